"""The thin core under the tenfold packages.

Public modules: `device`, `run`, `cli`, `plots`, `errors`, `data`, `metrics`, `testing`. Importing
`shared_core` itself imports none of them, so it costs nothing beyond Python.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"

"""EDGE: multi-label out-of-distribution detection by energy-gap expansion."""

__version__ = "0.1.0"

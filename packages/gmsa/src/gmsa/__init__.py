"""GMSA: context compression for language models by group merging and layer semantic alignment."""

__version__ = "0.1.0"

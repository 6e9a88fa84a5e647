"""Generic diffusion feature: any activation of any diffusion backbone as a dense image feature."""

__version__ = "0.1.0"

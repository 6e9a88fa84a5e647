"""LEDE: lossless self-speculative decoding whose exit layer and draft length are chosen by a small learned policy."""

__version__ = "0.1.0"

"""Focal-SAM and its family: sharpness-aware training for long-tailed data."""

__version__ = "0.1.0"

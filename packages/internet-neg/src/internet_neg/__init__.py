"""InterNeg: zero-shot out-of-distribution detection for CLIP-like models with inter-modal negative texts."""

__version__ = "0.1.0"

"""ABKD: knowledge distillation with the alpha-beta-divergence, at real vocabulary sizes."""

__version__ = "0.1.0"

"""Bridge-Garden: hybrid hard- and soft-label distillation of language models, and measures of exposure bias."""

__version__ = "0.1.0"

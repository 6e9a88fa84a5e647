"""OpenworldAUC: one threshold-free number for open-world classification, and the prompt tuning (GMoP) that optimises it."""

__version__ = "0.1.0"

"""ABKD: knowledge distillation with the alpha-beta-divergence, at real vocabulary sizes.

The divergences (`ab_divergence`, `divergence`) and the objectives made of them (`distillation_loss`
on logits, `fused_linear_ab_divergence` on hidden states) need torch alone. Beside them:
`abkd.trainer` on transformers, `abkd.vision`, `abkd.sparse`, `abkd.evaluation`, `abkd.presets`.
"""

from abkd.divergence import ab_divergence, ab_divergence_from_log_probs
from abkd.divergence import divergence as divergence
from abkd.fused import fused_linear_ab_divergence
from abkd.objective import (
    ABDivergenceLoss,
    DistillationOutput,
    WeightFunction,
    distillation_loss,
)
from abkd.statistics import TokenStatistics
from abkd.terms import DIVERGENCES, Terms, divergence_terms
from abkd.vocab import VocabularyMismatchError, align_vocab

__all__ = [
    "DIVERGENCES",
    "ABDivergenceLoss",
    "DistillationOutput",
    "Terms",
    "TokenStatistics",
    "VocabularyMismatchError",
    "WeightFunction",
    "ab_divergence",
    "ab_divergence_from_log_probs",
    "align_vocab",
    "distillation_loss",
    "divergence",
    "divergence_terms",
    "fused_linear_ab_divergence",
]

__version__ = "0.1.0"

"""Bridge-Garden: hybrid hard- and soft-label distillation of language models, and exposure bias.

The losses (`hybrid_loss`, `fused_hybrid_loss`), their weights and the measures need torch and abkd.
Beside them: `bridge_garden.trainer` on transformers, `bridge_garden.ledger`, `bridge_garden.cost`,
`bridge_garden.presets`.
"""

from bridge_garden.annotate import Annotation, annotate
from bridge_garden.exposure import ExposureReport, exposure_bias, exposure_from_losses
from bridge_garden.hybrid import HybridOutput, fused_hybrid_loss, hybrid_loss
from bridge_garden.kappa import Decomposition, Split, exact_decomposition, exact_kappa, split
from bridge_garden.kappa_mc import KappaEstimate, kappa_mc
from bridge_garden.risk import Risk, risk_penalty
from bridge_garden.weights import (
    Confidence,
    Curriculum,
    Entropy,
    Product,
    Reversed,
    Static,
    StepInfo,
    Weight,
    WeightedSoftLabels,
    weight_from_string,
)

__all__ = [
    "Annotation",
    "Confidence",
    "Curriculum",
    "Decomposition",
    "Entropy",
    "ExposureReport",
    "HybridOutput",
    "KappaEstimate",
    "Product",
    "Reversed",
    "Risk",
    "Split",
    "Static",
    "StepInfo",
    "Weight",
    "WeightedSoftLabels",
    "annotate",
    "exact_decomposition",
    "exact_kappa",
    "exposure_bias",
    "exposure_from_losses",
    "fused_hybrid_loss",
    "hybrid_loss",
    "kappa_mc",
    "risk_penalty",
    "split",
    "weight_from_string",
]

__version__ = "0.1.0"

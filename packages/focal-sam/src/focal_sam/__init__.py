"""Focal-SAM and its family: sharpness-aware training for long-tailed data.

The methods (`FocalSAM`, `SAM`, `ASAM`, `ImbSAM`, `CCSAM`) compute gradients and leave optimizer,
scheduler and scaler to you. Beside them: `focal_sam.losses`, `focal_sam.data`, `focal_sam.metrics`,
`focal_sam.models`, `focal_sam.analysis`, `focal_sam.presets`, and the bridges `focal_sam.hf` and
`focal_sam.lightning`.
"""

from focal_sam.ccsam import CCSAM
from focal_sam.methods import ASAM, SAM, FocalSAM, ImbSAM
from focal_sam.optimizer import SAMOptimizer
from focal_sam.schedule import LinearRho, RhoScheduler, StepRho
from focal_sam.sharpness import SharpnessMethod, StepResult
from focal_sam.weights import ClassWeights, FocalWeights, suggest_gamma, tail_weights

__all__ = [
    "ASAM",
    "CCSAM",
    "SAM",
    "ClassWeights",
    "FocalSAM",
    "FocalWeights",
    "ImbSAM",
    "LinearRho",
    "RhoScheduler",
    "SAMOptimizer",
    "SharpnessMethod",
    "StepResult",
    "StepRho",
    "suggest_gamma",
    "tail_weights",
]

__version__ = "0.1.0"

"""OpenworldAUC: one number for open-world classification, and prompt tuning (GMoP) for it.

The metric needs torch only: `openworld_auc`, `openworld_report`, `openworld_auc_ci`,
`compare_openworld_auc`, and the torchmetrics classes `OpenworldAUC` and `OpenworldMetrics`. The
prompt tuning is `GMoP` with `GMoPTrainer`, on open_clip and Hugging Face CLIP models.
"""

from typing import TYPE_CHECKING, Any

from openworld_auc.binned import openworld_auc_binned
from openworld_auc.gmop import GMoP, GMoPConfig, GMoPOutput
from openworld_auc.intervals import compare_openworld_auc, openworld_auc_ci
from openworld_auc.losses import GatedPairwiseAUCLoss, gated_pairwise_auc_loss
from openworld_auc.partition import Partition, pseudo_partition
from openworld_auc.presets import load_preset
from openworld_auc.prompts import PromptLearner
from openworld_auc.ranking import openworld_auc, openworld_auc_score, openworld_curve
from openworld_auc.report import OpenworldReport, fit_threshold, openworld_report
from openworld_auc.train import GMoPTrainer

if TYPE_CHECKING:
    from openworld_auc.metric import OpenworldAUC, OpenworldMetrics

__all__ = [
    "GMoP",
    "GMoPConfig",
    "GMoPOutput",
    "GMoPTrainer",
    "GatedPairwiseAUCLoss",
    "OpenworldAUC",
    "OpenworldMetrics",
    "OpenworldReport",
    "Partition",
    "PromptLearner",
    "compare_openworld_auc",
    "fit_threshold",
    "gated_pairwise_auc_loss",
    "load_preset",
    "openworld_auc",
    "openworld_auc_binned",
    "openworld_auc_ci",
    "openworld_auc_score",
    "openworld_curve",
    "openworld_report",
    "pseudo_partition",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in ("OpenworldAUC", "OpenworldMetrics"):
        from openworld_auc import metric

        return getattr(metric, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

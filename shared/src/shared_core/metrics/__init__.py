"""Metrics that several of the methods report: OOD detection, class groups, segmentation, text.

Functions score what they are given. The classes `OODMetrics`, `ShotAccuracy` and
`SegmentationMetrics` are `torchmetrics.Metric`: they accumulate over batches and merge over
processes. They are imported on first use, because torchmetrics takes seconds to import.
"""

from typing import TYPE_CHECKING, Any

from shared_core.metrics.groups import shot_groups
from shared_core.metrics.ood import aupr_in, aupr_out, auroc, fpr_at_recall, ood_metrics
from shared_core.metrics.segmentation import (
    class_iou,
    confusion_matrix,
    mean_iou,
    segmentation_metrics,
)
from shared_core.metrics.text import (
    exact_match,
    normalize_answer,
    rouge_l,
    sub_exact_match,
    token_accuracy,
    token_f1,
)

if TYPE_CHECKING:
    from shared_core.metrics._stateful import OODMetrics, SegmentationMetrics, ShotAccuracy

__all__ = [
    "OODMetrics",
    "SegmentationMetrics",
    "ShotAccuracy",
    "aupr_in",
    "aupr_out",
    "auroc",
    "class_iou",
    "confusion_matrix",
    "exact_match",
    "fpr_at_recall",
    "mean_iou",
    "normalize_answer",
    "ood_metrics",
    "rouge_l",
    "segmentation_metrics",
    "shot_groups",
    "sub_exact_match",
    "token_accuracy",
    "token_f1",
]


def __getattr__(name: str) -> Any:
    if name in ("OODMetrics", "SegmentationMetrics", "ShotAccuracy"):
        from shared_core.metrics import _stateful

        return getattr(_stateful, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

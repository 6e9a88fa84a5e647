"""The metrics as `torchmetrics.Metric`: accumulate over batches, merge over processes.

A module of its own because torchmetrics takes seconds to import; the functions beside it do not
need it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from shared_core.errors import InputError
from shared_core.metrics.groups import shot_groups
from shared_core.metrics.ood import Rule, check_rule, ood_metrics
from shared_core.metrics.segmentation import (
    check_label_maps,
    confusion_matrix,
    float_type,
    segmentation_metrics,
)

__all__ = ["OODMetrics", "SegmentationMetrics", "ShotAccuracy"]


class OODMetrics(Metric):
    """OOD detection metrics over batches; exact, because all scores are kept.

    `compute` gives what `shared_core.metrics.ood_metrics` gives, as 0-dimensional tensors.

    Args:
        rule: The threshold rule of both false-positive rates; see
            `shared_core.metrics.fpr_at_recall`.
        kwargs: Of `torchmetrics.Metric`.

    Raises:
        InputError: If `rule` is unknown; on `update` if the shapes do not match; on `compute` if
            there are no ID or no OOD scores, or one is NaN.

    Examples:
        >>> from shared_core.metrics import OODMetrics
        >>> metric = OODMetrics()
        >>> metric.update(torch.tensor([3.0, 1.0]), torch.tensor([False, True]))
        >>> metric.update(torch.tensor([2.0, 0.0]), torch.tensor([False, True]))
        >>> metric.compute()["auroc"]
        tensor(1., dtype=torch.float64)
    """

    is_differentiable = False
    full_state_update = False
    scores: list[Tensor]
    is_ood: list[Tensor]

    def __init__(self, *, rule: Rule = "at_least", **kwargs: Any) -> None:
        check_rule(rule)
        super().__init__(**kwargs)
        self.rule = rule
        self.add_state("scores", [], dist_reduce_fx="cat")
        self.add_state("is_ood", [], dist_reduce_fx="cat")

    def update(self, scores: Float[Tensor, "batch"], is_ood: Bool[Tensor, "batch"]) -> None:
        """Add a batch.

        Args:
            scores: ID scores, higher means more in-distribution, shape [batch].
            is_ood: Whether each sample is out-of-distribution, bool, shape [batch].
        """
        if scores.ndim != 1 or scores.shape != is_ood.shape or is_ood.dtype != torch.bool:
            raise InputError(
                f"scores have shape {list(scores.shape)}, is_ood has shape {list(is_ood.shape)} "
                f"and dtype {is_ood.dtype}; accepted: [n] and [n], is_ood of dtype bool"
            )
        # One dtype for all, which holds any score exactly, so that processes can exchange them.
        self.scores.append(scores.detach().to(float_type(scores)))
        self.is_ood.append(is_ood)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the scores of all processes; `compute` calls this."""
        if not self.scores:  # torchmetrics would send an empty tensor of another dtype
            dtype = float_type(torch.empty(0, device=self.device))
            self.scores.append(torch.empty(0, dtype=dtype, device=self.device))
            self.is_ood.append(torch.empty(0, dtype=torch.bool, device=self.device))
        super().sync(*args, **kwargs)

    def compute(self) -> dict[str, Tensor]:
        """The metrics of all batches of all processes."""
        scores, is_ood = dim_zero_cat(self.scores), dim_zero_cat(self.is_ood)
        values = ood_metrics(scores[~is_ood], scores[is_ood], rule=self.rule)
        return {
            key: torch.tensor(
                value,
                dtype=torch.long if isinstance(value, int) else scores.dtype,
                device=scores.device,
            )
            for key, value in values.items()
        }


class ShotAccuracy(Metric):
    """Accuracy of a long-tailed classifier: overall, and by training frequency of the classes.

    Classes are grouped by their TRAINING counts (`shared_core.metrics.shot_groups`), while
    accuracy is measured on the samples given to `update`. Classes without test samples are left out
    of all means; a value over no class at all is NaN.

    `compute` gives 0-dimensional tensors in [0, 1]:

    - ``overall``: top-1 accuracy over all samples;
    - ``many``, ``medium``, ``few``: mean recall of the group's classes;
    - ``balanced``: mean recall of all classes;
    - ``worst_class``: the lowest recall of a class;
    - ``harmonic_mean``: harmonic mean of the group values that exist.

    Args:
        train_counts: Training samples of each class.
        many: Edge of the many-shot group.
        few: Edge of the few-shot group.
        many_inclusive: Whether a class with exactly `many` samples is many-shot.
        few_inclusive: Whether a class with exactly `few` samples is few-shot.
        kwargs: Of `torchmetrics.Metric`.

    Attributes:
        groups: The classes of each group.

    Raises:
        InputError: As `shared_core.metrics.shot_groups`; on `update` if the shapes do not match
            or a class index is out of range.

    Examples:
        >>> from shared_core.metrics import ShotAccuracy
        >>> metric = ShotAccuracy([500, 50, 5])
        >>> metric.update(torch.tensor([0, 0, 1, 0]), torch.tensor([0, 0, 1, 2]))
        >>> {key: round(value.item(), 3) for key, value in metric.compute().items()}
        {'overall': 0.75, 'many': 1.0, 'medium': 1.0, 'few': 0.0, 'balanced': 0.667,
         'worst_class': 0.0, 'harmonic_mean': 0.0}
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    correct: Tensor
    total: Tensor
    membership: Tensor

    def __init__(
        self,
        train_counts: Sequence[int] | Int[Tensor, "classes"],
        *,
        many: int = 100,
        few: int = 20,
        many_inclusive: bool = False,
        few_inclusive: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.groups = shot_groups(
            train_counts,
            many=many,
            few=few,
            many_inclusive=many_inclusive,
            few_inclusive=few_inclusive,
        )
        self.num_classes = len(train_counts)
        membership = torch.zeros(len(self.groups), self.num_classes, dtype=torch.bool)
        for row, classes in zip(membership, self.groups.values(), strict=True):
            row[classes] = True
        self.register_buffer("membership", membership, persistent=False)
        zeros = torch.zeros(self.num_classes, dtype=torch.long)
        self.add_state("correct", zeros, dist_reduce_fx="sum")
        self.add_state("total", zeros.clone(), dist_reduce_fx="sum")

    def update(
        self,
        preds: Float[Tensor, "batch classes"] | Int[Tensor, "batch"],
        target: Int[Tensor, "batch"],
    ) -> None:
        """Add a batch.

        Args:
            preds: Class scores [batch, classes], of which the largest counts, or class indices
                [batch].
            target: True class indices [batch].
        """
        check_label_maps(preds, target, self.num_classes, None)
        labels = preds.argmax(1) if preds.is_floating_point() else preds
        self.total += torch.bincount(target, minlength=self.num_classes)
        self.correct += torch.bincount(target[labels == target], minlength=self.num_classes)

    def per_class(self) -> Float[Tensor, "classes"]:
        """Recall of each class over this process's batches; NaN for classes without samples."""
        return self.correct.to(float_type(self.correct)) / self.total

    def compute(self) -> dict[str, Tensor]:
        """The accuracies over all batches of all processes."""
        recall = self.per_class()
        outside = torch.full_like(recall, torch.nan)
        groups = torch.where(self.membership, recall, outside).nanmean(dim=1)
        lowest = recall.nan_to_num(nan=torch.inf).min()
        exists = ~groups.isnan()
        return {
            "overall": self.correct.sum() / self.total.sum().to(recall.dtype),
            **dict(zip(self.groups, groups.unbind(), strict=True)),
            "balanced": recall.nanmean(),
            "worst_class": torch.where(lowest.isinf(), torch.nan, lowest),
            "harmonic_mean": exists.sum() / torch.where(exists, 1 / groups, 0.0).sum(),
        }


class SegmentationMetrics(Metric):
    """Mean IoU, pixel accuracy and mean class accuracy over batches of label maps.

    `compute` gives what `shared_core.metrics.segmentation_metrics` gives for the pooled pixels.

    Args:
        num_classes: Number of classes.
        ignore_index: Target value of pixels that do not count, such as 255.
        kwargs: Of `torchmetrics.Metric`.

    Attributes:
        confusion: The pooled confusion matrix of this process, true class by predicted class.

    Raises:
        InputError: On `update`, as `shared_core.metrics.confusion_matrix`.

    Examples:
        >>> from shared_core.metrics import SegmentationMetrics
        >>> metric = SegmentationMetrics(2, ignore_index=255)
        >>> metric.update(torch.tensor([[0, 1, 1]]), torch.tensor([[0, 0, 255]]))
        >>> metric.compute()["miou"]
        tensor(0.2500, dtype=torch.float64)
    """

    is_differentiable = False
    full_state_update = False
    confusion: Tensor

    def __init__(self, num_classes: int, *, ignore_index: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        empty = torch.zeros(num_classes, num_classes, dtype=torch.long)
        self.add_state("confusion", empty, dist_reduce_fx="sum")

    def update(
        self,
        preds: Float[Tensor, "batch classes *space"] | Int[Tensor, "batch *space"],
        target: Int[Tensor, "batch *space"],
    ) -> None:
        """Add a batch.

        Args:
            preds: Class scores [batch, classes, ...] or class indices [batch, ...].
            target: True class indices [batch, ...].
        """
        self.confusion += confusion_matrix(
            preds, target, self.num_classes, ignore_index=self.ignore_index
        )

    def compute(self) -> dict[str, Tensor]:
        """The metrics over all batches of all processes."""
        return segmentation_metrics(self.confusion, ignore_index=self.ignore_index)

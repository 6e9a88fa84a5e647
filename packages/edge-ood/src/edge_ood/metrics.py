"""How well a multi-label classifier works, and along the label frequency, where its detector fails.

Detection metrics themselves are shared_core's; all values here are fractions, not percent.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from edge_ood.loss import check_targets
from shared_core.errors import InputError
from shared_core.metrics import ood_metrics

__all__ = [
    "COCO_GRID",
    "VOC_GRID",
    "average_precisions",
    "bucket_report",
    "frequency_order",
    "multilabel_map",
    "tail_curve",
]

VOC_GRID = (0, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19)
COCO_GRID = (*range(11), 20, 40, 60)  # NUS-WIDE as well
_ROWS = 65536

Counts = Sequence[int] | Tensor
Rule = Literal["nearest", "at_least"]


def average_precisions(
    logits: Float[Tensor, "N C"],
    targets: Float[Tensor, "N C"],
    ap: Literal["step", "trapezoid"] = "step",
) -> Float[Tensor, " C"]:
    """Average precision of each class, float64; NaN for a class without positives.

    Args:
        logits: Scores, of which only the order within a class counts, ``[N, C]``.
        targets: Labels, 0 or 1, ``[N, C]``.
        ap: ``step`` sums precision over recall steps, as scikit-learn and torchmetrics do.
            ``trapezoid`` is the area under the precision-recall points that the JointEnergy and
            EDGE code report, which is optimistic.

    Raises:
        InputError: If shapes do not fit, a score is NaN, or `ap` is not known.

    Examples:
        >>> average_precisions(torch.tensor([[3.0], [2.0], [1.0]]), torch.tensor([[1.0], [0], [1]]))
        tensor([0.8333], dtype=torch.float64)
    """
    if ap not in ("step", "trapezoid"):
        raise InputError(f"ap is {ap!r}; accepted: 'step', 'trapezoid'")
    check_targets(logits, targets)
    if logits.isnan().any():
        raise InputError(f"{int(logits.isnan().sum())} logits are NaN, which cannot be ranked")
    step, trapezoid = precision_areas(logits, targets > 0.5)
    return step if ap == "step" else trapezoid


def precision_areas(
    logits: Float[Tensor, "N C"], positive: Bool[Tensor, "N C"]
) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"]]:
    """Step-wise and trapezoid area under each class's precision-recall curve, from one sort.

    Recall rises at the positives alone, by one part each. There the curve comes from the precision
    of all samples scored higher, and goes to that of all scored at least as high.

    Examples:
        >>> precision_areas(torch.tensor([[3.0], [2.0]]), torch.tensor([[False], [True]]))
        (tensor([0.5000], dtype=torch.float64), tensor([0.2500], dtype=torch.float64))
    """
    n, step, trapezoid = len(logits), [], []
    # Class by class: the indices that a sort of all at once makes are twice as large as the logits.
    for column, chosen in zip(logits.T, positive.T, strict=True):
        scores = column.sort().values
        own = column[chosen].sort().values
        if not len(own):
            step.append(math.nan)
            trapezoid.append(math.nan)
            continue
        reached, before = (
            ((len(own) - _rank(own, own, right)) / (n - _rank(scores, own, right)))
            for right in (False, True)
        )
        before = before.nan_to_num(1.0)  # 0 / 0: the curve begins at precision 1
        step.append(float(reached.mean()))
        trapezoid.append(float((reached + before).mean() / 2))
    return torch.tensor(step, dtype=torch.float64), torch.tensor(trapezoid, dtype=torch.float64)


def _rank(ordered: Tensor, values: Tensor, right: bool) -> Tensor:
    return torch.searchsorted(ordered, values, right=right).cpu().double()


def multilabel_map(
    logits: Float[Tensor, "N C"],
    targets: Float[Tensor, "N C"],
    ap: Literal["step", "trapezoid"] = "step",
) -> float:
    """Mean average precision over the classes that have positives.

    Classes without positives are left out of the mean, with a warning that says how many.

    Args:
        logits: See `average_precisions`.
        targets: See `average_precisions`.
        ap: See `average_precisions`.

    Raises:
        InputError: As `average_precisions`; also if no class has a positive.

    Examples:
        >>> multilabel_map(torch.tensor([[3.0], [2.0], [1.0]]), torch.tensor([[1.0], [0], [1]]))
        0.8333333333333333
    """
    values = average_precisions(logits, targets, ap)
    found = values[~values.isnan()]
    if not len(found):
        raise InputError("no class has a positive label, so there is no average precision")
    if len(found) < len(values):
        warnings.warn(
            f"{len(values) - len(found)} of {len(values)} classes have no positive label; "
            "they are left out of the mean average precision",
            stacklevel=2,
        )
    return float(found.mean())


def frequency_order(class_counts: Counts) -> list[int]:
    """Classes from the most frequent to the rarest; equal ones by index.

    Examples:
        >>> frequency_order([5, 50, 20])
        [1, 2, 0]
    """
    counts = torch.as_tensor(class_counts)
    return counts.argsort(descending=True, stable=True).tolist()


def tail_curve(
    id_scores: Float[Tensor, " n"],
    targets: Shaped[Tensor, "n C"],
    ood_scores: Float[Tensor, " m"],
    *,
    class_counts: Counts | None = None,
    order_by: Literal["train", "eval"] = "train",
    grid: Sequence[int] | None = None,
    rule: Rule = "nearest",
    include_unlabelled: bool = False,
) -> list[dict[str, Any]]:
    """OOD metrics of the ID samples that hold none of the j most frequent classes, over j.

    Args:
        id_scores: Scores of ID samples, high = ID, ``[n]``.
        targets: Their labels, 0 or 1, ``[n, C]``.
        ood_scores: Scores of all OOD samples, ``[m]``.
        class_counts: TRAINING samples of each class, which give the order of classes.
        order_by: ``train``, or ``eval`` for the published protocol, which orders the classes by
            their frequency in `targets` itself.
        grid: Values of j; by default eleven from 0 to C - 1. `VOC_GRID` and `COCO_GRID` are the
            published ones.
        rule: See `shared_core.metrics.ood_metrics`.
        include_unlabelled: Samples without any label would be counted as tail; by default they are
            left out.

    Returns:
        For each j of the grid: ``j``, ``n`` (ID samples), and the metrics, which are ``None`` where
        no ID sample is left (with a warning).

    Raises:
        InputError: If lengths do not fit, `class_counts` is missing, or a j is out of range.

    Examples:
        >>> labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> curve = tail_curve(torch.tensor([3.0, 1.0]), labels, torch.tensor([2.0]),
        ...                    class_counts=[10, 1], grid=[0, 1])
        >>> [(row["j"], row["n"], row["auroc"]) for row in curve]
        [(0, 2, 0.5), (1, 1, 0.0)]
    """
    labels = _check_rows(id_scores, targets)
    order = _order(labels, class_counts, order_by)
    classes = labels.shape[1]
    if grid is None:
        grid = sorted({round(i * (classes - 1) / 10) for i in range(11)})
    if any(not 0 <= j < max(classes, 1) for j in grid):
        raise InputError(f"grid={list(grid)}; every j has to lie in [0, {classes - 1}]")
    keep = torch.ones(len(labels), dtype=torch.bool) if include_unlabelled else labels.any(1)
    _note_unlabelled(keep)
    first = _most_frequent(labels, order)
    rows = []
    for j in grid:
        chosen = keep & (first >= j)
        rows.append({"j": j, **_metrics(id_scores[chosen.to(id_scores.device)], ood_scores, rule)})
    empty = [row["j"] for row in rows if row["n"] == 0]
    if empty:
        warnings.warn(f"no ID sample is left for j = {empty}", stacklevel=2)
    return rows


def bucket_report(
    id_scores: Float[Tensor, " n"],
    targets: Shaped[Tensor, "n C"],
    ood_scores: Float[Tensor, " m"],
    *,
    class_counts: Counts | None = None,
    order_by: Literal["train", "eval"] = "train",
    rule: Rule = "nearest",
) -> dict[str, dict[str, Any]]:
    """OOD metrics of head, medium and tail samples against all OOD samples.

    A sample belongs to the bucket of its most frequent label; the buckets are thirds of the ranking
    of classes. Samples without a label belong to none.

    Args:
        id_scores: See `tail_curve`, as all that follow.
        targets: Labels.
        ood_scores: Scores of all OOD samples.
        class_counts: Training samples of each class.
        order_by: ``train`` or ``eval``.
        rule: See `shared_core.metrics.ood_metrics`.

    Returns:
        For ``head``, ``medium`` and ``tail``: ``n`` and the metrics, ``None`` for an empty bucket.

    Examples:
        >>> report = bucket_report(torch.tensor([3.0, 1.0]), torch.eye(3)[[0, 2]],
        ...                        torch.tensor([2.0]), class_counts=[10, 5, 1])
        >>> {name: (row["n"], row["auroc"]) for name, row in report.items()}
        {'head': (1, 1.0), 'medium': (0, None), 'tail': (1, 0.0)}
    """
    labels = _check_rows(id_scores, targets)
    bucket = sample_buckets(labels, class_counts, order_by)
    return {
        name: _metrics(id_scores[(bucket == i).to(id_scores.device)], ood_scores, rule)
        for i, name in enumerate(("head", "medium", "tail"))
    }


def sample_buckets(
    labels: Tensor, class_counts: Counts | None, order_by: Literal["train", "eval"] = "train"
) -> Tensor:
    """The bucket of each sample: 0 head, 1 medium, 2 tail, -1 without a label; ``[n]``.

    Examples:
        >>> sample_buckets(torch.eye(3, dtype=torch.bool), [1, 10, 5])
        tensor([2, 0, 1])
    """
    labels = labels.cpu() > 0.5 if labels.is_floating_point() else labels.cpu()
    order = _order(labels, class_counts, order_by)
    classes = len(order)
    first = _most_frequent(labels, order)
    bucket = torch.where(first < round(classes / 3), 0, 1)
    bucket = torch.where(first >= round(2 * classes / 3), 2, bucket)
    return torch.where(labels.any(1), bucket, -1)


def _most_frequent(labels: Tensor, order: list[int]) -> Tensor:
    """The place in `order` of each sample's most frequent label; C without a label."""
    # In chunks, so that many rows are not copied at once.
    first = [part[:, order].to(torch.uint8).argmax(1) for part in torch.split(labels, _ROWS)]
    return torch.where(labels.any(1), torch.cat(first), len(order))


def _check_rows(id_scores: Tensor, targets: Tensor) -> Tensor:
    if targets.ndim != 2 or id_scores.ndim != 1 or len(id_scores) != len(targets):
        raise InputError(
            f"id_scores have shape {list(id_scores.shape)}, targets {list(targets.shape)}; "
            "accepted: [n] and [n, C]"
        )
    return targets.cpu() if targets.dtype == torch.bool else targets.cpu() > 0.5


def _order(labels: Tensor, class_counts: Counts | None, order_by: str) -> list[int]:
    if order_by not in ("train", "eval"):
        raise InputError(f"order_by is {order_by!r}; accepted: 'train', 'eval'")
    if order_by == "eval":
        return frequency_order(labels.sum(0))
    if class_counts is None:
        raise InputError(
            "class_counts is missing: give the training samples of each class, or "
            "order_by='eval' to order classes by the evaluated labels"
        )
    if len(class_counts) != labels.shape[1]:
        raise InputError(f"{len(class_counts)} class_counts for {labels.shape[1]} classes")
    return frequency_order(class_counts)


def _note_unlabelled(keep: Tensor) -> None:
    missing = int((~keep).sum())
    if missing:
        warnings.warn(
            f"{missing} ID samples have no label; the tail curve leaves them out", stacklevel=3
        )


def _metrics(id_scores: Tensor, ood_scores: Tensor, rule: Rule) -> dict[str, Any]:
    if len(id_scores) == 0:
        names = ("fpr95", "auroc", "aupr_in", "aupr_out", "fpr95_ood_positive")
        return {"n": 0, **dict.fromkeys(names)}
    found: Mapping[str, Any] = ood_metrics(id_scores, ood_scores, rule=rule)
    return {"n": found["n_id"], **{k: v for k, v in found.items() if not k.startswith("n_")}}

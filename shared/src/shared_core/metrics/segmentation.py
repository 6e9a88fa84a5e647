"""Semantic segmentation: mean intersection over union and accuracies from a confusion matrix.

All values are those of the whole data set, as ADE20K and Cityscapes report them: pixels are pooled
over images before dividing. (torchmetrics' `MeanIoU` averages over images instead.)
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from shared_core.errors import InputError

__all__ = ["class_iou", "confusion_matrix", "mean_iou", "segmentation_metrics"]


def confusion_matrix(
    preds: Float[Tensor, "batch classes *space"] | Int[Tensor, "batch *space"],
    target: Int[Tensor, "batch *space"],
    num_classes: int,
    *,
    ignore_index: int | None = None,
) -> Int[Tensor, "{num_classes} {num_classes}"]:
    """Count pixels by true class (row) and predicted class (column).

    Args:
        preds: Class scores [batch, classes, ...], of which the largest counts, or class indices
            [batch, ...].
        target: True class indices [batch, ...].
        num_classes: Number of classes C.
        ignore_index: Target value of pixels that do not count, such as 255.

    Raises:
        InputError: If the shapes do not match or an index that counts is not in 0..C-1.

    Examples:
        >>> confusion_matrix(torch.tensor([[0, 1, 1]]), torch.tensor([[0, 0, 1]]), 2)
        tensor([[1, 1],
                [0, 1]])
    """
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    check_label_maps(preds, target, num_classes, ignore_index)
    matrix: Tensor = multiclass_confusion_matrix(
        preds, target, num_classes, ignore_index=ignore_index, validate_args=False
    )
    return matrix


def class_iou(
    confusion: Int[Tensor, "classes classes"], *, ignore_index: int | None = None
) -> Float[Tensor, "classes"]:
    """Intersection over union of each class: TP / (TP + FP + FN).

    Args:
        confusion: Pixel counts, true class by predicted class; see `confusion_matrix`.
        ignore_index: The ignored target value; if it is one of the classes, its IoU is NaN.

    Returns:
        IoU in [0, 1], float64; NaN for a class that neither occurs nor is predicted.

    Examples:
        >>> class_iou(torch.tensor([[2, 1, 0], [0, 1, 0], [0, 0, 0]]))
        tensor([0.6667, 0.5000,    nan], dtype=torch.float64)
    """
    counts = confusion.to(float_type(confusion))
    hits = counts.diagonal()
    iou = hits / (counts.sum(0) + counts.sum(1) - hits)
    if ignore_index is not None and 0 <= ignore_index < len(iou):
        iou[ignore_index] = torch.nan
    return iou


def segmentation_metrics(
    confusion: Int[Tensor, "classes classes"], *, ignore_index: int | None = None
) -> dict[str, Tensor]:
    """Mean IoU, pixel accuracy and mean class accuracy of a confusion matrix.

    Args:
        confusion: Pixel counts, true class by predicted class; see `confusion_matrix`.
        ignore_index: The ignored target value; if it is one of the classes, that class is left
            out of the means.

    Returns:
        0-dimensional tensors in [0, 1] under ``miou`` (mean over the classes that occur or are
        predicted), ``pixel_accuracy`` (fraction of right pixels) and ``mean_accuracy`` (mean recall
        of the classes that occur); NaN if no pixel counts.

    Examples:
        >>> values = segmentation_metrics(torch.tensor([[2, 1], [0, 1]]))
        >>> {key: round(value.item(), 4) for key, value in values.items()}
        {'miou': 0.5833, 'pixel_accuracy': 0.75, 'mean_accuracy': 0.8333}
    """
    counts = confusion.to(float_type(confusion))
    hits = counts.diagonal()
    return {
        "miou": class_iou(confusion, ignore_index=ignore_index).nanmean(),
        "pixel_accuracy": hits.sum() / counts.sum(),
        "mean_accuracy": (hits / counts.sum(1)).nanmean(),
    }


def mean_iou(
    preds: Float[Tensor, "batch classes *space"] | Int[Tensor, "batch *space"],
    target: Int[Tensor, "batch *space"],
    num_classes: int,
    *,
    ignore_index: int | None = None,
) -> Float[Tensor, ""]:
    """Mean intersection over union of one prediction, over the classes that occur in it.

    Args:
        preds: Class scores [batch, classes, ...] or class indices [batch, ...].
        target: True class indices [batch, ...].
        num_classes: Number of classes.
        ignore_index: Target value of pixels that do not count, such as 255.

    Raises:
        InputError: As `confusion_matrix`.

    Examples:
        >>> mean_iou(torch.tensor([[0, 1, 1]]), torch.tensor([[0, 0, 255]]), 2, ignore_index=255)
        tensor(0.2500, dtype=torch.float64)
    """
    confusion = confusion_matrix(preds, target, num_classes, ignore_index=ignore_index)
    return segmentation_metrics(confusion, ignore_index=ignore_index)["miou"]


def check_label_maps(
    preds: Tensor, target: Tensor, num_classes: int, ignore_index: int | None
) -> None:
    """Refuse label maps that do not fit together, or class indices out of range."""
    scores = preds.is_floating_point()
    expected = (target.shape[0], num_classes, *target.shape[1:]) if scores else target.shape
    if preds.shape != expected:
        raise InputError(
            f"preds have shape {list(preds.shape)} and target {list(target.shape)}; accepted: "
            f"class scores of shape {[target.shape[0], num_classes, *target.shape[1:]]}, or class "
            "indices of the target's shape"
        )
    counted = None if ignore_index is None else target != ignore_index
    for name, labels in (("target", target),) if scores else (("target", target), ("preds", preds)):
        values = labels if counted is None else labels[counted]
        if values.numel() == 0:
            continue
        low, high = (int(value) for value in values.aminmax())
        if low < 0 or high >= num_classes:
            wrong = low if low < 0 else high
            raise InputError(
                f"{name} holds the class {wrong}; accepted: 0 to {num_classes - 1}"
                + ("" if ignore_index is None else f", and {ignore_index} in target to ignore")
            )


def float_type(like: Tensor) -> torch.dtype:
    """The float dtype that counts are divided in: float64 where the device has it."""
    return torch.float32 if like.device.type == "mps" else torch.float64

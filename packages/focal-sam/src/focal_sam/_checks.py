"""Checks of arguments that several modules make."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from shared_core.errors import InputError

ClassCounts = Sequence[int] | Tensor


def check_nonnegative(**values: int | float) -> None:
    """Refuse numbers that are negative or not finite, naming the first one."""
    for name, value in values.items():
        if not math.isfinite(value) or value < 0:
            raise InputError(f"{name} is {value}; it must be finite and at least 0")


def check_choice(name: str, value: str, *accepted: str) -> None:
    """Refuse a word that is not one of those accepted."""
    if value not in accepted:
        raise InputError(f"{name} is {value!r}; accepted: {', '.join(map(repr, accepted))}")


def check_counts(
    class_counts: ClassCounts, allow_empty: bool | None = None
) -> Float[Tensor, " classes"]:
    """Take training samples per class to float64 on the CPU, refusing all that cannot be that.

    Args:
        class_counts: One count per class, ``[classes]``.
        allow_empty: Whether classes without samples are accepted. ``None`` means no, for callers
            that have no such option to recommend.
    """
    try:
        counts = torch.as_tensor(class_counts).detach().cpu().to(torch.float64, copy=True)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"class_counts is a {type(class_counts).__name__} that is no tensor ({error}); "
            "pass one number per class, such as [500, 50, 5]"
        ) from error
    if counts.ndim != 1 or counts.numel() == 0:
        raise InputError(
            f"class_counts has the shape {list(counts.shape)}; pass one number per class, "
            "such as [500, 50, 5]"
        )
    accepted = counts.isfinite() & (counts >= 1)
    if allow_empty:
        accepted |= counts == 0
    bad = (~accepted).nonzero()
    if bad.numel():
        index = int(bad[0])
        value = counts[index].item()
        hint = ""
        if allow_empty:
            hint = " or 0"
        elif value == 0 and allow_empty is False:
            hint = ", or pass allow_empty=True for classes that are never trained on"
        raise InputError(
            f"class_counts[{index}] is {value:g}; every class needs at least 1 training sample"
            f"{hint}"
        )
    if not counts.any():
        raise InputError("class_counts are all 0; at least one class needs training samples")
    return counts


def check_labels(target: Tensor, classes: int, *, on_device: bool = False) -> None:
    """Refuse integer labels outside ``[0, classes)``, naming one of them.

    Labels on an accelerator are left to its own assertions unless `on_device` says to wait for it.
    """
    if target.numel() == 0 or (target.device.type != "cpu" and not on_device):
        return
    low, high = (int(bound) for bound in target.aminmax())
    if low < 0 or high >= classes:
        raise IndexError(
            f"label {low if low < 0 else high} is outside [0, {classes}): "
            f"there are {classes} classes, counted from 0"
        )

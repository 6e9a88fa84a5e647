"""Checks of arguments that several modules make."""

import functools
import math
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from shared_core.errors import InputError

IGNORE_INDEX = -100
P = ParamSpec("P")
R = TypeVar("R")
_flagged: set[tuple[float, float]] = set()


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """Let torch.compile step around a function whose backward is written by hand."""

    @functools.wraps(function)
    def stepped_around(*args: P.args, **kwargs: P.kwargs) -> R:
        # Not `disable` itself as the decorator: that imports the compiler, seconds of it.
        if torch.compiler.is_compiling():
            disabled: Callable[P, R] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
            return disabled(*args, **kwargs)
        return function(*args, **kwargs)

    return stepped_around


def check_choice(name: str, value: object, *accepted: str) -> None:
    """Refuse a word that is not one of those accepted."""
    if value not in accepted:
        raise InputError(f"{name} is {value!r}; accepted: {', '.join(map(repr, accepted))}")


def check_exponents(alpha: float | Tensor, beta: float | Tensor) -> None:
    """Refuse exponents that are not finite; flag once those outside [0, 1]."""
    for name, value in (("alpha", alpha), ("beta", beta)):
        finite = value.isfinite().all() if isinstance(value, Tensor) else math.isfinite(value)
        if not finite:
            raise InputError(f"{name} is not finite ({value}); pass real numbers, such as 0.2")
    if isinstance(alpha, Tensor) or isinstance(beta, Tensor):
        return
    pair = (float(alpha), float(beta))
    if not all(0 <= value <= 1 for value in pair) and pair not in _flagged:
        _flagged.add(pair)
        warnings.warn(
            f"alpha={alpha:g}, beta={beta:g} lie outside [0, 1]: a defined divergence, but for "
            "negative exponents loss and gradient are unbounded",
            stacklevel=4,
        )


def check_temperature(temperature: float) -> None:
    """Refuse temperatures that are not positive and finite."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise InputError(f"temperature is {temperature}; it must be finite and above 0")


def check_chunk_size(chunk_size: int | str | None) -> None:
    """Refuse chunks of no rows."""
    if isinstance(chunk_size, int) and chunk_size < 1:
        raise InputError(f"chunk_size is {chunk_size}; a chunk holds at least 1 token")


def check_floating(**tensors: Tensor) -> None:
    """Refuse logits that are integers, which are mostly labels in the wrong place."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise InputError(
                f"{name} has dtype {tensor.dtype}; pass floating-point values (are these labels?)"
            )


def check_pair(student: Tensor, teacher: Tensor) -> None:
    """Refuse logits that do not belong together."""
    check_floating(student_logits=student, teacher_logits=teacher)
    if student.ndim < 1 or student.shape[-1] < 1:
        raise InputError(f"logits have shape {list(student.shape)}; they need a class dimension")
    if student.shape[:-1] != teacher.shape[:-1]:
        raise InputError(
            f"student_logits have shape {list(student.shape)} and teacher_logits "
            f"{list(teacher.shape)}; all but the last dimension have to be equal"
        )
    if student.shape[-1] != teacher.shape[-1]:
        raise InputError(
            f"the student has {student.shape[-1]} classes and the teacher {teacher.shape[-1]}; "
            "cut both to the shared vocabulary first (see abkd.align_vocab)"
        )
    if student.device != teacher.device:
        raise InputError(
            f"student_logits are on {student.device} and teacher_logits on {teacher.device}; "
            "move them to one device"
        )


def detached_teacher(tensor: Tensor, detach: bool) -> Tensor:
    """The teacher's tensor without its graph; refuse one that would want gradients."""
    if tensor.requires_grad and not detach:
        raise InputError(
            "the teacher's tensor requires gradients, which no divergence here gives it; compute "
            "it under torch.no_grad(), or pass detach_teacher=True"
        )
    return tensor.detach()


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether gradients are to be computed; warn where they would silently be lost."""
    required = any(t is not None and t.requires_grad for t in tensors)
    if torch.is_grad_enabled():
        return required
    if any(t is not None and t.requires_grad and not t.is_leaf for t in tensors):
        warnings.warn(
            "the student requires gradients but the loss is computed under torch.no_grad(); "
            "nothing will be trained",
            stacklevel=4,
        )
    return False


def as_rows(name: str, value: Tensor | None, shape: torch.Size) -> Tensor | None:
    """Flatten a per-token tensor after seeing that it has one entry per token."""
    if value is None:
        return None
    if value.shape != shape:
        raise InputError(
            f"{name} has shape {list(value.shape)}; with these logits it must be {list(shape)}"
        )
    return value.reshape(-1)


def check_labels(labels: Tensor, classes: int) -> None:
    """Refuse labels outside the vocabulary; on an accelerator its own assertions do."""
    if labels.is_floating_point():
        raise InputError(f"labels have dtype {labels.dtype}; they must be integer class indices")
    if labels.numel() == 0 or labels.device.type != "cpu":
        return
    low, high = (int(bound) for bound in labels.aminmax())
    if low < 0 or high >= classes:
        raise InputError(
            f"label {low if low < 0 else high} is outside [0, {classes}), the classes that student "
            f"and teacher share; mask such positions with {IGNORE_INDEX}"
        )


def warn_no_valid() -> None:
    """Say that a batch had nothing to learn from."""
    warnings.warn("no valid position in this batch: loss and gradients are 0", stacklevel=4)

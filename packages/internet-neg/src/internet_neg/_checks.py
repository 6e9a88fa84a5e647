"""What every function of the method asks of its embeddings."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from internet_neg.errors import InterNegError

__all__ = ["check_classnames", "check_embeddings", "check_same_width", "normalize", "widen"]


def widen(x: Tensor) -> Tensor:
    """Half precision as float32, where strict comparisons of cosines do not tie; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def normalize(x: Tensor) -> Tensor:
    """Rows of length one, in float32 or wider."""
    return F.normalize(widen(x), dim=-1)


def check_embeddings(name: str, x: Tensor, width: int | None = None) -> None:
    """Refuse what is not a matrix of finite, non-zero rows."""
    if x.ndim != 2 or not x.is_floating_point():
        raise InterNegError(
            f"{name} have shape {list(x.shape)} and dtype {x.dtype}; accepted: a floating-point "
            "matrix, one embedding a row"
        )
    if width is not None and x.shape[1] != width:
        raise InterNegError(
            f"{name} have {x.shape[1]} dimensions, but the class texts have {width}; "
            "all embeddings have to come from one model"
        )
    bad = ~x.isfinite().all(dim=1)
    if bad.any():
        raise InterNegError(
            f"{name} hold NaN or infinity, first in row {int(bad.nonzero()[0])}; "
            "look for broken images or half-precision overflow"
        )
    zero = (x == 0).all(dim=1)
    if zero.any():
        raise InterNegError(f"{name} hold a zero vector in row {int(zero.nonzero()[0])}")


def check_same_width(named: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse embeddings of different widths."""
    shapes = [(name, x) for name, x in named if x.numel()]
    for name, x in shapes[1:]:
        if x.shape[-1] != shapes[0][1].shape[-1]:
            raise InterNegError(
                f"{name} have {x.shape[-1]} dimensions, {shapes[0][0]} have "
                f"{shapes[0][1].shape[-1]}; all embeddings have to come from one model"
            )


def check_classnames(classnames: Sequence[str]) -> list[str]:
    """The names as a list, refused where one is blank or comes twice."""
    if isinstance(classnames, str) or not len(classnames):
        raise InterNegError("class names have to be a list of at least one string")
    names = list(classnames)
    for index, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise InterNegError(f"class name {index} is {name!r}; every class needs a name")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InterNegError(f"the class name {twice!r} comes twice; names have to differ")
    return names

"""Joining the parts of rows ([soft tokens | prompt | target]) without holes between them."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from shared_core.errors import InputError

__all__ = ["join_rows"]


def join_rows(
    parts: Sequence[tuple[Tensor, Tensor]], *, side: str = "right"
) -> tuple[Tensor, Bool[Tensor, "B s"]]:
    """Concatenate padded parts row by row, valid entries only, and pad once.

    A row's result is the same whatever rows are beside it, which is what makes a batch equal its
    rows run alone.

    Args:
        parts: Pairs of values ``[B, n_p, ...]`` and masks ``[B, n_p]``, in order.
        side: Where the padding goes: ``right`` to train, ``left`` to generate.

    Returns:
        The values ``[B, s, ...]``, zero in the padding, and the mask ``[B, s]``; s is the length
        of the longest row.

    Raises:
        InputError: If there is no part, or parts differ in batch size, width, dtype or device.

    Examples:
        >>> yes = torch.tensor([[True, True], [True, False]])
        >>> a, b = torch.tensor([[1, 2], [3, 0]]), torch.tensor([[4, 5], [6, 0]])
        >>> join_rows([(a, yes), (b, yes)])[0]
        tensor([[1, 2, 4, 5],
                [3, 6, 0, 0]])
    """
    if side not in ("left", "right"):
        raise InputError(f"side is {side!r}; accepted: left, right")
    if not parts:
        raise InputError("there are no parts to join")
    kinds = {(len(v), v.shape[2:], v.dtype, v.device) for v, _ in parts}
    if len(kinds) > 1:
        told = "; ".join(f"{list(v.shape)} {v.dtype} on {v.device}" for v, _ in parts)
        raise InputError(f"parts differ in batch size, width, dtype or device: {told}")
    values = torch.cat([value for value, _ in parts], 1)
    mask = torch.cat([mask for _, mask in parts], 1)
    lengths = mask.sum(1, keepdim=True)
    width = int(lengths.max()) if mask.numel() else 0
    place = mask.cumsum(1) - 1
    if side == "left":
        place = place + (width - lengths)
    # What is not valid lands in one more column, which is cut off.
    place = torch.where(mask, place, width)
    extra = (1,) * (values.dim() - 2)
    index = place.view(*place.shape, *extra).expand_as(values)
    kept = values.masked_fill(~mask.view(*mask.shape, *extra), 0)
    joined = values.new_zeros(len(values), width + 1, *values.shape[2:]).scatter(1, index, kept)
    column = torch.arange(width, device=mask.device)
    valid = column < lengths if side == "right" else column >= width - lengths
    return joined[:, :width], valid

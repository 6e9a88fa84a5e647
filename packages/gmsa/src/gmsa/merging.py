"""Group merging: the mean of each run of r hidden states (section 2 of the paper, "Group Merging").

Groups are formed over a row's valid positions only, so padding and holes in a mask never matter,
and the last group is averaged over its own size. A row of n tokens becomes exactly ⌈n / r⌉ vectors.
"""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from shared_core.errors import InputError

__all__ = ["as_rates", "compact_rows", "group_merge", "num_groups"]

Rate = int | Tensor


def as_rates(rate: Rate, rows: int, device: torch.device | None = None) -> Int[Tensor, "B"]:
    """One compression rate a row, checked.

    Args:
        rate: A whole number ≥ 1, or one a row as an integer tensor ``[B]``.
        rows: The batch size B.
        device: Where the rates shall be.

    Raises:
        InputError: If a rate is not a whole number or below 1, or there is not one a row.

    Examples:
        >>> as_rates(4, 2)
        tensor([4, 4])
    """
    if isinstance(rate, Tensor) and rate.dim():
        if rate.dtype.is_floating_point or rate.dtype.is_complex or rate.dtype == torch.bool:
            raise InputError(f"rates have the dtype {rate.dtype}; accepted: whole numbers")
        if rate.shape != (rows,):
            raise InputError(
                f"rates have shape {list(rate.shape)} for {rows} rows; give one number or one a row"
            )
        if rows and int(rate.min()) < 1:  # before it goes to a GPU, where looking would wait
            raise InputError(f"a rate is {int(rate.min())}; accepted: whole numbers from 1 on")
        return rate.to(device=device, dtype=torch.long)
    value: object = rate.item() if isinstance(rate, Tensor) else rate
    try:
        if isinstance(value, bool):
            raise TypeError
        whole = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise InputError(f"rate is {value!r}; accepted: whole numbers from 1 on") from None
    if whole < 1:
        raise InputError(f"rate is {whole}; accepted: whole numbers from 1 on")
    return torch.full((rows,), whole, dtype=torch.long, device=device)


def num_groups(num_tokens: Int[Tensor, "B"], rate: Rate) -> Int[Tensor, "B"]:
    """G = ⌈n / r⌉: how many vectors rows of n tokens become.

    Args:
        num_tokens: Valid tokens n of each row ``[B]``.
        rate: Compression rate r, one number or one a row.

    Examples:
        >>> num_groups(torch.tensor([8, 9, 0]), 4)
        tensor([2, 3, 0])
    """
    rates = as_rates(rate, len(num_tokens), num_tokens.device)
    return (num_tokens + rates - 1) // rates


def compact_rows(
    mask: Bool[Tensor, "B n"], *values: Tensor
) -> tuple[Bool[Tensor, "B m"], *tuple[Tensor, ...]]:
    """Move each row's valid entries to its left and cut the columns that no row needs.

    Args:
        mask: Which entries are valid ``[B, n]``; padding may be left, right or anywhere.
        values: Tensors ``[B, n, ...]``.

    Returns:
        The mask ``[B, m]`` and the values ``[B, m, ...]``, zero where the mask is not set; m is
        the largest number of valid entries.

    Examples:
        >>> compact_rows(torch.tensor([[False, True, True]]), torch.tensor([[9, 5, 6]]))
        (tensor([[True, True]]), tensor([[5, 6]]))
    """
    lengths = mask.sum(1)
    width = int(lengths.max()) if mask.numel() else 0
    order = (~mask).to(torch.int8).argsort(dim=1, stable=True)[:, :width]
    dense = torch.arange(width, device=mask.device) < lengths[:, None]
    moved = []
    for value in values:
        extra = (1,) * (value.dim() - 2)
        index = order.view(*order.shape, *extra).expand(*order.shape, *value.shape[2:])
        moved.append(value.gather(1, index).masked_fill(~dense.view(*dense.shape, *extra), 0))
    return dense, *moved


def group_merge(
    hidden: Float[Tensor, "B n d"], mask: Bool[Tensor, "B n"] | None = None, rate: Rate = 4
) -> tuple[Float[Tensor, "B G d"], Bool[Tensor, "B G"]]:
    """H̄_j = (1 / |g_j|) Σ_{i ∈ g_j} H_i over consecutive groups g_j of r valid positions.

    Differentiable, without loops over rows, and accumulated in float32 for half precision.

    Args:
        hidden: Hidden states H ``[B, n, d]``.
        mask: Valid positions ``[B, n]``; all by default.
        rate: Group size r, one number or one a row as an integer tensor ``[B]``.

    Returns:
        The merged vectors ``[B, G, d]``, G the largest ⌈n_b / r_b⌉, padded with zeros to the
        right, and the mask of those that are there ``[B, G]``.

    Raises:
        InputError: If a rate is not a whole number or below 1, or the mask has another shape.

    Source: section 2.3 of the paper, "average pooling of equal groups".

    Examples:
        >>> hidden = torch.tensor([[[1.0], [3.0], [8.0]]])
        >>> group_merge(hidden, rate=2)
        (tensor([[[2.], [8.]]]), tensor([[True, True]]))
    """
    B, n, d = hidden.shape
    if mask is not None and mask.shape != (B, n):
        raise InputError(f"the mask has shape {list(mask.shape)}; the hidden states want {[B, n]}")
    one_rate = rate if isinstance(rate, int) else None
    rates = as_rates(rate, B, hidden.device)
    if mask is None and one_rate is not None:
        return _merge_full_rows(hidden, one_rate)
    if mask is None:
        mask = torch.ones(B, n, dtype=torch.bool, device=hidden.device)
    lengths = mask.sum(1)
    groups = num_groups(lengths, rates)
    if not B:
        return hidden, mask
    G, total = (int(x) for x in torch.stack([groups.max(), lengths.sum()]).tolist())
    column = torch.arange(G, device=hidden.device)
    # Where each group begins among the valid tokens of all rows; groups of padding are empty.
    begins = (lengths.cumsum(0) - lengths)[:, None] + (column * rates[:, None]).minimum(
        lengths[:, None]
    )
    merged = _GroupMeans.apply(hidden.reshape(B * n, d), _places(mask, total), begins.flatten())
    return merged.view(B, G, d), column < groups[:, None]


def _places(mask: Bool[Tensor, "B n"], total: int) -> Int[Tensor, "N"]:
    """The positions of the `total` entries that are set, in order; ``nonzero`` without its sync."""
    flat = mask.flatten()
    slots = torch.where(flat, flat.cumsum(0) - 1, total)
    positions = torch.arange(len(flat), device=mask.device)
    return positions.new_empty(total + 1).scatter_(0, slots, positions)[:total]


class _GroupMeans(torch.autograd.Function):
    """Means of consecutive groups of chosen rows, in one pass over them.

    The forward is PyTorch's ``embedding_bag``; it rounds the sum of half precision before it
    divides, so such rows are widened first. Its own backward is far slower than the closed form:
    each row's gradient is its group's over the group's size.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Float[Tensor, "T d"],
        chosen: Int[Tensor, "N"],
        begins: Int[Tensor, "J"],
    ) -> Float[Tensor, "J d"]:
        ctx.save_for_backward(chosen, begins)
        ctx.count = len(rows)
        if not len(begins):
            return rows.new_zeros(0, rows.shape[1])
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return F.embedding_bag(chosen, wide, begins, mode="mean").to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, "J d"]) -> tuple[Tensor, None, None]:
        chosen, begins = ctx.saved_tensors
        sizes = begins.diff(append=begins.new_tensor([len(chosen)]))
        shares = torch.cat([grad / sizes.clamp(min=1)[:, None], grad.new_zeros(1, grad.shape[1])])
        # The group of each row; those that were not chosen take the row of zeros at the end.
        group_of = begins.new_full((ctx.count,), len(begins))
        group_of[chosen] = torch.repeat_interleave(sizes, output_size=len(chosen))
        return shares.index_select(0, group_of), None, None


def _merge_full_rows(
    hidden: Float[Tensor, "B n d"], rate: int
) -> tuple[Float[Tensor, "B G d"], Bool[Tensor, "B G"]]:
    """The case without padding and with one rate: a mean over a view."""
    B, n, d = hidden.shape
    rate = min(rate, max(n, 1))
    whole, rest = divmod(n, rate)
    if rate == 1:
        merged = hidden
    else:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        body = hidden[:, : whole * rate].reshape(B, whole, rate, d)
        merged = body.mean(2, dtype=wide).to(hidden.dtype)
        if rest:
            tail = hidden[:, whole * rate :].mean(1, keepdim=True, dtype=wide)
            merged = torch.cat([merged, tail.to(hidden.dtype)], 1)
    return merged, torch.ones(merged.shape[:2], dtype=torch.bool, device=hidden.device)

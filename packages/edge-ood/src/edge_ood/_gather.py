"""Tensors of all processes in one, with the gradient that a single process would have."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shared_core.parallel import is_parallel

__all__ = ["gather_rows"]


class _GatherRows(torch.autograd.Function):
    """Rows of all processes, in the order of ranks.

    Every process computes the same loss from the gathered rows, so the gradient of that loss for
    the own rows is at hand without communication. DDP then averages over the processes, which the
    factor ``world`` undoes.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int]) -> Tensor:
        rank, longest = dist.get_rank(), max(sizes)
        ctx.start, ctx.length, ctx.world = sum(sizes[:rank]), len(rows), len(sizes)
        padded = rows.new_zeros((longest, *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        own = gradients[0][ctx.start : ctx.start + ctx.length]
        return own * ctx.world, None


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate the rows of all processes, which may differ in number; ``[n]`` to ``[sum n]``.

    For a loss that every process computes alike from the result, under DDP or FSDP, which average
    gradients: the averaged gradient is then the one of a single process with the joined batch.

    Examples:
        >>> gather_rows(torch.ones(2))
        tensor([1., 1.])
    """
    if not is_parallel():
        return rows
    size = torch.tensor([len(rows)], device=rows.device)
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    gathered: Tensor = _GatherRows.apply(rows, [int(s) for s in sizes])
    return gathered

"""What processes exchange that tune the same prompts, or that share a batch of pairs.

Image features are computed once, so a training step costs what its prompts cost. The processes
therefore share out the prompts, not the images: each encodes some sequences, all receive all text
features and compute the same loss of the same batch, pairs included. Any number of processes gives
what one gives, up to rounding.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shared_core.parallel import is_parallel

__all__ = ["all_true", "from_first", "gather", "join_batches", "share", "sum_gradients"]


def _world() -> int:
    return dist.get_world_size() if is_parallel() else 1


def share(count: int) -> slice:
    """Which of `count` items are this process's; all of them where there are too few to share."""
    world = _world()
    if world == 1 or count < world:
        return slice(0, count)
    rank = dist.get_rank()
    return slice(rank * count // world, (rank + 1) * count // world)


def gather(rows: Tensor, count: int) -> Tensor:
    """All `count` rows, of which this process has its `share`; differentiable.

    Every process has the same loss, so its gradient of its own rows is theirs; of rows that all
    have, each gives its part, for `sum_gradients` to add up.
    """
    world = _world()
    if world == 1:
        return rows
    if count < world:
        return _scale_gradient(rows, 1 / world)
    sizes = [(r + 1) * count // world - r * count // world for r in range(world)]
    gathered: Tensor = _Gather.apply(rows, sizes)
    return gathered


def join_batches(rows: Tensor) -> Tensor:
    """The rows of all processes in rank order, of which each may have another number.

    Differentiable for a loss that all processes compute alike and whose gradients are then
    averaged, as DistributedDataParallel does: a process's own rows get its gradient times the
    number of processes.
    """
    world = _world()
    if world == 1:
        return rows
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(world)]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    gathered: Tensor = _Gather.apply(_scale_gradient(rows, world), [int(c) for c in counts])
    return gathered


def _scale_gradient(rows: Tensor, factor: float) -> Tensor:
    if rows.requires_grad:
        rows = rows.clone()
        rows.register_hook(lambda gradient: gradient * factor)  # type: ignore[no-untyped-call]
    return rows


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int]) -> Tensor:
        rank = dist.get_rank()
        ctx.own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[ctx.own], None


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Add up what each process's sequences contributed to the gradients."""
    for parameter in parameters if is_parallel() else ():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)


def all_true(value: bool, device: torch.device) -> bool:
    """Whether a condition holds in every process."""
    if not is_parallel():
        return value
    flag = torch.tensor([int(value)], device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())


def from_first(value: Tensor | None, like: Tensor) -> Tensor:
    """The first process's tensor, in every process; `like` has its shape, dtype and device."""
    sent = like if value is None else value.to(like)
    if is_parallel():
        dist.broadcast(sent, 0)
    return sent

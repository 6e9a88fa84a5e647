"""Processes that tune the same prompts: who they are, and what they exchange.

Image features are computed once, so a training step costs what its prompts cost. The processes
therefore share out the prompts, not the images: each encodes some sequences, all receive all text
features and compute the same loss of the same batch, pairs included. Any number of processes gives
what one gives, up to rounding.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["all_true", "from_first", "gather", "is_first", "processes", "share", "sum_gradients"]


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process writes files and talks."""
    return _world() == 1 or dist.get_rank() == 0


@contextlib.contextmanager
def processes(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that torchrun started, and give each its GPU."""
    started = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if device.type == "cuda" and (started or _world() > 1):
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if started:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        if started:
            dist.destroy_process_group()


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
    if _world() == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows, count)
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, count: int) -> Tensor:
        world = _world()
        ctx.own, ctx.owners = share(count), world if count < world else 1
        if count < world:
            return rows.clone()
        sizes = [(r + 1) * count // world - r * count // world for r in range(world)]
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[ctx.own] / ctx.owners, None


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Add up what each process's sequences contributed to the gradients."""
    for parameter in parameters if _world() > 1 else ():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)


def all_true(value: bool, device: torch.device) -> bool:
    """Whether a condition holds in every process."""
    if _world() == 1:
        return value
    flag = torch.tensor([int(value)], device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())


def from_first(value: Tensor | None, like: Tensor) -> Tensor:
    """The first process's tensor, in every process; `like` has its shape, dtype and device."""
    sent = like if value is None else value.to(like)
    if _world() > 1:
        dist.broadcast(sent, 0)
    return sent

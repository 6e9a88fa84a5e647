"""What several processes share: their parts of a computation, and the rows that come of them."""

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["gather_counts", "gather_rows", "is_parallel", "own_share", "process_group"]


def is_parallel() -> bool:
    """Whether several processes run."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[bool]:
    """The process group of a launcher such as torchrun, if one started this process.

    Args:
        device: Where this process computes.

    Yields:
        Whether this process is the one that reports.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield not is_parallel() or dist.get_rank() == 0
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield dist.get_rank() == 0
    finally:
        dist.destroy_process_group()


def own_share(n: int) -> tuple[int, int]:
    """First and last of the n items that are this process's; shares are in rank order."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return rank * n // world, (rank + 1) * n // world


def gather_counts(count: int, device: torch.device) -> tuple[list[int], int]:
    """The count of every rank, and the sum over the ranks before this one."""
    own = torch.tensor([count], device=device)
    counts = [torch.zeros_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, own)
    numbers = [int(c) for c in counts]
    return numbers, sum(numbers[: dist.get_rank()])


def gather_rows(rows: Tensor, counts: list[int]) -> Tensor:
    """The rows of all ranks, in rank order."""
    longest = max(counts)
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.zeros_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

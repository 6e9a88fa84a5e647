"""What several processes share: their parts of a computation, and the rows that come of them."""

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["gather_counts", "gather_rows", "own_share"]


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

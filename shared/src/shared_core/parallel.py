"""The processes that a launcher such as torchrun started, and this one's place among them."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from shared_core.device import own_gpu, select_device

__all__ = ["Processes", "is_first", "is_parallel", "join_processes", "launched"]


@dataclass(frozen=True)
class Processes:
    """This process among those that work together.

    Attributes:
        rank: Its number, from 0.
        world: How many there are.
        device: Where it computes.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files and reports."""
        return self.rank == 0


def is_parallel() -> bool:
    """Whether this process belongs to a process group of several.

    Examples:
        >>> is_parallel()
        False
    """
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first() -> bool:
    """Whether this process is the one that writes files and reports.

    Examples:
        >>> is_first()
        True
    """
    return not is_parallel() or dist.get_rank() == 0


def launched(device: torch.device | str) -> Processes:
    """What the environment of a launcher says, without joining a process group.

    Enough where each process takes its share of independent work. On a machine of several GPUs each
    process gets its own, unless `device` names one.

    Args:
        device: Where to compute; ``cuda`` without an index is completed. A string is a wish as
            `select_device` takes it, such as ``auto``.

    Raises:
        InputError: If the wish is not a device that is there.

    Examples:
        >>> launched(torch.device("cpu"))
        Processes(rank=0, world=1, device=device(type='cpu'))
    """
    if dist.is_available() and dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()
    else:
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if isinstance(device, str):
        device = select_device(device)
    elif str(device) == "cuda":
        device = torch.device("cuda", own_gpu())
    return Processes(rank, world, device)


@contextlib.contextmanager
def join_processes(device: torch.device | str) -> Iterator[Processes]:
    """Join the process group of a launcher, if one started this process, and leave it at the end.

    A group that exists already is used as it is, and left as it is.

    Args:
        device: As in `launched`; NCCL connects GPUs, gloo everything else.

    Yields:
        This process's place; alone if nothing launched it.

    Examples:
        >>> with join_processes(torch.device("cpu")) as processes:
        ...     processes.first, processes.world
        (True, 1)
    """
    here = launched(device)
    if here.world == 1:
        yield here
        return
    if here.device.type == "cuda":
        torch.cuda.set_device(here.device)
    started = not dist.is_initialized()
    if started:
        dist.init_process_group("nccl" if here.device.type == "cuda" else "gloo")
    try:
        yield here
    finally:
        if started:
            dist.destroy_process_group()

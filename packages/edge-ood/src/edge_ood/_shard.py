"""Parameters sharded over processes with FSDP2, and their whole state for files."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from shared_core.errors import InputError

__all__ = ["full_state", "load_full_state", "shard", "share_buffers"]


def shard(model: nn.Module, world: int, dtype: torch.dtype) -> None:
    """Shard the parameters, in place; the optimizer is to be made afterwards.

    Raises:
        InputError: With one process, or for float16, whose gradient scaling accelerate does for
            models of its own alone.
    """
    if world == 1:
        raise InputError("--fsdp shards over several processes; start it with torchrun")
    if dtype == torch.float16:
        raise InputError("--fsdp does not go with --dtype float16; take bfloat16")
    from torch.distributed.fsdp import fully_shard

    fully_shard(model)


def full_state(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """The whole state of the model, or of the optimizer; all processes have to call it.

    It lies on the CPU of the first process; elsewhere it may be empty.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    if optimizer is None:
        return get_model_state_dict(model, options=options)
    return dict(get_optimizer_state_dict(model, optimizer, options=options))


def load_full_state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    model_state: Mapping[str, Any],
    optimizer_state: Mapping[str, Any],
) -> None:
    """Give each process its shards of what `full_state` gave; all have read the same file."""
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, dict(model_state), options=options)
    set_optimizer_state_dict(model, optimizer, dict(optimizer_state), options=options)


def share_buffers(model: nn.Module) -> None:
    """Take the first process's running statistics, as DDP does before each step."""
    for buffer in model.buffers():
        dist.broadcast(buffer, 0)

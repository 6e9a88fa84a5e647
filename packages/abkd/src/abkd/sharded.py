"""A head whose weights FSDP2 has spread over the processes, gathered for the fused loss.

The loss takes place outside the model's forward pass, where its weights are sharded; so the head is
gathered for it, and the gradient is averaged and sharded again, as FSDP does with all others.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["GatheredHead", "after", "can_gather", "gathered", "is_sharded"]


@dataclass(frozen=True)
class GatheredHead:
    """As much of a linear layer as the losses ask for.

    Attributes:
        weight: ``[V, H]``.
        bias: ``[V]``, or ``None``.
    """

    weight: Tensor
    bias: Tensor | None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits ``[..., V]``."""
        return nn.functional.linear(hidden, self.weight, self.bias)


class _Gathered(torch.autograd.Function):
    """The whole of a sharded weight; backward, each process's share of the mean gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Any) -> Tensor:
        ctx.mesh, ctx.placements = weight.device_mesh, weight.placements
        whole: Tensor = weight.full_tensor()
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        from torch.distributed.tensor import DTensor, Partial

        terms = [Partial()] * ctx.mesh.ndim
        mean = DTensor.from_local(gradient / ctx.mesh.size(), ctx.mesh, terms, run_check=False)
        return mean.redistribute(placements=ctx.placements)


class _After(torch.autograd.Function):
    """A tensor as it is, whose gradient reaches another one first, as zeros."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, other: Tensor) -> Tensor:
        ctx.like = other.shape, other.dtype, other.device
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        shape, dtype, device = ctx.like
        return gradient, torch.zeros(shape, dtype=dtype, device=device)


def after(hidden: Tensor, output: Tensor) -> Tensor:
    """Hidden states of a model, whose backward pass begins at the model's output.

    There FSDP gathers the weights that are not in a block, such as the last norm's, which a
    gradient by hidden states alone would find gone.
    """
    found: Tensor = _After.apply(hidden, output)
    return found


def is_sharded(weight: Tensor) -> bool:
    """Whether a process holds a part of the weight only (FSDP, DeepSpeed, tensor parallelism)."""
    return hasattr(weight, "full_tensor") or hasattr(weight, "ds_id") or weight.ndim != 2


def can_gather(weight: Any, processes: int) -> bool:
    """Whether a sharded weight is FSDP2's, over all processes."""
    return hasattr(weight, "full_tensor") and weight.device_mesh.size() == processes


def gathered(head: Any) -> Any:
    """The head with whole weights; itself, where FSDP has left them gathered."""
    if not is_sharded(head.weight):
        return head
    bias = None if head.bias is None else _Gathered.apply(head.bias)
    return GatheredHead(_Gathered.apply(head.weight), bias)

"""What several processes must agree on: DDP (local or global perturbation) and FSDP2."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from focal_sam._perturbation import is_dtensor

BUCKET_ELEMENTS = 2**24


def _unwrapped(model: nn.Module | None) -> nn.Module | None:
    """`model` without the shell of torch.compile."""
    while model is not None and isinstance(getattr(model, "_orig_mod", None), nn.Module):
        model = model._orig_mod  # type: ignore[assignment]
    return model


class Parallel:
    """The processes that train one model.

    Args:
        model: The model as the training loop calls it.
        sync: ``"local"`` or ``"global"``.
    """

    def __init__(self, model: nn.Module | None, sync: str) -> None:
        self.model = inner = _unwrapped(model)
        self.ddp = inner if isinstance(inner, DistributedDataParallel) else None
        self.sharded = model is not None and any(is_dtensor(p) for p in model.parameters())
        if model is not None and any(
            type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()
        ):
            raise NotImplementedError(
                "FSDP1 flattens parameters and cannot be perturbed; use FSDP2's fully_shard"
            )
        self.is_global = self.sharded or (self.ddp is not None and sync == "global")

    @property
    def alone(self) -> bool:
        """Whether this process may take a path that depends on its own batch."""
        return not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)

    def reduce_every_pass(self) -> None:
        """With FSDP2, reduce gradients in each pass, also where a loop that accumulates waits.

        The ascent gradient has to be reduced apart from what has been accumulated.
        """
        if self.sharded and self.model is not None:
            from torch.distributed.fsdp import FSDPModule

            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.set_requires_gradient_sync(True, recurse=False)

    def unsynced(self) -> contextlib.AbstractContextManager[Any]:
        """Passes inside leave gradients in this process; DDP's next synced pass sends them."""
        return self.ddp.no_sync() if self.ddp is not None else contextlib.nullcontext()

    def _group(self) -> Any:
        return self.ddp.process_group if self.ddp is not None else dist.group.WORLD

    def batch_share(self, size: int, device: torch.device) -> Tensor | None:
        """``B_r W / Σ B``: what makes the mean over W processes the mean over the joined batch."""
        if not self.is_global:
            return None
        group = self._group()
        share = torch.full((), float(size), device=device)
        total = share.clone()
        dist.all_reduce(total, group=group)
        return share * dist.get_world_size(group) / total

    def mean_gradients(
        self, gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Average the ascent gradient over the processes, for DDP with global perturbation."""
        if self.ddp is None or not self.is_global:
            return list(gradients)
        group = self._group()
        world = dist.get_world_size(group)
        # A parameter unused here may be used elsewhere; all processes must send the same.
        whole = [
            torch.zeros_like(p) if g is None else g
            for g, p in zip(gradients, parameters, strict=True)
        ]
        buckets: list[list[int]] = []
        kind, room = None, 0
        for index, gradient in enumerate(whole):
            if (gradient.device, gradient.dtype) != kind or gradient.numel() > room:
                kind, room = (gradient.device, gradient.dtype), BUCKET_ELEMENTS
                buckets.append([])
            room -= gradient.numel()
            buckets[-1].append(index)
        for bucket in buckets:
            flat = torch.cat([whole[i].reshape(-1) for i in bucket])
            dist.all_reduce(flat, group=group)
            flat /= world
            parts = torch.split(flat, [whole[i].numel() for i in bucket])
            for index, part in zip(bucket, parts, strict=True):
                whole[index] = part.view_as(whole[index])
        return list(whole)

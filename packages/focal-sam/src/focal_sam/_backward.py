"""Who scales a loss and who runs its backward pass: torch, a GradScaler, accelerate, Lightning."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Backward:
    """One step's way of turning losses into gradients.

    All losses of a step get the same factor: the caller's `scale`, accelerate's share of an
    accumulated step, and the gradient scaler's. The ascent gradient may keep it, for it is
    normalised.

    Args:
        scaler: A gradient scaler, or ``None``.
        accelerator: An `accelerate.Accelerator`, or ``None``.
        backward: Called with a loss in place of its ``backward()``, or ``None``.
        scale: The caller's factor.
    """

    def __init__(
        self,
        scaler: Any = None,
        accelerator: Any = None,
        backward: Callable[..., Any] | None = None,
        scale: float = 1.0,
    ) -> None:
        self.share = 1.0
        if accelerator is not None:
            kind = str(getattr(accelerator.distributed_type, "value", ""))
            if kind in ("DEEPSPEED", "MEGATRON_LM"):
                raise NotImplementedError(
                    f"{kind} owns its backward pass and its parameters, so they cannot be "
                    "perturbed; use DDP or FSDP2"
                )
            scaler = accelerator.scaler
            backward = accelerator.backward
            self.share = 1 / accelerator.gradient_accumulation_steps
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.run = backward
        self.scale = scale

    def _scaled(self, loss: Tensor) -> Tensor:
        loss = loss * (self.scale * self.share)
        return loss if self.scaler is None else self.scaler.scale(loss)

    def backward(self, loss: Tensor, **options: Any) -> None:
        """Add the gradient of `loss`, scaled, to ``p.grad``."""
        if self.run is not None:
            self.run(loss * self.scale, **options)
        else:
            torch.autograd.backward(self._scaled(loss), **options)

    def gradient(
        self, loss: Tensor, parameters: Sequence[Tensor], *, retain_graph: bool = False
    ) -> list[Tensor | None]:
        """The gradient of `loss`, scaled, apart from ``p.grad``."""
        return list(
            torch.autograd.grad(
                self._scaled(loss), parameters, retain_graph=retain_graph, allow_unused=True
            )
        )

    def gradient_by_backward(
        self,
        loss: Tensor,
        parameters: Sequence[Tensor],
        trainable: Sequence[Tensor],
        *,
        keep: bool,
        retain_graph: bool = False,
    ) -> list[Tensor | None]:
        """The gradient of `loss` through ``backward()``.

        Its hooks (FSDP2's reduce-scatter, reentrant checkpointing) do not run under
        `torch.autograd.grad`.

        Args:
            loss: A scalar.
            parameters: With respect to which.
            trainable: All parameters that the backward pass may reach.
            keep: Whether ``p.grad`` keeps the sum, or is left as it was.
            retain_graph: Keep the graph for another pass.
        """
        before = [p.grad for p in trainable]
        for p in trainable:
            p.grad = None
        try:
            self.backward(loss, retain_graph=retain_graph)
            found = [p.grad for p in parameters]
            if not keep:
                return found
            apart = [None if g is None else g.clone() for g in found]
            for p, old in zip(trainable, before, strict=True):
                if old is not None and p.grad is not None:
                    p.grad = old.add_(p.grad)
                elif old is not None:
                    p.grad = old
            return apart
        finally:
            if not keep:
                for p, old in zip(trainable, before, strict=True):
                    p.grad = old

    def overflow(self, norm: Tensor) -> Tensor | float:
        """1, or infinity where a scaler is to see that the ascent gradient overflowed."""
        if self.scaler is None:
            return 1.0
        return torch.where(norm.isfinite(), 1.0, float("inf"))

    def unscaled(self, norm: Tensor) -> Tensor:
        """A norm of `gradient`'s result without the step's factor."""
        return norm / self._scaled(torch.ones_like(norm))


def uses_reentrant_checkpointing(loss: Tensor) -> bool:
    """Whether the graph of `loss` holds a reentrant activation checkpoint."""
    seen: set[Any] = set()
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node.name() == "CheckpointFunctionBackward":
            return True
        seen.add(node)
        waiting += [before for before, _ in node.next_functions]
    return False

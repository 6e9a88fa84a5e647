"""What must stand still while a model is run a second time on the same batch."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@contextlib.contextmanager
def frozen_running_stats(norms: Iterable[_NormBase], freeze: bool = True) -> Iterator[None]:
    """Keep batch statistics in use but leave the running ones untouched.

    The buffers are taken out while the block runs: normalisation layers in training mode then use
    the batch and have nothing to update, so even a batch with NaN leaves no trace. Setting the
    momentum to 0 would not do: 0 · NaN is NaN. The flag is for SyncBatchNorm, which insists on
    the buffers of a layer that tracks.
    """
    taken: list[tuple[_NormBase, dict[str, Any]]] = []
    try:
        if freeze:
            for norm in norms:
                if norm.training and norm.track_running_stats:
                    taken.append((norm, {b: norm._buffers[b] for b in BUFFERS}))
                    norm._buffers.update(dict.fromkeys(BUFFERS))
                    norm.track_running_stats = False
        yield
    finally:
        for norm, buffers in taken:
            norm._buffers.update(buffers)
            norm.track_running_stats = True


class RandomState:
    """The generator states that a forward pass on `devices` draws from.

    A replayed pass draws the same dropout masks, so the difference of the two losses is due to the
    weights alone.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = {d: torch.cuda.get_rng_state(d) for d in devices if d.type == "cuda"}
        self._mps = torch.mps.get_rng_state() if any(d.type == "mps" for d in devices) else None

    def replay(self) -> None:
        """Set the generators back."""
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)
        if self._mps is not None:
            torch.mps.set_rng_state(self._mps)


def norm_layers(model: nn.Module | None) -> list[_NormBase]:
    """The layers of `model` that may keep running statistics."""
    return [] if model is None else [m for m in model.modules() if isinstance(m, _NormBase)]

"""What a model is examined under: nothing about it, nor about the generators, may change."""

import contextlib
import random
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn


class Generators:
    """All states a pass over a loader may draw from: torch, Python, numpy, the loader's own."""

    def __init__(self, loader: Any, devices: Iterable[torch.device]) -> None:
        self._devices = list(devices)
        batch_sampler = getattr(loader, "batch_sampler", None)
        owners = [loader, getattr(loader, "sampler", None), batch_sampler]
        owners.append(getattr(batch_sampler, "sampler", None))
        found = [getattr(owner, "generator", None) for owner in owners]
        own = {id(g): g for g in found if isinstance(g, torch.Generator)}
        self._own = [(g, g.get_state()) for g in own.values()]
        self._python = random.getstate()
        self._numpy = np.random.get_state()  # noqa: NPY002 - datasets draw from the global one
        self._cpu = torch.get_rng_state()
        self._cuda = {d: torch.cuda.get_rng_state(d) for d in self._devices if d.type == "cuda"}
        self._mps = [torch.mps.get_rng_state() for d in self._devices if d.type == "mps"]

    def restore(self) -> None:
        for generator, state in self._own:
            generator.set_state(state)
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)
        for state in self._mps:
            torch.mps.set_rng_state(state)


class Buffers:
    """The buffers of a model: which tensors they are, and what they hold."""

    def __init__(self, model: nn.Module) -> None:
        self._kept = [
            (module, name, buffer, buffer.clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def restore(self) -> None:
        with torch.no_grad():
            for module, name, buffer, content in self._kept:
                buffer.copy_(content)
                module._buffers[name] = buffer


@contextlib.contextmanager
def compilers_off() -> Iterator[None]:
    """Run compiled models eagerly: a compiled backward pass cannot be differentiated again."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield

"""Noise and timesteps: what the backbone sees of an image at time t."""

import copy
import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from shared_core.errors import InputError

__all__ = ["Schedule", "seeded_noise"]


def seeded_noise(
    ids: Sequence[str | int], shape: Sequence[int], *, seed: int = 0, draw: int = 0
) -> Float[Tensor, "batch ..."]:
    """Standard normal noise that depends on the seed, the sample's id and the draw, nothing else.

    So features do not depend on the batch, its order, or how samples are spread over devices.

    Args:
        ids: One name per sample.
        shape: Of one sample, without the batch.
        seed: Of the run.
        draw: Number of the draw, for ensembles.

    Examples:
        >>> a = seeded_noise(["x", "y"], (2, 2)); b = seeded_noise(["y"], (2, 2))
        >>> torch.equal(a[1], b[0])
        True
    """
    rows = []
    for name in ids:
        digest = hashlib.sha256(f"{seed}/{name}/{draw}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        rows.append(torch.randn(tuple(shape), generator=generator))
    return torch.stack(rows)


class Schedule:
    """The forward process of a diffusers scheduler's configuration.

    Variance preserving: ``x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps``; rectified flow:
    ``x_t = (1 - s) x_0 + s eps`` with ``s = t / 1000``.

    Args:
        scheduler: A diffusers scheduler.
        shift_timesteps: Apply a flow scheduler's static shift to s.

    Attributes:
        steps: Number of training timesteps T.
        flow: Whether it is a rectified flow.
        alphas_cumprod: abar, ``[T]``, or ``None`` for flows.

    Examples:
        >>> from diffusers import DDIMScheduler
        >>> schedule = Schedule(DDIMScheduler())
        >>> x = schedule.add_noise(torch.zeros(1, 1), torch.ones(1, 1), 999)
        >>> round(x.item(), 3)
        1.0
    """

    def __init__(self, scheduler: Any, *, shift_timesteps: bool = False) -> None:
        self.scheduler = scheduler
        self.shift_timesteps = shift_timesteps
        self.steps = int(scheduler.config.num_train_timesteps)
        self.flow = not hasattr(scheduler, "alphas_cumprod")
        self.alphas_cumprod: Tensor | None = None
        if not self.flow:
            self.alphas_cumprod = scheduler.alphas_cumprod.double().cpu()

    def check(self, t: int) -> None:
        """Refuse timesteps outside [0, T).

        Raises:
            InputError: If `t` is one.
        """
        if not 0 <= t < self.steps:
            raise InputError(f"t={t}; accepted: 0 to {self.steps - 1}")

    def signal_and_noise(self, t: int) -> tuple[float, float]:
        """The factors of x_0 and of eps at t."""
        self.check(t)
        if self.alphas_cumprod is not None:
            abar = float(self.alphas_cumprod[t])
            return abar**0.5, (1 - abar) ** 0.5
        s = self.flow_time(t)
        return 1 - s, s

    def flow_time(self, t: int) -> float:
        """S of a flow at t."""
        s = t / self.steps
        shift = float(getattr(self.scheduler.config, "shift", 1.0)) if self.shift_timesteps else 1.0
        return shift * s / (1 + (shift - 1) * s)

    def model_time(self, t: int) -> float:
        """What the backbone is told: t itself, or 1000 s of a flow."""
        return self.flow_time(t) * self.steps if self.flow else float(t)

    def official_timestep(self, t: int) -> int:
        """The timestep that image-to-image plumbing with 1000 steps really runs when asked for t.

        With SD1.5's PNDM scheduler that is t + 1.

        Examples:
            >>> from diffusers import PNDMScheduler
            >>> stock = PNDMScheduler(skip_prk_steps=True, steps_offset=1)
            >>> Schedule(stock).official_timestep(50)
            51
        """
        self.check(t)
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(self.steps)
        start = (self.steps - t) * getattr(scheduler, "order", 1)
        times = scheduler.timesteps
        return min(round(float(times[min(start, len(times) - 1)])), self.steps - 1)

    def add_noise(self, clean: Tensor, noise: Tensor, t: int) -> Tensor:
        """x_t of a clean latent and noise of the same shape."""
        signal, scale = self.signal_and_noise(t)
        return signal * clean + scale * noise

    def predict_clean(self, x_t: Tensor, output: Tensor, t: int) -> Tensor:
        """The clean latent that a prediction at t implies.

        Raises:
            InputError: If the scheduler's prediction type is not known.
        """
        signal, scale = self.signal_and_noise(t)
        if self.flow:  # velocity: eps - x_0
            return x_t - scale * output
        kind = getattr(self.scheduler.config, "prediction_type", "epsilon")
        if kind == "epsilon":
            return (x_t - scale * output) / signal
        if kind == "v_prediction":
            return signal * x_t - scale * output
        if kind == "sample":
            return output
        raise InputError(f"prediction type {kind!r}; accepted: epsilon, v_prediction, sample")

"""Record activations in the background while a pipeline generates."""

from collections.abc import Collection
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor, nn

from diffeat.capture import Capture
from diffeat.features import Features
from diffeat.selection import Layers
from shared_core.errors import InputError

__all__ = ["Recorder"]


class Recorder:
    """Keeps the features of chosen calls of a model, such as denoising steps of a pipeline.

    Args:
        model: The backbone, such as ``pipe.unet``.
        layers: See `Selection.parse`.
        steps: Calls to keep, counted from 0; by default all.
        cfg: With classifier-free guidance the batch is (unconditional, conditional): keep the half
            ``cond`` or ``uncond``, or ``both``.
        device: Where to keep them; the CPU by default.
        dtype: As what.

    Attributes:
        features: `Features` by step.

    Raises:
        ActivationNotFound: If a name is unknown.
        InputError: If `cfg` is unknown, or a batch cannot be halved.

    Examples:
        >>> model = nn.Linear(2, 2)
        >>> with Recorder(model, ["module:"], steps=[1]) as record:
        ...     _ = [model(torch.full((1, 2), float(i))) for i in range(3)]
        >>> list(record.features)
        [1]
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers,
        *,
        steps: Collection[int] | None = None,
        cfg: Literal["cond", "uncond", "both"] = "both",
        device: torch.device | str | None = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        if cfg not in ("cond", "uncond", "both"):
            raise InputError(f"cfg={cfg!r}; accepted: cond, uncond, both")
        self.steps, self.cfg = steps, cfg
        self.device, self.dtype = device, dtype
        self.features: dict[int, Features] = {}
        self._capture = Capture(model, layers, stop=False, on_complete=self._keep)

    def _keep(self, found: dict[str, Tensor]) -> None:
        step = self._capture.calls - 1
        if self.steps is not None and step not in self.steps:
            return
        self.features[step] = Features({n: self._half(v) for n, v in found.items()}).to(
            device=self.device, dtype=self.dtype
        )

    def _half(self, value: Tensor) -> Tensor:
        if self.cfg == "both":
            return value
        if len(value) % 2:
            raise InputError(f"a batch of {len(value)} has no halves; use cfg='both'")
        return value.chunk(2)[self.cfg == "cond"]

    def __enter__(self) -> "Recorder":
        self._capture.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        return self._capture.__exit__(kind, error, traceback)

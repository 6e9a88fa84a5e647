"""Join features of several layers or models, fixed or trained."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from diffeat.extractor import FeatureExtractor
from diffeat.features import Features, Size
from shared_core.errors import InputError

__all__ = ["HyperAggregation", "MultiModel", "WeightedSum"]


class WeightedSum(nn.Module):
    """Softmax-weighted sum of 1 x 1 projections of layers, at the size of the largest.

    Args:
        channels: Channels of each layer.
        out_channels: Channels of the sum.

    Example:
        >>> join = WeightedSum([3, 5], 4)
        >>> join([torch.randn(1, 3, 2, 2), torch.randn(1, 5, 4, 4)]).shape
        torch.Size([1, 4, 4, 4])
    """

    def __init__(self, channels: Sequence[int], out_channels: int) -> None:
        super().__init__()
        self.projections = nn.ModuleList(self._project(c, out_channels) for c in channels)
        self.logits = nn.Parameter(torch.zeros(len(channels)))

    def _project(self, channels: int, out_channels: int) -> nn.Module:
        return nn.Conv2d(channels, out_channels, 1)

    def forward(self, maps: Sequence[Tensor]) -> Float[Tensor, "B D h w"]:
        """The joined map.

        Raises:
            InputError: If there is not one map per layer.
        """
        if len(maps) != len(self.projections):
            raise InputError(f"{len(maps)} maps for {len(self.projections)} layers")
        size = max((m.shape[-2:] for m in maps), key=tuple)
        parts = [
            F.interpolate(project(m), size, mode="bilinear", align_corners=False)
            for project, m in zip(self.projections, maps, strict=True)
        ]
        weights = self.logits.softmax(0)
        return torch.stack([w * p for w, p in zip(weights, parts, strict=True)]).sum(0)


class HyperAggregation(WeightedSum):
    """The same with bottlenecks (1 x 1, 3 x 3, 1 x 1, group norm), as in Diffusion Hyperfeatures.

    Args:
        channels: Channels of each layer (of each timestep).
        out_channels: Channels of the result, divisible by 32; 384 in the paper.

    Example:
        >>> HyperAggregation([3], 32)([torch.randn(1, 3, 2, 2)]).shape
        torch.Size([1, 32, 2, 2])
    """

    def __init__(self, channels: Sequence[int], out_channels: int = 384) -> None:
        if out_channels % 32:
            raise InputError(f"out_channels={out_channels}; accepted: multiples of 32")
        super().__init__(channels, out_channels)

    def _project(self, channels: int, out_channels: int) -> nn.Module:
        inner = out_channels // 4
        return _Bottleneck(
            nn.Sequential(
                nn.Conv2d(channels, inner, 1, bias=False),
                nn.GroupNorm(min(32, inner), inner),
                nn.ReLU(),
                nn.Conv2d(inner, inner, 3, padding=1, bias=False),
                nn.GroupNorm(min(32, inner), inner),
                nn.ReLU(),
                nn.Conv2d(inner, out_channels, 1, bias=False),
                nn.GroupNorm(32, out_channels),
            ),
            nn.Conv2d(channels, out_channels, 1),
        )


class _Bottleneck(nn.Module):
    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch, self.shortcut = branch, shortcut

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.shortcut(x))


class MultiModel:
    """Features of several models for the same images, named ``<model>/<activation>``.

    Each extractor may sit on its own device; results are gathered on `device`.

    Args:
        extractors: By name.
        device: Where the features go.

    Raises:
        InputError: If there is none.
    """

    def __init__(
        self, extractors: dict[str, FeatureExtractor], device: torch.device | str = "cpu"
    ) -> None:
        if not extractors:
            raise InputError("give at least one extractor")
        self.extractors, self.device = extractors, device

    def __call__(self, images: Any, prompt: Any = None, t: int = 50, **options: Any) -> Features:
        """Features of all models, in order; arguments as `FeatureExtractor`."""
        found = {}
        for name, fx in self.extractors.items():
            given = prompt[name] if isinstance(prompt, dict) else prompt
            for layer, value in fx(images, given, t, **options).items():
                found[f"{name}/{layer}"] = value.to(self.device)
        return Features(found)

    def concat(self, images: Any, size: Size = "max", **options: Any) -> Tensor:
        """All features of all models in one tensor."""
        return self(images, **options).concat(size)

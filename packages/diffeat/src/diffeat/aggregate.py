"""Join features of several layers or models, fixed or trained."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from diffeat.extractor import FeatureExtractor
from diffeat.features import Features, Size
from diffeat.presets import COMBINED, PRESETS
from shared_core.errors import InputError

__all__ = ["Concat", "HyperAggregation", "MultiModel", "WeightedSum"]


class Concat(nn.Module):
    """All layers at one size, side by side: what the paper feeds its heads.

    Args:
        size: A number, (height, width), or that of the largest (``max``) or smallest map.

    Examples:
        >>> Concat()([torch.randn(1, 3, 2, 2), torch.randn(1, 5, 4, 4)]).shape
        torch.Size([1, 8, 4, 4])
    """

    def __init__(self, size: Size = "max") -> None:
        super().__init__()
        self.size = size

    def forward(self, maps: Sequence[Tensor] | Features) -> Float[Tensor, "B D h w"]:
        """The joined map."""
        named = maps if isinstance(maps, Features) else {str(i): m for i, m in enumerate(maps)}
        return Features(named).concat(self.size)


class WeightedSum(nn.Module):
    """Softmax-weighted sum of 1 x 1 projections of layers, at the size of the largest.

    Args:
        channels: Channels of each layer.
        out_channels: Channels of the sum.

    Examples:
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

    Examples:
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

    Each extractor may sit on its own device; those on different devices run at the same time, those
    on one device one after another. Results are gathered on `device`.

    Args:
        extractors: By name.
        device: Where the features go.

    Attributes:
        layers: Names of all features.
        size: The largest size of the extractors.

    Raises:
        InputError: If there is none.
    """

    def __init__(
        self, extractors: dict[str, FeatureExtractor], device: torch.device | str = "cpu"
    ) -> None:
        if not extractors:
            raise InputError("give at least one extractor")
        self.extractors, self.device = extractors, torch.device(device)

    @classmethod
    def from_pretrained(
        cls,
        preset: str,
        models: Sequence[str] | None = None,
        *,
        devices: Sequence[torch.device | str] = ("cpu",),
        **options: Any,
    ) -> "MultiModel":
        """The models of a combined preset, such as ``xl-t``.

        Args:
            preset: Key of `diffeat.presets.COMBINED`.
            models: Hub ids or folders, one for each part, in place of the preset's own.
            devices: Where the parts go, in turns; features are gathered on the first.
            options: See `FeatureExtractor.from_pretrained`. On one GPU that does not hold all
                models, ``offload="model"`` keeps only the running one there.

        Raises:
            InputError: If there is no such preset, or not one model for each part.
        """
        parts = COMBINED.get(preset)
        if parts is None:
            raise InputError(f"{preset!r} joins no models; accepted: {', '.join(COMBINED)}")
        ids = list(models or [PRESETS[part].topology for part in parts])
        if len(ids) != len(parts):
            raise InputError(
                f"{len(ids)} models for {preset} = {' + '.join(parts)}; give {len(parts)}"
            )
        extractors = {
            part: FeatureExtractor.from_pretrained(
                model, part, device=devices[i % len(devices)], **options
            )
            for i, (part, model) in enumerate(zip(parts, ids, strict=True))
        }
        return cls(extractors, devices[0])

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of all features for one timestep."""
        return tuple(f"{m}/{n}" for m, fx in self.extractors.items() for n in fx.layers)

    @property
    def size(self) -> tuple[int, int] | None:
        """The largest size of the extractors, if any has one."""
        return max((fx.size for fx in self.extractors.values() if fx.size), default=None)

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the first backbone."""
        return next(iter(self.extractors.values())).dtype

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """As that of each extractor, with the models' names before the layers'."""
        return [
            {**row, "name": f"{m}/{row['name']}"}
            for m, fx in self.extractors.items()
            for row in fx.feature_info
        ]

    def feature_names(self, times: Sequence[int]) -> list[str]:
        """Names of what a call with these timesteps gives, in order."""
        return [f"{m}/{n}" for m, fx in self.extractors.items() for n in fx.feature_names(times)]

    def identity(self) -> str:
        """A short hash of all backbones, for caches."""
        joined = " ".join(f"{m} {fx.identity()}" for m, fx in self.extractors.items())
        return hashlib.sha256(joined.encode()).hexdigest()[:16]

    def pixels(self, images: Any, value_range: str = "0,1") -> Tensor:
        """Images as the extractor with the largest size sees them."""
        largest = max(self.extractors.values(), key=lambda fx: fx.size or (0, 0))
        return largest.pixels(images, value_range)

    def __call__(
        self, images: Any, prompt: Any = None, t: int | Sequence[int] = 50, **options: Any
    ) -> Features:
        """Features of all models, in order; arguments as `FeatureExtractor`."""

        def run(name: str) -> dict[str, Tensor]:
            fx = self.extractors[name]
            given = prompt[name] if isinstance(prompt, dict) else prompt
            features = fx(images, given, t, **options)
            found = {f"{name}/{layer}": value.to(self.device) for layer, value in features.items()}
            # An offloaded model makes room for the next one.
            getattr(fx.pipeline, "maybe_free_model_hooks", lambda: None)()
            return found

        groups: dict[torch.device, list[str]] = {}
        for name, fx in self.extractors.items():
            groups.setdefault(fx.device, []).append(name)
        if len(groups) == 1:
            parts = [run(name) for name in self.extractors]
        else:
            with ThreadPoolExecutor(len(groups)) as pool:
                lists = pool.map(lambda names: [run(n) for n in names], groups.values())
                parts = [part for some in lists for part in some]
        joined = {key: value for part in parts for key, value in part.items()}
        order = [k for name in self.extractors for k in joined if k.startswith(f"{name}/")]
        return Features({key: joined[key] for key in order})

    def concat(self, images: Any, size: Size = "max", **options: Any) -> Tensor:
        """All features of all models in one tensor."""
        return self(images, **options).concat(size)

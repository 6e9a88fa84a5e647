"""The networks of the CIFAR-100 distillation tables, by the names that are usual there.

``resnet<6n+2>`` (He et al., 2016, section 4.2), the four times wider ``resnet8x4`` and
``resnet32x4``, ``wrn-<depth>-<width>`` (Zagoruyko and Komodakis, 2016), ``vgg8`` and ``vgg13`` with
batch normalisation. Any other name is asked of timm.
"""

import re
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from shared_core.errors import InputError, MissingExtraError

__all__ = ["create_classifier"]


class _Block(nn.Module):
    """Two 3×3 convolutions with a shortcut; batch norm after them, or before (WRN)."""

    def __init__(self, before: int, after: int, stride: int, *, preact: bool) -> None:
        super().__init__()
        self.preact = preact
        self.norm1 = nn.BatchNorm2d(before if preact else after)
        self.norm2 = nn.BatchNorm2d(after)
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or before != after:
            conv = nn.Conv2d(before, after, 1, stride, bias=False)
            self.shortcut = conv if preact else nn.Sequential(conv, nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps to feature maps."""
        if self.preact:
            first = F.relu(self.norm1(x))
            y = self.conv2(F.relu(self.norm2(self.conv1(first))))
            out: Tensor = y + (x if self.shortcut is None else self.shortcut(first))
            return out
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


def _residual(
    widths: Sequence[int], blocks: int, classes: int, channels: int, *, preact: bool
) -> nn.Module:
    stem: list[nn.Module] = [nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)]
    if not preact:
        stem += [nn.BatchNorm2d(widths[0]), nn.ReLU()]
    stages = []
    for i in range(3):
        before, after = widths[i], widths[i + 1]
        stride = 1 if i == 0 else 2
        stages.append(_Block(before, after, stride, preact=preact))
        stages += [_Block(after, after, 1, preact=preact) for _ in range(blocks - 1)]
    end = [nn.BatchNorm2d(widths[-1]), nn.ReLU()] if preact else []
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes)]
    return nn.Sequential(*stem, *stages, *end, *head)


def _vgg(per_stage: int, classes: int, channels: int) -> nn.Module:
    layers: list[nn.Module] = []
    before = channels
    for i, width in enumerate((64, 128, 256, 512, 512)):
        for _ in range(per_stage):
            layers += [nn.Conv2d(before, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        if i < 4:
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))


def create_classifier(name: str, classes: int, channels: int = 3) -> nn.Module:
    """A network with random weights.

    Args:
        name: ``resnet20``, ``resnet8x4``, ``wrn-16-2``, ``vgg8``, …, or a name of timm.
        classes: Number of classes.
        channels: Of the images.

    Raises:
        InputError: If the name is not known.
        MissingExtraError: If the name is none of these and timm is not installed.

    Examples:
        >>> sum(p.numel() for p in create_classifier("resnet20", 100).parameters())
        278324
    """
    if match := re.fullmatch(r"resnet(\d+)(x4)?", name):
        depth, wide = int(match[1]), bool(match[2])
        if depth >= 8 and (depth - 2) % 6 == 0:
            widths = (32, 64, 128, 256) if wide else (16, 16, 32, 64)
            return _residual(widths, (depth - 2) // 6, classes, channels, preact=False)
    if match := re.fullmatch(r"wrn-(\d+)-(\d+)", name):
        depth, k = int(match[1]), int(match[2])
        if depth >= 10 and (depth - 4) % 6 == 0 and k >= 1:
            widths = (16, 16 * k, 32 * k, 64 * k)
            return _residual(widths, (depth - 4) // 6, classes, channels, preact=True)
    if name in ("vgg8", "vgg13"):
        return _vgg(1 if name == "vgg8" else 2, classes, channels)
    try:
        import timm
    except ImportError as error:
        raise MissingExtraError("abkd", "clip", "timm") from error
    try:
        model: nn.Module = timm.create_model(name, num_classes=classes, in_chans=channels)
    except RuntimeError as error:
        raise InputError(
            f"no classifier is called {name!r}; accepted: resnet20 (any depth 6n+2), resnet8x4, "
            "wrn-16-2 (any 6n+4), vgg8, vgg13, or a model of timm"
        ) from error
    return model

"""Small networks to train from scratch, and the cosine head.

Any network works with the sharpness-aware methods; these are the ones that the presets and the
demo use. `create_model` makes a preset's network from its name.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from shared_core.errors import InputError, MissingExtraError

__all__ = ["NormedLinear", "create_model", "mlp", "resnet32_cifar", "small_cnn"]


class NormedLinear(nn.Module):
    """Cosine head: ``scale * cos(x, w_i)`` for the weight ``w_i`` of each class i.

    The head of LDAM (Cao et al., NeurIPS 2019), whose loss has a scale of its own, and of CLIP
    fine-tuning (see `focal_sam.adaptformer`). A feature of length zero has the cosine 0 with every
    class, and a finite gradient. Lengths are taken in float32 where the features or weights are
    float16 or bfloat16; logits have the type of the weights.

    Args:
        in_features: Width of the features.
        out_features: Number of classes.
        scale: Factor on the cosines, fixed.

    Attributes:
        weight: ``[out_features, in_features]``, at first random directions of length 1.

    Raises:
        InputError: If a size is below 1.

    Examples:
        >>> head = NormedLinear(2, 2, scale=10.0)
        >>> _ = head.weight.data.copy_(torch.tensor([[5.0, 0.0], [0.0, 0.1]]))
        >>> head(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).detach()
        tensor([[6., 8.],
                [0., 0.]])
    """

    def __init__(self, in_features: int, out_features: int, scale: float | int = 1.0) -> None:
        super().__init__()
        _check_sizes(in_features=in_features, out_features=out_features)
        self.in_features, self.out_features, self.scale = in_features, out_features, scale
        self.weight = nn.Parameter(_directions(torch.randn(out_features, in_features)))

    def forward(
        self, features: Float[Tensor, "*batch features"]
    ) -> Float[Tensor, "*batch classes"]:
        """The scaled cosines.

        Args:
            features: ``[..., in_features]``.
        """
        dtype = self.weight.dtype
        x, w = _directions(features).to(dtype), _directions(self.weight).to(dtype)
        return F.linear(x, w) * self.scale

    def extra_repr(self) -> str:  # noqa: D102
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, scale={self.scale}"
        )


def resnet32_cifar(num_classes: int, *, normed: bool = False) -> nn.Module:
    """The 32-layer residual network for 32x32 images, with 464,154 parameters for 10 classes.

    He et al., "Deep residual learning for image recognition", CVPR 2016, section 4.2: a 3x3
    convolution, three stages of five two-layer blocks with 16, 32 and 64 channels, and a linear
    layer on the pooled features. Shortcuts have no parameters (option A): where the stride is 2
    they take every second pixel and pad with channels of zeros, half of them before and half after.
    Weights are drawn as He et al. (ICCV 2015) have it, normal with variance ``2 / fan_in``.

    Args:
        num_classes: Number of classes.
        normed: End in the cosine head `NormedLinear`, for `focal_sam.losses.LDAMLoss`.

    Raises:
        InputError: If `num_classes` is below 1.

    Examples:
        >>> model = resnet32_cifar(10)
        >>> model(torch.zeros(2, 3, 32, 32)).shape, sum(p.numel() for p in model.parameters())
        (torch.Size([2, 10]), 464154)
    """
    _check_sizes(num_classes=num_classes)
    return _CifarResNet(num_classes, blocks=5, normed=normed)


def small_cnn(num_classes: int, in_channels: int = 3, width: int = 16) -> nn.Module:
    """Three 3x3 convolutions with batch norm, global average pooling and a linear layer.

    Args:
        num_classes: Number of classes.
        in_channels: Channels of the images, which are at least 4x4.
        width: Channels of the first convolution; the others have twice and four times as many.

    Raises:
        InputError: If a size is below 1.

    Examples:
        >>> small_cnn(10, in_channels=1)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    _check_sizes(num_classes=num_classes, in_channels=in_channels, width=width)
    layers: list[nn.Module] = []
    channels = [in_channels, width, 2 * width, 4 * width]
    for stage, (before, after) in enumerate(pairwise(channels)):
        if stage:
            layers.append(nn.MaxPool2d(2))
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)]
        layers.append(nn.ReLU())
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], num_classes)]
    model = nn.Sequential(*layers)
    model.apply(_he_init)
    return model


def mlp(in_features: int, hidden: Sequence[int], num_classes: int) -> nn.Sequential:
    """Fully connected layers with ReLU between them, normal weights of variance ``2 / fan_in``.

    Args:
        in_features: Numbers per sample; samples of any shape are flattened.
        hidden: Widths of the hidden layers; none makes a linear classifier.
        num_classes: Number of classes.

    Raises:
        InputError: If a size is below 1.

    Examples:
        >>> model = mlp(64, [64, 64], 10)
        >>> model(torch.zeros(2, 8, 8)).shape, sum(p.numel() for p in model.parameters())
        (torch.Size([2, 10]), 8970)
    """
    _check_sizes(in_features=in_features, num_classes=num_classes)
    _check_sizes(**{f"hidden[{i}]": width for i, width in enumerate(hidden)})
    sizes = [in_features, *hidden, num_classes]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    model.apply(_he_init)
    return model


def create_model(
    name: str, num_classes: int, *, class_names: Sequence[str] | None = None, **options: Any
) -> nn.Module:
    """Make a network from the name that a preset has for it.

    Args:
        name: ``resnet32``, ``resnet50`` (torchvision's, untrained), ``clip-vit-b16`` (OpenAI's
            CLIP with AdaptFormer, downloaded by transformers), ``small_cnn`` or ``mlp``.
        num_classes: Number of classes.
        class_names: The names of the classes, which ``clip-vit-b16`` needs for its head.
        options: What the maker of the network takes beside the number of classes; ``mlp`` needs
            `in_features` and `hidden`.

    Raises:
        InputError: If the name is unknown, or the class names are missing or not as many as the
            classes.
        MissingExtraError: If torchvision or transformers is needed and not installed.

    Examples:
        >>> create_model("mlp", 10, in_features=64, hidden=[64, 64])(torch.zeros(2, 64)).shape
        torch.Size([2, 10])
    """
    match name:
        case "resnet32":
            return resnet32_cifar(num_classes, **options)
        case "resnet50":
            return _resnet50(num_classes, **options)
        case "clip-vit-b16":
            if class_names is None or len(class_names) != num_classes:
                given = "none" if class_names is None else str(len(class_names))
                raise InputError(
                    f"clip-vit-b16 starts from the names of its {num_classes} classes, and got "
                    f"{given}; give one class name per class"
                )
            from focal_sam.adaptformer import clip_adaptformer

            return clip_adaptformer("openai/clip-vit-base-patch16", class_names, **options)
        case "small_cnn":
            return small_cnn(num_classes, **options)
        case "mlp":
            return mlp(num_classes=num_classes, **options)
    raise InputError(
        f"no network is called {name!r}; accepted: resnet32, resnet50, clip-vit-b16, small_cnn, mlp"
    )


def _resnet50(num_classes: int, **options: Any) -> nn.Module:
    _check_sizes(num_classes=num_classes)
    try:
        from torchvision.models import resnet50
    except ImportError as error:
        raise MissingExtraError("focal-sam", "vision", "torchvision") from error
    model: nn.Module = resnet50(weights=None, num_classes=num_classes, **options)
    return model


class _CifarResNet(nn.Module):
    """The CIFAR residual network with ``6 * blocks + 2`` layers."""

    def __init__(self, num_classes: int, *, blocks: int, normed: bool) -> None:
        super().__init__()
        self.conv = _conv3x3(3, 16)
        self.norm = nn.BatchNorm2d(16)
        stages = []
        for before, after in ((16, 16), (16, 32), (32, 64)):
            first = _BasicBlock(before, after, stride=after // before)
            stages.append(
                nn.Sequential(first, *(_BasicBlock(after, after) for _ in range(blocks - 1)))
            )
        self.stages = nn.Sequential(*stages)
        self.classifier = NormedLinear(64, num_classes) if normed else nn.Linear(64, num_classes)
        self.apply(_he_init)

    def forward(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch classes"]:
        x = self.stages(F.relu(self.norm(self.conv(images))))
        logits: Tensor = self.classifier(x.mean(dim=(2, 3)))
        return logits


class _BasicBlock(nn.Module):
    """``relu(shortcut(x) + norm(conv(relu(norm(conv(x))))))``."""

    def __init__(self, before: int, after: int, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.extra = after - before
        self.conv1 = _conv3x3(before, after, stride)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = _conv3x3(after, after)
        self.norm2 = nn.BatchNorm2d(after)

    def shortcut(
        self, x: Float[Tensor, "batch before height width"]
    ) -> Float[Tensor, "batch after new_height new_width"]:
        """Option A: every `stride`-th pixel, and channels of zeros around."""
        if self.stride == 1 and not self.extra:
            return x
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))

    def forward(
        self, x: Float[Tensor, "batch before height width"]
    ) -> Float[Tensor, "batch after new_height new_width"]:
        residual = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(self.shortcut(x) + residual)


def _conv3x3(before: int, after: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)


def _he_init(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _directions(vectors: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch features"]:
    """Vectors divided by their length, zeros where it is 0; half precision becomes float32."""
    if vectors.dtype in (torch.float16, torch.bfloat16):
        vectors = vectors.float()
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    # Dividing by a small constant instead would give zeros a gradient as large as its inverse.
    return vectors / torch.where(length > 1e-12, length, 1.0)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise InputError(f"{name} is {size}: it must be at least 1")

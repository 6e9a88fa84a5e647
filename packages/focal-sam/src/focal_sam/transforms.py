"""The image transforms of the presets, for training and for evaluation.

| name | training | evaluation |
|---|---|---|
| ``cifar`` | 32x32 crop of the image padded by 4, flip | none |
| ``imagenet-lt`` | resized crop 224, flip, colour jitter 0.4 | resize 256, centre crop 224 |
| ``inat2018`` | resized crop 224, flip | resize 256, centre crop 224 |
| ``clip`` | resized crop 224, flip | resize 224, centre crop 224 |

All end in float32 tensors ``[3, height, width]``, standardised per channel. Images are resized
bilinearly, also for CLIP (whose own preprocessing is bicubic).
"""

from collections.abc import Callable
from typing import Any

from shared_core.errors import InputError, MissingExtraError

__all__ = ["NORMALIZATION", "image_transform"]

NORMALIZATION: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "cifar": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "imagenet-lt": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "inat2018": ((0.466, 0.471, 0.380), (0.195, 0.194, 0.192)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
"""Mean and standard deviation of the channels, for pixels in [0, 1], by transform name."""


def image_transform(name: str, *, train: bool) -> Callable[[Any], Any]:
    """The transform of PIL images that a preset names.

    Args:
        name: ``cifar``, ``imagenet-lt``, ``inat2018`` or ``clip``; see `focal_sam.transforms`.
        train: With the random augmentation of training; it draws from torch's global generator.

    Returns:
        A function from a PIL image in RGB mode to a float32 tensor ``[3, height, width]``.

    Raises:
        InputError: If the name is unknown.
        MissingExtraError: If torchvision is not installed.

    Examples:
        >>> import PIL.Image
        >>> image = PIL.Image.new("RGB", (320, 240))
        >>> image_transform("clip", train=False)(image).shape
        torch.Size([3, 224, 224])
    """
    if name not in NORMALIZATION:
        raise InputError(f"no transform is called {name!r}; accepted: {', '.join(NORMALIZATION)}")
    try:
        import torch
        from torchvision.transforms import v2
    except ImportError as error:
        raise MissingExtraError("focal-sam", "vision", "torchvision") from error
    steps: list[Any] = []
    if name == "cifar":
        steps += [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()] if train else []
    elif train:
        steps += [v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()]
        if name == "imagenet-lt":
            steps.append(v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0))
    else:
        steps += [v2.Resize(224 if name == "clip" else 256), v2.CenterCrop(224)]
    steps += [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    mean, std = NORMALIZATION[name]
    transform: Callable[[Any], Any] = v2.Compose([*steps, v2.Normalize(mean, std)])
    return transform

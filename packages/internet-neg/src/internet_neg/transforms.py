"""The image transforms of the literature."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from internet_neg.errors import InterNegError

__all__ = ["load_transform"]


def load_transform(name: str, encoder: Any) -> Callable[[Any], Tensor]:
    """The image transform of a benchmark.

    Args:
        name: ``clip`` for the model's own, ``openood`` for OpenOOD's: the short side to 256 pixels,
            the middle 224 (both in proportion for a model of another size), CLIP's mean and
            deviation.
        encoder: For which model.

    Raises:
        InterNegError: If the name is not known.

    Examples:
        >>> import PIL.Image
        >>> from internet_neg.mini_clip import build_mini_clip
        >>> load_transform("openood", build_mini_clip())(PIL.Image.new("RGB", (300, 400))).shape
        torch.Size([3, 32, 32])
    """
    if name == "clip":
        own: Callable[[Any], Tensor] = encoder.preprocess
        return own
    if name != "openood":
        raise InterNegError(f"transform {name!r}; accepted: clip, openood")
    import PIL.Image
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
    from torchvision import transforms

    side = encoder.preprocess(PIL.Image.new("RGB", (256, 256))).shape[-1]
    chain: Callable[[Any], Tensor] = transforms.Compose(
        [
            transforms.Resize(round(side * 256 / 224), transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(side),
            transforms.ToTensor(),
            transforms.Normalize(OPENAI_DATASET_MEAN, OPENAI_DATASET_STD),
        ]
    )
    return chain

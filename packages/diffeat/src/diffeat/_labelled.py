"""Images with label maps: read from folders, and their features batch by batch."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared_core.errors import InputError

LabelledImages = tuple[Tensor, Tensor]


def batches(
    fx: Any,
    data: LabelledImages,
    t: Any,
    batch_size: int,
    prompt: Any,
    seed: int,
    first_id: str,
    **options: Any,
) -> Iterator[tuple[Any, Tensor]]:
    """Features and labels, batch by batch; noise is named by the image's number."""
    images, labels = data
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        ids = [f"{first_id}{i}" for i in range(start, start + len(images[part]))]
        yield fx(images[part], prompt, t, ids=ids, seed=seed, **options), labels[part]


def load_labelled(
    samples: Sequence[tuple[str, Any]], folder: Path, fx: Any, test_share: float
) -> tuple[LabelledImages, LabelledImages]:
    """Images and their label PNGs as a training and a test set, at the extractor's size.

    Raises:
        InputError: If a label map is missing or either set would be empty.
    """
    import numpy as np
    from PIL import Image

    maps = []
    for name, _ in samples:
        file = (folder / name).with_suffix(".png")
        if not file.is_file():
            raise InputError(f"there is no label map {file} for the image {name}")
        with Image.open(file) as opened:
            image: Image.Image = opened
            if image.mode not in ("L", "P", "I;16", "I"):
                raise InputError(f"{file} is {image.mode}; accepted: one channel of class numbers")
            size = fx.size and (fx.size[1], fx.size[0])
            image = image.resize(size, Image.Resampling.NEAREST) if size else image
            maps.append(torch.from_numpy(np.array(image).astype("int64")))
    cut = round(len(samples) * (1 - test_share))
    if not 0 < cut < len(samples):
        raise InputError(f"--test-share {test_share} of {len(samples)} images leaves an empty set")
    pixels = ((fx.pixels([image for _, image in samples]) + 1) * 127.5).round().to(torch.uint8)
    labels = torch.stack(maps)
    return (pixels[:cut], labels[:cut]), (pixels[cut:], labels[cut:])

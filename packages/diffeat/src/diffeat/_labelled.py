"""Images with label maps: read from folders, and their features batch by batch."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared_core.data.folders import label_maps
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
    maps = label_maps(folder, [name for name, _ in samples], fx.size)
    cut = round(len(samples) * (1 - test_share))
    if not 0 < cut < len(samples):
        raise InputError(f"--test-share {test_share} of {len(samples)} images leaves an empty set")
    pixels = ((fx.pixels([image for _, image in samples]) + 1) * 127.5).round().to(torch.uint8)
    labels = torch.stack([torch.from_numpy(map_) for map_ in maps.values()])
    return (pixels[:cut], labels[:cut]), (pixels[cut:], labels[cut:])

"""The data of a training run: a long-tailed training set, a balanced test set, their transforms."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from focal_sam.data import LongTailSubset, class_counts, long_tail_counts, read_image_list
from focal_sam.transforms import image_transform
from shared_core.data.loading import ImageDataset, load_images
from shared_core.errors import InputError

__all__ = ["ImageData", "load_data", "to_tensor"]

EMBEDDED = ("digits", "shapes")


@dataclass
class ImageData:
    """What a run trains and tests on.

    Attributes:
        train: Pairs of an image tensor and a label, augmented.
        validation: Held out of the training images, not augmented; ``None`` unless asked for.
        test: Not augmented.
        counts: Training images of each class.
        class_names: The name of each class.
    """

    train: Dataset[Any]
    validation: Dataset[Any] | None
    test: Dataset[Any]
    counts: list[int]
    class_names: list[str]


def to_tensor(image: Any) -> Tensor:
    """A PIL image in RGB mode as a float32 tensor ``[3, height, width]`` around 0.

    Examples:
        >>> import PIL.Image
        >>> to_tensor(PIL.Image.new("RGB", (8, 6), (255, 255, 255))).mean()
        tensor(1.)
    """
    pixels = torch.from_numpy(np.array(image))
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def _read(source: str, split: str, lists: tuple[str | None, str], transform: Any) -> ImageDataset:
    """One split from an image list, or from whatever `load_images` takes."""
    file, root = lists
    if file is not None:
        return read_image_list(file, root, transform=transform)
    return load_images(source, split=split, transform=transform)


def load_data(
    source: str,
    *,
    transform: str,
    test_source: str | None = None,
    train_list: str | None = None,
    test_list: str | None = None,
    imbalance_ratio: int | float | None = None,
    validation_fraction: float = 0.0,
    seed: int = 0,
) -> ImageData:
    """Load training and test images, and cut the training set to a long tail.

    Args:
        source: An embedded name, a path or a hub id, as `shared_core.data.loading.load_images`
            takes them; with lists, the folder that their paths start from.
        transform: A name of `focal_sam.transforms.image_transform`, or ``none`` for plain tensors.
        test_source: Where the test images are, if not in `source`'s split ``test``.
        train_list: A ``path label`` file of the training images.
        test_list: The same of the test images.
        imbalance_ratio: Most frequent over rarest class of the exponential profile; the subset is
            the usual one of CIFAR-LT for seed 0. ``None`` keeps all images.
        validation_fraction: Share of each class's training images that is held out (at least one
            of a class with two or more).
        seed: Of the subset.

    Raises:
        InputError: If one list comes without the other, the test set has other classes, or the
            data cannot be loaded.

    Examples:
        >>> data = load_data("digits", transform="none", imbalance_ratio=20)
        >>> data.counts
        [138, 98, 70, 50, 36, 26, 18, 13, 9, 6]
    """
    if (train_list is None) != (test_list is None):
        raise InputError("give --train-list and --test-list together, or neither")
    if train_list is None and source not in EMBEDDED and test_source is None:
        path = Path(source)
        if path.is_file():
            raise InputError(
                f"{source} is one file, so one split; say where the test images are: --test-data"
            )
    plain = transform == "none"
    for_training = to_tensor if plain else image_transform(transform, train=True)
    for_testing = to_tensor if plain else image_transform(transform, train=False)
    whole = _read(source, "train", (train_list, source), for_training)
    test = _read(test_source or source, "test", (test_list, source), for_testing)
    names = whole.class_names if len(whole.class_names) >= len(test.class_names) else None
    if names is None or (not train_list and whole.class_names != test.class_names):
        raise InputError(
            f"the training set has {len(whole.class_names)} classes and the test set "
            f"{len(test.class_names)}, or their names differ; they have to be the same"
        )
    available = class_counts(whole, len(names))
    empty = [name for name, count in zip(names, available, strict=True) if count == 0]
    if empty:
        raise InputError(f"the training set has no image of class {empty[0]!r}")
    if imbalance_ratio is None:
        counts = available
    else:
        counts = long_tail_counts(min(available), len(names), imbalance_ratio=imbalance_ratio)
    subset = LongTailSubset(whole, counts, seed=seed, rng="legacy")
    if validation_fraction == 0:
        return ImageData(subset, None, test, counts, names)
    kept, held = _held_out(subset.targets, len(names), validation_fraction, seed)
    plain_view = ImageDataset(whole.images, whole.targets, names, for_testing)
    return ImageData(
        Subset(subset, kept),
        Subset(plain_view, [subset.indices[i] for i in held]),
        test,
        class_counts([subset.targets[i] for i in kept], len(names)),
        names,
    )


def _held_out(
    targets: list[int], classes: int, fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Positions to keep and positions to hold out, a share of each class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(targets)
    held: list[int] = []
    for label in range(classes):
        members = (labels == label).nonzero().squeeze(1)
        size = max(1, round(fraction * len(members))) if len(members) > 1 else 0
        held += members[torch.randperm(len(members), generator=generator)[:size]].tolist()
    out = set(held)
    return [i for i in range(len(targets)) if i not in out], held

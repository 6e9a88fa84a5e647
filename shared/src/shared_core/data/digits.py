"""Real images without a download: the 1,797 handwritten digits that scikit-learn ships.

They are the test half of the UCI data set "Optical Recognition of Handwritten Digits" (Alpaydin and
Kaynak, 1998): 8x8 pixels with 17 levels, 174 to 183 images of each digit.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import PIL.Image
from jaxtyping import Int64, UInt8

from shared_core.data._draws import raw
from shared_core.data.loading import ImageDataset
from shared_core.errors import InputError

__all__ = ["digit_arrays", "load_digits"]

Split = Literal["train", "test"]


def digit_arrays(
    split: Split | None = None, *, test_per_class: int = 36, seed: int = 0
) -> tuple[UInt8[np.ndarray, "n 8 8"], Int64[np.ndarray, " n"]]:
    """The images, with values from 0 to 16, and their labels.

    The test split holds the same number of images of each digit, drawn at random; the training
    split holds the rest. Both keep the order of the whole set.

    Args:
        split: ``train`` or ``test``; by default all 1,797 images.
        test_per_class: Test images of each digit, from 1 to 173. The default leaves 80 % for
            training.
        seed: Seed of the split. A smaller test split is a part of a larger one of the same seed.

    Returns:
        Images, uint8, shape [n, 8, 8], and labels, int64, shape [n].

    Raises:
        InputError: If the split is unknown, or `test_per_class` or `seed` out of range.

    Examples:
        >>> images, labels = digit_arrays("test")
        >>> images.shape, np.bincount(labels).tolist()
        ((360, 8, 8), [36, 36, 36, 36, 36, 36, 36, 36, 36, 36])
    """
    if split not in (None, "train", "test"):
        raise InputError(f"split {split!r} is not known; accepted: train, test")
    images, labels = _digits()
    if split is None:
        return images.copy(), labels.copy()
    most = int(np.bincount(labels).min()) - 1
    if not 1 <= test_per_class <= most:
        raise InputError(f"test_per_class={test_per_class}; accepted: 1 to {most}")
    keys = raw(seed, "order", np.arange(labels.size), 1)[:, 0]
    held_out = np.zeros(labels.size, dtype=bool)
    for digit in range(10):
        members = np.flatnonzero(labels == digit)
        held_out[members[np.argsort(keys[members], kind="stable")[:test_per_class]]] = True
    chosen = held_out if split == "test" else ~held_out
    return images[chosen], labels[chosen]


def load_digits(
    split: Split | None = None,
    *,
    test_per_class: int = 36,
    seed: int = 0,
    transform: Callable[[PIL.Image.Image], Any] | None = None,
) -> ImageDataset:
    """The digits as labelled 8x8 images, like ``load_images("digits", split=...)``.

    Args:
        split: ``train`` or ``test``; by default all 1,797 images.
        test_per_class: Test images of each digit; see `digit_arrays`.
        seed: Seed of the split.
        transform: Applied to each image, a PIL image in RGB mode.

    Raises:
        InputError: As `digit_arrays`.

    Examples:
        >>> train = load_digits("train")
        >>> len(train), train[0][0].size, train.class_names[train[0][1]]
        (1437, (8, 8), '0')
    """
    images, labels = digit_arrays(split, test_per_class=test_per_class, seed=seed)
    pixels = ((images.astype(np.uint16) * 255 + 8) // 16).astype(np.uint8)
    return ImageDataset(pixels, labels.tolist(), [str(digit) for digit in range(10)], transform)


@functools.cache
def _digits() -> tuple[UInt8[np.ndarray, "1797 8 8"], Int64[np.ndarray, " 1797"]]:
    import sklearn.datasets

    bunch = sklearn.datasets.load_digits()
    return bunch.images.astype(np.uint8), bunch.target.astype(np.int64)

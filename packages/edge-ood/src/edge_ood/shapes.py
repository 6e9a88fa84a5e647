"""The demo's part of shared-core's image world: what is known, what trains, what is unknown."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from shared_core.data.shapes import BACKGROUNDS, MultiLabelScenes, ShapesWorld, render

__all__ = ["OOD_SETS", "known_images", "outlier_images", "unknown_images"]

OOD_SETS = ("shapes", "colors", "textures")

_COLORS = ["red", "green", "blue", "yellow"]
_KNOWN: dict[str, Any] = {
    "size": 32,
    "max_objects": 3,
    "label": "shape_color",
    "order": "random",
    "shapes": ["circle", "square", "triangle", "ring", "cross"],
    "colors": _COLORS,
    "fills": ["solid"],
    "backgrounds": ["plain", "shaded"],
}
_OE_SHAPES = ["bar", "crescent", "arrow"]
_OE_BACKGROUNDS = ["plain", "shaded", "noisy", "gridded"]
_UNKNOWN_SHAPES = ["star", "hexagon", "heart", "gear"]
_UNKNOWN_COLORS = ["orange", "white"]
_UNKNOWN_BACKGROUNDS = ["wavy", "speckled"]
# Every set but the ID images is drawn in a world of its own: in one world, images of equal number
# share their layout, and a detector could tell sets apart, or mistake them, by that.
_SETS = ("oe objects", "oe textures", "shapes", "colors", "textures")


def known_images(
    seed: int, n: int, split: Literal["train", "test"] = "train", imbalance: float = 30.0
) -> MultiLabelScenes:
    """ID images: 1 to 3 solid shapes, 20 labels (5 shapes in 4 colors) with a long tail.

    Args:
        seed: Of the world; also orders the labels by frequency.
        n: How many.
        split: ``train`` or ``test``.
        imbalance: Most frequent over rarest label.

    Examples:
        >>> known_images(0, 3).labels.shape
        (3, 20)
    """
    return ShapesWorld(seed).multilabel(n, **_KNOWN, imbalance=imbalance, split=split)


def outlier_images(seed: int, n: int) -> dict[str, np.ndarray]:
    """Outliers to train on: ``objects`` of other shapes, and ``textures`` without an object.

    Args:
        seed: Of the world.
        n: How many in all.

    Examples:
        >>> {name: len(images) for name, images in outlier_images(0, 5).items()}
        {'objects': 2, 'textures': 3}
    """
    wanted = {**_KNOWN, "shapes": _OE_SHAPES, "colors": [*_COLORS, "purple", "cyan"]}
    objects = _world(seed, "oe objects").multilabel(n // 2, **wanted, imbalance=1)
    textures = _textures(_OE_BACKGROUNDS, n - n // 2, _world(seed, "oe textures").seed)
    return {"objects": objects.images, "textures": textures}


def unknown_images(seed: int, n: int) -> dict[str, np.ndarray]:
    """OOD test images: unknown ``shapes`` and ``colors`` (near), unknown ``textures`` (far).

    No shape, color or background that makes an image unknown occurs in `outlier_images`.

    Args:
        seed: Of the world.
        n: How many of each.

    Examples:
        >>> list(unknown_images(0, 2))
        ['shapes', 'colors', 'textures']
    """
    changes = {"shapes": _UNKNOWN_SHAPES, "colors": _UNKNOWN_COLORS}
    sets = {
        name: _world(seed, name).multilabel(n, **{**_KNOWN, name: values}, imbalance=1).images
        for name, values in changes.items()
    }
    return {**sets, "textures": _textures(_UNKNOWN_BACKGROUNDS, n, _world(seed, "textures").seed)}


def _world(seed: int, name: str) -> ShapesWorld:
    """The world of a set of images, another for every seed and every set."""
    [derived] = np.random.SeedSequence([seed, 1 + _SETS.index(name)]).generate_state(1)
    return ShapesWorld(int(derived) % 2**31)


def _textures(backgrounds: Sequence[str], n: int, seed: int) -> np.ndarray:
    kinds = np.array([BACKGROUNDS.index(b) for b in backgrounds])
    images: np.ndarray = render(-1, -1, -1, kinds[np.arange(n) % len(kinds)], seed=seed)
    return images

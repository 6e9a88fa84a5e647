"""Images of the shapes world by their attributes, and ways to use and to see them."""

import math
from collections.abc import Sequence
from typing import Literal, overload

import numpy as np
import PIL.Image
import torch
from jaxtyping import Bool, Float32, Int, UInt8
from torch import Tensor

from shared_core.data._attributes import check_attributes
from shared_core.data._render import draw_images
from shared_core.errors import InputError

__all__ = ["check_count", "check_seed_and_size", "contact_sheet", "image_tensor", "render"]

Indices = int | Sequence[int] | Int[np.ndarray, " _"]
Pixels = UInt8[np.ndarray, "n {size} {size} 3"]
Masks = Bool[np.ndarray, "n {size} {size}"]

_SMALLEST, _LARGEST = 8, 512


@overload
def render(
    shape: Indices,
    color: Indices,
    fill: Indices,
    background: Indices,
    seed: int,
    size: int = 32,
    return_mask: Literal[False] = False,
    *,
    indices: Indices | None = None,
) -> Pixels: ...


@overload
def render(
    shape: Indices,
    color: Indices,
    fill: Indices,
    background: Indices,
    seed: int,
    size: int = 32,
    *,
    return_mask: Literal[True],
    indices: Indices | None = None,
) -> tuple[Pixels, Masks]: ...


def render(
    shape: Indices,
    color: Indices,
    fill: Indices,
    background: Indices,
    seed: int,
    size: int = 32,
    return_mask: bool = False,
    *,
    indices: Indices | None = None,
) -> Pixels | tuple[Pixels, Masks]:
    """Draw one object per image, of random size, place, rotation, shade and pattern.

    Args:
        shape: Index of each image's shape, one or [n]; -1 draws no object.
        color: Index of its color; -1 with no object.
        fill: Index of its fill; -1 with no object.
        background: Index of its background.
        seed: Seed of everything random, at least 0.
        size: Pixels per side, 8 to 512.
        return_mask: Whether to return where the objects are as well.
        indices: The number of each image; by default 0, 1, 2, ... Image i depends on the seed, its
            number and its attributes alone.

    Returns:
        The images, uint8 [n, size, size, 3], and with `return_mask` the masks, [n, size, size]:
        the pixels that the object covers by more than half.

    Raises:
        InputError: If an attribute, the seed or the size is out of range, or lengths differ.

    Examples:
        >>> images, masks = render([0, 6], [0, 3], 0, 0, seed=7, return_mask=True)
        >>> images.shape, masks.shape
        ((2, 32, 32, 3), (2, 32, 32))
        >>> again = render(6, 3, 0, 0, seed=7, indices=1)
        >>> bool((again == images[1:]).all())
        True
    """
    check_seed_and_size(seed, size)
    given = [shape, color, fill, background, *([] if indices is None else [indices])]
    columns = [np.atleast_1d(np.asarray(column)) for column in given]
    for column in columns:
        if column.ndim != 1 or (column.size and column.dtype.kind not in "iu"):
            raise InputError(
                f"attributes or indices have shape {column.shape} and dtype {column.dtype}; "
                "accepted: an integer, or one per image"
            )
    lengths = sorted({column.size for column in columns if column.size != 1})
    if len(lengths) > 1:
        raise InputError(f"attributes and indices have lengths {lengths}; give one per image")
    table = np.stack(np.broadcast_arrays(*columns), axis=1).astype(np.int64)
    attributes = table[:, :4]
    check_attributes(attributes)
    numbers = np.arange(len(table), dtype=np.int64) if indices is None else table[:, 4]
    if numbers.min(initial=0) < 0:
        raise InputError(f"index {numbers.min()} is negative; images are numbered from 0")
    images, masks = draw_images(attributes, numbers, seed, size)
    return (images, masks) if return_mask else images


def image_tensor(
    images: UInt8[np.ndarray, "n height width 3"],
) -> Float32[Tensor, "n 3 height width"]:
    """Images as a tensor for a network: channels first, values from 0 to 1.

    Args:
        images: Pixels, as the world makes them.

    Examples:
        >>> from shared_core.data.shapes import ShapesWorld
        >>> image_tensor(ShapesWorld(0).sample(2).images).shape
        torch.Size([2, 3, 32, 32])
    """
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float() / 255


def contact_sheet(
    images: UInt8[np.ndarray, "n height width 3"], columns: int | None = None, zoom: int = 2
) -> PIL.Image.Image:
    """All images in rows on one sheet, to look at.

    Args:
        images: Pixels, in reading order.
        columns: Images per row; by default as many as rows.
        zoom: How many pixels wide to show each pixel.

    Raises:
        InputError: If there is no image, or `columns` or `zoom` is below 1.

    Examples:
        >>> from shared_core.data.shapes import ShapesWorld
        >>> contact_sheet(ShapesWorld(0).sample(6).images, columns=3, zoom=1).size
        (104, 70)
    """
    n, height, width, _ = images.shape
    columns = math.isqrt(n - 1) + 1 if columns is None and n else columns
    for name, number in (("the number of images", n), ("columns", columns), ("zoom", zoom)):
        check_count(name, number or 0)
    assert columns is not None
    rows, gap = -(-n // columns), 2
    sheet = np.full((rows * columns, height * zoom + gap, width * zoom + gap, 3), 255, np.uint8)
    sheet[:n, gap:, gap:] = images.repeat(zoom, axis=1).repeat(zoom, axis=2)
    sheet = sheet.reshape(rows, columns, *sheet.shape[1:]).swapaxes(1, 2)
    sheet = sheet.reshape(rows * sheet.shape[1], -1, 3)
    return PIL.Image.fromarray(np.pad(sheet, ((0, gap), (0, gap), (0, 0)), constant_values=255))


def check_seed_and_size(seed: int, size: int) -> None:
    if seed < 0:
        raise InputError(f"seed={seed}; it has to be at least 0")
    if not _SMALLEST <= size <= _LARGEST:
        raise InputError(f"size={size}; accepted: {_SMALLEST} to {_LARGEST} pixels")


def check_count(name: str, number: int) -> None:
    if number < 1:
        raise InputError(f"{name} is {number}; it has to be at least 1")

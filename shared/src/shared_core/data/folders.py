"""Images of a folder by their names, and label maps that lie beside them."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int64

from shared_core.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["IMAGE_SUFFIXES", "label_maps", "named_images"]

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
MODES = ("L", "P", "I;16", "I")  # one channel of whole numbers


def named_images(source: str | os.PathLike[str]) -> "list[tuple[str, Image.Image]]":
    """All images below a folder, sorted, or one image file; each with its name, in RGB.

    Args:
        source: The folder or file. Names are paths relative to the folder, with slashes.

    Raises:
        InputError: If there is no image, or one cannot be read.

    Examples:
        >>> from PIL import Image
        >>> folder = getfixture("tmp_path"); (folder / "cats").mkdir()
        >>> Image.new("L", (4, 2)).save(folder / "cats" / "a.png")
        >>> [(name, image.mode, image.size) for name, image in named_images(folder)]
        [('cats/a.png', 'RGB', (4, 2))]
    """
    from PIL import Image, UnidentifiedImageError

    root = Path(source)
    files = [root] if root.is_file() else sorted(root.rglob("*")) if root.is_dir() else []
    files = [f for f in files if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file()]
    if not files:
        raise InputError(f"{root} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    found = []
    for file in files:
        name = file.name if root.is_file() else file.relative_to(root).as_posix()
        try:
            with Image.open(file) as image:
                found.append((name, image.convert("RGB")))
        except (OSError, UnidentifiedImageError) as error:
            raise InputError(f"{file} cannot be read as an image: {error}") from error
    return found


def label_maps(
    folder: str | os.PathLike[str],
    names: Iterable[str],
    size: tuple[int, int] | None = None,
) -> dict[str, Int64[np.ndarray, "h w"]]:
    """Label maps of images: PNGs of the same names, one channel of class numbers.

    Args:
        folder: Where they lie.
        names: Of the images, as from `named_images`.
        size: Height and width to bring them to (nearest neighbour); as they are if ``None``.

    Raises:
        InputError: If one is missing, cannot be read or has several channels.

    Examples:
        >>> from PIL import Image
        >>> folder = getfixture("tmp_path")
        >>> Image.new("L", (4, 2), 3).save(folder / "a.png")
        >>> label_maps(folder, ["a.jpg"], size=(1, 2))["a.jpg"]
        array([[3, 3]])
    """
    from PIL import Image, UnidentifiedImageError

    found = {}
    for name in names:
        file = (Path(folder) / name).with_suffix(".png")
        if not file.is_file():
            raise InputError(f"there is no label map {file} for the image {name}")
        try:
            with Image.open(file) as opened:
                image: Image.Image = opened
                if image.mode not in MODES:
                    raise InputError(
                        f"{file} is {image.mode}; accepted: one channel of class numbers"
                    )
                if size is not None:
                    image = image.resize(size[::-1], Image.Resampling.NEAREST)
                found[name] = np.array(image).astype(np.int64)
        except (OSError, UnidentifiedImageError) as error:
            raise InputError(f"{file} cannot be read as an image: {error}") from error
    return found

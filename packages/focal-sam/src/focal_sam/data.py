"""Long-tailed data: the CIFAR-LT profiles, and the image lists of ImageNet-LT and iNaturalist.

`long_tail_counts`, `long_tail_indices`, `LongTailSubset` and `class_counts` are those of
`shared_core.data.long_tail`. ImageNet-LT and iNaturalist 2018 come as images and text files of
``path label`` lines, which `read_image_list` reads.

Examples:
    >>> counts = long_tail_counts(5000, 10, imbalance_ratio=100)
    >>> counts[0], counts[-1], sum(counts)
    (5000, 50, 12406)
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import PIL.Image

from shared_core.data.loading import ImageDataset
from shared_core.data.long_tail import (
    LongTailSubset,
    class_counts,
    long_tail_counts,
    long_tail_indices,
)
from shared_core.errors import InputError

__all__ = [
    "LongTailSubset",
    "class_counts",
    "long_tail_counts",
    "long_tail_indices",
    "read_image_list",
]


def read_image_list(
    file: str | os.PathLike[str],
    root: str | os.PathLike[str],
    *,
    class_names: Sequence[str] | None = None,
    transform: Callable[[PIL.Image.Image], Any] | None = None,
) -> ImageDataset:
    r"""Read a text file with an image path and a class index on each line.

    Images are opened when an item is asked for; before, only the first one is looked for, to find
    a wrong `root` early.

    Args:
        file: The list, in UTF-8: ``train/n01440764/n01440764_190.JPEG 0``. Paths can hold spaces;
            empty lines are passed over.
        root: The folder that the paths start from.
        class_names: The name of each class; by default the indices ``"0"``, ``"1"``, … up to the
            largest in the list.
        transform: Applied to each image, a PIL image in RGB mode.

    Raises:
        InputError: If the list is missing, empty or not such text, a label is not the index of a
            class, or (when an item is read) an image is missing or damaged. The message names the
            line.

    Examples:
        >>> folder = getfixture("tmp_path")
        >>> PIL.Image.new("RGB", (5, 4)).save(folder / "newt.png")
        >>> _ = (folder / "train.txt").write_text("newt.png 1\n")
        >>> data = read_image_list(folder / "train.txt", folder, class_names=["eel", "newt"])
        >>> image, label = data[0]
        >>> image.size, data.class_names[label], class_counts(data)
        ((5, 4), 'newt', [0, 1])
    """
    name = os.fspath(file)
    try:
        lines = Path(file).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the image list {name} cannot be read: {error}") from error
    paths, numbers, labels = [], [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        path, label = _parsed(line, f"{name}, line {number}", class_names)
        paths.append(path)
        numbers.append(number)
        labels.append(label)
    if not paths:
        raise InputError(f"the image list {name} has no lines; expected: path label")
    if not (Path(root) / paths[0]).is_file():
        raise InputError(
            f"{name}, line {numbers[0]}: there is no image {paths[0]} in {os.fspath(root)}; "
            "root is the folder that the paths start from"
        )
    if class_names is None:
        class_names = [str(label) for label in range(max(labels) + 1)]
    return ImageDataset(
        _ImageFiles(name, Path(root), paths, numbers), labels, class_names, transform
    )


def _parsed(line: str, where: str, class_names: Sequence[str] | None) -> tuple[str, int]:
    """The path and the label of a line."""
    try:
        path, text = line.strip().rsplit(maxsplit=1)
        label = int(text)
    except ValueError as error:
        raise InputError(f"{where}: expected a path and a class index, got {line!r}") from error
    if label < 0 or (class_names is not None and label >= len(class_names)):
        limit = "" if class_names is None else f" and below the {len(class_names)} classes"
        raise InputError(f"{where}: label {label}; class indices are at least 0{limit}")
    return path, label


class _ImageFiles(Sequence[PIL.Image.Image]):
    """The images of a list, opened when asked for."""

    def __init__(self, name: str, root: Path, paths: list[str], numbers: list[int]) -> None:
        self.name, self.root, self.paths, self.numbers = name, root, paths, numbers

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        path = self.root / self.paths[index]
        try:
            with PIL.Image.open(path) as image:
                return image.convert("RGB")
        except (OSError, SyntaxError) as error:  # Pillow raises both
            raise InputError(
                f"{self.name}, line {self.numbers[index]}: {path} cannot be read: {error}"
            ) from error

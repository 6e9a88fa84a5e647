"""Base and new classes, and few shots of the base ones, as the paper's benchmarks have them."""

import csv
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import Dataset

from shared_core.data.loading import ImageDataset, load_images
from shared_core.errors import InputError

__all__ = [
    "OpenworldData",
    "Part",
    "few_shots",
    "load_openworld_data",
    "read_names",
    "read_split_file",
]


class Part(Dataset[tuple[Any, int]]):
    """Some images of a data set, with labels counted from 0.

    Args:
        data: The data set.
        indices: Which images.
        first: The label that becomes 0.
    """

    def __init__(self, data: ImageDataset, indices: Sequence[int], first: int = 0) -> None:
        self.data = data
        self.indices = list(indices)
        self.first = first
        self.targets = [data.targets[i] - first for i in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.data[self.indices[index]][0], self.targets[index]

    def stamps(self) -> list[tuple[str, int, int]] | None:
        """Path, size in bytes and time of change in ns of each image's file, if they are files."""
        images = self.data.images
        return [images.stamp(i) for i in self.indices] if isinstance(images, _Files) else None


class OpenworldData(NamedTuple):
    """The parts that training and testing need.

    Attributes:
        train: Few shots of the base classes.
        base: Test images of base classes.
        new: Test images of new classes, labels from 0.
        base_classes: Names of the base classes.
        new_classes: Names of the new classes.
        manifest: Which training images were drawn, by class.
    """

    train: Part
    base: Part
    new: Part
    base_classes: list[str]
    new_classes: list[str]
    manifest: dict[str, list[int]]

    def with_transform(self, transform: Callable[[Any], Any]) -> "OpenworldData":
        """The same, with `transform` applied to each image: a backbone may come after the data."""
        for part in (self.train, self.base, self.new):
            part.data.transform = transform
        return self


def few_shots(targets: Sequence[int], classes: int, shots: int, seed: int) -> list[list[int]]:
    """Which images of each class are trained on.

    As in the published code: Python's random generator is seeded anew for each class; a class with
    too few images has some drawn twice.

    Args:
        targets: Label of each image.
        classes: Number of (base) classes.
        shots: Images a class.
        seed: The seed.

    Raises:
        InputError: If `shots` is below 1 or a class has no image.

    Examples:
        >>> few_shots([0, 0, 0, 1], classes=2, shots=2, seed=1)
        [[0, 2], [3, 3]]
    """
    if shots < 1:
        raise InputError(f"shots is {shots}; accepted: at least one image a class")
    members: list[list[int]] = [[] for _ in range(classes)]
    for index, label in enumerate(targets):
        if label < classes:
            members[label].append(index)
    chosen = []
    for label, items in enumerate(members):
        if not items:
            raise InputError(f"base class {label} has no training image")
        draw = random.Random(seed)
        enough = len(items) >= shots
        chosen.append(draw.sample(items, shots) if enough else draw.choices(items, k=shots))
    return chosen


def read_names(path: str | Path) -> list[str]:
    """Class names, one a line; blank lines do not count.

    Args:
        path: The file.

    Raises:
        InputError: If it cannot be read or is empty.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the class names in {path}: {error}") from error
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if not names:
        raise InputError(f"there is no class name in {path}; give one a line")
    return names


def read_split_file(
    path: str | Path, images: str | Path, transform: Callable[[Any], Any] | None = None
) -> tuple[ImageDataset, ImageDataset]:
    """Training and test images of a split file of the CoOp community (``split_zhou_*.json``).

    Args:
        path: The file: ``{"train": [[file, label, class name], ...], "test": [...]}``; or a csv
            with the columns ``file``, ``label``, ``name`` and ``split`` (train or test).
        images: The folder that its file names start from.
        transform: Applied to each image.

    Raises:
        InputError: If the file is not such a file, or an image is missing.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        content = _csv_lists(text) if Path(path).suffix.lower() == ".csv" else json.loads(text)
        lists = [
            [(str(f), int(label), str(n)) for f, label, n in content[s]] for s in ("train", "test")
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is not a split file ({error}); accepted: JSON with 'train' and 'test', lists "
            "of [file, label, class name], or csv with columns file, label, name and split"
        ) from error
    names = {label: name for rows in lists for _, label, name in rows}
    if sorted(names) != list(range(len(names))):
        raise InputError(f"the labels in {path} are not 0, 1, 2, ... without a gap")
    missing = [f for rows in lists for f, _, _ in rows if not (Path(images) / f).is_file()]
    if missing:
        raise InputError(f"{len(missing)} images of {path} are not under {images}: {missing[0]}")
    class_names = [names[label] for label in range(len(names))]
    train, test = (
        ImageDataset(
            _Files(images, [f for f, _, _ in rows]), [y for _, y, _ in rows], class_names, transform
        )
        for rows in lists
    )
    return train, test


def _csv_lists(text: str) -> dict[str, list[tuple[str, str, str]]]:
    lists: dict[str, list[tuple[str, str, str]]] = {"train": [], "test": []}
    for row in csv.DictReader(text.splitlines()):
        lists.setdefault(row["split"], []).append((row["file"], row["label"], row["name"]))
    return lists


class _Files(Sequence[Any]):
    """Image files, read when asked for."""

    def __init__(self, root: str | Path, files: Sequence[str]) -> None:
        self.root, self.files = Path(root), files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:
        import PIL.Image

        with PIL.Image.open(self.root / self.files[index]) as image:
            return image.convert("RGB")

    def stamp(self, index: int) -> tuple[str, int, int]:
        path = (self.root / self.files[index]).resolve()
        found = path.stat()
        return str(path), found.st_size, found.st_mtime_ns


def load_openworld_data(
    source: str,
    *,
    transform: Callable[[Any], Any] | None = None,
    base: int | None = None,
    shots: int = 16,
    seed: int = 1,
    test_source: str | None = None,
    test_split: str = "test",
    split_file: str | Path | None = None,
    class_names: Sequence[str] | None = None,
    test_only: bool = False,
) -> OpenworldData:
    """Load a data set, take its first classes as base ones and few shots of them to train on.

    Args:
        source: As in `shared_core.data.loading`: an image folder with ``train`` and ``test``, a
            parquet file, or a hub id with image and label columns.
        transform: Turns an image into a tensor for the backbone.
        base: Number of base classes, the first by label; by default half of them, rounded up.
        shots: Training images of each base class.
        seed: Of the choice of training images.
        test_source: Test images, if they are elsewhere.
        test_split: The split to test on.
        split_file: A file for `read_split_file`; `source` is then its folder of images.
        class_names: What the classes are called, in the order of their labels, in place of the
            data's own names: folders of ImageNet are called n01440764, which says nothing to CLIP.
        test_only: Whether `train` stays empty, as for data that prompts of other data are tested
            on; then no training images are needed.

    Raises:
        InputError: If data cannot be read, or there are no new or no base classes.
    """
    if split_file is not None:
        train, test = read_split_file(split_file, source, transform)
    else:
        test = load_images(test_source or source, split=test_split, transform=transform)
        train = test if test_only else load_images(source, split="train", transform=transform)
    if train.class_names != test.class_names:
        raise InputError("training and test images have different classes, or in another order")
    names = train.class_names
    if class_names is not None:
        if len(class_names) != len(names):
            raise InputError(f"there are {len(class_names)} class names for {len(names)} classes")
        names = list(class_names)
    count = (len(names) + 1) // 2 if base is None else base
    if not 1 <= count < len(names):
        raise InputError(
            f"{count} of {len(names)} classes are base; accepted: at least one base and one new"
        )
    chosen = [] if test_only else few_shots(train.targets, count, shots, seed)
    on_base = [i for i, label in enumerate(test.targets) if label < count]
    on_new = [i for i, label in enumerate(test.targets) if label >= count]
    if not on_base or not on_new:
        raise InputError("the test images leave out all base or all new classes")
    return OpenworldData(
        Part(train, [i for items in chosen for i in items]),
        Part(test, on_base),
        Part(test, on_new, count),
        list(names[:count]),
        list(names[count:]),
        {names[label]: items for label, items in enumerate(chosen)},
    )

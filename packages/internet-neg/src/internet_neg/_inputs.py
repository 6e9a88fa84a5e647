"""What a person names on a command line: classes, words, proxies, and images of every kind."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from internet_neg._saving import read_state
from internet_neg.errors import InterNegError
from internet_neg.evaluate import read_imglist
from internet_neg.proxies import DataImage, class_folders, is_image
from internet_neg.vocabulary import EXCLUDED, Vocabulary

__all__ = [
    "image_files",
    "labelled_images",
    "read_lines",
    "read_proxies",
    "read_vocabulary",
    "unlabelled_images",
]

# An embedded name or a hub id, with a split where it is not the usual one.
_DATA = re.compile(r"[\w.-]+(/[\w.-]+)?@[^/@]+|[\w-][\w.-]*/[\w.-]+")


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InterNegError(f"cannot read {path}: {error}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_vocabulary(file: Path | None, wordnet: Path | None, exclude: str | None) -> Vocabulary:
    """A file of words, another WordNet's folder, or the words that come with the package."""
    left_out = EXCLUDED if exclude is None else [e.strip() for e in exclude.split(",") if e.strip()]
    if file is not None:
        return Vocabulary.from_file(file)
    if wordnet is not None:
        return Vocabulary.from_wordnet_folder(wordnet, left_out)
    return Vocabulary.wordnet(left_out)


def read_proxies(path: Path) -> Tensor:
    """Proxies [K, D] of another detector's folder, or of a .npy file."""
    if path.is_dir():
        proxies: Tensor = read_state(path)["proxies"]
        return proxies
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False)).float()
    except (OSError, ValueError, TypeError) as error:
        raise InterNegError(
            f"cannot read proxies from {path}: {error}; accepted: a detector's folder, or a .npy "
            "file of a row for each class"
        ) from error


def image_files(paths: Sequence[Path]) -> list[Path]:
    """The image files among paths and in folders, in order."""
    found = []
    for path in paths:
        if path.is_dir():
            found += sorted(f for f in path.rglob("*") if is_image(f))
        elif path.is_file():
            found.append(path)
        else:
            raise InterNegError(f"there is no image or folder {path}")
    if not found:
        raise InterNegError("there are no images in " + ", ".join(map(str, paths)))
    return found


def labelled_images(
    source: str, split: str, classnames: Sequence[str] | None = None
) -> tuple[list[Any], list[int], list[str]]:
    """Images, their classes, and the names of the classes.

    Args:
        source: A folder with a subfolder for each class; a list of ``path label`` lines; a parquet
            file; or a data set of the hub, ``owner/name`` or ``owner/name@split``.
        split: Of a data set that names none.
        classnames: The classes by number; by default the source's own.

    Raises:
        InterNegError: If it is not there, or has a class that is none of those.
    """
    path = Path(source)
    if path.is_dir():
        folders = class_folders(path)
        own = list(folders)
        images: list[Any] = [file for files in folders.values() for file in files]
        labels = [i for i, files in enumerate(folders.values()) for _ in files]
    elif path.is_file() and path.suffix != ".parquet":
        if classnames is None:
            raise InterNegError(f"{path} has no class names; give --classes too")
        return *read_imglist(path, path.parent), list(classnames)
    elif path.is_file() or _DATA.fullmatch(source):
        images, labels, own = _data_images(source, split)
    else:
        raise InterNegError(f"there is no folder {source}")
    if classnames is None:
        return images, labels, own
    numbers = {name: index for index, name in enumerate(classnames)}
    if strange := [own[label] for label in sorted(set(labels)) if own[label] not in numbers]:
        raise InterNegError(f"{strange[0]!r} in {source} is none of the class names")
    return images, [numbers[own[label]] for label in labels], list(classnames)


def unlabelled_images(source: str, split: str) -> list[Any]:
    """The images of a folder, at any depth, or of what `labelled_images` reads."""
    path = Path(source)
    if path.is_dir():
        return list(image_files([path]))
    if path.is_file() and path.suffix != ".parquet":
        return list(read_imglist(path, path.parent)[0])
    if path.is_file() or _DATA.fullmatch(source):
        return _data_images(source, split)[0]
    raise InterNegError(f"there is no folder or list {source}")


def _data_images(source: str, split: str) -> tuple[list[Any], list[int], list[str]]:
    from shared_core.data.loading import load_images

    name, _, given = source.partition("@")
    data = load_images(name, split=given or split)
    rows = getattr(data.images, "rows", None)
    # The library's own name for this very content; what is embedded changes with the package only.
    version = getattr(rows, "_fingerprint", "embedded")
    where = f"{name}@{given or split} {version}"
    images = [DataImage(data, where, index) for index in range(len(data))]
    return images, data.targets, data.class_names

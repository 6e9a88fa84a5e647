"""What the command line calls data: ID sets with labels, and sets of outliers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from edge_ood.datasets import (
    CocoMultiLabel,
    FolderMultiLabel,
    HFMultiLabel,
    MultiLabelImages,
    NUSWideMultiLabel,
    UnlabelledImages,
    VOCMultiLabel,
)
from shared_core.errors import InputError

__all__ = ["KINDS", "load_id", "load_outliers", "outlier_folder"]

KINDS = ("shapes", "voc:FOLDER", "coco:FOLDER", "nuswide:FOLDER", "folder:FILE", "hf:ID")
_COCO = {"train": "train2014", "test": "val2014"}
_NUSWIDE = {"train": "Train", "test": "Test"}


def load_id(
    source: str,
    split: str = "train",
    transform: Callable[[Any], Any] | None = None,
    *,
    seed: int = 0,
    image_column: str = "image",
    label_column: str = "labels",
    class_names: list[str] | None = None,
) -> MultiLabelImages:
    """An ID set by its name on the command line.

    Args:
        source: ``shapes`` (embedded); ``voc:FOLDER``; ``coco:FOLDER`` with ``train2014``,
            ``val2014`` and ``annotations``; ``nuswide:FOLDER``, the published ``ImageList``,
            ``Groundtruth/TrainTestLabels`` and ``Flickr``, or ``TrainImagelist.txt``,
            ``TrainLabels.txt`` (and Test) and ``images``; ``folder:FILE``, a CSV file or a folder
            with ``train.csv`` and ``test.csv``; ``hf:ID``, a hub id or a parquet file.
        split: ``train`` or ``test``; for ``hf:`` in the syntax of `datasets`.
        transform: Of each PIL image.
        seed: Of the embedded world.
        image_column: For ``hf:``.
        label_column: For ``hf:``.
        class_names: Of the training set, for the test set of ``folder:`` and ``hf:``.

    Raises:
        InputError: If there is no such kind, or its files are not there.

    Examples:
        >>> data = load_id("shapes", "test")
        >>> len(data), len(data.class_names)
        (1000, 20)
    """
    kind, _, rest = source.partition(":")
    options: dict[str, Any] = {"transform": transform}
    if source == "shapes":
        return _shapes(split, seed, transform)
    if not rest or kind not in {k.split(":")[0] for k in KINDS}:
        raise InputError(f"there is no ID set {source!r}; accepted: {', '.join(KINDS)}")
    path = Path(rest)
    if kind == "voc":
        return VOCMultiLabel(path, "val" if split == "test" else split, **options)
    if kind == "coco":
        year = _COCO.get(split, split)
        file = path / f"annotations/instances_{year}.json"
        return CocoMultiLabel(path / year, file, **options)
    if kind == "nuswide":
        name = _NUSWIDE.get(split, split)
        listed, labels = path / f"{name}Imagelist.txt", path / f"{name}Labels.txt"
        images = path / "images"
        if (path / "ImageList").is_dir():  # as it is published
            listed = path / "ImageList" / listed.name
            labels = path / "Groundtruth/TrainTestLabels"
            images = path / "Flickr"
        return NUSWideMultiLabel(listed, labels, images, **options)
    if kind == "folder":
        return FolderMultiLabel(path, split, class_names=class_names, **options)
    return HFMultiLabel(
        rest,
        split,
        image_column=image_column,
        label_column=label_column,
        class_names=class_names,
        **options,
    )


def load_outliers(
    source: str,
    split: str = "train",
    transform: Callable[[Any], Any] | None = None,
    *,
    seed: int = 0,
    image_column: str = "image",
) -> UnlabelledImages:
    """A set of outliers by its name: ``shapes``, ``shapes:colors``..., a folder, or ``hf:ID``.

    Args:
        source: ``shapes`` is the embedded OE set; ``shapes:objects``, ``shapes:textures`` (OE)
            and, with ``split="test"``, ``shapes:shapes``, ``shapes:colors`` and
            ``shapes:textures`` are its parts and its unknown images.
        split: ``train`` (to train on) or ``test`` for ``shapes``; else of ``hf:``.
        transform: Of each PIL image.
        seed: Of the embedded world.
        image_column: For ``hf:``.

    Raises:
        InputError: If it is not there.

    Examples:
        >>> len(load_outliers("shapes:colors", "test"))
        500
    """
    kind, _, rest = source.partition(":")
    if kind == "shapes":
        sets = _shapes_outliers(split, seed)
        chosen = list(sets) if not rest else [rest]
        if chosen[0] not in sets:
            raise InputError(f"shapes has no outliers {rest!r}; accepted: {', '.join(sets)}")
        images = [image for name in chosen for image in sets[name]]
        return UnlabelledImages(images=images, transform=transform)
    name = rest if kind == "hf" else source.removeprefix("folder:")
    if kind != "hf" and not Path(name).exists():
        raise InputError(
            f"there are no images at {name}; accepted: a folder, hf:ID, shapes or shapes:SET"
        )
    return UnlabelledImages(name, split, transform=transform, image_column=image_column)


def outlier_folder(source: str) -> Path | None:
    """The folder of a set of outliers, absolute; ``None`` for those of other kinds.

    Examples:
        >>> outlier_folder("shapes:objects") is None
        True
    """
    path = Path(source.removeprefix("folder:"))
    return path.resolve() if path.is_dir() else None


def _shapes(split: str, seed: int, transform: Any) -> MultiLabelImages:
    from edge_ood.shapes import known_images

    if split not in ("train", "test"):
        raise InputError(f"shapes has no split {split!r}; accepted: train, test")
    scenes = (
        known_images(seed, 2000, "train") if split == "train" else known_images(seed, 1000, "test")
    )
    targets = torch.from_numpy(scenes.labels).float()
    return MultiLabelImages(scenes.images, targets, scenes.class_names, transform)


def _shapes_outliers(split: str, seed: int) -> dict[str, Any]:
    from edge_ood.shapes import outlier_images, unknown_images

    if split == "train":
        return outlier_images(seed, 2000)
    return unknown_images(seed, 500)

"""Multi-label images from the usual layouts on disk, and unlabelled ones for outliers.

Item i of a labelled set is ``(image, y)`` with y float ``[C]``; of an unlabelled one the image. All
take a ``transform`` of the PIL image (RGB).
"""

import csv
import json
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset

from shared_core.errors import InputError
from shared_core.run import progress

__all__ = [
    "CocoMultiLabel",
    "FolderMultiLabel",
    "HFMultiLabel",
    "MultiLabelImages",
    "NUSWideMultiLabel",
    "UnlabelledImages",
    "VOCMultiLabel",
    "eval_transform",
    "train_transform",
]

Transform = Callable[[PIL.Image.Image], Any]
SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)


def _read(image: Any, index: int) -> PIL.Image.Image:
    try:
        if isinstance(image, str | os.PathLike):
            with PIL.Image.open(image) as opened:
                return opened.convert("RGB")
        found: PIL.Image.Image = image
        if not isinstance(image, PIL.Image.Image):
            found = PIL.Image.fromarray(image)
        return found.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"image {index} ({image}) cannot be decoded: {error}") from error


class MultiLabelImages(Dataset[tuple[Any, Tensor]]):
    """Images with labels.

    Args:
        images: Paths, PIL images or arrays ``[H, W, 3]``, read when asked for.
        targets: Labels, ``[n, C]``.
        class_names: C names.
        transform: Of each PIL image.

    Attributes:
        images: As given.
        targets: Float, ``[n, C]``.
        class_names: Names of the labels.

    Raises:
        InputError: If lengths do not fit or there is no image.

    Examples:
        >>> import numpy as np
        >>> pixels = np.zeros((2, 8, 8, 3), dtype=np.uint8)
        >>> data = MultiLabelImages(pixels, torch.eye(2), ["cat", "dog"], lambda image: image.size)
        >>> data[1], data.class_counts.tolist()
        (((8, 8), tensor([0., 1.])), [1, 1])
    """

    def __init__(
        self,
        images: Sequence[Any] | np.ndarray,
        targets: Float[Tensor, "n C"],
        class_names: Sequence[str],
        transform: Transform | None = None,
    ) -> None:
        if len(images) == 0:
            raise InputError("there are no images")
        if targets.shape != (len(images), len(class_names)):
            raise InputError(
                f"{len(images)} images and {len(class_names)} classes do not fit targets of shape "
                f"{list(targets.shape)}"
            )
        self.images, self.targets = images, targets
        self.class_names, self.transform = list(class_names), transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        image = _read(self.images[index], index)
        return (image if self.transform is None else self.transform(image)), self.targets[index]

    @property
    def class_counts(self) -> Tensor:
        """Samples of each label, ``[C]``."""
        return self.targets.sum(0).long()


def _table(rows: Sequence[Sequence[int]], classes: int) -> Tensor:
    targets = torch.zeros(len(rows), classes)
    for row, labels in zip(targets, rows, strict=True):
        row[list(labels)] = 1
    return targets


def _need(path: Path) -> Path:
    if not path.exists():
        raise InputError(f"there is no file or folder {path}")
    return path


class VOCMultiLabel(MultiLabelImages):
    """PASCAL VOC: an image has the labels of the objects in its annotation.

    Args:
        root: The folder with ``JPEGImages``, ``Annotations`` and ``ImageSets`` (``VOC2012``), or
            one above it (also ``VOCdevkit/VOC2012``).
        split: A list in ``ImageSets/Main``: ``train``, ``val``, ``trainval``.
        difficult: Whether objects that are marked as difficult count.
        transform: Of each PIL image.

    Raises:
        InputError: If a file is missing or an annotation names an unknown class.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str = "train",
        *,
        difficult: bool = True,
        transform: Transform | None = None,
    ) -> None:
        base = Path(root)
        for inner in (base / "VOCdevkit/VOC2012", base / "VOC2012"):
            base = inner if inner.is_dir() else base
        names = _need(base / f"ImageSets/Main/{split}.txt").read_text(encoding="utf-8").split()
        rows = []
        for name in progress(names, description="annotations", unit="file"):
            tree = ElementTree.parse(_need(base / f"Annotations/{name}.xml"))
            found = set()
            for item in tree.iterfind("object"):
                if not difficult and item.findtext("difficult") == "1":
                    continue
                label = item.findtext("name", "")
                if label not in VOC_CLASSES:
                    raise InputError(f"{name}.xml names the class {label!r}, which VOC has not")
                found.add(VOC_CLASSES.index(label))
            rows.append(sorted(found))
        images = [base / f"JPEGImages/{name}.jpg" for name in names]
        super().__init__(images, _table(rows, len(VOC_CLASSES)), VOC_CLASSES, transform)


class CocoMultiLabel(MultiLabelImages):
    """MS-COCO: an image has the categories of its annotations; images without any are left out.

    Args:
        images: The folder of the images, such as ``train2014``.
        annotations: The ``instances_*.json`` file.
        transform: Of each PIL image.

    Attributes:
        dropped: How many images have no annotation.

    Raises:
        InputError: If a file is missing or is not such a file.
    """

    def __init__(
        self,
        images: str | os.PathLike[str],
        annotations: str | os.PathLike[str],
        *,
        transform: Transform | None = None,
    ) -> None:
        folder, file = _need(Path(images)), _need(Path(annotations))
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            categories = sorted(content["categories"], key=lambda c: c["id"])
            column = {c["id"]: i for i, c in enumerate(categories)}
            labels: dict[int, set[int]] = {}
            for item in content["annotations"]:
                labels.setdefault(item["image_id"], set()).add(column[item["category_id"]])
            entries = [(e["file_name"], labels.get(e["id"])) for e in content["images"]]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file} is not a COCO instances file ({error!r})") from error
        kept = [(name, found) for name, found in entries if found]
        self.dropped = len(entries) - len(kept)
        rows = [sorted(found) for _, found in kept]
        names = [c["name"] for c in categories]
        super().__init__([folder / n for n, _ in kept], _table(rows, len(names)), names, transform)


class NUSWideMultiLabel(MultiLabelImages):
    """NUS-WIDE: a list of images and a table of labels; images without a label are left out.

    Args:
        list_file: One image path a line, under `root`; backslashes are taken for slashes.
        label_file: One line an image, a 0 or 1 for each concept; or the published folder with a
            file of one column for each concept, ``Labels_<concept>_Train.txt`` (or ``_Test``, as
            the name of `list_file` begins).
        root: The folder of the images.
        class_names: Names of the concepts; by default those of the files, or their numbers.
        transform: Of each PIL image.

    Attributes:
        dropped: How many images have no label.

    Raises:
        InputError: If a file is missing, or the tables do not fit.
    """

    def __init__(
        self,
        list_file: str | os.PathLike[str],
        label_file: str | os.PathLike[str],
        root: str | os.PathLike[str],
        *,
        class_names: Sequence[str] | None = None,
        transform: Transform | None = None,
    ) -> None:
        names = _need(Path(list_file)).read_text(encoding="utf-8").split("\n")
        names = [n.strip().replace("\\", "/") for n in names if n.strip()]
        if _need(Path(label_file)).is_dir():
            split = "Test" if Path(list_file).name.startswith("Test") else "Train"
            files = sorted(Path(label_file).glob(f"Labels_*_{split}.txt"))
            if not files:
                raise InputError(f"there is no Labels_<concept>_{split}.txt in {label_file}")
            columns = [_numbers(file, len(names), list_file) for file in files]
            if any(column.shape[1] != 1 for column in columns):
                raise InputError(f"a file in {label_file} has more than one number a line")
            table = torch.cat(columns, dim=1)
            found = [f.name.removeprefix("Labels_").removesuffix(f"_{split}.txt") for f in files]
        else:
            table = _numbers(Path(label_file), len(names), list_file)
            found = [str(i) for i in range(table.shape[1])]
        if not bool(((table == 0) | (table == 1)).all()):
            raise InputError(f"{label_file} holds other numbers than 0 and 1")
        keep = table.any(1)
        self.dropped = int((~keep).sum())
        images = [Path(root) / n for n, kept in zip(names, keep.tolist(), strict=True) if kept]
        super().__init__(images, table[keep], class_names or found, transform)


def _numbers(file: Path, rows: int, list_file: str | os.PathLike[str]) -> Tensor:
    """A text file's table of numbers, one row for each line of the list."""
    lines = file.read_text(encoding="utf-8").strip().split("\n")
    try:
        table = torch.tensor([[float(v) for v in line.split()] for line in lines])
    except ValueError as error:
        raise InputError(f"{file} is no table of 0 and 1 ({error})") from error
    if table.ndim != 2 or len(table) != rows:
        raise InputError(f"{list_file} names {rows} images, {file} has {len(lines)} rows")
    return table


class FolderMultiLabel(MultiLabelImages):
    """Images of your own, listed in a CSV file.

    The file has a column ``path`` (relative to `root`) and either a column ``labels`` with names
    joined by ``;``, or one column of 0 and 1 for each class.

    Args:
        file: The CSV file, or a folder that holds one called ``<split>.csv``.
        split: ``train`` or ``test``, for a folder.
        root: The folder of the images; by default that of the file.
        class_names: Names and order of the classes, such as those of the training set; by default
            those of the file, sorted (or in the order of its columns).
        transform: Of each PIL image.

    Raises:
        InputError: If the file is missing, has no such columns, or names an unknown class.
    """

    def __init__(
        self,
        file: str | os.PathLike[str],
        split: str = "train",
        *,
        root: str | os.PathLike[str] | None = None,
        class_names: Sequence[str] | None = None,
        transform: Transform | None = None,
    ) -> None:
        path = Path(file)
        path = _need(path / f"{split}.csv" if path.is_dir() else path)
        with open(path, newline="", encoding="utf-8") as opened:
            rows = list(csv.DictReader(opened))
        columns = list(rows[0]) if rows else []
        if "path" not in columns or len(columns) < 2:
            raise InputError(
                f"{path} has the columns {', '.join(map(str, columns)) or 'none'}; accepted: path "
                "and labels (names joined by ;), or path and one column of 0 and 1 per class"
            )
        if "labels" in columns:
            found = [[n.strip() for n in r["labels"].split(";") if n.strip()] for r in rows]
            names = list(class_names or sorted({n for row in found for n in row}))
        else:
            given = [c for c in columns if c != "path"]
            wrong = {r[c] for r in rows for c in given} - {"0", "1"}
            if wrong:
                raise InputError(f"{path} holds {min(map(str, wrong))!r} where 0 or 1 belongs")
            found = [[c for c in given if r[c] == "1"] for r in rows]
            names = list(class_names or given)
        index = {name: i for i, name in enumerate(names)}
        unknown = {n for row in found for n in row} - set(index)
        if unknown:
            raise InputError(f"{path} names the class {min(unknown)!r}, which is not known")
        base = path.parent if root is None else Path(root)
        targets = _table([[index[n] for n in row] for row in found], len(names))
        super().__init__([base / r["path"] for r in rows], targets, names, transform)


class HFMultiLabel(MultiLabelImages):
    """A hub data set, or a parquet or arrow file, with a list of labels per image.

    Args:
        source: A hub id or a path; see `shared_core.data.loading.load_rows`.
        split: In the syntax of `datasets`.
        image_column: The column of images.
        label_column: The column of labels: class indices or names, one or a list a row. A nested
            column of a dictionary is written with a dot (``objects.category``).
        class_names: Names of the classes; by default those of the column's ClassLabel, else the
            values found, sorted.
        transform: Of each PIL image.
        options: Of ``datasets.load_dataset``.

    Raises:
        InputError: If the source or a column is not there, or a label is unknown.
        MissingExtraError: If `datasets` is not installed.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        split: str = "train",
        *,
        image_column: str = "image",
        label_column: str = "labels",
        class_names: Sequence[str] | None = None,
        transform: Transform | None = None,
        **options: Any,
    ) -> None:
        import datasets

        from shared_core.data.loading import load_rows

        rows = load_rows(source, split=split, **options)
        outer, _, inner = label_column.partition(".")
        for column in (image_column, outer):
            if column not in rows.features:
                raise InputError(
                    f"there is no column {column!r} in {source}; available: "
                    f"{', '.join(rows.features)}"
                )
        if not isinstance(rows.features[image_column], datasets.Image):
            rows = rows.cast_column(image_column, datasets.Image())
        values = list(rows[outer])
        if inner:
            values = [value[inner] for value in values]
        found = [value if isinstance(value, list) else [value] for value in values]
        feature = rows.features[outer]
        if inner:
            feature = feature[inner] if isinstance(feature, dict) else feature.feature[inner]
        feature = getattr(feature, "feature", feature)
        names = getattr(feature, "names", None)
        if names is not None:
            found = [[v if isinstance(v, str) else names[v] for v in row] for row in found]
        found = [[str(v) for v in row] for row in found]
        labels = list(class_names or names or sorted({v for row in found for v in row}))
        index = {name: i for i, name in enumerate(labels)}
        unknown = {v for row in found for v in row} - set(index)
        if unknown:
            raise InputError(f"{source} has the label {min(unknown)!r}, which is not known")
        targets = _table([[index[v] for v in row] for row in found], len(labels))
        super().__init__(_Column(rows, image_column), targets, labels, transform)


class _Column(Sequence[Any]):
    """The images of a table, decoded when asked for."""

    def __init__(self, rows: Any, name: str) -> None:
        self.rows, self.name = rows, name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[int(index)][self.name]


class UnlabelledImages(Dataset[Any]):
    """Images without labels: all of a folder and its subfolders, or a table's.

    Args:
        source: A folder of images, or a hub id or file that `HFMultiLabel` could read.
        split: Of a hub id or file.
        image_column: Its column of images.
        transform: Of each PIL image.
        images: The images themselves, in place of a source.

    Attributes:
        images: Paths, or images read when asked for.

    Raises:
        InputError: If there is no image.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | None = None,
        split: str = "train",
        *,
        image_column: str = "image",
        transform: Transform | None = None,
        images: Sequence[Any] | None = None,
    ) -> None:
        self.transform = transform
        if images is not None:
            self.images: Sequence[Any] = images
        elif source is None:
            raise InputError("give a source or images")
        elif Path(source).is_dir() and not (Path(source) / "state.json").is_file():
            files = sorted(f for f in Path(source).rglob("*") if f.suffix.lower() in SUFFIXES)
            self.images = files
        else:
            import datasets

            from shared_core.data.loading import load_rows

            rows = load_rows(source, split=split)
            if image_column not in rows.features:
                raise InputError(
                    f"there is no column {image_column!r} in {source}; available: "
                    f"{', '.join(rows.features)}"
                )
            self.images = _Column(rows.cast_column(image_column, datasets.Image()), image_column)
        if len(self.images) == 0:
            raise InputError(f"there are no images in {source}")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        image = _read(self.images[index], index)
        return image if self.transform is None else self.transform(image)


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _vision() -> Any:
    try:
        from torchvision.transforms import v2
    except ImportError as error:
        from shared_core.errors import MissingExtraError

        raise MissingExtraError("edge-ood", "vision", "torchvision") from error
    return v2


def eval_transform(size: int = 256) -> Transform:
    """The deterministic transform of all test images, ID and OOD alike.

    Resize to a square without keeping the aspect, normalise by ImageNet's statistics.

    Args:
        size: Pixels per side.

    Raises:
        MissingExtraError: If torchvision is not installed.
    """
    v2 = _vision()
    steps = [v2.Resize((size, size), antialias=True), v2.ToImage()]
    transform: Transform = v2.Compose(
        [*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    )
    return transform


def train_transform(size: int = 256, *, official: bool = False) -> Transform:
    """A random resized crop and a flip.

    Args:
        size: Pixels per side.
        official: The crop's scale of the authors' code, 0.5 to 2 (scales above 1 mostly fall back
            to a central crop), in place of 0.5 to 1.

    Raises:
        MissingExtraError: If torchvision is not installed.
    """
    v2 = _vision()
    scale = (0.5, 2.0) if official else (0.5, 1.0)
    steps = [v2.RandomResizedCrop(size, scale=scale, antialias=True), v2.RandomHorizontalFlip()]
    transform: Transform = v2.Compose(
        [
            *steps,
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    return transform

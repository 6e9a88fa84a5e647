"""One loader for images and one for texts: embedded data, local files, the Hugging Face hub.

What works on the embedded data works on a file or a hub data set by changing the source:

- an embedded name: ``shapes`` or ``digits`` (images), ``pydoc`` (text); no download, no files;
- a local path: an image folder, or a parquet, arrow, json, jsonl, csv, tsv or txt file, a folder of
  these, or a folder written by ``Dataset.save_to_disk``;
- anything else: the id of a data set on the hub, such as ``uoft-cs/cifar10``.

An embedded name wins over a folder of that name in the working folder; write ``./digits`` for that.
Files and hub data are read by the `datasets` library, from the extra ``shared-core[data]``.
"""

import contextlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import PIL.Image
from torch.utils.data import Dataset

from shared_core.data._columns import find_column, find_label_column
from shared_core.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    import datasets

__all__ = ["ImageDataset", "load_images", "load_rows", "load_texts"]

_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".arrow": ("arrow", {}),
    ".csv": ("csv", {}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".txt": ("text", {"sample_by": "document"}),
}


class ImageDataset(Dataset[tuple[Any, int]]):
    """Labelled images: item i is ``(image, label)``, whatever they were read from.

    Args:
        images: The images, read when asked for: PIL images or uint8 arrays [height, width, 3].
        targets: The class index of each image.
        class_names: The name of each class.
        transform: Applied to each image, which comes as a PIL image in RGB mode; without it the
            item holds that PIL image.

    Raises:
        InputError: If lengths differ; when an item is read, if its image cannot be decoded.

    Examples:
        >>> pixels = np.zeros((2, 8, 8, 3), dtype=np.uint8)
        >>> data = ImageDataset(pixels, [0, 1], ["cat", "dog"], transform=lambda image: image.size)
        >>> data[1], len(data), data.targets, data.class_names
        (((8, 8), 1), 2, [0, 1], ['cat', 'dog'])
    """

    def __init__(
        self,
        images: Any,
        targets: Sequence[int],
        class_names: Sequence[str],
        transform: Callable[[PIL.Image.Image], Any] | None = None,
    ) -> None:
        if len(images) != len(targets):
            raise InputError(f"there are {len(images)} images but {len(targets)} targets")
        self.images = images
        self.targets = [int(label) for label in targets]
        self.class_names = list(class_names)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        label = self.targets[index]
        try:
            image = self.images[int(index)]
            if not isinstance(image, PIL.Image.Image):
                image = PIL.Image.fromarray(np.asarray(image))
            image = image.convert("RGB")
        except (OSError, SyntaxError) as error:  # Pillow raises both
            raise InputError(f"image {index} cannot be decoded: {error}") from error
        return (image if self.transform is None else self.transform(image)), label


def _embedded_images(
    name: str,
    split: str,
    transform: Callable[[PIL.Image.Image], Any] | None,
    options: Mapping[str, Any],
) -> ImageDataset:
    """One of the data sets that need no files, or a part of it."""
    from shared_core.data.digits import load_digits
    from shared_core.data.shapes import ShapesWorld, load_shapes

    maker: Callable[..., ImageDataset] = load_shapes if name == "shapes" else load_digits
    sources = [maker, ShapesWorld.classification] if name == "shapes" else [maker]
    known = {key for source in sources for key in inspect.signature(source).parameters}
    known -= {"self", "split", "options", "transform"}
    for option in options:
        if option not in known:
            raise InputError(
                f"{name} takes no option {option!r}; accepted: {', '.join(sorted(known))}"
            )
    part = re.fullmatch(r"(\w+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", split)
    if part is None:
        raise InputError(f"split {split!r} is not known; accepted: a split such as test, test[:9]")
    data = maker(part[1], transform=transform, **options)
    if "[" not in split:
        return data
    start, stop = (_position(place, len(data)) for place in part.group(2, 3))
    chosen = slice(start, stop)
    return ImageDataset(data.images[chosen], data.targets[chosen], data.class_names, transform)


def _position(place: str | None, length: int) -> int | None:
    """A number of samples or a percentage, as a position."""
    if place is None or not place.endswith("%"):
        return None if place is None else int(place)
    return round(int(place[:-1]) * length / 100)


class _Column(Sequence[Any]):
    """One column of a Hugging Face data set, read row by row when asked for."""

    def __init__(self, rows: "datasets.Dataset", name: str) -> None:
        self.rows = rows.select_columns([name])
        self.name = name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index][self.name]

    def __iter__(self) -> Iterator[Any]:
        for row in self.rows:
            yield row[self.name]


def load_images(
    source: str | os.PathLike[str],
    *,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    transform: Callable[[PIL.Image.Image], Any] | None = None,
    **options: Any,
) -> ImageDataset:
    """Load labelled images from an embedded name, a local path or the hub.

    Args:
        source: ``shapes``, ``digits``, a path or a hub id; see `shared_core.data.loading`.
        split: Which split, in the syntax of `datasets` (``"train"``, ``"test[:500]"``). A single
            file is one split, which goes by the name asked for.
        image_column: The image column of a file or hub data set, if it is not clear.
        label_column: The label column, if it is not clear. Class indices and class names are both
            accepted as labels.
        transform: Applied to each image (a PIL image in RGB mode) when it is read.
        options: For ``shapes`` and ``digits``: the arguments of their maker
            (`shared_core.data.shapes`, `shared_core.data.digits`). For files and the hub: those of
            ``datasets.load_dataset``, such as ``name`` or ``revision``.

    Raises:
        InputError: If the source or split is not there or cannot be read, a column is not clear or
            does not hold images or labels, or a sample has no label.
        MissingExtraError: If files or hub data are asked for and `datasets` is not installed.

    Examples:
        >>> digits = load_images("digits", split="test")
        >>> image, label = digits[0]
        >>> image.mode, digits.class_names[label] in "0123456789"
        ('RGB', True)
    """
    if source in ("shapes", "digits"):
        return _embedded_images(str(source), split, transform, options)
    if source == "pydoc":
        raise InputError("pydoc holds text; load it with load_texts")
    rows = load_rows(source, split=split, **options)
    name = find_column(
        rows.features,
        image_column,
        role="image",
        candidates=_image_columns(rows.features),
        usual=("image", "img"),
    )
    label_column = find_label_column(rows.features, label_column)
    targets, class_names = _labels(rows, label_column)
    return ImageDataset(_Column(_decoded(rows, name), name), targets, class_names, transform)


def load_texts(
    source: str | os.PathLike[str],
    *,
    split: str = "train",
    text_column: str | None = None,
    **options: Any,
) -> Sequence[str]:
    r"""Load texts from an embedded name, a local path or the hub.

    Args:
        source: ``pydoc``, a path or a hub id; see `shared_core.data.loading`. A txt file is one
            text, as a whole (``sample_by="line"`` makes each line one).
        split: Which split, in the syntax of `datasets`; for ``pydoc`` one of ``train``,
            ``validation`` and ``test``. A single file is one split, which goes by the name asked
            for.
        text_column: The text column of a file or hub data set, if it is not clear.
        options: For ``pydoc``: ``kind``, as in `shared_core.data.text.pydoc_documents`. For files
            and the hub: those of ``datasets.load_dataset``.

    Returns:
        The texts. Those of files and the hub are read when asked for.

    Raises:
        InputError: If the source or split is not there or cannot be read, or the column is not
            clear or does not hold text.
        MissingExtraError: If files or hub data are asked for and `datasets` is not installed.

    Examples:
        >>> texts = load_texts("pydoc", split="validation")
        >>> len(texts), texts[0][:28]
        (9, 'Binary bitwise operations\n**')
    """
    if source == "pydoc":
        from shared_core.data.text import pydoc_documents

        return [document.text for document in pydoc_documents(cast(Any, split), **options)]
    if source in ("shapes", "digits"):
        raise InputError(f"{source} holds images; load it with load_images")
    rows = load_rows(source, split=split, **options)
    strings = [name for name, feature in rows.features.items() if _holds_text(feature)]
    name = find_column(
        rows.features, text_column, role="text", candidates=strings, usual=("text", "content")
    )
    if not _holds_text(rows.features[name]):
        raise InputError(
            f"column {name!r} holds {rows.features[name]}, not text; "
            f"available: {', '.join(rows.features)}"
        )
    return _Column(rows, name)


def load_rows(
    source: str | os.PathLike[str], *, split: str = "train", **options: Any
) -> "datasets.Dataset":
    r"""Load a table of any columns from a local path or the hub, such as questions with answers.

    Args:
        source: A path or a hub id; see `shared_core.data.loading`.
        split: Which split, in the syntax of `datasets`. A single file is one split, which goes by
            the name asked for.
        options: Those of ``datasets.load_dataset``.

    Raises:
        InputError: If the source or split is not there or cannot be read.
        MissingExtraError: If `datasets` is not installed.

    Examples:
        >>> path = getfixture("tmp_path") / "sums.jsonl"
        >>> _ = path.write_text('{"question": "1 + 1", "answer": "2"}\n')
        >>> load_rows(path, cache_dir=str(path.parent))[0]
        {'question': '1 + 1', 'answer': '2'}
    """
    if options.get("streaming"):
        raise InputError("streaming=True gives no data set with a length; leave it out")
    path = _local_path(source)
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("shared-core", "data", "datasets") from error
    if path is not None and path.is_file() and path.stat().st_size == 0:
        raise InputError(f"{path} is empty; accepted: a file with at least one row")
    try:
        with _quiet():
            return _load(source, path, split, options)
    except InputError:
        raise
    # What `datasets` raises for a missing or broken source, an unknown split, or no connection.
    except (OSError, ValueError, StopIteration, datasets.exceptions.DatasetsError) as error:
        reason = str(error.__cause__ or error).strip() or repr(error)
        raise InputError(
            f"cannot load the split {split!r} of {source}: {reason.splitlines()[0]}"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the page that `datasets` logs about a broken file, and without bars in a log file."""
    import datasets

    verbosity = datasets.logging.get_verbosity()
    bars = datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()


def _load(
    source: str | os.PathLike[str], path: Path | None, split: str, options: Mapping[str, Any]
) -> Any:
    import datasets

    if path is None:
        return datasets.load_dataset(str(source), split=split, **options)
    if path.is_dir():
        return _load_folder(path, split, options)
    builder, defaults = _builder_of(path)
    files = {re.split(r"[\[+]", split)[0]: str(path)}
    return datasets.load_dataset(builder, data_files=files, split=split, **{**defaults, **options})


def _local_path(source: str | os.PathLike[str]) -> Path | None:
    """The path if the source is one, None if it can only be a hub id."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    text = os.fspath(source)
    looks_local = (
        not isinstance(source, str)
        or text.startswith((".", "/", "~"))
        or "\\" in text
        or text.count("/") > 1
        or text.endswith("/")
        or path.suffix.lower() in _BUILDERS
        or ("/" in text and path.parent.is_dir())
    )
    if looks_local:
        raise InputError(
            f"there is no file or folder {text}; accepted: an existing path, or a hub id such as "
            "uoft-cs/cifar10"
        )
    return None


def _builder_of(path: Path) -> tuple[str, dict[str, Any]]:
    suffix = path.suffix.lower()
    if suffix not in _BUILDERS:
        raise InputError(
            f"{path} is of no known kind; accepted: {', '.join(_BUILDERS)} files, and folders"
        )
    return _BUILDERS[suffix]


def _load_folder(path: Path, split: str, options: Mapping[str, Any]) -> Any:
    import datasets

    if (path / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(str(path))
        if split not in saved:
            raise InputError(f"{path} has no split {split!r}; available: {', '.join(saved)}")
        return saved[split]
    if (path / "state.json").is_file():
        return datasets.load_from_disk(str(path))
    suffixes = {file.suffix.lower() for file in path.rglob("*")} & set(_BUILDERS)
    defaults = _BUILDERS[".txt"][1] if suffixes == {".txt"} else {}
    return datasets.load_dataset(str(path), split=split, **{**defaults, **options})


def _image_columns(features: Mapping[str, Any]) -> list[str]:
    """Columns of decoded images, else columns of encoded ones."""
    import datasets

    images = [name for name, f in features.items() if isinstance(f, datasets.Image)]
    return images or [name for name, f in features.items() if _holds_bytes(f)]


def _holds_bytes(feature: Any) -> bool:
    kind = feature.get("bytes") if isinstance(feature, Mapping) else feature
    return getattr(kind, "dtype", None) in ("binary", "large_binary")


def _holds_text(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _decoded(rows: "datasets.Dataset", name: str) -> "datasets.Dataset":
    import datasets

    feature = rows.features[name]
    if isinstance(feature, datasets.Image):
        return rows
    if _holds_bytes(feature):
        return rows.cast_column(name, datasets.Image())
    raise InputError(
        f"column {name!r} holds {feature}, not images; available: {', '.join(rows.features)}"
    )


def _labels(rows: "datasets.Dataset", name: str) -> tuple[list[int], list[str]]:
    """The class index of each row and the names of the classes."""
    feature = rows.features[name]
    if not (_holds_text(feature) or "int" in getattr(feature, "dtype", "")):
        raise InputError(
            f"column {name!r} holds {feature}, not one class index or name per row; "
            f"available: {', '.join(rows.features)}"
        )
    values = np.asarray(rows.select_columns([name]).with_format("numpy")[:][name])
    if _holds_text(feature):
        missing = sum(value is None for value in values)
    else:
        missing = int((~(values >= 0)).sum())  # the hub marks hidden labels with -1
    if missing:
        raise InputError(
            f"{missing} of {len(values)} rows have no label in column {name!r}; "
            "choose a labelled split, or a part of it"
        )
    if _holds_text(feature):
        found, indices = np.unique(values.astype(str), return_inverse=True)
        return indices.tolist(), found.tolist()
    targets = values.astype(np.int64).tolist()
    numbered = [str(label) for label in range(max(targets, default=-1) + 1)]
    return targets, getattr(feature, "names", numbered)

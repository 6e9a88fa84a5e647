"""Pairing ID and OE batches, and seeing that the sets do not overlap."""

import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from shared_core.errors import InputError

__all__ = ["PairedLoader", "check_disjoint"]


class PairedLoader:
    """ID batches, each with a batch of outliers: yields ``(x_id, y, x_oe)``.

    An epoch is one pass over the ID loader, whatever the size of the OE set: a small one starts
    again (and shuffles again) when it is exhausted, a large one goes on where the last epoch
    stopped. The authors' code stops at the end of the shorter loader, which cuts ID epochs short
    while the learning-rate schedule counts whole ones; ``sampling="truncate"`` does the same.

    Args:
        id_loader: Gives ``(x, y)`` batches; has a length.
        oe_loader: Gives batches ``x``, or tuples that begin with x.
        sampling: ``cycle`` or ``truncate``.

    Raises:
        InputError: If a loader is empty or the sampling unknown.

    Examples:
        >>> pairs = PairedLoader([("a", 0), ("b", 1), ("c", 2)], ["x", "y"])
        >>> len(pairs), list(pairs), next(iter(pairs))
        (3, [('a', 0, 'x'), ('b', 1, 'y'), ('c', 2, 'x')], ('a', 0, 'y'))
    """

    def __init__(
        self, id_loader: Any, oe_loader: Any, sampling: Literal["cycle", "truncate"] = "cycle"
    ) -> None:
        if sampling not in ("cycle", "truncate"):
            raise InputError(f"sampling is {sampling!r}; accepted: 'cycle', 'truncate'")
        for name, loader in (("ID", id_loader), ("OE", oe_loader)):
            if len(loader) == 0:
                raise InputError(f"the {name} loader is empty; it needs at least one batch")
        self.id_loader, self.oe_loader, self.sampling = id_loader, oe_loader, sampling
        self._outliers: Iterator[Any] | None = None

    def __len__(self) -> int:
        if self.sampling == "truncate":
            return min(len(self.id_loader), len(self.oe_loader))
        return len(self.id_loader)

    def __iter__(self) -> Iterator[tuple[Any, Any, Any]]:
        if self.sampling == "truncate":
            for (x, y), outliers in zip(self.id_loader, self.oe_loader, strict=False):
                yield x, y, _inputs(outliers)
            return
        for x, y in self.id_loader:
            yield x, y, self._next()

    def restart(self) -> None:
        """Begin the OE loader anew with the next epoch."""
        self._outliers = None

    def _next(self) -> Any:
        if self._outliers is None:
            self._outliers = iter(self.oe_loader)
        try:
            return _inputs(next(self._outliers))
        except StopIteration:
            self._outliers = iter(self.oe_loader)
            return _inputs(next(self._outliers))


def _inputs(batch: Any) -> Any:
    return batch[0] if isinstance(batch, tuple | list) else batch


def check_disjoint(
    first: Iterable[Any],
    second: Iterable[Any],
    how: Literal["path", "sha1"] = "path",
    *,
    names: tuple[str, str] = ("the first set", "the second set"),
    on_overlap: Literal["error", "warn"] = "error",
) -> int:
    """See that two sets of samples have none in common, such as OE training and OOD test images.

    Args:
        first: Samples: paths, images, arrays or tensors.
        second: The same.
        how: ``path`` compares resolved paths; ``sha1`` compares contents (of files, the bytes).
        names: What to call the sets in the message.
        on_overlap: Raise, or warn.

    Returns:
        How many distinct samples they share.

    Raises:
        InputError: If they overlap, unless `on_overlap` is ``warn``; if ``path`` is asked for
            samples that are not paths; if a file is not there.

    Examples:
        >>> check_disjoint([torch.zeros(2)], [torch.ones(2)], how="sha1")
        0
    """
    if how not in ("path", "sha1"):
        raise InputError(f"how is {how!r}; accepted: 'path', 'sha1'")
    key = _path_key if how == "path" else _content_key
    samples, others = list(enumerate(first)), list(second)
    if how == "sha1":
        # Files of different sizes differ, and need not be read.
        sizes = {_file_size(sample) for _, sample in samples}
        sizes &= {_file_size(sample) for sample in others}
        samples = [(i, sample) for i, sample in samples if _file_size(sample) in sizes]
        others = [sample for sample in others if _file_size(sample) in sizes]
    ours = {key(sample): index for index, sample in samples}
    shared = {k for sample in others if (k := key(sample)) in ours}
    if shared:
        example = min(ours[k] for k in shared)
        message = (
            f"{names[0]} and {names[1]} share {len(shared)} samples by {how}, the first at index "
            f"{example} of {names[0]}; take them out of one of the two"
        )
        if on_overlap == "error":
            raise InputError(message)
        warnings.warn(message, stacklevel=2)
    return len(shared)


def _path_key(sample: Any) -> str:
    if not isinstance(sample, str | os.PathLike):
        raise InputError(f"a {type(sample).__name__} has no path; compare contents with how='sha1'")
    return str(Path(sample).resolve())


def _file_size(sample: Any) -> int | None:
    """The size of a file; of other samples nothing."""
    if not isinstance(sample, str | os.PathLike):
        return None
    try:
        return os.path.getsize(sample)
    except OSError as error:
        raise InputError(f"{sample} cannot be read ({error.strerror})") from error


def _content_key(sample: Any) -> bytes:
    if isinstance(sample, str | os.PathLike):
        with open(sample, "rb") as file:
            return hashlib.file_digest(file, "sha1").digest()
    if isinstance(sample, Tensor):
        sample = sample.detach().cpu()
        sample = (sample.float() if sample.dtype == torch.bfloat16 else sample).numpy()
    elif isinstance(sample, PIL.Image.Image):
        sample = np.asarray(sample.convert("RGB"))
    array = np.ascontiguousarray(sample)
    return hashlib.sha1(repr((array.shape, array.dtype.str)).encode() + array.tobytes()).digest()

"""Long-tailed class profiles: how many samples each class keeps, and which ones.

The profiles are those of the CIFAR-LT benchmarks: ``exp`` lets the class counts decay geometrically
from `n_max`, ``step`` splits the classes into a frequent and a rare half (Cao et al., "Learning
Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019, section 4).
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

from shared_core.data._columns import find_label_column
from shared_core.errors import InputError

__all__ = ["LongTailSubset", "class_counts", "long_tail_counts", "long_tail_indices"]


def long_tail_counts(
    n_max: int,
    num_classes: int,
    *,
    imbalance_ratio: int | float | None = None,
    imbalance_factor: int | float | None = None,
    profile: Literal["exp", "step"] = "exp",
    rounding: Literal["floor", "nearest"] = "floor",
) -> list[int]:
    """Samples to keep of each class, from the most frequent class to the rarest.

    With C classes and the factor f = rarest / most frequent, class i keeps
    ``n_max * f**(i / (C - 1))`` (profile ``exp``), or `n_max` for the first ``C // 2`` classes and
    ``n_max * f`` for the others (profile ``step``).

    Args:
        n_max: Samples of the most frequent class.
        num_classes: Number of classes C; a single class keeps `n_max`.
        imbalance_ratio: Most frequent / rarest, at least 1. It means the factor
            ``1 / imbalance_ratio``.
        imbalance_factor: Rarest / most frequent, in (0, 1]. Give this or the ratio.
        profile: ``exp`` or ``step``.
        rounding: ``floor`` truncates the floating-point value with ``int()``, as all CIFAR-LT code
            does; a value a hair below a whole number loses one. ``nearest`` rounds, and keeps at
            least one sample.

    Raises:
        InputError: If not exactly one of ratio and factor is given or it is out of range, if
            `n_max` or `num_classes` is below 1, or if ``floor`` leaves a class without samples.

    Examples:
        >>> long_tail_counts(5000, 10, imbalance_ratio=100)
        [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
        >>> long_tail_counts(500, 4, imbalance_factor=0.1, profile="step")
        [500, 500, 50, 50]
    """
    if n_max < 1 or num_classes < 1:
        raise InputError(f"n_max={n_max} and num_classes={num_classes}; both have to be at least 1")
    if profile not in ("exp", "step"):
        raise InputError(f"profile {profile!r} is not known; accepted: exp, step")
    if rounding not in ("floor", "nearest"):
        raise InputError(f"rounding {rounding!r} is not known; accepted: floor, nearest")
    factor = _imbalance_factor(imbalance_ratio, imbalance_factor)
    last = max(num_classes - 1, 1)
    if num_classes == 1:
        exact = [float(n_max)]
    elif profile == "exp":
        exact = [n_max * factor ** (i / last) for i in range(num_classes)]
    else:
        head = num_classes // 2
        exact = [float(n_max)] * head + [n_max * factor] * (num_classes - head)
    if rounding == "nearest":
        return [max(1, round(value)) for value in exact]
    counts = [int(value) for value in exact]
    if counts[-1] < 1:
        first = next(i for i, count in enumerate(counts) if count < 1)
        raise InputError(
            f"class {first} of {num_classes} would keep int({exact[first]:.4g}) = 0 samples; "
            'raise n_max, lower the imbalance, or take rounding="nearest"'
        )
    return counts


def _imbalance_factor(ratio: int | float | None, factor: int | float | None) -> float:
    if (ratio is None) == (factor is None):
        raise InputError(
            f"imbalance_ratio={ratio} and imbalance_factor={factor}; give exactly one of them "
            "(a ratio of 100 is a factor of 0.01)"
        )
    if ratio is not None:
        if not (math.isfinite(ratio) and ratio >= 1):
            raise InputError(f"imbalance_ratio={ratio}; it has to be finite and at least 1")
        return 1 / ratio
    assert factor is not None
    if not 0 < factor <= 1:
        raise InputError(f"imbalance_factor={factor}; it has to lie in (0, 1]")
    return factor


def long_tail_indices(
    labels: Any,
    counts: Sequence[int],
    *,
    seed: int,
    rng: Literal["default", "legacy"] = "default",
) -> list[int]:
    """Pick ``counts[c]`` random samples of each class c.

    Args:
        labels: One class index per sample, or a data set (see `class_counts`).
        counts: Samples to keep of each class; class indices run from 0 to ``len(counts) - 1``.
        seed: Seed of the selection.
        rng: ``default`` draws every class from a stream of its own (numpy's `Generator`, seeded
            with `seed` and the class), so a class's selection does not depend on the other
            classes, and smaller counts select a subset of what larger ones do. ``legacy`` selects
            the CIFAR-LT subset that the literature trains on: numpy's `RandomState` shuffles the
            classes' indices one class after the other, in ascending order, and the first
            ``counts[c]`` stay (seed 0 in most code).

    Returns:
        Positions in `labels`, class after class.

    Raises:
        InputError: If a label lies outside the classes, a count is negative, or a class has fewer
            samples than its count.

    Examples:
        >>> labels = [0, 1, 0, 1, 0, 1]
        >>> chosen = long_tail_indices(labels, [3, 1], seed=0)
        >>> [labels[i] for i in chosen]
        [0, 0, 0, 1]
    """
    if rng not in ("default", "legacy"):
        raise InputError(f"rng {rng!r} is not known; accepted: default, legacy")
    targets, _ = _targets(labels, None)
    return _select(targets, counts, seed, rng)


def _select(targets: np.ndarray, counts: Sequence[int], seed: int, rng: str) -> list[int]:
    if not counts:
        raise InputError("counts is empty; it needs one number per class")
    available = _count(targets, len(counts))
    for label, (count, have) in enumerate(zip(counts, available, strict=True)):
        if count < 0 or count > have:
            raise InputError(f"class {label} has {have} samples, so it cannot keep {count}")
    legacy = np.random.RandomState(seed)  # the generator behind the published subsets
    order = np.argsort(targets, kind="stable")
    chosen = []
    for label, members in enumerate(np.split(order, np.cumsum(available)[:-1])):
        if rng == "legacy":
            legacy.shuffle(members)
        else:
            members = np.random.default_rng((seed, label)).permutation(members)
        chosen.append(members[: counts[label]])
    picked: list[int] = np.concatenate(chosen).tolist()
    return picked


def class_counts(
    dataset_or_labels: Any, num_classes: int | None = None, *, label_column: str | None = None
) -> list[int]:
    """Number of samples of each class.

    Args:
        dataset_or_labels: Integer class labels as a tensor, an array or a list; or a data set whose
            labels can be read without loading its samples: one with ``.targets`` or ``.labels``
            (torchvision's, and those of `shared_core.data`), a Hugging Face data set with a label
            column, or a `torch.utils.data.Subset` of these.
        num_classes: Number of classes; by default the number of names the data set gives its
            classes, else the largest label + 1.
        label_column: The label column of a Hugging Face data set, if it is not clear.

    Raises:
        InputError: If no labels are found, or one lies outside the classes.

    Examples:
        >>> class_counts([0, 2, 2, 0, 0])
        [3, 0, 2]
    """
    targets, named = _targets(dataset_or_labels, label_column)
    counts: list[int] = _count(targets, named if num_classes is None else num_classes).tolist()
    return counts


def _count(targets: np.ndarray, num_classes: int | None) -> np.ndarray:
    if targets.size:
        low, high = int(targets.min()), int(targets.max())
        if low < 0:
            raise InputError(f"label {low} is negative; labels run from 0 upwards")
        if num_classes is not None and high >= num_classes:
            raise InputError(f"label {high} is not below the number of classes, {num_classes}")
    return np.bincount(targets, minlength=num_classes or 0)


def _targets(source: Any, label_column: str | None) -> tuple[np.ndarray, int | None]:
    """The labels of a data set or array as int64, and the number of classes if it is named."""
    if isinstance(source, Subset):
        targets, named = _targets(source.dataset, label_column)
        return targets[np.asarray(source.indices, dtype=np.int64)], named
    if hasattr(source, "column_names") and hasattr(source, "features"):
        return _column_targets(source, label_column)
    names = next(
        (getattr(source, k) for k in ("class_names", "classes") if hasattr(source, k)), None
    )
    for attribute in ("targets", "labels"):
        if hasattr(source, attribute):
            targets, _ = _targets(getattr(source, attribute), None)
            return targets, None if names is None else len(names)
    if isinstance(source, torch.Tensor):
        values = source.detach().cpu().numpy()
    elif hasattr(source, "__array__") or isinstance(source, list | tuple):
        values = np.asarray(source)
    else:
        raise InputError(
            f"found no labels in {type(source).__name__}: it has neither .targets nor .labels; "
            "pass the labels themselves"
        )
    if values.size == 0:
        return np.zeros(0, dtype=np.int64), None
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise InputError(
            f"labels have shape {values.shape} and dtype {values.dtype}; "
            "accepted: one integer class index per sample"
        )
    return values.astype(np.int64, copy=False), None


def _column_targets(source: Any, label_column: str | None) -> tuple[np.ndarray, int | None]:
    """The labels of a Hugging Face data set."""
    label_column = find_label_column(source.features, label_column)
    names = getattr(source.features[label_column], "names", None)
    values = source.select_columns([label_column]).with_format("numpy")[:][label_column]
    targets, _ = _targets(np.asarray(values), None)
    return targets, None if names is None else len(names)


class LongTailSubset(Subset[Any]):
    """A long-tailed subset of a balanced data set.

    Args:
        dataset: A map-style data set whose labels `class_counts` can read.
        counts: Samples to keep of each class, for example from `long_tail_counts`.
        seed: Seed of the selection.
        rng: ``default`` or ``legacy``; see `long_tail_indices`.
        label_column: The label column of a Hugging Face data set, if it is not clear.

    Attributes:
        targets: The labels of the chosen samples, in order.
        class_counts: The number of chosen samples of each class.

    Raises:
        InputError: As `class_counts` and `long_tail_indices` do.

    Examples:
        >>> from torch.utils.data import TensorDataset
        >>> balanced = TensorDataset(torch.arange(6.0), torch.tensor([0, 0, 0, 1, 1, 1]))
        >>> balanced.targets = [0, 0, 0, 1, 1, 1]
        >>> tail = LongTailSubset(balanced, [3, 1])
        >>> len(tail), tail.targets, tail.class_counts
        (4, [0, 0, 0, 1], [3, 1])
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        counts: Sequence[int],
        *,
        seed: int = 0,
        rng: Literal["default", "legacy"] = "default",
        label_column: str | None = None,
    ) -> None:
        if rng not in ("default", "legacy"):
            raise InputError(f"rng {rng!r} is not known; accepted: default, legacy")
        targets, _ = _targets(dataset, label_column)
        chosen = _select(targets, counts, seed, rng)
        super().__init__(dataset, chosen)
        self.targets: list[int] = targets[chosen].tolist()
        self.class_counts: list[int] = [int(count) for count in counts]

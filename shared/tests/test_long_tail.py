import math

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Subset, TensorDataset

from shared_core.data.long_tail import (
    LongTailSubset,
    class_counts,
    long_tail_counts,
    long_tail_indices,
)
from shared_core.errors import InputError
from shared_core.testing import examples

repeatable = examples(80)


@pytest.fixture(autouse=True)
def without_type_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let wrong arguments reach our own checks, as they do outside the tests."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


class Images(torch.utils.data.Dataset):
    """A data set in torchvision's style."""

    def __init__(self, targets: object, attribute: str = "targets", classes: int | None = None):
        setattr(self, attribute, targets)
        self.length = len(targets)
        if classes is not None:
            self.classes = [f"class {i}" for i in range(classes)]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("n_max", "classes", "ratio", "total"),
    # Totals of the CIFAR-LT training sets in the literature.
    [(5000, 10, 100, 12406), (5000, 10, 10, 20431), (500, 100, 100, 10847), (500, 100, 10, 19573)],
)
def test_cifar_long_tail_sizes(n_max: int, classes: int, ratio: int, total: int) -> None:
    counts = long_tail_counts(n_max, classes, imbalance_ratio=ratio)
    assert sum(counts) == total
    assert counts[0] == n_max
    assert counts[-1] == n_max // ratio


@pytest.mark.parametrize("factor", [1.0, 0.5, 0.1, 0.02, 0.01, 0.005])
@pytest.mark.parametrize("classes", [2, 3, 10, 100])
def test_exponential_profile_truncates_the_usual_expression(factor: float, classes: int) -> None:
    expected = [int(500 * (factor ** (i / (classes - 1.0)))) for i in range(classes)]
    assert long_tail_counts(500, classes, imbalance_factor=factor) == expected
    assert long_tail_counts(500, classes, imbalance_ratio=1 / factor) == expected


def test_exponential_profile_against_logarithms() -> None:
    counts = long_tail_counts(1280, 30, imbalance_ratio=256, rounding="nearest")
    for i, count in enumerate(counts):
        exact = math.exp(math.log(1280) - i / 29 * math.log(256))
        assert abs(count - exact) <= 0.5 + 1e-9


def test_step_profile() -> None:
    step = long_tail_counts(500, 5, imbalance_ratio=100, profile="step")
    assert step == [500, 500, 5, 5, 5]
    step = long_tail_counts(5, 4, imbalance_ratio=100, profile="step", rounding="nearest")
    assert step == [5, 5, 1, 1]


def test_one_class_and_no_imbalance() -> None:
    for profile in ("exp", "step"):
        assert long_tail_counts(7, 1, imbalance_ratio=10, profile=profile) == [7]
        assert long_tail_counts(7, 3, imbalance_ratio=1, profile=profile) == [7, 7, 7]


@given(st.integers(1, 6000), st.integers(1, 60), st.floats(1, 1000))
@repeatable
def test_counts_never_grow(n_max: int, classes: int, ratio: float) -> None:
    for profile in ("exp", "step"):
        counts = long_tail_counts(
            n_max, classes, imbalance_ratio=ratio, profile=profile, rounding="nearest"
        )
        assert len(counts) == classes
        assert counts == sorted(counts, reverse=True)
        assert n_max == counts[0] >= counts[-1] >= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give exactly one of them"),
        ({"imbalance_ratio": 100, "imbalance_factor": 0.01}, "give exactly one of them"),
        ({"imbalance_ratio": 0.01}, "imbalance_ratio=0.01; it has to be finite and at least 1"),
        ({"imbalance_ratio": math.inf}, "imbalance_ratio=inf"),
        ({"imbalance_ratio": math.nan}, "imbalance_ratio=nan"),
        ({"imbalance_factor": 0.0}, r"imbalance_factor=0.0; it has to lie in \(0, 1\]"),
        ({"imbalance_factor": 100}, "imbalance_factor=100"),
        ({"imbalance_ratio": 2, "profile": "pareto"}, "profile 'pareto' is not known"),
        ({"imbalance_ratio": 2, "rounding": "up"}, "rounding 'up' is not known"),
        ({"imbalance_ratio": 2, "n_max": 0}, "n_max=0 and num_classes=10"),
        ({"imbalance_ratio": 2, "num_classes": 0}, "n_max=50 and num_classes=0"),
        ({"imbalance_ratio": 100}, r"class 8 of 10 would keep int\(0.8341\) = 0 samples"),
    ],
)
def test_impossible_profiles_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        long_tail_counts(**{"n_max": 50, "num_classes": 10, **arguments})


@pytest.mark.smoke
def test_legacy_selection_is_the_published_one() -> None:
    targets = np.random.default_rng(0).integers(0, 10, 3000)
    counts = long_tail_counts(150, 10, imbalance_ratio=10)
    # The published recipe: seed numpy's global generator, shuffle each class's positions in place.
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    expected = []
    for label, count in enumerate(counts):
        positions = np.where(targets == label)[0]
        np.random.shuffle(positions)  # noqa: NPY002
        expected.extend(positions[:count].tolist())
    np.random.set_state(state)  # noqa: NPY002
    assert long_tail_indices(targets, counts, seed=0, rng="legacy") == expected
    assert long_tail_indices(targets.tolist(), counts, seed=1, rng="legacy") != expected


@given(st.lists(st.integers(0, 3), min_size=8, max_size=40), st.integers(0, 5), st.data())
@repeatable
def test_selection_keeps_the_asked_number_of_each_class(
    labels: list, seed: int, data: st.DataObject
) -> None:
    counts = [data.draw(st.integers(0, labels.count(c))) for c in range(4)]
    for rng in ("default", "legacy"):
        chosen = long_tail_indices(labels, counts, seed=seed, rng=rng)
        assert len(set(chosen)) == len(chosen)
        assert [labels[i] for i in chosen] == [c for c in range(4) for _ in range(counts[c])]
        assert chosen == long_tail_indices(labels, counts, seed=seed, rng=rng)


def test_default_selections_are_nested_and_independent_between_classes() -> None:
    labels = [0] * 30 + [1] * 30
    small = long_tail_indices(labels, [5, 3], seed=4)
    assert set(small) < set(long_tail_indices(labels, [20, 3], seed=4))
    assert small[5:] == long_tail_indices(labels, [20, 3], seed=4)[20:]
    assert small != long_tail_indices(labels, [5, 3], seed=5)
    positions = [i - 30 for i in long_tail_indices(labels, [5, 5], seed=4)[5:]]
    assert positions != small[:5]  # the classes are not drawn alike


def test_selection_leaves_the_global_generators_alone() -> None:
    before = np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    for rng in ("default", "legacy"):
        long_tail_indices([0, 0, 1], [1, 1], seed=0, rng=rng)
    assert np.random.get_state()[1].tolist() == before[0]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize(
    ("labels", "counts", "message"),
    [
        ([0, 1], [2, 1], "class 0 has 1 samples, so it cannot keep 2"),
        ([0, 1], [1, -1], "class 1 has 1 samples, so it cannot keep -1"),
        ([0, 1], [1], "label 1 is not below the number of classes, 1"),
        ([0, -1], [1], "label -1 is negative"),
        ([0, 1], [], "counts is empty"),
        ([0.0, 1.0], [1, 1], "dtype float64; accepted: one integer class index"),
        ([[0, 1]], [1, 1], r"labels have shape \(1, 2\)"),
        (7, [1, 1], "found no labels in int"),
        ("01", [1, 1], "found no labels in str"),
    ],
)
def test_impossible_selections_are_refused(labels: object, counts: list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        long_tail_indices(labels, counts, seed=0)


def test_unknown_generator_is_refused() -> None:
    with pytest.raises(InputError, match="rng 'torch' is not known"):
        long_tail_indices([0], [1], seed=0, rng="torch")
    with pytest.raises(InputError, match="rng 'torch' is not known"):
        LongTailSubset(Images([0]), [1], rng="torch")


@pytest.mark.smoke
@pytest.mark.parametrize(
    "source",
    [
        [2, 0, 2],
        (2, 0, 2),
        np.array([2, 0, 2], dtype=np.uint8),
        torch.tensor([2, 0, 2], dtype=torch.int32),
        Images([2, 0, 2]),
        Images(np.array([2, 0, 2]), "labels"),
        Images(torch.tensor([2, 0, 2])),
        Subset(Images([1, 2, 0, 2]), [1, 2, 3]),
        Subset(Subset(Images([1, 2, 0, 2]), [3, 2, 1, 0]), [0, 1, 2]),
    ],
)
def test_counts_of_every_kind_of_source(source: object) -> None:
    assert class_counts(source) == [1, 0, 2]
    assert class_counts(source, 5) == [1, 0, 2, 0, 0]
    with pytest.raises(InputError, match="label 2 is not below the number of classes, 2"):
        class_counts(source, 2)


def test_named_classes_count_even_if_absent() -> None:
    assert class_counts(Images([0, 1], classes=4)) == [1, 1, 0, 0]
    assert class_counts(Subset(Images([0, 1], classes=4), [1])) == [0, 1, 0, 0]
    assert class_counts([]) == []
    assert class_counts(torch.zeros(0, dtype=torch.long), 2) == [0, 0]


def test_counts_of_a_hugging_face_data_set() -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    names = ClassLabel(names=["cat", "dog", "eel"])
    table = Dataset.from_dict(
        {"text": ["a", "b", "c"], "animal": [1, 1, 0], "topic": [3, 0, 0]},
        features=Features({"text": Value("string"), "animal": names, "topic": Value("int64")}),
    )
    assert class_counts(table) == [1, 2, 0]
    assert class_counts(table, label_column="topic") == [2, 0, 0, 1]
    assert class_counts(table.select([0, 2])) == [1, 1, 0]
    tail = LongTailSubset(table, [1, 1, 0])
    assert [row["animal"] for row in tail] == tail.targets == [0, 1]
    with pytest.raises(InputError, match="no column 'animals'; available: text, animal, topic"):
        class_counts(table, label_column="animals")
    with pytest.raises(
        InputError, match=r"which column holds the label; .* available: text, topic"
    ):
        class_counts(table.remove_columns("animal"))
    plain = table.remove_columns("animal").rename_column("topic", "label")
    assert class_counts(plain) == [2, 0, 0, 1]


@pytest.mark.smoke
def test_subset_has_the_labels_of_its_samples() -> None:
    labels = torch.arange(40) % 4
    dataset = TensorDataset(torch.arange(40), labels)
    dataset.targets = labels
    counts = long_tail_counts(8, 4, imbalance_ratio=8)
    tail = LongTailSubset(dataset, counts, seed=2)
    assert tail.class_counts == counts == class_counts(tail) == [8, 4, 2, 1]
    assert tail.targets == [int(label) for _, label in tail]
    assert [int(x) for x, _ in tail] == long_tail_indices(labels, counts, seed=2)
    legacy = LongTailSubset(dataset, counts, seed=2, rng="legacy")
    assert legacy.indices == long_tail_indices(labels, counts, seed=2, rng="legacy")
    further = LongTailSubset(tail, [1, 1, 1, 1])
    assert further.targets == [0, 1, 2, 3] == [int(label) for _, label in further]

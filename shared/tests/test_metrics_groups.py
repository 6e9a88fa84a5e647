import math
from fractions import Fraction

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score

from shared_core.errors import InputError
from shared_core.metrics import ShotAccuracy, shot_groups
from shared_core.testing import examples


@pytest.fixture
def without_shape_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let wrong shapes reach our own checks, as they do outside the tests."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def values_of(metric: ShotAccuracy) -> dict[str, float]:
    return {key: value.item() for key, value in metric.compute().items()}


@pytest.mark.smoke
def test_edges_of_the_groups() -> None:
    counts = [1280, 101, 100, 99, 21, 20, 19, 5, 0]
    assert shot_groups(counts) == {"many": [0, 1], "medium": [2, 3, 4, 5], "few": [6, 7, 8]}
    inclusive = shot_groups(counts, many_inclusive=True, few_inclusive=True)
    assert inclusive == {"many": [0, 1, 2], "medium": [3, 4], "few": [5, 6, 7, 8]}
    moved = shot_groups(torch.tensor(counts), many=1000, few=100)
    assert moved == {"many": [0], "medium": [1, 2], "few": [3, 4, 5, 6, 7, 8]}
    assert shot_groups([30, 30], many=30, few=30) == {"many": [], "medium": [0, 1], "few": []}


@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=20),
    st.integers(0, 200),
    st.integers(0, 200),
    st.booleans(),
)
@examples(60)
def test_groups_partition_the_classes(counts: list, low: int, width: int, inclusive: bool) -> None:
    groups = shot_groups(counts, many=low + width, few=low, many_inclusive=inclusive)
    assert sorted(c for group in groups.values() for c in group) == list(range(len(counts)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_counts": []}, "train_counts is empty"),
        ({"train_counts": [3, -1]}, "class 1 has the training count -1"),
        ({"train_counts": [3], "many": 10, "few": 20}, "groups overlap: few=20"),
        (
            {
                "train_counts": [3],
                "many": 9,
                "few": 9,
                "many_inclusive": True,
                "few_inclusive": True,
            },
            "groups overlap",
        ),
    ],
)
def test_impossible_groups_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        shot_groups(**arguments)
    with pytest.raises(InputError, match=message):
        ShotAccuracy(**arguments)


@pytest.mark.smoke
def test_hand_computed_accuracies() -> None:
    # Recalls: class 0 3/4, class 1 1/2, class 2 2/2, class 3 0/1, class 4 1/3.
    target = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 3, 4, 4, 4])
    preds = torch.tensor([0, 0, 0, 1, 1, 0, 2, 2, 0, 4, 0, 1])
    metric = ShotAccuracy([500, 200, 60, 30, 3])
    metric.update(preds, target)
    many, medium, few = Fraction(5, 8), Fraction(1, 2), Fraction(1, 3)
    assert values_of(metric) == pytest.approx(
        {
            "overall": 7 / 12,
            "many": float(many),
            "medium": float(medium),
            "few": float(few),
            "balanced": float(Fraction(3, 4) + Fraction(1, 2) + 1 + 0 + Fraction(1, 3)) / 5,
            "worst_class": 0.0,
            "harmonic_mean": float(3 / (1 / many + 1 / medium + 1 / few)),
        },
        1e-12,
    )
    assert metric.per_class().tolist() == pytest.approx([0.75, 0.5, 1, 0, 1 / 3], 1e-12)
    assert metric.groups == {"many": [0, 1], "medium": [2, 3], "few": [4]}


def test_random_batches_against_a_loop_over_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = [int(400 * 0.97**c) for c in range(120)]
    target = torch.randint(0, 119, (900,), generator=generator)  # class 119 never occurs
    scores = torch.randn(900, 120, generator=generator)
    scores[torch.arange(900), target] += 2
    scores[:, 119] -= 99
    metric = ShotAccuracy(counts)
    for piece in torch.arange(900).split(128):
        metric.update(scores[piece], target[piece])
    preds = scores.argmax(1)
    recalls = {
        c: (preds[target == c] == c).double().mean().item() for c in target.unique().tolist()
    }
    groups = {"many": [], "medium": [], "few": []}
    for c, recall in recalls.items():
        name = "many" if counts[c] > 100 else "few" if counts[c] < 20 else "medium"
        groups[name].append(recall)
    values = values_of(metric)
    assert min(map(len, groups.values())) > 3
    for name, members in groups.items():
        assert values[name] == pytest.approx(sum(members) / len(members), 1e-12)
    assert values["overall"] == pytest.approx((preds == target).double().mean().item(), 1e-12)
    assert values["worst_class"] == pytest.approx(min(recalls.values()), 1e-12)
    assert values["balanced"] == pytest.approx(balanced_accuracy_score(target, preds), 1e-12)


def test_per_class_recall_equals_torchmetrics() -> None:
    from torchmetrics.functional.classification import multiclass_accuracy

    generator = torch.Generator().manual_seed(1)
    target = torch.arange(7).repeat(20)
    preds = torch.where(
        torch.rand(140, generator=generator) < 0.6,
        target,
        torch.randint(0, 7, (140,), generator=generator),
    )
    metric = ShotAccuracy([200, 150, 90, 50, 20, 10, 5])
    metric.update(preds, target)
    expected = multiclass_accuracy(preds, target, num_classes=7, average=None)
    torch.testing.assert_close(metric.per_class().float(), expected)


def test_classes_without_test_samples_stay_out() -> None:
    metric = ShotAccuracy([500, 300, 50, 5])
    metric.update(torch.tensor([0, 0]), torch.tensor([0, 2]))
    values = values_of(metric)
    assert (values["many"], values["medium"], values["balanced"]) == (1, 0, 0.5)
    assert math.isnan(values["few"])
    assert (values["worst_class"], values["harmonic_mean"]) == (0, 0)
    assert metric.per_class().isnan().tolist() == [False, True, False, True]


def test_harmonic_mean_leaves_out_groups_that_do_not_exist() -> None:
    metric = ShotAccuracy([500, 5])
    metric.update(torch.tensor([0, 0, 1, 0]), torch.tensor([0, 0, 1, 1]))
    values = values_of(metric)
    assert math.isnan(values["medium"])
    assert values["harmonic_mean"] == pytest.approx(2 / (1 / 1 + 1 / 0.5))


def test_perfect_and_useless_classifiers() -> None:
    target = torch.arange(4)
    for preds, expected in ((target, 1.0), ((target + 1) % 4, 0.0)):
        metric = ShotAccuracy([300, 60, 50, 2])
        metric.update(preds, target)
        assert set(values_of(metric).values()) == {expected}


def test_half_precision_scores_and_reset() -> None:
    metric = ShotAccuracy([300, 2])
    metric.update(torch.tensor([[0.1, 0.9]], dtype=torch.bfloat16), torch.tensor([0]))
    metric.reset()
    metric.update(torch.tensor([[0.9, 0.1]], dtype=torch.float16), torch.tensor([0]))
    assert values_of(metric)["overall"] == 1.0
    assert metric.total.tolist() == [1, 0]


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric ShotAccuracy:UserWarning")
def test_without_batches_all_is_nan() -> None:
    assert all(math.isnan(value) for value in values_of(ShotAccuracy([300, 60, 2])).values())


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("preds", "target", "message"),
    [
        ([0, 1], [0, 3], "target holds the class 3; accepted: 0 to 2"),
        ([0, 1], [0, -1], "target holds the class -1"),
        ([0, 7], [0, 1], "preds holds the class 7"),
        ([0, 1, 2], [0, 1], r"preds have shape \[3\] and target \[2\]"),
        ([[0.1, 0.9]], [0], r"class scores of shape \[1, 3\]"),
    ],
)
def test_bad_batches_are_refused(preds: list, target: list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ShotAccuracy([300, 60, 2]).update(torch.tensor(preds), torch.tensor(target))

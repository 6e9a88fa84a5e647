import math
import pickle
import re
import warnings

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from focal_sam.weights import ClassWeights, FocalWeights, suggest_gamma, tail_weights
from shared_core.data.long_tail import long_tail_counts
from shared_core.errors import InputError
from shared_core.testing import examples

CIFAR10_LT = long_tail_counts(5000, 10, imbalance_ratio=100)
CIFAR100_LT = long_tail_counts(500, 100, imbalance_ratio=100)


def counts_between(n_max: int, n_min: int, classes: int, total: int) -> list[int]:
    """One largest and one smallest class; the others share the remaining samples evenly."""
    share, more = divmod(total - n_max - n_min, classes - 2)
    return [n_max, n_min] + [share + 1] * more + [share] * (classes - 2 - more)


IMAGENET_LT = counts_between(1280, 5, 1000, 115846)
INATURALIST = counts_between(1000, 2, 8142, 437513)

a_count = st.integers(1, 5000)
some_counts = st.lists(a_count, min_size=2, max_size=20)
repeatable = examples(100)


@pytest.fixture
def without_shape_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let wrong shapes reach our own checks, as they do outside the tests."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def silent(*arguments: object, **options: object) -> FocalWeights:
    """Focal weights that may be flat."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return FocalWeights(*arguments, **options)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("counts", "gamma", "lam", "low", "high", "digits"),
    [
        (CIFAR10_LT, 3.0, 0.5, 0.106, 0.494, 3),
        (CIFAR100_LT, 3.2, 0.8, 0.688, 0.799, 3),
        (IMAGENET_LT, 0.8, 1.0, 0.991, 1.0, 3),
        (INATURALIST, 2.0, 1.0, 0.995, 1.0, 3),
    ],
    ids=["cifar10-lt", "cifar100-lt", "imagenet-lt", "inaturalist"],
)
def test_weights_of_the_papers_settings(
    counts: list, gamma: float, lam: float, low: float, high: float, digits: int
) -> None:
    weights = silent(counts, gamma, lam)
    assert round(weights.values.min().item(), digits) == low
    assert round(weights.values.max().item(), digits) == high
    assert weights.num_classes == len(counts)


def test_the_profiles_are_those_of_the_data_sets() -> None:
    assert [sum(c) for c in (CIFAR10_LT, CIFAR100_LT, IMAGENET_LT, INATURALIST)] == [
        12406,
        10847,
        115846,
        437513,
    ]


@repeatable
@given(some_counts, st.floats(0, 8), st.floats(0, 2))
def test_focal_weights_follow_the_formula(counts: list, gamma: float, lam: float) -> None:
    values = silent(counts, gamma, lam).values
    expected = [lam * math.pow((sum(counts) - n) / sum(counts), gamma) for n in counts]
    assert values.dtype == torch.float64
    assert values.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-300)


@repeatable
@given(some_counts, st.floats(0, 8), st.floats(0, 2), st.sampled_from(["empirical", "relative"]))
def test_rarer_classes_weigh_at_least_as_much_and_never_more_than_lambda(
    counts: list, gamma: float, lam: float, prior: str
) -> None:
    values = silent(counts, gamma, lam, prior=prior).values.tolist()
    assert all(0 <= c <= lam for c in values)
    by_rarity = [c for _, c in sorted(zip(counts, values, strict=True), key=lambda p: -p[0])]
    assert by_rarity == sorted(by_rarity)


@repeatable
@given(some_counts, st.randoms(use_true_random=False))
def test_weights_follow_their_classes_when_these_are_renumbered(counts: list, rng: object) -> None:
    order = list(range(len(counts)))
    rng.shuffle(order)
    values = silent(counts).values[order]
    torch.testing.assert_close(silent([counts[i] for i in order]).values, values)


def test_gamma_zero_is_uniform_even_for_a_single_class() -> None:
    assert FocalWeights(CIFAR10_LT, gamma=0.0, lam=1.0).uniform() == 1.0
    assert FocalWeights([5], gamma=0.0, lam=0.7).uniform() == 0.7
    assert FocalWeights([5], gamma=2.0, lam=0.7).uniform() == 0.0
    assert FocalWeights(CIFAR10_LT, gamma=3.0, lam=0.0).uniform() == 0.0
    assert FocalWeights(CIFAR10_LT, gamma=3.0).uniform() is None


def test_lambda_above_one_is_kept() -> None:
    assert silent([99, 1], gamma=1.0, lam=1.5).values.tolist() == pytest.approx([0.015, 1.485])


def test_the_relative_prior_bites_whatever_the_number_of_classes() -> None:
    weights = FocalWeights(IMAGENET_LT, gamma=2.0, lam=1.0, prior="relative")
    assert weights.values[:2].tolist() == pytest.approx([(5 / 1285) ** 2, (1280 / 1285) ** 2])
    with_empty = FocalWeights([90, 0, 10], 2.0, 1.0, prior="relative", allow_empty=True)
    assert with_empty.values.tolist() == pytest.approx([0.01, 1.0, 0.81])


def test_a_class_never_trained_on_has_prior_zero() -> None:
    weights = FocalWeights([90, 10, 0], gamma=2.0, lam=0.5, allow_empty=True)
    assert weights.class_priors.tolist() == [0.9, 0.1, 0.0]
    assert weights.values.tolist() == pytest.approx([0.005, 0.405, 0.5])


def flat_warning(*arguments: object, **options: object) -> str | None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        FocalWeights(*arguments, **options)
    assert len(caught) <= 1
    assert all(w.category is UserWarning for w in caught)
    return str(caught[0].message) if caught else None


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("counts", "gamma", "lam"), [(IMAGENET_LT, 0.8, 0.8), (INATURALIST, 2.0, 1.1)]
)
def test_flat_weights_warn_once_and_the_advice_helps(
    counts: list, gamma: float, lam: float
) -> None:
    message = flat_warning(counts, gamma, lam)
    assert message is not None
    assert f"{lam}-weighted SAM in all but name" in message
    advised = float(re.search(r"γ = ([\d.e+]+) would", message)[1])
    assert advised == pytest.approx(suggest_gamma(counts, 0.5), rel=5e-3)
    assert flat_warning(counts, advised, lam) is None


def test_the_advice_for_the_relative_prior_is_about_that_prior() -> None:
    message = flat_warning([90, 40, 10], 0.01, 1.0, prior="relative")
    advised = float(re.search(r"γ = ([\d.e+]+) would", message)[1])
    halved = FocalWeights([90, 40, 10], advised, 1.0, prior="relative").values[0]
    assert halved.item() == pytest.approx(0.5, rel=5e-3)


@pytest.mark.parametrize("counts", [[50] * 10, [1000] * 99 + [990], [500, 0, 500]])
def test_balanced_classes_are_told_that_no_gamma_helps(counts: list) -> None:
    message = flat_warning(counts, 2.0, 0.8, allow_empty=True)
    assert message is not None
    assert message.endswith("no γ changes that")


@pytest.mark.parametrize(
    ("counts", "gamma", "lam"),
    [
        (CIFAR10_LT, 3.0, 0.5),
        (CIFAR100_LT, 3.2, 0.8),
        (IMAGENET_LT, 0.0, 1.0),
        (IMAGENET_LT, 0.8, 0.0),
        ([5], 2.0, 1.0),
        ([5], 0.0, 1.0),
    ],
)
def test_no_warning_without_reason(counts: list, gamma: float, lam: float) -> None:
    for prior in ("empirical", "relative"):
        assert flat_warning(counts, gamma, lam, prior=prior) is None


def test_the_limit_of_flatness_is_five_percent() -> None:
    # Two classes: the ratio of the weights is (π_0 / π_1)^γ.
    counts = [60, 40]
    below, above = (math.log(ratio) / math.log(1.5) for ratio in (1.0499, 1.0501))
    assert flat_warning(counts, below, 1.0) is not None
    assert flat_warning(counts, above, 1.0) is None


@repeatable
@given(some_counts, st.floats(0.01, 1.0))
def test_suggest_gamma_round_trip(counts: list, head_weight: float) -> None:
    gamma = suggest_gamma(counts, head_weight)
    assert gamma >= 0
    described = silent(counts, gamma, 1.0).describe()
    assert described["head"] == pytest.approx(head_weight, rel=1e-9)
    assert described["min"] == described["head"]


def test_suggest_gamma_one_is_sam() -> None:
    assert math.copysign(1, suggest_gamma([90, 10], 1.0)) == 1
    assert suggest_gamma([90, 10], 1.0) == 0
    assert suggest_gamma([3, 1, 0], 0.25) == pytest.approx(1.0)


@pytest.mark.parametrize("head_weight", [0.0, -0.5, 1.01, math.nan])
def test_suggest_gamma_for_an_impossible_factor(head_weight: float) -> None:
    with pytest.raises(InputError, match=rf"head_weight is {head_weight}; it must lie in \(0, 1\]"):
        suggest_gamma([90, 10], head_weight)


@pytest.mark.parametrize("counts", [[7], [7, 0]])
def test_suggest_gamma_for_a_single_class(counts: list) -> None:
    with pytest.raises(InputError, match="a single class with samples"):
        suggest_gamma(counts, 0.5)


def test_describe() -> None:
    assert FocalWeights([10, 90, 0], 2.0, 1.0, allow_empty=True).describe() == {
        "classes": 3,
        "gamma": 2.0,
        "lam": 1.0,
        "prior": "empirical",
        "min": pytest.approx(0.01),
        "max": 1.0,
        "head": pytest.approx(0.01),
        "tail": pytest.approx(0.81),
        "spread": pytest.approx(81.0),
    }
    assert silent([5, 5], 0.0, 1.0, prior="relative").describe()["spread"] == 1.0
    assert FocalWeights([5, 5], 1.0, 0.0).describe()["spread"] == 1.0


def test_tail_weights() -> None:
    assert tail_weights([100, 20, 19, 1], 20).tolist() == [0, 0, 1, 1]
    assert tail_weights([100, 20], 0).tolist() == [0, 0]
    assert tail_weights(CIFAR100_LT, 20).sum() == sum(n < 20 for n in CIFAR100_LT)


@pytest.mark.smoke
@repeatable
@given(
    st.lists(st.floats(-2, 2), min_size=1, max_size=8),
    st.lists(st.integers(0, 7), max_size=12),
)
def test_lookup(values: list, labels: list) -> None:
    labels = [label % len(values) for label in labels]
    weights = ClassWeights(torch.tensor(values, dtype=torch.float64))
    expected = [values[label] for label in labels]
    target = torch.tensor(labels, dtype=torch.int64)
    assert weights(target, torch.float64).tolist() == expected
    assert weights(target).dtype == torch.float32
    one_hot = torch.nn.functional.one_hot(target, len(values)).double()
    assert weights(one_hot, torch.float64).tolist() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_labels_of_every_integer_type(dtype: torch.dtype) -> None:
    weights = ClassWeights(torch.tensor([0.25, 0.5]))
    assert weights(torch.tensor([1, 0], dtype=dtype)).tolist() == [0.5, 0.25]


def test_a_mixture_of_two_labels_weighs_their_mean() -> None:
    weights = FocalWeights(CIFAR10_LT, 3.0, 0.5)
    a, b, share = torch.tensor([0, 4, 9]), torch.tensor([9, 4, 1]), 0.3
    one_hot = torch.eye(10, dtype=torch.float64)
    torch.testing.assert_close(
        weights(share * one_hot[a] + (1 - share) * one_hot[b], torch.float64),
        share * weights(a, torch.float64) + (1 - share) * weights(b, torch.float64),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_leaves_the_weights_their_precision(dtype: torch.dtype) -> None:
    weights = FocalWeights(CIFAR10_LT, 3.0, 0.5)
    soft = torch.rand(6, 10, generator=torch.Generator().manual_seed(0)).softmax(dim=1)
    expected = (soft.double() * weights.values).sum(dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        found = weights(soft, dtype)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


def test_weights_are_constants_to_autograd() -> None:
    soft = torch.full((2, 2), 0.5, requires_grad=True)
    assert not ClassWeights(torch.tensor([0.1, 0.9], requires_grad=True))(soft).requires_grad


def test_uniform_within_a_tolerance() -> None:
    weights = ClassWeights(torch.tensor([0.9, 1.0, 1.1], dtype=torch.float64))
    assert weights.uniform() is None
    assert weights.uniform(0.09) is None
    assert weights.uniform(0.11) == pytest.approx(1.0)
    lopsided = ClassWeights(torch.tensor([0.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    assert lopsided.uniform(0.99) is None
    assert ClassWeights(torch.zeros(3)).uniform() == 0.0
    assert ClassWeights(torch.tensor([-1.0, 1.0])).uniform(0.5) is None


def test_later_changes_of_the_callers_tensor_do_not_reach_the_weights() -> None:
    values = torch.tensor([0.1, 0.2], dtype=torch.float64)
    weights = ClassWeights(values)
    values.zero_()
    assert weights.values.tolist() == [0.1, 0.2]


def test_weights_first_used_in_inference_mode_can_train_later() -> None:
    weights = ClassWeights(torch.tensor([0.1, 0.2]))
    with torch.inference_mode():
        weights(torch.tensor([0, 1]))
    assert not weights.to(torch.device("cpu")).is_inference()


def test_weights_survive_pickling() -> None:
    weights = FocalWeights(CIFAR10_LT, 3.0, 0.5)
    copy = pickle.loads(pickle.dumps(weights))  # noqa: S301 (our own bytes)
    assert copy.values.equal(weights.values)
    assert copy.describe() == weights.describe()


@pytest.mark.usefixtures("without_shape_checks")
def test_counts_of_other_kinds() -> None:
    expected = silent([90, 10]).values
    for counts in (
        np.array([90, 10]),
        torch.tensor([90, 10]),
        torch.tensor([90.0, 10.0]),
        (90, 10),
    ):
        assert silent(counts).values.equal(expected)


@pytest.mark.parametrize("label", [-1, -100, 2])
def test_labels_outside_the_classes(label: int) -> None:
    with pytest.raises(
        IndexError, match=rf"label {label} is outside \[0, 2\): there are 2 classes"
    ):
        ClassWeights(torch.tensor([0.1, 0.5]))(torch.tensor([1, label, 0]))


def test_labels_on_a_device_are_read_only_when_asked() -> None:
    # A meta tensor has no values, so whatever reads one fails.
    target = torch.zeros(3, dtype=torch.int64, device="meta")
    values = torch.tensor([0.1, 0.5])
    assert ClassWeights(values)(target).shape == (3,)
    with pytest.raises(RuntimeError, match="meta"):
        ClassWeights(values, check_labels=True)(target)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_labels_on_a_gpu_are_checked_when_asked() -> None:
    weights = FocalWeights([90, 10], check_labels=True)
    assert weights(torch.tensor([0, 1], device="cuda")).device.type == "cuda"
    with pytest.raises(IndexError, match="label -1 is outside"):
        weights(torch.tensor([0, -1], device="cuda"))


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.zeros(3, 3), r"the soft target has the shape \[3, 3\]; .* \[batch, 2\]"),
        (torch.zeros(2), r"the soft target has the shape \[2\]"),
        (torch.zeros(3, 2, dtype=torch.int64), r"shape \[3, 2\] and the type torch.int64"),
        (torch.tensor(1), r"shape \[\] and the type torch.int64; pass labels \[batch\]"),
        (torch.zeros(3, dtype=torch.bool), "type torch.bool"),
        (torch.zeros(3, dtype=torch.complex64), "type torch.complex64"),
    ],
)
def test_targets_that_do_not_fit(target: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ClassWeights(torch.tensor([0.1, 0.5]))(target)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.zeros(2, 2), r"the weights have the shape \[2, 2\]; pass one number per class"),
        (torch.zeros(0), r"the weights have the shape \[0\]"),
        (torch.tensor(1.0), r"the weights have the shape \[\]"),
        (torch.tensor([0.0, math.nan]), "the weight of class 1 is nan; it must be finite"),
        (torch.tensor([math.inf, 1.0]), "the weight of class 0 is inf"),
    ],
)
def test_weights_that_are_none(values: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ClassWeights(values)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["gamma", "lam"])
def test_gamma_and_lambda_out_of_range(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{name} is {value}; it must be finite and at least 0"):
        FocalWeights([90, 10], **{name: value})


@pytest.mark.usefixtures("without_shape_checks")
def test_an_unknown_prior() -> None:
    with pytest.raises(InputError, match="prior is 'flat'; accepted: 'empirical', 'relative'"):
        FocalWeights([90, 10], prior="flat")


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([5, 0, 3], r"class_counts\[1\] is 0; .* at least 1 .*allow_empty=True"),
        ([5, 3, -2], r"class_counts\[2\] is -2; every class needs at least 1"),
        ([0.9, 0.1], r"class_counts\[0\] is 0.9; every class needs at least 1"),
        ([5.0, math.nan], r"class_counts\[1\] is nan"),
        ([5.0, math.inf], r"class_counts\[1\] is inf"),
        ([], r"class_counts has the shape \[0\]; pass one number per class"),
        ([[1, 2]], r"class_counts has the shape \[1, 2\]"),
        ({0: 5, 1: 3}, "class_counts is a dict .*pass one number per class, such as"),
        ([[1], [1, 2]], "class_counts is a list"),
    ],
)
def test_counts_that_are_none(counts: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        FocalWeights(counts)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([0, 0], "class_counts are all 0"),
        ([3, -1], r"class_counts\[1\] is -1; every class needs at least 1 training sample or 0"),
        ([0.9, 0.1], r"class_counts\[0\] is 0.9"),
    ],
)
@pytest.mark.usefixtures("without_shape_checks")
def test_counts_that_are_none_even_with_empty_classes(counts: list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        FocalWeights(counts, allow_empty=True)
    with pytest.raises(InputError, match=message):
        suggest_gamma(counts, 0.5)


def test_tail_weights_of_an_empty_class_and_a_negative_threshold() -> None:
    with pytest.raises(InputError, match=r"class_counts\[1\] is 0"):
        tail_weights([5, 0], 20)
    with pytest.raises(InputError, match="threshold is -1"):
        tail_weights([5, 3], -1)

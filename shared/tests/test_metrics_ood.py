import math
from fractions import Fraction

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from shared_core.errors import InputError
from shared_core.metrics import aupr_in, aupr_out, auroc, fpr_at_recall, ood_metrics
from shared_core.testing import examples

few_scores = st.lists(st.integers(-3, 3), min_size=1, max_size=12)
many_scores = st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=30)
levels = st.sampled_from([0.05, 0.25, 0.5, 0.8, 0.9, 0.95, 1.0])
repeatable = examples(150)


@pytest.fixture
def without_shape_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let wrong shapes reach our own checks, as they do outside the tests."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def tensor(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def pairwise_auroc(id_scores: list, ood_scores: list) -> float:
    wins = Fraction(0)
    for s in id_scores:
        for u in ood_scores:
            wins += Fraction(1) if s > u else Fraction(1, 2) if s == u else Fraction(0)
    return float(wins / (len(id_scores) * len(ood_scores)))


def stepwise_precision(positive: list, negative: list) -> float:
    """Sum over distinct thresholds of (recall gained) x (precision)."""
    total, before = Fraction(0), 0
    for t in sorted({*positive, *negative}, reverse=True):
        true = sum(s >= t for s in positive)
        false = sum(u >= t for u in negative)
        total += Fraction(true - before, len(positive)) * Fraction(true, true + false)
        before = true
    return float(total)


def enumerated_fpr(positive: list, negative: list, level: float, rule: str) -> float:
    """Every observed score as a threshold, in exact arithmetic, as the two rules are worded."""
    points = []  # recall, false-positive rate, threshold
    for t in sorted({*positive, *negative}):
        recall = Fraction(sum(s >= t for s in positive), len(positive))
        rate = Fraction(sum(u >= t for u in negative), len(negative))
        points.append((recall, rate, t))
    goal = Fraction(str(level))
    if rule == "at_least":
        _, rate, _ = max((p for p in points if p[0] >= goal), key=lambda p: p[2])
        return float(rate)
    points = [p for p in points if p[2] >= min(positive)]  # none below the lowest positive
    nearest = min(abs(p[0] - goal) for p in points)
    recall = max(p[0] for p in points if abs(p[0] - goal) == nearest)
    return float(next(p[1] for p in points if p[0] == recall))  # ascending: the lowest threshold


def outlier_exposure_fpr(positive: np.ndarray, negative: np.ndarray, level: float) -> float:
    """The detection-metric recipe of the outlier-exposure papers, in floating point.

    Cumulate true positives over the distinct scores in descending order, cut the curve where the
    recall first becomes 1, and take the point nearest to the level, searching from recall 1 down.
    """
    scores = np.concatenate([positive, negative])
    truth = np.concatenate([np.ones(len(positive)), np.zeros(len(negative))])
    order = np.argsort(-scores, kind="stable")
    scores, truth = scores[order], truth[order]
    ends = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)
    true = np.cumsum(truth)[ends]
    false = ends + 1 - true
    keep = slice(np.searchsorted(true, true[-1]), None, -1)
    recall = true[keep] / true[-1]
    return false[keep][np.argmin(np.abs(recall - level))] / len(negative)


@pytest.mark.smoke
@given(few_scores, few_scores)
@repeatable
def test_auroc_counts_pairs(id_scores: list, ood_scores: list) -> None:
    assert auroc(tensor(id_scores), tensor(ood_scores)) == pairwise_auroc(id_scores, ood_scores)


@given(few_scores, few_scores)
@repeatable
def test_average_precision_sums_over_distinct_thresholds(id_scores: list, ood_scores: list) -> None:
    left, right = tensor(id_scores), tensor(ood_scores)
    negated = [[-s for s in ood_scores], [-s for s in id_scores]]
    assert aupr_in(left, right) == pytest.approx(stepwise_precision(id_scores, ood_scores), 1e-12)
    assert aupr_out(left, right) == pytest.approx(stepwise_precision(*negated), 1e-12)


@pytest.mark.smoke
@given(few_scores, few_scores, levels)
@repeatable
def test_fpr_takes_the_threshold_its_rule_names(
    id_scores: list, ood_scores: list, level: float
) -> None:
    left, right = tensor(id_scores), tensor(ood_scores)
    negated = [[-s for s in ood_scores], [-s for s in id_scores]]
    for rule in ("nearest", "at_least"):
        assert fpr_at_recall(left, right, level, rule=rule) == enumerated_fpr(
            id_scores, ood_scores, level, rule
        )
        assert fpr_at_recall(left, right, level, positive="ood", rule=rule) == enumerated_fpr(
            *negated, level, rule
        )


@given(many_scores, many_scores)
@repeatable
def test_extreme_float32_scores_are_not_rounded(id_scores: list, ood_scores: list) -> None:
    left, right = torch.tensor(id_scores), torch.tensor(ood_scores)
    assert auroc(left, right) == pairwise_auroc(id_scores, ood_scores)


@pytest.mark.parametrize("ties", [False, True])
def test_agrees_with_scikit_learn(ties: bool) -> None:
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(1, 1, 700), rng.normal(0, 1.5, 430)
    if ties:
        inside, outside = inside.round(1), outside.round(1)
    truth = np.r_[np.ones(700), np.zeros(430)]
    scores = np.r_[inside, outside]
    values = ood_metrics(inside, outside)
    assert values["auroc"] == pytest.approx(roc_auc_score(truth, scores), 1e-12)
    assert values["aupr_in"] == pytest.approx(average_precision_score(truth, scores), 1e-12)
    assert values["aupr_out"] == pytest.approx(average_precision_score(1 - truth, -scores), 1e-12)
    rate, recall, _ = roc_curve(truth, scores, drop_intermediate=False)
    assert values["fpr95"] == rate[np.argmax(recall >= 0.95)]
    rate, recall, _ = roc_curve(1 - truth, -scores, drop_intermediate=False)
    assert values["fpr95_ood_positive"] == rate[np.argmax(recall >= 0.95)]
    assert (values["n_id"], values["n_ood"]) == (700, 430)


@pytest.mark.parametrize("size", [3, 7, 21, 128, 999])  # none where two recalls are equally near
@pytest.mark.parametrize("ties", [False, True])
def test_nearest_rule_equals_the_outlier_exposure_recipe(size: int, ties: bool) -> None:
    for seed in range(20):
        rng = np.random.default_rng((size, seed))
        inside, outside = rng.normal(1, 1, size), rng.normal(0, 1, 2 * size)
        if ties and size > 21:
            inside, outside = inside.round(1), outside.round(1)
        expected = outlier_exposure_fpr(inside, outside, 0.95)
        assert fpr_at_recall(inside, outside, rule="nearest") == expected
        expected = outlier_exposure_fpr(-outside, -inside, 0.95)
        assert fpr_at_recall(inside, outside, positive="ood", rule="nearest") == expected


def test_equally_near_recalls_take_the_higher_one() -> None:
    inside = torch.arange(1.0, 11.0)  # recalls 0.9 and 1.0 are both 0.05 away
    outside = torch.tensor([1.0, 1.5, 0.5, 0.0])
    assert fpr_at_recall(inside, outside, rule="nearest") == 0.5


def test_the_two_conventions_are_mirror_images() -> None:
    generator = torch.Generator().manual_seed(0)
    inside = torch.randn(90, generator=generator) + 1
    outside = torch.randn(70, generator=generator)
    for rule in ("nearest", "at_least"):
        values = ood_metrics(inside, outside, rule=rule)
        mirrored = ood_metrics(-outside, -inside, rule=rule)
        assert values["fpr95"] == mirrored["fpr95_ood_positive"]
        assert values["fpr95_ood_positive"] == mirrored["fpr95"]
        assert values["aupr_in"] == mirrored["aupr_out"]
        assert values["auroc"] == mirrored["auroc"]
        assert ood_metrics(outside, inside)["auroc"] == pytest.approx(1 - values["auroc"], 1e-12)


@pytest.mark.smoke
def test_limiting_cases() -> None:
    apart = ood_metrics(torch.tensor([3.0, 2.0]), torch.tensor([1.0, 0.0]))
    assert apart == {
        "auroc": 1, "aupr_in": 1, "aupr_out": 1, "fpr95": 0, "fpr95_ood_positive": 0,
        "n_id": 2, "n_ood": 2,
    }  # fmt: skip
    for rule in ("nearest", "at_least"):
        equal = ood_metrics(torch.full((30,), 0.7), torch.full((20,), 0.7), rule=rule)
        assert (equal["auroc"], equal["fpr95"], equal["fpr95_ood_positive"]) == (0.5, 1, 1)
        assert equal["aupr_in"] == pytest.approx(0.6, 1e-12)
        assert equal["aupr_out"] == pytest.approx(0.4, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_is_compared_as_given(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    inside = (torch.randn(200, generator=generator) + 1).to(dtype)
    outside = torch.randn(100, generator=generator).to(dtype)
    expected = pairwise_auroc(inside.double().tolist(), outside.double().tolist())
    assert auroc(inside, outside) == expected


def test_scores_outside_the_unit_interval_keep_their_order() -> None:
    inside, outside = torch.tensor([100.0, 101.0, 1e30]), torch.tensor([99.0, 98.0, -1e30])
    assert auroc(inside, outside) == 1.0  # a sigmoid in float32 would tie five of the six
    assert auroc(torch.tensor([math.inf, 0.0]), torch.tensor([-math.inf, 0.0])) == 0.875
    assert fpr_at_recall(torch.tensor([-math.inf]), torch.tensor([-math.inf, -3.0])) == 1.0
    close = torch.tensor([1.0], dtype=torch.float64)
    assert auroc(close + 1e-15, close) == 1.0


def test_dtypes_can_differ_between_the_sides() -> None:
    fine = torch.tensor([1.0 + 1e-12], dtype=torch.float64)
    assert auroc(fine, torch.tensor([1.0], dtype=torch.bfloat16)) == 1.0
    assert auroc(np.array([2.0], dtype=np.float16), torch.tensor([1.0])) == 1.0


def test_strictly_increasing_maps_change_nothing() -> None:
    generator = torch.Generator().manual_seed(2)
    inside = torch.randn(64, generator=generator, dtype=torch.float64) + 1
    outside = torch.randn(64, generator=generator, dtype=torch.float64)
    assert ood_metrics(inside, outside) == ood_metrics(inside.exp(), outside.exp())


def test_inputs_are_left_alone() -> None:
    inside = torch.tensor([1.0, 3.0, 2.0], requires_grad=True)
    mapped = np.array([2.0, 0.0])
    mapped.flags.writeable = False
    assert auroc(inside, mapped) == pytest.approx(4.5 / 6)
    assert inside.tolist() == [1.0, 3.0, 2.0]


def test_large_inputs_count_without_overflow() -> None:
    scores = torch.linspace(0, 1, 300_000, dtype=torch.float64)
    values = ood_metrics(scores + 2, scores)
    assert values["auroc"] == 1.0
    assert ood_metrics(scores, scores)["auroc"] == 0.5


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("inside", "outside", "message"),
    [
        (torch.ones(0), torch.ones(2), "there are no ID scores"),
        (torch.ones(2), torch.ones(0), "there are no OOD scores"),
        (torch.ones(2, 2), torch.ones(2), r"ID scores have shape \[2, 2\]"),
        (torch.ones(2), torch.ones(2, dtype=torch.long), "OOD scores .* torch.int64"),
        (torch.tensor([0.0, math.nan]), torch.ones(1), "1 of 2 ID scores are NaN.*index 1"),
        (torch.ones(1), torch.tensor([math.nan]), "OOD scores are NaN"),
    ],
)
def test_bad_scores_are_refused(inside: torch.Tensor, outside: torch.Tensor, message: str) -> None:
    for function in (auroc, aupr_in, aupr_out, fpr_at_recall, ood_metrics):
        with pytest.raises(InputError, match=message):
            function(inside, outside)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recall": 0.0}, r"recall=0.0; it has to lie in \(0, 1\]"),
        ({"recall": 1.1}, "recall=1.1"),
        ({"recall": math.nan}, "recall=nan"),
        ({"positive": "in"}, "positive='in' is not known"),
        ({"rule": "first"}, "rule='first' is not known"),
    ],
)
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fpr_at_recall(torch.ones(1), torch.ones(1), **settings)


@pytest.mark.usefixtures("without_shape_checks")
def test_metric_refuses_bad_batches() -> None:
    from shared_core.metrics import OODMetrics

    with pytest.raises(InputError, match="rule='best'"):
        OODMetrics(rule="best")
    with pytest.raises(InputError, match="rule='best'"):
        ood_metrics(torch.ones(1), torch.ones(1), rule="best")
    metric = OODMetrics()
    with pytest.raises(InputError, match=r"is_ood has shape \[1\]"):
        metric.update(torch.ones(2), torch.ones(1, dtype=torch.bool))
    with pytest.raises(InputError, match="and dtype"):
        metric.update(torch.ones(2), torch.ones(2, dtype=torch.long))
    metric.reset()
    metric.update(torch.ones(2), torch.zeros(2, dtype=torch.bool))
    with pytest.raises(InputError, match="there are no OOD scores"):
        metric.compute()


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric OODMetrics:UserWarning")
def test_metric_without_batches_is_refused() -> None:
    from shared_core.metrics import OODMetrics

    with pytest.raises(InputError, match="there are no ID scores"):
        OODMetrics().compute()


def stream(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    is_ood = torch.rand(101, generator=generator) < 0.4
    scores = torch.randn(101, generator=generator) - is_ood.float()
    return scores.mul(4).round().div(4).to(dtype), is_ood


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_metric_over_batches_equals_the_function(dtype: torch.dtype) -> None:
    from shared_core.metrics import OODMetrics

    scores, is_ood = stream(dtype)
    metric = OODMetrics(rule="nearest")
    for piece in torch.arange(101).split(20):
        metric.update(scores[piece], is_ood[piece])
    expected = ood_metrics(scores[~is_ood], scores[is_ood], rule="nearest")
    assert {key: value.item() for key, value in metric.compute().items()} == expected
    metric.reset()
    metric.update(torch.tensor([1.0, 0.0]), torch.tensor([False, True]))
    assert metric.compute()["n_id"] == 1

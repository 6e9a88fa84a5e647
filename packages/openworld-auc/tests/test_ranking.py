"""The area and its curve against the double sum, scikit-learn, and what must not matter."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from openworld_auc import openworld_auc, openworld_auc_score, openworld_curve
from openworld_auc._checks import check_samples
from openworld_auc.ranking import placements
from shared_core.testing import examples


@pytest.mark.smoke
@pytest.mark.parametrize("levels", [None, 2, 5])
@pytest.mark.parametrize("soft", [False, True])
def test_the_area_is_the_double_sum(tools, levels, soft) -> None:
    for seed in range(60):
        case = tools.case(seed, levels=levels, soft=soft)
        for ties in ("half", "strict"):
            expected = tools.pairwise(*tools.split(*case), strict=ties == "strict")
            assert abs(float(openworld_auc(*case, ties=ties)) - expected) < 1e-12


def test_weights_are_those_of_the_double_sum(tools) -> None:
    for seed in range(40):
        scores, correct, is_base = tools.case(seed, levels=4)
        weight = torch.rand(len(scores), generator=torch.Generator().manual_seed(seed)).double()
        s, c, u, d = tools.split(scores, correct, is_base)
        a, b = weight[is_base], weight[~is_base]
        kernel = (s[:, None] > u).double() + 0.5 * (s[:, None] == u)
        expected = float(((a * c)[:, None] * (b * d) * kernel).sum() / (a.sum() * b.sum()))
        found = float(openworld_auc(scores, correct, is_base, sample_weight=weight))
        assert abs(found - expected) < 1e-12
        ones = openworld_auc(scores, correct, is_base, sample_weight=torch.ones_like(weight))
        assert abs(float(ones) - float(openworld_auc(scores, correct, is_base))) < 1e-12


@pytest.mark.smoke
def test_limiting_cases() -> None:
    is_base = torch.tensor([True] * 4 + [False] * 5)
    correct = torch.tensor([True, True, True, False, True, False, True, True, False])
    base, new = 3 / 4, 3 / 5
    high_first = torch.arange(9.0, 0.0, -1)
    assert float(openworld_auc(high_first, correct, is_base)) == pytest.approx(base * new)
    assert float(openworld_auc(-high_first, correct, is_base)) == 0
    assert float(openworld_auc(torch.ones(9), correct, is_base)) == pytest.approx(base * new / 2)
    # All wrong and inverted: the published code says 1 here.
    assert float(openworld_auc(-high_first, torch.zeros(9, dtype=torch.bool), is_base)) == 0
    single = openworld_auc(torch.tensor([1.0, 0.0]), torch.ones(2).bool(), torch.tensor([1, 0]))
    assert float(single) == 1


def test_infinite_scores_are_ordered() -> None:
    scores = torch.tensor([torch.inf, 0.0, -torch.inf, 0.0])
    is_base = torch.tensor([True, True, False, False])
    assert float(openworld_auc(scores, torch.ones(4).bool(), is_base)) == 3.5 / 4


def test_it_is_an_auroc_when_everything_is_right(tools) -> None:
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    for seed in range(30):
        scores, correct, is_base = tools.case(seed, levels=6 if seed % 2 else None)
        found = float(openworld_auc(scores, torch.ones_like(correct), is_base))
        assert abs(found - sklearn_metrics.roc_auc_score(is_base, scores)) < 1e-12
        s, c, u, d = tools.split(scores, correct, is_base)
        if c.any() and d.any():
            right = torch.cat([c, d])
            labels = torch.cat([torch.ones(len(s)), torch.zeros(len(u))])[right]
            among = sklearn_metrics.roc_auc_score(labels, torch.cat([s, u])[right])
            expected = float(c.double().mean() * d.double().mean()) * among
            assert abs(float(openworld_auc(scores, correct, is_base)) - expected) < 1e-12


def test_only_the_order_of_scores_matters(tools) -> None:
    for seed in range(20):
        scores, correct, is_base = tools.case(seed, levels=9)
        value = openworld_auc(scores, correct, is_base)
        for moved in (3 * scores - 7, scores.exp(), scores**3):
            assert openworld_auc(moved, correct, is_base) == value
    # Logits near 100 in float32, where a sigmoid would make everything 1.
    logits = torch.tensor([100.0, 99.0, 98.0, 97.0])
    assert openworld_auc(logits, torch.ones(4).bool(), torch.tensor([1, 1, 0, 0])) == 1


def test_the_mirrored_problem_is_the_same(tools) -> None:
    for seed in range(20):
        scores, correct, is_base = tools.case(seed, levels=5)
        mirrored = openworld_auc(-scores, correct, ~is_base)
        assert abs(float(mirrored - openworld_auc(scores, correct, is_base))) < 1e-15


def test_the_ratio_of_domains_does_not_matter(tools) -> None:
    for seed in range(20):
        case = tools.case(seed, levels=5)
        times = torch.where(case[2], 3, 7)
        repeated = [part.repeat_interleave(times) for part in case]
        assert abs(float(openworld_auc(*repeated)) - float(openworld_auc(*case))) < 1e-15


@examples(60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), levels=st.sampled_from([None, 2, 4]))
def test_the_curve_has_the_area(tools, seed, levels) -> None:
    case = tools.case(seed, levels=levels)
    x, y, t = openworld_curve(*case)
    scores, correct, is_base = case
    assert abs(float(torch.trapezoid(y, x) - openworld_auc(*case))) < 1e-12
    assert bool((x.diff() >= -1e-15).all())
    assert bool((y.diff() >= -1e-15).all())
    assert len(t) == len(scores.unique()) + 1
    base, new = correct[is_base].double().mean(), correct[~is_base].double().mean()
    assert (float(x[0]), float(y[0])) == (float(1 - base), 0.0)
    assert (float(x[-1]), float(y[-1])) == pytest.approx((1, float(new)))
    some = len(t) // 2
    missed = 1 - (correct & (scores > t[some]))[is_base].double().mean()
    assert x[some] == pytest.approx(float(missed))


def test_placements_average_to_the_area(tools) -> None:
    for seed in range(20):
        case = tools.case(seed, levels=4, soft=seed % 2 == 0)
        base, new = placements(check_samples(*case))
        value = float(openworld_auc(*case))
        assert float(base.mean()) == pytest.approx(value, abs=1e-12)
        assert float(new.mean()) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.filterwarnings("default:.* correct pairs tie in half precision")
def test_half_precision_is_compared_as_given(tools, dtype) -> None:
    scores, correct, is_base = tools.case(3, dtype=dtype)
    assert openworld_auc(scores, correct, is_base) == openworld_auc(
        scores.double(), correct, is_base
    )


def test_ties_of_half_precision_are_told() -> None:
    scores = torch.full((40,), 0.999).half()
    is_base = torch.arange(40) < 20
    with pytest.warns(UserWarning, match="tie in half precision"):
        openworld_auc(scores, torch.ones(40).bool(), is_base)


def test_a_million_samples_are_counted_in_integers() -> None:
    n = 500_000
    scores = torch.arange(2 * n, dtype=torch.float64)
    is_base = torch.arange(2 * n) % 2 == 1
    value = openworld_auc(scores, torch.ones(2 * n, dtype=torch.bool), is_base)
    assert float(value) == (n + 1) / (2 * n)


def test_a_million_samples_agree_with_every_pair() -> None:
    g = torch.Generator().manual_seed(0)
    is_base = torch.arange(1_000_000) < 600
    scores = torch.randn(1_000_000, generator=g) + is_base
    correct = torch.rand(1_000_000, generator=g) < 0.7
    correct[:2] = True
    scores[:2] = scores[-2:]  # some ties
    s, u = scores[is_base & correct], scores[~is_base & correct]
    wins = sum(int((one > u).sum()) for one in s)
    ties = sum(int((one == u).sum()) for one in s)
    assert ties > 0
    expected = (wins + ties / 2) / (600 * 999_400)
    assert abs(float(openworld_auc(scores, correct, is_base)) - expected) < 1e-12


def test_half_a_million_on_each_side_agree_with_every_pair_of_levels() -> None:
    # With 2,000 different scores the double sum is over pairs of scores, counted in integers.
    g = torch.Generator().manual_seed(1)
    is_base = torch.arange(1_000_000) % 2 == 0
    level = torch.randint(2000, (1_000_000,), generator=g)
    correct = torch.rand(1_000_000, generator=g) < 0.7
    h_b, h_n = (
        torch.bincount(level[side & correct], minlength=2000).tolist()
        for side in (is_base, ~is_base)
    )
    twice = sum(h_b[i] * (2 * sum(h_n[:i]) + h_n[i]) for i in range(2000))
    expected = twice / 2 / 500_000**2
    found = openworld_auc(level.double() / 7, correct, is_base)
    assert abs(float(found) - expected) < 1e-12


def test_lists_and_arrays() -> None:
    lists = openworld_auc_score([0.9, 0.8, 0.3], [1, 0, 1], [0.6, 0.1], [True, True])
    arrays = openworld_auc_score(
        np.array([0.9, 0.8, 0.3]), np.array([1, 0, 1]), np.array([0.6, 0.1]), np.array([1, 1])
    )
    assert lists == arrays == 0.5
    with pytest.raises(ValueError, match="base_score has shape"):
        openworld_auc_score([0.9], [True, False], [0.1], [True])


OK = torch.tensor([0.9, 0.1]), torch.tensor([True, True]), torch.tensor([True, False])


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.tensor([0.9, torch.nan]), "1 of 2 scores are NaN, the first at index 1"),
        (0, torch.ones(2, 2), r"scores has shape \[2, 2\]"),
        (0, torch.tensor([1, 2]), "accepted: one floating-point score"),
        (1, torch.tensor([True]), r"correct has shape \[1\], but there are 2 scores"),
        (1, torch.tensor([0.5, 1.5]), "correct holds 1.5"),
        (1, torch.tensor([0.5, torch.nan]), "correct holds nan"),
        (2, torch.tensor([True]), r"is_base has shape \[1\]"),
        (2, torch.tensor([0, 2]), "is_base holds values other than 0 and 1"),
        (2, torch.tensor([True, True]), "there are no new samples"),
        (2, torch.tensor([False, False]), "there are no base samples"),
    ],
)
def test_bad_input(place, value, message) -> None:
    given = list(OK)
    given[place] = value
    with pytest.raises(ValueError, match=message):
        openworld_auc(*given)


@pytest.mark.usefixtures("without_type_checks")
def test_bad_options() -> None:
    with pytest.raises(ValueError, match="ties is 'win'"):
        openworld_auc(*OK, ties="win")
    for weight, message in (
        (torch.tensor([1.0, -1.0]), "negative"),
        (torch.tensor([1.0, 0.0]), "all weights of new samples are 0"),
        (torch.tensor([1.0]), "sample_weight has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            openworld_auc(*OK, sample_weight=weight)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_is_the_same(tools) -> None:
    for seed in range(10):
        case = tools.case(seed, levels=5)
        on_gpu = openworld_auc(*(part.cuda() for part in case))
        assert on_gpu.device.type == "cuda"
        assert float(on_gpu) == float(openworld_auc(*case))

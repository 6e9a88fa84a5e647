"""Intervals and comparisons: DeLong's special case, coverage, and what they must refuse."""

import math

import pytest
import torch

from openworld_auc import compare_openworld_auc, openworld_auc_ci


def draw(seed, n_b=150, n_n=200, shift=1.0, p=0.7):
    g = torch.Generator().manual_seed(seed)
    is_base = torch.arange(n_b + n_n) < n_b
    scores = torch.randn(n_b + n_n, generator=g).double() + shift * is_base
    return scores, torch.rand(n_b + n_n, generator=g) < p, is_base


def test_with_everything_right_the_variance_is_delongs(tools) -> None:
    scores, correct, is_base = draw(0)
    s, u = scores[is_base], scores[~is_base]
    kernel = (s[:, None] > u).double() + 0.5 * (s[:, None] == u)
    variance = kernel.mean(1).var() / len(s) + kernel.mean(0).var() / len(u)
    found = openworld_auc_ci(scores, torch.ones_like(correct), is_base)
    assert found.se == pytest.approx(float(variance.sqrt()), rel=1e-12)


@pytest.mark.smoke
def test_coverage() -> None:
    # P(s > u) with a shift of 1 between unit normals, times both accuracies.
    truth = 0.7**2 * 0.5 * (1 + math.erf(1 / 2))
    inside = 0
    for seed in range(600):
        interval = openworld_auc_ci(*draw(seed))
        inside += interval.low <= truth <= interval.high
    assert 0.92 <= inside / 600 <= 0.97


def test_bootstrap_agrees_with_placements_and_with_itself() -> None:
    case = draw(1, 400, 500)
    placed = openworld_auc_ci(*case)
    drawn = openworld_auc_ci(*case, method="bootstrap", n_boot=600)
    assert drawn == openworld_auc_ci(*case, method="bootstrap", n_boot=600)
    assert drawn.value == pytest.approx(placed.value)
    assert drawn.se == pytest.approx(placed.se, rel=0.1)
    assert drawn.low == pytest.approx(placed.low, abs=0.3 * placed.se)
    plain = openworld_auc_ci(*case, scale="plain")
    assert plain.high - plain.value == pytest.approx(1.959964 * placed.se, rel=1e-6)


def test_the_bootstrap_draws_each_domain_apart() -> None:
    # All samples of a domain are alike: only a draw without one domain could give another value.
    scores, is_base = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0]), torch.tensor([1, 1, 0, 0, 0]).bool()
    found = openworld_auc_ci(scores, torch.ones(5).bool(), is_base, method="bootstrap", n_boot=200)
    assert (found.low, found.high, found.se) == (0.5, 0.5, 0)


def test_whole_classes_vary_more_than_samples() -> None:
    # Classes differ in accuracy, so that which classes there are matters.
    g = torch.Generator().manual_seed(0)
    classes = torch.arange(400) // 20
    accuracy = (torch.rand(20, generator=g) > 0.5).double()[classes]
    scores, _, is_base = draw(2, 200, 200)
    correct = torch.rand(400, generator=g).double() < accuracy
    plain = openworld_auc_ci(scores, correct, is_base, method="bootstrap", n_boot=300)
    whole = openworld_auc_ci(
        scores, correct, is_base, method="bootstrap", n_boot=300, cluster=classes
    )
    assert whole.se > 2 * plain.se


def test_degenerate_values_fall_back() -> None:
    scores, is_base = torch.tensor([3.0, 2.0, 1.0, 0.0]), torch.tensor([1, 1, 0, 0]).bool()
    with pytest.warns(UserWarning, match="the value is 1, so placements"):
        found = openworld_auc_ci(scores, torch.ones(4).bool(), is_base)
    assert (found.low, found.high) == (1, 1)


def test_a_difference_is_found_and_chance_is_not() -> None:
    false_alarms = found = 0
    for seed in range(300):
        scores, correct, is_base = draw(seed)
        g = torch.Generator().manual_seed(10_000 + seed)
        noise = torch.randn(2, len(scores), generator=g).double()
        a, b = (scores + n for n in noise)
        false_alarms += (
            compare_openworld_auc((a, correct, is_base), (b, correct, is_base)).p_value < 0.05
        )
        worse = correct & (torch.rand(len(scores), generator=g) < 0.85)
        result = compare_openworld_auc((a, correct, is_base), (a, worse, is_base))
        found += result.p_value < 0.05
        assert result.low <= result.difference <= result.high
    assert 0.02 <= false_alarms / 300 <= 0.085
    assert found > 285


def test_pairing_sharpens_and_the_order_is_antisymmetric() -> None:
    scores, correct, is_base = draw(5)
    a = (scores, correct, is_base)
    b = (scores + 0.1 * torch.randn(len(scores), dtype=torch.float64), correct, is_base)
    paired, apart = compare_openworld_auc(a, b), compare_openworld_auc(a, b, paired=False)
    assert paired.se < apart.se / 2
    assert compare_openworld_auc(b, a).z == pytest.approx(-paired.z)
    same = compare_openworld_auc(a, a)
    assert (same.difference, same.z, same.p_value) == (0, 0, 1)


@pytest.mark.usefixtures("without_type_checks")
def test_bad_input() -> None:
    case = draw(0)
    for options, message in (
        ({"method": "exact"}, "method is 'exact'"),
        ({"level": 95}, "level is 95"),
        ({"scale": "log"}, "scale is 'log'"),
        ({"cluster": torch.zeros(350).long()}, "cluster needs method='bootstrap'"),
        ({"method": "bootstrap", "n_boot": 1}, "n_boot is 1"),
        ({"method": "bootstrap", "cluster": torch.zeros(3).long()}, r"cluster has shape \[3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            openworld_auc_ci(*case, **options)
    other = case[0], case[1], ~case[2]
    with pytest.raises(ValueError, match="pass paired=False"):
        compare_openworld_auc(case, other)
    one = tuple(part[149:] for part in case)
    with pytest.raises(ValueError, match="one sample only"):
        compare_openworld_auc(one, one)

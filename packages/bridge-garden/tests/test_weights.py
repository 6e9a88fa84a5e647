"""Each weight against its formula, its range and its limits."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from abkd import TokenStatistics
from bridge_garden.weights import (
    Confidence,
    Curriculum,
    Entropy,
    Product,
    Reversed,
    Static,
    StepInfo,
    WeightedSoftLabels,
    checked_weight,
    weight_from_string,
)
from shared_core.errors import InputError
from shared_core.testing import examples

NOW = StepInfo()


def seen(p: object, q: object = None, labels: object = None) -> TokenStatistics:
    p = torch.as_tensor(p, dtype=torch.float64)
    q = p if q is None else torch.as_tensor(q, dtype=torch.float64)
    label = None if labels is None else torch.as_tensor(labels)
    return TokenStatistics(torch.arange(len(p)), label, q.log(), p.log())


@pytest.mark.smoke
def test_each_formula_in_numpy() -> None:
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.full(7, 0.4), 5), rng.dirichlet(np.ones(7), 5)
    y = np.array([0, 3, 6, 2, 2])
    at = np.arange(5)
    s = seen(p, q, y)
    expected = {
        "confidence": 1 - p.max(1),
        "confidence:label": 1 - p[at, y],
        "entropy": -(p * np.log(p)).sum(1) / math.log(7),
        "entropy:power": ((p**0.1).sum(1) - 1) / (7**0.9 - 1),
        "wsl": 1 - np.exp(-np.log(q[at, y]) / np.log(p[at, y])),
        "static:0.3": np.full(5, 0.3),
        "soft": np.ones(5),
        "hard": np.zeros(5),
        "reversed-entropy": 1 + (p * np.log(p)).sum(1) / math.log(7),
        "static:0.5*confidence": 0.5 * (1 - p.max(1)),
    }
    for name, values in expected.items():
        found = weight_from_string(name)(s, NOW)
        np.testing.assert_allclose(found.numpy(), values, rtol=1e-12, atol=1e-14, err_msg=name)


@given(st.lists(st.floats(0.0, 40.0), min_size=2, max_size=9))
@examples(40)
def test_ranges(logits: list[float]) -> None:
    p = torch.softmax(torch.tensor([logits], dtype=torch.float64), -1)
    s, V = seen(p), len(logits)
    assert 0 <= Confidence()(s, NOW) <= 1 - 1 / V + 1e-12
    for weight in (Entropy(), Entropy("power")):
        assert 0 <= weight(s, NOW) <= 1


def test_limits() -> None:
    s = seen([[1.0, 0.0, 0.0, 0.0], [0.25] * 4])
    assert Confidence()(s, NOW).tolist() == [0.0, 0.75]
    for kind in ("shannon", "power"):
        np.testing.assert_allclose(Entropy(kind)(s, NOW), [0.0, 1.0], atol=1e-12)
    assert Entropy()(seen([[1.0]]), NOW).tolist() == [0.0]
    assert WeightedSoftLabels()(seen([[1.0, 0.0]], labels=[0]), NOW).tolist() == [0.0]


def test_smoothness_grows_with_flattening() -> None:
    base = torch.tensor([3.0, 1.0, 0.0, -2.0], dtype=torch.float64)
    p = torch.softmax(base / torch.tensor([[0.3], [1.0], [3.0], [10.0]], dtype=torch.float64), -1)
    for weight in (Entropy(), Entropy("power"), Confidence()):
        found = weight(seen(p), NOW)
        assert (found[1:] > found[:-1]).all()


def test_curriculum() -> None:
    s = seen([[0.5, 0.5]])
    values = [Curriculum(0.4, 0.2)(s, StepInfo(t, 100)).item() for t in (0, 5, 10, 20, 99)]
    assert values == pytest.approx([0, 0.1, 0.2, 0.4, 0.4])
    assert Curriculum(0.4, 0.0)(s, StepInfo(0, 100)).item() == pytest.approx(0.4)
    with pytest.raises(InputError, match="number of steps"):
        Curriculum()(s, StepInfo(3))


def test_a_user_weight_is_checked() -> None:
    s = seen([[0.9, 0.1], [0.5, 0.5]])
    assert checked_weight(lambda seen, at: seen.teacher_max_prob, s, NOW).tolist() == [0.9, 0.5]
    for bad in (1.5, -0.1, math.nan):
        with pytest.raises(InputError, match=r"outside \[0, 1\] or NaN for 2 of 2"):
            checked_weight(lambda seen, at, b=bad: torch.full((2,), b), s, NOW)
    with pytest.raises(InputError, match=r"must be \[2\]"):
        checked_weight(lambda seen, at: torch.zeros(1), s, NOW)
    with pytest.raises(InputError, match="NaN"):
        Reversed(lambda seen, at: torch.full((2,), math.nan))(s, NOW)
    with pytest.raises(InputError, match="NaN"):
        Product(Static(1.0), lambda seen, at: torch.full((2,), math.nan))(s, NOW)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    "make",
    [
        lambda: Static(1.2),
        lambda: Static(math.nan),
        lambda: Confidence("mean"),
        lambda: Entropy("tsallis"),
        lambda: Entropy("power", gamma=1.0),
        lambda: Curriculum(-0.1),
        lambda: Curriculum(0.5, 2.0),
        lambda: weight_from_string("confident"),
        lambda: weight_from_string("static:half"),
        lambda: weight_from_string("soft:1"),
    ],
)
def test_impossible_settings(make: object) -> None:
    with pytest.raises(InputError, match=r"accepted|is not a number"):
        make()

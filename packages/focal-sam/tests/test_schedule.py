import math
from fractions import Fraction

import pytest
import torch

from focal_sam.methods import SAM
from focal_sam.schedule import LinearRho, RhoScheduler, StepRho
from shared_core.errors import InputError


class Recorder:
    """What a schedule needs of a method."""

    def __init__(self) -> None:
        self.rho = math.nan

    def set_rho(self, rho: float) -> None:
        self.rho = rho


def radii(scheduler: RhoScheduler, epochs: int) -> list[float]:
    """ρ in force in every epoch of a training loop."""
    seen = []
    for _ in range(epochs):
        seen.append(scheduler.method.rho)
        assert scheduler.rho == scheduler.method.rho
        scheduler.step()
    return seen


def test_constant() -> None:
    assert radii(RhoScheduler(Recorder(), 0.2), 4) == [0.2] * 4


def test_any_function_of_the_epoch() -> None:
    assert radii(RhoScheduler(Recorder(), lambda epoch: 2.0**-epoch), 4) == [1, 0.5, 0.25, 0.125]


@pytest.mark.smoke
@pytest.mark.parametrize("epochs", [1, 2, 4, 5, 13, 20, 90, 100, 200])
def test_step_is_the_rule_of_the_authors_code(epochs: int) -> None:
    expected = [0.2 if epoch + 1 >= 0.8 * epochs else 0.1 for epoch in range(epochs)]
    assert radii(StepRho(Recorder(), epochs), epochs) == expected


def test_step_changes_at_the_exact_fraction() -> None:
    for percent in range(101):
        for epochs in (1, 7, 100, 300):
            scheduler = StepRho(Recorder(), epochs, first=1.0, second=2.0, fraction=percent / 100)
            begin = Fraction(percent, 100) * epochs
            expected = [2.0 if epoch + 1 >= begin else 1.0 for epoch in range(epochs)]
            assert radii(scheduler, epochs) == expected


@pytest.mark.parametrize(("start", "end"), [(0.05, 0.3), (0.7, 0.1), (0.0, 0.7), (0.2, 0.2)])
def test_linear(start: float, end: float) -> None:
    seen = radii(LinearRho(Recorder(), 11, start, end), 14)
    exact = [Fraction(start) + (Fraction(end) - Fraction(start)) * i / 10 for i in range(11)]
    assert seen[:11] == pytest.approx([float(r) for r in exact], rel=1e-15, abs=1e-15)
    assert seen[0] == start
    assert seen[10:] == [end] * 4


def test_linear_over_a_single_epoch() -> None:
    assert radii(LinearRho(Recorder(), 1, 0.1, 0.3), 2) == [0.1, 0.3]


@pytest.mark.parametrize("stop", [0, 1, 7, 12])
def test_resuming_goes_on_as_if_nothing_had_happened(stop: int) -> None:
    builders = [
        lambda: StepRho(Recorder(), 10),
        lambda: LinearRho(Recorder(), 10, 0.1, 0.4),
        lambda: RhoScheduler(Recorder(), lambda epoch: 1 / (1 + epoch)),
    ]
    for build in builders:
        whole = radii(build(), 15)
        first = build()
        radii(first, stop)
        second = build()
        second.load_state_dict(first.state_dict())
        assert second.last_epoch == stop
        assert radii(second, 15 - stop) == whole[stop:]


@pytest.mark.smoke
def test_every_group_of_a_method_gets_the_same_radius() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    sam = SAM(model, rho=0.5, params=[{"params": model[1].parameters(), "rho": 0.9}])
    scheduler = RhoScheduler(sam, lambda epoch: 0.1 + 0.1 * epoch)
    assert len(sam.groups) == 2
    assert [group.rho for group in sam.groups] == [0.1, 0.1]
    scheduler.step()
    assert [group.rho for group in sam.groups] == [0.2, 0.2]


@pytest.mark.parametrize("rho", [-0.1, math.nan, math.inf])
def test_a_radius_that_is_none(rho: float) -> None:
    with pytest.raises(InputError, match=f"rho of epoch 0 is {rho}; it must be finite"):
        RhoScheduler(Recorder(), rho)
    for arguments in ({"first": rho}, {"second": rho}):
        with pytest.raises(InputError, match=f"{next(iter(arguments))} is {rho}"):
            StepRho(Recorder(), 10, **arguments)
    for arguments in ({"start": rho, "end": 0.1}, {"start": 0.1, "end": rho}):
        with pytest.raises(InputError, match=f"is {rho}"):
            LinearRho(Recorder(), 10, **arguments)


def test_a_radius_that_goes_wrong_later_leaves_the_last_one_in_force() -> None:
    scheduler = RhoScheduler(Recorder(), lambda epoch: 0.1 - 0.1 * epoch)
    scheduler.step()
    with pytest.raises(InputError, match=r"rho of epoch 2 is -0\.1"):
        scheduler.step()
    assert scheduler.last_epoch == 1
    assert scheduler.method.rho == scheduler.rho == 0.0


@pytest.mark.parametrize("epochs", [0, -5])
def test_too_few_epochs(epochs: int) -> None:
    with pytest.raises(InputError, match=f"epochs is {epochs}; it must be at least 1"):
        StepRho(Recorder(), epochs)
    with pytest.raises(InputError, match=f"epochs is {epochs}; it must be at least 1"):
        LinearRho(Recorder(), epochs, 0.1, 0.2)


@pytest.mark.parametrize("fraction", [-0.1, 1.2, math.nan])
def test_a_fraction_out_of_range(fraction: float) -> None:
    with pytest.raises(InputError, match=f"fraction is {fraction}; it must lie in"):
        StepRho(Recorder(), 10, fraction=fraction)


@pytest.mark.parametrize("state", [{}, {"last_epoch": -1}, {"last_epoch": "3"}])
def test_a_state_of_something_else(state: dict) -> None:
    with pytest.raises(InputError, match="the state has last_epoch"):
        StepRho(Recorder(), 10).load_state_dict(state)

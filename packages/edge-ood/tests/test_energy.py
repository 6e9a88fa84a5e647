"""JointEnergy against its definition in exact arithmetic, and at extreme logits."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edge_ood import joint_energy, label_energies
from shared_core.errors import InputError

logits = st.lists(st.floats(-60, 60), min_size=1, max_size=8)


@pytest.mark.smoke
@given(logits)
def test_it_is_a_sum_of_logarithms(values):
    expected = math.fsum(math.log1p(math.exp(v)) for v in values)
    found = joint_energy(torch.tensor([values], dtype=torch.float64))
    assert found.item() == pytest.approx(expected, rel=1e-12)


@given(logits)
def test_bounds_monotonicity_and_additivity(values):
    z = torch.tensor([values], dtype=torch.float64)
    energy = joint_energy(z).item()
    assert energy >= max(0.0, max(values)) - 1e-12
    assert energy <= len(values) * math.log(2) + sum(max(v, 0) for v in values) + 1e-9
    assert joint_energy(torch.cat([z, z + 1], dim=1)).item() == pytest.approx(
        energy + joint_energy(z + 1).item()
    )
    raised = z.clone()
    raised[0, 0] += 1
    assert joint_energy(raised) >= joint_energy(z)
    assert values[0] < -30 or joint_energy(raised) > joint_energy(z)


@pytest.mark.parametrize(
    ("dtype", "extreme"),
    [(torch.float32, 1e4), (torch.float16, 6e4), (torch.bfloat16, 1e4), (torch.float64, 1e4)],
)
def test_extreme_logits(dtype, extreme):
    z = torch.full((2, 80), extreme, dtype=dtype)
    z[1] *= -1
    z.requires_grad_()
    energy = joint_energy(z)
    assert energy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert energy[0] == 80 * z[0, 0].detach().to(energy.dtype)
    energy.sum().backward()
    assert z.grad.isfinite().all()


def test_confident_outliers_do_not_tie():
    z = torch.linspace(-60, -18, 200)[:, None]
    energy = joint_energy(z)
    assert (energy > 0).all()
    assert (energy.diff() > 0).all()
    # The formula as it is usually written is 0 there.
    assert (torch.log(1 + torch.exp(z)) == 0).all()


def test_dimension_and_errors():
    z = torch.randn(3, 4, 5)
    assert torch.equal(joint_energy(z, dim=1), joint_energy(z.transpose(1, 2)))
    assert label_energies(z).shape == z.shape
    for bad in (torch.zeros(()), torch.zeros(2, 0)):
        with pytest.raises(InputError, match="at least one label"):
            joint_energy(bad)

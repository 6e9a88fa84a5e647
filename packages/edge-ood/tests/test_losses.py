"""The comparison losses against plain restatements, and against timm's ASL."""

import math

import pytest
import torch
from torch import nn

from edge_ood.losses import (
    AsymmetricLoss,
    DistributionBalancedLoss,
    FocalMultiLabelLoss,
    MultiLabelEnergyBoundLoss,
    MultiLabelOELoss,
)
from shared_core.errors import InputError


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(6, 4, generator=g, dtype=torch.float64) * 3
    y = (torch.rand(6, 4, generator=g) < 0.4).double()
    return z, y, torch.randn(5, 4, generator=g, dtype=torch.float64)


def sigmoid(v):
    return 1 / (1 + math.exp(-v))


def each(z, y, function):
    return [function(a, b) for a, b in zip(z.flatten().tolist(), y.flatten().tolist(), strict=True)]


def test_focal(batch):
    z, y, _ = batch

    def one(v, t):
        p = sigmoid(v) if t else 1 - sigmoid(v)
        return -((1 - p) ** 3) * math.log(p)

    values = each(z, y, one)
    assert FocalMultiLabelLoss(3.0, "sum")(z, y).item() == pytest.approx(math.fsum(values))
    assert FocalMultiLabelLoss(3.0)(z, y).item() == pytest.approx(math.fsum(values) / 24)
    assert FocalMultiLabelLoss(0.0)(z, y) == pytest.approx(nn.BCEWithLogitsLoss()(z, y).item())


@pytest.mark.smoke
def test_asymmetric(batch):
    z, y, _ = batch

    def one(v, t):
        p, q = sigmoid(v), min(1, 1 - sigmoid(v) + 0.05)
        return -((1 - p) ** 1) * math.log(p) if t else -((1 - q) ** 4) * math.log(q)

    loss = AsymmetricLoss()
    assert loss(z, y).item() == pytest.approx(math.fsum(each(z, y, one)), rel=1e-6)
    assert AsymmetricLoss(reduction="none")(z, y).shape == (6, 4)


def test_asymmetric_equals_timm(batch):
    timm = pytest.importorskip("timm.loss")
    z, y, _ = batch
    theirs = timm.AsymmetricLossMultiLabel(gamma_neg=4, gamma_pos=1, clip=0.05)
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    ours = AsymmetricLoss()(a, y)
    other = theirs(b, y)  # a mean over samples in timm's newer versions
    factor = round((ours / other).item())
    assert factor in (1, len(z))
    torch.testing.assert_close(ours, factor * other.double(), rtol=1e-6, atol=0)
    assert torch.is_grad_enabled()


def test_asymmetric_sends_no_gradient_through_the_focus(batch):
    z, y, _ = batch
    z = z.requires_grad_()
    [found] = torch.autograd.grad(AsymmetricLoss(clip=0.0)(z, y), z)
    p = z.detach().sigmoid()
    expected = torch.where(y > 0, -((1 - p) ** 2), p**4 * p)
    torch.testing.assert_close(found, expected)


def test_distribution_balanced(batch):
    z, y, _ = batch
    y[0] = torch.tensor([1.0, 0.0, 1.0, 0.0])
    counts, n = [50, 20, 5, 2], 100
    found = DistributionBalancedLoss(counts, n, reduction="none")(z, y)
    for i in range(6):
        inverse = [1 / c for c in counts]
        total = sum(v for v, t in zip(inverse, y[i].tolist(), strict=True) if t) or sum(inverse)
        for c in range(4):
            v, t = z[i, c].item(), y[i, c].item()
            w = 0.1 + sigmoid(10 * (inverse[c] / total - 0.2))
            v += -math.log(n / counts[c] - 1) * 0.05 / 2
            if not t:
                v, w = 2 * v, w / 2
            p = sigmoid(v) if t else 1 - sigmoid(v)
            expected = 2 * (1 - p) ** 2 * w * -math.log(p)
            assert found[i, c].item() == pytest.approx(expected, rel=1e-5)


def test_outlier_losses(batch):
    z, y, oe = batch
    bce = nn.BCEWithLogitsLoss()(z, y).item()
    rows = oe.tolist()
    flat = [-sum(math.log(math.exp(v) / sum(map(math.exp, r))) for v in r) / 4 for r in rows]
    assert MultiLabelOELoss()(z, y, oe).item() == pytest.approx(bce + 0.5 * sum(flat) / 5)

    def energy(row):
        return -math.log(sum(map(math.exp, row)))

    inside = [max(0, energy(r) + 3) ** 2 for r in z.tolist()]
    outside = [max(0, -1 - energy(r)) ** 2 for r in rows]
    expected = bce + 0.1 * (sum(inside) / 6 + sum(outside) / 5)
    found = MultiLabelEnergyBoundLoss(m_in=-3.0, m_out=-1.0)(z, y, oe).item()
    assert found == pytest.approx(expected)
    assert sum(inside) > 0  # the published script's signs would make this term vanish


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_extreme_logits_stay_finite(dtype):
    z = (torch.tensor([[1.0, -1.0], [-1.0, 1.0]]) * 1e4).to(dtype).requires_grad_()
    y = torch.eye(2)
    for loss in (
        FocalMultiLabelLoss(),
        AsymmetricLoss(),
        DistributionBalancedLoss([3, 2], 10),
        lambda a, b: MultiLabelOELoss()(a, b, a),
        lambda a, b: MultiLabelEnergyBoundLoss()(a, b, a),
    ):
        value = loss(z, 1 - y)
        assert value.isfinite()
        assert torch.autograd.grad(value, z)[0].isfinite().all()


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FocalMultiLabelLoss(reduction="avg"), "reduction is 'avg'"),
        (lambda: FocalMultiLabelLoss(-1.0), "gamma is -1"),
        (lambda: AsymmetricLoss(clip=1.0), r"clip=1\.0"),
        (lambda: DistributionBalancedLoss([3, 0], 10), "one number from 1 up"),
        (lambda: DistributionBalancedLoss([3, 10], 10), "every sample"),
        (lambda: AsymmetricLoss()(torch.zeros(2, 2), torch.zeros(2).long()), "one_hot"),
    ],
)
def test_errors(make, message):
    with pytest.raises(InputError, match=message):
        make()

"""The EDGE loss against a plain restatement in float64, its gradient in closed form, its limits."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from edge_ood import EdgeLoss, EdgeSchedule, edge_loss, energy_gap, joint_energy
from edge_ood.loss import tail_size
from edge_ood.losses import AsymmetricLoss
from shared_core.errors import InputError
from shared_core.testing import examples


def sample(n, m, c, seed=0, dtype=torch.float64, scale=2.0):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, c, generator=g, dtype=torch.float64) * scale
    y = (torch.rand(n, c, generator=g) < 0.3).double()
    oe = torch.randn(m, c, generator=g, dtype=torch.float64) * scale - 1
    return z.to(dtype), y.to(dtype), oe.to(dtype)


def restated(z, y, oe, alpha, beta, count, margin):
    """The published formulas with Python loops and numbers."""
    n, c = len(z), len(z[0])

    def sp(v):
        return max(v, 0.0) + math.log1p(math.exp(-abs(v)))

    bce = [y[i][j] * sp(-z[i][j]) + (1 - y[i][j]) * sp(z[i][j]) for i in range(n) for j in range(c)]
    inside = sorted(math.fsum(map(sp, row)) for row in z)[:count]
    outside = [math.fsum(map(sp, row)) for row in oe]
    conf = math.fsum(outside) / (len(oe) * c)
    hinge = math.fsum(max(0.0, e - t + margin) for e in outside for t in inside)
    return math.fsum(bce) / (n * c) + alpha * conf + beta * hinge / (len(oe) * count)


CASES = list(
    itertools.product(
        [(8, 6, 5), (3, 9, 1), (16, 1, 20)],
        [0.25, 2, 50],
        [(1.0, 0.1, 0.0), (0.3, 1.0, 2.0), (0.0, 0.7, -1.0)],
    )
)


@pytest.mark.smoke
@pytest.mark.parametrize(("shape", "k", "weights"), CASES)
@pytest.mark.parametrize("implementation", ["pairwise", "sorted"])
def test_it_equals_the_restated_formulas(shape, k, weights, implementation):
    z, y, oe = sample(*shape)
    alpha, beta, margin = weights
    count = max(1, min(round(k * shape[0]) if isinstance(k, float) else k, shape[0]))
    expected = restated(z.tolist(), y.tolist(), oe.tolist(), alpha, beta, count, margin)
    options = {"alpha": alpha, "beta": beta, "k": k, "margin": margin}
    out = edge_loss(z, y, oe, **options, gap_impl=implementation)
    assert out.loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert out.n_tail == count
    assert out.loss.item() == pytest.approx(
        (out.l_id + alpha * out.l_conf + beta * out.l_gap).item()
    )
    single = edge_loss(z.float(), y.float(), oe.float(), **options, gap_impl=implementation)
    assert single.loss.item() == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("implementation", ["pairwise", "sorted"])
def test_the_gradient_in_closed_form(implementation):
    z, y, oe = sample(12, 9, 4, seed=3)
    n, m, c, k, alpha, beta, margin = 12, 9, 4, 5, 0.7, 0.9, 0.5
    z.requires_grad_()
    oe.requires_grad_()
    out = edge_loss(z, y, oe, alpha=alpha, beta=beta, k=k, margin=margin, gap_impl=implementation)
    out.loss.backward()
    with torch.no_grad():
        energy, outside = (torch.log1p(torch.exp(v)).sum(1) for v in (z, oe))
        tail = energy.argsort()[:k]
        active = outside[:, None] + margin > energy[tail]
        expected_oe = oe.sigmoid() * (
            alpha / (m * c) + beta * active.double().sum(1, True) / (m * k)
        )
        expected = (z.sigmoid() - y) / (n * c)
        expected[tail] -= beta * active.double().sum(0)[:, None] / (m * k) * z[tail].sigmoid()
    torch.testing.assert_close(z.grad, expected, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(oe.grad, expected_oe, rtol=1e-9, atol=1e-13)
    assert out.gap_active_frac.item() == pytest.approx(active.double().mean().item())


@pytest.mark.parametrize("implementation", ["pairwise", "sorted"])
@pytest.mark.parametrize("mask", ["all", "positives"])
def test_gradcheck(implementation, mask):
    z, y, oe = sample(6, 5, 3, seed=1)

    def value(a, b):
        options = {"gap_mask": mask, "gap_impl": implementation}
        return edge_loss(a, y, b, beta=1.0, k=0.5, margin=0.3, **options).loss

    leaves = z.requires_grad_(), oe.requires_grad_()
    assert torch.autograd.gradcheck(value, leaves)
    assert torch.autograd.gradgradcheck(value, leaves)


def by_formulas(monkeypatch, *arguments, **options):
    """The loss that autograd follows step by step."""
    with monkeypatch.context() as patch:
        patch.setattr("edge_ood.loss.can_use_closed_form", lambda *given: False)
        return edge_loss(*arguments, **options)


@pytest.mark.smoke
@pytest.mark.parametrize("implementation", ["pairwise", "sorted"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_the_closed_form_equals_the_formulas(implementation, dtype, monkeypatch):
    for shape, scale in (((9, 7, 5), 2), ((1, 1, 1), 2), ((16, 30, 80), 100)):
        z, y, oe = sample(*shape, dtype=dtype, scale=scale)
        leaves = z.requires_grad_(), oe.requires_grad_()
        options = {"beta": 0.8, "k": 0.4, "margin": 0.5, "gap_impl": implementation}
        found = edge_loss(z, y, oe, **options)
        expected = by_formulas(monkeypatch, z, y, oe, **options)
        assert type(found.loss.grad_fn) is not type(expected.loss.grad_fn)
        for value, other in zip(found, expected, strict=True):
            torch.testing.assert_close(value, other)
        assert not any(value.requires_grad for value in (*found[1:4], found[5]))
        # Twice, since the gradient is kept between the passes.
        for _ in range(2):
            gradients = torch.autograd.grad(3 * found.loss, leaves, retain_graph=True)
            others = torch.autograd.grad(3 * expected.loss, leaves, retain_graph=True)
            for gradient, other in zip(gradients, others, strict=True):
                assert gradient.dtype == dtype
                torch.testing.assert_close(gradient, other)
        # One leaf alone, and its second derivative.
        loss = edge_loss(z.detach(), y, oe, **options).loss
        [gradient] = torch.autograd.grad(loss, oe, create_graph=True)
        torch.testing.assert_close(gradient, others[1] / 3)
        assert gradient.requires_grad


@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")
def test_transforms_of_functions_see_the_formulas():
    z, y, oe = sample(9, 7, 5)
    expected = torch.autograd.grad(edge_loss(z.requires_grad_(), y, oe).loss, z)[0]
    found = torch.func.grad(lambda z: edge_loss(z, y, oe).loss)(z.detach())
    torch.testing.assert_close(found, expected)
    with torch.autograd.forward_ad.dual_level():
        moving = torch.autograd.forward_ad.make_dual(z, torch.ones_like(z))
        change = torch.autograd.forward_ad.unpack_dual(edge_loss(moving, y, oe).loss).tangent
    torch.testing.assert_close(change, expected.sum())


def test_soft_labels_can_have_a_gradient_too():
    z, y, oe = sample(9, 7, 5)
    y = (0.1 + 0.8 * y).requires_grad_()
    [gradient] = torch.autograd.grad(edge_loss(z.requires_grad_(), y, oe).loss, y)
    torch.testing.assert_close(gradient, -z.detach() / z.numel())


def test_limits():
    z, y, oe = sample(10, 7, 4)
    bce = nn.BCEWithLogitsLoss()(z, y)
    softplus = nn.functional.softplus(oe).mean()
    assert torch.equal(edge_loss(z, y, oe, alpha=0.0, beta=0.0).loss, bce)
    torch.testing.assert_close(edge_loss(z, y, oe, alpha=2.0, beta=0.0).loss, bce + 2 * softplus)
    zeros = torch.zeros_like(oe)
    torch.testing.assert_close(
        edge_loss(z, y, oe).l_conf, nn.BCEWithLogitsLoss()(oe, zeros), rtol=1e-12, atol=0
    )
    # Every pair active and every sample tail: the means and the margin remain.
    out = edge_loss(z, y, oe, k=1.0, margin=1e4)
    expected = joint_energy(oe).mean() - joint_energy(z).mean() + 1e4
    torch.testing.assert_close(out.l_gap, expected)
    # A gap that is wide enough costs nothing and moves nothing.
    z.requires_grad_()
    low = torch.full_like(oe, -50.0, requires_grad=True)
    out = edge_loss(z, y, low, alpha=0.0, beta=5.0)
    out.loss.backward()
    assert out.l_gap == 0
    assert not low.grad.any()
    assert torch.allclose(z.grad, (z.sigmoid() - y).detach() / z.numel())


def test_the_kink_has_no_gradient():
    tail = torch.tensor([1.0, 2.0], requires_grad=True)
    outside = torch.tensor([1.0], requires_grad=True)
    for implementation in ("pairwise", "sorted"):
        gap, active = energy_gap(tail, outside, 0.0, implementation)
        assert gap == 0
        assert active == 0
        for gradient in torch.autograd.grad(gap, (tail, outside)):
            assert not gradient.any()
    # The same rows as ID samples and as outliers: no hinge is active where energies are equal.
    z = torch.tensor([[0.5, -1.0]] * 3, requires_grad=True)
    y, oe = torch.zeros(3, 2), z.detach().clone().requires_grad_()
    for implementation in ("pairwise", "sorted"):
        options = {"alpha": 0.0, "k": 1.0, "gap_impl": implementation}
        losses = [edge_loss(z, y, oe, beta=beta, **options).loss for beta in (0.0, 1.0)]
        of_bce, of_all = (torch.autograd.grad(loss, (z, oe)) for loss in losses)
        for expected, found in zip(of_bce, of_all, strict=True):
            torch.testing.assert_close(found, expected)


def test_without_outliers_the_id_loss_remains():
    z, y, oe = sample(4, 3, 2)
    for outliers in (None, oe[:0]):
        out = edge_loss(z, y, outliers)
        assert torch.equal(out.loss, nn.BCEWithLogitsLoss()(z, y))
        assert out.l_conf == out.l_gap == 0


def test_positives_raise_true_labels_only():
    z, y, oe = sample(6, 5, 4, seed=2)
    z.requires_grad_()
    y[0] = 0  # a sample without labels has nothing to raise

    def gradient(mask):
        full = edge_loss(z, y, oe, alpha=0.0, beta=1.0, k=1.0, margin=9.0, gap_mask=mask).loss
        return torch.autograd.grad(full - nn.BCEWithLogitsLoss()(z, y), z)[0]

    assert (gradient("all")[y == 0] < 0).all()
    assert not gradient("positives")[y == 0].any()
    assert (gradient("positives")[y == 1] < 0).all()


@pytest.mark.smoke
@examples(30)
@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 40), st.floats(-2, 2))
def test_sorted_equals_pairwise(seed, k, m, margin):
    g = torch.Generator().manual_seed(seed)
    # Rounded, so that energies tie.
    tail = (torch.randn(k, generator=g) * 3).round(decimals=1).requires_grad_()
    outside = (torch.randn(m, generator=g) * 3).round(decimals=1).requires_grad_()
    values = [energy_gap(tail, outside, margin, how) for how in ("pairwise", "sorted")]
    torch.testing.assert_close(values[1][0], values[0][0], rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(v[0], (tail, outside)) for v in values]
    if abs(margin * 10 - round(margin * 10)) > 1e-3:  # away from kinks, where rounding decides
        for found, expected in zip(*reversed(gradients), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_large_gap_in_single_precision():
    g = torch.Generator().manual_seed(0)
    tail, outside = torch.rand(2048, generator=g) * 100, torch.rand(4096, generator=g) * 100
    exact = energy_gap(tail.double(), outside.double(), 0.1, "pairwise")[0]
    assert energy_gap(tail, outside, 0.1, "sorted")[0].item() == pytest.approx(
        exact.item(), rel=1e-6
    )


@examples(20)
@given(st.integers(0, 1000))
def test_order_does_not_matter(seed):
    z, y, oe = sample(9, 7, 5, seed=seed)
    g = torch.Generator().manual_seed(seed)
    rows, others, classes = (torch.randperm(size, generator=g) for size in (9, 7, 5))
    expected = edge_loss(z, y, oe, beta=1.0).loss
    moved = edge_loss(z[rows][:, classes], y[rows][:, classes], oe[others][:, classes], beta=1.0)
    torch.testing.assert_close(moved.loss, expected)


def test_ties_at_the_edge_of_the_tail():
    z = torch.zeros(4, 2, requires_grad=True)
    out = edge_loss(z, torch.zeros(4, 2), torch.ones(3, 2), alpha=0.0, beta=1.0, k=2)
    [gradient] = torch.autograd.grad(out.l_id * 0 + out.loss, z)
    moved = (gradient < gradient.max()).all(1)
    assert moved.sum() == 2
    again = torch.autograd.grad(
        edge_loss(z, torch.zeros(4, 2), torch.ones(3, 2), alpha=0.0, beta=1.0, k=2).loss, z
    )[0]
    assert torch.equal(gradient, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_logits_stay_finite(dtype, sign):
    extreme = 6e4 if dtype == torch.float16 else 1e4
    z = torch.full((4, 80), sign * extreme, dtype=dtype, requires_grad=True)
    oe = torch.full((3, 80), -sign * extreme, dtype=dtype, requires_grad=True)
    out = edge_loss(z, torch.ones(4, 80), oe, beta=1.0, k=0.5, margin=1.0)
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert all(part.isfinite() for part in (out.loss, out.l_id, out.l_conf, out.l_gap))
    assert z.grad.isfinite().all()
    assert oe.grad.isfinite().all()


def test_under_autocast_the_loss_is_single_precision():
    z, y, oe = sample(8, 6, 80, dtype=torch.float32)
    expected = edge_loss(z, y, oe).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = EdgeLoss()(z, y, oe).loss
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_strides_do_not_matter():
    z, y, oe = sample(8, 6, 5)
    strided = [torch.stack([t, t], dim=-1)[..., 0] for t in (z, y, oe)]
    assert not strided[0].is_contiguous()
    assert torch.equal(edge_loss(*strided).loss, edge_loss(z, y, oe).loss)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("implementation", ["pairwise", "sorted"])
def test_it_compiles_without_graph_breaks(implementation, without_type_checks):
    z, y, oe = sample(16, 12, 5, dtype=torch.float32)
    z.requires_grad_()
    criterion = EdgeLoss(beta=1.0, gap_impl=implementation)
    torch._dynamo.reset()
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    found, expected = compiled(z, y, oe).loss, criterion(z, y, oe).loss
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found, z), torch.autograd.grad(expected, z), strict=True):
        torch.testing.assert_close(a, b)


def test_other_id_losses():
    z, y, oe = sample(8, 6, 5)
    asl = AsymmetricLoss(reduction="mean")
    out = EdgeLoss(alpha=0.0, beta=0.0, id_loss=asl)(z, y, oe)
    assert torch.equal(out.loss, asl(z, y))


def test_the_gap_waits_for_tau():
    for tau, epochs, first in ((0.5, 100, 50), (3, None, 3), (0, None, 0), (1.0, 10, 10)):
        schedule = EdgeSchedule(tau, epochs, beta=0.2)
        on = [epoch for epoch in range(12 if epochs is None else epochs) if schedule.is_on(epoch)]
        assert on[:1] == ([first] if first < (epochs or 12) else [])
        assert schedule.beta(first) == 0.2
        assert first == 0 or schedule.beta(first - 1) == 0.0
    z, y, oe = sample(8, 6, 5)
    off = EdgeLoss(beta=5.0)(z, y, oe, gap=False)
    assert off.n_tail == 0
    assert torch.equal(off.loss, edge_loss(z, y, oe, beta=0.0).loss)


def test_tail_size():
    assert [tail_size(k, 128) for k in (0.25, 1.0, 0.001, 50, 500)] == [32, 128, 1, 50, 128]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": 1.5}, r"k is 1\.5"),
        ({"k": math.nan}, "k is nan"),
        ({"alpha": math.nan}, "alpha is nan"),
        ({"beta": -1.0}, r"beta is -1\.0"),
        ({"margin": math.inf}, "margin is inf"),
        ({"gap_mask": "tail"}, "gap_mask is 'tail'"),
        ({"gap_impl": "fast"}, "gap_impl is 'fast'"),
        ({"id_loss": "ce"}, "id_loss is 'ce'"),
    ],
)
@pytest.mark.usefixtures("without_type_checks")
def test_bad_settings(changes, message):
    with pytest.raises(InputError, match=message):
        EdgeLoss(**changes)


@pytest.mark.usefixtures("without_type_checks")
def test_bad_inputs():
    z, y, oe = sample(4, 3, 2)
    for arguments, message in (
        ((z, y.long(), oe), "one_hot"),
        ((z, y[:, 0], oe), "one_hot"),
        ((z, y + 2, oe), r"targets lie in"),
        ((z, y * math.nan, oe), r"targets lie in"),
        ((z, y, oe[:, :1]), "both come from one model"),
        ((z[:0], y[:0], oe), "at least one ID sample"),
        ((z[0], y[0], oe), "logits_id has shape"),
    ):
        with pytest.raises(InputError, match=message):
            edge_loss(*arguments)
    for tau, epochs in ((-1, 5), (1.5, 5), (0.5, None), (math.nan, 5)):
        with pytest.raises(InputError, match="tau"):
            EdgeSchedule(tau, epochs)


@pytest.mark.cuda
def test_on_a_gpu_without_waiting_for_it():
    z, y, oe = (t.cuda() for t in sample(128, 128, 80, dtype=torch.float32))
    z.requires_grad_()
    expected = edge_loss(*(t.detach().cpu() for t in (z, y, oe))).loss
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = edge_loss(z, y, oe)
        out.loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(out.loss.cpu(), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.cuda
def test_half_precision_on_a_gpu():
    z, y, oe = (t.cuda() for t in sample(64, 64, 80, dtype=torch.float32))
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cuda", dtype=dtype):
            out = edge_loss(z.to(dtype), y, oe.to(dtype), beta=1.0)
        assert out.loss.dtype == torch.float32
        torch.testing.assert_close(
            out.loss, edge_loss(z, y, oe, beta=1.0).loss, rtol=0.02, atol=0.02
        )

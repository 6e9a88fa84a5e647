"""Values and gradients against float64, limits, invariants, and every documented error."""

import math
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from abkd import (
    DIVERGENCES,
    ab_divergence,
    ab_divergence_from_log_probs,
    divergence,
    divergence_terms,
)
from shared_core.testing import examples

pytestmark = pytest.mark.filterwarnings("ignore:alpha=:UserWarning")

Reference = Callable[..., Tensor]
PAIRS = [
    (1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (1.0, 1.0), (0.2, 0.7), (0.1, 0.8), (0.8, 0.3),
    (0.9, 0.3), (0.0, 0.5), (0.5, 0.0), (0.0, 2.0), (2.0, 0.0), (0.5, -0.5), (-0.5, 0.5),
    (0.0, 0.0), (0.3, 0.0), (1.3, 0.4), (0.4, 1.3), (-0.3, 0.8), (0.8, -0.3), (-0.2, -0.4),
    (0.6, -0.3), (1.0, 0.5), (0.05, 0.05),
]  # fmt: skip
exponents = st.floats(0.05, 1.5)


def logits(*shape: int, seed: int = 0, scale: float = 2.0, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).mul(scale).to(dtype)


@pytest.mark.smoke
@pytest.mark.parametrize(("alpha", "beta"), PAIRS)
def test_value_equals_the_definition_on_and_off_the_axes(
    textbook: Reference, alpha: float, beta: float
) -> None:
    z, t = logits(5, 7), logits(5, 7, seed=1)
    for tau in (1.0, 3.0):
        expected = textbook(z, t, alpha, beta, tau)
        found = ab_divergence(z, t, alpha, beta, temperature=tau, reduction="none")
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
        single = ab_divergence(z.float(), t.float(), alpha, beta, temperature=tau, reduction="none")
        torch.testing.assert_close(single, expected.float(), rtol=3e-5, atol=1e-6)


@pytest.mark.parametrize(("alpha", "beta"), PAIRS)
def test_gradient_equals_autograd_of_the_definition(
    textbook: Reference, alpha: float, beta: float
) -> None:
    z, t = logits(3, 6).requires_grad_(), logits(3, 6, seed=1)
    (expected,) = torch.autograd.grad(textbook(z, t, alpha, beta, 2.0).mean(), z)
    (found,) = torch.autograd.grad(ab_divergence(z, t, alpha, beta, temperature=2.0), z)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)
    assert found.sum(-1).abs().max() < 1e-14
    assert torch.autograd.gradcheck(lambda x: ab_divergence(x, t, alpha, beta), z)


@pytest.mark.parametrize(("alpha", "beta"), PAIRS)
def test_float32_gradient(textbook: Reference, alpha: float, beta: float) -> None:
    z, t = logits(4, 50).requires_grad_(), logits(4, 50, seed=1)
    (expected,) = torch.autograd.grad(textbook(z, t, alpha, beta).sum(), z)
    x = z.detach().float().requires_grad_()
    (found,) = torch.autograd.grad(ab_divergence(x, t.float(), alpha, beta, reduction="sum"), x)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=2e-6)


def test_axes_have_the_squared_factors() -> None:
    lq, lp = torch.log_softmax(logits(4), -1), torch.log_softmax(logits(4, seed=1), -1)
    p, q = lp.exp(), lq.exp()
    for c in (0.5, 2.0):
        on_beta = (c * (lp - lq) * p**c - p**c + q**c).sum() / c**2
        found = ab_divergence_from_log_probs(lq, lp, c, 0.0)
        torch.testing.assert_close(found, on_beta)
        # The published code divides by c once; the loss then jumps at the axis.
        assert abs(found - on_beta * c) > 0.1 * found


@pytest.mark.parametrize("where", ["alpha", "beta", "sum"])
@pytest.mark.parametrize("c", [0.5, 0.7, 2.0])
def test_continuity_across_the_axes(where: str, c: float) -> None:
    z, t = logits(3, 9), logits(3, 9, seed=1)

    def value(step: float, dtype: torch.dtype) -> Tensor:
        pair = {"alpha": (step, c), "beta": (c, step), "sum": (c, step - c)}[where]
        return ab_divergence(z.to(dtype), t.to(dtype), *pair)

    for dtype, step, tolerance in (
        (torch.float32, 1e-4, 1e-3),
        (torch.float32, -1e-4, 1e-3),
        (torch.float64, 1e-6, 1e-5),
        (torch.float64, 2e-6, 1e-5),
    ):
        at = value(0.0, dtype)
        assert abs(value(step, dtype) - at) <= tolerance * abs(at) * (5 if c > 1 else 1)


@pytest.mark.parametrize(
    ("alpha", "beta"), [(1.0, 0.0), (0.0, 1.0), (0.2, 0.7), (0.7, 1e-5), (0.6, -0.5999999)]
)
def test_near_equality_is_accurate_in_float32(
    textbook: Reference, alpha: float, beta: float
) -> None:
    t = logits(2, 5000, scale=1.0)
    z = t + logits(2, 5000, seed=1, scale=1e-3)
    # The reference in float64 by the always-positive series, which the definition confirms.
    lq, lp = (torch.log_softmax(x.float().double(), -1) for x in (z, t))
    d, s = lp - lq, alpha + beta
    h = [sum(s**i * alpha ** (m - i) for i in range(m + 1)) for m in range(6)]
    series = sum(h[n - 1] * d ** (n + 1) / math.factorial(n + 1) for n in range(1, 7))
    expected = (torch.exp(s * lq) * series).sum(-1)
    if beta in (0.0, 1.0, 0.7):
        torch.testing.assert_close(
            textbook(z.float(), t.float(), alpha, beta), expected, rtol=1e-6, atol=0
        )
    found = ab_divergence(z.float(), t.float(), alpha, beta, reduction="none").double()
    assert ((found - expected).abs() / expected).max() < 1e-2
    x = z.float().requires_grad_()
    (gradient,) = torch.autograd.grad(ab_divergence(x, t.float(), alpha, beta, reduction="sum"), x)
    w = -torch.exp(s * lq) * torch.expm1(alpha * d) / alpha if alpha else -torch.exp(s * lq) * d
    exact = w - lq.exp() * w.sum(-1, keepdim=True)
    assert (gradient - exact).norm() < 1e-2 * exact.norm()


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("alpha", "beta"), [p for p in PAIRS if min(p) >= 0 and p != (0.0, 0.0)])
def test_finite_at_gaps_of_200(dtype: torch.dtype, alpha: float, beta: float) -> None:
    t = torch.tensor([[0.0, -200.0, -5.0, 1.0], [200.0, 0.0, 0.0, 0.0]], dtype=dtype)
    z = t.flip(-1).clone().requires_grad_()
    loss = ab_divergence(z, t, alpha, beta)
    loss.backward()
    assert loss.isfinite()
    assert z.grad.isfinite().all()
    assert z.grad.abs().sum() > 0


def test_the_published_form_is_nan_there() -> None:
    """The trap: powers of a softmax that underflows have the derivative 0^(β-1)·0."""
    t = torch.tensor([[0.0, 0.0, 200.0]])
    z = t.flip(-1).clone().requires_grad_()
    q, p = torch.softmax(z, -1), torch.softmax(t, -1)
    (-(p**0.2 * q**0.7 - 0.2 / 0.9 * p**0.9 - 0.7 / 0.9 * q**0.9) / 0.14).sum().backward()
    assert z.grad.isnan().any()
    mine = t.flip(-1).clone().requires_grad_()
    ab_divergence(mine, t, 0.2, 0.7).backward()
    assert mine.grad.isfinite().all()


def test_large_vocabulary_in_half_precision(textbook: Reference) -> None:
    z, t = logits(2, 151_936, scale=3.0), logits(2, 151_936, seed=1, scale=3.0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        low_z, low_t = z.to(dtype), t.to(dtype)
        for alpha, beta in ((0.2, 0.7), (1.0, 0.0), (0.0, 1.0)):
            found = ab_divergence(low_z, low_t, alpha, beta, reduction="none").double()
            expected = textbook(low_z, low_t, alpha, beta)
            torch.testing.assert_close(found, expected, rtol=2e-5, atol=0)
    assert abs(torch.log_softmax(z.float(), -1).exp().sum(-1) - 1).max() < 2e-5


def test_infinite_logits_are_mass_zero() -> None:
    inf = math.inf
    z = torch.tensor([[0.0, 1.0, -inf, -inf]])
    t = torch.tensor([[1.0, 0.0, -inf, 0.5]])
    one_z, one_t = z[:, [0, 1, 3]], t[:, [0, 1, 3]]
    for alpha, beta in ((0.2, 0.7), (0.5, 0.5), (0.0, 1.0), (0.0, 0.5)):
        both = ab_divergence(z, t, alpha, beta)  # the class that neither has adds nothing
        torch.testing.assert_close(both, ab_divergence(one_z, one_t, alpha, beta))
        assert both.isfinite()
        x = z.clone().requires_grad_()
        ab_divergence(x, t, alpha, beta).backward()
        assert x.grad.isfinite().all()
    assert ab_divergence(z, t, 1.0, 0.0) == inf  # q = 0 < p is told, not masked
    assert ab_divergence(t, z, 0.0, 1.0) == inf  # p = 0 < q
    assert ab_divergence(t, z, 0.4, 0.6).isfinite()
    p, q = torch.softmax(z, -1), torch.softmax(t, -1)
    expected = torch.nn.functional.kl_div(q[:, :2].log(), p[:, :2], reduction="sum")
    torch.testing.assert_close(ab_divergence(t, z, 1.0, 0.0), expected)


@examples(30)
@given(exponents, exponents, st.integers(0, 10_000), st.floats(0.2, 4))
def test_invariants(alpha: float, beta: float, seed: int, omega: float) -> None:
    z, t = logits(2, 8, seed=seed), logits(2, 8, seed=seed + 1)
    value = ab_divergence(z, t, alpha, beta, reduction="none")
    assert (value > 0).all()
    torch.testing.assert_close(value, ab_divergence(t, z, beta, alpha, reduction="none"))
    torch.testing.assert_close(value, ab_divergence(z + 3, t - 5, alpha, beta, reduction="none"))
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        value, ab_divergence(z[:, order], t[:, order], alpha, beta, reduction="none")
    )
    assert ab_divergence(z, z, alpha, beta).abs() < 1e-14
    # D^(ωα,ωβ)(p‖q) = D^(α,β)(p^ω‖q^ω)/ω², for masses that need not sum to one
    scaled = ab_divergence_from_log_probs(z, t, omega * alpha, omega * beta)
    powers = ab_divergence_from_log_probs(omega * z, omega * t, alpha, beta) / omega**2
    torch.testing.assert_close(scaled, powers, rtol=1e-9, atol=1e-12)


def test_special_members() -> None:
    z, t = logits(4, 11), logits(4, 11, seed=1)
    lq, lp = z.log_softmax(-1), t.log_softmax(-1)
    p, q = lp.exp(), lq.exp()
    m = 0.5 * (p + q)
    kl = lambda a, b: (a * (a.log() - b.log())).sum(-1)  # noqa: E731
    skewed, reverse_skewed = 0.1 * p + 0.9 * q, 0.9 * p + 0.1 * q
    order = p.argsort(-1, descending=True)
    head = torch.zeros_like(p).scatter(-1, order, (p.gather(-1, order).cumsum(-1) < 0.5).double())
    gap = (p - q).abs()
    h = (gap * head).sum(-1) / gap.sum(-1)
    expected = {
        "ab": ab_divergence(z, t, 0.2, 0.7, reduction="none"),
        "fkl": F.kl_div(lq, lp, log_target=True, reduction="none").sum(-1),
        "rkl": F.kl_div(lp, lq, log_target=True, reduction="none").sum(-1),
        "jsd": 0.5 * kl(p, m) + 0.5 * kl(q, m),
        "tv": 0.5 * (p - q).abs().sum(-1),
        "skew_fkl": kl(p, skewed),
        "skew_rkl": kl(q, reverse_skewed),
        "hellinger": 0.5 * ((p.sqrt() - q.sqrt()) ** 2).sum(-1),
        "alpha": (1 - (p**0.2 * q**0.8).sum(-1)) / 0.16,
        "beta": ab_divergence(z, t, 1.0, 0.7, reduction="none"),
        "wsd": 0.5 * kl(p, q) + 0.5 * kl(q, p),
        "akl": h * kl(p, q) + (1 - h) * kl(q, p),
    }
    assert expected.keys() == set(DIVERGENCES)
    for name, value in expected.items():
        torch.testing.assert_close(divergence(name, z, t, reduction="none"), value)
    torch.testing.assert_close(
        ab_divergence(z, t, 0.5, 0.5, reduction="none"), 2 * ((p.sqrt() - q.sqrt()) ** 2).sum(-1)
    )
    torch.testing.assert_close(
        ab_divergence(z, t, 1.0, 1.0, reduction="none"), 0.5 * ((p - q) ** 2).sum(-1)
    )


@pytest.mark.parametrize("name", [n for n in DIVERGENCES if n != "akl"])
def test_gradients_of_all(name: str) -> None:
    z, t = logits(2, 5).requires_grad_(), logits(2, 5, seed=1)
    assert torch.autograd.gradcheck(lambda x: divergence(name, x, t, temperature=1.5), z)


def test_gradient_of_akl_keeps_its_weights_fixed() -> None:
    z, t = logits(1, 5).requires_grad_(), logits(1, 5, seed=1)
    value, fkl, rkl = (divergence(n, z, t) for n in ("akl", "fkl", "rkl"))
    h = ((value - rkl) / (fkl - rkl)).detach()
    (expected,) = torch.autograd.grad(h * fkl + (1 - h) * rkl, z)
    (found,) = torch.autograd.grad(value, z)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mix", [0.1, 0.7])
def test_generalised_jsd_is_continuous(mix: float) -> None:
    z, t = logits(3, 6), logits(3, 6, seed=1)
    p, q = t.softmax(-1), z.softmax(-1)
    m = mix * p + (1 - mix) * q
    expected = mix * (p * (p / m).log()).sum(-1) + (1 - mix) * (q * (q / m).log()).sum(-1)
    torch.testing.assert_close(divergence("jsd", z, t, mix=mix, reduction="none"), expected)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_all_are_finite_with_padding_rows(name: str) -> None:
    z = torch.tensor([[0.0, 90.0, -math.inf]], requires_grad=True)
    loss = divergence(name, z, torch.tensor([[90.0, 0.0, -math.inf]]))
    loss.backward()
    assert loss.isfinite()
    assert z.grad.isfinite().all()


def test_exponents_of_each_token() -> None:
    z, t = logits(len(PAIRS), 6).requires_grad_(), logits(len(PAIRS), 6, seed=1)
    alpha, beta = (torch.tensor(v, dtype=torch.float64) for v in zip(*PAIRS, strict=True))
    found = ab_divergence(z, t, alpha, beta, reduction="none")
    each = [ab_divergence(z[i], t[i], a, b) for i, (a, b) in enumerate(PAIRS)]
    torch.testing.assert_close(found, torch.stack(each), rtol=1e-9, atol=1e-12)
    (gradient,) = torch.autograd.grad(found.sum(), z)
    (expected,) = torch.autograd.grad(sum(each), z)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.smoke
@pytest.mark.parametrize("chunk_size", [None, 1, 5, 100])
def test_mask_weight_and_reduction(chunk_size: int | None) -> None:
    z, t = logits(3, 4, 9).requires_grad_(), logits(3, 4, 9, seed=1)
    mask = torch.rand(3, 4, generator=torch.Generator().manual_seed(2)) > 0.4
    weight = torch.arange(12.0).reshape(3, 4)
    each = ab_divergence(z, t, reduction="none", chunk_size=chunk_size)
    assert each.shape == (3, 4)
    masked = ab_divergence(z, t, mask=mask, weight=weight, chunk_size=chunk_size)
    expected = (each * mask * weight).sum() / mask.sum()
    torch.testing.assert_close(masked, expected)
    (found,) = torch.autograd.grad(masked, z, retain_graph=True)
    (again,) = torch.autograd.grad(masked, z)
    torch.testing.assert_close(found, torch.autograd.grad(expected, z)[0])
    assert torch.equal(found, again)
    assert found[~mask].abs().max() == 0


def test_half_precision_is_the_float32_result_rounded() -> None:
    z, t = logits(8, 300, dtype=torch.bfloat16), logits(8, 300, seed=1, dtype=torch.bfloat16)
    x = z.clone().requires_grad_()
    loss = ab_divergence(x, t, reduction="sum")
    loss.backward()
    y = z.float().requires_grad_()
    exact = ab_divergence(y, t.float(), reduction="sum")
    exact.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact)
    torch.testing.assert_close(x.grad.float(), y.grad, rtol=2**-7, atol=1e-9)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_under_compile_and_no_grad() -> None:
    z, t = logits(4, 6).requires_grad_(), logits(4, 6, seed=1)
    compiled = torch.compile(lambda a, b: 2 * ab_divergence(a, b), backend="eager")
    loss = compiled(z, t)
    torch.testing.assert_close(loss, 2 * ab_divergence(z, t))
    loss.backward()
    assert z.grad.abs().sum() > 0
    with torch.no_grad():
        assert not ab_divergence(z, t).requires_grad


def test_losing_the_students_gradient_is_told() -> None:
    z = logits(2, 3).requires_grad_() * 2
    with torch.no_grad(), pytest.warns(UserWarning, match=r"under torch.no_grad"):
        ab_divergence(z, logits(2, 3))


def test_no_valid_token_is_zero_with_zero_gradient() -> None:
    z, t = logits(2, 3).requires_grad_(), logits(2, 3, seed=1)
    with pytest.warns(UserWarning, match="no valid position"):
        loss = ab_divergence(z, t, mask=torch.zeros(2, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert (z.grad == 0).all()
    with pytest.warns(UserWarning, match="no valid position"):
        assert ab_divergence(z[:0], t[:0]) == 0


def test_exponents_outside_the_unit_square_are_flagged_once() -> None:
    z = logits(1, 3)
    with pytest.warns(UserWarning, match="outside"):
        ab_divergence(z, z, 1.234, 0.1)
    with warnings.catch_warnings(action="error"):
        ab_divergence(z, z, 1.234, 0.1)


Z = torch.zeros(2, 3)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ab_divergence(Z, torch.zeros(3, 3)), "all but the last dimension"),
        (lambda: ab_divergence(Z, torch.zeros(2, 4)), "3 classes and the teacher 4"),
        (lambda: ab_divergence(Z, Z, math.nan, 0.5), "alpha is not finite"),
        (lambda: ab_divergence(Z, Z, 0.5, math.inf), "beta is not finite"),
        (lambda: ab_divergence(Z, Z, torch.tensor([0.1, math.nan])), "alpha is not finite"),
        (lambda: ab_divergence(Z, Z, torch.zeros(5)), "fit the tokens"),
        (lambda: ab_divergence(Z, Z, temperature=0.0), "temperature is 0"),
        (lambda: ab_divergence(Z, Z, temperature=-1.0), "temperature is -1"),
        (lambda: ab_divergence(Z.long(), Z), "labels in the wrong place|are these labels"),
        (lambda: ab_divergence(Z, Z, mask=torch.ones(3)), "mask has shape"),
        (lambda: ab_divergence(Z, Z, weight=torch.ones(3)), "weight has shape"),
        (lambda: ab_divergence(Z, Z, reduction="sums"), "accepted: 'mean', 'sum', 'none'"),
        (lambda: ab_divergence(Z, Z, chunk_size=0), "at least 1 token"),
        (lambda: ab_divergence(Z, Z.clone().requires_grad_()), "requires gradients"),
        (lambda: ab_divergence(Z, Z.to("meta")), "move them to one device"),
        (lambda: ab_divergence(torch.zeros(()), torch.zeros(())), "class dimension"),
        (lambda: divergence("kl", Z, Z), "divergence is 'kl'"),
        (lambda: divergence_terms("jsd", mix=1.0), "both excluded"),
    ],
)
def test_errors(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_teacher_with_a_graph_can_be_detached() -> None:
    t = torch.ones(2, 3, requires_grad=True)
    ab_divergence(Z.clone().requires_grad_(), t, detach_teacher=True).backward()
    assert t.grad is None

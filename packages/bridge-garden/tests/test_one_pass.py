"""The risk penalty in the one pass over a head's chunks: equal to two passes and to the formula."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import bridge_garden.hybrid
from bridge_garden import Risk, fused_hybrid_loss, hybrid_loss

B, T, H, V = 3, 6, 5, 9


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, heads, and labels that are the teacher's choice at two of three tokens."""
    h, th = (torch.randn(B, T, n, dtype=torch.float64) for n in (H, 4))
    W, tW = (torch.randn(V + 2, n, dtype=torch.float64) for n in (H, 4))
    y = (th @ tW[:V].T).argmax(-1)
    y[:, ::3] = torch.randint(V, (B, 2))
    y[0, :2] = -100  # a prompt
    y[1, 4:] = -100  # padding
    y[2, 2] = -100  # a hole: nothing is coupled across it
    return h.requires_grad_(), W.requires_grad_(), th, tW, y


def naive(
    z: Tensor, t: Tensor, y: Tensor, risk: Risk, kind: str, segments: Tensor | None, tau: float
) -> Tensor:
    """The formula of the module's first lines, token by token."""
    q, p = torch.log_softmax(z, -1), torch.softmax(t, -1)
    soft_q, soft_p = torch.log_softmax(z / tau, -1), torch.log_softmax(t / tau, -1)
    total, count = z.new_zeros(()), 0
    for b in range(len(y)):
        for i in range(y.shape[1]):
            if y[b, i] == -100:
                continue
            count += 1
            lam = 1 - p[b, i].max()
            a = y[b, i] if kind == "labels" else p[b, i].argmax()
            hard = -q[b, i, a]
            after = i + 1 < y.shape[1] and y[b, i + 1] != -100
            after = after and (segments is None or segments[b, i] == segments[b, i + 1])
            if a == y[b, i] and (after or risk.terminal == "official"):
                value = torch.logsumexp(z[b, i + 1], -1) if after else 0.0
                hard = hard + risk.alpha / 4 * (value - z[b, i, a]) ** 2
            kl = (soft_p[b, i].exp() * (soft_p[b, i] - soft_q[b, i])).sum()
            total = total + lam * kl + (1 - lam) * hard
    return total / count


@pytest.mark.parametrize("terminal", ["skip", "official"])
@pytest.mark.parametrize("kind", ["labels", "teacher_argmax"])
@pytest.mark.parametrize("chunk", [1, 4, "auto"])
def test_value_and_gradients_are_those_of_the_formula(
    terminal: Any, kind: Any, chunk: int | str
) -> None:
    h, W, th, tW, y = inputs()
    bias = torch.randn(V + 2, dtype=torch.float64, requires_grad=True)
    risk, tau = Risk(0.7, terminal=terminal), 1.0 if chunk == 1 else 2.0
    segments = torch.tensor([[0] * 4 + [1] * 2] * B) if chunk == 4 else None
    kw = {"hard_labels": kind, "risk": risk, "temperature": tau, "segments": segments}
    options = {"student_bias": bias, "student_softcap": 3.0, "student_logit_scale": 1.3}
    out = fused_hybrid_loss(h, W, th, tW, y, vocab=V, chunk_size=chunk, **kw, **options)
    z = 3 * torch.tanh(1.3 * (h @ W.T + bias) / 3)
    expected = naive(z[..., :V], (th @ tW.T)[..., :V], y, risk, kind, segments, tau)
    torch.testing.assert_close(out.loss, expected, rtol=1e-10, atol=1e-12)
    assert out.risk > 0
    torch.testing.assert_close(out.loss.detach(), out.soft + out.hard + out.risk)
    leaves = (h, W, bias)
    found, known = (torch.autograd.grad(x, leaves) for x in (out.loss, expected))
    torch.testing.assert_close(found, known, rtol=1e-10, atol=1e-12)
    # Doubling the denominator halves all.
    half = fused_hybrid_loss(
        h, W, th, tW, y, vocab=V, chunk_size=chunk, n_valid=2.0 * (y != -100).sum(), **kw, **options
    )
    torch.testing.assert_close(half.loss * 2, out.loss)
    torch.testing.assert_close(half.risk * 2, out.risk)


@pytest.mark.parametrize("kind", ["labels", "teacher_argmax"])
def test_one_pass_equals_two(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    h, W, th, tW, y = inputs()
    passes = []
    real = bridge_garden.hybrid.one_pass
    for rule in (real, lambda risk, labels: False):
        monkeypatch.setattr(bridge_garden.hybrid, "one_pass", rule)
        out = fused_hybrid_loss(
            h, W, th, tW, y, hard_labels=kind, risk=Risk(0.4), chunk_size=4, weight="entropy"
        )
        grads = torch.autograd.grad(out.loss, (h, W))
        passes.append((out.loss, out.soft, out.hard, out.risk, out.weight, *grads))
    torch.testing.assert_close(passes[0], passes[1], rtol=1e-10, atol=1e-12)


def test_gradcheck() -> None:
    h, W, th, tW, y = inputs()

    def loss(h: Tensor, W: Tensor) -> Tensor:
        return fused_hybrid_loss(
            h, W, th, tW, y, vocab=V, chunk_size=4, risk=Risk(0.5), weight="static:0.3",
            hard_labels="labels",
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(loss, (h, W))


def test_a_frozen_head_and_no_gradient_at_all() -> None:
    h, W, th, tW, y = inputs()
    kw = {"risk": Risk(0.5), "chunk_size": 4}
    whole = fused_hybrid_loss(h, W, th, tW, y, **kw)
    frozen = fused_hybrid_loss(h, W.detach(), th, tW, y, **kw)
    torch.testing.assert_close(
        torch.autograd.grad(frozen.loss, h), torch.autograd.grad(whole.loss, h)
    )
    with torch.no_grad():
        torch.testing.assert_close(fused_hybrid_loss(h, W, th, tW, y, **kw).loss, whole.loss)


def test_what_does_not_count_may_hold_anything() -> None:
    h, W, th, tW, y = inputs()
    kw = {"risk": Risk(0.5), "hard_labels": "labels", "chunk_size": 4}
    clean = fused_hybrid_loss(h, W, th, tW, y, **kw)
    known = torch.autograd.grad(clean.loss, (h, W))
    dirty = torch.where((y == -100).unsqueeze(-1), math.nan, h.detach()).requires_grad_()
    out = fused_hybrid_loss(dirty, W, th, tW, y, **kw)
    torch.testing.assert_close(out.loss, clean.loss)
    torch.testing.assert_close(torch.autograd.grad(out.loss, (dirty, W)), known)


def test_autocast_rounds_as_the_plain_loss_does() -> None:
    h, W, th, tW, y = (x.float() if x.is_floating_point() else x for x in inputs())
    h, W = h.detach().requires_grad_(), W.detach().requires_grad_()
    kw = {"risk": Risk(0.5), "hard_labels": "labels"}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused = fused_hybrid_loss(h, W, th, tW, y, chunk_size=4, **kw)
        plain = hybrid_loss(h @ W.T, th @ tW.T, y, **kw)
    torch.testing.assert_close(fused.loss, plain.loss.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fused.risk, plain.risk.float(), rtol=1e-3, atol=1e-4)
    found, known = (torch.autograd.grad(x.loss, (h, W)) for x in (fused, plain))
    torch.testing.assert_close(found, known, rtol=3e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("risk", "kind", "single"),
    [
        (None, "labels", False),
        (Risk(0.1), "labels", True),
        (Risk(0.1), "teacher_argmax", True),
        (Risk(0.1), "both_agree", False),
        (Risk(0.1, 0.9), "labels", False),
    ],
)
def test_when_there_is_one_pass(risk: Risk | None, kind: str, single: bool) -> None:
    assert bridge_garden.hybrid.one_pass(risk, kind) is single

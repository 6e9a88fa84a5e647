"""The risk penalty against closed forms written out token by token."""

import math

import pytest
import torch

from bridge_garden.risk import Risk, risk_penalty
from shared_core.errors import InputError


def chi2(logits, labels, mask, alpha, gamma):
    """Minus the inverse-RL objective with φ(x) = x - x²/4 (per unit α), token by token.

    This is the form that the authors' code minimises: cross-entropy, penalty and terminal term.
    """
    total, terminal, count, sequences = 0.0, 0.0, 0, 0
    for z, y, m in zip(logits, labels, mask, strict=True):
        places = [t for t in range(len(y)) if m[t]]
        if not places:
            continue
        sequences += 1
        for i, t in enumerate(places):
            V = torch.logsumexp(z[t], -1)
            last = i == len(places) - 1
            after = torch.tensor(0.0, dtype=z.dtype) if last else torch.logsumexp(z[t + 1], -1)
            r = z[t, y[t]] - gamma * after
            phi = r - alpha * r * r / 4
            total = total - gamma**i * (phi - (V - gamma * after))
            count += 1
            if last:
                terminal = terminal + gamma**i * alpha * (1 - gamma) / 4 * V**2
    return total / count + terminal / sequences


@pytest.mark.parametrize("gamma", [1.0, 0.9999, 0.8])
def test_official_form(gamma: float) -> None:
    logits = torch.randn(3, 6, 5, dtype=torch.float64)
    labels = torch.randint(5, (3, 6))
    mask = torch.tensor(
        [[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 0]], dtype=torch.bool
    )
    found = risk_penalty(logits, labels, mask, alpha=0.3, gamma=gamma, terminal="official")
    ce = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="none"
    ).view(3, 6)
    powers = torch.tensor([[gamma**i for i in range(6)]], dtype=torch.float64)
    index = (mask.long().cumsum(1) - 1).clamp(min=0)
    discounted = (powers.expand(3, 6).gather(1, index) * ce)[mask].sum() / mask.sum()
    torch.testing.assert_close(
        found + discounted, chi2(logits, labels, mask, 0.3, gamma), rtol=1e-10, atol=1e-12
    )


@pytest.mark.smoke
def test_paper_form_skips_the_last_token() -> None:
    logits = torch.randn(1, 3, 4, dtype=torch.float64)
    labels = torch.tensor([[1, 0, 3]])
    V = torch.logsumexp(logits[0], -1)
    deltas = [V[1] - logits[0, 0, 1], V[2] - logits[0, 1, 0]]
    expected = 0.1 / 4 * (deltas[0] ** 2 + deltas[1] ** 2) / 3
    torch.testing.assert_close(risk_penalty(logits, labels), expected, rtol=1e-12, atol=0)


def test_gradient_couples_neighbours() -> None:
    logits = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[1, 0, 3]])
    for gamma, terminal in ((1.0, "skip"), (0.9, "official")):
        assert torch.autograd.gradcheck(
            lambda z, g=gamma, t=terminal: risk_penalty(z, labels, gamma=g, terminal=t), logits
        )
    alpha = 0.4
    (g,) = torch.autograd.grad(risk_penalty(logits, labels, alpha=alpha, n_valid=1.0), logits)
    q, V = torch.softmax(logits, -1), torch.logsumexp(logits, -1)
    d0, d1 = V[0, 1] - logits[0, 0, 1], V[0, 2] - logits[0, 1, 0]
    expected = alpha / 2 * (d0 * q[0, 1] - d1 * torch.eye(4, dtype=torch.float64)[0])
    torch.testing.assert_close(g[0, 1], expected)


def test_packed_and_padded_sequences_do_not_couple() -> None:
    a, b = torch.randn(1, 3, 5), torch.randn(1, 4, 5)
    ya, yb = torch.randint(5, (1, 3)), torch.randint(5, (1, 4))
    for gamma, terminal in ((1.0, "skip"), (0.9, "skip"), (1.0, "official")):
        kw = {"gamma": gamma, "terminal": terminal, "n_valid": 7.0}
        apart = risk_penalty(a, ya, **kw) + risk_penalty(b, yb, **kw)
        packed = risk_penalty(
            torch.cat([a, b], 1),
            torch.cat([ya, yb], 1),
            segments=torch.tensor([[0, 0, 0, 1, 1, 1, 1]]),
            **kw,
        )
        torch.testing.assert_close(packed, apart)
        for left in (True, False):
            junk, no = torch.full((1, 2, 5), math.inf), torch.full((1, 2), -100)
            order = (lambda x, y: [x, y]) if left else (lambda x, y: [y, x])
            padded = risk_penalty(torch.cat(order(junk, b), 1), torch.cat(order(no, yb), 1), **kw)
            torch.testing.assert_close(padded, risk_penalty(b, yb, **kw))


def test_too_short_for_risk() -> None:
    logits = torch.randn(2, 1, 5, requires_grad=True)
    found = risk_penalty(logits, torch.zeros(2, 1, dtype=torch.int64))
    assert found.item() == 0
    found.backward()
    assert logits.grad.abs().sum() == 0
    assert risk_penalty(torch.randn(1, 3, 5), torch.full((1, 3), -100)).item() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    logits = (torch.randn(1, 4, 6) * 1000).to(dtype)
    labels = torch.tensor([[0, 1, 2, 3]])
    found = risk_penalty(logits, labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, risk_penalty(logits.double(), labels).float())


@pytest.mark.usefixtures("without_type_checks")
def test_errors() -> None:
    for bad in ({"alpha": -1.0}, {"alpha": math.nan}, {"gamma": 0.0}, {"gamma": 1.1}):
        with pytest.raises(InputError, match="accepted"):
            Risk(**bad)
    with pytest.raises(InputError, match="skip, official"):
        Risk(terminal="zero")
    with pytest.raises(InputError, match=r"\[B, T, V\]"):
        risk_penalty(torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.int64))

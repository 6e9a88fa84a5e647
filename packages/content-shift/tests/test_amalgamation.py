"""Eq. 3 to 5 against loops, and what must hold whatever the assigners say."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from content_shift import Amalgamation, AmalgamationOutput, GammaWalk, amalgamation_loss
from shared_core.errors import InputError
from shared_core.testing import examples


def by_hand(mix: Amalgamation, stack: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and weights of one image after another, one assigner after another."""
    weights = []
    for assigner in mix.assigners:
        conv, _, norm, _, _, _, last = assigner
        rows = []
        for image in stack:
            logits = []
            for r in image:
                hidden = nn.functional.conv2d(r[None], conv.weight, padding=1).clamp_min(0)
                scale = norm.weight / (norm.running_var + norm.eps).sqrt()
                hidden = (hidden - norm.running_mean[:, None, None]) * scale[:, None, None]
                pooled = (hidden + norm.bias[:, None, None]).mean((2, 3))[0]
                logits.append(last.weight @ pooled + last.bias)
            rows.append(torch.stack(logits).exp() / torch.stack(logits).exp().sum(0))
        weights.append(torch.stack(rows))
    w = torch.stack(weights, 1)  # [B, n, b, 1 or C]
    parts = []
    for j in range(w.shape[1]):
        total = torch.zeros_like(stack[:, 0])
        for i in range(stack.shape[1]):
            total += w[:, j, i, :, None, None] * stack[:, i]
        parts.append(total)
    return torch.cat(parts, 1), w


@pytest.mark.smoke
@pytest.mark.parametrize("granularity", ["scalar", "channel"])
def test_equals_an_independent_computation(granularity: str) -> None:
    torch.manual_seed(0)
    mix = Amalgamation(5, 3, granularity, hidden=16).double()
    mix(torch.randn(4, 2, 5, 6, 6, dtype=torch.float64))  # running statistics that matter
    mix.eval()
    stack = torch.randn(2, 4, 5, 6, 7, dtype=torch.float64)
    extra = torch.randn(2, 2, 6, 7, dtype=torch.float64)
    with torch.no_grad():
        out = mix(stack, extra)
        features, weights = by_hand(mix, stack)
    found = out.weights if granularity == "channel" else out.weights[..., None]
    torch.testing.assert_close(found.double(), weights, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(out.features[:, :15], features, atol=1e-5, rtol=1e-5)
    assert torch.equal(out.features[:, 15:], extra)
    sparsity = sum(weights[:, j].norm(dim=1).mean(-1) for j in range(3))
    pairs = sum(
        (weights[:, j] - weights[:, k]).norm(dim=1).mean(-1)
        for j in range(3)
        for k in range(3)
        if j != k
    )
    torch.testing.assert_close(out.sparsity.double(), sparsity, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.diversity.double(), pairs / 2, atol=1e-5, rtol=1e-5)
    loss = amalgamation_loss(torch.tensor(2.0), out, 0.3, 0.7)
    expected = 2 - 0.3 * sparsity.mean() - 0.7 / 2 * pairs.mean()
    assert float(loss) == pytest.approx(float(expected), abs=1e-5)


@given(st.integers(2, 5), st.integers(1, 3), st.sampled_from(["scalar", "channel"]), st.integers(0))
@examples(20)
def test_invariants(b: int, n: int, granularity: str, seed: int) -> None:
    torch.manual_seed(seed % 1000)
    mix = Amalgamation(3, n, granularity, hidden=8).eval()
    stack = torch.randn(2, b, 3, 4, 4)
    out = mix(stack)
    assert out.weights.shape == ((2, n, b) if granularity == "scalar" else (2, n, b, 3))
    assert bool((out.weights >= 0).all())
    torch.testing.assert_close(out.weights.sum(2), torch.ones_like(out.weights.sum(2)))
    norms = out.weights.norm(dim=2)
    assert bool((norms >= 1 / math.sqrt(b) - 1e-6).all() and (norms <= 1 + 1e-6).all())
    gaps = (out.weights[:, :1] - out.weights).norm(dim=2)
    assert bool((gaps <= math.sqrt(2) + 1e-6).all())
    if n == 1:
        assert out.diversity.tolist() == [0, 0]
    order = torch.randperm(b)
    moved = mix(stack[:, order])
    torch.testing.assert_close(moved.weights, out.weights[:, :, order])
    torch.testing.assert_close(moved.features, out.features)
    same = mix(stack[:, :1].expand(-1, b, -1, -1, -1))
    torch.testing.assert_close(same.features, stack[:, 0].repeat(1, n, 1, 1))


def test_channel_and_scalar_agree_where_the_rows_of_the_last_layer_do() -> None:
    torch.manual_seed(0)
    scalar, channel = Amalgamation(4, 2, "scalar"), Amalgamation(4, 2, "channel")
    for a, b in zip(scalar.assigners, channel.assigners, strict=True):
        state = a.state_dict()
        state["6.weight"] = state["6.weight"].expand(4, -1)
        state["6.bias"] = state["6.bias"].expand(4)
        b.load_state_dict(state)
    stack = torch.randn(3, 3, 4, 5, 5)
    ours, theirs = scalar.eval()(stack), channel.eval()(stack)
    torch.testing.assert_close(ours.features, theirs.features)
    torch.testing.assert_close(ours.sparsity, theirs.sparsity)
    torch.testing.assert_close(ours.diversity, theirs.diversity)


def test_identical_assigners_have_finite_gradients() -> None:
    mix = Amalgamation(3, 2, dropout=0.0)
    mix.assigners[1].load_state_dict(mix.assigners[0].state_dict())
    out = mix(torch.randn(2, 3, 3, 4, 4))
    assert float(out.diversity.detach().max()) < 1e-5
    amalgamation_loss(torch.tensor(0.0), out, 0.1, 0.1).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mix.parameters())
    fresh = Amalgamation(3, 2).eval()(torch.randn(2, 3, 3, 4, 4))
    assert float(fresh.diversity.detach().min()) > 1e-4  # each begins elsewhere


def test_two_assigners_count_once() -> None:
    w = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    from content_shift.amalgamation import _diversity, _sparsity

    out = AmalgamationOutput(w, w, _sparsity(w), _diversity(w))
    assert float(amalgamation_loss(torch.tensor(0.0), out, 0.0, 1.0)) == pytest.approx(-(2**0.5))
    assert float(amalgamation_loss(torch.tensor(0.0), out, 1.0, 0.0)) == pytest.approx(-2)


def test_pixels_and_norms() -> None:
    torch.manual_seed(0)
    mix = Amalgamation(4, 2, kind="pixel", hidden=8)
    stack = torch.randn(6, 3, 4)
    assert mix(stack, torch.randn(6, 2)).features.shape == (6, 10)
    with pytest.raises(InputError, match="batch statistics"):
        mix(stack[:1])
    assert mix.eval()(stack[:1]).features.shape == (1, 8)
    grouped = Amalgamation(4, 2, kind="pixel", hidden=8, norm="group", dropout=0.0)
    alone = torch.cat([grouped(stack[i : i + 1]).features for i in range(6)])
    torch.testing.assert_close(alone, grouped(stack).features)
    half = Amalgamation(4, 2, "channel").eval().bfloat16()(torch.randn(1, 2, 4, 4, 4).bfloat16())
    assert half.features.dtype == torch.bfloat16
    assert half.weights.dtype == torch.float32


def test_the_walk_is_seeded_and_resumes() -> None:
    torch.manual_seed(0)
    out = Amalgamation(3, 1).eval()(torch.randn(2, 3, 3, 4, 4))
    losses = torch.rand(400, generator=torch.Generator().manual_seed(1)) + 1

    def gammas(walk: GammaWalk, part: slice) -> list[float]:
        found = []
        for loss in losses[part]:
            term = walk.term(loss, out)
            assert float(term.detach()) == pytest.approx(-walk_gamma[0] * float(loss), abs=1e-9)
            walk_gamma[0] = walk.gamma
            found.append(walk.gamma)
        return found

    walk_gamma = [0.0]
    whole = gammas(GammaWalk(seed=3), slice(None))
    assert min(whole) >= 0
    assert max(whole) > 0
    assert len(set(whole)) > 3
    walk_gamma = [0.0]
    first = GammaWalk(seed=3)
    gammas(first, slice(0, 203))
    second = GammaWalk(seed=9)
    second.load_state_dict(first.state_dict())
    assert gammas(second, slice(203, None)) == whole[203:]


def test_bad_input_is_refused() -> None:
    mix = Amalgamation(3, 2).eval()
    for call in (
        lambda: mix(torch.randn(2, 1, 3, 4, 4)),
        lambda: mix(torch.randn(2, 3, 4, 4, 4)),
        lambda: mix(torch.randn(2, 3, 3)),
        lambda: mix(torch.randn(2, 3, 3, 4, 4), torch.randn(2, 1, 5, 5)),
        lambda: Amalgamation(0),
    ):
        with pytest.raises(InputError):
            call()


@pytest.mark.usefixtures("without_type_checks")
def test_unknown_options_are_refused() -> None:
    for options in ({"granularity": "layer"}, {"kind": "token"}, {"norm": "layer"}):
        with pytest.raises(InputError, match="accepted"):
            Amalgamation(3, **options)

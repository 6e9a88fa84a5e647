"""The hybrid loss: its limits, its gradient in closed form, one denominator, fused = plain."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import abkd
from bridge_garden import Risk, Static, StepInfo, fused_hybrid_loss, hybrid_loss
from shared_core.errors import InputError


def pair(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    student = torch.randn(*shape, dtype=dtype, requires_grad=True)
    return student, 2 * torch.randn(*shape, dtype=dtype), torch.randint(shape[-1], shape[:-1])


def grad(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


@pytest.mark.smoke
def test_soft_alone_is_abkd_and_hard_alone_is_cross_entropy() -> None:
    z, t, y = pair(2, 4, 7)
    y[0, :2] = -100
    for name in ("fkl", "rkl", "jsd", "tv", ("ab", 0.2, 0.7)):
        exponents = {} if isinstance(name, str) else {"alpha": name[1], "beta": name[2]}
        label = name if isinstance(name, str) else name[0]
        soft = hybrid_loss(z, t, y, weight="soft", divergence=name).loss
        theirs = abkd.divergence(label, z, t, mask=y != -100, **exponents)
        torch.testing.assert_close(soft, theirs, rtol=1e-14, atol=0)
        torch.testing.assert_close(grad(soft, z), grad(theirs, z), rtol=1e-13, atol=1e-16)
    hard = hybrid_loss(z, t, y, weight="hard", hard_labels="labels").loss
    ce = F.cross_entropy(z.flatten(0, 1), y.flatten(), ignore_index=-100)
    torch.testing.assert_close(hard, ce, rtol=1e-13, atol=0)
    torch.testing.assert_close(grad(hard, z), grad(ce, z), rtol=1e-12, atol=1e-15)
    argmax = hybrid_loss(z, t, weight="hard").loss
    torch.testing.assert_close(argmax, F.cross_entropy(z.flatten(0, 1), t.argmax(-1).flatten()))


@pytest.mark.parametrize("weight", ["static:0.3", "confidence", "entropy", "entropy:power"])
def test_gradient_is_that_of_the_mixed_target(weight: str) -> None:
    z, t, _ = pair(3, 5, 6)
    out = hybrid_loss(z, t, weight=weight)
    p, lam = torch.softmax(t, -1), out.weight.unsqueeze(-1)
    target = lam * p + (1 - lam) * F.one_hot(t.argmax(-1), 6)
    mixed = -(target * torch.log_softmax(z, -1)).sum(-1).mean()
    torch.testing.assert_close(grad(out.loss, z), grad(mixed, z), rtol=1e-10, atol=1e-15)
    entropy = -(p * p.log()).sum(-1, keepdim=True)
    value = mixed - (lam * entropy).mean()
    torch.testing.assert_close(out.loss, value, rtol=1e-12, atol=0)
    torch.testing.assert_close(out.loss.detach(), out.soft + out.hard)


def test_the_weight_gets_no_gradient_and_the_teacher_is_refused_one() -> None:
    z, t, y = pair(1, 3, 4)
    # The student's own statistics set λ here: a gradient through it would be seen.
    wsl = hybrid_loss(z, t, y, weight="wsl", hard_labels="labels")
    fixed = wsl.weight.flatten()
    again = hybrid_loss(z, t, y, weight=lambda s, at: fixed[s.rows], hard_labels="labels")
    torch.testing.assert_close(grad(wsl.loss, z), grad(again.loss, z))
    with pytest.raises(InputError, match="teacher"):
        hybrid_loss(z, t.requires_grad_(), y)


def test_hard_labels() -> None:
    t = torch.tensor([[[2.0, 0.0, 0.0], [2.0, 2.0, 0.0]]], dtype=torch.float64)
    z = torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([[1, 0]])
    ce = -torch.log_softmax(z, -1)
    kw = {"weight": "hard"}
    torch.testing.assert_close(
        hybrid_loss(z, t, y, **kw).loss,
        (ce[0, 0, 0] + ce[0, 1, 0]) / 2,  # ties: the lowest id
    )
    torch.testing.assert_close(
        hybrid_loss(z, t, y, hard_labels="both_agree", **kw).loss, ce[0, 1, 0] / 2
    )
    torch.testing.assert_close(
        hybrid_loss(z, t, y, hard_labels="labels", **kw).loss, (ce[0, 0, 1] + ce[0, 1, 0]) / 2
    )


def test_own_tokens_of_the_student_are_never_trained_on() -> None:
    z, t, _ = pair(2, 3, 5)
    own = (t.argmax(-1) + 1) % 5  # what the student sampled is never the teacher's choice
    for kind in ("teacher_argmax", "both_agree"):
        g = grad(hybrid_loss(z, t, own, weight="hard", hard_labels=kind).loss, z)[0]
        # Cross-entropy lowers the loss by raising its label: that gradient is negative.
        assert (g.gather(-1, own.unsqueeze(-1)) >= 0).all()


@pytest.mark.parametrize("hard_labels", ["labels", "teacher_argmax"])
def test_risk_in_the_mixture(hard_labels: str) -> None:
    z, t, y = pair(2, 5, 6)
    y[:, ::2] = t.argmax(-1)[:, ::2]
    y[1, 4] = -100
    risk = Risk(alpha=0.3)
    out = hybrid_loss(z, t, y, weight="static:0.25", hard_labels=hard_labels, risk=risk)
    V, total = torch.logsumexp(z, -1), 0.0
    for b, length in ((0, 5), (1, 4)):
        for i in range(length - 1):
            a = y[b, i] if hard_labels == "labels" else t[b, i].argmax()
            if a == y[b, i]:  # else the next position is not the state after a*
                total = total + 0.75 * 0.3 / 4 * (V[b, i + 1] - z[b, i, a]) ** 2
    torch.testing.assert_close(out.loss.detach() - out.soft - out.hard, (total / 9).detach())
    torch.testing.assert_close(out.risk, (total / 9).detach())
    plain = hybrid_loss(z, t, y, weight="static:0.25", hard_labels=hard_labels).loss
    torch.testing.assert_close(grad(out.loss, z)[0], grad(plain + total / 9, z)[0])


def test_discounted_risk_discounts_the_cross_entropy() -> None:
    z, t, y = pair(1, 3, 4)
    kw = {"weight": "hard", "hard_labels": "labels"}
    out = hybrid_loss(z, t, y, risk=Risk(0.0, gamma=0.5), **kw)
    ce = F.cross_entropy(z[0], y[0], reduction="none")
    torch.testing.assert_close(out.loss, (ce * torch.tensor([1, 0.5, 0.25])).sum() / 3)


RISKS = [None, Risk(0.2), Risk(0.2, 0.9, "official")]


@pytest.mark.parametrize("risk", RISKS)
@pytest.mark.parametrize("chunk", [1, 3, "auto"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fused_is_plain(risk: Risk | None, chunk: int | str, dtype: torch.dtype) -> None:
    h = torch.randn(2, 5, 8, dtype=dtype, requires_grad=True)
    W = torch.randn(11, 8, dtype=dtype, requires_grad=True)
    th, tW = torch.randn(2, 5, 6, dtype=dtype), torch.randn(11, 6, dtype=dtype)
    y = torch.randint(11, (2, 5))
    y[0, :2] = -100
    kw = {"weight": "confidence", "risk": risk, "hard_labels": "labels"}
    fused = fused_hybrid_loss(h, W, th, tW, y, chunk_size=chunk, **kw)
    plain = hybrid_loss(h @ W.T, th @ tW.T, y, **kw)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for a, b in zip(
        (fused.loss, fused.risk, fused.weight, *grad(fused.loss, h, W)),
        (plain.loss, plain.risk, plain.weight, *grad(plain.loss, h, W)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_no_tensor_of_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    N, V = 24, 501
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for one in out if isinstance(out, tuple | list) else (out,):
                if isinstance(one, Tensor) and one.ndim and one.shape[-1] == V:
                    largest = max(largest, one.numel() // V)
            return out

    h, W = torch.randn(2, 12, 4, requires_grad=True), torch.randn(V, 4, requires_grad=True)
    y = torch.randint(V, (2, 12))
    with Watch():
        out = fused_hybrid_loss(
            h, W, torch.randn(2, 12, 4), torch.randn(V, 4), y, chunk_size=5, risk=Risk(0.1)
        )
        out.loss.backward()
    assert 1 <= largest <= 5 < N


def test_one_denominator_under_accumulation() -> None:
    z, t, y = pair(4, 5, 6)
    y[0, :4], y[2, :] = -100, -100
    kw = {"weight": "confidence", "hard_labels": "labels", "risk": Risk(0.2)}
    whole = hybrid_loss(z, t, y, **kw).loss
    count = float((y != -100).sum())
    parts = sum(
        hybrid_loss(z[i : i + 2], t[i : i + 2], y[i : i + 2], n_valid=count, **kw).loss
        for i in (0, 2)
    )
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad(parts, z), grad(whole, z), rtol=1e-12, atol=1e-16)


def test_padding_rows_of_heads_have_no_part() -> None:
    """151,936 against 152,064 rows for one tokenizer, in small: 12 and 14 for 10 tokens."""
    h = torch.randn(1, 3, 4, dtype=torch.float64)
    th = torch.randn(1, 3, 4, dtype=torch.float64)
    W, tW = torch.randn(12, 4, dtype=torch.float64), torch.randn(14, 4, dtype=torch.float64)
    tW[10:] = 50 * th[0, 0]  # a padding row that would win the argmax
    W.requires_grad_()
    kw = {"weight": "entropy", "statistics": ("teacher_argmax",)}
    out = fused_hybrid_loss(h, W, th, tW, vocab=10, **kw)
    assert (out.statistics["teacher_argmax"] < 10).all()
    small = hybrid_loss(h @ W[:10].T, th @ tW[:10].T, **kw)
    torch.testing.assert_close(out.loss, small.loss)
    torch.testing.assert_close(out.weight, small.weight)  # log 10, not log 12
    assert grad(out.loss, W)[0][10:].abs().sum() == 0
    cut = hybrid_loss(h @ W.T, th @ tW.T, vocab=10, **kw)
    torch.testing.assert_close(cut.loss, small.loss)


def test_shift_and_mask() -> None:
    z, t, y = pair(2, 4, 5)
    kw = {"hard_labels": "labels", "risk": Risk(0.1)}
    a = hybrid_loss(z, t, y, shift=True, **kw)
    b = hybrid_loss(z[:, :-1], t[:, :-1], y[:, 1:], **kw)
    torch.testing.assert_close(a.loss, b.loss)
    mask = torch.tensor([[True, False, True, True], [False] * 4])
    masked = hybrid_loss(z, t, y, mask=mask)
    ignored = hybrid_loss(z, t, torch.where(mask, y, -100))
    torch.testing.assert_close(masked.loss, ignored.loss)
    assert masked.weight[~mask].abs().sum() == 0
    assert masked.weight_mean == masked.weight.sum() / 3


def test_one_token_responses() -> None:
    """[B, 1] weights must not spread over the batch."""
    z, t, y = pair(3, 1, 5)
    out = hybrid_loss(z, t, y, weight="confidence")
    each = [hybrid_loss(z[i : i + 1], t[i : i + 1], y[i : i + 1]).loss for i in range(3)]
    torch.testing.assert_close(out.loss, sum(each) / 3)
    assert out.weight.shape == (3, 1)


@pytest.mark.filterwarnings("ignore:.*no valid:UserWarning")
@pytest.mark.filterwarnings("ignore:.*token:UserWarning")
def test_no_valid_position_is_zero() -> None:
    z, t, y = pair(1, 3, 4)
    out = hybrid_loss(z, t, torch.full_like(y, -100), risk=Risk(0.1))
    assert out.loss.item() == 0
    assert out.weight_mean.item() == 0
    assert grad(out.loss, z)[0].abs().sum() == 0


def test_masked_positions_may_hold_anything() -> None:
    z, t, y = pair(1, 3, 4)
    y[0, 0] = -100
    t = t.clone()
    t[0, 0] = math.nan
    out = hybrid_loss(z, t, y, risk=Risk(0.1), hard_labels="labels")
    assert out.loss.isfinite()
    assert grad(out.loss, z)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    z, t, y = pair(2, 3, 9, dtype=torch.float32)
    low_z, low_t = z.detach().to(dtype).requires_grad_(), (40 * t).to(dtype)
    out = hybrid_loss(low_z, low_t, y, weight="entropy", risk=Risk(0.1), hard_labels="labels")
    high = hybrid_loss(
        low_z.float(), low_t.float(), y, weight="entropy", risk=Risk(0.1), hard_labels="labels"
    )
    torch.testing.assert_close(out.loss.float(), high.loss, rtol=1e-5, atol=1e-6)
    assert grad(out.loss, low_z)[0].isfinite().all()


def test_logit_gaps_of_200_are_finite() -> None:
    z = torch.tensor([[[200.0, 0.0, -200.0]]], requires_grad=True)
    t = torch.tensor([[[-200.0, 0.0, 200.0]]])
    for weight in ("confidence", "entropy", "entropy:power", "static:0.5"):
        out = hybrid_loss(z, t, torch.tensor([[2]]), weight=weight)
        assert out.loss.isfinite()
        assert grad(out.loss, z)[0].isfinite().all()


def test_curriculum_follows_the_step() -> None:
    z, t, y = pair(1, 2, 4)
    means = [
        hybrid_loss(z, t, y, weight="curriculum:0.4", at=StepInfo(s, 10)).weight_mean.item()
        for s in (0, 1, 2, 9)
    ]
    assert means == pytest.approx([0, 0.2, 0.4, 0.4])


@pytest.mark.usefixtures("without_type_checks")
def test_errors() -> None:
    z, t, y = pair(1, 3, 4)
    cases = [
        ("outside", lambda: hybrid_loss(z, t, weight=lambda s, at: s.teacher_max_prob + 1)),
        ("accepted: soft", lambda: hybrid_loss(z, t, weight="hopeful")),
        ("teacher_argmax, labels", lambda: hybrid_loss(z, t, y, hard_labels="gold")),
        ("needs labels", lambda: hybrid_loss(z, t, hard_labels="labels")),
        ("pass labels", lambda: hybrid_loss(z, t, risk=Risk())),
        ("labels has shape", lambda: hybrid_loss(z, t, y[:, :2])),
        ("accepted", lambda: hybrid_loss(z, t, y, divergence="kl")),
        ("accepted: 1 to 4", lambda: hybrid_loss(z, t, y, vocab=9)),
        ("temperature", lambda: hybrid_loss(z, t, y, temperature=0.0)),
        ("classes", lambda: hybrid_loss(z, t[..., :3], y)),
        ("label", lambda: hybrid_loss(z, t, y + 7, hard_labels="labels")),
    ]
    for message, call in cases:
        with pytest.raises(InputError, match=message):
            call()


def test_static_accepts_the_class() -> None:
    z, t, y = pair(1, 3, 4)
    named = hybrid_loss(z, t, y, weight="static:0.2").loss
    torch.testing.assert_close(hybrid_loss(z, t, y, weight=Static(0.2)).loss, named)


@pytest.mark.cuda
def test_amp_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    h = torch.randn(4, 8, 32, device="cuda", requires_grad=True)
    W = torch.randn(500, 32, device="cuda", requires_grad=True)
    th, tW = torch.randn(4, 8, 32, device="cuda"), torch.randn(500, 32, device="cuda")
    y = torch.randint(500, (4, 8), device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        low = fused_hybrid_loss(h, W, th, tW, y, risk=Risk(0.1))
    high = fused_hybrid_loss(h, W, th, tW, y, risk=Risk(0.1))
    torch.testing.assert_close(low.loss, high.loss, rtol=5e-2, atol=5e-2)

"""The fused loss equals the plain one, per-token hooks included, and makes no [N, V] tensor."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from abkd import TokenStatistics, distillation_loss, fused_linear_ab_divergence

N, V, HS, HT = 23, 37, 5, 7


class World:
    """A student and a teacher with heads, and some per-token settings."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        g = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

        self.h, self.W = draw(N, HS).requires_grad_(), draw(V, HS).requires_grad_()
        self.b = draw(V).requires_grad_()
        self.th, self.tW, self.tb = draw(N, HT), draw(V, HT), draw(V)
        self.labels = torch.randint(0, V, (N,), generator=g)
        self.labels[::4] = -100
        self.weight = torch.rand(N, generator=g).to(dtype)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.h, self.W, self.b]

    def logits(self, cap: float | None = None, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        z = scale * F.linear(self.h, self.W, self.b)
        t = F.linear(self.th, self.tW, self.tb)
        return (z if cap is None else cap * torch.tanh(z / cap)), t


def confident(seen: TokenStatistics) -> tuple[Tensor, Tensor]:
    return 1 - seen.teacher_max_prob, seen.teacher_max_prob


SETTINGS = [
    {},
    {"divergence": "fkl", "ce_weight": 0.3},
    {"alpha": 0.5, "beta": 0.5, "temperature": 2.0, "temperature_power": 2.0, "ce_weight": 1.0},
    {"ce_weight": 1.0, "weight_fn": confident, "hard_labels": "teacher_argmax"},
    {"ce_weight": 1.0, "hard_labels": "both_agree", "n_valid": 40.0},
    {"divergence": "jsd", "mix": 0.3, "ce_weight": 1.0, "weight_fn": confident},
]


@pytest.mark.smoke
@pytest.mark.parametrize("options", SETTINGS)
@pytest.mark.parametrize("chunk_size", [1, 4, 100])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_fused_equals_plain(options: dict, chunk_size: int, cap: float | None) -> None:
    w = World()
    names = ("teacher_entropy", "student_entropy", "teacher_argmax", "student_max_prob")
    common = dict(labels=w.labels, token_weight=w.weight, statistics=names, **options)
    z, t = w.logits(cap, scale=1.3)
    plain = distillation_loss(z, t, **common)
    fused = fused_linear_ab_divergence(
        w.h, w.W, w.th, w.tW, student_bias=w.b, teacher_bias=w.tb, student_softcap=cap,
        student_logit_scale=1.3, chunk_size=chunk_size, **common,
    )  # fmt: skip
    for name in ("loss", "kd", "ce", "per_token_kd", "per_token_ce", "soft_weight", "hard_weight"):
        torch.testing.assert_close(getattr(fused, name), getattr(plain, name))
    for name in names:
        torch.testing.assert_close(fused.statistics[name], plain.statistics[name])
    expected = torch.autograd.grad(2.5 * plain.loss, w.leaves)
    found = torch.autograd.grad(2.5 * fused.loss, w.leaves, retain_graph=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    again = torch.autograd.grad(2.5 * fused.loss, w.leaves)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.smoke
def test_plain_equals_its_definition(textbook: Callable[..., Tensor]) -> None:
    w = World()
    z, t = w.logits()
    valid = w.labels != -100
    out = distillation_loss(
        z, t, w.labels, temperature=2.0, temperature_power=2.0, ce_weight=0.7, kd_weight=1.5,
        token_weight=w.weight, ce_token_weight=1 - w.weight,
    )  # fmt: skip
    kd = textbook(z, t, 0.2, 0.7, 2.0)
    ce = F.cross_entropy(z, w.labels, reduction="none", ignore_index=-100)
    total = 1.5 * 4 * (w.weight * kd)[valid].sum() + 0.7 * ((1 - w.weight) * ce)[valid].sum()
    expected = total / valid.sum()
    torch.testing.assert_close(out.loss, expected)
    for a, b in zip(
        torch.autograd.grad(out.loss, w.leaves, retain_graph=True),
        torch.autograd.grad(expected, w.leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_a_mixed_target_is_the_soft_and_hard_term_together() -> None:
    """λ KL(p‖q) + (1-λ) CE(argmax p) has the gradient of cross-entropy with λp + (1-λ)e."""
    w = World()
    z, t = w.logits()
    p = t.softmax(-1)
    lam = 1 - p.max(-1).values
    out = distillation_loss(
        z, t, divergence="fkl", ce_weight=1.0, weight_fn=confident, hard_labels="teacher_argmax"
    )
    target = lam[:, None] * p + (1 - lam[:, None]) * F.one_hot(p.argmax(-1), V)
    (expected,) = torch.autograd.grad(F.cross_entropy(z, target), w.h, retain_graph=True)
    (found,) = torch.autograd.grad(out.loss, w.h)
    torch.testing.assert_close(found, expected)


def test_gradcheck() -> None:
    w = World()
    mask = torch.arange(N) < 5

    def loss(h: Tensor, W: Tensor, b: Tensor) -> Tensor:
        out = fused_linear_ab_divergence(
            h, W, w.th, w.tW, student_bias=b, labels=w.labels, mask=mask, ce_weight=0.5,
            student_softcap=4.0, temperature=1.7, chunk_size=2, return_label_logits=True,
        )  # fmt: skip
        return out.loss + (out.student_lse - out.label_logit).square().sum()

    assert torch.autograd.gradcheck(loss, w.leaves)


@pytest.mark.parametrize("hard_labels", ["labels", "teacher_argmax"])
def test_label_logits_are_differentiable_and_couple_positions(hard_labels: str) -> None:
    """Such as (LSE_{t+1} - z_t[label])², which crosses the borders of chunks."""
    w = World()
    z, t = w.logits()
    target = w.labels if hard_labels == "labels" else t.argmax(-1)
    valid = w.labels != -100
    options = {"labels": w.labels, "hard_labels": hard_labels, "return_label_logits": True}
    label = z.gather(-1, target.clamp(min=0)[:, None])[:, 0]
    pair = valid[1:] & valid[:-1]
    expected = ((z.logsumexp(-1)[1:] - label[:-1]) ** 2)[pair].sum()
    want = torch.autograd.grad(expected, w.leaves, retain_graph=True)
    for out in (
        distillation_loss(z, t, **options),
        fused_linear_ab_divergence(
            w.h, w.W, w.th, w.tW, student_bias=w.b, teacher_bias=w.tb, chunk_size=3, **options
        ),
    ):
        found = ((out.student_lse[1:] - out.label_logit[:-1]) ** 2)[pair].sum()
        torch.testing.assert_close(found, expected)
        for a, b in zip(torch.autograd.grad(found, w.leaves, retain_graph=True), want, strict=True):
            torch.testing.assert_close(a, b)
        assert (out.label_logit[~valid] == 0).all()


def test_statistics_equal_their_definitions() -> None:
    w = World()
    z, t = w.logits()
    kept: list[TokenStatistics] = []

    def look(seen: TokenStatistics) -> tuple[None, None]:
        kept.append(seen)
        assert not torch.is_grad_enabled()
        return None, None

    distillation_loss(z, t, w.labels, weight_fn=look, temperature=3.0, chunk_size=100)
    [seen] = kept
    p, q = (x[w.labels != -100].softmax(-1) for x in (t, z))
    labels = w.labels[w.labels != -100]
    assert torch.equal(seen.rows, (w.labels != -100).nonzero()[:, 0])
    assert seen.vocab_size == V
    torch.testing.assert_close(seen.teacher_max_prob, p.max(-1).values)
    torch.testing.assert_close(seen.teacher_entropy, -(p * p.log()).sum(-1))
    torch.testing.assert_close(seen.student_entropy, -(q * q.log()).sum(-1))
    torch.testing.assert_close(seen.teacher_power_sum(0.1), (p**0.1).sum(-1))
    torch.testing.assert_close(seen.teacher_label_prob, p.gather(-1, labels[:, None])[:, 0])
    torch.testing.assert_close(seen.student_label_prob, q.gather(-1, labels[:, None])[:, 0])
    assert torch.equal(seen.teacher_argmax, p.argmax(-1))
    assert torch.equal(seen.student_argmax, q.argmax(-1))
    one_hot = torch.tensor([[0.0, -math.inf]])
    sure = TokenStatistics(torch.tensor([0]), None, one_hot, one_hot)
    assert sure.teacher_entropy == 0
    assert sure.teacher_power_sum(0.1) == 1


class Largest(TorchDispatchMode):
    """Remembers the most elements that any operation returned."""

    size = 0
    matmuls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, Tensor) and not t._is_view():
                self.size = max(self.size, t.numel())
        self.matmuls += "mm" in func.__name__
        return out


def test_no_tensor_of_all_logits_is_made_and_a_frozen_head_costs_nothing() -> None:
    n, v, chunk = 64, 400, 8
    h, W = torch.randn(n, 4, requires_grad=True), torch.randn(v, 4, requires_grad=True)
    labels = torch.randint(0, v, (n,))
    counted = []
    for frozen in (False, True):
        W.requires_grad_(not frozen)
        with Largest() as seen:
            out = fused_linear_ab_divergence(
                h, W, torch.randn(n, 6), torch.randn(v, 6), labels=labels, ce_weight=0.5,
                chunk_size=chunk, weight_fn=confident, return_label_logits=True,
                statistics=["teacher_entropy"],
            )  # fmt: skip
            (out.loss + out.student_lse.sum()).backward()
        assert seen.size <= chunk * v < n * v
        counted.append(seen.matmuls)
    assert counted[0] - counted[1] == 2 * n // chunk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype: torch.dtype) -> None:
    exact, low = World(), World(dtype)
    results = []
    for w in (exact, low):
        out = fused_linear_ab_divergence(w.h, w.W, w.th, w.tW, labels=w.labels, ce_weight=1.0)
        results.append((out.loss, *torch.autograd.grad(out.loss, [w.h, w.W])))
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    for a, b in zip(results[1], results[0], strict=True):
        assert (a.double() - b).norm() <= tolerance * b.norm()
    assert results[1][2].dtype == dtype


def test_autocast() -> None:
    w = World(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = fused_linear_ab_divergence(w.h, w.W, w.th, w.tW)
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    low = [x.bfloat16() for x in (w.h, w.W, w.th, w.tW)]
    torch.testing.assert_close(out.loss, fused_linear_ab_divergence(*low).loss)
    assert w.W.grad.dtype == torch.float32


def test_padding_rows_of_a_head_get_nothing() -> None:
    w = World()
    more = torch.randn(9, HT, dtype=torch.float64)
    teacher = torch.cat([w.tW, more])
    found = fused_linear_ab_divergence(w.h, w.W, w.th, teacher, vocab=30)
    (gradient,) = torch.autograd.grad(found.loss, w.W)
    assert (gradient[30:] == 0).all()
    assert (gradient[:30] != 0).all()
    W = w.W.detach()[:30].requires_grad_()
    cut = fused_linear_ab_divergence(w.h, W, w.th, w.tW[:30])
    torch.testing.assert_close(found.loss, cut.loss)
    torch.testing.assert_close(gradient[:30], torch.autograd.grad(cut.loss, W)[0])
    both = fused_linear_ab_divergence(w.h, w.W, w.th, teacher, vocab="intersection")
    torch.testing.assert_close(both.loss, fused_linear_ab_divergence(w.h, w.W, w.th, w.tW).loss)


def test_shares_of_a_batch_add_up() -> None:
    """Micro-batches of unequal numbers of tokens, with the step's denominator."""
    w = World()
    n = float((w.labels != -100).sum())
    options = {"ce_weight": 0.5, "n_valid": n}
    whole = fused_linear_ab_divergence(w.h, w.W, w.th, w.tW, labels=w.labels, **options)
    parts = [
        fused_linear_ab_divergence(w.h[s], w.W, w.th[s], w.tW, labels=w.labels[s], **options).loss
        for s in (slice(0, 5), slice(5, 6), slice(6, N))
    ]
    torch.testing.assert_close(sum(parts), whole.loss)


def test_no_valid_token() -> None:
    w = World()
    with pytest.warns(UserWarning, match="no valid position"):
        out = fused_linear_ab_divergence(
            w.h, w.W, w.th, w.tW, labels=torch.full((N,), -100), ce_weight=1.0
        )
    out.loss.backward()
    assert out.loss == 0
    assert (w.W.grad == 0).all()


H, W_ = torch.zeros(2, 3), torch.zeros(5, 3)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"student_hidden": torch.zeros(2, 4)}, "same H"),
        ({"teacher_hidden": torch.zeros(3, 3)}, "all but the last dimension"),
        ({"teacher_weight": torch.zeros(6, 3)}, "pass vocab=len"),
        ({"vocab": 6}, "1 to the smaller"),
        ({"vocab": "union"}, "vocab is 'union'"),
        ({"student_hidden": torch.zeros(2, 3).long()}, "floating-point"),
        ({"labels": torch.tensor([0, 5])}, r"label 5 is outside \[0, 5\)"),
        ({"labels": torch.tensor([0.0, 1.0])}, "integer class indices"),
        ({"labels": torch.tensor([0])}, "labels has shape"),
        ({"ce_weight": 1.0}, "needs labels"),
        ({"hard_labels": "argmax"}, "accepted: 'labels'"),
        ({"statistics": ["entropy"]}, "accepted: 'teacher_max_prob'"),
        ({"statistics": ["teacher_label_prob"]}, "no labels were given"),
        ({"weight_fn": lambda seen: (torch.ones(2, 2), None)}, "weight_fn returned soft weights"),
        ({"token_weight": torch.ones(3)}, "token_weight has shape"),
        ({"n_valid": 0.0}, "n_valid is 0"),
        ({"chunk_size": 0}, "at least 1 token"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"alpha": math.nan}, "alpha is not finite"),
        ({"teacher_weight": torch.zeros(5, 3, requires_grad=True)}, "requires gradients"),
        ({"student_hidden": torch.zeros(2, 3, device="meta")}, "move them to one device"),
    ],
)
def test_errors(options: dict, message: str) -> None:
    inputs = {"student_hidden": H, "student_weight": W_, "teacher_hidden": H, "teacher_weight": W_}
    with pytest.raises(ValueError, match=message):
        fused_linear_ab_divergence(**{**inputs, **options})


@pytest.mark.parametrize("classes", [511, 512, 700, 1024])
def test_the_first_of_equal_maxima_is_the_argmax(classes: int) -> None:
    """Also where the search goes by blocks, across their borders and in the last, shorter one."""
    lp = torch.zeros(6, classes)
    for row, places in enumerate([[0], [255, 256], [300, 400], [classes - 1], [510], []]):
        lp[row, places] = 1.0
    seen = TokenStatistics(torch.arange(6), None, lp, lp - 1)
    expected = torch.tensor([0, 255, 300, classes - 1, 510, 0])
    assert torch.equal(seen.teacher_argmax, expected)
    assert torch.equal(seen.student_argmax, expected)
    torch.testing.assert_close(seen.teacher_max_prob, torch.exp(lp.amax(-1) - 1))

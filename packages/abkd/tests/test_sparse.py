"""Top-k teachers: exact at K = V, bounds below, gradients, and what is refused."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from abkd import TokenStatistics, ab_divergence, distillation_loss
from abkd.sparse import sparse_ab_divergence, sparse_distillation_loss


def pair(n: int = 4, v: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    z, t = (2 * torch.randn(n, v, generator=g, dtype=torch.float64) for _ in range(2))
    return z.requires_grad_(), t.log_softmax(-1)


@pytest.mark.smoke
@pytest.mark.parametrize("tail", ["residual", "renormalize", "ignore"])
@pytest.mark.parametrize(("alpha", "beta"), [(0.2, 0.7), (1.0, 0.0), (0.0, 1.0), (0.8, 0.3)])
def test_all_classes_equal_dense(tail: str, alpha: float, beta: float) -> None:
    z, lp = pair()
    top = lp.topk(9)
    found = sparse_ab_divergence(z, top.indices, top.values, alpha=alpha, beta=beta, tail=tail)
    expected = ab_divergence(z, lp, alpha, beta)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, z)[0], torch.autograd.grad(expected, z)[0]
    )


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_the_residual_bound_rises_to_dense_when_the_exponents_sum_to_one(alpha: float) -> None:
    z, lp = pair()
    dense = ab_divergence(z, lp, alpha, 1 - alpha)
    last = torch.tensor(0.0, dtype=torch.float64)
    for k in range(1, 10):
        top = lp.topk(k)
        found = sparse_ab_divergence(z, top.indices, top.values, alpha=alpha, beta=1 - alpha)
        assert last - 1e-12 <= found <= dense + 1e-12
        last = found


@pytest.mark.parametrize("tail", ["residual", "renormalize", "ignore"])
def test_value_and_gradient_equal_autograd_of_the_definition(
    textbook: Callable[..., Tensor], tail: str
) -> None:
    z, lp = pair()
    top = lp.topk(3)
    q = z.softmax(-1).gather(-1, top.indices)
    p = top.values.exp()
    if tail == "residual":
        q = torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1)
        p = torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1)
    if tail == "renormalize":
        q, p = q / q.sum(-1, keepdim=True), p / p.sum(-1, keepdim=True)
    a, b = 0.2, 0.7
    terms = -(p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)) / (a * b)
    expected = terms.sum(-1).mean()
    for student in (z, (z, torch.eye(9, dtype=torch.float64))):
        found = sparse_ab_divergence(student, top.indices, top.values, tail=tail)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            torch.autograd.grad(found, z)[0],
            torch.autograd.grad(expected, z, retain_graph=True)[0],
        )


@pytest.mark.parametrize(("alpha", "beta"), [(0.2, 0.7), (0.0, 1.0), (1.0, 0.0), (0.5, 0.5)])
def test_a_tail_that_underflows_is_finite(alpha: float, beta: float) -> None:
    z = torch.tensor([[300.0, 0.0, 0.0, 0.0]], requires_grad=True)
    lp = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    loss = sparse_ab_divergence(z, torch.tensor([[0, 1]]), lp[:, :2], alpha=alpha, beta=beta)
    loss.backward()
    assert loss.isfinite()
    assert z.grad.isfinite().all()


def test_the_per_token_hooks_work_with_top_k() -> None:
    z, lp = pair()
    labels = lp.argmax(-1)

    def weights(seen: TokenStatistics) -> tuple[Tensor, Tensor]:
        return 1 - seen.teacher_max_prob, seen.teacher_max_prob

    options = {
        "labels": labels, "ce_weight": 1.0, "weight_fn": weights, "hard_labels": "teacher_argmax",
        "divergence": "fkl", "statistics": ["teacher_entropy", "teacher_label_prob"],
    }  # fmt: skip
    top = lp.topk(9)
    dense = distillation_loss(z, lp, **options)
    full = sparse_distillation_loss(z, top.indices, top.values, **options)
    torch.testing.assert_close(full.loss, dense.loss)
    for name in options["statistics"]:
        torch.testing.assert_close(full.statistics[name], dense.statistics[name])
    three = sparse_distillation_loss(z, top.indices[:, :3], top.values[:, :3], **options)
    torch.testing.assert_close(three.soft_weight, dense.soft_weight)
    # the tail, spread evenly, has the highest entropy that fits
    assert (three.statistics["teacher_entropy"] >= dense.statistics["teacher_entropy"]).all()


IDS, LOGS = torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.2]]).log()
Z = torch.zeros(1, 4)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topk_ids": torch.tensor([[0, 4]])}, r"id 4 is outside \[0, 4\)"),
        ({"topk_ids": torch.tensor([[-1, 0]])}, "id -1 is outside"),
        ({"topk_ids": torch.tensor([[1, 1]])}, "lists a class twice"),
        ({"topk_ids": torch.tensor([[0.0, 1.0]])}, "must be integers"),
        ({"topk_ids": torch.tensor([[0]])}, "both must be"),
        ({"topk_logprobs": torch.tensor([[2.0, 1.0]])}, "not logits"),
        ({"tail": "drop"}, "tail is 'drop'"),
        ({"temperature": 2.0}, "tail='renormalize'"),
        ({"lambda": 2.0}, "unknown setting 'lambda'"),
    ],
)
def test_errors(change: dict, message: str) -> None:
    inputs = {"student": Z, "topk_ids": IDS, "topk_logprobs": LOGS}
    with pytest.raises(ValueError, match=message):
        sparse_distillation_loss(**{**inputs, **change})

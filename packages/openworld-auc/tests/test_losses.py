"""The pairwise loss against a double loop, its gradients, and its edges; partitions."""

import math

import pytest
import torch

from openworld_auc import GatedPairwiseAUCLoss, gated_pairwise_auc_loss, losses, pseudo_partition

PAIR = {
    "square": lambda z: (1 - z) ** 2,
    "squared_hinge": lambda z: max(0.0, 1 - z) ** 2,
    "logistic": lambda z: math.log1p(math.exp(-z)),
    "exponential": lambda z: math.exp(-z),
}


def case(seed=0, n=12):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(n, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(n, generator=g, dtype=torch.float64, requires_grad=True)
    return scores, torch.arange(n) % 3 > 0, weight


@pytest.mark.smoke
@pytest.mark.parametrize("surrogate", PAIR)
def test_each_surrogate_is_a_double_loop(surrogate) -> None:
    scores, positive, weight = case()
    total, pairs = 0.0, 0
    for i in range(12):
        for j in range(12):
            if positive[i] and not positive[j]:
                z = (scores[i] - scores[j]).item()
                total += (weight[i] * weight[j]).item() * PAIR[surrogate](z)
                pairs += 1
    loss = GatedPairwiseAUCLoss(surrogate)
    assert loss(scores, positive, weight).item() == pytest.approx(total / pairs, rel=1e-12)
    summed = gated_pairwise_auc_loss(scores, positive, weight, surrogate=surrogate, reduction="sum")
    assert summed.item() == pytest.approx(total, rel=1e-12)
    assert torch.autograd.gradcheck(lambda s, w: loss(s, positive, w), (scores, weight))


def test_the_linear_form_is_the_pair_form(monkeypatch) -> None:
    scores, positive, weight = case(1, 90)
    pair = gated_pairwise_auc_loss(scores, positive, weight, margin=0.7)
    gradient = torch.autograd.grad(pair, (scores, weight))
    monkeypatch.setattr(losses, "MANY_PAIRS", 0)
    linear = gated_pairwise_auc_loss(scores, positive, weight, margin=0.7)
    assert linear.item() == pytest.approx(pair.item(), rel=1e-12)
    for one, other in zip(torch.autograd.grad(linear, (scores, weight)), gradient, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-14)


def test_order_and_unit_weights_do_not_matter() -> None:
    scores, positive, weight = case(2)
    order = torch.randperm(12)
    found = gated_pairwise_auc_loss(scores[order], positive[order], weight[order])
    assert found.item() == pytest.approx(gated_pairwise_auc_loss(scores, positive, weight).item())
    ones = gated_pairwise_auc_loss(scores, positive, torch.ones_like(weight))
    assert ones.item() == pytest.approx(gated_pairwise_auc_loss(scores, positive).item())


@pytest.mark.parametrize("positive", [True, False])
def test_without_pairs_it_is_zero_with_a_zero_gradient(positive) -> None:
    scores, _, weight = case(3)
    loss = gated_pairwise_auc_loss(scores, torch.full((12,), positive), weight)
    loss.backward()
    assert loss.item() == 0
    assert bool((scores.grad == 0).all())
    assert bool((weight.grad == 0).all())


@pytest.mark.parametrize("surrogate", PAIR)
def test_what_is_no_pair_cannot_overflow(surrogate) -> None:
    # Between positives the difference is 2000, whose exponential is infinite.
    scores = torch.tensor([1000.0, -1000.0, -1001.0], requires_grad=True)
    loss = gated_pairwise_auc_loss(
        scores, torch.tensor([True, True, False]), surrogate=surrogate, margin=1.0
    )
    loss.backward()
    assert loss.isfinite()
    assert scores.grad.isfinite().all()


@pytest.mark.cuda
def test_on_a_gpu_nothing_waits() -> None:
    scores, positive, weight = (x.detach().cuda() for x in case())
    scores.requires_grad_()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gated_pairwise_auc_loss(scores, positive, weight).backward()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.usefixtures("without_type_checks")
def test_bad_input() -> None:
    scores, positive, weight = case()
    with pytest.raises(ValueError, match="surrogate is 'hinge'"):
        GatedPairwiseAUCLoss("hinge")
    with pytest.raises(ValueError, match="reduction is 'max'"):
        gated_pairwise_auc_loss(scores, positive, reduction="max")
    with pytest.raises(ValueError, match="dtype bool"):
        gated_pairwise_auc_loss(scores, positive.long())
    with pytest.raises(ValueError, match=r"weight has shape \[3\]"):
        gated_pairwise_auc_loss(scores, positive, weight[:3])


@pytest.mark.parametrize("scheme", ["mod", "random"])
@pytest.mark.parametrize(("classes", "k"), [(5, 3), (6, 3), (18, 4), (4, 4), (7, 2)])
def test_each_class_is_pseudo_new_once(classes, k, scheme) -> None:
    g = torch.Generator().manual_seed(0)
    parts = pseudo_partition(classes, k, scheme=scheme, generator=g)
    assert sorted(c for p in parts for c in p.pseudo_new) == list(range(classes))
    sizes = [len(p.pseudo_new) for p in parts]
    assert max(sizes) - min(sizes) <= 1
    for part in parts:
        assert sorted(part.pseudo_base + part.pseudo_new) == list(range(classes))
        assert part.vocabulary == part.pseudo_base


def test_the_published_padding() -> None:
    parts = pseudo_partition(5, 3, official_padding=True)
    # ceil(5 * 2/3) = 4 columns: detectors 0 and 1 are short of one, detector 2 is not.
    assert [p.vocabulary for p in parts] == [(1, 2, 4, 0), (0, 2, 3, 1), (0, 1, 3, 4)]
    assert parts[0].pseudo_base == (1, 2, 4)


@pytest.mark.parametrize("k", [1, 6])
def test_a_partition_needs_both_sides(k) -> None:
    with pytest.raises(ValueError, match=f"k is {k} for 5 base classes"):
        pseudo_partition(5, k)

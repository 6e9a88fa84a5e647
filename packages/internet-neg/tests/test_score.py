"""The score against the softmax sum in float64, its limits, its invariances and its tails."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from internet_neg import InterNegError, grouped_score, mcm_score
from internet_neg.score import group_negatives, score_with_groups
from shared_core.metrics import auroc

Unit = Callable[..., Tensor]


def softmax_sum(v: Tensor, T: Tensor, groups: Tensor, scale: float) -> Tensor:
    """Eq. 11 as it is written, in float64."""
    values = []
    for Z in groups.double():
        logits = scale * v.double() @ torch.cat([T.double(), Z]).T
        values.append(torch.softmax(logits, dim=1)[:, : len(T)].sum(dim=1))
    return torch.stack(values).mean(dim=0)


@pytest.mark.smoke
@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("G", [1, 3, 7])
def test_the_closed_form_is_the_softmax_sum(unit: Unit, scale: float, G: int) -> None:
    v, T, Z = unit(20, 8, seed=1), unit(5, 8, seed=2), unit(23, 8, seed=3)
    kept = 23 // G * G
    permuted = Z
    if G > 1:
        permuted = Z[torch.randperm(kept, generator=torch.Generator().manual_seed(0))]
    groups = permuted[:kept].view(G, kept // G, 8)
    expected = softmax_sum(v, T, groups, scale)
    assert torch.allclose(grouped_score(v, T, Z, scale, G), expected, atol=1e-6)
    score = score_with_groups(v.double(), T.double(), groups.double(), scale)
    assert torch.allclose(score.margin, torch.logit(expected), atol=1e-6, rtol=1e-6)


def test_limits(unit: Unit) -> None:
    v, T, Z = unit(6, 8, seed=1), unit(4, 8, seed=2), unit(9, 8, seed=3)
    assert (grouped_score(v, T, Z[:0], 10.0) == 1).all()
    assert grouped_score(v, T, T, 10.0).tolist() == pytest.approx([0.5] * 6, abs=1e-12)
    twice = grouped_score(v, torch.cat([T, T]), torch.cat([Z, Z]), 10.0)
    assert torch.allclose(twice, grouped_score(v, T, Z, 10.0), atol=1e-6)
    permuted = grouped_score(v, T, Z.flip(0), 10.0)
    assert torch.allclose(permuted, grouped_score(v, T, Z, 10.0), atol=1e-6)
    for n in range(1, 9):
        assert (grouped_score(v, T, Z[: n + 1], 10.0) <= grouped_score(v, T, Z[:n], 10.0)).all()
    wins = (v @ T.T).amax(1) > (v @ Z.T).amax(1)
    assert torch.equal(grouped_score(v, T, Z, 1e6) > 0.5, wins)
    assert set(grouped_score(v, T, Z, 1e6).tolist()) == {0.0, 1.0}


def test_rotations_classes_and_a_constant_logit_change_nothing(unit: Unit) -> None:
    v, T, Z = (unit(n, 8, seed=n, dtype=torch.float64) for n in (6, 4, 9))
    Q = torch.linalg.qr(unit(8, 8, dtype=torch.float64)).Q
    expected = grouped_score(v, T, Z, 10.0, 3)
    assert torch.allclose(grouped_score(v @ Q, T @ Q, Z @ Q, 10.0, 3), expected)
    assert torch.allclose(grouped_score(v, T.flip(0), Z, 10.0, 3), expected)
    # A further dimension that all texts share is a constant added to every logit.
    wide = [torch.cat([x, torch.full((len(x), 1), 3.0)], dim=1) for x in (v, T, Z)]
    assert torch.allclose(grouped_score(*wide, 10.0, 3), expected)


def test_margins_rank_where_scores_are_tied() -> None:
    # One known text and one negative: the margin is s times the difference of two cosines.
    T, Z = torch.tensor([[1.0, 0.0]]), torch.tensor([[[0.0, 1.0]]])
    v = torch.tensor([[1.0, 0.0], [0.99, 0.0], [0.0, 0.99], [0.0, 1.0]])
    found = score_with_groups(v, T, Z, 101.0)
    assert found.margin.tolist() == pytest.approx([101, 99.99, -99.99, -101])
    assert found.score[0] == found.score[1] == 1.0
    groups = Z.repeat(4, 1, 1)
    grouped = score_with_groups(v, T, groups, 101.0)
    assert grouped.margin.tolist() == pytest.approx([101, 99.99, -99.99, -101])
    assert auroc(grouped.margin[:1], grouped.margin[1:2]) == 1.0
    assert auroc(grouped.score[:1], grouped.score[1:2]) == 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_neither_overflows_nor_ties(unit: Unit, dtype: torch.dtype) -> None:
    v, T, Z = (unit(n, 16, seed=n).to(dtype) for n in (8, 4, 6000))
    found = grouped_score(v, T, Z, 100.0, 5)
    assert found.dtype == torch.float64
    assert torch.allclose(found, grouped_score(v.float(), T.float(), Z.float(), 100.0, 5))


def test_batches_do_not_matter(unit: Unit) -> None:
    v, T, Z = unit(9, 8, seed=1), unit(4, 8, seed=2), unit(9, 8, seed=3)
    parts = [grouped_score(x, T, Z, 10.0, 2) for x in (v[:1], v[1:9], v[:0])]
    assert torch.allclose(torch.cat(parts), grouped_score(v, T, Z, 10.0, 2), atol=1e-6)
    strided = torch.stack([v, v], dim=2)[:, :, 1]
    assert torch.allclose(grouped_score(strided, T, Z, 10.0), grouped_score(v, T, Z, 10.0))


def test_groups_are_the_published_permutation() -> None:
    Z = torch.arange(11.0)[:, None]
    torch.manual_seed(0)
    published = torch.randperm(10)
    state = torch.get_rng_state()
    found = group_negatives(Z, 5)
    assert found.flatten().tolist() == published.tolist()
    assert torch.equal(torch.get_rng_state(), state)
    assert group_negatives(Z, 5, permute=False).flatten().tolist() == list(range(10))


def test_mcm_is_the_largest_probability(unit: Unit) -> None:
    v, T = unit(6, 8, seed=1), unit(4, 8, seed=2)
    for row, found in zip((v.double() @ T.double().T).tolist(), mcm_score(v, T), strict=True):
        total = sum(math.exp(x) for x in row)
        assert found.item() == pytest.approx(max(math.exp(x) for x in row) / total, rel=1e-6)
    assert torch.allclose(mcm_score(v, T, 0.1), torch.softmax(10 * v @ T.T, dim=1).amax(1))


@pytest.mark.usefixtures("without_type_checks")
def test_errors(unit: Unit) -> None:
    v, T, Z = unit(3, 8), unit(2, 8), unit(5, 8)
    for groups in (0, 6):
        with pytest.raises(InterNegError, match="accepted: 1 to 5"):
            grouped_score(v, T, Z, 10.0, groups)
    with pytest.raises(InterNegError, match="one model"):
        grouped_score(v[:, :4], T, Z, 10.0)
    with pytest.raises(InterNegError, match="temperature=0"):
        mcm_score(v, T, 0.0)


def test_the_gradient_of_the_score(unit: Unit) -> None:
    v, T, Z = (unit(n, 5, seed=n, dtype=torch.float64) for n in (3, 2, 6))
    v.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: grouped_score(x, T, Z, 7.0, 2), [v])

"""Selection against the formulas in float64, its invariances, its limits and its errors."""

import warnings
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from internet_neg import (
    InterNegError,
    NoAdmissibleNegativesError,
    admissible,
    base_distance,
    deviation,
    neglabel_select,
    select_negatives,
)
from shared_core.device import peak_memory
from shared_core.testing import examples

Unit = Callable[..., Tensor]


def world(unit: Unit, K: int = 5, n: int = 60, D: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Texts, class texts and proxies, such that about half of the texts are admissible."""
    T = unit(K, D, seed=1)
    P = torch.nn.functional.normalize(T + 3.0 * unit(K, D, seed=2), dim=-1)
    return unit(n, D, seed=3), T, P


def by_definition(E: Tensor, T: Tensor, P: Tensor) -> tuple[list[bool], list[float]]:
    """A(e) and delta(e) from the distances, one number at a time, in float64."""
    masks, deltas = [], []
    for e in E.double():
        differences = []
        for t, p in zip(T.double(), P.double(), strict=True):
            d = 1 - sum(a * b for a, b in zip(e.tolist(), p.tolist(), strict=True))
            base = 1 - sum(a * b for a, b in zip(t.tolist(), p.tolist(), strict=True))
            differences.append(d - base)
        masks.append(all(x > 0 for x in differences))
        deltas.append(sum(differences) / len(differences))
    return masks, deltas


@pytest.mark.smoke
def test_criterion_and_deviation_are_their_definitions(unit: Unit) -> None:
    E, T, P = world(unit)
    masks, deltas = by_definition(E, T, P)
    assert 5 < sum(masks) < 55
    assert admissible(E, T, P).tolist() == masks
    assert deviation(E, T, P).tolist() == pytest.approx(deltas, abs=1e-6)
    expected = (1 - base_distance(T, P)).mean() - E @ P.mean(0)
    assert deviation(E, T, P).tolist() == pytest.approx(expected.tolist(), abs=1e-6)


def test_no_class_name_is_admissible(unit: Unit) -> None:
    for seed in range(20):
        T, P = unit(7, 33, seed=seed), unit(7, 33, seed=seed + 50)
        assert not admissible(T, T, P).any()
        assert not admissible(T, T, T).any()


@pytest.mark.parametrize("M", [1, 7, 20])
def test_selected_words_are_the_best_admissible_ones_by_quota(unit: Unit, M: int) -> None:
    E, T, P = world(unit)
    nouns, adjectives = E[:40], E[40:]
    found_adj, found_noun = select_negatives(nouns, adjectives, T, P, M)
    expected = {}
    for name, part in (("adj", adjectives), ("noun", nouns)):
        masks, deltas = by_definition(part, T, P)
        order = sorted(range(len(part)), key=lambda i: -deltas[i])
        expected[name] = [i for i in order if masks[i]]
    n_adj, n_noun = len(expected["adj"]), len(expected["noun"])
    quota = M * n_adj // (n_adj + n_noun)
    assert found_adj.tolist() == expected["adj"][:quota]
    assert found_noun.tolist() == expected["noun"][: M - quota]


def test_all_admissible_words_are_taken_where_there_are_too_few(unit: Unit) -> None:
    E, T, P = world(unit)
    with pytest.warns(UserWarning, match=r"only \d+ admissible words for M=1000"):
        adj, noun = select_negatives(E[:40], E[40:], T, P, 1000)
    assert len(adj) + len(noun) == int(admissible(E, T, P).sum())


def test_ties_are_decided_by_the_vocabulary(unit: Unit) -> None:
    _, T, P = world(unit)
    e = -P.mean(0, keepdim=True) / P.mean(0).norm()
    _, noun = select_negatives(e.repeat(6, 1), e[:0], T, P, 3)
    assert noun.tolist() == [0, 1, 2]


@examples(25)
@given(chunk=st.integers(1, 70), seed=st.integers(0, 1000))
def test_chunks_and_rotations_change_nothing(chunk: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> Tensor:
        x = torch.randn(n, 6, generator=generator, dtype=torch.float64)
        return torch.nn.functional.normalize(x, dim=-1)

    E, T = draw(50), draw(3)
    P = torch.nn.functional.normalize(T + 0.5 * draw(3), dim=-1)
    Q = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    mask = admissible(E, T, P)
    assert torch.equal(mask, admissible(E, T, P, chunk=chunk))
    assert torch.equal(mask, admissible(E @ Q, T @ Q, P @ Q))
    assert torch.equal(mask, admissible(E, T.flip(0), P.flip(0)))
    if mask.any():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            one = select_negatives(E[:30], E[30:], T, P, 10)
            two = select_negatives(E[:30] @ Q, E[30:] @ Q, T @ Q, P @ Q, 10, chunk=chunk)
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_half_precision_and_strides_are_accepted(unit: Unit) -> None:
    E, T, P = world(unit)
    wide = torch.stack([E, E], dim=2)[:, :, 0]
    assert not wide.is_contiguous()
    assert torch.equal(admissible(wide, T, P), admissible(E, T, P))
    half = [x.half() for x in (E, T, P)]
    same = [x.float() for x in half]
    assert torch.equal(admissible(*half), admissible(*same))
    assert deviation(*half).dtype == torch.float32


@pytest.mark.parametrize("K", [1, 4, 20, 100])
def test_neglabels_percentile_in_both_modes(unit: Unit, K: int) -> None:
    E, T = unit(50, 8, seed=1), unit(K, 8, seed=2)
    cosines = (E.double() @ T.double().T).sort(dim=1).values
    place = 0.95 * (K - 1)
    low = int(place)
    high = min(low + 1, K - 1)
    linear = cosines[:, low] + (place - low) * (cosines[:, high] - cosines[:, low])
    index = cosines[:, min(int(0.95 * K), K - 1)]
    for mode, rating in (("linear", linear), ("index", index)):
        adj, noun = neglabel_select(E[:30], E[30:], T, 10, percentile_mode=mode)
        assert noun.tolist() == rating[:30].argsort()[:6].tolist()
        assert adj.tolist() == rating[30:].argsort()[:4].tolist()


def test_errors(unit: Unit) -> None:
    E, T, P = world(unit)
    with pytest.raises(NoAdmissibleNegativesError, match="none of 5 words"):
        select_negatives(T, T[:0], T, P, 3)
    with pytest.raises(InterNegError, match="M=0"):
        select_negatives(E, E[:0], T, P, 0)
    with pytest.raises(InterNegError, match="M=0"):
        neglabel_select(E, E[:0], T, 0)
    with pytest.raises(InterNegError, match="chunk=0"):
        admissible(E, T, P, chunk=0)


@pytest.mark.usefixtures("without_type_checks")
def test_errors_of_shape(unit: Unit) -> None:
    E, T, P = world(unit)
    with pytest.raises(InterNegError, match="all embeddings have to come from one model"):
        admissible(E[:, :4], T, P)
    with pytest.raises(InterNegError, match="one proxy per class"):
        base_distance(T, P[:3])
    with pytest.raises(InterNegError, match="percentile_mode"):
        neglabel_select(E, E[:0], T, 3, percentile_mode="nearest")
    with pytest.raises(InterNegError, match="percentile=2"):
        neglabel_select(E, E[:0], T, 3, percentile=2)


def test_memory_at_imagenets_size_stays_bounded() -> None:
    # V x K would be 280 MB in float32; the vocabulary itself is 143 MB.
    generator = torch.Generator().manual_seed(0)
    E = torch.randn(70_000, 512, generator=generator)
    E /= E.norm(dim=1, keepdim=True)
    T = torch.nn.functional.normalize(torch.randn(1000, 512, generator=generator), dim=1)
    P = torch.nn.functional.normalize(T + 0.05 * torch.randn(1000, 512, generator=generator), dim=1)
    with peak_memory() as peak:
        adj, noun = select_negatives(E[:58_000], E[58_000:], T, P, 2000)
    assert len(adj) + len(noun) == 2000
    if peak.bytes is not None:
        assert peak.bytes < 300e6


@pytest.mark.cuda
def test_a_gpu_selects_the_same_words(unit: Unit) -> None:
    E, T, P = world(unit, n=400)
    adjectives, nouns = E[:150], E[150:]
    expected = select_negatives(nouns, adjectives, T, P, 60)
    found = select_negatives(*(x.cuda() for x in (nouns, adjectives, T, P)), 60)
    for one, other in zip(found, expected, strict=True):
        assert one.cpu().tolist() == other.tolist()

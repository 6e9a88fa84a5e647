"""The ledger's three faces (whole texts, single states, samples) agree."""

import pytest
import torch

from bridge_garden.ledger import Ledger, WindowStudent
from shared_core.errors import InputError


@pytest.mark.parametrize(
    "ledger", [Ledger(rounds=3), Ledger(modulus=3, fillers_per_round=1, rounds=4)]
)
def test_texts_and_states_agree(ledger: Ledger) -> None:
    ids = ledger.sample(4, torch.Generator().manual_seed(0))
    ids[0] = torch.randint(ledger.vocab_size, (ledger.length,))  # any token may come anywhere
    ids[0, 0] = 0
    p = ledger.probs(ids[:, :-1])
    assert torch.allclose(p.sum(-1), torch.ones(1, dtype=torch.float64))
    totals = ledger.totals(ids)
    for row in range(2):
        state = ledger.initial
        for t, token in enumerate(ids[row, 1:].tolist()):
            torch.testing.assert_close(ledger.next_dist(state), p[row, t], rtol=0, atol=0)
            state = ledger.step(state, token)
            assert state.total == totals[row, t + 1]
        assert ledger.is_terminal(state)


@pytest.mark.smoke
def test_the_teacher_counts_from_operations_alone() -> None:
    ledger = Ledger(rounds=6)
    ids = ledger.sample(500, torch.Generator().manual_seed(0))
    digits = torch.where((ids >= 1) & (ids < 11), ids - 1, -1)
    ops = torch.where((ids >= 11) & (ids < 14), ids - 10, 0)
    truth = (digits[:, 1:2] + ops.cumsum(1)) % 10
    results = ledger.slots()["result"] + 1
    right = (digits == truth)[:, results].double().mean().item()
    assert right == pytest.approx(0.95, abs=0.015)
    assert (digits[:, results] >= 0).all()
    assert (ids[:, ledger.slots()["filler"] + 1] >= 14).all()


def test_student_windows_are_its_states() -> None:
    ledger = Ledger(rounds=2)
    student = WindowStudent(ledger.vocab_size)
    text = ledger.sample(1, torch.Generator().manual_seed(0))
    states = [ledger.initial]
    for token in text[0, 1:-1].tolist():
        states.append(ledger.step(states[-1], token))
    with torch.no_grad():
        torch.testing.assert_close(student(text[:, :-1])[0], student.on_states(states))


def test_student_samples_its_own_distribution() -> None:
    student = WindowStudent(4, window=2, width=8)
    ids = student.sample(4000, 3, torch.Generator().manual_seed(0))
    with torch.no_grad():
        p = torch.softmax(student(torch.zeros(1, 1, dtype=torch.int64))[0, 0], -1)
    seen = torch.bincount(ids[:, 1], minlength=4) / 4000
    assert (seen - p).abs().max() < 0.03


@pytest.mark.parametrize("bad", [{"rounds": 0}, {"modulus": 1}, {"ops": (0.5, 0.1)}, {"slip": 1.0}])
def test_impossible_ledgers(bad: dict[str, object]) -> None:
    with pytest.raises(InputError, match=r"ledger|probabilities"):
        Ledger(**bad)

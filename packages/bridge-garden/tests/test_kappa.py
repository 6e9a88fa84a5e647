"""κ by dynamic programming against enumeration of every text, and its identities."""

import itertools

import pytest
import torch

from bridge_garden import exact_decomposition, exact_kappa, kappa_mc, split
from bridge_garden.ledger import Ledger, LedgerState, WindowStudent
from shared_core.errors import InputError

TINY = Ledger(
    modulus=2, ops=(0.7, 0.3), fillers=2, fillers_per_round=1, rounds=2, slip=0.1, window=2
)


@pytest.fixture
def student() -> WindowStudent:
    return WindowStudent(TINY.vocab_size, window=2, width=8, embedding=4)


class Tree:
    """Five binary steps with an arbitrary teacher: the state is the whole prefix."""

    vocab_size = 3
    length = 5

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.table = {
            s: torch.softmax(2 * torch.randn(3, generator=generator, dtype=torch.float64), 0)
            for n in range(self.length)
            for s in itertools.product(range(3), repeat=n)
        }
        self.other = {
            s: torch.randn(3, generator=generator, dtype=torch.float64) for s in self.table
        }
        self.calls = 0

    def next_dist(self, state: tuple[int, ...]) -> torch.Tensor:
        return self.table[state]

    def step(self, state: tuple[int, ...], token: int) -> tuple[int, ...]:
        return (*state, token)

    def is_terminal(self, state: tuple[int, ...]) -> bool:
        return len(state) >= self.length

    def student(self, states: object) -> torch.Tensor:
        self.calls += 1
        return torch.stack([self.other[s] for s in states])


def loss(tree: Tree, s: tuple[int, ...]) -> float:
    p, lq = tree.table[s], torch.log_softmax(tree.other[s], 0)
    return (p * (p.log() - lq)).sum().item()


def override(tree: Tree, s: tuple[int, ...], a: int) -> float:
    """E[Σ ℓ] after forcing a at s, by listing every text that can follow."""
    total = 0.0
    rest = tree.length - len(s) - 1
    for text in itertools.product(range(3), repeat=rest):
        chance, state, sum_ = 1.0, (*s, a), 0.0
        for token in text:
            sum_ += loss(tree, state)
            chance *= tree.table[state][token].item()
            state = (*state, token)
        total += chance * sum_
    return total


@pytest.mark.smoke
def test_dynamic_programming_equals_brute_force() -> None:
    tree = Tree()
    states = [(), (1,), (2, 0), (0, 1, 2)]
    found = exact_kappa(tree, tree.student, states)
    assert tree.calls <= tree.length  # one call a depth
    for s, kappa in zip(states, found, strict=True):
        Q = [override(tree, s, a) for a in range(3)]
        mean = sum(tree.table[s][a].item() * Q[a] for a in range(3))
        for a in range(3):
            # The divergence's series is exact to a few 1e-12.
            assert kappa[a].item() == pytest.approx(Q[a] - mean, abs=2e-11)


def test_decomposition_equals_enumeration_and_kappa_explains_it() -> None:
    tree = Tree()
    found = exact_decomposition(tree, tree.student, {(): 1.0})
    fit = own = caused = 0.0
    for n in range(tree.length):
        states = list(itertools.product(range(3), repeat=n))
        kappas = exact_kappa(tree, tree.student, states)
        for s, kappa in zip(states, kappas, strict=True):
            d_teacher = d_own = 1.0
            for i, a in enumerate(s):
                d_teacher *= tree.table[s[:i]][a].item()
                d_own *= torch.softmax(tree.other[s[:i]], 0)[a].item()
            fit += d_teacher * loss(tree, s) / tree.length
            own += d_own * loss(tree, s) / tree.length
            q = torch.softmax(tree.other[s], 0)
            caused += d_own * (q * kappa).sum().item() / tree.length
    assert found.fit == pytest.approx(fit, abs=2e-11)
    assert found.inference == pytest.approx(own, abs=2e-11)
    assert found.bias == pytest.approx(caused, abs=2e-11)
    assert sum(found.attribution) == pytest.approx(found.bias, abs=1e-12)
    assert sum(found.per_position_fit) == pytest.approx(found.fit)
    assert sum(found.per_position_inference) == pytest.approx(found.inference)


def test_teacher_mean_of_kappa_is_zero(student: WindowStudent) -> None:
    states, state = [], TINY.initial
    for token in TINY.sample(1, torch.Generator().manual_seed(1))[0, 1:].tolist():
        states.append(state)
        state = TINY.step(state, token)
    kappa = exact_kappa(TINY, student.on_states, states, exclude=(0,))
    p = torch.stack([TINY.next_dist(s) for s in states])
    assert (p * kappa).sum(-1).abs().max() < 1e-12
    assert kappa[:, 0].abs().max() == 0
    assert kappa[-1].abs().max() == 0  # nothing follows the last token


def test_no_risk_where_the_token_changes_nothing() -> None:
    class Forgetful(Tree):
        """The state is the place alone."""

        def __init__(self) -> None:
            self.table = {n: torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64) for n in range(5)}

        def step(self, state: int, token: int) -> int:
            return state + 1

        def is_terminal(self, state: int) -> bool:
            return state >= 5

    found = exact_kappa(Forgetful(), lambda s: torch.randn(3).expand(len(s), 3), [0, 2])
    assert found.abs().max() < 1e-12


def test_monte_carlo_agrees(student: WindowStudent) -> None:
    ids = TINY.sample(1, torch.Generator().manual_seed(3))[0].tolist()
    position = 4  # the first result
    assert TINY.kind(position) == "result"
    state = TINY.initial
    for token in ids[1:position]:
        state = TINY.step(state, token)
    exact = exact_kappa(TINY, student.on_states, [state])[0]
    [found] = kappa_mc(
        student,
        lambda prefix: TINY.probs(prefix).log().clamp(min=-1e4),
        ids[:position],
        [position],
        n_alternatives=3,
        horizon=TINY.length - position - 1,
        n_rollouts=150,
        seed=1,
    )
    assert len(found.tokens) == len(set(found.tokens)) == 6
    for token, value, error in zip(found.tokens, found.kappa, found.standard_error, strict=True):
        assert abs(value - exact[token].item()) < 4 * error + 1e-9
    assert found.weight == pytest.approx(0.1)


def test_split() -> None:
    found = split(torch.arange(11.0), 0.2)
    assert (found.bridges, found.gardens) == ([10, 9], [0, 1])
    assert found.bridge_ties == found.garden_ties == 0
    tied = split(torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0]), 0.2)
    assert (tied.bridges, tied.bridge_ties, tied.garden_ties) == ([0], 4, 4)
    assert split(torch.ones(4), 0.2).bridges == []


@pytest.mark.usefixtures("without_type_checks")
def test_errors(student: WindowStudent) -> None:
    with pytest.raises(InputError, match="more than 5 states"):
        exact_kappa(TINY, student.on_states, [TINY.initial], limit=5)
    with pytest.raises(InputError, match="more than 5 states"):
        exact_decomposition(TINY, student.on_states, {TINY.initial: 1.0}, limit=5)
    end = LedgerState(TINY.length, 0, -1, (0, 0))
    with pytest.raises(InputError, match="terminal"):
        exact_kappa(TINY, student.on_states, [end])
    with pytest.raises(InputError, match="log-probabilities of shape"):
        exact_kappa(TINY, lambda s: torch.zeros(1, 2), [TINY.initial])
    for fraction in (0.0, 0.6):
        with pytest.raises(InputError, match="accepted"):
            split(torch.ones(3), fraction)
    with pytest.raises(InputError, match="NaN"):
        split(torch.tensor([1.0, float("nan")]))

    def model(ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*ids.shape, 4)

    with pytest.raises(InputError, match="outside the text"):
        kappa_mc(model, model, [1, 2], [0])
    with pytest.raises(InputError, match="at least 1"):
        kappa_mc(model, model, [1, 2], horizon=0)

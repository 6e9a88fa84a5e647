"""κ, the risk of a token, exactly: what one deviation from the teacher costs later.

With ℓ(s) = D(π_T(·|s) ‖ π_θ(·|s)), and the teacher followed from then on (Section on the
bridge-garden split)::

    G(s) = ℓ(s) + Σ_b π_T(b|s) G([s,b]),    G(end) = 0
    κ(a|s) = G([s,a]) - Σ_b π_T(b|s) G([s,b]),    κ(s) = Σ_a κ(a|s)

States with a large κ(s) are bridges, with a small one gardens. Two identities tie κ to exposure
bias: Σ_a π_T(a|s) κ(a|s) = 0, and, summed over a sequence,

    L_{d_θ} - L_{d_T} = Σ_{s∼d_θ} Σ_a π_θ(a|s) κ(a|s),

so that exposure bias is charged to the very tokens that cause it. Here both are computed without
sampling, for processes small enough to enumerate.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from abkd import divergence_terms
from shared_core.errors import InputError

__all__ = ["Decomposition", "Process", "Split", "exact_decomposition", "exact_kappa", "split"]

S = TypeVar("S", bound=Hashable)


@runtime_checkable
class Process(Protocol[S]):
    """A teacher that can be asked about any state. States that behave alike should be equal."""

    @property
    def vocab_size(self) -> int:
        """V."""

    def next_dist(self, state: S) -> Float[Tensor, " V"]:
        """π_T(·|state)."""

    def step(self, state: S, token: int) -> S:
        """The state after a token, also after one that the teacher never emits."""

    def is_terminal(self, state: S) -> bool:
        """Whether the sequence ends here."""


Student = Callable[[Sequence[S]], Tensor]


class _Layers(Generic[S]):
    """The states reachable from some roots, depth by depth, with ℓ and the transitions of each.

    The student is asked once a depth, for all its states together.
    """

    def __init__(
        self,
        process: Process[S],
        student: "Student[S]",
        roots: Sequence[S],
        tokens: Sequence[int],
        divergence: str,
        limit: int,
        follow_student: bool,
    ) -> None:
        terms = divergence_terms(divergence)
        self.index: list[dict[S, int]] = []
        self.loss: list[Tensor] = []
        self.teacher: list[Tensor] = []
        self.student: list[Tensor] = []
        self.next: list[Tensor] = []
        layer, total = dict.fromkeys(r for r in roots if not process.is_terminal(r)), 0
        while layer:
            states = list(layer)
            total += len(states)
            if total > limit:
                raise InputError(
                    f"more than {limit} states are reachable; shorten the process, make states "
                    "that behave alike equal, or raise limit="
                )
            lq = student(states).double()
            p = torch.stack([process.next_dist(s) for s in states]).double()
            if lq.shape != p.shape:
                raise InputError(
                    f"the student returned log-probabilities of shape {list(lq.shape)} for "
                    f"{len(states)} states of {p.shape[-1]} tokens"
                )
            lq = torch.log_softmax(lq, -1)
            self.index.append({s: i for i, s in enumerate(states)})
            self.loss.append(terms(lq, p.log())[0])
            self.teacher.append(p)
            self.student.append(lq.exp())
            following: dict[S, None] = {}
            edges = torch.full((len(states), p.shape[-1]), -1, dtype=torch.int64)
            order: dict[S, int] = {}
            allowed = (p > 0).tolist()
            for i, state in enumerate(states):
                for a in tokens:
                    if not (follow_student or allowed[i][a]):
                        continue
                    after = process.step(state, a)
                    if process.is_terminal(after):
                        continue
                    edges[i, a] = order.setdefault(after, len(order))
                    following[after] = None
            self.next.append(edges)
            layer = following

    def cost_to_go(self) -> list[tuple[Tensor, Tensor]]:
        """For each depth G ``[n]`` and G of the successors ``[n, V]``."""
        found: list[tuple[Tensor, Tensor]] = []
        below = torch.zeros(1, dtype=torch.float64)
        for loss, p, edges in zip(
            reversed(self.loss), reversed(self.teacher), reversed(self.next), strict=True
        ):
            # Edge -1 is the end, with G = 0 in the last place of `below`.
            after = below[edges]
            G = loss + (p * after).sum(-1)
            found.append((G, after))
            below = torch.cat([G, torch.zeros(1, dtype=torch.float64)])
        return found[::-1]


def _tokens(process: Process[S], exclude: Sequence[int]) -> list[int]:
    return [a for a in range(process.vocab_size) if a not in set(exclude)]


def exact_kappa(
    process: Process[S],
    student: "Student[S]",
    states: Sequence[S],
    *,
    divergence: str = "fkl",
    exclude: Sequence[int] = (),
    limit: int = 200_000,
) -> Float[Tensor, "n V"]:
    """κ(a|s) of every token in every state, by dynamic programming over reachable states.

    Args:
        process: The teacher.
        student: Log-probabilities (or logits) ``[n, V]`` of a list of states.
        states: Where κ is wanted; none may be terminal.
        divergence: ℓ; a name of `abkd.DIVERGENCES`.
        exclude: Tokens that are never emitted (padding, begin of text); their κ is 0. All others
            are tried, also those that the teacher gives no mass.
        limit: The most states to visit.

    Returns:
        κ, float64, as sums over the rest of the sequence (the paper's convention with the mean
        loss divides by its length). κ(s) is the sum over the last dimension.

    Raises:
        InputError: If more than `limit` states are reachable, or a state is terminal.

    Examples:
        >>> from bridge_garden.ledger import Ledger
        >>> ledger = Ledger(modulus=2, ops=(0.5, 0.5), fillers=2, fillers_per_round=1, rounds=1)
        >>> def even(states): return torch.zeros(len(states), ledger.vocab_size)
        >>> kappa = exact_kappa(ledger, even, [ledger.initial])
        >>> kappa.abs().max().item() < 1e-12  # a student that sees nothing is wrong everywhere
        True
    """
    for state in states:
        if process.is_terminal(state):
            raise InputError("a terminal state has no next token and no κ")
    tokens = _tokens(process, exclude)
    after = [process.step(s, a) for s in states for a in tokens]
    groups = _Layers(process, student, after, tokens, divergence, limit, follow_student=False)
    value: dict[S, float] = {}
    if groups.index:
        first = groups.cost_to_go()[0][0].tolist()
        value = {s: first[i] for s, i in groups.index[0].items()}
    Q = torch.zeros(len(states), process.vocab_size, dtype=torch.float64)
    following = iter(after)
    for i in range(len(states)):
        for a in tokens:
            Q[i, a] = value.get(next(following), 0.0)
    p = torch.stack([process.next_dist(s) for s in states]).double()
    kappa = Q - (p * Q).sum(-1, keepdim=True)
    outside = [a for a in range(process.vocab_size) if a not in tokens]
    kappa[:, outside] = 0.0
    return kappa


@dataclass(frozen=True)
class Decomposition:
    """Inference error = training fit + exposure bias, exactly, each as a mean over positions.

    Attributes:
        fit: L_{d_T}(π_θ), the loss on the teacher's prefixes.
        inference: L_{d_θ}(π_θ), the loss on the student's own.
        bias: Their difference.
        per_position_fit: Its summands by position (0 after the end), over the length.
        per_position_inference: Likewise.
        attribution: Σ_{s∼d_θ} Σ_a π_θ(a|s) κ(a|s) by position: the exposure bias that deviations
            *at* this position cause. Sums to `bias`.
    """

    fit: float
    inference: float
    bias: float
    per_position_fit: list[float]
    per_position_inference: list[float]
    attribution: list[float]


def exact_decomposition(
    process: Process[S],
    student: "Student[S]",
    initial: Mapping[S, float],
    *,
    divergence: str = "fkl",
    exclude: Sequence[int] = (),
    limit: int = 200_000,
) -> Decomposition:
    """Training fit, exposure bias and its causes, without sampling.

    Args:
        process: The teacher.
        student: See `exact_kappa`, as all that is not listed here.
        initial: Probabilities of the first states.
        divergence: ℓ.
        exclude: Tokens that neither emits; the student's mass on them is renormalised away.
        limit: The most states to visit. The student reaches every state there is.

    Raises:
        InputError: If more than `limit` states are reachable.

    Examples:
        >>> from bridge_garden.ledger import Ledger
        >>> ledger = Ledger(modulus=2, ops=(0.5, 0.5), fillers=2, fillers_per_round=1, rounds=1)
        >>> def teacher(states): return torch.stack([ledger.next_dist(s) for s in states]).log()
        >>> exact_decomposition(ledger, teacher, {ledger.initial: 1.0}).bias
        0.0
    """
    tokens = _tokens(process, exclude)
    layers = _Layers(
        process, student, list(initial), tokens, divergence, limit, follow_student=True
    )
    values = layers.cost_to_go()
    d = torch.zeros(len(layers.index[0]), dtype=torch.float64)
    for state, probability in initial.items():
        d[layers.index[0][state]] = probability
    d_teacher = d_student = d
    fit, inference, attribution = [], [], []
    for depth, (loss, p, q, edges) in enumerate(
        zip(layers.loss, layers.teacher, layers.student, layers.next, strict=True)
    ):
        keep = torch.zeros_like(q)
        keep[:, tokens] = q[:, tokens]
        q = keep / keep.sum(-1, keepdim=True)
        after = values[depth][1]
        kappa = after - (p * after).sum(-1, keepdim=True)
        fit.append(float(d_teacher @ loss))
        inference.append(float(d_student @ loss))
        attribution.append(float(d_student @ (q * kappa).sum(-1)))
        if depth + 1 == len(layers.index):
            break
        size = len(layers.index[depth + 1])
        reached = edges >= 0
        d_teacher = _push(d_teacher, p, edges, reached, size)
        d_student = _push(d_student, q, edges, reached, size)
    length = len(fit)
    fit, inference, attribution = (
        [x / length for x in part] for part in (fit, inference, attribution)
    )
    return Decomposition(
        sum(fit), sum(inference), sum(inference) - sum(fit), fit, inference, attribution
    )


def _push(d: Tensor, policy: Tensor, edges: Tensor, reached: Tensor, size: int) -> Tensor:
    flow = d.unsqueeze(-1) * policy
    after = torch.zeros(size, dtype=torch.float64)
    return after.index_add_(0, edges[reached], flow[reached])


@dataclass(frozen=True)
class Split:
    """Bridges and gardens by index.

    Attributes:
        bridges: The states of the largest scores, the largest first.
        gardens: Those of the smallest, the smallest first.
        bridge_ties: Further states with the score of the last bridge, left out by their index.
        garden_ties: Likewise of the gardens.
    """

    bridges: list[int]
    gardens: list[int]
    bridge_ties: int
    garden_ties: int


def split(scores: Float[Tensor, " n"], fraction: float = 0.2) -> Split:
    """The top and bottom `fraction` of states by κ(s): ⌊n · fraction⌋ each.

    Args:
        scores: κ(s) of each state.
        fraction: Share of either, above 0 and at most one half.

    Raises:
        InputError: If the fraction is out of range or a score is NaN.

    Examples:
        >>> split(torch.tensor([5.0, 1.0, 2.0, 2.0, 9.0]), 0.4)
        Split(bridges=[4, 0], gardens=[1, 2], bridge_ties=0, garden_ties=1)
    """
    if not 0 < fraction <= 0.5:
        raise InputError(f"fraction is {fraction}; accepted: above 0, at most 0.5")
    if scores.isnan().any():
        raise InputError("a score is NaN; states without a score cannot be ranked")
    # The small term keeps ⌊5 · 0.4⌋ at 2 where the product is rounded down.
    k = int(len(scores) * fraction + 1e-9)
    values = scores.tolist()
    down = sorted(range(len(values)), key=lambda i: (-values[i], i))
    up = sorted(range(len(values)), key=lambda i: (values[i], i))

    def ties(order: list[int]) -> int:
        return sum(values[i] == values[order[k - 1]] for i in order[k:]) if k else 0

    return Split(down[:k], up[:k], ties(down), ties(up))

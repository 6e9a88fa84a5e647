"""The ledger: a small language with bridges and gardens, and a teacher known exactly everywhere.

A text is a start digit and rounds of ``filler … filler operation result``. Fillers follow a random
Markov chain, and many are fine: gardens. The result must be the running total of all operations:
a bridge. The teacher counts from the operations alone, so it knows the truth after any mistake; a
student with a short window can only add the operation to the result it sees, and is wrong for ever
after its own slip.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from shared_core.errors import InputError

__all__ = ["Ledger", "LedgerState", "WindowStudent"]

BOS = 0


@dataclass(frozen=True)
class LedgerState:
    """What decides the future: for the teacher place, total and last filler; for the student the window.

    Attributes:
        place: Index of the next token.
        total: The true total.
        filler: The last filler's index, or -1.
        window: The last tokens.
    """

    place: int
    total: int
    filler: int
    window: tuple[int, ...]


@dataclass(frozen=True)
class Ledger:
    """The process and its exact teacher. Tokens: begin, digits, operations (+1, +2, …), fillers.

    Args:
        modulus: Number of digits.
        ops: Probabilities of the operations; the i-th adds i.
        fillers: Number of fillers.
        fillers_per_round: Fillers before each operation.
        rounds: Rounds of a text.
        slip: ε, the teacher's mass on wrong results.
        sharpness: Scale of the chain's random logits.
        window: Tokens that a student's state keeps.
        seed: Of the filler chain.

    Raises:
        InputError: If a size is below 1 (2 for the digits) or `ops` are not probabilities.

    Example:
        >>> ledger = Ledger(rounds=2)
        >>> ledger.vocab_size, ledger.length
        (22, 10)
        >>> ledger.sample(1, torch.Generator().manual_seed(0)).shape
        torch.Size([1, 10])
    """

    modulus: int = 10
    ops: tuple[float, ...] = (0.40, 0.35, 0.25)
    fillers: int = 8
    fillers_per_round: int = 2
    rounds: int = 14
    slip: float = 0.05
    sharpness: float = 0.8
    window: int = 6
    seed: int = 1234
    chain: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        sizes = (self.fillers, self.fillers_per_round, self.rounds, self.window, self.modulus - 1)
        if min(sizes) < 1:
            raise InputError("a ledger needs two digits and at least one of everything else")
        if abs(sum(self.ops) - 1) > 1e-9 or min(self.ops) < 0 or not 0 <= self.slip < 1:
            raise InputError("ops have to be probabilities that sum to 1, and slip within [0, 1)")
        generator = torch.Generator().manual_seed(self.seed)
        logits = torch.randn(self.fillers, self.fillers, generator=generator, dtype=torch.float64)
        object.__setattr__(self, "chain", torch.softmax(self.sharpness * logits, -1))

    @property
    def first_op(self) -> int:
        """Id of the operation +1."""
        return 1 + self.modulus

    @property
    def first_filler(self) -> int:
        """Id of the first filler."""
        return self.first_op + len(self.ops)

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return self.first_filler + self.fillers

    @property
    def period(self) -> int:
        """Tokens of a round."""
        return self.fillers_per_round + 2

    @property
    def length(self) -> int:
        """Tokens of a text with its begin."""
        return 2 + self.period * self.rounds

    def slots(self) -> dict[str, Int[Tensor, " n"]]:
        """Positions t whose *next* token is a ``result``, a ``filler`` or an ``op``."""
        place = torch.arange(2, self.length)
        kind = (place - 2) % self.period
        op = self.fillers_per_round
        return {
            "result": place[kind == op + 1] - 1,
            "filler": place[kind < op] - 1,
            "op": place[kind == op] - 1,
        }

    # The teacher on whole texts

    def totals(self, ids: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
        """The true total after each token, whatever results were written."""
        place = torch.arange(ids.shape[1])
        digit = (ids >= 1) & (ids < self.first_op) & (place == 1)
        at_op = (place >= 2) & ((place - 2) % self.period == self.fillers_per_round)
        op = at_op & (ids >= self.first_op) & (ids < self.first_filler)
        adds = torch.where(digit, ids - 1, 0) + torch.where(op, ids - self.first_op + 1, 0)
        return adds.cumsum(-1) % self.modulus

    def probs(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """π_T of the token after each prefix of `ids` (begin token first), float64."""
        B, T = ids.shape
        out = torch.zeros(B, T, self.vocab_size, dtype=torch.float64)
        totals = self.totals(ids)
        rows = torch.cat(
            [self.chain, torch.full((1, self.fillers), 1 / self.fillers, dtype=torch.float64)]
        )
        last = torch.full((B,), -1)
        for t in range(T):
            kind = (t - 2) % self.period
            if t >= 2 and kind < self.fillers_per_round:
                seen = ids[:, t] - self.first_filler
                last = torch.where(seen >= 0, seen, -1)
            if t == 0:
                out[:, 0, 1 : self.first_op] = 1 / self.modulus
                continue
            kind = (t - 1) % self.period
            if kind < self.fillers_per_round:
                out[:, t, self.first_filler :] = rows[last]
            elif kind == self.fillers_per_round:
                out[:, t, self.first_op : self.first_filler] = torch.tensor(
                    self.ops, dtype=torch.float64
                )
            else:
                out[:, t, 1 : self.first_op] = self.slip / (self.modulus - 1)
                out[torch.arange(B), t, 1 + totals[:, t]] = 1 - self.slip
        return out

    def sample(self, count: int, generator: torch.Generator) -> Int[Tensor, "{count} T"]:
        """Texts of the teacher."""
        ids = torch.zeros(count, 1, dtype=torch.int64)
        # What comes next depends on the total and the last filler: a short prefix is not enough,
        # and the whole one is cheap, for the loop runs over places and not over texts.
        states = [self.initial] * count
        del states
        chain = torch.cat(
            [self.chain, torch.full((1, self.fillers), 1 / self.fillers, dtype=torch.float64)]
        )
        total, last = torch.zeros(count, dtype=torch.int64), torch.full((count,), -1)
        for place in range(1, self.length):
            kind = (place - 2) % self.period
            p = torch.zeros(count, self.vocab_size, dtype=torch.float64)
            if place == 1:
                p[:, 1 : self.first_op] = 1 / self.modulus
            elif kind < self.fillers_per_round:
                p[:, self.first_filler :] = chain[last]
            elif kind == self.fillers_per_round:
                p[:, self.first_op : self.first_filler] = torch.tensor(
                    self.ops, dtype=torch.float64
                )
            else:
                p[:, 1 : self.first_op] = self.slip / (self.modulus - 1)
                p[torch.arange(count), 1 + total] = 1 - self.slip
            token = torch.multinomial(p, 1, generator=generator)
            ids = torch.cat([ids, token], 1)
            token = token.squeeze(1)
            if place == 1:
                total = token - 1
            elif kind < self.fillers_per_round:
                last = token - self.first_filler
            elif kind == self.fillers_per_round:
                total = (total + token - self.first_op + 1) % self.modulus
        return ids

    # The teacher state by state (`bridge_garden.kappa.Process`)

    @property
    def initial(self) -> LedgerState:
        """The state after the begin token."""
        return LedgerState(1, 0, -1, (BOS,) * self.window)

    def is_terminal(self, state: LedgerState) -> bool:
        """Whether the text is whole."""
        return state.place >= self.length

    def next_dist(self, state: LedgerState) -> Float[Tensor, " V"]:
        """π_T(·|state), float64."""
        p = torch.zeros(self.vocab_size, dtype=torch.float64)
        kind = (state.place - 2) % self.period
        if state.place == 1:
            p[1 : self.first_op] = 1 / self.modulus
        elif kind < self.fillers_per_round:
            p[self.first_filler :] = (
                self.chain[state.filler] if state.filler >= 0 else 1 / self.fillers
            )
        elif kind == self.fillers_per_round:
            p[self.first_op : self.first_filler] = torch.tensor(self.ops, dtype=torch.float64)
        else:
            p[1 : self.first_op] = self.slip / (self.modulus - 1)
            p[1 + state.total] = 1 - self.slip
        return p

    def step(self, state: LedgerState, token: int) -> LedgerState:
        """The state after a token; one that does not belong there takes the place all the same."""
        total, filler = state.total, state.filler
        kind = (state.place - 2) % self.period
        if state.place == 1:
            total = token - 1 if 1 <= token < self.first_op else 0
        elif kind < self.fillers_per_round:
            filler = token - self.first_filler if token >= self.first_filler else -1
        elif kind == self.fillers_per_round and self.first_op <= token < self.first_filler:
            total = (total + token - self.first_op + 1) % self.modulus
        return LedgerState(state.place + 1, total, filler, (*state.window[1:], token))


class WindowStudent(nn.Module):
    """A student that sees the last tokens only: embeddings, two hidden layers, logits.

    Args:
        vocab_size: V.
        window: Tokens it sees.
        width: Of the hidden layers.
        embedding: Width of a token.

    Example:
        >>> student = WindowStudent(22)
        >>> student(torch.zeros(2, 5, dtype=torch.int64)).shape
        torch.Size([2, 5, 22])
    """

    def __init__(
        self, vocab_size: int, window: int = 6, width: int = 96, embedding: int = 16
    ) -> None:
        super().__init__()
        self.window = window
        self.embed = nn.Embedding(vocab_size, embedding)
        self.layers = nn.Sequential(
            nn.Linear(window * embedding, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, vocab_size),
        )

    def windows(self, windows: Int[Tensor, "*batch window"]) -> Float[Tensor, "*batch V"]:
        """Logits of the token after each window."""
        return self.layers(self.embed(windows).flatten(-2))

    def forward(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """Logits of the token after each prefix."""
        padded = nn.functional.pad(ids, (self.window - 1, 0), value=BOS)
        return self.windows(padded.unfold(1, self.window, 1))

    def on_states(self, states: Sequence[LedgerState]) -> Float[Tensor, "n V"]:
        """Logits in states of a `Ledger` with the same window."""
        with torch.no_grad():
            return self.windows(torch.tensor([s.window for s in states]))

    @torch.no_grad()
    def sample(
        self, count: int, length: int, generator: torch.Generator
    ) -> Int[Tensor, "{count} {length}"]:
        """Texts of the student at temperature 1, begin token first."""
        ids = torch.zeros(count, length, dtype=torch.int64)
        padded = nn.functional.pad(ids, (self.window - 1, 0), value=BOS)
        for place in range(1, length):
            p = torch.softmax(self.windows(padded[:, place - 1 : place - 1 + self.window]), -1)
            token = torch.multinomial(p, 1, generator=generator).squeeze(1)
            padded[:, place - 1 + self.window] = token
        return padded[:, self.window - 1 :]


Sampler = Callable[[int, torch.Generator], Tensor]

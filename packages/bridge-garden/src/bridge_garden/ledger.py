"""The ledger: a small language with bridges and gardens, and a teacher known exactly everywhere.

A text is a start digit and rounds of ``filler … filler operation result``. Fillers follow a random
Markov chain, and many are fine: gardens. The result must be the running total of all operations:
a bridge. The teacher counts from the operations alone, so it knows the truth after any mistake; a
student with a short window can only add the operation to the result it sees, and is wrong for ever
after its own slip.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from shared_core.errors import InputError

__all__ = ["Ledger", "LedgerState", "WindowStudent"]

BOS = 0


@dataclass(frozen=True)
class LedgerState:
    """What decides the future: place, total and filler for the teacher, the window for the student.

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

    Examples:
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

    def _next(
        self, place: int, total: Int[Tensor, " B"], filler: Int[Tensor, " B"]
    ) -> Float[Tensor, "B V"]:
        """π_T of the token at `place`, given the total and the last filler (-1: none)."""
        B = len(total)
        p = torch.zeros(B, self.vocab_size, dtype=torch.float64)
        kind = self.kind(place)
        if kind == "start":
            p[:, 1 : self.first_op] = 1 / self.modulus
        elif kind == "filler":
            even = torch.full((1, self.fillers), 1 / self.fillers, dtype=torch.float64)
            p[:, self.first_filler :] = torch.cat([self.chain, even])[filler]
        elif kind == "op":
            p[:, self.first_op : self.first_filler] = torch.tensor(self.ops, dtype=torch.float64)
        else:
            p[:, 1 : self.first_op] = self.slip / (self.modulus - 1)
            p[torch.arange(B), 1 + total] = 1 - self.slip
        return p

    def _after(
        self, place: int, token: Tensor, total: Tensor, filler: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Total and last filler after `token` was written at `place`, whether it fits or not."""
        kind = self.kind(place)
        if kind == "start":
            total = torch.where((token >= 1) & (token < self.first_op), token - 1, 0)
        elif kind == "filler":
            filler = (token - self.first_filler).clamp(min=-1)
        elif kind == "op":
            fits = (token >= self.first_op) & (token < self.first_filler)
            total = (total + torch.where(fits, token - self.first_op + 1, 0)) % self.modulus
        return total, filler

    def kind(self, place: int) -> str:
        """What belongs at a place: ``start``, ``filler``, ``op`` or ``result``."""
        if place == 1:
            return "start"
        kind = (place - 2) % self.period
        if kind < self.fillers_per_round:
            return "filler"
        return "op" if kind == self.fillers_per_round else "result"

    def probs(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """π_T of the token after each prefix of `ids` (begin token first), float64."""
        total = torch.zeros(len(ids), dtype=torch.int64)
        filler, found = total - 1, []
        for t in range(ids.shape[1]):
            if t:
                total, filler = self._after(t, ids[:, t], total, filler)
            found.append(self._next(t + 1, total, filler))
        return torch.stack(found, 1)

    def totals(self, ids: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
        """The true total after each token, whatever results were written."""
        total = torch.zeros(len(ids), dtype=torch.int64)
        filler, found = total - 1, [total]
        for t in range(1, ids.shape[1]):
            total, filler = self._after(t, ids[:, t], total, filler)
            found.append(total)
        return torch.stack(found, 1)

    def sample(self, count: int, generator: torch.Generator) -> Int[Tensor, "{count} T"]:
        """Texts of the teacher, begin token first."""
        ids = torch.zeros(count, self.length, dtype=torch.int64)
        total = torch.zeros(count, dtype=torch.int64)
        filler = total - 1
        for place in range(1, self.length):
            p = self._next(place, total, filler)
            token = torch.multinomial(p, 1, generator=generator).squeeze(1)
            ids[:, place] = token
            total, filler = self._after(place, token, total, filler)
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
        total, filler = torch.tensor([state.total]), torch.tensor([state.filler])
        return self._next(state.place, total, filler)[0]

    def step(self, state: LedgerState, token: int) -> LedgerState:
        """The state after a token; one that does not belong there takes the place all the same."""
        total, filler = state.total, state.filler
        kind = self.kind(state.place)
        if kind == "start":
            total = token - 1 if 1 <= token < self.first_op else 0
        elif kind == "filler":
            filler = token - self.first_filler if token >= self.first_filler else -1
        elif kind == "op" and self.first_op <= token < self.first_filler:
            total = (total + token - self.first_op + 1) % self.modulus
        return LedgerState(state.place + 1, total, filler, (*state.window[1:], token))


class WindowStudent(nn.Module):
    """A student that sees the last tokens only: embeddings, two hidden layers, logits.

    Args:
        vocab_size: V.
        window: Tokens it sees.
        width: Of the hidden layers.
        embedding: Width of a token.

    Examples:
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
        logits: Tensor = self.layers(self.embed(windows).flatten(-2))
        return logits

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

"""What decoding did: rounds, drafts, exits."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from lede.cost import CostModel

__all__ = ["DecodeStats", "Round"]


class Round(NamedTuple):
    """One round of one row.

    Attributes:
        row: Of the batch.
        position: Committed tokens after the prompt when the round began.
        exit: Exit layer; the model's depth for a plain autoregressive step.
        passes: Passes of the early layers, k; k - 1 drafts were verified.
        accepted: Drafts accepted.
        heads: Times that the head ran at exits.
        looks: Times that the policy looked at an exit.
    """

    row: int
    position: int
    exit: int
    passes: int
    accepted: int
    heads: int = 0
    looks: int = 0


@dataclass
class DecodeStats:
    """Counts of a call of ``generate``.

    Attributes:
        depth: Layers of the model.
        tokens: Committed tokens, over all rows.
        wall_s: Seconds, prefill included.
        log: Every round of every row.
        lossless: Whether the output is the model's own; not with a scripted verifier.

    Examples:
        >>> stats = DecodeStats(8, tokens=4, log=[Round(0, 0, 2, 4, 2), Round(0, 3, 8, 1, 0)])
        >>> stats.acceptance_rate, stats.mean_exit_layer, stats.tokens_per_round
        (0.6666666666666666, 2.0, 2.0)
    """

    depth: int
    tokens: int = 0
    wall_s: float = 0.0
    log: list[Round] = field(default_factory=list)
    lossless: bool = True

    @property
    def rounds(self) -> int:
        """Rounds over all rows."""
        return len(self.log)

    @property
    def drafted(self) -> int:
        """Drafts verified."""
        return sum(r.passes - 1 for r in self.log)

    @property
    def accepted(self) -> int:
        """Drafts accepted."""
        return sum(r.accepted for r in self.log)

    @property
    def acceptance_rate(self) -> float:
        """Accepted over drafted; 0 where nothing was drafted."""
        return self.accepted / max(1, self.drafted)

    @property
    def mean_exit_layer(self) -> float:
        """Ē, over the rounds that exited early; the depth where none did."""
        early = [r.exit for r in self.log if r.exit < self.depth]
        return sum(early) / len(early) if early else float(self.depth)

    @property
    def mean_draft_len(self) -> float:
        """d̄: drafts per round."""
        return self.drafted / max(1, self.rounds)

    @property
    def tokens_per_round(self) -> float:
        """Committed tokens per round."""
        return self.tokens / max(1, self.rounds)

    def cost(self, model: CostModel) -> float:
        """Counted cost of all rounds (prefill and DEL's shadow heads aside).

        Examples:
            >>> stats = DecodeStats(8, tokens=3, log=[Round(0, 0, 2, 3, 2, heads=2)])
            >>> round(stats.cost(CostModel.memory_bound(8, head_ratio=0.5)), 3)
            13.565
        """
        if not self.log:
            return 0.0
        columns = np.array([(r.exit, r.passes, r.heads, r.looks) for r in self.log]).T
        return float(np.sum(model.round(*columns)))

    def to_dict(self) -> dict[str, Any]:
        """The counts and the histograms of exits and draft lengths, JSON-ready."""
        return {
            "rounds": self.rounds,
            "tokens": self.tokens,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "acceptance_rate": self.acceptance_rate,
            "mean_exit_layer": self.mean_exit_layer,
            "mean_draft_len": self.mean_draft_len,
            "tokens_per_round": self.tokens_per_round,
            "wall_s": self.wall_s,
            "lossless": self.lossless,
            "exit_histogram": dict(sorted(Counter(r.exit for r in self.log).items())),
            "draft_histogram": dict(sorted(Counter(r.passes - 1 for r in self.log).items())),
        }

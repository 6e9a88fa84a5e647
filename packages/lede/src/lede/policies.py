"""Who decides where to exit and when to stop drafting: the protocol and the baselines.

A policy decides for many rows at once (the rows of a batch, or of a simulation). Its answers are
scores: positive says yes. In a batch that must share one exit, scores are summed over the rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from shared_core.errors import InputError

__all__ = [
    "AutoregressivePolicy",
    "ConfidenceExitPolicy",
    "ConfidencePolicy",
    "DELPolicy",
    "DraftVerifyPolicy",
    "Observation",
    "Policy",
    "StaticPolicy",
    "chance",
    "updated_ema",
]

EMA_START = 0.7


@dataclass
class Observation:
    """What is known when a decision is taken, for some of the rows.

    Attributes:
        rows: Which rows these are, int, shape [R]; all arrays below have this length.
        layer: The exit layer that was probed.
        index: Passes of the early layers so far in this round, i; 1 while walking.
        p1: Top probability of q_i.
        margin: p₁ - p₂.
        entropy: H(q_i) / ln V.
        agree: 1 where the top token equals that of the round's candidate before; else 0.
        ema: Moving average of the accepted share of drafts.
        prefix: Product of the p₁ of the drafts before, an estimate that all of them are right.
        last_accepted: Drafts accepted in the round before, over the largest draft length.
        probe: Outputs of the policy's probe of the hidden state, [R, 2]; ``None`` without one.
        chain: Product of the probe's chances of the drafts before; 1 while walking.
    """

    rows: np.ndarray
    layer: np.ndarray
    index: np.ndarray
    p1: np.ndarray
    margin: np.ndarray
    entropy: np.ndarray
    agree: np.ndarray
    ema: np.ndarray
    prefix: np.ndarray
    last_accepted: np.ndarray
    probe: np.ndarray | None = None
    chain: np.ndarray | None = None

    def __getitem__(self, chosen: np.ndarray) -> "Observation":
        parts = {n: getattr(self, n) for n in self.__dataclass_fields__}
        taken: Any = {n: None if p is None else p[chosen] for n, p in parts.items()}
        return Observation(**taken)

    def __len__(self) -> int:
        return len(self.rows)


@runtime_checkable
class Policy(Protocol):
    """Decides in every round where to exit and how long to draft.

    A policy keeps what it remembers by row, and forgets it in `reset`.

    Attributes:
        autoregressive: Never drafts: no candidate is visited.
        uses_features: Whether `keep_drafting` looks at the observation's features.
        needs_head: Whether its features are the distribution's; if not (a probe of the hidden
            state is enough), the head runs only where a draft is made.
        probe: An `AcceptanceProbe` to fill ``observation.probe``, or ``None``.
        wants_shadow: Whether `end_round` is to be told each candidate's share of right predictions
            among the tokens just verified (costs a head per candidate).
    """

    autoregressive: bool
    uses_features: bool
    needs_head: bool
    wants_shadow: bool
    probe: Any

    def reset(self, rows: int, exits: Sequence[int], depth: int, max_draft: int) -> None:
        """Begin `rows` sequences on a model of `depth` layers with the candidate `exits`."""

    def start_round(self, positions: np.ndarray) -> None:
        """Begin a round; `positions` are the committed tokens after the prompt, by row."""

    def probes(self, layer: int) -> bool:
        """Whether the walk looks at this candidate's features."""

    def choose_exit(self, observation: Observation) -> np.ndarray:
        """Scores of exiting here rather than going deeper; not asked at the last candidate."""

    def max_drafts(self, rows: np.ndarray, layer: np.ndarray) -> np.ndarray:
        """The most drafts to make in this round, by row."""

    def keep_drafting(self, observation: Observation) -> np.ndarray:
        """Scores of drafting a further token rather than stopping to verify."""

    def end_round(
        self, rows: np.ndarray, accepted: np.ndarray, drafted: np.ndarray, shadow: np.ndarray | None
    ) -> None:
        """What came of the round; `shadow` only for policies that ask for it."""


def updated_ema(ema: np.ndarray, accepted: np.ndarray, drafted: np.ndarray) -> np.ndarray:
    """Moving average of the accepted share: 0.8 of the old and 0.2 of a / min(a + 1, drafts).

    The denominator counts the drafts that were judged: those after the first wrong one were not.
    A round without drafts leaves it as it was.

    Examples:
        >>> updated_ema(np.array([0.5, 0.5]), np.array([3, 0]), np.array([3, 0]))
        array([0.6, 0.5])
    """
    share = accepted / np.maximum(1, np.minimum(accepted + 1, drafted))
    return np.where(drafted > 0, 0.8 * ema + 0.2 * share, ema)


def chance(log_odds: np.ndarray) -> np.ndarray:
    """Probability of log-odds, without overflow.

    Examples:
        >>> chance(np.array([0.0]))
        array([0.5])
    """
    out: np.ndarray = 0.5 * (1 + np.tanh(0.5 * log_odds))
    return out


class AutoregressivePolicy:
    """No drafts: every token runs through all layers.

    Examples:
        >>> AutoregressivePolicy().probes(2)
        False
    """

    autoregressive = True
    uses_features = False
    needs_head = True
    wants_shadow = False
    probe: Any = None

    def reset(self, rows: int, exits: Sequence[int], depth: int, max_draft: int) -> None:
        """Begin `rows` sequences."""
        self.rows, self.exits, self.depth, self.longest = rows, tuple(exits), depth, max_draft

    def start_round(self, positions: np.ndarray) -> None:
        """Nothing to prepare."""

    def probes(self, layer: int) -> bool:
        """No candidate is looked at."""
        return False

    def choose_exit(self, observation: Observation) -> np.ndarray:
        """Never exit early."""
        return np.full(len(observation), -1.0)

    def max_drafts(self, rows: np.ndarray, layer: np.ndarray) -> np.ndarray:
        """None here; up to `max_draft` in the policies that inherit this."""
        return np.full(len(rows), 0 if self.autoregressive else self.longest)

    def keep_drafting(self, observation: Observation) -> np.ndarray:
        """Always, up to the longest draft."""
        return np.ones(len(observation))

    def end_round(
        self, rows: np.ndarray, accepted: np.ndarray, drafted: np.ndarray, shadow: np.ndarray | None
    ) -> None:
        """Nothing to learn."""


class _FixedExit(AutoregressivePolicy):
    """Always the same exit layer; it must be among the decoder's candidates."""

    autoregressive = False

    def __init__(self, exit_layer: int) -> None:
        self.exit_layer = exit_layer

    def reset(self, rows: int, exits: Sequence[int], depth: int, max_draft: int) -> None:
        super().reset(rows, exits, depth, max_draft)
        if self.exit_layer not in exits:
            raise InputError(
                f"the policy exits at layer {self.exit_layer}, which is not among the decoder's "
                f"exit_layers {tuple(exits)}"
            )

    def choose_exit(self, observation: Observation) -> np.ndarray:
        return np.where(observation.layer == self.exit_layer, 1.0, -1.0)


class StaticPolicy(_FixedExit):
    """LayerSkip's own policy: a fixed exit layer E and draft length d.

    Args:
        exit_layer: E.
        num_draft: d; a round runs d + 1 early passes and d heads.

    Raises:
        InputError: If `num_draft` is below 1.

    Examples:
        >>> StaticPolicy(exit_layer=4, num_draft=6)
        StaticPolicy(exit_layer=4, num_draft=6)
    """

    def __init__(self, exit_layer: int, num_draft: int) -> None:
        super().__init__(exit_layer)
        if num_draft < 1:
            raise InputError(f"num_draft={num_draft}; a static policy drafts at least 1 token")
        self.num_draft = num_draft

    def __repr__(self) -> str:
        return f"StaticPolicy(exit_layer={self.exit_layer}, num_draft={self.num_draft})"

    def max_drafts(self, rows: np.ndarray, layer: np.ndarray) -> np.ndarray:
        """Always d."""
        return np.full(len(rows), min(self.num_draft, self.longest))


class ConfidencePolicy(_FixedExit):
    """A fixed exit that drafts while it is confident: p₁ ≥ θ, or the product of all p₁ ≥ θ.

    Args:
        exit_layer: E.
        threshold: θ.
        product: Compare Π_{j≤i} p₁ instead of p₁ alone.

    Examples:
        >>> ConfidencePolicy(2, 0.4, product=True)
        ConfidencePolicy(exit_layer=2, threshold=0.4, product=True)
    """

    uses_features = True

    def __init__(self, exit_layer: int, threshold: float, *, product: bool = False) -> None:
        super().__init__(exit_layer)
        self.threshold, self.product = threshold, product

    def __repr__(self) -> str:
        return (
            f"ConfidencePolicy(exit_layer={self.exit_layer}, threshold={self.threshold:g}, "
            f"product={self.product})"
        )

    def keep_drafting(self, observation: Observation) -> np.ndarray:
        """Positive while the confidence is not below θ."""
        seen = observation.p1 * (observation.prefix if self.product else 1.0)
        return np.where(seen >= self.threshold, 1.0, -1.0)


class ConfidenceExitPolicy(AutoregressivePolicy):
    """Exit at the first candidate whose p₁ reaches its threshold (as LITE), then draft likewise.

    Args:
        thresholds: One per candidate, or one for all.
        draft_threshold: Draft while p₁ is not below this.

    Examples:
        >>> policy = ConfidenceExitPolicy([0.9, 0.8], draft_threshold=0.5)
        >>> policy.reset(1, (2, 4), 8, 12)
    """

    autoregressive = False
    uses_features = True

    def __init__(self, thresholds: float | Sequence[float], draft_threshold: float = 0.5) -> None:
        self.thresholds, self.draft_threshold = thresholds, draft_threshold

    def __repr__(self) -> str:
        return f"ConfidenceExitPolicy({self.thresholds}, draft_threshold={self.draft_threshold:g})"

    def reset(self, rows: int, exits: Sequence[int], depth: int, max_draft: int) -> None:
        """Begin `rows` sequences; there must be one threshold per candidate."""
        super().reset(rows, exits, depth, max_draft)
        given = self.thresholds
        values = [float(given)] * len(exits) if isinstance(given, int | float) else list(given)
        if len(values) != len(exits):
            raise InputError(
                f"{len(values)} thresholds for {len(exits)} exit layers; give one each"
            )
        self._of = dict(zip(exits, values, strict=True))

    def probes(self, layer: int) -> bool:
        """Every candidate is looked at."""
        return True

    def choose_exit(self, observation: Observation) -> np.ndarray:
        """Positive where p₁ reaches the candidate's threshold."""
        wanted = np.array([self._of[int(layer)] for layer in observation.layer])
        return np.where(observation.p1 >= wanted, 1.0, -1.0)

    def keep_drafting(self, observation: Observation) -> np.ndarray:
        """Positive while p₁ is not below `draft_threshold`."""
        return np.where(observation.p1 >= self.draft_threshold, 1.0, -1.0)


class DraftVerifyPolicy(_FixedExit):
    """Draft&Verify (Zhang et al., ACL 2024): a fixed exit and a threshold that adapts.

    Draft while p₁ ≥ θ. After a round with accepted share m: M ← 0.5 M + 0.5 m; the target is
    θ ± 0.01 (up while M is below 0.9, else down) and θ ← 0.9 θ + 0.1 of it. θ begins at 0.8.

    Args:
        exit_layer: E.
        threshold: First θ.
        target: Accepted share aimed at.

    Examples:
        >>> DraftVerifyPolicy(2)
        DraftVerifyPolicy(exit_layer=2, threshold=0.8)
    """

    uses_features = True

    def __init__(self, exit_layer: int, threshold: float = 0.8, target: float = 0.9) -> None:
        super().__init__(exit_layer)
        self.threshold, self.target = threshold, target

    def __repr__(self) -> str:
        return f"DraftVerifyPolicy(exit_layer={self.exit_layer}, threshold={self.threshold:g})"

    def reset(self, rows: int, exits: Sequence[int], depth: int, max_draft: int) -> None:
        """Begin `rows` sequences with the first threshold."""
        super().reset(rows, exits, depth, max_draft)
        self._theta, self._matched = np.full(rows, self.threshold), np.full(rows, self.target)

    def keep_drafting(self, observation: Observation) -> np.ndarray:
        """Positive while p₁ is not below the row's θ."""
        return np.where(observation.p1 >= self._theta[observation.rows], 1.0, -1.0)

    def end_round(
        self, rows: np.ndarray, accepted: np.ndarray, drafted: np.ndarray, shadow: np.ndarray | None
    ) -> None:
        """Move the threshold towards the target share."""
        rows, share = rows[drafted > 0], (accepted / np.maximum(drafted, 1))[drafted > 0]
        self._matched[rows] = 0.5 * self._matched[rows] + 0.5 * share
        step = np.where(self._matched[rows] < self.target, 0.01, -0.01)
        self._theta[rows] = 0.9 * self._theta[rows] + 0.1 * (self._theta[rows] + step)


class DELPolicy(AutoregressivePolicy):
    """DEL (COLM 2025): the exit with the most tokens per layer, from acceptance seen so far.

    Every round, each candidate's predictions for the tokens just verified ("shadow tokens", one
    head per candidate) update its acceptance α_E by a moving average. The next round takes
    argmax over E, d of (1 - α^{d+1}) / (1 - α) / ((d + 1) E + L - E), and stops early where
    p₁ < θ. We restate the published idea; the authors' code was not used.

    Args:
        threshold: θ.
        decay: Of the moving average, per round.

    Examples:
        >>> policy = DELPolicy()
        >>> policy.reset(1, (2, 4), 8, 12)
        >>> policy.choices()
        (array([2]), array([3]))
    """

    autoregressive = False
    uses_features = True
    wants_shadow = True

    def __init__(self, threshold: float = 0.3, decay: float = 0.9) -> None:
        self.threshold, self.decay = threshold, decay

    def __repr__(self) -> str:
        return f"DELPolicy(threshold={self.threshold:g})"

    def reset(self, rows: int, exits: Sequence[int], depth: int, max_draft: int) -> None:
        """Begin `rows` sequences; all candidates begin with an acceptance of 0.8."""
        super().reset(rows, exits, depth, max_draft)
        self._alpha = np.full((rows, len(exits)), 0.8)
        self.start_round(np.zeros(rows))

    def choices(self) -> tuple[np.ndarray, np.ndarray]:
        """The exit and draft length with the most tokens per layer, by row."""
        d = np.arange(1, self.longest + 1)
        exits = np.array(self.exits)
        alpha = np.clip(self._alpha, 0, 0.999)[:, :, None]
        tokens = (1 - alpha ** (d + 1)) / (1 - alpha)
        layers = (d + 1) * exits[:, None] + self.depth - exits[:, None]
        best = (tokens / layers).reshape(len(alpha), -1).argmax(1)
        return exits[best // len(d)], d[best % len(d)]

    def start_round(self, positions: np.ndarray) -> None:
        """Choose exit and length for every row."""
        self._exit, self._length = self.choices()

    def choose_exit(self, observation: Observation) -> np.ndarray:
        """Positive at the chosen exit."""
        return np.where(observation.layer >= self._exit[observation.rows], 1.0, -1.0)

    def max_drafts(self, rows: np.ndarray, layer: np.ndarray) -> np.ndarray:
        """The chosen length."""
        length: np.ndarray = self._length[rows]
        return length

    def keep_drafting(self, observation: Observation) -> np.ndarray:
        """Positive while p₁ is not below θ."""
        return np.where(observation.p1 >= self.threshold, 1.0, -1.0)

    def end_round(
        self, rows: np.ndarray, accepted: np.ndarray, drafted: np.ndarray, shadow: np.ndarray | None
    ) -> None:
        """Update every candidate's acceptance by its share of right predictions."""
        if shadow is not None:
            self._alpha[rows] = self.decay * self._alpha[rows] + (1 - self.decay) * shadow

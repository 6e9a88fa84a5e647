"""Replaying a policy on experience without the model: exact, round for round, when greedy."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from lede.cost import CostModel
from lede.experience import ExperienceTable
from lede.policies import (
    EMA_START,
    AutoregressivePolicy,
    ConfidencePolicy,
    Observation,
    Policy,
    StaticPolicy,
    chance,
    updated_ema,
)
from lede.stats import Round
from shared_core.errors import InputError

__all__ = [
    "OraclePolicy",
    "Simulation",
    "best_confidence",
    "best_static",
    "simulate",
    "static_grid",
]


@dataclass
class Simulation:
    """What a policy would have done on each text.

    Attributes:
        speedup: Tokens per cost over those of plain decoding, over all texts.
        tokens: Committed tokens per simulated row.
        cost: Cost per simulated row.
        log: The rounds, by row and position.
        contexts: ``ema`` and ``last_accepted`` at each text's round starts, [R, T]; NaN elsewhere.
    """

    tokens: np.ndarray
    cost: np.ndarray
    autoregressive: float
    depth: int
    log: list[Round]
    contexts: tuple[np.ndarray, np.ndarray] = field(repr=False)

    @property
    def speedup(self) -> float:
        """Tokens per cost, in units of plain decoding's."""
        return float(self.tokens.sum() * self.autoregressive / self.cost.sum())

    @property
    def acceptance_rate(self) -> float:
        """Accepted over drafted."""
        drafted = sum(r.passes - 1 for r in self.log)
        return sum(r.accepted for r in self.log) / max(1, drafted)

    @property
    def mean_exit_layer(self) -> float:
        """Ē over rounds that exited early."""
        early = [r.exit for r in self.log if r.exit < self.depth]
        return float(np.mean(early)) if early else float(self.depth)

    @property
    def mean_draft_len(self) -> float:
        """d̄ per round."""
        return float(np.mean([r.passes - 1 for r in self.log]))


def simulate(
    table: ExperienceTable,
    policy: Policy,
    cost: CostModel,
    *,
    rows: np.ndarray | None = None,
    keep_log: bool = True,
) -> Simulation:
    """Replay a policy on every text, each for itself as at batch 1.

    Args:
        table: Experience; a teacher-only table will do for policies that do not look at features.
        policy: Who decides.
        cost: What rounds cost.
        rows: Texts to replay (default: each once); a text may occur often.
        keep_log: Whether to list the rounds.

    Raises:
        InputError: If the policy looks at features and the table has no continuations.
    """
    if policy.uses_features and not table.complete:
        raise InputError(
            "a policy that looks at features needs mode='branch' experience: what follows a wrong "
            "draft is not in a teacher-only table"
        )
    text = np.arange(len(table)) if rows is None else np.asarray(rows)
    count, exits = len(text), table.exits
    policy.reset(count, exits, table.depth, table.max_draft)
    length = table.lengths[text]
    t = np.zeros(count, dtype=np.int64)
    ema, last = np.full(count, EMA_START), np.zeros(count)
    spent = np.zeros(count)
    shape = (count, table.tokens.shape[1])
    contexts = np.full(shape, np.nan), np.full(shape, np.nan)
    log: list[Round] = []
    while True:
        active = np.flatnonzero(t < length)
        if not len(active):
            break
        contexts[0][active, t[active]], contexts[1][active, t[active]] = ema[active], last[active]
        policy.start_round(t)
        # A decoder does not know where a text will end: only its budget of tokens bounds a draft.
        budget = np.minimum(shape[1] - t - 1, table.max_draft)
        drafting = active[budget[active] > 0]
        if policy.autoregressive:
            drafting = drafting[:0]
        candidate = np.full(count, -1)
        passes, heads, looks = (np.zeros(count, dtype=np.int64) for _ in range(3))
        passes[active] = 1
        wrong = np.zeros(count, dtype=np.int64)
        if len(drafting):
            agree = np.zeros(count)
            replay = _Replay(table, text, t, ema, last, agree)
            replay.walk(policy, drafting, candidate, heads, looks)
            replay.draft(policy, drafting, candidate, budget, passes, heads, looks, wrong)
        accepted = np.where(wrong > 0, wrong - 1, np.maximum(passes - 1, 0))
        layer = np.where(candidate < 0, table.depth, np.array([*exits, table.depth])[candidate])
        here = cost.round(layer, np.maximum(passes, 1), heads, looks)
        if policy.wants_shadow:
            drafted_rows = candidate >= 0
            here = here + drafted_rows * len(exits) * cost.head_cost(np.maximum(passes, 1))
        spent[active] += here[active]
        if keep_log:
            log += [
                Round(*(int(v) for v in values))
                for values in zip(
                    active,
                    *(v[active] for v in (t, layer, passes, accepted, heads, looks)),
                    strict=True,
                )
            ]
        shadow = _shadow(table, text, t, accepted)[active] if policy.wants_shadow else None
        if shadow is not None and policy.autoregressive:
            shadow = None
        policy.end_round(active, accepted[active], passes[active] - 1, shadow)
        ema[active] = updated_ema(ema, accepted, passes - 1)[active]
        last[active] = accepted[active] / table.max_draft
        t[active] += accepted[active] + 1
    return Simulation(length.copy(), spent, cost.autoregressive, table.depth, log, contexts)


def _shadow(
    table: ExperienceTable, text: np.ndarray, t: np.ndarray, accepted: np.ndarray
) -> np.ndarray:
    """Each candidate's share of right predictions at the tokens a round verified, [R, m]."""
    at = np.minimum(t[:, None] + np.arange(table.max_draft + 1), table.tokens.shape[1] - 1)
    right = table.right[text[:, None], :, at]  # [R, D + 1, m]
    judged = np.arange(table.max_draft + 1) <= accepted[:, None]
    share: np.ndarray = (right * judged[..., None]).sum(1) / judged.sum(1, keepdims=True)
    return share


class _Replay:
    """The two phases of a round, read from the table instead of run on the model."""

    def __init__(
        self,
        table: ExperienceTable,
        text: np.ndarray,
        t: np.ndarray,
        ema: np.ndarray,
        last: np.ndarray,
        agree: np.ndarray,
    ) -> None:
        self.table, self.text, self.t = table, text, t
        self.ema, self.last, self.agree = ema, last, agree

    def observe(
        self,
        rows: np.ndarray,
        candidate: np.ndarray,
        index: int,
        features: np.ndarray,
        prefix: np.ndarray,
        chain: np.ndarray,
    ) -> Observation:
        return Observation(
            rows=rows,
            layer=np.array(self.table.exits)[candidate],
            index=np.full(len(rows), index),
            p1=features[:, 0],
            margin=features[:, 1],
            entropy=features[:, 2],
            agree=self.agree[rows],
            ema=self.ema[rows],
            prefix=prefix,
            last_accepted=self.last[rows],
            probe=features[:, 3:] if features.shape[1] > 3 else None,
            chain=chain,
        )

    def walk(
        self,
        policy: Policy,
        rows: np.ndarray,
        candidate: np.ndarray,
        heads: np.ndarray,
        looks: np.ndarray,
    ) -> None:
        table = self.table
        probed_before: int | None = None
        walking = rows
        for j, layer in enumerate(table.exits):
            features = np.full((len(walking), table.features.shape[-1]), np.nan)
            if policy.probes(layer):
                text, t = self.text[walking], self.t[walking]
                features = table.features[text, j, t]
                heads[walking] += policy.needs_head
                looks[walking] += 1
                if probed_before is not None and policy.needs_head:
                    same = table.top[text, j, t] == table.top[text, probed_before, t]
                    self.agree[walking] = same
                probed_before = j
            if j == len(table.exits) - 1:
                candidate[walking] = j
                return
            one = np.ones(len(walking))
            seen = self.observe(walking, np.full(len(walking), j), 1, features, one, one)
            leaves = policy.choose_exit(seen) > 0
            candidate[walking[leaves]] = j
            walking = walking[~leaves]
            if not len(walking):
                return

    def draft(
        self,
        policy: Policy,
        rows: np.ndarray,
        candidate: np.ndarray,
        budget: np.ndarray,
        passes: np.ndarray,
        heads: np.ndarray,
        looks: np.ndarray,
        wrong: np.ndarray,
    ) -> None:
        table, eos = self.table, np.array(self.table.eos, dtype=np.int64)
        layers = np.array(table.exits)[candidate[rows]]
        limit = np.zeros(len(passes), dtype=np.int64)
        limit[rows] = np.minimum(policy.max_drafts(rows, layers), budget[rows])
        prefix, chain = np.ones(len(passes)), np.ones(len(passes))
        probed = np.array([policy.probes(layer) for layer in table.exits])
        going, index = rows, 1
        while True:
            going = going[limit[going] >= index]
            if not len(going):
                return
            text, j, w = self.text[going], candidate[going], wrong[going]
            on = w == 0
            at = np.where(on, self.t[going] + index - 1, self.t[going] + w - 1)
            features, top = table.features[text, j, at], table.top[text, j, at]
            if not on.all() and len(table.branch_top):
                off = np.flatnonzero(~on)
                steps = index - w[off] - 1
                branch = table.branch[text[off], j[off], at[off]]
                features[off] = table.branch_features[branch, steps]
                top[off] = table.branch_top[branch, steps]
            fresh = ~probed[j] if index == 1 else np.ones(len(going), dtype=bool)
            stays = np.ones(len(going), dtype=bool)
            if policy.uses_features:
                looks[going[fresh]] += 1
                seen = self.observe(going, j, index, features, prefix[going], chain[going])
                stays = policy.keep_drafting(seen) > 0
            # A policy that needs no distribution has the head run for the drafts it makes.
            heads[going[fresh if policy.needs_head else stays]] += 1
            stays &= ~np.isin(top, eos)
            prefix[going] *= features[:, 0]
            if features.shape[1] > 3:
                chain[going] *= chance(features[:, 3])
            right = table.right[text, j, np.minimum(at, table.tokens.shape[1] - 1)]
            wrong[going[stays & on & ~right]] = index
            going = going[stays]
            passes[going] += 1
            index += 1


def static_grid(table: ExperienceTable, cost: CostModel) -> np.ndarray:
    """Speedup of every static pair, [m, D]: exit by candidate, d = 1 .. D by column."""
    lead = table.leading()
    rows, m = np.arange(len(table))[:, None, None], np.arange(len(table.exits))[:, None]
    d = np.arange(1, table.max_draft + 1)
    shape = (len(table), len(table.exits), len(d))
    t = np.zeros(shape, dtype=np.int64)
    spent = np.zeros(shape)
    length = table.lengths[:, None, None]
    ends = np.isin(table.top, np.array(table.eos, dtype=np.int64))
    until_end = _first_true_from(ends)
    exits = np.array(table.exits)[:, None]
    while True:
        active = t < length
        if not active.any():
            break
        at = np.minimum(t, table.tokens.shape[1] - 1)
        drafts = np.minimum(np.broadcast_to(d, shape), np.maximum(length - t - 1, 0))
        plain = drafts == 0
        run = lead[rows, m, at]
        stop = until_end[rows, m, at]  # passes before the exit proposes an end of text
        # On the text, an exit that proposes the end stops drafting; off it, static grids ignore
        # the rare end of text that a wrong branch proposes.
        heads = np.minimum(drafts, stop + 1)
        drafts = np.where(stop <= run, np.minimum(drafts, stop), drafts)
        heads = np.where(stop <= run, heads, drafts)
        accepted = np.minimum(run, drafts)
        layer = np.where(plain, table.depth, np.broadcast_to(exits, shape))
        here = cost.round(layer, drafts + 1, np.where(plain, 0, heads))
        spent += np.where(active, here, 0)
        t += np.where(active, accepted + 1, 0)
    grid: np.ndarray = table.lengths.sum() * cost.autoregressive / spent.sum(0)
    return grid


def _first_true_from(flags: np.ndarray) -> np.ndarray:
    """Distance to the first true entry from each position of the last axis on; large if none."""
    far = 10**9
    out = np.full(flags.shape, far, dtype=np.int64)
    out[..., -1] = np.where(flags[..., -1], 0, far)
    for t in range(flags.shape[-1] - 2, -1, -1):
        out[..., t] = np.where(flags[..., t], 0, np.minimum(out[..., t + 1] + 1, far))
    return out


def best_static(table: ExperienceTable, cost: CostModel) -> tuple[StaticPolicy, float]:
    """The static pair with the highest speedup on the table, by the full grid; and that speedup."""
    grid = static_grid(table, cost)
    j, d = np.unravel_index(int(grid.argmax()), grid.shape)
    return StaticPolicy(table.exits[j], int(d) + 1), float(grid[j, d])


class _ManyConfidence(ConfidencePolicy):
    """Exit and threshold by row, to try a grid in one replay."""

    def __init__(self, layers: np.ndarray, thresholds: np.ndarray, products: np.ndarray) -> None:
        super().__init__(int(layers[0]), 0.0)
        self._layers, self._thresholds, self._products = layers, thresholds, products

    def choose_exit(self, observation: Observation) -> np.ndarray:
        return np.where(observation.layer == self._layers[observation.rows], 1.0, -1.0)

    def keep_drafting(self, observation: Observation) -> np.ndarray:
        rows = observation.rows
        seen = observation.p1 * np.where(self._products[rows], observation.prefix, 1.0)
        return np.where(seen >= self._thresholds[rows], 1.0, -1.0)


def best_confidence(
    table: ExperienceTable,
    cost: CostModel,
    thresholds: Iterable[float] = (
        0.0,
        0.003,
        0.01,
        0.02,
        0.05,
        0.1,
        0.2,
        0.3,
        0.4,
        0.5,
        0.6,
        0.7,
        0.8,
        0.9,
    ),
) -> tuple[ConfidencePolicy, float]:
    """The threshold rule with the highest speedup on the table: exit × threshold × kind."""
    grid = [(e, th, k) for e in table.exits for th in thresholds for k in (False, True)]
    count = len(table)
    layers, values, products = (np.repeat(np.array(v), count) for v in zip(*grid, strict=True))
    rows = np.tile(np.arange(count), len(grid))
    policy = _ManyConfidence(layers, values, products)
    result = simulate(table, policy, cost, rows=rows, keep_log=False)
    spent = result.cost.reshape(len(grid), count).sum(1)
    best = int(spent.argmin())
    speedup = float(table.lengths.sum() * cost.autoregressive / spent[best])
    exit_layer, threshold, product = grid[best]
    return ConfidencePolicy(exit_layer, threshold, product=product), speedup


class OraclePolicy(AutoregressivePolicy):
    """Knows the outcome of every draft: the least possible cost, by exact backward induction.

    For each text, V(t) = min over E, k of cost(E, k) + V(t + accepted + 1). It pays for heads but
    not for looking. No policy that must look ahead can be faster: this is the ceiling.

    Args:
        table: Experience of the very texts it will decode.
        cost: What rounds cost.
    """

    autoregressive = False

    def __init__(self, table: ExperienceTable, cost: CostModel) -> None:
        lead, d = table.leading(), np.arange(1, table.max_draft + 1)
        exits = np.array(table.exits)
        rows, width = table.tokens.shape
        value = np.zeros((rows, width + table.max_draft + 2))
        self._exit = np.full((rows, width), table.depth)
        self._drafts = np.zeros((rows, width), dtype=np.int64)
        pair_cost = cost.round(exits[:, None], d + 1, d)
        at = np.arange(rows)
        for t in range(width - 1, -1, -1):
            plain = cost.autoregressive + value[:, t + 1]
            accepted = np.minimum(lead[:, :, t, None], d)
            total = pair_cost + value[at[:, None, None], t + accepted + 1]
            allowed = d <= (table.lengths - t - 1)[:, None, None]
            total = np.where(allowed, total, np.inf).reshape(rows, -1)
            best = total.argmin(1)
            better = total[at, best] < plain
            inside = t < table.lengths
            value[:, t] = np.where(inside, np.where(better, total[at, best], plain), 0)
            self._exit[better, t] = exits[best[better] // len(d)]
            self._drafts[better, t] = d[best[better] % len(d)]
        self._last = table.exits[-1]
        self.speedup = float(table.lengths.sum() * cost.autoregressive / value[:, 0].sum())

    def start_round(self, positions: np.ndarray) -> None:
        """Look up the plan at the rows' positions."""
        self._t = np.minimum(positions, self._exit.shape[1] - 1)

    def choose_exit(self, observation: Observation) -> np.ndarray:
        """Positive at the planned exit."""
        planned = self._exit[observation.rows, self._t[observation.rows]]
        return np.where(observation.layer == planned, 1.0, -1.0)

    def max_drafts(self, rows: np.ndarray, layer: np.ndarray) -> np.ndarray:
        """The planned length."""
        drafts: np.ndarray = self._drafts[rows, self._t[rows]]
        return drafts

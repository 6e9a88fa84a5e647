"""Offline training of the policy on an experience table (section 2.5).

The objective is tokens per second, a ratio. With ρ the speedup so far, a round is worth its
tokens minus ρ times its cost in plain tokens; a policy that maximises this has a higher ratio, and
ρ is then its own (Dinkelbach 1967). ρ is found by replaying the policy, not from the network.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lede.cost import CostModel
from lede.experience import ExperienceTable
from lede.policies import EMA_START, Observation
from lede.qpolicy import DRAFT, PROBE_STATE, WALK, QNetwork, QPolicy, StateSpec
from lede.rollouts import Episodes, products
from lede.simulation import best_static, simulate
from shared_core.errors import InputError
from shared_core.run import progress

__all__ = ["TrainConfig", "TrainResult", "build_episodes", "train_policy"]


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `train_policy`.

    Attributes:
        algo: ``ddqn`` regresses both actions of a state; ``cql`` only the logged one, and keeps
            the other down by α (logsumexp Q - Q(logged)); ``fqi``: fitted Q iteration, which
            regresses on r + max Q of the network as it was at the last refresh, whatever `target`
            says (Ernst et al. 2005); `steps` must allow `refresh` as often as a round is long.
        target: ``expected``: realised rounds of the current policy with the tokens replaced by a
            fitted probability of acceptance; ``returns``: with the tokens that came; ``bootstrap``:
            one-step double DQN, as in the paper.
        steps: Updates.
        batch: States per update.
        lr: Of Adam; a fifth of it for the last 30 %.
        refresh: Updates between replays, which renew targets, ρ and the starts seen.
        tau: Polyak step of the target network (``bootstrap``).
        alpha: Of CQL.
        on_policy: Share of the states drawn from rounds that the current policy visits.
        hidden: Width of the network.
        stride: Take every stride-th start of the table.
        features: The state; by default `StateSpec`'s, or with a probe of hidden states
            `PROBE_STATE`, which needs no head to decide.
        seed: Of everything.
    """

    algo: str = "ddqn"
    target: str = "expected"
    steps: int = 2400
    batch: int = 1024
    lr: float = 1e-3
    refresh: int = 150
    tau: float = 0.02
    alpha: float = 0.1
    on_policy: float = 0.5
    hidden: int = 64
    stride: int = 1
    features: tuple[str, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.algo not in ("ddqn", "cql", "fqi"):
            raise InputError(f"algo={self.algo!r}; accepted: ddqn, cql, fqi")
        if self.target not in ("expected", "returns", "bootstrap"):
            raise InputError(f"target={self.target!r}; accepted: expected, returns, bootstrap")
        if self.steps < 1 or self.refresh < 1 or self.batch < 1:
            raise InputError("steps, refresh and batch must be at least 1")


def build_episodes(table: ExperienceTable, stride: int = 1) -> Episodes:
    """Lay out the rounds from every `stride`-th position with room for a draft.

    Args:
        table: With continuations.
        stride: Distance of the starts.

    Raises:
        InputError: If the table is teacher-only, or no text has room for a draft.
    """
    if not table.complete:
        raise InputError("training needs mode='branch' experience")
    steps = table.max_draft
    width = table.tokens.shape[1]
    room = np.arange(width) < (table.lengths - 1)[:, None]
    room[:, np.arange(width) % stride != 0] = False
    text, t = np.nonzero(room)
    if not len(text):
        raise InputError("no text is longer than one token; generate more")
    lead = table.leading()[text, :, t]  # [N, m]
    i = np.arange(1, steps + 2)
    alive = (i - 1 <= lead[..., None]).astype(np.float32)
    m = np.arange(len(table.exits))[:, None]
    index = i[:steps]
    at = np.minimum(t[:, None, None] + np.minimum(index - 1, lead[..., None]), width - 1)
    features = table.features[text[:, None, None], m, at]
    off = index > lead[..., None] + 1
    if len(table.branch_top):
        branch = table.branch[text[:, None, None], m, at]
        # Past the end of a text there is no continuation; the budget ends drafts before.
        off &= branch >= 0
        step = np.clip(index - lead[..., None] - 2, 0, table.branch_top.shape[1] - 1)
        features = np.where(off[..., None], table.branch_features[branch, step], features)
    prefix, chain = products(features)
    return Episodes(
        table.exits,
        table.depth,
        steps,
        text,
        t,
        features,
        alive,
        table.agree[text, :, t],
        np.minimum(steps, table.lengths[text] - t - 1),
        prefix,
        chain,
        np.full(len(text), EMA_START),
        np.zeros(len(text)),
        table.probe,
    )


@dataclass
class TrainResult:
    """A trained policy and how training went.

    Attributes:
        policy: The best checkpoint, in mode ``full``.
        checkpoints: Every checkpoint with its speedup on the validation experience.
        history: One record per refresh: step, loss, rho, validation, mean_exit, acceptance,
            mean_draft.
        rho: Speedup of the best checkpoint on the training experience.
    """

    policy: QPolicy
    checkpoints: list[tuple[float, QPolicy]] = field(repr=False)
    history: list[dict[str, float]]
    rho: float


class EpisodeArrays:
    """Static arrays of the episodes, and the targets that a policy and ρ give them."""

    def __init__(
        self, table: ExperienceTable | Episodes, cost: CostModel, config: TrainConfig
    ) -> None:
        self.cost, self.config = cost, config
        if isinstance(table, ExperienceTable):
            table = build_episodes(table, config.stride)
        self.e = e = table
        usual = PROBE_STATE if table.probe else StateSpec().names
        self.spec = spec = StateSpec(config.features or usual)
        if spec.needs_probe and table.probe is None:
            raise InputError("features of a probe need experience collected with probe=")
        self.m, self.steps = len(table.exits), table.max_draft
        layer = np.array(table.exits)[:, None]
        k = np.arange(1, self.steps + 2)
        unit = cost.autoregressive
        early = (k * layer * cost.layer[0]) / unit
        # The last pass of the longest round is not looked at; a policy that needs no distribution
        # has the head run only for the drafts that it makes.
        made = np.minimum(k, self.steps) if spec.needs_head else k - 1
        heads = (made * cost.head[0] + np.minimum(k, self.steps) * cost.look) / unit
        late = ((table.depth - layer) * cost.layer_cost(k) + cost.head_cost(k)) / unit
        self.sunk = torch.tensor(early + heads, dtype=torch.float32)  # [m, D + 1]
        self.late = torch.tensor(late, dtype=torch.float32)
        self.look = (cost.head[0] * spec.needs_head + cost.look) / unit
        index = torch.arange(1, self.steps + 1)
        limit = torch.from_numpy(e.limit)[:, None, None]
        self.valid = (index <= limit).expand(-1, self.m, -1)  # a decision may be taken
        self.forced = torch.from_numpy(e.limit)  # drafts end here at the latest
        # A fixed exit is not preceded by a walk, so that agreement is 0 there: show both.
        flip = np.random.default_rng(config.seed).random(e.agree.shape) < 0.5
        self.agree_draft = np.where(flip, e.agree, 0.0)
        self.alive = torch.from_numpy(e.alive)
        self.tokens = self.alive.cumsum(-1)
        self.set_contexts(e.ema, e.last_accepted)

    def set_contexts(self, ema: np.ndarray, last: np.ndarray) -> None:
        """Build the states of all decisions with these averages at the starts."""
        e = self.e
        shape = e.prefix.shape
        layer = np.broadcast_to(np.array(e.exits)[:, None], shape)

        def spread(value: np.ndarray) -> np.ndarray:
            return np.broadcast_to(value, shape)

        seen = Observation(
            rows=np.arange(0),
            layer=layer.ravel(),
            index=spread(np.arange(1, self.steps + 1)).ravel(),
            p1=e.features[..., 0].ravel(),
            margin=e.features[..., 1].ravel(),
            entropy=e.features[..., 2].ravel(),
            agree=spread(self.agree_draft[..., None]).ravel(),
            ema=spread(ema[:, None, None]).ravel(),
            prefix=e.prefix.ravel(),
            last_accepted=spread(last[:, None, None]).ravel(),
            probe=e.features[..., 3:].reshape(-1, 2) if e.features.shape[-1] > 3 else None,
            chain=e.chain.ravel(),
        )
        states = self.spec.states(DRAFT, seen, e.depth, self.steps)
        self.draft_states = torch.from_numpy(states).view(*shape, -1)
        seen.agree = spread(e.agree[..., None]).ravel()
        states = self.spec.states(WALK, seen, e.depth, self.steps)
        self.walk_states = torch.from_numpy(states).view(*shape, -1)[:, :, 0]

    def q_all(self, network: QNetwork) -> tuple[Tensor, Tensor]:
        """Q of all draft states [N, m, D, 2] and walk states [N, m, 2]."""
        with torch.no_grad():
            out = []
            for phase, states in ((DRAFT, self.draft_states), (WALK, self.walk_states)):
                flat = states.reshape(-1, states.shape[-1])
                repeat = states[0, 0].numel() // states.shape[-1]
                candidate = torch.arange(self.m).repeat_interleave(repeat).repeat(len(states))
                parts = [
                    network(s, c, phase)
                    for s, c in zip(
                        torch.split(flat, 65536), torch.split(candidate, 65536), strict=True
                    )
                ]
                out.append(torch.cat(parts).view(*states.shape[:-1], 2))
        return out[0], out[1]

    def returns(self, network: QNetwork, rho: float, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Targets of both actions under the network's own greedy continuation.

        Sunk cost (layers and heads already paid in this round) is left out of all values.
        """
        q_draft, q_walk = self.q_all(network)
        count = len(tokens)
        total = tokens - rho * (self.sunk + self.late)  # payoff of stopping after k passes
        forced = (self.forced + 1).view(-1, 1, 1)
        k = torch.arange(1, self.steps + 2)
        # At the budget's end the last pass needs no head.
        total = total + rho * self.look * ((k == forced) & (k <= self.steps))
        stops = (q_draft[..., 1] >= q_draft[..., 0]) | ~self.valid
        following = torch.empty((count, self.m, self.steps + 1))
        following[..., -1] = total[..., -1]
        for i in range(self.steps - 1, -1, -1):
            following[..., i] = torch.where(stops[..., i], total[..., i], following[..., i + 1])
        sunk = rho * self.sunk
        draft = torch.stack([following[..., 1:], total[..., :-1]], -1) + sunk[:, :-1, None]
        walk = torch.zeros(count, self.m, 2)
        looks = torch.arange(self.m) * rho * self.look
        here = following[..., 0] - looks  # earlier looks of the walk are paid as well
        value = here[:, -1]
        for j in range(self.m - 2, -1, -1):
            paid = sunk[j, 0] + looks[j]
            walk[:, j, 0], walk[:, j, 1] = value + paid, here[:, j] + paid
            exits = q_walk[:, j, 1] >= q_walk[:, j, 0]
            value = torch.where(exits, here[:, j], value)
        reached = torch.cumprod((~stops).float(), -1)
        self.reached = torch.cat([torch.ones(count, self.m, 1), reached[..., :-1]], -1) > 0
        return draft, walk

    def ratio(self, network: QNetwork) -> tuple[float, float, float, float]:
        """Expected tokens per cost over the starts, mean exit, acceptance and mean draft length.

        Every start counts alike, whatever policy it was met under.
        """
        q_draft, q_walk = self.q_all(network)
        stops = (q_draft[..., 1] >= q_draft[..., 0]) | ~self.valid
        stops = torch.cat([stops, torch.ones_like(stops[..., :1])], -1)
        at = stops.int().argmax(-1, keepdim=True)  # drafts made, at every exit
        exits = q_walk[..., 1] >= q_walk[..., 0]
        exits[:, -1] = True
        j = exits.int().argmax(-1, keepdim=True)
        spent = self.sunk + self.late
        cost = spent.expand(len(at), -1, -1).gather(-1, at)[..., 0]
        whole = (at[..., 0] == self.forced[:, None]) & (at[..., 0] < self.steps)
        cost = cost - self.look * whole + self.look * torch.arange(self.m)
        tokens = self.tokens.gather(-1, at)[..., 0]
        tokens, cost, drafts = (v.gather(1, j) for v in (tokens, cost, at[..., 0]))
        layer = torch.tensor(self.e.exits)[j].double().mean()
        accepted = (tokens - 1).sum() / drafts.sum().clamp(min=1)
        rho = tokens.sum() / cost.sum()
        return float(rho), float(layer), float(accepted), float(drafts.double().mean())

    def best_fixed(self) -> float:
        """Expected tokens per cost of the best static pair over the starts."""
        k = torch.minimum(torch.arange(self.steps + 1), self.forced[:, None])
        tokens = self.tokens.gather(-1, k[:, None].expand(-1, self.m, -1))
        cost = (self.sunk + self.late).expand(len(k), -1, -1)
        cost = cost.gather(-1, k[:, None].expand(-1, self.m, -1))
        return float((tokens.sum(0) / cost.sum(0)).max())

    def bootstrap(
        self, network: QNetwork, target: QNetwork, rho: float, n: Tensor, j: Tensor, i: Tensor
    ) -> Tensor:
        """One-step double-DQN targets of draft states (n, j, i), [batch, 2]."""
        sunk = rho * self.sunk
        stop = self.tokens[n, j, i] - rho * self.late[j, i]
        step = sunk[j, i + 1] - sunk[j, i]
        last = i + 1 >= self.forced[n]
        after = (i + 1).clamp(max=self.steps - 1)
        states = self.draft_states[n, j, after]
        with torch.no_grad():
            best = network(states, j, DRAFT).argmax(-1, keepdim=True)
            later = target(states, j, DRAFT).gather(-1, best)[:, 0]
        end = self.tokens[n, j, i + 1] - rho * self.late[j, i + 1]
        end = end + rho * self.look * (i + 1 < self.steps)
        return torch.stack([torch.where(last, end, later) - step, stop], -1)

    def bootstrap_walk(
        self, network: QNetwork, target: QNetwork, rho: float, n: Tensor, j: Tensor
    ) -> Tensor:
        """One-step double-DQN targets of walk states (n, j), [batch, 2]."""
        first = torch.zeros_like(j)
        with torch.no_grad():

            def best(states: Tensor, at: Tensor, phase: int) -> Tensor:
                chosen = network(states, at, phase).argmax(-1, keepdim=True)
                found: Tensor = target(states, at, phase).gather(-1, chosen)[:, 0]
                return found

            here = best(self.draft_states[n, j, first], j, DRAFT)
            deeper = j + 1
            at_end = best(self.draft_states[n, deeper, first], deeper, DRAFT)
            walking = best(self.walk_states[n, deeper], deeper, WALK)
        step = rho * (self.sunk[deeper, 0] - self.sunk[j, 0] + self.look)
        later = torch.where(deeper == self.m - 1, at_end, walking) - step
        return torch.stack([later, here], -1)


def _expected_tokens(trainer: EpisodeArrays, generator: torch.Generator, steps: int) -> Tensor:
    """Tokens with 0/1 outcomes replaced by a fitted P(all drafts up to i right | state i)."""
    network = QNetwork(trainer.draft_states.shape[-1], trainer.m, trainer.config.hidden)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    where = trainer.valid.nonzero()
    for step in range(steps):
        if step == int(steps * 0.7):
            optimizer.param_groups[0]["lr"] = 6e-4
        n, j, i = where[torch.randint(len(where), (2048,), generator=generator)].T
        logit = network(trainer.draft_states[n, j, i], j, DRAFT)[:, 0]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            logit, trainer.alive[n, j, i + 1]
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    q_draft, _ = trainer.q_all(network)
    alive = torch.cat([torch.ones_like(q_draft[..., :1, 0]), q_draft[..., 0].sigmoid()], -1)
    return alive.cumsum(-1)


def conservative_loss(q: Tensor, y: Tensor, taken: Tensor, alpha: float) -> Tensor:
    """CQL: squared error of the logged action, and α (logsumexp Q - Q(logged)); the mean of both.

    Args:
        q: Values of both actions, [N, 2].
        y: Targets of both, [N, 2].
        taken: The logged action, int64, [N].
        alpha: α.

    Examples:
        >>> q, y = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 3.0]])
        >>> round(conservative_loss(q, y, torch.tensor([0]), alpha=1.0).item(), 4)
        1.6931
    """
    logged, goal = (v.gather(1, taken[:, None])[:, 0] for v in (q, y))
    return ((logged - goal) ** 2 + alpha * (q.logsumexp(1) - logged)).mean()


def train_policy(
    table: ExperienceTable | Episodes,
    cost: CostModel,
    config: TrainConfig | None = None,
    *,
    validation: ExperienceTable | Episodes | None = None,
) -> TrainResult:
    """Train a `QPolicy` and keep the checkpoint that is fastest on validation experience.

    Args:
        table: Training experience: a table with continuations, or roll-outs (for sampling).
        cost: What rounds cost.
        config: Settings.
        validation: To choose the checkpoint on; by default the training experience.

    Raises:
        InputError: If the experience is teacher-only or too short.
    """
    config = config or TrainConfig()
    generator = torch.Generator().manual_seed(config.seed)
    held_out = table if validation is None else validation
    state = torch.get_rng_state()
    torch.manual_seed(config.seed)
    try:
        return _train(table, held_out, cost, config, generator)
    finally:
        torch.set_rng_state(state)


class _Measure:
    """How fast a network's policy is, on a table by replay, on roll-outs by expectation."""

    def __init__(
        self, source: ExperienceTable | Episodes, cost: CostModel, config: TrainConfig
    ) -> None:
        self.source, self.cost = source, cost
        self._rollouts = (
            None if isinstance(source, ExperienceTable) else EpisodeArrays(source, cost, config)
        )

    def __call__(self, network: QNetwork, policy: QPolicy) -> tuple[dict[str, float], Any]:
        """Speedup, mean exit, acceptance, mean draft length; and the round starts of a replay."""
        names = ("speedup", "mean_exit", "acceptance", "mean_draft")
        if self._rollouts is not None:
            return dict(zip(names, self._rollouts.ratio(network), strict=True)), None
        assert isinstance(self.source, ExperienceTable)
        found = simulate(self.source, policy, self.cost)
        values = (
            found.speedup,
            found.mean_exit_layer,
            found.acceptance_rate,
            found.mean_draft_len,
        )
        return dict(zip(names, values, strict=True)), found.contexts


def _train(
    table: ExperienceTable | Episodes,
    held_out: ExperienceTable | Episodes,
    cost: CostModel,
    config: TrainConfig,
    generator: torch.Generator,
) -> TrainResult:
    trainer = EpisodeArrays(table, cost, config)
    on_training, on_held_out = (_Measure(t, cost, config) for t in (table, held_out))
    if isinstance(table, ExperienceTable):
        static, rho = best_static(table, cost)
        seen = simulate(table, static, cost, keep_log=False)
        visited = _use_contexts(trainer, seen.contexts)
    else:
        rho, visited = trainer.best_fixed(), torch.arange(len(table))
    network = QNetwork(len(trainer.spec.names), trainer.m, config.hidden)
    target = copy.deepcopy(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=config.lr)
    tokens = trainer.tokens
    if config.target == "expected":
        tokens = _expected_tokens(trainer, generator, max(200, config.steps // 3))
    where = trainer.valid.nonzero()
    logged = torch.randint(2, trainer.valid.shape, generator=generator)
    history: list[dict[str, float]] = []
    checkpoints: list[tuple[float, QPolicy]] = []
    losses: list[float] = []

    def snapshot() -> QPolicy:
        weights = network.weights()
        return QPolicy(
            weights, table.exits, table.depth, table.max_draft, trainer.spec, probe=table.probe
        )

    draft, walk = trainer.returns(network, rho, tokens)
    for step in progress(range(config.steps), description="training the policy", unit="step"):
        if step == int(config.steps * 0.7):
            optimizer.param_groups[0]["lr"] = config.lr / 5
        if step and step % config.refresh == 0:
            policy = snapshot()
            result, contexts = on_training(network, policy)
            if step >= min(600, config.steps // 3):
                rho = max(1.0, result.pop("speedup"))
            if contexts is not None:
                visited = _use_contexts(trainer, contexts)
            if config.algo == "fqi":
                target.load_state_dict(network.state_dict())
            draft, walk = trainer.returns(network, rho, tokens)
            value = on_held_out(network, policy)[0]["speedup"]
            checkpoints.append((value, policy))
            history.append(
                {
                    "step": float(step),
                    "loss": float(np.mean(losses)),
                    "rho": rho,
                    "validation": value,
                    **{k: result[k] for k in ("mean_exit", "acceptance", "mean_draft")},
                }
            )
            losses.clear()
        n, j, i = where[torch.randint(len(where), (config.batch,), generator=generator)].T
        own = int(config.batch * config.on_policy)
        if own and len(visited):
            # Rounds of the current policy, up to where it stops.
            n = n.clone()
            n[:own] = visited[torch.randint(len(visited), (own,), generator=generator)]
            ok = trainer.valid[n, j, i] & (trainer.reached[n, j, i] | (torch.arange(len(n)) >= own))
            n, j, i = n[ok], j[ok], i[ok]
        size = config.batch // 4
        w_n = n[torch.randint(len(n), (size,), generator=generator)]
        w_j = torch.randint(max(1, trainer.m - 1), (size,), generator=generator)
        q = network(trainer.draft_states[n, j, i], j, DRAFT)
        q_walk = network(trainer.walk_states[w_n, w_j], w_j, WALK)
        if config.algo == "fqi" or config.target == "bootstrap":
            chooser = target if config.algo == "fqi" else network
            y = trainer.bootstrap(chooser, target, rho, n, j, i)
            y_walk = trainer.bootstrap_walk(chooser, target, rho, w_n, w_j)
        else:
            y, y_walk = draft[n, j, i], walk[w_n, w_j]
        if config.algo == "cql":
            loss = conservative_loss(q, y, logged[n, j, i], config.alpha)
        else:
            loss = ((q - y) ** 2).mean()
        if trainer.m > 1:
            loss = loss + ((q_walk - y_walk) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
        if config.algo != "fqi":
            with torch.no_grad():
                for slow, fast in zip(target.parameters(), network.parameters(), strict=True):
                    slow.lerp_(fast, config.tau)
    policy = snapshot()
    checkpoints.append((on_held_out(network, policy)[0]["speedup"], policy))
    best = max(checkpoints, key=lambda pair: pair[0])[1]
    network.load(best.weights)
    return TrainResult(best, checkpoints, history, on_training(network, best)[0]["speedup"])


def _use_contexts(trainer: EpisodeArrays, contexts: tuple[np.ndarray, np.ndarray]) -> Tensor:
    """Give every start the averages of the round before it; return the starts that were visited."""
    e = trainer.e
    filled: list[Any] = []
    for value, default in zip(contexts, (EMA_START, 0.0), strict=True):
        known = ~np.isnan(value)
        latest = np.maximum.accumulate(np.where(known, np.arange(value.shape[1]), 0), axis=1)
        spread = np.take_along_axis(np.where(known, value, default), latest, axis=1)
        filled.append(spread[e.text, e.position])
    trainer.set_contexts(*filled)
    return torch.from_numpy(np.flatnonzero(~np.isnan(contexts[0])[e.text, e.position]))

"""The policy learns: targets, checks, the two-regime world, saving, the floor."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lede
from lede import CostModel, ExperienceTable, QPolicy, TrainConfig
from lede.policies import updated_ema
from lede.training import EpisodeArrays, build_episodes, conservative_loss

COST = CostModel.memory_bound(12)


def two_regimes(
    texts: int = 40, length: int = 60, seed: int = 0, depth: int = 12, switch: float = 0.08
) -> Any:
    """Easy stretches, where exit 2 is always right, and hard ones, where only exit 6 is.

    p₁ shows the regime (0.9 or 0.5, with noise). After a wrong draft everything stays wrong.
    """
    generator = np.random.default_rng(seed)
    exits, longest = (2, 6), 8
    easy = np.zeros((texts, length), dtype=bool)
    for row in range(texts):
        state = generator.random() < 0.5
        for t in range(length):
            if generator.random() < switch:
                state = not state
            easy[row, t] = state
    tokens = generator.integers(2, 50, size=(texts, length))
    right = np.stack([easy, np.ones_like(easy)], 1)
    top = np.where(right, tokens[:, None], 1)
    p1 = np.where(easy[:, None], 0.9, 0.5) + generator.normal(0, 0.03, (texts, 2, length))
    p1 = np.clip(p1, 0.05, 0.999)
    features = np.stack([p1, 2 * p1 - 1, 1 - p1], -1)
    branch = np.full(top.shape, -1)
    where = np.argwhere(~right)
    branch[tuple(where.T)] = np.arange(len(where))
    wrong = np.clip(0.5 + generator.normal(0, 0.03, (len(where), longest - 1)), 0.05, 0.999)
    return ExperienceTable(
        exits,
        depth,
        longest,
        np.full(texts, length),
        tokens,
        top,
        features,
        branch,
        np.ones((len(where), longest - 1), dtype=np.int64),
        np.stack([wrong, 2 * wrong - 1, 1 - wrong], -1),
    )


@pytest.mark.parametrize(("target", "share"), [("expected", 0.95), ("returns", 0.9)])
def test_two_regimes_are_learnt(target: str, share: float) -> None:
    """At least 15 % over every static pair and 95 % of the clairvoyant ceiling, on other texts."""
    train, validation, test = (two_regimes(40, 100, s, switch=0.03) for s in range(3))
    config = TrainConfig(target=target, steps=900, batch=512, seed=0)
    result = lede.train_policy(train, COST, config, validation=validation)
    learned = lede.simulate(test, result.policy, COST).speedup
    static = lede.best_static(test, COST)[1]
    ceiling = lede.OraclePolicy(test, COST).speedup
    assert learned > 1.15 * static
    assert learned > share * ceiling
    for baseline in (lede.DraftVerifyPolicy(2), lede.DraftVerifyPolicy(6), lede.DELPolicy()):
        assert learned > lede.simulate(test, baseline, COST).speedup
    # The ρ of every target is the ratio of the policy that it was computed for.
    for record, (_, policy) in zip(result.history, result.checkpoints, strict=False):
        if record["step"] >= 300:
            found = lede.simulate(train, policy, COST)
            ratio = found.tokens.sum() * COST.autoregressive / found.cost.sum()
            assert record["rho"] == pytest.approx(ratio)
    found = lede.simulate(train, result.policy, COST)
    assert result.rho == pytest.approx(found.tokens.sum() * COST.autoregressive / found.cost.sum())


def tabular(texts: int, length: int, seed: int) -> ExperienceTable:
    """Positions without memory: three levels of p₁, each right as often as it says."""
    generator = np.random.default_rng(seed)
    longest, levels = 4, np.array(LEVELS)
    tokens = generator.integers(2, 50, size=(texts, length))
    level = generator.integers(3, size=(texts, 2, length))
    right = generator.random(level.shape) < levels[np.arange(2)[:, None], level]
    top = np.where(right, tokens[:, None], 1)
    where = np.argwhere(~right)
    branch = np.full(top.shape, -1)
    branch[tuple(where.T)] = np.arange(len(where))

    def features(level: np.ndarray) -> np.ndarray:
        shown = np.array([0.9, 0.6, 0.3])[level]
        return np.stack([shown, shown, shown], -1)

    off = features(generator.integers(3, size=(len(where), longest - 1)))
    ones = np.ones(off.shape[:2], dtype=np.int64)
    lengths = np.full(texts, length)
    return ExperienceTable(
        (2, 6), 12, longest, lengths, tokens, top, features(level), branch, ones, off
    )


LEVELS = ((0.95, 0.5, 0.05), (1.0, 0.9, 0.5))  # chance of being right, by exit and level


def optimum_of_the_tabular_world() -> float:
    """The best ratio by backward induction over beliefs, ρ by Dinkelbach's iteration."""
    look, plain = COST.head[0] + COST.look, COST.autoregressive

    def drafting(j: int, level: int, passes: int, belief: float, tokens: float, rho: float) -> Any:
        """Best (tokens - ρ cost, tokens, cost) from here on; costs so far are not counted."""
        layer = (2, 6)[j]
        late = ((12 - layer) * COST.layer_cost(passes) + COST.head_cost(passes)) / plain
        stop = tokens - rho * late, tokens, late
        if passes == 5:
            return stop
        belief *= LEVELS[j][level]
        step = (layer + (look if passes < 4 else 0)) / plain
        ways = [drafting(j, n, passes + 1, belief, tokens + belief, rho) for n in range(3)]
        if passes == 4:
            ways = ways[:1]
        value, gained, spent = np.mean(ways, axis=0)
        on = value - rho * step, gained, spent + step
        return max(stop, on)

    rho = 1.0
    for _ in range(20):
        deep = np.mean([drafting(1, n, 1, 1.0, 1.0, rho) for n in range(3)], axis=0)
        more = (4 + look) / plain
        deep = (deep[0] - rho * more, deep[1], deep[2] + more)
        rounds = [max(drafting(0, n, 1, 1.0, 1.0, rho), deep, key=lambda w: w[0]) for n in range(3)]
        _, tokens, spent = np.mean(rounds, axis=0)
        before, rho = rho, float(tokens / (spent + (2 + look) / plain))
        assert rho >= before - 1e-12  # exact solves rise
    assert rho == pytest.approx(before, abs=1e-9)
    return rho


def test_within_three_percent_of_backward_induction() -> None:
    train, validation, test = (tabular(40, 120, s) for s in range(3))
    best = optimum_of_the_tabular_world()
    config = TrainConfig(steps=900, batch=512)
    policy = lede.train_policy(train, COST, config, validation=validation).policy
    learned = lede.simulate(tabular(150, 200, 9), policy, COST).speedup
    assert 0.97 * best < learned < 1.01 * best
    assert lede.best_static(test, COST)[1] < best


def test_training_is_reproducible() -> None:
    table = two_regimes(12, 30)
    config = TrainConfig(steps=60, refresh=20, batch=64, seed=3)
    a, b = (lede.train_policy(table, COST, config) for _ in range(2))
    assert a.history == b.history
    for name, value in a.policy.weights.items():
        np.testing.assert_array_equal(value, b.policy.weights[name])


@pytest.mark.parametrize(
    "settings",
    [
        {"target": "bootstrap"},
        {"algo": "cql", "target": "returns"},
        {"target": "returns"},
        {"algo": "fqi"},
    ],
)
def test_every_design_trains(settings: dict[str, str]) -> None:
    table = two_regimes(16, 30)
    config = TrainConfig(steps=200, refresh=50, batch=256, **settings)
    result = lede.train_policy(table, COST, config)
    assert result.rho > 1.0
    assert len(result.history) == 3


def test_returns_against_a_loop() -> None:
    """Both actions' values under a random network's greedy continuation, state by state."""
    table = two_regimes(3, 12)
    trainer = EpisodeArrays(table, COST, TrainConfig())
    from lede.qpolicy import QNetwork

    torch.manual_seed(0)
    network = QNetwork(13, 2)
    rho = 1.4
    draft, walk = trainer.returns(network, rho, trainer.tokens)
    q_draft, _ = trainer.q_all(network)
    e, unit, deep = trainer.e, COST.autoregressive, 12
    look = COST.head[0] + COST.look
    lead = table.leading()

    def stop_value(n: int, j: int, k: int) -> float:
        tokens = 1 + min(int(lead[e.text[n], j, e.position[n]]), k - 1)
        late = (deep - table.exits[j]) * COST.layer_cost(k) + COST.head_cost(k)
        return tokens - rho * late / unit

    def go_on(n: int, j: int, k: int) -> float:
        """Draft once more from pass k, then follow the network."""
        spent = table.exits[j] / unit
        end = k + 1 == e.limit[n] + 1
        if not end:
            spent += look / unit
        if end or q_draft[n, j, k, 1] >= q_draft[n, j, k, 0]:
            return stop_value(n, j, k + 1) - rho * spent
        return go_on(n, j, k + 1) - rho * spent

    for n in range(0, len(e.text), 5):
        first = []
        for j in range(2):
            for k in range(1, int(e.limit[n]) + 1):
                assert draft[n, j, k - 1, 1] == pytest.approx(stop_value(n, j, k), abs=1e-4)
                assert draft[n, j, k - 1, 0] == pytest.approx(go_on(n, j, k), abs=1e-4)
            stops = q_draft[n, j, 0, 1] >= q_draft[n, j, 0, 0]
            first.append(stop_value(n, j, 1) if stops else go_on(n, j, 1))
        assert walk[n, 0, 1] == pytest.approx(first[0], abs=1e-4)
        deeper = rho * (table.exits[1] - table.exits[0] + look) / unit
        assert walk[n, 0, 0] == pytest.approx(first[1] - deeper, abs=1e-4)


def test_double_dqn_targets_in_numpy() -> None:
    """r + Q_target(s', argmax Q(s')), one decision on; at the budget's end the round's payoff."""
    from lede.qpolicy import QNetwork

    table = two_regimes(3, 12)
    arrays = EpisodeArrays(table, COST, TrainConfig())
    torch.manual_seed(0)
    network, target = QNetwork(13, 2), QNetwork(13, 2)
    rho, unit, exits = 1.4, COST.autoregressive, table.exits
    look = COST.head[0] + COST.look
    (q_draft, q_walk), (t_draft, t_walk) = (
        [q.numpy() for q in arrays.q_all(n)] for n in (network, target)
    )
    lead, e = table.leading(), arrays.e

    def payoff(n: int, j: int, k: int) -> float:
        tokens = 1 + min(int(lead[e.text[n], j, e.position[n]]), k - 1)
        late = (12 - exits[j]) * COST.layer_cost(k) + COST.head_cost(k)
        return float(tokens - rho * late / unit)

    n, j, i = arrays.valid.nonzero().T
    found = arrays.bootstrap(network, target, rho, n, j, i).numpy()
    ends = 0
    for row, (n_, j_, i_) in enumerate(zip(n.tolist(), j.tolist(), i.tolist(), strict=True)):
        k = i_ + 1  # passes so far
        assert found[row, 1] == pytest.approx(payoff(n_, j_, k), abs=1e-4)
        fed = rho * exits[j_] / unit
        if k == e.limit[n_]:  # no further decision, and no further look
            later, ends = payoff(n_, j_, k + 1), ends + 1
        else:
            later = t_draft[n_, j_, i_ + 1, q_draft[n_, j_, i_ + 1].argmax()] - rho * look / unit
        assert found[row, 0] == pytest.approx(later - fed, abs=1e-4)
    assert 0 < ends < len(n)
    starts = torch.arange(len(e.text))
    found = arrays.bootstrap_walk(network, target, rho, starts, torch.zeros_like(starts)).numpy()
    for n_ in range(len(e.text)):
        here = t_draft[n_, 0, 0, q_draft[n_, 0, 0].argmax()]
        deep = t_draft[n_, 1, 0, q_draft[n_, 1, 0].argmax()]
        step = rho * (exits[1] - exits[0] + look) / unit
        assert found[n_, 1] == pytest.approx(here, abs=1e-4)
        assert found[n_, 0] == pytest.approx(deep - step, abs=1e-4)
    assert q_walk.shape == t_walk.shape  # with two exits, no walk state follows another


def test_conservative_loss_in_numpy() -> None:
    rng = np.random.default_rng(0)
    q, y = rng.normal(size=(2, 50, 2))
    taken = rng.integers(2, size=50)
    rows = np.arange(50)
    expected = np.mean(
        (q[rows, taken] - y[rows, taken]) ** 2 + 0.7 * (np.log(np.exp(q).sum(1)) - q[rows, taken])
    )
    tensors = torch.from_numpy(q).requires_grad_(), torch.from_numpy(y), torch.from_numpy(taken)
    loss = conservative_loss(*tensors, alpha=0.7)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(
        lambda value: conservative_loss(value, *tensors[1:], alpha=0.7), tensors[0]
    )


def test_transitions_add_up_to_rounds() -> None:
    """The rewards of an exported episode are its tokens minus ρ times the round's counted cost."""
    table, rho = two_regimes(6, 20), 1.3
    config = TrainConfig(seed=4, stride=2)
    found = lede.to_d3rlpy(table, COST, config, rho=rho)
    e, lead = build_episodes(table, 2), table.leading()
    ends = np.flatnonzero(found["terminals"])
    assert len(ends) == len(e.text)
    assert len({len(v) for v in found.values()}) == 1
    assert found["observations"].dtype == found["rewards"].dtype == np.float32
    first, lengths, kinds = 0, set(), set()
    for n, end in enumerate(ends):
        action = found["actions"][first : end + 1].tolist()
        total = found["rewards"][first : end + 1].sum()
        phase = found["observations"][first : end + 1, 0]
        walked = int((phase == 0).sum())
        assert walked == 1  # two exits: one decision to climb
        j = 0 if action[0] == 1 else 1
        drafts = action[walked:].count(0)
        stopped = action[-1] == 1
        assert stopped or drafts == e.limit[n]
        k = drafts + 1
        seen = drafts + stopped  # passes looked at, each with a head
        tokens = 1 + min(int(lead[e.text[n], j, e.position[n]]), drafts)
        cost = COST.round(table.exits[j], k, seen + j, seen + j) / COST.autoregressive
        assert total == pytest.approx(tokens - rho * cost, abs=1e-4)
        lengths.add(k)
        kinds.add((j, stopped))
        first = end + 1
    assert len(kinds) == 4
    assert max(lengths) == 9
    by_default = lede.to_d3rlpy(table, COST, config)["rewards"]
    assert not np.array_equal(by_default, found["rewards"])


def test_episodes_repeat_the_table() -> None:
    table = two_regimes(4, 20)
    e = build_episodes(table, stride=3)
    assert set(e.position % 3) == {0}
    lead = table.leading()
    for n in range(len(e.text)):
        b, t = e.text[n], e.position[n]
        for j in range(2):
            for i in range(1, int(e.limit[n]) + 1):
                run = lead[b, j, t]
                if i <= run + 1:
                    expected = table.features[b, j, t + i - 1]
                else:
                    branch = table.branch[b, j, t + run]
                    expected = table.branch_features[branch, i - run - 2]
                np.testing.assert_array_equal(e.features[n, j, i - 1], expected)
                assert e.alive[n, j, i] == (i <= run)


def test_the_delivered_policy_is_never_below_static_on_validation() -> None:
    train, validation = two_regimes(20, 40, 0), two_regimes(20, 40, 1)
    useless = lede.train_policy(train, COST, TrainConfig(steps=1)).policy
    choice = lede.choose_policy([useless], train, validation, COST)
    best = lede.simulate(validation, choice.policy, COST).speedup
    for kind in ("static", "threshold", "draft_verify", "full", "draft_only", "exit_only"):
        assert best >= lede.simulate(validation, choice.best[kind], COST).speedup
    assert best == max(t["validation"] for t in choice.tried)
    assert lede.choose_policy([], train, validation, COST).name in choice.best


def test_policy_is_saved_bit_exact(tmp_path: Path) -> None:
    table = two_regimes(8, 20)
    policy = lede.train_policy(table, COST, TrainConfig(steps=20, batch=32)).policy
    for saved in (
        policy,
        policy.variant("draft_only", exit_layer=6),
        policy.variant("exit_only", num_draft=3, active=(2, 6)),
    ):
        saved.save_pretrained(tmp_path / "p")
        again = QPolicy.from_pretrained(tmp_path / "p")
        assert repr(again) == repr(saved)
        for name, value in saved.weights.items():
            np.testing.assert_array_equal(again.weights[name], value)
        assert lede.simulate(table, again, COST).log == lede.simulate(table, saved, COST).log
    settings = json.loads((tmp_path / "p/policy.json").read_text())
    for change, message in (
        ({"exits": [2, 4, 6]}, "12 values|gives 8 values"),
        ({"features": ["p1"]}, "takes 13 features"),
    ):
        (tmp_path / "p/policy.json").write_text(json.dumps({**settings, **change}))
        with pytest.raises(lede.PolicyMismatchError, match=message):
            QPolicy.from_pretrained(tmp_path / "p")
    (tmp_path / "p/policy.json").write_text("{")
    with pytest.raises(ValueError, match="does not hold a whole policy"):
        QPolicy.from_pretrained(tmp_path / "p")


def test_network_and_numpy_policy_agree() -> None:
    from lede.policies import Observation
    from lede.qpolicy import DRAFT, QNetwork, StateSpec

    torch.manual_seed(0)
    network, generator = QNetwork(13, 3), np.random.default_rng(0)
    policy = QPolicy(network.weights(), (2, 4, 6), 8, 12)
    layer = generator.choice([2, 4, 6], 20)
    seen = Observation(
        np.arange(20), layer, generator.integers(1, 12, 20), *generator.random((7, 20))
    )
    states = torch.from_numpy(StateSpec().states(DRAFT, seen, 8, 12))
    expected = network(states, torch.from_numpy(layer // 2 - 1), DRAFT).detach()
    np.testing.assert_allclose(policy.q_values(DRAFT, seen), expected, atol=1e-5)


def test_state_follows_its_definition() -> None:
    from lede.policies import Observation
    from lede.qpolicy import StateSpec

    seen = Observation(*(np.array([v]) for v in (0, 4, 3, 0.8, 0.5, 0.2, 1.0, 0.6, 0.7, 0.25)))
    [state] = StateSpec().states(1, seen, 8, 12)
    expected = [
        1,
        0.5,
        0.25,
        0.8,
        0.5,
        0.2,
        1,
        0.6,
        0.7,
        np.log(0.2) / 9.2,
        0.25,
        0.56,
        np.log(0.56) / 9.2,
    ]
    np.testing.assert_allclose(state, expected, rtol=1e-6)
    assert updated_ema(np.array([0.7]), np.array([2]), np.array([5])) == pytest.approx(
        0.8 * 0.7 + 0.2 * 2 / 3
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainConfig(algo="ppo"), "accepted: ddqn, cql"),
        (lambda: TrainConfig(target="td"), "accepted: expected, returns, bootstrap"),
        (lambda: TrainConfig(steps=0), "at least 1"),
        (lambda: lede.StateSpec(("p2",)), "unknown features"),
        (lambda: lede.StaticPolicy(2, 0), "at least 1 token"),
        (lambda: lede.ConfidenceExitPolicy([0.5]).reset(1, (1, 2), 4, 3), "1 thresholds for 2"),
        (lambda: two_regimes(0, 0), "empty"),
        (lambda: QPolicy({}, (1,), 4, 3), "lack"),
    ],
)
@pytest.mark.usefixtures("without_type_checks")
def test_bad_settings(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()

"""Replay equals decoding; grids equal brute force; backward induction is the ceiling."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lede
from lede import CostModel, ExperienceTable, SelfSpeculativeDecoder, StaticPolicy
from lede.simulation import static_grid
from lede.testing import synthetic_llama, tiny_model

EXITS = (1, 2, 4)


def fresh(family: str = "llama", end: int | None = None) -> Any:
    model = tiny_model(family, layers=6, vocab=32, dtype=torch.float64)
    ids = torch.randint(1, 32, (4, 8), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    decoder = SelfSpeculativeDecoder(model, EXITS, max_draft=5)
    table = lede.collect(
        decoder,
        ids,
        attention_mask=mask,
        max_new_tokens=30,
        batch_size=3,
        branch_batch=16,
        pad_token_id=0,
        eos_token_id=end,
    )
    return decoder, ids, mask, table


@pytest.fixture(scope="module")
def world() -> Any:
    return fresh()


COST = CostModel.memory_bound(6)


def policies(table: ExperienceTable) -> Sequence[lede.Policy]:
    learned = lede.train_policy(
        table, COST, lede.TrainConfig(steps=80, refresh=40, batch=128)
    ).policy
    return [
        learned,
        learned.variant("full", active=(1, 4)),
        learned.variant("draft_only", exit_layer=4),
        learned.variant("exit_only", num_draft=2),
        lede.AutoregressivePolicy(),
        StaticPolicy(2, 4),
        lede.ConfidencePolicy(4, 0.5),
        lede.ConfidencePolicy(2, 0.2, product=True),
        lede.ConfidenceExitPolicy(0.6, 0.4),
        lede.DraftVerifyPolicy(2, 0.4),
        lede.DELPolicy(0.05),
    ]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_replay_equals_decoding_round_for_round(family: str) -> None:
    """For the learned policy in all its modes and every baseline; of Gemma for a part of them."""
    decoder, ids, mask, table = fresh(family)
    for policy in policies(table)[:: 1 if family == "llama" else 3]:
        told = [r for r in lede.simulate(table, policy, COST).log if r.row < 2]
        real = []
        for row in range(2):  # a whole prompt and a padded one
            out = decoder.generate(
                ids[row : row + 1, mask[row] > 0], policy=policy, max_new_tokens=30, pad_token_id=0
            )
            real += [r._replace(row=row) for r in out.stats.log]
        assert sorted(real) == sorted(told), policy


def test_replay_equals_decoding_with_an_end_of_text(world: Any) -> None:
    end = int(np.bincount(world[3].tokens.ravel()).argmax())
    decoder, ids, mask, table = fresh(end=end)
    assert table.lengths.min() < 30
    for policy in (StaticPolicy(1, 5), lede.ConfidencePolicy(2, 0.2), lede.DELPolicy(0.05)):
        told = lede.simulate(table, policy, COST).log
        real = []
        for row in range(len(ids)):
            out = decoder.generate(
                ids[row : row + 1, mask[row] > 0],
                policy=policy,
                max_new_tokens=30,
                pad_token_id=0,
                eos_token_id=end,
            )
            real += [r._replace(row=row) for r in out.stats.log]
        assert sorted(real) == sorted(told), policy


def test_collected_features_are_those_of_real_branches(world: Any) -> None:
    """Every state that real rounds visit, off the text too, is in the table to 1e-10."""
    decoder, ids, _, table = world
    seen: list[Any] = []

    class Noting(lede.ConfidencePolicy):
        def start_round(self, positions: np.ndarray) -> None:
            self.at = int(positions[0])

        def keep_drafting(self, observation: lede.Observation) -> np.ndarray:
            seen.append(
                (
                    self.at,
                    int(observation.index[0]),
                    *(float(getattr(observation, n)[0]) for n in ("p1", "margin", "entropy")),
                )
            )
            return np.ones(1)

    decoder.generate(ids[:1], policy=Noting(2, 0.0), max_new_tokens=30, pad_token_id=0)
    lead = table.leading()[0, 1]
    off = 0
    for t, index, *found in seen:
        if index <= lead[t] + 1:
            expected = table.features[0, 1, t + index - 1]
        else:
            off += 1
            branch = table.branch[0, 1, t + lead[t]]
            expected = table.branch_features[branch, index - lead[t] - 2]
        # features are float32 roundings of float64 logits
        np.testing.assert_allclose(found, expected, atol=2e-7)
    assert off > 5


@pytest.mark.smoke
def test_static_grid_equals_one_replay_each(world: Any) -> None:
    table = world[3]
    grid = static_grid(table, COST)
    one_by_one = [
        [lede.simulate(table, StaticPolicy(e, d), COST).speedup for d in range(1, 6)] for e in EXITS
    ]
    np.testing.assert_allclose(grid, one_by_one, rtol=1e-12)
    policy, speedup = lede.best_static(table, COST)
    assert speedup == pytest.approx(np.max(one_by_one))
    assert lede.simulate(table, policy, COST).speedup == pytest.approx(speedup)


def test_best_confidence_equals_one_replay_each(world: Any) -> None:
    table, thresholds = world[3], (0.2, 0.5, 0.8)
    found, speedup = lede.best_confidence(table, COST, thresholds)
    every = [
        lede.simulate(table, lede.ConfidencePolicy(e, th, product=k), COST).speedup
        for e in EXITS
        for th in thresholds
        for k in (False, True)
    ]
    assert speedup == pytest.approx(max(every))
    assert lede.simulate(table, found, COST).speedup == pytest.approx(speedup)


def test_oracle_is_the_shortest_path(world: Any) -> None:
    """Against Dijkstra's relaxation written out over (E, k), and above every policy."""
    table = world[3]
    oracle = lede.OraclePolicy(table, COST)
    total = 0.0
    for b in range(len(table)):
        length = int(table.lengths[b])
        best = [np.inf] * (length + 1)
        best[0] = 0.0
        for t in range(length):
            best[t + 1] = min(best[t + 1], best[t] + COST.autoregressive)
            for j, e in enumerate(EXITS):
                for d in range(1, min(5, length - t - 1) + 1):
                    a = 0
                    while a < d and table.top[b, j, t + a] == table.tokens[b, t + a]:
                        a += 1
                    late = (6 - e) * COST.layer_cost(d + 1) + COST.head_cost(d + 1)
                    spent = (d + 1) * e + d * COST.head[0] + late
                    best[t + a + 1] = min(best[t + a + 1], best[t] + spent)
        total += best[length]
    assert oracle.speedup == pytest.approx(table.lengths.sum() * COST.autoregressive / total)
    assert lede.simulate(table, oracle, COST).speedup == pytest.approx(oracle.speedup)
    assert oracle.speedup > lede.best_static(table, COST)[1]


def test_a_teacher_only_table_serves_static_policies_only(world: Any) -> None:
    decoder, ids, _, _ = world
    table = lede.collect(decoder, ids, max_new_tokens=12, mode="teacher", pad_token_id=0)
    assert lede.simulate(table, StaticPolicy(1, 3), COST).speedup > 0
    with pytest.raises(ValueError, match="mode='branch'"):
        lede.simulate(table, lede.ConfidencePolicy(1, 0.5), COST)
    with pytest.raises(ValueError, match="mode='branch'"):
        lede.train_policy(table, COST)


def test_experience_is_saved_whole(world: Any, tmp_path: Path) -> None:
    table = world[3]
    table.save(tmp_path / "t.safetensors")
    again = ExperienceTable.load(tmp_path / "t.safetensors")
    assert again.exits == table.exits
    np.testing.assert_array_equal(again.branch_features, table.branch_features)
    policy = lede.ConfidencePolicy(2, 0.4)
    assert lede.simulate(again, policy, COST).log == lede.simulate(table, policy, COST).log
    part = table.select([2, 0])
    log = [r for r in lede.simulate(table, policy, COST).log if r.row == 2]
    assert [r._replace(row=2) for r in lede.simulate(part, policy, COST).log if r.row == 0] == log
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        ExperienceTable.load(tmp_path / "bad.safetensors")


def test_bad_requests(world: Any) -> None:
    decoder, ids, _, _ = world
    with pytest.raises(ValueError, match="accepted: branch, teacher"):
        lede.collect(decoder, ids, mode="all")
    with pytest.raises(ValueError, match="greedy"):
        lede.collect(decoder, ids, do_sample=True)
    with pytest.raises(ValueError, match="no prompts"):
        lede.collect(decoder, ids[:0])


@pytest.mark.parametrize(("alpha", "d"), [(0.0, 4), (0.3, 1), (0.8, 6), (1.0, 5)])
def test_closed_forms(alpha: float, d: int) -> None:
    draws = np.random.default_rng(0).random((200_000, d)) < alpha
    tokens = 1 + np.cumprod(draws, 1).sum(1).mean()
    assert lede.expected_tokens(alpha, d) == pytest.approx(tokens, abs=0.02)
    cost = CostModel(32, (1.0,) * 5, (0.3,) * 5)
    paper = sum(alpha**i for i in range(d + 1)) * 32.3 / ((d + 1) * 7 + d * 0.3 + 25 + 0.3)
    assert lede.expected_speedup(alpha, 7, d, cost) == pytest.approx(paper)


def test_cost_model_is_saved_and_damaged_files_are_named(tmp_path: Path) -> None:
    COST.save(tmp_path / "cost.json")
    assert CostModel.load(tmp_path / "cost.json") == COST
    (tmp_path / "cost.json").write_text("[1]")
    with pytest.raises(ValueError, match="not a saved cost model"):
        CostModel.load(tmp_path / "cost.json")


def test_tables_are_joined(world: Any) -> None:
    table = world[3]
    whole = ExperienceTable.cat([table.select([0, 2]), table.select([1])])
    policy = lede.ConfidencePolicy(4, 0.3)
    told = [lede.simulate(t, policy, COST).log for t in (whole, table.select([0, 2, 1]))]
    assert told[0] == told[1]
    assert ExperienceTable.cat([table]).branch is not table.branch
    with pytest.raises(ValueError, match="differ in exits"):
        ExperienceTable.cat([table, dataclasses.replace(table, exits=(1, 2, 3))])
    with pytest.raises(ValueError, match="one or more"):
        ExperienceTable.cat([])


def test_calibration_measures_what_layers_and_head_cost() -> None:
    """A wide layer against a narrow one, a large head against a small one: coarse, but measured."""
    small = tiny_model(layers=3, hidden=32, vocab=64)
    large = tiny_model(layers=3, hidden=512, vocab=8192)
    found = [
        lede.calibrate(SelfSpeculativeDecoder(m, [1]), context=16, repeats=15)
        for m in (small, large)
    ]
    for cost in found:
        assert (cost.depth, cost.unit, cost.widths) == (3, "s", (1, 2, 4, 8, 13))
        values = np.array([*cost.layer, *cost.head, cost.features])
        assert (values > 0).all()
        assert (values < 1).all()
        assert cost.autoregressive == pytest.approx(3 * cost.layer[0] + cost.head[0])
    assert found[1].layer[-1] > 2 * found[0].layer[-1]
    assert found[1].head[-1] > 2 * found[0].head[-1]


@pytest.mark.parametrize("acceptance", [0.6, 0.9])
def test_synthetic_models_agree_as_often_as_asked(acceptance: float) -> None:
    """At their knee, on tokens other than those it was set on; and deeper exits agree more."""
    model = synthetic_llama(layers=6, hidden=64, vocab=256, knee=2, acceptance=acceptance)
    ids = torch.randint(256, (8, 64), generator=torch.Generator().manual_seed(7))
    runner = lede.adapters.layer_runner(model)
    with torch.no_grad():
        out = model(ids, output_hidden_states=True, use_cache=False)
        final = out.logits.argmax(-1)
        agreement = [
            float((runner.logits(out.hidden_states[e]).argmax(-1) == final).double().mean())
            for e in (2, 5)
        ]
    assert agreement[0] == pytest.approx(acceptance, abs=0.08)
    assert agreement[1] > agreement[0]

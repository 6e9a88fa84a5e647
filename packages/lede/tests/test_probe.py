"""The probe of hidden states: what it learns, what it saves, and that decoding stays exact."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lede
from lede import AcceptanceProbe, CostModel, SelfSpeculativeDecoder, TrainConfig
from lede.probe import train_probe
from lede.qpolicy import PROBE_FEATURES, PROBE_STATE, STATE_FEATURES
from lede.testing import tiny_model

EXITS = (1, 2, 4)
COST = CostModel.memory_bound(6)


@pytest.fixture(scope="module")
def world() -> Any:
    model = tiny_model(layers=6, vocab=32, dtype=torch.float64)
    ids = torch.randint(1, 32, (10, 8), generator=torch.Generator().manual_seed(1))
    decoder = SelfSpeculativeDecoder(model, EXITS, max_draft=5)
    common = {"max_new_tokens": 30, "pad_token_id": 0}
    probe = lede.fit_probe(decoder, ids[:5], **common)
    table = lede.collect(decoder, ids[5:], probe=probe, **common)
    config = TrainConfig(steps=120, refresh=40, batch=128)
    learned = lede.train_policy(table, COST, config).policy
    return decoder, ids[5:], table, learned


@pytest.mark.smoke
def test_a_planted_signal_is_found_and_standardised_away() -> None:
    rng = np.random.default_rng(0)
    hidden = rng.normal(3.0, [1.0, 10.0, 0.1, 1.0], size=(4000, 2, 4)).astype(np.float32)
    odds = np.stack([(hidden[:, 0, 1] - 3) / 3, (hidden[:, 1, 2] - 3) / 0.03], 1)
    chance = 1 / (1 + np.exp(-odds))
    right = (rng.random(chance.shape) < chance).astype(float)
    probe = train_probe(hidden, right, right / 2, width=8, steps=600)
    fresh = rng.normal(3.0, [1.0, 10.0, 0.1, 1.0], size=(2000, 2, 4)).astype(np.float32)
    for j, (at, scale) in enumerate(((1, 3), (2, 0.03))):
        out = probe(torch.from_numpy(fresh[:, j]), j).numpy()
        truth = (fresh[:, j, at] - 3) / scale
        assert np.corrcoef(np.tanh(truth / 2), np.tanh(out[:, 0] / 2))[0, 1] > 0.95
        # Half of the drafts in a row at most: the second output's mean is half of the first's.
        means = (1 / (1 + np.exp(-out))).mean(0)
        assert means[1] == pytest.approx(means[0] / 2, abs=0.05)


@pytest.mark.parametrize("features", [PROBE_STATE, (*STATE_FEATURES, *PROBE_FEATURES)])
def test_replay_equals_decoding_round_for_round(world: Any, features: tuple[str, ...]) -> None:
    """Heads and looks included: a policy that needs no distribution runs fewer heads."""
    decoder, ids, table, _ = world
    config = TrainConfig(steps=80, refresh=40, batch=128, features=features, seed=1)
    learned = lede.train_policy(table, COST, config).policy
    assert learned.needs_head == (features != PROBE_STATE)
    seen = set()
    for policy in (
        learned,
        learned.variant("full", active=(1, 4)),
        learned.variant("draft_only", exit_layer=4),
        learned.variant("exit_only", num_draft=3),
    ):
        told = lede.simulate(table, policy, COST)
        real, spent = [], 0.0
        for row in range(len(ids)):
            stats = decoder.generate(
                ids[row : row + 1], policy=policy, max_new_tokens=30, pad_token_id=0
            ).stats
            real += [r._replace(row=row) for r in stats.log]
            spent += stats.cost(COST)
        assert sorted(real) == sorted(told.log), policy
        assert spent == pytest.approx(told.cost.sum())
        seen |= {r.exit for r in real}
        if policy is learned and not learned.needs_head:
            assert all(r.heads == r.passes - 1 for r in real)
    assert len(seen) > 1


def test_the_head_runs_where_a_draft_is_made(world: Any) -> None:
    decoder, ids, _, learned = world
    head: list[int] = []
    hook = decoder.model.lm_head.register_forward_hook(lambda m, a, o: head.append(a[0].shape[1]))
    log = decoder.generate(ids[:1], policy=learned, max_new_tokens=30).stats.log
    hook.remove()
    drafts = sum(r.passes - 1 for r in log)
    assert drafts > 0
    assert len(head) == drafts + len(log)
    assert sum(head) == drafts + sum(r.passes for r in log)


@pytest.mark.parametrize("end", [None, 7])
def test_tokens_are_those_of_generate(world: Any, end: int | None) -> None:
    decoder, ids, _, learned = world
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    settings = {"max_new_tokens": 20, "pad_token_id": 0, "eos_token_id": end}
    expected = decoder.model.generate(ids, attention_mask=mask, do_sample=False, **settings)
    found = decoder.generate(ids, attention_mask=mask, policy=learned, **settings)
    assert torch.equal(found.sequences, expected)


def test_saved_bit_exact_and_mismatches_are_named(world: Any, tmp_path: Path) -> None:
    _, _, table, learned = world
    learned.save_pretrained(tmp_path / "p")
    again = lede.QPolicy.from_pretrained(tmp_path / "p")
    for name, value in learned.probe.weights.items():
        np.testing.assert_array_equal(again.probe.weights[name], value)
    assert lede.simulate(table, again, COST).log == lede.simulate(table, learned, COST).log
    table.save(tmp_path / "t.safetensors")
    loaded = lede.ExperienceTable.load(tmp_path / "t.safetensors")
    assert lede.simulate(loaded, again, COST).log == lede.simulate(table, learned, COST).log
    with pytest.raises(lede.PolicyMismatchError, match="probe of 3 exits"):
        lede.QPolicy(learned.weights, EXITS, 6, 5, learned.spec)
    with pytest.raises(lede.PolicyMismatchError, match="not whole"):
        AcceptanceProbe({"w1": np.zeros((1, 2, 3))})
    weights = learned.probe.weights
    with pytest.raises(lede.PolicyMismatchError, match="do not fit"):
        AcceptanceProbe({**weights, "b2": np.zeros((3, 1))})


def test_without_a_probe_its_features_are_refused(world: Any) -> None:
    decoder, ids, table, learned = world
    plain = lede.collect(decoder, ids, max_new_tokens=8, pad_token_id=0)
    with pytest.raises(ValueError, match="collected with probe"):
        lede.train_policy(plain, COST, TrainConfig(features=PROBE_STATE))
    with pytest.raises(lede.PolicyMismatchError, match="need a probe"):
        lede.simulate(plain, learned, COST)
    assert len(table.select([0])) == 1

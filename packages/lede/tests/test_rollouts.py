"""Roll-outs agree with the table where both see the same, and serve sampling."""

from typing import Any

import numpy as np
import pytest
import torch

import lede
from lede import CostModel, SelfSpeculativeDecoder, TrainConfig
from lede.testing import tiny_model
from lede.training import EpisodeArrays, build_episodes

COST = CostModel.memory_bound(4)


@pytest.fixture(scope="module")
def world() -> Any:
    model = tiny_model(layers=4, vocab=24, dtype=torch.float64)
    ids = torch.randint(1, 24, (6, 8), generator=torch.Generator().manual_seed(1))
    return SelfSpeculativeDecoder(model, (1, 3), max_draft=4), ids


@pytest.mark.smoke
def test_greedy_rollouts_agree_with_the_table(world: Any) -> None:
    decoder, ids = world
    common = {"max_new_tokens": 20, "pad_token_id": 0}
    probe = lede.fit_probe(decoder, ids, **common)
    table = lede.collect(decoder, ids, probe=probe, **common)
    teacher = lede.collect(decoder, ids, probe=probe, mode="teacher", **common)
    np.testing.assert_allclose(teacher.features, table.features, atol=1e-10)
    np.testing.assert_array_equal(teacher.right, table.right)
    rollouts = lede.collect_rollouts(decoder, ids, probe=probe, batch_size=4, seed=3, **common)
    every = build_episodes(table)
    where = {(b, t): n for n, (b, t) in enumerate(zip(every.text, every.position, strict=True))}
    assert len(rollouts) > 20
    for n in range(len(rollouts)):
        same = where[rollouts.text[n], rollouts.position[n]]
        limit = int(rollouts.limit[n])
        assert limit == every.limit[same]
        np.testing.assert_array_equal(
            rollouts.alive[n, :, : limit + 1], every.alive[same, :, : limit + 1]
        )
        np.testing.assert_array_equal(rollouts.agree[n], every.agree[same])
        # features are float32 roundings of float64 logits
        for name in ("features", "prefix", "chain"):
            np.testing.assert_allclose(
                getattr(rollouts, name)[n, :, :limit],
                getattr(every, name)[same, :, :limit],
                atol=1e-5,
            )


def test_sampled_chances_are_overlaps_of_distributions(world: Any) -> None:
    """Mean of min(1, p / q) over first drafts from one start: Σ min(p, q), at every exit."""
    decoder, ids = world
    rows = ids[:1].expand(4000, 8)
    rollouts = lede.collect_rollouts(
        decoder, rows, max_new_tokens=2, do_sample=True, top_k=0, batch_size=4000, pad_token_id=0
    )
    assert (rollouts.position == 0).all()
    runner, model = decoder.runner, decoder.model
    with torch.no_grad():
        states = model(ids[:1], output_hidden_states=True)
        p = torch.softmax(states.logits[0, -1].float(), -1)
        for j, layer in enumerate(decoder.exits):
            q = torch.softmax(runner.logits(states.hidden_states[layer])[0, -1], -1)
            overlap = torch.minimum(p, q).sum().item()
            assert rollouts.alive[:, j, 1].mean() == pytest.approx(overlap, abs=0.03)


def test_a_policy_is_trained_on_sampled_rollouts(world: Any) -> None:
    decoder, ids = world
    common = {"max_new_tokens": 30, "do_sample": True, "temperature": 0.6, "pad_token_id": 0}
    train = lede.collect_rollouts(decoder, ids.repeat(3, 1), seed=0, **common)
    held_out = lede.collect_rollouts(decoder, ids, seed=1, **common)
    again = lede.collect_rollouts(decoder, ids, seed=1, **common)
    np.testing.assert_array_equal(again.features, held_out.features)
    config = TrainConfig(steps=300, refresh=60, batch=256)
    result = lede.train_policy(train, COST, config, validation=held_out)
    assert result.rho > EpisodeArrays(train, COST, config).best_fixed() * 0.98
    out = decoder.generate(ids[:2], policy=result.policy, **common)
    assert out.stats.drafted > 0


def test_expected_ratio_against_a_loop(world: Any) -> None:
    """Tokens over cost of the network's own decisions, start by start."""
    from lede.qpolicy import QNetwork

    decoder, ids = world
    rollouts = lede.collect_rollouts(decoder, ids, max_new_tokens=12, pad_token_id=0, seed=2)
    trainer = EpisodeArrays(rollouts, COST, TrainConfig())
    torch.manual_seed(3)
    network = QNetwork(len(trainer.spec.names), 2)
    q_draft, q_walk = trainer.q_all(network)
    tokens = cost = 0.0
    for n in range(len(rollouts)):
        j = 0 if q_walk[n, 0, 1] >= q_walk[n, 0, 0] else 1
        drafts = 0
        while drafts < rollouts.limit[n] and q_draft[n, j, drafts, 0] > q_draft[n, j, drafts, 1]:
            drafts += 1
        looks = j + min(drafts + 1, int(rollouts.limit[n]))
        tokens += rollouts.alive[n, j, : drafts + 1].sum()
        cost += COST.round((1, 3)[j], drafts + 1, looks, looks) / COST.autoregressive
    assert trainer.ratio(network)[0] == pytest.approx(tokens / cost, rel=1e-4)


def test_no_prompts(world: Any) -> None:
    decoder, ids = world
    with pytest.raises(ValueError, match="no prompts"):
        lede.collect_rollouts(decoder, ids[:0])
    with pytest.raises(ValueError, match="longer than one token"):
        lede.collect_rollouts(decoder, ids, max_new_tokens=1, pad_token_id=0)

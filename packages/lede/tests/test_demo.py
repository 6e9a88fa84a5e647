"""The demo's parts on a very small model, and its pictures."""

import pytest

from lede import demo, plots
from lede.simulation import simulate


@pytest.mark.smoke
def test_one_small_seed_is_told_and_drawn() -> None:
    settings = demo.DemoSettings(
        layers=4,
        probe_prompts=8,
        hidden=32,
        exits=(1, 2),
        max_draft=4,
        train_steps=4,
        prompts=(8, 4, 8),
        prompt_tokens=16,
        new_tokens=12,
        policy_steps=30,
    )
    steps: list[int] = []
    result = demo.run_seed(0, settings, tick=lambda: steps.append(1))
    assert len(steps) == 4
    assert result.lossless
    for kind, policy in result.choice.best.items():
        found = simulate(result.test, policy, result.cost).speedup
        assert result.speedups[kind] == pytest.approx(found)
        assert found <= result.speedups["oracle"] + 1e-9
    summary = demo.summarize([result, result])
    assert summary["static"]["against_static"] == 1.0
    assert [row["policy"] for row in demo.table(summary)] == list(demo.TITLES.values())
    text = demo.tell([result, result], summary)
    assert f"{summary['delivered']['speedup']:.2f} times as fast" in text
    assert ("lost to the static pair" in text) == (summary["full"]["against_static"] < 1)
    rounds = simulate(result.test, result.choice.policy, result.cost).log
    assert plots.plot_segments(result.segments).axes
    pieces = [[chr(t) for t in row] for row in result.test.tokens.tolist()]
    image = plots.plot_exit_heatmap(rounds, pieces, 4, columns=6).axes[0].images[0].get_array()
    first = next(r for r in rounds if r.row == 0)
    supplied = [first.exit] * first.accepted + [4]
    assert image.flatten()[: len(supplied)].tolist() == supplied

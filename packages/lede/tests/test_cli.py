"""The commands, one after the other on a saved model; errors in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lede
from lede.cli import main

WORDS = [f"w{i}" for i in range(60)]


@pytest.fixture(scope="module")
def model(
    tmp_path_factory: pytest.TempPathFactory, save_word_model: Callable[[Path], list[str]]
) -> Path:
    folder = tmp_path_factory.mktemp("model")
    assert save_word_model(folder) == WORDS
    return folder


def run(capsys: Any, *arguments: object) -> Any:
    assert main([str(a) for a in (*arguments, "--json")]) == 0
    return json.loads(capsys.readouterr().out)


def test_from_prompts_to_a_policy_to_text(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(" ".join(WORDS[i : i + 4]) for i in range(16)) + "\n\n")
    where = ("--model", model, "--exit-layers", "1,3", "--max-draft", 4, "--device", "cpu")
    short = ("--max-new-tokens", 16)
    told = run(capsys, "collect", prompts, *where, *short, "--out", tmp_path / "e")
    assert told["texts"] == 8  # the probe took the other half
    assert told["tokens"] == 128
    held = ("--num-samples", 4, "--probe-of", tmp_path / "e", "--out", tmp_path / "v")
    assert run(capsys, "collect", prompts, *where, *short, *held)["texts"] == 4
    table = lede.ExperienceTable.load(tmp_path / "e/experience.safetensors")
    cost = lede.CostModel.load(tmp_path / "e/cost.json")
    assert told["best_static"]["speedup"] == pytest.approx(lede.best_static(table, cost)[1])
    steps = ("--steps", 200, "--validation", tmp_path / "v", "--out", tmp_path / "p")
    trained = run(capsys, "train-policy", tmp_path / "e", *steps)
    assert (tmp_path / "p/training.png").is_file()
    policy = lede.QPolicy.from_pretrained(tmp_path / "p")
    assert policy.mode == trained["mode"]
    replayed = lede.simulate(table, policy, cost).speedup
    assert trained["speedup_on_training_texts"] == pytest.approx(replayed)
    rows = run(capsys, "simulate", tmp_path / "e", "--policy", tmp_path / "p")["policies"]
    by_title = {row["policy"]: row["speedup"] for row in rows}
    assert by_title["LEDE"] == pytest.approx(replayed, abs=1e-4)
    assert by_title["oracle"] == max(by_title.values())
    swept = run(capsys, "sweep", prompts, *where, *short, "--out", tmp_path / "s")
    assert swept["best"]["speedup"] == pytest.approx(max(map(max, swept["sweep"]["grid"])))
    text = ("generate", "w1 w2 w3", "--model", model, "--max-new-tokens", 12, "--device", "cpu")
    learned = run(capsys, *text, "--policy", tmp_path / "p", "--out", tmp_path / "g")
    static = run(capsys, *text, "--exit-layers", "1,3")
    assert learned["text"] == static["text"]
    assert len(learned["text"].split()) == 15
    few = ("--num-samples", 2, "--repeats", 2, "--policy", tmp_path / "p")
    timed = run(capsys, "bench", prompts, *where, *short, *few, "--out", tmp_path / "b")
    assert timed["lossless"]
    assert list(timed["policies"])[:2] == ["generate", "assistant_early_exit"]
    assert timed["policies"]["generate"]["speedup"] == 1.0
    assert timed["policies"]["LEDE"]["counted"] > 0
    drawn = {"b": {"speedups", "acceptance", "exits", "heatmap"}, "g": {"exits", "heatmap"}}
    for folder, names in {**drawn, "s": {"sweep"}}.items():
        found = run(capsys, "plot", tmp_path / folder, "--out", tmp_path / "again" / folder)
        assert {Path(p).stem for p in found["pictures"]} == names
        assert all((tmp_path / folder / f"{name}.png").is_file() for name in names)


def test_compiled_commands(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """What is compiled is asked for; here it stays as it is, which `test_compiled` does not."""
    import torch

    asked = []

    def compile(function: Any, **options: Any) -> Any:
        asked.append(options["backend"])
        return function

    monkeypatch.setattr(torch, "compile", compile)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("w1 w2 w3\nw4 w5 w6\n")
    where = ("--model", model, "--exit-layers", 3, "--max-draft", 1, "--device", "cpu")
    short = ("--max-new-tokens", 6, "--repeats", 1, "--out", tmp_path / "b", "--no-plots")
    told = run(capsys, "bench", prompts, *where, *short, "--compile")
    assert told["lossless"]
    assert told["policies"]["our loop, no drafts"]["over_no_drafts"] == 1.0
    assert asked == ["inductor"] * 6  # a walk, two verifications, a plain step, two heads
    text = ("generate", "w1 w2 w3", *where, "--max-new-tokens", 6)
    assert run(capsys, *text, "--compile")["text"] == run(capsys, *text)["text"]
    assert len(asked) > 6


def test_train_exit_resumes(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "text.txt"
    data.write_text(" ".join(WORDS * 12))
    settings = ("--model", model, "--data", data, "--length", 12, "--batch-size", 4)
    settings += ("--steps", 4, "--save-steps", 2, "--lr", 0.01, "--device", "cpu")
    whole = run(capsys, "train-exit", *settings, "--out", tmp_path / "a")
    assert whole["steps"] == 4
    assert (tmp_path / "a/exit_quality.png").is_file()
    run(capsys, "train-exit", *settings, "--out", tmp_path / "b")
    import shutil

    shutil.rmtree(tmp_path / "b/checkpoints/checkpoint-4")
    assert main([str(a) for a in ("train-exit", *settings, "--out", tmp_path / "b")]) == 2
    assert "--resume" in capsys.readouterr().err
    other = [str(a) for a in ("train-exit", *settings, "--out", tmp_path / "b", "--resume")]
    assert main([*other, "--p-max", "0.3"]) == 2
    assert "p_max=0.3" in capsys.readouterr().err
    again = run(capsys, "train-exit", *settings, "--out", tmp_path / "b", "--resume")
    assert again["losses"] == whole["losses"]
    assert again["exit_quality"]["after"] == whole["exit_quality"]["after"]
    after, before = (whole["exit_quality"][w]["loss"][1] for w in ("after", "before"))
    assert after < before
    assert run(capsys, "generate", "w1", "--model", tmp_path / "a/model", "--exit-layers", "2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "hi"], "--model FOLDER or HUB-ID"),
        (["generate", "hi", "--preset", "gpt"], "gpt"),
        (["collect", "missing.txt", "--model", "x"], "missing.txt is not a readable text file"),
        (["train-policy", "nowhere"], "nowhere"),
        (["train-policy", "nowhere", "--algo", "ppo"], "accepted: ddqn, cql"),
        (["simulate", "nowhere"], "nowhere"),
        (["bench", "missing.txt", "--model", "x"], "missing.txt is not a readable text file"),
        (["sweep", "missing.txt", "--model", "x"], "missing.txt is not a readable text file"),
        (["plot", "nowhere"], "holds nothing to draw"),
        (["train-exit"], "--model FOLDER or HUB-ID"),
        (["train-exit", "--model", "x", "--p-max", "1"], "p_max=1.0; accepted"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told

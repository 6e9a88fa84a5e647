"""The commands, one after the other on a saved model; errors in one line."""

import json
from pathlib import Path
from typing import Any

import pytest

import lede
from lede.cli import main
from lede.testing import tiny_model

WORDS = [f"w{i}" for i in range(60)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    tiny_model("llama", layers=5).save_pretrained(folder)
    return folder


def run(capsys: Any, *arguments: object) -> Any:
    assert main([str(a) for a in (*arguments, "--json")]) == 0
    return json.loads(capsys.readouterr().out)


def test_from_prompts_to_a_policy_to_text(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(" ".join(WORDS[i : i + 4]) for i in range(8)) + "\n\n")
    where = ("--model", model, "--exit-layers", "1,3", "--max-draft", 4, "--device", "cpu")
    told = run(capsys, "collect", prompts, *where, "--max-new-tokens", 16, "--out", tmp_path / "e")
    assert told["texts"] == 8
    assert told["tokens"] == 128
    table = lede.ExperienceTable.load(tmp_path / "e/experience.safetensors")
    cost = lede.CostModel.load(tmp_path / "e/cost.json")
    assert told["best_static"]["speedup"] == pytest.approx(lede.best_static(table, cost)[1])
    trained = run(capsys, "train-policy", tmp_path / "e", "--steps", 30, "--out", tmp_path / "p")
    policy = lede.QPolicy.from_pretrained(tmp_path / "p")
    replayed = lede.simulate(table, policy, cost).speedup
    assert trained["speedup_on_training_texts"] == pytest.approx(replayed)
    rows = run(capsys, "simulate", tmp_path / "e", "--policy", tmp_path / "p")["policies"]
    by_title = {row["policy"]: row["speedup"] for row in rows}
    assert by_title["LEDE"] == pytest.approx(replayed, abs=1e-4)
    assert by_title["oracle"] == max(by_title.values())
    text = ("generate", "w1 w2 w3", "--model", model, "--max-new-tokens", 12, "--device", "cpu")
    learned = run(capsys, *text, "--policy", tmp_path / "p")
    static = run(capsys, *text, "--exit-layers", "1,3")
    assert learned["text"] == static["text"]
    assert len(learned["text"].split()) == 15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "hi"], "--model FOLDER or HUB-ID"),
        (["generate", "hi", "--preset", "gpt"], "gpt"),
        (["collect", "missing.txt", "--model", "x"], "missing.txt is not a readable text file"),
        (["train-policy", "nowhere"], "nowhere"),
        (["train-policy", "nowhere", "--algo", "ppo"], "accepted: ddqn, cql"),
        (["simulate", "nowhere"], "nowhere"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told

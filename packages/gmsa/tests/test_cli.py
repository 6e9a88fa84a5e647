"""The demo and the commands."""

import json
from pathlib import Path

import pytest

import gmsa.demo as the_demo
from gmsa import qa_metrics, reconstruction_metrics
from gmsa.cli import main
from gmsa.demo import DemoSettings, tell, tiny_compressor
from gmsa.presets import get_preset


@pytest.mark.smoke
def test_demo_writes_a_run(run_cli, monkeypatch) -> None:
    tiny = DemoSettings(base_steps=2, ae_steps=2, keft_steps=2, items=8)
    monkeypatch.setattr(the_demo.DemoSettings, "quick", lambda self: tiny)
    shown = run_cli(main, "demo", "--quick", "--json", "--out", "run")
    assert shown.code == 0, shown.stderr
    written = json.loads(Path("run/metrics.json").read_text())
    assert written.pop("timing")["seconds"] > 0
    assert written == json.loads(shown.stdout)
    assert Path("run/comparison.png").stat().st_size > 10_000


def test_commands_on_a_checkpoint(run_cli) -> None:
    compressor = tiny_compressor()
    compressor.model.decoder.save_pretrained("base")
    compressor.tokenizer.save_pretrained("base")
    compressor.model.config.base_model_name_or_path = "base"
    compressor.model.save_pretrained("saved")
    Path("a.txt").write_text("ba be bi bo bu ba")
    stored = run_cli(main, "compress", "saved", "a.txt", "--store", "store", "--rate", 2, "--json")
    assert stored.code == 0, stored.stderr
    assert json.loads(stored.stdout)["documents"] == 1
    shown = run_cli(main, "answer", "saved", "ba", "--context", "a.txt", "--json")
    assert shown.code == 0, shown.stderr
    assert json.loads(shown.stdout)["compressed_tokens"] == 2
    assert run_cli(main, "reconstruct", "saved", "a.txt").code == 0
    for argv, message in (
        (["answer", "saved", "ba", "--context", "no.txt"], "cannot be read"),
        (["answer", "nowhere", "ba", "--context", "a.txt"], "not a folder"),
        (["demo", "--device", "abacus"], "is not here"),
    ):
        refused = run_cli(main, *argv)
        assert (refused.code, refused.stdout) == (2, "")
        assert message in refused.stderr


def test_help_info_and_presets(run_cli) -> None:
    assert run_cli(main, "--help").code == 0
    assert json.loads(run_cli(main, "info", "--json").stdout)["official"]["rates"] == [16, 32]
    with pytest.raises(ValueError, match="accepted: qwen3-4b-4x8x"):
        get_preset("gpt")


def test_losses_are_told() -> None:
    rows = [
        {"method": m, "QA exact match %": v}
        for m, v in (("full prompt", 60.0), ("truncation", 20.0), ("pooling", 55.0), ("GMSA", 50.0))
    ]
    told = tell(rows, 1, 4)
    assert "ahead of truncation" in told
    assert "not ahead of pooling" in told


def test_scores() -> None:
    found = qa_metrics(["The Eiffel Tower!", "it is Rome"], [["eiffel tower"], ["Paris", "Rome"]])
    assert found == {"em": 0.5, "sub_em": 1.0, "f1": 0.75, "f1_first": 0.5}
    scores = reconstruction_metrics([[1, 2, 9, 4], [5]], [[1, 2, 3, 4], [5]])
    assert scores == {"prefix_em": 0.75, "token_acc": 0.8, "exact": 0.5}
    with pytest.raises(ValueError, match="1 predictions for 0"):
        qa_metrics(["a"], [])


def test_answers_and_budgets() -> None:
    compressor = tiny_compressor()
    texts = ["ba be bi bo bu", "ca ce"]
    soft = compressor.compress(texts, target_tokens=2)
    assert soft.lengths.tolist() == [2, 2]
    options = {"max_new_tokens": 3}
    both = compressor.answer(["ba", "be bi"], texts, 2, **options)
    alone = [
        compressor.answer(q, t, 2, **options) for q, t in zip(["ba", "be bi"], texts, strict=True)
    ]
    assert both == alone
    shared = compressor.answer(["ba", "be bi"], texts[0], 2, **options)
    assert shared[0] == alone[0]
    pieces = compressor.compress(texts, 2, chunk_size=3)
    assert pieces.lengths.tolist() == [3, 1]
    with pytest.raises(ValueError, match="text 1 has no tokens"):
        compressor.compress(["ba", ""])
    assert compressor.compress(["ba", ""], allow_empty=True).lengths.tolist() == [1, 0]
    with pytest.raises(ValueError, match="2 questions for 3"):
        compressor.answer(["a", "b"], [*texts, "ba"])
    with pytest.raises(ValueError, match="target_tokens is 0"):
        compressor.compress("ba", target_tokens=0)

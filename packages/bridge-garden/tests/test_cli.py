"""The command line: every command runs, says what it did, and refuses bad input in a line."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bridge_garden.cli import main
from bridge_garden.cost import cost_account
from bridge_garden.models import read_rows
from bridge_garden.presets import PRESETS, get_preset
from shared_core.errors import InputError
from shared_core.testing import CliResult

Run = Callable[..., CliResult]
# transformers fills float settings with ints.
pytestmark = pytest.mark.usefixtures("without_type_checks")


def test_help_teaches(run_cli: Run) -> None:
    shown = run_cli(main, "--help")
    for name in ["demo", "train", "exposure", "kappa", "cost", "presets"]:
        assert name in shown.stdout
        assert run_cli(main, name, "--help").code == 0


@pytest.mark.smoke
def test_demo_writes_a_run(run_cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import bridge_garden.demo as the_demo

    short = the_demo.DemoSettings(rounds=2, sequences=60, steps=6, batch=8, rollouts=60)
    whole = the_demo.kappa_picture
    monkeypatch.setattr(
        the_demo, "DemoSettings", lambda **changes: dataclasses.replace(short, **changes)
    )
    monkeypatch.setattr(
        the_demo, "kappa_picture", lambda seed: whole(seed, steps=2, texts=2, rounds=2)
    )
    shown = run_cli(main, "demo", "--quick", "--json")
    assert shown.code == 0, shown.stderr
    written = json.loads(Path("runs/bridge-garden/demo/metrics.json").read_text())
    assert written.pop("timing")["seconds"] > 0
    assert written == json.loads(shown.stdout)
    assert len(written["summary"]["rows"]) == 4
    for name in ("comparison", "positions", "kappa"):
        assert Path(f"runs/bridge-garden/demo/{name}.png").stat().st_size > 10_000


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str, str]:
    """A student and a teacher with heads of unequal size, in folders, and rows."""
    pytest.importorskip("accelerate")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<eos>", "<unk>", *"0123456789+=", "is", "the", "sum"]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>"
    )
    for name, size, width in (("student", 20, 16), ("teacher", 24, 32)):
        torch.manual_seed(width)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=size,
                hidden_size=width,
                intermediate_size=width,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=64,
                eos_token_id=0,
                bos_token_id=0,
            )
        )
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    lines = [json.dumps({"prompt": f"{i} + 1 =", "completion": str(i + 1)}) for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return tuple(str(tmp_path / n) for n in ("student", "teacher", "rows.jsonl"))


def test_a_killed_run_goes_on_and_ends_in_the_same_numbers(
    run_cli: Run, pair: tuple[str, str, str]
) -> None:
    from transformers import AutoModelForCausalLM

    student, teacher, data = pair
    command = ["train", "--student", student, "--teacher", teacher, "--data", data]
    command += ["--device", "cpu", "--batch-size", "2", "--accumulation", "2", "--json"]
    command += ["--lr", "1e-2", "--save-steps", "5", "--max-steps", "40", "--risk-alpha", "0.1"]
    command += ["--weight", "curriculum:0.4"]
    shown = run_cli(main, *command, "--out", "whole")
    assert shown.code == 0, shown.stderr
    first = json.loads(shown.stdout)
    assert first["steps"] == 40
    assert json.loads(Path("whole/config.json").read_text())["settings"]["vocab_size"] == 17
    logged = [json.loads(line) for line in Path("whole/log.jsonl").read_text().splitlines()]
    assert {"weight", "risk"} <= logged[0].keys()
    assert "continue it with --resume" in run_cli(main, *command, "--out", "whole").stderr
    assert run_cli(main, *command, "--out", "fresh", "--resume").code == 2

    with Path("said.txt").open("w") as said:
        killed = subprocess.Popen(
            [sys.executable, "-m", "bridge_garden.cli", *command, "--out", "killed"],
            stdout=said,
            stderr=said,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    mark = Path("killed/checkpoints/checkpoint-10/complete.json")
    limit = time.monotonic() + 300
    while not mark.is_file() and time.monotonic() < limit and killed.poll() is None:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(60) == -signal.SIGKILL, Path("said.txt").read_text()
    assert not Path("killed/student").exists()
    # A checkpoint that was being written does not count.
    Path("killed/checkpoints/checkpoint-39").mkdir()
    other = run_cli(main, *command, "--out", "killed", "--resume", "--weight", "soft")
    assert (other.code, "--resume with weight='soft'" in other.stderr) == (2, True)
    again = run_cli(main, *command, "--out", "killed", "--resume")
    assert again.code == 0, again.stderr
    assert json.loads(again.stdout) == first
    whole, resumed = (
        AutoModelForCausalLM.from_pretrained(f"{name}/student").state_dict()
        for name in ("whole", "killed")
    )
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)
    steps = [json.loads(x) for x in Path("killed/log.jsonl").read_text().splitlines()]
    assert [x["loss"] for x in steps if "loss" in x] == [x["loss"] for x in logged if "loss" in x]


def test_exposure_and_kappa(run_cli: Run, pair: tuple[str, str, str]) -> None:
    student, teacher, data = pair
    both = ["--student", student, "--teacher", teacher, "--device", "cpu", "--json"]
    shown = run_cli(main, "exposure", *both, "--data", data, "--max-new-tokens", "3")
    assert shown.code == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert found["inference"] == pytest.approx(found["fit"] + found["bias"])
    assert Path("runs/bridge-garden/exposure/positions.png").is_file()
    few = ["--alternatives", "2", "--horizon", "3", "--rollouts", "2"]
    shown = run_cli(main, "kappa", "the sum 1 + 1 = 2", *both, *few)
    assert shown.code == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert [p["position"] for p in found["positions"]] == list(range(1, 7))
    folder = Path("runs/bridge-garden/kappa")
    assert "<span" in (folder / "kappa.html").read_text()
    assert (folder / "kappa.png").is_file()


def test_presets_and_plan(run_cli: Run) -> None:
    listed = json.loads(run_cli(main, "presets", "--json").stdout)
    assert listed.keys() == PRESETS.keys()
    assert all(entry["assumed"] for entry in listed.values())
    plan = run_cli(main, "train", "--preset", "qwen2.5-7b-3b", "--dry-run", "--json")
    assert plan.code == 0, plan.stderr
    assert json.loads(plan.stdout)["teacher"] == "Qwen/Qwen2.5-7B-Instruct"
    assert get_preset("qwen2.5-7b-3b-risk").risk_alpha == 0.1
    with pytest.raises(InputError, match="accepted: qwen"):
        get_preset("gpt-9")


def test_cost(run_cli: Run) -> None:
    found = json.loads(run_cli(main, "cost", "--json").stdout)
    assert found["on_policy"] == pytest.approx(found["off_policy"] + found["generation"])
    # Reading 6 GB of weights 512 times at 3 TB/s, and the prompts' forward pass.
    expected = 512 * 6e9 / 3e12 + 2 * 3e9 * 4 * 256 / 400e12
    assert found["generation"] == pytest.approx(expected)
    with pytest.raises(InputError, match="above 0"):
        cost_account(0, 1)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["train"], "say which teacher"),
        (["train", "--preset", "nope"], "no preset is called"),
        (["train", "--preset", "qwen2.5-7b-3b"], "say which data"),
        (["demo", "--methods", "dpo"], "accepted: soft"),
        (["demo", "--device", "cuda"], "cpu"),
        (["exposure", "--student", "no/s", "--teacher", "no/t", "--data", "no.jsonl"], "no.jsonl"),
        (["kappa", "a", "--student", "./no", "--teacher", "./no"], "tokenizer"),
    ],
)
def test_bad_input_is_two_lines(run_cli: Run, argv: list[str], told: str) -> None:
    shown = run_cli(main, *argv)
    assert shown.code == 2
    assert told in shown.stderr
    assert "Traceback" not in shown.stderr


def test_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n")
    assert read_rows(str(path)) == [{"text": "one"}, {"text": "two"}]
    for text, told in (("{", "line 1, is not JSON"), ("[1]", "named columns"), ("\n", "no rows")):
        bad = tmp_path / "bad.jsonl"
        bad.write_text(text)
        with pytest.raises(InputError, match=told):
            read_rows(str(bad))

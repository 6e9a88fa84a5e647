"""The command line: every command runs, says what it did, and refuses bad input in a line."""

import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge_garden.cli import main
from bridge_garden.cost import cost_account
from bridge_garden.models import prompt_of, read_rows
from bridge_garden.presets import PRESETS, get_preset
from shared_core.errors import InputError
from shared_core.testing import CliResult

Run = Callable[..., CliResult]
# transformers fills float settings with ints.
pytestmark = pytest.mark.usefixtures("without_type_checks")


def test_help_teaches(run_cli: Run) -> None:
    shown = run_cli(main, "--help")
    names = ["demo", "train", "exposure", "kappa", "annotate", "capture", "evaluate", "bench"]
    for name in [*names, "cost", "presets"]:
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


def in_its_own_process(argv: list[str], folder: str) -> None:
    """The command, in a process that can be killed."""
    os.chdir(folder)
    with (
        Path("said.txt").open("w") as said,
        contextlib.redirect_stderr(said),
        contextlib.redirect_stdout(said),
    ):
        sys.exit(main(argv))


def test_a_killed_run_goes_on_and_ends_in_the_same_numbers(
    run_cli: Run, pair: tuple[str, str, str], warm_processes: Any
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

    killed = warm_processes.Process(
        target=in_its_own_process, args=([*command, "--out", "killed"], os.getcwd())
    )
    killed.start()
    mark = Path("killed/checkpoints/checkpoint-10/complete.json")
    limit = time.monotonic() + 300
    while not mark.is_file() and time.monotonic() < limit and killed.is_alive():
        time.sleep(0.01)
    killed.kill()
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL, Path("said.txt").read_text()
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


def test_annotate_and_evaluate(
    run_cli: Run, pair: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher, data = pair
    shown = run_cli(
        main, "annotate", "the sum 1 + 1 = 2", "--teacher", teacher, "--student", student,
        "--weight", "wsl", "--device", "cpu", "--json",
    )  # fmt: skip
    assert shown.code == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert found["tokens"] == ["the", "sum", "1", "+", "1", "=", "2"]
    assert len(found["positions"]["weight"]) == 6
    folder = Path("runs/bridge-garden/annotate")
    assert (folder / "annotate.png").stat().st_size > 10_000
    assert "&lt;" in _strip_of(run_cli, teacher, "2 <eos> 3")

    import bridge_garden.small_teacher as small

    whole = small.small_teacher
    monkeypatch.setattr(
        small, "small_teacher", lambda seed: whole(2, vocab=300, width=16, window=8, seed=seed)
    )
    shown = run_cli(main, "annotate", "--device", "cpu", "--json", "--out", "without")
    assert shown.code == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert "".join(found["tokens"]) == small.SENTENCE
    assert json.loads(Path("without/metrics.json").read_text()) == {**found, "timing": {}}

    command = ["evaluate", "--model", student, "--data", data, "--device", "cpu", "--json"]
    shown = run_cli(main, *command, "--max-new-tokens", "3", "--limit", "5")
    assert shown.code == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert found["rows"] == 5
    lines = Path("runs/bridge-garden/evaluate/log.jsonl").read_text().splitlines()
    scores = [json.loads(line)["score"] for line in lines]
    assert found["exact_match"] == sum(scores) / 5


def _strip_of(run_cli: Run, teacher: str, text: str) -> str:
    shown = run_cli(
        main, "annotate", text, "--teacher", teacher, "--device", "cpu", "--out", "strip"
    )
    assert shown.code == 0, shown.stderr
    return Path("strip/annotate.html").read_text()


def test_capture_then_train_without_the_teacher(run_cli: Run, pair: tuple[str, str, str]) -> None:
    """All 17 tokens are kept, so that the numbers are those of training with the teacher."""
    pytest.importorskip("datasets")
    student, teacher, data = pair
    captured = run_cli(
        main, "capture", "--teacher", teacher, "--data", data, "--k", "17", "--out", "topk",
        "--device", "cpu", "--json",
    )  # fmt: skip
    assert captured.code == 0, captured.stderr
    assert json.loads(captured.stdout) == {"out": "topk", "rows": 8, "k": 17, "vocab": 17}
    again = ["capture", "--teacher", teacher, "--data", data, "--out", "topk", "--device", "cpu"]
    assert run_cli(main, *again).code == 2
    assert run_cli(main, *again, "--k", "17", "--resume").code == 0
    command = ["train", "--student", student, "--device", "cpu", "--batch-size", "4", "--json"]
    command += ["--accumulation", "1", "--max-steps", "4", "--lr", "1e-2", "--weight", "entropy"]
    command += ["--nonfinite", "skip"]
    runs = [
        run_cli(main, *command, "--data", "topk", "--out", "offline"),
        run_cli(main, *command, "--data", data, "--teacher", teacher, "--out", "online"),
    ]
    assert [run.code for run in runs] == [0, 0], [run.stderr for run in runs]
    offline, online = (json.loads(run.stdout) for run in runs)
    assert offline["skipped"] == online["skipped"] == 0
    for name in ("loss", "kd", "ce", "weight"):
        assert offline[name] == pytest.approx(online[name], rel=1e-3)
    own = run_cli(main, *command, "--data", "topk", "--on-policy-fraction", "0.5", "--out", "own")
    assert (own.code, "need the teacher itself" in own.stderr) == (2, True)
    drawn = run_cli(
        main, *command, "--data", data, "--teacher", teacher, "--out", "drawn",
        "--on-policy-fraction", "1", "--max-new-tokens", "3",
    )  # fmt: skip
    assert drawn.code == 0, drawn.stderr
    assert json.loads(drawn.stdout)["loss"] != online["loss"]


def test_bench(run_cli: Run) -> None:
    shown = run_cli(
        main, "bench", "--tokens", 16, "--classes", 50, "--width", 4, "--repeats", 1,
        "--device", "cpu", "--out", "measured", "--json",
    )  # fmt: skip
    assert shown.code == 0, shown.stderr
    found = json.loads(shown.stdout)
    ours, plain = {"hybrid", "hybrid_risk", "soft"}, {"chain", "naive", "naive_risk"}
    assert found["seconds"].keys() == ours | plain
    assert found["ratios"].keys() >= {"hybrid over soft, time", "chain over hybrid, time"}
    assert all(difference < 1e-5 for difference in found["relative_differences"].values())
    assert json.loads(Path("measured/metrics.json").read_text())["timing"] == found


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
    own = get_preset("qwen2.5-7b-3b-on-policy")
    assert (own.weight, own.on_policy_fraction, own.max_new_tokens) == ("static:0.1", 0.2, 512)
    files = json.loads(run_cli(main, "presets", "--launch", "--json").stdout)
    assert files
    assert all(Path(path).is_file() for path in files.values())


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
        (["annotate", "a b", "--teacher", "./no"], "no model could be loaded"),
        (["annotate", "a b", "--weight", "bold"], "no weight is called"),
        (["capture", "--teacher", "./no", "--data", "no.jsonl"], "no.jsonl"),
        (["evaluate", "--model", "./no", "--data", "no.jsonl"], "no.jsonl"),
        (["bench", "--tokens", "1"], "tokens"),
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
    with pytest.raises(InputError, match="columns story; accepted: prompt, question or text"):
        prompt_of({"story": "once"})

"""The command line: every command runs, a killed run goes on, bad input is refused in a line."""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from abkd.cli import main
from shared_core.testing import CliResult

Run = Callable[..., CliResult]
pytestmark = pytest.mark.usefixtures("without_type_checks")


def test_help_teaches(run_cli: Run) -> None:
    shown = run_cli(main, "--help")
    assert shown.code == 0
    for name in ["demo", "train", "capture", "evaluate", "heatmap", "presets", "bench"]:
        assert name in shown.stdout
        assert run_cli(main, name, "--help").code == 0


@pytest.mark.smoke
def test_demo_writes_a_run(run_cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import abkd.demo as the_demo

    monkeypatch.setattr(the_demo, "GRID", (0.05, 0.5, 1.0))
    from abkd import demo_digits, demo_language

    real = the_demo.DemoSettings
    monkeypatch.setattr(the_demo, "DemoSettings", lambda steps: real(steps=5))
    short = {
        "teacher_width": 16,
        "window": 16,
        "teacher_steps": 2,
        "init_steps": 1,
        "steps": 2,
        "held_out": 4,
        "prompt": 4,
    }
    full = demo_language.LanguageSettings
    monkeypatch.setattr(demo_language, "LanguageSettings", lambda **_: full(**short, new_tokens=4))
    digits = demo_digits.run_digits
    monkeypatch.setattr(demo_digits, "run_digits", lambda seeds, steps: digits(seeds, steps=5))
    shown = run_cli(main, "demo", "--quick", "--json", "--seeds", 2)
    assert shown.code == 0, shown.stderr
    summary = json.loads(shown.stdout)
    folder = Path("runs/abkd/demo")
    written = json.loads((folder / "metrics.json").read_text())
    assert written.pop("timing")["seconds"] > 0
    assert written == summary
    named = [row["divergence"] for row in written["summary"]["rows"]]
    assert named[: len(the_demo.NAMED)] == list(the_demo.NAMED)
    assert not set(written["seeds"]) & set(written["tuning_seeds"])
    assert list(written["language"]["rows"]) == list(demo_language.METHODS)
    assert len(written["digits"]["rows"]) == 4
    for name in ("heatmap", "tradeoff", "language"):
        assert (folder / f"{name}.png").stat().st_size > 10_000
    assert json.loads((folder / "config.json").read_text())["command"] == "abkd demo"


def in_its_own_process(argv: list[str], folder: str) -> None:
    """The command, in a process that can be killed."""
    os.chdir(folder)
    with Path("said.txt").open("w") as said, contextlib.redirect_stderr(said):
        sys.exit(main(argv))


def damage(path: Path) -> None:
    """Flip a byte in the middle; twice is as before."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.filterwarnings("default:.*is damaged and passed over:UserWarning")
def test_a_killed_run_goes_on_and_ends_in_the_same_numbers(
    pair: list[str], tmp_path: Path, run_cli: Run, warm_processes: Any
) -> None:
    from safetensors.torch import load_file

    whole = run_cli(main, *pair, "--out", tmp_path / "whole")
    assert whole.code == 0, whole.stderr
    killed = warm_processes.Process(
        target=in_its_own_process, args=([*pair, "--out", "killed"], str(tmp_path))
    )
    killed.start()
    mark = tmp_path / "killed/checkpoints/checkpoint-10/complete.json"
    limit = time.monotonic() + 300
    while not mark.is_file() and time.monotonic() < limit and killed.is_alive():
        time.sleep(0.01)
    killed.kill()
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL, (tmp_path / "said.txt").read_text()
    assert not (tmp_path / "killed/student").exists()
    refused = run_cli(main, *pair, "--out", tmp_path / "killed")
    assert refused.code == 2
    assert "continue it with --resume" in refused.stderr
    other = [*pair, "--out", tmp_path / "killed", "--resume", "--alpha", "0.5"]
    assert "give the same settings" in run_cli(main, *other).stderr
    # The latest whole checkpoint is damaged on the disk: the one before takes over.
    marks = sorted((tmp_path / "killed").rglob("complete.json"), key=lambda p: len(str(p)))
    steps = sorted(int(mark.parent.name.split("-")[1]) for mark in marks)
    latest = tmp_path / f"killed/checkpoints/checkpoint-{steps[-1]}"
    damage(latest / "model.safetensors")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "killed").rglob("*") if p.is_file()}
    if len(steps) > 1:
        kept = steps[-2]
        damage(tmp_path / f"killed/checkpoints/checkpoint-{kept}/optimizer.pt")
        refused = run_cli(main, *pair, "--out", tmp_path / "killed", "--resume")
        assert refused.code == 2
        assert "are damaged; delete them" in refused.stderr
        damage(tmp_path / f"killed/checkpoints/checkpoint-{kept}/optimizer.pt")  # and undone
        assert all(p.is_file() for p in before)
    again = run_cli(main, *pair, "--out", tmp_path / "killed", "--resume")
    assert again.code == 0, again.stderr
    assert f"checkpoint-{steps[-1]} is damaged and passed over" in again.stderr
    one, two = (
        load_file(tmp_path / name / "student/model.safetensors") for name in ("whole", "killed")
    )
    assert all((one[name] == two[name]).all() for name in one)
    numbers = [
        json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "killed")
    ]
    for found in numbers:
        found.pop("timing")
    assert numbers[0] == numbers[1]
    assert numbers[0]["steps"] == 30
    assert numbers[0]["last"]["kd"] < numbers[0]["first"]["kd"]
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("whole", "killed")]
    assert [json.loads(line).get("kd") for line in logs[0].splitlines()] == [
        json.loads(line).get("kd") for line in logs[1].splitlines()
    ]


def test_capture_then_train_without_the_teacher(
    pair: list[str], tmp_path: Path, run_cli: Run
) -> None:
    options = [*pair[3:7], "--k", "250", "--device", "cpu", "--out", "top"]
    first = run_cli(main, "capture", *options, "--json")
    assert first.code == 0, first.stderr
    assert json.loads(first.stdout)["rows"] == 40
    files = sorted(Path("top").glob("*.parquet"))
    files[-1].unlink()
    refused = run_cli(main, "capture", *options)
    assert refused.code == 2
    assert run_cli(main, "capture", *options, "--resume").code == 0
    assert sorted(Path("top").glob("*.parquet")) == files
    online = run_cli(main, *pair, "--max-steps", 2, "--out", "on", "--json")
    assert online.code == 0, online.stderr
    arguments = [*pair[:3], "--data", "top", *pair[7:], "--max-steps", 2, "--out", "off", "--json"]
    offline = run_cli(main, *arguments)
    assert offline.code == 0, offline.stderr
    one, two = (json.loads(shown.stdout)["first"]["kd"] for shown in (online, offline))
    assert one == pytest.approx(two, rel=0.1)  # nearly all tokens are listed
    assert one != two
    refused = run_cli(main, "capture", *options[:4], "--k", "9999", "--out", "other")
    assert "accepted: 1 to" in refused.stderr


def test_evaluate(pair: list[str], tmp_path: Path, run_cli: Run) -> None:
    common = ["evaluate", "--model", pair[2], "--device", "cpu", "--max-new-tokens", 4]
    common += ["--data", pair[6], "--json"]
    shown = run_cli(main, *common, "--metric", "exact_match", "--limit", 3, "--out", "e")
    assert shown.code == 0, shown.stderr
    assert json.loads(shown.stdout)["rows"] == 3
    lines = [json.loads(line) for line in Path("e/log.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["The quick"] * 3
    refused = run_cli(main, *common, "--metric", "bleu")
    assert refused.code == 2
    assert "accepted: rouge_l, exact_match" in refused.stderr
    (tmp_path / "text.jsonl").write_text('{"story": "x"}')
    refused = run_cli(main, *common, "--metric", "exact_match", "--data", tmp_path / "text.jsonl")
    assert refused.code == 2
    assert "evaluation needs prompt and" in refused.stderr


def test_a_run_that_cannot_be_read_is_not_continued(
    pair: list[str], tmp_path: Path, run_cli: Run
) -> None:
    (tmp_path / "bad/checkpoints/checkpoint-5").mkdir(parents=True)
    (tmp_path / "bad/config.json").write_text('{"settings": ')
    shown = run_cli(main, *pair, "--out", tmp_path / "bad", "--resume")
    assert shown.code == 2
    assert "config.json cannot be read" in shown.stderr


def test_presets_and_plan(run_cli: Run) -> None:
    listed = json.loads(run_cli(main, "presets", "--json").stdout)
    assert listed["gpt2-small-dolly"]["alpha"] == 0.2
    assert listed["openllama-3b-dolly"]["student"] == "openlm-research/open_llama_3b_v2"
    assert "clip-base-to-new" in run_cli(main, "presets").stdout
    assert {p["task"] for p in listed.values()} == {"language", "vision", "clip"}
    for name, preset in listed.items():
        extra = ["--data", "images"] if preset["task"] == "clip" else []
        shown = run_cli(main, "train", "--preset", name, *extra, "--dry-run", "--json")
        plan = json.loads(shown.stdout)
        for key in ("student", "teacher", "alpha", "beta", "lr", "kd_weight", "epochs"):
            assert plan[key] == preset[key], name
    assert listed["gpt2-xl-dolly-sft"]["teacher"] is None
    changed = ["train", "--preset", "cifar100-dkd-resnet56-resnet20", "--dry-run", "--json"]
    plan = json.loads(run_cli(main, *changed, "--epochs", 3, "--alpha", 0.5).stdout)
    assert (plan["epochs"], plan["alpha"], plan["criterion"]) == (3, 0.5, "dkd")


def test_launch_files(run_cli: Run) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    files = json.loads(run_cli(main, "presets", "--launch", "--json").stdout)
    kinds = {name: load_config_from_file(path) for name, path in files.items()}
    assert kinds["ddp"].distributed_type == "MULTI_GPU"
    assert kinds["fsdp2"].fsdp_config["fsdp_version"] == 2
    for stage in (1, 2, 3):
        assert kinds[f"zero{stage}"].deepspeed_config["zero_stage"] == stage


def test_the_gsm8k_recipe(
    pair: list[str], run_cli: Run, tenfold_data: Path, tmp_path: Path
) -> None:
    for split, count in (("train", 24), ("test", 3)):
        lines = (tenfold_data / f"gsm8k-{split}.jsonl").read_text().splitlines()[:count]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    options = [*pair[:5], "--data", "train.jsonl", "--max-steps", 2, "--batch-size", 2]
    options += ["--max-length", 640, "--device", "cpu", "--out", "run", "--json"]
    trained = run_cli(main, *options)
    assert trained.code == 0, trained.stderr
    assert json.loads(trained.stdout)["last"]["kd"] > 0
    argv = ["evaluate", "--model", "run/student", "--data", "test.jsonl", "--metric", "exact_match"]
    argv += ["--max-new-tokens", 4, "--seeds", 2, "--device", "cpu", "--json"]
    shown = run_cli(main, *argv)
    assert shown.code == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert (found["rows"], len(found["of_seeds"])) == (3, 2)
    from abkd.evaluation import exact_match

    references = [
        json.loads(line)["answer"] for line in Path("test.jsonl").read_text().splitlines()
    ]
    assert exact_match(references, references) == [100.0] * 3
    assert exact_match(references, references[1:] + references[:1]) == [0.0] * 3


def test_bench(run_cli: Run) -> None:
    shown = run_cli(
        main, "bench", "--tokens", 4, "--classes", 50, "--repeats", 1, "--json", "--out", "b"
    )
    assert shown.code == 0, shown.stderr
    assert json.loads(shown.stdout)["ratios"]["plain_ab over ab, time"] > 0
    assert Path("b/metrics.json").is_file()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train"], "say what to train"),
        (["train", "--preset", "mnist"], "no preset is called 'mnist'"),
        (["train", "--preset", "clip-base-to-new"], "the preset names no data"),
        (["train", "--preset", "gpt2-small-dolly", "--criterion", "ab"], "has no part in a run of"),
        (["train", "--student", "./none", "--data", "pydoc"], "cannot load the model ./none"),
        (["train", "--student", "a", "--data", "b", "--device", "tpu"], "device 'tpu'"),
        (["demo", "--seeds", "0"], "--seeds"),
        (["demo", "--device", "mps"], "mps"),
    ],
)
def test_bad_input_is_one_line_and_code_2(run_cli: Run, argv: list[str], message: str) -> None:
    shown = run_cli(main, *argv)
    assert shown.code == 2
    assert message in shown.stderr
    assert len(shown.stderr.strip().splitlines()) <= 2
    assert "Traceback" not in shown.stderr

"""The command line: every command runs, a killed run goes on, bad input is refused in a line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import gmsa.bench as the_bench
import gmsa.demo as the_demo
from gmsa.cli import main
from gmsa.demo import DemoSettings, save_tour, tiny_compressor

TINY = ["--encoder-layers", "1", "--lora-r", "4", "--rates", "2,4", "--batch-size", "2",
        "--instruction", "Restate", "--device", "cpu", "--lr", "0.01"]  # fmt: skip


@pytest.fixture(scope="module")
def tour(tmp_path_factory):
    """What the demo leaves: a base model, records, and a compressor; and text files."""
    folder = tmp_path_factory.mktemp("tour")
    save_tour(folder, 24)
    compressor = tiny_compressor()
    compressor.model.decoder.load_state_dict(the_demo.load_base().state_dict())
    again = the_demo.GMSAModel.from_backbone(
        compressor.model.decoder, the_demo.GMSAConfig(encoder_layers=1, lora_r=4)
    )
    again.config.base_model_name_or_path = "../base"
    again.save_pretrained(folder / "compressor")
    (folder / "a.txt").write_text("ba be bi bo bu ba")
    (folder / "b.txt").write_text("ca ce ci")
    return folder


def called(run_cli, *argv):
    found = run_cli(main, *argv, "--json")
    assert found.code == 0, found.stderr
    return json.loads(found.stdout)


@pytest.mark.smoke
def test_demo_writes_a_run_and_goes_on(run_cli, monkeypatch) -> None:
    tiny = DemoSettings(ae_steps=2, keft_steps=2, items=8)
    monkeypatch.setattr(the_demo.DemoSettings, "quick", lambda self: tiny)
    monkeypatch.setattr(the_bench, "latency", lambda *a, **k: [
        {"n": n, "way": "GMSA", "rate": 4, "first": 0.1, "total": 0.2, "speed-up": 1.0}
        for n in (1, 2)
    ])  # fmt: skip
    shown = run_cli(main, "demo", "--quick", "--json", "--out", "run")
    assert shown.code == 0, shown.stderr
    written = json.loads(Path("run/metrics.json").read_text())
    assert written.pop("timing")["seconds"] > 0
    assert written == json.loads(shown.stdout)
    assert [r["method"] for r in written["summary"]["rows"]] == list(the_demo.QUICK_METHODS)
    for name in ("comparison", "latency"):
        assert Path(f"run/{name}.png").stat().st_size > 10_000
    trained = []
    method = the_demo.run_method

    def interrupted(name, *args):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(name)
        return method(name, *args)

    with monkeypatch.context() as patch:
        patch.setattr(the_demo, "run_method", interrupted)
        assert run_cli(main, "demo", "--quick", "--out", "half").code == 130
    assert "--resume" in run_cli(main, "demo", "--quick", "--out", "half").stderr
    again = []
    monkeypatch.setattr(the_demo, "run_method", lambda n, *a: again.append(n) or method(n, *a))
    resumed = called(run_cli, "demo", "--quick", "--out", "half", "--resume")
    assert not set(again) & set(trained)
    assert resumed["seeds"] == written["seeds"]


def test_the_demo_runs_in_processes_of_its_own(tmp_path) -> None:
    tiny = DemoSettings(items=8)
    jobs = [("truncation", 0)]  # one job, one process: starting one costs seconds
    found = dict(the_demo.run_jobs(jobs, tiny, tmp_path, 0, 2))
    assert found == {job: the_demo.run_method(*job, tiny) for job in jobs}


def test_a_killed_training_goes_on_and_ends_in_the_same_numbers(run_cli, tour, tmp_path) -> None:
    argv = ["train-ae", "--model", tour / "base", "--train-file", tour / "train.jsonl", *TINY,
            "--steps", "30", "--save-steps", "5"]  # fmt: skip
    argv = [str(a) for a in argv]
    whole = called(run_cli, *argv, "--out", tmp_path / "whole")
    assert whole["steps"] == 30
    assert whole["last"]["loss"] < whole["first"]["loss"]
    with (tmp_path / "said.txt").open("w") as said:
        killed = subprocess.Popen(
            [sys.executable, "-m", "gmsa.cli", *argv, "--out", "killed"], cwd=tmp_path,
            env=dict(os.environ, HF_HUB_OFFLINE="1"), stdout=said, stderr=said,
        )  # fmt: skip
    mark = tmp_path / "killed/checkpoints/checkpoint-10/complete.json"
    limit = time.monotonic() + 300
    while not mark.is_file() and time.monotonic() < limit and killed.poll() is None:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(60) == -signal.SIGKILL, (tmp_path / "said.txt").read_text()
    assert not (tmp_path / "killed/model").exists()
    refused = run_cli(main, *argv, "--out", tmp_path / "killed")
    assert (refused.code, "continue it with --resume" in refused.stderr) == (2, True)
    other = [*argv, "--out", tmp_path / "killed", "--resume", "--lr", "0.5"]
    assert "give the same settings" in run_cli(main, *other).stderr
    assert called(run_cli, *argv, "--out", tmp_path / "killed", "--resume")["last"] == whole["last"]
    one, two = (
        load_file(tmp_path / name / "model/compressor.safetensors") for name in ("whole", "killed")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("whole", "killed")]
    assert logs[0] == logs[1]


def test_both_stages_then_the_scores(run_cli, tour) -> None:
    train = ["--train-file", tour / "train.jsonl", "--steps", 2, "--device", "cpu"]
    called(run_cli, "train-ae", "--model", tour / "base", *train, *TINY, "--out", "ae",
           "--checkpointing", "all", "--dtype", "bfloat16")  # fmt: skip
    assert Path("ae/training.png").stat().st_size > 10_000
    assert json.loads(Path("ae/config.json").read_text())["settings"]["rates"] == [2, 4]
    keft = ["train-keft", "--model", "ae/model", *train, "--rates", "2,4", "--grad-accum", 2]
    called(run_cli, *keft, "--decoder-tuning", "lora", "--out", "keft")
    assert Path("keft/model/decoder/adapter_model.safetensors").is_file()
    argv = ["eval-qa", "keft/model", "--eval-file", tour / "test.jsonl", "--rates", "2,4",
            "--max-new-tokens", 3, "--baselines", "full,closed-book,truncation,truncation-end",
            "--out", "qa", "--device", "cpu"]  # fmt: skip
    rows = called(run_cli, *argv)["rows"]
    assert [(r["method"], r["rate"]) for r in rows[:4]] == [
        ("gmsa", 2), ("gmsa", 4), ("full", 1), ("closed-book", 1)
    ]  # fmt: skip
    assert rows[1]["ratio"] == 4.0
    assert rows[2]["ratio"] == 1.0
    assert rows[3]["ratio"] is None
    lines = Path("qa/predictions.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 8 * 3
    assert "--resume" in run_cli(main, *argv).stderr
    # A killed run leaves some lines and half of one.
    Path("qa/predictions.jsonl").write_text("".join(lines[:4]) + lines[4][:20])
    assert called(run_cli, *argv, "--resume")["rows"] == rows
    assert sorted(Path("qa/predictions.jsonl").read_text().splitlines()) == sorted(
        line.strip() for line in lines
    )
    assert "give the same" in run_cli(main, *argv, "--resume", "--limit", 1).stderr


def test_ablations_and_controls_train_without_the_first_stage(run_cli, tour) -> None:
    argv = ["train-keft", "--model", tour / "base", "--train-file", tour / "train.jsonl",
            "--steps", 1, *[t for t in TINY if t not in ("--instruction", "Restate")]]  # fmt: skip
    for number, options in enumerate(
        (["--merging", "embeddings", "--alignment", "none", "--rates", "1"],
         ["--merging", "memory", "--alignment", "linear", "--memory-tokens", "16"],
         ["--lsa-init", "random"])
    ):  # fmt: skip
        called(run_cli, *argv, *options, "--out", f"run{number}")
    shown = called(run_cli, "info", "run1/model")
    assert (shown["merging"], shown["decoder_tuning"]) == ("memory", "full")


def test_reconstruction_scores(run_cli, tour) -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    argv = ["eval-recon", tour / "compressor", "--eval-file", tour / "test.jsonl", "--rates", "2",
            "--max-tokens", 9, "--out", "recon", "--device", "cpu"]  # fmt: skip
    [row] = called(run_cli, *argv)["rows"]
    assert {"prefix_em", "token_acc", "exact", "bleu", "rouge1", "rouge2", "rougeL"} <= set(row)
    assert Path("recon/scores.png").stat().st_size > 5_000


def test_compress_answer_reconstruct(run_cli, tour) -> None:
    saved = tour / "compressor"
    argv = ["compress", saved, tour / "a.txt", tour / "b.txt", "--rate", 2, "--device", "cpu"]
    stored = called(run_cli, *argv, "--out", "c")
    assert (stored["documents"], stored["tokens"], stored["soft_tokens"]) == (2, 9, 5)
    assert called(run_cli, *argv, "--out", "c", "--resume")["added"] == 0
    half = [*argv, "--num-shards", 2, "--shard-id", 1, "--store", "half"]
    assert called(run_cli, *half)["documents"] == 1
    many = ["compress", saved, tour / "test.jsonl", "--store", "many", "--device", "cpu"]
    assert called(run_cli, *many)["documents"] == 3
    described = called(run_cli, "info", "c/store", "--verify")
    assert (described["kind"], described["documents"], described["damaged"]) == ("store", 2, [])
    ask = ["answer", saved, "ba", "be bi", "--rate", 2, "--device", "cpu", "--max-new-tokens", 3]
    here = called(run_cli, *ask, "--context", tour / "a.txt", "--out", "ans")
    assert here["compressed_tokens"] == 3
    assert len(here["answers"]) == 2
    kept = called(run_cli, *ask, "--context", tour / "a.txt", "--out", "ans", "--resume")
    assert kept == here
    both = called(run_cli, *ask, "--store", "c/store", "--ids", "b.txt,a.txt")
    assert (both["origin_tokens"], both["compressed_tokens"]) == (9, 5)
    texts = called(run_cli, "reconstruct", saved, tour / "a.txt", "--device", "cpu", "--out", "r")
    assert len(texts["texts"]) == 1
    assert Path("r/predictions.jsonl").is_file()


def test_bench_measures_and_goes_on(run_cli, monkeypatch) -> None:
    cpu = torch.device("cpu")
    small = {
        "compress": lambda d, r: the_bench.bench_compress(d, r, n=64, vocab=500, width=64, k=2),
        "merge": lambda d, r: the_bench.bench_merge(d, r, rows=4, n=32, width=16),
        "train": lambda d, r: the_bench.bench_train(d, r, n=32, vocab=500, width=64),
        "answer": lambda d, r: the_bench.bench_answer(d, r, lengths=(32, 64)),
        "store": lambda d, r: the_bench.bench_store(d, r, documents=3, n=32, width=64),
        "stream": lambda d, r: the_bench.bench_stream(d, r, n=64, width=64, chunk=16),
    }
    monkeypatch.setattr(the_bench, "CASES", small)
    found = called(run_cli, "bench", "--repeats", 1, "--out", "b", "--device", "cpu")
    aims = {row["case"] for row in found["targets"]}
    assert aims == {"compress", "merge", "train", "store", "stream"}
    assert found["stream"]["largest difference"] < 1e-5
    assert found["compress"]["largest difference"] < 1e-4
    assert found["compress"]["largest tensor of ours over n V"] < 1
    assert found["merge"]["largest difference"] < 1e-5
    assert found["train"]["difference of the losses"] < 1e-4
    assert len(found["answer"]["rows"]) == 2 * 5
    assert Path("b/latency.png").stat().st_size > 10_000
    calls = []
    done = {name: lambda d, r, n=name: calls.append(n) or {} for name in small}
    monkeypatch.setattr(the_bench, "CASES", {**done, "store": lambda d, r: 1 / 0})
    assert run_cli(main, "bench", "--out", "c").code == 1
    monkeypatch.setattr(the_bench, "CASES", done)
    called(run_cli, "bench", "--out", "c", "--resume", "--no-plots", "--device", cpu)
    assert sorted(calls) == sorted(small)


@pytest.mark.smoke
def test_help_info_and_launch_files(run_cli) -> None:
    shown = run_cli(main, "--help").stdout
    for name in ("demo", "train-ae", "train-keft", "compress", "answer", "reconstruct", "eval-qa",
                 "eval-recon", "bench", "info"):  # fmt: skip
        assert f" {name} " in shown
    for name in ("demo", "train-ae", "train-keft", "compress", "answer", "reconstruct", "eval-qa",
                 "eval-recon", "bench"):  # fmt: skip
        options = run_cli(main, name, "--help").stdout
        assert all(o in options for o in ("--out", "--seed", "--device", "--json", "--resume"))
    presets = called(run_cli, "info")
    assert presets["official"]["rates"] == [16]
    assert presets["official"]["generation"]["repetition_penalty"] == 1.3
    assert called(run_cli, "train-ae", "--preset", "qwen3-4b-4x8x", "--train-file", "t.txt",
                  "--dry-run", "--device", "cpu")["steps"] == 5000  # fmt: skip


def test_launch_files_are_what_accelerate_reads(tmp_path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    from gmsa.inspection import LAUNCH, launch_file

    kinds = {}
    for name in LAUNCH:
        (tmp_path / name).write_text(launch_file(name))
        kinds[name] = load_config_from_file(str(tmp_path / name)).distributed_type.value
    assert kinds == {
        "ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed-zero2": "DEEPSPEED",
        "deepspeed-zero3": "DEEPSPEED",
    }  # fmt: skip


def test_what_is_refused(run_cli, tour) -> None:
    saved = tour / "compressor"
    train = ["train-ae", "--model", tour / "base"]
    Path("bad.jsonl").write_text('{"input": "ba"}\n\n{"prompt": "ba"}\n')
    Path("worse.jsonl").write_text("{\n")
    Path("empty.txt").write_text("\n")
    for argv, message in (
        (["answer", saved, "ba", "--context", "no.txt"], "cannot be read"),
        (["answer", "nowhere", "ba", "--context", tour / "a.txt"], "not a folder"),
        (["answer", saved, "ba"], "say what to answer from"),
        (["answer", saved, "ba", "--context", tour / "a.txt", "--resume"], "needs the --out"),
        (["demo", "--device", "abacus"], "is not here"),
        (["compress", saved, tour / "a.txt", tour / "a.txt"], "two documents have the id"),
        (["compress", saved, tour / "a.txt", "--shard-id", "1"], "--shard-id is 1"),
        (["eval-qa", saved, "--eval-file", "bad.jsonl"], "bad.jsonl, line 1 has no 'prompt'"),
        (["eval-recon", saved, "--eval-file", "bad.jsonl"], "line 3 has no 'input'"),
        (["eval-qa", saved, "--eval-file", tour / "test.jsonl", "--rates", "x"], "whole numbers"),
        (["eval-qa", saved, "--eval-file", tour / "test.jsonl", "--baselines", "magic"],
         "accepted: full, closed-book"),
        ([*train, "--train-file", "worse.jsonl"], "line 1: no JSON"),
        ([*train, "--train-file", "empty.txt"], "has no records"),
        ([*train], "--train-file"),
        (["train-ae", "--preset", "tiny-demo", "--train-file", "t"], "give --model"),
        (["train-ae", "--preset", "gpt", "--train-file", "t"], "accepted: qwen3-4b-4x8x"),
        ([*train, "--train-file", tour / "train.jsonl", "--dtype", "float16", "--device", "cpu"],
         "does not train on the CPU"),
        ([*train, "--train-file", tour / "train.jsonl", "--encoder-layers", "9"], "1 to 3"),
        (["bench", "--cases", "speed"], "accepted: compress"),
        (["info", tour], "neither a checkpoint"),
        (["info", "--launch", "magic"], "accepted: ddp"),
    ):  # fmt: skip
        refused = run_cli(main, *argv)
        assert (refused.code, refused.stdout) == (2, ""), (argv, refused.stderr)
        assert message in refused.stderr, (argv, refused.stderr)
        assert len(refused.stderr.strip().splitlines()) <= 2

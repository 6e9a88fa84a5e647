"""The command line: real files in, numbers and pictures out, one line for what is wrong."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from openworld_auc import openworld_auc, openworld_report
from openworld_auc.cli import main
from shared_core.testing import CliResult

Run = Callable[..., CliResult]


def write_csv(path, tools, seed=0, header="score,correct,is_base"):
    scores, correct, is_base = tools.case(seed)
    rows = zip(scores.tolist(), correct.int().tolist(), is_base.int().tolist(), strict=True)
    Path(path).write_text("\n".join([header, *(f"{s!r},{c},{b}" for s, c, b in rows)]) + "\n")
    return scores, correct, is_base


def test_help_teaches(run_cli: Run) -> None:
    shown = run_cli(main, "--help")
    assert shown.code == 0
    for name in ("demo", "train", "eval", "score", "compare", "presets"):
        assert name in shown.stdout
        assert run_cli(main, name, "--help").code == 0


@pytest.mark.smoke
@pytest.mark.filterwarnings("default:the threshold")
def test_score_reads_the_files_of_any_model(run_cli: Run, tools) -> None:
    case = write_csv("a.csv", tools)
    scores, correct, is_base = case
    np.savez("a.npz", score=scores, correct=correct, is_base=is_base, joint_correct=correct)
    target = torch.arange(len(scores)) % 4
    pred = torch.where(correct, target, target + 1)
    words = ["base" if b else "new" for b in is_base]
    rows = zip(scores.tolist(), pred.tolist(), target.tolist(), words, strict=True)
    Path("b.tsv").write_text(
        "\n".join(["score\tpred\ttarget\tdomain", *("\t".join(map(str, r)) for r in rows)])
    )
    for name in ("a.csv", "a.npz", "b.tsv"):
        shown = run_cli(main, "score", name, "--threshold", "0.1", "--json")
        assert shown.code == 0, shown.stderr
        found = json.loads(shown.stdout)
        assert found["openworld_auc"] == pytest.approx(float(openworld_auc(*case)), abs=1e-12)
        assert found["low"] < found["openworld_auc"] < found["high"]
        joint = found["overall_acc_joint"]
        assert joint == (pytest.approx(float(correct.double().mean())) if ".npz" in name else None)
    folder = Path("runs/openworld-auc/score/a")
    assert (folder / "curve.png").stat().st_size > 5000
    assert json.loads((folder / "metrics.json").read_text())["auroc"] == found["auroc"]
    assert "OpenworldAUC" not in run_cli(main, "score", "a.csv", "--no-plots").stderr
    assert run_cli(main, "score", "b.tsv", "--by-class").code == 0
    told = run_cli(main, "score", "a.csv", "--threshold", "youden")
    assert "note: the threshold 'youden' is fitted on the evaluated samples" in told.stderr


def test_parquet(run_cli: Run, tools, tmp_path, monkeypatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    scores, correct, is_base = case = tools.case(2)
    table = {"score": scores.tolist(), "correct": correct.tolist(), "is_base": is_base.tolist()}
    datasets.Dataset.from_dict(table).to_parquet("a.parquet")
    shown = run_cli(main, "score", "a.parquet", "--json")
    assert shown.code == 0, shown.stderr
    found = json.loads(shown.stdout)["openworld_auc"]
    assert found == pytest.approx(float(openworld_auc(*case)), abs=1e-12)


@pytest.mark.smoke
def test_compare(run_cli: Run, tools) -> None:
    write_csv("a.csv", tools)
    text = Path("a.csv").read_text().splitlines()
    worse = [
        text[0],
        *(line.replace(",1,", ",0,") if i % 3 else line for i, line in enumerate(text[1:])),
    ]
    Path("b.csv").write_text("\n".join(worse))
    shown = run_cli(main, "compare", "a.csv", "b.csv", "--json")
    assert shown.code == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert found["difference"] > 0
    assert found["difference"] == pytest.approx(found["value_a"] - found["value_b"])
    write_csv("c.csv", tools, seed=3)
    refused = run_cli(main, "compare", "a.csv", "c.csv")
    assert (refused.code, refused.stdout) == (2, "")
    assert "pass paired=False" in refused.stderr
    assert run_cli(main, "compare", "a.csv", "c.csv", "--unpaired").code == 0


def test_presets(run_cli: Run) -> None:
    found = json.loads(run_cli(main, "presets", "--json").stdout)
    assert len(found["benchmarks"]) == 15
    assert found["benchmarks"]["imagenet_a"]["base"] == 101
    assert found["methods"]["gmop-official"]["train"]["t_max"] == 100
    assert "oxford_pets" in run_cli(main, "presets").stdout


def test_train_resume_and_eval(run_cli: Run, pets, tools) -> None:
    argv = ["train", "--data", pets / "images", "--split-file", pets / "split.json"]
    argv += ["--backbone", f"local-dir:{pets / 'clip'}", "--shots", 2, "--epochs", 2, "--k", 2]
    shown = run_cli(main, *argv, "--out", "run", "--json", "--device", "cpu")
    assert shown.code == 0, shown.stderr
    found = json.loads(shown.stdout)["test"]["gmop"]
    assert (found["n_base"], found["n_new"]) == (8, 8)
    manifest = json.loads(Path("run/manifest.json").read_text())
    assert {name: len(items) for name, items in manifest.items()} == {"cat": 2, "dog": 2}
    for name in ("curves.png", "training.png", "contexts.safetensors", "gmop.json", "log.jsonl"):
        assert Path("run", name).is_file()
    again = run_cli(main, *argv, "--out", "run", "--resume", "--json", "--device", "cpu")
    assert json.loads(again.stdout)["test"]["gmop"] == found
    config = Path("run/config.json").read_text()
    refused = run_cli(main, *argv, "--out", "run", "--resume", "--lam", 0.5)
    assert (refused.code, "--resume with lam=0.5, but the run in run has lam=1.0" in
            refused.stderr) == (2, True)  # fmt: skip
    assert Path("run/config.json").read_text() == config  # which eval reads
    faster = ["--prefix-cache", "--chunk", 2, "--out", "faster", "--json", "--device", "cpu"]
    shown = run_cli(main, *argv, *faster)
    assert json.loads(shown.stdout)["test"]["gmop"] == pytest.approx(found, abs=1e-6)
    refused = run_cli(main, *argv, "--out", "run")
    assert refused.code == 2
    assert "--resume" in refused.stderr
    tested = run_cli(main, "eval", "run", "--json", "--device", "cpu")
    assert tested.code == 0, tested.stderr
    summary = json.loads(tested.stdout)
    assert summary["test"]["run"] == pytest.approx(found)
    assert list(summary) == ["test", "against"]
    assert list(summary["test"]["run"]) == list(openworld_report(*tools.case(0)).to_dict())
    assert summary["test"]["zeroshot"]["new_acc"] == found["new_acc"]
    tested = run_cli(main, "eval", "run", "--ci", "bootstrap", "--json", "--device", "cpu")
    drawn = json.loads(tested.stdout)["test"]["run"]
    assert drawn["openworld_auc"] == pytest.approx(found["openworld_auc"])
    assert drawn["low"] != found["low"]
    tested = run_cli(main, "eval", "run", "--by-class", "--json", "--device", "cpu")
    assert json.loads(tested.stdout)["test"]["run"]["se"] != drawn["se"]
    refused = run_cli(main, "eval", "run", "--ci", "exact")
    assert (refused.code, "--ci is 'exact'" in refused.stderr) == (2, True)
    assert 0 <= summary["against"]["zeroshot"]["p_value"] <= 1
    drawn = [
        json.loads(run_cli(main, "score", "a.csv", "--ci", "bootstrap", "--seed", seed, "--json",
                           "--no-plots").stdout)["low"]
        for seed in (0, 0, 1) if write_csv("a.csv", tools)
    ]  # fmt: skip
    assert drawn[0] == drawn[1] != drawn[2]


def test_prompts_of_one_benchmark_on_another(run_cli: Run, pets, monkeypatch) -> None:
    from openworld_auc import presets

    # Folders with names that say nothing, as ImageNet's, and what they are called beside them.
    names = ["cat", "dog", "red fox", "owl"]
    for label in range(4):
        for split, part in (("wnids/train", "train"), ("wnids/test", "test"), ("few/test", "test")):
            if (split, label) == ("few/test", 0):
                continue
            folder = Path(split, f"n{label}")
            folder.mkdir(parents=True)
            for file in (pets / "images").glob(f"{part}_{label}_*.png"):
                (folder / file.name).write_bytes(file.read_bytes())
    Path("names.txt").write_text("\n".join(names))
    model = ["--model", f"local-dir:{pets / 'clip'}", "--device", "cpu", "--json"]
    argv = ["train", "--data", "wnids", "--classes", "names.txt", "--shots", 2, "--epochs", 1]
    shown = run_cli(main, *argv, "--base", 3, "--k", 2, *model, "--out", "run")
    assert shown.code == 0, shown.stderr
    assert json.loads(Path("run/gmop.json").read_text())["base_classes"] == names[:3]
    assert list(json.loads(Path("run/manifest.json").read_text())) == names[:3]
    # The same classes with fewer of them base, and no training images.
    few = presets.Benchmark("few", 3, 2, 12, "imagenet-v2", train_on="imagenet")
    monkeypatch.setitem(presets.BENCHMARKS, "few", few)
    Path("few.txt").write_text("dog\nred fox\nowl")
    argv = ["eval", "run", "--preset", "few", "--device", "cpu", "--json"]
    there = ["--data", "few", "--classes", "few.txt"]
    shown = run_cli(main, *argv, *there)
    assert shown.code == 0, shown.stderr
    found = json.loads(shown.stdout)["test"]
    assert list(found) == ["run", "zeroshot"]
    assert (found["run"]["n_base"], found["run"]["n_new"]) == (8, 4)
    refused = run_cli(main, *argv)
    assert (refused.code, "give --data" in refused.stderr) == (2, True)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["score", "nowhere.csv"], "there is no file nowhere.csv"),
        (["score", "bad.csv"], "has no column 'is_base', but score, correct"),
        (["score", "text.csv"], "column 'score' of text.csv does not hold numbers"),
        (["score", "ragged.csv"], "line 2 of ragged.csv has 2 fields"),
        (["score", "domain.csv"], "holds 'far'; accepted"),
        (["score", "nan.csv"], "1 of 2 scores are NaN"),
        (["score", "one.csv"], "there are no new samples"),
        (["score", "a.xlsx"], "of no known kind"),
        (["score", "ok.csv", "--threshold", "best"], "--threshold is 'best'"),
        (["score", "ok.csv", "--ci", "exact"], "method is 'exact'"),
        (["score", "ok.csv", "--by-class"], "needs the column 'target'"),
        (["train", "--data", "x", "--preset", "mnist"], "there is no preset 'mnist'"),
        (["train", "--data", "x", "--method", "sgd"], "there is no method 'sgd'"),
        (["train", "--data", "x", "--method", "zeroshot"], "trains nothing"),
        (["train", "--data", "digits", "--model", "ViT-Z"], "open_clip has no model 'ViT-Z'"),
        (["train", "--data", "x", "--split-file", "y.json"], "y.json is not a split file"),
        (["train", "--data", "digits", "--classes", "names.txt"], "2 class names for 10 classes"),
        (["train", "--data", "digits", "--classes", "y.txt"], "cannot read the class names in y.t"),
        (["train", "--data", "x", "--dtype", "int8"], "dtype 'int8' is not known"),
        (["eval", "nowhere"], "not the folder of a finished training run"),
        (["demo", "--device", "tpu"], "device 'tpu' is not here"),
        (["demo", "--seeds", "0"], "--seeds"),
    ],
)
@pytest.mark.usefixtures("without_type_checks")
def test_bad_input_is_one_line_and_code_2(run_cli: Run, argv: list[str], message: str) -> None:
    for name, text in {
        "bad.csv": "score,correct\n0.1,1\n",
        "text.csv": "score,correct,is_base\nhigh,1,1\n",
        "ragged.csv": "score,correct,is_base\n0.1,1\n",
        "domain.csv": "score,correct,domain\n0.1,1,far\n",
        "nan.csv": "score,correct,is_base\nnan,1,1\n0.1,1,0\n",
        "one.csv": "score,correct,is_base\n0.2,1,1\n0.1,1,1\n",
        "ok.csv": "score,correct,is_base\n0.2,1,1\n0.3,1,1\n0.1,1,0\n0.25,0,0\n",
        "a.xlsx": "x",
        "names.txt": "one\ntwo\n",
    }.items():
        Path(name).write_text(text)
    shown = run_cli(main, *argv)
    assert shown.code == 2
    assert message in shown.stderr
    assert len(shown.stderr.strip().splitlines()) <= 2
    assert "Traceback" not in shown.stderr

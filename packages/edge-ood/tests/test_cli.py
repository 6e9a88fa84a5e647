"""The command line: every command runs, says what it did, and refuses bad input in a line."""

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from edge_ood.cli import main
from edge_ood.scorers import list_scorers


def test_help_teaches(run_cli):
    shown = run_cli(main, "--help")
    assert shown.code == 0
    for name in ["demo", "train", "select-oe", "score", "eval", "calibrate", "list"]:
        assert name in shown.stdout
        assert run_cli(main, name, "--help").code == 0


@pytest.mark.smoke
def test_demo_writes_a_run(run_cli, monkeypatch):
    import edge_ood.demo as the_demo

    real = dataclasses.replace
    monkeypatch.setattr(
        dataclasses,
        "replace",
        lambda s, **c: real(s, **{**c, "train": 128, "test": 600, "ood": 40, "epochs": 1}),
    )
    shown = run_cli(main, "demo", "--quick", "--json", "--methods", "bce,edge")
    assert shown.code == 0, shown.stderr
    summary = json.loads(shown.stdout)
    folder = Path("runs/edge-ood/demo")
    written = json.loads((folder / "metrics.json").read_text())
    assert written.pop("timing")["seconds"] > 0
    assert written == summary
    assert [row["method"] for row in written["summary"]["rows"]] == ["BCE", "EDGE"]
    for name in ("comparison", "energies", "tail_curve", "roc", "training", "spectra", "images"):
        assert (folder / f"{name}.png").stat().st_size > 10_000
    assert json.loads((folder / "config.json").read_text())["command"] == "edge-ood demo"
    assert the_demo.METHODS


def tables(folder="."):
    rng = np.random.default_rng(0)
    y = (rng.random((100, 4)) < 0.4).astype(np.uint8)
    y[:, 0] |= ~y.any(1)
    z = (rng.normal(size=(100, 4)) + 3 * y - 2).astype(np.float32)
    for name, table in {"id": z, "y": y, "far": z - 4, "counts": y.sum(0)}.items():
        np.save(Path(folder) / f"{name}.npy", table)


@pytest.mark.smoke
def test_eval_from_logits_alone(run_cli):
    tables()
    shown = run_cli(
        main,
        *["eval", "--id-logits", "id.npy", "--labels", "y.npy", "--ood-logits", "far=far.npy"],
        *["--ood-logits", "other=far.npy", "--scorers", "all"],
        *["--train-counts", "counts.npy", "--fit", "id.npy", "--grid", "0,1,3", "--json"],
    )
    assert shown.code == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert set(found["scorers"]) >= {"joint_energy", "lof", "iforest", "msp"}
    assert [row["j"] for row in found["scorers"]["msp"]["tail_curve"]] == [0, 1, 3]
    assert found["scorers"]["joint_energy"]["ood"]["far"]["auroc"] > 0.8
    for name in ("roc", "energies", "tail_curve"):
        assert Path(f"runs/edge-ood/eval/{name}.png").is_file()
    shown = run_cli(main, "eval", "--id-logits", "id.npy", "--ood-logits", "far.npy")
    assert "AUROC %" in shown.stdout


@pytest.mark.filterwarnings("default:mixed and the outliers")
def test_train_score_calibrate_select(run_cli):
    pytest.importorskip("torchvision")
    from edge_ood.shapes import known_images, outlier_images, unknown_images

    # Balanced, so that the few training images hold every label of the test images.
    sets = {
        "train": known_images(0, 90, imbalance=1.0),
        "test": known_images(0, 40, "test", imbalance=1.0),
    }
    for split, scenes in sets.items():
        rows = []
        for i, (image, labels) in enumerate(zip(scenes.images, scenes.labels, strict=True)):
            PIL.Image.fromarray(image).save(f"{split}{i}.png")
            names = ";".join(scenes.class_names[c] for c in labels.nonzero()[0])
            rows.append([f"{split}{i}.png", names])
        with open(f"{split}.csv", "w", newline="") as file:
            csv.writer(file).writerows([["path", "labels"], *rows])
    for folder, images in {
        "objects": outlier_images(0, 60)["objects"],
        "textures": outlier_images(0, 60)["textures"],
        "new": unknown_images(0, 20)["colors"],
    }.items():
        Path(folder).mkdir()
        for i, image in enumerate(images):
            PIL.Image.fromarray(image).save(f"{folder}/{i}.png")
    shown = run_cli(
        main,
        *["train", "--id", "folder:train.csv", "--oe", "folder:objects", "--epochs", 2],
        *["--batch-size", 32, "--oe-batch-size", 16, "--tau", 1, "--out", "run", "--json"],
    )
    assert shown.code == 0, shown.stderr
    assert 0 < json.loads(shown.stdout)["validation_mAP"]["best"] <= 1
    assert Path("run/training.png").is_file()
    for source, out in (("folder:.", "known"), ("new", "unknown")):
        scored = ["score", "--checkpoint", "run/best", "--input", source, "--out", out]
        shown = run_cli(main, *scored)
        assert shown.code == 0, shown.stderr
    with open("unknown/scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["sample"] == "new/0.png"
    # The same transform for both sets and every time; the authors' random one only if asked for.
    scored = ["score", "--checkpoint", "run/best", "--input", "new", "--out", "again"]
    for options in ([], ["--official-transforms"]):
        shown = run_cli(main, *scored, *options)
        assert shown.code == 0, shown.stderr
        same = Path("again/scores.csv").read_text() == Path("unknown/scores.csv").read_text()
        assert same == (not options)
    # Outliers that the model was trained on say nothing about unknown images.
    Path("mixed").mkdir()
    for source, name in (("new/0.png", "0.png"), ("objects/3.png", "renamed.png")):
        Path("mixed", name).write_bytes(Path(source).read_bytes())
    scored = ["score", "--checkpoint", "run/best", "--input", "mixed", "--out", "mixed-out"]
    shown = run_cli(main, *scored)
    assert shown.code == 0, shown.stderr
    assert f"mixed and the outliers {Path('objects').resolve()}" in shown.stderr
    assert "share 1 samples by sha1" in shown.stderr
    assert np.load("known/labels.npy").shape == np.load("known/logits.npy").shape == (40, 20)
    shown = run_cli(
        main,
        *["eval", "--id-logits", "known/logits.npy", "--labels", "known/labels.npy"],
        *["--ood-logits", "new=unknown/logits.npy", "--train-counts", "known/train_counts.npy"],
        *["--grid", "0,1,3"],
    )
    assert shown.code == 0, shown.stderr
    assert "mAP" in shown.stdout
    # Every score under one harness: those fitted on ID images and ODIN beside those of logits.
    scored = ["score", "--checkpoint", "run/best", "--features"]
    shown = run_cli(main, *scored, "--input", "folder:train.csv", "--out", "fit")
    assert shown.code == 0, shown.stderr
    for source, out in (("folder:.", "known-all"), ("new", "new-all")):
        options = ["--scorers", "all", "--fit", "fit", "--out", out, "--json"]
        shown = run_cli(main, *scored, "--input", source, *options)
        assert shown.code == 0, shown.stderr
    assert json.loads(shown.stdout)["scorers"]["joint_energy"]["kept"] is not None
    shown = run_cli(
        main,
        *["eval", "--id-logits", "known-all", "--ood-logits", "new=new-all", "--json"],
        *["--grid", "0,1"],
    )
    assert shown.code == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert set(found["scorers"]) == set(list_scorers())
    assert found["order_by"] == "train"
    for entry in found["scorers"].values():
        assert 0 <= entry["mean"]["auroc"] <= 1
        assert [row["j"] for row in entry["tail_curve"]] == [0, 1]
    shown = run_cli(main, *scored, "--input", "new", "--scorers", "knn", "--out", "x")
    assert shown.code == 2
    assert "knn has to be fitted" in shown.stderr
    shown = run_cli(main, "score", "--checkpoint", "run/best", "--input", "known/logits.npy")
    assert shown.code == 0, shown.stderr
    for options in (["--recall", 0.8, "--out", "eighty"], ["--scorer", "max_logit", "--out", "ml"]):
        shown = run_cli(main, "calibrate", "--checkpoint", "run/best", "--json", *options)
        assert shown.code == 0, shown.stderr
    assert json.loads(shown.stdout)["scorer"] == "max_logit"
    before, after = (
        json.loads(Path(f"{p}/detector.json").read_text())["threshold"]
        for p in ("run/best", "eighty")
    )
    assert after > before
    shown = run_cli(
        main,
        *["select-oe", "--id", "folder:train.csv", "--candidate", "objects", "--candidate"],
        *["t=textures", "--checkpoint", "run/best", "--batch-size", 16, "--image-size", 32],
        "--json",
    )
    assert shown.code == 0, shown.stderr
    assert {r["name"] for r in json.loads(shown.stdout)["ranking"]} == {"objects", "t"}
    assert Path("runs/edge-ood/select-oe/spectra.png").is_file()
    # The same image in both sets is refused before training.
    shown = run_cli(main, "train", "--id", "folder:train.csv", "--oe", ".", "--out", "again")
    assert shown.code == 2
    assert "share 90 samples by path" in shown.stderr
    Path("copies").mkdir()
    Path("copies/1.png").write_bytes(Path("train7.png").read_bytes())
    shown = run_cli(main, "train", "--id", "folder:train.csv", "--oe", "copies", "--out", "again")
    assert shown.code == 2
    assert "share 1 samples by sha1" in shown.stderr
    shown = run_cli(main, "train", "--id", "folder:train.csv", "--oe", "new", "--out", "run")
    assert shown.code == 2
    assert "--resume" in shown.stderr


def test_list(run_cli):
    found = json.loads(run_cli(main, "list", "--json").stdout)
    assert "joint_energy" in found["scorers"]["logits"]
    assert found["presets"]["coco-r50"]["batch_size"] == 128
    assert "coco-r50" in run_cli(main, "list").stdout


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train"], "say what to train on"),
        (["train", "--id", "shapes"], "give --oe"),
        (["train", "--id", "imagenet", "--loss", "bce"], "there is no ID set"),
        (["train", "--id", "coco:none", "--loss", "bce"], "no file or folder"),
        (["train", "--preset", "mnist"], "no preset is called"),
        (["train", "--id", "shapes", "--loss", "bce", "--k", "0", "--oe", "x"], "k is"),
        (["demo", "--methods", "adam"], "accepted: bce, edge"),
        (["demo", "--device", "tpu"], "device 'tpu' is not here"),
        (["score", "--checkpoint", "none", "--input", "x.npy"], "not the folder of a detector"),
        (["score", "--checkpoint", "none", "--input", "x", "--scorers", "knn"], "to be fitted"),
        (
            ["score", "--checkpoint", "none", "--input", "x.npy", "--scorers", "odin"],
            "needs images",
        ),
        (["calibrate", "--checkpoint", "none"], "not the folder of a detector"),
        (["eval", "--id-logits", "no.npy", "--ood-logits", "a=no.npy"], "there is no file"),
        (
            ["eval", "--id-logits", "id.npy", "--ood-logits", "a=far.npy", "--rule", "x"],
            "accepted: nearest, at_least",
        ),
        (
            ["eval", "--id-logits", "id.npy", "--ood-logits", "a=far.npy", "--grid", "x"],
            "--grid x; accepted",
        ),
        (["select-oe", "--id", "shapes", "--candidate", "=x"], "give NAME=PATH"),
        (["select-oe", "--id", "shapes", "--candidate", "a=none"], "no images at"),
    ],
)
@pytest.mark.usefixtures("without_type_checks")
def test_bad_input_is_one_line_and_code_2(run_cli, argv, message):
    if argv[0] in ("train", "select-oe") and any("shapes" in a or "coco" in a for a in argv):
        pytest.importorskip("torchvision")
    tables()
    shown = run_cli(main, *argv)
    assert shown.code == 2
    assert message in shown.stderr
    assert len(shown.stderr.strip().splitlines()) <= 2
    assert "Traceback" not in shown.stderr

"""The command line: every command runs, says what it did, and refuses bad input in a line."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from internet_neg.cli import main
from internet_neg.demo import DemoSettings, order_holds, run_seed, tell
from internet_neg.mini_clip import build_mini_clip, save_mini_clip
from shared_core.run import load_state
from shared_core.testing import CliResult

Run = Callable[..., CliResult]


def test_help_teaches(run_cli: Run) -> None:
    shown = run_cli(main, "--help")
    assert shown.code == 0
    for name in ("demo", "negatives", "score", "eval", "vocab", "info"):
        assert name in shown.stdout
        assert run_cli(main, name, "--help").code == 0


@pytest.mark.smoke
@pytest.mark.filterwarnings("default:only")  # an untrained model admits few words
def test_demo_writes_a_run_and_score_uses_its_detector(
    run_cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    import internet_neg.demo as the_demo

    monkeypatch.setattr(
        the_demo,
        "DemoSettings",
        lambda **changes: DemoSettings(**{**changes, "steps": 6, "images": 256, "per_set": 32}),
    )
    shown = run_cli(main, "demo", "--quick", "--json", "--out", "run", "--seed", 3)
    assert shown.code == 0, shown.stderr
    summary = json.loads(shown.stdout)
    written = json.loads(Path("run/metrics.json").read_text())
    assert written.pop("timing")["seconds"] > 0
    assert written == summary
    methods = [row["method"] for row in written["summary"]["rows"]]
    assert methods == ["MCM", "NegLabel", "InterNeg, text only", "InterNeg"]
    assert json.loads(Path("run/config.json").read_text())["command"] == "internet-neg demo"
    for name in ("roc", "hist"):
        assert Path(f"run/{name}.png").stat().st_size > 10_000
    assert written["order_holds"] in (True, False)
    assert set(written["conventions"]) == {"FPR95 (ID+)", "FPR95 (OOD+)"}
    weights = Path("run/mini_clip.safetensors").stat().st_mtime_ns
    again = run_cli(main, "demo", "--quick", "--json", "--out", "run", "--seed", 3, "--no-plots")
    assert Path("run/mini_clip.safetensors").stat().st_mtime_ns == weights  # kept
    assert json.loads(again.stdout)["methods"] == summary["methods"]

    Path("pictures").mkdir()
    for i, color in enumerate(("red", "blue", "green")):
        PIL.Image.new("RGB", (40, 40), color).save(f"pictures/{i}.png")
    scored = run_cli(main, "score", "run/detector", "pictures", "--threshold", 0.5)
    assert scored.code == 0, scored.stderr
    lines = [json.loads(line) for line in scored.stdout.splitlines()]
    assert [Path(line["path"]).name for line in lines] == ["0.png", "1.png", "2.png"]
    for line in lines:
        assert line["is_id"] == (line["score"] >= 0.5)
    Path("pictures/1.png").write_bytes(b"broken")
    refused = run_cli(main, "score", "run/detector", "pictures")
    assert (refused.code, refused.stdout) == (2, "")
    assert "pictures/1.png cannot be decoded" in refused.stderr
    kept = run_cli(
        main,
        *["score", "run/detector", "pictures", "--skip-bad", "--json", "--no-update"],
        *["--out", "scored", "--seed", 7],
    )
    found = json.loads(kept.stdout)
    assert (len(found["images"]), found["seed"]) == (2, 7)
    assert "left out" in kept.stderr
    written = [json.loads(line) for line in Path("scored/scores.jsonl").read_text().splitlines()]
    assert written == found["images"]


@pytest.mark.filterwarnings("default:only")
def test_the_full_demo_fails_where_the_order_is_broken(
    run_cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    import internet_neg.demo as the_demo

    monkeypatch.setattr(
        the_demo,
        "DemoSettings",
        lambda **changes: DemoSettings(**{**changes, "steps": 2, "images": 256, "per_set": 16}),
    )
    monkeypatch.setattr(the_demo, "order_holds", lambda summary: False)
    options = ["demo", "--seeds", 1, "--no-plots", "--out", "run"]
    shown = run_cli(main, *options)
    assert shown.code == 1
    assert "before MCM, is broken." in shown.stdout
    assert "FPR95 (OOD+): known images rejected" in shown.stdout
    assert run_cli(main, *options, "--quick").code == 0  # too short to tell


@pytest.fixture
def folders(tmp_path: Path) -> None:
    save_mini_clip(tmp_path / "model", build_mini_clip(seed=1))
    generator = torch.Generator().manual_seed(0)
    for folder in ("shots/red star", "shots/blue bar", "ood"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(2):
            pixels = torch.randint(256, (32, 32, 3), generator=generator, dtype=torch.uint8)
            PIL.Image.fromarray(pixels.numpy()).save(tmp_path / folder / f"{i}.png")
    (tmp_path / "classes.txt").write_text("red star\nblue bar\n")
    (tmp_path / "twice.txt").write_text("red star\nblue bar\nred star\n")
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "label.txt").write_text("ood/0.png 2\n")
    (tmp_path / "words.txt").write_text("ring\nheart\ngear\nblue bar\npink\tadj\n")


@pytest.mark.usefixtures("folders")
@pytest.mark.filterwarnings("default:no images of the known")
def test_negatives_then_score(run_cli: Run) -> None:
    shown = run_cli(
        main,
        *["negatives", "--model", "model", "--classes", "classes.txt", "--vocab", "words.txt"],
        *["-M", 3, "--text-only", "--out", "detector", "--json"],
    )
    assert shown.code == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert found["removed_words"] == ["blue bar"]
    assert "left out 1 words that name known classes: blue bar" in shown.stderr
    assert "texts stand in as proxies" in shown.stderr
    table = Path("detector/negatives.tsv").read_text().splitlines()
    assert table[0] == "word\tpos\tdeviation"
    assert len(table) == 1 + found["negatives"]
    scored = run_cli(main, "score", "detector", "ood", "--json")
    assert scored.code == 0, scored.stderr
    assert len(json.loads(scored.stdout)["images"]) == 2
    np.save("proxies.npy", load_state("detector/detector.safetensors")["proxies"].numpy())
    for proxies in ("proxies.npy", "detector"):
        again = run_cli(
            main,
            *["negatives", "--model", "model", "--classes", "classes.txt", "--vocab", "words.txt"],
            *["-M", 3, "--text-only", "--out", "again", "--json", "--proxies", proxies],
        )
        assert again.code == 0, again.stderr
        assert json.loads(again.stdout)["top"] == found["top"]


@pytest.mark.usefixtures("folders")
def test_eval_on_folders(run_cli: Run) -> None:
    shown = run_cli(
        main,
        *["eval", "--model", "model", "--id", "shots", "--id-images", "shots", "--ood", "x=ood"],
        *["--vocab", "words.txt", "--methods", "mcm,neglabel", "-M", 2, "--out", "run"],
        *["--transform", "openood", "--percentile-mode", "index", "--rescore", "accepted"],
    )
    assert shown.code == 0, shown.stderr
    for name in ("FPR95 (ID+)", "FPR95 (OOD+)", "FPR95 (OOD+): known images rejected"):
        assert name in shown.stdout
    written = json.loads(Path("run/metrics.json").read_text())
    assert list(written["methods"]) == ["mcm", "neglabel"]
    told = json.loads(Path("run/config.json").read_text())["settings"]
    assert (told["interneg"]["transform"], told["interneg"]["rescore"]) == ("openood", "accepted")
    assert told["neglabel"]["percentile_mode"] == "index"
    assert Path("run/roc.png").is_file()


def test_vocab_and_info(run_cli: Run) -> None:
    assert json.loads(run_cli(main, "vocab", "--json").stdout)["nouns"] == 58_514
    Path("w.txt").write_text("ring\nred\tadj\n")
    built = run_cli(main, "vocab", "build", "--vocab", "w.txt", "--out", "copy")
    assert built.code == 0
    assert Path("copy/words.txt").read_text() == "ring\tnoun\nred\tadj\n"
    shown = run_cli(main, "info", "--json")
    assert len(json.loads(shown.stdout)["presets"]) == 3


FOLDERS = ["--id", "shots", "--id-images", "shots", "--ood", "x=ood", "--vocab", "words.txt"]


@pytest.mark.usefixtures("folders", "without_type_checks")
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["negatives", "--model", "model"], "name the known classes"),
        (["negatives", "--classes", "classes.txt"], "which model?"),
        (["negatives", "--classes", "absent.txt", "--model", "model"], "cannot read absent.txt"),
        (["negatives", "--id-images", "absent", "--model", "model"], "there is no folder absent"),
        (
            ["negatives", "--classes", "classes.txt", "--model", "model", "--exclude", "noun.zoo"],
            "noun.zoo",
        ),
        (["negatives", "--classes", "classes.txt", "--model", "ViT-B-16"], "which weights"),
        (["score", "absent", "ood"], "holds no detector"),
        (["score", "absent", "nowhere.png"], "there is no image or folder"),
        (["score", "absent", "model"], "there are no images"),
        (["eval"], "give --preset with --data-root"),
        (["eval", "--preset", "cifar"], "accepted: imagenet-four"),
        (["eval", "--preset", "imagenet-four"], "give --data-root"),
        (["negatives", "--classes", "twice.txt", "--model", "model"], "'red star' comes twice"),
        (["negatives", "--classes", "blank.txt", "--model", "model"], "at least one string"),
        (
            *[["negatives", "--classes", "classes.txt", "--model", "model", "--proxies", "x.npy"]],
            "cannot read proxies from x.npy",
        ),
        (["score", "absent", "ood", "--threshold", "1.5"], "scores lie in [0, 1]"),
        (["score", "model", "ood", "--out", "./model"], "is the detector's own folder"),
        (["eval", *FOLDERS, "--rank-by", "rank"], "accepted: margin, score"),
        (["eval", *FOLDERS, "--methods", "odin", "--model", "model"], "accepted: mcm"),
        (["eval", *FOLDERS, "--id", "label.txt", "--model", "model"], "has label 2; accepted: 0"),
        (["eval", *FOLDERS, "--rescore", "never"], "accepted: batch, accepted"),
        (["eval", *FOLDERS, "--percentile-mode", "mean"], "accepted: linear, index"),
        (["eval", *FOLDERS, "--transform", "resize"], "accepted: clip, openood"),
        (["vocab", "count"], "accepted: stats, build"),
        (["demo", "--seed", "100", "--steps", "1", "--quick"], "chosen on seed 100"),
        (["demo", "--device", "tpu"], "device 'tpu' is not here"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    run_cli: Run, argv: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("internet_neg.demo.get_encoder", lambda *_: build_mini_clip())
    shown = run_cli(main, *argv)
    assert shown.code == 2, shown.stderr
    assert message in shown.stderr
    lines = [line for line in shown.stderr.strip().splitlines() if "mini-CLIP:" not in line]
    assert len(lines) <= 2
    assert "Traceback" not in shown.stderr


def test_the_demo_tells_its_losses() -> None:
    def entry(auroc: float, fpr: float) -> dict[str, dict[str, dict[str, float]]]:
        keys = {"auroc": auroc, "fpr95": fpr, "fpr95_ood_positive": fpr}
        keys |= {"gated_id": 0.5, "gated_ood": 0.9, "bank": 10}
        values = {key: {"mean": value} for key, value in keys.items()}
        return dict.fromkeys(("near", "far", "average"), values)

    summary = {"MCM": entry(0.7, 0.5), "NegLabel": entry(0.95, 0.1), "InterNeg": entry(0.9, 0.2)}
    told = tell(summary, 3)
    assert "InterNeg 90.0 AUROC, 20.0 % FPR95" in told
    assert "behind NegLabel in AUROC on near by 5.0" in told
    assert "NegLabel in FPR95 (ID+) on far by 10.0" in told
    assert not order_holds(summary)
    assert "MCM in" not in told
    summary["InterNeg"] = entry(0.99, 0.01)
    assert "not behind on any set" in tell(summary, 1)
    assert order_holds(summary)
    summary["MCM"] = entry(0.96, 0.5)
    assert not order_holds(summary)


@pytest.mark.usefixtures("without_type_checks")
def test_the_demo_does_not_report_on_what_it_was_tuned_on() -> None:
    with pytest.raises(ValueError, match="chosen on seed 101"):
        run_seed(build_mini_clip(), 101, DemoSettings())

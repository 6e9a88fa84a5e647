"""The command line: every command runs, says what it did, and refuses bad input in a line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from focal_sam.cli import main
from shared_core.testing import CliResult

Run = Callable[..., CliResult]


def test_help_teaches(run_cli: Run) -> None:
    shown = run_cli(main, "--help")
    assert shown.code == 0
    for name in ["demo", "train", "eval", "sharpness", "landscape", "weights", "presets", "bench"]:
        assert name in shown.stdout
        assert run_cli(main, name, "--help").code == 0


@pytest.mark.smoke
def test_demo_writes_a_run(run_cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    import focal_sam.demo as the_demo

    short = dataclasses.make_dataclass(
        "Short", [], bases=(the_demo.DemoSettings,), frozen=True, namespace={"epochs": 1}
    )
    monkeypatch.setattr(the_demo, "DemoSettings", lambda **changes: short(epochs=1, **changes))
    shown = run_cli(main, "demo", "--quick", "--json", "--methods", "sgd,focal")
    assert shown.code == 0, shown.stderr
    summary = json.loads(shown.stdout)
    folder = Path("runs/focal-sam/demo")
    written = json.loads((folder / "metrics.json").read_text())
    assert written.pop("timing")["seconds"] > 0
    assert written == summary
    assert [row["method"] for row in written["summary"]["rows"]] == ["SGD", "Focal-SAM"]
    for name in ("comparison", "class_weights", "landscape", "sharpness"):
        assert (folder / f"{name}.png").stat().st_size > 10_000
    assert json.loads((folder / "config.json").read_text())["command"] == "focal-sam demo"


@pytest.fixture
def trained(run_cli: Run) -> str:
    shown = run_cli(
        main,
        *[
            "train",
            "--data",
            "digits",
            "--model",
            "small_cnn",
            "--imbalance-ratio",
            "20",
            "--epochs",
            "1",
        ],
        *["--batch-size", "128", "--few-below", "30", "--many-above", "80", "--out", "run"],
    )
    assert shown.code == 0, shown.stderr
    assert "harmonic_mean" in shown.stdout
    return "run"


def test_train_eval_sharpness_landscape(run_cli: Run, trained: str) -> None:
    tested = run_cli(main, "eval", trained, "--json")
    assert json.loads(tested.stdout)["test"]["overall"] > 10
    first = json.loads(Path(trained, "metrics.json").read_text())["test"]
    assert json.loads(tested.stdout)["test"] == pytest.approx(first)
    shown = run_cli(main, "sharpness", trained, "--images", 100, "--groups", "many,few", "--json")
    assert shown.code == 0, shown.stderr
    assert sorted(json.loads(shown.stdout)["sharpness"]["sharpness"]) == ["few", "many"]
    assert Path("runs/focal-sam/sharpness/run/sharpness.png").is_file()
    shown = run_cli(main, "landscape", trained, "--images", 50, "--steps", 3)
    assert shown.code == 0, shown.stderr
    assert Path(shown.stdout.strip()).is_file()
    for argv, message in (
        (["sharpness", trained, "--groups", "most"], "accepted: many, medium, few"),
        (["train", "--data", "digits", "--out", trained], "--resume"),
        (["train", "--data", "digits", "--out", trained, "--resume", "--lr", "1"], "--resume"),
    ):
        refused = run_cli(main, *argv)
        assert (refused.code, refused.stdout) == (2, "")
        assert message in refused.stderr


def test_weights_and_presets(run_cli: Run) -> None:
    Path("counts.json").write_text("[5000, 500, 50]")
    for source in ("counts.json", "5000,500,50"):
        shown = run_cli(main, "weights", "--counts", source, "--out", "w", "--json")
        assert shown.code == 0, shown.stderr
        assert json.loads(shown.stdout)["suggested_gamma"]["0.5"] == pytest.approx(0.3, abs=0.01)
    assert Path("w/class_weights.png").is_file()
    assert json.loads(run_cli(main, "presets", "--json").stdout)["cifar10lt-clip"]["rho"] == 0.05
    assert "resnet32" in run_cli(main, "presets").stdout


@pytest.mark.filterwarnings("default:the class weights differ")
def test_flat_weights_are_noted(run_cli: Run) -> None:
    shown = run_cli(main, "weights", "--counts", ",".join(["100"] * 50 + ["99"]))
    assert shown.code == 0
    assert "note: the class weights differ" in shown.stderr


def test_bench(run_cli: Run) -> None:
    shown = run_cli(
        main,
        *[
            "bench",
            "--model",
            "small_cnn",
            "--batch-size",
            "2",
            "--repeats",
            "1",
            "--methods",
            "sam,focal",
        ],
        *["--json", "--out", "bench"],
    )
    found = json.loads(shown.stdout)
    assert list(found) == ["sgd", "sam", "focal"]
    assert found["sgd"]["ratio_to_sgd"] == 1
    assert Path("bench/metrics.json").is_file()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train"], "say what to train on"),
        (["train", "--preset", "mnist"], "no preset is called 'mnist'"),
        (["train", "--preset", "inat2018-clip"], "images of your own"),
        (["train", "--data", "digits", "--method", "adam"], "method is 'adam'"),
        (["train", "--data", "digits", "--device", "tpu"], "device 'tpu' is not here"),
        (["demo", "--methods", "adam"], "accepted: sgd, sam, imbsam, focal"),
        (["demo", "--seeds", "0"], "--seeds"),
        (["eval", "nowhere"], "not the folder of a finished training run"),
        (["weights", "--counts", "a,b"], "neither a file of class counts"),
        (["weights", "--counts", "5,0"], "class_counts[1] is 0"),
        (["weights", "--counts", "5,2", "--prior", "flat"], "prior is 'flat'"),
        (["bench", "--model", "vgg"], "bench has no model 'vgg'"),
        (["bench", "--methods", "adam"], "no method is called 'adam'"),
    ],
)
@pytest.mark.usefixtures("without_type_checks")
def test_bad_input_is_one_line_and_code_2(run_cli: Run, argv: list[str], message: str) -> None:
    shown = run_cli(main, *argv)
    assert shown.code == 2
    assert message in shown.stderr
    assert len(shown.stderr.strip().splitlines()) <= 2
    assert "Traceback" not in shown.stderr

"""Every command runs, says what it did, and refuses bad input in a line."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from diffeat import demo
from diffeat.cli import main
from shared_core import workers
from shared_core.testing import CliResult

Run = Callable[..., CliResult]


@pytest.mark.smoke
def test_layers_and_presets(run_cli: Run) -> None:
    shown = run_cli(main, "layers", "--topology", "sdxl", "--maps", "--json")
    assert len(json.loads(shown.stdout)["activations"]) == 612
    assert "165 activations" in run_cli(main, "layers", "--topology", "sd15").stdout
    listed = json.loads(run_cli(main, "presets", "--json").stdout)
    assert listed["presets"]["sdxl-practical"]["channels"] == 3840
    assert "xl-t = " in run_cli(main, "presets").stdout
    for argv, message in (
        (["layers"], "--topology"),
        (["layers", "--topology", "sd9"], "sd15"),
        (["layers", "--topology", "sd15", "--pattern", "up-levl*"], "nearest"),
        (["layers", "--model", "nobody/nothing"], "configuration"),
    ):
        refused = run_cli(main, *argv)
        assert (refused.code, refused.stdout) == (2, "")
        assert message in refused.stderr


@pytest.mark.smoke
def test_demo_and_what_follows(run_cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    tiny = dataclasses.make_dataclass(
        "Tiny",
        [],
        bases=(demo.DemoSettings,),
        frozen=True,
        namespace={"measured": 6, "__annotations__": {}},
    )
    with monkeypatch.context() as patch:
        patch.setattr(workers, "cores", lambda: 1)
        patch.setattr(demo, "DemoSettings", tiny)
        patch.setattr(
            dataclasses,
            "replace",
            lambda s, **c: type(s)(
                **{**c, "seeds": 2, "steps": 2, "images": 20, "train": 6, "test": 4}
            ),
        )
        shown = run_cli(main, "demo", "--quick", "--json", "--out", "demo")
    assert shown.code == 0, shown.stderr
    written = json.loads(Path("demo/metrics.json").read_text())
    assert written["summary"] == json.loads(shown.stdout)["summary"]
    assert len(written["summary"]["rows"]) == 10
    for name in ("depth", "ranking", "pca"):
        assert Path(f"demo/{name}.png").stat().st_size > 5_000
    images, labels, _ = demo.shapes_data(5, "test")
    for folder in ("images", "labels"):
        Path(folder).mkdir()
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(f"images/{i}.png")
        Image.fromarray(label.numpy().astype("uint8")).save(f"labels/{i}.png")
    model = ["--model", "demo/backbone"]
    given = ["--input", "images", *model]
    layer = ["--layers", "up-level1-repeat0-vit-out"]
    shown = run_cli(main, "extract", *given, *layer, "--out", "x", "--json")
    assert shown.code == 0, shown.stderr
    assert len(list(Path("x/samples").iterdir())) == 5
    assert run_cli(main, "extract", *given, *layer, "--out", "x", "--resume").code == 0
    shown = run_cli(main, "visualize", *given, *layer)
    assert Path(shown.stdout.strip()).is_file(), shown.stderr
    shown = run_cli(main, "measure", *given, "--json")
    assert shown.code == 0, shown.stderr
    measured = json.loads(shown.stdout)["activations"]
    assert len(measured) > 60
    assert {"noise", "hf", "locality"} < set(measured[0])
    ranked = ["rank", *model, "--images", "images", "--labels", "labels", "--classes", 4]
    shown = run_cli(main, *ranked, "--candidates", "mid-*", "--json")
    assert shown.code == 0, shown.stderr
    assert len(json.loads(shown.stdout)["ranking"]) == 11
    probed = ["probe", *ranked[1:], *layer, "--probe", "ridge"]
    shown = run_cli(main, *probed, "--json")
    assert shown.code == 0, shown.stderr
    assert 0 <= json.loads(shown.stdout)["miou"] <= 1
    for argv, message in (
        ([*probed[:-1], "svm"], "mlp, ridge"),
        (["correspond", *model, *layer, "--pairs", "images"], "PairAnnotation"),
        (["extract", *given, *layer, "--out", "x"], "other runs"),
        (["extract", *given, "--layers", "up-levle", "--out", "y"], "nearest"),
        (["extract", "--input", "x", *model, *layer], "no images"),
        ([*ranked[:-1], "1"], "--classes"),
        (["rank", *model, "--images", "images", "--labels", "x", "--classes", 4], "no label map"),
    ):
        refused = run_cli(main, *argv)
        assert (refused.code, refused.stdout) == (2, ""), refused.stderr
        assert message in refused.stderr

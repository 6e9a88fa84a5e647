"""Every command runs, says what it did, and refuses bad input in a line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from content_shift import demo
from content_shift.cli import main
from diffeat.demo import shapes_data
from shared_core.testing import CliResult

Run = Callable[..., CliResult]
LAYER = ["--layers", "up-level1-repeat1-vit-out"]


@pytest.mark.smoke
def test_demo_and_what_follows(run_cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    tiny = demo.DemoSettings(
        backbone_steps=1, images=8, control_steps=1, batch_size=4, train=4, test=3,
        timesteps=(100,), seeds=1,
    )  # fmt: skip
    monkeypatch.setattr(demo.DemoSettings, "quick", lambda self: tiny)
    shown = run_cli(main, "demo", "--quick", "--json", "--out", "demo")
    assert shown.code == 0, shown.stderr
    written = json.loads(Path("demo/metrics.json").read_text())
    assert written["summary"] == json.loads(shown.stdout)["summary"]
    assert len(written["summary"]["rows"]) == 8
    assert len(written["rows"]) == 8
    nothing = [r for r in written["rows"] if r["technique"] == "control x 0"]
    assert all(r[k] == 0 for r in nothing for k in ("gain", "miou_gain", "score"))
    guided = [r for r in written["rows"] if r["technique"] == "guidance 3"]
    said = [r for r in written["rows"] if r["technique"] == "class-free prompt"]
    assert [g["miou"] for g in guided] == [s["miou"] for s in said]  # features of one forward
    for name in ("scatter", "img2img", "shift"):
        assert Path(f"demo/{name}.png").stat().st_size > 5_000
    images, labels, _ = shapes_data(5, "test")
    for folder in ("images", "labels"):
        Path(folder).mkdir()
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(f"images/{i}.png")
        Image.fromarray(label.numpy().astype("uint8")).save(f"labels/{i}.png")
    given = ["--input", "images", "--model", "demo/backbone"]
    control = ["--control", "demo/controlnet", "--preprocess", "sobel"]
    shown = run_cli(
        main,
        "gate",
        *given,
        *LAYER,
        *control,
        "--cfg",
        3,
        "--with-prompt",
        "a picture of",
        "--json",
    )
    assert shown.code == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert set(found["ranking"]) == {"prompt", "control", "guidance"}
    assert Path("runs/content-shift/gate/gate.png").is_file()
    shown = run_cli(main, "img2img", *given, *control, "--steps", 3, "--json")
    assert shown.code == 0, shown.stderr
    assert [r["technique"] for r in json.loads(shown.stdout)["rows"]] == ["none", "control"]
    Path("r.yaml").write_text(
        "- name: plain\n"
        "- {name: control, techniques: [{technique: ControlNet, model: demo/controlnet, "
        "preprocess: sobel}]}\n"
    )
    extracted = ["extract", *given, *LAYER, "--recipe", "r.yaml", "--out", "bucket"]
    shown = run_cli(main, *extracted, "--json")
    assert shown.code == 0, shown.stderr
    assert json.loads(shown.stdout)["features"] == ["plain", "control"]
    assert run_cli(main, *extracted, "--resume").code == 0
    shown = run_cli(
        main, "amalgamate", "--bucket", "bucket", "--task", "segmentation", "--labels", "labels",
        "--classes", 4, "--networks", 1, "--epochs", 1, "--json",
    )  # fmt: skip
    assert shown.code == 0, shown.stderr
    assert 0 <= json.loads(shown.stdout)["miou"] <= 1
    trained = ["train-control", *given, "--preprocess", "sobel", "--embedding-channels", "8,16"]
    shown = run_cli(main, *trained, "--steps", 1, "--json")
    assert shown.code == 0, shown.stderr
    assert (Path(json.loads(shown.stdout)["out"]) / "config.json").is_file()
    for argv, message in (
        (["gate", *given, *LAYER], "--with-prompt, --control"),
        (["gate", *given, "--layers", "up-levle", *control], "nearest"),
        (["gate", *given, *LAYER, "--control", "nobody/nothing"], "cannot be loaded"),
        (["gate", *given, *LAYER, *control, "--ref", "best"], "plain, same"),
        (["img2img", *given, *control, "--strength", "2"], "strength"),
        (["extract", *given, "--recipe", "cub"], "spair, horse21"),
        (["extract", *given, "--recipe", "spair"], "train-lora"),
        (["extract", *given, "--recipe", "spair", "--lora", "good"], "KEY=PATH"),
        ([*extracted, "--t", "3"], "--t"),
        (["extract", "--input", "bucket", *given[2:], "--recipe", "r.yaml"], "no images"),
        (["amalgamate", "--bucket", "images", "--task", "segmentation"], "feature bucket"),
        (["amalgamate", "--bucket", "bucket", "--task", "depth"], "correspondence, segm"),
        (["amalgamate", "--bucket", "bucket", "--task", "correspondence"], "--pairs"),
        (["amalgamate", "--bucket", "bucket", "--task", "segmentation"], "--labels"),
        ([*trained, "--embedding-channels", "8;16"], "by commas"),
        ([*trained, "--steps", "1"], "--resume"),
        (["train-lora", *given, "--captions", "none.json"], "cannot be read"),
        (["demo", "--backbone", "images"], "no demo backbone"),
    ):
        refused = run_cli(main, *argv)
        assert (refused.code, refused.stdout) == (2, ""), (argv, refused.stderr)
        assert message in refused.stderr, argv


def test_spearman_shares_ranks() -> None:
    assert demo.spearman([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == -1
    stats = pytest.importorskip("scipy.stats", reason="the comparison needs scipy")
    a, b = [1.0, 1.0, 2.0, 5.0, 3.0, 3.0], [2.0, 1.0, 4.0, 4.0, 0.0, 6.0]
    assert demo.spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert demo.spearman([1.0, 1.0], [0.0, 2.0]) == 0


def test_train_lora_and_captions(run_cli: Run, pipeline: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="LoRA weights need peft")
    Path("images").mkdir()
    for i in range(2):
        Image.new("RGB", (40, 32), (80 * i, 50, 9)).save(f"images/{i}.png")
    Path("c.json").write_text(json.dumps({"0.png": ["", "a c"], "1.png": "a"}))
    argv = [
        "train-lora", "--input", "images", "--model", str(pipeline), "--captions", "c.json",
        "--steps", 1, "--rank", 2, "--out", "lora", "--json",
    ]  # fmt: skip
    shown = run_cli(main, *argv)
    assert shown.code == 0, shown.stderr
    assert Path("lora/pytorch_lora_weights.safetensors").is_file()
    gate = ["gate", "--input", "images", "--model", str(pipeline), "--layers", "sd15-legacy"]
    shown = run_cli(main, *gate, "--lora", "lora", "--prompt", "a c", "--draws", 1, "--json")
    assert shown.code == 0, shown.stderr
    refused = run_cli(main, *argv)
    assert (refused.code, refused.stdout) == (2, "")
    assert "--resume" in refused.stderr


def test_caption_by_a_model_from_a_folder(run_cli: Run, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="captions need transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "an", "image", "of", "x"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    text: dict[str, Any] = {
        "vocab_size": len(words), "hidden_size": 8, "encoder_hidden_size": 8,
        "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "max_position_embeddings": 128, "bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3,
        "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 32, "patch_size": 16,
    }  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BlipForConditionalGeneration(
        transformers.BlipConfig(text_config=text, vision_config=vision)
    )
    model.save_pretrained(tmp_path / "blip")
    processor = transformers.BlipProcessor(
        transformers.BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer
    )
    processor.save_pretrained(tmp_path / "blip")
    Path("images").mkdir()
    for i in range(2):
        Image.new("RGB", (40, 32), (80 * i, 50, 9)).save(f"images/{i}.png")
    shown = run_cli(main, "caption", "--input", "images", "--model", "blip", "--json")
    assert shown.code == 0, shown.stderr
    written = json.loads(Path("runs/content-shift/caption/captions.json").read_text())
    assert written == json.loads(shown.stdout)["captions"]
    assert list(written) == ["0.png", "1.png"]
    assert all("an image of" in text for text in written.values())
    refused = run_cli(main, "caption", "--input", "images", "--model", "nobody/nothing")
    assert refused.code == 2
    assert "cannot be loaded" in refused.stderr

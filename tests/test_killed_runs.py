"""A run that is killed goes on with --resume, and ends in what an undisturbed run ends in.

SIGKILL gives a process no chance to tidy up. abkd, bridge-garden and gmsa have the same test among
their own, with the models that they distil and compress; internet-neg has no run to resume.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file


def module_of(package: str) -> str:
    return f"{package.replace('-', '_')}.cli"


def run_is_resumed(
    run_cli: Any, argv: list[Any], same: list[str], killed_when: Callable[[Path], bool]
) -> None:
    """Run a command undisturbed, and again with a kill in the middle; compare what is left.

    `same` has the files to compare, or patterns of them.
    """
    package, *words = [str(word) for word in argv]
    main = importlib.import_module(module_of(package)).main
    whole = run_cli(main, *words, "--device", "cpu", "--out", "whole")
    assert whole.code == 0, whole.stderr
    killed = Path("killed")
    with Path("said.txt").open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", module_of(package), *words, "--device", "cpu", "--out", killed],
            env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
            stdout=said,
            stderr=said,
        )
        deadline = time.monotonic() + 240
        while process.poll() is None and not killed_when(killed):
            assert time.monotonic() < deadline, Path("said.txt").read_text()
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL, Path("said.txt").read_text()
    names = [
        str(file.relative_to("whole"))
        for pattern in same
        for file in sorted(Path("whole").glob(pattern))
    ]
    assert len(names) >= len(same)
    assert not all((killed / name).is_file() for name in names), (
        "the run had ended before it was killed"
    )
    resumed = run_cli(main, *words, "--device", "cpu", "--out", killed, "--resume")
    assert resumed.code == 0, resumed.stderr
    for name in names:
        one, two = Path("whole", name), killed / name
        if name.endswith(".safetensors"):
            first, second = load_file(one), load_file(two)
            assert first.keys() == second.keys()
            assert all(torch.equal(first[key], second[key]) for key in first), name
        else:
            assert without_clock(one) == without_clock(two), name


def without_clock(file: Path) -> Any:
    """The lines or the object of a file of numbers, but for seconds and its own folder."""
    text = file.read_text(encoding="utf-8")
    found = [json.loads(line) for line in text.splitlines()] if "jsonl" in file.name else None
    if found is None:
        found = [json.loads(text)]
    return [
        {k: v for k, v in entry.items() if k != "timing" and "seconds" not in k and k != "out"}
        for entry in found
    ]


def lines_in(folder: Path, name: str = "log.jsonl") -> int:
    file = folder / name
    return len(file.read_text(encoding="utf-8").splitlines()) if file.is_file() else 0


def draw_images(folder: Path, count: int, size: int = 40) -> None:
    folder.mkdir()
    generator = np.random.default_rng(list(folder.name.encode()))  # no two folders share an image
    for i in range(count):
        pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


def test_focal_sam_trains_on(run_cli: Any) -> None:
    argv = ["focal-sam", "train", "--data", "digits", "--model", "small_cnn", "--epochs", 4]
    argv += ["--batch-size", 128, "--imbalance-ratio", 100, "--few-below", 30, "--many-above", 80]
    same = ["model.safetensors", "log.jsonl", "metrics.json"]
    run_is_resumed(run_cli, argv, same, lambda run: lines_in(run) >= 2)


def test_edge_ood_trains_on(run_cli: Any) -> None:
    draw_images(Path("images"), 60)
    draw_images(Path("outliers"), 30)
    rows = [
        f"images/{i}.png,{'cat' if i % 2 else 'dog'};{'a' if i % 3 else 'b'}" for i in range(60)
    ]
    Path("train.csv").write_text("\n".join(["path,labels", *rows]))
    argv = ["edge-ood", "train", "--id", "folder:train.csv", "--oe", "outliers", "--epochs", 8]
    argv += ["--batch-size", 16, "--oe-batch-size", 8, "--tau", 1]
    same = ["log.jsonl", "metrics.json"]
    run_is_resumed(run_cli, argv, same, lambda run: lines_in(run) >= 2)


def test_lede_trains_exits_on(run_cli: Any) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from lede.testing import tiny_model

    words = [f"w{i}" for i in range(60)]
    tokenizer = Tokenizer(
        models.WordLevel(
            {w: i for i, w in enumerate(["<pad>", "<unk>", *words])}, unk_token="<unk>"
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained("model")
    tiny_model("llama", layers=5).save_pretrained("model")
    Path("text.txt").write_text(" ".join(words * 12))
    argv = ["lede", "train-exit", "--model", "model", "--data", "text.txt", "--length", 12]
    argv += ["--batch-size", 4, "--steps", 40, "--save-steps", 5, "--lr", 0.01]
    mark = "checkpoints/checkpoint-10/complete.json"
    run_is_resumed(run_cli, argv, ["metrics.json"], lambda run: (run / mark).is_file())


@pytest.mark.filterwarnings("ignore:the value is 0, so placements give no interval")
def test_openworld_auc_tunes_on(run_cli: Any) -> None:
    from open_clip.model import CLIP

    split: dict[str, list[Any]] = {"train": [], "val": [], "test": []}
    draw_images(Path("images"), 28)
    for i in range(28):
        label = i % 4
        name = ["cat", "dog", "red_fox", "owl"][label]
        split["train" if i < 12 else "test"].append([f"{i}.png", label, name])
    Path("split.json").write_text(json.dumps(split))
    config: dict[str, Any] = {
        "embed_dim": 16,
        "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32},
        "text_cfg": {
            "context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1,
        },
    }  # fmt: skip
    Path("clip").mkdir()
    Path("clip/open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {}})
    )
    torch.manual_seed(0)
    save_file(CLIP(**config).state_dict(), "clip/open_clip_model.safetensors")
    argv = ["openworld-auc", "train", "--data", "images", "--split-file", "split.json"]
    argv += ["--backbone", f"local-dir:{Path('clip').resolve()}", "--shots", 2, "--k", 2]
    same = ["contexts.safetensors", "log.jsonl", "metrics.json"]
    run_is_resumed(run_cli, [*argv, "--epochs", 12], same, lambda run: lines_in(run) >= 2)


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    """A diffusion U-Net as the demo of diffeat saves it, after one step of training."""
    from diffeat.demo import DemoSettings, save_backbone, train_backbone

    save_backbone(train_backbone(DemoSettings(images=16, steps=1)), tmp_path / "backbone")
    return tmp_path / "backbone"


@pytest.mark.parametrize("package", ["diffeat", "content-shift"])
def test_features_are_extracted_on(package: str, backbone: Path, run_cli: Any) -> None:
    draw_images(Path("images"), 40, size=32)
    argv: list[Any] = [package, "extract", "--input", "images", "--model", backbone]
    argv += ["--layers", "up-level1-repeat0-vit-out", "--batch-size", 1]
    if package == "content-shift":
        Path("recipe.yaml").write_text("- name: plain\n")
        argv += ["--recipe", "recipe.yaml"]
    run_is_resumed(
        run_cli, argv, ["samples/*"], lambda run: len(list(run.glob("samples/*.safetensors"))) >= 3
    )

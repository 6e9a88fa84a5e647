"""The protocols, and extraction that is killed halfway."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffeat import extract_to_disk
from diffeat.cli import main
from diffeat.demo import build_extractor, save_backbone, shapes_data
from diffeat.evaluate import correspond, ignore_rare, read_pairs, segment
from diffeat.probe import LinearProbe, iou_of
from shared_core.errors import InputError
from shared_core.testing import CliResult


def spair(folder: Path, shift: int = 0) -> Path:
    """Pairs of an image with itself, laid out as SPair-71k; target keypoints off by `shift`."""
    image = shapes_data(1, "test")[0][0].permute(1, 2, 0).numpy()
    for category, side in (("cat", (64, 96)), ("dog", (80, 48))):
        images, pairs = folder / "JPEGImages" / category, folder / "PairAnnotation/test"
        for place in (images, pairs):
            place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).resize(side, Image.Resampling.BICUBIC).save(images / "a.png")
        points = [[10.0, 12.0], [30.0, 20.0], [40.0, 40.0]]
        content = {
            "category": category, "src_imname": "a.png", "trg_imname": "a.png",
            "src_kps": points, "trg_kps": [[x + shift, y] for x, y in points],
            "trg_bndbox": [5, 5, 45, 45],
        }  # fmt: skip
        (pairs / f"1-{category}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.smoke
def test_correspondence_of_an_image_with_itself(tmp_path: Path) -> None:
    fx = build_extractor()
    fx.layers = ["up-level2-repeat0-res-out"]
    found = correspond(fx, read_pairs(spair(tmp_path / "same")), alpha=0.1)
    assert (found["pck_image"], found["pck_box"], found["keypoints"]) == (1, 1, 6)
    assert [row["category"] for row in found["categories"]] == ["cat", "dog"]
    # Truth moved by 6 pixels: within .1 x 96 and .1 x 80 of the image, not within .1 x 40.
    moved = correspond(fx, read_pairs(spair(tmp_path / "moved", 6)), alpha=0.1)
    assert (moved["pck_image"], moved["pck_box"]) == (1, 0)


def test_the_command_and_bad_pairs(tmp_path: Path, run_cli: Callable[..., CliResult]) -> None:
    folder = spair(tmp_path / "pairs")
    save_backbone(build_extractor(), tmp_path / "model")
    given = ["correspond", "--model", "model", "--layers", "up-level1-repeat0-res-out"]
    shown = run_cli(main, *given, "--pairs", "pairs", "--limit", 1)
    assert shown.code == 0, shown.stderr
    assert "100.0" in shown.stdout
    assert json.loads(Path("runs/diffeat/correspond/metrics.json").read_text())["pairs"] == 1
    file = folder / "PairAnnotation/test/1-cat.json"
    content = json.loads(file.read_text())
    for wrong, message in (
        ({**content, "trg_kps": [[1, 2]]}, "3 source and 1 target"),
        ({"category": "cat"}, "no pair of SPair"),
        ({**content, "src_kps": [[1, 2, 3]]}, "no pair of SPair"),
    ):
        file.write_text(json.dumps(wrong))
        with pytest.raises(InputError, match=message):
            read_pairs(folder)
    file.write_text(json.dumps({**content, "src_imname": "none.png"}))
    with pytest.raises(InputError, match="cannot be read"):
        correspond(build_extractor(), read_pairs(folder))


@pytest.mark.usefixtures("without_type_checks")
def test_segmentation_with_both_probes() -> None:
    """Labels that can be read off the input: where it is bright."""
    fx = build_extractor()
    fx.layers = ["unet-in"]
    images = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    images[:, :, :, 16:] = 255
    images[4:] = images[4:].flip(3)
    labels = (images[:, 0] > 128).long()
    train, test = (images[::2], labels[::2]), (images[1::2], labels[1::2])
    for options in ({"probe": "ridge"}, {"networks": 2, "epochs": 6}):
        found = segment(fx, train, test, classes=3, t=0, **options)  # type: ignore[arg-type]
        assert found["miou"] > 0.9, options
        assert found["iou"][2] is None
        assert ("uncertainty" in found) == ("networks" in options)
    probe = LinearProbe(3)
    a, b = (
        fx(x, "", 0, ids=[f"{n}{i}" for i in range(4)]).concat(32)
        for n, x in (("train", train[0]), ("test", test[0]))
    )
    probe.update(a, train[1])
    expected = float(iou_of(probe.confusion(b, test[1]).sum(0)))
    ridge = segment(fx, train, test, classes=3, t=0, probe="ridge", batch_size=3)
    assert ridge["miou"] == pytest.approx(expected, abs=1e-6)
    with pytest.raises(InputError, match="mlp, ridge"):
        segment(fx, train, test, classes=3, probe="svm")  # type: ignore[arg-type]
    few = torch.zeros(1, 8, 8, dtype=torch.long)
    few[0, 0, :3] = 1
    few[0, 1:4] = 2
    kept = ignore_rare(few)
    assert (kept == 255).sum() == 3
    assert torch.equal(kept[0, 1:], few[0, 1:])


KILLED = """
import sys, time, torch
from pathlib import Path
from diffeat import extract_to_disk, features
from diffeat.demo import build_extractor, shapes_data
torch.set_num_threads(1)
save = features.Features.save
features.Features.save = lambda self, path: (time.sleep(0.3), save(self, path))
samples = [(f"{i}.png", image) for i, image in enumerate(shapes_data(7, "test")[0])]
extract_to_disk(build_extractor(), samples, sys.argv[1], batch_size=3, prompt="")
"""


@pytest.mark.skipif(os.name == "nt", reason="kill -9 is a POSIX matter")
def test_killed_and_resumed_gives_the_same_bytes(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "killed")])
    try:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("killed/samples/*.safetensors"))) < 2:
            assert time.monotonic() < deadline
            assert process.poll() is None, "ended before it was killed"
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(list(tmp_path.glob("killed/samples/*.safetensors"))) < 7
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    samples = [(f"{i}.png", image) for i, image in enumerate(shapes_data(7, "test")[0])]

    for folder in ("killed", "whole"):
        extract_to_disk(build_extractor(), samples, tmp_path / folder, batch_size=3, prompt="")
    torch.set_num_threads(threads)
    found, expected = (
        {f.name: f.read_bytes() for f in (tmp_path / folder / "samples").glob("[!.]*")}
        for folder in ("killed", "whole")
    )
    assert len(expected) == 7
    assert found == expected

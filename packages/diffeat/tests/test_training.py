"""Heads: every parameter learns, what is trained gets better, resumed trainings are the same."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffeat.cli import main
from diffeat.demo import build_extractor, save_backbone, shapes_data
from diffeat.evaluate import correspond, read_pairs, segment
from diffeat.probe import ConvCorrespondence
from diffeat.segmentation import SegmentationHead, train_segmentation
from diffeat.train import train_correspondence
from shared_core.errors import InputError
from shared_core.run import load_state, save_state
from shared_core.testing import CliResult


def spair_71k(folder: Path) -> Path:
    """The layout of the published archive, with all that lies in it, and pairs of two views."""
    images, _, _ = shapes_data(4, "test")
    for split, count in (("trn", 3), ("val", 2), ("test", 2)):
        rows = []
        for number in range(count):
            category = ("aeroplane", "tvmonitor")[number % 2]
            stem = f"2008_00{number:04d}"
            places = {k: folder / k / category for k in ("JPEGImages", "ImageAnnotation")}
            for place in (*places.values(), folder / "PairAnnotation" / split):
                place.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(images[number].permute(1, 2, 0).numpy())
            image.resize((96, 64), Image.Resampling.BICUBIC).save(
                places["JPEGImages"] / f"{stem}.jpg", quality=95
            )
            image.resize((64, 64), Image.Resampling.BICUBIC).save(
                places["JPEGImages"] / f"{stem}b.jpg", quality=95
            )
            (places["ImageAnnotation"] / f"{stem}.json").write_text("{}")
            name = f"{number:06d}-{stem}-{stem}b:{category}"
            rows.append(name)
            points = [[12, 10], [45, 32], [80, 50]]
            pair = {
                "pair_id": number, "filename": name, "src_imname": f"{stem}.jpg",
                "trg_imname": f"{stem}b.jpg", "src_imsize": [96, 64, 3],
                "trg_imsize": [64, 64, 3], "src_bndbox": [6, 4, 90, 60],
                "trg_bndbox": [4, 4, 60, 60], "category": category, "src_pose": "Unspecified",
                "trg_pose": "Frontal", "src_kps": points,
                "trg_kps": [[round(x * 2 / 3), y] for x, y in points], "kps_ids": ["0", "3", "7"],
                "mirror": 0, "viewpoint_variation": 1, "scale_variation": 0, "truncation": 0,
                "occlusion": 0,
            }  # fmt: skip
            (folder / "PairAnnotation" / split / f"{name}.json").write_text(json.dumps(pair))
        for size in ("large", "small"):
            (folder / "Layout" / size).mkdir(parents=True, exist_ok=True)
            (folder / "Layout" / size / f"{split}.txt").write_text("\n".join(rows))
    return folder


def hyperfeatures(folder: Path, file: Path) -> Path:
    """The test pairs as Diffusion Hyperfeatures lists them; paths lie below JPEGImages."""
    rows = []
    for pair in read_pairs(folder):
        left, top, right, bottom = pair.box
        rows.append(
            {
                "source_path": f"{pair.category}/{pair.source.name}",
                "target_path": f"{pair.category}/{pair.target.name}",
                "source_points": pair.source_points.long().tolist(),
                "target_points": pair.target_points.long().tolist(),
                "category": pair.category, "mirror": 0, "viewpoint_variation": 1,
                "source_pose": "Left", "target_pose": "Right",
                "source_bounding_box": [0, 0, 1, 1],
                "target_bounding_box": [left, top, right, bottom],
            }
        )  # fmt: skip
    file.write_text(json.dumps(rows))
    return file


def test_spair_as_published_and_as_a_list(tmp_path: Path) -> None:
    folder = spair_71k(tmp_path / "SPair-71k")
    pairs = read_pairs(folder)
    assert [p.category for p in pairs] == ["aeroplane", "tvmonitor"]
    assert [len(read_pairs(folder, split)) for split in ("trn", "val")] == [3, 2]
    listed = read_pairs(folder, str(hyperfeatures(folder, tmp_path / "spair_71k_val-360.json")))
    for a, b in zip(pairs, listed, strict=True):
        assert (a.source, a.target, a.category, a.box) == (b.source, b.target, b.category, b.box)
        assert torch.equal(a.source_points, b.source_points)
    assert torch.equal(pairs[0].points_at(32)[0], torch.tensor([[4, 5], [15, 16], [27, 25]]))
    fx = build_extractor()
    fx.layers = ["up-level2-repeat0-res-out", "up-level1-repeat0-vit-out"]
    found = correspond(fx, pairs, t=0)
    # Both images are one picture at two sizes; the extractor sees it at one.
    assert (found["pck_image"], found["pck_image_by_pair"]) == (1, 1)
    for text, message in (("[]", "no list"), ("{", "cannot be read"), ("[{}]", "no pair")):
        (tmp_path / "wrong.json").write_text(text)
        with pytest.raises(InputError, match=message):
            read_pairs(folder, str(tmp_path / "wrong.json"))


def test_one_layer_at_a_time_equals_all_joined(tmp_path: Path) -> None:
    """A convolution that changes nothing joins the layers first; results must not differ."""
    pairs = read_pairs(spair_71k(tmp_path))
    fx = build_extractor()
    fx.layers = ["mid-vit-out", "up-level1-repeat1-vit-block0-cross-q"]
    head = ConvCorrespondence(64 + 48)
    with torch.no_grad():
        torch.nn.init.dirac_(head.conv.weight)
    given: dict[str, Any] = {"side": 16, "alpha": 0.02}
    assert correspond(fx, pairs, **given) == correspond(fx, pairs, head=head, **given)


def test_the_convolution_learns_and_resumes(tmp_path: Path) -> None:
    folder = spair_71k(tmp_path)
    fx = build_extractor()
    fx.layers = ["mid-vit-out"]  # too coarse to match by itself
    train, val = read_pairs(folder, "trn"), read_pairs(folder, "val")
    losses: list[float] = []
    states: dict[int, Any] = {}

    def after(step: int, loss: float, state: Callable[[], dict[str, Any]]) -> None:
        losses.append(loss)
        if step == 7:
            save_state(tmp_path / "state.safetensors", state())
        states[step] = None

    given: dict[str, Any] = {
        "validation": val, "epochs": 5, "side": 8, "t": 0, "validate_every": 6, "lr": 5e-3
    }  # fmt: skip
    head, told = train_correspondence(fx, train, after=after, **given)
    assert len(losses) == 15
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    assert [r["step"] for r in told["rounds"]] == [6, 12, 15]
    assert told["last"] == told["rounds"][-1]
    assert told["best"]["pck_image"] == max(r["pck_image"] for r in told["rounds"])
    again, told_again = train_correspondence(
        fx, train, state=load_state(tmp_path / "state.safetensors"), **given
    )
    assert torch.equal(again.conv.weight, head.conv.weight)
    assert told_again == told
    with pytest.raises(InputError, match="no pairs"):
        train_correspondence(fx, [])


def test_every_parameter_of_the_head_has_a_gradient_at_once() -> None:
    """The authors' refinement blocks begin at zero, where only the last bias has one."""
    torch.manual_seed(0)
    layers = {"a": (12, 8), "b": (9, 8), "c": (6, 4), "d": (5, 2)}
    head = SegmentationHead(layers, 4, channels=16)
    maps = {n: torch.randn(2, c, 32 // r, 32 // r) for n, (c, r) in layers.items()}
    labels = torch.randint(0, 4, (2, 32, 32))
    head.loss(maps, labels).backward()
    for name, p in head.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name
    assert head(maps).shape == (2, 4, 16, 16)
    with pytest.raises(InputError, match="lack d"):
        head({n: maps[n] for n in "abc"})
    with pytest.raises(InputError, match="accepted"):
        SegmentationHead({}, 4)


def test_the_head_learns_and_resumes(tmp_path: Path) -> None:
    fx = build_extractor()
    fx.layers = ["unet-in", "up-level2-repeat0-res-out"]
    images, labels, _ = shapes_data(8, "test")
    labels = (labels > 0).long()

    def fresh() -> SegmentationHead:
        torch.manual_seed(3)
        return SegmentationHead.of(fx, 2, channels=16)

    losses: list[float] = []

    def after(step: int, loss: float, state: Callable[[], dict[str, Any]]) -> None:
        losses.append(loss)
        if step == 9:
            save_state(tmp_path / "state.safetensors", state())

    given: dict[str, Any] = {"steps": 18, "batch_size": 4, "lr": 1e-2, "t": 0}
    head = train_segmentation(fx, fresh(), (images, labels), after=after, **given)
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    state = load_state(tmp_path / "state.safetensors")
    again = train_segmentation(fx, fresh(), (images, labels), state=state, **given)
    for a, b in zip(head.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(InputError, match="give as many"):
        train_segmentation(fx, head, (images, labels[:2]))
    longer = {**given, "steps": 60}
    found = segment(
        fx, (images, labels), (images, labels), classes=2, probe="head", channels=16, **longer
    )
    assert found["miou"] > 0.6
    fx.layers = ["up-level1-repeat0-vit-block0-cross-map"]
    with pytest.raises(InputError, match="not known before"):
        SegmentationHead.of(fx, 2)


def test_commands(tmp_path: Path, run_cli: Callable[..., CliResult]) -> None:
    spair_71k(tmp_path / "SPair-71k")
    save_backbone(build_extractor(), tmp_path / "model")
    given = ["--model", "model", "--layers", "mid-vit-out"]
    conv = ["correspond", *given, "--pairs", "SPair-71k", "--method", "conv", "--out", "c"]
    shown = run_cli(main, *conv, "--steps", 1, "--epochs", 2, "--json")
    assert shown.code == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert found["rounds"] == [found["last"]]
    assert Path("c/head.safetensors").is_file()
    images, labels, _ = shapes_data(5, "test")
    for folder in ("images", "labels"):
        Path(folder).mkdir()
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(f"images/{i}.png")
        Image.fromarray(label.numpy().astype("uint8")).save(f"labels/{i}.png")
    data = ["--images", "images", "--labels", "labels", "--classes", 4]
    head = ["probe", *given, *data, "--probe", "head", "--steps", 3, "--channels", 8]
    shown = run_cli(main, *head, "--json", "--out", "h")
    assert shown.code == 0, shown.stderr
    assert len(Path("h/log.jsonl").read_text().splitlines()) == 3
    ranked = ["rank", "--model", "model", *data, "--candidates", "mid-vit-out", "--probe", "mlp"]
    shown = run_cli(main, *ranked, "--networks", 1, "--epochs", 1, "--json")
    assert shown.code == 0, shown.stderr
    assert json.loads(shown.stdout)["ranking"][0]["channels"] == 64
    shown = run_cli(main, *ranked[:-4], "--candidates", "auto", "--json")
    assert shown.code == 0, shown.stderr
    assert len(json.loads(shown.stdout)["ranking"]) > 3
    Path("words.txt").write_text("a picture of circle\n")
    taken = ["extract", "--input", "images", *given, "--prompt-file", "words.txt"]
    shown = run_cli(main, *taken, "--format", "memmap", "--pca", 4, "--out", "m")
    assert shown.code == 0, shown.stderr
    assert json.loads(Path("m/manifest.json").read_text())["prompt"] == "a picture of circle"
    for argv, message in (
        ([*conv[:-3], "mean"], "nn, conv"),
        (["extract", "--input", "images", "--layers", "mid-vit-out"], "give --model"),
        ([*taken[:-1], "nowhere.txt"], "cannot be read"),
        (["visualize", "--input", "images", "--layers", "xl-t", "--model", "a,b"], "give 3"),
    ):
        refused = run_cli(main, *argv)
        assert (refused.code, refused.stdout) == (2, ""), refused.stderr
        assert message in refused.stderr

"""Buckets hold what separate calls give; presets are the paper's; heads learn from buckets."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from content_shift import FeatureBucket, FeatureSpec, Recipe, extract_bucket, load_specs, recipes
from content_shift import techniques as T
from content_shift.correspondence import CorrespondenceHead, Match, train_correspondence
from content_shift.presets import GAMMA_GRID, LORA_TRAINING, get_recipe
from content_shift.segmentation import train_segmentation
from diffeat import Features
from shared_core.errors import InputError

Build = Callable[..., Any]


@pytest.mark.smoke
def test_a_bucket_holds_what_separate_calls_give(
    extractor: Build, control: Build, images: torch.Tensor, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    fx = extractor("sd15")
    net = control(fx.backbone)
    specs = [
        FeatureSpec("prompt", Recipe(T.Prompt("a cat")), seed=1),
        FeatureSpec("control", T.Prompt("a") + T.ControlNet(net), t=70),
        FeatureSpec("clean", T.Prompt("a") + T.CleanBackbone(fx.backbone.state_dict())),
        FeatureSpec("attention", T.Prompt("a") + T.ControlNet(net) + T.PreDenoise(52), ["attn"]),
    ]
    samples = [(f"folder/{i}.png", image) for i, image in enumerate(images)]
    encoded = []
    encode = fx.encode_images
    monkeypatch.setattr(fx, "encode_images", lambda *a, **k: encoded.append(1) or encode(*a, **k))
    bucket = extract_bucket(fx, specs, samples, tmp_path / "b", batch_size=3)
    assert len(encoded) == 1  # one encoding for all four features
    assert list(bucket) == [name for name, _ in samples]
    assert (bucket.plain, bucket.attention) == (["prompt", "control", "clean"], ["attention"])
    for spec in specs:
        alone = spec.recipe(
            fx, images, spec.t, seed=spec.seed, ids=list(bucket),
            layers=None if spec.layers is None else tuple(spec.layers),
        )  # fmt: skip
        for row, name in enumerate(bucket):
            for layer, value in alone.items():
                assert torch.equal(bucket[name][spec.name][layer][0], value[row]), spec.name
    stack, extra = bucket.load(list(bucket)[:2], 8)
    assert stack.shape == (2, 3, 8 + 16 + 16 + 16, 8, 8)
    assert extra is not None
    assert extra.shape[:1] + extra.shape[2:] == (2, 8, 8)
    # A lost file is made again, by the same bytes; shards divide the rest.
    lost = sorted((tmp_path / "b" / "samples").iterdir())[0]
    content = lost.read_bytes()
    lost.unlink()
    extract_bucket(fx, specs, samples, tmp_path / "b", batch_size=3)
    assert lost.read_bytes() == content
    for rank in (1, 0):
        extract_bucket(fx, specs, samples, tmp_path / "s", batch_size=3, shard=(rank, 2))
    joined = FeatureBucket(tmp_path / "s")
    for name in bucket:
        for layer, value in bucket[name]["prompt"].items():
            torch.testing.assert_close(joined[name]["prompt"][layer], value, atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match="other features"):
        extract_bucket(fx, specs[:1], samples, tmp_path / "b")
    with pytest.raises(InputError, match="no features of 'x'"):
        bucket.load(["x"], 8)
    for bad, message in (
        ({"samples": [samples[0], samples[0]]}, "only once"),
        ({"features": []}, "only once"),
        ({"features": {"a/b": Recipe()}}, "slash"),
        ({"shard": (2, 2)}, "shard"),
    ):
        given = {"features": specs, "samples": samples, "out": tmp_path / "n", **bad}
        with pytest.raises(InputError, match=message):
            extract_bucket(fx, **given)
    with pytest.raises(InputError, match="feature bucket"):
        FeatureBucket(tmp_path / "n")


def test_presets_are_the_papers() -> None:
    assert list(recipes) == ["spair", "horse21", "bedroom28", "ade20k", "cityscapes"]
    lora = {"good": "g", "overfit": "o"}
    spair = recipes["spair"].build(lora)
    assert len(spair) == 7
    assert {s.t for s in spair} == {50}
    assert [s.seed for s in spair] == [0, 0, 0, 1, 1, 1, 0]
    assert [s.attention for s in spair] == [False] * 6 + [True]
    assert repr(spair[6].recipe.techniques[1:]) == (
        "(ControlNet(model='lllyasviel/sd-controlnet-canny', preprocess='canny', scale=1.0, "
        "images=None), LoRA(weights='g', weight=1.0, name=None), PreDenoise(from_t=60))"
    )
    assert spair[2].recipe.to_dict()[0] == {"technique": "Prompt", "text": "a photo"}
    horse = {s.name: s for s in recipes["horse21"].build(lora)}
    assert list(horse) == ["prompt", "control", "lora", "lora-overfit", "attention"]
    assert [len(h.recipe) for h in horse.values()] == [1, 2, 2, 2, 4]
    early = {s.name: s for s in recipes["horse21"].build(lora, pre_denoise="control")}
    assert [len(h.recipe) for h in early.values()] == [1, 3, 2, 2, 4]
    none = recipes["horse21"].build(lora, pre_denoise="none")
    assert not any(isinstance(t, T.PreDenoise) for s in none for t in s.recipe.techniques)
    for name in ("ade20k", "cityscapes"):
        specs = recipes[name].build(lora, pre_denoise="control", topology="sdxl")
        assert [len(s.recipe) for s in specs] == [1, 3, 3]  # never a walk, never attention
        assert specs[1].recipe.to_dict()[1]["model"] == "diffusers/controlnet-canny-sdxl-1.0"
    assert [s.name for s in get_recipe("bedroom28").build(skip_missing=True)] == [
        "prompt", "control",
    ]  # fmt: skip
    assert LORA_TRAINING["rank"], LORA_TRAINING["alpha"] == (64, 32)
    assert GAMMA_GRID[0] == 0
    with pytest.raises(InputError, match="good, overfit"):
        recipes["spair"].build()
    with pytest.raises(InputError, match="sd15, sdxl"):
        recipes["spair"].build(lora, topology="sd3")
    with pytest.raises(InputError, match="spair, horse21"):
        get_recipe("cub")


def test_specs_are_data(tmp_path: Path) -> None:
    import yaml

    specs = recipes["horse21"].build({"good": "g", "overfit": "o"})
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump([s.to_dict() for s in specs]))
    again = load_specs(file)
    assert [repr(s) for s in again] == [repr(s) for s in specs]
    for content, message in (("a: 1", "no list"), ("- {techniques: []}", "accepted: name")):
        file.write_text(content)
        with pytest.raises(InputError, match=message):
            load_specs(file)


def written(folder: Path, maps: dict[str, dict[str, torch.Tensor]], extra: bool = False) -> Any:
    """A bucket on disk with these features (name, then feature) of one layer."""
    import hashlib
    import json

    titles = list(next(iter(maps.values())))
    listed = [{"name": t, "attention": extra and t == titles[-1]} for t in titles]
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"features": listed}))
    (folder / "index.json").write_text(json.dumps(list(maps)))
    (folder / "samples").mkdir()
    for name, found in maps.items():
        stem = hashlib.sha256(name.encode()).hexdigest()[:32]
        Features({f"{t}/layer": m[None] for t, m in found.items()}).save(
            folder / "samples" / f"{stem}.safetensors"
        )
    return FeatureBucket(folder)


def test_assigners_learn_to_match_by_the_better_feature(tmp_path: Path) -> None:
    """One feature is the same place for place in both images, the other is noise."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    maps = {}
    for pair in range(6):
        common = noise(6, 8, 8)
        for side in "ab":
            # The useless feature is louder, so equal weights fail.
            maps[f"{pair}{side}"] = {"noise": 3 * noise(6, 8, 8), "good": common + 0.3}
    bucket = written(tmp_path / "b", maps)
    points = torch.tensor([[4.0, 4.0], [20.0, 12.0], [28.0, 28.0], [12.0, 20.0]]) + 0.5
    matches = [Match(f"{p}a", f"{p}b", points, points, (32, 32), (32, 32)) for p in range(6)]
    given: dict[str, Any] = {
        "steps": 60, "validate_every": 20, "side": 8, "size": 32, "alpha": 0.05, "lr": 5e-3,
    }  # fmt: skip
    head, found = train_correspondence(
        bucket, matches[:4], matches[4:], out=tmp_path / "r", **given
    )
    assert [r["step"] for r in found["rounds"]] == [20, 40, 60]
    assert found["best"]["pck_image"] == max(r["pck_image"] for r in found["rounds"])
    assert found["last"] == found["rounds"][-1]
    assert found["last"]["pck_image"] > 0.8
    stack, _ = bucket.load(["4a", "4b"], 8)
    with torch.no_grad():
        assert float(head(stack)[1].weights[..., 1].mean()) > 0.8
    # Interrupted and resumed, it ends in the same weights.
    train_correspondence(
        bucket, matches[:4], matches[4:], out=tmp_path / "p", **{**given, "steps": 40}
    )
    rest, again = train_correspondence(
        bucket, matches[:4], matches[4:], out=tmp_path / "p", resume=True, **given
    )
    assert again["rounds"] == found["rounds"]
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), rest.parameters(), strict=True))
    with pytest.raises(InputError, match="0 training"):
        train_correspondence(bucket, [], matches)


def test_the_loss_is_symmetric_cross_entropy_over_all_positions() -> None:
    torch.manual_seed(0)
    head = CorrespondenceHead(4, 2, "conv", 2).eval()
    assert len(head.convs) == 2
    assert head.convs[0] is not head.convs[1]
    assert head.convs[0].weight.shape == (6, 6, 3, 3)
    assert head.convs[0].bias is None
    stack, extra = torch.randn(2, 3, 4, 5, 5), torch.randn(2, 2, 5, 5)
    with torch.no_grad():
        features, out = head(stack, extra)
        mixed = [(out.weights[:, j, :, None, None, None] * stack).sum(1) for j in (0, 1)]
        joined = [conv(torch.cat([m, extra], 1)) for conv, m in zip(head.convs, mixed, strict=True)]
        torch.testing.assert_close(features, torch.cat(joined, 1))
        source, target = torch.tensor([[1, 2], [4, 0]]), torch.tensor([[3, 3], [0, 1]])
        total = 0.0
        for a, b, pa, pb in ((0, 1, source, target), (1, 0, target, source)):
            for p, q in zip(pa, pb, strict=True):
                query = features[a, :, p[1], p[0]]
                cosine = torch.cosine_similarity(features[b], query[:, None, None], dim=0)
                logs = (cosine / 0.07).flatten().log_softmax(0)
                total -= float(logs[q[1] * 5 + q[0]]) / 4
        assert float(head.loss(features, source, target)) == pytest.approx(total, abs=1e-4)


def test_pixels_learn_the_better_feature(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    labels, maps = {}, {}
    for i in range(6):
        label = torch.zeros(8, 8, dtype=torch.long)
        label[:, 3 + i % 3 :] = 1
        good = nn.functional.one_hot(label, 2).permute(2, 0, 1).float()
        good = torch.cat([good, good]) + 0.1 * torch.randn(4, 8, 8, generator=generator)
        labels[str(i)] = label
        maps[str(i)] = {
            "noise": torch.randn(4, 8, 8, generator=generator), "good": good,
            "extra": torch.randn(1, 8, 8, generator=generator),
        }  # fmt: skip
    bucket = written(tmp_path / "b", maps, extra=True)
    names = list(maps)
    found = train_segmentation(
        bucket, labels, names[:4], names[4:], classes=3, networks=2, epochs=15, gamma1=0.01
    )
    assert found["miou"] > 0.9
    assert found["iou"][2] is None
    assert torch.tensor(found["weights"]).shape == (2, 2, 2)
    for bad, message in (
        ({"train": []}, "0 training"),
        ({"classes": 1}, "label 1 with 1 classes"),
        ({"labels": {}}, "no label map"),
    ):
        given: dict[str, Any] = {
            "labels": labels, "train": names[:4], "test": names[4:], "classes": 2, **bad,
        }  # fmt: skip
        with pytest.raises(InputError, match=message):
            train_segmentation(bucket, **given)

"""Every form of features on disk holds the same features, resumes, and keeps its bytes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffeat import FeatureCache, FeatureExtractor, Features, extract_to_disk
from diffeat.demo import build_extractor, shapes_data
from shared_core.errors import InputError
from shared_core.testing import run_gloo

FORMS = [
    ("safetensors", "per-sample"),
    ("safetensors", "per-layer"),
    ("npy", "per-sample"),
    ("npy", "per-layer"),
    ("memmap", "per-layer"),
]
LAYERS = ["mid-vit-out", "up-level1-repeat0-vit-block0-cross-q", "vae-out"]
Samples = list[tuple[str, Any]]


@pytest.fixture(scope="module")
def fx() -> FeatureExtractor:
    fx = build_extractor()
    fx.layers = LAYERS
    return fx


@pytest.fixture(scope="module")
def samples() -> Samples:
    return [(f"dir/{i}.png", image) for i, image in enumerate(shapes_data(5, "test")[0])]


@pytest.fixture(scope="module")
def expected(fx: FeatureExtractor, samples: Samples) -> dict[str, Features]:
    images = torch.stack([image for _, image in samples])
    whole = fx(images, "", [0, 50], ids=[name for name, _ in samples])
    return {
        name: Features({k: v[i : i + 1] for k, v in whole.items()})
        for i, (name, _) in enumerate(samples)
    }


def content(folder: Path) -> dict[str, bytes]:
    files = [f for f in folder.rglob("*") if f.is_file() and not f.name.startswith(".")]
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(files)}


@pytest.mark.parametrize(("form", "layout"), FORMS)
def test_forms(
    fx: FeatureExtractor, samples: Samples, expected: Any, tmp_path: Path, form: Any, layout: Any
) -> None:
    given: dict[str, Any] = {"prompt": "", "t": [0, 50], "format": form, "layout": layout}
    out = extract_to_disk(fx, samples, tmp_path / "a", batch_size=5, **given)
    cache = FeatureCache(out)
    assert list(cache) == [name for name, _ in samples]
    order = [f"{n}@t{t}" for t in (0, 50) for n in LAYERS[:2]] + ["vae-out"]
    for name, features in expected.items():
        found = cache[name]
        assert list(found) == list(features) == order
        for layer, value in features.items():
            torch.testing.assert_close(found[layer], value, atol=1e-6, rtol=1e-6)
    some = FeatureCache(out, layers=[order[1]])
    assert list(some["dir/3.png"]) == [order[1]]
    with pytest.raises(InputError, match="does not hold"):
        FeatureCache(out, layers=["mid"])
    # What is lost of a sample is made again, the same to the byte; the rest is not touched.
    before = content(out)
    if form == "memmap":
        (out / "rows/2").unlink()
        array = np.load(next((out / "layers").glob("mid*t50.npy")), mmap_mode="r+")
        array[2] = 7
        array.flush()
        del array
    elif layout == "per-layer":
        sorted(out.glob("layers/*/*"))[3].unlink()
    else:
        lost = sorted((out / "samples").iterdir())[2]
        if lost.is_dir():
            lost.rename(tmp_path / "elsewhere")
        else:
            lost.unlink()
    assert len(FeatureCache(out)) == 4
    extract_to_disk(fx, samples, out, batch_size=5, **given)
    assert content(out) == before
    # Shards write into one folder.
    for shard in ((0, 2), (1, 2)):
        extract_to_disk(fx, samples, tmp_path / "b", batch_size=2, shard=shard, **given)
    other = FeatureCache(tmp_path / "b")
    assert len(other) == 5
    for name, features in expected.items():
        for layer, value in features.items():
            torch.testing.assert_close(other[name][layer], value, atol=1e-5, rtol=1e-5)


def test_components(fx: FeatureExtractor, samples: Samples, expected: Any, tmp_path: Path) -> None:
    out = extract_to_disk(fx, samples, tmp_path, prompt="", pca=3, dtype=torch.float16)
    cache = FeatureCache(out)
    name = LAYERS[1]
    x = torch.cat([expected[s][f"{name}@t50"] for s in cache]).permute(0, 2, 3, 1).flatten(0, 2)
    x = (x - x.mean(0)).double()
    _, _, directions = torch.linalg.svd(x, full_matrices=False)
    wanted = x @ directions[:3].T
    found = torch.cat([cache[s][name] for s in cache])
    assert found.dtype == torch.float16
    found = found.permute(0, 2, 3, 1).flatten(0, 2).double()
    signs = (found * wanted).sum(0).sign()
    torch.testing.assert_close(found, wanted * signs, atol=2e-2, rtol=2e-2)
    before = content(out)
    (out / "samples" / next(iter(sorted(p.name for p in (out / "samples").iterdir())))).unlink()
    extract_to_disk(fx, samples, out, prompt="", pca=3, dtype=torch.float16)
    assert content(out) == before


@pytest.mark.usefixtures("without_type_checks")
def test_refusals(fx: FeatureExtractor, samples: Samples, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"format": "zip"}, "accepted: safetensors"),
        ({"format": "npy", "dtype": torch.bfloat16}, "bfloat16"),
        ({"format": "memmap", "layout": "per-sample"}, "one array a layer"),
        ({"layout": "flat"}, "per-layer"),
        ({"pca": 0}, "pca=0"),
        ({"shard": (2, 2)}, "shard"),
    ]
    for given, message in cases:
        with pytest.raises(InputError, match=message):
            extract_to_disk(fx, samples, tmp_path / "x", prompt="", **given)
        assert not (tmp_path / "x").exists()
    with pytest.raises(InputError, match="only once"):
        extract_to_disk(fx, [*samples, samples[0]], tmp_path / "x", prompt="")
    with pytest.raises(InputError, match="feature folder"):
        FeatureCache(tmp_path)
    extract_to_disk(fx, samples, tmp_path / "y", prompt="", format="memmap")
    with pytest.raises(KeyError):
        FeatureCache(tmp_path / "y")["nothing"]
    with pytest.raises(InputError, match="other t"):
        extract_to_disk(fx, samples, tmp_path / "y", prompt="", format="memmap", t=60)
    with pytest.raises(InputError, match="other samples"):
        extract_to_disk(fx, samples[:3], tmp_path / "y", prompt="", format="memmap")
    (tmp_path / "y/layers/mid-vit-out.npy").write_bytes(b"no")
    with pytest.raises(InputError, match="no readable features"):
        FeatureCache(tmp_path / "y")["dir/0.png"]
    free = build_extractor()
    free.size, free.layers = None, ["unet-in"]
    mixed = [("a", samples[0][1]), ("b", samples[1][1][:, :, :16])]
    with pytest.raises(InputError, match="several sizes"):
        extract_to_disk(free, mixed, tmp_path / "z", prompt="", format="memmap", batch_size=1)


def _two_processes(rank: int, world: int, folder: str) -> None:
    from torch.nn.parallel import DistributedDataParallel

    samples = [(str(i), image) for i, image in enumerate(shapes_data(3, "test")[0])]
    extract_to_disk(
        build_extractor(), samples, folder, prompt="", format="memmap", batch_size=1,
        shard=(rank, world),
    )  # fmt: skip

    class Trained(torch.nn.Module):
        """A backbone that learns through its features, as a user would wrap it."""

        def __init__(self) -> None:
            super().__init__()
            self.fx = build_extractor()
            self.fx.train_backbone()
            self.unet = self.fx.backbone

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.fx(images, "", ids=["same"])["up-level1-repeat1-vit-out"]

    both = torch.stack([image for _, image in samples[:2]])
    module = DistributedDataParallel(Trained(), find_unused_parameters=True)
    module(both[rank : rank + 1]).pow(2).mean().backward()
    alone = Trained()
    sum(alone(both[i : i + 1]).pow(2).mean() / 2 for i in range(2)).backward()
    for p, q in zip(module.module.unet.parameters(), alone.unet.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-3)


def test_two_processes(tmp_path: Path) -> None:
    run_gloo(_two_processes, tmp_path, str(tmp_path / "features"))
    assert len(FeatureCache(tmp_path / "features")) == 3

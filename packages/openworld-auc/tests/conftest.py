import json

import numpy as np
import PIL.Image
import pytest
import torch

pytest_plugins = ["shared_core.testing"]


def pairwise(s, c, u, d, *, strict=False):
    """The double sum of the definition, in float64."""
    s, u = s.double()[:, None], u.double()[None]
    kernel = (s > u).double() + (0.0 if strict else 0.5) * (s == u)
    pairs = c.double()[:, None] * d.double()[None] * kernel
    return float(pairs.sum() / (len(s) * u.shape[1]))


def random_case(seed, *, levels=None, soft=False, dtype=torch.float64):
    """Scores (with ties if there are few levels), correctness and domain of random samples."""
    g = torch.Generator().manual_seed(seed)
    n_b, n_n = (int(torch.randint(1, 40, (), generator=g)) for _ in range(2))
    n = n_b + n_n
    scores = torch.randn(n, generator=g, dtype=torch.float64)
    if levels:
        scores = torch.randint(levels, (n,), generator=g).double()
    correct = torch.rand(n, generator=g, dtype=torch.float64)
    correct = correct if soft else correct < 0.6
    order = torch.randperm(n, generator=g)
    is_base = (torch.arange(n) < n_b)[order]
    return scores.to(dtype), correct, is_base


def split(scores, correct, is_base):
    return scores[is_base], correct[is_base], scores[~is_base], correct[~is_base]


@pytest.fixture
def tools():
    class Tools:
        pass

    Tools.pairwise = staticmethod(pairwise)
    Tools.case = staticmethod(random_case)
    Tools.split = staticmethod(split)
    return Tools


@pytest.fixture
def pets(tmp_path):
    """A split file with its images, and a tiny open_clip model in a folder."""
    from open_clip.model import CLIP

    rng = np.random.default_rng(0)
    split = {"train": [], "val": [], "test": []}
    (tmp_path / "images").mkdir()
    for label, name in enumerate(["cat", "dog", "red_fox", "owl"]):
        for part, count in (("train", 3), ("test", 4)):
            for i in range(count):
                file = f"{part}_{label}_{i}.png"
                pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                PIL.Image.fromarray(pixels).save(tmp_path / "images" / file)
                split[part].append([file, label, name])
    (tmp_path / "split.json").write_text(json.dumps(split))
    config = {
        "embed_dim": 16,
        "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32},
        "text_cfg": {
            "context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1,
        },
    }  # fmt: skip
    folder = tmp_path / "clip"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": {}})
    )
    torch.manual_seed(0)
    from safetensors.torch import save_file

    save_file(CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    return tmp_path

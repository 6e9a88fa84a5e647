"""Scoring images: one deterministic transform for all, the published one on request alone."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from edge_ood.detector import OODDetector
from edge_ood.models import create_model
from edge_ood.scoring import score_source
from edge_ood.shapes import unknown_images
from shared_core.run import RunFolder


def test_official_transforms_only_on_request(tmp_path):
    pytest.importorskip("torchvision")
    from edge_ood.datasets import eval_transform

    images = [PIL.Image.fromarray(image) for image in unknown_images(0, 4)["shapes"]]
    (tmp_path / "images").mkdir()
    for i, image in enumerate(images):
        image.save(tmp_path / f"images/{i}.png")
    model = create_model("small_cnn", 3).eval()
    OODDetector(model, "joint_energy").save(tmp_path / "detector")

    def logits(name, **options):
        run = RunFolder(tmp_path / name)
        score_source(tmp_path / "detector", str(tmp_path / "images"), run, **options)
        return np.load(Path(run.path) / "logits.npy")

    with torch.no_grad():
        expected = model(torch.stack([eval_transform(224)(image) for image in images])).numpy()
    for seed in (0, 1):
        np.testing.assert_allclose(logits(f"plain{seed}", seed=seed), expected, atol=1e-5)
    random = [logits(f"random{s}", seed=s, official_transforms=True) for s in (0, 1)]
    assert np.abs(random[0] - random[1]).max() > 1e-3
    assert np.abs(random[0] - expected).max() > 1e-3

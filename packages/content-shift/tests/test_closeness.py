"""Canny beside OpenCV; PSNR, SSIM and edges beside other implementations."""

import math

import pytest
import torch

from content_shift import canny
from content_shift.closeness import closeness, edge_f1, psnr, sobel, ssim
from shared_core.data.shapes import ShapesWorld
from shared_core.errors import InputError, MissingExtraError


def pictures() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    scenes = torch.from_numpy(ShapesWorld(0).segmentation(4, 64, (1, 3)).images)
    small = torch.rand(3, 3, 9, 9, generator=generator)
    return [
        scenes.permute(0, 3, 1, 2).float() / 255,
        torch.nn.functional.interpolate(small, (70, 50), mode="bicubic").clamp(0, 1),
        torch.rand(2, 3, 32, 32, generator=generator),
        torch.rand(2, 1, 31, 33, generator=generator),
    ]


def test_canny_is_opencvs() -> None:
    pytest.importorskip("cv2", reason="the comparison needs OpenCV")
    for images in pictures():
        for low, high in ((100, 200), (20, 250)):
            ours = canny(images, low, high, backend="torch")
            theirs = canny(images, low, high, backend="opencv")
            assert float((ours == theirs).float().mean()) >= 0.99
            assert 0 < float(theirs.mean()) < 1


@pytest.mark.smoke
def test_canny_is_binary_with_three_equal_channels() -> None:
    edges = canny(pictures()[0], backend="torch")
    assert edges.shape == (4, 3, 64, 64)
    assert set(edges.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(edges[:, 0], edges[:, 2])
    assert canny(torch.full((1, 3, 16, 16), 0.5), backend="torch").sum() == 0
    for call in (
        lambda: canny(torch.full((1, 3, 8, 8), 2.0)),
        lambda: canny(torch.zeros(1, 2, 8, 8)),
        lambda: canny(torch.zeros(1, 3, 8, 8), 200, 100),
        lambda: canny(torch.zeros(1, 3, 8, 8), backend="numpy"),
    ):
        with pytest.raises(InputError):
            call()


def test_canny_without_opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    x = torch.zeros(1, 3, 8, 8)
    with pytest.raises(MissingExtraError, match=r"content-shift\[canny\]"):
        canny(x, backend="opencv")
    assert canny(x).shape == x.shape


@pytest.mark.usefixtures("without_type_checks")
def test_images_of_different_size_are_refused() -> None:
    with pytest.raises(InputError, match="differ"):
        closeness(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 9))


@pytest.mark.smoke
def test_psnr_ssim_and_edges() -> None:
    x = pictures()[1]
    noisy = (x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    for i in range(3):
        error = float(((x[i].double() - noisy[i].double()) ** 2).mean())
        assert float(psnr(noisy, x)[i]) == pytest.approx(-10 * math.log10(error), abs=1e-4)
    assert closeness(x, x, "ssim").tolist() == [1.0] * 3
    assert closeness(x, x, "edge").tolist() == [1.0] * 3
    # One shift of a pixel is within the tolerance of edges, four are not.
    step = torch.zeros(1, 3, 32, 32)
    step[..., 12:] = 1
    assert float(edge_f1(step.roll(1, 3), step)) > float(edge_f1(step.roll(4, 3), step))
    assert float(sobel(step).max()) == 1
    for metric in ("psnr", "ssim", "edge"):
        assert bool((closeness(noisy, x, metric) < closeness(x, x, metric)).all())
    flat = torch.zeros(1, 3, 8, 8)
    assert float(edge_f1(flat, flat)) == 1
    with pytest.raises(InputError, match="psnr, ssim, edge"):
        closeness(x, x, "lpips")


def test_ssim_is_torchmetrics() -> None:
    metrics = pytest.importorskip("torchmetrics.functional.image", reason="needs torchmetrics")
    x = pictures()[0]
    y = (x + 0.2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(2))).clamp(0, 1)
    theirs = metrics.structural_similarity_index_measure(
        y.double(), x.double(), data_range=1.0, reduction="none"
    )
    # torchmetrics reflects the borders; ours takes windows inside the image only.
    wide = [torch.nn.functional.pad(z, (5, 5, 5, 5), mode="reflect") for z in (y, x)]
    torch.testing.assert_close(ssim(*wide).double(), theirs, atol=1e-6, rtol=0)

import sys

import numpy as np
import PIL.Image
import pytest
import torch

from focal_sam.presets import PRESETS
from focal_sam.transforms import image_transform
from shared_core.errors import InputError, MissingExtraError

STANDARD = {
    "cifar": ([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]),
    "imagenet-lt": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "inat2018": ([0.466, 0.471, 0.380], [0.195, 0.194, 0.192]),
    "clip": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]),
}


def picture(width: int, height: int) -> PIL.Image.Image:
    """A smooth image without symmetry, never black."""
    y, x = np.mgrid[:height, :width]
    channels = [20 + 200 * x / width, 20 + 200 * y / height, 20 + 100 * (x / width) * (y / height)]
    return PIL.Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def standardised(pixels: np.ndarray, name: str) -> np.ndarray:
    mean, std = (np.array(values) for values in STANDARD[name])
    return ((pixels / 255 - mean) / std).transpose(2, 0, 1)


def pixels_of(tensor: torch.Tensor, name: str) -> np.ndarray:
    mean, std = (np.array(values) for values in STANDARD[name])
    return 255 * (tensor.double().numpy().transpose(1, 2, 0) * std + mean)


@pytest.mark.parametrize("name", STANDARD)
@pytest.mark.parametrize("train", [True, False])
def test_shape_and_type(name: str, train: bool) -> None:
    side = 32 if name == "cifar" else 224
    image = picture(32, 32) if name == "cifar" else picture(300, 260)
    result = image_transform(name, train=train)(image)
    assert result.shape == (3, side, side)
    assert result.dtype == torch.float32


def test_cifar_evaluation_only_standardises() -> None:
    image = picture(32, 32)
    result = image_transform("cifar", train=False)(image)
    np.testing.assert_allclose(result, standardised(np.asarray(image), "cifar"), atol=1e-5)


def test_cifar_training_crops_the_padded_image_and_flips() -> None:
    image = picture(32, 32)
    padded = np.zeros((40, 40, 3), dtype=np.uint8)
    padded[4:36, 4:36] = np.asarray(image)
    crops = {
        padded[top : top + 32, left : left + 32][:, ::step].tobytes(): (top, left, step)
        for top in range(9)
        for left in range(9)
        for step in (1, -1)
    }
    torch.manual_seed(0)
    transform = image_transform("cifar", train=True)
    seen = []
    for _ in range(200):
        pixels = pixels_of(transform(image), "cifar")
        whole = np.round(pixels)
        np.testing.assert_allclose(pixels, whole, atol=1e-3)
        seen.append(crops[whole.astype(np.uint8).tobytes()])
    tops, lefts, steps = (set(values) for values in zip(*seen, strict=True))
    assert tops == lefts == set(range(9))
    assert steps == {1, -1}


@pytest.mark.parametrize(
    ("name", "shorter"), [("imagenet-lt", 256), ("inat2018", 256), ("clip", 224)]
)
def test_evaluation_resizes_the_shorter_side_and_crops_the_centre(name: str, shorter: int) -> None:
    image = picture(640, 512)
    longer = shorter * 640 // 512
    resized = image.resize((longer, shorter), PIL.Image.Resampling.BILINEAR)
    left, top = round((longer - 224) / 2), round((shorter - 224) / 2)
    expected = resized.crop((left, top, left + 224, top + 224))
    result = image_transform(name, train=False)(image)
    np.testing.assert_allclose(result, standardised(np.asarray(expected), name), atol=1e-5)


@pytest.mark.parametrize("name", ["imagenet-lt", "inat2018", "clip"])
def test_training_takes_resized_crops_and_flips(name: str) -> None:
    image = picture(300, 260)
    torch.manual_seed(0)
    transform = image_transform(name, train=True)
    slopes, spans = [], []
    for _ in range(20):
        red = pixels_of(transform(image), name)[..., 0].mean(axis=0)
        slopes.append(np.sign(red[-1] - red[0]))
        spans.append(abs(red[-1] - red[0]))
    assert set(slopes) == {-1, 1}
    assert max(spans) > 1.5 * min(spans)  # crops of different sizes


def test_only_imagenet_lt_changes_colours() -> None:
    grey = PIL.Image.new("RGB", (300, 260), (90, 120, 150))

    def colours(name: str) -> set[tuple[float, ...]]:
        torch.manual_seed(0)
        results = [pixels_of(image_transform(name, train=True)(grey), name) for _ in range(8)]
        return {tuple(np.round(result.mean(axis=(0, 1)))) for result in results}

    assert colours("inat2018") == colours("clip") == {(90.0, 120.0, 150.0)}
    jittered = colours("imagenet-lt")
    assert len(jittered) == 8
    # brightness within 0.6 to 1.4, contrast and saturation change little here; no hue: the order
    # of the channels stays
    assert all(red < green < blue for red, green, blue in jittered)
    assert all(0.5 * 120 < green < 1.5 * 120 for _, green, _ in jittered)


def test_training_is_reproducible() -> None:
    transform = image_transform("imagenet-lt", train=True)
    image = picture(300, 260)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(transform(image))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_every_preset_has_its_transform() -> None:
    for preset in PRESETS.values():
        assert callable(image_transform(preset.transform, train=True))


@pytest.mark.smoke
def test_unknown_name() -> None:
    with pytest.raises(InputError, match=r"'mnist'; accepted: cifar, imagenet-lt, inat2018, clip"):
        image_transform("mnist", train=True)


def test_torchvision_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.transforms", None)
    with pytest.raises(MissingExtraError, match=r"focal-sam\[vision\]"):
        image_transform("cifar", train=True)

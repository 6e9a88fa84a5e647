"""Images and label maps read from folders."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared_core.data.folders import label_maps, named_images
from shared_core.errors import InputError


def test_images_of_a_folder_and_of_one_file(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "z.png").mkdir()  # a folder that is named like an image
    colors = {"b/2.JPG": (0, 255, 0), "a.png": (255, 0, 0), "b/1.webp": (0, 0, 255)}
    for name, color in colors.items():
        Image.new("RGB", (6, 4), color).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    found = named_images(tmp_path)
    assert [name for name, _ in found] == ["a.png", "b/1.webp", "b/2.JPG"]
    for name, image in found:
        assert image.mode == "RGB"
        assert np.abs(np.array(image)[0, 0].astype(int) - colors[name]).max() < 4
    assert [name for name, _ in named_images(tmp_path / "b/2.JPG")] == ["2.JPG"]


def test_label_maps_keep_their_numbers(tmp_path: Path) -> None:
    numbers = np.arange(24).reshape(4, 6)
    (tmp_path / "b").mkdir()
    for name, array in (
        ("a", numbers.astype(np.uint8)),
        ("b/c", (numbers + 500).astype(np.uint16)),
    ):
        Image.fromarray(array).save(tmp_path / f"{name}.png")
    found = label_maps(tmp_path, ["a.jpg", "b/c.webp"])
    assert list(found) == ["a.jpg", "b/c.webp"]
    assert found["a.jpg"].dtype == np.int64
    np.testing.assert_array_equal(found["a.jpg"], numbers)
    np.testing.assert_array_equal(found["b/c.webp"], numbers + 500)
    small = label_maps(tmp_path, ["a.jpg"], size=(2, 3))["a.jpg"]
    assert small.shape == (2, 3)
    assert set(small.flatten().tolist()) <= set(range(24))


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no images"):
        named_images(tmp_path)
    with pytest.raises(InputError, match="holds no images"):
        named_images(tmp_path / "missing")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no more")
    with pytest.raises(InputError, match=r"broken\.png cannot be read as an image"):
        named_images(tmp_path)
    with pytest.raises(InputError, match=r"broken\.png cannot be read as an image"):
        label_maps(tmp_path, ["broken.jpg"])
    with pytest.raises(InputError, match=r"no label map .*other\.png for the image other\.jpg"):
        label_maps(tmp_path, ["other.jpg"])
    Image.new("RGB", (2, 2)).save(tmp_path / "colored.png")
    with pytest.raises(InputError, match="is RGB; accepted: one channel"):
        label_maps(tmp_path, ["colored.jpg"])

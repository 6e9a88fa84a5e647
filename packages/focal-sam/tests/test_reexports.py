import pickle
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import torch

import focal_sam.data
import focal_sam.metrics
from focal_sam.data import (
    LongTailSubset,
    class_counts,
    long_tail_counts,
    read_image_list,
)
from focal_sam.metrics import shot_groups
from shared_core.data import long_tail
from shared_core.data.loading import ImageDataset
from shared_core.errors import InputError


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with three images, of red levels 10, 20 and 30."""
    (tmp_path / "train").mkdir()
    for name, level in (("a.png", 10), ("b c.png", 20), ("d.png", 30)):
        PIL.Image.new("RGB", (5, 4), (level, 0, 9)).save(tmp_path / "train" / name)
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "list.txt"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.smoke
def test_the_shared_builders_are_passed_on() -> None:
    for name in ("LongTailSubset", "class_counts", "long_tail_counts", "long_tail_indices"):
        assert getattr(focal_sam.data, name) is getattr(long_tail, name)
    assert set(focal_sam.data.__all__) <= set(dir(focal_sam.data))


def test_the_cifar_profiles() -> None:
    ten = long_tail_counts(5000, 10, imbalance_ratio=100)
    hundred = long_tail_counts(500, 100, imbalance_factor=0.01)
    assert (ten[0], ten[-1], sum(ten)) == (5000, 50, 12406)
    assert (hundred[0], hundred[-1], sum(hundred)) == (500, 5, 10847)


def test_metrics_are_passed_on() -> None:
    import shared_core.metrics

    assert focal_sam.metrics.ShotAccuracy is shared_core.metrics.ShotAccuracy
    assert shot_groups is shared_core.metrics.shot_groups
    with pytest.raises(AttributeError, match="Accuracies"):
        focal_sam.metrics.Accuracies  # noqa: B018


def test_shot_accuracy_by_hand() -> None:
    accuracy = focal_sam.metrics.ShotAccuracy([300, 50, 5])
    accuracy.update(torch.tensor([0, 0, 1, 0, 2, 0]), torch.tensor([0, 0, 1, 1, 2, 2]))
    found = {key: float(value) for key, value in accuracy.compute().items()}
    assert found["many"] == 1.0
    assert found["medium"] == found["few"] == 0.5


def test_nothing_optional_is_imported() -> None:
    modules = "adaptformer, data, metrics, models, presets, transforms"
    code = (
        f"import sys\nfrom focal_sam import {modules}\n"
        "heavy = {'torchvision', 'transformers', 'open_clip', 'datasets', 'torchmetrics', 'timm'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.strip() == "[]"


# Image lists


@pytest.mark.smoke
def test_image_list(images: Path) -> None:
    path = write(images, "train/a.png 0\n\ntrain/b c.png 2\r\n  train/d.png\t0  ")
    data = read_image_list(path, images)
    assert isinstance(data, ImageDataset)
    assert data.targets == [0, 2, 0]
    assert data.class_names == ["0", "1", "2"]
    assert [data[i][0].getpixel((0, 0)) for i in range(3)] == [(10, 0, 9), (20, 0, 9), (30, 0, 9)]
    assert data[1][1] == 2
    assert class_counts(data) == [2, 0, 1]


def test_image_list_with_names_and_a_transform(images: Path) -> None:
    path = write(images, "a.png 1\n")
    data = read_image_list(
        path,
        str(images / "train"),
        class_names=["eel", "newt", "toad"],
        transform=lambda image: (image.mode, image.size),
    )
    assert data[0] == (("RGB", (5, 4)), 1)
    assert class_counts(data) == [0, 1, 0]


def test_images_are_opened_when_asked_for(images: Path) -> None:
    path = write(images, "train/a.png 0\ntrain/missing.png 1\n")
    data = read_image_list(path, images)
    assert data[0][1] == 0
    with pytest.raises(InputError, match=r"list\.txt, line 2: .*missing\.png cannot be read"):
        data[1]


def test_damaged_image_names_its_line(images: Path) -> None:
    whole = (images / "train" / "d.png").read_bytes()
    (images / "train" / "half.png").write_bytes(whole[: len(whole) // 2])
    data = read_image_list(write(images, "train/a.png 0\n\n\ntrain/half.png 1"), images)
    with pytest.raises(InputError, match=r"line 4: .*half\.png cannot be read"):
        data[1]


def test_grey_images_become_rgb(images: Path) -> None:
    PIL.Image.new("L", (3, 3), 7).save(images / "grey.png")
    image, _ = read_image_list(write(images, "grey.png 0"), images)[0]
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == (7, 7, 7)


def test_image_list_goes_to_other_processes(images: Path) -> None:
    data = read_image_list(write(images, "train/a.png 0\ntrain/d.png 1"), images)
    again = pickle.loads(pickle.dumps(data))  # noqa: S301
    assert again[1][0].getpixel((0, 0)) == (30, 0, 9)


def test_long_tail_subset_of_an_image_list(images: Path) -> None:
    data = read_image_list(write(images, "train/a.png 0\ntrain/d.png 0\ntrain/b c.png 1"), images)
    subset = LongTailSubset(data, [1, 1])
    assert subset.targets == [0, 1]
    assert subset[1][0].getpixel((0, 0)) == (20, 0, 9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train/a.png 0\ntrain/d.png\n", r"list\.txt, line 2: expected a path and a class index"),
        ("train/a.png 0\n\ntrain/d.png cat\n", r"line 3: expected .*'train/d.png cat'"),
        ("train/a.png 1.5\n", r"line 1: expected"),
        ("train/a.png -1\n", r"line 1: label -1; class indices are at least 0$"),
        ("\n \n", r"has no lines; expected: path label"),
        ("\na.png 0\n", r"line 2: there is no image a\.png in"),
    ],
)
def test_bad_lists(images: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_image_list(write(images, text), images)


def test_label_beyond_the_names(images: Path) -> None:
    path = write(images, "train/a.png 0\ntrain/d.png 2\n")
    with pytest.raises(InputError, match=r"line 2: label 2; .* below the 2 classes"):
        read_image_list(path, images, class_names=["eel", "newt"])


def test_missing_and_binary_lists(images: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.txt cannot be read"):
        read_image_list(images / "nowhere.txt", images)
    (images / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"binary\.txt cannot be read"):
        read_image_list(images / "binary.txt", images)

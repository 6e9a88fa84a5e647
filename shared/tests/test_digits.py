import subprocess
import sys

import numpy as np
import pytest
import sklearn.datasets
import torch

from shared_core.data.digits import digit_arrays, load_digits
from shared_core.data.loading import ImageDataset, load_images
from shared_core.data.long_tail import LongTailSubset, class_counts
from shared_core.errors import InputError

# Where the first test images of seed 0 are in the whole set: the split must never change.
FIRST = [9, 10, 12, 16, 21, 22, 26, 28, 42, 46, 50, 54]


def test_the_images_are_those_of_scikit_learn() -> None:
    bunch = sklearn.datasets.load_digits()
    images, labels = digit_arrays()
    assert (images.dtype, labels.dtype) == (np.uint8, np.int64)
    assert (images == bunch.images).all()
    assert (labels == bunch.target).all()
    images[:] = 0
    assert digit_arrays()[0].max() == 16  # a copy was changed, not the data


@pytest.mark.smoke
@pytest.mark.parametrize("test_per_class", [1, 36, 70, 173])
def test_the_splits_share_out_every_class(test_per_class: int) -> None:
    train, train_labels = digit_arrays("train", test_per_class=test_per_class)
    test, test_labels = digit_arrays("test", test_per_class=test_per_class)
    assert np.bincount(test_labels).tolist() == [test_per_class] * 10
    assert len(train_labels) + len(test_labels) == 1797
    both = [(image.tobytes(), label) for image, label in zip(train, train_labels, strict=True)]
    both += [(image.tobytes(), label) for image, label in zip(test, test_labels, strict=True)]
    images, labels = digit_arrays()
    everything = [(image.tobytes(), label) for image, label in zip(images, labels, strict=True)]
    assert sorted(both) == sorted(everything)
    assert len(set(everything)) == 1797  # so the splits have no image in common


def test_splits_depend_on_the_seed_alone_and_are_nested() -> None:
    def members(**options: int) -> set[bytes]:
        return {image.tobytes() for image in digit_arrays("test", **options)[0]}

    assert members() == members(seed=0, test_per_class=36)
    assert len(members(seed=0) & members(seed=1)) < 150
    assert members(test_per_class=20) < members(test_per_class=70)
    chosen = members()
    places = [i for i, image in enumerate(digit_arrays()[0]) if image.tobytes() in chosen]
    assert places[:12] == FIRST


@pytest.mark.smoke
def test_as_a_data_set() -> None:
    train, test = load_digits("train"), load_images("digits", split="test")
    assert isinstance(test, ImageDataset)
    assert (len(train), len(test), len(load_digits())) == (1437, 360, 1797)
    assert test.class_names == list("0123456789")
    assert class_counts(test) == [36] * 10
    image, label = test[5]
    pixels, labels = digit_arrays("test")
    shown = np.asarray(image)
    assert shown.shape == (8, 8, 3)
    assert (np.rint(shown[..., 0] * (16 / 255)) == pixels[5]).all()
    assert (shown.min(), shown.max()) == (0, 255)
    assert label == labels[5]
    tail = LongTailSubset(train, [100, 51, 26, 13, 5] + [1] * 5)
    assert len(tail) == 200


def test_options_and_parts_through_the_loader() -> None:
    data = load_images("digits", split="test", test_per_class=70, seed=3, transform=np.asarray)
    assert len(data) == 700
    assert data[0][0].shape == (8, 8, 3)
    part = load_images("digits", split="test[10:20]", test_per_class=70, seed=3)
    assert part.targets == data.targets[10:20]
    assert (np.asarray(part[0][0]) == data[10][0]).all()
    assert len(load_images("digits", split="train[:10%]")) == 144
    assert len(load_images("digits", split="train[-5:]")) == 5


def test_a_linear_model_reads_them() -> None:
    images, labels = digit_arrays("train")
    held_out, truth = digit_arrays("test")
    x = torch.from_numpy(images.reshape(-1, 64).astype(np.float64)) / 16
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    y = torch.nn.functional.one_hot(torch.from_numpy(labels)).double()
    weights = torch.linalg.solve(x.T @ x + torch.eye(65), x.T @ y)
    z = torch.from_numpy(held_out.reshape(-1, 64).astype(np.float64)) / 16
    guess = (torch.cat([z, torch.ones(len(z), 1)], dim=1) @ weights).argmax(1)
    assert (guess.numpy() == truth).mean() > 0.9


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "valid"}, "split 'valid' is not known; accepted: train, test"),
        ({"test_per_class": 0}, "test_per_class=0; accepted: 1 to 173"),
        ({"test_per_class": 174}, "test_per_class=174; accepted: 1 to 173"),
        ({"seed": -1}, "seed=-1; it has to be at least 0"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    for load in (digit_arrays, load_digits):
        with pytest.raises(InputError, match=message):
            load(**{"split": "test"} | arguments)


def test_bad_arguments_through_the_loader() -> None:
    with pytest.raises(InputError, match="digits takes no option 'size'; accepted: seed, test_per"):
        load_images("digits", size=32)
    for split in ("train+test", "train[3]", "[:3]"):
        with pytest.raises(InputError, match=r"split '.*' is not known; accepted: a split such as"):
            load_images("digits", split=split)


@pytest.mark.smoke
def test_import_is_cheap() -> None:
    code = "import sys, shared_core.data.digits; assert 'sklearn' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

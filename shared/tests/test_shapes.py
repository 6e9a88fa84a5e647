import json
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from shared_core.data.loading import ImageDataset, load_images
from shared_core.data.long_tail import class_counts, long_tail_counts
from shared_core.data.shapes import (
    BACKGROUNDS,
    COLORS,
    FILLS,
    SHAPES,
    ShapesDataset,
    ShapesWorld,
    contact_sheet,
    image_tensor,
    load_shapes,
    ood_pairs,
    render,
)
from shared_core.errors import InputError

WORLD = ShapesWorld(seed=3)


def test_the_order_of_the_vocabularies() -> None:
    assert " ".join(SHAPES) == (
        "circle square triangle diamond pentagon hexagon star cross ring heart crescent arrow bar "
        "flower gear drop"
    )
    assert " ".join(COLORS) == (
        "red green blue yellow orange purple pink cyan brown white gray black"
    )
    assert " ".join(FILLS) == "solid striped dotted checkered gradient outlined"
    assert " ".join(BACKGROUNDS) == "plain noisy shaded gridded wavy speckled"


# Samples


@pytest.mark.smoke
def test_a_sample_is_what_its_attributes_say() -> None:
    images, attrs = WORLD.sample(500)
    assert (images.shape, images.dtype, attrs.dtype) == ((500, 32, 32, 3), np.uint8, np.int16)
    assert (images == render(*attrs.T, seed=3)).all()
    again, same = ShapesWorld(seed=3).sample(200)
    assert (again == images[:200]).all()
    assert (same == attrs[:200]).all()
    assert (ShapesWorld(seed=4).sample(200).attrs != same).any(axis=1).mean() > 0.9
    assert ShapesWorld(seed=3, size=48).sample(2).images.shape == (2, 48, 48, 3)


def test_samples_are_spread_evenly_over_the_values() -> None:
    attrs = ShapesWorld(seed=1, size=8).sample(6000).attrs
    for column, size in zip(attrs.T, (16, 12, 6, 6), strict=True):
        counts = np.bincount(column, minlength=size)
        expected = 6000 / size
        assert ((counts - expected) ** 2 / expected).sum() < size + 5 * np.sqrt(2 * size)
    joint = np.histogram2d(attrs[:, 0], attrs[:, 1], bins=(16, 12))[0]
    assert ((joint - 31.25) ** 2 / 31.25).sum() < 192 + 5 * np.sqrt(2 * 192)


def test_samples_of_some_values() -> None:
    batch = WORLD.sample(300, shapes=["star", 2], colors=[11], fills=("dotted",), backgrounds=[0])
    assert {tuple(row) for row in batch.attrs.tolist()} == {(6, 11, 2, 0), (2, 11, 2, 0)}
    pairs = [("circle", "red"), (1, 2), ("gear", 0)]
    batch = WORLD.sample(300, pairs=pairs, fills=["solid"])
    counts = dict.fromkeys([(0, 0), (1, 2), (14, 0)], 0)
    for shape, color, fill, _ in batch.attrs.tolist():
        counts[shape, color] += 1
        assert fill == 0
    assert min(counts.values()) > 70


def test_splits_have_nothing_in_common() -> None:
    splits = [WORLD.sample(400, split=split) for split in ("train", "validation", "test")]
    seen = [{image.tobytes() for image in batch.images} for batch in splits]
    assert [len(images) for images in seen] == [400] * 3
    assert len(set.union(*seen)) == 1200
    sets = {split: WORLD.classification("color", 5, split=split) for split in ("train", "test")}
    sets |= WORLD.id_ood(n=60) | {f"base-{k}": v for k, v in WORLD.base_new(3, 4).items()}
    # The same numbers come back where the same split is asked for again, and nowhere else.
    split_of = {}
    for data in sets.values():
        assert len(set(data.indices.tolist())) == len(data)
        for index in data.indices.tolist():
            assert split_of.setdefault(index, data.split) == data.split
    base_new = WORLD.base_new(3, 4)
    assert not set(base_new["base"].indices) & set(base_new["new"].indices)


# Captions

WORDS = {
    word: (column, index)
    for column, vocabulary in enumerate((SHAPES, COLORS, FILLS, BACKGROUNDS))
    for index, word in enumerate(vocabulary)
}
FILLERS = {"a", "photo", "of", "the", "nice", "picture", "good", "this", "is", "on", "background"}


def parse(caption: str) -> dict[int, int]:
    """What a caption says: column -> index."""
    said = {}
    for word in caption.split():
        if word in WORDS:
            column, index = WORDS[word]
            assert column not in said
            said[column] = index
        else:
            assert word in FILLERS
    return said


@pytest.mark.smoke
def test_captions_say_what_is_there() -> None:
    attrs = ShapesWorld(0, size=8).sample(4000).attrs
    captions = WORLD.captions(attrs, seed=5)
    said = [parse(caption) for caption in captions]
    for row, mentions in zip(attrs.tolist(), said, strict=True):
        assert mentions
        assert all(row[column] == index for column, index in mentions.items())
    assert max(len(caption.split()) for caption in captions) <= 12
    named = [tuple(sorted(mentions)) for mentions in said]
    expected = {
        (0, 1): 0.30, (0, 1, 2): 0.15, (0,): 0.15, (0, 2): 0.08, (1,): 0.08, (2,): 0.06,
        (3,): 0.06,
    }  # fmt: skip
    for mentions, share in expected.items():
        assert abs(named.count(mentions) / 4000 - share) < 0.03
    with_background = [c for c, m in zip(captions, said, strict=True) if 0 in m and 3 in m]
    assert abs(len(with_background) / 4000 - 0.12) < 0.025
    assert all(re.search(r"on a \w+ background$", caption) for caption in with_background)
    starts = ("a photo of a ", "the nice ", "a picture of the ", "a good photo of the ")
    wrapped = [caption for caption in captions if not caption.startswith("this is")]
    shares = [np.mean([c.startswith(start) for c in wrapped]) for start in starts]
    assert np.allclose(shares, 0.2, atol=0.03)
    assert not any("this is" in caption for caption in wrapped)


def test_the_other_styles() -> None:
    attrs = WORLD.sample(200).attrs
    for row, full, simple in zip(
        attrs.tolist(),
        WORLD.captions(attrs, 0, "full"),
        WORLD.captions(attrs, 0, "simple"),
        strict=True,
    ):
        assert parse(full) == dict(enumerate(row))
        assert simple == f"{COLORS[row[1]]} {SHAPES[row[0]]}"


def test_captions_without_an_object_name_the_background() -> None:
    attrs = np.array([[-1, -1, -1, background] for background in range(6)] * 20)
    for style in ("clip", "full", "simple"):
        for row, caption in zip(attrs, WORLD.captions(attrs, 1, style), strict=True):
            assert parse(caption) == {3: row[3]}


def test_caption_i_depends_on_the_seed_and_row_i() -> None:
    attrs = WORLD.sample(100).attrs
    captions = WORLD.captions(attrs, seed=1)
    assert WORLD.captions(attrs[:30], seed=1) == captions[:30]
    assert ShapesWorld(8).captions(attrs, seed=1) == captions
    changed = attrs.copy()
    changed[50:] = 0
    assert WORLD.captions(changed, seed=1)[:50] == captions[:50]
    assert WORLD.captions(attrs, seed=2) != captions


# Data sets


@pytest.mark.parametrize(
    ("classes", "column", "names"),
    [("shape", 0, SHAPES), ("color", 1, COLORS)],
)
def test_classes_of_one_attribute(classes: str, column: int, names: tuple) -> None:
    data = WORLD.classification(classes, 30)
    assert data.class_names == list(names)
    assert class_counts(data) == [30] * len(names)
    assert data.attrs[:, column].tolist() == data.targets
    assert (data.images == render(*data.attrs.T, seed=3, indices=data.indices)).all()
    others = np.delete(data.attrs, column, axis=1)
    assert all(len(np.unique(values)) > 5 for values in others.T)


@pytest.mark.smoke
def test_classes_of_a_shape_and_a_color() -> None:
    data = WORLD.classification("shape_color", 2)
    assert (len(data), data.class_names[13]) == (384, "green square")
    pairs = data.attrs[:, :2].tolist()
    assert all(12 * s + c == y for (s, c), y in zip(pairs, data.targets, strict=True))
    chosen = WORLD.classification([("star", "red"), (0, 9)], 5, fills=["solid"])
    assert chosen.class_names == ["red star", "white circle"]
    assert {tuple(row[:3]) for row in chosen.attrs.tolist()} == {(6, 0, 0), (0, 9, 0)}
    some = WORLD.classification("shape", 4, shapes=["bar", "ring"], colors=[3], split="test")
    assert (some.class_names, some.split) == (["bar", "ring"], "test")
    assert set(some.attrs[:, 1].tolist()) == {3}


def test_items_are_pil_images_and_labels() -> None:
    data = WORLD.classification("shape", 2)
    assert isinstance(data, ImageDataset)
    image, label = data[5]
    assert (image.mode, image.size, label) == ("RGB", (32, 32), data.targets[5])
    assert (np.asarray(image) == data.images[5]).all()
    transformed = WORLD.classification("shape", 2, transform=lambda x: image_tensor(np.array([x])))
    batch, labels = next(iter(DataLoader(transformed, batch_size=4)))
    assert batch.shape == (4, 1, 3, 32, 32)
    assert labels.tolist() == data.targets[:4]


def test_lazy_images_are_the_same_images() -> None:
    data, lazy = (WORLD.classification("shape", 3, lazy=lazy) for lazy in (False, True))
    assert len(lazy.images) == len(lazy) == 48
    for i in (0, 17, -1):
        assert (np.asarray(lazy[i][0]) == np.asarray(data[i][0])).all()
        assert lazy[i][1] == data[i][1]
    assert (lazy.images[10:20][3] == data.images[13]).all()
    with pytest.raises(IndexError):
        lazy[48]
    copied = pickle.loads(pickle.dumps(lazy))  # noqa: S301
    assert (np.asarray(copied[7][0]) == data.images[7]).all()
    huge = WORLD.classification("shape", 100_000, lazy=True)
    assert np.asarray(huge[1_234_567][0]).shape == (32, 32, 3)


def test_smaller_counts_select_a_part_of_larger_ones() -> None:
    balanced = WORLD.classification("shape", 20)
    tail = WORLD.classification("shape", counts=WORLD.long_tail(16, 20, imbalance=20))
    assert class_counts(tail) == long_tail_counts(20, 16, imbalance_ratio=20, rounding="nearest")
    index = {number: i for i, number in enumerate(balanced.indices.tolist())}
    places = [index[number] for number in tail.indices.tolist()]
    assert (balanced.images[places] == tail.images).all()
    assert places == sorted(places)
    assert balanced.targets != sorted(balanced.targets)  # mixed
    first = np.bincount(balanced.targets[:160], minlength=16)
    assert first.min() >= 3


# Splits


def test_known_and_unknown_pairs() -> None:
    pairs = ood_pairs()
    shapes = {name: {s for s, _ in chosen} for name, chosen in pairs.items()}
    colors = {name: {c for _, c in chosen} for name, chosen in pairs.items()}
    assert {name: len(set(chosen)) for name, chosen in pairs.items()} == {
        "id": 16, "near": 48, "far": 12
    }  # fmt: skip
    assert pairs["id"][:4] == [(0, 0), (0, 3), (1, 1), (1, 4)]
    assert pairs["id"][-2:] == [(7, 1), (7, 4)]
    assert (shapes["id"], colors["id"]) == (set(range(8)), set(range(6)))
    assert (shapes["far"], colors["far"]) == (set(range(12, 16)), set(range(9, 12)))
    for shape, color in pairs["near"]:
        unknown = (shape not in shapes["id"], color not in colors["id"])
        assert sum(unknown) == 1
        assert shape in shapes["id"] | shapes["far"]
        assert color in colors["id"] | colors["far"]


@pytest.mark.smoke
def test_in_and_out_of_distribution() -> None:
    sets = WORLD.id_ood(n=100)
    assert list(sets) == ["id", "near", "far", "textures"]
    pairs = ood_pairs()
    for name, data in sets.items():
        assert isinstance(data, ShapesDataset)
        assert len(data) == 100
        assert data.images.shape == (100, 32, 32, 3)
        counts = class_counts(data)
        assert max(counts) - min(counts) <= 1
        if name != "textures":
            shown = data.attrs[:, :2].tolist()
            assert all(
                tuple(pair) == pairs[name][y] for pair, y in zip(shown, data.targets, strict=True)
            )
    textures = sets["textures"]
    assert (textures.attrs[:, :3] == -1).all()
    assert textures.attrs[:, 3].tolist() == textures.targets
    assert textures.class_names == list(BACKGROUNDS)
    proxies = WORLD.classification(pairs["id"], 16)
    assert proxies.class_names == sets["id"].class_names
    assert not set(proxies.indices) & set(sets["id"].indices)
    assert len(WORLD.id_ood()["near"]) == 800


def test_base_and_new_classes() -> None:
    six = {"shapes": range(6), "colors": range(6)}
    splits = WORLD.base_new(18, 18, n_per_class=16, n_test=10, **six)
    assert {name: len(data) for name, data in splits.items()} == {
        "train": 288, "base": 180, "new": 180
    }  # fmt: skip
    train, base, new = splits.values()
    assert (train.split, base.split, new.split) == ("train", "test", "test")
    assert train.class_names == base.class_names
    assert not set(base.class_names) & set(new.class_names)
    assert set(base.attrs[:, 0].tolist()) == {0, 1, 2}
    assert set(new.attrs[:, 0].tolist()) == {3, 4, 5}
    assert class_counts(new) == [10] * 18
    assert [new.class_names[y] for y in new.targets] == [
        f"{COLORS[color]} {SHAPES[shape]}" for shape, color in new.attrs[:, :2].tolist()
    ]
    pairs = WORLD.base_new(1, 1, classes=[("star", "red"), ("bar", "blue")])
    assert pairs["new"].class_names == ["blue bar"]


@pytest.mark.parametrize(("classes", "most", "imbalance"), [(16, 500, 100), (2, 9, 4), (1, 7, 3)])
def test_long_tails_are_exact(classes: int, most: int, imbalance: int) -> None:
    counts = WORLD.long_tail(classes, most, imbalance)
    assert counts == [
        max(1, round(most * imbalance ** (-c / max(classes - 1, 1)))) for c in range(classes)
    ]
    shuffled = WORLD.long_tail(classes, most, imbalance, order="random")
    assert sorted(shuffled, reverse=True) == counts
    assert WORLD.long_tail(classes, most, 1) == [most] * classes


def test_long_tails_in_random_order() -> None:
    orders = [tuple(ShapesWorld(s).long_tail(16, 500, 100, order="random")) for s in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert list(orders[0]) != sorted(orders[0], reverse=True)
    assert WORLD.long_tail(4, 100, 10, "step") == [100, 100, 10, 10]


def test_descriptions_are_json() -> None:
    for data in [*WORLD.id_ood(n=12).values(), WORLD.classification("shape", 2, fills=["dotted"])]:
        assert json.loads(json.dumps(data.describe())) == data.describe()
    description = data.describe()
    assert description | {"backgrounds": [], "colors": []} == {
        "seed": 3, "size": 32, "split": "train", "images": 32,
        "classes": dict.fromkeys(SHAPES, 2), "shapes": list(SHAPES), "fills": ["dotted"],
        "backgrounds": [], "colors": [],
    }  # fmt: skip
    assert set(description["colors"]) <= set(COLORS)
    textures = WORLD.id_ood(n=12)["textures"].describe()
    assert (textures["shapes"], textures["backgrounds"]) == ([], list(BACKGROUNDS))


# The loader


@pytest.mark.smoke
def test_through_the_loader() -> None:
    data = load_images("shapes", split="test", seed=3, n_per_class=4, classes="color")
    assert isinstance(data, ImageDataset)
    same = WORLD.classification("color", 4, split="test")
    assert (data.images == same.images).all()
    assert (data.targets, data.class_names) == (same.targets, same.class_names)
    part = load_images(
        "shapes", split="test[8:-8]", seed=3, n_per_class=4, classes="color",
        lazy=True, transform=np.asarray,
    )  # fmt: skip
    assert len(part) == 32
    assert (part[0][0] == same.images[8]).all()
    assert part[0][1] == same.targets[8]
    percent = load_images("shapes", split="test[50%:]", seed=3, n_per_class=4, classes="color")
    assert percent.targets == same.targets[24:]
    splits = [load_images("shapes", split=split) for split in ("train", "validation", "test")]
    assert [len(split) for split in splits] == [8000, 1600, 1600]
    everything = {image.tobytes() for split in splits for image in split.images}
    assert len(everything) == 11_200
    assert load_shapes("test").targets == splits[2].targets


# Looking at them


def test_contact_sheets_show_every_image() -> None:
    images = WORLD.sample(7).images
    sheet = np.asarray(contact_sheet(images, columns=3, zoom=2))
    assert sheet.shape == (3 * 66 + 2, 3 * 66 + 2, 3)
    for i, image in enumerate(images):
        top, left = 2 + 66 * (i // 3), 2 + 66 * (i % 3)
        assert (sheet[top : top + 64 : 2, left + 1 : left + 65 : 2] == image).all()
    assert (sheet[134:, 68:] == 255).all()
    assert contact_sheet(images, zoom=1).size == (3 * 34 + 2, 3 * 34 + 2)


def test_image_tensors() -> None:
    images = WORLD.sample(3).images
    tensor = image_tensor(images)
    assert (tensor.dtype, tensor.shape) == (torch.float32, (3, 3, 32, 32))
    assert tensor.is_contiguous()
    assert (tensor[1, 2, 5, 7] * 255).round() == images[1, 5, 7, 2]
    assert 0 <= tensor.min() < tensor.max() <= 1


# Bad input


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ShapesWorld(-1), "seed=-1; it has to be at least 0"),
        (lambda: ShapesWorld(0, 4), "size=4; accepted: 8 to 512 pixels"),
        (lambda: WORLD.sample(0), "n is 0; it has to be at least 1"),
        (lambda: WORLD.sample(1, split="valid"), "'valid' is not known; accepted: train, valid"),
        (lambda: WORLD.sample(1, split="near"), "'near' is not known; accepted: train, valid"),
        (lambda: WORLD.sample(1, shapes=["disc"]), "'disc' is none of the shapes; accepted: 0 to"),
        (lambda: WORLD.sample(1, colors=[12]), "12 is none of the colors; accepted: 0 to 11, or"),
        (lambda: WORLD.sample(1, colors=[-1]), "-1 is none of the colors; accepted: 0 to 11, or"),
        (lambda: WORLD.sample(1, fills=[]), "fills is empty; name at least one"),
        (lambda: WORLD.sample(1, backgrounds=[0, "plain"]), "backgrounds holds 0 twice; name each"),
        (lambda: WORLD.sample(1, pairs=[(0, 0)], shapes=[0]), "leave out shapes and colors"),
        (lambda: WORLD.sample(1, pairs=["star"]), "'star' is no pair of a shape and a color"),
        (lambda: WORLD.sample(1, pairs=[(0, 1, 2)]), r"\(0, 1, 2\) is no pair of a shape and a"),
        (lambda: WORLD.sample(1, pairs=[(0, 1), ("circle", 1)]), r"pairs holds \(0, 1\) twice"),
        (lambda: WORLD.sample(1, pairs=[]), "pairs is empty; name at least one"),
        (
            lambda: WORLD.captions(np.zeros((1, 4), int), 0, "long"),
            "style 'long' is not known; acc",
        ),
        (lambda: WORLD.captions(np.zeros((1, 4), int), -1), "seed=-1; it has to be at least 0"),
        (lambda: WORLD.captions(np.full((1, 4), 6), 0), "6 is none of the fills; accepted: 0 to 5"),
        (lambda: WORLD.classification("shape"), "n_per_class=None and counts=None; give exactly"),
        (lambda: WORLD.classification("shape", 1, counts=[1]), "give exactly one of them"),
        (lambda: WORLD.classification("shape", 0), "n_per_class is 0; it has to be at least 1"),
        (lambda: WORLD.classification("size", 1), "classes 'size' are not known; accepted: shape,"),
        (lambda: WORLD.classification("color", counts=[1]), r"counts=\[1\] for 12 classes; give"),
        (lambda: WORLD.classification([(0, 0)], counts=[0]), r"counts=\[0\] for 1 classes"),
        (lambda: WORLD.classification([(0, 0)], counts=[-1]), r"counts=\[-1\] for 1 classes"),
        (lambda: WORLD.classification([(0, 0)], 1, colors=[0]), "leave out shapes and colors"),
        (lambda: WORLD.classification("shape", 1, split="all"), "split 'all' is not known"),
        (lambda: WORLD.base_new(0, 1), "k_base is 0; it has to be at least 1"),
        (lambda: WORLD.base_new(1, 1, n_test=0), "n_test is 0; it has to be at least 1"),
        (lambda: WORLD.base_new(10, 7, classes="shape"), r"k_base \+ k_new = 17, but there are 16"),
        (lambda: WORLD.base_new(1, 1, classes=[(0, 0), (1, 1)], shapes=[0]), "leave out shapes"),
        (lambda: WORLD.id_ood("full"), "preset 'full' is not known; accepted: demo"),
        (lambda: WORLD.id_ood(n=0), "n is 0; it has to be at least 1"),
        (
            lambda: WORLD.long_tail(3, 9, 2, order="none"),
            "order 'none' is not known; accepted: ind",
        ),
        (lambda: WORLD.long_tail(3, 9, 0.5), "imbalance_ratio=0.5"),
        (lambda: contact_sheet(np.zeros((0, 8, 8, 3), np.uint8)), "the number of images is 0"),
        (lambda: contact_sheet(np.zeros((1, 8, 8, 3), np.uint8), 0), "columns is 0"),
        (lambda: contact_sheet(np.zeros((1, 8, 8, 3), np.uint8), zoom=0), "zoom is 0"),
        (lambda: load_images("shapes", split="all"), "split 'all' is not known; accepted: train,"),
        (
            lambda: load_images("shapes", colour=1),
            "shapes takes no option 'colour'; accepted: back",
        ),
        (
            lambda: load_images("shapes", split="test[1:2:3]"),
            "accepted: a split such as test, test",
        ),
    ],
)
def test_bad_arguments(call: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.smoke
def test_import_is_cheap() -> None:
    code = (
        "import sys, shared_core.data.shapes; "
        "assert not {'sklearn', 'scipy', 'matplotlib', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Learning


def test_a_small_conv_net_tells_shapes_apart() -> None:
    """Three shapes in all colors, fills and backgrounds, from images of other numbers."""
    world, shapes = ShapesWorld(0, size=24), ["circle", "star", "bar"]
    train = world.classification("shape", 400, shapes=shapes)
    test = world.classification("shape", 100, shapes=shapes, split="test")
    x, y = image_tensor(train.images) - 0.5, torch.tensor(train.targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 16, 5, padding=2), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(32 * 9, 3),
        )  # fmt: skip
        optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.05)
        for _ in range(6):
            for chosen in torch.randperm(len(x)).split(50):
                loss = nn.functional.cross_entropy(net(x[chosen]), y[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    net.eval()
    with torch.no_grad():
        guess = net(image_tensor(test.images) - 0.5).argmax(1)
    assert (guess == torch.tensor(test.targets)).float().mean() > 0.9

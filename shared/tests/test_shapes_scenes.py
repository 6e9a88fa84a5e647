import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_core.data._attributes import COLOR_VALUES
from shared_core.data._draws import uniforms
from shared_core.data._scenes import class_chain, co_occurrence
from shared_core.data.shapes import COLORS, SHAPES, MultiLabelScenes, Scenes, ShapesWorld
from shared_core.errors import InputError
from shared_core.testing import examples

WORLD = ShapesWorld(seed=3)
HASH = "385270cac2421be34ac7914d4155298e7cf7c115091592c1d1e1690b888c01cd"


@pytest.mark.smoke
def test_the_bytes_never_change() -> None:
    scenes = WORLD.multilabel(20)
    assert scenes.images.shape == (20, 64, 64, 3)
    parts = (scenes.images, scenes.instance, scenes.part, scenes.boxes, scenes.attrs, scenes.labels)
    assert hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest() == HASH


def test_a_scene_depends_on_its_number_alone() -> None:
    many, few = WORLD.multilabel(150, size=32), WORLD.multilabel(30, size=32)
    for name, values in vars(few).items():
        if name != "class_names":
            assert (values == getattr(many, name)[:30]).all()
    held_out = WORLD.multilabel(150, size=32, split="test")
    assert (held_out.images != many.images).any(axis=(1, 2, 3)).all()
    other = ShapesWorld(4).multilabel(150, size=32)
    assert (other.images != many.images).any(axis=(1, 2, 3)).all()


def check(scenes: Scenes) -> None:
    """What holds for all scenes, object by object."""
    n, slots, _ = scenes.attrs.shape
    size = scenes.images.shape[1]
    masks = scenes.masks
    assert masks.shape == (n, slots, size, size)
    for i, k in itertools.product(range(n), range(slots)):
        shape, color, fill, background = scenes.attrs[i, k]
        ys, xs = np.nonzero(masks[i, k])
        if shape < 0:
            assert ys.size == 0
            assert scenes.attrs[i, k].tolist() == scenes.boxes[i, k].tolist() == [-1] * 4
            continue
        box = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        assert scenes.boxes[i, k].tolist() == box
        assert (scenes.instance[i][masks[i, k]] == k + 1).all()
        assert (scenes.semantic[i][masks[i, k]] == shape + 1).all()
        assert 0 <= color < 12
        assert 0 <= fill < 6
        assert 0 <= background < 6
    union = masks.any(axis=1)
    assert ((scenes.semantic > 0) == union).all()
    assert (masks.sum(axis=1) <= 1).all()
    assert ((scenes.part > 0) == union).all()
    assert set(np.unique(scenes.part)) <= {0, 1, 2}


@examples(12)
@given(
    seed=st.integers(0, 2**40),
    size=st.sampled_from([16, 40, 64]),
    objects=st.sampled_from([(1, 1), (1, 3), (2, 5), (16, 16)]),
)
def test_masks_boxes_and_maps_agree(seed: int, size: int, objects: tuple[int, int]) -> None:
    scenes = ShapesWorld(seed).segmentation(6, size=size, objects=objects)
    check(scenes)
    assert len(scenes) == 6
    found = (scenes.attrs[:, :, 0] >= 0).sum(axis=1)
    assert found.max() <= objects[1]
    assert found.min() >= 1


@pytest.mark.smoke
def test_objects_are_counted_and_spread() -> None:
    scenes = WORLD.segmentation(600, size=32, objects=(1, 3))
    check(scenes)
    found = (scenes.attrs[:, :, 0] >= 0).sum(axis=1)
    assert np.allclose(np.bincount(found, minlength=4)[1:] / 600, 1 / 3, atol=0.07)
    present = scenes.attrs[scenes.attrs[:, :, 0] >= 0]
    for column, values in enumerate((16, 12, 6, 6)):
        counts = np.bincount(present[:, column], minlength=values)
        assert counts.min() > 0.6 * len(present) / values
    assert (present[:, 3] >= 0).all()
    backgrounds = np.where(scenes.attrs[:, :, 0] >= 0, scenes.attrs[:, :, 3], -1)
    assert all(len(set(row) - {-1}) == 1 for row in backgrounds.tolist())


def test_later_objects_cover_at_most_two_fifths_of_earlier_ones() -> None:
    most = 6
    scenes = WORLD.segmentation(120, objects=(most, most))
    hidden = 0
    for k in range(most):
        # Without the later objects, the last of k + 1 is whole, and where it was.
        whole = WORLD.segmentation(120, objects=(k + 1, k + 1)).masks[:, k]
        visible = scenes.masks[:, k]
        assert not (visible & ~whole).any()
        share = visible.sum(axis=(1, 2)) / np.maximum(whole.sum(axis=(1, 2)), 1)
        placed = whole.any(axis=(1, 2))
        assert (share[placed] >= 0.6).all()
        hidden += (share[placed] < 0.999).sum()
    assert hidden > 100  # they do cover each other


def test_crowded_scenes_leave_objects_out() -> None:
    scenes = WORLD.segmentation(40, objects=(16, 16))
    found = (scenes.attrs[:, :, 0] >= 0).sum(axis=1)
    assert 6 < found.min() < 16
    assert found.mean() < 15.5
    check(scenes)


def test_objects_are_painted_where_their_masks_are() -> None:
    scenes = WORLD.segmentation(200, fills=["solid"], backgrounds=["plain"], objects=(1, 4))
    for i, k in itertools.product(range(200), range(4)):
        shape, color, _, _ = scenes.attrs[i, k]
        if shape >= 0:
            shown = np.median(scenes.images[i][scenes.masks[i, k]], axis=0)
            assert abs(shown - COLOR_VALUES[color]).max() / 255 < 0.15
    # The background keeps away from a single object's luminance.
    luminance = scenes.images @ np.array([0.299, 0.587, 0.114]) / 255
    single = np.flatnonzero((scenes.attrs[:, :, 0] >= 0).sum(axis=1) == 1)
    for i in single:
        apart = np.median(luminance[i][scenes.semantic[i] > 0])
        apart -= np.median(luminance[i][scenes.semantic[i] == 0])
        assert abs(apart) > 0.2


def test_parts_are_the_rim_and_what_it_leaves() -> None:
    scenes = WORLD.segmentation(60, shapes=["circle"], objects=(1, 1), size=96)
    rows, columns = np.mgrid[:96, :96]
    for mask, part, box in zip(scenes.masks[:, 0], scenes.part, scenes.boxes[:, 0], strict=True):
        left, top, right, bottom = box
        r = np.hypot(columns + 0.5 - (left + right) / 2, rows + 0.5 - (top + bottom) / 2)
        inner, outer = r[part == 1], r[part == 2]
        assert inner.max() < outer.max()
        radius = (right - left) / 2
        assert abs(inner.max() / radius - (0.95 - 0.14) / 0.95) < 0.08
        assert outer.min() > inner.max() - 1.5
        assert ((part > 0) == mask).all()


# Labels


@pytest.mark.smoke
@pytest.mark.parametrize("label", ["shape", "shape_color"])
def test_labels_are_the_visible_classes(label: str) -> None:
    scenes = WORLD.multilabel(150, label=label, min_pixels=60, max_objects=5)
    check(scenes)
    expected = np.zeros_like(scenes.labels)
    pixels: dict[tuple[int, str], int] = {}
    for i, k in itertools.product(range(150), range(5)):
        shape, color, *_ = scenes.attrs[i, k]
        name = SHAPES[shape] if label == "shape" else f"{COLORS[color]} {SHAPES[shape]}"
        if shape >= 0:
            pixels[i, name] = pixels.get((i, name), 0) + int(scenes.masks[i, k].sum())
    for (i, name), count in pixels.items():
        expected[i, scenes.class_names.index(name)] = count >= 60
    assert (scenes.labels == expected).all()
    assert len(scenes.class_names) == (16 if label == "shape" else 192)
    assert min(pixels.values()) < 60 < max(pixels.values())  # the threshold decided something


def test_the_threshold_follows_the_size() -> None:
    for size, pixels in ((64, 25), (128, 100), (16, 2), (8, 1)):
        scenes, same = (
            WORLD.multilabel(40, size=size, min_pixels=threshold) for threshold in (None, pixels)
        )
        assert (scenes.labels == same.labels).all()
    assert WORLD.multilabel(100, size=32).labels.sum(axis=1).min() >= 1


def test_classes_of_some_shapes_and_colors() -> None:
    scenes = WORLD.multilabel(
        80, size=32, label="shape_color", shapes=["ring", "bar"], colors=["red", "cyan", 0 + 3],
        fills=["solid"], backgrounds=["wavy"], max_objects=3,
    )  # fmt: skip
    assert isinstance(scenes, MultiLabelScenes)
    assert scenes.class_names == [
        "red ring", "cyan ring", "yellow ring", "red bar", "cyan bar", "yellow bar"
    ]  # fmt: skip
    present = scenes.attrs[scenes.attrs[:, :, 0] >= 0]
    assert set(present[:, 0].tolist()) == {8, 12}
    assert set(present[:, 1].tolist()) == {0, 7, 3}
    assert set(present[:, 2].tolist()) == {0}
    assert set(present[:, 3].tolist()) == {4}
    only = WORLD.multilabel(20, size=32, shapes=["star"])
    assert (only.labels == 1).all()


def frequencies(scenes: MultiLabelScenes) -> np.ndarray:
    shapes = scenes.attrs[:, :, 0]
    counts = np.bincount(shapes[shapes >= 0], minlength=16)
    return counts / counts.sum()


@pytest.mark.parametrize(("tail", "imbalance"), [("exp", 50), ("step", 10), ("exp", 1)])
def test_classes_follow_the_tail(tail: str, imbalance: int) -> None:
    n = 3000
    scenes = WORLD.multilabel(n, size=16, tail=tail, imbalance=imbalance)
    ratio = imbalance ** (-np.arange(16) / 15)
    if tail == "step":
        ratio = np.where(np.arange(16) < 8, 1, 1 / imbalance)
    expected = ratio / ratio.sum()
    # 7500 objects, correlated within a scene: twice the binomial variance.
    error = abs(frequencies(scenes) - expected) / np.sqrt(2 * expected * (1 - expected) / (2.5 * n))
    assert error.max() < 4
    if imbalance > 1:
        assert np.corrcoef(scenes.labels.mean(axis=0), expected)[0, 1] > 0.98
        head, rare = scenes.labels[:, :5], scenes.labels[:, 11:]
        assert (head.any(axis=1) & rare.any(axis=1)).sum() > 100  # they meet


def test_the_tail_in_random_order() -> None:
    scenes = WORLD.multilabel(1500, size=16, order="random")
    counts = np.array(WORLD.long_tail(16, 10**6, 50, order="random"))
    assert np.corrcoef(frequencies(scenes), counts)[0, 1] > 0.98
    assert np.corrcoef(frequencies(scenes), np.sort(counts)[::-1])[0, 1] < 0.9


@pytest.mark.parametrize(
    ("classes", "imbalance"), [(16, 50), (192, 100), (2, 1), (3, 1000), (1, 1)]
)
def test_co_occurrence_has_its_marginal(classes: int, imbalance: int) -> None:
    marginal = imbalance ** (-np.arange(classes) / max(classes - 1, 1))
    marginal /= marginal.sum()
    joint = co_occurrence(marginal, seed=1)
    np.testing.assert_allclose(joint, joint.T, atol=1e-15)
    np.testing.assert_allclose(joint.sum(axis=0), marginal, atol=1e-9)
    assert (joint > 0).all()


def test_co_occurrence_has_blocks() -> None:
    joint = co_occurrence(np.full(64, 1 / 64), seed=5)
    # With a uniform marginal, the lift is the affinity but for a mild scaling.
    lift = joint * 64 * 64
    off = lift[~np.eye(64, dtype=bool)].reshape(64, 63)
    friends = (off > 0.6 * off.max(axis=1, keepdims=True)).sum(axis=1)
    assert np.unique(friends).tolist() == [15]  # four blocks of 16
    assert np.diag(lift).max() < 0.2 * off.max()
    assert off.min() > 0.05
    other = co_occurrence(np.full(64, 1 / 64), seed=6)
    assert abs(joint - other).max() > 1e-4


def test_class_chains_follow_the_joint_distribution() -> None:
    joint = co_occurrence(np.array([0.4, 0.3, 0.2, 0.1]), seed=1)
    chain = class_chain(joint, uniforms(0, "object", np.arange(60_000), 4))
    for slot in range(4):
        shares = np.bincount(chain[:, slot], minlength=4) / 60_000
        np.testing.assert_allclose(shares, [0.4, 0.3, 0.2, 0.1], atol=0.01)
    for slot in range(3):
        pairs = np.histogram2d(chain[:, slot], chain[:, slot + 1], bins=range(5))[0] / 60_000
        np.testing.assert_allclose(pairs, joint, atol=0.01)
    ends = class_chain(joint, np.array([[0.0, 0.0], [1 - 2**-53, 1 - 2**-53]]))
    assert ends.tolist() == [[0, 0], [3, 3]]


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: WORLD.multilabel(0), "n is 0; it has to be at least 1"),
        (lambda: WORLD.multilabel(1, size=600), "size=600; accepted: 8 to 512 pixels"),
        (lambda: WORLD.multilabel(1, max_objects=0), "1 to 0 objects; accepted: from 1 to 16"),
        (lambda: WORLD.multilabel(1, max_objects=17), "1 to 17 objects; accepted: from 1 to 16"),
        (lambda: WORLD.multilabel(1, label="color"), "label 'color' is not known; accepted: shape"),
        (lambda: WORLD.multilabel(1, tail="zipf"), "profile 'zipf' is not known; accepted: exp"),
        (lambda: WORLD.multilabel(1, imbalance=0.5), "imbalance_ratio=0.5; it has to be finite"),
        (lambda: WORLD.multilabel(1, order="up"), "order 'up' is not known; accepted: index"),
        (lambda: WORLD.multilabel(1, min_pixels=0), "min_pixels is 0; it has to be at least 1"),
        (lambda: WORLD.multilabel(1, split="all"), "split 'all' is not known; accepted: train"),
        (lambda: WORLD.segmentation(1, objects=(3, 2)), "3 to 2 objects; accepted: from 1 to 16"),
        (lambda: WORLD.segmentation(1, objects=(0, 2)), "0 to 2 objects; accepted: from 1 to 16"),
        (lambda: WORLD.segmentation(0), "n is 0; it has to be at least 1"),
        (lambda: WORLD.segmentation(1, shapes=["disc"]), "'disc' is none of the shapes"),
    ],
)
def test_bad_arguments(call: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()

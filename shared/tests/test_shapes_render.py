import hashlib
import itertools
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_core.data._attributes import COLOR_VALUES
from shared_core.data._draws import box_muller, noise, permutation, pick, uniforms
from shared_core.data._render import (
    BACKGROUND_DRAWS,
    OBJECT_DRAWS,
    Objects,
    _background_field,
    background_color,
    draw_objects,
    interior,
    paint,
    silhouettes,
)
from shared_core.data.shapes import BACKGROUNDS, COLORS, FILLS, SHAPES, render
from shared_core.errors import InputError
from shared_core.testing import examples

LUMINANCE = np.array([0.299, 0.587, 0.114])


def mixed(n: int) -> list[np.ndarray]:
    """Attributes that go through all values in different orders."""
    i = np.arange(n)
    return [i % 16, i // 3 % 12, i // 7 % 6, i // 5 % 6]


def digest(images: np.ndarray) -> str:
    return hashlib.sha256(images.tobytes()).hexdigest()


# Determinism

HASH = "04971f4c70f26263f407ad0f5d3f503e406711269b9489ff5ae675948801568d"


@pytest.mark.smoke
def test_the_bytes_never_change() -> None:
    images, masks = render(*mixed(64), seed=0, return_mask=True)
    assert (images.shape, images.dtype) == ((64, 32, 32, 3), np.uint8)
    assert (masks.shape, masks.dtype) == ((64, 32, 32), bool)
    assert digest(images) == HASH


def test_the_bytes_do_not_depend_on_the_processor() -> None:
    config = np.show_config(mode="dicts")
    found = config["SIMD Extensions"].get("found", [])  # what numpy would choose at run time
    code = (
        "import hashlib, numpy as np; from shared_core.data._render import draw_images; "
        "i = np.arange(64); kinds = np.stack([i % 16, i // 3 % 12, i // 7 % 6, i // 5 % 6], 1); "
        "images, _ = draw_images(kinds, i, 0, 32); "
        "print(hashlib.sha256(images.tobytes()).hexdigest())"
    )
    environment = {**os.environ, "NPY_DISABLE_CPU_FEATURES": " ".join(found)}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert result.stdout.strip() == HASH


@examples(15)
@given(st.lists(st.integers(0, 299), min_size=1, max_size=40), st.sampled_from([16, 32]))
def test_an_image_depends_on_its_number_and_attributes_alone(chosen: list[int], size: int) -> None:
    every = mixed(300)
    whole, masks = render(*every, seed=9, size=size, return_mask=True)
    part, part_masks = render(
        *(column[chosen] for column in every),
        seed=9, size=size, return_mask=True, indices=np.array(chosen),
    )  # fmt: skip
    assert (part == whole[chosen]).all()
    assert (part_masks == masks[chosen]).all()


def test_prefixes_seeds_and_masks() -> None:
    whole = render(*mixed(300), seed=9)
    assert (render(*mixed(70), seed=9) == whole[:70]).all()
    assert (render(*mixed(300), seed=9, return_mask=True)[0] == whole).all()
    other = render(*mixed(300), seed=10)
    assert (other != whole).any(axis=(1, 2, 3)).all()
    far = 5 * 2**40 + 3  # a number of another split, and one too large for float64
    for index in (far, 2**58 + 1):
        one = render(3, 2, 1, 0, seed=9, indices=[index])
        pair = render(3, 2, 1, 0, seed=9, indices=[index, index + 1])
        assert (one[0] == pair[0]).all()
        assert (pair[0] != pair[1]).any()


def test_draws_are_the_raw_stream_of_pcg64() -> None:
    bits = np.random.PCG64((2, 41))
    expected = bits.random_raw(7 * 1000).reshape(1000, 7) // 2**11 / 2**53
    rows = np.array([5, 6, 999, 0, 1, 2, 5])
    assert (uniforms(41, "image", rows, 7) == expected[rows]).all()
    assert uniforms(41, "image", np.arange(0), 7).shape == (0, 7)
    others = uniforms(41, "scene", rows, 7), uniforms(42, "image", rows, 7)
    assert all((other != expected[rows]).all() for other in others)
    order = permutation(3, "order", 500)
    assert sorted(order) == list(range(500))
    assert list(order) != list(range(500))


def test_normal_numbers() -> None:
    u, v = np.array([0.0, 0.5, 0.25]), np.array([0.3, 0.0, 0.5])
    expected = [
        math.sqrt(-2 * math.log(1 - a)) * math.cos(2 * math.pi * b)
        for a, b in zip(u, v, strict=True)
    ]
    np.testing.assert_allclose(box_muller(u, v), expected, atol=1e-12)
    pool = noise(np.array([0.0, 0.999999]), 2**19)
    assert pool.dtype == np.float32
    assert abs(pool.mean()) < 0.005
    assert abs(pool.std() - 1) < 0.005
    assert abs((abs(pool) < 1.959964).mean() - 0.95) < 0.002
    assert abs((pool[:, 1:] * pool[:, :-1]).mean()) < 0.005
    assert (pick(np.array([0.0, 0.19, 0.2, 1 - 2**-53]), 5) == [0, 0, 1, 4]).all()


# Silhouettes


def objects_of(shape: str | np.ndarray, n: int = 1, **fields: object) -> Objects:
    """Objects in a fixed, generic pose."""
    index = np.full(n, SHAPES.index(shape)) if isinstance(shape, str) else shape
    single = {
        "radius": 0.7, "x": 0.06, "y": -0.11, "cos": math.cos(0.2), "sin": math.sin(0.2)
    }  # fmt: skip
    values = {name: np.full(n, value, dtype=np.float32) for name, value in single.items()}
    values |= {
        "shape": index.astype(np.int64),
        "fill": np.zeros(n, dtype=np.int64),
        "color": np.full((n, 3), 1.0, dtype=np.float32),
        "second": np.full((n, 3), 0.0, dtype=np.float32),
        "pattern": np.tile(np.array([2.7, 0.3, 0.6, 0.8, 0.6], dtype=np.float32), (n, 1)),
    }
    return Objects(**values | fields)


def object_coordinates(size: int) -> tuple[np.ndarray, np.ndarray]:
    """The coordinates of the pixels in the pose of `objects_of`, in float64."""
    place = (np.arange(size) + 0.5) * 2 / size - 1
    z = (place[None, :] - 0.06 + 1j * (place[:, None] + 0.11)) / 0.7 * np.exp(-0.2j)
    return z.real, z.imag


def polygon(*corners: tuple[float, float]) -> object:
    """Whether points lie in a polygon, by the number of its edges to their right."""

    def inside(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        odd = np.zeros(u.shape, dtype=bool)
        for (u0, v0), (u1, v1) in itertools.pairwise((*corners, corners[0])):
            if v0 != v1:
                crosses = (v0 > v) != (v1 > v)
                odd ^= crosses & (u < u0 + (v - v0) / (v1 - v0) * (u1 - u0))
        return odd

    return inside


def regular(corners: int, turned: float = -math.pi / 2, radius: float = 1) -> list:
    turns = [turned + 2 * math.pi * k / corners for k in range(corners)]
    return [(radius * math.cos(t), radius * math.sin(t)) for t in turns]


def pentagram() -> list:
    notch = math.sin(math.pi / 10) / math.sin(7 * math.pi / 10)
    inner = regular(5, -math.pi / 2 + math.pi / 5, notch)
    return [corner for pair in zip(regular(5), inner, strict=True) for corner in pair]


def wheel(mean: float, swing: float, petals: int, steep: float) -> object:
    def inside(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        angle = np.arctan2(u, -v)
        return np.hypot(u, v) < mean + swing * np.clip(steep * np.cos(petals * angle), -1, 1)

    return inside


def heart(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    x, y = 1.2 * u, 0.1 - 1.2 * v
    return (x**2 + y**2 - 1) ** 3 < x**2 * y**3


def drop(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    tangent = math.acos(0.62 / 1.3)  # at the disc's center, from the tip to where tangents touch
    touch = (0.62 * math.sin(tangent), 0.3 - 0.62 * math.cos(tangent))
    cone = polygon((0, -1), touch, (-touch[0], touch[1]))
    return (np.hypot(u, v - 0.3) < 0.62) | cone(u, v)


INSIDE = {
    "circle": lambda u, v: np.hypot(u, v) < 0.95,
    "square": polygon((-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)),
    "triangle": polygon(*regular(3)),
    "diamond": polygon((0, -18 / 17), (2 / 3, 0), (0, 18 / 17), (-2 / 3, 0)),
    "pentagon": polygon(*regular(5)),
    "hexagon": polygon(*regular(6, 0)),
    "star": polygon(*pentagram()),
    "cross": lambda u, v: (np.minimum(abs(u), abs(v)) < 0.3) & (np.maximum(abs(u), abs(v)) < 0.95),
    "ring": lambda u, v: abs(np.hypot(u, v) - 0.7) < 0.22,
    "heart": heart,
    "crescent": lambda u, v: (np.hypot(u, v) < 0.95) & (np.hypot(u - 0.42, v) > 0.75),
    "arrow": polygon(
        (-0.95, -0.22), (0.1, -0.22), (0.1, -0.85), (0.95, 0), (0.1, 0.85), (0.1, 0.22),
        (-0.95, 0.22),
    ),
    "bar": polygon((-1, -0.3), (1, -0.3), (1, 0.3), (-1, 0.3)),
    "flower": wheel(0.72, 0.26, 5, 1),
    "gear": wheel(0.78, 0.16, 8, 4),
    "drop": drop,
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_silhouettes_are_those_of_the_shapes(shape: str) -> None:
    size = 256
    placed = silhouettes(objects_of(shape), size)
    u, v = object_coordinates(size)
    np.testing.assert_allclose(placed.u[0], u, atol=1e-5)
    np.testing.assert_allclose(placed.v[0], v, atol=1e-5)
    wrong = (placed.covered[0] > 0.5) != INSIDE[shape](u, v)
    assert wrong.sum() <= 2  # a center on the edge, to within float32


@pytest.mark.parametrize("shape", SHAPES)
def test_edges_are_anti_aliased(shape: str) -> None:
    covered = silhouettes(objects_of(shape), 32).covered[0]
    u, v = object_coordinates(32 * 16)
    exact = INSIDE[shape](u, v).reshape(32, 16, 32, 16).mean(axis=(1, 3))
    assert ((covered > 0.02) & (covered < 0.98)).sum() > 15
    # A gear's distance grows faster than it should across the sides of its teeth.
    assert abs(covered - exact).mean() < (0.015 if shape == "gear" else 0.008)
    assert abs(covered.sum() / exact.sum() - 1) < 0.03


def test_no_shape_looks_like_another() -> None:
    n = 250
    masks = np.stack(
        [
            render(shape, 0, 0, 0, seed=5, indices=np.arange(n), return_mask=True)[1]
            for shape in range(16)
        ]
    )
    pixels = [
        (masks[a] ^ masks[b]).sum(axis=(1, 2)) for a, b in itertools.combinations(range(16), 2)
    ]
    assert np.mean(np.array(pixels) >= 10) >= 0.999
    shapes_of: dict[bytes, set[int]] = {}
    for shape, mask in itertools.product(range(16), range(n)):
        shapes_of.setdefault(masks[shape, mask].tobytes(), set()).add(shape)
    assert np.mean([len(shapes) == 1 for shapes in shapes_of.values()]) >= 0.999


@pytest.mark.parametrize("size", [8, 33, 64])
def test_sizes_show_the_same_picture(size: int) -> None:
    images, masks = render(*mixed(48), seed=2, size=size, return_mask=True)
    assert images.shape == (48, size, size, 3)
    large, large_masks = render(*mixed(48), seed=2, size=4 * size, return_mask=True)
    share = large_masks.reshape(48, size, 4, size, 4).mean(axis=(2, 4))
    assert abs(masks - share).mean() < 0.6 / size  # edge pixels only
    assert abs(masks.sum() / share.sum() - 1) < (0.04 if size == 8 else 0.005)
    shrunk = large.reshape(48, size, 4, size, 4, 3).mean(axis=(2, 4))
    assert abs(shrunk.mean(axis=(1, 2)) - images.mean(axis=(1, 2))).mean() < 6
    assert render(0, 0, 0, 0, seed=0, size=512).shape == (1, 512, 512, 3)


# Colors, fills, backgrounds


def test_solid_objects_have_the_color_of_their_name() -> None:
    n = 1200
    colors = np.arange(n) % 12
    images, masks = render(
        np.arange(n) // 12 % 16, colors, 0, np.arange(n) // 7 % 6, seed=3, return_mask=True
    )
    shown = np.array([np.median(images[i][masks[i]], axis=0) for i in range(n)]) / 255
    named = COLOR_VALUES / 255
    assert abs(shown - named[colors]).max() < 0.15
    nearest = ((shown[:, None] - named) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest == colors).mean() > 0.995
    spread = (shown - named[colors])[colors == COLORS.index("brown")]
    assert 0.025 < spread.std() < 0.045


def test_objects_are_posed_within_their_ranges() -> None:
    n = 4000
    uniform = uniforms(0, "object", np.arange(n), OBJECT_DRAWS)
    kinds = np.arange(n) % 16, np.arange(n) % 12, np.arange(n) % 6
    objects = draw_objects(*kinds, uniform)
    ranges = {
        "radius": (objects.radius, 0.5, 0.8),
        "x": (objects.x, -0.22, 0.22),
        "y": (objects.y, -0.22, 0.22),
        "rotation": (np.arctan2(objects.sin, objects.cos), -0.3, 0.3),
        "frequency": (objects.pattern[:, 0], 2.2, 3.2),
        "phase": (objects.pattern[:, 1], 0, 1),
        "direction": (np.arctan2(objects.pattern[:, 4], objects.pattern[:, 3]), 0, math.pi),
    }
    for values, low, high in ranges.values():
        share = (values - low) / (high - low)
        assert -1e-6 <= share.min() < 0.01
        assert 0.99 < share.max() <= 1 + 1e-6
        assert abs(share.mean() - 0.5) < 0.02
    columns = np.stack([values for values, _, _ in ranges.values()])
    assert abs(np.corrcoef(columns) - np.eye(7)).max() < 0.06
    low = draw_objects(np.array([0]), np.array([0]), np.array([0]), uniform[:1] * 0)
    assert (low.radius[0], low.x[0]) == (np.float32(0.5), np.float32(-0.22))


def shares(fill: str, size: int = 96) -> np.ndarray:
    """How much of the second color a square shows, which is white with black."""
    objects = objects_of("square", fill=np.array([FILLS.index(fill)]))
    placed = silhouettes(objects, size)
    canvas = np.zeros((1, 3, size, size), dtype=np.float32)
    paint(canvas, objects, placed._replace(covered=np.ones_like(placed.covered)))
    assert (canvas[0, 0] == canvas[0, 2]).all()
    return 1 - canvas[0, 0]


def test_fills_follow_their_formulas() -> None:
    u, v = object_coordinates(96)
    along, across = 0.8 * u + 0.6 * v, 0.8 * v - 0.6 * u
    a, b = 1.35 * along + 0.3, 1.35 * across + 0.6
    from_dot = np.hypot(1.4 * a - np.rint(1.4 * a), 1.4 * b - np.rint(1.4 * b))
    wave_a, wave_b = (1 - 4 * abs(x - np.rint(x)) for x in (a, b))
    expected = {
        "solid": 0 * u,
        "striped": 0.5 + 3 * wave_a,
        "dotted": 0.5 + 8 * (0.3 - from_dot),
        "checkered": 0.5 + 8 * wave_a * wave_b,
        "gradient": 0.5 + 0.5 * along,
    }
    for fill, share in expected.items():
        np.testing.assert_allclose(shares(fill), np.clip(share, 0, 1), atol=2e-4)
    second = {fill: shares(fill).mean() for fill in FILLS}
    assert second["solid"] == 0
    assert all(0.15 < second[fill] < 0.65 for fill in FILLS[1:5])


@pytest.mark.parametrize("shape", SHAPES)
def test_outlines_leave_the_inside(shape: str) -> None:
    objects = objects_of(shape, fill=np.array([FILLS.index("outlined")]))
    placed = silhouettes(objects, 128)
    inside = interior(objects, placed)[0] > 0.5
    mask = placed.covered[0] > 0.5
    assert 0.2 < inside.sum() / mask.sum() < 0.9
    assert not (inside & ~mask).any()
    # The outline is 6 pixels wide, and at least half of that everywhere; but a flower's and a
    # gear's are measured towards the center, so that they are thinner beside petals and teeth.
    grown = inside.copy()
    for _ in range({"flower": 1, "gear": 0}.get(shape, 3)):
        padded = np.pad(grown, 1)
        grown = padded[1:-1, 1:-1] | padded[2:, 1:-1] | padded[:-2, 1:-1]
        grown |= padded[1:-1, 2:] | padded[1:-1, :-2]
    assert not (grown & ~mask).any()


def test_a_heart_has_an_outline_all_around() -> None:
    # Its distance is not metric: a threshold on it would give a ragged outline.
    objects = objects_of("heart")
    placed = silhouettes(objects, 128)
    u, v = object_coordinates(128)
    inside = interior(objects, placed)[0] > 0.5
    smaller = heart(1.45 / 1.2 * u, 1.45 / 1.2 * v)
    assert (inside != smaller).mean() < 0.001


def test_backgrounds_keep_apart_from_objects() -> None:
    n = 6000
    draws = uniforms(1, "image", np.arange(n), BACKGROUND_DRAWS)
    pose = uniforms(1, "object", np.arange(n), OBJECT_DRAWS)
    zero = np.zeros(n, dtype=np.int64)
    colors = draw_objects(zero, np.arange(n) % 12, zero, pose).color[:, None]
    present = np.ones((n, 1), dtype=bool)
    chosen = background_color(draws, colors, present)
    assert (chosen.min(), chosen.max()) >= (0, 0)
    assert chosen.max() <= 1
    apart = abs(chosen @ LUMINANCE - colors[:, 0] @ LUMINANCE)
    assert apart.min() > 0.25 - 1e-6
    free = background_color(draws, colors, ~present)
    np.testing.assert_allclose(free, 0.1 + 0.8 * draws[:, :3], atol=1e-6)
    moved = (chosen != free).any(axis=1)
    close = abs(free @ LUMINANCE - colors[:, 0] @ LUMINANCE) < 0.25
    assert (moved == close).mean() > 0.9999
    assert 0.2 < moved.mean() < 0.8


def fields(kind: str, n: int = 200, size: int = 32) -> np.ndarray:
    draws = uniforms(2, "image", np.arange(n), BACKGROUND_DRAWS)
    return _background_field(np.full(n, BACKGROUNDS.index(kind)), draws, size)


def test_background_patterns() -> None:
    assert not fields("plain").any()
    grain = fields("noisy")
    assert abs(grain.std() - 0.1) < 0.005
    assert abs((grain[:, 1:] * grain[:, :-1]).mean()) < 5e-4
    specks = fields("speckled")
    assert np.unique(specks).tolist() == [np.float32(-0.3), 0, np.float32(0.3)]
    assert abs((specks != 0).mean() - math.erfc(1.7 / math.sqrt(2))) < 0.01
    slope = fields("shaded")
    np.testing.assert_allclose(np.diff(slope, 2, axis=1), 0, atol=1e-6)
    np.testing.assert_allclose(np.diff(slope, 2, axis=2), 0, atol=1e-6)
    steepness = np.hypot(np.diff(slope, axis=1)[:, 0, 0], np.diff(slope, axis=2)[:, 0, 0])
    np.testing.assert_allclose(steepness, 0.2 * 2 / 32, rtol=1e-4)
    lines = fields("gridded")
    rows, columns = lines.max(axis=2, keepdims=True), lines.max(axis=1, keepdims=True)
    np.testing.assert_allclose(lines, np.minimum(rows, columns), atol=1e-6)
    assert np.quantile(lines, [0, 1]).tolist() == [np.float32(-0.2), 0]
    assert 0.1 < (lines < -0.1).mean() < 0.5
    waves = fields("wavy", size=128)
    assert abs(waves).max() == pytest.approx(0.14, abs=1e-3)
    assert abs(waves.mean()) < 0.01
    ups = ((waves[:, 1:] > 0) & (waves[:, :-1] <= 0)).sum(axis=1)  # crossings per column
    assert 4 <= ups.min() <= ups.max() <= 7


@pytest.mark.parametrize("background", range(6))
def test_backgrounds_show_without_an_object(background: int) -> None:
    images, masks = render(np.full(40, -1), -1, -1, background, seed=1, return_mask=True)
    assert not masks.any()
    contrast = images.std(axis=(1, 2)).mean(axis=1) / 255
    if background == 0:
        assert contrast.max() < 0.03
        assert contrast.mean() == pytest.approx(0.02, abs=0.002)  # the pixel noise
    else:
        assert contrast.min() > 0.035


def test_the_same_pixels_under_a_drawn_object_are_hidden() -> None:
    """Where an object is solid, its background does not show through."""
    values = [
        render(0, 0, 0, background, seed=4, indices=np.arange(30), return_mask=True)
        for background in (1, 4)
    ]
    (noisy, masks), (wavy, _) = values
    same = (noisy == wavy).all(axis=3)
    core = masks[:, 1:-1, 1:-1].copy()
    for rows, columns in itertools.product((0, 1, 2), repeat=2):
        core &= masks[:, rows : 30 + rows, columns : 30 + columns]
    assert same[:, 1:-1, 1:-1][core].all()
    assert not same[~masks].all()


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": 16}, "16 is none of the shapes; accepted: 0 to 15, and -1 for no object"),
        ({"color": [0, 12]}, "12 is none of the colors; accepted: 0 to 11, and -1 for no object"),
        ({"fill": -2}, "-2 is none of the fills; accepted: 0 to 5, and -1 for no object"),
        ({"background": -1}, "-1 is none of the backgrounds; accepted: 0 to 5$"),
        ({"shape": -1}, "shape, color and fill have to be -1 together, which is no object"),
        ({"seed": -1}, "seed=-1; it has to be at least 0"),
        ({"size": 7}, "size=7; accepted: 8 to 512 pixels"),
        ({"size": 513}, "size=513; accepted: 8 to 512 pixels"),
        ({"indices": -1}, "index -1 is negative; images are numbered from 0"),
        ({"shape": [1, 2], "color": [1, 2, 3]}, r"have lengths \[2, 3\]; give one per image"),
        ({"indices": [0, 1], "color": [1, 2, 3]}, r"have lengths \[2, 3\]; give one per image"),
        ({"shape": [[1]]}, r"have shape \(1, 1\) and dtype int64; accepted: an integer, or one"),
        ({"shape": 0.5}, r"have shape \(1,\) and dtype float64; accepted: an integer, or one per"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments: dict, message: str) -> None:
    given = {"shape": 0, "color": 0, "fill": 0, "background": 0, "seed": 0}
    with pytest.raises(InputError, match=message):
        render(**given | arguments)


def test_one_value_stands_for_all_images() -> None:
    assert (render([0, 1], 2, 3, 4, seed=5) == render([0, 1], [2, 2], [3] * 2, 4, seed=5)).all()
    assert render([], 0, 0, 0, seed=0).shape == (0, 32, 32, 3)

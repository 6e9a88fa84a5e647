"""Drawing blocks of the shapes world: objects, their fills, backgrounds, compositing.

Every operation on pixels is one that IEEE 754 rounds exactly (+ - * / sqrt, comparison, rounding),
in float32, each a numpy call of its own. So an image does not depend on the processor, on numpy's
version or on its neighbours in a block. Waves are therefore parabolas and triangles, and cosines of
multiple angles are polynomials. Only the numbers that describe an object pass through sine, cosine
and logarithm, in float64, and are rounded to float32 afterwards.

Object coordinates (u, v) run from -1 to 1 over an unturned object, u to the right and v down.
"""

# numpy's operators give Any.
# mypy: disable-error-code="no-any-return"

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64, UInt8

from shared_core.data._attributes import BACKGROUNDS, COLOR_VALUES, FILLS
from shared_core.data._distances import groups, inner_distance, norm, signed_distance
from shared_core.data._draws import box_muller, noise, uniforms

__all__ = [
    "BACKGROUND_DRAWS",
    "OBJECT_DRAWS",
    "Objects",
    "Silhouettes",
    "background_color",
    "block_length",
    "draw_images",
    "draw_objects",
    "finish",
    "interior",
    "paint",
    "paper",
    "silhouettes",
]

# How many uniform numbers describe an object, and a background with the noise over the image.
OBJECT_DRAWS = 14
BACKGROUND_DRAWS = 9

_JITTER = 0.035
_CONTRAST = 0.25
_SHIFT = 0.45
_PIXEL_NOISE = 0.02
_BLOCK = 2**18  # pixels drawn at once, so that a plane of them stays in the cache

Planes = Float32[np.ndarray, "n h w"]
Canvas = Float32[np.ndarray, "n 3 h w"]
Vector = Float32[np.ndarray, " n"]
Index = Int64[np.ndarray, " n"]


class Objects(NamedTuple):
    """n objects, one per image; shape -1 is no object.

    Attributes:
        shape: Index of the shape.
        fill: Index of the fill.
        color: The color that the object is named after, RGB in [0, 1].
        second: The other color of its fill.
        radius: Half its size, in halves of the image.
        x: Horizontal place of its center, -1 to 1.
        y: Vertical place of its center, downwards.
        cos: Cosine of its rotation.
        sin: Sine of its rotation.
        pattern: Frequency, two phases, cosine and sine of the direction of its fill.
    """

    shape: Index
    fill: Index
    color: Float32[np.ndarray, "n 3"]
    second: Float32[np.ndarray, "n 3"]
    radius: Vector
    x: Vector
    y: Vector
    cos: Vector
    sin: Vector
    pattern: Float32[np.ndarray, "n 5"]

    def take(self, chosen: Int64[np.ndarray, " m"] | slice) -> "Objects":
        """Some of the objects."""
        return Objects(*(field[chosen] for field in self))


def block_length(size: int) -> int:
    """How many images to draw at once."""
    return max(1, _BLOCK // size**2)


def draw_objects(
    shape: Index,
    color: Index,
    fill: Index,
    uniform: Float64[np.ndarray, "n 14"],
    *,
    radius: tuple[float, float] = (0.5, 0.8),
    reach: float = 0.22,
) -> Objects:
    """Objects of random size, place, rotation (up to 0.3 rad), shade and pattern.

    Args:
        shape: Index of each object's shape, or -1.
        color: Index of its color, or -1 with no object.
        fill: Index of its fill, or -1 with no object.
        uniform: Uniform numbers in [0, 1).
        radius: Range of the radius.
        reach: Largest distance of the center from the middle of the image, per axis.
    """
    size, x, y, rotation, *_, frequency, phase_1, phase_2, direction = uniform.T
    # Three standard deviations at most, so that a color stays close to its name.
    jitter = np.clip(box_muller(uniform[:, 4:7], uniform[:, 7:10]), -3, 3)
    rgb = np.clip(COLOR_VALUES[color] / 255 + _JITTER * jitter, 0, 1).astype(np.float32)
    rotation = 0.6 * rotation - 0.3
    direction = np.pi * direction
    pattern = [2.2 + frequency, phase_1, phase_2, np.cos(direction), np.sin(direction)]
    return Objects(
        shape=shape,
        fill=fill,
        color=rgb,
        second=_second_color(rgb),
        radius=(radius[0] + (radius[1] - radius[0]) * size).astype(np.float32),
        x=(reach * (2 * x - 1)).astype(np.float32),
        y=(reach * (2 * y - 1)).astype(np.float32),
        cos=np.cos(rotation).astype(np.float32),
        sin=np.sin(rotation).astype(np.float32),
        pattern=np.stack(pattern, axis=1).astype(np.float32),
    )


def _luminance(rgb: Float32[np.ndarray, "*n 3"]) -> Float32[np.ndarray, "*n"]:
    # Spelt out, because a matrix product rounds differently on different machines.
    red, green, blue = np.moveaxis(rgb, -1, 0)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _second_color(rgb: Float32[np.ndarray, "n 3"]) -> Float32[np.ndarray, "n 3"]:
    """Bright colors are joined by a darker one, dark colors by a lighter one."""
    half = 0.5
    return np.where(_luminance(rgb)[:, None] > 0.65, half * rgb, half + half * rgb)


class Silhouettes(NamedTuple):
    """Where objects are, per pixel.

    Attributes:
        u: Object coordinate to the right.
        v: Object coordinate down.
        distance: Signed distance to the edge, in object coordinates.
        covered: How much of the pixel the object covers, 0 to 1.
    """

    u: Planes
    v: Planes
    distance: Planes
    covered: Planes

    def take(self, chosen: Int64[np.ndarray, " m"]) -> "Silhouettes":
        """Some of the silhouettes."""
        return Silhouettes(*(field[chosen] for field in self))


def silhouettes(objects: Objects, size: int) -> Silhouettes:
    """Place objects in square images."""
    place = _pixel_centers(size)
    x = (place - objects.x[:, None]) / objects.radius[:, None]
    y = (place - objects.y[:, None]) / objects.radius[:, None]
    cos, sin = objects.cos[:, None], objects.sin[:, None]
    u = (x * cos)[:, None, :] + (y * sin)[:, :, None]
    v = (y * cos)[:, :, None] - (x * sin)[:, None, :]
    distance = signed_distance(objects.shape, u, v)
    return Silhouettes(u, v, distance, _coverage(distance, objects.radius))


def interior(objects: Objects, placed: Silhouettes) -> Planes:
    """How much of each pixel the object covers without its outline."""
    inner = inner_distance(objects.shape, placed.u, placed.v, placed.distance)
    return _coverage(inner, objects.radius)


def _coverage(distance: Planes, radius: Vector) -> Planes:
    """A linear ramp one pixel wide."""
    per_pixel = distance.shape[-1] * radius / 2
    covered = 0.5 - distance * per_pixel[:, None, None]
    return np.clip(covered, 0, 1, out=covered)


def _pixel_centers(size: int) -> Float32[np.ndarray, " {size}"]:
    return ((2 * np.arange(size) + 1) / size - 1).astype(np.float32)


def _triangle_wave(x: Planes) -> Planes:
    """Period 1, from 1 at whole numbers to -1 between them."""
    return 1 - 4 * abs(x - np.rint(x))


def _round_wave(x: Planes) -> Planes:
    """Period 1, close to sin(2 pi x), of parabolas."""
    x = x - np.rint(x)
    return 8 * x * (1 - 2 * abs(x))


def _second_share(objects: Objects, placed: Silhouettes) -> Planes:
    """How much of the fill's second color each pixel takes, 0 to 1."""
    share = np.zeros_like(placed.u)
    for index, members in groups(objects.fill):
        if FILLS[index] != "solid":
            fill = _FILL_SHARES[FILLS[index]]
            share[members] = fill(objects.take(members), placed.take(members))
    return share


def _striped(objects: Objects, placed: Silhouettes) -> Planes:
    along, _ = _fill_frame(objects, placed)
    return np.clip(0.5 + 3 * _triangle_wave(along), 0, 1)


def _dotted(objects: Objects, placed: Silhouettes) -> Planes:
    along, across = (1.4 * x for x in _fill_frame(objects, placed))
    from_dot = norm(along - np.rint(along), across - np.rint(across))
    return np.clip(0.5 + 8 * (0.3 - from_dot), 0, 1)


def _checkered(objects: Objects, placed: Silhouettes) -> Planes:
    along, across = _fill_frame(objects, placed)
    return np.clip(0.5 + 8 * _triangle_wave(along) * _triangle_wave(across), 0, 1)


def _gradient(objects: Objects, placed: Silhouettes) -> Planes:
    _, _, _, cos, sin = objects.pattern.T[:, :, None, None]
    return np.clip(0.5 + 0.5 * (placed.u * cos + placed.v * sin), 0, 1)


def _outlined(objects: Objects, placed: Silhouettes) -> Planes:
    return 1 - interior(objects, placed)


_FILL_SHARES = {
    "striped": _striped,
    "dotted": _dotted,
    "checkered": _checkered,
    "gradient": _gradient,
    "outlined": _outlined,
}


def _fill_frame(objects: Objects, placed: Silhouettes) -> tuple[Planes, Planes]:
    """Coordinates along and across the direction of the fill, in periods of its pattern."""
    frequency, phase_1, phase_2, cos, sin = objects.pattern.T[:, :, None, None]
    along = placed.u * (0.5 * frequency * cos) + placed.v * (0.5 * frequency * sin)
    across = placed.v * (0.5 * frequency * cos) - placed.u * (0.5 * frequency * sin)
    return along + phase_1, across + phase_2


def background_color(
    uniform: Float64[np.ndarray, "n 9"],
    colors: Float32[np.ndarray, "n objects 3"],
    present: Bool[np.ndarray, "n objects"],
) -> Float32[np.ndarray, "n 3"]:
    """A random color for each background, kept apart from its objects' in luminance.

    A color whose luminance is closer than 0.25 to that of an object is made lighter or darker by
    0.45, whichever takes it further away from all objects.
    """
    base = (0.1 + 0.8 * uniform[:, :3]).astype(np.float32)
    shift = _SHIFT
    candidates = np.stack([base, np.minimum(base + shift, 1), np.maximum(base - shift, 0)])
    apart = abs(_luminance(candidates)[:, :, None] - _luminance(colors))
    nearest = np.where(present, apart, 9).min(axis=2, initial=9)
    choice = np.where(nearest[0] >= _CONTRAST, 0, 1 + nearest[1:].argmax(axis=0))
    return candidates[choice, np.arange(choice.size)]


def _background_field(background: Index, uniform: Float64[np.ndarray, "n 9"], size: int) -> Planes:
    """The pattern of each background, to add to its color."""
    field = np.zeros((background.size, size, size), dtype=np.float32)
    x = _pixel_centers(size)
    y = x[:, None]
    for index, members in groups(background):
        kind = BACKGROUNDS[index]
        if kind == "plain":
            continue
        draws = uniform[members, 3:8]
        if kind in ("noisy", "speckled"):
            field[members] = _grain(draws[:, 4], size, speckled=kind == "speckled")
            continue
        direction = 2 * np.pi * draws[:, 3]
        parts = np.stack(
            [2.2 + draws[:, 0], draws[:, 1], draws[:, 2], np.cos(direction), np.sin(direction)]
        )
        frequency, phase_1, phase_2, cos, sin = parts.astype(np.float32)[:, :, None, None]
        if kind == "shaded":
            field[members] = 0.2 * (cos * x + sin * y)
        elif kind == "gridded":
            lines = np.minimum(
                _triangle_wave(frequency * x + phase_1), _triangle_wave(frequency * y + phase_2)
            )
            dark = np.clip(-4 * lines - 2, 0, 1)
            field[members] = -0.2 * dark
        else:  # wavy
            bend = 0.3 * _round_wave(0.5 * frequency * x + phase_2)
            field[members] = 0.14 * _round_wave(frequency * y + phase_1 + bend)
    return field


def _grain(offsets: Float64[np.ndarray, " n"], size: int, *, speckled: bool) -> Planes:
    """Noise whose grains are a 32nd of the image, or one pixel where that is more."""
    grain = max(1, size // 32)
    cells = -(-size // grain)
    field = noise(offsets, cells * cells).reshape(-1, cells, cells)
    field = 0.3 * np.sign(np.rint(field / 3.4)) if speckled else 0.1 * field
    if grain > 1:
        field = field.repeat(grain, axis=1).repeat(grain, axis=2)[:, :size, :size]
    return field


def paper(
    background: Index,
    color: Float32[np.ndarray, "n 3"],
    uniform: Float64[np.ndarray, "n 9"],
    size: int,
) -> Canvas:
    """Backgrounds to paint on."""
    field = _background_field(background, uniform, size)
    # Lines are darker than a light color, lighter than a dark one.
    field *= np.where(_luminance(color) < 0.5, -1, 1).astype(np.float32)[:, None, None]
    return color[:, :, None, None] + field[:, None]


def paint(canvas: Canvas, objects: Objects, placed: Silhouettes) -> None:
    """Paint objects over a canvas, in place."""
    share = _second_share(objects, placed)
    for channel in range(3):
        plane = canvas[:, channel]
        first = objects.color[:, channel, None, None]
        layer = share * (objects.second[:, channel, None, None] - first)
        layer += first
        layer -= plane
        layer *= placed.covered
        plane += layer


def finish(canvas: Canvas, uniform: Float64[np.ndarray, "n 9"]) -> UInt8[np.ndarray, "n h w 3"]:
    """Add pixel noise and round to bytes. Uses up the canvas."""
    grains = noise(uniform[:, 8], math.prod(canvas.shape[1:])).reshape(canvas.shape)
    grains *= _PIXEL_NOISE
    canvas += grains
    np.clip(canvas, 0, 1, out=canvas)
    canvas *= 255
    np.rint(canvas, out=canvas)
    return np.ascontiguousarray(canvas.astype(np.uint8).transpose(0, 2, 3, 1))


def draw_images(
    attributes: Int64[np.ndarray, "n 4"], indices: Index, seed: int, size: int
) -> tuple[UInt8[np.ndarray, "n {size} {size} 3"], Bool[np.ndarray, "n {size} {size}"]]:
    """Images of one object each, and where the objects are.

    Args:
        attributes: Shape, color, fill (-1 for no object) and background of each image.
        indices: The number of each image, which with the seed decides everything else.
        seed: Seed of the world.
        size: Pixels per side.
    """
    images = np.empty((indices.size, size, size, 3), dtype=np.uint8)
    masks = np.empty((indices.size, size, size), dtype=bool)
    step = block_length(size)
    for first in range(0, indices.size, step):
        block = slice(first, first + step)
        shape, color, fill, background = attributes[block].T
        uniform = uniforms(seed, "image", indices[block], OBJECT_DRAWS + BACKGROUND_DRAWS)
        behind = uniform[:, OBJECT_DRAWS:]
        objects = draw_objects(shape, color, fill, uniform[:, :OBJECT_DRAWS])
        base = background_color(behind, objects.color[:, None], shape[:, None] >= 0)
        canvas = paper(background, base, behind, size)
        placed = silhouettes(objects, size)
        paint(canvas, objects, placed)
        images[block] = finish(canvas, behind)
        masks[block] = placed.covered > 0.5
    return images, masks

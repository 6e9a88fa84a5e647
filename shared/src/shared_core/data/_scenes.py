"""Scenes of several objects, with what is where: labels, boxes, instance and semantic maps."""

# numpy's operators give Any.
# mypy: disable-error-code="no-any-return"

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float64, Int16, Int64, UInt8

from shared_core.data._attributes import Choices
from shared_core.data._draws import choose, permutation, pick, uniforms
from shared_core.data._render import (
    BACKGROUND_DRAWS,
    OBJECT_DRAWS,
    Canvas,
    Objects,
    background_color,
    block_length,
    draw_objects,
    finish,
    interior,
    paint,
    paper,
    silhouettes,
)

__all__ = [
    "MAX_OBJECTS",
    "MultiLabelScenes",
    "Scenes",
    "class_chain",
    "co_occurrence",
    "draw_labelled_scenes",
    "draw_scenes",
]

MAX_OBJECTS = 16
_TRIES = 20
_HIDDEN = 0.4  # largest share of an object that later ones may cover
_RADIUS = (0.25, 0.45)
_BLOCKS = 4

Draws = Float64[np.ndarray, "n slots 2"]
Slots = Int64[np.ndarray, "n slots"]
ObjectClasses = Callable[[Draws], tuple[Slots, Slots]]  # to shape and color


@dataclasses.dataclass(frozen=True)
class Scenes:
    """n images of several objects each, drawn back to front.

    Attributes:
        images: Pixels, [n, size, size, 3].
        attrs: Shape, color, fill and background of each object, [n, slots, 4]; -1 where a
            scene has no object in the slot.
        boxes: The visible part of each object as left, top, right, bottom, [n, slots, 4]: pixels,
            right and bottom exclusive; -1 without object.
        instance: Whose pixel it is, [n, size, size]: 0 background, 1 + the slot of the object.
        part: What the pixel shows, [n, size, size]: 0 background, 1 an object's inside, 2 the edge
            that an outline would take.
    """

    images: UInt8[np.ndarray, "n size size 3"]
    attrs: Int16[np.ndarray, "n slots 4"]
    boxes: Int16[np.ndarray, "n slots 4"]
    instance: UInt8[np.ndarray, "n size size"]
    part: UInt8[np.ndarray, "n size size"]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def masks(self) -> Bool[np.ndarray, "n slots size size"]:
        """The visible pixels of each object."""
        slots = np.arange(1, self.attrs.shape[1] + 1, dtype=np.uint8)
        return self.instance[:, None] == slots[:, None, None]

    @property
    def semantic(self) -> UInt8[np.ndarray, "n size size"]:
        """The shape at each pixel: 0 background, 1 + the index of the shape."""
        table = np.pad(self.attrs[:, :, 0] + 1, ((0, 0), (1, 0))).astype(np.uint8)
        return table[np.arange(len(table))[:, None, None], self.instance]


@dataclasses.dataclass(frozen=True)
class MultiLabelScenes(Scenes):
    """Scenes with the classes that are visible in each.

    Attributes:
        labels: 1 where a class is visible, [n, classes].
        class_names: The name of each class.
    """

    labels: UInt8[np.ndarray, "n classes"]
    class_names: list[str]


def draw_scenes(
    indices: Int64[np.ndarray, " n"],
    *,
    seed: int,
    size: int,
    objects: tuple[int, int],
    choices: Choices,
    classes: ObjectClasses,
) -> Scenes:
    """Draw scenes, each from its own random numbers.

    Args:
        indices: The number of each scene.
        seed: Seed of the world.
        size: Pixels per side.
        objects: Fewest and most objects per scene, both included; each number is as likely.
        choices: The fills and backgrounds to use.
        classes: Gives objects their shape and color.
    """
    step = block_length(size)
    parts = [indices[first : first + step] for first in range(0, indices.size, step)]
    blocks = []
    for part in parts:
        draws = uniforms(seed, "scene", part, 2 + BACKGROUND_DRAWS)
        counts = objects[0] + pick(draws[:, 0], objects[1] - objects[0] + 1)
        background = choose(draws[:, 1], choices.backgrounds)
        numbers = part[:, None] * MAX_OBJECTS + np.arange(objects[1])
        uniform = uniforms(seed, "object", numbers.ravel(), 3 + OBJECT_DRAWS + 2 * _TRIES)
        uniform = uniform.reshape(*numbers.shape, -1)
        shapes, colors = classes(uniform[:, :, :2])
        kinds = np.stack([shapes, colors, choose(uniform[:, :, 2], choices.fills)], axis=2)
        kinds[np.arange(objects[1]) >= counts[:, None]] = -1
        blocks.append(_draw_block(kinds, background, uniform[:, :, 3:], draws[:, 2:], size))
    return Scenes(*(np.concatenate(fields) for fields in zip(*blocks, strict=True)))


def draw_labelled_scenes(
    indices: Int64[np.ndarray, " n"],
    *,
    seed: int,
    size: int,
    objects: tuple[int, int],
    choices: Choices,
    members: Sequence[tuple[int, int]],
    class_names: list[str],
    weights: Sequence[int],
    min_pixels: int,
) -> MultiLabelScenes:
    """Draw scenes whose objects belong to classes, some more frequent than others.

    Args:
        indices: The number of each scene.
        seed: Seed of the world.
        size: Pixels per side.
        objects: Fewest and most objects per scene.
        choices: Attributes to use.
        members: The shape and the color of each class, -1 where it may be any.
        class_names: The name of each class.
        weights: How often each class occurs, relative to the others.
        min_pixels: Visible pixels that a class needs in a scene to be a label.
    """
    share = np.array(weights, dtype=np.float64)
    joint = co_occurrence(share / share.sum(), seed)
    shape_of, color_of = np.array(members).T

    def classes(uniform: Draws) -> tuple[Slots, Slots]:
        chosen = class_chain(joint, uniform[:, :, 0])
        color = choose(uniform[:, :, 1], choices.colors)
        return shape_of[chosen], np.where(color_of[chosen] < 0, color, color_of[chosen])

    scenes = draw_scenes(
        indices, seed=seed, size=size, objects=objects, choices=choices, classes=classes
    )
    visible = scenes.masks.sum(axis=(2, 3))
    labels = np.zeros((len(scenes), len(members)), dtype=np.uint8)
    for label, (shape, color) in enumerate(members):
        belongs = scenes.attrs[:, :, 0] == shape
        if color >= 0:
            belongs &= scenes.attrs[:, :, 1] == color
        labels[:, label] = (visible * belongs).sum(axis=1) >= min_pixels
    return MultiLabelScenes(**vars(scenes), labels=labels, class_names=class_names)


def _draw_block(
    kinds: Int64[np.ndarray, "n slots 3"],
    background: Int64[np.ndarray, " n"],
    uniform: Float64[np.ndarray, "n slots draws"],
    behind: Float64[np.ndarray, "n 9"],
    size: int,
) -> tuple[np.ndarray, ...]:
    """The fields of `Scenes`."""
    n, slots, _ = kinds.shape
    shapes, colors, fills = np.moveaxis(kinds, 2, 0)
    layers = [
        draw_objects(shape, color, fill, draws, radius=_RADIUS)
        for shape, color, fill, draws in zip(
            shapes.T, colors.T, fills.T, uniform[:, :, :OBJECT_DRAWS].swapaxes(0, 1), strict=True
        )
    ]
    painted = np.stack([layer.color for layer in layers], axis=1)
    base = background_color(behind, painted, shapes >= 0)
    canvas = paper(background, base, behind, size)
    instance = np.zeros((n, size, size), dtype=np.uint8)
    part = np.zeros_like(instance)
    areas = np.zeros((n, slots), dtype=np.int64)
    for slot, layer in enumerate(layers):
        places = uniform[:, slot, OBJECT_DRAWS:].reshape(n, _TRIES, 2)
        _place(layer, places, slot, canvas, instance, part, areas)
    boxes, visible = _boxes(instance, slots)
    attributes = np.concatenate([kinds, np.repeat(background, slots).reshape(n, slots, 1)], axis=2)
    attributes[visible == 0] = -1
    return finish(canvas, behind), attributes.astype(np.int16), boxes, instance, part


def _place(
    layer: Objects,
    places: Float64[np.ndarray, "n tries 2"],
    slot: int,
    canvas: Canvas,
    instance: UInt8[np.ndarray, "n size size"],
    part: UInt8[np.ndarray, "n size size"],
    areas: Int64[np.ndarray, "n slots"],
) -> None:
    """Paint one object per scene where it covers not too much of the earlier ones, in place."""
    waiting = np.flatnonzero(layer.shape >= 0)
    for tried in range(places.shape[1]):
        if not waiting.size:
            return
        objects = layer.take(waiting)
        reach = (1 - objects.radius)[:, None] * (2 * places[waiting, tried] - 1)
        x, y = reach.T.astype(np.float32)
        objects = objects._replace(x=x, y=y)
        placed = silhouettes(objects, canvas.shape[-1])
        mask = placed.covered > 0.5
        left = instance[waiting] * ~mask
        fits = np.ones(waiting.size, dtype=bool)
        for earlier in range(slot):
            still = (left == earlier + 1).sum(axis=(1, 2))
            fits &= still >= (1 - _HIDDEN) * areas[waiting, earlier]
        chosen = np.flatnonzero(fits)
        done = waiting[chosen]
        objects, placed, mask = objects.take(chosen), placed.take(chosen), mask[chosen]
        layers = canvas[done]
        paint(layers, objects, placed)
        canvas[done] = layers
        instance[done] = np.where(mask, slot + 1, instance[done])
        inside = interior(objects, placed) > 0.5
        part[done] = np.where(mask, 2 - inside, part[done])
        areas[done, slot] = mask.sum(axis=(1, 2))
        waiting = waiting[~fits]


def _boxes(
    instance: UInt8[np.ndarray, "n size size"], slots: int
) -> tuple[Int16[np.ndarray, "n {slots} 4"], Int64[np.ndarray, "n {slots}"]]:
    """The box around each object's visible pixels, and their number."""
    size = instance.shape[1]
    boxes = np.empty((len(instance), slots, 4), dtype=np.int16)
    visible = np.empty((len(instance), slots), dtype=np.int64)
    for slot in range(slots):
        mask = instance == slot + 1
        visible[:, slot] = mask.sum(axis=(1, 2))
        for side, axis in enumerate((1, 2)):
            line = mask.any(axis=axis)
            boxes[:, slot, side] = line.argmax(axis=1)
            boxes[:, slot, side + 2] = size - line[:, ::-1].argmax(axis=1)
    boxes[visible == 0] = -1
    return boxes, visible


def co_occurrence(
    marginal: Float64[np.ndarray, " classes"], seed: int
) -> Float64[np.ndarray, "classes classes"]:
    """How often two classes meet: a symmetric joint distribution with the marginal given.

    Classes fall into four random blocks. Two classes of one block meet more often than two of
    different blocks, by a random factor of 2 to 10; a class seldom meets itself. Blocks mix
    frequent and rare classes. The weights are scaled to the marginal (Sinkhorn and Knopp, 1967).
    """
    classes = marginal.size
    block = permutation(seed, "blocks", classes) % _BLOCKS
    affinity = uniforms(seed, "blocks", np.arange(_BLOCKS) + 2**40, _BLOCKS)
    affinity = 0.1 + 0.4 * np.tril(affinity)
    affinity = np.maximum(affinity, affinity.T)
    np.fill_diagonal(affinity, 1)
    weights = affinity[block][:, block]
    np.fill_diagonal(weights, 0.02)
    scale = np.sqrt(marginal)
    for _ in range(10_000):
        reached = scale * (weights @ scale)
        if abs(reached - marginal).max() < 1e-13:
            break
        scale = scale * np.sqrt(marginal / reached)
    joint: np.ndarray = scale[:, None] * weights * scale
    return joint


def class_chain(
    joint: Float64[np.ndarray, "classes classes"], uniform: Float64[np.ndarray, "n slots"]
) -> Int64[np.ndarray, "n slots"]:
    """The classes of a scene's objects: each depends on the one before by the joint distribution.

    Because the joint distribution is symmetric, every object of a scene has its marginal.
    """
    last = len(joint) - 1
    marginal = joint.sum(axis=1)
    steps = np.cumsum(joint / marginal[:, None], axis=1)
    chosen = np.empty(uniform.shape, dtype=np.int64)
    chosen[:, 0] = np.searchsorted(np.cumsum(marginal), uniform[:, 0], side="right")
    for slot in range(1, uniform.shape[1]):
        before = steps[np.minimum(chosen[:, slot - 1], last)]
        chosen[:, slot] = (before <= uniform[:, slot, None]).sum(axis=1)
    return np.minimum(chosen, last)

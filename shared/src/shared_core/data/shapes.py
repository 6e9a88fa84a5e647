"""A procedural world of images: colored, textured shapes on backgrounds, with all labels known.

16 shapes, 12 colors, 6 fills and 6 backgrounds make data for classification, captions, long tails,
held-out attributes, several labels per image, and segmentation, without a download. The same seed
gives the same bytes on every machine: an image depends on the seed of its world, its number and its
attributes, and on nothing else. Each split takes numbers of its own, so that no two images of
different splits are drawn alike.

Shapes, colors, fills and backgrounds are given by index or by name.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int, Int16, Int64, UInt8

from shared_core.data._attributes import (
    BACKGROUNDS,
    COLORS,
    FILLS,
    SHAPES,
    Choices,
    Value,
    check_attributes,
)
from shared_core.data._captions import Style, captions
from shared_core.data._classes import class_list, ood_pairs, pairs_of
from shared_core.data._draws import choose, permutation, pick, raw, uniforms
from shared_core.data._pictures import (
    check_count,
    check_seed_and_size,
    contact_sheet,
    image_tensor,
    render,
)
from shared_core.data._render import draw_images
from shared_core.data._scenes import (
    MAX_OBJECTS,
    MultiLabelScenes,
    Scenes,
    draw_labelled_scenes,
    draw_scenes,
)
from shared_core.data._shapes_dataset import ShapesDataset, Transform
from shared_core.data.long_tail import long_tail_counts
from shared_core.errors import InputError

__all__ = [
    "BACKGROUNDS",
    "COLORS",
    "FILLS",
    "SHAPES",
    "Batch",
    "MultiLabelScenes",
    "Scenes",
    "ShapesDataset",
    "ShapesWorld",
    "contact_sheet",
    "image_tensor",
    "load_shapes",
    "ood_pairs",
    "render",
]

Split = Literal["train", "validation", "test"]
Values = Sequence[Value]
Pairs = Sequence[Sequence[Value]]

# Every split takes its image numbers from a range of its own; the last three belong to `id_ood`.
_RANGES = ("train", "validation", "test", "near", "far", "textures")
_RANGE = 2**40


class Batch(NamedTuple):
    """Images and what they show.

    Attributes:
        images: Pixels, [n, size, size, 3].
        attrs: Index of shape, color, fill and background of each image, [n, 4].
    """

    images: UInt8[np.ndarray, "n size size 3"]
    attrs: Int16[np.ndarray, "n 4"]


class ShapesWorld:
    """Images of shapes, with everything that the world knows about them.

    Args:
        seed: Seed of the world, at least 0.
        size: Pixels per side, 8 to 512.

    Raises:
        InputError: If the seed or the size is out of range.

    Examples:
        >>> world = ShapesWorld(seed=0)
        >>> images, attrs = world.sample(4, shapes=["star"], colors=["red"])
        >>> images.shape, world.captions(attrs, seed=0, style="simple")[0]
        ((4, 32, 32, 3), 'red star')
    """

    def __init__(self, seed: int = 0, size: int = 32) -> None:
        check_seed_and_size(seed, size)
        self.seed = seed
        self.size = size

    def sample(
        self,
        n: int,
        shapes: Values | None = None,
        colors: Values | None = None,
        fills: Values | None = None,
        backgrounds: Values | None = None,
        pairs: Pairs | None = None,
        *,
        split: Split = "train",
    ) -> Batch:
        """Images with attributes drawn at random, each value as likely as the others.

        Args:
            n: How many. A smaller number gives the first of a larger one.
            shapes: Shapes to choose from; by default all.
            colors: Colors to choose from.
            fills: Fills to choose from.
            backgrounds: Backgrounds to choose from.
            pairs: Pairs of a shape and a color to choose from, in place of `shapes` and `colors`.
            split: ``train``, ``validation`` or ``test``.

        Raises:
            InputError: If `n` is below 1, a value is not known, or `pairs` comes with `shapes` or
                `colors`.

        Examples:
            >>> batch = ShapesWorld(0).sample(100, pairs=[("circle", "red"), ("star", "blue")])
            >>> sorted({(shape, color) for shape, color, *_ in batch.attrs.tolist()})
            [(0, 0), (6, 2)]
        """
        indices = _numbers(split, n)
        choices = Choices.of(shapes, colors, fills, backgrounds)
        attributes = self._attributes(indices, choices)
        if pairs is not None:
            _refuse_beside_pairs(shapes, colors)
            chosen = np.array(pairs_of(pairs))
            first = uniforms(self.seed, "attributes", indices, 4)[:, 0]
            attributes[:, :2] = chosen[pick(first, len(chosen))]
        images, _ = draw_images(attributes, indices, self.seed, self.size)
        return Batch(images, attributes.astype(np.int16))

    def captions(
        self, attrs: Int[np.ndarray, "n 4"], seed: int, style: Style = "clip"
    ) -> list[str]:
        """A sentence about each image, true to its attributes.

        Args:
            attrs: Index of shape, color, fill and background of each image.
            seed: Seed of the choice of words; caption i depends on it, on i and on row i.
            style: ``clip`` names some of the attributes, like captions from the web (``a photo of
                a red star``, ``this is a striped photo``); ``full`` names all four; ``simple`` is
                the name of the class, color and shape.

        Raises:
            InputError: If the style is not known, or an attribute or the seed is out of range.

        Examples:
            >>> ShapesWorld(0).captions(np.array([[6, 0, 1, 4]]), seed=0, style="full")
            ['a photo of a striped red star on a wavy background']
        """
        check_attributes(attrs)
        return captions(attrs, seed, style)

    def classification(
        self,
        classes: Literal["shape", "color", "shape_color"] | Pairs = "shape",
        n_per_class: int | None = None,
        *,
        counts: Sequence[int] | None = None,
        shapes: Values | None = None,
        colors: Values | None = None,
        fills: Values | None = None,
        backgrounds: Values | None = None,
        split: Split = "train",
        lazy: bool = False,
        transform: Transform | None = None,
    ) -> ShapesDataset:
        """A labelled data set, in random order; attributes that are not the class are random.

        The images of a class do not depend on the counts of other classes, and a smaller count
        selects a part of what a larger one does.

        Args:
            classes: What the classes are: ``shape``, ``color``, ``shape_color`` (all colors of the
                first shape, then of the second, ...), or pairs of a shape and a color.
            n_per_class: Images of each class.
            counts: Images of each class, in place of `n_per_class`; for example from `long_tail`.
            shapes: Shapes to use; by default all.
            colors: Colors to use.
            fills: Fills to use.
            backgrounds: Backgrounds to use.
            split: ``train``, ``validation`` or ``test``.
            lazy: Draw images when they are read, instead of all at once.
            transform: Applied to each image, a PIL image in RGB mode, when it is read.

        Raises:
            InputError: If a value is not known, not exactly one of `n_per_class` and `counts` is
                given, they do not fit, or pairs come with `shapes` or `colors`.

        Examples:
            >>> data = ShapesWorld(0).classification(
            ...     "shape_color", counts=[5, 3, 2, 1], shapes=["bar", "star"], colors=["red", 2]
            ... )
            >>> len(data), data.class_names
            (11, ['red bar', 'blue bar', 'red star', 'blue star'])
        """
        if (n_per_class is None) == (counts is None):
            raise InputError(
                f"n_per_class={n_per_class} and counts={counts}; give exactly one of them"
            )
        _check_split(split)
        if not isinstance(classes, str):
            _refuse_beside_pairs(shapes, colors)
        choices = Choices.of(shapes, colors, fills, backgrounds)
        members, names = class_list(classes, choices)
        if n_per_class is not None:
            check_count("n_per_class", n_per_class)
        counts = [n_per_class or 0] * len(members) if counts is None else list(counts)
        if len(counts) != len(members) or min(counts) < 0 or not any(counts):
            raise InputError(
                f"counts={counts} for {len(members)} classes; give each one a number from 0 up"
            )
        return self._dataset(members, names, counts, choices, split, lazy=lazy, transform=transform)

    def base_new(
        self,
        k_base: int,
        k_new: int,
        *,
        classes: Literal["shape", "color", "shape_color"] | Pairs = "shape_color",
        n_per_class: int = 16,
        n_test: int = 60,
        shapes: Values | None = None,
        colors: Values | None = None,
        fills: Values | None = None,
        backgrounds: Values | None = None,
    ) -> dict[str, ShapesDataset]:
        """Base classes to learn from, and new classes to recognize as well.

        The base classes are the first `k_base` of `classification`, the new ones the next `k_new`:
        with ``classes="shape_color"`` and 6 colors, 18 and 18 classes are 3 shapes each.

        Args:
            k_base: Number of base classes.
            k_new: Number of new classes.
            classes: What the classes are; see `classification`.
            n_per_class: Training images of each base class.
            n_test: Test images of each class.
            shapes: Shapes to use; by default all.
            colors: Colors to use.
            fills: Fills to use.
            backgrounds: Backgrounds to use.

        Returns:
            ``train`` (base classes), and ``base`` and ``new`` for testing. In each, labels count
            from 0 along its own ``class_names``.

        Raises:
            InputError: If there are fewer classes than asked for, a number is below 1, or as
                `classification`.

        Examples:
            >>> splits = ShapesWorld(0).base_new(2, 1, classes="shape", n_per_class=4, n_test=3)
            >>> {name: (data.class_names, len(data)) for name, data in splits.items()}
            {'train': (['circle', 'square'], 8), 'base': (['circle', 'square'], 6),
             'new': (['triangle'], 3)}
        """
        numbers = {"k_base": k_base, "k_new": k_new, "n_per_class": n_per_class, "n_test": n_test}
        for name, number in numbers.items():
            check_count(name, number)
        if not isinstance(classes, str):
            _refuse_beside_pairs(shapes, colors)
        choices = Choices.of(shapes, colors, fills, backgrounds)
        members, names = class_list(classes, choices)
        both = k_base + k_new
        if both > len(members):
            raise InputError(f"k_base + k_new = {both}, but there are {len(members)} classes")
        base, new = slice(k_base), slice(k_base, both)
        assert not set(members[base]) & set(members[new])
        train, test = [n_per_class] * k_base, [n_test] * both
        return {
            "train": self._dataset(members[base], names[base], train, choices, "train"),
            "base": self._dataset(
                members[base], names[base], test[base], choices, "test", stride=both
            ),
            "new": self._dataset(
                members[new], names[new], test[new], choices, "test", first=k_base, stride=both
            ),
        }

    def id_ood(self, preset: Literal["demo"] = "demo", *, n: int = 800) -> dict[str, ShapesDataset]:
        """Test images in and out of distribution, for the classes of `ood_pairs`.

        The proxies or training images of the same classes are
        ``classification(ood_pairs()["id"], n_per_class, split="train")``.

        Args:
            preset: The split; ``demo`` is the only one.
            n: Images of each set, shared out evenly among its classes.

        Returns:
            ``id`` (known pairs of a color and a shape), ``near`` (one of the two is unknown),
            ``far`` (both are), and ``textures`` (backgrounds without an object).

        Raises:
            InputError: If the preset is not known or `n` is below 1.

        Examples:
            >>> {name: len(data.class_names) for name, data in ShapesWorld(0).id_ood(n=48).items()}
            {'id': 16, 'near': 48, 'far': 12, 'textures': 6}
        """
        check_count("n", n)
        sets = {}
        for name, pairs in ood_pairs(preset).items():
            split = "test" if name == "id" else name
            counts = _share_out(n, len(pairs))
            _, names = class_list(pairs, Choices.of())
            sets[name] = self._dataset(pairs, names, counts, Choices.of(), split)
        labels = np.arange(n) % len(BACKGROUNDS)
        attributes = np.full((n, 4), -1, dtype=np.int16)
        attributes[:, 3] = labels
        sets["textures"] = ShapesDataset(
            attributes,
            _start("textures") + np.arange(n, dtype=np.int64),
            labels.tolist(),
            BACKGROUNDS,
            seed=self.seed,
            size=self.size,
            split="textures",
        )
        return sets

    def long_tail(
        self,
        n_classes: int,
        n_max: int,
        imbalance: int | float,
        profile: Literal["exp", "step"] = "exp",
        *,
        order: Literal["index", "random"] = "index",
    ) -> list[int]:
        """Images of each class for `classification`: ``round(n_max * imbalance**(-c / (C - 1)))``.

        Args:
            n_classes: Number of classes C.
            n_max: Images of the most frequent class.
            imbalance: Most frequent / rarest, at least 1. A class keeps at least one image.
            profile: ``exp``, or ``step``; see `shared_core.data.long_tail.long_tail_counts`.
            order: Whether classes become rarer by their index or in an order drawn with the
                world's seed.

        Raises:
            InputError: As `long_tail_counts`, or if the order is not known.

        Examples:
            >>> ShapesWorld(0).long_tail(4, 100, imbalance=50)
            [100, 27, 7, 2]
        """
        counts = long_tail_counts(
            n_max, n_classes, imbalance_ratio=imbalance, profile=profile, rounding="nearest"
        )
        if order not in ("index", "random"):
            raise InputError(f"order {order!r} is not known; accepted: index, random")
        if order == "index":
            return counts
        return [counts[rank] for rank in permutation(self.seed, "ranks", n_classes)]

    def multilabel(
        self,
        n: int,
        size: int = 64,
        max_objects: int = 4,
        label: Literal["shape", "shape_color"] = "shape",
        tail: Literal["exp", "step"] = "exp",
        imbalance: int | float = 50,
        *,
        order: Literal["index", "random"] = "index",
        min_pixels: int | None = None,
        shapes: Values | None = None,
        colors: Values | None = None,
        fills: Values | None = None,
        backgrounds: Values | None = None,
        split: Split = "train",
    ) -> MultiLabelScenes:
        """Scenes of 1 to `max_objects` objects, labelled with the classes that are visible.

        The classes of objects follow the tail's profile exactly in expectation; which classes meet
        in a scene is not independent (blocks of classes like to meet, drawn with the seed). Labels
        are a little flatter than objects at the head, where a class may occur twice in a scene.

        Args:
            n: How many.
            size: Pixels per side.
            max_objects: Most objects per scene, 1 to 16; each number is as likely. An object that
                would cover more than 40 % of an earlier one is moved, or left out after 20 tries.
            label: What the classes are, in the order of `classification`.
            tail: Profile of the class frequencies; see `long_tail`.
            imbalance: Most frequent / rarest class; 1 is balanced.
            order: Whether classes become rarer by index or in random order.
            min_pixels: Visible pixels that a class needs to be a label; by default 25 for 64 pixels
                per side, and in proportion to the area otherwise.
            shapes: Shapes to use; by default all.
            colors: Colors to use.
            fills: Fills to use.
            backgrounds: Backgrounds to use.
            split: ``train``, ``validation`` or ``test``.

        Raises:
            InputError: If a value is not known or a number out of range.

        Examples:
            >>> scenes = ShapesWorld(0).multilabel(3, max_objects=2)
            >>> scenes.images.shape, scenes.labels.shape, scenes.boxes.shape
            ((3, 64, 64, 3), (3, 16), (3, 2, 4))
        """
        if label not in ("shape", "shape_color"):
            raise InputError(f"label {label!r} is not known; accepted: shape, shape_color")
        choices = Choices.of(shapes, colors, fills, backgrounds)
        members, names = class_list(label, choices)
        _check_scenes(size, 1, max_objects)
        if min_pixels is None:
            min_pixels = max(1, round(25 * (size / 64) ** 2))
        check_count("min_pixels", min_pixels)
        return draw_labelled_scenes(
            _numbers(split, n),
            seed=self.seed,
            size=size,
            objects=(1, max_objects),
            choices=choices,
            members=members,
            class_names=names,
            weights=self.long_tail(len(members), 10**6, imbalance, tail, order=order),
            min_pixels=min_pixels,
        )

    def segmentation(
        self,
        n: int,
        size: int = 64,
        objects: tuple[int, int] = (1, 3),
        *,
        shapes: Values | None = None,
        colors: Values | None = None,
        fills: Values | None = None,
        backgrounds: Values | None = None,
        split: Split = "train",
    ) -> Scenes:
        """Scenes with a semantic map, an instance map and a map of parts.

        Args:
            n: How many.
            size: Pixels per side.
            objects: Fewest and most objects per scene, from 1 to 16; see `multilabel`.
            shapes: Shapes to choose from; by default all.
            colors: Colors to choose from.
            fills: Fills to choose from.
            backgrounds: Backgrounds to choose from.
            split: ``train``, ``validation`` or ``test``.

        Raises:
            InputError: If a value is not known or a number out of range.

        Examples:
            >>> scenes = ShapesWorld(0).segmentation(2, shapes=["circle"], objects=(1, 1))
            >>> scenes.semantic.shape, np.unique(scenes.semantic).tolist()
            ((2, 64, 64), [0, 1])
        """
        _check_scenes(size, *objects)
        choices = Choices.of(shapes, colors, fills, backgrounds)
        return draw_scenes(
            _numbers(split, n),
            seed=self.seed,
            size=size,
            objects=objects,
            choices=choices,
            classes=lambda uniform: (
                choose(uniform[:, :, 0], choices.shapes),
                choose(uniform[:, :, 1], choices.colors),
            ),
        )

    def _attributes(
        self, indices: Int64[np.ndarray, " n"], choices: Choices
    ) -> Int64[np.ndarray, "n 4"]:
        uniform = uniforms(self.seed, "attributes", indices, 4)
        columns = [choose(uniform[:, column], values) for column, values in enumerate(choices)]
        return np.stack(columns, axis=1)

    def _dataset(
        self,
        members: Sequence[tuple[int, int]],
        names: Sequence[str],
        counts: Sequence[int],
        choices: Choices,
        split: str,
        *,
        first: int = 0,
        stride: int | None = None,
        lazy: bool = False,
        transform: Transform | None = None,
    ) -> ShapesDataset:
        """The first images of each class; those of class c are first + c, + stride, + stride..."""
        labels = np.repeat(np.arange(len(members), dtype=np.int64), counts)
        ranks = np.concatenate([np.arange(count) for count in counts])
        numbers = _start(split) + first + labels + ranks * (stride or len(members))
        order = np.argsort(raw(self.seed, "order", numbers, 1)[:, 0], kind="stable")
        labels, numbers = labels[order], numbers[order]
        fixed = np.array(members)[labels]
        attributes = self._attributes(numbers, choices)
        attributes[:, :2] = np.where(fixed < 0, attributes[:, :2], fixed)
        return ShapesDataset(
            attributes.astype(np.int16),
            numbers,
            labels.tolist(),
            names,
            seed=self.seed,
            size=self.size,
            split=split,
            lazy=lazy,
            transform=transform,
        )


def load_shapes(
    split: Split = "train",
    *,
    seed: int = 0,
    size: int = 32,
    classes: Literal["shape", "color", "shape_color"] | Pairs = "shape",
    n_per_class: int | None = None,
    counts: Sequence[int] | None = None,
    **options: Any,
) -> ShapesDataset:
    """A labelled data set of a new world, like ``load_images("shapes", split=...)``.

    Args:
        split: ``train``, ``validation`` or ``test``.
        seed: Seed of the world.
        size: Pixels per side.
        classes: What the classes are; see `ShapesWorld.classification`.
        n_per_class: Images of each class; by default 500 for training, 100 otherwise.
        counts: Images of each class, in place of `n_per_class`.
        options: Further arguments of `ShapesWorld.classification`.

    Raises:
        InputError: As `ShapesWorld.classification`.

    Examples:
        >>> data = load_shapes("test", classes="color")
        >>> len(data), data.class_names[:3]
        (1200, ['red', 'green', 'blue'])
    """
    if n_per_class is None and counts is None:
        n_per_class = 500 if split == "train" else 100
    world = ShapesWorld(seed, size)
    return world.classification(classes, n_per_class, counts=counts, split=split, **options)


def _check_scenes(size: int, fewest: int, most: int) -> None:
    check_seed_and_size(0, size)
    if not 1 <= fewest <= most <= MAX_OBJECTS:
        raise InputError(f"{fewest} to {most} objects; accepted: from 1 to {MAX_OBJECTS}")


def _check_split(split: str) -> None:
    if split not in ("train", "validation", "test"):
        raise InputError(f"split {split!r} is not known; accepted: train, validation, test")


def _refuse_beside_pairs(shapes: Values | None, colors: Values | None) -> None:
    if shapes is not None or colors is not None:
        raise InputError("pairs name shapes and colors already; leave out shapes and colors")


def _start(split: str) -> int:
    return _RANGES.index(split) * _RANGE


def _numbers(split: str, n: int) -> Int64[np.ndarray, " {n}"]:
    _check_split(split)
    check_count("n", n)
    return _start(split) + np.arange(n, dtype=np.int64)


def _share_out(n: int, parts: int) -> list[int]:
    return [n // parts + (part < n % parts) for part in range(parts)]

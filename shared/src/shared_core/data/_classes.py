"""Classes of the shapes world: what their images have in common, and how they are called."""

from collections.abc import Iterable, Sequence
from typing import Literal

from shared_core.data._attributes import (
    COLORS,
    SHAPES,
    Choices,
    Value,
    index_of,
    refuse_repeats,
)
from shared_core.errors import InputError

__all__ = ["class_list", "ood_pairs", "pairs_of"]


def pairs_of(pairs: Iterable[Sequence[Value]]) -> list[tuple[int, int]]:
    """Pairs of a shape and a color that a caller names, by index.

    Raises:
        InputError: If a value is not known, a pair is given twice, or there is none.
    """
    chosen = []
    for pair in pairs:
        if isinstance(pair, str) or len(pair) != 2:
            raise InputError(f"{pair!r} is no pair of a shape and a color")
        chosen.append((index_of("shapes", pair[0]), index_of("colors", pair[1])))
    refuse_repeats("pairs", chosen)
    return chosen


def class_list(
    classes: str | Iterable[Sequence[Value]], choices: Choices
) -> tuple[list[tuple[int, int]], list[str]]:
    """The shape and the color of each class, -1 where it may be any, and the classes' names.

    Args:
        classes: ``shape``, ``color``, ``shape_color``, or pairs of a shape and a color.
        choices: The shapes and colors to use, unless pairs are given.

    Raises:
        InputError: If it is none of these, or as `pairs_of`.
    """
    if not isinstance(classes, str):
        members = pairs_of(classes)
    elif classes == "shape":
        members = [(shape, -1) for shape in choices.shapes]
    elif classes == "color":
        members = [(-1, color) for color in choices.colors]
    elif classes == "shape_color":
        members = [(shape, color) for shape in choices.shapes for color in choices.colors]
    else:
        raise InputError(
            f"classes {classes!r} are not known; accepted: shape, color, shape_color, or pairs of "
            "a shape and a color"
        )
    return members, [_class_name(*member) for member in members]


def _class_name(shape: int, color: int) -> str:
    words = [COLORS[color]] if color >= 0 else []
    return " ".join(words + ([SHAPES[shape]] if shape >= 0 else []))


def ood_pairs(preset: Literal["demo"] = "demo") -> dict[str, list[tuple[int, int]]]:
    """Pairs of a shape and a color that are known or unknown.

    Returns:
        ``id``: 16 pairs, shape s from 0 to 7 with the colors s and s + 3 (modulo 6). ``near``: 48
        pairs with one attribute unknown, those shapes in the colors 9 to 11 and the shapes 12 to 15
        in the colors 0 to 5. ``far``: the shapes 12 to 15 in the colors 9 to 11.

    Raises:
        InputError: If the preset is not known.

    Examples:
        >>> [f"{COLORS[color]} {SHAPES[shape]}" for shape, color in ood_pairs()["id"]][:3]
        ['red circle', 'yellow circle', 'green square']
    """
    if preset != "demo":
        raise InputError(f"preset {preset!r} is not known; accepted: demo")
    known = [(shape, (shape + shift) % 6) for shape in range(8) for shift in (0, 3)]
    new_colors = [(shape, color) for shape in range(8) for color in range(9, 12)]
    new_shapes = [(shape, color) for shape in range(12, 16) for color in range(6)]
    far = [(shape, color) for shape in range(12, 16) for color in range(9, 12)]
    near = new_colors + new_shapes
    assert len({*known, *near, *far}) == len(known) + len(near) + len(far)
    return {"id": known, "near": near, "far": far}

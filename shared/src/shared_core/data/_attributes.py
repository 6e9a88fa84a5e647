"""The vocabularies of the shapes world, and how a caller names a part of one."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from shared_core.errors import InputError

# The order is part of the contract: splits and published class lists go by index.
SHAPES = (
    "circle",
    "square",
    "triangle",
    "diamond",
    "pentagon",
    "hexagon",
    "star",
    "cross",
    "ring",
    "heart",
    "crescent",
    "arrow",
    "bar",
    "flower",
    "gear",
    "drop",
)
COLORS = (
    "red",
    "green",
    "blue",
    "yellow",
    "orange",
    "purple",
    "pink",
    "cyan",
    "brown",
    "white",
    "gray",
    "black",
)
FILLS = ("solid", "striped", "dotted", "checkered", "gradient", "outlined")
BACKGROUNDS = ("plain", "noisy", "shaded", "gridded", "wavy", "speckled")

COLOR_VALUES = np.array(
    [
        (220, 40, 40),
        (50, 170, 70),
        (45, 80, 220),
        (240, 220, 50),
        (245, 145, 35),
        (140, 60, 180),
        (245, 130, 180),
        (60, 210, 220),
        (130, 85, 45),
        (245, 245, 245),
        (135, 135, 135),
        (20, 20, 20),
    ],
    dtype=np.uint8,
)
COLOR_VALUES.flags.writeable = False

Value = int | str  # an index or a name

VOCABULARIES = {
    "shapes": SHAPES,
    "colors": COLORS,
    "fills": FILLS,
    "backgrounds": BACKGROUNDS,
}


class Choices(NamedTuple):
    """Which shapes, colors, fills and backgrounds may occur, by index."""

    shapes: list[int]
    colors: list[int]
    fills: list[int]
    backgrounds: list[int]

    @classmethod
    def of(
        cls,
        shapes: Iterable[Value] | None = None,
        colors: Iterable[Value] | None = None,
        fills: Iterable[Value] | None = None,
        backgrounds: Iterable[Value] | None = None,
    ) -> "Choices":
        """The choices that a caller names; None means all.

        Raises:
            InputError: If a value is not known, is given twice, or there is none.
        """
        wanted = (shapes, colors, fills, backgrounds)
        return cls(*(_choose(name, w) for name, w in zip(VOCABULARIES, wanted, strict=True)))


def _choose(attribute: str, wanted: Iterable[Value] | None) -> list[int]:
    if wanted is None:
        return list(range(len(VOCABULARIES[attribute])))
    chosen = [index_of(attribute, value) for value in wanted]
    refuse_repeats(attribute, chosen)
    return chosen


def refuse_repeats(name: str, chosen: Sequence[object]) -> None:
    if not chosen:
        raise InputError(f"{name} is empty; name at least one, or leave it out for all")
    for value in chosen:
        if chosen.count(value) > 1:
            raise InputError(f"{name} holds {value} twice; name each once")


def index_of(attribute: str, value: Value) -> int:
    """The index of one value of an attribute.

    Raises:
        InputError: If the value is not known.
    """
    vocabulary = VOCABULARIES[attribute]
    if isinstance(value, str) and value in vocabulary:
        return vocabulary.index(value)
    if isinstance(value, int | np.integer) and 0 <= value < len(vocabulary):
        return int(value)
    raise InputError(
        f"{value!r} is none of the {attribute}; accepted: 0 to {len(vocabulary) - 1}, or "
        f"{', '.join(vocabulary)}"
    )


def check_attributes(attributes: Int[np.ndarray, "n 4"]) -> None:
    """Check rows of shape, color, fill and background; the first three are -1 without an object.

    Raises:
        InputError: If an index is out of range, or only a part of an object is there.
    """
    for (name, vocabulary), column in zip(VOCABULARIES.items(), attributes.T, strict=True):
        lowest = 0 if name == "backgrounds" else -1
        bad = column[(column < lowest) | (column >= len(vocabulary))]
        if bad.size:
            raise InputError(
                f"{bad[0]} is none of the {name}; accepted: 0 to {len(vocabulary) - 1}"
                + (", and -1 for no object" if lowest else "")
            )
    absent = attributes[:, :3] < 0
    if (absent.any(axis=1) != absent.all(axis=1)).any():
        raise InputError("shape, color and fill have to be -1 together, which is no object")

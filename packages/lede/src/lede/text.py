"""The demo's text: easy and hard stretches of one stream, by kind.

``prose`` and ``code`` are what CPython ships; ``table`` counts and repeats (easy); ``digits`` are
random groups of digits, each followed by its copy, so that a model must look back.
"""

import numpy as np

from shared_core.data.text import pydoc_text
from shared_core.errors import InputError

__all__ = ["SEGMENTS", "segment_text"]

SEGMENTS = ("prose", "code", "table", "digits")


def _table(generator: np.random.Generator, size: int) -> str:
    parts: list[str] = []
    length = 0
    names = ["alpha", "beta", "gamma", "delta", "north", "south", "red", "blue"]
    while length < size:
        start, step = int(generator.integers(0, 90)), int(generator.integers(1, 4))
        name = names[int(generator.integers(len(names)))]
        rows = [f"| {name} | {start + step * i:4d} | ok |" for i in range(12)]
        parts.append("\n".join(["| name | value | state |", *rows]) + "\n")
        length += len(parts[-1])
    return "".join(parts)[:size]


def _digits(generator: np.random.Generator, size: int) -> str:
    parts: list[str] = []
    length = 0
    while length < size:
        number = "".join(map(str, generator.integers(0, 10, size=5)))
        parts.append(f"{number}={number};\n")
        length += len(parts[-1])
    return "".join(parts)[:size]


def segment_text(kind: str, split: str, *, seed: int = 0, size: int = 400_000) -> str:
    """ASCII text of one kind.

    Args:
        kind: One of `SEGMENTS`.
        split: ``train``, ``validation`` or ``test``.
        seed: Of the generated kinds; every split draws its own.
        size: Most characters.

    Raises:
        InputError: If the kind is unknown.

    Examples:
        >>> segment_text("table", "train", size=24)
        '| name | value | state |'
    """
    if kind not in SEGMENTS:
        raise InputError(f"segment {kind!r} is not known; accepted: {', '.join(SEGMENTS)}")
    if kind in ("prose", "code"):
        text = pydoc_text(split, kind="docs" if kind == "prose" else "code")  # type: ignore[arg-type]
        return text.encode("ascii", "replace").decode()[:size]
    number = ("train", "validation", "test").index(split)
    generator = np.random.default_rng([seed, number, SEGMENTS.index(kind)])
    return (_table if kind == "table" else _digits)(generator, size)

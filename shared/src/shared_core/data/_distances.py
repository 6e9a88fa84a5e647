"""The silhouettes of the shapes world, as signed distance functions.

A distance is negative inside and given in object coordinates: u to the right and v down, both from
-1 to 1 over the object. Near the edge it is metric or close to it, which is what anti-aliasing
needs; far inside it need not be.
"""

# numpy's operators give Any.
# mypy: disable-error-code="no-any-return"

import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Float32, Int64

from shared_core.data._attributes import SHAPES

__all__ = ["groups", "inner_distance", "norm", "signed_distance"]

Planes = Float32[np.ndarray, "n h w"]
Index = Int64[np.ndarray, " n"]

_OUTLINE = 0.14  # width of an outline, in object coordinates


def groups(values: Index) -> list[tuple[int, Int64[np.ndarray, " m"]]]:
    """The positions of each value that occurs, from 0 upwards."""
    present = np.flatnonzero(np.bincount(values[values >= 0]))
    return [(int(value), np.flatnonzero(values == value)) for value in present]


def norm(u: Planes, v: Planes) -> Planes:
    return np.sqrt(u * u + v * v)


def _disc(u: Planes, v: Planes) -> Planes:
    return norm(u, v) - 0.95


def _square(u: Planes, v: Planes) -> Planes:
    return np.maximum(abs(u), abs(v)) - 0.82


def _diamond(u: Planes, v: Planes) -> Planes:
    tilted = 1.35 * abs(u) + 0.85 * abs(v)
    return 0.7 * (tilted - 0.9)


def _normals(sides: int) -> list[tuple[float, float]]:
    """The directions that the sides of a regular polygon on a flat base face."""
    turns = [math.pi / 2 + 2 * math.pi * side / sides for side in range(sides)]
    return [(math.cos(turn), math.sin(turn)) for turn in turns]


def _polygon(sides: int) -> Callable[[Planes, Planes], Planes]:
    """A regular polygon, as an intersection of half-planes."""

    def distance(u: Planes, v: Planes) -> Planes:
        farthest = np.full_like(u, -9)
        for across, down in _normals(sides):
            np.maximum(farthest, across * u + down * v, out=farthest)
        return farthest - math.cos(math.pi / sides)

    return distance


def _upward_cosine(u: Planes, v: Planes) -> tuple[Planes, Planes]:
    """The distance from the center, and the cosine of the angle from straight up."""
    r = norm(u, v)
    return r, -v / np.maximum(r, 1e-6)


def _fivefold(c: Planes) -> Planes:
    """The cosine of 5 times the angle whose cosine is given (a Chebyshev polynomial)."""
    square = c * c
    return ((16 * square - 20) * square + 5) * c


def _star(u: Planes, v: Planes) -> Planes:
    """The pentagram with a tip upwards: where at most one of the five half-planes is left."""
    first = np.full_like(u, -9)
    second = np.full_like(u, -9)
    for across, down in _normals(5):
        beyond = across * u - down * v
        np.maximum(second, np.minimum(first, beyond), out=second)
        np.maximum(first, beyond, out=first)
    return second - math.cos(2 * math.pi / 5)


def _cross(u: Planes, v: Planes) -> Planes:
    u, v = abs(u), abs(v)
    narrow, long = 0.3, 0.95
    return np.minimum(np.maximum(u - narrow, v - long), np.maximum(u - long, v - narrow))


def _ring(u: Planes, v: Planes) -> Planes:
    return abs(norm(u, v) - 0.7) - 0.22


def _heart(u: Planes, v: Planes, scale: float = 1.2) -> Planes:
    """The sextic (x^2 + y^2 - 1)^3 = x^2 y^3, over its gradient: metric only near the edge."""
    x = scale * u
    y = 0.1 - scale * v
    xx, yy = x * x, y * y
    a = xx + yy - 1
    aa = a * a
    across = x * (6 * aa - 2 * yy * y)
    down = y * (6 * aa - 3 * xx * y)
    slope = scale * norm(across, down) + 1e-4
    return (aa * a - xx * yy * y) / slope


def _crescent(u: Planes, v: Planes) -> Planes:
    bite = 0.75 - norm(u - 0.42, v)
    return np.maximum(_disc(u, v), bite)


def _arrow(u: Planes, v: Planes) -> Planes:
    v = abs(v)
    # From -0.95 to 0.5: it ends inside the head, so that no edge is left between the two.
    shaft = np.maximum(v - 0.22, abs(u + 0.225) - 0.725)
    diagonal = math.sqrt(0.5) * (v + u - 0.95)
    return np.minimum(shaft, np.maximum(diagonal, 0.1 - u))


def _bar(u: Planes, v: Planes) -> Planes:
    return np.maximum(abs(u) - 1, abs(v) - 0.3)


def _flower(u: Planes, v: Planes) -> Planes:
    r, c = _upward_cosine(u, v)
    return r - (0.72 + 0.26 * _fivefold(c))


def _gear(u: Planes, v: Planes) -> Planes:
    r, cosine = _upward_cosine(u, v)
    for _ in range(3):  # doubles the angle
        cosine = 2 * cosine * cosine - 1
    teeth = np.clip(4 * cosine, -1, 1)
    return r - (0.78 + 0.16 * teeth)


def _drop(u: Planes, v: Planes) -> Planes:
    """A disc with the tangents from a point above it."""
    middle, radius, tip = 0.3, 0.62, -1.0
    sin = radius / (middle - tip)  # of half the angle at the tip
    cos = math.sqrt(1 - sin**2)
    disc = norm(u, v - middle) - radius
    side = cos * abs(u) - sin * (v - tip)
    along = sin * abs(u) + cos * (v - tip)
    return np.where(along < cos * (middle - tip), side, disc)


_DISTANCES: dict[str, Callable[[Planes, Planes], Planes]] = {
    "circle": _disc,
    "square": _square,
    "triangle": _polygon(3),
    "diamond": _diamond,
    "pentagon": _polygon(5),
    "hexagon": _polygon(6),
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "heart": _heart,
    "crescent": _crescent,
    "arrow": _arrow,
    "bar": _bar,
    "flower": _flower,
    "gear": _gear,
    "drop": _drop,
}


def signed_distance(shape: Index, u: Planes, v: Planes) -> Planes:
    """The distance of every point to the edge of each object; shape -1 has no inside."""
    distance = np.full_like(u, 9)
    for index, members in groups(shape):
        distance[members] = _DISTANCES[SHAPES[index]](u[members], v[members])
    return distance


def inner_distance(shape: Index, u: Planes, v: Planes, distance: Planes) -> Planes:
    """The same for the part of each object that its outline leaves."""
    inner = distance + _OUTLINE
    hearts = np.flatnonzero(shape == SHAPES.index("heart"))
    if hearts.size:  # their distance is not metric that far inside, so this is a smaller heart
        inner[hearts] = _heart(u[hearts], v[hearts], scale=1.45)
    return inner

"""Random numbers that are the same on every machine, and that any image can draw on its own.

Only the raw 64-bit stream of PCG64 is used, which numpy keeps stable, and never a `Generator`,
whose methods may change. Row i of a draw sits at a fixed place of the stream, so it does not depend
on what else is drawn.
"""

# numpy's operators give Any.
# mypy: disable-error-code="no-any-return"

import functools
import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Float64, Int64, UInt64
from numpy.lib.stride_tricks import sliding_window_view

from shared_core.errors import InputError

_STREAMS = {
    "noise": 1,
    "image": 2,
    "attributes": 3,
    "object": 4,
    "scene": 5,
    "order": 6,
    "caption": 7,
    "blocks": 8,
    "ranks": 9,
}
_POOL = 2**20


def raw(
    seed: int, stream: str, indices: Int64[np.ndarray, " n"], width: int
) -> UInt64[np.ndarray, "n {width}"]:
    """Rows of 64 random bits each: row i is a function of the seed, the stream and its index.

    Args:
        seed: A seed, at least 0.
        stream: Which of the independent streams.
        indices: The index of each row, at least 0, in any order.
        width: Numbers per row; rows of different widths overlap.

    Raises:
        InputError: If the seed is negative.
    """
    if seed < 0:
        raise InputError(f"seed={seed}; it has to be at least 0")
    bits = np.random.PCG64((_STREAMS[stream], seed))
    places, where = np.unique(indices, return_inverse=True)
    rows = np.empty((places.size, width), dtype=np.uint64)
    position = 0
    # Neighbours in the stream are drawn in one call.
    breaks = np.flatnonzero(np.diff(places) != 1) + 1
    for first, end in itertools.pairwise([0, *breaks.tolist(), places.size]):
        wanted = width * int(places[first]) if places.size else 0
        bits.advance(wanted - position)
        rows[first:end] = bits.random_raw((end - first) * width).reshape(-1, width)
        position = wanted + (end - first) * width
    return rows[where]


def uniforms(
    seed: int, stream: str, indices: Int64[np.ndarray, " n"], width: int
) -> Float64[np.ndarray, "n {width}"]:
    """Rows of uniform numbers in [0, 1), from the top 53 bits of `raw`."""
    return (raw(seed, stream, indices, width) >> np.uint64(11)) * 2.0**-53


def permutation(seed: int, stream: str, n: int) -> Int64[np.ndarray, " {n}"]:
    """A random order of n things."""
    return np.argsort(raw(seed, stream, np.arange(n), 1)[:, 0], kind="stable")


def pick(uniform: Float64[np.ndarray, "*n"], choices: int) -> Int64[np.ndarray, "*n"]:
    """Uniform numbers in [0, 1) as integers from 0 to ``choices - 1``."""
    return (uniform * choices).astype(np.int64)


def choose(uniform: Float64[np.ndarray, "*n"], values: Sequence[int]) -> Int64[np.ndarray, "*n"]:
    """Uniform numbers in [0, 1) as one of the values each."""
    return np.array(values, dtype=np.int64)[pick(uniform, len(values))]


def box_muller(
    first: Float64[np.ndarray, "*shape"], second: Float64[np.ndarray, "*shape"]
) -> Float64[np.ndarray, "*shape"]:
    """One standard normal number per pair of uniform ones in [0, 1) (Box and Muller, 1958)."""
    return np.sqrt(-2 * np.log1p(-first)) * np.cos(2 * np.pi * second)


@functools.cache
def _pool() -> Float32[np.ndarray, " 1048576"]:
    first, second = uniforms(0, "noise", np.arange(_POOL), 2).T
    pool = box_muller(first, second).astype(np.float32)
    pool.flags.writeable = False
    return pool


def noise(offsets: Float64[np.ndarray, " n"], length: int) -> Float32[np.ndarray, "n {length}"]:
    """Rows of standard normal noise, cut out of one fixed pool of 2**20 numbers.

    Drawing fresh numbers would take most of the time of rendering; a window of the pool at a random
    place costs a copy.

    Args:
        offsets: Where in the pool each row starts, in [0, 1).
        length: Numbers per row, below the size of the pool.
    """
    return sliding_window_view(_pool(), length)[pick(offsets, _POOL - length + 1)]

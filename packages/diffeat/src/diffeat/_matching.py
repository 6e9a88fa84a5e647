"""Nearest neighbours between enlarged feature maps, without enlarging the features.

Bilinear enlargement is linear. So the inner products of a query with all pixels of the enlarged map
are the enlarged map of the inner products, and the squared length of an enlarged feature is a
quadratic form in the inner products of the four features around it. Both need maps of the small
size only, and sums over channels: layers and groups of channels add up one after another.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

GROUP = 256  # channels at a time


def _corners(size: int, length: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each of `length` pixels the positions of `size` before and after it.

    And the weight of the one after, as `interpolate` with ``align_corners=False`` has them.
    """
    at = ((torch.arange(length, device=device) + 0.5) * size / length - 0.5).clamp_min(0)
    first = at.long().clamp_max(size - 1)
    return first, (first + 1).clamp_max(size - 1), at - first


def _at(features: Tensor, where: Tensor, size: int) -> Tensor:
    """Columns ``[C, N]`` of the enlarged map ``[C, size, size]`` at pixels (x, y)."""
    top, bottom, down = _corners(features.shape[1], size, features.device)
    left, right, across = _corners(features.shape[2], size, features.device)
    x, y = where[:, 0], where[:, 1]
    down, across = down[y], across[x]
    above = features[:, top[y], left[x]] * (1 - across) + features[:, top[y], right[x]] * across
    below = features[:, bottom[y], left[x]] * (1 - across)
    below = below + features[:, bottom[y], right[x]] * across
    return above * (1 - down) + below * down


def _products(features: Tensor) -> Tensor:
    """Inner products ``[5, h + 1, w + 1]`` of features and their neighbours.

    Of each with itself, its right, lower and lower right neighbour, and of its right with its lower
    neighbour; borders are repeated.
    """
    f = F.pad(features[None], (0, 2, 0, 2), mode="replicate")[0]
    here, right, below, across = f[:, :-1, :-1], f[:, :-1, 1:], f[:, 1:, :-1], f[:, 1:, 1:]
    pairs = ((here, here), (here, right), (here, below), (here, across), (right, below))
    return torch.stack([(a * b).sum(0) for a, b in pairs])


def _lengths(products: Tensor, size: int) -> Tensor:
    """Squared length of each feature of the enlarged map, ``[size, size]``."""
    height, width = (n - 1 for n in products.shape[1:])
    top, _, down = _corners(height, size, products.device)
    left, _, across = _corners(width, size, products.device)
    b, d = down[:, None].to(products.dtype), across.to(products.dtype)
    a, c = 1 - b, 1 - d
    same, right, below, diagonal, other = products

    def at(values: Tensor, y: int = 0, x: int = 0) -> Tensor:
        return values[top + y][:, left + x]

    squares = (a * c) ** 2 * at(same) + (a * d) ** 2 * at(same, 0, 1)
    squares = squares + (b * c) ** 2 * at(same, 1) + (b * d) ** 2 * at(same, 1, 1)
    rows = a**2 * at(right) + b**2 * at(right, 1)
    columns = c**2 * at(below) + d**2 * at(below, 0, 1)
    crossed = at(diagonal) + at(other)
    return squares + 2 * (rows * c * d + columns * a * b + crossed * a * b * c * d)


def match(layers: Iterable[tuple[Tensor, Tensor]], where: Tensor, size: int) -> Tensor:
    """Pixels (x, y) of the target, by cosine similarity of all layers joined.

    Args:
        layers: Source and target maps ``[C, h, w]`` of each layer, all of one size.
        where: Whole pixels (x, y) of the enlarged source.
        size: Side of both enlarged maps.
    """
    dots: Tensor | None = None
    products: Tensor | None = None
    for source, target in layers:
        for s, t in zip(torch.split(source, GROUP), torch.split(target, GROUP), strict=True):
            s, t = s.float(), t.float()
            some = torch.einsum("cn,chw->nhw", _at(s, where, size), t)
            dots = some if dots is None else dots + some
            more = _products(t)
            products = more if products is None else products + more
    assert dots is not None
    assert products is not None
    scale = _lengths(products, size).clamp_min(1e-24).rsqrt()
    best = []
    for few in torch.split(dots, 16):
        big = F.interpolate(few[None], (size, size), mode="bilinear", align_corners=False)[0]
        best.append((big * scale).flatten(1).argmax(1))
    index = torch.cat(best)
    return torch.stack([index % size, index // size], 1)

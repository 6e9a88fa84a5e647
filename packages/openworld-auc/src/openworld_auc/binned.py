"""OpenworldAUC in constant memory: histograms of the scores, and how far off they can be."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from openworld_auc._checks import check_samples, check_scores
from shared_core.errors import InputError

__all__ = [
    "BinnedAUC",
    "area_of_histograms",
    "bin_edges",
    "histograms",
    "openworld_auc_binned",
]


class BinnedAUC(NamedTuple):
    """A binned area and its exact error bound.

    Attributes:
        value: The area in which pairs of one bin count one half.
        bound: The exact area lies within ``value ± bound``.
    """

    value: Tensor
    bound: Tensor


def bin_edges(bins: int | Shaped[Tensor, " edges"]) -> Float[Tensor, " edges"]:
    """Edges of score bins, float64; scores outside fall into two end bins.

    A number of bins gives edges uniform in logit(r) from -16 to 16, because maxima of softmaxes
    pile up near 1, where bins uniform in r would hold most of them.

    Args:
        bins: Number of bins for scores in [0, 1], or ascending edges for scores of any range.

    Raises:
        InputError: If there are fewer than 2 bins, or edges do not ascend.

    Examples:
        >>> bin_edges(4)
        tensor([1.1254e-07, 3.3535e-04, 5.0000e-01, 9.9966e-01, 1.0000e+00], dtype=torch.float64)
    """
    if isinstance(bins, Tensor):
        edges = bins.detach().cpu().double()
        if edges.ndim != 1 or len(edges) < 1 or not (edges.diff() > 0).all() or edges.isnan().any():
            raise InputError("bins as a tensor are edges; accepted: [edges], strictly ascending")
        return edges
    if bins < 2:
        raise InputError(f"bins is {bins}; accepted: 2 or more, or a tensor of ascending edges")
    return torch.linspace(-16, 16, bins + 1, dtype=torch.float64).sigmoid()


def histograms(
    scores: Shaped[Tensor, " n"],
    correct: Shaped[Tensor, " n"],
    is_base: Shaped[Tensor, " n"],
    edges: Shaped[Tensor, " edges"],
) -> Int[Tensor, "4 bins"]:
    """Counts in each bin: correct base, correct new, all base, all new samples.

    Args:
        scores: Checked scores.
        correct: Bool.
        is_base: Bool.
        edges: From `bin_edges`; a score on an edge belongs to the bin below it.
    """
    bins = torch.bucketize(scores.to(edges.dtype), edges)
    rows = (is_base & correct, ~is_base & correct, is_base, ~is_base)
    return torch.stack([torch.bincount(bins[row], minlength=len(edges) + 1) for row in rows])


def area_of_histograms(base: Int[Tensor, " bins"], new: Int[Tensor, " bins"]) -> BinnedAUC:
    """The area of two histograms as a sum over pairs (not yet divided by N_b N_n), and its bound.

    Args:
        base: Counts of (correct) base samples by ascending score.
        new: Counts of (correct) new samples.
    """
    same = (base * new).sum().double() / 2
    below = new.cumsum(0) - new
    return BinnedAUC((base * below).sum().double() + same, same)


def openworld_auc_binned(
    scores: Float[Tensor, " n"],
    correct: Shaped[Tensor, " n"],
    is_base: Shaped[Tensor, " n"],
    *,
    bins: int | Shaped[Tensor, " edges"] = 1024,
) -> BinnedAUC:
    """`openworld_auc` from histograms, with the exact bound of its error.

    Two samples in one bin count one half, so the error is at most
    ``1/2 sum_bin H_b H_n / (N_b N_n)``, which is returned beside the value.

    Args:
        scores: Detector scores, [n]; in [0, 1] unless `bins` are edges.
        correct: Correctness as bool, [n]; there is no soft form in bins.
        is_base: Domain of each sample, [n].
        bins: See `bin_edges`.

    Raises:
        InputError: As `openworld_auc`; if scores leave [0, 1] without edges of your own; if
            `correct` is soft.

    Examples:
        >>> scores = torch.tensor([0.9, 0.8, 0.3, 0.6, 0.1])
        >>> correct = torch.tensor([True, False, True, True, True])
        >>> is_base = torch.tensor([True, True, True, False, False])
        >>> value, bound = openworld_auc_binned(scores, correct, is_base, bins=64)
        >>> value.item(), bound.item()
        (0.5, 0.0)
    """
    samples = check_samples(scores, correct, is_base)
    edges = bin_edges(bins).to(samples.base_scores.device)
    check_binnable(check_scores(scores), correct, default_edges=not isinstance(bins, Tensor))
    pooled = torch.cat([samples.base_scores, samples.new_scores])
    base = torch.arange(len(pooled), device=pooled.device) < len(samples.base_scores)
    right = torch.cat([samples.base_correct, samples.new_correct])
    hit_base, hit_new, all_base, all_new = histograms(pooled, right, base, edges)
    value, bound = area_of_histograms(hit_base, hit_new)
    pairs = (all_base.sum() * all_new.sum()).double()
    return BinnedAUC(value / pairs, bound / pairs)


def check_binnable(
    scores: Shaped[Tensor, " n"], correct: Shaped[Tensor, " n"], *, default_edges: bool
) -> None:
    """Refuse soft correctness, and scores outside [0, 1] where the edges are the default ones."""
    if correct.is_floating_point():
        raise InputError("correct is soft; bins count samples and need it as bool: use bins=None")
    if default_edges and len(scores) and not ((scores >= 0) & (scores <= 1)).all():
        raise InputError(
            f"scores reach from {scores.min().item():g} to {scores.max().item():g}; a number of "
            "bins is for scores in [0, 1]: pass a tensor of edges as bins instead"
        )

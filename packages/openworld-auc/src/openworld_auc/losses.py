"""The gated pairwise AUC loss: base samples should score above new ones, pair by weighted pair."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from openworld_auc._checks import check_choice
from shared_core.errors import InputError

__all__ = ["GatedPairwiseAUCLoss", "Surrogate", "gated_pairwise_auc_loss"]

Surrogate = Literal["square", "squared_hinge", "logistic", "exponential"]
SURROGATES = ("square", "squared_hinge", "logistic", "exponential")
# From this many pairs on, the square loss is computed from sums instead of a matrix of pairs.
MANY_PAIRS = 2**16


def gated_pairwise_auc_loss(
    scores: Float[Tensor, " n"],
    is_positive: Shaped[Tensor, " n"],
    weight: Float[Tensor, " n"] | None = None,
    *,
    surrogate: Surrogate = "square",
    margin: float = 1.0,
    reduction: Literal["mean", "sum"] = "mean",
) -> Float[Tensor, ""]:
    """Surrogate of the pairs ranked wrong, each pair weighted by the gates of its two samples.

    ``1/(|P||N|) sum_ij w_i w_j l(s_i - s_j)`` over positives i and negatives j, with
    ``l(z) = (margin - z)²`` for ``square``, its positive part squared for ``squared_hinge``,
    ``log(1 + exp(-z))`` and ``exp(-z)``. The mean is over pairs and is not divided by the weights.
    Without a pair it is zero with zero gradient.

    Args:
        scores: Detector scores, [n].
        is_positive: Which samples should score high, bool, [n].
        weight: Gate of each sample, [n]; by default 1.
        surrogate: The loss of one pair.
        margin: Of the first two surrogates.
        reduction: ``mean`` over pairs, or ``sum``.

    Raises:
        InputError: If shapes differ or a choice is not known.

    Source:
        Hua et al. (ICML 2025), the gated ranking term of GMoP; the square surrogate is the paper's.

    Example:
        >>> scores = torch.tensor([0.9, 0.2], dtype=torch.float64)
        >>> round(gated_pairwise_auc_loss(scores, torch.tensor([True, False])).item(), 4)
        0.09
    """
    check_choice("surrogate", surrogate, SURROGATES)
    check_choice("reduction", reduction, ("mean", "sum"))
    if scores.ndim != 1 or is_positive.shape != scores.shape or is_positive.dtype != torch.bool:
        raise InputError(
            f"scores has shape {list(scores.shape)}, is_positive {list(is_positive.shape)} and "
            f"dtype {is_positive.dtype}; accepted: [n] and [n] of dtype bool"
        )
    if weight is not None and weight.shape != scores.shape:
        raise InputError(f"weight has shape {list(weight.shape)}; accepted: {list(scores.shape)}")
    w = torch.ones_like(scores) if weight is None else weight
    s, u = scores[is_positive], scores[~is_positive]
    w, v = w[is_positive], w[~is_positive]
    pairs = len(s) * len(u)
    if pairs == 0:
        return scores[:0].sum() + w[:0].sum()
    if surrogate == "square" and pairs > MANY_PAIRS:
        total = _square_from_moments(margin - s, u, w, v)
    else:
        total = (w[:, None] * v * _surrogate(s[:, None] - u, surrogate, margin)).sum()
    return total / pairs if reduction == "mean" else total


def _surrogate(z: Tensor, surrogate: str, margin: float) -> Tensor:
    if surrogate == "square":
        return (margin - z) ** 2
    if surrogate == "squared_hinge":
        return F.relu(margin - z) ** 2
    if surrogate == "logistic":
        return F.softplus(-z)
    return torch.exp(-z)


def _square_from_moments(a: Tensor, u: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """``sum_ij w_i v_j (a_i + u_j)²`` in linear time."""
    return (
        (w * a**2).sum() * v.sum() + 2 * (w * a).sum() * (v * u).sum() + w.sum() * (v * u**2).sum()
    )


class GatedPairwiseAUCLoss(nn.Module):
    """`gated_pairwise_auc_loss` as a module.

    Args:
        surrogate: The loss of one pair: square, squared_hinge, logistic or exponential.
        margin: Of the first two.
        reduction: ``mean`` over pairs, or ``sum``.

    Raises:
        InputError: If a choice is not known.

    Example:
        >>> loss = GatedPairwiseAUCLoss("squared_hinge")
        >>> loss(torch.tensor([2.0, 0.5]), torch.tensor([True, False])).item()
        0.0
    """

    def __init__(
        self,
        surrogate: Surrogate = "square",
        margin: float = 1.0,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> None:
        super().__init__()
        check_choice("surrogate", surrogate, SURROGATES)
        check_choice("reduction", reduction, ("mean", "sum"))
        self.surrogate: Surrogate = surrogate
        self.margin = margin
        self.reduction: Literal["mean", "sum"] = reduction

    def forward(
        self,
        scores: Float[Tensor, " n"],
        is_positive: Shaped[Tensor, " n"],
        weight: Float[Tensor, " n"] | None = None,
    ) -> Float[Tensor, ""]:
        """The loss; see `gated_pairwise_auc_loss`."""
        return gated_pairwise_auc_loss(
            scores,
            is_positive,
            weight,
            surrogate=self.surrogate,
            margin=self.margin,
            reduction=self.reduction,
        )

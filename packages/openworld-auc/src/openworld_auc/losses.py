"""The gated pairwise AUC loss: base samples should score above new ones, pair by weighted pair."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from openworld_auc._checks import check_choice
from openworld_auc._parallel import join_batches
from shared_core.errors import InputError

__all__ = ["GatedPairwiseAUCLoss", "Surrogate", "gated_pairwise_auc_loss"]

Surrogate = Literal["square", "squared_hinge", "logistic", "exponential"]
SURROGATES = ("square", "squared_hinge", "logistic", "exponential")
# Where there can be more pairs, the square loss is computed from sums, not a matrix of pairs.
MANY_PAIRS = 2**16


def gated_pairwise_auc_loss(
    scores: Float[Tensor, " n"],
    is_positive: Shaped[Tensor, " n"],
    weight: Float[Tensor, " n"] | None = None,
    *,
    surrogate: Surrogate = "square",
    margin: float = 1.0,
    reduction: Literal["mean", "sum"] = "mean",
    sync: bool = False,
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
        sync: Whether the batches of all processes of torch.distributed are one, with pairs across
            them. Each process then has the loss of the joint batch, and the gradients that
            DistributedDataParallel averages are those of one process with that batch. All of them
            have to call.

    Raises:
        InputError: If shapes differ or a choice is not known.

    Source:
        Hua et al. (ICML 2025), the gated ranking term of GMoP; the square surrogate is the paper's.

    Examples:
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
    if sync:
        scores, w = join_batches(torch.stack([scores, w], 1)).unbind(1)
        is_positive = join_batches(is_positive)
    # Masks in place of selections, whose sizes a GPU would have to tell the CPU first.
    w, v = torch.where(is_positive, w, 0), torch.where(is_positive, 0, w)
    if surrogate == "square" and len(scores) ** 2 > 4 * MANY_PAIRS:
        total = _square_from_moments(margin - scores, scores, w, v)
    else:
        is_pair = is_positive[:, None] & ~is_positive
        z = torch.where(is_pair, scores[:, None] - scores, 0)
        total = (w[:, None] * v * _surrogate(z, surrogate, margin)).sum()
    if reduction == "sum":
        return total
    return total / (is_positive.sum() * (~is_positive).sum()).clamp(min=1)


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
        sync: Whether the batches of all processes are one; see `gated_pairwise_auc_loss`.

    Raises:
        InputError: If a choice is not known.

    Examples:
        >>> loss = GatedPairwiseAUCLoss("squared_hinge")
        >>> loss(torch.tensor([2.0, 0.5]), torch.tensor([True, False])).item()
        0.0
    """

    def __init__(
        self,
        surrogate: Surrogate = "square",
        margin: float = 1.0,
        reduction: Literal["mean", "sum"] = "mean",
        sync: bool = False,
    ) -> None:
        super().__init__()
        check_choice("surrogate", surrogate, SURROGATES)
        check_choice("reduction", reduction, ("mean", "sum"))
        self.surrogate: Surrogate = surrogate
        self.margin = margin
        self.reduction: Literal["mean", "sum"] = reduction
        self.sync = sync

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
            sync=self.sync,
        )

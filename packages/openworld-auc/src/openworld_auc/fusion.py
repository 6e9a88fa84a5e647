"""A detector without training that weighs two readings of one classifier by their uncertainty."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from shared_core.errors import InputError

__all__ = ["erf_scores"]


def erf_scores(logits: Float[Tensor, "n classes"], n_base: int) -> Float[Tensor, " n"]:
    """Rank fusion of the largest and the summed base probability, weighted by entropies.

    With p the softmax over all names, both readings are replaced by their ranks among the n
    samples, in (0, 1), and mixed with weights ``w_sum = H_m / (H_s + H_m)`` and ``w_max = H_s /
    (H_s + H_m)``: H_s is the binary entropy of the sum over log 2, H_m the entropy of p over log C.
    The score is transductive: a sample's rank depends on the others, so give the whole test set.

    Args:
        logits: Over all class names, base classes first.
        n_base: How many of them are base classes.

    Raises:
        InputError: If there are no base or no new columns.

    Source:
        Li, Wang and Zhang, Rethinking Open-world Prompt Tuning (AAAI 2026).

    Examples:
        >>> erf_scores(torch.tensor([[5.0, 0.0, 0.0], [0.0, 0.0, 5.0]]), 2)
        tensor([0.7500, 0.2500])
    """
    if not 0 < n_base < logits.shape[1]:
        raise InputError(
            f"{n_base} of {logits.shape[1]} columns are base classes; accepted: at least one base "
            "and one new"
        )
    log_p = logits.double().log_softmax(1)
    largest = log_p[:, :n_base].amax(1)
    inside, outside = log_p[:, :n_base].logsumexp(1), log_p[:, n_base:].logsumexp(1)
    h_s = -(inside.exp() * inside + outside.exp() * outside) / math.log(2)
    h_m = -(log_p.exp() * log_p).sum(1) / math.log(logits.shape[1])
    # Both are 0 only where nothing is uncertain; either reading is as good then.
    sure = h_s + h_m == 0
    w_sum = torch.where(sure, 0.5, h_m / (h_s + h_m))
    return (w_sum * _ranks(inside - outside) + (1 - w_sum) * _ranks(largest)).to(logits.dtype)


def _ranks(values: Tensor) -> Tensor:
    ordered = values.sort().values
    low, high = torch.searchsorted(ordered, values), torch.searchsorted(ordered, values, right=True)
    return (low + high).double() / (2 * len(values))

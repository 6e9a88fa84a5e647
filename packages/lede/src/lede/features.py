"""What a policy may look at: the confidence and uncertainty of an exit's distribution.

Everything here is a function of the distribution, never of the token drawn from it. A decision
that looked at the drawn token would bias sampled output.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["FEATURES", "confidence_features"]

FEATURES = ("p1", "margin", "entropy")


def confidence_features(
    logits: Float[Tensor, "*batch vocabulary"],
) -> tuple[Float[Tensor, "*batch 3"], Int[Tensor, "*batch"]]:
    """Top probability, its margin over the second, normalised entropy; and the top token.

    Args:
        logits: Of one exit, after any logits processors (so entries may be ``-inf``).

    Returns:
        The features p₁, p₁ - p₂ and H(q) / ln V in float32, and the most likely token (the first
        of equals). NaN logits give NaN features.

    Examples:
        >>> features, token = confidence_features(torch.tensor([[0.0, 0.0] + 2 * [-torch.inf]]))
        >>> features
        tensor([[0.5000, 0.0000, 0.5000]])
    """
    log_q = torch.log_softmax(logits.float(), dim=-1)
    q = log_q.exp()
    top = q.topk(2, dim=-1).values if q.shape[-1] > 1 else q.expand(*q.shape[:-1], 2)
    # 0 · -inf is NaN; a masked token adds nothing to the entropy.
    entropy = -(q * log_q.masked_fill(log_q == -torch.inf, 0.0)).sum(-1)
    scale = math.log(max(q.shape[-1], 2))
    features = torch.stack([top[..., 0], top[..., 0] - top[..., 1], entropy / scale], dim=-1)
    return features, logits.argmax(-1)

"""The score: how much likelier known texts are than negative ones, averaged over groups (Eq. 11).

Each group g has S_g = sum_i exp(s<v,t_i>) / (sum_i exp(s<v,t_i>) + sum_z exp(s<v,z>)), which is
the sigmoid of a difference of two logsumexps; written so, nothing overflows. The mean of sigmoids
still saturates, at margins above 17 in float32, and then ranks no more; so the exact logit of the
mean comes along, which never does.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from internet_neg._checks import check_same_width, widen
from internet_neg.errors import InterNegError

__all__ = ["Score", "group_negatives", "grouped_score", "mcm_score", "score_with_groups"]


class Score(NamedTuple):
    """Scores of a batch.

    Attributes:
        score: S, the mean over groups of the share of known texts, [B], float64.
        margin: The logit of S, [B], float64: it ranks as S does, without ties by saturation.
    """

    score: Float[Tensor, " B"]
    margin: Float[Tensor, " B"]


def group_negatives(
    Z: Float[Tensor, "m D"], groups: int = 1, permute: bool = True, seed: int = 0
) -> Float[Tensor, "G n D"]:
    """Negative texts in `groups` equal groups, by a fixed permutation.

    The last m mod G are dropped. Do this once for a set of negatives, not for every batch.

    Args:
        Z: Negative texts; those to keep first come first.
        groups: Number of groups G, from 1 to m (any, if there are no negatives).
        permute: Whether to permute before splitting.
        seed: Of the permutation.

    Raises:
        InterNegError: If G is out of range.

    Examples:
        >>> group_negatives(torch.eye(5), groups=2, permute=False)[1].tolist()
        [[0.0, 0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0, 0.0]]
    """
    if groups < 1 or (len(Z) and groups > len(Z)):
        raise InterNegError(f"{groups} groups of {len(Z)} negative texts; accepted: 1 to {len(Z)}")
    kept = len(Z) // groups * groups
    if permute and groups > 1:
        generator = torch.Generator().manual_seed(seed)
        Z = Z[torch.randperm(kept, generator=generator).to(Z.device)]
    return Z[:kept].reshape(groups, kept // groups, Z.shape[1])


def score_with_groups(
    v: Float[Tensor, "B D"],
    T: Float[Tensor, "K D"],
    grouped: Float[Tensor, "G n D"],
    scale: float | Float[Tensor, ""],
) -> Score:
    """Score of images against known texts and grouped negatives; see `grouped_score`.

    Args:
        v: Image embeddings, of length one.
        T: Text embeddings of the classes.
        grouped: What `group_negatives` returned.
        scale: s, which multiplies the cosines.

    Examples:
        >>> names = torch.eye(2)[:1]
        >>> score_with_groups(names, names, torch.eye(2)[None, 1:], 2.0).margin.tolist()
        [2.0]
    """
    v, T, grouped = widen(v), widen(T), widen(grouped)
    check_same_width([("images", v), ("class texts", T), ("negative texts", grouped)])
    groups, size, width = grouped.shape
    exact = v.dtype if v.device.type == "mps" else torch.float64  # MPS has no float64
    if size == 0:
        ones = torch.ones(len(v), dtype=exact, device=v.device)
        return Score(ones, torch.full_like(ones, torch.inf))
    # The scale goes to the smaller matrix.
    scaled = v * scale
    known = torch.logsumexp(scaled @ T.T, dim=-1)
    negative = (scaled @ grouped.reshape(groups * size, width).T).view(-1, groups, size)
    m = known[:, None].to(exact) - torch.logsumexp(negative, dim=-1).to(exact)
    share = torch.sigmoid(m).mean(dim=1)
    if groups == 1:
        return Score(share, m[:, 0])
    margin = torch.logsumexp(F.logsigmoid(m), dim=1) - torch.logsumexp(F.logsigmoid(-m), dim=1)
    return Score(share, margin)


def grouped_score(
    v: Float[Tensor, "B D"],
    T: Float[Tensor, "K D"],
    Z: Float[Tensor, "m D"],
    scale: float | Float[Tensor, ""],
    groups: int = 1,
    permute: bool = True,
    seed: int = 0,
) -> Float[Tensor, " B"]:
    """S of each image: near 1 if it matches a known class, near 0 if a negative text (Eq. 11).

    Args:
        v: Image embeddings, of length one.
        T: Text embeddings of the classes.
        Z: Negative texts. Without any, S is 1.
        scale: s, which multiplies the cosines; ``logit_scale.exp()`` of the model.
        groups: Number of groups G; S is the mean over groups.
        permute: Whether negatives are permuted before they are split.
        seed: Of the permutation.

    Examples:
        >>> grouped_score(torch.eye(2), torch.eye(2), torch.eye(2), scale=10.0).tolist()
        [0.5, 0.5]
    """
    return score_with_groups(v, T, group_negatives(Z, groups, permute, seed), scale).score


def mcm_score(
    v: Float[Tensor, "B D"], T: Float[Tensor, "K D"], temperature: float = 1.0
) -> Float[Tensor, " B"]:
    """Maximum concept matching (Ming et al., NeurIPS 2022): the largest softmax probability.

    Args:
        v: Image embeddings, of length one.
        T: Text embeddings of the classes.
        temperature: The cosines are divided by it.

    Examples:
        >>> mcm_score(torch.eye(2), torch.eye(2)).tolist()
        [0.7310585, 0.7310585]
    """
    if not temperature > 0:
        raise InterNegError(f"temperature={temperature}; it has to be positive")
    v, T = widen(v), widen(T)
    check_same_width([("images", v), ("class texts", T)])
    return torch.softmax(v @ T.T / temperature, dim=-1).amax(dim=-1)

"""OpenworldAUC: base and new samples ranked by a detector, counted where both are classified right.

Notation of the paper: base samples have scores s_i = r(x_i) and correctness c_i = 1[g(x_i) = y_i],
new samples have u_j = r(x_j) and d_j = 1[h(x_j) = y_j]; a larger score means more base-like. g
chooses among the base classes only, h among the new classes only. Scores are compared and never
transformed.
"""

import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from openworld_auc._checks import Samples, check_choice, check_samples, check_weights
from shared_core.errors import InputError

__all__ = ["area", "openworld_auc", "openworld_auc_score", "openworld_curve", "placements"]

Ties = Literal["half", "strict"]


def openworld_auc(
    scores: Float[Tensor, " n"],
    correct: Shaped[Tensor, " n"],
    is_base: Shaped[Tensor, " n"],
    *,
    sample_weight: Float[Tensor, " n"] | None = None,
    ties: Ties = "half",
) -> Float[Tensor, ""]:
    """Probability that a base and a new sample are ranked right and both are classified right.

    ``A = 1/(N_b N_n) sum_ij c_i d_j K(s_i, u_j)`` over all base samples i and new samples j, with K
    1 if s_i > u_j, 1/2 if equal, 0 otherwise. Exact, in the time of sorting.

    Args:
        scores: Detector scores, any float dtype, infinities allowed; larger means more base-like.
        correct: Whether each sample is classified right within its own domain: bool, or a number
            in [0, 1] (the soft form).
        is_base: Which samples are of base classes: bool, or 0 and 1.
        sample_weight: Weights a_i and b_j: ``sum_ij a_i c_i b_j d_j K / (sum a sum b)``.
        ties: Whether equal scores count ``half``, as the trapezoids of a ROC curve do, or nothing
            (``strict``), the literal indicator of the definition.

    Returns:
        The area, float64, on the device of the scores (on the CPU for MPS, which has no float64).

    Raises:
        InputError: If lengths differ, a score is NaN, a value is out of range, or a domain has
            no sample.

    Source:
        Hua et al., OpenworldAUC (ICML 2025), the definition of the metric and its empirical form.

    Examples:
        >>> scores = torch.tensor([0.9, 0.8, 0.3, 0.6, 0.1])
        >>> correct = torch.tensor([True, False, True, True, True])
        >>> is_base = torch.tensor([True, True, True, False, False])
        >>> openworld_auc(scores, correct, is_base)  # 3 of 6 pairs
        tensor(0.5000, dtype=torch.float64)
    """
    check_choice("ties", ties, ("half", "strict"))
    samples = check_samples(scores, correct, is_base)
    if sample_weight is None:
        return area(samples, ties)
    base_weight, new_weight = check_weights(sample_weight, is_base)
    return _soft_area(samples, ties, base_weight, new_weight)


def openworld_auc_score(
    base_score: Sequence[float | int | bool] | Shaped[np.ndarray, " b"],
    base_correct: Sequence[bool | int | float] | Shaped[np.ndarray, " b"],
    new_score: Sequence[float | int | bool] | Shaped[np.ndarray, " n"],
    new_correct: Sequence[bool | int | float] | Shaped[np.ndarray, " n"],
) -> float:
    """`openworld_auc` of lists or numpy arrays, one pair for each domain, as a Python number.

    Args:
        base_score: Detector scores of the base samples; larger means more base-like.
        base_correct: Whether each base sample is classified right among the base classes.
        new_score: Detector scores of the new samples.
        new_correct: Whether each new sample is classified right among the new classes.

    Raises:
        InputError: As `openworld_auc`.

    Examples:
        >>> openworld_auc_score([0.9, 0.8, 0.3], [True, False, True], [0.6, 0.1], [True, True])
        0.5
    """
    sides = [np.asarray(base_score), np.asarray(new_score)]
    rights = [np.asarray(base_correct), np.asarray(new_correct)]
    for name, values, right in zip(("base", "new"), sides, rights, strict=True):
        if values.ndim != 1 or values.shape != right.shape:
            raise InputError(
                f"{name}_score has shape {list(values.shape)} and {name}_correct "
                f"{list(right.shape)}; accepted: one score and one correctness per sample"
            )
    is_base = torch.arange(sum(map(len, sides))) < len(sides[0])
    scores = torch.from_numpy(np.concatenate(sides).astype(np.float64))
    both = np.concatenate(rights)
    correct = torch.from_numpy(both if both.dtype == bool else both.astype(np.float64))
    return float(openworld_auc(scores, correct, is_base))


def openworld_curve(
    scores: Float[Tensor, " n"], correct: Shaped[Tensor, " n"], is_base: Shaped[Tensor, " n"]
) -> tuple[Float[Tensor, " points"], Float[Tensor, " points"], Float[Tensor, " points"]]:
    """The curve whose area is OpenworldAUC: what the base side misses, what the new side hits.

    At threshold t, samples with r > t go to the base classifier and the others to the classifier
    of new classes: ``MissRate_b(t) = 1 - P_b[r > t, g right]`` and
    ``HitRate_n(t) = P_n[r <= t, h right]``.
    The curve begins at (1 - Acc_b, 0), not at 0, and ends at (1, Acc_n).

    Args:
        scores: Detector scores, [n].
        correct: Correctness within the own domain, [n].
        is_base: Domain of each sample, [n].

    Returns:
        ``(miss_rate_base, hit_rate_new, thresholds)``, float64, ascending: a point for the
        threshold minus infinity and one for each distinct score. The trapezoidal area is
        `openworld_auc`.

    Raises:
        InputError: As `openworld_auc`.

    Examples:
        >>> scores = torch.tensor([0.9, 0.8, 0.3, 0.6, 0.1])
        >>> correct = torch.tensor([True, False, True, True, True])
        >>> is_base = torch.tensor([True, True, True, False, False])
        >>> x, y, t = openworld_curve(scores, correct, is_base)
        >>> torch.trapezoid(y, x)
        tensor(0.5000, dtype=torch.float64)
    """
    s, c, u, d, _ = check_samples(scores, correct, is_base)
    thresholds = torch.unique(torch.cat([s, u]))
    lowest = thresholds.new_full((1,), -torch.inf)
    miss = 1 - c.double().mean() + _mass_up_to(thresholds, s, c) / len(s)
    hit = _mass_up_to(thresholds, u, d) / len(u)
    start = 1 - c.double().mean()
    return (
        torch.cat([start[None], miss]),
        torch.cat([torch.zeros_like(start)[None], hit]),
        torch.cat([lowest, thresholds]).double(),
    )


def area(samples: Samples, ties: Ties = "half") -> Float[Tensor, ""]:
    """OpenworldAUC of checked samples; see `openworld_auc`.

    Args:
        samples: From `openworld_auc._checks.check_samples`.
        ties: As in `openworld_auc`.
    """
    s, c, u, d, half = samples
    if c.dtype != torch.bool or d.dtype != torch.bool:
        return _soft_area(samples, ties)
    q, v = s[c], u[d]
    below, not_above = _ranked_pairs(q, v)
    pairs = len(q) * len(v)
    if half and int(not_above - below) > 0.01 * pairs:
        warnings.warn(
            f"{int(not_above - below)} of {pairs} correct pairs tie in half precision, and a tie "
            "counts one half; compute the scores in float32",
            stacklevel=3,
        )
    wins = below if ties == "strict" else below + not_above
    return wins.double() / (len(s) * len(u) * (1 if ties == "strict" else 2))


def _ranked_pairs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """How many pairs have q > v, and how many q >= v, as int64; only one side need be sorted."""
    if len(v) <= len(q):
        v = v.sort().values
        below = torch.searchsorted(v, q).sum()
        not_above = torch.searchsorted(v, q, right=True).sum()
        return below, not_above
    q = q.sort().values
    pairs = len(q) * len(v)
    return (
        pairs - torch.searchsorted(q, v, right=True).sum(),
        pairs - torch.searchsorted(q, v).sum(),
    )


def _soft_area(
    samples: Samples,
    ties: Ties,
    base_weight: Tensor | None = None,
    new_weight: Tensor | None = None,
) -> Tensor:
    s, c, u, d, _ = samples
    a, b = c.double(), d.double()
    total_base, total_new = a.new_tensor(len(s)), b.new_tensor(len(u))
    if base_weight is not None and new_weight is not None:
        a, b = a * base_weight.to(a.device), b * new_weight.to(b.device)
        total_base, total_new = base_weight.sum().to(a.device), new_weight.sum().to(b.device)
    won = _mass_below(s, u, b, ties)
    return (a * won).sum() / (total_base * total_new)


def _prefix(mass: Tensor) -> Tensor:
    return torch.cat([mass.new_zeros(1, dtype=torch.float64), mass.double().cumsum(0)])


def _mass_below(at: Tensor, scores: Tensor, mass: Tensor, ties: Ties) -> Tensor:
    """For each value of `at`: the mass of scores below it, plus half (or none) of the ties."""
    ordered, order = scores.sort()
    prefix = _prefix(mass[order])
    low = prefix[torch.searchsorted(ordered, at)]
    if ties == "strict":
        return low
    return (low + prefix[torch.searchsorted(ordered, at, right=True)]) / 2


def _mass_up_to(at: Tensor, scores: Tensor, mass: Tensor) -> Tensor:
    ordered, order = scores.sort()
    return _prefix(mass[order])[torch.searchsorted(ordered, at, right=True)]


def placements(samples: Samples) -> tuple[Float[Tensor, " b"], Float[Tensor, " n"]]:
    """What each sample contributes to OpenworldAUC; both means are the area.

    ``V_b(i) = c_i / N_n sum_j d_j K(s_i, u_j)`` and ``V_n(j) = d_j / N_b sum_i c_i K(s_i, u_j)``,
    the placements of DeLong et al. (Biometrics 1988) with correctness inside.

    Args:
        samples: From `openworld_auc._checks.check_samples`.
    """
    s, c, u, d, _ = samples
    base = c.double() * _mass_below(s, u, d, "half") / len(u)
    new = d.double() * _mass_below(-u, -s, c, "half") / len(s)
    return base, new

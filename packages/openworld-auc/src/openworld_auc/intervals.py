"""How sure an OpenworldAUC is: confidence intervals, and two models on the same samples.

The variance is that of placements (DeLong et al., Biometrics 1988), with correctness inside the
placement; with every sample classified right it is the classical variance of an AUROC.
"""

import math
import warnings
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from openworld_auc._checks import Samples, check_choice, check_level, check_samples
from openworld_auc.ranking import placements
from shared_core.errors import InputError

__all__ = ["Comparison", "Interval", "compare_openworld_auc", "openworld_auc_ci"]


class Interval(NamedTuple):
    """A value with its confidence interval.

    Attributes:
        value: OpenworldAUC.
        low: Lower end.
        high: Upper end.
        se: Standard error.
    """

    value: float
    low: float
    high: float
    se: float


class Comparison(NamedTuple):
    """The difference of two models' OpenworldAUC.

    Attributes:
        difference: A minus B.
        low: Lower end of its confidence interval.
        high: Upper end.
        se: Standard error of the difference.
        z: Difference over standard error.
        p_value: Two-sided, of the hypothesis of no difference.
        value_a: OpenworldAUC of A.
        value_b: OpenworldAUC of B.
    """

    difference: float
    low: float
    high: float
    se: float
    z: float
    p_value: float
    value_a: float
    value_b: float


def openworld_auc_ci(
    scores: Float[Tensor, " n"],
    correct: Shaped[Tensor, " n"],
    is_base: Shaped[Tensor, " n"],
    *,
    method: Literal["placement", "bootstrap"] = "placement",
    level: float = 0.95,
    scale: Literal["logit", "plain"] = "logit",
    n_boot: int = 1000,
    generator: torch.Generator | None = None,
    cluster: Int[Tensor, " n"] | None = None,
) -> Interval:
    """Confidence interval of OpenworldAUC for fixed models and samples drawn at random.

    Args:
        scores: Detector scores, [n].
        correct: Correctness within the own domain, [n].
        is_base: Domain of each sample, [n].
        method: ``placement``: ``Var = S²(V_b)/N_b + S²(V_n)/N_n``; ``bootstrap``: percentiles, with
            base and new samples drawn apart.
        level: Confidence level.
        scale: Whether the placement interval is symmetric in logit(A) or in A.
        n_boot: Draws of the bootstrap.
        generator: Of the bootstrap, on the CPU; by default one with seed 0.
        cluster: Class of each sample, for the bootstrap: whole classes are drawn. The plain
            interval leaves out the randomness of which classes there are.

    Raises:
        InputError: As `openworld_auc`; if a choice is not known or a number out of range; if
            `cluster` comes without the bootstrap.

    Examples:
        >>> scores = torch.linspace(0, 1, 200)
        >>> is_base = torch.arange(200) >= 80
        >>> correct = torch.arange(200) % 4 > 0
        >>> interval = openworld_auc_ci(scores, correct, is_base)
        >>> interval.low < interval.value < interval.high
        True
    """
    check_choice("method", method, ("placement", "bootstrap"))
    check_choice("scale", scale, ("logit", "plain"))
    check_level(level)
    samples = check_samples(scores, correct, is_base)
    if cluster is not None and method != "bootstrap":
        raise InputError("cluster needs method='bootstrap'; placements know no classes")
    value_b, value_n = placements(samples)
    value = float(value_b.mean())
    if method == "placement":
        too_few = min(len(value_b), len(value_n)) < 2
        if not too_few and 0 < value < 1:
            se = math.sqrt(_variance(value_b) + _variance(value_n))
            return Interval(value, *_ends(value, se, level, scale), se)
        reason = "a domain has one sample only" if too_few else f"the value is {value:g}"
        warnings.warn(
            f"{reason}, so placements give no interval; bootstrap used instead", stacklevel=2
        )
    if n_boot < 2:
        raise InputError(f"n_boot is {n_boot}; accepted: 2 or more")
    groups = None if cluster is None else _clusters(cluster, is_base)
    draws = _bootstrap(samples, n_boot, generator or torch.Generator().manual_seed(0), groups)
    tail = (1 - level) / 2
    low, high = draws.quantile(draws.new_tensor([tail, 1 - tail])).tolist()
    return Interval(value, low, high, float(draws.std()))


def compare_openworld_auc(
    a: tuple[Tensor, Tensor, Tensor],
    b: tuple[Tensor, Tensor, Tensor],
    *,
    paired: bool = True,
    level: float = 0.95,
) -> Comparison:
    """Test whether two models have different OpenworldAUC.

    Args:
        a: ``(scores, correct, is_base)`` of model A.
        b: The same of model B.
        paired: Whether both were evaluated on the same samples in the same order; then the
            covariance of their placements counts, and small differences become visible.
        level: Confidence level of the interval of the difference.

    Raises:
        InputError: As `openworld_auc`, or if `paired` and the samples are not aligned.

    Examples:
        >>> is_base = torch.arange(100) < 50
        >>> scores = torch.linspace(1, 0, 100)
        >>> right = torch.ones(100, dtype=torch.bool)
        >>> wrong = torch.arange(100) % 5 > 0
        >>> result = compare_openworld_auc((scores, right, is_base), (scores, wrong, is_base))
        >>> round(result.difference, 2), result.p_value < 0.01
        (0.36, True)
    """
    check_level(level)
    first, second = check_samples(*a), check_samples(*b)
    if paired and not torch.equal(a[2].cpu().bool(), b[2].cpu().bool()):
        raise InputError(
            "a and b are not evaluated on the same samples in the same order (is_base differs); "
            "align them, or pass paired=False"
        )
    parts_a, parts_b = placements(first), placements(second)
    value_a, value_b = float(parts_a[0].mean()), float(parts_b[0].mean())
    if paired:
        variance = sum(_variance(p - q.to(p.device)) for p, q in zip(parts_a, parts_b, strict=True))
    else:
        variance = sum(_variance(part) for part in (*parts_a, *parts_b))
    se = math.sqrt(variance)
    difference = value_a - value_b
    normal = NormalDist()
    reach = normal.inv_cdf((1 + level) / 2) * se
    z = difference / se if se > 0 else math.copysign(math.inf, difference) if difference else 0.0
    p_value = math.erfc(abs(z) / math.sqrt(2))
    ends = difference - reach, difference + reach
    return Comparison(difference, *ends, se, z, p_value, value_a, value_b)


def _variance(placement: Tensor) -> float:
    """Variance of the mean of one side's placements."""
    if len(placement) < 2:
        raise InputError("a domain has one sample only; a variance needs two or more")
    return float(placement.var()) / len(placement)


def _ends(value: float, se: float, level: float, scale: str) -> tuple[float, float]:
    reach = NormalDist().inv_cdf((1 + level) / 2) * se
    if scale == "plain":
        return max(0.0, value - reach), min(1.0, value + reach)
    centre, step = math.log(value / (1 - value)), reach / (value * (1 - value))

    def expit(x: float) -> float:
        return 0.5 * (1 + math.tanh(x / 2))

    return expit(centre - step), expit(centre + step)


def _clusters(cluster: Tensor, is_base: Tensor) -> tuple[Tensor, Tensor]:
    if cluster.shape != is_base.shape:
        raise InputError(
            f"cluster has shape {list(cluster.shape)}; accepted: the class of each of the "
            f"{len(is_base)} samples"
        )
    base = is_base.bool().cpu()
    sides = cluster.cpu()[base], cluster.cpu()[~base]
    first, second = (torch.unique(side, return_inverse=True)[1] for side in sides)
    return first, second


def _bootstrap(
    samples: Samples,
    n_boot: int,
    generator: torch.Generator,
    groups: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Areas of resampled data: the ranks are found once, a draw only changes the weights."""
    s, c, u, d = (part.cpu() for part in samples[:4])
    s, order_s = s.sort()
    u, order_u = u.sort()
    a, b = c[order_s].double(), d[order_u].double()
    low, high = torch.searchsorted(u, s), torch.searchsorted(u, s, right=True)
    labels: Any = (None, None)
    if groups is not None:
        labels = groups[0][order_s], groups[1][order_u]
    prefix = torch.zeros(len(u) + 1, dtype=torch.float64)
    areas = torch.empty(n_boot, dtype=torch.float64)
    for draw in range(n_boot):
        weight_s = _resample(len(s), labels[0], generator)
        weight_u = _resample(len(u), labels[1], generator)
        torch.cumsum(b * weight_u, 0, out=prefix[1:])
        won = torch.dot(a * weight_s, prefix[low] + prefix[high]) / 2
        areas[draw] = won / (weight_s.sum() * weight_u.sum())
    return areas


def _resample(n: int, labels: Tensor | None, generator: torch.Generator) -> Tensor:
    """How often each sample (or its class) is drawn, with replacement."""
    groups = n if labels is None else int(labels.max()) + 1
    drawn = torch.randint(groups, (groups,), generator=generator)
    counts = torch.bincount(drawn, minlength=groups).double()
    return counts if labels is None else counts[labels]

"""Out-of-distribution (OOD) detection: AUROC, AUPR and false-positive rates, exact under ties.

Scores are in-distribution (ID) scores: the higher, the more in-distribution. Scores are only
compared, never transformed, so every strictly increasing map of them gives the same values, and
infinities are ordinary scores. All counts are integers; one division makes the result.

Why not a library's: torchmetrics' `BinaryAUROC` squashes scores outside [0, 1] with a sigmoid,
which ties the extreme ones; scikit-learn refuses infinities and knows neither bfloat16 nor GPUs;
neither offers the ``nearest`` rule for the false-positive rate.
"""

import math
from fractions import Fraction
from typing import Literal, TypedDict

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from shared_core.errors import InputError

__all__ = ["OODScores", "aupr_in", "aupr_out", "auroc", "fpr_at_recall", "ood_metrics"]

Rule = Literal["nearest", "at_least"]


class OODScores(TypedDict):
    """What `ood_metrics` returns.

    Attributes:
        auroc: Area under the ROC curve.
        aupr_in: Average precision with ID as the positive class.
        aupr_out: Average precision with OOD as the positive class.
        fpr95: Fraction of OOD accepted at 95 % recall of ID (ID positive).
        fpr95_ood_positive: Fraction of ID rejected at 95 % recall of OOD (OOD positive).
        n_id: Number of ID scores.
        n_ood: Number of OOD scores.
    """

    auroc: float
    aupr_in: float
    aupr_out: float
    fpr95: float
    fpr95_ood_positive: float
    n_id: int
    n_ood: int


def auroc(
    id_scores: Float[Tensor, "id"] | Float[np.ndarray, "id"],
    ood_scores: Float[Tensor, "ood"] | Float[np.ndarray, "ood"],
) -> float:
    """Probability that an ID sample scores above an OOD sample; ties count one half.

    Args:
        id_scores: Scores of ID samples, shape [id], any float dtype.
        ood_scores: Scores of OOD samples, shape [ood].

    Raises:
        InputError: If a side is empty, is not one-dimensional floating point, or holds a NaN.

    Examples:
        >>> auroc(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([1.0, 0.0]))
        0.9166666666666666
    """
    return _auroc(*_sorted_pair(id_scores, ood_scores))


def aupr_in(
    id_scores: Float[Tensor, "id"] | Float[np.ndarray, "id"],
    ood_scores: Float[Tensor, "ood"] | Float[np.ndarray, "ood"],
) -> float:
    """Average precision with ID as the positive class, accepted at high scores.

    This is the step-wise sum over the distinct thresholds, as in scikit-learn, not the trapezoidal
    area.

    Args:
        id_scores: Scores of ID samples, shape [id], any float dtype.
        ood_scores: Scores of OOD samples, shape [ood].

    Raises:
        InputError: As `auroc`.

    Examples:
        >>> aupr_in(torch.tensor([3.0, 1.0]), torch.tensor([2.0, 0.0]))
        0.8333333333333333
    """
    return _average_precision(*_sorted_pair(id_scores, ood_scores))


def aupr_out(
    id_scores: Float[Tensor, "id"] | Float[np.ndarray, "id"],
    ood_scores: Float[Tensor, "ood"] | Float[np.ndarray, "ood"],
) -> float:
    """Average precision with OOD as the positive class, flagged at low scores.

    Args:
        id_scores: Scores of ID samples, shape [id], any float dtype.
        ood_scores: Scores of OOD samples, shape [ood].

    Raises:
        InputError: As `auroc`.

    Examples:
        >>> aupr_out(torch.tensor([3.0, 1.0]), torch.tensor([2.0, 0.0]))
        0.8333333333333333
    """
    return _average_precision(*_negated(*_sorted_pair(id_scores, ood_scores)))


def fpr_at_recall(
    id_scores: Float[Tensor, "id"] | Float[np.ndarray, "id"],
    ood_scores: Float[Tensor, "ood"] | Float[np.ndarray, "ood"],
    recall: int | float = 0.95,
    *,
    positive: Literal["id", "ood"] = "id",
    rule: Rule = "at_least",
) -> float:
    """False-positive rate at the threshold that reaches a recall (FPR95 with the default).

    The literature uses two conventions. With ID positive (MCM, NegLabel, outlier exposure) the
    value is the fraction of OOD samples accepted when 95 % of the ID samples are accepted. With OOD
    positive (OpenOOD, pytorch-ood) it is the fraction of ID samples rejected when 95 % of the OOD
    samples are rejected. They are different numbers.

    Args:
        id_scores: Scores of ID samples, shape [id], any float dtype.
        ood_scores: Scores of OOD samples, shape [ood].
        recall: The recall level, in (0, 1]. It is taken as the decimal number it prints as, so
            that 0.95 means 19/20.
        positive: The positive class: ``id`` or ``ood``.
        rule: ``at_least`` takes the strictest threshold with at least this recall, the first such
            point of the ROC curve. ``nearest`` is the rule of the outlier-exposure line of work:
            of all observed scores as thresholds, those whose recall is nearest to the level (the
            higher recall if two are equally near), and of these the most permissive one; a recall
            of 1 is reached at the lowest positive score. Nearness is decided in exact arithmetic.

    Raises:
        InputError: As `auroc`; also if `recall` is out of range, or `positive` or `rule` unknown.

    Examples:
        >>> id_scores = torch.arange(1.0, 22.0)
        >>> ood_scores = torch.tensor([0.0, 1.5, 2.5, 9.0])
        >>> fpr_at_recall(id_scores, ood_scores, rule="at_least")
        0.5
        >>> fpr_at_recall(id_scores, ood_scores, rule="nearest")
        0.75
        >>> fpr_at_recall(id_scores, ood_scores, positive="ood")
        0.42857142857142855
    """
    if not 0 < recall <= 1:
        raise InputError(f"recall={recall}; it has to lie in (0, 1]")
    if positive not in ("id", "ood"):
        raise InputError(f"positive={positive!r} is not known; accepted: id, ood")
    check_rule(rule)
    ordered = _sorted_pair(id_scores, ood_scores)
    return _fpr(*(ordered if positive == "id" else _negated(*ordered)), recall, rule)


def ood_metrics(
    id_scores: Float[Tensor, "id"] | Float[np.ndarray, "id"],
    ood_scores: Float[Tensor, "ood"] | Float[np.ndarray, "ood"],
    *,
    rule: Rule = "at_least",
) -> OODScores:
    """All OOD detection metrics from one sort of the scores.

    Args:
        id_scores: Scores of ID samples, shape [id], any float dtype; higher means more ID.
        ood_scores: Scores of OOD samples, shape [ood].
        rule: The threshold rule of both false-positive rates; see `fpr_at_recall`.

    Returns:
        Plain numbers under the keys ``auroc``, ``aupr_in``, ``aupr_out``, ``fpr95``,
        ``fpr95_ood_positive``, ``n_id`` and ``n_ood``; rates are fractions, not percent.

    Raises:
        InputError: As `auroc`; also if `rule` is unknown.

    Examples:
        >>> values = ood_metrics(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([1.0, 0.0]))
        >>> {key: round(value, 3) for key, value in values.items()}
        {'auroc': 0.917, 'aupr_in': 0.917, 'aupr_out': 0.833, 'fpr95': 0.5,
         'fpr95_ood_positive': 0.333, 'n_id': 3, 'n_ood': 2}
    """
    check_rule(rule)
    ordered = _sorted_pair(id_scores, ood_scores)
    negated = _negated(*ordered)
    return OODScores(
        auroc=_auroc(*ordered),
        aupr_in=_average_precision(*ordered),
        aupr_out=_average_precision(*negated),
        fpr95=_fpr(*ordered, 0.95, rule),
        fpr95_ood_positive=_fpr(*negated, 0.95, rule),
        n_id=len(ordered[0]),
        n_ood=len(ordered[1]),
    )


def check_rule(rule: str) -> None:
    """Refuse a threshold rule that does not exist."""
    if rule not in ("nearest", "at_least"):
        raise InputError(f"rule={rule!r} is not known; accepted: nearest, at_least")


def _sorted_pair(
    id_scores: Tensor | np.ndarray, ood_scores: Tensor | np.ndarray
) -> tuple[Tensor, Tensor]:
    """Both sides checked, in one dtype that represents all scores exactly, ascending."""
    first, second = _checked("ID", id_scores), _checked("OOD", ood_scores)
    dtype = torch.promote_types(torch.float32, torch.promote_types(first.dtype, second.dtype))
    second = second.to(first.device)
    return first.to(dtype).sort().values, second.to(dtype).sort().values


def _checked(side: str, scores: Tensor | np.ndarray) -> Tensor:
    # A copy of an array, because torch warns about sharing read-only memory (memory maps).
    values = scores.detach() if isinstance(scores, Tensor) else torch.from_numpy(np.array(scores))
    if values.device.type == "mps":  # has no float64 for the final division
        values = values.cpu()
    if values.ndim != 1 or not values.is_floating_point():
        raise InputError(
            f"{side} scores have shape {list(values.shape)} and dtype {values.dtype}; "
            "accepted: one floating-point score per sample, shape [n]"
        )
    if len(values) == 0:
        raise InputError(f"there are no {side} scores; OOD metrics compare two non-empty sides")
    invalid = values.isnan()
    if invalid.any():
        where = invalid.nonzero()[0].item()
        raise InputError(
            f"{int(invalid.sum())} of {len(values)} {side} scores are NaN, the first at index "
            f"{where}; a NaN cannot be ranked"
        )
    return values


def _negated(id_scores: Tensor, ood_scores: Tensor) -> tuple[Tensor, Tensor]:
    """The mirrored problem: OOD positive, its negated scores ascending."""
    return -ood_scores.flip(0), -id_scores.flip(0)


def _auroc(positive: Tensor, negative: Tensor) -> float:
    below = torch.searchsorted(negative, positive).sum()
    not_above = torch.searchsorted(negative, positive, right=True).sum()
    return int(below + not_above) / (2 * len(positive) * len(negative))


def _average_precision(positive: Tensor, negative: Tensor) -> float:
    # Each positive adds the precision at the threshold equal to its own score.
    true = len(positive) - torch.searchsorted(positive, positive)
    false = len(negative) - torch.searchsorted(negative, positive)
    return float((true.double() / (true + false)).mean())


def _fpr(positive: Tensor, negative: Tensor, recall: int | float, rule: Rule) -> float:
    """False positives at the recall level; both sides ascending."""
    n, m = len(positive), len(negative)
    level = Fraction(repr(float(recall))) * n  # as a number of true positives
    at_least = positive[n - math.ceil(level)]
    accepted = m - torch.searchsorted(negative, at_least)
    if rule == "at_least":
        return int(accepted) / m
    # The two attainable numbers of true positives around the level: `higher` with the threshold
    # `at_least`, `lower` with the next distinct score above it. Zero is attainable only if a
    # negative scores above every positive.
    above = m - torch.searchsorted(negative, at_least, right=True)
    smaller = int(torch.searchsorted(positive, at_least))
    higher = n - smaller
    lower = n - int(torch.searchsorted(positive, at_least, right=True))
    attainable = lower > 0 or bool(negative[-1] > at_least)
    if attainable and level - lower < higher - level:
        return int(above) / m
    if higher == n:
        return int(accepted) / m
    return int(m - torch.searchsorted(negative, positive[smaller - 1], right=True)) / m

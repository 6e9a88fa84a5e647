"""Everything that one evaluation tells: OpenworldAUC and the metrics that it is compared with."""

import json
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from openworld_auc._checks import (
    Samples,
    check_choice,
    check_domain,
    check_samples,
    check_scores,
)
from openworld_auc.intervals import openworld_auc_ci
from openworld_auc.ranking import area
from shared_core.errors import InputError
from shared_core.metrics import fpr_at_recall
from shared_core.run import to_plain

__all__ = ["OpenworldReport", "companions", "fit_threshold", "openworld_report", "overall_accuracy"]

Rule = Literal["otsu", "youden", "tpr95", "median"]
RULES = ("otsu", "youden", "tpr95", "median")


@dataclass(frozen=True)
class OpenworldReport:
    """What `openworld_report` measured; fractions, not percent.

    Attributes:
        openworld_auc: Probability that a base and a new sample are ranked and classified right.
        base_acc: Accuracy on base samples among base classes, B.
        new_acc: Accuracy on new samples among new classes, N.
        hm: Harmonic mean of the two.
        auroc: Ranking alone, as if every sample were classified right.
        fpr95: Fraction of new samples taken for base when 95 % of base samples are (base positive).
        opt_a: Ranking with correctness of base samples only; OpenAUC of the base classifier.
        opt_g: Ranking with correctness of new samples only.
        n_base: Number of base samples.
        n_new: Number of new samples.
        low: Lower end of the interval of `openworld_auc`, if asked for.
        high: Upper end.
        se: Standard error.
        threshold: Score above which a sample counts as base, if asked for.
        hit_rate_base: Fraction of base samples above the threshold and classified right.
        hit_rate_new: Fraction of new samples not above the threshold and classified right.
        overall_acc: Accuracy of the two stages at the threshold and the prior.
        prior: Fraction of base samples for which `overall_acc` holds.
        overall_acc_joint: Accuracy of one classifier that chooses among all classes, base and new,
            at the same prior, if it was given.
    """

    openworld_auc: float
    base_acc: float
    new_acc: float
    hm: float
    auroc: float
    fpr95: float
    opt_a: float
    opt_g: float
    n_base: int
    n_new: int
    low: float | None = None
    high: float | None = None
    se: float | None = None
    threshold: float | None = None
    hit_rate_base: float | None = None
    hit_rate_new: float | None = None
    overall_acc: float | None = None
    prior: float | None = None
    overall_acc_joint: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """All values by name, those that were not asked for as None."""
        return dict(self.__dict__)

    def to_json(self) -> str:
        """The values as one JSON object, without NaN or infinities."""
        return json.dumps(to_plain(self.to_dict()), allow_nan=False)

    def table(self) -> str:
        """The values as lines for a person, rates in percent."""
        lines = []
        for name, value in self.to_dict().items():
            if value is not None:
                exact = name in ("n_base", "n_new", "threshold")
                shown = f"{value:>10.6g}" if exact else f"{100 * value:>8.2f} %"
                lines.append(f"{name:<17}{shown}")
        return "\n".join(lines)


def companions(samples: Samples) -> dict[str, float]:
    """OpenworldAUC and all threshold-free companions of checked samples, by name.

    Args:
        samples: From `openworld_auc._checks.check_samples`.
    """
    s, c, u, d, half = samples
    all_base, all_new = torch.ones_like(c), torch.ones_like(d)
    base, new = float(c.double().mean()), float(d.double().mean())
    return {
        "openworld_auc": float(area(samples)),
        "base_acc": base,
        "new_acc": new,
        "hm": 2 * base * new / (base + new) if base + new > 0 else 0.0,
        "auroc": float(area(Samples(s, all_base, u, all_new, half))),
        "fpr95": fpr_at_recall(s, u),
        "opt_a": float(area(Samples(s, c, u, all_new, half))),
        "opt_g": float(area(Samples(s, all_base, u, d, half))),
    }


def fit_threshold(
    scores: Float[Tensor, " n"],
    is_base: Shaped[Tensor, " n"] | None = None,
    *,
    rule: Rule = "youden",
) -> float:
    """A threshold t for "base where score > t", from validation scores.

    Args:
        scores: Validation scores, [n].
        is_base: Domain of each; not needed by ``otsu`` and ``median``.
        rule: ``youden`` maximises P_b[r > t] - P_n[r > t]; ``tpr95`` keeps 95 % of base samples;
            ``otsu`` maximises the variance between the two groups of scores; ``median`` is the
            pooled one.

    Raises:
        InputError: If the rule is not known, scores are NaN or missing, or domains are needed and
            not given.

    Examples:
        >>> fit_threshold(torch.tensor([0.9, 0.8, 0.2, 0.1]), torch.tensor([1, 1, 0, 0]))
        0.20000000298023224
    """
    check_choice("rule", rule, RULES)
    values = check_scores(scores).double()
    if rule in ("otsu", "median"):
        if len(values) == 0:
            raise InputError("there are no scores; a threshold needs some")
        return _otsu(values) if rule == "otsu" else float(values.quantile(0.5))
    if is_base is None:
        raise InputError(f"the rule {rule!r} needs is_base, the domain of each score")
    base = check_domain(is_base, len(values), values.device)
    s, u = values[base].sort().values, values[~base].sort().values
    if len(s) == 0 or len(u) == 0:
        raise InputError(f"the rule {rule!r} needs scores of both domains")
    if rule == "tpr95":
        kept = s[(len(s) * 5) // 100]  # the largest t with mean(s >= t) >= 0.95
        return float(torch.nextafter(kept, kept.new_tensor(-torch.inf)))
    candidates = torch.unique(torch.cat([s, u]))
    above_s = 1 - torch.searchsorted(s, candidates, right=True) / len(s)
    above_u = 1 - torch.searchsorted(u, candidates, right=True) / len(u)
    return float(candidates[(above_s - above_u).argmax()])


def _otsu(values: Tensor) -> float:
    ordered = values.sort().values
    n = len(ordered)
    count = torch.arange(1, n + 1, dtype=torch.float64, device=values.device)
    total = ordered.cumsum(0)
    between = (total / count - (total[-1] - total) / (n - count).clamp(min=1)) ** 2
    between = between * count * (n - count)
    # A split between equal values is none.
    between[:-1][ordered[:-1] == ordered[1:]] = -1.0
    return float(ordered[between.argmax()])


def overall_accuracy(
    samples: Samples, threshold: float, prior: float | None = None
) -> tuple[float, float, float, float]:
    """Accuracy of deciding the domain by a threshold and then the class.

    ``π HitRate_b(t) + (1 - π) HitRate_n(t)``, with π the fraction of base samples.

    Args:
        samples: From `openworld_auc._checks.check_samples`.
        threshold: t; samples with r > t go to the base classifier.
        prior: π; by default that of the samples.

    Returns:
        ``(overall, hit_rate_base, hit_rate_new, prior)``.
    """
    s, c, u, d, _ = samples
    prior = _prior(samples, prior)
    hit_base = float((c.double() * (s > threshold)).mean())
    hit_new = float((d.double() * (u <= threshold)).mean())
    return prior * hit_base + (1 - prior) * hit_new, hit_base, hit_new, prior


def _prior(samples: Samples, prior: float | None) -> float:
    if prior is None:
        return len(samples.base_scores) / (len(samples.base_scores) + len(samples.new_scores))
    if not 0 <= prior <= 1:
        raise InputError(f"prior is {prior}; accepted: a fraction of base samples in [0, 1]")
    return prior


def openworld_report(
    scores: Float[Tensor, " n"],
    correct: Shaped[Tensor, " n"],
    is_base: Shaped[Tensor, " n"],
    *,
    threshold: float | Rule | None = None,
    prior: float | None = None,
    ci: Literal["placement", "bootstrap"] | None = None,
    classes: Shaped[Tensor, " n"] | None = None,
    joint_correct: Shaped[Tensor, " n"] | None = None,
    generator: torch.Generator | None = None,
) -> OpenworldReport:
    """OpenworldAUC with its companions from the same three vectors.

    Args:
        scores: Detector scores, [n].
        correct: Correctness within the own domain, [n].
        is_base: Domain of each sample, [n].
        threshold: A number for the two-stage accuracy, or the name of a rule of `fit_threshold`,
            which is then fitted on these very samples, with a warning.
        prior: Fraction of base samples for which the overall accuracy is wanted; by default that
            of the samples. No resampling is needed.
        ci: Method of the confidence interval, as in `openworld_auc_ci`.
        classes: Class of each sample; the bootstrap then draws whole classes.
        joint_correct: Whether one classifier that chooses among all classes is right, for
            `OpenworldReport.overall_acc_joint`.
        generator: Of the bootstrap, on the CPU; by default one with seed 0.

    Raises:
        InputError: As `openworld_auc`, `fit_threshold` and `openworld_auc_ci`.

    Examples:
        >>> scores = torch.tensor([0.9, 0.8, 0.3, 0.6, 0.1])
        >>> correct = torch.tensor([True, False, True, True, True])
        >>> is_base = torch.tensor([True, True, True, False, False])
        >>> report = openworld_report(scores, correct, is_base, threshold=0.5)
        >>> report.openworld_auc, round(report.base_acc, 3), report.overall_acc
        (0.5, 0.667, 0.4)
    """
    samples = check_samples(scores, correct, is_base)
    values: dict[str, Any] = companions(samples)
    if ci is not None:
        interval = openworld_auc_ci(
            scores, correct, is_base, method=ci, cluster=classes, generator=generator
        )
        values |= {"low": interval.low, "high": interval.high, "se": interval.se}
    if isinstance(threshold, str):
        warnings.warn(
            f"the threshold {threshold!r} is fitted on the evaluated samples themselves, which "
            "flatters overall_acc; fit it on validation scores with fit_threshold",
            stacklevel=2,
        )
        threshold = fit_threshold(scores, is_base, rule=threshold)
    if threshold is not None:
        overall, hit_base, hit_new, used = overall_accuracy(samples, threshold, prior)
        values |= {"threshold": float(threshold), "overall_acc": overall, "prior": used}
        values |= {"hit_rate_base": hit_base, "hit_rate_new": hit_new}
    elif prior is not None and joint_correct is None:
        raise InputError("prior is for overall_acc, which needs a threshold: pass threshold= too")
    if joint_correct is not None:
        joint = check_samples(scores, joint_correct, is_base)
        used = _prior(joint, prior)
        on_base, on_new = (
            float(right.double().mean()) for right in (joint.base_correct, joint.new_correct)
        )
        values |= {"overall_acc_joint": used * on_base + (1 - used) * on_new, "prior": used}
    return OpenworldReport(**values, n_base=len(samples.base_scores), n_new=len(samples.new_scores))

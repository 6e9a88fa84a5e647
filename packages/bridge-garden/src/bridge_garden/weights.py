"""λ, the weight of the soft label, token by token.

Wang et al., "The Bridge-Garden Dilemma in LLM Distillation", ICML 2026 (arXiv 2605.26246)::

    ℓ_hyb(s) = λ(s) D(π_T(·|s) ‖ π_θ(·|s)) + (1 - λ(s)) (-log π_θ(a*|s))

A weight is any callable ``(seen, at) -> λ [C]``: `seen` are the `abkd.TokenStatistics` of a
chunk of tokens, `at` says where training stands. λ is computed under no_grad and gets no gradient.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from abkd import TokenStatistics
from shared_core.errors import InputError

__all__ = [
    "Confidence",
    "Curriculum",
    "Entropy",
    "Product",
    "Reversed",
    "Static",
    "StepInfo",
    "Weight",
    "WeightedSoftLabels",
    "checked_weight",
    "weight_from_string",
]


@dataclass(frozen=True)
class StepInfo:
    """Where training stands: optimizer steps done, and their total if known.

    Examples:
        >>> StepInfo(5, total=100).step
        5
    """

    step: int = 0
    total: int | None = None


Weight = Callable[[TokenStatistics, StepInfo], Tensor]


def _check_unit(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise InputError(f"{name} is {value}; accepted: 0 (hard labels only) to 1 (soft only)")


@dataclass(frozen=True)
class Static:
    """The same λ everywhere; 1 is soft-label and 0 hard-label distillation.

    Args:
        value: λ. The authors' script has 0.2, their configuration 0.5.

    Raises:
        InputError: If it is not within 0 and 1.

    Examples:
        >>> lp = torch.tensor([[0.5, 0.5]]).log()
        >>> Static(0.2)(TokenStatistics(torch.tensor([0]), None, lp, lp), StepInfo())
        tensor([0.2000])
    """

    value: float = 0.5

    def __post_init__(self) -> None:
        _check_unit("the static weight", self.value)

    def __call__(self, seen: TokenStatistics, at: StepInfo) -> Tensor:
        """λ of every token, ``[C]``."""
        return torch.full_like(seen.teacher_max_prob, self.value)


@dataclass(frozen=True)
class Confidence:
    """λ = 1 - max_a π_T(a|s): hard labels where the teacher is sure.

    Args:
        source: ``max`` is the paper's; ``label`` takes the probability of the data's token, as
            the authors' code does.

    Raises:
        InputError: If `source` is neither.

    Examples:
        >>> lp = torch.tensor([[0.9, 0.1], [0.5, 0.5]]).log()
        >>> Confidence()(TokenStatistics(torch.arange(2), None, lp, lp), StepInfo())
        tensor([0.1000, 0.5000])
    """

    source: Literal["max", "label"] = "max"

    def __post_init__(self) -> None:
        if self.source not in ("max", "label"):
            raise InputError(f"source is {self.source!r}; accepted: max, label")

    def __call__(self, seen: TokenStatistics, at: StepInfo) -> Tensor:
        """λ of every token, ``[C]``."""
        p = seen.teacher_max_prob if self.source == "max" else seen.teacher_label_prob
        return (1 - p).clamp(0, 1)


@dataclass(frozen=True)
class Entropy:
    """λ = H(π_T(·|s))/log V, or the authors' power-sum measure of smoothness.

    Args:
        kind: ``shannon`` is the paper's; ``power``, as in the authors' code, is
            (Σ_a π_T^γ - 1)/(V^(1-γ) - 1). Both are 0 for a one-hot teacher and 1 for a uniform one.
        gamma: γ of ``power``, between 0 and 1, both excluded.

    Raises:
        InputError: If `kind` is unknown or γ out of range.

    Examples:
        >>> lp = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).log()
        >>> Entropy()(TokenStatistics(torch.tensor([0]), None, lp, lp), StepInfo())
        tensor([0.5000])
    """

    kind: Literal["shannon", "power"] = "shannon"
    gamma: float = 0.1

    def __post_init__(self) -> None:
        if self.kind not in ("shannon", "power"):
            raise InputError(f"kind is {self.kind!r}; accepted: shannon, power")
        if not 0 < self.gamma < 1:
            raise InputError(f"gamma is {self.gamma}; accepted: above 0 and below 1")

    def __call__(self, seen: TokenStatistics, at: StepInfo) -> Tensor:
        """λ of every token, ``[C]``."""
        V = seen.vocab_size
        if V == 1:
            return torch.zeros_like(seen.teacher_max_prob)
        if self.kind == "shannon":
            return (seen.teacher_entropy / math.log(V)).clamp(0, 1)
        power_sum = seen.teacher_power_sum(self.gamma)
        most: float = V ** (1 - self.gamma)
        return ((power_sum - 1) / (most - 1)).clamp(0, 1)


@dataclass(frozen=True)
class Curriculum:
    """λ = maximum · min(t / (warmup · total), 1): hard labels first, soft ones mixed in later.

    Args:
        maximum: λ at the end of the warm-up (0.2 to 0.5 in the authors' runs).
        warmup: Its share of all optimizer steps.

    Raises:
        InputError: If either is not within 0 and 1; when called, if the total is unknown.

    Examples:
        >>> lp = torch.tensor([[0.5, 0.5]]).log()
        >>> seen = TokenStatistics(torch.tensor([0]), None, lp, lp)
        >>> Curriculum(0.4, warmup=0.2)(seen, StepInfo(10, total=100))
        tensor([0.2000])
    """

    maximum: float = 0.5
    warmup: float = 0.2

    def __post_init__(self) -> None:
        _check_unit("maximum", self.maximum)
        _check_unit("warmup", self.warmup)

    def __call__(self, seen: TokenStatistics, at: StepInfo) -> Tensor:
        """λ of every token, ``[C]``."""
        if at.total is None:
            raise InputError(
                "the curriculum needs the number of steps; pass at=StepInfo(step, total), or set "
                "max_steps where the data has no length"
            )
        length = self.warmup * at.total
        done = 1.0 if at.step >= length else at.step / length
        return torch.full_like(seen.teacher_max_prob, self.maximum * done)


@dataclass(frozen=True)
class WeightedSoftLabels:
    """λ = 1 - exp(-CE_student/CE_teacher) of the label (Zhou et al., ICLR 2021): a baseline.

    Examples:
        >>> lq, lp = torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.5, 0.5]]).log()
        >>> seen = TokenStatistics(torch.tensor([0]), torch.tensor([0]), lq, lp)
        >>> WeightedSoftLabels()(seen, StepInfo())
        tensor([0.8647])
    """

    def __call__(self, seen: TokenStatistics, at: StepInfo) -> Tensor:
        """λ of every token, ``[C]``."""
        ratio = seen.student_label_prob.log() / seen.teacher_label_prob.log()
        return (1 - torch.exp(-ratio)).nan_to_num(0.0).clamp(0, 1)


@dataclass(frozen=True)
class Reversed:
    """1 - λ of another weight: the paper's ablation, which should do worse.

    Examples:
        >>> lp = torch.tensor([[0.9, 0.1]]).log()
        >>> Reversed(Confidence())(TokenStatistics(torch.tensor([0]), None, lp, lp), StepInfo())
        tensor([0.9000])
    """

    weight: Weight

    def __call__(self, seen: TokenStatistics, at: StepInfo) -> Tensor:
        """λ of every token, ``[C]``."""
        return 1 - checked_weight(self.weight, seen, at)


@dataclass(frozen=True)
class Product:
    """The product of two weights, such as a curriculum on top of the confidence.

    Examples:
        >>> lp = torch.tensor([[0.9, 0.1]]).log()
        >>> seen = TokenStatistics(torch.tensor([0]), None, lp, lp)
        >>> Product(Static(0.5), Confidence())(seen, StepInfo())
        tensor([0.0500])
    """

    first: Weight
    second: Weight

    def __call__(self, seen: TokenStatistics, at: StepInfo) -> Tensor:
        """λ of every token, ``[C]``."""
        return checked_weight(self.first, seen, at) * checked_weight(self.second, seen, at)


_IN_RANGE = (Static, Confidence, Entropy, Curriculum, WeightedSoftLabels, Reversed, Product)


def checked_weight(weight: Weight, seen: TokenStatistics, at: StepInfo) -> Tensor:
    """λ, with a look at its range where the weight is the user's own.

    Args:
        weight: The weight.
        seen: The statistics of the chunk.
        at: Where training stands.

    Raises:
        InputError: If λ has a wrong shape, is NaN, or leaves [0, 1].

    Examples:
        >>> lp = torch.tensor([[0.9, 0.1]]).log()
        >>> seen = TokenStatistics(torch.tensor([0]), None, lp, lp)
        >>> checked_weight(lambda seen, at: seen.teacher_max_prob * 2, seen, StepInfo())
        Traceback (most recent call last):
            ...
        shared_core.errors.InputError: the weight is outside [0, 1] or NaN for 1 of 1 tokens; ...
    """
    found = weight(seen, at)
    if isinstance(weight, _IN_RANGE):
        return found
    if found.shape != seen.rows.shape:
        raise InputError(
            f"the weight has shape {list(found.shape)}; this chunk has {len(seen.rows)} tokens, so "
            f"it must be [{len(seen.rows)}]"
        )
    bad = int((~((found >= 0) & (found <= 1))).sum())
    if bad:
        raise InputError(
            f"the weight is outside [0, 1] or NaN for {bad} of {len(found)} tokens; λ is the share "
            "of the soft label: clamp it"
        )
    return found


def _number(text: str, default: float) -> float:
    try:
        return float(text) if text else default
    except ValueError:
        raise InputError(f"{text!r} is not a number") from None


def weight_from_string(text: str) -> Weight:
    """A weight by name, as the command line and configurations write it.

    Args:
        text: ``soft``, ``hard``, ``static:0.2``, ``confidence`` or ``confidence:label``,
            ``entropy`` or ``entropy:power``, ``curriculum:0.5``, ``wsl``; ``reversed-`` before any
            of them; ``*`` between two for their product.

    Raises:
        InputError: If it is none of these.

    Examples:
        >>> weight_from_string("curriculum:0.5*confidence")
        Product(first=Curriculum(maximum=0.5, warmup=0.2), second=Confidence(source='max'))
    """
    first, star, second = text.partition("*")
    if star:
        return Product(weight_from_string(first), weight_from_string(second))
    if text.startswith("reversed-"):
        return Reversed(weight_from_string(text.removeprefix("reversed-")))
    name, _, setting = text.strip().partition(":")
    match name:
        case "soft" if not setting:
            return Static(1.0)
        case "hard" if not setting:
            return Static(0.0)
        case "static":
            return Static(_number(setting, 0.5))
        case "confidence":
            return Confidence(setting or "max")  # type: ignore[arg-type]
        case "entropy":
            return Entropy(setting or "shannon")  # type: ignore[arg-type]
        case "curriculum":
            return Curriculum(_number(setting, 0.5))
        case "wsl" if not setting:
            return WeightedSoftLabels()
    raise InputError(
        f"no weight is called {text!r}; accepted: soft, hard, static:0.2, confidence[:label], "
        "entropy[:power], curriculum:0.5, wsl, reversed-NAME, NAME*NAME"
    )

"""How much of each class's loss enters the sharpness term.

Focal-SAM weights the sharpness of class i by ``c_i = λ (1 - π_i)^γ`` with the class prior
``π_i = n_i / N`` (Li et al., ICML 2025). SAM is ``c = 1``; ImbSAM is ``c_i = 1[n_i < η]``.
"""

import math
import warnings
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from focal_sam._checks import (
    ClassCounts,
    check_choice,
    check_counts,
    check_labels,
    check_nonnegative,
)
from focal_sam._per_class import PerClass
from shared_core.errors import InputError

__all__ = ["ClassWeights", "FocalWeights", "suggest_gamma", "tail_weights"]

FLAT_RATIO = 1.05


class ClassWeights(PerClass):
    """A weight per class, looked up for a batch of labels.

    Args:
        values: The weights, shape ``[classes]``, any real numbers (a weight above 1 is legal).
        check_labels: Also check labels that live on an accelerator. This waits for the device
            once a step; labels on the CPU are always checked.

    Raises:
        ValueError: If the values are not one finite number per class.

    Examples:
        >>> ClassWeights(torch.tensor([0.1, 0.5]))(torch.tensor([1, 0, 1]))
        tensor([0.5000, 0.1000, 0.5000])
    """

    def __init__(self, values: Float[Tensor, " classes"], *, check_labels: bool = False) -> None:
        if values.ndim != 1 or values.numel() == 0:
            raise InputError(
                f"the weights have the shape {list(values.shape)}; pass one number per class"
            )
        super().__init__(values)
        bad = (~self.values.isfinite()).nonzero()
        if bad.numel():
            raise InputError(
                f"the weight of class {int(bad[0])} is {self.values[bad[0]].item()}; "
                "it must be finite"
            )
        self.check_labels = check_labels

    def uniform(self, tolerance: float = 0.0) -> float | None:
        """The mean weight if all weights lie within a relative `tolerance` of it, else ``None``.

        Examples:
            >>> ClassWeights(torch.ones(3)).uniform()
            1.0
        """
        low, high = self.values.min().item(), self.values.max().item()
        if low == high:
            return low
        mean = self.values.mean().item()
        if tolerance > 0 and mean > 0 and max(high / mean - 1, 1 - low / mean) <= tolerance:
            return mean
        return None

    def __call__(
        self, target: Shaped[Tensor, "batch *classes"], dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, " batch"]:
        """Look the weights up.

        Args:
            target: Labels ``[batch]`` (integers) or label distributions ``[batch, classes]``
                (floats, such as mixup gives), whose weight is the expectation.
            dtype: Of the result.

        Raises:
            IndexError: If a label is negative or not below the number of classes.
            ValueError: If the target has another shape or dtype.
        """
        if target.is_floating_point():
            if target.ndim != 2 or target.shape[1] != self.num_classes:
                raise InputError(
                    f"the soft target has the shape {list(target.shape)}; "
                    f"pass label distributions [batch, {self.num_classes}]"
                )
            # Not a matrix product: autocast would take that to half precision.
            return (target.detach().to(dtype) * self.to(target.device, dtype)).sum(dim=1)
        if target.ndim != 1 or target.dtype == torch.bool or target.is_complex():
            raise InputError(
                f"the target has the shape {list(target.shape)} and the type {target.dtype}; "
                f"pass labels [batch] of an integer type or label distributions "
                f"[batch, {self.num_classes}] of a float type"
            )
        check_labels(target, self.num_classes, on_device=self.check_labels)
        # On an accelerator, gather asserts both bounds, where indexing would take -1 for the last.
        return self.to(target.device, dtype).gather(0, target.long())


class FocalWeights(ClassWeights):
    """Focal-SAM's class weights ``c_i = λ (1 - π_i)^γ`` (paper, eq. of the objective).

    Args:
        class_counts: Number of training samples of each class, ``[classes]``.
        gamma: Focal exponent γ ≥ 0; the larger, the less the head classes are flattened.
        lam: Sharpness weight λ ≥ 0; above 1 is legal (the authors' code takes 1.1 once).
        prior: ``"empirical"`` is the paper's ``π_i = n_i / N``. ``"relative"`` is an extension
            that is not in the paper: ``π_i = n_i / (n_max + n_min)`` (n_min of the classes with
            samples), which bites with any number of classes.
        allow_empty: Accept classes without training samples (``π_i = 0``).
        check_labels: See `ClassWeights`.

    Attributes:
        values: c, ``[classes]``, float64.
        class_priors: π, ``[classes]``, float64.

    Raises:
        ValueError: If γ or λ is negative or not finite, or a count is below 1.

    Warns:
        UserWarning: If γ > 0 but the weights differ by less than 5 %: then this is λ-weighted SAM
            in all but name, as with the paper's own settings for a thousand classes and more.

    Examples:
        >>> FocalWeights([90, 10], gamma=2.0, lam=1.0).values
        tensor([0.0100, 0.8100], dtype=torch.float64)
    """

    def __init__(
        self,
        class_counts: ClassCounts,
        gamma: float = 2.0,
        lam: float = 0.8,
        *,
        prior: Literal["empirical", "relative"] = "empirical",
        allow_empty: bool = False,
        check_labels: bool = False,
    ) -> None:
        check_nonnegative(gamma=gamma, lam=lam)
        check_choice("prior", prior, "empirical", "relative")
        counts = check_counts(class_counts, allow_empty)
        self.class_counts = counts
        self.gamma, self.lam, self.prior = gamma, lam, prior
        self._seen = counts > 0
        total = counts.sum() if prior == "empirical" else counts.max() + counts[self._seen].min()
        self.class_priors = counts / total
        # 0^0 = 1, so that γ = 0 is SAM even where one class is all there is.
        super().__init__(lam * (1 - self.class_priors) ** gamma, check_labels=check_labels)
        weighted = gamma > 0 and self.values.any() and self._seen.sum() > 1
        if weighted and self._spread() < FLAT_RATIO:
            warnings.warn(self._flatness(), stacklevel=2)

    def _spread(self) -> float:
        """Highest over lowest weight of the classes that occur in training."""
        low, high = (bound.item() for bound in self.values[self._seen].aminmax())
        if low == high:
            return 1.0
        return high / low if low > 0 else math.inf

    def _flatness(self) -> str:
        """What to know, and do, about weights that hardly differ."""
        rests = 1 - self.class_priors[self._seen]
        steeper = math.log(0.5) / math.log(rests.min().item())
        if (rests.max() / rests.min()).item() ** steeper < FLAT_RATIO:
            advice = "with class counts as balanced as these no γ changes that"
        else:
            advice = f"γ = {steeper:.3g} would halve the largest class's weight (see suggest_gamma)"
        return (
            f"the class weights differ by {100 * (self._spread() - 1):.2g} % only, so this is "
            f"{self.lam:g}-weighted SAM in all but name; {advice}"
        )

    def describe(self) -> dict[str, Any]:
        """The settings and the weights in a few numbers.

        Returns:
            ``classes``, ``gamma``, ``lam``, ``prior``; the lowest and the highest weight (``min``,
            ``max``), those of the largest and the smallest class that occurs in training
            (``head``, ``tail``), and the highest over the lowest of those classes (``spread``,
            infinite where only the lowest is 0).

        Examples:
            >>> FocalWeights([90, 10], gamma=2.0, lam=1.0).describe()["tail"]
            0.81
        """
        counts = self.class_counts
        head = int(counts.argmax())
        tail = int(counts.where(self._seen, math.inf).argmin())
        return {
            "classes": self.num_classes,
            "gamma": self.gamma,
            "lam": self.lam,
            "prior": self.prior,
            "min": self.values.min().item(),
            "max": self.values.max().item(),
            "head": self.values[head].item(),
            "tail": self.values[tail].item(),
            "spread": self._spread(),
        }


def suggest_gamma(class_counts: ClassCounts, head_weight: float) -> float:
    """The γ that gives the largest class the factor ``(1 - π_max)^γ = head_weight``.

    Args:
        class_counts: Number of training samples of each class, ``[classes]``; 0 is accepted.
        head_weight: The wanted factor, in (0, 1].

    Raises:
        ValueError: If `head_weight` is outside (0, 1], a count is negative, or only one class has
            samples.

    Examples:
        >>> round(suggest_gamma([90, 10], 0.01), 6)
        2.0
    """
    if not 0 < head_weight <= 1:
        raise InputError(f"head_weight is {head_weight}; it must lie in (0, 1]")
    counts = check_counts(class_counts, allow_empty=True)
    largest = (counts.max() / counts.sum()).item()
    if largest == 1:
        raise InputError(
            "class_counts has a single class with samples, whose factor (1 - π)^γ is 0 for every "
            "γ > 0; there is nothing to weigh"
        )
    return abs(math.log(head_weight) / math.log1p(-largest))


def tail_weights(class_counts: ClassCounts, threshold: int) -> Float[Tensor, " classes"]:
    """ImbSAM's weights: 1 for the classes with fewer than `threshold` samples, 0 for the others.

    Args:
        class_counts: Number of training samples of each class, ``[classes]``.
        threshold: η of Zhou et al. (ICCV 2023), ``>= 0``; their value for CIFAR-100-LT is 20.

    Raises:
        ValueError: If a count is below 1 or `threshold` is negative.

    Examples:
        >>> tail_weights([90, 10], 20)
        tensor([0., 1.], dtype=torch.float64)
    """
    check_nonnegative(threshold=threshold)
    return (check_counts(class_counts) < threshold).double()

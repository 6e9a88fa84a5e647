"""Losses for long-tailed data, one value per sample, to put under a sharpness-aware method.

Sharpness-aware methods that weight classes need the loss of every sample, so all losses here
default to ``reduction="none"`` and return ``[B]``. They are training losses: evaluate the raw
logits. Logits in float16 or bfloat16 are taken to float32 first.

Plain cross-entropy is ``torch.nn.CrossEntropyLoss(reduction="none")``. Balanced softmax (Ren et
al., NeurIPS 2020) is `LogitAdjustedLoss` with ``tau=1``: the two differ by a constant shift of the
logits.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor, nn

from focal_sam._checks import (
    ClassCounts,
    check_choice,
    check_counts,
    check_labels,
    check_nonnegative,
)
from focal_sam._per_class import PerClass
from focal_sam.weights import ClassWeights
from shared_core.errors import InputError

__all__ = [
    "ClassBalancedWeights",
    "DRWSchedule",
    "FocalLoss",
    "LDAMLoss",
    "LogitAdjustedLoss",
    "VSLoss",
    "class_balanced_weights",
]

Labels = Integer[Tensor, " batch"]
SoftLabels = Float[Tensor, "batch classes"]
Losses = Float[Tensor, " batch"] | Float[Tensor, ""]
Reduction = Literal["none", "mean", "sum"]


class LogitAdjustedLoss(nn.Module):
    """Cross-entropy of logits shifted by the log prior: ``CE(z + tau * log(pi + 1e-9), y)``.

    Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, Eq. 10. With ``tau=1`` it is
    balanced softmax, with ``tau=0`` cross-entropy.

    Args:
        class_counts: Training samples per class, ``[C]``.
        tau: Strength of the adjustment, ``>= 0``.
        allow_empty: Accept classes without training samples; their logit is shifted by
            ``tau * log(1e-9)``.
        reduction: ``"none"`` (``[B]``, what the sharpness methods need), ``"mean"`` or ``"sum"``.

    Raises:
        ValueError: If a count is below 1, an argument is out of range, or (when called) the
            shapes of logits and target do not fit.
        IndexError: When called with a label outside ``[0, C)`` on the CPU.

    Examples:
        >>> import torch
        >>> criterion = LogitAdjustedLoss([90, 10])
        >>> criterion(torch.zeros(2, 2), torch.tensor([0, 1]))
        tensor([0.1054, 2.3026])
    """

    def __init__(
        self,
        class_counts: ClassCounts,
        tau: float = 1.0,
        *,
        allow_empty: bool = False,
        reduction: Reduction = "none",
    ) -> None:
        super().__init__()
        counts = check_counts(class_counts, allow_empty=allow_empty)
        check_nonnegative(tau=tau)
        self.tau = tau
        self.reduction = _checked(reduction)
        self.shift = PerClass(tau * torch.log(counts / counts.sum() + 1e-9))

    def forward(
        self, logits: Float[Tensor, "batch classes"], target: Labels | SoftLabels
    ) -> Losses:
        """The loss of every sample (or its mean or sum).

        Args:
            logits: ``[B, C]``.
            target: Labels ``[B]``, or soft labels ``[B, C]``, each row a distribution.
        """
        z, y = _prepared(logits, target, self.shift.num_classes)
        return F.cross_entropy(z + self.shift.like(z), y, reduction=self.reduction)

    def extra_repr(self) -> str:  # noqa: D102
        return f"tau={self.tau}, reduction={self.reduction!r}"


class VSLoss(nn.Module):
    """Vector-scaling loss: ``CE(z_j / D_j + tau * log pi_j, y)``, ``D_j = (n_max / n_j)^gamma``.

    Kini et al., "Label-imbalanced and group-sensitive classification under overparameterization",
    NeurIPS 2021, with the additive adjustment written as in `LogitAdjustedLoss`. The largest class
    has ``D = 1`` and rare classes a larger divisor. ``gamma=0`` is logit adjustment (without its
    1e-9), ``gamma=tau=0`` cross-entropy.

    Args:
        class_counts: Training samples per class, ``[C]``, all positive.
        gamma: Exponent of the multiplicative adjustment, ``>= 0``. (The Focal-SAM authors' CIFAR
            scripts take 0.05, with ``tau=0.75``.)
        tau: Strength of the additive adjustment, ``>= 0``.
        reduction: ``"none"`` (``[B]``, what the sharpness methods need), ``"mean"`` or ``"sum"``.

    Raises:
        ValueError: If a count is below 1, an argument is out of range, or (when called) the
            shapes of logits and target do not fit.
        IndexError: When called with a label outside ``[0, C)`` on the CPU.

    Examples:
        >>> import torch
        >>> criterion = VSLoss([90, 10], gamma=0.3)
        >>> criterion(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))
        tensor([0.0401, 1.8509])
    """

    def __init__(
        self,
        class_counts: ClassCounts,
        gamma: float = 0.3,
        tau: float = 1.0,
        *,
        reduction: Reduction = "none",
    ) -> None:
        super().__init__()
        counts = check_counts(class_counts)
        check_nonnegative(gamma=gamma, tau=tau)
        self.gamma, self.tau = gamma, tau
        self.reduction = _checked(reduction)
        self.scale = PerClass((counts / counts.max()) ** gamma)
        self.shift = PerClass(tau * torch.log(counts / counts.sum()))

    def forward(
        self, logits: Float[Tensor, "batch classes"], target: Labels | SoftLabels
    ) -> Losses:
        """The loss of every sample (or its mean or sum).

        Args:
            logits: ``[B, C]``.
            target: Labels ``[B]``, or soft labels ``[B, C]``, each row a distribution.
        """
        z, y = _prepared(logits, target, self.shift.num_classes)
        return F.cross_entropy(
            z * self.scale.like(z) + self.shift.like(z), y, reduction=self.reduction
        )

    def extra_repr(self) -> str:  # noqa: D102
        return f"gamma={self.gamma}, tau={self.tau}, reduction={self.reduction!r}"


class LDAMLoss(nn.Module):
    """Label-distribution-aware margin loss: ``CE(scale * (z - m_y on the target's logit), y)``.

    Cao et al., "Learning imbalanced datasets with label-distribution-aware margin loss", NeurIPS
    2019, with margins ``m_i = max_margin * (n_min / n_i)^(1/4)``: the rarest class has the
    largest. The margins are meant for cosine logits, those of `focal_sam.models.NormedLinear` with
    its default scale 1. Multiply the loss by `DRWSchedule` for LDAM-DRW. ``max_margin=0, scale=1``
    is cross-entropy.

    Args:
        class_counts: Training samples per class, ``[C]``, all positive.
        max_margin: Margin of the rarest class, ``>= 0``. 0.5 for CIFAR; 0.3 is also used.
        scale: Factor on the logits after the margin, ``> 0``.
        reduction: ``"none"`` (``[B]``, what the sharpness methods need), ``"mean"`` or ``"sum"``.

    Raises:
        ValueError: If a count is below 1, an argument is out of range, or (when called) the
            target is soft or the shapes of logits and target do not fit.
        IndexError: When called with a label outside ``[0, C)`` on the CPU.

    Examples:
        >>> import torch
        >>> criterion = LDAMLoss([160, 10], max_margin=0.5, scale=1.0)
        >>> criterion(torch.zeros(2, 2), torch.tensor([0, 1]))
        tensor([0.8259, 0.9741])
    """

    def __init__(
        self,
        class_counts: ClassCounts,
        max_margin: float = 0.5,
        scale: float = 30.0,
        *,
        reduction: Reduction = "none",
    ) -> None:
        super().__init__()
        counts = check_counts(class_counts)
        check_nonnegative(max_margin=max_margin, scale=scale)
        if scale == 0:
            raise InputError("scale is 0: it must be positive (30 in the paper)")
        self.max_margin, self.scale = max_margin, scale
        self.reduction = _checked(reduction)
        self.margins = PerClass(max_margin * (counts.min() / counts) ** 0.25)

    def forward(
        self, logits: Float[Tensor, "batch classes"], target: Labels | SoftLabels
    ) -> Losses:
        """The loss of every sample (or its mean or sum).

        Args:
            logits: ``[B, C]``, cosines.
            target: Labels ``[B]``. Soft labels have no margin and are refused.
        """
        if target.is_floating_point():
            raise InputError(
                f"LDAMLoss got soft labels of shape {list(target.shape)}: its margin belongs to "
                "one target class. Pass int64 labels [B], or use LogitAdjustedLoss or VSLoss"
            )
        z, y = _prepared(logits, target, self.margins.num_classes)
        margin = self.margins.like(z) * F.one_hot(y, z.shape[1])
        return F.cross_entropy(self.scale * (z - margin), y, reduction=self.reduction)

    def extra_repr(self) -> str:  # noqa: D102
        return f"max_margin={self.max_margin}, scale={self.scale}, reduction={self.reduction!r}"


class FocalLoss(nn.Module):
    """Focal loss, ``-(1 - p_y)^gamma * log p_y`` with ``p = softmax(z)``.

    Lin et al., "Focal loss for dense object detection", ICCV 2017, Eq. 4, for softmax classifiers.
    Soft labels give ``-sum_j t_j (1 - p_j)^gamma log p_j``. Multiply by `ClassBalancedWeights` for
    the alpha-balanced form. ``gamma=0`` is cross-entropy. (The focal factor of Focal-SAM is
    another one: it weights the sharpness of a class by its prior.)

    Args:
        gamma: Focusing exponent, ``>= 0``.
        reduction: ``"none"`` (``[B]``, what the sharpness methods need), ``"mean"`` or ``"sum"``.

    Raises:
        ValueError: If an argument is out of range, or (when called) the shapes of logits and
            target do not fit.
        IndexError: When called with a label outside ``[0, C)`` on the CPU.

    Examples:
        >>> import torch
        >>> FocalLoss(gamma=2.0)(torch.zeros(1, 2), torch.tensor([0]))
        tensor([0.1733])
    """

    def __init__(self, gamma: float = 2.0, *, reduction: Reduction = "none") -> None:
        super().__init__()
        check_nonnegative(gamma=gamma)
        self.gamma = gamma
        self.reduction = _checked(reduction)

    def forward(
        self, logits: Float[Tensor, "batch classes"], target: Labels | SoftLabels
    ) -> Losses:
        """The loss of every sample (or its mean or sum).

        Args:
            logits: ``[B, C]``.
            target: Labels ``[B]``, or soft labels ``[B, C]``, each row a distribution.
        """
        z, y = _prepared(logits, target)
        log_p = F.log_softmax(z, dim=1)
        soft = y.is_floating_point()
        if not soft:
            log_p = log_p.gather(1, y[:, None])
        # A sure prediction has 1 - p = 0, where the power's derivative is infinite for gamma < 1:
        # the clamp cuts that gradient to the 0 it is multiplied with.
        rest = (-torch.expm1(log_p)).clamp_min(torch.finfo(log_p.dtype).tiny)
        loss = -(rest**self.gamma * log_p)
        loss = (y * loss if soft else loss).sum(dim=1)
        if self.reduction == "none":
            return loss
        return loss.mean() if self.reduction == "mean" else loss.sum()

    def extra_repr(self) -> str:  # noqa: D102
        return f"gamma={self.gamma}, reduction={self.reduction!r}"


def class_balanced_weights(
    class_counts: ClassCounts, beta: float = 0.9999
) -> Float[Tensor, " classes"]:
    """Class weights ``(1 - beta) / (1 - beta^n_i)``, scaled to sum to the number of classes.

    Cui et al., "Class-balanced loss based on effective number of samples", CVPR 2019. ``beta=0``
    gives ones; ``beta -> 1`` gives the inverse class frequency.

    Args:
        class_counts: Training samples per class, ``[C]``, all positive.
        beta: In ``[0, 1)``.

    Returns:
        The weights, ``[C]``, float64 on the CPU.

    Raises:
        ValueError: If a count is below 1 or ``beta`` is not in ``[0, 1)``.

    Examples:
        >>> class_balanced_weights([100, 10, 1], beta=0.9)
        tensor([0.2393, 0.3674, 2.3932], dtype=torch.float64)
    """
    counts = check_counts(class_counts)
    if not 0 <= beta < 1:
        raise InputError(f"beta is {beta}: it must lie in [0, 1), as 0.9999 does")
    # -expm1(n log beta) is 1 - beta^n without the cancellation near beta = 1.
    log_beta = torch.log(torch.tensor(beta, dtype=torch.float64))
    weights = -1 / torch.expm1(counts * log_beta)
    return weights * (len(counts) / weights.sum())


class ClassBalancedWeights(ClassWeights):
    """Looks up the class-balanced weight of every sample, to multiply an unreduced loss with.

    Average the product over the batch size, not over the sum of the weights as
    ``CrossEntropyLoss(weight=...)`` does. (Its base class is what the sharpness methods use for
    their own weights; these here weight the loss.)

    Args:
        class_counts: Training samples per class, ``[C]``, all positive.
        beta: In ``[0, 1)``, see `class_balanced_weights`.
        check_labels: See `ClassWeights`.

    Raises:
        ValueError: If a count is below 1 or ``beta`` is not in ``[0, 1)``.

    Examples:
        >>> import torch
        >>> weights = ClassBalancedWeights([100, 10, 1], beta=0.9)
        >>> loss = torch.nn.CrossEntropyLoss(reduction="none")
        >>> target = torch.tensor([0, 2])
        >>> loss(torch.zeros(2, 3), target) * weights(target)
        tensor([0.2629, 2.6292])
    """

    def __init__(
        self, class_counts: ClassCounts, beta: float = 0.9999, *, check_labels: bool = False
    ) -> None:
        super().__init__(class_balanced_weights(class_counts, beta), check_labels=check_labels)
        self.beta = beta


class DRWSchedule:
    """Deferred re-weighting: weights of one first, class-balanced weights from an epoch on.

    Cao et al., "Learning imbalanced datasets with label-distribution-aware margin loss", NeurIPS
    2019. Multiply the unreduced loss by the weights before the sharpness method sees it.

    Args:
        class_counts: Training samples per class, ``[C]``, all positive.
        start_epoch: The first epoch, counted from 0, that is re-weighted. 160 of 200 in the paper.
        beta: In ``[0, 1)``, see `class_balanced_weights`.

    Raises:
        ValueError: If a count is below 1, ``beta`` is not in ``[0, 1)``, or an epoch is negative.

    Examples:
        >>> import torch
        >>> drw = DRWSchedule([100, 10, 1], start_epoch=160, beta=0.9)
        >>> target = torch.tensor([0, 2])
        >>> drw.set_epoch(159)
        >>> drw(target)
        tensor([1., 1.])
        >>> drw.set_epoch(160)
        >>> drw(target)
        tensor([0.2393, 2.3932])
    """

    def __init__(
        self, class_counts: ClassCounts, start_epoch: int = 160, beta: float = 0.9999
    ) -> None:
        if start_epoch < 0:
            raise InputError(f"start_epoch is {start_epoch}: epochs count from 0")
        self.start_epoch = start_epoch
        self.after = ClassBalancedWeights(class_counts, beta)
        self.before = ClassWeights(torch.ones(self.after.num_classes))
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch runs, counted from 0; call it at the start of every epoch."""
        if epoch < 0:
            raise InputError(f"epoch is {epoch}: epochs count from 0")
        self.epoch = epoch

    def __call__(
        self, target: Labels | SoftLabels, dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, " batch"]:
        """The weight of every sample in the current epoch.

        Args:
            target: Labels ``[B]``, or soft labels ``[B, C]``, whose weight is the mean of
                the class weights under each row.
            dtype: Of the result.
        """
        return (self.after if self.epoch >= self.start_epoch else self.before)(target, dtype)


def _prepared(logits: Tensor, target: Tensor, classes: int | None = None) -> tuple[Tensor, Tensor]:
    """Check logits and target against each other; take both to types that the losses are exact in.

    Half-precision logits become float32, labels int64, and soft labels the type of the logits.
    """
    if logits.ndim != 2 or classes not in (None, logits.shape[1]):
        expected = "[B, C]" if classes is None else f"[B, {classes}]"
        raise InputError(f"logits have the shape {list(logits.shape)}: expected {expected}")
    batch, classes = logits.shape
    soft = target.is_floating_point()
    integer = not (soft or target.is_complex() or target.dtype == torch.bool)
    if not (soft or integer) or target.shape != ((batch, classes) if soft else (batch,)):
        raise InputError(
            f"target has the shape {list(target.shape)} and the type {target.dtype}: expected "
            f"labels [{batch}] of an integer type or soft labels [{batch}, {classes}] of a float "
            "type"
        )
    if integer:
        check_labels(target, classes)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return logits, target.to(logits.dtype if soft else torch.int64)


def _checked(reduction: Reduction) -> Reduction:
    check_choice("reduction", reduction, "none", "mean", "sum")
    return reduction

"""Losses that EDGE is compared with: for long-tailed labels, and for outlier exposure.

Long-tail losses take logits and targets ``[N, C]`` and can be the `id_loss` of `EdgeLoss`.
Outlier losses take the logits of the outliers as well, like `EdgeLoss`.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from edge_ood.loss import check_targets
from shared_core.errors import InputError

__all__ = [
    "AsymmetricLoss",
    "DistributionBalancedLoss",
    "FocalMultiLabelLoss",
    "MultiLabelEnergyBoundLoss",
    "MultiLabelOELoss",
]

Reduction = Literal["none", "mean", "sum"]


def _reduce(values: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "mean":
        return values.mean()
    return values.sum() if reduction == "sum" else values


def _check_reduction(reduction: str) -> None:
    if reduction not in ("none", "mean", "sum"):
        raise InputError(f"reduction is {reduction!r}; accepted: 'none', 'mean', 'sum'")


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


class FocalMultiLabelLoss(nn.Module):
    """Sigmoid focal loss: ``-(1 - p_t)^γ log p_t`` for each label.

    Args:
        gamma: γ; 0 is BCE. The EDGE authors' copy has 4 with reduction ``sum``.
        reduction: ``mean`` over samples and labels, ``sum`` or ``none``.

    Source:
        Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, eq. 4.

    Examples:
        >>> FocalMultiLabelLoss(gamma=0.0)(torch.zeros(1, 2), torch.ones(1, 2))
        tensor(0.6931)
    """

    def __init__(self, gamma: float = 4.0, reduction: Reduction = "mean") -> None:
        super().__init__()
        _check_reduction(reduction)
        if not (math.isfinite(gamma) and gamma >= 0):
            raise InputError(f"gamma is {gamma}; it must be finite and at least 0")
        self.gamma, self.reduction = gamma, reduction

    def forward(
        self, logits: Float[Tensor, "N C"], targets: Float[Tensor, "N C"]
    ) -> Float[Tensor, "*out"]:
        """Compute the loss."""
        check_targets(logits, targets)
        z = _wide(logits)
        y = targets.to(z.dtype)
        bce = F.binary_cross_entropy_with_logits(z, y, reduction="none")
        # 1 - p_t from the logit itself: 1 - sigmoid(z) would round to 0.
        wrong = torch.sigmoid(z) * (1 - y) + torch.sigmoid(-z) * y
        return _reduce(wrong**self.gamma * bce, self.reduction)


class AsymmetricLoss(nn.Module):
    """Asymmetric loss (ASL): focal exponents apart for positive and negative labels, and a shift.

    Args:
        gamma_neg: γ- of negative labels.
        gamma_pos: γ+ of positive labels.
        clip: m: the probability of a negative label is lowered by it, at most to 0.
        eps: Smallest probability in a logarithm.
        reduction: ``sum`` over samples and labels as published, ``mean`` or ``none``.

    Source:
        Ridnik et al., "Asymmetric Loss For Multi-Label Classification", ICCV 2021, eq. 4 to 7. As
        in their code, no gradient flows through the focusing weight.

    Examples:
        >>> loss = AsymmetricLoss(0.0, 0.0, clip=0.0, reduction="mean")
        >>> loss(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]))
        tensor(0.6931)
    """

    def __init__(
        self,
        gamma_neg: float = 4.0,
        gamma_pos: float = 1.0,
        clip: float = 0.05,
        eps: float = 1e-8,
        reduction: Reduction = "sum",
    ) -> None:
        super().__init__()
        _check_reduction(reduction)
        if gamma_neg < 0 or gamma_pos < 0 or not 0 <= clip < 1:
            raise InputError(
                f"gamma_neg={gamma_neg}, gamma_pos={gamma_pos}, clip={clip}; accepted: exponents "
                "from 0 up, clip in [0, 1)"
            )
        self.gamma_neg, self.gamma_pos = gamma_neg, gamma_pos
        self.clip, self.eps, self.reduction = clip, eps, reduction

    def forward(
        self, logits: Float[Tensor, "N C"], targets: Float[Tensor, "N C"]
    ) -> Float[Tensor, "*out"]:
        """Compute the loss."""
        check_targets(logits, targets)
        z = _wide(logits)
        y = targets.to(z.dtype)
        positive = torch.sigmoid(z)
        negative = (torch.sigmoid(-z) + self.clip).clamp(max=1)
        logs = y * positive.clamp(min=self.eps).log() + (1 - y) * negative.clamp(min=self.eps).log()
        right = (positive * y + negative * (1 - y)).detach()
        weight = (1 - right) ** (self.gamma_pos * y + self.gamma_neg * (1 - y))
        return _reduce(-weight * logs, self.reduction)


class DistributionBalancedLoss(nn.Module):
    """Distribution-balanced loss: re-balanced weights and negative-tolerant regularisation.

    With n_c samples of class c among n: ``r = (1/n_c) / Σ_{c' in y} 1/n_c'`` corrects for the
    sampling of label sets, smoothed to ``w = a + sigmoid(b (r - mu))``; logits are shifted by
    ``ν_c = -κ log(n/n_c - 1)`` (the code's ``init_bias``); negative logits are scaled by λ and
    their loss divided by it; a focal factor multiplies.

    Args:
        class_counts: Training samples of each class, ``[C]``, at least 1 and below `n_train`.
        n_train: All training samples.
        map_alpha: a of the weight.
        map_beta: b.
        map_gamma: mu.
        neg_scale: λ.
        init_bias: κ.
        focal_gamma: Exponent of the focal factor.
        balance: Factor of the focal loss.
        reduction: ``mean`` over samples and labels, ``sum`` or ``none``.

    Source:
        Wu et al., "Distribution-Balanced Loss for Multi-Label Classification in Long-Tailed
        Datasets", ECCV 2020; defaults of its COCO-LT settings.

    Examples:
        >>> loss = DistributionBalancedLoss([50, 5], n_train=100)
        >>> loss(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]])).shape
        torch.Size([])
    """

    inverse: Tensor
    bias: Tensor

    def __init__(
        self,
        class_counts: list[int] | Tensor,
        n_train: int,
        *,
        map_alpha: float = 0.1,
        map_beta: float = 10.0,
        map_gamma: float = 0.2,
        neg_scale: float = 2.0,
        init_bias: float = 0.05,
        focal_gamma: float = 2.0,
        balance: float = 2.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        _check_reduction(reduction)
        counts = torch.as_tensor(class_counts, dtype=torch.float64)
        if counts.ndim != 1 or counts.numel() == 0 or not bool((counts >= 1).all()):
            raise InputError(
                "class_counts needs one number from 1 up per class; "
                "leave classes without training samples out of the labels"
            )
        if not bool((counts < n_train).all()):
            raise InputError(
                f"a class has {counts.max():g} of {n_train} samples; a class that is in every "
                "sample has no finite logit shift"
            )
        self.register_buffer("inverse", (1 / counts).float())
        # Sign and the division by λ as in the authors' code, where the bias is added to the logit.
        self.register_buffer(
            "bias", (-(n_train / counts - 1).log() * init_bias / neg_scale).float()
        )
        self.map_alpha, self.map_beta, self.map_gamma = map_alpha, map_beta, map_gamma
        self.neg_scale, self.focal_gamma, self.balance = neg_scale, focal_gamma, balance
        self.reduction = reduction

    def forward(
        self, logits: Float[Tensor, "N C"], targets: Float[Tensor, "N C"]
    ) -> Float[Tensor, "*out"]:
        """Compute the loss."""
        check_targets(logits, targets)
        z = _wide(logits)
        y = targets.to(z.dtype)
        inverse, bias = self.inverse.to(z.dtype), self.bias.to(z.dtype)
        # A sample without a label would divide by 0; it then counts as if it had them all.
        total = (y * inverse).sum(1, keepdim=True)
        total = torch.where(total > 0, total, inverse.sum())
        weight = self.map_alpha + torch.sigmoid(self.map_beta * (inverse / total - self.map_gamma))
        z = z + bias
        z = z * (y + (1 - y) * self.neg_scale)
        weight = weight * (y + (1 - y) / self.neg_scale)
        bce = F.binary_cross_entropy_with_logits(z, y, reduction="none")
        wrong = torch.sigmoid(z) * (1 - y) + torch.sigmoid(-z) * y
        return _reduce(self.balance * wrong**self.focal_gamma * weight * bce, self.reduction)


class MultiLabelOELoss(nn.Module):
    """Outlier exposure on top of BCE: outliers get a flat softmax over the labels.

    ``BCE + w mean_i [logsumexp(z_i) - mean_c z_ic]``, the cross-entropy to the uniform
    distribution.

    Args:
        weight: w.

    Source:
        Hendrycks et al., "Deep Anomaly Detection with Outlier Exposure", ICLR 2019, section 4.

    Examples:
        >>> MultiLabelOELoss()(torch.zeros(1, 2), torch.ones(1, 2), torch.zeros(3, 2))
        tensor(1.0397)
    """

    def __init__(self, weight: float = 0.5) -> None:
        super().__init__()
        self.weight = weight

    def forward(
        self,
        logits_id: Float[Tensor, "N C"],
        targets: Float[Tensor, "N C"],
        logits_oe: Float[Tensor, "M C"],
    ) -> Float[Tensor, ""]:
        """Compute the loss."""
        check_targets(logits_id, targets)
        z, outliers = _wide(logits_id), _wide(logits_oe)
        bce = F.binary_cross_entropy_with_logits(z, targets.to(z.dtype))
        return bce + self.weight * (outliers.logsumexp(1) - outliers.mean(1)).mean()


class MultiLabelEnergyBoundLoss(nn.Module):
    """Energy-bounded learning on top of BCE: squared hinges on the energy ``-logsumexp(z)``.

    ``BCE + w mean relu(E_in - m_in)² + w mean relu(m_out - E_out)²``. The published script of the
    EDGE authors has both margins with the other sign, which makes the ID term vanish; here they are
    as in the energy paper.

    Args:
        weight: w.
        m_in: Energies of ID samples should lie below it.
        m_out: Energies of outliers should lie above it.

    Source:
        Liu et al., "Energy-based Out-of-distribution Detection", NeurIPS 2020, eq. 8 and 9.

    Examples:
        >>> loss = MultiLabelEnergyBoundLoss(m_in=-1.0, m_out=0.0)
        >>> loss(torch.zeros(1, 1), torch.ones(1, 1), torch.zeros(1, 1))
        tensor(0.7931)
    """

    def __init__(self, weight: float = 0.1, m_in: float = -25.0, m_out: float = -7.0) -> None:
        super().__init__()
        self.weight, self.m_in, self.m_out = weight, m_in, m_out

    def forward(
        self,
        logits_id: Float[Tensor, "N C"],
        targets: Float[Tensor, "N C"],
        logits_oe: Float[Tensor, "M C"],
    ) -> Float[Tensor, ""]:
        """Compute the loss."""
        check_targets(logits_id, targets)
        z = _wide(logits_id)
        bce = F.binary_cross_entropy_with_logits(z, targets.to(z.dtype))
        inside, outside = -z.logsumexp(1), -_wide(logits_oe).logsumexp(1)
        hinges = F.relu(inside - self.m_in) ** 2, F.relu(self.m_out - outside) ** 2
        return bce + self.weight * (hinges[0].mean() + hinges[1].mean())

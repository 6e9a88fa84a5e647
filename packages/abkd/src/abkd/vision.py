"""Distillers of image classifiers with any divergence in place of their KL.

The paper's plug-in claim (AB-DKD, AB-LSD, AB-TTM): each method below is the original at (1, 0) and
its α-β version elsewhere. Conventions are those of the authors' code: the plain loss has no factor
T² (its weight λ = 32 plays that part), DKD and LSD have it, TTM's student is at T = 1.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from abkd._checks import check_choice, check_pair, check_temperature
from abkd.divergence import ab_divergence, ab_divergence_from_log_probs
from shared_core.errors import InputError

__all__ = ["DistillationLoss", "dkd_loss", "lsd_loss", "ttm_loss"]

CRITERIA = ("ab", "kd", "dkd", "lsd", "ttm")


def dkd_loss(
    student_logits: Float[Tensor, "B classes"],
    teacher_logits: Float[Tensor, "B classes"],
    labels: Int[Tensor, " B"],
    alpha: float = 1.0,
    beta: float = 0.0,
    *,
    target_weight: float = 1.0,
    non_target_weight: float = 8.0,
    temperature: float = 4.0,
) -> Float[Tensor, ""]:
    """Decoupled distillation (Zhao et al., CVPR 2022), with D^(α,β) on the non-target classes.

    The target part is the KL between (target, rest), whatever α and β; the other part compares the
    softmaxes over the classes without the target. Both have the factor T².

    Args:
        student_logits: ``[B, C]``.
        teacher_logits: ``[B, C]``.
        labels: ``[B]``.
        alpha: α.
        beta: β.
        target_weight: Weight of the target part.
        non_target_weight: Weight of the other.
        temperature: T.

    Raises:
        InputError: As `abkd.ab_divergence`; also with fewer than two classes.

    Examples:
        >>> z, t = torch.randn(4, 10), torch.randn(4, 10)
        >>> dkd_loss(z, t, torch.arange(4), 0.8, 0.3).shape
        torch.Size([])
    """
    check_pair(student_logits, teacher_logits)
    classes = student_logits.shape[-1]
    if classes < 2:
        raise InputError("DKD needs at least 2 classes")
    target = F.one_hot(labels, classes).bool()
    pairs = []
    for logits in (student_logits, teacher_logits):
        log_probs = torch.log_softmax(logits.float() / temperature, -1)
        rest = torch.logsumexp(log_probs.masked_fill(target, -torch.inf), -1)
        pairs.append(torch.stack([log_probs[target], rest], -1))
    on_target = ab_divergence_from_log_probs(pairs[0], pairs[1], 1.0, 0.0)
    shape = (len(labels), classes - 1)
    others = [logits[~target].reshape(shape) for logits in (student_logits, teacher_logits)]
    off_target = ab_divergence(others[0], others[1], alpha, beta, temperature=temperature)
    return (target_weight * on_target + non_target_weight * off_target) * temperature**2


def lsd_loss(
    student_logits: Float[Tensor, "B classes"],
    teacher_logits: Float[Tensor, "B classes"],
    alpha: float = 1.0,
    beta: float = 0.0,
    *,
    temperature: float = 2.0,
) -> Float[Tensor, ""]:
    """Logit standardisation (Sun et al., CVPR 2024): z-scores of each sample, then T² D^(α,β).

    Args:
        student_logits: ``[B, C]``.
        teacher_logits: ``[B, C]``.
        alpha: α.
        beta: β.
        temperature: T.

    Raises:
        InputError: As `abkd.ab_divergence`; also with fewer than two classes.

    Examples:
        >>> z = torch.randn(4, 10)
        >>> bool(lsd_loss(z, 3 * z + 1).abs() < 1e-6)  # location and scale have no part
        True
    """
    check_pair(student_logits, teacher_logits)
    if student_logits.shape[-1] < 2:
        raise InputError("LSD needs at least 2 classes")
    scores = [
        (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-7)
        for x in (student_logits.float(), teacher_logits.float())
    ]
    return (
        ab_divergence(scores[0], scores[1], alpha, beta, temperature=temperature) * temperature**2
    )


def ttm_loss(
    student_logits: Float[Tensor, "B classes"],
    teacher_logits: Float[Tensor, "B classes"],
    alpha: float = 1.0,
    beta: float = 0.0,
    *,
    exponent: float = 0.1,
) -> Float[Tensor, ""]:
    """Transformed teacher matching (Zheng and Yang, ICLR 2024): teacher p^l normalised, student q.

    Args:
        student_logits: ``[B, C]``, at temperature 1.
        teacher_logits: ``[B, C]``.
        alpha: α.
        beta: β.
        exponent: l > 0; a teacher at temperature 1/l.

    Raises:
        InputError: As `abkd.ab_divergence`; also if the exponent is not positive.

    Examples:
        >>> z = torch.randn(4, 10)
        >>> bool(ttm_loss(0.1 * z, z, 0.8, 0.3).abs() < 1e-6)
        True
    """
    if not exponent > 0:
        raise InputError(f"exponent is {exponent}; it must be above 0")
    check_pair(student_logits, teacher_logits)
    return ab_divergence(student_logits, exponent * teacher_logits.float(), alpha, beta)


class DistillationLoss(nn.Module):
    """Cross-entropy plus one of the distillers, with the authors' weights as defaults.

    Args:
        criterion: ``ab`` (T = 4, λ = 32, no T²), ``kd`` (T = 4, λ = 9, T², always (1, 0)),
            ``dkd`` (T = 4, λ = 1; warms up over `warmup_epochs`), ``lsd`` (T = 2, λ = 9, CE 0.1)
            or ``ttm`` (λ = 1).
        alpha: α.
        beta: β.
        temperature: T, if not the default.
        kd_weight: λ, if not the default.
        ce_weight: If not the default (1; 0.1 for ``lsd``).
        temperature_power: r in the factor T^r of ``ab``: 0 as the paper's, 2 as Hinton's.
        warmup_epochs: DKD's soft term grows linearly over these; see `epoch`.
        options: Further keywords of `dkd_loss` or `ttm_loss`.

    Attributes:
        epoch: Set it at the start of each epoch for DKD's warm-up, counting from 1.

    Raises:
        InputError: If the criterion is unknown.

    Examples:
        >>> criterion = DistillationLoss("lsd", 0.9, 0.3)
        >>> criterion(torch.randn(4, 10), torch.randn(4, 10), torch.arange(4)).shape
        torch.Size([])
    """

    def __init__(
        self,
        criterion: str = "ab",
        alpha: float = 0.8,
        beta: float = 0.3,
        *,
        temperature: float | None = None,
        kd_weight: float | None = None,
        ce_weight: float | None = None,
        temperature_power: float = 0.0,
        warmup_epochs: int = 20,
        **options: Any,
    ) -> None:
        super().__init__()
        check_choice("criterion", criterion, *CRITERIA)
        defaults = {"ab": (4.0, 32.0), "kd": (4.0, 9.0), "dkd": (4.0, 1.0), "lsd": (2.0, 9.0)}
        base_temperature, base_weight = defaults.get(criterion, (1.0, 1.0))
        self.criterion, self.alpha, self.beta = criterion, alpha, beta
        self.temperature = base_temperature if temperature is None else temperature
        self.kd_weight = base_weight if kd_weight is None else kd_weight
        self.ce_weight = (0.1 if criterion == "lsd" else 1.0) if ce_weight is None else ce_weight
        self.temperature_power = temperature_power
        self.warmup_epochs, self.options = warmup_epochs, options
        self.epoch: int | None = None
        check_temperature(self.temperature)

    def forward(
        self,
        student_logits: Float[Tensor, "B classes"],
        teacher_logits: Float[Tensor, "B classes"],
        labels: Int[Tensor, " B"],
    ) -> Float[Tensor, ""]:
        """The whole objective of a batch."""
        z, t, a, b, tau = student_logits, teacher_logits, self.alpha, self.beta, self.temperature
        weight = self.kd_weight
        if self.criterion == "ab":
            soft = ab_divergence(z, t, a, b, temperature=tau) * tau**self.temperature_power
        elif self.criterion == "kd":
            soft = ab_divergence(z, t, 1.0, 0.0, temperature=tau) * tau**2
        elif self.criterion == "dkd":
            soft = dkd_loss(z, t, labels, a, b, temperature=tau, **self.options)
            if self.epoch is not None and self.warmup_epochs:
                weight *= min(self.epoch / self.warmup_epochs, 1.0)
        elif self.criterion == "lsd":
            soft = lsd_loss(z, t, a, b, temperature=tau)
        else:
            soft = ttm_loss(z, t, a, b, **self.options)
        hard: Tensor = F.cross_entropy(z.float(), labels)
        total: Tensor = self.ce_weight * hard + weight * soft
        return total

"""Focal-SAM and its relatives: which classes' sharpness counts, and how much.

All of them are `SharpnessMethod`, where the update is; they differ in the weight ``c_i`` of class
i's sharpness: 1 for SAM and ASAM, ``1[n_i < η]`` for ImbSAM, ``λ (1 - π_i)^γ`` for Focal-SAM.
"""

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from focal_sam._checks import check_nonnegative
from focal_sam.sharpness import Model, SharpnessMethod
from focal_sam.weights import FocalWeights, tail_weights

__all__ = ["ASAM", "SAM", "FocalSAM", "ImbSAM"]


class FocalSAM(SharpnessMethod):
    """Focal-SAM (Li et al., ICML 2025): one perturbation, every class's sharpness weighted.

    Args:
        model: See `SharpnessMethod`.
        class_counts: Number of training samples of each class.
        rho: ρ; 0.2 suits training from scratch, 0.05 fine-tuning.
        gamma: γ of ``(1 - π_i)^γ``.
        lam: λ, the weight of the sharpness term.
        allow_empty: Accept classes without training samples.
        prior: See `FocalWeights`.
        check_labels: See `ClassWeights`.
        options: See `SharpnessMethod`.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> fsam = FocalSAM(model, class_counts=[90, 10], rho=0.2, gamma=2.0, lam=0.8)
        >>> criterion = torch.nn.CrossEntropyLoss(reduction="none")
        >>> x, y = torch.randn(8, 4), torch.randint(2, (8,))
        >>> loss = fsam.backward(lambda: criterion(model(x), y), y).loss
        >>> optimizer.step(); optimizer.zero_grad()
    """

    def __init__(
        self,
        model: Model,
        class_counts: Sequence[int] | Tensor,
        rho: float = 0.2,
        gamma: float = 2.0,
        lam: float = 0.8,
        *,
        allow_empty: bool = False,
        prior: Literal["empirical", "relative"] = "empirical",
        check_labels: bool = False,
        **options: Any,
    ) -> None:
        weights = FocalWeights(
            class_counts,
            gamma,
            lam,
            prior=prior,
            allow_empty=allow_empty,
            check_labels=check_labels,
        )
        super().__init__(model, weights, rho, **options)


class SAM(SharpnessMethod):
    """SAM (Foret et al., ICLR 2021): every sample weighs 1.

    Args:
        model: See `SharpnessMethod`.
        rho: ρ.
        options: See `SharpnessMethod`.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> SAM(model, rho=0.1).backward(lambda: model(torch.ones(3, 2)).squeeze(1)).skipped
        tensor(False)
    """

    def __init__(self, model: Model, rho: float = 0.05, **options: Any) -> None:
        super().__init__(model, 1.0, rho, **options)


class ASAM(SAM):
    """ASAM (Kwon et al., ICML 2021): SAM with an element-wise radius; wants a ρ ten times larger.

    Args:
        model: See `SharpnessMethod`.
        rho: ρ.
        eta: η.
        adaptive_bias: The authors leave biases unscaled.
        options: See `SharpnessMethod`.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> ASAM(model).backward(lambda: model(torch.ones(3, 2)).squeeze(1)).skipped
        tensor(False)
    """

    def __init__(
        self,
        model: Model,
        rho: float = 0.5,
        *,
        eta: float = 0.01,
        adaptive_bias: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(model, rho, adaptive=True, eta=eta, adaptive_bias=adaptive_bias, **options)


class ImbSAM(SharpnessMethod):
    """ImbSAM (Zhou et al., ICCV 2023): only classes with few samples are flattened.

    Args:
        model: See `SharpnessMethod`.
        class_counts: Number of training samples of each class.
        rho: ρ.
        threshold: η; classes with fewer samples are the tail.
        tail_multiplier: Factor of the tail's loss in both passes; the authors' code uses 2, their
            formula 1.
        options: See `SharpnessMethod`.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(4, 2)
        >>> ImbSAM(model, class_counts=[90, 10], rho=0.1).weights.values
        tensor([0., 1.], dtype=torch.float64)
    """

    def __init__(
        self,
        model: Model,
        class_counts: Sequence[int] | Tensor,
        rho: float = 0.05,
        threshold: int = 20,
        *,
        tail_multiplier: float = 1.0,
        **options: Any,
    ) -> None:
        check_nonnegative(tail_multiplier=tail_multiplier)
        super().__init__(model, tail_weights(class_counts, threshold), rho, **options)
        self._multiplier = tail_multiplier

"""The energies of a multi-label classifier, in plain tensor code."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from shared_core.errors import InputError

__all__ = ["joint_energy", "label_energies"]


def label_energies(logits: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Free energy of each label, ``log(1 + exp(z))``: positive, and strictly increasing in z.

    Half precision is taken to float32 first, so that a sum of these over many labels cannot
    overflow.

    Args:
        logits: Any shape, any float dtype.

    Examples:
        >>> label_energies(torch.tensor([0.0, 100.0]))
        tensor([  0.6931, 100.0000])
    """
    half = logits.dtype in (torch.float16, torch.bfloat16)
    # A log1p up to the threshold, so confident outliers do not tie at zero; z itself above it,
    # which is exact in float64 from 40 on.
    return F.softplus(logits.float() if half else logits, threshold=40)


def joint_energy(logits: Float[Tensor, "*shape"], dim: int = -1) -> Float[Tensor, "*rest"]:
    """JointEnergy: the SUM over labels of ``log(1 + exp(z_c))``; high means in-distribution.

    It is a sum of logarithms, one per label, and not the logarithm of a sum (`LogSumExp`), with
    which it is often confused.

    Args:
        logits: Label scores before the sigmoid, ``[..., C]``, any float dtype.
        dim: The dimension of the labels.

    Returns:
        ``[...]``; float32 for half-precision logits, else their dtype.

    Source:
        Wang et al., "Can multi-label classification networks know what they don't know?",
        NeurIPS 2021, eq. 6; the score of EDGE (Sun et al., AAAI 2025).

    Examples:
        >>> joint_energy(torch.tensor([[0.0, 0.0], [3.0, -3.0]]))
        tensor([1.3863, 3.0972])
    """
    if logits.ndim == 0 or logits.shape[dim] == 0:
        raise InputError(
            f"logits have shape {list(logits.shape)}; accepted: [..., C] with at least one label"
        )
    return label_energies(logits).sum(dim)

"""The EDGE loss with its gradient in closed form: fewer passes over the logits than autograd makes.

With E_n the energy of a sample, T the k tail energies, n_i the number of t in T below E_i + m, and
r_t the number of outliers i with E_i + m above t,

    dL/dz_i = σ(z_i) (α / (M C) + β n_i / (M k))              for an outlier,
    dL/dz_n = σ(z_n) (1 / (N C) - β r_n / (M k)) - y_n / (N C)    for an ID sample; r_n = 0 off T.

`edge_ood.loss` writes the value out as formulas, which autograd can follow any number of times; the
tests hold the two against each other.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from edge_ood.energy import joint_energy

__all__ = ["ClosedForm", "Weights", "can_use_closed_form"]


class Weights(NamedTuple):
    """The settings of a step: α, β, k as a number, m, and how pairs are counted."""

    alpha: float
    beta: float
    k: int
    margin: float
    pairwise: bool


def can_use_closed_form(z: Tensor, y: Tensor, outliers: Tensor) -> bool:
    """Whether the logits alone want a gradient, and none but the plain autograd computes it.

    A compiler fuses the formulas itself; the transforms of ``torch.func`` and forward-mode
    differentiation need to see them.
    """
    return (
        torch.is_grad_enabled()
        and (z.requires_grad or outliers.requires_grad)
        and not y.requires_grad
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


class ClosedForm(torch.autograd.Function):
    """Loss, L_id, L_conf, L_gap and the share of active pairs, all 0-dimensional.

    Arguments: ID logits z ``[N, C]``, labels y, OE logits ``[M, C]``, `Weights`, and the loss of ID
    and OE logits in operations that autograd follows, for a gradient of the gradient. Only the loss
    has a gradient, for z and the OE logits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        y: Tensor,
        outliers: Tensor,
        weights: Weights,
        formulas: Callable[[Tensor, Tensor], Tensor],
    ) -> tuple[Tensor, ...]:
        (n, c), m = z.shape, len(outliers)
        alpha, beta, k, margin, pairwise = weights
        inside, outside = joint_energy(z), joint_energy(outliers)
        l_id, l_conf = F.binary_cross_entropy_with_logits(z, y), outside.mean() / c
        tail, lowest = inside.topk(k, largest=False, sorted=False)
        l_gap, below, above = (_pairwise if pairwise else _sorted)(tail, outside + margin)
        active = below.mean() / k
        # Each sample's factor of σ(z). What is changed in place was made here.
        factor = z.new_full((n,), 1 / (n * c)).index_add_(0, lowest, above, alpha=-beta / (m * k))
        of_z = z.sigmoid().mul_(factor[:, None]).sub_(y, alpha=1 / (n * c))
        factor = below.mul_(beta / (m * k)).add_(alpha / (m * c))
        of_outliers = outliers.sigmoid().mul_(factor[:, None])
        ctx.save_for_backward(z, outliers, of_z, of_outliers)
        ctx.formulas = formulas
        ctx.mark_non_differentiable(l_id, l_conf, l_gap, active)
        return l_id + alpha * l_conf + beta * l_gap, l_id, l_conf, l_gap, active

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        z, outliers, *found = ctx.saved_tensors
        given = gradients[0]
        if torch.is_grad_enabled():  # create_graph=True
            leaves = [t for t in (z, outliers) if t.requires_grad]
            loss = ctx.formulas(z, outliers)
            second = torch.autograd.grad(loss, leaves, given, create_graph=True)
            of_z = second[0] if z.requires_grad else None
            of_outliers = second[-1] if outliers.requires_grad else None
        else:
            of_z, of_outliers = (gradient * given for gradient in found)
        return of_z, None, of_outliers, None, None


def _pairwise(tail: Tensor, raised: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean hinge, how many t lie below each E + m, and how many E + m above each t."""
    hinge = F.relu(raised[:, None] - tail)
    active = hinge.sign()
    return hinge.mean(), active.sum(1), active.sum(0)


def _sorted(tail: Tensor, raised: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same without a matrix."""
    dtype = raised.dtype
    # Prefix sums cancel; in float64 they do so far below float32's precision (MPS has none).
    wide = dtype if raised.device.type == "mps" else torch.float64
    tail, raised = tail.to(wide), raised.to(wide)
    ordered = tail.sort().values
    below = torch.searchsorted(ordered, raised)
    above = len(raised) - torch.searchsorted(raised.sort().values, tail, right=True)
    sums = F.pad(ordered.cumsum(0), (1, 0))
    gap = (raised * below - sums[below]).sum() / (len(tail) * len(raised))
    return gap.to(dtype), below.to(dtype), above.to(dtype)

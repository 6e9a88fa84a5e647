from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

pytest_plugins = ["shared_core.testing"]


def _losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), y, reduction="none")


def _focal_sam_gradient(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    weights: Tensor,
    rho: float,
    *,
    losses: Callable[..., Tensor] = _losses,
    eta: float | None = None,
    names: Sequence[str] | None = None,
    ascent_factor: float = 1.0,
) -> dict[str, Tensor]:
    """λ ∇L^γ(θ + ε) + ∇[L - λ L^γ](θ) by plain functional autograd, with nothing of the package.

    `eta` asks for ASAM's ε with that η, `names` for a perturbation of those parameters only, and
    `ascent_factor` multiplies L^γ in both passes but not in L - λ L^γ.
    """
    theta = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    buffers = {n: b.detach().clone() for n, b in model.named_buffers()}

    def value(parameters: dict[str, Tensor], sample_weights: Tensor) -> Tensor:
        def call(inputs: Tensor) -> Tensor:
            return torch.func.functional_call(model, {**parameters, **buffers}, (inputs,))

        return (sample_weights * losses(call, x, y)).sum() / len(y)

    def gradient(parameters: dict[str, Tensor], sample_weights: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad(
            value(parameters, sample_weights), list(parameters.values()), allow_unused=True
        )
        return {
            n: torch.zeros_like(p) if g is None else g
            for (n, p), g in zip(parameters.items(), found, strict=True)
        }

    w = weights[y]
    moving = list(theta) if names is None else list(names)
    ascent = gradient(theta, w)
    scales = {n: torch.ones_like(theta[n]) if eta is None else theta[n].abs() + eta for n in moving}
    square = sum(((scales[n] * ascent[n]) ** 2).sum() for n in moving)
    epsilon = {n: rho * scales[n] ** 2 * ascent[n] / square**0.5 for n in moving}
    there = {
        n: (p + epsilon[n] if n in epsilon else p).detach().requires_grad_()
        for n, p in theta.items()
    }
    at_perturbed, rest = gradient(there, ascent_factor * w), gradient(theta, 1 - w)
    return {n: at_perturbed[n] + rest[n] for n in theta}


@pytest.fixture
def focal_sam_gradient() -> Callable[..., dict[str, Tensor]]:
    """The independent derivation that the package's gradients are compared with."""
    return _focal_sam_gradient

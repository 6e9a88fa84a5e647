"""Moving parameters by ε and back, in few kernels, bit-exactly, without waiting for the device."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def _dtensor() -> Any:
    """The class of sharded tensors. Until something imports it, nothing can be one."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())


def is_dtensor(tensor: Tensor) -> bool:
    """Whether `tensor` is sharded."""
    return isinstance(tensor, _dtensor())


def _local(tensor: Tensor) -> Tensor:
    """The memory this process holds, as a plain real tensor (a view)."""
    here: Tensor = tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
    here = here.detach()
    return torch.view_as_real(here) if here.is_complex() else here


def _locals(tensors: Sequence[Tensor]) -> list[Tensor]:
    """`_local` of each. Plain real tensors come back as they are, to be used under no_grad.

    With hundreds of small tensors, a view of each would cost more than the arithmetic.
    """
    sharded = _dtensor()
    return [_local(t) if isinstance(t, sharded) or t.is_complex() else t for t in tensors]


def _by_device_and_dtype(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    groups: dict[Any, list[int]] = {}
    for index, tensor in enumerate(tensors):
        groups.setdefault((tensor.device, tensor.dtype), []).append(index)
    yield from groups.values()


def scaled_gradient(gradient: Tensor, parameter: Tensor, eta: float) -> Tensor:
    """ASAM's ``T_θ g`` with ``T_θ = |θ| + η``."""
    return gradient * (parameter.detach().abs() + eta)


@torch.no_grad()
def global_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The L2 norm over all elements of all tensors, in float32 (float64 if any is float64)."""
    device = gradients[0].device
    precise = any(g.dtype in (torch.float64, torch.complex128) for g in gradients)
    dtype = torch.float64 if precise else torch.float32
    kind = _dtensor()
    meshes: dict[Any, list[Tensor]] = {}
    plain: list[Tensor] = []
    for gradient in gradients:
        if isinstance(gradient, kind):
            meshes.setdefault(gradient.device_mesh, []).append(gradient)
        else:
            plain.append(gradient)
    norms: list[Tensor] = []
    for members in meshes.values():
        wide = [g.to(dtype) for g in members]
        total: Any = torch.nn.utils.get_total_norm(wide)
        norms.append(total.full_tensor())
    plain = _locals(plain)
    for indices in _by_device_and_dtype(plain):
        norms += torch._foreach_norm([plain[i] for i in indices], 2, dtype=dtype)
    joined: Tensor = torch.linalg.vector_norm(torch.stack([n.to(device) for n in norms]))
    return joined


@contextlib.contextmanager
def moved(parameters: Sequence[Tensor], displacements: list[Tensor]) -> Iterator[None]:
    """Add the displacements to the parameters; restore every bit on any exit.

    The list of displacements is emptied on entry: once applied they are not needed, and the
    second forward pass should have their memory.
    """
    places = _locals(parameters)
    copies = [torch.empty_like(p, requires_grad=False) for p in places]
    groups = [
        ([places[i] for i in indices], [copies[i] for i in indices], indices)
        for indices in _by_device_and_dtype(places)
    ]
    with torch.no_grad():
        for here, kept, _ in groups:
            torch._foreach_copy_(kept, here)
    try:
        steps = _locals(displacements)
        displacements.clear()
        with torch.no_grad():
            for here, _, indices in groups:
                torch._foreach_add_(here, [steps[i] for i in indices])
        del steps
        # Autocast keeps half-precision copies of weights, which would still be those of θ.
        torch.clear_autocast_cache()
        yield
    finally:
        # In place, so that flat buffers, CUDA graphs and fused optimizers keep their pointers, and
        # copied, because θ + ε - ε need not be θ.
        with torch.no_grad():
            for here, kept, _ in groups:
                torch._foreach_copy_(here, kept)
        torch.clear_autocast_cache()


@torch.no_grad()
def displacements(
    gradients: Sequence[Tensor],
    parameters: Sequence[Tensor],
    *,
    rho: Sequence[float],
    adaptive: Sequence[bool],
    eta: float,
) -> tuple[list[Tensor], Tensor]:
    """``ε = ρ g / ||g||``, or ASAM's ``ρ T² g / ||T g||``, and the norm.

    A zero, infinite or NaN norm gives ε = 0, decided on the device.

    Args:
        gradients: g, one per parameter.
        parameters: θ.
        rho: ρ of each parameter.
        adaptive: Whether to scale by ``T = |θ| + η``, for each parameter.
        eta: η of ASAM.

    Returns:
        ε, one per parameter and of its dtype, and the norm, a scalar.
    """
    scaled = [
        scaled_gradient(g, p, eta) if a else g
        for g, p, a in zip(gradients, parameters, adaptive, strict=True)
    ]
    norm = global_norm(scaled)
    inverse = 1 / norm
    inverse = torch.where(inverse.isfinite() & norm.isfinite(), inverse, torch.zeros_like(norm))
    result = _locals(scaled)
    groups: dict[Any, list[int]] = {}
    for index, gradient in enumerate(scaled):
        key = (gradient.device, gradient.dtype, rho[index])
        groups.setdefault(key, []).append(index)
    for (device, dtype, radius), indices in groups.items():
        factor = (inverse * radius).to(device)
        members = [result[i] for i in indices]
        if dtype in (torch.float16, torch.bfloat16):
            # ρ / ||g|| need not fit a half; the product does.
            members = [m.float() for m in members]
        # Not in place: autograd may hand out one tensor for two parameters.
        members = list(torch._foreach_mul(members, factor.to(members[0].dtype)))
        _clear_if(~norm.isfinite(), members)
        for index, member in zip(indices, members, strict=True):
            result[index] = member
    places = _locals(parameters)
    for index, (place, is_adaptive) in enumerate(zip(places, adaptive, strict=True)):
        if is_adaptive:
            magnitude = parameters[index].abs() + eta
            local = magnitude.to_local() if is_dtensor(magnitude) else magnitude  # type: ignore[attr-defined]
            if parameters[index].is_complex():
                local = local.unsqueeze(-1)
            result[index] = result[index] * local
        if result[index].dtype != place.dtype:
            result[index] = result[index].to(place.dtype)
    return result, norm


def _clear_if(condition: Tensor, tensors: list[Tensor]) -> None:
    """Zero what a norm that is not finite has made NaN (0 · inf), so that no pass runs on NaN."""
    if condition.device.type != "cpu":
        for tensor in tensors:  # the host does not know the condition and does not wait for it
            torch.nan_to_num_(tensor, nan=0.0, posinf=0.0, neginf=0.0)
    elif condition:
        torch._foreach_zero_(tensors)


def lost_fraction(parameter: Tensor, displacement: Tensor, samples: int = 4096) -> Tensor:
    """Fraction of sampled elements too large for their ε to change them at this precision."""
    place, step = _local(parameter).flatten()[:samples], displacement.flatten()[:samples]
    moving = step != 0
    return ((place + step == place) & moving).sum() / moving.sum().clamp(min=1)

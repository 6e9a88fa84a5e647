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
    if _all_plain(tensors) and not any(map(torch.is_complex, tensors)):
        return list(tensors)
    sharded = _dtensor()
    return [_local(t) if isinstance(t, sharded) or t.is_complex() else t for t in tensors]


def _all_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether none can be sharded, for which their types are enough."""
    return set(map(type, tensors)) <= {Tensor, torch.nn.Parameter}


def _by_device_and_dtype(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    groups: dict[Any, list[int]] = {}
    for index, tensor in enumerate(tensors):
        groups.setdefault((tensor.device, tensor.dtype), []).append(index)
    yield from groups.values()


def _by_factor(
    tensors: Sequence[Tensor], factors: Sequence[float]
) -> Iterator[tuple[float, list[int]]]:
    groups: dict[Any, list[int]] = {}
    for index, (tensor, factor) in enumerate(zip(tensors, factors, strict=True)):
        groups.setdefault((tensor.device, tensor.dtype, factor), []).append(index)
    for (_, _, factor), indices in groups.items():
        yield factor, indices


def scaled_gradient(gradient: Tensor, parameter: Tensor, eta: float) -> Tensor:
    """ASAM's ``T_θ g`` with ``T_θ = |θ| + η``."""
    return gradient * (parameter.detach().abs() + eta)


@torch.no_grad()
def global_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The L2 norm over all elements of all tensors, in float32 (float64 if any is float64)."""
    device = gradients[0].device
    precise = {torch.float64, torch.complex128} & {g.dtype for g in gradients}
    dtype = torch.float64 if precise else torch.float32
    meshes: dict[Any, list[Tensor]] = {}
    plain: list[Tensor] = list(gradients) if _all_plain(gradients) else []
    for gradient in [] if plain else gradients:
        if is_dtensor(gradient):
            meshes.setdefault(gradient.device_mesh, []).append(gradient)  # type: ignore[attr-defined]
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
def moved(
    parameters: Sequence[Tensor],
    displacements: list[Tensor],
    factors: Sequence[float] | None = None,
) -> Iterator[None]:
    """Add the displacements to the parameters; restore every bit on any exit.

    Args:
        parameters: What moves.
        displacements: One per parameter. The list is emptied on entry: once applied they are not
            needed, and the second forward pass should have their memory.
        factors: What each displacement is still to be multiplied by; nothing, if ``None``.
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
            if factors is None:
                for here, _, indices in groups:
                    torch._foreach_add_(here, [steps[i] for i in indices])
            elif len(groups) == len(set(factors)) == 1:
                torch._foreach_add_(groups[0][0], steps, alpha=factors[0])
            else:
                for factor, indices in _by_factor(places, factors):
                    torch._foreach_add_(
                        [places[i] for i in indices], [steps[i] for i in indices], alpha=factor
                    )
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
) -> tuple[list[Tensor], list[float], Tensor]:
    """``ε = ρ g / ||g||``, or ASAM's ``ρ T² g / ||T g||``, and the norm.

    A zero, infinite or NaN norm gives ε = 0, decided on the device.

    On a CPU, where the host knows the norm, ε is g and a factor, to be multiplied while it is
    added: writing it to fresh memory costs more than all else here.

    Args:
        gradients: g, one per parameter.
        parameters: θ.
        rho: ρ of each parameter.
        adaptive: Whether to scale by ``T = |θ| + η``, for each parameter.
        eta: η of ASAM.

    Returns:
        ε, one per parameter and of its dtype; what each is still to be multiplied by; and the
        norm, a scalar.
    """
    scaled = [
        scaled_gradient(g, p, eta) if a else g
        for g, p, a in zip(gradients, parameters, adaptive, strict=True)
    ]
    norm = global_norm(scaled)
    inverse = 1 / norm
    inverse = torch.where(inverse.isfinite() & norm.isfinite(), inverse, torch.zeros_like(norm))
    result, places = _locals(scaled), _locals(parameters)
    factors = [1.0] * len(result)
    groups: dict[Any, list[int]] = {}
    for index, (g, place, radius, a) in enumerate(zip(scaled, places, rho, adaptive, strict=True)):
        key = (g.device, g.dtype, radius, not a and g.dtype == place.dtype)
        groups.setdefault(key, []).append(index)
    written: list[int] = []
    for (device, dtype, radius, as_it_is), indices in groups.items():
        factor = (inverse * radius).to(device)
        members = [result[i] for i in indices]
        if dtype in (torch.float16, torch.bfloat16):
            # ρ / ||g|| need not fit a half; the product does.
            members = [m.float() for m in members]
        elif device.type == "cpu" and as_it_is and norm.isfinite():
            known = factor.item()
            for index in indices:
                factors[index] = known
            continue
        # Not in place: autograd may hand out one tensor for two parameters.
        written += indices
        members = list(torch._foreach_mul(members, factor.to(members[0].dtype)))
        _clear_if(~norm.isfinite(), members)
        for index, member in zip(indices, members, strict=True):
            result[index] = member
    for index in written:
        place = places[index]
        if adaptive[index]:
            magnitude = parameters[index].abs() + eta
            local = magnitude.to_local() if is_dtensor(magnitude) else magnitude  # type: ignore[attr-defined]
            if parameters[index].is_complex():
                local = local.unsqueeze(-1)
            result[index] = result[index] * local
        if result[index].dtype != place.dtype:
            result[index] = result[index].to(place.dtype)
    return result, factors, norm


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

"""Which parameters are perturbed, and by how much."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

Predicate = Callable[[str, nn.Parameter], bool]

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
WRAPPERS = ("module.", "_orig_mod.")


@dataclass
class ParameterGroup:
    """Parameters that share a radius."""

    params: list[Tensor]
    rho: float
    adaptive: bool


def _clean(name: str) -> str:
    """The name as the unwrapped model has it (DDP and torch.compile add prefixes)."""
    while name.startswith(WRAPPERS):
        name = name.split(".", 1)[1]
    return name


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, NORMS) or type(module).__name__.endswith("Norm")


def _chosen(model: nn.Module, perturb: Predicate | str | None) -> list[nn.Parameter]:
    if perturb is None:
        return list(model.parameters())
    if callable(perturb):
        return [p for n, p in model.named_parameters() if perturb(_clean(n), p)]
    if perturb == "norm_only":
        norms = [m for m in model.modules() if _is_norm(m)]
        return [p for m in norms for p in m.parameters(recurse=False)]
    if perturb == "no_norm_bias":
        return [p for p in model.parameters() if p.ndim > 1]
    raise ValueError(
        f"perturb is {perturb!r}; accepted: None, 'norm_only', 'no_norm_bias', or a function of "
        "a parameter's name and the parameter"
    )


def select_parameters(
    model: nn.Module | Iterable[Any],
    params: Sequence[Mapping[str, Any]] | None,
    *,
    perturb: Predicate | str | None,
    rho: float,
    adaptive: bool,
) -> list[ParameterGroup]:
    """Make the groups; a parameter that occurs twice (tied weights) is moved once."""
    given: list[Mapping[str, Any]] = [dict(g) for g in params or ()]
    if isinstance(model, nn.Module):
        rest = _chosen(model, perturb)
        if perturb is not None:
            allowed = {id(p) for p in rest}
            given = [{**g, "params": [p for p in g["params"] if id(p) in allowed]} for g in given]
        given.append({"params": rest})
    else:
        if perturb is not None:
            raise ValueError("perturb needs the model, not its parameters")
        items = list(model)
        given += [i if isinstance(i, Mapping) else {"params": [i]} for i in items]
    seen: set[int] = set()
    groups: dict[tuple[float, bool], ParameterGroup] = {}
    for item in given:
        unknown = set(item) - {"params", "rho", "adaptive", "name"}
        if params is not None and unknown:
            raise ValueError(f"a parameter group has rho and adaptive, not {sorted(unknown)}")
        members = item["params"]
        members = [members] if isinstance(members, Tensor) else list(members)
        fresh = [p for p in members if id(p) not in seen and p.is_leaf]
        seen.update(map(id, fresh))
        key = (float(item.get("rho", rho)), bool(item.get("adaptive", adaptive)))
        groups.setdefault(key, ParameterGroup([], *key)).params.extend(fresh)
    found = [g for g in groups.values() if g.params]
    if not any(p.requires_grad for g in found for p in g.params):
        raise ValueError("no parameter to perturb requires a gradient; there is nothing to train")
    return found

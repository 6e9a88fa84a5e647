"""How sharp and how curved the loss of each class, or group of classes, is at the end of training.

On long-tailed data the mean loss hides what happens to rare classes: their own loss can sit at a
sharp minimum or at a saddle while the mean looks flat (Rangwani et al., NeurIPS 2022; Li et al.,
ICML 2025). All functions here look at the mean loss over a group's own samples,
``L_g(θ) = (1/n_g) Σ_{s: y_s ∈ g} l(θ; x_s, y_s)``.

They share these arguments:

- ``model``: returns logits ``[batch, classes]``; its trainable parameters, float32 or float64, are
  θ. Frozen ones stay out.
- ``loader``: batches ``(x, y)`` with integer labels ``y`` ``[batch]``: a DataLoader, or a list such
  as ``[(x, y)]``. It is walked many times; where the data fits in memory, ``list(loader)`` is
  faster. Each pass replays the generators' states, so shuffling and augmentation repeat.
- ``criterion``: ``(logits, y) -> losses [batch]``; cross-entropy by default. It is usually the
  training loss built with ``reduction="none"``.
- ``groups``: classes by name, such as ``{"head": [0, 1], "tail": [8, 9]}``. Groups may overlap. By
  default each class is a group. Groups without samples get NaN and are listed as ``empty``.
- ``eval_mode``: by default the model runs in evaluation mode: BatchNorm uses its running
  statistics, dropout is off. ``False`` leaves the training flags as they are; batch statistics and
  dropout masks, the same ones in every pass, are then part of the loss.

Parameters, buffers, ``p.grad``, training flags and the states of the generators are afterwards what
they were, bit for bit, also after an exception. The model is examined in one process; a DDP wrapper
is looked through. On CUDA, TF32 (on for convolutions unless ``torch.backends.cudnn.allow_tf32`` is
off) limits curvature to about three digits.
"""

import math
import statistics
import warnings
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from focal_sam._hessian import (
    Which,
    curvlinops_extremes,
    has_curvlinops,
    lanczos_extremes,
    quadrature,
)
from focal_sam._results import (
    ClassSharpness,
    ClassSpectrum,
    ClassTrace,
    HessianEigenvalues,
    LossSurface,
)
from focal_sam._surface import Criterion, GroupLoss, GroupLosses, Groups, group_losses
from shared_core.errors import InputError

__all__ = [
    "ClassSharpness",
    "ClassSpectrum",
    "ClassTrace",
    "HessianEigenvalues",
    "LossSurface",
    "class_hessian_eigs",
    "class_sharpness",
    "class_spectrum",
    "hutchinson_trace",
    "loss_surface_2d",
]


def class_sharpness(
    model: nn.Module,
    loader: Iterable[Any],
    rho: int | float,
    *,
    criterion: Criterion | None = None,
    groups: Groups | None = None,
    mode: Literal["ascent", "random"] = "ascent",
    samples: int = 10,
    filter_normalized: bool = False,
    seed: int = 0,
    eval_mode: bool = True,
) -> ClassSharpness:
    """How much each group's loss rises at distance ρ: ``L_g(θ + ε) - L_g(θ)``.

    ``"ascent"`` takes one step uphill, ``ε = ρ ∇L_g / ||∇L_g||`` with each group's own gradient:
    the first-order maximum that SAM trains against (Foret et al., ICLR 2021, Eq. 2). ``"random"``
    averages over directions drawn uniformly, the same ones for all groups.

    Args:
        model: See the module's description, as for `loader`, `criterion`, `groups`, `eval_mode`.
        loader: Batches ``(x, y)``.
        rho: Radius ρ ≥ 0, in the L2 norm over all trainable parameters.
        criterion: Per-sample loss.
        groups: Classes by name.
        mode: ``"ascent"`` or ``"random"``.
        samples: Number of directions of ``"random"``.
        filter_normalized: Weight the random directions as `loss_surface_2d` does before they get
            length ρ.
        seed: Of the random directions.
        eval_mode: Run the model in evaluation mode.

    Raises:
        InputError: If an argument is out of range, the loader, a label, the logits or the losses
            are not as described, or a loss is NaN or infinite (also at distance ρ).

    Examples:
        >>> model = torch.nn.Linear(4, 3)
        >>> data = [(torch.randn(32, 4), torch.randint(3, (32,)))]
        >>> result = class_sharpness(model, data, rho=0.1, groups={"head": [0, 1], "tail": [2]})
        >>> list(result.sharpness), result.sharpness["tail"] > 0
        (['head', 'tail'], True)
    """
    if not (math.isfinite(rho) and rho >= 0):
        raise InputError(f"rho is {rho}; it must be finite and at least 0")
    if mode not in ("ascent", "random"):
        raise InputError(f"mode is {mode!r}; accepted: 'ascent', 'random'")
    _check_positive(samples=samples)
    with group_losses(model, loader, criterion, groups, eval_mode) as space:
        where = f"at distance {rho:g} of θ (a smaller rho may help)"
        if mode == "ascent":
            rises = {n: [_ascent(GroupLoss(space, n), rho, where)] for n in _filled(space)}
        else:
            rises = {n: [] for n in _filled(space)}
            generator = torch.Generator().manual_seed(seed)
            for _ in range(samples):
                direction = space.random_vector(generator)
                if filter_normalized:
                    direction = space.filter_normalized(direction)
                losses = space.at(_scaled(direction, rho), where)
                for name, values in rises.items():
                    values.append(losses[name] - space.losses[name])
        means, errors = _means_and_errors(space, rises)
        return ClassSharpness(
            *_description(space),
            means,
            errors,
            float(rho),
            mode,
            1 if mode == "ascent" else samples,
        )


def class_hessian_eigs(
    model: nn.Module,
    loader: Iterable[Any],
    k: int = 1,
    *,
    criterion: Criterion | None = None,
    groups: Groups | None = None,
    which: Which = "both",
    backend: Literal["auto", "lanczos", "curvlinops"] = "lanczos",
    tol: float = 1e-3,
    max_iter: int = 300,
    seed: int = 0,
    eval_mode: bool = True,
) -> HessianEigenvalues:
    """The largest and smallest eigenvalues of the Hessian of each group's mean loss.

    A large top eigenvalue is a sharp direction; a clearly negative bottom one a saddle.
    ``"lanczos"`` is band Lanczos with full re-orthogonalisation on k start vectors, so that
    eigenvalues of multiplicity up to k are found as often as they occur. It keeps one vector of
    the size of θ per product; set `max_iter` to what memory allows. ``"curvlinops"`` is that
    library's Hessian under scipy's ARPACK.

    Args:
        model: See the module's description, as for `loader`, `criterion`, `groups`, `eval_mode`.
        loader: Batches ``(x, y)``.
        k: Number of eigenvalues at each end.
        criterion: Per-sample loss, twice differentiable.
        groups: Classes by name.
        which: ``"top"``, ``"bottom"`` or ``"both"`` ends.
        backend: ``"lanczos"``, ``"curvlinops"`` (extra ``focal-sam[analysis]``), or ``"auto"``:
            curvlinops if it is installed, else Lanczos.
        tol: Relative residual at which an eigenvalue counts as found (below a thousandth of the
            largest eigenvalue: relative to that). Its error is at most the residual, and mostly of
            the order of its square.
        max_iter: Most Hessian-vector products (ARPACK: restarts).
        seed: Of the start vectors.
        eval_mode: Run the model in evaluation mode.

    Raises:
        InputError: As `class_sharpness`; also if ``k`` exceeds the number of parameters or a
            Hessian-vector product is not finite.
        MissingExtraError: If curvlinops is asked for and not installed.

    Warns:
        UserWarning: If the tolerance was not reached for a group.

    Examples:
        >>> model = torch.nn.Linear(4, 3)
        >>> data = [(torch.randn(32, 4), torch.randint(3, (32,)))]
        >>> result = class_hessian_eigs(model, data, groups={"all": [0, 1, 2]})
        >>> result.top["all"][0] > 0, abs(result.bottom["all"][0]) < 1e-5  # convex
        (True, True)
    """
    _check_positive(k=k, max_iter=max_iter)
    if not 0 < tol < 1:
        raise InputError(f"tol is {tol}; it must lie between 0 and 1")
    if which not in ("top", "bottom", "both"):
        raise InputError(f"which is {which!r}; accepted: 'top', 'bottom', 'both'")
    if backend not in ("auto", "lanczos", "curvlinops"):
        raise InputError(f"backend is {backend!r}; accepted: 'auto', 'lanczos', 'curvlinops'")
    external = backend == "curvlinops" or (backend == "auto" and has_curvlinops())
    solve = curvlinops_extremes if external else lanczos_extremes
    with group_losses(model, loader, criterion, groups, eval_mode) as space:
        if k > space.dimension:
            raise InputError(f"k is {k}, but there are {space.dimension} trainable parameters")
        found = {
            name: solve(GroupLoss(space, name), k, which, tol=tol, max_iter=max_iter, seed=seed)
            for name in _filled(space)
        }
        missing = [math.nan] * k
        result = HessianEigenvalues(
            *_description(space),
            top={
                n: found[n].top if n in found else missing[: k if which != "bottom" else 0]
                for n in space.groups
            },
            bottom={
                n: found[n].bottom if n in found else missing[: k if which != "top" else 0]
                for n in space.groups
            },
            converged={n: n in found and found[n].converged for n in space.groups},
            products={n: found[n].products if n in found else 0 for n in space.groups},
            backend="curvlinops" if external else "lanczos",
        )
    unfinished = [n for n in found if not result.converged[n]]
    if unfinished:
        warnings.warn(
            f"the eigenvalues of {', '.join(unfinished)} did not reach tol={tol:g} within "
            f"max_iter={max_iter}; raise either",
            stacklevel=2,
        )
    return result


def class_spectrum(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    criterion: Criterion | None = None,
    groups: Groups | None = None,
    samples: int = 8,
    steps: int = 64,
    points: int = 512,
    bandwidth: int | float | None = None,
    seed: int = 0,
    eval_mode: bool = True,
) -> ClassSpectrum:
    """The spectral density of each group's Hessian, by stochastic Lanczos quadrature.

    From each of `samples` random vectors, `steps` Lanczos steps give nodes and weights of the
    spectral measure; their mean, each node drawn out to a Gaussian, estimates the density of all
    eigenvalues (Ghorbani et al., ICML 2019, Section 2). Large outliers and the mass below 0 are
    read off it; for exact ends use `class_hessian_eigs`.

    Args:
        model: See the module's description, as for `loader`, `criterion`, `groups`, `eval_mode`.
        loader: Batches ``(x, y)``.
        criterion: Per-sample loss, twice differentiable.
        groups: Classes by name.
        samples: Number of random vectors, the same ones for all groups.
        steps: Lanczos steps, that is nodes, per vector.
        points: Length of the grid.
        bandwidth: Standard deviation of the Gaussians; by default 1 % of the range of all nodes.
        seed: Of the random vectors.
        eval_mode: Run the model in evaluation mode.

    Raises:
        InputError: As `class_hessian_eigs`.

    Examples:
        >>> model = torch.nn.Linear(4, 3)
        >>> data = [(torch.randn(32, 4), torch.randint(3, (32,)))]
        >>> result = class_spectrum(model, data, groups={"all": [0, 1, 2]})
        >>> area = torch.trapezoid(torch.tensor(result.density["all"]), torch.tensor(result.grid))
        >>> round(area.item(), 3)
        1.0
    """
    _check_positive(samples=samples, steps=steps, points=points)
    if bandwidth is not None and not (math.isfinite(bandwidth) and bandwidth > 0):
        raise InputError(f"bandwidth is {bandwidth}; it must be finite and positive")
    with group_losses(model, loader, criterion, groups, eval_mode) as space:
        rules: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for name in _filled(space):
            loss = GroupLoss(space, name)
            generator = torch.Generator().manual_seed(seed)
            rules[name] = [
                quadrature(loss, space.random_vector(generator), steps) for _ in range(samples)
            ]
        nodes = [values for rule in rules.values() for values, _ in rule]
        low = min((values.min().item() for values in nodes), default=0.0)
        high = max((values.max().item() for values in nodes), default=0.0)
        # A spectrum that is one point has no range to take a part of.
        width = float(bandwidth or 0.01 * ((high - low) or abs(high) or 1.0))
        grid = torch.linspace(low - 5 * width, high + 5 * width, points, dtype=torch.float64)
        return ClassSpectrum(
            *_description(space),
            grid=grid.tolist(),
            density={
                n: _density(rules[n], grid, width).tolist() if n in rules else [math.nan] * points
                for n in space.groups
            },
            ritz_values={n: [v.tolist() for v, _ in rules.get(n, [])] for n in space.groups},
            ritz_weights={n: [w.tolist() for _, w in rules.get(n, [])] for n in space.groups},
            bandwidth=width,
            dimension=space.dimension,
        )


def hutchinson_trace(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    criterion: Criterion | None = None,
    groups: Groups | None = None,
    samples: int = 32,
    seed: int = 0,
    eval_mode: bool = True,
) -> ClassTrace:
    """The trace of each group's Hessian, ``E[vᵀ H v]`` over random signs v.

    Hutchinson, Communications in Statistics 1990. The trace over the number of parameters is the
    mean eigenvalue; to second order, ``ρ² trace / (2 P)`` is the sharpness in a random direction.

    Args:
        model: See the module's description, as for `loader`, `criterion`, `groups`, `eval_mode`.
        loader: Batches ``(x, y)``.
        criterion: Per-sample loss, twice differentiable.
        groups: Classes by name.
        samples: Number of random vectors, the same ones for all groups.
        seed: Of the random vectors.
        eval_mode: Run the model in evaluation mode.

    Raises:
        InputError: As `class_hessian_eigs`.

    Examples:
        >>> model = torch.nn.Linear(4, 3)
        >>> data = [(torch.randn(32, 4), torch.randint(3, (32,)))]
        >>> result = hutchinson_trace(model, data, groups={"all": [0, 1, 2]})
        >>> result.trace["all"] > 4 * result.standard_error["all"]
        True
    """
    _check_positive(samples=samples)
    with group_losses(model, loader, criterion, groups, eval_mode) as space:
        forms: dict[str, list[float]] = {}
        for name in _filled(space):
            loss = GroupLoss(space, name)
            generator = torch.Generator().manual_seed(seed)
            forms[name] = []
            for _ in range(samples):
                signs = space.random_signs(generator)
                product = loss.hessian_product(signs)
                form = (signs.to(space.wide) @ product.to(space.wide)).item()
                if not math.isfinite(form):
                    raise InputError(
                        f"a Hessian-vector product of group {name!r} is not finite: the loss has "
                        "no second derivative at these parameters"
                    )
                forms[name].append(form)
        means, errors = _means_and_errors(space, forms)
        return ClassTrace(*_description(space), means, errors, samples, space.dimension)


def loss_surface_2d(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    criterion: Criterion | None = None,
    groups: Groups | None = None,
    steps: int = 21,
    radius: int | float = 1.0,
    seed: int = 0,
    eval_mode: bool = True,
) -> LossSurface:
    """The mean loss of each group on a plane through θ along two random directions.

    The directions are filter-normalised: each filter (row) has the norm of the weights' filter,
    biases and normalisation parameters do not move (Li et al., "Visualizing the loss landscape of
    neural nets", NeurIPS 2018, Section 4). Models of different scale can then be compared; use the
    same seed for them.

    Args:
        model: See the module's description, as for `loader`, `criterion`, `groups`, `eval_mode`.
        loader: Batches ``(x, y)``; it is walked ``steps²`` times.
        criterion: Per-sample loss.
        groups: Classes by name.
        steps: Points along either direction; odd, θ is one of them.
        radius: The plane reaches from ``-radius`` to ``radius``.
        seed: Of the directions.
        eval_mode: Run the model in evaluation mode.

    Raises:
        InputError: As `class_sharpness`; also if no weight with two or more dimensions is
            trainable.

    Examples:
        >>> model = torch.nn.Linear(4, 3)
        >>> data = [(torch.randn(32, 4), torch.randint(3, (32,)))]
        >>> result = loss_surface_2d(model, data, groups={"all": [0, 1, 2]}, steps=3)
        >>> result.coordinates, result.surface["all"][1][1] == result.losses["all"]
        ([-1.0, 0.0, 1.0], True)
    """
    _check_positive(steps=steps)
    if steps < 2:
        raise InputError(f"steps is {steps}; a surface needs at least 2")
    if not (math.isfinite(radius) and radius > 0):
        raise InputError(f"radius is {radius}; it must be finite and positive")
    with group_losses(model, loader, criterion, groups, eval_mode) as space:
        generator = torch.Generator().manual_seed(seed)
        across, up = (space.filter_normalized(space.random_vector(generator)) for _ in range(2))
        # Mirrored, so that the middle of an odd number of points is 0 and not about 0.
        line = torch.linspace(-radius, radius, steps, dtype=torch.float64)
        coordinates = ((line - line.flip(0)) / 2).tolist()
        surface: dict[str, list[list[float]]] = {name: [] for name in space.groups}
        where = f"within radius {radius:g} of θ (a smaller radius may help)"
        for b in coordinates:
            for rows in surface.values():
                rows.append([])
            for a in coordinates:
                losses = space.at(a * across + b * up, where)
                for name, rows in surface.items():
                    rows[-1].append(losses[name])
        return LossSurface(*_description(space), coordinates, surface)


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1")


def _filled(space: GroupLosses) -> list[str]:
    return [name for name, n in space.counts.items() if n]


def _description(
    space: GroupLosses,
) -> tuple[dict[str, list[int]], dict[str, int], dict[str, float], list[str], bool]:
    return space.groups, space.counts, space.losses, space.empty, space.eval_mode


def _scaled(direction: Tensor, rho: float) -> Tensor:
    """`direction` with length ρ; zero stays zero."""
    norm = torch.linalg.vector_norm(direction)
    return direction * (rho / norm if norm > 0 else 0.0)


def _ascent(loss: GroupLoss, rho: float, where: str) -> float:
    before, gradient = loss.value_and_gradient("at θ")
    if not gradient.isfinite().all():
        raise InputError(f"the gradient of group {loss.name!r} is not finite")
    with loss.space.displaced(_scaled(gradient, rho)):
        return loss.value(where) - before


def _means_and_errors(
    space: GroupLosses, values: dict[str, list[float]]
) -> tuple[dict[str, float], dict[str, float]]:
    """Mean and standard error of each group's values; NaN where there are too few."""
    means = {n: statistics.fmean(values[n]) if n in values else math.nan for n in space.groups}
    errors = {
        n: statistics.stdev(values[n]) / math.sqrt(len(values[n]))
        if len(values.get(n, [])) > 1
        else math.nan
        for n in space.groups
    }
    return means, errors


def _density(rules: list[tuple[Tensor, Tensor]], grid: Tensor, width: float) -> Tensor:
    """The mean over quadrature rules of their nodes drawn out to Gaussians, ``[points]``."""
    densities = [
        torch.exp(-0.5 * ((grid[:, None] - values) / width) ** 2) @ weights
        for values, weights in rules
    ]
    return torch.stack(densities).mean(dim=0) / (width * math.sqrt(2 * math.pi))

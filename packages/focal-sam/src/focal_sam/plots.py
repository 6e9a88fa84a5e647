"""Pictures of class weights, sharpness, spectra and loss surfaces, as matplotlib figures.

Each function returns a `matplotlib.figure.Figure` that needs no display; ``figure.savefig(path)``
writes it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from focal_sam.analysis import ClassSharpness, ClassSpectrum, HessianEigenvalues, LossSurface
from focal_sam.weights import ClassWeights
from shared_core.errors import InputError
from shared_core.plots import COLORS, new_figure, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_class_weights", "plot_loss_surface", "plot_sharpness_bars", "plot_spectrum"]

Weights = ClassWeights | Tensor
Measured = ClassSharpness | HessianEigenvalues

# A few classes can be named one by one under an axis.
NAMED_CLASSES = 20
LEVELS = 13


def plot_class_weights(
    weights: Weights | Mapping[str, Weights], class_counts: Sequence[int] | Tensor | None = None
) -> "Figure":
    """Draw the weight of every class, over its number of training samples if that is known.

    Args:
        weights: `FocalWeights`, other `ClassWeights` or a tensor ``[classes]``; several by name
            are drawn as several curves.
        class_counts: Samples per class ``[classes]``; by default those that the weights know.
            Classes are then ordered from the most to the least frequent.

    Raises:
        InputError: If there is nothing to draw or the numbers of classes differ.

    Examples:
        >>> from focal_sam.weights import FocalWeights
        >>> weights = FocalWeights([500, 100, 20], gamma=2.0, lam=0.8)
        >>> figure = plot_class_weights(weights)
        >>> figure.axes[0].get_ylabel()
        'class weight $c_i$'
    """
    named = weights if isinstance(weights, Mapping) else {"": weights}
    if not named:
        raise InputError("there are no weights to draw")
    curves = {
        name: torch.as_tensor(w.values if isinstance(w, ClassWeights) else w)
        .detach()
        .double()
        .cpu()
        for name, w in named.items()
    }
    if class_counts is None:
        known = [getattr(w, "class_counts", None) for w in named.values()]
        class_counts = next((c for c in known if c is not None), None)
    counts = None if class_counts is None else torch.as_tensor(class_counts).double().cpu()
    sizes = {len(c) for c in curves.values()} | ({len(counts)} if counts is not None else set())
    if len(sizes) > 1:
        raise InputError(f"weights and counts are of {sorted(sizes)} classes; they must agree")
    [size] = sizes
    order = torch.arange(size)
    if counts is not None:
        order = counts.argsort(descending=True, stable=True)
    figure: Figure
    with style():
        figure, axes = new_figure()
        if counts is not None:
            bars = axes.twinx()
            bars.bar(range(size), counts[order].tolist(), width=0.8, color="0.85")
            bars.set_ylabel("training samples (bars)", color="0.45")
            bars.tick_params(axis="y", colors="0.45")
            bars.set_yscale("log")
            bars.grid(False)
            bars.spines["right"].set_visible(True)
            # The curves belong in front of the bars.
            axes.set_zorder(bars.get_zorder() + 1)
            axes.patch.set_visible(False)
        for name, values in curves.items():
            marker = "o" if size <= NAMED_CLASSES else None
            axes.plot(range(size), values[order].tolist(), marker=marker, label=name)
        axes.set_ylim(0, 1.08 * max(c.max().item() for c in curves.values()) or 1)
        axes.set_ylabel("class weight $c_i$")
        axes.set_title("Weight of each class's sharpness")
        if size <= NAMED_CLASSES:
            axes.set_xticks(range(size), [str(i) for i in order.tolist()])
        axes.set_xlabel("class" if counts is None else "class, most frequent first")
        if isinstance(weights, Mapping):
            figure.legend(loc="outside lower center", ncols=min(len(curves), 4))
    return figure


def plot_sharpness_bars(
    results: Measured | Mapping[str, Measured | Sequence[Measured]], *, log: bool = False
) -> "Figure":
    """Draw the sharpness, or the top eigenvalue, of each group as bars, one colour per method.

    Args:
        results: One result of `class_sharpness` or `class_hessian_eigs`, or several by the name of
            the method; for several seeds, a list of results per method: the bar is their mean,
            the whisker their standard deviation, and every seed is a dot.
        log: Draw on a logarithmic axis.

    Raises:
        InputError: If there is nothing to draw, or the results differ in kind or in groups.

    Examples:
        >>> from focal_sam.analysis import class_sharpness
        >>> model = torch.nn.Linear(4, 3)
        >>> data = [(torch.randn(32, 4), torch.randint(3, (32,)))]
        >>> figure = plot_sharpness_bars({"SGD": class_sharpness(model, data, rho=0.1)})
        >>> len(figure.axes[0].patches)
        3
    """
    named = results if isinstance(results, Mapping) else {"": results}
    seeds = {n: list(r) if isinstance(r, Sequence) else [r] for n, r in named.items()}
    flat = [r for members in seeds.values() for r in members]
    if not flat or not all(seeds.values()):
        raise InputError("there are no results to draw")
    groups = list(flat[0].groups)
    first = flat[0]
    if any(_kind(r) != _kind(first) for r in flat):
        raise InputError(
            "the results differ in kind, groups, rho or mode; draw alike ones together"
        )
    if isinstance(first, HessianEigenvalues):
        label, title = "top Hessian eigenvalue", "Curvature of each group's loss"
    else:
        label = rf"$L_g(\theta + \epsilon) - L_g(\theta)$, $\rho$ = {first.rho:g}"
        step = "one ascent step" if first.mode == "ascent" else "random directions"
        title = f"Sharpness of each group's loss ({step})"
    width = 0.8 / len(seeds)
    figure: Figure
    with style():
        figure, axes = new_figure(
            figsize=(min(max(4.8, 0.16 * len(groups) * len(seeds) + 2), 16), 3.6)
        )
        for number, (name, members) in enumerate(seeds.items()):
            values = [[_value(r, g) for r in members] for g in groups]
            places = [i + (number - (len(seeds) - 1) / 2) * width for i in range(len(groups))]
            means = [float(np.mean(v)) for v in values]
            spread = [float(np.std(v, ddof=1)) for v in values] if len(members) > 1 else None
            color = COLORS[number % len(COLORS)]
            axes.bar(
                places,
                means,
                0.9 * width,
                color=color,
                label=name,
                yerr=spread,
                error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "0.25"},
            )
            if len(members) > 1:
                axes.plot(
                    [p for p in places for _ in members],
                    [v for of_group in values for v in of_group],
                    linestyle="none",
                    marker=".",
                    markersize=4,
                    color="0.25",
                    alpha=0.6,
                )
        if log:
            axes.set_yscale("log")
        axes.set_xticks(range(len(groups)), groups)
        axes.set_xlim(-0.6, len(groups) - 0.4)
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("class" if _one_class_each(first.groups) else "group of classes")
        axes.set_ylabel(label)
        axes.set_title(title)
        if isinstance(results, Mapping):
            figure.legend(loc="outside lower center", ncols=min(len(seeds), 4))
    return figure


def plot_spectrum(spectrum: ClassSpectrum, *, floor: float = 1e-5) -> "Figure":
    """Draw the spectral density of each group's Hessian on a logarithmic axis.

    Args:
        spectrum: What `class_spectrum` returned.
        floor: The lowest density drawn.

    Raises:
        InputError: If no group has samples, or `floor` is not positive.

    Examples:
        >>> from focal_sam.analysis import class_spectrum
        >>> model = torch.nn.Linear(4, 3)
        >>> data = [(torch.randn(32, 4), torch.randint(3, (32,)))]
        >>> figure = plot_spectrum(class_spectrum(model, data, samples=2))
        >>> figure.axes[0].get_yscale()
        'log'
    """
    if not floor > 0:
        raise InputError(f"floor is {floor}; a logarithmic axis needs a positive one")
    groups = [g for g in spectrum.groups if g not in spectrum.empty]
    if not groups:
        raise InputError("no group has samples; there is no spectrum to draw")
    figure: Figure
    with style():
        figure, axes = new_figure(figsize=(6.4, 3.6))
        highest = floor
        for number, group in enumerate(groups):
            color = COLORS[number % len(COLORS)]
            density = spectrum.density[group]
            highest = max(highest, *density)
            axes.plot(spectrum.grid, density, color=color, label=group, linewidth=1.2)
            axes.fill_between(spectrum.grid, density, floor, color=color, alpha=0.12, linewidth=0)
        axes.axvline(0, color="0.4", linewidth=0.8, linestyle=":")
        axes.set_yscale("log")
        axes.set_ylim(floor, 3 * highest)
        axes.set_xlim(spectrum.grid[0], spectrum.grid[-1])
        axes.set_xlabel("eigenvalue of the Hessian")
        axes.set_ylabel("density")
        axes.set_title(f"Spectrum of each group's loss ({spectrum.dimension} parameters)")
        axes.legend(
            title="class" if _one_class_each(spectrum.groups) else None,
            ncols=math.ceil(len(groups) / 6),
        )
    return figure


def plot_loss_surface(surfaces: LossSurface | Mapping[str, LossSurface]) -> "Figure":
    """Draw the loss of each group around θ as contours, one row per model, on one colour scale.

    Args:
        surfaces: What `loss_surface_2d` returned, or several such by the name of the method.

    Raises:
        InputError: If there is nothing to draw or the groups differ.

    Examples:
        >>> from focal_sam.analysis import loss_surface_2d
        >>> model = torch.nn.Linear(4, 3)
        >>> data = [(torch.randn(32, 4), torch.randint(3, (32,)))]
        >>> surface = loss_surface_2d(model, data, groups={"head": [0, 1], "tail": [2]}, steps=5)
        >>> figure = plot_loss_surface({"SAM": surface, "Focal-SAM": surface})
        >>> len(figure.axes)  # 2 x 2 surfaces and the colour bar
        5
    """
    named = surfaces if isinstance(surfaces, Mapping) else {"": surfaces}
    if not named:
        raise InputError("there are no surfaces to draw")
    first = next(iter(named.values()))
    if any(s.groups != first.groups for s in named.values()):
        raise InputError("the surfaces differ in groups; draw alike ones together")
    groups = [g for g in first.groups if any(g not in s.empty for s in named.values())]
    values = [v for s in named.values() for g in groups for row in s.surface[g] for v in row]
    positive = [v for v in values if v > 0]
    if not positive:
        raise InputError("no surface has a positive loss to draw")
    # Loss spans orders of magnitude from the bottom to the rim.
    low, high = min(positive), max(positive)
    low, high = (low, high) if high > low else (low / 2, low * 2)
    levels = torch.logspace(math.log10(low), math.log10(high), LEVELS, dtype=torch.float64).tolist()
    figure: Figure
    with style():
        from matplotlib.colors import LogNorm

        figure, grid = new_figure(
            len(named),
            len(groups),
            figsize=(2.7 * len(groups) + 1.2, 2.35 * len(named) + 0.8),
            sharex=True,
            sharey=True,
            squeeze=False,
        )
        filled: Any = None
        for row, (name, surface) in enumerate(named.items()):
            for column, group in enumerate(groups):
                axes = grid[row][column]
                axes.set_aspect("equal")
                axes.grid(False)
                if group not in surface.empty:
                    loss = np.clip(surface.surface[group], levels[0], levels[-1])
                    where = (surface.coordinates, surface.coordinates, loss)
                    filled = axes.contourf(
                        *where, levels=levels, norm=LogNorm(levels[0], levels[-1]), cmap="viridis"
                    )
                    axes.contour(*where, levels=levels, colors="white", linewidths=0.4)
                axes.plot(0, 0, marker="+", color="white", markersize=8)
                if row == 0:
                    kind = "class " if _one_class_each(first.groups) else ""
                    axes.set_title(f"{kind}{group}")
                if row == len(named) - 1:
                    axes.set_xlabel("direction 1")
                if column == 0:
                    axes.set_ylabel(f"{name}\ndirection 2" if name else "direction 2")
        bar = figure.colorbar(filled, ax=grid, ticks=levels[::2], shrink=0.9, label="mean loss")
        bar.ax.set_yticklabels([f"{v:.2g}" for v in levels[::2]])
        bar.minorticks_off()
    return figure


def _kind(result: Measured) -> tuple[Any, ...]:
    """What results must share to be drawn side by side."""
    settings = (result.rho, result.mode) if isinstance(result, ClassSharpness) else ()
    return type(result), list(result.groups), settings


def _value(result: Measured, group: str) -> float:
    if isinstance(result, ClassSharpness):
        return result.sharpness[group]
    if not result.top[group]:
        raise InputError("the eigenvalues were computed with which='bottom'; bars show the top")
    return result.top[group][0]


def _one_class_each(groups: Mapping[str, list[int]]) -> bool:
    """Whether the groups are the classes themselves."""
    return all([name] == [str(c) for c in members] for name, members in groups.items())

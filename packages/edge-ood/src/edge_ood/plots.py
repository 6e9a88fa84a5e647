"""Pictures of energies, of the spectrum of labels, and of the choice of outliers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from shared_core.plots import COLORS, new_figure

__all__ = [
    "plot_comparison",
    "plot_curves",
    "plot_energies",
    "plot_images",
    "plot_spectra",
    "plot_tail_curves",
    "plot_training",
]


def plot_energies(panels: Mapping[str, Mapping[str, Tensor]], title: str = "JointEnergy") -> Any:
    """Densities of scores, on a logarithmic axis: one panel a method, one line a set.

    Args:
        panels: For each method the scores of each set; the names of ID sets begin with ``ID``.
        title: Name of the score.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, axes = new_figure(1, len(panels), squeeze=False, sharex=True)
    everything = np.concatenate([_positive(s) for sets in panels.values() for s in sets.values()])
    low, high = np.quantile(everything, [0.002, 0.999])
    edges = np.geomspace(max(low, 1e-6), max(high, 2e-6), 50)
    for axis, (method, sets) in zip(axes[0], panels.items(), strict=True):
        for index, (name, scores) in enumerate(sets.items()):
            known = name.startswith("ID")
            heights, _ = np.histogram(np.clip(_positive(scores), edges[0], edges[-1]), edges)
            axis.stairs(
                heights / max(1, heights.sum()),
                edges,
                label=name,
                color=COLORS[index % len(COLORS)],
                linestyle="-" if known else "--",
                linewidth=1.8 if known else 1.3,
            )
        axis.set(title=method, xscale="log", xlabel=title, ylabel="share of the set")
        # Within few decades, numbers between the powers of ten are readable and needed.
        few = edges[-1] / edges[0] < 300
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
    handles = axes[0][-1].get_legend_handles_labels()
    figure.legend(*handles, loc="outside right center", fontsize=8)
    return figure


def _positive(scores: Tensor) -> np.ndarray:
    values: np.ndarray = scores.double().clamp(min=1e-6).numpy()
    return values


def plot_tail_curves(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    """AUROC and FPR95 of the ID samples without the j most frequent classes, over j.

    Args:
        curves: For each method what `edge_ood.tail_curve` gave.
    """
    figure, axes = new_figure(1, 2, figsize=(11.0, 3.6))
    for axis, key, label in zip(axes, ("auroc", "fpr95"), ("AUROC %", "FPR95 %"), strict=True):
        for index, (name, rows) in enumerate(curves.items()):
            kept = [r for r in rows if r[key] is not None]
            color, style = COLORS[index % len(COLORS)], "os^"[index // len(COLORS) % 3]
            style += ("-", "--", ":")[index // len(COLORS) % 3]
            values = [100 * r[key] for r in kept]
            axis.plot([r["j"] for r in kept], values, style, label=name, color=color)
        axis.set(xlabel="j: ID images without the j most frequent labels", ylabel=label)
    axes[0].axhline(50, color="0.6", linewidth=1, linestyle=":")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure


def plot_curves(scores: Mapping[str, tuple[Tensor, Tensor]]) -> Any:
    """ROC and precision-recall curves, ID positive.

    Args:
        scores: For each line, ID scores and OOD scores.
    """
    figure, (roc, pr) = new_figure(1, 2)
    for color, (name, (inside, outside)) in zip(COLORS * 3, scores.items(), strict=False):
        both = np.concatenate([inside.numpy(), outside.numpy()])
        known = np.arange(len(both)) < len(inside)
        order = np.argsort(-both, kind="stable")
        ends = np.append(np.flatnonzero(np.diff(both[order]) != 0), len(both) - 1)
        true = np.cumsum(known[order])[ends]
        false = np.cumsum(~known[order])[ends]
        step = max(1, len(ends) // 2000)
        recall = true / len(inside)
        rates = np.append(0, false / len(outside)), np.append(0, recall)
        roc.plot(rates[0][::step], rates[1][::step], label=name, color=color)
        pr.plot(recall[::step], (true / (true + false))[::step], label=name, color=color)
    roc.axhline(0.95, color="0.6", linewidth=1, linestyle=":")
    roc.set(xlabel="share of OOD accepted", ylabel="share of ID accepted", title="ROC")
    pr.set(xlabel="recall of ID", ylabel="precision", title="Precision and recall")
    roc.legend(fontsize=8)
    return figure


def plot_comparison(
    summary: Mapping[str, Mapping[str, Any]], titles: Mapping[str, str], keys: Mapping[str, str]
) -> Any:
    """Bars of the demo's table, with the standard deviation over seeds and each seed as a dot.

    Args:
        summary: What `edge_ood.demo.summarize` gave.
        titles: Name of each method.
        keys: Title of each panel and its key in the summary.
    """
    figure, axes = new_figure(1, len(keys), squeeze=False, figsize=(3.0 * len(keys), 3.4))
    for axis, (title, key) in zip(axes[0], keys.items(), strict=True):
        for place, (method, entry) in enumerate(summary.items()):
            spread = entry[key]
            axis.bar(
                place,
                100 * spread["mean"],
                yerr=100 * spread["std"],
                color=COLORS[place % len(COLORS)],
                width=0.7,
                capsize=3,
                label=titles[method],
            )
            dots = [100 * v for v in spread["values"]]
            axis.plot([place] * len(dots), dots, ".", color="0.2", markersize=5)
        axis.set(title=title, xticks=[])
        axis.grid(axis="x", visible=False)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9)
    return figure


def plot_spectra(spectra: Mapping[str, Sequence[float]], k: int = 32) -> Any:
    """Singular values of the features of the ID set and of candidate OE sets.

    Args:
        spectra: For each set its spectrum; the first is the ID set.
        k: How many leading values the distance reads.
    """
    figure, axis = new_figure()
    for index, (name, values) in enumerate(spectra.items()):
        color = "black" if index == 0 else COLORS[index - 1]
        shown = np.maximum(np.asarray(values), 1e-6)
        axis.plot(np.arange(1, len(shown) + 1), shown, label=name, color=color)
    axis.axvline(k, color="0.6", linestyle=":", linewidth=1)
    top = max(max(values) for values in spectra.values())
    axis.set(yscale="log", xlabel="index", ylabel="singular value", ylim=(top / 1e4, 2 * top))
    axis.legend(fontsize=8)
    return figure


def plot_training(histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    """Losses and mean energies over the epochs: one line a method.

    Args:
        histories: For each method what `edge_ood.loop.train_edge` gave.
    """
    from matplotlib.ticker import MaxNLocator

    panels = {
        "l_id": "classification loss",
        "l_conf": "confidence loss",
        "l_gap": "gap loss",
        "energy_id": "mean energy, ID",
        "energy_oe": "mean energy, OE",
    }
    figure, axes = new_figure(1, len(panels), figsize=(3.0 * len(panels), 3.2))
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        for color, (name, history) in zip(COLORS * 3, histories.items(), strict=False):
            values = [epoch[key] for epoch in history if key in epoch]
            if any(values):
                axis.plot(range(1, len(values) + 1), values, label=name, color=color)
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    figure.legend(*axes[3].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure


def plot_images(sets: Mapping[str, np.ndarray]) -> Any:
    """A row of images of every set.

    Args:
        sets: For each set its images, uint8 ``[n, H, W, 3]``.
    """
    figure, axes = new_figure(len(sets), 1, squeeze=False, figsize=(7.2, 0.85 * len(sets)))
    for axis, (name, images) in zip(axes[:, 0], sets.items(), strict=True):
        axis.imshow(np.concatenate(list(images), axis=1), interpolation="nearest")
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
        axis.set(xticks=[], yticks=[])
        axis.grid(visible=False)
        for side in axis.spines.values():
            side.set_visible(False)
    return figure

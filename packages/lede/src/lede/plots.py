"""The pictures of a comparison: speedups, training, exits, and where in a text it exits."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lede.stats import Round

__all__ = [
    "plot_exit_heatmap",
    "plot_exit_histogram",
    "plot_segments",
    "plot_speed_against_acceptance",
    "plot_speedups",
    "plot_training",
]


def plot_speedups(entries: Mapping[str, Sequence[float]], title: str = "") -> Any:
    """Bars of speedup by policy, one point per seed.

    Args:
        entries: Values by policy.
        title: Of the picture.
    """
    from shared_core.plots import COLORS, new_figure

    figure, axes = new_figure(figsize=(7.2, 0.42 * len(entries) + 1.2))
    names = list(entries)[::-1]
    widest = max(max(v) for v in entries.values())
    gap = 0.025 * widest  # clear of the last point
    for i, name in enumerate(names):
        values = list(entries[name])
        learned = name.startswith(("LEDE", "delivered"))
        axes.barh(i, np.mean(values), color=COLORS[0] if learned else "0.72", height=0.65)
        axes.plot(values, [i] * len(values), "o", color="black", ms=3)
        axes.text(max(values) + gap, i, f"{np.mean(values):.2f}", va="center", fontsize=9)
    axes.axvline(1, color="black", lw=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlim(0, 1.14 * widest)
    axes.set_xlabel("speedup over plain decoding (counted cost)")
    axes.set_title(title)
    axes.grid(axis="y", visible=False)
    return figure


def plot_training(history: Sequence[Mapping[str, float]]) -> Any:
    """Validation speedup, acceptance and mean exit against updates.

    Args:
        history: Of a `TrainResult`.
    """
    from shared_core.plots import COLORS, new_figure

    figure, axes = new_figure(1, 3, figsize=(10.5, 3.0))
    steps = [h["step"] for h in history]
    names = (
        ("validation", "speedup on validation"),
        ("acceptance", "accepted drafts"),
        ("mean_exit", "mean exit layer"),
    )
    for panel, (key, label), color in zip(axes, names, COLORS, strict=False):
        panel.plot(steps, [h[key] for h in history], "o-", color=color, ms=4)
        panel.set_xlabel("updates")
        panel.set_title(label)
    return figure


def plot_exit_histogram(rounds: Sequence[Round], depth: int) -> Any:
    """How often each exit and each draft length was taken.

    Args:
        rounds: A log.
        depth: Layers of the model.
    """
    from shared_core.plots import COLORS, new_figure

    figure, (left, right) = new_figure(1, 2, figsize=(8.4, 3.0))
    exits = np.bincount([r.exit for r in rounds], minlength=depth + 1)
    left.bar(range(1, depth + 1), exits[1:] / len(rounds), color=COLORS[0])
    left.set_xlabel(f"exit layer ({depth}: plain step)")
    left.set_ylabel("share of rounds")
    drafts = np.bincount([r.passes - 1 for r in rounds])
    right.bar(range(len(drafts)), drafts / len(rounds), color=COLORS[1])
    right.set_xlabel("drafts in the round")
    return figure


def plot_speed_against_acceptance(entries: Mapping[str, tuple[float, float]]) -> Any:
    """Speedup against acceptance rate, a point per policy.

    Args:
        entries: (acceptance, speedup) by policy.
    """
    from shared_core.plots import COLORS, new_figure

    figure, axes = new_figure(figsize=(6.4, 4.0))
    for i, (name, (acceptance, speedup)) in enumerate(entries.items()):
        if name.startswith("delivered"):  # a ring around the point of the policy that it is
            axes.plot(acceptance, speedup, "o", mfc="none", mec="black", ms=13, label=name)
        else:
            axes.plot(acceptance, speedup, "o", color=COLORS[i % len(COLORS)], label=name)
    axes.set_xlabel("accepted drafts")
    axes.set_ylabel("speedup (counted cost)")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def plot_segments(segments: Mapping[str, Mapping[str, float]]) -> Any:
    """Speedup by kind of text: static, threshold and the delivered policy.

    Args:
        segments: ``static``, ``threshold`` and ``delivered`` by kind.
    """
    from shared_core.plots import COLORS, new_figure

    figure, axes = new_figure(figsize=(7.2, 3.4))
    names = ("static", "threshold", "delivered")
    for i, name in enumerate(names):
        places = np.arange(len(segments)) + (i - 1) * 0.27
        axes.bar(places, [s[name] for s in segments.values()], 0.25, label=name, color=COLORS[i])
    axes.axhline(1, color="black", lw=0.8)
    axes.set_xticks(range(len(segments)), list(segments))
    axes.set_ylabel("speedup (counted cost)")
    axes.legend()
    return figure


def plot_exit_heatmap(
    texts: Sequence[Sequence[int] | np.ndarray],
    rounds: Sequence[Round],
    decode: Callable[[int], str],
    depth: int,
    columns: int = 64,
) -> Any:
    """Generated text, each token coloured by the layer at which it was drafted.

    A token that the last layer supplied (a correction or the round's last) counts as `depth`.

    Args:
        texts: Generated tokens of a few texts.
        rounds: Their log; `row` is the index in `texts`.
        decode: Text of one token.
        depth: Layers of the model.
        columns: Tokens per line.
    """
    from shared_core.plots import new_figure

    columns = min(columns, max(len(tokens) for tokens in texts))
    cells = []
    for row, tokens in enumerate(texts):
        layers = np.full(len(tokens), float(depth))
        for r in rounds:
            if r.row == row:
                layers[r.position : r.position + r.accepted] = r.exit
        starts = range(0, len(tokens), columns)
        cells += [(layers[at : at + columns], tokens[at : at + columns]) for at in starts]
    figure, axes = new_figure(figsize=(12, 0.42 * len(cells) + 1.0))
    grid = np.full((len(cells), columns), np.nan)
    for i, (layers, _) in enumerate(cells):
        grid[i, : len(layers)] = layers
    image = axes.imshow(grid, cmap="YlGnBu", vmin=0, vmax=depth * 1.25, aspect="auto")
    for i, (layers, tokens) in enumerate(cells):
        for j, token in enumerate(tokens):
            shown = decode(int(token)).replace("\n", "↵")
            color = "white" if layers[j] > 0.8 * depth else "black"
            axes.text(j, i, shown, ha="center", va="center", fontsize=7, color=color)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.set_title(f"layer that supplied each token (dark: all {depth} layers)")
    figure.colorbar(image, ax=axes, shrink=0.8, label="layer")
    return figure

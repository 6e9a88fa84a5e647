"""The pictures of a comparison: speedups, training, exits, and where in a text it exits."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lede.stats import Round
from shared_core.errors import InputError

__all__ = [
    "draw_run",
    "plot_exit_heatmap",
    "plot_exit_histogram",
    "plot_exit_quality",
    "plot_segments",
    "plot_speed_against_acceptance",
    "plot_speedups",
    "plot_sweep",
    "plot_training",
]

COUNTED = "speedup over plain decoding (counted cost)"


def plot_speedups(entries: Mapping[str, Sequence[float]], label: str = COUNTED) -> Any:
    """Bars of speedup by policy, one point per seed or repeat.

    Args:
        entries: Values by policy.
        label: What is drawn.
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
    axes.set_xlabel(label)
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
    for place, s in enumerate(segments.values()):
        if "mean_exit" in s:
            text = f"exit {s['mean_exit']:.1f}"
            axes.text(place + 0.27, s["delivered"], text, ha="center", va="bottom", fontsize=8)
    axes.axhline(1, color="black", lw=0.8)
    axes.margins(y=0.12)
    axes.set_xticks(range(len(segments)), list(segments))
    axes.set_ylabel("speedup (counted cost)")
    axes.legend()
    return figure


def plot_exit_heatmap(
    rounds: Sequence[Round],
    pieces: Sequence[Sequence[str]],
    depth: int,
    columns: int = 64,
) -> Any:
    """Generated text, each token coloured by the layer at which it was drafted.

    A token that the last layer supplied (a correction or the round's last) counts as `depth`.

    Args:
        rounds: The log of a few texts; `row` is the index in `pieces`.
        pieces: The text of every generated token.
        depth: Layers of the model.
        columns: Tokens per line.
    """
    from shared_core.plots import new_figure

    columns = min(columns, max(len(text) for text in pieces))
    cells: list[tuple[np.ndarray, Sequence[str]]] = []
    for row, text in enumerate(pieces):
        layers = np.full(len(text), float(depth))
        for r in rounds:
            if r.row == row:
                layers[r.position : r.position + r.accepted] = r.exit
        starts = range(0, len(text), columns)
        cells += [(layers[at : at + columns], text[at : at + columns]) for at in starts]
    figure, axes = new_figure(figsize=(12, 0.42 * len(cells) + 1.0))
    grid = np.full((len(cells), columns), np.nan)
    for i, (layers, _) in enumerate(cells):
        grid[i, : len(layers)] = layers
    image = axes.imshow(grid, cmap="YlGnBu", vmin=0, vmax=depth * 1.25, aspect="auto")
    for i, (layers, text) in enumerate(cells):
        for j, piece in enumerate(text):
            shown = piece.replace("\n", "↵")
            color = "white" if layers[j] > 0.8 * depth else "black"
            axes.text(j, i, shown, ha="center", va="center", fontsize=7, color=color)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.set_title(f"layer that supplied each token (dark: all {depth} layers)")
    figure.colorbar(image, ax=axes, shrink=0.8, label="layer").ax.set_ylim(0, depth)
    return figure


def plot_sweep(exits: Sequence[int], grid: Sequence[Sequence[float]] | np.ndarray) -> Any:
    """Speedup of every static pair.

    Args:
        exits: Candidates.
        grid: Speedup by exit and draft length 1 .. D.
    """
    from shared_core.plots import new_figure

    values = np.asarray(grid, dtype=float)
    figure, axes = new_figure(figsize=(1.6 + 0.55 * values.shape[1], 1.2 + 0.45 * len(exits)))
    image = axes.imshow(values, cmap="YlGnBu", aspect="auto")
    middle = (values.min() + values.max()) / 2
    for (i, j), value in np.ndenumerate(values):
        color = "white" if value > middle else "black"
        axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
    best = np.unravel_index(int(values.argmax()), values.shape)
    axes.plot(best[1], best[0], "s", mfc="none", mec="black", ms=24)
    axes.set_xticks(range(values.shape[1]), [str(d + 1) for d in range(values.shape[1])])
    axes.set_yticks(range(len(exits)), [str(e) for e in exits])
    axes.set_xlabel("drafts in a round")
    axes.set_ylabel("exit layer")
    axes.grid(visible=False)
    figure.colorbar(image, ax=axes, label="speedup (counted cost)")
    return figure


def plot_exit_quality(curves: Mapping[str, Sequence[float]]) -> Any:
    """Agreement of every exit with the last layer.

    Args:
        curves: Agreement by layer, by name of the training.
    """
    from shared_core.plots import COLORS, new_figure

    figure, axes = new_figure(figsize=(6.0, 3.4))
    for (name, values), color in zip(curves.items(), COLORS, strict=False):
        axes.plot(range(1, len(values) + 1), values, "o-", ms=4, color=color, label=name)
    axes.set_xlabel("exit layer")
    axes.set_ylabel("agreement with the last layer")
    axes.set_ylim(0, 1.03)
    axes.legend()
    return figure


def draw_run(folder: Path) -> dict[str, Any]:
    """All pictures that the files of a run folder allow, by name.

    Args:
        folder: What `lede demo`, ``bench``, ``train-policy``, ``train-exit``, ``sweep`` or
            ``generate --out`` wrote.

    Raises:
        InputError: If the folder holds nothing to draw.
    """
    metrics, rounds = _read(folder / "metrics.json"), _read(folder / "rounds.json")
    figures: dict[str, Any] = {}
    policies = metrics.get("policies")
    if isinstance(policies, dict):
        bars = {k: v["values"] for k, v in policies.items() if v.get("values")}
        figures["speedups"] = plot_speedups(bars, label=metrics.get("speedup", COUNTED))
        points = {
            k: (v["acceptance"], v["speedup"])
            for k, v in policies.items()
            if v.get("acceptance") is not None and v.get("draft")
        }
        if points:
            figures["acceptance"] = plot_speed_against_acceptance(points)
    if metrics.get("history"):
        figures["training"] = plot_training(metrics["history"])
    if metrics.get("segments"):
        figures["segments"] = plot_segments(metrics["segments"])
    if metrics.get("sweep"):
        figures["sweep"] = plot_sweep(metrics["sweep"]["exits"], metrics["sweep"]["grid"])
    if metrics.get("exit_quality"):
        figures["exit_quality"] = plot_exit_quality(
            {k: v["agreement"] for k, v in metrics["exit_quality"].items()}
        )
    if rounds:
        log = [Round(*r) for r in rounds["rounds"]]
        figures["exits"] = plot_exit_histogram(log, rounds["depth"])
        texts = rounds["texts"][:8]
        figures["heatmap"] = plot_exit_heatmap(log, texts, rounds["depth"])
    if not figures:
        raise InputError(
            f"{folder} holds nothing to draw; accepted: a folder that demo, bench, sweep, "
            "train-policy, train-exit or generate --out wrote"
        )
    return figures


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error})") from error
    return found if isinstance(found, dict) else {}

"""Pictures: scores by layer, grids of images, where content shifts, scores against gains."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from shared_core.plots import COLORS, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_gate", "plot_grid", "plot_scatter", "plot_shift"]


def plot_gate(table: Sequence[Mapping[str, Any]], pooled: Sequence[Mapping[str, Any]]) -> "Figure":
    """Scores of techniques by layer with their spread over draws, and gains where there are some.

    Args:
        table: Rows of a `GateReport`.
        pooled: Its pooled rows.
    """
    names = [row["technique"] for row in pooled]
    layers = list(dict.fromkeys(row["layer"] for row in table))
    with_gain = all(row.get("gain") is not None for row in pooled)
    figure, axes = new_figure(
        1, 1 + with_gain, figsize=(6.5 + 3.5 * with_gain, 0.5 * len(names) + 1.9), squeeze=False
    )
    axis = axes[0][0]
    for i, layer in enumerate(layers):
        rows = {r["technique"]: r for r in table if r["layer"] == layer}
        at = [k + 0.5 * (i / max(1, len(layers) - 1) - 0.5) for k in range(len(names))]
        axis.errorbar(
            [rows[n]["score"] for n in names], at, xerr=[rows[n]["std"] or 0 for n in names],
            fmt="o", ms=4, capsize=2, color=COLORS[i % len(COLORS)], label=layer,
        )  # fmt: skip
    axis.axvline(0, color="0.5", lw=1)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlabel("GATE score (eq. 2): 1 as the reference, 0 as without")
    axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2)
    if with_gain:
        axis = axes[0][1]
        gains, errors = ([row[k] or 0 for row in pooled] for k in ("gain", "gain_std"))
        axis.barh(range(len(names)), gains, xerr=errors, color=COLORS[2], height=0.6)
        axis.axvline(0, color="0.5", lw=1)
        axis.set_yticks(range(len(names)), [])
        axis.invert_yaxis()
        axis.set_xlabel("reconstruction gain (dB)")
    return figure  # type: ignore[no-any-return]


def plot_grid(pictures: Mapping[str, Tensor], most: int = 8) -> "Figure":
    """A row of images for each name.

    Args:
        pictures: ``[B, 3, H, W]`` in [0, 1] by name.
        most: Images a row, at most.
    """
    count = min(most, min(len(p) for p in pictures.values()))
    figure, axes = new_figure(
        len(pictures), count, figsize=(1.3 * count + 1.6, 1.35 * len(pictures)), squeeze=False
    )
    for row, (name, images) in zip(axes, pictures.items(), strict=True):
        for axis, image in zip(row, images, strict=False):
            axis.imshow(image.float().permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.grid(False)
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    return figure  # type: ignore[no-any-return]


def plot_shift(images: Tensor, maps: Mapping[str, Sequence[Tensor]]) -> "Figure":
    """Images and, below them, where their content shifts, on one scale.

    Args:
        images: ``[B, 3, H, W]`` in [0, 1].
        maps: Maps ``[h, w]`` of each image by name.
    """
    count = len(images)
    figure, axes = new_figure(
        1 + len(maps), count, figsize=(1.3 * count + 1.8, 1.35 * (1 + len(maps))), squeeze=False
    )
    top = max(float(m.max()) for ms in maps.values() for m in ms) or 1.0
    shown: Any = None
    for k in range(count):
        axes[0][k].imshow(images[k].permute(1, 2, 0).numpy(), interpolation="nearest")
        for row, values in zip(axes[1:], maps.values(), strict=True):
            shown = row[k].imshow(
                values[k].cpu().numpy(), vmin=0, vmax=top, cmap="inferno", interpolation="nearest"
            )
    for row, name in zip(axes, ("image", *maps), strict=True):
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
            axis.grid(False)
    figure.colorbar(shown, ax=axes, shrink=0.6, label="content shift (eq. 1, by position)")
    return figure  # type: ignore[no-any-return]


def plot_scatter(
    points: Mapping[str, Sequence[tuple[float, float]]], xlabels: Sequence[str], ylabel: str,
    other: Mapping[str, Sequence[tuple[float, float]]],
) -> "Figure":  # fmt: skip
    """Two measures of techniques against the same outcome, side by side.

    Args:
        points: (x, y) by technique, of the left measure.
        xlabels: Names of both measures.
        ylabel: Name of the outcome.
        other: (x, y) by technique, of the right measure.
    """
    figure, axes = new_figure(1, 2, figsize=(9.5, 4.2), sharey=True)
    for axis, data, label in zip(axes, (points, other), xlabels, strict=True):
        for i, (name, pairs) in enumerate(data.items()):
            xs, ys = zip(*pairs, strict=True)
            marker = "os^Dv<>P*X"[i % 10]
            color = COLORS[i % len(COLORS)]
            axis.scatter(xs, ys, s=30, marker=marker, color=color, label=name, alpha=0.85)
        axis.axhline(0, color="0.6", lw=1)
        axis.axvline(0, color="0.6", lw=1)
        axis.set_xlabel(label)
    axes[0].set_ylabel(ylabel)
    axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure  # type: ignore[no-any-return]

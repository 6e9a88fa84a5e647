"""Pictures: noise over depth, rankings, principal components."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from shared_core.plots import COLORS, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_depth", "plot_pca", "plot_ranking"]

BETWEEN = ("res-out", "vit-out", "upsampler-out", "downsampler-out")
GROUPS: tuple[tuple[str, Callable[[dict[str, Any]], bool]], ...] = (
    ("between modules", lambda r: r["kind"] in BETWEEN),
    ("self-attention q, k, v", lambda r: r["kind"].startswith("self-")),
    ("cross-attention q", lambda r: r["kind"] == "cross-q"),
    ("increments", lambda r: r["kind"] in ("res-increment", "ffn-inner")),
)


def plot_depth(rows: Sequence[dict[str, Any]]) -> "Figure":
    """Noise ratio and high-frequency share of activations in order of execution.

    Args:
        rows: From `diffeat.demo.measure_depth`.
    """
    figure, axes = new_figure(2, 1, figsize=(9, 6), sharex=True)
    stages = [row["stage"] for row in rows]
    for axis, key, title in (
        (axes[0], "noise", "share of variance that is noise"),
        (axes[1], "hf", "share of power above half Nyquist"),
    ):
        for color, (label, chosen) in zip(
            COLORS,
            GROUPS,
            strict=False,
        ):
            at = [i for i, row in enumerate(rows) if chosen(row)]
            line = "-" if label == "between modules" else ""
            axis.plot(at, [rows[i][key] for i in at], f"o{line}", ms=3.5, color=color, label=label)
        axis.set_ylabel(title, fontsize=9)
        axis.set_ylim(0, None)
        for stage in ("down", "mid", "up"):
            inside = [i for i, s in enumerate(stages) if s == stage]
            if inside:
                axis.axvline(min(inside) - 0.5, color="0.6", lw=1, ls=":")
                axis.text(
                    min(inside), 1.01, stage, transform=axis.get_xaxis_transform(), fontsize=9
                )
    axes[1].set_xlabel("activations in order of execution")
    axes[0].legend(fontsize=8, ncols=2)
    return figure  # type: ignore[no-any-return]


def plot_ranking(rows: Sequence[dict[str, Any]], top: int = 20) -> "Figure":
    """MIoU of the best activations with their intervals.

    Args:
        rows: From `diffeat.rank`.
        top: How many.
    """
    best = list(rows)[:top][::-1]
    figure, axis = new_figure(figsize=(8, 0.28 * len(best) + 1.2))
    at = range(len(best))
    values = [row["miou"] for row in best]
    spread = [
        [v - (row["low"] or v) for v, row in zip(values, best, strict=True)],
        [(row["high"] or v) - v for v, row in zip(values, best, strict=True)],
    ]
    spread = [[max(0.0, x) for x in side] for side in spread]
    axis.errorbar(values, at, xerr=spread, fmt="o", color=COLORS[0], ms=4, capsize=2)
    axis.set_yticks(list(at), [f"{r['name']} (t={r['t']})" for r in best], fontsize=7)
    axis.set_xlabel("mIoU of a linear probe (90 % interval over test images)")
    return figure  # type: ignore[no-any-return]


def plot_pca(images: Tensor, maps: dict[str, Tensor]) -> "Figure":
    """A grid: the images, and below them the first three principal components of each activation.

    Args:
        images: uint8 or [0, 1] floats ``[B, 3, H, W]``.
        maps: RGB maps by name, from `diffeat.pca_image`.
    """
    figure, axes = new_figure(
        len(maps) + 1, len(images), figsize=(1.3 * len(images) + 1.5, 1.3 * (len(maps) + 1)),
        squeeze=False,
    )  # fmt: skip
    for row, (name, values) in enumerate([("image", images), *maps.items()]):
        for axis, value in zip(axes[row], values, strict=True):
            axis.imshow(value.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.grid(False)
        label = name.replace("-vit-", "\nvit-").replace("-repeat", "\nrepeat")
        axes[row][0].set_ylabel(label, fontsize=6, rotation=0, ha="right", va="center")
    return figure  # type: ignore[no-any-return]

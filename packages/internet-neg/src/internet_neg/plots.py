"""Pictures of an evaluation: ROC curves, margins, the bank over the stream, what was inverted."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from internet_neg.evaluate import StreamResult
from shared_core.plots import COLORS, new_figure

__all__ = ["plot_bank", "plot_gated", "plot_margins", "plot_roc"]

Streams = Mapping[tuple[str, str], StreamResult]


def _sides(result: StreamResult, n_id: int) -> tuple[Tensor, Tensor]:
    known = result.order < n_id
    margin = result.output.margin.cpu()
    return margin[known], margin[~known]


def plot_roc(streams: Streams, n_id: int) -> Any:
    """ROC curves with known images positive, a panel for each set of unknown images.

    Args:
        streams: By detector and set; see `internet_neg.evaluate.compare`.
        n_id: Number of known images.
    """
    sets = list(dict.fromkeys(ood for _, ood in streams))
    names = list(dict.fromkeys(name for name, _ in streams))
    figure, axes = new_figure(1, len(sets), squeeze=False, figsize=(4.4 * len(sets), 3.9))
    for panel, ood in zip(axes[0], sets, strict=True):
        for color, name in zip(_colors(len(names)), names, strict=True):
            known, unknown = _sides(streams[name, ood], n_id)
            thresholds = torch.unique(torch.cat([known, unknown])).flip(0)
            accepted = [
                1 - torch.searchsorted(side.sort().values, thresholds).double() / len(side)
                for side in (unknown, known)
            ]
            x, y = (np.concatenate([[0.0], side.numpy()]) for side in accepted)
            panel.plot(100 * x, 100 * y, color=color, label=name, drawstyle="steps-post")
        panel.axhline(95, color="gray", linewidth=0.8, linestyle=":")
        panel.set_title(f"unknown: {ood}")
        panel.set_xlabel("unknown accepted (%)")
        panel.set_ylabel("known accepted (%)")
        panel.set_xlim(-1, 101)
        panel.set_ylim(40, 101)
    axes[0][0].legend(loc="lower right")
    return figure


def plot_margins(streams: Streams, n_id: int) -> Any:
    """Histograms of the margins of known and unknown images, a row for each detector.

    Args:
        streams: By detector and set.
        n_id: Number of known images.
    """
    sets = list(dict.fromkeys(ood for _, ood in streams))
    names = list(dict.fromkeys(name for name, _ in streams))
    figure, axes = new_figure(
        len(names),
        len(sets),
        squeeze=False,
        figsize=(4.4 * len(sets), 1.9 * len(names) + 0.4),
    )
    for row, name in zip(axes, names, strict=True):
        for panel, ood in zip(row, sets, strict=True):
            known, unknown = (side.numpy() for side in _sides(streams[name, ood], n_id))
            both = np.concatenate([known, unknown])
            both = both[np.isfinite(both)]
            low, high = np.quantile(both, [0.002, 0.998])
            bins = np.linspace(low, high, 50)
            for side, label, color in ((known, "known", COLORS[0]), (unknown, ood, COLORS[3])):
                shown = np.clip(side, low, high)
                panel.hist(shown, bins, alpha=0.6, color=color, label=label, density=True)
            panel.set_title(name)
            panel.set_yticks([])
            panel.legend()
    for panel in axes[-1]:
        panel.set_xlabel("margin (logit of S)")
    return figure


def plot_bank(streams: Streams) -> Any:
    """How many images were gated and accepted, and the size of the bank, over each stream.

    Args:
        streams: By detector and set; those that never gate an image are left out.
    """
    kept = {key: r.growth for key, r in streams.items() if r.growth[-1]["gated"]}
    if not kept:
        return None
    figure, axes = new_figure(1, len(kept), squeeze=False, figsize=(4.4 * len(kept), 3.4))
    for panel, ((name, ood), growth) in zip(axes[0], kept.items(), strict=True):
        seen = [0, *(record["seen"] for record in growth)]  # from 0, or one batch is no line
        for color, key in zip(COLORS, ("gated", "accepted", "bank"), strict=False):
            label = {"bank": "in the bank"}.get(key, key)
            panel.plot(seen, [0, *(record[key] for record in growth)], color=color, label=label)
        panel.set_title(f"{name}, unknown: {ood}")
        panel.set_xlabel("images seen")
        panel.set_ylim(bottom=0)
    axes[0][0].set_ylabel("images")
    axes[0][0].legend()
    return figure


def plot_gated(images: np.ndarray, titles: Sequence[str], columns: int = 8) -> Any:
    """Images in rows, each with a line of text under it.

    Args:
        images: Pixels, uint8 [n, height, width, 3].
        titles: One line for each.
        columns: Images a row.
    """
    rows = -(-len(images) // columns)
    figure, axes = new_figure(rows, columns, squeeze=False, figsize=(1.4 * columns, 1.8 * rows))
    for panel in axes.flat:
        panel.axis("off")
    for panel, image, title in zip(axes.flat, images, titles, strict=False):
        panel.imshow(image, interpolation="nearest")
        panel.set_title(title, fontsize=7)
    return figure


def _colors(n: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(n)]

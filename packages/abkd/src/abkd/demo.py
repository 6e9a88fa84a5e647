"""The picture of the paper in small: what α and β do to a student that cannot fit its teacher.

A fixed teacher table of 64 contexts by 200 classes (a Zipf body and four modes) is fitted by a
rank-6 bilinear softmax, by full-batch Adam, for every (α, β) of a grid at once. Each seed draws
the table and the start anew; nothing else is random.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from abkd.divergence import ab_divergence

__all__ = [
    "GRID",
    "NAMED",
    "DemoSettings",
    "best_cell",
    "figures",
    "language_figure",
    "run_seed",
    "summarize",
    "tell",
]

GRID = (0.05, 0.15, 0.3, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5)
NAMED = {
    "forward KL": (1.0, 0.0),
    "reverse KL": (0.0, 1.0),
    "αβ (0.15, 0.7)": (0.15, 0.7),
    "αβ (0.5, 0.5)": (0.5, 0.5),
    "αβ (0.7, 0.5)": (0.7, 0.5),
    "αβ (0.85, 0.3)": (0.85, 0.3),
    "αβ (0.05, 0.05)": (0.05, 0.05),
}
MEASURES = ("top-1 agreement", "student entropy", "total variation", "teacher cross-entropy")


@dataclass(frozen=True)
class DemoSettings:
    """The task and its training."""

    contexts: int = 64
    classes: int = 200
    rank: int = 6
    steps: int = 200
    lr: float = 0.05


def teacher_table(seed: int, settings: DemoSettings) -> Tensor:
    """Teacher log-probabilities ``[contexts, classes]``: Zipf's law, permuted, and four modes."""
    g = torch.Generator().manual_seed(seed)
    body = -1.2 * torch.arange(1, settings.classes + 1).float().log()
    rows = []
    for _ in range(settings.contexts):
        logits = body[torch.randperm(settings.classes, generator=g)].clone()
        modes = torch.randperm(settings.classes, generator=g)[:4]
        logits[modes] += torch.tensor([5.0, 4.0, 3.0, 2.5])
        rows.append(logits)
    return torch.stack(rows).log_softmax(-1)


def run_seed(
    seed: int, pairs: list[tuple[float, float]], settings: DemoSettings | None = None
) -> dict[str, Tensor]:
    """Fit one student for each pair, all from one start, and measure them.

    Args:
        seed: Of the table and the start.
        pairs: The (α, β).
        settings: The task.

    Returns:
        Each of the measures, one value a pair, and the teacher's entropy.

    Examples:
        >>> found = run_seed(0, [(1.0, 0.0)], DemoSettings(steps=2))
        >>> found["total variation"].shape
        torch.Size([1])
    """
    settings = settings or DemoSettings()
    lp = teacher_table(seed, settings)
    g = torch.Generator().manual_seed(seed + 10_000)
    n = len(pairs)

    def start(*shape: int) -> Tensor:
        first = 0.3 * torch.randn(*shape, generator=g)
        return first.expand(n, *shape).clone().requires_grad_()

    left = start(settings.contexts, settings.rank)
    right = start(settings.rank, settings.classes)
    bias = torch.zeros(n, 1, settings.classes, requires_grad=True)
    optimizer = torch.optim.Adam([left, right, bias], lr=settings.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    for _ in range(settings.steps):
        optimizer.zero_grad()
        z = left @ right + bias
        with warnings.catch_warnings(action="ignore"):  # exponents above 1 are meant
            losses = [ab_divergence(z[i], lp, a, b) for i, (a, b) in enumerate(pairs)]
        torch.autograd.backward(torch.stack(losses).sum())
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        lq = (left @ right + bias).log_softmax(-1)
        q, p = lq.exp(), lp.exp()
        return {
            "top-1 agreement": (lq.argmax(-1) == lp.argmax(-1)).float().mean(-1),
            "student entropy": -(q * lq).sum(-1).mean(-1),
            "total variation": 0.5 * (q - p).abs().sum(-1).mean(-1),
            "teacher cross-entropy": -(q * lp).sum(-1).mean(-1),
            "teacher entropy": -(p * lp).sum(-1).mean().expand(n),
        }


def summarize(
    results: list[dict[str, Tensor]], pairs: list[tuple[float, float]]
) -> dict[str, dict[str, Any]]:
    """Mean and standard error over seeds of each measure, of the named pairs and all others."""
    found: dict[str, dict[str, Any]] = {}
    names = {pair: name for name, pair in NAMED.items()}
    for pair in pairs:
        name = names.get(pair, f"αβ ({pair[0]:g}, {pair[1]:g})")
        at = pairs.index(pair)
        entry: dict[str, Any] = {"alpha": pair[0], "beta": pair[1]}
        for measure in (*MEASURES, "teacher entropy"):
            values = torch.stack([r[measure][at] for r in results])
            error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None
            entry[measure] = {"mean": values.mean().item(), "standard_error": error}
        found[name] = entry
    return found


def table(summary: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows for a person."""
    return [
        {"divergence": name, **{m: round(entry[m]["mean"], 3) for m in MEASURES}}
        for name, entry in summary.items()
    ]


def best_cell(
    results: list[dict[str, Tensor]], pairs: list[tuple[float, float]]
) -> tuple[float, float]:
    """The (α, β) of least total variation, for the tuning seeds."""
    return pairs[int(torch.stack([r["total variation"] for r in results]).mean(0).argmin())]


def tell(
    summary: dict[str, dict[str, Any]],
    results: list[dict[str, Tensor]],
    pairs: list[tuple[float, float]],
    best: tuple[float, float],
) -> str:
    """Say what was seen of the paper's claims on the reported seeds, whichever way it went."""
    fkl, rkl = summary["forward KL"], summary["reverse KL"]
    truth = fkl["teacher entropy"]["mean"]
    at = [pairs.index(p) for p in (best, (1.0, 0.0), (0.0, 1.0))]
    found = torch.stack([r["total variation"][at] for r in results])
    gaps = found[:, 1:].min(-1).values - found[:, 0]
    smooth = fkl["student entropy"]["mean"] > truth
    sharp = rkl["student entropy"]["mean"] < truth
    small = summary["αβ (0.05, 0.05)"]["total variation"]["mean"]
    worse = small > max(e["total variation"]["mean"] for e in (fkl, rkl))
    return (
        f"Table, {len(results)} seeds: forward KL gives entropy "
        f"{fkl['student entropy']['mean']:.2f} and reverse KL "
        f"{rkl['student entropy']['mean']:.2f} where the teacher has {truth:.2f} "
        f"(too smooth: {'yes' if smooth else 'no'}; too sharp: {'yes' if sharp else 'no'}). The "
        f"cell α={best[0]:g}, β={best[1]:g}, chosen on other seeds, has total variation "
        f"{found[:, 0].mean():.3f}, {gaps.mean():.3f} below the better of the two KLs (in "
        f"{int((gaps > 0).sum())} of {len(results)} seeds). Tiny α with tiny β "
        f"{'fails' if worse else 'does not fail'} (total variation {small:.2f})."
    )


def figures(
    tuning: list[dict[str, Tensor]],
    cells: list[tuple[float, float]],
    grid: tuple[float, ...],
    results: list[dict[str, Tensor]],
    pairs: list[tuple[float, float]],
) -> dict[str, Any]:
    """Heat maps of the tuning seeds over the grid, and the named pairs between smooth and sharp."""
    from shared_core.plots import COLORS, new_figure

    figure, axes = new_figure(1, 3, figsize=(13.5, 4.2))
    for ax, measure in zip(axes, MEASURES, strict=False):
        values = torch.stack([r[measure] for r in tuning]).mean(0)
        if measure == "student entropy":
            values = values / torch.stack([r["teacher entropy"][0] for r in tuning]).mean()
        field = torch.tensor([[values[cells.index((a, b))] for a in grid] for b in grid])
        picture = ax.imshow(field.numpy(), origin="lower", cmap="viridis", aspect="auto")
        ax.set_xticks(range(len(grid)), [f"{v:g}" for v in grid])
        ax.set_yticks(range(len(grid)), [f"{v:g}" for v in grid])
        ax.set_xlabel("α")
        ax.set_ylabel("β")
        ax.grid(visible=False)
        title = "student over teacher entropy" if measure == "student entropy" else measure
        ax.set_title(title)
        figure.colorbar(picture, ax=ax)
    scatter, ax = new_figure(figsize=(6.4, 4.4))
    for i, (name, pair) in enumerate(NAMED.items()):
        at = pairs.index(pair)
        xs = [float(r["student entropy"][at]) for r in results]
        ys = [float(r["total variation"][at]) for r in results]
        ax.scatter(xs, ys, color=COLORS[i % len(COLORS)], label=name, s=24)
    truth = torch.stack([r["teacher entropy"][0] for r in results]).mean()
    ax.axvline(float(truth), color="0.4", linestyle="--", linewidth=1)
    ax.set_xlabel("entropy of the student (dashed: the teacher's)")
    ax.set_ylabel("total variation from the teacher")
    ax.legend(fontsize=8)
    return {"heatmap": figure, "tradeoff": scatter}


def language_figure(found: dict[str, Any]) -> Any:
    """Each method's text: how probable the teacher finds it, and how varied it is."""
    from shared_core.plots import COLORS, new_figure

    figure, ax = new_figure(figsize=(6.4, 4.4))
    for i, (name, row) in enumerate(found["rows"].items()):
        errors = found["errors"][name]
        ax.errorbar(
            row["distinct_2"], row["teacher_nll"], xerr=errors["distinct_2"],
            yerr=errors["teacher_nll"], color=COLORS[i], label=name, marker="o", capsize=3,
            linestyle="none",
        )  # fmt: skip
    ax.set_xlabel("distinct bigrams in the student's samples (more: more varied)")
    ax.set_ylabel("the teacher's nats a token for them (less: better)")
    ax.legend(fontsize=8)
    return figure

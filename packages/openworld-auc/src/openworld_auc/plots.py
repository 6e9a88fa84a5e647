"""Pictures: the curve with its area, scores by domain, what a ratio changes, training."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from openworld_auc._checks import Samples, check_samples
from openworld_auc.ranking import area, openworld_curve
from openworld_auc.report import overall_accuracy
from shared_core.plots import COLORS, new_figure, style

__all__ = ["curve_figure", "histogram_figure", "ratio_figure", "training_figure"]

Evaluation = tuple[Tensor, Tensor, Tensor]


def curve_figure(evaluations: Mapping[str, Evaluation]) -> Any:
    """The MissRate-HitRate curve of each model, with the box that no detector can leave.

    Args:
        evaluations: Scores, correctness and domain by the name of the model.
    """
    figure, axes = new_figure(figsize=(5.4, 4.2))
    with style():
        for index, (name, case) in enumerate(evaluations.items()):
            x, y, _ = openworld_curve(*case)
            color = COLORS[index % len(COLORS)]
            value = float(area(check_samples(*case)))
            axes.plot(x, y, color=color, label=f"{name}: {100 * value:.1f} %")
            axes.plot([x[0], x[0], 1], [0, y[-1], y[-1]], color=color, linestyle=":", alpha=0.6)
            if len(evaluations) == 1:
                axes.fill_between(x, 0, y, color=color, alpha=0.15)
        axes.set(
            xlabel="base side missed (1 - hit rate)",
            ylabel="new side hit",
            xlim=(0, 1.01),
            ylim=(0, 1),
            title="OpenworldAUC is the area; dotted: Acc_b · Acc_n",
        )
        axes.legend(loc="upper left")
    return figure


def histogram_figure(case: Evaluation) -> Any:
    """Scores of base and new samples, split by whether they are classified right.

    Args:
        case: Scores, correctness and domain.
    """
    scores, correct, is_base = (part.cpu() for part in case)
    figure, axes = new_figure(1, 2, sharey=True, sharex=True)
    right = correct > 0.5 if correct.is_floating_point() else correct
    finite = scores[scores.isfinite()].double()
    edges = torch.linspace(float(finite.min()), float(finite.max()) + 1e-12, 31).tolist()
    with style():
        for axis, side, name in zip(axes, (is_base, ~is_base), ("base", "new"), strict=True):
            kept = [scores[side & part].double().numpy() for part in (right, ~right)]
            axis.hist(kept, bins=edges, stacked=True, label=["right", "wrong"], color=COLORS[:2])
            axis.set(xlabel="detector score", title=f"{name} samples")
        axes[0].set_ylabel("samples")
        axes[1].legend()
    return figure


def ratio_figure(
    case: Evaluation, threshold: float, ratios: Sequence[float], *, draws: int = 50, seed: int = 0
) -> Any:
    """What the ratio of base to new samples does to overall accuracy, and not to OpenworldAUC.

    Args:
        case: Scores, correctness and domain.
        threshold: Of the overall accuracy.
        ratios: Base over new.
        draws: Stratified subsamples for each ratio; the bars are their 95 % range.
        seed: Of the subsamples.
    """
    samples = check_samples(*case)
    g = torch.Generator().manual_seed(seed)
    s, c, u, d = (part.cpu() for part in samples[:4])
    means, lows, highs = [], [], []
    for ratio in ratios:
        n_base = min(len(s), max(1, round(len(u) * ratio)))
        n_new = min(len(u), max(1, round(len(s) / ratio)))
        found = []
        for _ in range(draws):
            i = torch.randperm(len(s), generator=g)[:n_base]
            j = torch.randperm(len(u), generator=g)[:n_new]
            found.append(float(area(Samples(s[i], c[i], u[j], d[j]))))
        low, mean, high = torch.tensor(found).quantile(torch.tensor([0.025, 0.5, 0.975])).tolist()
        means.append(mean)
        lows.append(mean - low)
        highs.append(high - mean)
    overall = [overall_accuracy(samples, threshold, r / (1 + r))[0] for r in ratios]
    figure, axes = new_figure(figsize=(5.4, 3.8))
    with style():
        axes.errorbar(ratios, means, [lows, highs], marker="o", capsize=3, label="OpenworldAUC")
        axes.plot(ratios, overall, marker="s", label="overall accuracy")
        axes.set(
            xscale="log",
            xlabel="base samples per new sample",
            ylim=(0, 1),
            ylabel="value",
            title="What the mixture changes",
        )
        axes.set_xticks(list(ratios), [f"{r:g}" for r in ratios])
        axes.minorticks_off()
        axes.legend()
    return figure


def training_figure(history: Sequence[Mapping[str, float]]) -> Any:
    """The parts of the loss by epoch.

    Args:
        history: From `openworld_auc.GMoPTrainer.fit`.
    """
    figure, axes = new_figure()
    names = {"ce": "base classifier", "warm": "detectors' classes", "auc": "gated ranking"}
    with style():
        for key, name in names.items():
            values = [record[key] for record in history]
            axes.plot(range(1, len(values) + 1), values, label=name)
        axes.set(xlabel="epoch", ylabel="loss", ylim=(0, None), title="Training")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
    return figure

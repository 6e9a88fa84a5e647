"""The embedded demonstration: long-tailed handwritten digits, four methods, several seeds.

Each seed draws which digit is the most frequent and which the rarest, cuts scikit-learn's 1,797
real images down to a long-tailed training set and a balanced test set of 70 images a digit, and
trains one small network per method from the same start on the same batches. The settings were
chosen on other seeds.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from focal_sam.analysis import ClassSharpness, class_hessian_eigs, class_sharpness, loss_surface_2d
from focal_sam.data import long_tail_counts
from focal_sam.losses import LogitAdjustedLoss
from focal_sam.methods import SAM, FocalSAM, ImbSAM
from focal_sam.models import mlp
from focal_sam.sharpness import SharpnessMethod
from shared_core.data.digits import digit_arrays
from shared_core.errors import InputError

__all__ = [
    "METHODS",
    "DemoSettings",
    "DigitsTask",
    "SeedResult",
    "figures",
    "run_seed",
    "summarize",
    "table",
    "tell",
]

GROUPS = {"head": [0, 1, 2], "medium": [3, 4, 5, 6], "tail": [7, 8, 9]}


@dataclass(frozen=True)
class DemoSettings:
    """The settings of the demo.

    Attributes:
        imbalance_ratio: Most frequent over rarest class of the training set.
        epochs: Passes over the training set.
        batch_size: Images per step.
        lr: Learning rate at the start; annealed to 0 by a cosine, step by step.
        momentum: Of SGD.
        weight_decay: Of SGD.
        rho: ρ of all methods.
        gamma: γ of Focal-SAM.
        lam: λ of Focal-SAM.
        threshold: ImbSAM's tail: classes with fewer training images.
    """

    imbalance_ratio: int | float = 20
    epochs: int = 80
    batch_size: int = 64
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    rho: float = 0.3
    gamma: float = 6.0
    lam: float = 1.0
    threshold: int = 20


METHODS: dict[str, Callable[[nn.Module, list[int], DemoSettings], SharpnessMethod]] = {
    "sgd": lambda model, counts, s: SharpnessMethod(model, 1.0, rho=0.0),
    "sam": lambda model, counts, s: SAM(model, s.rho),
    "imbsam": lambda model, counts, s: ImbSAM(model, counts, s.rho, s.threshold),
    "focal": lambda model, counts, s: FocalSAM(model, counts, s.rho, s.gamma, s.lam),
}
TITLES = {"sgd": "SGD", "sam": "SAM", "imbsam": "ImbSAM", "focal": "Focal-SAM"}


class DigitsTask:
    """One seed's long-tailed training set and balanced test set; class 0 is the most frequent.

    Args:
        seed: Of the order of the classes and of the choice of images.
        settings: Of the demo.
        device: Where the images are put.

    Attributes:
        counts: Training images of each class.
        train: Images ``[n, 64]`` in [0, 1] and labels ``[n]``.
        test: The same, 70 of each class.
    """

    def __init__(self, seed: int, settings: DemoSettings, device: torch.device) -> None:
        pixels, digits = (torch.from_numpy(part) for part in digit_arrays())
        images = pixels.flatten(1).float() / 16
        self.counts = long_tail_counts(100, 10, imbalance_ratio=settings.imbalance_ratio)
        generator = torch.Generator().manual_seed(seed)
        train, test = [], []
        for digit, count in zip(torch.randperm(10, generator=generator), self.counts, strict=True):
            members = (digits == digit).nonzero().squeeze(1)
            members = members[torch.randperm(len(members), generator=generator)]
            test.append(members[:70])
            train.append(members[70 : 70 + count])
        self.train, self.test = (
            (
                images[torch.cat(parts)].to(device),
                torch.cat([torch.full((len(p),), rank) for rank, p in enumerate(parts)]).to(device),
            )
            for parts in (train, test)
        )


@dataclass
class SeedResult:
    """What one method reached with one seed, by ``head``, ``medium``, ``tail`` where not overall.

    Attributes:
        overall: Accuracy on the test set, in percent.
        accuracy: Accuracy of each group, in percent.
        sharpness: Rise of each group's training loss at distance 0.3 along its gradient.
        measured: The same with all its details.
        eigenvalue: Largest Hessian eigenvalue of each group's training loss.
        model: The trained network.
    """

    overall: float
    accuracy: dict[str, float]
    sharpness: dict[str, float]
    eigenvalue: dict[str, float]
    measured: ClassSharpness = field(repr=False)
    model: nn.Module = field(repr=False)


def _fit(model: nn.Module, method: str, task: DigitsTask, seed: int, s: DemoSettings) -> None:
    """Train in place. The three lines with `sharpness` are all that a method changes."""
    x, y = task.train
    criterion = LogitAdjustedLoss(task.counts)
    sharpness = METHODS[method](model, task.counts, s)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=s.lr, momentum=s.momentum, weight_decay=s.weight_decay
    )
    steps = s.epochs * math.ceil(len(y) / s.batch_size)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(s.epochs):
        order = torch.randperm(len(y), generator=generator)
        for rows in torch.split(order, s.batch_size):
            inputs, labels = x[rows.to(x.device)], y[rows.to(x.device)]

            def losses(inputs: Tensor = inputs, labels: Tensor = labels) -> Tensor:
                values: Tensor = criterion(model(inputs), labels)
                return values

            sharpness.backward(losses, labels)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()


def run_seed(
    seed: int,
    methods: Sequence[str] = tuple(METHODS),
    settings: DemoSettings | None = None,
    *,
    device: torch.device | None = None,
    progress: Callable[[str], None] = lambda method: None,
) -> dict[str, SeedResult]:
    """Train and measure every method on one seed's task, from the same initial weights.

    Args:
        seed: Of the task, the initial weights and the order of the batches.
        methods: Some of `METHODS`.
        settings: By default those of `DemoSettings`.
        device: By default the CPU.
        progress: Told every method when it is done.

    Raises:
        InputError: If a method is unknown.

    Examples:
        >>> results = run_seed(0, ["focal"], DemoSettings(epochs=1))
        >>> sorted(results["focal"].accuracy)
        ['head', 'medium', 'tail']
    """
    unknown = [m for m in methods if m not in METHODS]
    if unknown or not methods:
        raise InputError(f"methods {unknown or 'are none'}; accepted: {', '.join(METHODS)}")
    s = settings or DemoSettings()
    device = device or torch.device("cpu")
    task = DigitsTask(seed, s, device)
    criterion = LogitAdjustedLoss(task.counts)
    found = {}
    for method in methods:
        torch.manual_seed(seed)
        model = mlp(64, [64, 64], 10).to(device)
        _fit(model, method, task, seed, s)
        with torch.no_grad():
            right = (model(task.test[0]).argmax(1) == task.test[1]).double()
        recall = right.view(10, -1).mean(1) * 100
        sharp = class_sharpness(model, [task.train], 0.3, criterion=criterion, groups=GROUPS)
        top = class_hessian_eigs(
            model, [task.train], 1, which="top", criterion=criterion, groups=GROUPS
        )
        found[method] = SeedResult(
            overall=recall.mean().item(),
            accuracy={g: recall[classes].mean().item() for g, classes in GROUPS.items()},
            sharpness=sharp.sharpness,
            eigenvalue={g: values[0] for g, values in top.top.items()},
            measured=sharp,
            model=model,
        )
        progress(method)
    return found


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "values": list(values),
    }


def summarize(results: Sequence[dict[str, SeedResult]]) -> dict[str, Any]:
    """Means and standard deviations over the seeds, and paired differences from SGD.

    Args:
        results: What `run_seed` returned, one per seed.

    Returns:
        For each method: ``overall``, ``accuracy``, ``sharpness`` and ``eigenvalue`` (the last three
        by group), each as mean, std and per-seed values; and ``difference_from_sgd`` of the overall
        accuracy as mean, standard error and values.

    Examples:
        >>> seeds = [run_seed(s, ["sgd", "sam"], DemoSettings(epochs=1)) for s in (0, 1)]
        >>> sorted(summarize(seeds)["sam"]["difference_from_sgd"])
        ['mean', 'standard_error', 'values']
    """
    methods: dict[str, Any] = {}
    for method in results[0]:
        runs = [r[method] for r in results]
        entry: dict[str, Any] = {"overall": _spread([r.overall for r in runs])}
        for name in ("accuracy", "sharpness", "eigenvalue"):
            entry[name] = {g: _spread([getattr(r, name)[g] for r in runs]) for g in GROUPS}
        if method != "sgd" and "sgd" in results[0]:
            paired = [r[method].overall - r["sgd"].overall for r in results]
            error = statistics.stdev(paired) / math.sqrt(len(paired)) if len(paired) > 1 else None
            entry["difference_from_sgd"] = {
                "mean": statistics.fmean(paired),
                "standard_error": error,
                "values": paired,
            }
        methods[method] = entry
    return methods


def table(methods: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the printed table, from what `summarize` returned."""
    rows = []
    for method, entry in methods.items():
        overall, difference = entry["overall"], entry.get("difference_from_sgd")
        std = "" if overall["std"] is None else f" ±{overall['std']:.1f}"
        error = difference and difference["standard_error"]
        rows.append(
            {
                "method": TITLES[method],
                "accuracy %": f"{overall['mean']:.1f}{std}",
                "vs SGD": f"{difference['mean']:+.2f}" + (f" ±{error:.2f}" if error else "")
                if difference
                else "",
                "head": f"{entry['accuracy']['head']['mean']:.1f}",
                "medium": f"{entry['accuracy']['medium']['mean']:.1f}",
                "tail": f"{entry['accuracy']['tail']['mean']:.1f}",
                "head sharpness": f"{entry['sharpness']['head']['mean']:.3f}",
                "tail sharpness": f"{entry['sharpness']['tail']['mean']:.3f}",
                "head top eigenvalue": f"{entry['eigenvalue']['head']['mean']:.2f}",
                "tail top eigenvalue": f"{entry['eigenvalue']['tail']['mean']:.2f}",
            }
        )
    return rows


def tell(methods: dict[str, Any], seeds: int) -> str:
    """Say in words what was seen, losses included.

    Args:
        methods: What `summarize` returned.
        seeds: Number of seeds.
    """
    if not {"sgd", "focal"} <= methods.keys():
        return f"{seeds} seeds; without both SGD and Focal-SAM there is nothing to compare."
    sgd, focal = methods["sgd"], methods["focal"]
    ratio = {g: sgd["sharpness"][g]["mean"] / focal["sharpness"][g]["mean"] for g in GROUPS}
    difference = focal["difference_from_sgd"]
    error = difference["standard_error"]
    lines = [
        f"Over {seeds} seeds, Focal-SAM's loss rises {ratio['head']:.1f} times less than SGD's for "
        f"head classes and {ratio['tail']:.1f} times less for tail classes (a ratio below 1 would "
        "be sharper than SGD)."
    ]
    if "imbsam" in methods:
        kept = methods["imbsam"]["eigenvalue"]["head"]["mean"] / sgd["eigenvalue"]["head"]["mean"]
        flat = focal["eigenvalue"]["head"]["mean"] / sgd["eigenvalue"]["head"]["mean"]
        lines.append(
            f"ImbSAM's head keeps {kept:.2f} times SGD's largest eigenvalue, Focal-SAM's "
            f"{flat:.2f} times."
        )
    lines.append(
        f"Accuracy: {difference['mean']:+.2f} points against SGD"
        + (f" (standard error {error:.2f}" if error else " (one seed")
        + (f"; SGD's own standard deviation is {sgd['overall']['std']:.1f})." if error else ").")
    )
    if seeds < 5:
        lines.append("So few seeds say little about accuracy: leave out --quick for five.")
    better = [
        TITLES[m]
        for m, entry in methods.items()
        if m not in ("sgd", "focal") and entry["overall"]["mean"] >= focal["overall"]["mean"]
    ]
    if better:
        lines.append(f"On this small task {' and '.join(better)} did as well or better overall.")
    worse = [g for g in GROUPS if focal["accuracy"][g]["mean"] < sgd["accuracy"][g]["mean"]]
    if worse:
        lines.append(f"Focal-SAM lost accuracy against SGD on: {', '.join(worse)}.")
    return " ".join(lines)


def figures(
    results: Sequence[dict[str, SeedResult]], seed: int, settings: DemoSettings
) -> dict[str, Any]:
    """The pictures by name: ``comparison``, ``class_weights``, ``sharpness``, ``landscape``.

    Args:
        results: What `run_seed` returned, one per seed.
        seed: The seed of the first.
        settings: Of the demo.
    """
    from focal_sam.plots import (
        plot_class_weights,
        plot_loss_surface,
        plot_sharpness_bars,
    )
    from focal_sam.weights import FocalWeights, tail_weights

    task = DigitsTask(seed, settings, torch.device("cpu"))
    weights = {
        "SAM": torch.ones(10, dtype=torch.float64),
        "ImbSAM": tail_weights(task.counts, settings.threshold),
        "Focal-SAM": FocalWeights(task.counts, settings.gamma, settings.lam).values,
    }
    drawn = {
        "comparison": _comparison(summarize(results)),
        "class_weights": plot_class_weights(weights, task.counts),
    }
    criterion = LogitAdjustedLoss(task.counts)
    shown = {TITLES[m]: results[0][m].model for m in ("imbsam", "focal") if m in results[0]}
    if shown:
        drawn["landscape"] = plot_loss_surface(
            {
                title: loss_surface_2d(
                    model.cpu(),
                    [task.train],
                    criterion=criterion,
                    groups={"most frequent class": [0], "rarest class": [9]},
                    seed=seed,
                )
                for title, model in shown.items()
            }
        )
    measured = {TITLES[m]: [r[m].measured for r in results] for m in results[0]}
    drawn["sharpness"] = plot_sharpness_bars(measured, log=True)
    return drawn


def _comparison(methods: dict[str, Any]) -> Any:
    """Accuracy and largest eigenvalue of each group, side by side."""
    from shared_core.plots import COLORS, new_figure

    figure, (left, right) = new_figure(1, 2, figsize=(9.6, 3.8))
    width = 0.8 / len(methods)
    for i, (method, entry) in enumerate(methods.items()):
        places = [g + (i - (len(methods) - 1) / 2) * width for g in range(len(GROUPS))]
        for axes, name in ((left, "accuracy"), (right, "eigenvalue")):
            axes.bar(
                places,
                [entry[name][g]["mean"] for g in GROUPS],
                width,
                yerr=[entry[name][g]["std"] or 0 for g in GROUPS],
                color=COLORS[i],
                label=TITLES[method],
                error_kw={"elinewidth": 1, "alpha": 0.6},
            )
    for axes in (left, right):
        axes.set_xticks(range(len(GROUPS)), [f"{g} classes" for g in GROUPS])
    lowest = min(entry["accuracy"][g]["mean"] for entry in methods.values() for g in GROUPS)
    left.set_ylim(max(0, 10 * math.floor((lowest - 8) / 10)), 101)
    left.set_ylabel("test accuracy (%)")
    right.set_yscale("log")
    right.set_ylabel("largest Hessian eigenvalue")
    left.set_title("Accuracy: higher is better")
    right.set_title("Curvature of the training loss: lower is flatter")
    right.legend(loc="upper left")
    return figure

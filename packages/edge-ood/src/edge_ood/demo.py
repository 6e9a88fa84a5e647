"""The embedded demonstration: images of coloured shapes with long-tailed labels, and unknown ones.

Each seed draws a world of shared-core: up to three objects an image, 20 labels (5 shapes in 4
colours) whose frequencies fall exponentially in an order drawn with the seed. Outliers to train on
show other shapes, or backgrounds without an object; the unknown images to detect show further
shapes (near), known shapes in new colours (near), or further backgrounds (far). Every method trains
the same small network from the same start on the same ID batches. Settings were chosen on other
seeds.
"""

import copy
import math
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edge_ood.data import PairedLoader
from edge_ood.dilation import OERank, OESelector
from edge_ood.energy import joint_energy
from edge_ood.loop import collect, train_edge
from edge_ood.loss import EdgeLoss, EdgeSchedule
from edge_ood.losses import AsymmetricLoss, FocalMultiLabelLoss, MultiLabelOELoss
from edge_ood.metrics import (
    bucket_report,
    frequency_order,
    multilabel_map,
    sample_buckets,
    tail_curve,
)
from edge_ood.models import create_model
from edge_ood.shapes import OOD_SETS, known_images, outlier_images, unknown_images
from shared_core.data.shapes import image_tensor
from shared_core.errors import InputError
from shared_core.metrics import ood_metrics

__all__ = [
    "METHODS",
    "DemoSettings",
    "MethodResult",
    "SeedResult",
    "ShapesTask",
    "check_methods",
    "figures",
    "report",
    "run_seed",
    "summarize",
    "table",
    "tell",
]


@dataclass(frozen=True)
class DemoSettings:
    """The settings of the demo.

    Attributes:
        train: ID training images; as many OE images.
        test: ID test images.
        ood: Images of each OOD test set.
        imbalance: Most frequent over rarest label.
        epochs: Passes over the ID images.
        batch_size: ID images per step; as many OE images.
        lr: Largest learning rate of OneCycle, with AdamW.
        weight_decay: Of AdamW.
        alpha: α of EDGE. The paper's 1 costs a network as small as this much of its mAP.
        beta: β of EDGE.
        k: Size of the tail.
        tau: Transform epoch, as a fraction.
        tail_classes: The most frequent classes whose images are not tail-only.
    """

    train: int = 3000
    test: int = 2000
    ood: int = 500
    imbalance: float = 30.0
    epochs: int = 12
    batch_size: int = 128
    lr: float = 1e-2
    weight_decay: float = 1e-2
    alpha: float = 0.3
    beta: float = 0.1
    k: float = 0.25
    tau: float = 0.5
    tail_classes: int = 10


# Each makes a loss, and says whether it trains on outliers.
METHODS: dict[str, tuple[str, Callable[[DemoSettings], nn.Module], bool]] = {
    "bce": ("BCE", lambda s: nn.BCEWithLogitsLoss(), False),
    "edge": ("EDGE", lambda s: EdgeLoss(s.alpha, s.beta, s.k), True),
    "conf": ("EDGE, confidence only", lambda s: EdgeLoss(s.alpha, 0.0, s.k), True),
    "gap": ("EDGE, gap only", lambda s: EdgeLoss(0.0, s.beta, s.k), True),
    "oe": ("outlier exposure", lambda s: MultiLabelOELoss(), True),
    "asl": ("ASL", lambda s: AsymmetricLoss(reduction="mean"), False),
    "focal": ("focal", lambda s: FocalMultiLabelLoss(gamma=2.0), False),
}
# Mean reduction makes ASL and focal losses small; AdamW does not mind the scale of a loss.


class TensorBatches:
    """Shuffled batches of tensors, the same for the same seed."""

    def __init__(self, tensors: Sequence[Tensor], batch_size: int, seed: int) -> None:
        self.tensors, self.batch_size = tensors, batch_size
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return -(-len(self.tensors[0]) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for chosen in torch.split(self._order(), self.batch_size):
            yield tuple(tensor[chosen] for tensor in self.tensors)

    def _order(self) -> Tensor:
        return torch.randperm(len(self.tensors[0]), generator=self.generator)

    def skip(self, epochs: int) -> None:
        """Go on as if so many epochs were over."""
        for _ in range(epochs):
            self._order()


def pixels(images: np.ndarray) -> Tensor:
    """Images as the network wants them."""
    return ((image_tensor(images) - 0.5) / 0.25).contiguous(memory_format=torch.channels_last)


class ShapesTask:
    """The images of one seed.

    Args:
        seed: Of the world.
        settings: Of the demo.

    Attributes:
        train: ID images and labels to learn from.
        test: ID images and labels to test on.
        oe: Outliers to train on, by kind: ``objects`` and ``textures``.
        ood: Unknown images to detect, by name.
        class_names: Of the labels.
        counts: Training images of each label.
        pictures: Some images of every set, to look at.
    """

    def __init__(self, seed: int, settings: DemoSettings) -> None:
        s = settings
        train = known_images(seed, s.train, "train", s.imbalance)
        test = known_images(seed, s.test, "test", s.imbalance)
        outliers, unknown = outlier_images(seed, s.train), unknown_images(seed, s.ood)
        self.class_names = train.class_names
        self.train = pixels(train.images), torch.from_numpy(train.labels).float()
        self.test = pixels(test.images), torch.from_numpy(test.labels).float()
        self.counts = self.train[1].sum(0).long()
        self.oe = {name: pixels(images) for name, images in outliers.items()}
        self.ood = {name: pixels(images) for name, images in unknown.items()}
        self.pictures = {
            "ID": test.images[:12],
            **{f"OE {name}": images[:12] for name, images in outliers.items()},
            **{f"OOD {name}": images[:12] for name, images in unknown.items()},
        }


@dataclass
class MethodResult:
    """One method on one seed; rates are fractions."""

    mean_ap: float
    mean_ap_trapezoid: float
    ood: dict[str, dict[str, Any]]
    tail: dict[str, Any]
    tail_by_set: dict[str, dict[str, Any]]
    buckets: dict[str, dict[str, Any]]
    curve: list[dict[str, Any]]
    history: list[dict[str, float]]
    id_energies: Tensor
    tail_energies: Tensor
    ood_energies: dict[str, Tensor]

    @property
    def fpr95(self) -> float:
        """Mean over the OOD sets."""
        return statistics.fmean(m["fpr95"] for m in self.ood.values())

    @property
    def auroc(self) -> float:
        """Mean over the OOD sets."""
        return statistics.fmean(m["auroc"] for m in self.ood.values())


@dataclass
class SeedResult:
    """All methods on one seed."""

    seed: int
    methods: dict[str, MethodResult]
    task: ShapesTask
    ranking: list[OERank] = field(default_factory=list)
    id_spectrum: list[float] = field(default_factory=list)
    id_distance: float = math.nan


def check_methods(methods: Sequence[str]) -> None:
    """Refuse unknown methods, and none at all.

    Raises:
        InputError: Listing those that there are.
    """
    if not methods or any(m not in METHODS for m in methods):
        raise InputError(
            f"methods are {', '.join(methods) or 'none'}; accepted: {', '.join(METHODS)}"
        )


def run_seed(
    seed: int,
    methods: Sequence[str],
    settings: DemoSettings,
    *,
    device: torch.device | None = None,
    rank_outliers: bool = True,
    progress: Callable[[str], None] | None = None,
) -> SeedResult:
    """Train and test the methods on one seed.

    Args:
        seed: Of the world, the network and the batches.
        methods: Some of `METHODS`.
        settings: Of the demo.
        device: By default the CPU.
        rank_outliers: Whether to rank four candidate OE sets, with the first method's features.
        progress: Called with the name of each method that is done.

    Raises:
        InputError: If a method is unknown, or there is none.
    """
    check_methods(methods)
    device = device or torch.device("cpu")
    task = ShapesTask(seed, settings)
    result = SeedResult(seed, {}, task)
    warm: dict[str, Any] = {}
    for method in methods:
        model, history = _train(method, task, seed, settings, device, warm)
        if rank_outliers and not result.ranking:
            _rank(model, task, settings, result)
        result.methods[method] = _test(model, task, settings, history)
        if progress is not None:
            progress(method)
    return result


def _train(
    method: str,
    task: ShapesTask,
    seed: int,
    s: DemoSettings,
    device: torch.device,
    warm: dict[str, Any],
) -> tuple[nn.Module, list[dict[str, float]]]:
    """Train a method.

    Before τ, EDGE and its confidence term alone are one and the same training. It is done once:
    `warm` takes the state at τ of the first, and the second goes on from there.
    """
    _, make, with_outliers = METHODS[method]
    torch.manual_seed(seed)
    model = create_model("small_cnn", len(task.class_names))
    model = model.to(memory_format=torch.channels_last).to(device)
    batches: Any = TensorBatches(task.train, s.batch_size, seed)
    outliers = TensorBatches([torch.cat(list(task.oe.values()))], s.batch_size, seed + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.lr, weight_decay=s.weight_decay)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, s.lr, epochs=s.epochs, steps_per_epoch=len(batches), pct_start=0.2
    )
    pairs = PairedLoader(batches, outliers) if with_outliers else batches
    parts: tuple[Any, ...] = (model, optimizer, scheduler)
    start = 0
    before: list[dict[str, float]] = []
    if method in ("edge", "conf") and warm:
        start, before = warm["epoch"], warm["history"]
        for part, state in zip(parts, warm["states"], strict=True):
            part.load_state_dict(state)
        batches.skip(start)
        outliers.skip(start)  # as many batches as the ID images make

    def keep(epoch: int, means: dict[str, float]) -> None:
        before_tau = method in ("edge", "conf") and not EdgeSchedule(s.tau, s.epochs).is_on(epoch)
        if before_tau and start == 0:
            warm["epoch"], warm["history"] = epoch + 1, [*warm.get("history", []), means]
            warm["states"] = [copy.deepcopy(part.state_dict()) for part in parts]

    history = train_edge(
        model,
        pairs,
        make(s),
        optimizer,
        epochs=s.epochs,
        tau=s.tau,
        scheduler=scheduler,
        start_epoch=start,
        device=device,
        after_epoch=keep,
    )
    return model, before + history


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    return collect(model, torch.split(images, 500), description="testing").logits


def _test(
    model: nn.Module, task: ShapesTask, s: DemoSettings, history: list[dict[str, float]]
) -> MethodResult:
    labels = task.test[1]
    logits = _logits(model, task.test[0])
    energies = joint_energy(logits)
    unknown = {name: joint_energy(_logits(model, x)) for name, x in task.ood.items()}
    together = torch.cat(list(unknown.values()))
    present = labels.any(0)  # a rare label can be absent from the test images
    head = frequency_order(task.counts)[: s.tail_classes]
    tail_only = energies[~(labels[:, head] > 0).any(1) & labels.any(1)]
    return MethodResult(
        mean_ap=multilabel_map(logits[:, present], labels[:, present]),
        mean_ap_trapezoid=multilabel_map(logits[:, present], labels[:, present], ap="trapezoid"),
        ood={n: dict(ood_metrics(energies, e, rule="nearest")) for n, e in unknown.items()},
        tail=dict(ood_metrics(tail_only, together, rule="nearest")),
        tail_by_set={
            n: dict(ood_metrics(tail_only, e, rule="nearest")) for n, e in unknown.items()
        },
        buckets=bucket_report(energies, labels, together, class_counts=task.counts),
        curve=tail_curve(
            energies, labels, together, class_counts=task.counts, grid=range(0, 16, 3)
        ),
        history=history,
        id_energies=energies,
        tail_energies=tail_only,
        ood_energies=unknown,
    )


def _rank(model: Any, task: ShapesTask, s: DemoSettings, result: SeedResult) -> None:
    """Dilation distances of four candidate OE sets, on this model's features."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(512, 3, 32, 32, generator=generator).sub(0.5).div(0.25)
    mixture = torch.cat([x[:256] for x in task.oe.values()])
    mixture = mixture[torch.randperm(len(mixture), generator=generator)]
    candidates = {**{n: x[:512] for n, x in task.oe.items()}, "mixture": mixture, "noise": noise}
    device = next(model.parameters()).device
    selector = OESelector(model.features, device=device, max_batches=8)
    selector.fit(torch.split(task.train[0][:512], 64))
    with warnings.catch_warnings():
        # No candidate holds an ID image, however close a network that learned little puts them.
        warnings.filterwarnings("ignore", message=".*holds no ID images")
        result.ranking = selector.rank({n: torch.split(x, 64) for n, x in candidates.items()})
    assert selector.id_spectrum is not None
    assert selector.id_distance is not None
    result.id_spectrum, result.id_distance = selector.id_spectrum.tolist(), selector.id_distance


def _spread(values: Sequence[float]) -> dict[str, Any]:
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": std, "values": list(values)}


def summarize(results: Sequence[SeedResult]) -> dict[str, Any]:
    """Means and standard deviations over seeds, method by method."""
    summary: dict[str, Any] = {}
    for method in results[0].methods:
        runs = [r.methods[method] for r in results]
        entry: dict[str, Any] = {
            "mAP": _spread([r.mean_ap for r in runs]),
            "mAP_trapezoid": _spread([r.mean_ap_trapezoid for r in runs]),
            "fpr95": _spread([r.fpr95 for r in runs]),
            "auroc": _spread([r.auroc for r in runs]),
            "tail_fpr95": _spread([r.tail["fpr95"] for r in runs]),
            "tail_auroc": _spread([r.tail["auroc"] for r in runs]),
            "tail_n": [r.tail["n_id"] for r in runs],
            "ood": {
                name: {
                    key: _spread([r.ood[name][key] for r in runs])
                    for key in ("fpr95", "auroc", "aupr_in", "aupr_out", "fpr95_ood_positive")
                }
                for name in OOD_SETS
            },
            "tail_auroc_by_set": {
                name: _spread([r.tail_by_set[name]["auroc"] for r in runs]) for name in OOD_SETS
            },
            "buckets": {
                name: _spread([r.buckets[name]["auroc"] for r in runs]) for name in runs[0].buckets
            },
        }
        summary[method] = entry
    return summary


def tail_interval(result: MethodResult, draws: int = 200) -> tuple[float, float]:
    """95 % bootstrap interval of the tail-only AUROC, over the tail-only ID images."""
    generator, tail = torch.Generator().manual_seed(0), result.tail_energies
    unknown = torch.cat(list(result.ood_energies.values())).sort().values
    # Per ID sample its probability to lie above an OOD sample; the AUROC is their mean.
    below = torch.searchsorted(unknown, tail) + torch.searchsorted(unknown, tail, right=True)
    above = below.double() / (2 * len(unknown))
    picks = torch.randint(len(tail), (draws, len(tail)), generator=generator)
    low, high = above[picks].mean(1).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    return low, high


def _cell(spread: dict[str, Any], digits: int = 1) -> str:
    mean = f"{100 * spread['mean']:.{digits}f}"
    return mean if len(spread["values"]) < 2 else f"{mean} ± {100 * spread['std']:.{digits}f}"


COLUMNS = {
    "mAP %": "mAP",
    "FPR95 %": "fpr95",
    "AUROC %": "auroc",
    "tail FPR95 %": "tail_fpr95",
    "tail AUROC %": "tail_auroc",
}


def table(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """The comparison, one row a method: means over seeds and OOD sets, ± standard deviation."""
    return [
        {"method": METHODS[m][0], **{title: _cell(entry[key]) for title, key in COLUMNS.items()}}
        for m, entry in summary.items()
    ]


def tell(summary: dict[str, Any], results: Sequence[SeedResult]) -> str:
    """What the run showed, good and bad, computed from it."""
    sizes = [r.methods[next(iter(r.methods))].tail["n_id"] for r in results]
    parts = []
    if "bce" in summary:
        bce = summary["bce"]
        tail, all_ = 100 * bce["tail_auroc"]["mean"], 100 * bce["auroc"]["mean"]
        parts.append(
            f"Trained by BCE, JointEnergy ranks ID above unknown images with AUROC {all_:.1f} %, "
            f"but tail-only ID images with {tail:.1f} %"
            + (": below the unknown ones." if tail < 50 else ".")
        )
    if "bce" in summary and "edge" in summary:
        parts.append(_compare(summary["bce"], summary["edge"]))
    if "edge" in summary and "conf" in summary:
        edge, conf = summary["edge"], summary["conf"]
        change = 100 * (edge["tail_auroc"]["mean"] - conf["tail_auroc"]["mean"])
        share = 100 * (edge["fpr95"]["mean"] - conf["fpr95"]["mean"])
        parts.append(
            f"Against the confidence term alone, the gap term changes FPR95 by {share:+.1f} points "
            f"and tail AUROC by {change:+.1f}."
        )
    parts.append(f"Tail-only images: {', '.join(map(str, sizes))} by seed.")
    return " ".join(parts)


def _compare(bce: dict[str, Any], edge: dict[str, Any]) -> str:
    def change(key: str) -> float:
        return 100 * float(edge[key]["mean"] - bce[key]["mean"])

    text = (
        f"EDGE changes FPR95 by {change('fpr95'):+.1f} points, AUROC by {change('auroc'):+.1f}, "
        f"tail AUROC by {change('tail_auroc'):+.1f}, and mAP by {change('mAP'):+.1f}."
    )
    lost = [
        name
        for name in OOD_SETS
        if edge["ood"][name]["fpr95"]["mean"] >= bce["ood"][name]["fpr95"]["mean"]
    ]
    if lost:
        text += f" It does not lower FPR95 on: {', '.join(lost)}."
    return text


def report(results: Sequence[SeedResult]) -> dict[str, Any]:
    """What ``metrics.json`` holds."""
    summary = summarize(results)
    first = results[0]
    for method, entry in summary.items():
        run = first.methods[method]
        entry["tail_auroc_interval_first_seed"] = tail_interval(run)
        entry["tail_curve_first_seed"] = run.curve
    return {
        "methods": summary,
        "seeds": [r.seed for r in results],
        "outlier_ranking_first_seed": [
            {"name": r.name, "distance": r.distance, "n": r.n} for r in first.ranking
        ],
        "id_halves_distance_first_seed": first.id_distance,
        "summary": {"message": tell(summary, results), "rows": table(summary)},
    }


def figures(results: Sequence[SeedResult]) -> dict[str, Any]:
    """The pictures: the comparison over seeds, and the first seed in detail."""
    from edge_ood import plots

    summary, first = summarize(results), results[0]
    titles = {m: METHODS[m][0] for m in summary}
    shown = {m: r for m, r in first.methods.items() if m in ("bce", "edge")} or first.methods
    bucket = sample_buckets(first.task.test[1], first.task.counts)
    energies = {
        titles[m]: {
            **{
                f"ID {name}": r.id_energies[bucket == i]
                for i, name in enumerate(("head", "medium", "tail"))
            },
            **{f"OOD {name}": e for name, e in r.ood_energies.items()},
        }
        for m, r in shown.items()
    }
    curves = {
        titles[m]: (r.id_energies, torch.cat(list(r.ood_energies.values())))
        for m, r in first.methods.items()
    }
    spectra = {"ID": first.id_spectrum, **{r.name: r.spectrum for r in first.ranking}}
    return {
        "comparison": plots.plot_comparison(summary, titles, COLUMNS),
        "energies": plots.plot_energies(energies),
        "tail_curve": plots.plot_tail_curves(
            {titles[m]: r.curve for m, r in first.methods.items()}
        ),
        "roc": plots.plot_curves(curves),
        "training": plots.plot_training({titles[m]: r.history for m, r in first.methods.items()}),
        "spectra": plots.plot_spectra(spectra),
        "images": plots.plot_images(first.task.pictures),
    }

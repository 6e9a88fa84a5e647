"""The demo: a mini-CLIP trained on the spot, and unknown shapes and colors to be told apart.

The mini-CLIP learns from captions that name all attributes, as CLIP's were; the vocabulary of
negatives names only some of them, as no vocabulary names all that may come. Known are 16 pairs of a
color and a shape; *near* unknown images have one attribute that is not among the known classes'
nor in the vocabulary, *far* ones have two. The settings were chosen on the worlds of `TUNED_ON`;
none of them may be reported on.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from internet_neg.baselines import MCMDetector, NegLabelDetector
from internet_neg.config import InterNegConfig
from internet_neg.detector import InterNegDetector
from internet_neg.encoders import OpenClipEncoder
from internet_neg.errors import InterNegError
from internet_neg.evaluate import CONVENTIONS, StreamResult, compare
from internet_neg.mini_clip import FILE, load_mini_clip, save_mini_clip, train_mini_clip
from internet_neg.proxies import embed_images
from internet_neg.vocabulary import Vocabulary
from shared_core.data.shapes import (
    BACKGROUNDS,
    COLORS,
    FILLS,
    SHAPES,
    ShapesDataset,
    ShapesWorld,
    image_tensor,
    ood_pairs,
)
from shared_core.run import RunFolder, load_state, save_state

__all__ = [
    "CONVENTIONS",
    "TUNED_ON",
    "DemoSettings",
    "SeedResult",
    "demo_vocabulary",
    "figures",
    "get_encoder",
    "order_holds",
    "run_seed",
    "summarize",
    "table",
    "tell",
]

TUNED_ON = (100, 101)
SETS = ("near", "far")
METHODS = ("MCM", "NegLabel", "InterNeg, text only", "InterNeg")
NO_FILTER = "InterNeg without the filter"


@dataclass(frozen=True)
class DemoSettings:
    """Settings of the demo.

    Attributes:
        steps: Training steps of the mini-CLIP.
        images: Its training images.
        per_set: Test images, known, near and far each.
        shots: Images of each known class.
        negatives: M of InterNeg: of 300, 600 and 900 the one with the lowest FPR95.
        neglabel_negatives: M of NegLabel, chosen alike.
        text_only_negatives: M of InterNeg without the stream, chosen alike.
        extra: E.
        scale_factor: s over the scale that the mini-CLIP learned; a scale trained for 400 steps is
            far below CLIP's 100.
        batch_size: Images of the stream at a time.
        ablation: Whether to run InterNeg without the filter too.
    """

    steps: int = 400
    images: int = 20_000
    per_set: int = 800
    shots: int = 16
    negatives: int = 600
    neglabel_negatives: int = 300
    text_only_negatives: int = 900
    extra: int = 600
    scale_factor: float = 4.0
    batch_size: int = 64
    ablation: bool = False


@dataclass
class SeedResult:
    """What one seed gave: see `internet_neg.evaluate.compare`."""

    metrics: dict[str, dict[str, dict[str, Any]]]
    streams: dict[tuple[str, str], StreamResult]
    detector: InterNegDetector
    pixels: dict[str, np.ndarray]
    captions: dict[str, list[str]]
    negatives: list[Any]


def demo_vocabulary() -> Vocabulary:
    """Words and short phrases about shapes 0 to 11 and colors 0 to 8, fills and backgrounds.

    Examples:
        >>> words = demo_vocabulary()
        >>> any(SHAPES[15] in word or COLORS[11] in word for word in words.nouns)
        False
    """
    shapes, colors = SHAPES[:12], COLORS[:9]
    nouns = [*shapes]
    nouns += [f"{color} {shape}" for color in colors for shape in shapes]
    nouns += [f"{fill} {shape}" for fill in FILLS for shape in shapes]
    nouns += [f"{fill} {color} {shape}" for fill in FILLS for color in colors for shape in shapes]
    nouns += [f"{shape} on a {ground} background" for shape in shapes for ground in BACKGROUNDS]
    adjectives = [*colors, *FILLS, *BACKGROUNDS]
    adjectives += [f"{fill} {color}" for fill in FILLS for color in colors]
    return Vocabulary(tuple(nouns), tuple(adjectives))


def get_encoder(
    run: RunFolder, settings: DemoSettings, seed: int, device: torch.device
) -> OpenClipEncoder:
    """The mini-CLIP of the run's folder if it was trained alike, else a new one.

    Args:
        run: Where it is kept.
        settings: Of the demo.
        seed: Of the training.
        device: Where to train.
    """
    made = {"steps": settings.steps, "images": settings.images, "seed": seed}
    marker = run.path / "mini_clip_settings.safetensors"
    if (run.path / FILE).is_file() and marker.is_file() and load_state(marker) == made:
        return load_mini_clip(run.path, device)
    encoder, history = train_mini_clip(
        steps=settings.steps, images=settings.images, seed=seed, device=device
    )
    for record in history:
        run.log(**record)
    save_mini_clip(run.path, encoder)
    save_state(marker, made)
    return load_mini_clip(run.path, device)


def _configs(settings: DemoSettings, scale: float) -> InterNegConfig:
    return InterNegConfig(
        negatives=settings.negatives,
        extra=settings.extra,
        groups=1,
        templates=(
            "a photo of a {}",
            "the nice {}",
            "a picture of the {}",
            "a good photo of the {}",
        ),
        class_prompt="the nice {}",
        noun_prompt="the nice {}",
        adjective_prompt="this is a {} photo",
        temperature=1 / (settings.scale_factor * scale),
        shots=settings.shots,
        # The model is small and the scale low: most images pass the gate, and the filter decides.
        max_gate_rate=1.0,
    )


def run_seed(encoder: OpenClipEncoder, seed: int, settings: DemoSettings) -> SeedResult:
    """Fit and compare all methods on the world of one seed.

    Args:
        encoder: The mini-CLIP.
        seed: Of the world, the shots and the order of the stream.
        settings: Of the demo.

    Raises:
        InterNegError: If the settings were chosen on that seed.
    """
    if seed in TUNED_ON:
        raise InterNegError(f"the demo's settings were chosen on seed {seed}; take another")
    world = ShapesWorld(seed)
    pairs = ood_pairs()
    shots = world.classification(pairs["id"], settings.shots)
    sets = world.id_ood(n=settings.per_set)

    def embed(data: ShapesDataset) -> Tensor:
        return embed_images(encoder, image_tensor(np.asarray(data.images)))

    source = {"features": embed(shots), "labels": torch.tensor(shots.targets)}
    names, vocabulary = shots.class_names, demo_vocabulary()
    config = _configs(settings, encoder.scale)

    def changed(**changes: Any) -> InterNegConfig:
        return InterNegConfig(**{**asdict(config), **changes})

    detectors: dict[str, InterNegDetector] = {
        "MCM": MCMDetector(encoder, names, InterNegConfig(class_prompt="the nice {}")),
        "NegLabel": NegLabelDetector(
            encoder, names, changed(negatives=settings.neglabel_negatives), vocabulary
        ),
        "InterNeg, text only": InterNegDetector(
            encoder,
            names,
            changed(negatives=settings.text_only_negatives, text_only=True),
            vocabulary,
        ),
        "InterNeg": InterNegDetector(encoder, names, config, vocabulary),
    }
    if settings.ablation:
        detectors[NO_FILTER] = InterNegDetector(
            encoder, names, changed(filter_inverted=False), vocabulary
        )
    for detector in detectors.values():
        detector.fit(source)
    metrics, streams = compare(
        detectors,
        embed(sets["id"]),
        {name: embed(sets[name]) for name in SETS},
        labels=torch.tensor(sets["id"].targets),
        batch_size=settings.batch_size,
        seeds=[seed],
    )
    detector = detectors["InterNeg"]
    return SeedResult(
        metrics,
        streams,
        detector,
        {name: np.asarray(sets[name].images) for name in ("id", *SETS)},
        {name: [sets[name].class_names[t] for t in sets[name].targets] for name in ("id", *SETS)},
        detector.negatives,
    )


def summarize(results: Sequence[SeedResult]) -> dict[str, Any]:
    """Mean over seeds and values by seed of each metric, by method and set."""
    found: dict[str, Any] = {}
    for method in results[0].metrics:
        found[method] = {}
        for name in (*SETS, "average"):
            entries = [result.metrics[method][name] for result in results]
            keys = [key for key in entries[0] if key not in ("by_seed", "n_id", "n_ood")]
            found[method][name] = {
                key: {
                    "mean": sum(entry[key] for entry in entries) / len(entries),
                    "values": [entry[key] for entry in entries],
                }
                for key in keys
            }
    return found


def table(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """The table that the demo prints: percent, means over seeds."""

    def percent(method: str, name: str, key: str) -> float:
        return round(100 * float(summary[method][name][key]["mean"]), 1)

    return [
        {
            "method": method,
            **{
                f"{name} {short}": percent(method, name, key)
                for name in SETS
                for short, key in (("AUROC", "auroc"), ("FPR95 (ID+)", "fpr95"))
            },
            "mean AUROC": percent(method, "average", "auroc"),
            "mean FPR95 (ID+)": percent(method, "average", "fpr95"),
            "mean FPR95 (OOD+)": percent(method, "average", "fpr95_ood_positive"),
        }
        for method in summary
    ]


def order_holds(summary: dict[str, Any]) -> bool:
    """Whether InterNeg is ahead of NegLabel, and that of MCM, in mean AUROC and FPR95 (ID+).

    Args:
        summary: What `summarize` returned.
    """
    means = [summary[method]["average"] for method in ("InterNeg", "NegLabel", "MCM")]
    aurocs = [float(entry["auroc"]["mean"]) for entry in means]
    fprs = [float(entry["fpr95"]["mean"]) for entry in means]
    return aurocs[0] > aurocs[1] > aurocs[2] and fprs[0] < fprs[1] < fprs[2]


def tell(summary: dict[str, Any], seeds: int) -> str:
    """What the demo saw, in words, losses included."""

    def value(method: str, key: str, name: str = "average") -> float:
        return 100 * float(summary[method][name][key]["mean"])

    ours = "InterNeg"
    parts = [
        f"Mean over near and far sets and {seeds} seed{'s' if seeds > 1 else ''}: InterNeg "
        f"{value(ours, 'auroc'):.1f} AUROC, {value(ours, 'fpr95'):.1f} % FPR95 (ID+); "
        f"NegLabel {value('NegLabel', 'auroc'):.1f}, {value('NegLabel', 'fpr95'):.1f}; "
        f"MCM {value('MCM', 'auroc'):.1f}, {value('MCM', 'fpr95'):.1f}."
    ]
    lost = []
    for method in [m for m in summary if m != ours]:
        for name in SETS:
            for key, label, sign in (
                ("auroc", "AUROC", 1),
                ("fpr95", "FPR95 (ID+)", -1),
                ("fpr95_ood_positive", "FPR95 (OOD+)", -1),
            ):
                difference = sign * (value(ours, key, name) - value(method, key, name))
                if difference < 0:
                    lost.append(f"{method} in {label} on {name} by {-difference:.1f}")
    parts.append(
        "InterNeg is behind " + "; ".join(lost) + "."
        if lost
        else "InterNeg is not behind on any set."
    )
    gated = summary[ours]["average"]
    parts.append(
        f"It inverted {value(ours, 'gated_id'):.0f} % of the known and "
        f"{value(ours, 'gated_ood'):.0f} % of the unknown images; its bank held "
        f"{gated['bank']['mean']:.0f} texts at the end."
    )
    return " ".join(parts)


def figures(results: Sequence[SeedResult]) -> dict[str, Any]:
    """The pictures by name, of the first seed: ``roc``, ``hist``, ``bank``, ``gated``."""
    from internet_neg.plots import plot_bank, plot_gated, plot_margins, plot_roc

    first = results[0]
    n_id = len(first.pixels["id"])
    drawn = {
        "roc": plot_roc(first.streams, n_id),
        "hist": plot_margins(first.streams, n_id),
        "bank": plot_bank(
            {key: stream for key, stream in first.streams.items() if key[0] == "InterNeg"}
        ),
    }
    images, titles = [], []
    for name in SETS:
        stream = first.streams["InterNeg", name]
        pixels = np.concatenate([first.pixels["id"], first.pixels[name]])
        captions = first.captions["id"] + first.captions[name]
        accepted = stream.order[stream.output.accepted.cpu()].tolist()[:16]
        images += [pixels[i] for i in accepted]
        titles += [("known: " if i < n_id else "") + captions[i] for i in accepted]
    if images:
        drawn["gated"] = plot_gated(np.stack(images), titles)
    return {name: figure for name, figure in drawn.items() if figure is not None}

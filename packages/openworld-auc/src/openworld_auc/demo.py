"""The demo: what the metric sees, and prompts tuned for a small CLIP trained on the spot."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from openworld_auc.backbone import OpenClipBackbone
from openworld_auc.gmop import GMoP, GMoPConfig
from openworld_auc.intervals import Interval, openworld_auc_ci
from openworld_auc.presets import METHODS
from openworld_auc.report import fit_threshold, openworld_report
from openworld_auc.train import Features, GMoPTrainer, TrainConfig, evaluation
from shared_core.contrastive import WordTokenizer, train_contrastive
from shared_core.data.shapes import ShapesWorld

__all__ = ["DemoSettings", "Task", "metric_properties", "pretrain", "run_seed", "summarize", "tell"]

COLORS = ("red", "orange", "yellow", "green", "blue", "purple")
BASE_SHAPES = ("circle", "square", "triangle")
NEW_SHAPES = ("cross", "star", "ring")
TEMPLATE = "a photo of a {}."
CAPTIONS = (TEMPLATE, "the nice {}", "a picture of the {}", "a good photo of the {}", "{}")

# open_clip's own small ResNet; a word vocabulary, because the usual one costs more than the rest.
MINI_CLIP: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"layers": (1, 1, 1, 1), "width": 16, "image_size": 32},
    "text_cfg": {"context_length": 24, "width": 64, "heads": 4, "layers": 2},
}


@dataclass(frozen=True)
class DemoSettings:
    """Settings of part B.

    Sizes are what two minutes of one core allow. Severity and learning rates were chosen by
    OpenworldAUC on seeds 100 and 101 with a pretraining of seed 100, apart from those shown:
    severity from 0.6 and 1.0, because at 0.6 every tuned method lost to zero-shot; CoOp's rate from
    0.03, 0.1 and 0.3; GMoP's from these and 1.0, its detectors' from 0.03, 0.1 and 0.3. The paper's
    loss weights are untouched.

    Attributes:
        pretraining_images: Captioned images that the small CLIP learns from.
        pretraining_steps: Steps on them.
        batch_size: Images a step.
        severity: How far images of the task are from those of pretraining, 0 to 1.
        shots: Training images of each base class.
        test_images: Test images of each class.
        epochs: Passes over the shots.
        lr: Learning rate of GMoP's base prompt; the paper's 0.002 does nothing to so small a model.
        lr_coop: That of CoOp's prompt.
        lr_detector: That of GMoP's detectors.
        n_ctx_detector: Context length of detectors.
    """

    pretraining_images: int = 4000
    pretraining_steps: int = 220
    batch_size: int = 144
    severity: float = 1.0
    shots: int = 16
    test_images: int = 40
    epochs: int = 18
    lr: float = 0.3
    lr_coop: float = 0.3
    lr_detector: float = 0.03
    n_ctx_detector: int = 4


QUICK = DemoSettings(
    pretraining_images=2000, pretraining_steps=100, batch_size=108, test_images=20, epochs=8
)


def pretrain(
    settings: DemoSettings, *, seed: int = 0, device: torch.device | None = None
) -> OpenClipBackbone:
    """Train the small CLIP on captioned images of the 36 classes.

    Args:
        settings: Sizes.
        seed: Of the network and the images.
        device: Where to train.
    """
    from open_clip.model import CLIP

    world = ShapesWorld(seed)
    batch = world.sample(
        settings.pretraining_images, shapes=[*BASE_SHAPES, *NEW_SHAPES], colors=COLORS
    )
    names = world.captions(batch.attrs, seed, style="simple")
    rng = np.random.default_rng(seed)
    captions = [
        CAPTIONS[k].format(n)
        for k, n in zip(rng.integers(len(CAPTIONS), size=len(names)), names, strict=True)
    ]
    tokenizer = WordTokenizer.from_texts(captions, context_length=24)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = {
            **MINI_CLIP,
            "text_cfg": {**MINI_CLIP["text_cfg"], "vocab_size": tokenizer.vocab_size},
        }
        model = CLIP(**config)
    train_contrastive(
        model,
        pixels(batch.images),
        captions,
        tokenizer=tokenizer,
        steps=settings.pretraining_steps,
        batch_size=settings.batch_size,
        seed=seed,
        device=device,
    )
    return OpenClipBackbone(model, tokenizer)


def pixels(images: np.ndarray, severity: float = 0.0, seed: int = 0) -> Tensor:
    """Images as tensors; with a severity: a warm cast, less contrast, noise and clutter.

    Args:
        images: Bytes, [n, 32, 32, 3].
        severity: 0 to 1.
        seed: Of noise and clutter.
    """
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
    if severity:
        g = torch.Generator().manual_seed(seed)
        coarse = torch.rand(len(x), 3, 6, 6, generator=g) - 0.5
        x = x + 0.5 * severity * torch.nn.functional.interpolate(coarse, 32, mode="bilinear")
        x = x * torch.tensor([1.1, 0.95, 0.75])[:, None, None] ** severity
        x = 0.5 + (x - 0.5) * (1 - 0.3 * severity)
        x = x + 0.1 * severity * torch.randn(x.shape, generator=g)
    return 4 * (x.clamp(0, 1) - 0.5)


class Task(NamedTuple):
    """Image features of one seed's draw of the task.

    Attributes:
        train: Few shots of base classes.
        base: Test images of base classes.
        new: Test images of new classes.
        base_classes: Names.
        new_classes: Names.
    """

    train: Features
    base: Features
    new: Features
    base_classes: list[str]
    new_classes: list[str]

    @classmethod
    def draw(cls, backbone: OpenClipBackbone, settings: DemoSettings, seed: int) -> "Task":
        """Draw images with a seed of their own and encode them once."""
        splits = ShapesWorld(1000 + seed).base_new(
            18,
            18,
            shapes=[*BASE_SHAPES, *NEW_SHAPES],
            colors=COLORS,
            n_per_class=settings.shots,
            n_test=settings.test_images,
        )
        parts = []
        for number, name in enumerate(("train", "base", "new")):
            data = splits[name]
            images = pixels(np.stack(list(data.images)), settings.severity, 10 * seed + number)
            with torch.no_grad():
                chunks = [
                    backbone.encode_image(x.to(backbone.device)) for x in torch.split(images, 256)
                ]
            parts.append((torch.cat(chunks).cpu(), torch.tensor(data.targets)))
        train, base, new = parts
        names = (list(splits[part].class_names) for part in ("base", "new"))
        return cls(train, base, new, *names)


def methods(settings: DemoSettings, seed: int) -> dict[str, GMoPConfig]:
    """What is compared, by name: the paper's comparison, then GMoP with one thing changed."""
    shared: dict[str, Any] = {"template": TEMPLATE, "seed": seed}
    gmop = GMoPConfig(n_ctx_detector=settings.n_ctx_detector, **shared)
    return {
        "zero-shot": replace(METHODS["zeroshot"].model, **shared),
        "CoOp": replace(METHODS["coop"].model, **shared),
        "GMoP": gmop,
        "GMoP, λ = 0": replace(gmop, lam=0.0),
        "GMoP, zero-shot detector": replace(
            gmop, detector="mcm", detector_prompt="template", lam=0.0, alpha=0.0
        ),
        "GMoP, tuned prompt for new": replace(gmop, new_prompt="tuned"),
    }


class SeedResult(NamedTuple):
    """What one seed gave.

    Attributes:
        evaluations: Scores, correctness and domain by method.
        history: Losses of GMoP by epoch.
    """

    evaluations: dict[str, tuple[Tensor, Tensor, Tensor]]
    history: list[dict[str, float]]


def run_seed(
    backbone: OpenClipBackbone,
    settings: DemoSettings,
    seed: int,
    on_method: Callable[[str], None] | None = None,
) -> SeedResult:
    """Tune and evaluate every method on one draw of the task.

    Args:
        backbone: From `pretrain`.
        settings: Sizes.
        seed: Of images and contexts.
        on_method: Called with the name of each finished method.
    """
    task = Task.draw(backbone, settings, seed)
    evaluations: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    history: list[dict[str, float]] = []
    recipe = TrainConfig(
        lr=settings.lr, lr_detector=settings.lr_detector, epochs=settings.epochs, seed=seed
    )
    tuned: dict[GMoPConfig, GMoP] = {}
    recipes = {"CoOp": replace(recipe, lr=settings.lr_coop)}
    for name, config in methods(settings, seed).items():
        model = GMoP(backbone, task.base_classes, config=config).set_classes(task.new_classes)
        same = replace(config, new_prompt="template")
        if same in tuned:  # only what is asked of the contexts differs, not their training
            model.load_contexts(tuned[same].contexts())
        elif config.base_prompt == "tuned":
            losses = GMoPTrainer(model, task.train, config=recipes.get(name, recipe)).fit()
            history = losses if name == "GMoP" else history
            tuned[same] = model
        evaluations[name] = evaluation(model, task.base, task.new)
        if on_method is not None:
            on_method(name)
    return SeedResult(evaluations, history)


def metric_properties(seed: int = 0, n: int = 2000) -> tuple[list[dict[str, Any]], Interval]:
    """Part A: what HM, AUROC, overall accuracy and OpenworldAUC see of a changed evaluation.

    Args:
        seed: Of the synthetic scores.
        n: Samples of each domain.

    Returns:
        Rows in percent, and the interval of the first one's OpenworldAUC.
    """
    g = torch.Generator().manual_seed(seed)
    is_base = torch.arange(2 * n) < n
    scores = torch.randn(2 * n, generator=g).double() + 2 * is_base
    correct = torch.rand(2 * n, generator=g) < torch.where(is_base, 0.85, 0.75)
    threshold = fit_threshold(scores, is_base, rule="tpr95")
    shuffled = torch.randperm(2 * n, generator=g)
    chance = torch.rand(2 * n, generator=g) < 0.1
    few_base = is_base & (torch.arange(2 * n) % 10 > 0)
    few_new = ~is_base & (torch.arange(2 * n) % 10 > 0)
    cases = {
        "as it is": (scores, correct, is_base),
        "detector scores shuffled": (scores[shuffled], correct, is_base),
        "predictions at random": (scores, chance, is_base),
        "base : new = 1 : 10": (scores[~few_base], correct[~few_base], is_base[~few_base]),
        "base : new = 10 : 1": (scores[~few_new], correct[~few_new], is_base[~few_new]),
    }
    rows = []
    for name, case in cases.items():
        report = openworld_report(*case, threshold=threshold)
        interval = openworld_auc_ci(*case)
        rows.append(
            {
                "evaluation": name,
                "HM": _percent(report.hm),
                "AUROC": _percent(report.auroc),
                "overall": _percent(report.overall_acc or 0.0),
                "OpenworldAUC": _percent(report.openworld_auc),
                "95 % interval": f"{_percent(interval.low)}-{_percent(interval.high)}",
            }
        )
    return rows, openworld_auc_ci(*cases["as it is"])


def _percent(value: float) -> float:
    return round(100 * value, 1)


def summarize(results: Sequence[SeedResult]) -> dict[str, dict[str, Any]]:
    """Means over seeds, in percent, and the difference in OpenworldAUC from zero-shot.

    Args:
        results: One for each seed.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in results[0].evaluations:
        reports = [openworld_report(*r.evaluations[name]) for r in results]
        values = torch.tensor([100 * r.openworld_auc for r in reports], dtype=torch.float64)
        entry: dict[str, Any] = {
            key: 100 * sum(getattr(r, key) for r in reports) / len(reports)
            for key in ("base_acc", "new_acc", "hm", "auroc", "openworld_auc")
        }
        entry["values"] = values.tolist()
        intervals = [openworld_auc_ci(*r.evaluations[name]) for r in results]
        entry["intervals"] = [[100 * i.low, 100 * i.high] for i in intervals]
        # Of the mean over seeds, for these prompts: what other test images would give.
        reach = 1.96 * 100 * math.sqrt(sum(i.se**2 for i in intervals)) / len(intervals)
        entry["interval"] = [entry["openworld_auc"] - reach, entry["openworld_auc"] + reach]
        found[name] = entry
    reference = torch.tensor(found["zero-shot"]["values"], dtype=torch.float64)
    for entry in found.values():
        difference = torch.tensor(entry["values"], dtype=torch.float64) - reference
        entry["difference_from_zero_shot"] = {
            "mean": float(difference.mean()),
            "standard_error": float(difference.std() / len(difference) ** 0.5)
            if len(difference) > 1
            else None,
        }
    return found


def table(summary: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The summary as rows for a person."""
    rows = []
    for name, entry in summary.items():
        change = entry["difference_from_zero_shot"]
        error = change["standard_error"]
        shown = f"{change['mean']:+.1f}" + ("" if error is None else f" ± {error:.1f}")
        rows.append(
            {
                "method": name,
                "base %": round(entry["base_acc"], 1),
                "new %": round(entry["new_acc"], 1),
                "HM": round(entry["hm"], 1),
                "AUROC": round(entry["auroc"], 1),
                "OpenworldAUC": round(entry["openworld_auc"], 1),
                "95 % interval": "{:.1f}-{:.1f}".format(*entry["interval"]),
                "vs zero-shot": "" if name == "zero-shot" else shown,
            }
        )
    return rows


def tell(summary: Mapping[str, Mapping[str, Any]], seeds: int) -> str:
    """What was seen, also where the method loses.

    Args:
        summary: From `summarize`.
        seeds: How many seeds.
    """
    value = {name: entry["openworld_auc"] for name, entry in summary.items()}
    auroc = {name: entry["auroc"] for name, entry in summary.items()}
    parts = [
        f"Over {seeds} seeds GMoP has an OpenworldAUC of {value['GMoP']:.1f} %, CoOp "
        f"{value['CoOp']:.1f} %, zero-shot CLIP {value['zero-shot']:.1f} %."
    ]
    best = max(value, key=lambda name: value[name])
    if best != "GMoP":
        parts.append(f"The best of the table is not GMoP but '{best}' ({value[best]:.1f} %).")
    if auroc["GMoP"] < auroc["zero-shot"]:
        parts.append(
            f"GMoP's detectors lose to the zero-shot detector here (AUROC {auroc['GMoP']:.1f} "
            f"against {auroc['zero-shot']:.1f} %)."
        )
    change = value["GMoP"] - value["GMoP, λ = 0"]
    verb = "adds" if change > 0 else "costs"
    parts.append(f"The gated ranking term {verb} {abs(change):.1f} points here.")
    return " ".join(parts)

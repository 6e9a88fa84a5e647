"""OpenworldAUC and GMoP's step beside their peers.

Run with ``nox -s bench -- openworld-auc``, or by hand as ``python -P benchmarks/openworld_auc.py``.
Peers:

- the metric by scikit-learn's ROC curve on Python lists, as the published code computes it: wrong
  samples are moved beyond the other side's scores, then ``roc_curve`` and trapezoids;
- the same curve in vectorised numpy, without lists and scikit-learn's checks;
- torchmetrics' ``BinaryAUROC``, which ranks without correctness;
- GMoP's training step restated plainly: each prompt encoded on its own at the full context length,
  zero-shot prompts and both image passes anew in each step. The image tower is the same.

Memory is the peak of the resident size of a fresh process above what it held before the call.

``--cifar`` tunes prompts of a small CLIP on the CIFAR-10 images that ``TENFOLD_DATA`` names: six
base classes, four held out. With ``--steps`` it takes as long as there is time for.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from openworld_auc import GMoP, GMoPConfig, GMoPTrainer, openworld_auc, openworld_auc_ci
from openworld_auc.backbone import OpenClipBackbone
from openworld_auc.presets import METHODS
from openworld_auc.train import TrainConfig, evaluation
from shared_core.contrastive import WordTokenizer, train_contrastive
from shared_core.device import environment, measure_time, peak_memory, select_device
from shared_core.run import write_json


def by_roc_curve(s: list[float], c: list[bool], u: list[float], d: list[bool]) -> float:
    """The area from a ROC curve over edited scores, in lists and float64."""
    from sklearn.metrics import auc, roc_curve

    low, high = min(*s, *u) - 1, max(*s, *u) + 1
    base = [x if right else low for x, right in zip(s, c, strict=True)]
    new = [x if right else high for x, right in zip(u, d, strict=True)]
    x, y, _ = roc_curve([1] * len(base) + [0] * len(new), base + new, drop_intermediate=False)
    return float(auc(x, y))


def by_numpy(s: np.ndarray, c: np.ndarray, u: np.ndarray, d: np.ndarray) -> float:
    """The same area by one sort in numpy."""
    low, high = min(s.min(), u.min()) - 1, max(s.max(), u.max()) + 1
    scores = np.concatenate([np.where(c, s, low), np.where(d, u, high)])
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    hits = np.append(0, np.cumsum(order < len(s))[ends])
    return float(np.trapezoid(hits, np.append(0, ends + 1 - hits[1:])) / len(s) / len(u))


def metric(total: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """Time the area of `total` samples, half base and half new."""
    from torchmetrics.functional.classification import binary_auroc

    g = torch.Generator().manual_seed(0)
    is_base = torch.arange(total) % 2 == 0
    scores = torch.rand(total, generator=g, dtype=torch.float64) * 0.5 + 0.25 * is_base
    correct = torch.rand(total, generator=g) < 0.75
    scores, correct, is_base = (x.to(device) for x in (scores, correct, is_base))

    def roc() -> float:
        sides = [(scores[m].tolist(), correct[m].tolist()) for m in (is_base, ~is_base)]
        return by_roc_curve(*sides[0], *sides[1])

    def in_numpy() -> float:
        sides = [(scores[m].cpu().numpy(), correct[m].cpu().numpy()) for m in (is_base, ~is_base)]
        return by_numpy(*sides[0], *sides[1])

    ours = float(openworld_auc(scores, correct, is_base))
    labels = is_base.long()
    timings = measure_time(
        lambda: openworld_auc(scores, correct, is_base),
        roc,
        in_numpy,
        lambda: binary_auroc(scores, labels, validate_args=False),
        device=device,
        repeats=repeats,
        warmup=1,
    )
    names = ("openworld_auc", "roc_curve_on_lists", "roc_in_numpy", "torchmetrics_auroc")
    return {
        "samples": total,
        "difference_from_roc_curve": abs(ours - roc()),
        "difference_from_numpy": abs(ours - in_numpy()),
        "median_seconds": {n: t.median for n, t in zip(names, timings, strict=True)},
        "quartiles": {n: t.interval for n, t in zip(names, timings, strict=True)},
        "times_faster_than_roc_curve": timings[1].median / timings[0].median,
        "times_faster_than_numpy": timings[2].median / timings[0].median,
    }


def memory_of(which: str, total: int) -> int:
    """Bytes by which one call raises this process's resident size; for a process of its own."""
    g = torch.Generator().manual_seed(0)
    is_base = torch.arange(total) % 2 == 0
    scores = torch.rand(total, generator=g, dtype=torch.float64)
    correct = torch.rand(total, generator=g) < 0.75
    few = slice(0, 100)
    calls = {
        "openworld_auc": lambda part: openworld_auc(scores[part], correct[part], is_base[part]),
        "roc_curve_on_lists": lambda part: by_roc_curve(
            *(
                x[part][side].tolist()
                for side in (is_base[part], ~is_base[part])
                for x in (scores, correct)
            )
        ),
    }
    calls[which](few)  # imports and buffers of the first call are no memory of the method
    with peak_memory() as peak:
        calls[which](slice(None))
    return peak.bytes or 0


def memory(total: int) -> dict[str, Any]:
    """Peak memory of the area of `total` samples beside its input, each in a fresh process."""
    size = total * (8 + 1 + 1)
    found: dict[str, Any] = {"samples": total, "input_bytes": size, "peak_bytes": {}}
    for which in ("openworld_auc", "roc_curve_on_lists"):
        # Every large block is given back and asked for anew, so that the peak is what is in use.
        shown = subprocess.run(
            [sys.executable, "-P", __file__, "--memory-of", which, "--samples", str(total)],
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
            check=True,
            capture_output=True,
            text=True,
        )
        found["peak_bytes"][which] = int(shown.stdout)
    found["peak_over_input"] = {n: b / size for n, b in found["peak_bytes"].items()}
    return found


def bootstrap(total: int, draws: int) -> dict[str, Any]:
    """Time a bootstrap interval."""
    g = torch.Generator().manual_seed(0)
    is_base = torch.arange(total) % 2 == 0
    scores = torch.rand(total, generator=g, dtype=torch.float64)
    correct = torch.rand(total, generator=g) < 0.75
    [timing] = measure_time(
        lambda: openworld_auc_ci(scores, correct, is_base, method="bootstrap", n_boot=draws),
        repeats=1,
        warmup=0,
    )
    return {"samples": total, "draws": draws, "seconds": timing.median}


def random_clip(name: str, device: torch.device) -> OpenClipBackbone:
    """An open_clip model with random weights."""
    import open_clip

    torch.manual_seed(0)
    model = open_clip.create_model(name, pretrained=None)
    return OpenClipBackbone(model.to(device), open_clip.get_tokenizer(name))


def plain_step(model: GMoP, images: Tensor, targets: Tensor, length: int) -> Tensor:
    """The objective with each prompt encoded alone at full length, and images encoded twice."""
    backbone = model.backbone
    with torch.no_grad():
        for _ in range(2):
            f = backbone.encode_image(images)
        ids = backbone.tokenize([model.config.template.format(n) for n in model.base_classes])
        zero_shot = backbone.encode_prompt_embeds(backbone.embed_tokens(ids), ids.argmax(1))

    def text(learner: Any, names: list[str]) -> Tensor:
        embeds, ends = learner(backbone, names)
        embeds = F.pad(embeds, (0, 0, 0, length - embeds.shape[1]))
        return backbone.encode_prompt_embeds(embeds, ends)

    logits = backbone.scale * f @ text(model.classifier, model.base_classes).T
    own = targets[:, None]
    gate_base = logits.detach().softmax(1).gather(1, own)[:, 0].sigmoid()
    gate_new = (backbone.scale * f @ zero_shot.T).softmax(1).gather(1, own)[:, 0].sigmoid()
    warm = auc = 0.0
    for learner, part in zip(model.detectors, model.partition, strict=True):
        names = [model.base_classes[c] for c in part.pseudo_base]
        found = backbone.scale * f @ text(learner, names).T
        where = torch.tensor([list(part.pseudo_base).index(t) if t in part.pseudo_base else -1
                              for t in targets.tolist()], device=targets.device)  # fmt: skip
        is_base = where >= 0
        if is_base.all() or not is_base.any():
            continue
        warm = warm + F.cross_entropy(found[is_base], where[is_base])
        r = found.softmax(1).amax(1)
        pair = (1 - r[is_base][:, None] + r[~is_base]) ** 2
        auc = auc + (gate_base[is_base][:, None] * gate_new[~is_base] * pair).mean()
    k = len(model.partition)
    return (
        F.cross_entropy(logits, targets)
        + model.config.alpha * warm / k
        + model.config.lam * auc / k
    )


def steps(
    name: str, classes: int, batch: int, repeats: int, device: torch.device
) -> dict[str, Any]:
    """Time a training step (forward and backward) of ours and of the plain restatement."""
    backbone = random_clip(name, device)
    names = [f"class number {i}" for i in range(classes)]
    model = GMoP(backbone, names, config=GMoPConfig())
    sharing = GMoP(backbone, names, config=GMoPConfig(prefix_cache=True))
    size = backbone.model.visual.image_size
    side = size[0] if isinstance(size, tuple) else size
    g = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, side, side, generator=g).to(device)
    targets = torch.randint(classes, (batch,), generator=g).to(device)
    features = model.encode_image(images)

    def ours(with_model: GMoP = model) -> Tensor:
        loss = with_model.loss(features, targets)["total"]
        loss.backward()
        return loss

    def plain() -> Tensor:
        loss = plain_step(model, images, targets, backbone.context_length)
        loss.backward()
        return loss

    losses: dict[str, float] = {}

    def kept(name: str, step: Any) -> Any:
        return lambda: losses.update({name: float(step().detach())})

    steps = {"ours": ours, "prefix_cache": lambda: ours(sharing), "plain": plain}
    timings = measure_time(
        *(kept(which, step) for which, step in steps.items()),
        device=device,
        repeats=repeats,
        warmup=0,
    )
    seconds = {which: t.median for which, t in zip(steps, timings, strict=True)}
    return {
        "model": name,
        "classes": classes,
        "batch": batch,
        "repeats": repeats,
        "loss": losses["plain"],
        "difference_of_losses": {
            which: abs(losses[which] - losses["plain"]) for which in ("ours", "prefix_cache")
        },
        "median_seconds": seconds,
        "quartiles": {which: t.interval for which, t in zip(steps, timings, strict=True)},
        "times_faster": seconds["plain"] / seconds["ours"],
        "times_faster_with_prefix_cache": seconds["plain"] / seconds["prefix_cache"],
    }


def cifar(
    folder: Path, training_steps: int, seeds: int, device: torch.device, epochs: int = 30
) -> dict[str, Any]:
    """Six base classes, four held out: a small CLIP, then zero-shot, CoOp and GMoP."""
    from open_clip.model import CLIP

    from openworld_auc.demo import MINI_CLIP, DemoSettings, summarize
    from openworld_auc.demo import SeedResult as Result
    from shared_core.data.loading import load_images

    settings = DemoSettings()  # rates chosen on the demo's tuning seeds, not here
    train = load_images(folder / "cifar10-train.parquet")
    test = load_images(folder / "cifar10-test.parquet")
    names = train.class_names

    def tensor(data: Any, chosen: list[int]) -> Tensor:
        stacked = np.stack([np.asarray(data[i][0]) for i in chosen])
        return 4 * (torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 255 - 0.5)

    captions = [f"a photo of a {names[y]}." for y in train.targets]
    tokenizer = WordTokenizer.from_texts(captions, context_length=24)
    torch.manual_seed(0)
    text = {**MINI_CLIP["text_cfg"], "vocab_size": tokenizer.vocab_size}
    model = CLIP(**{**MINI_CLIP, "text_cfg": text})
    everything = list(range(len(train)))
    train_contrastive(
        model, tensor(train, everything), captions, tokenizer=tokenizer, steps=training_steps,
        device=device,
    )  # fmt: skip
    backbone = OpenClipBackbone(model, tokenizer)

    def features(data: Any, chosen: list[int], first: int = 0) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            parts = [
                backbone.encode_image(x.to(device)).cpu()
                for x in torch.split(tensor(data, chosen), 256)
            ]
        return torch.cat(parts), torch.tensor([data.targets[i] - first for i in chosen])

    base = features(test, [i for i, y in enumerate(test.targets) if y < 6])
    new = features(test, [i for i, y in enumerate(test.targets) if y >= 6], 6)
    results = []
    for seed in range(seeds):
        g = torch.Generator().manual_seed(seed)
        shots = []
        for label in range(6):
            own = torch.tensor([i for i, y in enumerate(train.targets) if y == label])
            shots += own[torch.randperm(len(own), generator=g)[:16]].tolist()
        few = features(train, shots)
        found = {}
        gmop = GMoPConfig(n_ctx_detector=4, seed=seed)
        coop = METHODS["coop"].model
        for name, config in (
            ("zero-shot", METHODS["zeroshot"].model),
            ("CoOp", coop),
            ("GMoP", gmop),
        ):
            tuned = GMoP(backbone, names[:6], config=config).set_classes(names[6:])
            if config.base_prompt == "tuned":
                lr = settings.lr_coop if name == "CoOp" else settings.lr
                recipe = TrainConfig(
                    lr=lr, lr_detector=settings.lr_detector, epochs=epochs, seed=seed
                )
                GMoPTrainer(tuned, few, config=recipe).fit()
            found[name] = evaluation(tuned, base, new)
        results.append(Result(found, []))
    methods = summarize(results)
    for entry in methods.values():
        del entry["interval"]  # of independent test images; these are the same for all seeds
    return {
        "data": "CIFAR-10 subset (JPEG), all ten classes named in pretraining",
        "images": {"train": len(train), "test_base": len(base[1]), "test_new": len(new[1])},
        "base": names[:6],
        "new": names[6:],
        "shots": 16,
        "epochs": epochs,
        "pretraining_steps": training_steps,
        "seeds": seeds,
        "methods": methods,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="ViT-B-16", help="for the training step")
    parser.add_argument("--classes", type=int, default=50)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--draws", type=int, default=1000, help="of the bootstrap")
    parser.add_argument("--note", default="", help="anything to know about the machine")
    parser.add_argument("--parts", default="metric,memory,bootstrap,training_step")
    parser.add_argument("--step-repeats", type=int, default=2, help="of the training step")
    parser.add_argument("--memory-of", help="used by the part memory for its own processes")
    parser.add_argument("--samples", type=int, default=4_000_000, help="of the part memory")
    parser.add_argument("--cifar", action="store_true")
    parser.add_argument("--steps", type=int, default=600)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(memory_of(arguments.memory_of, arguments.samples))
        return
    if arguments.out is None:
        parser.error("--out is required")
    device = select_device(arguments.device)
    tag = device.type
    if arguments.cifar:
        folder = os.environ.get("TENFOLD_DATA")
        if not folder:
            raise SystemExit("set TENFOLD_DATA to the folder that holds cifar10-train.parquet")
        found = {"cifar": cifar(Path(folder), arguments.steps, 3, device)}
        name = f"openworld_auc-cifar-{tag}.json"
    else:
        parts: dict[str, Any] = {
            "metric": lambda: [metric(n, arguments.repeats, device) for n in (10_000, 1_000_000)],
            "memory": lambda: memory(arguments.samples),
            "bootstrap": lambda: bootstrap(100_000, arguments.draws),
            "training_step": lambda: steps(
                arguments.model, arguments.classes, arguments.batch, arguments.step_repeats, device
            ),
        }
        found = {part: parts[part]() for part in arguments.parts.split(",")}
        name = f"openworld_auc-{tag}.json"
    found["environment"] = environment("openworld-auc", "open_clip_torch", "torchmetrics")
    found["note"] = arguments.note
    write_json(arguments.out / name, found)


if __name__ == "__main__":
    main()

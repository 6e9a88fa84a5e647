"""The embedded demonstration: a small ControlNet, and whether it keeps features at the image.

diffeat's demo model (a U-Net with the layout of Stable Diffusion that learns to paint shapes) gets
a ControlNet that sees the edges of the image. Techniques are then compared on the same noise: how
close a one-step reconstruction comes to the input, how well a linear probe reads the segmentation
out of up-stage features, and the GATE score.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from content_shift.closeness import sobel
from content_shift.gate import evaluate, img2img, shift_map
from content_shift.plots import plot_grid, plot_scatter, plot_shift
from content_shift.recipe import Inputs, Recipe
from content_shift.techniques import CFG, ControlNet, Prompt
from content_shift.techniques import Captions as Said
from content_shift.train_control import train_control
from diffeat import FeatureExtractor
from diffeat import demo as base
from diffeat.probe import LinearProbe, iou_of
from shared_core.workers import run_beside

__all__ = [
    "DemoSettings", "compare", "compare_seed", "figures", "prepare_backbone", "run_seed",
    "run_seeds", "spearman", "tell",
]  # fmt: skip

LAYERS = (
    "up-level1-repeat1-vit-block0-cross-q",
    "up-level1-repeat1-vit-out",
    "up-level1-upsampler-out",
    "up-level2-repeat0-vit-out",
    "up-level2-repeat1-vit-out",
)


FREE, GUIDED = "class-free prompt", "guidance 3"
RIGHT, WRONG, BLIND = "control x 1", "control of another image", "control without edges"


@dataclass(frozen=True)
class DemoSettings:
    """The settings of the demo.

    Attributes:
        backbone_steps: Training steps of each seed's U-Net, if none is given. With too few of
            them any ControlNet helps, whatever image it sees: it makes up for the training.
        backbone_batch_size: Images a step of it.
        images: Images that U-Net and ControlNet are trained on.
        control_steps: Training steps of each seed's ControlNet.
        batch_size: Images a step of it.
        lr: Peak learning rate of both.
        train, test: Images that probes are fitted and tested on.
        timesteps: Where features are compared.
        seeds: How many U-Nets, ControlNets, image sets and noises.
    """

    backbone_steps: int = 300
    backbone_batch_size: int = 16
    images: int = 1500
    control_steps: int = 150
    batch_size: int = 12
    lr: float = 3e-3
    train: int = 100
    test: int = 60
    timesteps: tuple[int, ...] = (100, 300)
    seeds: int = 2

    def quick(self) -> "DemoSettings":
        """A version that shows that everything runs."""
        return replace(
            self, backbone_steps=60, images=400, control_steps=30, train=30, test=20,
            timesteps=(100,), seeds=1,
        )  # fmt: skip


def prepare_backbone(
    s: DemoSettings, folder: Path | None, seed: int, device: Any,
    told: Callable[[int, float], None] = lambda step, loss: None,
) -> FeatureExtractor:  # fmt: skip
    """The U-Net of diffeat's demo: read from a folder, or trained.

    Raises:
        InputError: If the folder holds none.
    """
    if folder is not None:
        fx = base.load_backbone(folder)
        fx.backbone.to(device)
    else:
        settings = base.DemoSettings(
            images=s.images, steps=s.backbone_steps, batch_size=s.backbone_batch_size, lr=s.lr
        )
        fx = base.train_backbone(settings, seed=seed, device=device, progress=told)
    fx.layers = list(LAYERS)
    return fx


def compare(
    net: Any, pixels: Tensor, captions: Sequence[str], only: Sequence[str] | None = None
) -> dict[str, Recipe]:
    """The techniques, some of which must not help, for a set of images.

    A caption that names the classes would tell the probe the answer, so that every prompt is either
    free of them or belongs to another image.
    """
    others = [*captions[1:], captions[0]]
    wrong = sobel(pixels.roll(1, 0))
    every = {
        FREE: Recipe(Prompt("a picture of")),
        "caption of another image": Recipe(Said(others)),
        GUIDED: Recipe(Prompt("a picture of"), CFG(3.0)),
        "control x 0": Recipe(ControlNet(net, "sobel", 0.0)),
        "control x 0.5": Recipe(ControlNet(net, "sobel", 0.5)),
        RIGHT: Recipe(ControlNet(net, "sobel")),
        WRONG: Recipe(ControlNet(net, images=wrong)),
        BLIND: Recipe(ControlNet(net, images=torch.zeros_like(wrong))),
    }
    return {name: r for name, r in every.items() if only is None or name in only}


def _probe(
    fx: FeatureExtractor, data: Sequence[tuple[Tensor, Tensor, list[str]]], net: Any, t: int,
    seed: int,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """MIoU of ridge probes by technique ("none" too) and layer; the same noise for all."""
    probes: dict[str, dict[str, LinearProbe]] = {}
    tables: dict[str, dict[str, Tensor]] = {}
    for split, (images, labels, captions) in zip(("train", "test"), data, strict=True):
        pixels = images.float() / 255
        every = {"none": Recipe(), **compare(net, pixels, captions)}
        del every[GUIDED]  # a feature of a single forward is that of its prompt
        for start in range(0, len(images), 25):
            index = list(range(start, min(start + 25, len(images))))
            inputs = Inputs.prepare(
                fx, images[index], ids=[f"{split}{i}" for i in index], index=index,
                total=len(images),
            )  # fmt: skip
            for name, recipe in every.items():
                found = recipe(fx, t=t, prompt="", inputs=inputs, seed=seed)
                for layer, value in found.items():
                    own = probes.setdefault(name, {})
                    if split == "train":
                        own.setdefault(layer, LinearProbe(base.CLASSES)).update(
                            value, labels[index]
                        )
                        continue
                    hits = own[layer].confusion(value, labels[index]).sum(0).cpu()
                    table = tables.setdefault(name, {})
                    table[layer] = table[layer] + hits if layer in table else hits
    miou = {
        name: {layer: float(iou_of(table)) for layer, table in by_layer.items()}
        for name, by_layer in tables.items()
    }
    return {**miou, GUIDED: miou[FREE]}


def run_seed(
    job: tuple[DemoSettings, int, Path | None, Path | None, str], told: Callable[..., None]
) -> list[dict[str, Any]]:
    """Train one seed's U-Net and ControlNet and compare techniques; see `run_seeds`.

    Args:
        job: Settings, seed, folder of a U-Net to use instead, where to save both, device.
        told: Told after every step.
    """
    s, seed, backbone, folder, device = job
    fx = prepare_backbone(s, backbone, seed, device, lambda *_: told())
    net, rows = compare_seed(fx, s, seed, lambda *_: told())
    if folder is not None:
        base.save_backbone(fx, folder / "backbone")
        net.save_pretrained(folder / "controlnet")
    return rows


def run_seeds(
    s: DemoSettings, seed: int, folder: Path, *, backbone: Path | None = None,
    device: torch.device | str = "cpu", told: Callable[..., None] = lambda place: None,
) -> tuple[list[dict[str, Any]], FeatureExtractor, Any]:  # fmt: skip
    """All seeds; on a CPU in processes beside each other.

    Args:
        s: The settings.
        seed: The first.
        folder: Where the models of the first seed are saved.
        backbone: Folder of a U-Net to use in place of new ones.
        device: Where to compute.
        told: Told the number of a run after each of its steps.

    Returns:
        The rows of all seeds (see `compare_seed`), and U-Net and ControlNet of the first.
    """
    from diffusers import ControlNetModel

    jobs = [(s, seed + i, backbone, None if i else folder, str(device)) for i in range(s.seeds)]
    found = run_beside(run_seed, jobs, told, alone=torch.device(device).type != "cpu")
    fx = prepare_backbone(s, folder / "backbone", seed, device)
    net: Any = ControlNetModel.from_pretrained(folder / "controlnet")
    return [row for rows in found for row in rows], fx, net.to(device)


def compare_seed(
    fx: FeatureExtractor, s: DemoSettings, seed: int,
    told: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[Any, list[dict[str, Any]]]:  # fmt: skip
    """Train one seed's ControlNet and compare the techniques on its images and noise.

    Returns:
        The ControlNet, and
        rows of ``technique, t, seed, gain`` (dB), ``miou`` and ``miou_gain`` (mean over layers),
        ``miou_gains`` by layer, ``score`` (eq. 2, pooled) and, for control at the first
        timestep, ``score_same`` (with the reference under the same technique).
    """
    images, _, captions = base.shapes_data(s.images, "train", seed)
    net = train_control(
        fx, images, captions, steps=s.control_steps, batch_size=s.batch_size, lr=s.lr,
        t_range=(50, 650), embedding_channels=(8, 16), seed=seed, told=told,
    )  # fmt: skip
    data = [base.shapes_data(n, split, seed) for n, split in
            ((s.train, "validation"), (s.test, "test"))]  # fmt: skip
    test_images, _, test_captions = data[1]
    every = compare(net, test_images.float() / 255, test_captions)
    rows = []
    for t in s.timesteps:
        miou = _probe(fx, data, net, t, seed)
        given: dict[str, Any] = {"draws": 1, "prompt": "", "seed": seed, "batch_size": 25}
        plain = evaluate(fx, every, test_images, t, **given)
        steered = {name: every[name] for name in (RIGHT, WRONG)}
        other = {}
        if t == s.timesteps[0]:
            same = evaluate(fx, steered, test_images, t, ref="same", reconstruction=False, **given)
            other = {row["technique"]: row["score"] for row in same.pooled}
        for row in plain.pooled:
            name = row["technique"]
            gains = {layer: miou[name][layer] - miou["none"][layer] for layer in LAYERS}
            rows.append(
                {
                    "technique": name,
                    "t": t,
                    "seed": seed,
                    "gain": row["gain"],
                    "miou": statistics.fmean(miou[name].values()),
                    "miou_none": statistics.fmean(miou["none"].values()),
                    "miou_gain": statistics.fmean(gains.values()),
                    "miou_gains": gains,
                    "score": row["score"],
                    "score_same": other.get(name),
                }
            )
    return net, rows


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation; ties share their mean rank; 0 where one side is constant.

    Examples:
        >>> spearman([1.0, 2.0, 3.0], [10.0, 20.0, 15.0])
        0.5
    """

    def ranks(values: Sequence[float]) -> Tensor:
        x = torch.tensor(values, dtype=torch.float64)
        below = (x[None] < x[:, None]).double().sum(1)
        equal = (x[None] == x[:, None]).double().sum(1)
        return below + (equal - 1) / 2

    x, y = (r - r.mean() for r in (ranks(a), ranks(b)))
    scale = (x.norm() * y.norm()).item()
    return round(float(x @ y) / scale, 12) if scale else 0.0


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[float, float]:
    values = [row[key] for row in rows]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def tell(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The table over seeds, rank correlations, and what was seen in sentences."""
    table, names = [], list(dict.fromkeys(r["technique"] for r in rows))
    times = sorted({r["t"] for r in rows})
    means: dict[Any, tuple[float, float]] = {}
    for t in times:
        for name in names:
            own = [r for r in rows if r["t"] == t and r["technique"] == name]
            found = {key: _mean(own, key) for key in ("gain", "miou_gain", "score")}
            same = [r["score_same"] for r in own if r["score_same"] is not None]
            means |= {(name, t, key): value for key, value in found.items()}
            table.append(
                {
                    "technique": name,
                    "t": t,
                    "gain dB": f"{found['gain'][0]:+.2f} ({found['gain'][1]:.2f})",
                    "mIoU gain": f"{found['miou_gain'][0]:+.4f} ({found['miou_gain'][1]:.4f})",
                    "eq. 2": f"{found['score'][0]:+.2f}",
                    "eq. 2, same ref": f"{statistics.fmean(same):+.2f}" if same else "",
                }
            )
    rho = {
        key: spearman([r[key] for r in rows], [r["miou_gain"] for r in rows])
        for key in ("gain", "score")
    }
    seeds = len({r["seed"] for r in rows})

    def said(name: str) -> str:
        return ", ".join(
            f"{means[name, t, 'gain'][0]:+.2f} dB and {means[name, t, 'miou_gain'][0]:+.4f} mIoU "
            f"at t = {t}"
            for t in times
        )

    message = (
        f"Over {seeds} seed{'s' if seeds > 1 else ''}, control brings {said(RIGHT)}; "
        f"control of another image {said(WRONG)}; control without edges {said(BLIND)}; "
        f"the caption of another "
        f"image {said('caption of another image')}. Rank correlation with the gain in mIoU: "
        f"reconstruction gain {rho['gain']:+.2f}; the GATE score (no claim) {rho['score']:+.2f}."
    )
    return {"table": table, "spearman": rho, "message": message}


def figures(
    fx: FeatureExtractor, net: Any, rows: Sequence[dict[str, Any]], seed: int
) -> dict[str, Any]:
    """The demo's pictures, by name."""
    images, _, captions = base.shapes_data(6, "test", seed)
    every = compare(net, images.float() / 255, captions, [RIGHT, WRONG])
    painted = img2img(fx, every, images, 0.7, 15, prompt="", seed=seed)
    control = Recipe(ControlNet(net, "sobel"))
    maps = {
        name: [
            shift_map(fx, image, 300, recipe, layer=LAYERS[-1], prompt="", seed=seed)
            for image in images
        ]
        for name, recipe in (("no technique", Recipe()), (RIGHT, control))
    }
    names = list(dict.fromkeys(r["technique"] for r in rows))
    points = [
        {name: [(r[key], r["miou_gain"]) for r in rows if r["technique"] == name] for name in names}
        for key in ("gain", "score")
    ]
    return {
        "scatter": plot_scatter(
            points[0], ("reconstruction gain (dB)", "GATE score (eq. 2)"),
            "gain in mIoU, mean over layers", points[1],
        ),
        "img2img": plot_grid(painted.pictures),
        "shift": plot_shift(images.float() / 255, maps),
    }  # fmt: skip

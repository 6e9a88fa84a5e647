"""The embedded demonstration: a small diffusion U-Net, trained on the spot, looked into.

A U-Net with the layout of Stable Diffusion (1.2 million parameters) learns to denoise images of the
shapes world in latents of an exact "VAE" (pixel unshuffle). Then every activation is measured and
probed: how noisy and how fine it is, and how well a linear classifier reads the segmentation out.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from diffeat.extractor import FeatureExtractor
from diffeat.measure import hf_ratio, locality, noise_ratio, pca_image
from diffeat.naming import list_activations
from diffeat.plots import plot_depth, plot_pca, plot_ranking
from diffeat.prompts import PromptEmbedding
from diffeat.ranking import rank
from shared_core.data.shapes import ShapesWorld
from shared_core.errors import InputError
from shared_core.run import atomic_path
from shared_core.workers import run_beside

__all__ = [
    "CLASSES",
    "DemoSettings",
    "PixelUnshuffleVAE",
    "ShapesText",
    "build_extractor",
    "combine",
    "figures",
    "load_backbone",
    "look_into",
    "measure_depth",
    "run_probes",
    "run_seed",
    "run_seeds",
    "save_backbone",
    "shapes_data",
    "train_backbone",
]

SHAPES = ("circle", "square", "triangle")
CLASSES = len(SHAPES) + 1
WORDS = ("<none>", "a", "picture", "of", *SHAPES)
LENGTH, WIDTH = 6, 32


@dataclass(frozen=True)
class DemoSettings:
    """The settings of the demo.

    Attributes:
        seeds: Runs, each with weights, data and noise of its own.
        images: Images that the U-Net is trained on.
        steps: Training steps.
        batch_size: Images per step.
        lr: Peak learning rate of AdamW.
        drop: Share of captions left out while training.
        train, test: Images that probes are fitted and tested on.
        measured: Images of the noise and granularity curves.
        timesteps: Where probes are fitted; in runs after the first only at 50.
        components: Principal components of the equal-width comparison.
    """

    seeds: int = 2
    images: int = 1500
    steps: int = 300
    batch_size: int = 16
    lr: float = 3e-3
    drop: float = 0.3
    train: int = 100
    test: int = 60
    measured: int = 24
    timesteps: tuple[int, ...] = (0, 50, 200)
    components: int = 32


class PixelUnshuffleVAE(nn.Module):
    """An exact autoencoder: 2 x 2 pixels become 4 times the channels.

    Examples:
        >>> vae = PixelUnshuffleVAE(); x = torch.randn(1, 3, 4, 4)
        >>> torch.equal(vae.decode(vae.encode(x)), x)
        True
    """

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(scaling_factor=1.0, shift_factor=0.0, spatial_factor=2)

    def encode(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` to ``[B, 12, H/2, W/2]``."""
        return F.pixel_unshuffle(images, 2)

    def decode(self, latents: Tensor) -> Tensor:
        """The way back."""
        return F.pixel_shuffle(latents, 2)


class ShapesText(nn.Module):
    """A learned embedding of a few words; the empty prompt is what dropped captions were."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(len(WORDS), WIDTH)

    def forward(self, prompts: Sequence[str]) -> PromptEmbedding:
        """Embed prompts of ``a picture of circle square triangle``; other words are skipped."""
        rows = []
        for prompt in prompts:
            known = [WORDS.index(w) for w in prompt.split() if w in WORDS[1:]][:LENGTH]
            rows.append(known + [0] * (LENGTH - len(known)))
        return PromptEmbedding(self.table(torch.tensor(rows, device=self.table.weight.device)))


def shapes_data(n: int, split: str, seed: int = 0) -> tuple[Tensor, Tensor, list[str]]:
    """Scenes of circles, squares and triangles: images, label maps, captions.

    Returns:
        uint8 images ``[n, 3, 32, 32]``, labels ``[n, 32, 32]`` (0 is background), and captions that
        name the shapes.

    Examples:
        >>> images, labels, captions = shapes_data(2, "test")
        >>> images.shape, labels.shape, captions[0][:12]
        (torch.Size([2, 3, 32, 32]), torch.Size([2, 32, 32]), 'a picture of')
    """
    scenes = ShapesWorld(seed).segmentation(n, 32, (1, 3), shapes=list(SHAPES), split=split)  # type: ignore[arg-type]
    labels = torch.from_numpy(scenes.semantic.astype("int64"))
    images = torch.from_numpy(scenes.images).permute(0, 3, 1, 2).contiguous()
    captions = [
        " ".join(["a picture of", *(SHAPES[c - 1] for c in row.unique().tolist() if c > 0)])
        for row in labels
    ]
    return images, labels, captions


def _scheduler() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    )


def build_extractor(seed: int = 0) -> FeatureExtractor:
    """An untrained extractor with the demo's U-Net.

    Examples:
        >>> build_extractor().vae_factor
        2
    """
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=12,
        out_channels=12,
        layers_per_block=1,
        block_out_channels=(32, 48, 64),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    return FeatureExtractor(
        unet,
        scheduler=_scheduler(),
        vae=PixelUnshuffleVAE(),
        text=ShapesText(),
        layers=["up-level1-repeat1-vit-out"],
        size=32,
    )


def train_backbone(
    settings: DemoSettings | None = None,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> FeatureExtractor:
    """Train the demo's U-Net to predict noise, and return its extractor.

    Args:
        settings: By default those of `DemoSettings`.
        seed: Of weights, data and noise.
        device: Where to train.
        progress: Told every step and its loss.
    """
    s = settings or DemoSettings()
    fx = build_extractor(seed)
    unet, text = fx.backbone.to(device).requires_grad_(True).train(), fx.text
    assert isinstance(text, ShapesText)
    text.to(device)
    images, _, captions = shapes_data(s.images, "train", seed)
    latents = fx.encode_images(images).to(device)
    generator = torch.Generator().manual_seed(seed)
    parameters = [*unet.parameters(), *text.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=s.lr)
    warmup = max(1, min(30, s.steps // 5))
    scheduler = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, s.steps - warmup)),
        ],
        milestones=[warmup],
    )
    abar = fx.schedule.alphas_cumprod
    assert abar is not None
    for step in range(s.steps):
        rows = torch.randint(len(latents), (s.batch_size,), generator=generator)
        clean = latents[rows.to(device)]
        t = torch.randint(fx.schedule.steps, (s.batch_size,), generator=generator)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        level = abar[t].float().view(-1, 1, 1, 1).to(device)
        x_t = level.sqrt() * clean + (1 - level).sqrt() * noise
        dropped = torch.rand(s.batch_size, generator=generator) < s.drop
        words = [
            "" if d else captions[i] for i, d in zip(rows.tolist(), dropped.tolist(), strict=True)
        ]
        loss = F.mse_loss(unet(x_t, t.to(device), text(words).states).sample, noise)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call,unused-ignore]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        progress(step, float(loss.detach()))
    unet.eval().requires_grad_(False)
    text.requires_grad_(False)
    return fx


def save_backbone(fx: FeatureExtractor, folder: Path) -> None:
    """Write a trained demo backbone: the U-Net as diffusers does, and the words' embedding."""
    backbone: Any = fx.backbone
    backbone.save_pretrained(folder / "unet")
    assert isinstance(fx.text, ShapesText)
    with atomic_path(folder / "text.safetensors") as temporary:
        save_file(fx.text.state_dict(), temporary)


def load_backbone(folder: Path) -> FeatureExtractor:
    """Read what `save_backbone` wrote.

    Raises:
        InputError: If it is not there.
    """
    from diffusers import UNet2DConditionModel

    if not (folder / "text.safetensors").is_file():
        raise InputError(f"{folder} holds no demo backbone; train one with: diffeat demo")
    fx = build_extractor()
    text = ShapesText()
    text.load_state_dict(load_file(folder / "text.safetensors"))
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    return FeatureExtractor(
        unet, scheduler=_scheduler(), vae=fx.vae, text=text.requires_grad_(False),
        layers=fx.layers, size=32,
    )  # fmt: skip


def measure_depth(
    fx: FeatureExtractor,
    images: Any,
    t: int = 50,
    *,
    seed: int = 0,
    prompt: Any = "",
    batch_size: int | None = None,
) -> list[dict[str, Any]]:
    """Noise, granularity and locality of every activation, from two draws of noise.

    Args:
        fx: The extractor; its own layers do not matter.
        images: Of a batch, or a sequence of them.
        t: Timestep.
        seed: Of the noise.
        prompt: One for all.
        batch_size: Images at a time, to be averaged over; by default all at once.

    Returns:
        Rows of ``name, kind, stage, level, noise, hf, locality`` in order of execution.
    """
    infos = list_activations(fx.backbone)
    sums: dict[str, dict[str, float]] = {}
    before = fx.layers
    fx.layers = [i.name for i in infos]
    try:
        for start in range(0, len(images), batch_size or len(images)):
            part = images[start : start + (batch_size or len(images))]
            ids = [str(start + i) for i in range(len(part))]
            a, b = (fx(part, prompt, t, seed=seed + draw, ids=ids) for draw in (0, 1))
            for name in a:
                if min(a[name].shape[-2:]) < 4:
                    continue
                row = sums.setdefault(name, {"noise": 0.0, "hf": 0.0, "locality": 0.0})
                share = len(part) / len(images)
                row["noise"] += share * noise_ratio(a[name], b[name])
                row["hf"] += share * hf_ratio(a[name])
                row["locality"] += share * locality(a[name])
    finally:
        fx.layers = before
    return [
        {"name": i.name, "kind": i.kind, "stage": i.stage, "level": i.level, **sums[i.name]}
        for i in infos
        if i.name in sums
    ]


def run_probes(
    fx: FeatureExtractor, s: DemoSettings, timesteps: Sequence[int], seed: int, **options: Any
) -> list[dict[str, Any]]:
    """MIoU of ridge probes on every activation, with the empty prompt."""
    train, test = (shapes_data(n, split, seed)[:2] for n, split in
                   ((s.train, "validation"), (s.test, "test")))  # fmt: skip
    return rank(
        fx, train, test, classes=CLASSES, timesteps=timesteps, prompt="", batch_size=20, seed=seed,
        **options,
    )  # fmt: skip


def look_into(
    fx: FeatureExtractor, s: DemoSettings, *, seed: int = 0, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Curves over depth, and probes of the trained and of an untrained network.

    Returns:
        ``depth``, ``ranking``, ``ranking_equal_width``; ``best`` mIoU and its ``mean`` over
        activations, at t = 50.
    """
    images, _, _ = shapes_data(s.measured, "test", seed)
    depth = measure_depth(fx, images, 50, seed=seed)
    trained = run_probes(fx, s, s.timesteps, seed)
    equal = run_probes(fx, s, [50], seed, components=s.components)
    untrained = build_extractor(seed)
    untrained.backbone.to(device)
    random = run_probes(untrained, s, [50], seed)
    at_50, mean = [r for r in trained if r["t"] == 50], {}
    for name, rows in (("trained", at_50), ("untrained", random)):
        mean[name] = sum(r["miou"] for r in rows) / len(rows)
    return {
        "depth": depth,
        "ranking": trained,
        "ranking_equal_width": equal,
        "best": {
            "trained": at_50[0]["miou"],
            "untrained": random[0]["miou"],
            "latent": next(r["miou"] for r in at_50 if r["name"] == "unet-in"),
        },
        "mean": mean,
    }


def run_seed(
    job: tuple[DemoSettings, int, Path | None, str], told: Callable[..., None]
) -> dict[str, Any]:
    """Train one seed's network and look into it; see `run_seeds`.

    Args:
        job: Settings, seed, where to save the network, device.
        told: Told every step and its loss.
    """
    settings, seed, folder, device = job
    fx = train_backbone(settings, seed=seed, device=device, progress=told)
    if folder is not None:
        save_backbone(fx, folder)
    return look_into(fx, settings, seed=seed, device=device)


def run_seeds(
    settings: DemoSettings,
    seed: int,
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    told: Callable[..., None] = lambda place, step, loss: None,
) -> tuple[list[dict[str, Any]], FeatureExtractor]:
    """Train and look into the networks of all seeds; on a CPU in processes beside each other.

    Args:
        settings: The settings.
        seed: The first.
        folder: Where the first network is saved.
        device: Where to compute.
        told: Told the number of the run, its step and its loss.

    Returns:
        What `look_into` gave for each seed, and the first network.
    """
    later = replace(settings, timesteps=(50,))
    jobs = [
        (later if i else settings, seed + i, None if i else folder, str(device))
        for i in range(settings.seeds)
    ]
    runs = run_beside(run_seed, jobs, told, alone=torch.device(device).type != "cpu")
    fx = load_backbone(folder)
    fx.backbone.to(device)
    return runs, fx


def combine(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What `look_into` gave for several seeds, as means with their spread.

    Returns:
        ``runs`` as they are, ``depth`` and ``ranking`` (t = 50) of means over seeds, ``table`` and
        ``message``.
    """
    depth = [
        {**rows[0], **{k: _mean(r[k] for r in rows) for k in ("noise", "hf", "locality")}}
        for rows in zip(*(run["depth"] for run in runs), strict=True)
    ]
    by_name: dict[str, list[dict[str, Any]]] = {}
    equal: dict[str, float] = {}
    for run in runs:
        for row in run["ranking"]:
            if row["t"] == 50:
                by_name.setdefault(row["name"], []).append(row)
        for row in run["ranking_equal_width"]:
            equal[row["name"]] = equal.get(row["name"], 0) + row["miou"] / len(runs)
    ranking = [
        {**rows[0], **{k: _mean(r[k] for r in rows) for k in ("miou", "low", "high")}}
        | {"spread": max(r["miou"] for r in rows) - min(r["miou"] for r in rows)}
        for rows in by_name.values()
    ]
    ranking.sort(key=lambda row: -row["miou"])
    order = sorted(equal, key=lambda name: -equal[name])
    noise = {row["name"]: row["noise"] for row in depth}
    table = [
        {
            "activation": r["name"],
            "channels": r["channels"],
            "mIoU": f"{r['miou']:.3f}",
            "spread of seeds": f"{r['spread']:.3f}",
            "90 % over images": f"{r['low']:.3f} to {r['high']:.3f}",
            "rank of equal width": order.index(r["name"]) + 1,
            "noise": f"{noise[r['name']]:.2f}" if r["name"] in noise else None,
        }
        for r in ranking[:10]
    ]
    return {
        "runs": list(runs),
        "depth": depth,
        "ranking": ranking,
        "table": table,
        "message": tell(runs),
    }


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def figures(fx: FeatureExtractor, result: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """The demo's pictures, by name."""
    images, _, _ = shapes_data(6, "test", seed)
    before = fx.layers
    fx.layers = [
        "unet-in", "down-level1-repeat0-vit-out", "up-level0-upsampler-out",
        "up-level1-repeat1-vit-out", "up-level2-repeat1-vit-out",
    ]  # fmt: skip
    found = fx(images, "", 50, seed=seed)
    fx.layers = before
    return {
        "depth": plot_depth(result["depth"]),
        "ranking": plot_ranking(result["ranking"]),
        "pca": plot_pca(images, {name: pca_image(v) for name, v in found.items()}),
    }


def tell(runs: Sequence[dict[str, Any]]) -> str:
    """What was seen, in sentences; intervals are the lowest and the highest seed."""
    stages = [stage_noise(run["depth"]) for run in runs]
    down, early, late = ([stage[i] for stage in stages] for i in range(3))
    as_told = sum(d > e < u for d, e, u in stages)
    better = sum(run["best"]["trained"] > run["best"]["untrained"] for run in runs)
    best = {k: _mean(run["best"][k] for run in runs) for k in ("trained", "untrained", "latent")}
    mean = {k: _mean(run["mean"][k] for run in runs) for k in ("trained", "untrained")}
    return (
        f"Noise makes up {_span(down)} of the down stage's activations, {_span(early)} of the "
        f"early and {_span(late)} of the late up stage's: falling, then returning, as the paper "
        f"describes, in {as_told} of {len(runs)} runs. The best activation reads the segmentation "
        f"with mIoU {best['trained']:.3f}, against {best['untrained']:.3f} in an untrained network "
        f"(better in {better} of {len(runs)} runs) and {best['latent']:.3f} from the raw latent; "
        f"the mean activation with {mean['trained']:.3f} against {mean['untrained']:.3f}."
    )


def stage_noise(depth: Sequence[dict[str, Any]]) -> tuple[float, float, float]:
    """Mean share of noise between modules: down stage, first and second half of the up stage."""
    between = [r for r in depth if r["kind"] in ("res-out", "vit-out")]
    down, up = ([r["noise"] for r in between if r["stage"] == stage] for stage in ("down", "up"))
    half = len(up) // 2
    return _mean(down), _mean(up[:half]), _mean(up[half:])


def _span(values: Sequence[float]) -> str:
    low, high = (f"{value:.0%}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"

"""The qualitative test (paper 4.1): repaint images strongly and see which technique keeps them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from content_shift.closeness import METRICS, closeness
from content_shift.recipe import Inputs, Recipe, Technique
from diffeat import FeatureExtractor, PipelineText
from shared_core.errors import InputError
from shared_core.run import RunFolder, progress, write_json

__all__ = ["Img2Img", "extractor_of", "img2img"]


@dataclass(frozen=True)
class Img2Img:
    """Repainted images and how close they came to the input.

    Attributes:
        rows: ``technique, psnr, ssim, edge_f1``, and ``psnr_gain`` over no technique.
        pictures: ``[B, 3, H, W]`` in [0, 1] by technique, the input first.
    """

    rows: list[dict[str, Any]]
    pictures: dict[str, Tensor] = field(repr=False)

    def save(self, folder: Path, *, plot: bool = True) -> None:
        """Write ``img2img.json`` and the grid ``img2img.png``."""
        from content_shift.plots import plot_grid

        write_json(Path(folder) / "img2img.json", {"rows": self.rows})
        if plot:
            RunFolder(folder, resume=True).save_figure("img2img", plot_grid(self.pictures))


def extractor_of(pipe: Any) -> FeatureExtractor:
    """An extractor on a pipeline's own parts; an extractor is returned as it is."""
    if isinstance(pipe, FeatureExtractor):
        return pipe
    backbone = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    if backbone is None:
        raise InputError(f"{type(pipe).__name__} is neither an extractor nor a diffusion pipeline")
    factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1) if pipe.vae is not None else 1
    side = getattr(backbone.config, "sample_size", None)
    return FeatureExtractor(
        backbone, scheduler=pipe.scheduler, layers="unet-out", vae=pipe.vae,
        text=PipelineText(pipe), size=side * factor if isinstance(side, int) else None,
        pipeline=pipe,
    )  # fmt: skip


def img2img(
    pipe: Any,
    techniques: Mapping[str, Technique | Recipe],
    images: Any,
    strength: float = 0.7,
    steps: int = 30,
    *,
    prompt: Any = None,
    seed: int = 0,
    ids: Sequence[str | int] | None = None,
) -> Img2Img:
    """Repaint images without and with each technique, all from the same noise (DDIM steps).

    Args:
        pipe: A diffusers pipeline, or an extractor.
        techniques: By name; "none" is added.
        images: All of one batch.
        strength: Share of the diffusion that is redone; high, so that content shifts visibly.
        steps: Of the whole diffusion; ``strength * steps`` are run.
        prompt: Where a technique sets none.
        seed: Of the noise.
        ids: Names of the samples.

    Raises:
        InputError: If the strength or the steps are out of range, or for flow models.
    """
    if not 0 < strength <= 1 or steps < 1 or int(strength * steps) < 1:
        raise InputError(
            f"strength={strength}, steps={steps}; accepted: 0 < strength <= 1, and at least one "
            "step to run"
        )
    fx = extractor_of(pipe)
    if fx.schedule.flow:
        raise InputError("img2img steps by DDIM, which is defined for variance-preserving models")
    inputs = Inputs.prepare(fx, images, ids=ids, seed=seed)
    pictures = {"input": inputs.pixels.cpu()}
    rows: list[dict[str, Any]] = []
    every = {"none": Recipe(), **{name: Recipe(value) for name, value in techniques.items()}}
    bar = progress(total=len(every) * int(strength * steps), description="repainting", unit="step")
    with bar:
        for name, recipe in every.items():
            painted = _repaint(fx, recipe, inputs, strength, steps, prompt, seed, bar.update)
            pictures[name] = painted.cpu()
            found = {
                ("edge_f1" if metric == "edge" else metric): float(
                    closeness(pictures[name], pictures["input"], metric).mean()
                )
                for metric in METRICS
            }
            gain = found["psnr"] - (rows[0]["psnr"] if rows else found["psnr"])
            rows.append({"technique": name, **found, "psnr_gain": gain})
    return Img2Img(rows, pictures)


def _repaint(
    fx: FeatureExtractor, recipe: Recipe, inputs: Inputs, strength: float, steps: int, prompt: Any,
    seed: int, told: Any,
) -> Tensor:  # fmt: skip
    from diffusers import DDIMScheduler

    # The model's own schedule with a deterministic stepper without memory.
    scheduler = DDIMScheduler.from_config(fx.schedule.scheduler.config)
    scheduler.set_timesteps(steps)
    times = [int(t) for t in scheduler.timesteps[steps - int(strength * steps) :]]
    with recipe.applied(fx) as opened:
        ctx = recipe.conditioned(
            fx, opened, inputs, t=times[0], prompt=prompt, seed=seed, walk=False
        )
        x = ctx.x_t
        for t in times:
            x = scheduler.step(ctx.predict(x, t), t, x).prev_sample
            told()
        return fx.decode(x)

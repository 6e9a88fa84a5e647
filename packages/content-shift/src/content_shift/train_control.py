"""Train a small ControlNet for a model of one's own, base frozen (paper A.2 takes a ready one)."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from content_shift._training import fit, generator_of, share, world
from content_shift.control import PREPROCESS, check_control
from content_shift.img2img import extractor_of
from content_shift.lora import noised
from content_shift.recipe import Inputs, added_conditions
from diffeat import PromptEmbedding
from shared_core.errors import InputError

__all__ = ["train_control"]


def train_control(
    model: Any,
    images: Any,
    captions: Sequence[str] | None = None,
    *,
    preprocess: Any = "sobel",
    steps: int = 100,
    batch_size: int = 24,
    lr: float = 1e-3,
    drop: float = 0.5,
    t_range: tuple[int, int] | None = None,
    embedding_channels: Sequence[int] = (16, 32, 96, 256),
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    save_every: int = 100,
    told: Callable[[int, float], None] | None = None,
) -> Any:
    """Train a ControlNet on the images' own edges; the base model does not change.

    Args:
        model: A pipeline or an extractor; a U-Net with text.
        images: The images.
        captions: One an image; without them the empty prompt.
        preprocess: What control images are made of, see `ControlNet`.
        steps: In all.
        batch_size: Images a step, over all processes.
        lr: Peak learning rate, falling as a cosine.
        drop: Share of captions left out.
        t_range: Timesteps to train on, by default all.
        embedding_channels: Widths of the control image's embedding; one halving less than there
            are must lead from pixels to latents.
        seed: Of order, noise and initial weights.
        out: Folder for the checkpoint and, in ``controlnet``, the result.
        resume: Continue the run in `out`.
        save_every: Steps between checkpoints.
        told: Told every step and its loss.

    Returns:
        A `diffusers.ControlNetModel` in evaluation mode.

    Raises:
        UnsupportedTechnique: If the backbone takes no residuals.
        InputError: If anything does not fit.
    """
    from diffusers import ControlNetModel

    fx = extractor_of(model)
    check_control(fx.backbone)
    backbone: Any = fx.backbone
    if 2 ** (len(embedding_channels) - 1) != fx.vae_factor:
        raise InputError(
            f"embedding_channels={tuple(embedding_channels)} halve "
            f"{len(embedding_channels) - 1} times; from pixels to latents it is a factor of "
            f"{fx.vae_factor}"
        )
    inputs = Inputs.prepare(fx, images, seed=seed)
    if captions is not None and len(captions) != len(inputs.pixels):
        raise InputError(f"{len(captions)} captions for {len(inputs.pixels)} images")
    make = preprocess if callable(preprocess) else PREPROCESS.get(preprocess)
    if make is None:
        raise InputError(f"preprocess={preprocess!r}; accepted: {', '.join(PREPROCESS)}")
    pictures = make(inputs.pixels)
    low, high = t_range or (0, fx.schedule.steps)
    if not 0 <= low < high <= fx.schedule.steps or steps < 1 or batch_size < 1:
        raise InputError(f"t_range={t_range}, steps={steps}, batch_size={batch_size} do not fit")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = ControlNetModel.from_unet(
            backbone, conditioning_channels=pictures.shape[1],
            conditioning_embedding_out_channels=tuple(embedding_channels),
        )  # fmt: skip
    if next(net.parameters()).dtype != torch.float32:
        net.float()
    net.to(fx.device).train().requires_grad_(True)
    latents, pictures = inputs.latents.to(fx.device), pictures.to(fx.device)
    backbone.eval().requires_grad_(False)
    texts = ["", *dict.fromkeys(captions or ())]
    known = [fx.encode_prompt(text) for text in texts]
    table = torch.cat([k.states for k in known]).detach().to(fx.device, torch.float32)
    pools = [k.pooled for k in known if k.pooled is not None]
    pooled = torch.cat(pools).detach().to(fx.device) if pools else None
    place = torch.tensor([texts.index(c) for c in captions or [""] * len(latents)])

    def loss_of(step: int) -> Tensor:
        generator = generator_of(seed, step)
        rows = torch.randint(len(latents), (batch_size,), generator=generator)
        kept = torch.rand(batch_size, generator=generator) >= drop
        x, t, target = noised(fx, latents[rows], generator, low, high)
        mine = share(torch.arange(batch_size))
        words = (place[rows] * kept)[mine]
        x, t, states = x[mine], t[mine], table[words]
        embedding = PromptEmbedding(states, pooled=None if pooled is None else pooled[words])
        added = added_conditions(fx, x, embedding)
        given = {"added_cond_kwargs": added} if added else {}
        down, mid = net(x, t, states, pictures[rows[mine]], return_dict=False, **given)
        dtype = fx.dtype
        guess = backbone(
            x.to(dtype), t, states.to(dtype),
            down_block_additional_residuals=[d.to(dtype) for d in down],
            mid_block_additional_residual=mid.to(dtype), **given,
        ).sample  # fmt: skip
        return F.mse_loss(guess.float(), target[mine].float())

    trainable = dict(net.named_parameters())
    fit(
        trainable, [{"params": list(trainable.values()), "lr": lr}], loss_of, steps=steps,
        factor=lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)),
        out=out, resume=resume, save_every=save_every, description="training ControlNet", told=told,
    )  # fmt: skip
    net.eval().requires_grad_(False)
    if out is not None and world()[0] == 0:
        net.save_pretrained(Path(out) / "controlnet")
    return net

"""Train a LoRA of a data set's style (paper A.3), which stock diffusers loads."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from content_shift._state import Session, lock_of
from content_shift._training import fit, generator_of, share, world
from content_shift.errors import UnsupportedTechnique
from content_shift.img2img import extractor_of
from content_shift.recipe import Inputs, added_conditions
from diffeat import FeatureExtractor, PromptEmbedding
from shared_core.device import autocast
from shared_core.errors import InputError, MissingExtraError

__all__ = ["LINEAR_TARGETS", "LOCON_TARGETS", "TrainedLoRA", "train_lora"]

LINEAR_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
)  # fmt: skip
LOCON_TARGETS = (*LINEAR_TARGETS, "conv1", "conv2", "conv_shortcut", "conv")
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
NAME = "in_training"


@dataclass(frozen=True)
class TrainedLoRA:
    """What `train_lora` gives.

    Attributes:
        path: Folder with ``pytorch_lora_weights.safetensors``.
        losses: Of the steps that were run.
        modules: Layers of the backbone that got low-rank weights.
    """

    path: Path
    losses: list[float]
    modules: int


def noised(
    fx: FeatureExtractor, clean: Tensor, generator: torch.Generator, low: int, high: int
) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, t and the target of a training step, each image at its own t in [low, high).

    Raises:
        InputError: For flow models.
    """
    schedule = fx.schedule
    if schedule.alphas_cumprod is None:
        raise InputError("training is defined for variance-preserving models")
    t = torch.randint(low, high, (len(clean),), generator=generator)
    noise = torch.randn(clean.shape, generator=generator).to(clean)
    level = schedule.alphas_cumprod[t].to(clean).view(-1, 1, 1, 1)
    signal, scale = level.sqrt(), (1 - level).sqrt()
    kind = getattr(schedule.scheduler.config, "prediction_type", "epsilon")
    targets = {"epsilon": noise, "v_prediction": signal * noise - scale * clean, "sample": clean}
    return signal * clean + scale * noise, t.to(clean.device), targets[kind]


def train_lora(
    model: Any,
    images: Any,
    captions: Sequence[str] | Sequence[Sequence[str]] = ("",),
    *,
    out: str | Path,
    rank: int = 64,
    alpha: int = 32,
    lr: float = 1e-4,
    te_lr: float = 5e-5,
    steps: int = 3000,
    batch_size: int = 1,
    locon: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    resume: bool = False,
    save_every: int = 100,
) -> TrainedLoRA:
    """Train low-rank weights on some images and leave the model as it was.

    The paper takes 30 images with three captions each (empty, tags, a sentence), rank 64, alpha 32,
    up to about 100 epochs, and picks a checkpoint by eye: a good one and a slightly overfitted one.

    Args:
        model: A pipeline or an extractor; a U-Net with text.
        images: The images.
        captions: Captions that all images share, or a list of captions for each image; each step
            draws one.
        out: Folder for weights and checkpoint.
        rank: Of the weights.
        alpha: Scale, over rank.
        lr: Of the U-Net's weights.
        te_lr: Of the text encoder's, where the pipeline has exactly one; 0 leaves it alone.
        steps: In all.
        batch_size: Images a step, over all processes.
        locon: Also on convolutions (LoCon), as in the paper.
        dtype: Of mixed precision; weights stay as they are.
        seed: Of order, noise and initial weights.
        resume: Continue the run in `out`.
        save_every: Steps between checkpoints.

    Raises:
        MissingExtraError: If peft is not installed.
        UnsupportedTechnique: If the backbone is no U-Net with text.
        InputError: If images and captions do not fit, or the run exists.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError("content-shift", "lora", "peft") from error
    fx = extractor_of(model)
    backbone: Any = fx.backbone
    if not hasattr(backbone, "down_blocks") or not backbone.config.cross_attention_dim:
        raise UnsupportedTechnique("train_lora", type(backbone), "it is no U-Net with text")
    if rank < 1 or alpha < 1 or steps < 1 or batch_size < 1:
        raise InputError(f"rank={rank}, alpha={alpha}, steps={steps}: accepted: 1 and more")
    inputs = Inputs.prepare(fx, images, seed=seed)
    words = _captions(captions, len(inputs.pixels))
    latents = inputs.latents.to(fx.device)
    tower: Any = getattr(fx.pipeline, "text_encoder", None)
    single = tower is not None and getattr(fx.pipeline, "text_encoder_2", None) is None
    with lock_of(backbone):
        opened = Session(fx)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                config = peft.LoraConfig(
                    r=rank, lora_alpha=alpha,
                    target_modules=list(LOCON_TARGETS if locon else LINEAR_TARGETS),
                )  # fmt: skip
                backbone.add_adapter(config, adapter_name=NAME)
                text_config = None
                if single and te_lr > 0:
                    text_config = peft.LoraConfig(
                        r=rank, lora_alpha=alpha, target_modules=list(TEXT_TARGETS)
                    )
                    peft.inject_adapter_in_model(text_config, tower, NAME)
            groups: list[dict[str, Any]] = []
            trainable: dict[str, nn.Parameter] = {}
            for prefix, part, rate in (("unet", backbone, lr), ("text_encoder", tower, te_lr)):
                own = {
                    f"{prefix}.{n}": p for n, p in (part.named_parameters() if part else ())
                    if f".{NAME}." in n
                }  # fmt: skip
                for p in own.values():
                    p.requires_grad_(True)
                    p.data = p.data.float()  # kept exact even where the model is in half precision
                if own:
                    groups.append({"params": list(own.values()), "lr": rate})
                trainable |= own

            def loss_of(step: int) -> Tensor:
                generator = generator_of(seed, step)
                rows = torch.randint(len(latents), (batch_size,), generator=generator)
                pick = torch.randint(1 << 30, (batch_size,), generator=generator)
                x, t, target = noised(fx, latents[rows], generator, 0, fx.schedule.steps)
                mine = share(torch.arange(batch_size))
                said = [words[rows[i]][pick[i] % len(words[rows[i]])] for i in mine.tolist()]
                with autocast(fx.device, dtype):
                    embedding = _embed(fx, said, trained=text_config is not None)
                    part = x[mine].to(fx.dtype)
                    added = added_conditions(fx, part, embedding)
                    given = {"added_cond_kwargs": added} if added else {}
                    guess = backbone(
                        part, t[mine],
                        encoder_hidden_states=embedding.states.to(fx.device, fx.dtype), **given,
                    ).sample  # fmt: skip
                return F.mse_loss(guess.float(), target[mine].float())

            losses = fit(
                trainable, groups, loss_of, steps=steps, out=out, resume=resume,
                save_every=save_every, description="training LoRA",
            )  # fmt: skip
            if world()[0] == 0:
                _save(fx, peft, Path(out), config, text_config)
            modules = sum(1 for n in trainable if n.startswith("unet.") and ".lora_A." in n)
        finally:
            opened.close()
    return TrainedLoRA(Path(out), losses, modules)


def _captions(captions: Any, images: int) -> list[list[str]]:
    if not captions:
        raise InputError("there are no captions; an empty one is ''")
    if all(isinstance(c, str) for c in captions):
        return [list(captions)] * images
    if len(captions) != images or not all(captions):
        raise InputError(f"captions of {len(captions)} images for {images}; give some for each")
    return [[c] if isinstance(c, str) else list(c) for c in captions]


def _embed(fx: FeatureExtractor, said: list[str], *, trained: bool) -> PromptEmbedding:
    if trained:
        pipe: Any = fx.pipeline
        tokens = pipe.tokenizer(
            said, padding="max_length", truncation=True, return_tensors="pt",
            max_length=pipe.tokenizer.model_max_length,
        ).input_ids  # fmt: skip
        return PromptEmbedding(pipe.text_encoder(tokens.to(fx.device))[0])
    parts = [fx.encode_prompt(text) for text in said]
    pooled = [p.pooled for p in parts if p.pooled is not None]
    return PromptEmbedding(
        torch.cat([p.states for p in parts]).detach(),
        pooled=torch.cat(pooled).detach() if pooled else None,
    )


def _save(fx: FeatureExtractor, peft: Any, out: Path, config: Any, text_config: Any) -> None:
    """Write the weights the way diffusers does, whole or not at all, alpha included."""
    from diffusers.loaders import lora_pipeline

    def layers(model: nn.Module) -> dict[str, Tensor]:
        # As peft names them: diffusers' own names know the attention layers only.
        return dict(peft.get_peft_model_state_dict(model, adapter_name=NAME))

    def metadata(settings: Any) -> dict[str, Any]:
        plain = settings.to_dict()
        return {k: sorted(v) if isinstance(v, set) else v for k, v in plain.items()}

    xl = getattr(fx.backbone.config, "addition_embed_type", None) == "text_time"
    mixin = (
        lora_pipeline.StableDiffusionXLLoraLoaderMixin
        if xl
        else lora_pipeline.StableDiffusionLoraLoaderMixin
    )
    given: dict[str, Any] = {
        "unet_lora_layers": layers(fx.backbone),
        "unet_lora_adapter_metadata": metadata(config),
    }
    if text_config is not None:
        pipe: Any = fx.pipeline
        given["text_encoder_lora_layers"] = layers(pipe.text_encoder)
        given["text_encoder_lora_adapter_metadata"] = metadata(text_config)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".lora-") as temporary:
        mixin.save_lora_weights(temporary, **given)
        name = "pytorch_lora_weights.safetensors"
        os.replace(Path(temporary) / name, out / name)

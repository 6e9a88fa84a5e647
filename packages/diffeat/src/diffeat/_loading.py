"""Loading of pipelines by diffusers' own loader."""

import warnings
from pathlib import Path
from typing import Any

import torch

from diffeat.presets import MODELS, PRESETS
from shared_core.errors import InputError, MissingExtraError


def load_pipeline(
    model: str,
    dtype: torch.dtype | None,
    variant: str | None,
    revision: str | None,
    lora: str | None,
) -> Any:
    """A diffusers pipeline by hub id, folder or short name; LoRA weights loaded into it.

    Raises:
        InputError: If it cannot be found or read.
        MissingExtraError: If its text towers need transformers.
    """
    from diffusers import DiffusionPipeline

    source = MODELS.get(model, model)
    folder = Path(source)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise InputError(f"{source} is no pipeline folder: it has no model_index.json")
    try:
        with warnings.catch_warnings():
            # Newer releases say `dtype`, which the oldest one that we accept does not know.
            warnings.filterwarnings("ignore", message=".*torch_dtype", category=FutureWarning)
            pipe = DiffusionPipeline.from_pretrained(
                source, torch_dtype=dtype or torch.float32, variant=variant, revision=revision
            )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{source} cannot be loaded: {reason}") from error
    except (ImportError, AttributeError) as error:
        raise MissingExtraError("diffeat", "text", "transformers") from error
    pipe.set_progress_bar_config(disable=True)
    if lora is not None:
        pipe.load_lora_weights(lora)
    return pipe


def load_backbone_config(model: str, revision: str | None = None) -> Any:
    """The backbone of a pipeline on the ``meta`` device: its configuration, no weights.

    Raises:
        InputError: If there is no configuration.
    """
    import diffusers

    source = MODELS.get(model, model)
    for part in ("unet", "transformer"):
        try:
            config = diffusers.ConfigMixin.load_config(source, subfolder=part, revision=revision)
        except (OSError, ValueError):
            continue
        backbone = getattr(diffusers, config["_class_name"])
        with torch.device("meta"):
            return backbone.from_config(config)
    raise InputError(
        f"{source}: no configuration of a unet or transformer; give a reachable hub id, or a "
        "pipeline folder"
    )


def native_size(layers: Any, backbone: Any, vae: Any) -> int | None:
    """Side of the images that a preset, or else the model, is made for."""
    sample = getattr(backbone.config, "sample_size", None)
    factor = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
    if isinstance(layers, str) and layers in PRESETS:
        preset = PRESETS[layers]
        # A model that is smaller than the preset's own (a toy) keeps its size.
        if not isinstance(sample, int) or sample * factor >= preset.size:
            return preset.size
    return sample * factor if isinstance(sample, int) else None

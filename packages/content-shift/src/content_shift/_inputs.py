"""What commands read: images, extractors, techniques, labels, captions."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from content_shift.bucket import FeatureSpec, load_specs
from content_shift.recipe import Recipe
from content_shift.techniques import CFG, ControlNet, LoRA, Prompt
from diffeat import FeatureExtractor
from shared_core.device import select_dtype
from shared_core.errors import InputError


def open_extractor(
    model: str, layers: Any, device: torch.device, dtype: str, size: int | None
) -> FeatureExtractor:
    """The extractor of a hub id, a pipeline folder, or a demo's folder."""
    from diffeat.demo import load_backbone

    if (Path(model) / "text.safetensors").is_file():
        fx = load_backbone(Path(model))
        fx.layers = layers
        fx.backbone.to(device)
        return fx
    return FeatureExtractor.from_pretrained(
        model, layers, dtype=select_dtype(dtype, device), device=device, size=size
    )


def techniques_from(
    prompts: Sequence[str], control: str | None, preprocess: str, scale: float,
    loras: Sequence[str], cfg: float | None, recipe: Path | None,
) -> dict[str, Recipe]:  # fmt: skip
    """Techniques named on a command line, each alone, and those of a recipe file.

    Raises:
        InputError: If there is none.
    """
    found: dict[str, Recipe] = {}
    for i, text in enumerate(prompts):
        found["prompt" if len(prompts) == 1 else f"prompt {i + 1}"] = Recipe(Prompt(text))
    if control is not None:
        found["control"] = Recipe(ControlNet(control, preprocess, scale))
    for i, path in enumerate(loras):
        found["lora" if len(loras) == 1 else f"lora {i + 1}"] = Recipe(LoRA(path))
    if cfg is not None:
        found["guidance"] = Recipe(CFG(cfg))
    if recipe is not None:
        found |= {spec.name: spec.recipe for spec in load_specs(recipe)}
    if not found:
        raise InputError(
            "name at least one technique: --with-prompt, --control, --lora, --cfg or --recipe"
        )
    return found


def features_from(
    recipe: str, loras: Sequence[str], control: str | None, topology: str, pre_denoise: str,
    skip_missing: bool,
) -> list[FeatureSpec]:  # fmt: skip
    """Features of a preset's name or of a recipe file.

    Raises:
        InputError: If it is neither.
    """
    from content_shift.presets import get_recipe

    if Path(recipe).suffix in (".yaml", ".yml", ".json"):
        return load_specs(recipe)
    given = {}
    for item in loras:
        key, _, path = item.partition("=")
        if not path:
            raise InputError(f"--lora {item}; accepted: KEY=PATH, such as good=runs/lora")
        given[key] = path
    return get_recipe(recipe).build(
        given, topology=topology, control=control, pre_denoise=pre_denoise,
        skip_missing=skip_missing,
    )  # fmt: skip


def read_captions(file: Path, names: Sequence[str]) -> list[list[str]]:
    """Captions of images from a JSON object: name to a caption or several.

    Raises:
        InputError: If it cannot be read, or an image has none.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        missing = [n for n in names if n not in content]
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"the captions {file} cannot be read: {error}") from error
    if missing or not isinstance(content, dict):
        raise InputError(f"{file} holds no caption for {', '.join(missing[:3]) or 'the images'}")
    return [[c] if isinstance(c, str) else list(c) for c in (content[n] for n in names)]

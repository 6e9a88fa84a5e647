"""Models and prompts for the command line, by path or hub id."""

from typing import Any

import torch
from torch import Tensor

from lede.presets import get_preset
from shared_core.errors import InputError


def load_model(
    model: str | None, preset: str | None, dtype: torch.dtype, device: torch.device
) -> tuple[Any, Any, tuple[int, ...] | None]:
    """Model, tokenizer and the preset's exits.

    Raises:
        InputError: If nothing is named, or it cannot be loaded; for gated weights the message says
            how to get access.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = get_preset(preset) if preset else None
    name = model or (found.model if found else None)
    if name is None:
        raise InputError("say which model: --model FOLDER or HUB-ID, or --preset NAME")
    try:
        loaded = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    except (OSError, ValueError) as error:
        text = " ".join(str(error).split())[:300]
        if any(word in text for word in ("gated", "401", "403")):
            raise InputError(
                f"{name} is gated: ask for access at https://huggingface.co/{name}, then run "
                "'hf auth login'"
            ) from error
        raise InputError(f"{name} cannot be loaded: {text}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return loaded.to(device).eval(), tokenizer, found.exit_layers if found else None


def tokenize(tokenizer: Any, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Ids and mask, padded at the left."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    return batch["input_ids"], batch["attention_mask"]

"""Pieces of a causal language model: its first blocks as a model of their own, LoRA on them."""

import copy
import inspect
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from shared_core.errors import InputError

__all__ = [
    "add_lora",
    "bars_for_people_only",
    "check_causal_lm",
    "first_blocks",
    "load_causal_lm",
    "lora_layers",
    "lora_state",
    "make_logits",
    "merge_lora",
    "randomize",
    "run_cached",
    "trunk_of",
    "unshare",
]

FAMILIES = "Llama, Qwen2, Qwen3, Mistral, Gemma, Gemma 2 and models built like them"

# Factors between the last hidden state and the logits that only the model's own forward applies.
_UNKNOWN_SCALES = ("logits_scaling", "logit_scale", "embedding_multiplier")


def trunk_of(decoder: nn.Module) -> Any:
    """The model under the language-model head."""
    return getattr(decoder, getattr(decoder, "base_model_prefix", "") or "model", None)


def check_causal_lm(decoder: nn.Module) -> None:
    """Refuse a model whose parts are not where the method needs them.

    Raises:
        TypeError: Naming what is missing and what is supported.
    """
    trunk = trunk_of(decoder)
    lacking = [n for n in ("layers", "norm", "rotary_emb") if not hasattr(trunk, n)]
    lacking += [n for n in ("get_input_embeddings", "get_output_embeddings", "generate")
                if not hasattr(decoder, n)]  # fmt: skip
    if not lacking and decoder.get_output_embeddings() is None:  # type: ignore[operator]
        lacking.append("a language-model head")
    config = getattr(decoder, "config", None)
    scales = [n for n in _UNKNOWN_SCALES if getattr(config, n, None) not in (None, 1, 1.0)]
    if lacking or scales:
        what = f"has no {', '.join(lacking)}" if lacking else f"uses {', '.join(scales)}"
        raise TypeError(
            f"{type(decoder).__name__} {what}, so GMSA cannot take it apart; supported: {FAMILIES}"
        )


def first_blocks(decoder: nn.Module, count: int, *, copy_blocks: bool, embed: bool) -> Any:
    """The first `count` blocks, with rotary embedding and final norm, as a model of their own.

    Modules are new, so that adapters on them do not touch `decoder`; frozen parameters are the
    same tensors.

    Args:
        decoder: A causal language model.
        count: Number of blocks.
        copy_blocks: Whether the blocks get tensors of their own, to be trained apart.
        embed: Whether the result embeds token ids; without, it takes ``inputs_embeds`` only.
    """
    trunk = trunk_of(decoder)
    own = {id(p) for p in trunk.layers[:count].parameters()} if copy_blocks else set()
    memo: dict[int, Any] = {
        id(t): t for t in (*trunk.parameters(), *trunk.buffers()) if id(t) not in own
    }
    left_out = [*trunk.layers[count:]] + ([] if embed else [trunk.get_input_embeddings()])
    # Blocks that are cut off afterwards, and an embedding that is not wanted, are not copied.
    memo.update((id(module), nn.Identity()) for module in left_out)
    part = copy.deepcopy(trunk, memo)
    part.layers = part.layers[:count]
    config, total = part.config, part.config.num_hidden_layers
    for name, value in list(vars(config).items()):
        if isinstance(value, list | tuple) and len(value) == total and total > 1:
            setattr(config, name, type(value)(value[:count]))
    config.num_hidden_layers = count
    return part


def unshare(part: nn.Module, decoder: nn.Module) -> None:
    """Give `part` a copy of every parameter that it shares with `decoder`."""
    shared = {id(p) for p in decoder.parameters()}
    copies: dict[int, nn.Parameter] = {}
    for module in part.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in shared:
                if id(parameter) not in copies:
                    copies[id(parameter)] = nn.Parameter(
                        parameter.detach().clone(), requires_grad=False
                    )
                setattr(module, name, copies[id(parameter)])


def add_lora(
    model: nn.Module,
    rank: int,
    alpha: float | int,
    dropout: float | int,
    targets: str | Sequence[str],
) -> LoraConfig:
    """Put LoRA on the linear layers of a model, in place; fresh adapters change nothing.

    Raises:
        ValueError: If a named target is not in the model.
    """
    heads = {id(h) for h in [getattr(model, "lm_head", None)] if h is not None}
    if targets == "all-linear":
        targets = sorted(
            {
                name.rsplit(".", 1)[-1]
                for name, module in model.named_modules()
                if isinstance(module, nn.Linear) and id(module) not in heads
            }
        )
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets), bias="none"
    )
    inject_adapter_in_model(config, model)
    return config


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """The layers with LoRA on them, by name."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapters' tensors under the names that PEFT stores them by."""
    return dict(get_peft_model_state_dict(model, save_embedding_layers=False))


def merge_lora(model: nn.Module) -> None:
    """Fold the LoRA on a model's linear layers into their weights, in place."""
    for name, layer in list(lora_layers(model)):
        base: Any = layer.get_base_layer()
        weight = base.weight.detach() + layer.get_delta_weight("default").to(base.weight.dtype)
        merged = nn.Linear(
            base.in_features, base.out_features, bias=base.bias is not None, device="meta"
        )
        merged.weight = nn.Parameter(weight, requires_grad=False)
        if base.bias is not None:
            merged.bias = base.bias
        model.set_submodule(name, merged)


def randomize(module: nn.Module, std: float) -> None:
    """Linear weights from N(0, std²), biases zero; norms stay as they are."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def bars_for_people_only() -> None:
    """Switch the bars of transformers off where stderr is no terminal, as ours are."""
    if not sys.stderr.isatty():
        disable_progress_bar()


def load_causal_lm(name: str | os.PathLike[str], **kwargs: Any) -> Any:
    """``AutoModelForCausalLM.from_pretrained``, with an error of one line.

    Raises:
        InputError: If there is no such model, or it cannot be read.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(name, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise InputError(f"the language model {name!r} cannot be loaded: {reason}") from error


def run_cached(trunk: Any, cache: Any, **inputs: Any) -> Tensor:
    """Run a trunk with a cache, under whichever name its transformers version knows it."""
    known = inspect.signature(type(trunk).forward).parameters
    name = "cache" if "cache" in known else "past_key_values"
    hidden: Tensor = trunk(**inputs, **{name: cache}, use_cache=True).last_hidden_state
    return hidden


def make_logits(decoder: Any, hidden: Tensor) -> Tensor:
    """The logits of hidden states ``[N, d]``, as the model itself makes them."""
    logits: Tensor = decoder.get_output_embeddings()(hidden)
    cap = getattr(decoder.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap

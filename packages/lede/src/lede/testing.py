"""Small random models of the real classes, for tests and examples."""

from typing import Any

import torch

from shared_core.errors import InputError

__all__ = ["TINY_MODEL_TYPES", "tiny_model"]

_SPECIAL: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    "phi3": {"pad_token_id": 0},
    "smollm3": {"pad_token_id": 0},
    "granite": {"embedding_multiplier": 2.0, "logits_scaling": 3.0, "residual_multiplier": 0.8},
    "olmo2": {},
    "gemma2": {
        "head_dim": 8,
        "sliding_window": 6,
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 300.0,  # the usual 30 makes ties of these steep logits
    },
    "gemma3_text": {
        "head_dim": 8,
        "sliding_window": 6,
        "query_pre_attn_scalar": 8,
        "sliding_window_pattern": 2,
    },
}
TINY_MODEL_TYPES = tuple(_SPECIAL)


def tiny_model(
    model_type: str = "llama",
    *,
    layers: int = 4,
    vocab: int = 64,
    hidden: int = 32,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    sharpness: float = 20.0,
    **config: Any,
) -> Any:
    """A random model of a real transformers class, with no end-of-text token.

    Args:
        model_type: One of `TINY_MODEL_TYPES`.
        layers: L.
        vocab: V.
        hidden: Width.
        seed: Of the weights.
        dtype: Of the weights.
        sharpness: Factor on the head, so that logits are not all alike.
        config: Further entries of the model's config.

    Raises:
        InputError: If the type is unknown.

    Example:
        >>> tiny_model("qwen3").config.num_hidden_layers
        4
    """
    if model_type not in _SPECIAL:
        raise InputError(f"no tiny model of {model_type!r}; accepted: {', '.join(_SPECIAL)}")
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": False,
        **_SPECIAL[model_type],
        **config,
    }
    torch_state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    finally:
        torch.set_rng_state(torch_state)
    with torch.no_grad():
        for depth, layer in enumerate(model.model.layers):
            for parameter in layer.parameters():
                if parameter.ndim >= 2:
                    parameter.mul_(4.0 / (1 + depth))  # later layers correct earlier ones
        model.lm_head.weight.mul_(sharpness)
    return model.to(dtype).eval()

"""Small random models of the real classes, for tests and examples."""

from typing import Any

import torch

from shared_core.errors import InputError

__all__ = ["TINY_MODEL_TYPES", "ScriptedVerifier", "synthetic_llama", "tiny_model"]

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

    Examples:
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


def synthetic_llama(
    *,
    layers: int = 12,
    hidden: int = 256,
    vocab: int = 2048,
    knee: int = 4,
    acceptance: float = 0.9,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **config: Any,
) -> Any:
    """A random Llama of any size whose exit at the knee agrees with its last layer as wanted.

    For timing without weights: real kernels and bytes, a controlled acceptance. What the layers
    after the knee add to the hidden state is scaled by one factor, found by bisection.

    Args:
        layers: L.
        hidden: Width; the shape of a 7B model is ``layers=32, hidden=4096, vocab=32000``.
        vocab: V.
        knee: Exit that agrees.
        acceptance: Share of positions at which it is to agree.
        seed: Of the weights and of the 256 tokens that the agreement is measured on.
        dtype: Of the weights.
        device: Of the weights.
        config: Further entries of the config.

    Raises:
        InputError: If knee or acceptance are out of range.

    Examples:
        >>> synthetic_llama(layers=3, hidden=32, vocab=64, knee=1).config.num_hidden_layers
        3
    """
    from lede.adapters import layer_runner

    if not 1 <= knee < layers or not 0 < acceptance < 1:
        raise InputError(
            f"knee={knee}, acceptance={acceptance}; accepted: 1 to {layers - 1}, above 0 to below 1"
        )
    settings = {
        "num_attention_heads": max(1, hidden // 64),
        "num_key_value_heads": max(1, hidden // 64),
        "intermediate_size": hidden * 11 // 4,
        "max_position_embeddings": 4096,
        **config,
    }
    model = tiny_model(
        "llama", layers=layers, vocab=vocab, hidden=hidden, seed=seed, dtype=dtype, **settings
    ).to(device)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab, (4, 64), generator=generator).to(device)
    runner = layer_runner(model)
    late = [p for layer in model.model.layers[knee:] for p in _writers(layer)]
    originals = [p.detach().clone() for p in late]
    low, high = 0.0, 8.0
    with torch.no_grad():
        for _ in range(16):
            scale = (low + high) / 2
            for parameter, original in zip(late, originals, strict=True):
                parameter.copy_(original * scale)
            states: list[Any] = []
            hook = model.model.layers[knee - 1].register_forward_hook(
                lambda m, a, out, states=states: states.append(out)
            )
            final = model(ids, use_cache=False).logits
            hook.remove()
            early = runner.logits(states[0][0] if isinstance(states[0], tuple) else states[0])
            agreement = (early.argmax(-1) == final.argmax(-1)).float().mean().item()
            low, high = (scale, high) if agreement > acceptance else (low, scale)
    return model


class ScriptedVerifier:
    """Accepts every draft with a fixed chance, whatever the model says: for timing alone.

    The output is **not** the model's: ``stats.lossless`` says so.

    Args:
        acceptance: The chance.
        seed: Of the draws.

    Raises:
        InputError: If the chance is not in 0 .. 1.

    Examples:
        >>> verifier = ScriptedVerifier(1.0)
        >>> verifier(torch.tensor([[5, 6, 7]]), torch.tensor([[1, 2]]), torch.tensor([2]))
        (tensor([2]), tensor([7]))
    """

    lossless = False

    def __init__(self, acceptance: float, seed: int = 0) -> None:
        if not 0 <= acceptance <= 1:
            raise InputError(f"acceptance={acceptance}; accepted: 0 to 1")
        self.acceptance = acceptance
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(
        self, predictions: torch.Tensor, drafts: torch.Tensor, counts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Accepted drafts per row, and the model's token after them.

        Args:
            predictions: [B, k].
            drafts: [B, k - 1].
            counts: Drafts of each row, [B].
        """
        lucky = torch.rand(drafts.shape, generator=self._generator) < self.acceptance
        real = torch.arange(drafts.shape[1], device=drafts.device) < counts[:, None]
        accepted = (lucky.to(drafts.device) & real).long().cumprod(1).sum(1)
        return accepted, predictions.gather(1, accepted[:, None])[:, 0]


def _writers(layer: Any) -> list[torch.Tensor]:
    """The matrices that write into the residual stream."""
    return [layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight]

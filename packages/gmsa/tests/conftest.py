import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest_plugins = ["shared_core.testing"]


def pytest_collection_finish() -> None:
    """Each run of the Trainer collects garbage; what the libraries' imports made is none."""
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


VOCAB = 60


def build_lm(family: str = "llama", *, layers: int = 3, seed: int = 0, **changes: Any) -> Any:
    """A small random model of a real class, large enough weights that outputs differ."""
    import transformers as tf

    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
    }
    extra: dict[str, dict[str, Any]] = {
        "llama": {},
        "qwen2": {},
        "qwen3": {"head_dim": 8},
        "mistral": {"sliding_window": 6},
        "gemma": {"head_dim": 8},
        "gemma2": {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
        "phi3": {},
    }
    names = {
        "llama": "Llama",
        "qwen2": "Qwen2",
        "qwen3": "Qwen3",
        "mistral": "Mistral",
        "gemma": "Gemma",
        "gemma2": "Gemma2",
        "phi3": "Phi3",
    }
    config_class = getattr(tf, f"{names[family]}Config")
    model_class = getattr(tf, f"{names[family]}ForCausalLM")
    torch.manual_seed(seed)
    model = model_class(config_class(**{**settings, **extra[family], **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # not all alike, so that a norm left out is seen
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def build_gmsa(family: str = "llama", *, fresh: bool = False, lm: Any = None, **settings: Any):
    """A compressor whose LoRA does something unless it is asked to be fresh."""
    from gmsa import GMSAConfig, GMSAModel

    options = {"encoder_layers": 2, "lora_r": 4, "lora_dropout": 0.0, **settings}
    torch.manual_seed(1)
    model = GMSAModel.from_backbone(lm or build_lm(family), GMSAConfig(**options))
    if not fresh:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)
    return model


@pytest.fixture
def tiny_lm() -> Callable[..., Any]:
    return build_lm


@pytest.fixture
def tiny_gmsa() -> Callable[..., Any]:
    return build_gmsa


@pytest.fixture
def ragged() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Right-padded random ids of given lengths, and their mask."""

    def make(lengths: list[int], seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        n = max(lengths)
        ids = torch.randint(2, VOCAB, (len(lengths), n), generator=generator)
        mask = torch.arange(n) < torch.tensor(lengths)[:, None]
        return ids.masked_fill(~mask, 0), mask

    return make

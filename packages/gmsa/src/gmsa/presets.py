"""The paper's settings as data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shared_core.errors import InputError

__all__ = ["OFFICIAL_GENERATION", "PRESETS", "RESTATE_INSTRUCTION", "Preset", "get_preset"]

RESTATE_INSTRUCTION = "Restate the aforementioned Text."
"""The instruction X_ins of the autoencoding stage, as in the paper's figure."""

OFFICIAL_GENERATION: dict[str, Any] = {
    "max_new_tokens": 100,
    "do_sample": False,
    "repetition_penalty": 1.3,
}
"""How the authors' code generates, for `gmsa.GMSACompressor.answer`; ours has no penalty."""


@dataclass(frozen=True)
class Preset:
    """Settings of a compressor and of its two training stages.

    Attributes:
        model: Hub id of the base; ``None`` where it is yours to name.
        rates: Compression rates drawn in training.
        rate_sampling: ``sample``, ``batch`` or ``fixed``.
        encoder_layers: k.
        lsa_layers: k_LSA.
        ae_steps: Steps of the autoencoding stage.
        ae_lr: Its learning rate (cosine, 10 % warm-up).
        keft_steps: Steps of the fine-tuning stage.
        keft_lr: Its learning rate.
        decoder_tuning: What fine-tuning trains: ``full`` or ``lora``.
        lora_r: Rank of the encoder's LoRA.
        lora_alpha: Its scale's numerator.
        batch_size: Samples a process and step.
        max_length: Tokens of context and prompt together.
        dtype: Of the weights.
        seed: Of the run.
        restate_instruction: The prompt of the autoencoding stage.
        generation: Options of ``generate``.
    """

    model: str | None
    rates: tuple[int, ...]
    rate_sampling: str = "sample"
    encoder_layers: int = 8
    lsa_layers: int = 1
    ae_steps: int = 5000
    ae_lr: float = 1e-4
    keft_steps: int = 10000
    keft_lr: float = 1e-5
    decoder_tuning: str = "full"
    lora_r: int = 128
    lora_alpha: int = 32
    batch_size: int = 1
    max_length: int = 28000
    dtype: str = "bfloat16"
    seed: int = 42
    restate_instruction: str = RESTATE_INSTRUCTION
    generation: Mapping[str, Any] = field(default_factory=lambda: {"max_new_tokens": 100})


_QWEN = "Qwen/Qwen3-4B-Instruct-2507"

PRESETS = {
    "qwen3-4b-4x8x": Preset(_QWEN, (4, 8)),
    "qwen3-4b-16x32x": Preset(_QWEN, (16, 32)),
    "llama3.2-3b-4x8x": Preset("meta-llama/Llama-3.2-3B-Instruct", (4, 8)),
    "llama3.2-1b": Preset("meta-llama/Llama-3.2-1B", (4, 8)),
    "official": Preset(
        _QWEN, (16,), rate_sampling="fixed", max_length=280000, generation=OFFICIAL_GENERATION
    ),
    "official-random": Preset(
        _QWEN, (16, 32), rate_sampling="batch", max_length=280000, generation=OFFICIAL_GENERATION
    ),
    # Those of the demo, for the model that it leaves in its folder.
    "tiny-demo": Preset(
        None, (4,), encoder_layers=1, ae_steps=400, ae_lr=4e-3, keft_steps=200, keft_lr=2e-3,
        lora_r=32, lora_alpha=32, batch_size=24, max_length=512, dtype="float32", seed=0,
        restate_instruction="Restate",
        generation={"max_new_tokens": 2},
    ),
}  # fmt: skip
"""The presets by name."""


def get_preset(name: str) -> Preset:
    """A preset by name.

    Raises:
        InputError: If there is none; the message lists them.

    Examples:
        >>> get_preset("qwen3-4b-4x8x").rates
        (4, 8)
    """
    if name not in PRESETS:
        raise InputError(f"no preset is called {name!r}; accepted: {', '.join(PRESETS)}")
    return PRESETS[name]

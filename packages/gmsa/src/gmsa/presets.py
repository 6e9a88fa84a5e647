"""The paper's settings as data."""

from dataclasses import dataclass

from shared_core.errors import InputError

__all__ = ["PRESETS", "Preset", "get_preset"]


@dataclass(frozen=True)
class Preset:
    """Settings of a compressor and of its two training stages.

    Attributes:
        model: Hub id of the base.
        rates: Compression rates drawn in training.
        rate_sampling: ``sample``, ``batch`` or ``fixed``.
        encoder_layers: k.
        lsa_layers: k_LSA.
        ae_steps: Steps of the autoencoding stage.
        ae_lr: Its learning rate (cosine, 10 % warm-up).
        keft_steps: Steps of the fine-tuning stage.
        keft_lr: Its learning rate.
        dtype: Of the weights.
    """

    model: str
    rates: tuple[int, ...]
    rate_sampling: str = "sample"
    encoder_layers: int = 8
    lsa_layers: int = 1
    ae_steps: int = 5000
    ae_lr: float = 1e-4
    keft_steps: int = 10000
    keft_lr: float = 1e-5
    dtype: str = "bfloat16"


_QWEN = "Qwen/Qwen3-4B-Instruct-2507"

PRESETS = {
    "qwen3-4b-4x8x": Preset(_QWEN, (4, 8)),
    "qwen3-4b-16x32x": Preset(_QWEN, (16, 32)),
    "llama3.2-3b-4x8x": Preset("meta-llama/Llama-3.2-3B-Instruct", (4, 8)),
    "llama3.2-1b": Preset("meta-llama/Llama-3.2-1B", (4, 8)),
    "official": Preset(_QWEN, (16, 32), rate_sampling="batch"),
}
"""The presets by name."""


def get_preset(name: str) -> Preset:
    """A preset by name.

    Raises:
        InputError: If there is none; the message lists them.

    Example:
        >>> get_preset("qwen3-4b-4x8x").rates
        (4, 8)
    """
    if name not in PRESETS:
        raise InputError(f"no preset is called {name!r}; accepted: {', '.join(PRESETS)}")
    return PRESETS[name]

"""The settings of a compressor, kept in its ``config.json``."""

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

from gmsa.presets import RESTATE_INSTRUCTION
from gmsa.rates import SAMPLINGS, check_rates
from shared_core.errors import InputError

__all__ = ["GMSAConfig"]

_CHOICES = {
    "merging": ("groups", "memory", "embeddings"),
    "alignment": ("lsa", "linear", "none"),
    "lsa_init": ("decoder", "random"),
    "rate_sampling": SAMPLINGS,
}


class GMSAConfig(PretrainedConfig):
    """Settings of a `GMSAModel`.

    Args:
        base_model_name_or_path: Hub id or folder of the language model that is encoder and decoder.
        base_config: Its configuration as a dict; filled in by `GMSAModel.from_backbone`.
        base_fingerprint: A hash of its weights, so that a checkpoint refuses another base; filled
            in likewise.
        encoder_layers: k, the number of its first blocks that encode.
        lsa_layers: k_LSA, the number of its first blocks that align.
        merging: ``groups`` (the paper), ``memory`` (learned tokens appended to the context whose
            last states are the summary, in the manner of ICAE) or ``embeddings`` (the group means
            of the token embeddings themselves, without an encoder).
        memory_tokens: How many memory tokens there are at most (``merging="memory"``).
        alignment: ``lsa``, ``linear`` or ``none``.
        lsa_init: ``decoder`` (copies of its first blocks) or ``random``.
        encoder_final_norm: Apply the model's last norm to the encoder's output.
        lsa_final_norm: The same for the alignment's output.
        rates: Compression rates drawn in training.
        default_rate: The rate where none is given.
        rate_sampling: ``sample`` (one draw a sample), ``batch`` or ``fixed`` (`default_rate`).
        lora_r: Rank of the encoder's LoRA.
        lora_alpha: Its numerator of the scale alpha / r.
        lora_dropout: Its dropout.
        lora_targets: ``all-linear`` or names of linear layers.
        decoder_tuning: What the last fine-tuning trained: ``none``, ``full`` or ``lora``.
        decoder_lora_r: Rank of the decoder's LoRA where `decoder_tuning` is ``lora``.
        decoder_lora_alpha: Its scale's numerator.
        restate_instruction: The prompt of the autoencoding stage.

    Raises:
        InputError: If a value is not accepted.

    Examples:
        >>> GMSAConfig(encoder_layers=2, rates=(4,)).alignment
        'lsa'
    """

    model_type = "gmsa"

    def __init__(
        self,
        base_model_name_or_path: str | None = None,
        base_config: dict[str, Any] | None = None,
        base_fingerprint: str | None = None,
        encoder_layers: int = 8,
        lsa_layers: int = 1,
        merging: str = "groups",
        memory_tokens: int = 512,
        alignment: str = "lsa",
        lsa_init: str = "decoder",
        encoder_final_norm: bool = True,
        lsa_final_norm: bool = True,
        rates: Sequence[int] = (4, 8),
        default_rate: int = 4,
        rate_sampling: str = "sample",
        lora_r: int = 128,
        lora_alpha: float | int = 32,
        lora_dropout: float | int = 0.05,
        lora_targets: str | Sequence[str] = "all-linear",
        decoder_tuning: str = "none",
        decoder_lora_r: int = 64,
        decoder_lora_alpha: float | int = 64,
        restate_instruction: str = RESTATE_INSTRUCTION,
        **kwargs: Any,
    ) -> None:
        self.base_model_name_or_path = base_model_name_or_path
        self.base_config = dict(base_config or {})
        self.base_fingerprint = base_fingerprint
        self.encoder_layers = encoder_layers
        self.lsa_layers = lsa_layers
        self.merging = merging
        self.memory_tokens = memory_tokens
        self.alignment = alignment
        self.lsa_init = lsa_init
        self.encoder_final_norm = encoder_final_norm
        self.lsa_final_norm = lsa_final_norm
        self.rates = check_rates(rates)
        [self.default_rate] = check_rates([default_rate], "default rates")
        self.rate_sampling = rate_sampling
        self.lora_r = lora_r
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        self.lora_targets = lora_targets if isinstance(lora_targets, str) else list(lora_targets)
        self.decoder_tuning = decoder_tuning
        self.decoder_lora_r = decoder_lora_r
        self.decoder_lora_alpha = decoder_lora_alpha
        self.restate_instruction = restate_instruction
        for name, accepted in _CHOICES.items():
            if getattr(self, name) not in accepted:
                raise InputError(
                    f"{name} is {getattr(self, name)!r}; accepted: {', '.join(accepted)}"
                )
        for name in ("encoder_layers", "lsa_layers", "memory_tokens", "lora_r"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; accepted: 1 and above")
        super().__init__(**kwargs)

    def check_backbone(self, num_layers: int) -> None:
        """Refuse depths that a backbone of `num_layers` blocks does not have.

        Raises:
            InputError: Naming the setting and what is accepted.
        """
        for name in ("encoder_layers", "lsa_layers"):
            if getattr(self, name) > num_layers:
                raise InputError(
                    f"{name} is {getattr(self, name)}, but the model has {num_layers} blocks; "
                    f"accepted: 1 to {num_layers}"
                )

"""Which parameters train in which stage (table 2.7 of the method).

======================  ==============  =====
part                    autoencoding    keft
======================  ==============  =====
encoder, its LoRA       train           no
encoder, its base       no              no
alignment               train           no
decoder                 no              train
======================  ==============  =====
"""

from typing import TYPE_CHECKING

from gmsa._backbone import add_lora, unshare
from shared_core.errors import InputError

if TYPE_CHECKING:
    from gmsa.model import GMSAModel

__all__ = ["STAGES", "TUNINGS", "add_decoder_lora", "freeze_for_stage", "unshare_base"]

STAGES = ("autoencoding", "keft")
TUNINGS = ("full", "lora")


def freeze_for_stage(model: "GMSAModel", stage: str, decoder_tuning: str = "full") -> None:
    """See `GMSAModel.freeze_for_stage`."""
    if stage not in STAGES:
        raise InputError(f"stage is {stage!r}; accepted: {', '.join(STAGES)}")
    if decoder_tuning not in TUNINGS:
        raise InputError(f"decoder_tuning is {decoder_tuning!r}; accepted: {', '.join(TUNINGS)}")
    model.requires_grad_(False)
    if stage == "autoencoding":
        for part in (
            model.lsa.layers if model.lsa is not None else None,
            model.projection,
            model.memory,
        ):
            if part is not None:
                part.requires_grad_(True)
        if model.encoder is not None:
            for name, parameter in model.encoder.named_parameters():
                parameter.requires_grad_("lora_" in name)
        return
    known = model.config.decoder_tuning
    if decoder_tuning == "full":
        if known == "lora":
            raise InputError("the decoder already has LoRA; go on with decoder_tuning='lora'")
        unshare_base(model)
        model.decoder.requires_grad_(True)
    else:
        if known == "full":
            raise InputError("the decoder was fully fine-tuned; go on with decoder_tuning='full'")
        if known != "lora":
            add_decoder_lora(model)
        for name, parameter in model.decoder.named_parameters():
            parameter.requires_grad_("lora_" in name)
    model.config.decoder_tuning = decoder_tuning


def add_decoder_lora(model: "GMSAModel") -> None:
    """Put fresh LoRA on the decoder's linear layers."""
    add_lora(
        model.decoder,
        model.config.decoder_lora_r,
        model.config.decoder_lora_alpha,
        model.config.lora_dropout,
        "all-linear",
    )


def unshare_base(model: "GMSAModel") -> None:
    """Give encoder and alignment their own copies of what they share with the decoder."""
    for part in (model.encoder, model.lsa):
        if part is not None:
            unshare(part, model.decoder)

"""The compressor and its decoder as one model of Hugging Face transformers."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from gmsa._backbone import (
    add_lora,
    check_causal_lm,
    first_blocks,
    load_causal_lm,
    make_logits,
    merge_lora,
    randomize,
    trunk_of,
)
from gmsa._checkpoint import base_fingerprint, load_compressor, save_compressor
from gmsa._memory import memory_states, new_memory
from gmsa.configuration import GMSAConfig
from gmsa.losses import IGNORED, label_cross_entropy
from gmsa.merging import Rate, as_rates, compact_rows, group_merge
from gmsa.sequences import join_rows
from gmsa.soft_tokens import SoftTokens
from gmsa.stages import freeze_for_stage, unshare_base
from shared_core.errors import InputError

__all__ = ["GMSAModel", "GMSAOutput"]


@dataclass
class GMSAOutput(ModelOutput):
    """What a training step gives.

    Attributes:
        loss: Mean cross-entropy over the labels.
        num_label_tokens: How many labels there were.
        num_correct: How many of them the argmax predicts.
        num_tokens: Context tokens in the batch.
        num_soft_tokens: Soft tokens they became.
    """

    loss: Any = None  # accelerate makes outputs anew, with a dict in the first place
    num_label_tokens: Tensor | None = None
    num_correct: Tensor | None = None
    num_tokens: Tensor | None = None
    num_soft_tokens: Tensor | None = None


class GMSAModel(PreTrainedModel):
    """A causal language model with a context compressor made of its own first blocks.

    ``compress`` encodes with the first k blocks (LoRA-tuned), averages groups of r states, and
    aligns the means with copies of the decoder's first k_LSA blocks. What comes out stands in the
    decoder's input as if it were token embeddings. Make one with `from_backbone` or
    `from_pretrained`.

    Attributes:
        encoder: The first k blocks with LoRA; ``None`` without an encoder.
        lsa: The alignment's blocks; ``None`` for another alignment.
        projection: The linear alignment; ``None`` for another.
        memory: The memory tokens' embeddings; ``None`` but for ``merging="memory"``.
        decoder: A plain causal language model of transformers.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> backbone = LlamaForCausalLM(LlamaConfig(
        ...     vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        ...     num_attention_heads=2, bos_token_id=None, eos_token_id=1, pad_token_id=0))
        >>> model = GMSAModel.from_backbone(backbone, GMSAConfig(encoder_layers=1, lora_r=4))
        >>> soft = model.compress(torch.arange(2, 12)[None], rate=4)
        >>> soft.embeds.shape, soft.ratio
        (torch.Size([1, 3, 16]), tensor([3.3333]))
    """

    config_class = GMSAConfig
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _tp_plan: dict[str, str] = {}  # noqa: RUF012 - how transformers declares it
    _pp_plan: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, config: GMSAConfig, decoder: nn.Module, *, share_base: bool = True) -> None:
        check_causal_lm(decoder)
        if config.decoder_tuning not in ("none", "full", "lora"):
            raise InputError(
                f"decoder_tuning is {config.decoder_tuning!r}; accepted: none, full, lora"
            )
        trunk = trunk_of(decoder)
        config.check_backbone(len(trunk.layers))
        super().__init__(config)
        self.all_tied_weights_keys: dict[str, str] = {}
        self._no_split_modules = set(getattr(decoder, "_no_split_modules", None) or ())
        dtype = next(decoder.parameters()).dtype
        width = trunk.config.hidden_size
        place = trunk.get_input_embeddings().weight.device
        decoder.requires_grad_(False)
        self.encoder: Any = None
        self.lsa: Any = None
        self.projection: nn.Linear | None = None
        self.memory: nn.Embedding | None = None
        if config.merging != "embeddings":
            self.encoder = first_blocks(
                decoder, config.encoder_layers, copy_blocks=False, embed=True
            )
            if not config.encoder_final_norm:
                self.encoder.norm = nn.Identity()
            add_lora(
                self.encoder,
                config.lora_r,
                config.lora_alpha,
                config.lora_dropout,
                config.lora_targets,
            )
        if config.merging == "memory":
            self.memory = new_memory(trunk.get_input_embeddings().weight, config.memory_tokens)
        if config.alignment == "lsa":
            self.lsa = first_blocks(decoder, config.lsa_layers, copy_blocks=True, embed=False)
            if config.lsa_init == "random":
                std = getattr(trunk.config, "initializer_range", 0.02)
                randomize(self.lsa.layers, std)
            if not config.lsa_final_norm:
                self.lsa.norm = nn.Identity()
        elif config.alignment == "linear":
            self.projection = nn.Linear(width, width, device=place, dtype=dtype)
        self.decoder: Any = decoder
        if not share_base:
            unshare_base(self)
        self.freeze_for_stage("autoencoding")
        self.eval()

    @classmethod
    def from_backbone(
        cls,
        backbone: str | os.PathLike[str] | nn.Module,
        config: GMSAConfig | None = None,
        *,
        dtype: str | torch.dtype = "auto",
        attn_implementation: str | None = "sdpa",
        device_map: Any = None,
        share_base: bool = True,
        **hf_kwargs: Any,
    ) -> "GMSAModel":
        """Make a compressor from a causal language model.

        Args:
            backbone: Hub id, local folder, or a model, which becomes the decoder (not copied).
            config: Settings; the paper's by default.
            dtype: For loading; ``auto`` keeps the checkpoint's.
            attn_implementation: For loading: ``sdpa``, ``flash_attention_2``, ``eager``, …
            device_map: For loading.
            share_base: Let encoder and decoder use the same frozen tensors (as long as the decoder
                is not fully fine-tuned).
            hf_kwargs: Further options of ``AutoModelForCausalLM.from_pretrained``.

        Raises:
            InputError: If a depth is not in 1..N, or the backbone cannot be loaded.
            TypeError: If the backbone is not built as the method needs it.

        Example: see `GMSAModel`.
        """
        config = config or GMSAConfig()
        if isinstance(backbone, nn.Module):
            decoder: Any = backbone
            name = getattr(decoder, "name_or_path", "") or None
        else:
            name = os.fspath(backbone)
            decoder = load_causal_lm(
                name,
                dtype=dtype,
                attn_implementation=attn_implementation,
                device_map=device_map,
                **hf_kwargs,
            )
        check_causal_lm(decoder)
        config.base_model_name_or_path = name or config.base_model_name_or_path
        config.base_config = decoder.config.to_dict()
        config.base_fingerprint = base_fingerprint(decoder)
        return cls(config, decoder, share_base=share_base)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        base_model: str | os.PathLike[str] | nn.Module | None = None,
        dtype: str | torch.dtype = "auto",
        attn_implementation: str | None = "sdpa",
        device_map: Any = None,
        share_base: bool = True,
        check_base: bool = True,
        **hub_kwargs: Any,
    ) -> "GMSAModel":
        """Load what `save_pretrained` wrote; strict: a wrong or missing tensor is an error.

        Args:
            pretrained_model_name_or_path: Folder, or hub id.
            base_model: The language model below, if it is not where the config says: a hub id, a
                folder or a model.
            dtype: See `from_backbone`.
            attn_implementation: See `from_backbone`.
            device_map: See `from_backbone`.
            share_base: See `from_backbone`.
            check_base: Refuse a base with other weights than the one trained on. Turn it off for a
                base that was rounded or quantised.
            hub_kwargs: ``revision``, ``token``, ``cache_dir`` and the like, for hub ids.

        Raises:
            InputError: If the checkpoint is not there, damaged, or does not fit the base.
        """
        return load_compressor(
            cls,
            pretrained_model_name_or_path,
            base_model=base_model,
            share_base=share_base,
            check_base=check_base,
            hub_kwargs=hub_kwargs,
            load_kwargs={
                "dtype": dtype,
                "attn_implementation": attn_implementation,
                "device_map": device_map,
            },
        )

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write the config, the trained tensors and, after fine-tuning, the decoder.

        The frozen base is not written. ``compressor.safetensors`` holds the encoder's LoRA under
        PEFT's names and the alignment; ``decoder/`` is a plain checkpoint of transformers (full
        fine-tuning) or of PEFT (LoRA).

        Args:
            save_directory: The folder.
            is_main_process: Whether this process writes.
            state_dict: The model's gathered ``state_dict`` (FSDP, DeepSpeed); its own by default.
            push_to_hub: Push the folder to the hub afterwards.
            kwargs: Those of ``push_to_hub`` (``repo_id``, ``token``, …).

        Raises:
            InputError: If the LoRA was merged into the encoder.
        """
        if is_main_process:
            save_compressor(self, save_directory, state_dict)
        if push_to_hub:
            repo = kwargs.pop("repo_id", os.path.basename(os.path.normpath(save_directory)))
            self.push_to_hub(repo, **kwargs)

    # --- training -----------------------------------------------------------------------------

    def freeze_for_stage(self, stage: str, decoder_tuning: str = "full") -> None:
        """Let exactly the parameters train that the stage trains (table 2.7 of the method).

        Args:
            stage: ``autoencoding`` (encoder LoRA and alignment) or ``keft`` (the decoder).
            decoder_tuning: For ``keft``: ``full`` (the paper) or ``lora``. Full tuning gives the
                encoder its own copy of what it shared with the decoder.

        Raises:
            InputError: If a word is not accepted.
        """
        freeze_for_stage(self, stage, decoder_tuning)

    def merge_encoder_lora(self) -> None:
        """Fold the LoRA into the encoder's weights, for speed; it cannot be saved afterwards."""
        if self.encoder is not None:
            merge_lora(self.encoder)

    def train(self, mode: bool = True) -> "GMSAModel":
        """Switch dropout on in the parts that train, and off in all others."""
        super().train(mode)
        if mode:
            for part in (self.encoder, self.lsa, self.decoder):
                if part is not None and not any(p.requires_grad for p in part.parameters()):
                    part.eval()
                    # A frozen block recomputes its activations only if it believes to train.
                    for block in trunk_of(part).layers if part is self.decoder else part.layers:
                        block.training = bool(getattr(block, "gradient_checkpointing", False))
        return self

    def checkpoint_activations(self, part: str) -> None:
        """Recompute activations in the backward pass instead of keeping them.

        Args:
            part: ``encoder``, ``decoder``, ``all`` or ``none``.

        Raises:
            InputError: If the word is not accepted.
        """
        parts = {
            "none": [],
            "encoder": [self.encoder, self.lsa],
            "decoder": [self.decoder],
            "all": [self.encoder, self.lsa, self.decoder],
        }
        if part not in parts:
            raise InputError(f"part is {part!r}; accepted: {', '.join(parts)}")
        for module in parts[part]:
            if module is not None:
                newer = getattr(module, "activation_checkpointing_enable", None)
                (newer or module.gradient_checkpointing_enable)({"use_reentrant": False})
        self.train(self.training)

    # --- compression --------------------------------------------------------------------------

    def get_input_embeddings(self) -> Any:
        """The decoder's token embedding."""
        return self.decoder.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        """The decoder's head; sharding has to know where it is tied to the embedding."""
        return self.decoder.get_output_embeddings()

    def merge(
        self, ids: Int[Tensor, "B n"], mask: Tensor | None, rates: Rate
    ) -> tuple[Float[Tensor, "B G d"], Tensor]:
        """H̄: from dense token ids to one vector a group.

        Args:
            ids: Token ids with padding to the right only ``[B, n]``.
            mask: Where they are valid ``[B, n]``; everywhere if ``None``.
            rates: Group size, one or one a row.
        """
        if self.encoder is None:
            return group_merge(self.get_input_embeddings()(ids), mask, rates)
        # Padding is to the right and attention causal: no attention mask is needed.
        if self.memory is None:
            hidden = self.encoder(input_ids=ids, use_cache=False).last_hidden_state
            return group_merge(hidden, mask, rates)
        return memory_states(self.encoder, self.memory, ids, mask, rates)

    def align(self, merged: Float[Tensor, "B G d"]) -> Float[Tensor, "B G d"]:
        """e_m = F_kLSA(H̄): into the decoder's input space."""
        if self.lsa is not None:
            aligned: Tensor = self.lsa(inputs_embeds=merged, use_cache=False).last_hidden_state
            return aligned
        return merged if self.projection is None else self.projection(merged)

    def compress(
        self,
        input_ids: Int[Tensor, "B n"],
        attention_mask: Tensor | None = None,
        rate: Rate | None = None,
    ) -> SoftTokens:
        """Turn contexts into ⌈n / r⌉ soft tokens each; no logits are computed.

        Padding may be anywhere and is never run. A row's result does not depend on its neighbours.

        Args:
            input_ids: Token ids ``[B, n]``, without special tokens.
            attention_mask: Valid tokens ``[B, n]``; all by default. A row without any has no soft
                tokens.
            rate: Compression rate, a whole number or one a row ``[B]``.

        Raises:
            InputError: If shapes, dtypes or rates are wrong, or a context is longer than the
                model's positions.

        Example: see `GMSAModel`.
        """
        if input_ids.dim() != 2 or input_ids.dtype.is_floating_point:
            raise InputError(
                f"input_ids have shape {list(input_ids.shape)} and dtype {input_ids.dtype}; "
                "accepted: whole numbers [batch, tokens]"
            )
        rate = self.config.default_rate if rate is None else rate
        rates = as_rates(rate, len(input_ids), input_ids.device)
        mask: Tensor | None = None
        ids = input_ids.long()
        if attention_mask is not None:
            if attention_mask.shape != input_ids.shape:
                raise InputError(
                    f"attention_mask has shape {list(attention_mask.shape)}, "
                    f"input_ids {list(input_ids.shape)}"
                )
            mask, ids = compact_rows(attention_mask.to(ids.device).bool(), ids)
        B, n = ids.shape
        self.check_length(n)
        n_tokens = torch.full((B,), n, device=ids.device) if mask is None else mask.sum(1)
        if B == 0 or n == 0:
            table = self.get_input_embeddings().weight
            none = table.new_zeros(B, 0, table.shape[1])
            return SoftTokens(none, torch.zeros(B, 0, dtype=torch.bool), rates, n_tokens)
        merged, merged_mask = self.merge(ids, mask, rate if isinstance(rate, int) else rates)
        embeds = self.align(merged)
        if mask is not None:
            embeds = embeds.masked_fill(~merged_mask[:, :, None], 0)
        return SoftTokens(embeds, merged_mask, rates, n_tokens)

    def check_length(self, n: int) -> None:
        """Refuse a context longer than the model's positions.

        Raises:
            InputError: With what to do about it.
        """
        limit = getattr(self.decoder.config, "max_position_embeddings", None)
        if limit is not None and n > limit:
            raise InputError(
                f"a context has {n} tokens, the model {limit} positions; compress it in windows "
                "(chunk_size=… with exact=False), or cut it"
            )

    # --- use ----------------------------------------------------------------------------------

    def decoder_inputs(
        self,
        soft: SoftTokens,
        prompt_ids: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        *,
        side: str = "left",
    ) -> tuple[Float[Tensor, "B s d"], Tensor]:
        """[soft tokens | prompt] as embeddings and mask, for any ``generate`` of transformers.

        Args:
            soft: The contexts.
            prompt_ids: The prompts' token ids ``[B, m]``.
            prompt_mask: Where they are valid ``[B, m]``; everywhere by default.
            side: Where the padding goes.

        Raises:
            InputError: If batch sizes or widths differ.
        """
        table = self.get_input_embeddings()
        width = table.weight.shape[1]
        if soft.embeds.shape[2] != width:
            raise InputError(
                f"soft tokens have width {soft.embeds.shape[2]}, the decoder {width}; "
                "they come from another compressor"
            )
        place = table.weight
        parts = [(soft.embeds.to(place.device, place.dtype), soft.mask.to(place.device))]
        if prompt_ids is not None:
            ids = prompt_ids.to(place.device)
            valid = torch.ones_like(ids) if prompt_mask is None else prompt_mask.to(place.device)
            parts.append((table(ids.long()), valid.bool()))
        return join_rows(parts, side=side)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        prompt_ids: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        labels: Tensor | None = None,
        rate: Rate | None = None,
        soft: SoftTokens | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> GMSAOutput:
        """The loss of predicting `labels` after [soft tokens | prompt].

        Args:
            input_ids: Contexts ``[B, n]``.
            attention_mask: Their valid tokens ``[B, n]``.
            prompt_ids: Instruction or question ``[B, m]``.
            prompt_mask: Its valid tokens ``[B, m]``.
            labels: The tokens to predict ``[B, t]``, -100 where there is none; not shifted. The
                first is predicted from the last prompt token.
            rate: Compression rate, one or one a row.
            soft: Contexts that are compressed already, in place of `input_ids`.
            num_items_in_batch: Divide by this number of labels instead of the batch's own.

        Raises:
            InputError: If labels or contexts are missing, or a row has labels and nothing before.
        """
        if labels is None:
            raise InputError("forward needs labels; for soft tokens alone call compress")
        if (input_ids is None) == (soft is None):
            raise InputError("give either input_ids or soft")
        if soft is None:
            assert input_ids is not None
            # In the fine-tuning stage nothing of the compressor trains: no graph is kept.
            training = any(p.requires_grad for p in self.compressor_parameters())
            with torch.set_grad_enabled(torch.is_grad_enabled() and training):
                soft = self.compress(input_ids, attention_mask, rate)
        before, before_mask = self.decoder_inputs(soft, prompt_ids, prompt_mask, side="right")
        labels = labels.to(before.device).long()
        target_mask = labels != IGNORED
        target_ids = labels.masked_fill(~target_mask, 0)
        embeds, _ = join_rows(
            [(before, before_mask), (self.get_input_embeddings()(target_ids), target_mask)]
        )
        nothing = labels.new_full(before_mask.shape, IGNORED)
        marks, valid = join_rows([(nothing, before_mask), (labels, target_mask)])
        hidden = trunk_of(self.decoder)(inputs_embeds=embeds, use_cache=False).last_hidden_state
        loss, correct, count = label_cross_entropy(
            hidden,
            marks.masked_fill(~valid, IGNORED),
            lambda states: make_logits(self.decoder, states),
            num_items=num_items_in_batch,
        )
        return GMSAOutput(
            loss=loss,
            num_label_tokens=count,
            num_correct=correct,
            num_tokens=soft.n_tokens.sum(),
            num_soft_tokens=soft.mask.sum(),
        )

    def compressor_parameters(self) -> list[nn.Parameter]:
        """The parameters of encoder and alignment, shared ones included."""
        parts = (self.encoder, self.lsa, self.projection, self.memory)
        own = [p for part in parts if part is not None for p in part.parameters()]
        decoder = {id(p) for p in self.decoder.parameters()}
        return [p for p in own if id(p) not in decoder]

    @torch.no_grad()
    def generate(
        self,
        soft: SoftTokens | Sequence[SoftTokens],
        prompt_ids: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        **gen_kwargs: Any,
    ) -> Int[Tensor, "B new"]:
        """Continue after [soft tokens | prompt]; greedy and at most 100 tokens by default.

        Args:
            soft: The contexts, or a list with one a row.
            prompt_ids: The prompts ``[B, m]``.
            prompt_mask: Their valid tokens ``[B, m]``.
            gen_kwargs: Those of ``generate`` of transformers.

        Returns:
            The new tokens only.

        Raises:
            InputError: If a row has neither soft tokens nor a prompt.
        """
        if not isinstance(soft, SoftTokens):
            soft = SoftTokens.batch(soft)
        embeds, mask = self.decoder_inputs(soft, prompt_ids, prompt_mask)
        if not bool(mask.any(1).all()):
            raise InputError("a row has neither soft tokens nor a prompt to continue from")
        options: dict[str, Any] = {"max_new_tokens": 100, "do_sample": False}
        if not gen_kwargs.get("do_sample", False):
            options.update(temperature=None, top_p=None, top_k=None)
        known = self.decoder.generation_config
        if known.pad_token_id is None and known.eos_token_id is not None:
            eos = known.eos_token_id
            options["pad_token_id"] = eos[0] if isinstance(eos, list) else eos
        new: Tensor = self.decoder.generate(
            inputs_embeds=embeds, attention_mask=mask.long(), **{**options, **gen_kwargs}
        )
        return new

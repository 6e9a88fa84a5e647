"""Prompt embeddings, and the text towers of diffusers pipelines behind one call."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from shared_core.errors import InputError

__all__ = ["PipelineText", "PromptEmbedding"]


@dataclass(frozen=True)
class PromptEmbedding:
    """What a backbone is told about the image in words.

    Attributes:
        states: Token states ``[1 or B, L, D]``; one row is broadcast to the batch.
        pooled: Pooled text ``[1 or B, D]``, where the model wants it (SDXL, SD3, Flux).
        mask: Which tokens count, ``[1 or B, L]`` (PixArt, HunyuanDiT).
        extra: Further arguments of the model's forward, such as HunyuanDiT's second text tower.

    Examples:
        >>> PromptEmbedding(torch.zeros(1, 77, 768)).expand(4).states.shape
        torch.Size([4, 77, 768])
    """

    states: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def _each(self, change: Any) -> "PromptEmbedding":
        return replace(
            self,
            states=change(self.states),
            pooled=None if self.pooled is None else change(self.pooled),
            mask=None if self.mask is None else change(self.mask),
            extra={name: change(value) for name, value in self.extra.items()},
        )

    def expand(self, batch: int) -> "PromptEmbedding":
        """One row per image.

        Raises:
            InputError: If there are several rows, but not one per image.
        """
        rows = self.states.shape[0]
        if rows not in (1, batch):
            raise InputError(f"{rows} prompts for {batch} images; give one, or one per image")
        return self._each(
            lambda x: x if x.shape[0] == batch else x.repeat(batch, *[1] * (x.ndim - 1))
        )

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "PromptEmbedding":
        """Moved, and floating parts converted."""
        return self._each(lambda x: x.to(device, dtype) if x.is_floating_point() else x.to(device))


class PipelineText:
    """Encode prompts with the text towers of a diffusers pipeline, without guidance.

    Args:
        pipeline: A loaded pipeline with ``encode_prompt``.
    """

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    def __call__(self, prompts: Sequence[str]) -> PromptEmbedding:
        """Embed prompts, one row each."""
        pipe = self.pipeline
        accepted = inspect.signature(pipe.encode_prompt).parameters
        options = {
            "prompt": list(prompts),
            "prompt_2": None,
            "prompt_3": None,
            "device": pipe._execution_device,
            "num_images_per_prompt": 1,
            "do_classifier_free_guidance": False,
        }
        given = {name: value for name, value in options.items() if name in accepted}
        with torch.no_grad():
            found = pipe.encode_prompt(**given)
            name = type(pipe).__name__
            if name.startswith("HunyuanDiT"):
                second = pipe.encode_prompt(**given, text_encoder_index=1)
                return PromptEmbedding(
                    found[0],
                    mask=found[2],
                    extra={
                        "encoder_hidden_states_t5": second[0],
                        "text_embedding_mask_t5": second[2],
                    },
                )
        if name.startswith("PixArt"):
            return PromptEmbedding(found[0], mask=found[1])
        if "XL" in name or name.startswith("StableDiffusion3"):
            return PromptEmbedding(found[0], pooled=found[2])
        if name.startswith("Flux"):
            return PromptEmbedding(found[0], pooled=found[1])
        return PromptEmbedding(found[0])

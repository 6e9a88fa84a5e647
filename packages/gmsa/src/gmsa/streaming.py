"""Compressing long contexts chunk by chunk.

Attention in encoder and alignment is causal and a group's mean needs its own tokens only, so a
context can be fed in pieces of any length: with the keys and values of earlier pieces kept, the
soft tokens equal those of one call up to rounding (`StreamingCompressor`). Memory for activations
then follows the piece, not the context. `compress_windows` forgets what came before each window:
linear time, no limit on the length, and other soft tokens.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from gmsa._backbone import run_cached
from gmsa.merging import as_rates, group_merge
from gmsa.model import GMSAModel
from gmsa.soft_tokens import SoftTokens
from shared_core.errors import InputError

__all__ = ["StreamingCompressor", "compress_long", "compress_windows"]


class StreamingCompressor:
    """Soft tokens of a growing context, exactly those of compressing it at once.

    Args:
        model: The compressor; ``merging`` has to be ``groups`` or ``embeddings``.
        rate: The compression rate.

    Raises:
        InputError: If the rate is not accepted or the model has memory tokens.

    Examples:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from gmsa import GMSAConfig
        >>> backbone = LlamaForCausalLM(LlamaConfig(
        ...     vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        ...     num_attention_heads=2))
        >>> model = GMSAModel.from_backbone(backbone, GMSAConfig(encoder_layers=1, lora_r=4))
        >>> ids = torch.arange(10)[None]
        >>> stream = StreamingCompressor(model, rate=4)
        >>> [stream.push(part).shape[1] for part in ids.split(3, dim=1)]  # complete groups
        [0, 1, 1, 0]
        >>> soft = stream.finish()
        >>> bool(torch.allclose(soft.embeds, model.compress(ids, rate=4).embeds, atol=1e-5))
        True
    """

    def __init__(self, model: GMSAModel, rate: int) -> None:
        as_rates(rate, 1)
        if model.config.merging == "memory":
            raise InputError("memory tokens come after the whole context; they cannot be streamed")
        self.model, self.rate = model, rate
        self._encoder_cache = _new_cache(model.encoder)
        self._lsa_cache = _new_cache(model.lsa)
        self._rest: Tensor | None = None
        self._done: list[Tensor] = []
        self._n = 0
        self._finished = False

    @torch.no_grad()
    def push(self, input_ids: Int[Tensor, "B n"]) -> Float[Tensor, "B G d"]:
        """Feed more tokens, the same number in every row; returns the groups that are complete."""
        if self._finished:
            raise InputError("this stream is finished; start another")
        model, (B, n) = self.model, input_ids.shape
        self.model.check_length(self._n + n)
        if n == 0:
            return self._empty(B)
        if model.encoder is None:
            hidden = model.get_input_embeddings()(input_ids)
        else:
            hidden = run_cached(model.encoder, self._encoder_cache, input_ids=input_ids)
        self._n += n
        if self._rest is not None:
            hidden = torch.cat([self._rest, hidden], 1)
        whole = hidden.shape[1] - hidden.shape[1] % self.rate
        self._rest = hidden[:, whole:]
        return self._align(hidden[:, :whole]) if whole else self._empty(B)

    @torch.no_grad()
    def finish(self) -> SoftTokens:
        """The soft tokens of all that was fed; the last group may be short.

        Raises:
            InputError: If nothing was fed.
        """
        if self._rest is None:
            raise InputError("nothing was fed to the stream")
        if self._rest.shape[1] and not self._finished:
            self._align(self._rest)
        self._finished = True
        embeds = torch.cat(self._done, 1)
        B, G, _ = embeds.shape
        place = embeds.device
        return SoftTokens(
            embeds,
            torch.ones(B, G, dtype=torch.bool, device=place),
            torch.full((B,), self.rate, device=place),
            torch.full((B,), self._n, device=place),
        )

    def _align(self, hidden: Tensor) -> Tensor:
        merged, _ = group_merge(hidden, None, self.rate)
        if self.model.lsa is None:
            aligned = self.model.align(merged)
        else:
            aligned = run_cached(self.model.lsa, self._lsa_cache, inputs_embeds=merged)
        self._done.append(aligned)
        return aligned

    def _empty(self, rows: int) -> Tensor:
        table: Any = self.model.get_input_embeddings()
        none: Tensor = table.weight.new_zeros(rows, 0, table.weight.shape[1])
        return none


def _new_cache(part: Any) -> Any:
    return None if part is None else DynamicCache(config=part.config)


def _check_chunk(chunk_size: int) -> None:
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise InputError(f"chunk_size is {chunk_size!r}; accepted: whole numbers from 1 on")


def compress_long(
    model: GMSAModel, input_ids: Int[Tensor, "B n"], rate: int, chunk_size: int
) -> SoftTokens:
    """Compress exactly, `chunk_size` tokens at a time.

    Args:
        model: The compressor.
        input_ids: Contexts of one length ``[B, n]``.
        rate: The compression rate.
        chunk_size: Tokens per call of the encoder; any number from 1 on.

    Raises:
        InputError: If a number is not accepted or the context has no token.

    Example: see `StreamingCompressor`.
    """
    _check_chunk(chunk_size)
    stream = StreamingCompressor(model, rate)
    for part in torch.split(input_ids, chunk_size, dim=1):
        stream.push(part)
    return stream.finish()


@torch.no_grad()
def compress_windows(
    model: GMSAModel,
    input_ids: Int[Tensor, "B n"],
    rate: int,
    chunk_size: int,
    *,
    batch_size: int = 8,
) -> SoftTokens:
    """Encode windows of `chunk_size` tokens independently; the alignment sees all of them.

    Args:
        model: The compressor.
        input_ids: Contexts of one length ``[B, n]``.
        rate: The compression rate.
        chunk_size: Tokens a window; a multiple of `rate`.
        batch_size: Windows encoded at a time.

    Raises:
        InputError: If `chunk_size` is not a multiple of the rate.

    Example: see `StreamingCompressor`.
    """
    _check_chunk(chunk_size)
    as_rates(rate, 1)
    if chunk_size % rate:
        raise InputError(f"chunk_size {chunk_size} is no multiple of the rate {rate}")
    B, n = input_ids.shape
    whole = n - n % chunk_size
    merged = []
    if whole:
        windows = input_ids[:, :whole].reshape(-1, chunk_size)
        parts = [model.merge(rows, None, rate)[0] for rows in torch.split(windows, batch_size)]
        joined = torch.cat(parts)
        merged.append(joined.reshape(B, -1, joined.shape[2]))
    if whole < n:
        merged.append(model.merge(input_ids[:, whole:], None, rate)[0])
    if not merged:
        raise InputError("the context has no token")
    embeds = model.align(torch.cat(merged, 1))
    place = embeds.device
    return SoftTokens(
        embeds,
        torch.ones(embeds.shape[:2], dtype=torch.bool, device=place),
        torch.full((B,), rate, device=place),
        torch.full((B,), n, device=place),
    )

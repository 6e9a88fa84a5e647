"""Memory tokens after the context, whose last states are its summary (in the manner of ICAE)."""

from typing import Any

import torch
from torch import Tensor, nn

from gmsa.merging import Rate, num_groups
from gmsa.sequences import join_rows
from shared_core.errors import InputError

__all__ = ["memory_states", "new_memory"]


def new_memory(table: Tensor, count: int) -> nn.Embedding:
    """Embeddings of `count` memory tokens, drawn with the mean and spread of a token table."""
    values = table.detach().float()
    fresh = torch.randn(count, values.shape[1]).to(values.device) * values.std(0, keepdim=True)
    drawn = (values.mean(0) + fresh).to(table.dtype)
    memory: nn.Embedding = nn.Embedding.from_pretrained(  # type: ignore[no-untyped-call]
        drawn, freeze=False
    )
    return memory


def memory_states(
    encoder: Any, memory: nn.Embedding, ids: Tensor, mask: Tensor | None, rates: Rate
) -> tuple[Tensor, Tensor]:
    """The encoder's states at ⌈n / r⌉ memory tokens that follow each context.

    Args:
        encoder: Blocks with an embedding.
        memory: The memory tokens' embeddings.
        ids: Token ids with padding to the right only ``[B, n]``.
        mask: Where they are valid ``[B, n]``; everywhere if ``None``.
        rates: Compression rate, one or one a row.

    Raises:
        InputError: If there are fewer memory tokens than needed.
    """
    if mask is None:
        mask = torch.ones_like(ids, dtype=torch.bool)
    groups = num_groups(mask.sum(1), rates)
    G = int(groups.max())
    if memory.num_embeddings < G:
        raise InputError(
            f"{G} memory tokens are needed, there are {memory.num_embeddings}; "
            "take a higher rate or more memory_tokens"
        )
    summary = torch.arange(G, device=ids.device) < groups[:, None]
    texts = encoder.get_input_embeddings()(ids)
    slots = memory.weight[:G].to(texts.dtype).expand(len(ids), G, -1)
    joined, _ = join_rows([(texts, mask), (slots, summary)])
    hidden = encoder(inputs_embeds=joined, use_cache=False).last_hidden_state
    where = (mask.sum(1, keepdim=True) + torch.arange(G, device=ids.device)).clamp(
        max=hidden.shape[1] - 1
    )
    states = hidden.gather(1, where[:, :, None].expand(-1, -1, hidden.shape[2]))
    return states.masked_fill(~summary[:, :, None], 0), summary

"""Sequences that begin alike, without computing the beginning again for each of them.

The start token and the context of a prompt are the same for all its classes, and attention looks
back only: their keys and values do not depend on the class name. So they are computed once for each
prompt, and for each class only the tokens of its name and the end. This is exact.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Block", "hf_blocks", "open_clip_blocks", "run_after_prefixes"]


class Block(NamedTuple):
    """A residual block that normalises first, taken apart where keys and values are made.

    Attributes:
        norm: What attention sees of the stream.
        project: That into queries, keys and values, [t, length, W] each.
        output: What attention gives, for the stream.
        feed: The second residual branch, its norm included.
        heads: Number of attention heads.
    """

    norm: Callable[[Tensor], Tensor]
    project: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    output: Callable[[Tensor], Tensor]
    feed: Callable[[Tensor], Tensor]
    heads: int


def open_clip_blocks(transformer: Any) -> list[Block] | None:
    """The blocks of an open_clip text transformer; None if they attend in a way of their own."""
    blocks = []
    for block in transformer.resblocks:
        attn = getattr(block, "attn", None)
        if type(attn) is not nn.MultiheadAttention or hasattr(block, "ln_1_kv"):
            return None
        blocks.append(_open_clip_block(block, attn))
    return blocks


def _open_clip_block(block: Any, attn: nn.MultiheadAttention) -> Block:
    def project(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = F.linear(x, cast(Tensor, attn.in_proj_weight), attn.in_proj_bias).chunk(3, -1)
        return q, k, v

    return Block(
        block.ln_1,
        project,
        lambda x: block.ls_1(attn.out_proj(x)),
        lambda x: block.ls_2(block.mlp(block.ln_2(x))),
        attn.num_heads,
    )


def hf_blocks(encoder: Any) -> list[Block]:
    """The blocks of a Hugging Face CLIP text encoder."""
    return [_hf_block(layer) for layer in encoder.layers]


def _hf_block(layer: Any) -> Block:
    attn = layer.self_attn
    return Block(
        layer.layer_norm1,
        lambda x: (attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)),
        attn.out_proj,
        lambda x: layer.mlp(layer.layer_norm2(x)),
        attn.num_heads,
    )


def run_after_prefixes(
    blocks: Sequence[Block],
    prefix: Tensor,
    lengths: Sequence[int],
    suffix: Tensor,
    counts: Sequence[int],
) -> Tensor:
    """What causal blocks make of suffixes, each of which follows one of the prefixes.

    Args:
        blocks: The blocks.
        prefix: Embedded prefixes with positions, padded on the right, [p, n, W].
        lengths: Their lengths.
        suffix: Embedded suffixes with positions, [t, m, W]; those of a prefix are in a row.
        counts: How many suffixes each prefix has.

    Returns:
        The stream after the last block, [t, m, W].
    """
    n, m = prefix.shape[1], suffix.shape[1]
    places = torch.arange(n, device=suffix.device)
    # The padding of a shorter prefix is hidden; it looks back itself, so nothing else sees it.
    there = torch.cat(
        [(places < length).expand(count, n) for length, count in zip(lengths, counts, strict=True)]
    )
    back = torch.ones(m, m, dtype=torch.bool, device=suffix.device).tril()
    seen = torch.cat([there[:, None].expand(-1, m, -1), back.expand(len(suffix), m, m)], 2)[:, None]
    for block in blocks:
        q, k, v = (_heads(x, block.heads) for x in block.project(block.norm(prefix)))
        before = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        prefix = _onward(block, prefix, before)
        queries, keys, values = (_heads(x, block.heads) for x in block.project(block.norm(suffix)))
        keys = torch.cat([_repeat(k, counts), keys], 2)
        values = torch.cat([_repeat(v, counts), values], 2)
        after = F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen)
        suffix = _onward(block, suffix, after)
    return suffix


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.view(*x.shape[:-1], heads, -1).transpose(1, 2)


def _onward(block: Block, x: Tensor, attended: Tensor) -> Tensor:
    x = x + block.output(attended.transpose(1, 2).flatten(2))
    return x + block.feed(x)


def _repeat(rows: Tensor, counts: Sequence[int]) -> Tensor:
    # By expansion, whose gradient is a sum in a fixed order, unlike that of an index.
    parts = [row.expand(count, *row.shape) for row, count in zip(rows, counts, strict=True)]
    return torch.cat(parts)

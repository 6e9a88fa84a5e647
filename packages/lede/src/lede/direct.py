"""Layers of the Llama kind as plain functions: the library's arithmetic, fewer frames and kernels.

One token through a small layer costs less arithmetic than the two dozen module calls and small
kernels around it. Here a layer's own weights are used as they are, without those calls. Only layers
that are exactly the library's are run so; one with hooks, adapters, quantized weights or a forward
of its own is called as a module.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DirectLayer", "direct_layers", "turns"]

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def _is_the_librarys(layer: nn.Module) -> bool:
    """Whether a layer is one of `FAMILIES`, untouched."""
    home = type(layer).__module__
    if home not in {f"transformers.models.{name}.modeling_{name}" for name in FAMILIES}:
        return False
    family = type(layer).__name__.removesuffix("DecoderLayer")
    parts = {family + part for part in ("DecoderLayer", "Attention", "MLP", "RMSNorm")}
    for module in layer.modules():
        kind: Any = type(module)
        known = (
            kind is nn.Linear
            or (kind.__module__ == home and kind.__name__ in parts)
            or kind.__name__ in ("SiLU", "SiLUActivation")
        )
        hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        if not known or hooked or kind.forward.__module__ != kind.__module__:
            return False
    return True


def direct_layers(layers: Iterable[nn.Module]) -> list["DirectLayer"] | None:
    """All layers as functions, or ``None`` if one of them has to be called as a module.

    Examples:
        >>> from lede.testing import tiny_model
        >>> model = tiny_model("llama", layers=3)
        >>> len(direct_layers(model.model.layers))
        3
        >>> handle = model.model.layers[1].mlp.register_forward_hook(lambda *a: None)
        >>> direct_layers(model.model.layers) is None
        True
    """
    whole = list(layers)
    if not all(map(_is_the_librarys, whole)):
        return None
    return [DirectLayer(layer) for layer in whole]


def _quick_norm(norm: Any) -> Callable[[Tensor], Tensor]:
    """A root-mean-square norm in one call.

    In float32 alone: in other dtypes the library rounds in between.
    """
    weight, eps, shape = norm.weight, norm.variance_epsilon, tuple(norm.weight.shape)
    if weight.dtype != torch.float32:
        return lambda hidden: norm(hidden)
    return lambda hidden: F.rms_norm(hidden, shape, weight, eps)


class DirectLayer:
    """One decoder layer in evaluation mode, with sdpa attention and without gradients.

    Args:
        layer: Of one of `FAMILIES`, untouched.
    """

    def __init__(self, layer: nn.Module) -> None:
        whole: Any = layer
        attention = self.attention = whole.self_attn
        mlp = whole.mlp
        self.index, self.size = attention.layer_idx, attention.head_dim
        self.norms = _quick_norm(whole.input_layernorm), _quick_norm(whole.post_attention_layernorm)
        around = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        self.q, self.k, self.v, self.o = ((p.weight, p.bias) for p in around)
        inside = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        self.gate, self.up, self.down = ((p.weight, p.bias) for p in inside)
        self.head_norms = (
            (_quick_norm(attention.q_norm), _quick_norm(attention.k_norm))
            if hasattr(attention, "q_norm")
            else None
        )
        self.heads = self.q[0].shape[0] // self.size, self.k[0].shape[0] // self.size

    def __call__(
        self, hidden: Tensor, shape: tuple[int, int], mask: Tensor | None, turn: Any, cache: Any
    ) -> Tensor:
        """Run the layer.

        Args:
            hidden: [B k, C].
            shape: B and k.
            mask: [B, 1, k, S], or ``None`` for causal.
            turn: What `turns` gave.
            cache: Whose ``update`` takes the keys and values.
        """
        cos, sin = turn
        heads = (*shape, -1, self.size)
        normed = self.norms[0](hidden)
        q, k = F.linear(normed, *self.q).view(heads), F.linear(normed, *self.k).view(heads)
        v = F.linear(normed, *self.v).view(heads).transpose(1, 2)
        if self.head_norms is not None:
            q, k = self.head_norms[0](q), self.head_norms[1](k)
        both = torch.cat((q, k), 2)
        half = self.size // 2
        turned = torch.cat((both[..., half:], both[..., :half]), -1).mul_(sin)
        both = both.mul_(cos).add_(turned).transpose(1, 2)
        q, k = torch.split(both, list(self.heads), 1)
        keys, values = cache.update(k, v, self.index)
        causal = mask is None and shape[1] > 1
        if self.heads[0] == self.heads[1]:
            seen = F.scaled_dot_product_attention(
                q, keys, values, mask, is_causal=causal, scale=self.attention.scaling
            ).transpose(1, 2)
        else:
            from transformers.integrations.sdpa_attention import sdpa_attention_forward

            seen, _ = sdpa_attention_forward(
                self.attention, q, keys, values, mask, scaling=self.attention.scaling
            )
        hidden = F.linear(seen.reshape(hidden.shape[0], -1), *self.o).add_(hidden)
        normed = self.norms[1](hidden)
        inner = F.silu(F.linear(normed, *self.gate), inplace=True).mul_(F.linear(normed, *self.up))
        return F.linear(inner, *self.down).add_(hidden)


def turns(rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, k, 1, D] for halves that change places, from the library's.

    The library negates the half that comes to the front; here its sines are negative instead.
    """
    cos, sin = (part.unsqueeze(2) for part in rotary)
    half = sin.shape[-1] // 2
    return cos, torch.cat((-sin[..., :half], sin[..., half:]), -1)

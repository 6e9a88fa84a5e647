"""Running a range of a transformers model's layers: one adapter a family.

An early exit at layer l is ``head(norm(h_l))`` with the model's own final norm and head. The layer
number counts layers already applied: exit 8 has run the layers 0 to 7.
"""

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from lede.cache import Frame, RaggedCache
from lede.direct import DirectLayer, direct_layers, turns
from lede.errors import UnsupportedModelError

__all__ = ["LayerRunner", "layer_runner", "register_adapter", "supported_model_types"]


class LayerRunner:
    """Embedding, layers and head of a decoder-only model, callable one range at a time.

    Fits the families whose layers are called like Llama's; the others override what differs.

    Args:
        model: A causal language model of transformers.

    Attributes:
        depth: Number of layers, L.
        windows: Sliding window of each layer, ``None`` for full attention.

    Raises:
        UnsupportedModelError: If the attention implementation is neither sdpa nor eager, or a
            layer attends in a way that a causal or sliding mask does not describe.
    """

    all_layers_slide: ClassVar[bool] = False

    def __init__(self, model: nn.Module) -> None:
        whole: Any = model
        self.model = whole
        self.config: Any = whole.config
        self.base: Any = whole.model
        self.embedding: Any = whole.model.embed_tokens
        self.depth = int(whole.config.num_hidden_layers)
        self.layers = list(whole.model.layers[: self.depth])
        self.windows = self._windows()
        self.layer_types: list[str | None] = list(
            getattr(self.config, "layer_types", None) or [None] * self.depth
        )
        parameters = inspect.signature(type(self.layers[0]).forward).parameters
        # transformers 5.24 renamed the argument.
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"
        attention = getattr(self.config, "_attn_implementation", "sdpa")
        if attention not in ("sdpa", "eager"):
            raise UnsupportedModelError(
                f"attention {attention!r} takes no mask of ours; accepted: sdpa, eager: call "
                "model.set_attn_implementation('sdpa')"
            )
        self._eager = attention == "eager"
        self._direct: list[DirectLayer] | None = None

    def prepare(self) -> None:
        """Look at the layers as they are now: the library's own run as `lede.direct` does."""
        as_modules = self._eager or type(self).apply is not LayerRunner.apply
        self._direct = None if as_modules else direct_layers(self.layers)

    @property
    def additive(self) -> torch.dtype | None:
        """The dtype of masks that are added to the scores; ``None`` where they are boolean."""
        return self.embedding.weight.dtype if self._eager else None

    def _windows(self) -> list[int | None]:
        window = getattr(self.config, "sliding_window", None)
        types = getattr(self.config, "layer_types", None)
        if self.all_layers_slide:
            return [window] * self.depth
        if types is None:
            return [None] * self.depth
        unknown = set(types) - {"full_attention", "sliding_attention"}
        if unknown:
            raise UnsupportedModelError(
                f"layers of type {', '.join(sorted(unknown))} are not supported; accepted: "
                "full_attention, sliding_attention"
            )
        return [window if t == "sliding_attention" else None for t in types[: self.depth]]

    @property
    def device(self) -> torch.device:
        """Where token ids enter."""
        device: torch.device = self.embedding.weight.device
        if device.type == "meta":  # accelerate brings offloaded weights when they are called
            return torch.device(self.embedding._hf_hook.execution_device)
        return device

    @property
    def vocab_size(self) -> int:
        """Number of logits."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    def frame(
        self, starts: np.ndarray, width: int, padding: np.ndarray, cache: RaggedCache
    ) -> Frame:
        """The frame of a pass of `width` tokens per row that begin at the slots `starts`."""
        length = cache.capacity if cache.static else None
        return Frame(starts, width, padding, self.device, self.additive, length)

    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings of token ids: [B, k] int64 to [B, k, C]."""
        embedded: Tensor = self.embedding(ids)
        return embedded

    def rotary(self, hidden: Tensor, positions: Tensor) -> dict[str | None, Any]:
        """Rotary cosines and sines, by type of layer."""
        shared = self.base.rotary_emb(hidden, positions)
        return dict.fromkeys(self.layer_types, shared)

    def run(
        self, hidden: Tensor, first: int, last: int, frame: Frame, cache: RaggedCache
    ) -> Tensor:
        """Run the layers ``first .. last - 1`` on hidden states [B, k, C] that stand at `frame`."""
        cache.frame = frame
        key = ("rotary", hidden.device)
        if key not in frame._masks:
            frame._masks[key] = self.rotary(hidden, frame.positions)  # type: ignore[assignment]
        rotary: Any = frame._masks[key]
        masks = {window: frame.mask(window) for window in set(self.windows[first:last])}
        modules = torch.is_grad_enabled() or torch.is_autocast_enabled(hidden.device.type)
        if self._direct is not None and not modules:
            return self._run_direct(hidden, first, last, masks, frame, rotary, cache)
        return self.apply(hidden, first, last, masks, frame.positions, rotary, cache)

    def _run_direct(
        self,
        hidden: Tensor,
        first: int,
        last: int,
        masks: Mapping[int | None, Tensor | None],
        frame: Frame,
        rotary: Mapping[str | None, Any],
        cache: RaggedCache,
    ) -> Tensor:
        assert self._direct is not None
        key = ("turns", hidden.device)
        if key not in frame._masks:
            frame._masks[key] = turns(rotary[self.layer_types[0]])  # type: ignore[assignment]
        turn = frame._masks[key]
        rows, width, size = hidden.shape
        flat, shape = hidden.reshape(-1, size), (rows, width)
        for i in range(first, last):
            flat = self._direct[i](flat, shape, masks[self.windows[i]], turn, cache)
        return flat.view(rows, width, size)

    def apply(
        self,
        hidden: Tensor,
        first: int,
        last: int,
        masks: Mapping[int | None, Tensor | None],
        positions: Tensor,
        rotary: Mapping[str | None, Any],
        cache: Any,
    ) -> Tensor:
        """Call the layers ``first .. last - 1`` with everything they need.

        Args:
            hidden: [B, k, C].
            first: First layer.
            last: The layer after the last one.
            masks: By the layer's window.
            positions: [B, k].
            rotary: Cosines and sines, by type of layer.
            cache: Whose ``update`` the layers call.
        """
        for i in range(first, last):
            hidden = self.layers[i](
                hidden,
                attention_mask=masks[self.windows[i]],
                position_ids=positions,
                position_embeddings=rotary[self.layer_types[i]],
                **{self._cache_name: cache},
            )
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states after any layer, [B, k, C] to [B, k, V] in float32.

        The logits are rounded to float32 whatever the model's dtype, as in ``generate``.
        """
        return self.head(self.normalize(hidden))

    def normalize(self, hidden: Tensor) -> Tensor:
        """The model's final norm, after any layer."""
        normed: Tensor = self.base.norm(hidden)
        return normed

    def head(self, normed: Tensor) -> Tensor:
        """Logits of normed hidden states."""
        out: Tensor = self.model.lm_head(normed)
        return self.shape_logits(out).float()

    def shape_logits(self, logits: Tensor) -> Tensor:
        """What the family does to logits after the head."""
        return logits


class _AllSliding(LayerRunner):
    """Families in which ``sliding_window``, if set, holds for every layer."""

    all_layers_slide = True


class _Granite(LayerRunner):
    def embed(self, ids: Tensor) -> Tensor:
        scaled: Tensor = super().embed(ids) * self.base.embedding_multiplier
        return scaled

    def shape_logits(self, logits: Tensor) -> Tensor:
        scaled: Tensor = logits / self.config.logits_scaling
        return scaled


class _Gemma2(LayerRunner):
    def embed(self, ids: Tensor) -> Tensor:
        embedded = super().embed(ids)
        if hasattr(self.base.embed_tokens, "embed_scale"):
            return embedded  # the embedding module scales, since transformers 5.24
        return embedded * torch.tensor(self.config.hidden_size**0.5, dtype=embedded.dtype)

    def shape_logits(self, logits: Tensor) -> Tensor:
        cap = self.config.final_logit_softcapping
        return logits if cap is None else torch.tanh(logits / cap) * cap


class _Gemma3(_Gemma2):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        if getattr(self.config, "use_bidirectional_attention", False):
            raise UnsupportedModelError("Gemma 3 with bidirectional attention does not decode")

    def rotary(self, hidden: Tensor, positions: Tensor) -> dict[str | None, Any]:
        return {t: self.base.rotary_emb(hidden, positions, t) for t in set(self.layer_types)}


_ADAPTERS: dict[str, type[LayerRunner]] = {
    "llama": LayerRunner,
    "mistral": _AllSliding,
    "qwen2": LayerRunner,
    "qwen3": LayerRunner,
    "qwen3_moe": _AllSliding,
    "phi3": _AllSliding,
    "smollm3": LayerRunner,
    "granite": _Granite,
    "olmo2": LayerRunner,
    "gemma2": _Gemma2,
    "gemma3_text": _Gemma3,
}


def register_adapter(model_type: str, adapter: type[LayerRunner]) -> None:
    """Teach the decoder another family.

    Args:
        model_type: As in the model's config.
        adapter: A subclass of `LayerRunner`.

    Examples:
        >>> register_adapter("my-llama", LayerRunner)
        >>> "my-llama" in supported_model_types()
        True
    """
    _ADAPTERS[model_type] = adapter


def supported_model_types() -> list[str]:
    """The families that have an adapter.

    Examples:
        >>> {"llama", "qwen3", "gemma3_text"} <= set(supported_model_types())
        True
    """
    return sorted(_ADAPTERS)


def layer_runner(model: nn.Module) -> LayerRunner:
    """The adapter of a model.

    Args:
        model: A causal language model of transformers.

    Raises:
        UnsupportedModelError: If its family has none.
    """
    config: Any = getattr(model, "config", None)
    name = getattr(config, "model_type", type(model).__name__)
    if name not in _ADAPTERS or not hasattr(model, "lm_head"):
        raise UnsupportedModelError(
            f"no adapter runs {type(model).__name__} (model type {name!r}) layer by layer; "
            f"supported: {', '.join(supported_model_types())}; "
            "others: lede.adapters.register_adapter"
        )
    return _ADAPTERS[name](model)

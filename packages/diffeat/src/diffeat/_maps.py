"""Attention maps: read where the requested attention modules compute them, and nowhere else."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffeat.errors import MapTooLarge

LIMIT = 2 << 30

Sink = Callable[[Tensor], None]


class _Spy(TorchFunctionMode):
    """Recomputes the probabilities of each attention call; the call itself goes through as it was.

    The mode is local to the thread and active only inside one processor call.
    """

    def __init__(self, heads: int, limit: int | None, name: str) -> None:
        super().__init__()
        self.heads, self.limit, self.name = heads, limit, name
        self.maps: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.maps.append(self._probabilities(*args, **kwargs))
        result = func(*args, **kwargs)
        if func in (torch.Tensor.softmax, torch.softmax) and result.ndim == 3:
            batch = result.shape[0] // self.heads
            self._check(batch, result.shape[1], result.shape[2], result.element_size())
            self.maps.append(result)
        return result

    def _check(self, batch: int, queries: int, keys: int, itemsize: int) -> None:
        size = batch * self.heads * queries * keys * itemsize
        if self.limit is not None and size > self.limit:
            raise MapTooLarge(self.name, size, self.limit)

    def _probabilities(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **_: Any,
    ) -> Tensor:
        self._check(query.shape[0], query.shape[-2], key.shape[-2], query.element_size())
        scores = query @ key.transpose(-1, -2) * (scale or 1 / math.sqrt(query.shape[-1]))
        if attn_mask is not None:
            blocked = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -torch.inf) if blocked else scores + attn_mask
        return scores.float().softmax(-1).to(query.dtype)


@contextlib.contextmanager
def spied(attention: Any, name: str, sink: Sink, *, limit: int | None = LIMIT) -> Iterator[None]:
    """Give the maps ``[B, heads, queries, keys]`` of one attention module to `sink`, call by call.

    Args:
        attention: A diffusers attention module.
        name: Of the activation, for messages.
        sink: Receives each map.
        limit: Bytes that a map may take.

    Raises:
        NotImplementedError: If its processor cannot be wrapped, or does something else than one
            softmax attention.
    """
    original = getattr(attention, "processor", None)
    if original is None or isinstance(original, nn.Module):
        raise NotImplementedError(
            f"{name}: a processor of class {type(original).__name__} cannot be wrapped; set a "
            "plain one with set_attn_processor, such as AttnProcessor2_0"
        )

    class MapProcessor:
        # diffusers reads the signature of __call__ to see which arguments the processor takes.
        @functools.wraps(type(original).__call__)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            with _Spy(attention.heads, limit, name) as spy:
                result = original(*args, **kwargs)
            if len(spy.maps) != 1:
                raise NotImplementedError(
                    f"{name}: {type(original).__name__} made {len(spy.maps)} softmax attentions "
                    "in a call instead of one; set AttnProcessor2_0 with set_attn_processor"
                )
            found = spy.maps[0]
            sink(found.unflatten(0, (-1, attention.heads)) if found.ndim == 3 else found)
            return result

    wrapper = MapProcessor()
    attention.processor = wrapper
    try:
        yield
    finally:
        attention.processor = original

"""Layers as compiled graphs over a static cache: one graph for each segment and width.

Eager layers of one token are bound by launches, not by arithmetic. Here the layers between two
candidate exits, at a width from a few buckets, are one graph of fixed shapes: `torch.compile`
fuses it, and on CUDA replays it as a CUDA graph. The walk from candidate to candidate and the
drafts use the same m segments; every exit's verification has a graph per bucket. So m exits and b
buckets make at most m + m b + 1 segments (the last is the plain step) and b heads, whatever is
decoded at a batch size. Only DEL, which looks at the candidates on the way, adds segments between
them: (m - 1) b.
"""

import contextlib
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lede.adapters import LayerRunner
from lede.cache import Frame, RaggedCache, visible
from lede.cost import WIDTHS
from shared_core.errors import InputError

__all__ = ["CompiledRunner"]

SMALLEST = 64


class CompiledRunner:
    """A `LayerRunner` whose short passes are compiled; prompts run eagerly into the same cache.

    Args:
        runner: Of the model.
        exits: Candidates; segments are cut there.
        max_draft: Longest draft; a verification is at most one wider.
        backend: Of ``torch.compile``. With ``inductor`` on CUDA the graphs are CUDA graphs.

    Raises:
        InputError: If the model is spread over devices, or the backend is unknown.

    Examples:
        >>> from lede.adapters import layer_runner
        >>> from lede.testing import tiny_model
        >>> runner = CompiledRunner(layer_runner(tiny_model()), (1, 2), 6, backend="eager")
        >>> runner.buckets, runner.graphs
        ((1, 2, 4, 7), 0)
    """

    def __init__(
        self,
        runner: LayerRunner,
        exits: Sequence[int],
        max_draft: int,
        *,
        backend: str = "inductor",
    ) -> None:
        known = torch.compiler.list_backends(exclude_tags=())
        if backend not in known:
            raise InputError(f"compile={backend!r}; accepted: True, False, {', '.join(known)}")
        if any(hasattr(module, "_hf_hook") for module in runner.model.modules()):
            raise InputError(
                "compile=True needs the whole model on one device; this one has the hooks of a "
                "device map: load it without, or leave compile off"
            )
        self._runner = runner
        self._exits = tuple(exits)
        self._backend = backend
        self.buckets = (*(w for w in WIDTHS if w <= max_draft), max_draft + 1)
        self._caches: dict[int, RaggedCache] = {}
        self._compiled: dict[Any, Callable[..., Tensor]] = {}
        self._called: set[Callable[..., Tensor]] = set()
        self._made_for: tuple[Any, ...] = ()

    def prepare(self) -> None:
        """Forget graphs and caches if the model, or a global setting of torch, has changed.

        Asked once a generation, so that it need not be asked at every call (see `_call`).
        """
        self._runner.prepare()
        made_for = self._signature()
        if made_for != self._made_for:
            self._compiled.clear()
            self._called.clear()
            self._caches.clear()  # their dtype is the model's
            self._made_for = made_for

    def _signature(self) -> tuple[Any, ...]:
        kind = self._runner.device.type
        modules = list(self._runner.model.modules())
        return (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled(kind),
            torch.get_autocast_dtype(kind),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_default_dtype(),
            torch.get_num_threads(),
            [(id(p), p.dtype, p.device, p.shape) for p in self._runner.model.parameters()],
            [
                (id(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks))
                for m in modules
            ],
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    @property
    def graphs(self) -> int:
        """How many graphs have been made so far."""
        return len(self._compiled)

    def cache(self, rows: int, length: int) -> RaggedCache:
        """The static cache for a batch size and at least `length` slots: a power of two, kept.

        A longer call makes a larger one, and graphs anew; a shorter call uses what is there.
        """
        length += self.buckets[-1]
        cache = self._caches.get(rows)
        if cache is None or cache.capacity < length:
            self._compiled = {k: v for k, v in self._compiled.items() if k[1] != rows}
            capacity = max(SMALLEST, 1 << (length - 1).bit_length())
            cache = RaggedCache(self._runner.depth, capacity)
            nothing = np.zeros(rows, dtype=np.int64)
            with torch.inference_mode(False), torch.no_grad():
                # An eager step allocates every layer's block, in its own shape and dtype.
                start = torch.zeros((rows, 1), dtype=torch.long, device=self._runner.device)
                frame = self._runner.frame(nothing, 1, nothing, cache)
                self._runner.run(self._runner.embed(start), 0, self._runner.depth, frame, cache)
            for block in (*cache.keys, *cache.values):
                torch._dynamo.mark_static_address(block)
            self._caches[rows] = cache
        for block in (*cache.keys, *cache.values):
            assert block is not None
            block.zero_()  # what an earlier call left could be NaN, which no mask hides
        return cache

    def run(
        self, hidden: Tensor, first: int, last: int, frame: Frame, cache: RaggedCache
    ) -> Tensor:
        """Run the layers ``first .. last - 1``, as `LayerRunner.run` does."""
        width = hidden.shape[1]
        prompt = width > 1 and last - first == self._runner.depth
        if prompt or width > self.buckets[-1]:
            return self._runner.run(hidden, first, last, frame, cache)
        bucket = self._bucket(width)
        slots = torch.from_numpy(frame.starts[:, None] + np.arange(bucket)).to(hidden.device)
        padding = torch.from_numpy(frame.padding).to(hidden.device)
        # What the surplus tokens of a bucket write stands behind all real slots, where nobody looks
        # before it is overwritten.
        hidden = _widened(hidden, bucket)
        blocks = _Blocks(cache.keys, cache.values, slots)
        stops = [e for e in self._exits if first < e < last] if last in self._exits else []
        for stop in (*stops, last):
            segment = self._segment(len(hidden), first, stop, bucket, cache.capacity)
            hidden = self._call(segment, hidden, padding, blocks)
            first = stop
        return hidden[:, :width]

    def warm_up(self, rows: int, length: int) -> None:
        """Compile everything that rounds of `rows` rows and up to `length` tokens can need."""
        with torch.no_grad():
            self.prepare()
        cache, depth = self.cache(rows, length), self._runner.depth
        nothing = np.zeros(rows, dtype=np.int64)
        with torch.no_grad():
            ids = torch.zeros((rows, self.buckets[-1]), dtype=torch.long, device=self.device)
            hidden = self._runner.embed(ids)
            for bucket in self.buckets:
                frame = self._runner.frame(nothing, bucket, nothing, cache)
                walk = zip((0, *self._exits), self._exits, strict=False) if bucket == 1 else ()
                for first, last in (*walk, *((e, depth) for e in self._exits)):
                    self.run(hidden[:, :bucket], first, last, frame, cache)
                self.logits(hidden[:, :bucket])
            frame = self._runner.frame(nothing, 1, nothing, cache)
            self.run(hidden[:, :1], 0, depth, frame, cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states after any layer, as `LayerRunner.logits`."""
        rows, width, _ = hidden.shape
        if width > self.buckets[-1]:
            return self._runner.logits(hidden)
        bucket = self._bucket(width)
        key = ("head", rows, bucket)
        if key not in self._compiled:
            runner = self._runner

            def head(hidden: Tensor) -> Tensor:
                return runner.logits(hidden)

            self._compiled[key] = self._compile(head, "_".join(map(str, key)))
        return self._call(self._compiled[key], _widened(hidden, bucket))[:, :width]

    def _bucket(self, width: int) -> int:
        return next(w for w in self.buckets if w >= width)

    def _segment(
        self, rows: int, first: int, last: int, width: int, capacity: int
    ) -> Callable[..., Tensor]:
        key = ("segment", rows, first, last, width)
        if key not in self._compiled:
            runner, windows = self._runner, set(self._runner.windows[first:last])
            additive = runner.additive

            def segment(hidden: Tensor, padding: Tensor, blocks: "_Blocks") -> Tensor:
                slots = blocks.slots
                positions = (slots - padding[:, None]).clamp(min=0)
                masks = {w: visible(slots, padding, capacity, w, additive) for w in windows}
                rotary = runner.rotary(hidden, positions)
                return runner.apply(hidden, first, last, masks, positions, rotary, blocks)

            self._compiled[key] = self._compile(segment, "_".join(map(str, key)))
        return self._compiled[key]

    def _compile(self, function: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
        # Dynamo counts recompilations by code object, and gives up after a few: each graph has its
        # own, so that none is a recompilation of another.
        code = function.__code__.replace(co_name=name)
        own = types.FunctionType(
            code, function.__globals__, name, function.__defaults__, function.__closure__
        )
        options: dict[str, Any] = {}
        if self._backend == "inductor" and self._runner.device.type == "cuda":
            options["mode"] = "reduce-overhead"
        compiled: Callable[..., Tensor] = torch.compile(
            own, backend=self._backend, fullgraph=True, dynamic=False, **options
        )
        return compiled

    def _call(self, compiled: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """Run a graph, after its first call without asking whether it still fits.

        Asking means looking at every weight. Older versions of torch always ask.
        """
        known = compiled in self._called
        self._called.add(compiled)
        with _trusting() if known else contextlib.nullcontext():
            if self._runner.device.type != "cuda":
                return compiled(*inputs)
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            return compiled(*inputs).clone()  # the next replay would overwrite it


def _trusting() -> contextlib.AbstractContextManager[Any]:
    stance: Any = torch.compiler.set_stance
    try:
        found: contextlib.AbstractContextManager[Any] = stance(skip_guard_eval_unsafe=True)
    except TypeError:
        return contextlib.nullcontext()
    return found


def _widened(hidden: Tensor, bucket: int) -> Tensor:
    """Hidden states [B, k, C] with zeros up to the bucket's width, in the strides of a new tensor.

    A graph is made for certain strides, those of dimensions of size 1 among them.
    """
    rows, width, size = hidden.shape
    if width == bucket and hidden.stride() == (bucket * size, size, 1):
        return hidden
    fresh = hidden.new_zeros((rows, bucket, size))
    fresh[:, :width] = hidden
    return fresh


class _Blocks:
    """What the layers of a graph see of the cache: fixed blocks, written at given slots [B, k]."""

    def __init__(self, keys: list[Any], values: list[Any], slots: Tensor) -> None:
        self.keys, self.values, self.slots = keys, values, slots

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        blocks = self.keys[layer_idx], self.values[layer_idx]
        for block, new in zip(blocks, (keys, values), strict=True):
            if len(self.slots) == 1:
                block.index_copy_(2, self.slots[0], new)
            else:
                block.scatter_(2, self.slots[:, None, :, None].expand_as(new), new)
        return blocks

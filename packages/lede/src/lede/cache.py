"""A key-value cache whose layers and rows may be filled to different lengths.

In a round of self-speculative decoding the early layers are ahead of the late ones, and every row
of a batch keeps a different number of drafts. Here a `Frame` says where the tokens of a pass
stand, the cache writes there, and the frame's mask hides everything behind. Rolling back costs
nothing: a rejected entry is never seen again and its slot is overwritten.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Frame", "RaggedCache", "visible"]


def visible(
    slots: Tensor,
    padding: Tensor,
    length: int,
    window: int | None,
    additive: torch.dtype | None = None,
) -> Tensor:
    """What tokens may see: the keys up to their own slot, of their window, and no padding.

    Args:
        slots: Where the tokens stand, int64, shape [B, k].
        padding: Left padding of each row, shape [B].
        length: Keys, S.
        window: Sliding window in tokens; ``None`` for full attention.
        additive: Give a mask to be added to the scores, in this dtype, instead of a boolean one.

    Returns:
        Mask of shape [B, 1, k, S].

    Examples:
        >>> visible(torch.tensor([[1, 2]]), torch.tensor([1]), 4, None)[0, 0].int()
        tensor([[0, 1, 0, 0],
                [0, 1, 1, 0]], dtype=torch.int32)
    """
    keys = torch.arange(length, device=slots.device)
    queries = slots[:, :, None]
    seen = keys <= queries
    if window is not None:
        seen = seen & (keys > queries - window)
    # A padding token sees itself: attention over nothing would be NaN.
    seen = (seen & ((keys >= padding[:, None, None]) | (keys == queries)))[:, None]
    if additive is None:
        return seen
    hidden = torch.finfo(additive).min
    nothing = torch.zeros(seen.shape, dtype=additive, device=slots.device)
    return nothing.masked_fill(~seen, hidden)


@dataclass
class Frame:
    """Where the tokens of one pass stand.

    Row b's k tokens stand at the slots ``starts[b] .. starts[b] + k - 1`` of the padded sequence;
    its first ``padding[b]`` slots are padding. A token sees the slots up to its own.

    Args:
        starts: First slot of each row, shape [B].
        width: Tokens per row, k.
        padding: Left padding of each row, shape [B].
        device: Where slots, positions and masks live.
        additive: Masks are added to the attention scores (eager attention) in this dtype, instead
            of being boolean.
        length: Slots the keys will have, if not the least that is needed.

    Examples:
        >>> frame = Frame(np.array([2, 3]), 2, np.array([0, 1]), torch.device("cpu"))
        >>> frame.positions
        tensor([[2, 3],
                [2, 3]])
        >>> frame.mask(None)[1, 0].int()
        tensor([[0, 1, 1, 1, 0],
                [0, 1, 1, 1, 1]], dtype=torch.int32)
    """

    starts: np.ndarray
    width: int
    padding: np.ndarray
    device: torch.device
    additive: torch.dtype | None = None
    length: int | None = None
    _masks: dict[Any, Tensor | None] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        first = int(self.starts[0])
        self.start: int | None = first if bool((self.starts == first).all()) else None
        self.end = int(self.starts.max()) + self.width
        self.padded = bool(self.padding.any())

    @cached_property
    def slots(self) -> Tensor:
        """Where the tokens stand, [B, k]."""
        return torch.from_numpy(self.starts[:, None] + np.arange(self.width)).to(self.device)

    @cached_property
    def positions(self) -> Tensor:
        """Their positions without the padding, [B, k]."""
        if not self.padded:
            return self.slots
        positions = self.starts[:, None] + np.arange(self.width) - self.padding[:, None]
        return torch.from_numpy(np.maximum(positions, 0)).to(self.device)

    def mask(self, window: int | None) -> Tensor | None:
        """What each token may see: shape [B, 1, k, S], or ``None`` where the library's own does.

        Args:
            window: Sliding window of the layer, in tokens; ``None`` for full attention.
        """
        if window not in self._masks:
            self._masks[window] = self._make_mask(window)
        return self._masks[window]

    def _make_mask(self, window: int | None) -> Tensor | None:
        slots = self.end if self.length is None else self.length
        plain = self.start is not None and not self.padded and slots == self.end
        short = window is None or self.end <= window
        causal = self.width == 1 or (self.start == 0 and self.additive is None)
        if plain and short and causal:
            return None
        padding = torch.from_numpy(self.padding).to(self.device)
        return visible(self.slots, padding, slots, window, self.additive)


class RaggedCache:
    """Keys and values of every layer in preallocated blocks, written in place.

    The decoder sets `frame` before it runs layers; the layers call `update` as they would with a
    cache of transformers.

    Args:
        layers: Number of layers.
        capacity: Slots to allocate; more are allocated when needed.
        static: Hand attention the whole block at every step, so that all shapes stay the same.

    Examples:
        >>> cache = RaggedCache(1, capacity=4)
        >>> cache.frame = Frame(np.array([0]), 3, np.array([0]), torch.device("cpu"))
        >>> keys, values = cache.update(torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3, 8), 0)
        >>> tuple(keys.shape)
        (1, 2, 3, 8)
    """

    def __init__(self, layers: int, capacity: int, *, static: bool = False) -> None:
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers
        self.capacity = capacity
        self.static = static
        self.frame: Frame | None = None

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values at the frame's slots and return all up to its end.

        Args:
            keys: [B, heads, k, D].
            values: [B, heads, k, D].
            layer_idx: Of the layer in the whole model.
            args: Ignored; some versions of transformers pass more.
            kwargs: Ignored.
        """
        frame = self.frame
        if frame is None:
            raise RuntimeError("the cache has no frame; run layers through LayerRunner.run")
        k = self._block(self.keys, layer_idx, keys, frame.end)
        v = self._block(self.values, layer_idx, values, frame.end)
        if frame.start is not None:
            k.narrow(2, frame.start, frame.width).copy_(keys)
            v.narrow(2, frame.start, frame.width).copy_(values)
        else:
            slots = frame.slots.to(keys.device)
            rows = torch.arange(len(slots), device=keys.device)[:, None]
            k[rows, :, slots] = keys.transpose(1, 2)
            v[rows, :, slots] = values.transpose(1, 2)
        end = self.capacity if self.static else frame.end
        return k.narrow(2, 0, end), v.narrow(2, 0, end)

    def _block(self, blocks: list[Tensor | None], layer: int, like: Tensor, end: int) -> Tensor:
        if end > self.capacity:
            self.capacity = max(end, 2 * self.capacity)
        block = blocks[layer]
        if block is None or block.shape[2] < self.capacity:
            shape = (like.shape[0], like.shape[1], self.capacity, like.shape[3])
            # Zeros: masked entries are multiplied by 0, which uninitialised NaN would survive.
            grown = like.new_zeros(shape)
            if block is not None:
                grown[:, :, : block.shape[2]] = block
            blocks[layer] = block = grown
        return block

    def gather(self, rows: Tensor, *, layers: int, length: int, extra: int) -> "RaggedCache":
        """Copy some rows of the first layers: the start of branches that leave their sequence.

        Args:
            rows: Row of each branch, int64, shape [M]; a row may occur often.
            layers: How many layers to copy.
            length: Slots to copy.
            extra: Further slots to allocate.
        """
        branch = RaggedCache(len(self.keys), length + extra)
        for blocks, copies in ((self.keys, branch.keys), (self.values, branch.values)):
            for i in range(layers):
                block = blocks[i]
                if block is None:
                    raise RuntimeError(f"layer {i} has no keys yet")
                copy = block.new_zeros((len(rows), block.shape[1], length + extra, block.shape[3]))
                copy[:, :, :length] = block[rows.to(block.device), :, :length]
                copies[i] = copy
        return branch

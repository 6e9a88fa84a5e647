"""The compressed form of a batch of contexts."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gmsa.merging import num_groups
from gmsa.sequences import join_rows
from shared_core.errors import InputError
from shared_core.run import atomic_path

__all__ = ["SoftTokens"]

_NAMES = ("embeds", "mask", "rates", "n_tokens")


@dataclass(frozen=True)
class SoftTokens:
    """Soft tokens e_m of B contexts, ready to stand where their text would.

    Attributes:
        embeds: Vectors in the decoder's input space ``[B, G, d]``, zero where there is none.
        mask: Which vectors are there ``[B, G]``; valid ones come first.
        rates: The compression rate r asked for, of each row ``[B]``.
        n_tokens: How many tokens each context had ``[B]``.

    Raises:
        InputError: If the shapes do not belong together.

    Examples:
        >>> soft = SoftTokens(
        ...     torch.zeros(1, 3, 8), torch.ones(1, 3, dtype=torch.bool),
        ...     torch.tensor([4]), torch.tensor([10]))
        >>> soft.lengths, soft.ratio
        (tensor([3]), tensor([3.3333]))
    """

    embeds: Float[Tensor, "B G d"]
    mask: Bool[Tensor, "B G"]
    rates: Int[Tensor, "B"]
    n_tokens: Int[Tensor, "B"]

    def __post_init__(self) -> None:
        B = len(self.embeds)
        if (
            self.embeds.dim() != 3
            or self.mask.shape != self.embeds.shape[:2]
            or self.rates.shape != (B,)
            or self.n_tokens.shape != (B,)
        ):
            told = ", ".join(f"{n} {list(getattr(self, n).shape)}" for n in _NAMES)
            raise InputError(f"soft tokens do not fit together: {told}")

    def __len__(self) -> int:
        return len(self.embeds)

    @property
    def lengths(self) -> Int[Tensor, "B"]:
        """The number of soft tokens of each row."""
        return self.mask.sum(1)

    @property
    def ratio(self) -> Float[Tensor, "B"]:
        """The achieved compression n / G of each row; 1 for an empty one."""
        lengths = self.lengths
        return torch.where(lengths > 0, self.n_tokens / lengths.clamp(min=1), 1.0)

    def to(self, *args: Any) -> "SoftTokens":
        """Move to a device, a dtype or both; the dtype is that of `embeds` alone."""
        embeds = self.embeds.to(*args)
        place = embeds.device
        return SoftTokens(
            embeds, self.mask.to(place), self.rates.to(place), self.n_tokens.to(place)
        )

    def cpu(self) -> "SoftTokens":
        """Move to the CPU."""
        return self.to("cpu")

    def detach(self) -> "SoftTokens":
        """Cut off from the graph that made them."""
        return SoftTokens(self.embeds.detach(), self.mask, self.rates, self.n_tokens)

    def __getitem__(self, rows: slice | Tensor | Sequence[int]) -> "SoftTokens":
        """Some of the rows, without padding that none of them needs."""
        kept = rows if isinstance(rows, slice | Tensor) else torch.tensor(rows, dtype=torch.long)
        mask = self.mask[kept]
        width = int(mask.sum(1).max()) if mask.numel() else 0
        return SoftTokens(
            self.embeds[kept][:, :width], mask[:, :width], self.rates[kept], self.n_tokens[kept]
        )

    def unbatch(self) -> list["SoftTokens"]:
        """One `SoftTokens` a row, without padding."""
        return [self[i : i + 1] for i in range(len(self))]

    @staticmethod
    def batch(rows: Sequence["SoftTokens"]) -> "SoftTokens":
        """Stack along the batch, padding to the longest.

        Raises:
            InputError: If there is nothing, or widths, dtypes or devices differ.
        """
        rows = _checked(rows)
        width = max(r.embeds.shape[1] for r in rows)

        def padded(value: Tensor) -> Tensor:
            short = width - value.shape[1]
            return torch.cat([value, value.new_zeros(len(value), short, *value.shape[2:])], 1)

        return SoftTokens(
            torch.cat([padded(r.embeds) for r in rows]),
            torch.cat([padded(r.mask) for r in rows]),
            torch.cat([r.rates for r in rows]),
            torch.cat([r.n_tokens for r in rows]),
        )

    @staticmethod
    def cat(documents: Sequence["SoftTokens"]) -> "SoftTokens":
        """Concatenate documents along the sequence, row by row and in order.

        Row b of the result holds row b of every document without padding between them. Its rate
        is the overall one, rounded up.

        Raises:
            InputError: If there is nothing, or batch sizes, widths, dtypes or devices differ.
        """
        documents = _checked(documents)
        if len({len(d) for d in documents}) > 1:
            raise InputError("documents to concatenate have different batch sizes")
        embeds, mask = join_rows([(d.embeds, d.mask) for d in documents])
        n_tokens = torch.stack([d.n_tokens for d in documents]).sum(0)
        rates = num_groups(n_tokens, mask.sum(1).clamp(min=1)).clamp(min=1)
        return SoftTokens(embeds, mask, rates, n_tokens)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, whole or not at all."""
        tensors = {n: getattr(self, n).detach().cpu().contiguous() for n in _NAMES}
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={"format": "gmsa-soft-tokens"})

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "SoftTokens":
        """Read what `save` wrote, on the CPU.

        Raises:
            InputError: If the file is missing, damaged or not such a file.
        """
        if not os.path.isfile(path):
            raise InputError(f"there are no soft tokens at {os.fspath(path)}")
        try:
            with safe_open(path, framework="pt") as file:
                return SoftTokens(*(file.get_tensor(n) for n in _NAMES))
        except (SafetensorError, OSError) as error:
            raise InputError(f"{os.fspath(path)} holds no soft tokens ({error})") from error

    def __iter__(self) -> Iterator["SoftTokens"]:
        return iter(self.unbatch())


def _checked(several: Sequence[SoftTokens]) -> list[SoftTokens]:
    """Refuse what cannot be put together."""
    found = list(several)
    if not found:
        raise InputError("there are no soft tokens to put together")
    kinds = {(s.embeds.shape[2], s.embeds.dtype, s.embeds.device) for s in found}
    if len(kinds) > 1:
        told = "; ".join(f"width {w}, {d}, {p}" for w, d, p in kinds)
        raise InputError(f"soft tokens differ in width, dtype or device: {told}")
    return found

"""The bank of extra negatives that a stream of images fills: the top E by deviation."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from internet_neg._checks import check_embeddings
from internet_neg.errors import InterNegError

__all__ = ["NegativeBank"]


class NegativeBank:
    """Extra negative texts in a buffer of fixed size, the largest deviation first.

    Args:
        capacity: E, the most to keep; at least 1.
        dim: Width of the embeddings.
        device: Where they lie.
        dtype: ``torch.float32``, or ``torch.float16`` as the published code.

    Examples:
        >>> bank = NegativeBank(capacity=2, dim=2)
        >>> bank.insert(torch.eye(2), torch.tensor([0.1, 0.3]), torch.tensor([7, 8]))
        >>> bank.insert(torch.ones(1, 2), torch.tensor([0.2]), torch.tensor([9]))
        >>> len(bank), bank.source_index.tolist()
        (2, [8, 9])
    """

    def __init__(
        self,
        capacity: int,
        dim: int,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if capacity < 1:
            raise InterNegError(f"a bank of {capacity}; it has to hold at least 1")
        self.capacity = capacity
        self._size = 0
        self._embeddings = torch.zeros(capacity, dim, device=device, dtype=dtype)
        self._deviations = torch.zeros(capacity, device=device)
        self._sources = torch.zeros(capacity, device=device, dtype=torch.long)

    def __len__(self) -> int:
        return self._size

    @property
    def embeddings(self) -> Float[Tensor, "n D"]:
        """The embeddings, the largest deviation first."""
        return self._embeddings[: self._size]

    @property
    def deviations(self) -> Float[Tensor, " n"]:
        """Their deviations, descending."""
        return self._deviations[: self._size]

    @property
    def source_index(self) -> Int[Tensor, " n"]:
        """The position in the stream of the image that each came from."""
        return self._sources[: self._size]

    def insert(
        self,
        embeddings: Float[Tensor, "b D"],
        deviations: Float[Tensor, " b"],
        source_index: Int[Tensor, " b"],
    ) -> None:
        """Merge new entries and keep the top E; where deviations tie, older ones stay.

        Args:
            embeddings: New negatives.
            deviations: Their deviations.
            source_index: Where in the stream they come from.

        Raises:
            InterNegError: If they are not finite or of another width.
        """
        if not len(embeddings):
            return
        check_embeddings("bank entries", embeddings, self._embeddings.shape[1])
        joined = torch.cat([self.deviations, deviations.to(self._deviations)])
        order = joined.argsort(descending=True, stable=True)[: self.capacity]
        n = len(order)
        for buffer, new in (
            (self._embeddings, embeddings),
            (self._deviations, deviations),
            (self._sources, source_index),
        ):
            buffer[:n] = torch.cat([buffer[: self._size], new.to(buffer)])[order]
        self._size = n

    def clear(self) -> None:
        """Forget all entries."""
        self._size = 0

    def state_dict(self) -> dict[str, Any]:
        """The entries, for saving."""
        return {
            "embeddings": self.embeddings.clone(),
            "deviations": self.deviations.clone(),
            "source_index": self.source_index.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the entries by saved ones.

        Raises:
            InterNegError: If there are more than the bank holds, or they are of another width.
        """
        if len(state["embeddings"]) > self.capacity:
            raise InterNegError(
                f"the saved bank holds {len(state['embeddings'])}, this one at most {self.capacity}"
            )
        self.clear()
        self.insert(state["embeddings"], state["deviations"], state["source_index"])

"""A number per class, on whatever device and in whatever precision a batch comes."""

import torch
from jaxtyping import Float
from torch import Tensor


class PerClass:
    """Constants of the classes: float64 on the CPU, with a copy for every device that asked.

    Unlike the buffer of a module it need not be moved, and nothing (``.half()``) rounds it.

    Args:
        values: One number per class, ``[classes]``.
    """

    def __init__(self, values: Float[Tensor, " classes"]) -> None:
        self.values = values.detach().cpu().to(torch.float64, copy=True)
        self._copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.values.numel()

    def to(
        self, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, " classes"]:
        """The values as a tensor on `device`, kept there for the next call."""
        key = (device, dtype)
        if key not in self._copies:
            # A copy made while evaluating must serve training too, where autograd saves it.
            with torch.inference_mode(False):
                self._copies[key] = self.values.to(device, dtype)
        return self._copies[key]

    def like(self, tensor: Tensor) -> Float[Tensor, " classes"]:
        """The values on the device and in the type of `tensor`."""
        return self.to(tensor.device, tensor.dtype)

"""Schedules of the radius ρ, used as `torch.optim.lr_scheduler` is used for learning rates.

Li et al. (ICML 2025) keep ρ constant, except for ResNet-50 on ImageNet-LT, where their code takes
0.1 and, for the last fifth of the training, 0.2: that is `StepRho` with its defaults.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from focal_sam._checks import check_nonnegative
from shared_core.errors import InputError

__all__ = ["LinearRho", "RhoScheduler", "StepRho"]


@runtime_checkable
class HasRho(Protocol):
    """What a schedule drives: every method of `focal_sam.methods`."""

    def set_rho(self, rho: float) -> None:
        """Set the radius."""


class RhoScheduler:
    """Sets ρ to ``schedule(epoch)``: for the first epoch at once, then at every `step`.

    A method whose parameter groups have radii of their own loses them: all groups get the same ρ.

    Args:
        method: What has the method ``set_rho``.
        schedule: ρ of an epoch counted from 0, or one number for a constant ρ. An epoch is what
            lies between two calls of `step`, so it may as well be a training step.

    Attributes:
        last_epoch: The epoch that ρ belongs to now.
        rho: ρ of that epoch.

    Raises:
        ValueError: If ρ is negative or not finite, at the epoch where it is.

    Examples:
        >>> import torch
        >>> from focal_sam.methods import SAM
        >>> sam = SAM(torch.nn.Linear(2, 2))
        >>> scheduler = RhoScheduler(sam, lambda epoch: 0.1 * 0.5**epoch)
        >>> for epoch in range(3):
        ...     print(sam.rho)  # train for an epoch
        ...     scheduler.step()
        0.1
        0.05
        0.025
    """

    def __init__(self, method: HasRho, schedule: Callable[[int], float] | float) -> None:
        self.method = method
        self.schedule = schedule
        self._go_to(0)

    def step(self) -> None:
        """Go to the next epoch; call it at the end of every epoch."""
        self._go_to(self.last_epoch + 1)

    def state_dict(self) -> dict[str, Any]:
        """The epoch. The schedule itself is not saved: build it anew before loading."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the epoch that `state_dict` saved, and set its ρ.

        Raises:
            ValueError: If the state is not one of `state_dict`.
        """
        epoch = state.get("last_epoch")
        if not isinstance(epoch, int) or epoch < 0:
            raise InputError(
                f"the state has last_epoch {epoch!r}; pass what state_dict() of a "
                f"{type(self).__name__} returned"
            )
        self._go_to(epoch)

    def _go_to(self, epoch: int) -> None:
        rho = self.schedule(epoch) if callable(self.schedule) else self.schedule
        check_nonnegative(**{f"rho of epoch {epoch}": rho})
        self.method.set_rho(rho)
        self.last_epoch, self.rho = epoch, rho


class StepRho(RhoScheduler):
    """One ρ first, another one from a fraction of the training on.

    The second begins with the first epoch e (from 0) that has ``e + 1 >= fraction * epochs``: with
    200 epochs and the fraction 0.8 that is epoch 159, so it lasts 41 epochs.

    Args:
        method: What has the method ``set_rho``.
        epochs: Epochs of the whole training, at least 1.
        first: ρ of the first part.
        second: ρ of the second part.
        fraction: Where the second part begins, in [0, 1].

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> import torch
        >>> from focal_sam.methods import SAM
        >>> scheduler = StepRho(SAM(torch.nn.Linear(2, 2)), epochs=5)
        >>> for epoch in range(5):
        ...     print(scheduler.rho)
        ...     scheduler.step()
        0.1
        0.1
        0.1
        0.2
        0.2
    """

    def __init__(
        self,
        method: HasRho,
        epochs: int,
        first: float = 0.1,
        second: float = 0.2,
        fraction: float = 0.8,
    ) -> None:
        _check_epochs(epochs)
        check_nonnegative(first=first, second=second)
        if not 0 <= fraction <= 1:
            raise InputError(f"fraction is {fraction}; it must lie in [0, 1], as 0.8 does")
        # Rounded, since 0.55 * 100 is a hair above 55 and must not cost an epoch.
        begin = math.ceil(round(fraction * epochs, 6)) - 1
        super().__init__(method, lambda epoch: first if epoch < begin else second)


class LinearRho(RhoScheduler):
    """ρ on a straight line: `start` in the first epoch, `end` in the last one and after it.

    Args:
        method: What has the method ``set_rho``.
        epochs: Epochs of the whole training, at least 1. A single one has `start`.
        start: ρ of the first epoch.
        end: ρ of the last epoch.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> import torch
        >>> from focal_sam.methods import SAM
        >>> scheduler = LinearRho(SAM(torch.nn.Linear(2, 2)), epochs=3, start=0.05, end=0.25)
        >>> for epoch in range(3):
        ...     print(round(scheduler.rho, 3))
        ...     scheduler.step()
        0.05
        0.15
        0.25
    """

    def __init__(self, method: HasRho, epochs: int, start: float, end: float) -> None:
        _check_epochs(epochs)
        check_nonnegative(start=start, end=end)

        def line(epoch: int) -> float:
            done = min(epoch / max(epochs - 1, 1), 1.0)
            # Both ends come out exactly, which start + done * (end - start) does not promise.
            return (1 - done) * start + done * end

        super().__init__(method, line)


def _check_epochs(epochs: int) -> None:
    if epochs < 1:
        raise InputError(f"epochs is {epochs}; it must be at least 1")

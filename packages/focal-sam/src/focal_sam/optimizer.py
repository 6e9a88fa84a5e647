"""The optimizer-style face of a sharpness method, for loops written around SAM optimizers."""

import contextlib
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from focal_sam._modules import frozen_running_stats
from focal_sam._perturbation import moved
from focal_sam.ccsam import CCSAM
from focal_sam.sharpness import Closure, SharpnessMethod, StepResult

__all__ = ["SAMOptimizer"]

RECIPE = (
    "step() needs a closure that returns the per-sample losses, and the labels: "
    "optimizer.step(lambda: criterion(model(x), y), y). With a gradient scaler, call "
    "method.backward(closure, y, scaler=scaler) and scaler.step(optimizer.base) instead"
)


class SAMOptimizer(Optimizer):
    """A base optimizer and a `SharpnessMethod` as one `torch.optim.Optimizer`.

    ``param_groups``, ``state``, ``defaults``, hooks and ``state_dict`` are the base optimizer's own
    objects, before and after loading, so learning-rate schedulers and checkpoints see what they
    would see without the wrapper. The method's few numbers are in its own ``state_dict``.

    Two ways to use it. ``step(closure, target)`` does everything::

        optimizer.step(lambda: criterion(model(x), y), y); optimizer.zero_grad()

    Or step by step, for loops of the ``first_step``/``second_step`` kind. With SAM and ASAM::

        criterion(model(x), y).mean().backward(); optimizer.first_step()
        criterion(model(x), y).mean().backward(); optimizer.second_step(zero_grad=True)

    Methods that weight classes take three steps, and `split` puts the weights in::

        weighted, rest = optimizer.split(criterion(model(x), y), y)
        weighted.backward(retain_graph=True); optimizer.first_step()
        rest.backward(); optimizer.second_step()
        weighted, _ = optimizer.split(criterion(model(x), y), y)
        weighted.backward(); optimizer.third_step(zero_grad=True)

    Step by step, both passes draw their own dropout, and each process of DDP has to perturb alike:
    use ``step(closure, target)`` or `SharpnessMethod.backward` where that matters.

    Args:
        base: An optimizer, or the class of one, which is then built over the method's model.
        method: The sharpness method.
        options: Of the optimizer class.

    Attributes:
        base: The base optimizer.
        method: The sharpness method.

    Raises:
        TypeError: If `base` is neither, or options come with a built optimizer.

    Examples:
        >>> import torch
        >>> from focal_sam import FocalSAM
        >>> model = torch.nn.Linear(4, 2)
        >>> method = FocalSAM(model, class_counts=[90, 10])
        >>> optimizer = SAMOptimizer(torch.optim.SGD, method, lr=0.1)
        >>> criterion = torch.nn.CrossEntropyLoss(reduction="none")
        >>> x, y = torch.randn(8, 4), torch.randint(2, (8,))
        >>> loss = optimizer.step(lambda: criterion(model(x), y), y)
        >>> optimizer.zero_grad()
    """

    def __init__(
        self, base: Optimizer | type[Optimizer], method: SharpnessMethod, **options: Any
    ) -> None:
        if isinstance(base, type) and issubclass(base, Optimizer):
            parameters: Any = (
                [{"params": g.params} for g in method.groups]
                if method.model is None
                else method.model.parameters()
            )
            base = base(parameters, **options)
        elif not isinstance(base, Optimizer):
            raise TypeError(f"base is a {type(base).__name__}, not a torch.optim.Optimizer")
        elif options:
            raise TypeError(f"{sorted(options)} belong to the optimizer that is already built")
        # Not Optimizer.__init__: what it would set up is the base's, and found by __getattr__.
        self.base: Optimizer = base
        self.method = method
        self.last: StepResult | None = None
        self._ascent: list[Tensor | None] | None = None
        self._moved = contextlib.ExitStack()
        self._stage = 0
        self._split = False

    def __getattr__(self, name: str) -> Any:
        if name in ("base", "method"):  # not set yet, as while being copied
            raise AttributeError(name)
        return getattr(self.base, name)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but a perturbation in force, which belongs to this process."""
        return {**self.__dict__, "_moved": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _moved=contextlib.ExitStack(), _ascent=None, _stage=0)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The base optimizer's groups."""
        return self.base.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The base optimizer's state."""
        return self.base.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The base optimizer's defaults."""
        return self.base.defaults

    def __repr__(self) -> str:
        return f"SAMOptimizer({self.base!r}, {type(self.method).__name__})"

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's ``state_dict``."""
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the base optimizer's state."""
        self.base.load_state_dict(state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        self.base.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer (the method perturbs what it was built with)."""
        self.base.add_param_group(param_group)

    def step(self, closure: Closure | None = None, target: Any = None) -> Tensor:  # type: ignore[override]
        """Compute the sharpness-aware gradient and take the base optimizer's step.

        Args:
            closure: Returns the per-sample losses, as for `SharpnessMethod.backward`.
            target: The labels, where classes are weighted.

        Returns:
            The mean loss at θ; the whole `StepResult` is in ``last``.

        Raises:
            RuntimeError: Without a closure, with the recipe.
        """
        if closure is None:
            raise RuntimeError(RECIPE)
        self.last = self.method.backward(closure, target)
        self.base.step()
        return self.last.loss

    def split(self, losses: Tensor, target: Any = None) -> tuple[Tensor, Tensor]:
        """``(1/B) Σ w l`` and ``(1/B) Σ (1 - w) l`` of per-sample losses ``[B]``.

        Args:
            losses: ``[B]``.
            target: The labels.
        """
        self._split = True
        return self.method.split(losses, target)

    def first_step(self, zero_grad: bool = False) -> None:
        """Take ``g_b`` out of ``p.grad``; where all samples weigh 1, also move to θ + ε.

        Args:
            zero_grad: For compatibility; ``p.grad`` is cleared in any case.
        """
        del zero_grad
        self._expect(0, "first_step")
        parameters = self.method._parameters()
        self._ascent = [p.grad for p in parameters]
        for p in self.method._trainable():
            p.grad = None
        self._stage = 1
        if self._unweighted:
            self._move()

    def second_step(self, zero_grad: bool = False) -> None:
        """Move to θ + ε, keeping ``g_a``; where all samples weigh 1, move back and step instead.

        Args:
            zero_grad: Clear the gradients after the base optimizer's step.
        """
        self._expect(1, "second_step")
        if self._unweighted:
            self._finish(zero_grad)
            return
        self._move()
        self._stage = 2

    def third_step(self, zero_grad: bool = False) -> None:
        """Move back to θ and take the base optimizer's step.

        Args:
            zero_grad: Clear the gradients after it.
        """
        self._expect(2, "third_step")
        self._finish(zero_grad)

    def restore(self) -> None:
        """Move back to θ, if an exception left the parameters at θ + ε; else do nothing."""
        self._moved.close()
        self._ascent, self._stage, self._split = None, 0, False

    @property
    def _unweighted(self) -> bool:
        return self.method.weights == 1.0 and not isinstance(self.method, CCSAM)

    def _expect(self, stage: int, name: str) -> None:
        if isinstance(self.method, CCSAM):
            raise RuntimeError(
                "CC-SAM has a perturbation for each class; use step(closure, target)"
            )
        if self._stage != stage:
            raise RuntimeError(f"{name}() is out of order: {self._stage} step(s) were taken before")
        if not self._unweighted and stage != 1:
            if not self._split:
                raise RuntimeError(
                    f"{type(self.method).__name__} weights classes: back-propagate what "
                    f"optimizer.split(losses, labels) returns before {name}()"
                )
            self._split = False

    def _move(self) -> None:
        method = self.method
        assert self._ascent is not None
        parameters, steps, factors, _ = method._displacements(self._ascent)
        self._ascent = None
        self._moved.enter_context(moved(parameters, steps, factors))
        freeze = method.bn_perturbed == "freeze"
        self._moved.enter_context(frozen_running_stats(method._norms, freeze))

    def _finish(self, zero_grad: bool) -> None:
        self.restore()
        self.method.steps += 1
        self.base.step()
        if zero_grad:
            self.base.zero_grad()

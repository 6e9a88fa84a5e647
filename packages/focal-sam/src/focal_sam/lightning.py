"""Sharpness-aware training of a Lightning module.

Only this module imports lightning (``pip install 'focal-sam[lightning]'``). A module inherits from
`FocalSAMMixin`, says which method it wants, and gives losses per sample instead of a training step.
"""

import contextlib
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ReduceLROnPlateau

from focal_sam.sharpness import SharpnessMethod, StepResult
from shared_core.errors import InputError, MissingExtraError

try:
    from lightning.pytorch import LightningModule
except ImportError as error:
    raise MissingExtraError("focal-sam", "lightning", "lightning") from error

__all__ = ["FocalSAMMixin"]

STATE_KEY = "sharpness_method"


class FocalSAMMixin(LightningModule):
    """A `LightningModule` that trains with Focal-SAM or another sharpness method.

    List it before any other base. Define `configure_sharpness` and `training_losses`; optimizers
    and schedulers come from ``configure_optimizers`` as always. The mixin is a training step in
    manual optimization: it runs mixed precision and DDP through Lightning, steps optimizers and
    schedulers, logs ``train_loss`` and ``train_sharpness``, and keeps the method's state in
    checkpoints. ``Trainer(accumulate_grad_batches=..., gradient_clip_val=...)`` work in automatic
    optimization only; set the attributes below in their place.

    Schedulers step with the interval (``"epoch"`` or ``"step"``) and frequency that
    ``configure_optimizers`` gives them; one that needs a metric (`ReduceLROnPlateau`) is left to
    you.

    Attributes:
        accumulate: Micro-batches per optimizer step. Each perturbs for itself, and the step takes
            the mean of their gradients; what is left at the end of an epoch is a step too.
        clip_val: Bound of the gradient, ``None`` for none.
        clip_algorithm: ``"norm"`` or ``"value"``.

    Examples:
        >>> from focal_sam import FocalSAM
        >>> from torch import nn, optim
        >>> class Classifier(FocalSAMMixin):
        ...     accumulate = 2
        ...
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = nn.Linear(4, 2)
        ...
        ...     def configure_sharpness(self, model):
        ...         return FocalSAM(model, class_counts=[90, 10], rho=0.1)
        ...
        ...     def training_losses(self, batch):
        ...         x, y = batch
        ...         return nn.functional.cross_entropy(self.net(x), y, reduction="none")
        ...
        ...     def configure_optimizers(self):
        ...         return optim.SGD(self.parameters(), lr=0.1)
        >>> Classifier().automatic_optimization
        False
    """

    automatic_optimization = False
    accumulate: int = 1
    clip_val: float | None = None
    clip_algorithm: Literal["norm", "value"] = "norm"

    _sharpness: SharpnessMethod | None = None
    _sharpness_of: Any = None
    _sharpness_state: dict[str, Any] | None = None

    def configure_sharpness(self, model: Any) -> SharpnessMethod:
        """Make the method.

        Args:
            model: This module as the strategy calls it (wrapped by DDP, if it is); hand it to the
                method in place of ``self``.
        """
        raise NotImplementedError(
            f"define {type(self).__name__}.configure_sharpness(self, model), for example: "
            "return FocalSAM(model, class_counts)"
        )

    def training_losses(self, batch: Any) -> Tensor | tuple[Tensor, Any]:
        """Run the forward pass and return the losses ``[B]``, or them and anything else.

        It is called twice a step, at θ and at the perturbed parameters: do not log here.
        """
        raise NotImplementedError(
            f"define {type(self).__name__}.training_losses(self, batch), which returns one loss "
            "per sample (reduction='none')"
        )

    def training_target(self, batch: Any) -> Any:
        """Return what the class weights are looked up by: ``batch["labels"]`` or ``batch[1]``."""
        if isinstance(batch, Mapping) and "labels" in batch:
            return batch["labels"]
        if isinstance(batch, list | tuple) and len(batch) > 1:
            return batch[1]
        raise InputError(
            f"the batch is a {type(batch).__name__} without 'labels' and not an (x, y) pair; "
            f"define {type(self).__name__}.training_target(self, batch)"
        )

    @property
    def sharpness(self) -> SharpnessMethod:
        """The method, made when training first needs it; it outlives the wrapper of its model."""
        strategy = self.trainer.strategy
        model = strategy.model
        if self._sharpness is None or self._sharpness_of is not model:
            if "DeepSpeed" in type(strategy).__name__:
                raise NotImplementedError(
                    "DeepSpeed owns its backward pass and its parameters, so they cannot be "
                    "perturbed; use DDP or FSDP2 (ModelParallelStrategy)"
                )
            state = (
                self._sharpness_state if self._sharpness is None else self._sharpness.state_dict()
            )
            method = self.configure_sharpness(model)
            if state is not None:
                method.load_state_dict(state)
            # Past nn.Module's registry: the wrapped model contains this module.
            self.__dict__.update(_sharpness=method, _sharpness_of=model)
            return method
        return self._sharpness

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Take `sharpness_step`, log it and return the loss at θ."""
        result = self.sharpness_step(batch, batch_idx)
        self.log_dict({"train_loss": result.loss, "train_sharpness": result.sharpness})
        return result.loss

    def sharpness_step(self, batch: Any, batch_idx: int) -> StepResult:
        """Add the micro-batch's gradient; with the last of a step, step the optimizers.

        Call it from a training step of your own to log other things; what `training_losses`
        returned beside the losses is in the result's ``aux``.
        """
        place = batch_idx % self.accumulate
        members = int(min(self.accumulate, self.trainer.num_training_batches - batch_idx + place))
        last = place + 1 >= members or self.trainer.is_last_batch
        model = self.trainer.strategy.model
        wait = not last and isinstance(model, DistributedDataParallel)
        with model.no_sync() if wait else contextlib.nullcontext():
            result = self.sharpness.backward(
                lambda: self.training_losses(batch),
                self.training_target(batch),
                backward=self.manual_backward,
                scaler=getattr(self.trainer.precision_plugin, "scaler", None),
                scale=1 / members,
            )
        if last:
            optimizers = self.optimizers()
            optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            # Lightning counts the steps of all optimizers.
            self._step_schedulers("step", self.trainer.global_step // len(optimizers))
        return result

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Clip the finished gradient, when a gradient scaler has unscaled it."""
        super().on_before_optimizer_step(optimizer)
        if self.clip_val is not None:
            self.clip_gradients(optimizer, self.clip_val, self.clip_algorithm)

    def on_train_epoch_end(self) -> None:
        """Step the schedulers whose interval is the epoch."""
        super().on_train_epoch_end()
        self._step_schedulers("epoch", self.current_epoch + 1)

    def _step_schedulers(self, interval: str, count: int) -> None:
        for config in self.trainer.lr_scheduler_configs:
            due = config.interval == interval and count % config.frequency == 0
            if due and not isinstance(config.scheduler, ReduceLROnPlateau):
                config.scheduler.step()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the method's state."""
        super().on_save_checkpoint(checkpoint)
        if self._sharpness is not None:
            checkpoint[STATE_KEY] = self._sharpness.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the method's state, for when the method is made."""
        super().on_load_checkpoint(checkpoint)
        self._sharpness_state = checkpoint.get(STATE_KEY)
        self._sharpness = self._sharpness_of = None

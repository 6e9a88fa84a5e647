"""Sharpness-aware fine-tuning with the trainer of Hugging Face transformers.

Only this module imports transformers (``pip install 'focal-sam[hf]'``). A script that fine-tunes an
image or text classifier with `transformers.Trainer` changes the class and adds one argument::

    from focal_sam import FocalSAM
    from focal_sam.hf import FocalSAMTrainer

    trainer = FocalSAMTrainer(
        model, args, train_dataset=train,
        sharpness=lambda model: FocalSAM(model, class_counts, rho=0.05),
    )
    trainer.train()
"""

import json
import os
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from focal_sam.sharpness import SharpnessMethod, StepResult
from shared_core.errors import InputError, MissingExtraError
from shared_core.run import write_json

try:
    from accelerate.utils.memory import clear_device_cache
    from transformers import Trainer
except ImportError as error:
    raise MissingExtraError("focal-sam", "hf", "transformers with accelerate") from error

__all__ = ["FocalSAMTrainer"]

STATE_NAME = "sharpness.json"


class FocalSAMTrainer(Trainer):
    """A `transformers.Trainer` whose gradient comes from Focal-SAM or another sharpness method.

    Everything else is the Trainer's own: optimizer, scheduler, mixed precision, clipping, logging,
    checkpoints, torchrun. A micro-batch enters an accumulated step with the weight it has there,
    and perturbs for itself. With ρ = 0 training is the Trainer's, sample for sample.

    The batch's ``labels`` are class indices ``[B]`` (or distributions ``[B, classes]``); the model
    is called without them and gives logits. The state of the method is saved in a checkpoint as
    ``sharpness.json`` and restored by ``train(resume_from_checkpoint=...)``.

    Args:
        args: See `transformers.Trainer`, as all that is not listed here.
        sharpness: Makes the method from the model as it is trained (wrapped by DDP or FSDP2, if
            it is), at the start of training: ``lambda model: FocalSAM(model, class_counts)``, or
            a class that needs nothing else, such as `focal_sam.SAM`.
        criterion: Takes logits ``[B, classes]`` and labels, returns one loss per sample ``[B]``.
            It is also the loss of evaluation. Default: cross-entropy with the label smoothing of
            the training arguments.
        options: See `transformers.Trainer`.

    Attributes:
        sharpness: The method; ``None`` before training.
        last_step: What the method saw in the last micro-batch; ``None`` before training.

    Raises:
        InputError: If the arguments ask for what cannot work: ``compute_loss_func`` (its loss is
            already reduced), label smoothing beside a criterion, an optimizer that steps inside
            the backward pass, or ``nn.DataParallel``.

    Examples:
        >>> from focal_sam import FocalSAM
        >>> from transformers import TrainingArguments, ViTConfig, ViTForImageClassification
        >>> model = ViTForImageClassification(ViTConfig(
        ...     image_size=8, patch_size=4, hidden_size=8, num_attention_heads=2,
        ...     num_hidden_layers=1, intermediate_size=16, num_labels=2))
        >>> data = [{"pixel_values": torch.randn(3, 8, 8), "labels": i % 2} for i in range(8)]
        >>> args = TrainingArguments(
        ...     getfixture("tmp_path"), max_steps=2, use_cpu=True, report_to="none",
        ...     disable_tqdm=True, dataloader_pin_memory=False, save_strategy="no")
        >>> trainer = FocalSAMTrainer(
        ...     model, args, train_dataset=data,
        ...     sharpness=lambda model: FocalSAM(model, class_counts=[900, 100], rho=0.05))
        >>> trainer.train().global_step
        {'train_runtime': ...}
        2
    """

    def __init__(
        self,
        *args: Any,
        sharpness: Callable[[nn.Module], Any],
        criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self._make_sharpness = sharpness
        self._sharpness_of: nn.Module | None = None
        self.sharpness: SharpnessMethod | None = None
        self.last_step: StepResult | None = None
        self._check_arguments(criterion)
        self.criterion = criterion or partial(
            F.cross_entropy, reduction="none", label_smoothing=self.args.label_smoothing_factor
        )

    def _check_arguments(self, criterion: Any) -> None:
        if self.compute_loss_func is not None:
            raise InputError(
                "compute_loss_func returns one loss for the batch, but the method weighs each "
                "sample; pass criterion=, which takes logits and labels and returns [B]"
            )
        if criterion is not None and self.args.label_smoothing_factor:
            raise InputError(
                f"label_smoothing_factor is {self.args.label_smoothing_factor} beside a criterion; "
                "smooth the labels in the criterion and set label_smoothing_factor=0"
            )
        problem = getattr(getattr(self.model, "config", None), "problem_type", None)
        if criterion is None and problem in ("regression", "multi_label_classification"):
            raise InputError(
                f"problem_type is {problem!r}, which cross-entropy does not fit; "
                "pass criterion=, which returns one loss per sample [B]"
            )
        optimizer = str(getattr(self.args.optim, "value", self.args.optim))
        if "lomo" in optimizer or "layerwise" in optimizer:
            raise InputError(
                f"optim is {optimizer!r}, which steps inside the backward pass; a sharpness method "
                "needs the gradient whole, so choose an optimizer that steps after it"
            )
        if self.args.n_gpu > 1:
            raise InputError(
                f"{self.args.n_gpu} GPUs in one process would train with nn.DataParallel; start "
                "one process per GPU (torchrun or accelerate launch), or set CUDA_VISIBLE_DEVICES"
            )

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Add the micro-batch's gradient to ``p.grad`` and return its share of the loss at θ.

        Raises:
            InputError: If the batch has no ``labels``.
        """
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        inputs = self._prepare_inputs(inputs)
        labels = _labels(inputs)
        method = self._sharpness_for(model)
        scale = self._share(labels, num_items_in_batch, method)

        def closure() -> Tensor:
            with self.compute_loss_context_manager():
                return self._losses(model, inputs)[0]

        self.last_step = method.backward(closure, labels, accelerator=self.accelerator, scale=scale)
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        return self.last_step.loss * scale

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the mean of the criterion, for evaluation."""
        losses, outputs = self._losses(model, inputs)
        return (losses.mean(), outputs) if return_outputs else losses.mean()

    def _losses(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """The losses ``[B]`` and the model's outputs by name."""
        labels = _labels(inputs)
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        if not isinstance(outputs, Mapping):
            outputs = {"logits": outputs if isinstance(outputs, Tensor) else outputs[0]}
        if "logits" not in outputs:
            raise InputError(
                f"the model returned {', '.join(outputs)} but no logits; "
                "train a model with a classification head"
            )
        return self.criterion(outputs["logits"], labels), dict(outputs)

    def _share(
        self, labels: Tensor, num_items: Tensor | int | None, method: SharpnessMethod
    ) -> float:
        """This micro-batch's part of its step's mean loss, as the Trainer would weigh it.

        The Trainer takes the mean over all samples of a step where the model takes part in that
        (``num_items_in_batch``), else the mean over micro-batches. The processes' gradients are
        averaged afterwards, so a mean over the samples of all is made of W times the share.
        """
        if num_items is None:
            return 1.0 / int(self.current_gradient_accumulation_steps)
        size: float = labels.numel()
        if self.args.average_tokens_across_devices and self.accelerator.num_processes > 1:
            if method._parallel.is_global:
                # One gradient for all processes, so one weight, whatever each of them holds.
                sizes = torch.tensor(size, device=self.accelerator.device)
                size = float(self.accelerator.reduce(sizes, reduction="sum"))
            else:
                size *= self.accelerator.num_processes // self.get_tp_size()
        return size / float(num_items)

    def _sharpness_for(self, model: nn.Module) -> SharpnessMethod:
        """The method of `model`; a model made anew (``model_init``) gets a new one."""
        if self.sharpness is None or self._sharpness_of is not model:
            self.sharpness, self._sharpness_of = self._make_sharpness(model), model
            if not isinstance(self.sharpness, SharpnessMethod):
                raise InputError(
                    f"sharpness returned {type(self.sharpness).__name__}; it must return a "
                    "method, such as FocalSAM(model, class_counts)"
                )
        return self.sharpness

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save and self.sharpness is not None:
            write_json(os.path.join(output_dir, STATE_NAME), self.sharpness.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint) / STATE_NAME
        if not path.is_file():
            warnings.warn(
                f"{checkpoint} has no {STATE_NAME}, as a checkpoint of the plain Trainer has none; "
                "the sharpness method starts with its own settings",
                stacklevel=2,
            )
            return
        state = json.loads(path.read_text(encoding="utf-8"))
        self._sharpness_for(self.model_wrapped).load_state_dict(state)


def _labels(inputs: Mapping[str, Any]) -> Tensor:
    if inputs.get("labels") is None:
        raise InputError(
            f"the batch has {', '.join(inputs)} but no labels; name the column of classes 'labels' "
            "(or 'label'), and set remove_unused_columns=False if the Trainer dropped it"
        )
    labels = inputs["labels"]
    if not isinstance(labels, Tensor):
        raise InputError(f"labels are a {type(labels).__name__}; they must be a tensor [B]")
    return labels

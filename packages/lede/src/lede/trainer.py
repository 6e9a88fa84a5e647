"""Making a model exit early with the trainer of Hugging Face transformers.

A script that fine-tunes with `transformers.Trainer` changes one name and adds the recipe::

    from lede.trainer import EarlyExitTrainer

    trainer = EarlyExitTrainer(model, args, early_exit=EarlyExitConfig(), train_dataset=data)
    trainer.train()

Optimizer, schedule, mixed precision, several processes, checkpoints and resuming are the Trainer's.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from lede.adapters import layer_runner
from lede.early_exit import EarlyExitConfig, early_exit_loss
from shared_core.errors import InputError

__all__ = ["EarlyExitTrainer"]


class EarlyExitTrainer(Trainer):
    """A `transformers.Trainer` with layer dropout and a loss at every exit (LayerSkip's recipe).

    Evaluation gives the loss of the last layer alone, which is the model's own.

    Args:
        model: A causal language model of a supported family.
        args: Of transformers.
        early_exit: The recipe.
        options: See `transformers.Trainer`. Rows have ``input_ids`` and ``labels``.

    Raises:
        InputError: If the family is not supported, or gradient checkpointing or several GPUs in
            one process are asked for.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        early_exit: EarlyExitConfig | None = None,
        **options: Any,
    ) -> None:
        layer_runner(model)
        if getattr(args, "activation_checkpointing", False) or args.gradient_checkpointing:
            raise InputError(
                "gradient_checkpointing would throw away the layers' outputs, which have losses of "
                "their own; leave it off"
            )
        if args.n_gpu > 1:
            raise InputError(
                f"{args.n_gpu} GPUs in one process would train with nn.DataParallel; start one "
                "process per GPU (torchrun or accelerate launch), or set CUDA_VISIBLE_DEVICES"
            )
        self.early_exit = early_exit or EarlyExitConfig()
        super().__init__(model, args, **options)
        # The loss is a mean over a micro-batch's tokens: the Trainer divides by accumulation.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The recipe's loss at the trainer's step; in evaluation that of the last layer."""
        del num_items_in_batch
        if not model.training:
            outputs = model(**inputs)
            return (outputs.loss, outputs) if return_outputs else outputs.loss
        loss = early_exit_loss(
            self.accelerator.unwrap_model(model),
            inputs["input_ids"],
            inputs["labels"],
            self.early_exit,
            step=self.state.global_step,
            total=max(1, self.state.max_steps),
            attention_mask=inputs.get("attention_mask"),
            forward=model,
        )
        return (loss, {"logits": loss.detach()[None]}) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """The loss of an evaluation batch; no logits are kept."""
        del prediction_loss_only, ignore_keys
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

"""Both training stages with the trainer of transformers."""

from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from gmsa._checkpoint import load_into
from gmsa.model import GMSAModel
from shared_core.errors import InputError

__all__ = ["GMSATrainer"]


class _Epochs(TrainerCallback):
    """Tells the data set which epoch it is, for the draws of the rates."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Before the epoch's samples are read; a resumed run begins within its epoch."""
        dataset = more["train_dataloader"].dataset
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(int(state.epoch or 0))


class GMSATrainer(Trainer):
    """A `transformers.Trainer` of one stage: freezes, saves and restores what the stage is about.

    It logs ``token_accuracy`` beside the loss: the loss can lie on a plateau for hundreds of steps
    before it falls, so do not stop early. Processes, precision, accumulation and resuming
    (``train(resume_from_checkpoint=...)``) are the Trainer's.

    Args:
        model: The compressor.
        args: See `transformers.Trainer`, as all options.
        stage: ``autoencoding`` or ``keft``.
        decoder_tuning: ``full`` or ``lora``, for ``keft``.
        options: ``train_dataset`` is an `AutoencodingDataset` or a `QADataset`, ``data_collator`` a
            `GMSADataCollator`.

    Raises:
        InputError: If the stage is not accepted, or workers are to outlive an epoch.

    Examples:
        >>> from gmsa.data import AutoencodingDataset, GMSADataCollator
        >>> from gmsa.demo import tiny_compressor
        >>> from transformers import TrainingArguments
        >>> compressor = tiny_compressor()
        >>> args = TrainingArguments(
        ...     getfixture("tmp_path"), max_steps=1, use_cpu=True, report_to="none",
        ...     disable_tqdm=True, dataloader_pin_memory=False, save_strategy="no")
        >>> trainer = GMSATrainer(
        ...     compressor.model, args, stage="autoencoding",
        ...     train_dataset=AutoencodingDataset(["ba be bi", "bo"], compressor.tokenizer),
        ...     data_collator=GMSADataCollator(0, [2, 4]))
        >>> trainer.train().global_step
        {'train_runtime': ...}
        1
    """

    def __init__(
        self,
        model: GMSAModel,
        args: Any,
        *,
        stage: str,
        decoder_tuning: str = "full",
        **options: Any,
    ) -> None:
        if args.dataloader_persistent_workers:
            raise InputError(
                "dataloader_persistent_workers keeps workers that never hear of a new epoch and "
                "would draw its rates again; leave it off"
            )
        if args.n_gpu > 1:  # torch's DataParallel cannot; several processes can
            args._n_gpu = 1
        args.remove_unused_columns = False  # the collator needs a sample's place and epoch
        model.freeze_for_stage(stage, decoder_tuning)
        self.stage = stage
        super().__init__(model, args, **options)
        # The model divides by the labels of all micro-batches of a step.
        self.model_accepts_loss_kwargs = True
        self.add_callback(_Epochs())
        self._counts = torch.zeros(2, dtype=torch.float64)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss, counting the labels that were predicted right."""
        loss, output = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            seen = torch.stack([output.num_correct, output.num_label_tokens]).detach()
            self._counts = self._counts.to(seen.device) + seen
        return (loss, output) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the token accuracy since the last time, over all processes."""
        if "loss" in logs:
            correct, count = self.accelerator.reduce(self._counts, reduction="sum").tolist()
            logs = {**logs, "token_accuracy": correct / max(1.0, count)}
            self._counts = torch.zeros_like(self._counts)
        super().log(logs, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        own = self.accelerator.unwrap_model(self.model if model is None else model)
        load_into(own, resume_from_checkpoint, decoder=self.stage == "keft")

"""EDGE with the trainer of Hugging Face transformers.

Only this module imports transformers (``pip install 'edge-ood[hf]'``). A script that trains a
multi-label model changes the class and adds the outliers::

    from edge_ood import EdgeLoss
    from edge_ood.hf import EdgeHFTrainer

    trainer = EdgeHFTrainer(
        model, args, train_dataset=train, oe_dataset=outliers, criterion=EdgeLoss()
    )
    trainer.train()
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from edge_ood.loss import EdgeLoss, EdgeLossOutput, EdgeSchedule
from shared_core.errors import InputError, MissingExtraError

try:
    from transformers import Trainer
except ImportError as error:
    raise MissingExtraError("edge-ood", "hf", "transformers with accelerate") from error

__all__ = ["EdgeHFTrainer"]


class _Endless:
    """Batches of indices without end, out of permutations, from a given batch on."""

    def __init__(self, size: int, batch_size: int, seed: int, start: int, rank: int, world: int):
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.start, self.rank, self.world = start, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        place = (self.start * self.world + self.rank) * self.batch_size
        stride = (self.world - 1) * self.batch_size
        turn, order = -1, torch.empty(0)
        while True:
            batch = []
            for at in range(place, place + self.batch_size):
                if at // self.size != turn:
                    turn = at // self.size
                    generator = torch.Generator().manual_seed(self.seed * 1_000_003 + turn)
                    order = torch.randperm(self.size, generator=generator)
                batch.append(int(order[at % self.size]))
            yield batch
            place += self.batch_size + stride


class EdgeHFTrainer(Trainer):
    """A `transformers.Trainer` that trains a multi-label classifier with EDGE.

    Each step takes a batch of outliers beside the batch of ID samples, in one forward pass where
    their shapes agree (images, or texts padded to one length), else in two. The gap is off before
    τ. Optimizer, scheduler, mixed precision, clipping, checkpoints, FSDP and DeepSpeed are the
    Trainer's own. A resumed run takes the outliers that the interrupted one would have taken.

    The batch's ``labels`` are float ``[B, C]``; the model is called without them and gives logits.

    Args:
        args: See `transformers.Trainer`, as all that is not listed here.
        oe_dataset: Outliers; items like those of the training set, labels are ignored.
        criterion: Default: `EdgeLoss` as published.
        tau: Transform epoch: an epoch (int) or a fraction of the training (float).
        oe_batch_size: Outliers per step and process; default: the training batch size.
        oe_collator: Makes a batch of outliers; default: the data collator.
        options: See `transformers.Trainer`.

    Attributes:
        last_output: The loss of the last training step and its parts, all detached.

    Raises:
        InputError: If the outliers are empty or the arguments ask for what cannot work.

    Examples:
        >>> from transformers import TrainingArguments, ViTConfig, ViTForImageClassification
        >>> model = ViTForImageClassification(ViTConfig(
        ...     image_size=8, patch_size=4, hidden_size=8, num_attention_heads=2,
        ...     num_hidden_layers=1, intermediate_size=16, num_labels=3,
        ...     problem_type="multi_label_classification"))
        >>> data = [{"pixel_values": torch.randn(3, 8, 8), "labels": torch.ones(3)}] * 8
        >>> args = TrainingArguments(
        ...     getfixture("tmp_path"), max_steps=2, use_cpu=True, report_to="none",
        ...     disable_tqdm=True, dataloader_pin_memory=False, save_strategy="no")
        >>> trainer = EdgeHFTrainer(model, args, train_dataset=data, oe_dataset=data)
        >>> trainer.train().global_step
        {'train_runtime': ...}
        2
    """

    def __init__(
        self,
        *args: Any,
        oe_dataset: Any,
        criterion: EdgeLoss | None = None,
        tau: int | float = 0.5,
        oe_batch_size: int | None = None,
        oe_collator: Callable[[list[Any]], Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        if not hasattr(oe_dataset, "__len__") or len(oe_dataset) == 0:
            raise InputError("oe_dataset needs a length and at least one sample")
        if self.compute_loss_func is not None:
            raise InputError("compute_loss_func and EDGE are two losses; pass criterion= alone")
        if self.args.n_gpu > 1:
            raise InputError(
                f"{self.args.n_gpu} GPUs in one process would train with nn.DataParallel; start "
                "one process per GPU (torchrun or accelerate launch), or set CUDA_VISIBLE_DEVICES"
            )
        self.oe_dataset, self.criterion = oe_dataset, criterion or EdgeLoss()
        self.tau = tau
        EdgeSchedule(tau, epochs=1)  # refuses what is no τ
        self.oe_batch_size = oe_batch_size or self.args.per_device_train_batch_size
        self.oe_collator = oe_collator or self.data_collator
        self.last_output: EdgeLossOutput | None = None
        # The loss is a mean over the micro-batch, so the Trainer has to divide it by their number.
        self.model_accepts_loss_kwargs = False
        self._outliers: Iterator[Any] | None = None

    def train(self, *args: Any, **options: Any) -> Any:
        """Train; see `transformers.Trainer.train`."""
        self._outliers = None  # begins where the state then says
        return super().train(*args, **options)

    def _next_outliers(self) -> dict[str, Any]:
        if self._outliers is None:
            start = self.state.global_step * self.args.gradient_accumulation_steps
            batches = _Endless(
                len(self.oe_dataset),
                self.oe_batch_size,
                self.args.seed,
                start,
                self.accelerator.process_index,
                self.accelerator.num_processes,
            )
            loader = DataLoader(
                self.oe_dataset,
                batch_sampler=batches,
                collate_fn=self.oe_collator,
                # Its own, so that starting the loader does not move the global generator.
                generator=torch.Generator().manual_seed(self.args.seed),
                num_workers=self.args.dataloader_num_workers,
                pin_memory=self.args.dataloader_pin_memory,
            )
            self._outliers = iter(loader)
        found = self._prepare_inputs(next(self._outliers))
        return {k: v for k, v in found.items() if k not in ("labels", "label")}

    def _gap_is_on(self) -> bool:
        if isinstance(self.tau, float):
            return bool(self.state.global_step >= self.tau * self.state.max_steps)
        return bool((self.state.epoch or 0) >= self.tau)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The EDGE loss in training; in evaluation, where there are no outliers, L_id.

        Raises:
            InputError: If the batch has no ``labels``, or they are not float ``[B, C]``.
        """
        labels = inputs.get("labels")
        if not isinstance(labels, Tensor) or not labels.is_floating_point() or labels.ndim != 2:
            raise InputError(
                "the batch needs float labels [B, C] (one 0 or 1 per class); name the column "
                "'labels', and set remove_unused_columns=False if the Trainer dropped it"
            )
        ours = {k: v for k, v in inputs.items() if k != "labels"}
        if not model.training:
            outputs = model(**ours)
            loss = self.criterion(_logits(outputs), labels, None).loss
            return (loss, outputs) if return_outputs else loss
        theirs = self._next_outliers()
        if all(_stackable(ours[k], theirs.get(k)) for k in ours):
            outputs = model(**{k: torch.cat([v, theirs[k]]) for k, v in ours.items()})
            both = _logits(outputs)
            z, outliers = both[: len(labels)], both[len(labels) :]
        else:
            outputs = model(**ours)
            z, outliers = _logits(outputs), _logits(model(**theirs))
        found = self.criterion(z, labels, outliers, gap=self._gap_is_on())
        loss = found.loss
        self.last_output = found._replace(loss=loss.detach())
        return (loss, outputs) if return_outputs else loss


def _stackable(ours: Any, theirs: Any) -> bool:
    tensors = isinstance(ours, Tensor) and isinstance(theirs, Tensor)
    return tensors and ours.shape[1:] == theirs.shape[1:]


def _logits(outputs: Any) -> Tensor:
    if isinstance(outputs, Tensor):
        return outputs
    logits: Tensor | None = outputs.get("logits") if isinstance(outputs, Mapping) else outputs[0]
    if logits is None:
        raise InputError("the model returned no logits; train one with a classification head")
    return logits

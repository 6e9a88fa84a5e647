"""A run that makes a model early-exit-capable: load, train, save, and go on after interruptions."""

import contextlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lede._loading import load_model, load_windows
from lede.early_exit import EarlyExitConfig, exit_quality
from shared_core.checkpoints import checkpoint_to_resume, whole_checkpoint_marker
from shared_core.errors import InputError
from shared_core.run import RunFolder

__all__ = ["TrainExitSettings", "quality_rows", "train_exit"]


@dataclass(frozen=True)
class TrainExitSettings:
    """What a run is made of; all of it is written to ``config.json``.

    Args:
        model: Hub id or folder of a causal language model.
        data: ``pydoc``, a text file, or a file or hub id with texts.
        p_max: See `lede.early_exit.EarlyExitConfig`, as the next four.
        e_scale: Weight of the early losses.
        curriculum: Which exits have a loss when.
        rotation: R.
        dropout_schedule: Of layer dropout.
        steps: Updates.
        batch_size: Windows of a micro-batch.
        accumulation: Micro-batches of a step.
        length: Tokens of a window.
        lr: Learning rate of AdamW, with warm-up over 5 % and cosine decay.
        save_steps: Steps between checkpoints.
        bf16: Mixed precision.
        seed: Of order and dropout.
    """

    model: str
    data: str = "pydoc"
    p_max: float = 0.1
    e_scale: float = 0.2
    curriculum: str = "rotational"
    rotation: int = 4
    dropout_schedule: str = "constant"
    steps: int = 500
    batch_size: int = 8
    accumulation: int = 1
    length: int = 256
    lr: float = 2e-5
    save_steps: int = 100
    bf16: bool = False
    seed: int = 0

    @property
    def early_exit(self) -> EarlyExitConfig:
        """The recipe."""
        names = ("p_max", "e_scale", "curriculum", "rotation", "dropout_schedule")
        return EarlyExitConfig(**{name: getattr(self, name) for name in names})


def train_exit(
    settings: TrainExitSettings, out: Path, device: torch.device, *, resume: bool = False
) -> dict[str, Any]:
    """Train and leave model and tokenizer in ``out/model``; return what changed, by layer.

    Checkpoints are in ``out/checkpoints``; one counts only once it has been written whole, so a
    run killed at any moment goes on from the last whole one and ends in the same numbers. One whose
    files have changed since is passed over, with a warning, for the one before.

    Raises:
        InputError: If something cannot be loaded, the folder holds another run, or all its
            checkpoints are damaged.
    """
    import transformers

    from lede.trainer import EarlyExitTrainer

    recipe = settings.early_exit
    last = checkpoint_to_resume(out, asdict(settings), resume=resume)
    run = RunFolder(out, resume=resume)
    run.write_config("lede train-exit", asdict(settings), distributions=["lede", "transformers"])
    model, tokenizer, _ = load_model(settings.model, None, torch.float32, device)
    windows = load_windows(settings.data, tokenizer, settings.length)
    held_out = windows[-max(1, min(64, len(windows) // 10)) :]
    windows = windows[: -len(held_out)]
    if len(windows) == 0:
        raise InputError(f"{settings.data} fills one window only; give more text")
    before = exit_quality(model, held_out)
    args = transformers.TrainingArguments(
        str(out / "checkpoints"),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.lr,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, settings.steps // 20),
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=2,
        logging_steps=1,
        bf16=settings.bf16,
        seed=settings.seed,
        use_cpu=device.type == "cpu",
        report_to="none",
        dataloader_pin_memory=False,
    )
    trainer = EarlyExitTrainer(
        model,
        args,
        early_exit=recipe,
        train_dataset=[{"input_ids": w, "labels": w} for w in windows],
        data_collator=transformers.default_data_collator,
        callbacks=[whole_checkpoint_marker(transformers.TrainerCallback)],
    )
    with contextlib.redirect_stdout(sys.stderr):  # the Trainer prints its log lines to stdout
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    trainer.save_model(str(out / "model"))
    tokenizer.save_pretrained(out / "model")
    clock = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
    history = [{k: v for k, v in h.items() if k not in clock} for h in trainer.state.log_history]
    if trainer.is_world_process_zero():
        (out / "log.jsonl").unlink(missing_ok=True)
        for line in history:
            run.log(**line)
    metrics = {
        "steps": trainer.state.global_step,
        "losses": [line["loss"] for line in history if "loss" in line],
        "exit_quality": {"before": before, "after": exit_quality(model, held_out)},
    }
    final = trainer.state.log_history[-1]
    run.write_metrics(metrics, timing={k: final[k] for k in clock if k in final})
    return metrics


def quality_rows(quality: Mapping[str, Mapping[str, Sequence[float]]]) -> list[dict[str, Any]]:
    """The rows of a table: loss and agreement of every layer, ``before`` and ``after``."""
    return [
        {
            "layer": layer + 1,
            **{
                f"{what} {when}": round(quality[when][what][layer], 3)
                for what in ("loss", "agreement")
                for when in ("before", "after")
            },
        }
        for layer in range(len(quality["before"]["loss"]))
    ]

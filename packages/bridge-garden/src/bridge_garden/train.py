"""A training run from the command line: models, rows, the trainer, the run folder."""

import contextlib
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bridge_garden.models import load_tokenizer, read_rows
from bridge_garden.presets import Preset, get_preset
from shared_core.checkpoints import checkpoint_to_resume, whole_checkpoint_marker
from shared_core.errors import InputError, MissingExtraError
from shared_core.run import RunFolder, atomic_path

__all__ = ["TrainSettings", "plan_training", "train"]


@dataclass(frozen=True)
class TrainSettings:
    """All settings of ``bridge-garden train``.

    Without a teacher, the data is the folder of a captured one (``bridge-garden capture``).

    Raises:
        InputError: If teacher, student or data are missing.

    Examples:
        >>> TrainSettings("teacher", "student", "rows.jsonl").weight
        'confidence'
    """

    teacher: str
    student: str
    data: str
    weight: str = "confidence"
    hard_labels: str = "teacher_argmax"
    divergence: str = "fkl"
    risk_alpha: float = 0.0
    nonfinite: str = "raise"
    on_policy_fraction: float = 0.0
    max_new_tokens: int = 512
    lr: float = 5e-5
    epochs: float = 2.0
    max_steps: int = -1
    batch_size: int = 4
    accumulation: int = 8
    max_length: int = 2048
    lora_r: int = 0
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    warmup_ratio: float = 0.03
    bf16: bool = False
    gradient_checkpointing: bool = False
    save_steps: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("teacher", "student", "data"):
            captured = name == "teacher" and Path(self.data or "/no").is_dir()
            if not getattr(self, name) and not captured:
                raise InputError(f"say which {name}: --{name}, or --preset NAME with --data")

    @classmethod
    def from_preset(cls, preset: Preset, **changes: Any) -> "TrainSettings":
        """A preset's settings with changes; ``None`` leaves the preset's."""
        names = cls.__dataclass_fields__
        settings = {k: v for k, v in asdict(preset).items() if k in names}
        settings.update({k: v for k, v in changes.items() if v is not None})
        settings.setdefault("data", "")
        return cls(**settings)


def plan_training(
    preset: str | None, changes: dict[str, Any], *, dry_run: bool = False
) -> tuple[TrainSettings, tuple[str, ...]]:
    """The settings of a run, and what a preset assumes beyond its sources.

    Args:
        preset: Name of a preset, or ``None``.
        changes: Settings of the user; ``None`` leaves the preset's or the default.
        dry_run: Do without data.

    Raises:
        InputError: If there is no such preset, or teacher, student or data are missing.

    Examples:
        >>> settings, assumed = plan_training("qwen2.5-7b-3b", {"data": "rows.jsonl"})
        >>> settings.lora_r, len(assumed)
        (16, 2)
    """
    given = {k: v for k, v in changes.items() if v is not None}
    if preset is None:
        return TrainSettings(**{"teacher": "", "student": "", "data": "", **given}), ()
    found = get_preset(preset)
    if dry_run:
        given.setdefault("data", "(not stated by the paper: pass --data)")
    return TrainSettings.from_preset(found, **given), found.assumed


def train(
    settings: TrainSettings, run: RunFolder, device: torch.device, *, resume: bool = False
) -> dict[str, Any]:
    """Train, save the student as safetensors into ``student/``, and return the last numbers.

    A checkpoint counts only once it has been written whole, so a run killed at any moment goes on
    from the last whole one and ends in the same numbers. One whose files have changed since is
    passed over, with a warning, for the one before.

    Args:
        settings: Of the run.
        run: Its folder; checkpoints go under ``checkpoints/``.
        device: ``cpu`` keeps the trainer off the GPU.
        resume: Continue from the last checkpoint.

    Raises:
        InputError: If models or data cannot be loaded, there is nothing to resume, an earlier run
            is in the way, it had other settings, or all its checkpoints are damaged.
    """
    from transformers import TrainerCallback

    from bridge_garden.trainer import HybridConfig, HybridTrainer

    checkpoints = run.path / "checkpoints"
    if resume and not any(checkpoints.glob("checkpoint-*")):
        raise InputError(f"{run.path} has no checkpoint to resume from; leave out --resume")
    last = checkpoint_to_resume(run.path, asdict(settings), resume=resume)
    if resume:
        _cut_log(run.path / "log.jsonl", 0 if last is None else int(last.name.split("-")[1]))
    rows = read_rows(settings.data)
    tokenizer = load_tokenizer(settings.student)
    peft_config = _lora(settings)
    args = HybridConfig(
        str(checkpoints),
        weight=settings.weight,
        hard_labels=settings.hard_labels,
        divergence=settings.divergence,
        risk_alpha=settings.risk_alpha,
        nonfinite=settings.nonfinite,
        on_policy_fraction=settings.on_policy_fraction,
        max_new_tokens=settings.max_new_tokens,
        learning_rate=settings.lr,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        max_length=settings.max_length,
        warmup_steps=settings.warmup_ratio,
        lr_scheduler_type="cosine",
        bf16=settings.bf16,
        save_steps=settings.save_steps,
        save_total_limit=2,
        logging_steps=1,
        report_to="none",
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        seed=settings.seed,
        **_checkpointing(settings),
    )
    started = time.perf_counter()

    class Records(TrainerCallback):  # type: ignore[misc, unused-ignore]
        def on_log(
            self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any
        ) -> None:
            if state.is_world_process_zero:
                run.log(step=state.global_step, **(logs or {}))

    trainer = HybridTrainer(
        settings.student,
        settings.teacher or None,
        args,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=[Records(), whole_checkpoint_marker(TrainerCallback)],
    )
    run.write_config(
        "bridge-garden train",
        {**asdict(settings), "vocab_size": trainer.vocab_size},
        distributions=["bridge-garden", "abkd", "transformers"],
    )
    # The trainer prints its log lines on stdout, which is for the result.
    with contextlib.redirect_stdout(sys.stderr):
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    if trainer.is_world_process_zero():
        tokenizer.save_pretrained(str(run.path / "student"))
    trainer.save_model(str(run.path / "student"))
    names = (
        "loss",
        "kd",
        "ce",
        "risk",
        "weight",
        "bridge_fraction",
        "garden_fraction",
        "agreement",
    )
    lines = [line for line in trainer.state.log_history if "loss" in line]
    final = {name: lines[-1].get(name) for name in names} if lines else {}
    metrics = {"steps": trainer.state.global_step, **final}
    if settings.nonfinite == "skip":
        metrics["skipped"] = sum(line["skipped"] for line in lines)
    run.write_metrics(metrics, timing={"seconds": time.perf_counter() - started})
    return metrics


def _cut_log(path: Path, step: int) -> None:
    """Drop the lines after the checkpoint, which the resumed run writes again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        # The last line of a killed run may be cut off.
        with contextlib.suppress(ValueError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    with atomic_path(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


def _checkpointing(settings: TrainSettings) -> dict[str, Any]:
    """The argument's name, which later versions of transformers changed."""
    from transformers import TrainingArguments

    newer = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if newer else "gradient_checkpointing"
    return {name: True} if settings.gradient_checkpointing else {}


def _lora(settings: TrainSettings) -> Any:
    if not settings.lora_r:
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise MissingExtraError("bridge-garden", "lora", "peft") from error
    return LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )

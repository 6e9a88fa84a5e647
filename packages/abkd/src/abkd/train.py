"""A distillation run in a folder: load, train, save, and go on after an interruption."""

import contextlib
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abkd.presets import get_preset
from shared_core.checkpoints import checkpoint_to_resume, whole_checkpoint_marker
from shared_core.errors import InputError
from shared_core.run import RunFolder

if TYPE_CHECKING:
    from abkd.trainer import DistillationConfig

__all__ = [
    "TrainSettings",
    "load_causal_lm",
    "load_examples",
    "load_tokenizer",
    "train",
    "trainer_arguments",
]


@dataclass(frozen=True)
class TrainSettings:
    """What a run is made of; all of it is written to ``config.json``.

    Args:
        student: Hub id or folder of a causal language model.
        teacher: Likewise; ``None`` with data that `abkd.capture` wrote, or for plain fine-tuning
            (`kd_weight` 0, `ce_weight` 1).
        data: ``pydoc``, a file or folder, or a hub id.
        divergence: One of `abkd.DIVERGENCES`.
        alpha: α.
        beta: β.
        temperature: τ.
        temperature_power: r in τ^r.
        kd_weight: Weight of the soft term.
        ce_weight: Weight of the hard term.
        lr: Learning rate of AdamW.
        weight_decay: Of AdamW.
        max_grad_norm: Clipping.
        lr_scheduler_type: As in transformers.
        batch_size: Examples of a micro-batch.
        accumulation: Micro-batches of a step.
        epochs: Passes over the data, if `max_steps` is not given.
        max_steps: Steps.
        max_length: Tokens of an example.
        save_steps: Steps between checkpoints.
        lora_r: Rank of LoRA adapters; 0 trains all weights.
        bf16: Mixed precision.
        fused: See `abkd.trainer.DistillationConfig`.
        max_prompt_length: Longer prompts lose their beginning.
        pretrain_data: Plain text mixed in, named like `data`.
        pretrain_weight: Weight of its cross-entropy.
        on_policy_fraction: Share of micro-batches with responses of the student's own.
        max_new_tokens: Length of such a response.
        seed: Seed of order and initialisation.
    """

    student: str
    teacher: str | None
    data: str
    divergence: str = "ab"
    alpha: float = 0.2
    beta: float = 0.7
    temperature: float = 1.0
    temperature_power: float = 2.0
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    lr: float = 5e-5
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    lr_scheduler_type: str = "cosine"
    batch_size: int = 8
    accumulation: int = 1
    epochs: float = 1.0
    max_steps: int = -1
    max_length: int = 512
    save_steps: int = 500
    lora_r: int = 0
    bf16: bool = False
    fused: bool = True
    max_prompt_length: int | None = None
    pretrain_data: str | None = None
    pretrain_weight: float = 1.0
    on_policy_fraction: float = 0.0
    max_new_tokens: int = 128
    seed: int = 0

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> "TrainSettings":
        """The settings of a language preset, with changes.

        Raises:
            InputError: If there is no such preset, or it is not one of language models.

        Examples:
            >>> TrainSettings.from_preset("openllama-3b-dolly").lora_r
            16
        """
        preset = get_preset(name)
        if preset.task != "language":
            raise InputError(f"{name} is a run of {preset.task}, not of language models")
        settings = cls(
            preset.student,
            preset.teacher,
            preset.data,
            alpha=preset.alpha,
            beta=preset.beta,
            temperature=preset.temperature,
            temperature_power=preset.temperature_power,
            kd_weight=preset.kd_weight,
            ce_weight=preset.ce_weight,
            lr=preset.lr,
            batch_size=preset.batch_size,
            epochs=float(preset.epochs),
            max_length=preset.max_length,
            lora_r=preset.more.get("lora", {}).get("r", 0),
            max_prompt_length=preset.more.get("max_prompt"),
            pretrain_data=preset.more.get("pretrain_data"),
        )
        return replace(settings, **changes)


def load_causal_lm(source: str) -> Any:
    """A causal language model from the hub or a folder.

    Raises:
        InputError: If it is not there or cannot be read.
    """
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise InputError(_reason("model", source, error)) from error


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a model, with a padding token.

    Raises:
        InputError: If it is not there or cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise InputError(_reason("tokenizer", source, error)) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _reason(what: str, source: str, error: Exception) -> str:
    first = (str(error).strip() or repr(error)).splitlines()[0]
    return f"cannot load the {what} {source}: {first}; pass a hub id or a folder of save_pretrained"


def load_examples(source: str, max_length: int) -> Any:
    """Rows for `abkd.data.tokenize_row`, from ``pydoc``, a file, a folder or the hub."""
    if source == "pydoc":
        from shared_core.data.loading import load_texts

        size = 3 * max_length  # about max_length tokens; passages stay whole where they fit
        texts = load_texts("pydoc", split="train")
        return [{"text": t[i : i + size]} for t in texts for i in range(0, len(t), size)]
    from shared_core.data.loading import load_rows

    rows = load_rows(source)
    if {"instruction", "response"} <= set(rows.column_names):
        return rows.map(_instruction, remove_columns=rows.column_names)
    if {"query", "response"} <= set(rows.column_names):
        return rows.select_columns(["query", "response"]).rename_columns(
            {"query": "prompt", "response": "completion"}
        )
    return rows


def _instruction(row: dict[str, str]) -> dict[str, str]:
    """The prompt of the paper's language runs (that of Alpaca)."""
    context = row.get("context", "")
    more = ", paired with an input that provides further context" if context else ""
    middle = f"### Input:\n{context}\n\n" if context else ""
    prompt = (
        f"Below is an instruction that describes a task{more}. Write a response that appropriately "
        f"completes the request.\n\n### Instruction:\n{row['instruction']}\n\n{middle}"
        "### Response:\n"
    )
    return {"prompt": prompt, "completion": row["response"]}


def trainer_arguments(
    settings: TrainSettings, folder: Path, device: str, **more: Any
) -> "DistillationConfig":
    """The settings as arguments of the trainer."""
    from abkd.trainer import DistillationConfig

    same = {
        name: getattr(settings, name)
        for name in (
            *("divergence", "alpha", "beta", "temperature", "temperature_power", "kd_weight"),
            *("ce_weight", "weight_decay", "max_grad_norm", "lr_scheduler_type", "max_steps"),
            *("max_length", "bf16", "fused", "seed", "max_prompt_length", "pretrain_weight"),
            *("on_policy_fraction", "max_new_tokens"),
        )
    }
    return DistillationConfig(
        str(folder),
        **same,
        learning_rate=settings.lr,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        num_train_epochs=settings.epochs,
        use_cpu=device == "cpu",
        report_to="none",
        dataloader_pin_memory=False,
        **more,
    )


def train(
    settings: TrainSettings, out: Path, device: str = "auto", *, resume: bool = False
) -> dict[str, Any]:
    """Run a distillation and leave the student in ``out/student``.

    Checkpoints are in ``out/checkpoints``; one counts only once it has been written whole, so a
    run killed at any moment goes on from the last whole one and ends in the same numbers. One whose
    files have changed since is passed over, with a warning, for the one before.

    Raises:
        InputError: If something cannot be loaded, the folder holds another run, or all its
            checkpoints are damaged.
    """
    import transformers

    from abkd.trainer import DistillationTrainer

    last = checkpoint_to_resume(out, asdict(settings), resume=resume)
    run = RunFolder(out, resume=resume)
    run.write_config("abkd train", asdict(settings), distributions=["abkd", "transformers"])
    student = load_causal_lm(settings.student)
    tokenizer = load_tokenizer(settings.student)
    teacher = load_causal_lm(settings.teacher) if settings.teacher else None
    theirs = load_tokenizer(settings.teacher) if settings.teacher else None
    args = trainer_arguments(
        settings,
        out / "checkpoints",
        device,
        logging_steps=1,
        save_strategy="steps",
        save_steps=settings.save_steps,
        save_total_limit=2,
    )
    plain = None
    if settings.pretrain_data is not None:
        plain = load_examples(settings.pretrain_data, settings.max_length)
    trainer = DistillationTrainer(
        student,
        teacher,
        args,
        train_dataset=load_examples(settings.data, settings.max_length),
        processing_class=tokenizer,
        teacher_processing_class=theirs,
        peft_config=_lora(settings.lora_r),
        pretrain_dataset=plain,
        callbacks=[whole_checkpoint_marker(transformers.TrainerCallback)],
    )
    with contextlib.redirect_stdout(sys.stderr):  # the Trainer prints its log lines to stdout
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    trainer.save_model(str(out / "student"))
    clock = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
    history = [{k: v for k, v in h.items() if k not in clock} for h in trainer.state.log_history]
    if trainer.is_world_process_zero():
        (out / "log.jsonl").unlink(missing_ok=True)
        for line in history:
            run.log(**line)
    lines = [line for line in history if "kd" in line or "ce" in line]
    metrics = {
        "steps": trainer.state.global_step,
        "first": lines[0] if lines else {},
        "last": lines[-1] if lines else {},
    }
    final = trainer.state.log_history[-1]
    run.write_metrics(metrics, timing={k: final[k] for k in clock if k in final})
    return metrics


def _lora(rank: int) -> Any:
    if not rank:
        return None
    from shared_core.errors import MissingExtraError

    try:
        from peft import LoraConfig
    except ImportError as error:
        raise MissingExtraError("abkd", "lora", "peft") from error
    return LoraConfig(r=rank, lora_alpha=4 * rank, lora_dropout=0.1, task_type="CAUSAL_LM")

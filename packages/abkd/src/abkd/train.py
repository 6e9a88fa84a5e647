"""A distillation run in a folder: load, train, save, and go on after an interruption."""

import contextlib
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from abkd.presets import get_preset
from shared_core.errors import InputError
from shared_core.run import RunFolder, write_json

__all__ = ["TrainSettings", "load_causal_lm", "load_examples", "load_tokenizer", "train"]

MARK = "complete.json"


@dataclass(frozen=True)
class TrainSettings:
    """What a run is made of; all of it is written to ``config.json``.

    Args:
        student: Hub id or folder of a causal language model.
        teacher: Likewise; ``None`` with data that `abkd.capture` wrote.
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
    seed: int = 0

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> "TrainSettings":
        """The settings of a language preset, with changes.

        Raises:
            InputError: If there is no such preset, or it is not one of language models.

        Example:
            >>> TrainSettings.from_preset("openllama-3b-dolly").lora_r
            16
        """
        preset = get_preset(name)
        if preset.task != "language":
            raise InputError(
                f"{name} is a run of {preset.task}, which this command does not train; its "
                "settings are there for abkd.vision (see abkd presets --json)"
            )
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


def train(
    settings: TrainSettings, out: Path, device: str = "auto", *, resume: bool = False
) -> dict[str, Any]:
    """Run a distillation and leave the student in ``out/student``.

    Checkpoints are in ``out/checkpoints``; one counts only once it has been written whole, so a
    run killed at any moment goes on from the last whole one and ends in the same numbers.

    Raises:
        InputError: If something cannot be loaded, or the folder holds another run.
    """
    import transformers

    from abkd.trainer import DistillationConfig, DistillationTrainer

    checkpoints = out / "checkpoints"
    found = list(checkpoints.glob("checkpoint-*"))
    if found and not resume:
        raise InputError(
            f"{out} holds the checkpoints of an earlier run; continue it with --resume, or choose "
            "another --out"
        )
    if found:
        _check_same(settings, out)
    run = RunFolder(out, resume=resume)
    run.write_config("abkd train", asdict(settings), distributions=["abkd", "transformers"])
    student = load_causal_lm(settings.student)
    tokenizer = load_tokenizer(settings.student)
    teacher = load_causal_lm(settings.teacher) if settings.teacher else None
    theirs = load_tokenizer(settings.teacher) if settings.teacher else None
    args = DistillationConfig(
        str(checkpoints),
        **{
            name: getattr(settings, name)
            for name in (
                *("divergence", "alpha", "beta", "temperature", "temperature_power", "kd_weight"),
                *("ce_weight", "weight_decay", "max_grad_norm", "lr_scheduler_type", "max_steps"),
                *("max_length", "save_steps", "bf16", "fused", "seed"),
            )
        },
        learning_rate=settings.lr,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        num_train_epochs=settings.epochs,
        logging_steps=1,
        save_strategy="steps",
        save_total_limit=2,
        use_cpu=device == "cpu",
        report_to="none",
        dataloader_pin_memory=False,
    )
    trainer = DistillationTrainer(
        student,
        teacher,
        args,
        train_dataset=load_examples(settings.data, settings.max_length),
        processing_class=tokenizer,
        teacher_processing_class=theirs,
        peft_config=_lora(settings.lora_r),
        callbacks=[_mark_whole(transformers.TrainerCallback)],
    )
    whole = [path for path in found if (path / MARK).is_file()]
    last = max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)
    with contextlib.redirect_stdout(sys.stderr):  # the Trainer prints its log lines to stdout
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    trainer.save_model(str(out / "student"))
    clock = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
    history = [{k: v for k, v in h.items() if k not in clock} for h in trainer.state.log_history]
    if trainer.is_world_process_zero():
        (out / "log.jsonl").unlink(missing_ok=True)
        for line in history:
            run.log(**line)
    lines = [line for line in history if "kd" in line]
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


def _check_same(settings: TrainSettings, out: Path) -> None:
    try:
        earlier = json.loads((out / "config.json").read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{out}/config.json cannot be read; choose another --out") from error
    for name, value in asdict(settings).items():
        if earlier.get(name) != value:
            raise InputError(
                f"--resume with {name}={value!r}, but the run in {out} has "
                f"{name}={earlier.get(name)!r}; give the same settings, or choose another --out"
            )


def _mark_whole(base: type) -> Any:
    """A callback that marks checkpoints which have been written to the end."""

    class MarkWhole(base):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            del control, kwargs
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if state.is_world_process_zero and folder.is_dir():
                write_json(folder / MARK, {"step": state.global_step})

    return MarkWhole()

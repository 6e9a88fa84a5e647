"""A training stage in a folder: load, train, save, and go on after an interruption."""

import contextlib
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from gmsa.presets import RESTATE_INSTRUCTION, get_preset
from shared_core.checkpoints import checkpoint_to_resume, whole_checkpoint_marker
from shared_core.device import seed_everything, select_dtype
from shared_core.errors import InputError
from shared_core.run import RunFolder

__all__ = ["TrainSettings", "curve", "settings_from", "sharded", "train"]

CLOCK = ("train_runtime", "train_samples_per_second", "train_steps_per_second")


@dataclass(frozen=True)
class TrainSettings:
    """What a stage is made of; all of it is written to ``config.json``.

    Where `model` is a GMSA checkpoint, its own settings count, and those here from `encoder_layers`
    to `restate_instruction` do not.

    Attributes:
        stage: ``autoencoding`` or ``keft``.
        model: Hub id or folder of a language model, or folder of a GMSA checkpoint.
        train_file: Records (see `gmsa.data.read_records`); the first stage needs ``input`` only.
        rates: Compression rates to draw from.
        rate_sampling: ``sample``, ``batch`` or ``fixed``.
        encoder_layers: k.
        lsa_layers: k_LSA.
        alignment: ``lsa``, ``linear`` or ``none``.
        lsa_init: ``decoder`` or ``random``.
        merging: ``groups``, ``memory`` or ``embeddings``.
        memory_tokens: How many there are at most (``merging="memory"``).
        lora_r: Rank of the encoder's LoRA.
        lora_alpha: Its scale's numerator.
        lora_dropout: Its dropout.
        restate_instruction: The prompt of the first stage.
        decoder_tuning: ``full`` or ``lora``, in the second stage.
        decoder_lora_r: Rank of the decoder's LoRA.
        steps: Optimizer steps.
        lr: The highest learning rate (cosine, 10 % warm-up).
        weight_decay: Of AdamW.
        batch_size: Samples of a process and micro-batch.
        accumulation: Micro-batches of a step.
        max_length: Tokens of context and prompt together.
        save_steps: Steps between checkpoints.
        dtype: Of the frozen weights: ``auto``, ``float32``, ``bfloat16`` or ``float16``; what
            trains is float32 under autocast.
        attn: Attention of transformers.
        checkpointing: Recompute activations of ``none``, ``encoder``, ``decoder`` or ``all``.
        report_to: ``none``, or what the Trainer of transformers reports to, such as ``wandb``.
        seed: Of order, initialisation, dropout and rates.
    """

    stage: str
    model: str
    train_file: str
    rates: tuple[int, ...] = (4, 8)
    rate_sampling: str = "sample"
    encoder_layers: int = 8
    lsa_layers: int = 1
    alignment: str = "lsa"
    lsa_init: str = "decoder"
    merging: str = "groups"
    memory_tokens: int = 512
    lora_r: int = 128
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    restate_instruction: str = RESTATE_INSTRUCTION
    decoder_tuning: str = "full"
    decoder_lora_r: int = 64
    steps: int = 1000
    lr: float = 1e-4
    weight_decay: float = 0.01
    batch_size: int = 1
    accumulation: int = 1
    max_length: int = 4096
    save_steps: int = 500
    dtype: str = "auto"
    attn: str = "sdpa"
    checkpointing: str = "none"
    report_to: str = "none"
    seed: int = 0

    @classmethod
    def from_preset(cls, name: str, stage: str, **changes: Any) -> "TrainSettings":
        """The settings of a stage of a preset, with changes.

        Raises:
            InputError: If there is no such preset, or what it leaves open is not among the changes.

        Examples:
            >>> TrainSettings.from_preset("qwen3-4b-4x8x", "keft", train_file="qa.jsonl").lr
            1e-05
        """
        preset = asdict(get_preset(name))
        short = "ae" if stage == "autoencoding" else "keft"
        preset["steps"], preset["lr"] = preset[f"{short}_steps"], preset[f"{short}_lr"]
        known = {f.name for f in fields(cls)}
        start = {k: v for k, v in preset.items() if k in known and v is not None}
        lacking = [n for n in ("train_file", "model") if n not in {**start, **changes}]
        if lacking:
            option = lacking[0].replace("_", "-")
            raise InputError(f"the preset {name} leaves it to you: give --{option}")
        return cls(**{**start, "stage": stage, **changes})


def sharded() -> bool:
    """Whether accelerate will shard the parameters (FSDP or DeepSpeed).

    Examples:
        >>> sharded()
        False
    """
    return any(
        os.environ.get(name, "").lower() in ("1", "true")
        for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    )


def _load(settings: TrainSettings, dtype: torch.dtype) -> Any:
    """The compressor of a run, and its tokenizer."""
    from gmsa._checkpoint import is_checkpoint
    from gmsa.compressor import GMSACompressor, load_tokenizer
    from gmsa.configuration import GMSAConfig
    from gmsa.model import GMSAModel

    # Tensors that two modules share cannot be sharded with each.
    options: dict[str, Any] = {
        "dtype": dtype, "attn_implementation": settings.attn, "share_base": not sharded(),
    }  # fmt: skip
    if is_checkpoint(settings.model):
        return GMSACompressor.from_pretrained(settings.model, **options)
    names = (
        *("rates", "rate_sampling", "encoder_layers", "lsa_layers", "alignment", "lsa_init"),
        *("merging", "memory_tokens", "lora_r", "lora_alpha", "lora_dropout"),
        "restate_instruction",
    )
    config = GMSAConfig(
        default_rate=settings.rates[0], **{name: getattr(settings, name) for name in names}
    )
    name = settings.model
    if Path(name).is_dir():  # so that the checkpoint finds it from anywhere
        name = str(Path(name).resolve())
    model = GMSAModel.from_backbone(name, config, **options)
    return GMSACompressor(model, load_tokenizer(name))


def _records(settings: TrainSettings) -> list[dict[str, Any]]:
    """The records to train on, checked for what the stage needs."""
    from gmsa.data import QA_FIELDS, read_records

    return read_records(settings.train_file, QA_FIELDS if settings.stage == "keft" else ("input",))


def _dataset(settings: TrainSettings, compressor: Any, records: list[dict[str, Any]]) -> Any:
    from gmsa.data import AutoencodingDataset, QADataset

    if settings.stage == "keft":
        return QADataset(records, compressor.tokenizer, settings.max_length)
    return AutoencodingDataset(
        [record["input"] for record in records],
        compressor.tokenizer,
        settings.max_length,
        compressor.model.config.restate_instruction,
    )


def train(
    settings: TrainSettings, out: Path, device: torch.device, *, resume: bool = False
) -> dict[str, Any]:
    """Run a stage and leave the compressor in ``out/model``.

    Checkpoints are in ``out/checkpoints``; one counts only once it has been written whole, so a
    run killed at any moment goes on from the last whole one and ends in the same numbers.

    Args:
        settings: What to do.
        out: The run's folder.
        device: Where; with several processes each takes its own GPU.
        resume: Go on with the run in `out`.

    Returns:
        ``steps``, ``first`` and ``last`` (loss, token accuracy and learning rate), ``history``.

    Raises:
        InputError: If something cannot be loaded, or the folder holds another run.
    """
    from transformers import TrainerCallback, TrainingArguments

    from gmsa._backbone import bars_for_people_only
    from gmsa.data import GMSADataCollator
    from gmsa.trainer import GMSATrainer

    dtype = select_dtype(settings.dtype, device)
    _check(settings, device, dtype)
    start = checkpoint_to_resume(out, asdict(settings), resume=resume)
    records = _records(settings)
    run = RunFolder(out, resume=resume)
    seed_everything(settings.seed)
    bars_for_people_only()
    compressor = _load(settings, dtype)
    model, tokenizer = compressor.model, compressor.tokenizer
    model.config.decoder_lora_r = model.config.decoder_lora_alpha = settings.decoder_lora_r
    data = _dataset(settings, compressor, records)
    run.write_config(
        f"gmsa train-{'ae' if settings.stage == 'autoencoding' else 'keft'}",
        asdict(settings), distributions=["gmsa", "transformers", "accelerate", "peft"],
    )  # fmt: skip
    model.freeze_for_stage(settings.stage, settings.decoder_tuning)
    model.checkpoint_activations(settings.checkpointing)
    for parameter in model.parameters():
        if parameter.requires_grad:  # steps of 1e-5 are lost in the last bits of bfloat16
            parameter.data = parameter.data.float()
    args = TrainingArguments(
        str(out / "checkpoints"),
        max_steps=settings.steps,
        learning_rate=settings.lr,
        lr_scheduler_type="cosine",
        warmup_steps=settings.steps // 10,
        weight_decay=settings.weight_decay,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        seed=settings.seed,
        save_steps=settings.save_steps,
        save_total_limit=2,
        logging_steps=1,
        use_cpu=device.type == "cpu",
        report_to=settings.report_to,
        disable_tqdm=not sys.stderr.isatty(),
        dataloader_pin_memory=device.type == "cuda",
        ddp_find_unused_parameters=False,
    )
    trainer = GMSATrainer(
        model,
        args,
        stage=settings.stage,
        decoder_tuning=settings.decoder_tuning,
        train_dataset=data,
        data_collator=GMSADataCollator(
            tokenizer.pad_token_id, settings.rates, settings.rate_sampling, settings.seed
        ),
        callbacks=[whole_checkpoint_marker(TrainerCallback)],
    )
    with contextlib.redirect_stdout(sys.stderr):  # the Trainer prints its log lines to stdout
        trainer.train(resume_from_checkpoint=None if start is None else str(start))
    trainer.save_model(str(out / "model"))
    return _report(trainer, run)


def _report(trainer: Any, run: RunFolder) -> dict[str, Any]:
    """Write the log and the metrics of a finished stage."""
    # Sorted, because a resumed run reads its first lines back in that order.
    lines = [dict(sorted(h.items())) for h in trainer.state.log_history if "loss" in h]
    metrics = {
        "steps": trainer.state.global_step,
        "first": lines[0] if lines else {},
        "last": lines[-1] if lines else {},
    }
    if trainer.is_world_process_zero():
        (run.path / "log.jsonl").unlink(missing_ok=True)
        for line in lines:
            run.log(**line)
        final = trainer.state.log_history[-1]
        run.write_metrics(metrics, timing={k: final[k] for k in CLOCK if k in final})
    return {**metrics, "history": lines, "first_process": trainer.is_world_process_zero()}


def curve(history: list[Mapping[str, Any]]) -> Any:
    """A figure of loss and token accuracy by step.

    Examples:
        >>> curve([{"step": 1, "loss": 2.0, "token_accuracy": 0.1}]).axes[1].get_ylabel()
        'token accuracy'
    """
    from shared_core.plots import COLORS, new_figure

    figure, axes = new_figure(1, 2)
    steps = [h["step"] for h in history]
    for axis, key, label in zip(
        axes, ("loss", "token_accuracy"), ("cross-entropy", "token accuracy"), strict=True
    ):
        axis.plot(steps, [h[key] for h in history], color=COLORS[0])
        axis.set_xlabel("step")
        axis.set_ylabel(label)
    axes[1].set_ylim(0, 1)
    return figure


def _check(settings: TrainSettings, device: torch.device, dtype: torch.dtype) -> None:
    for name in ("steps", "batch_size", "accumulation", "save_steps"):
        if getattr(settings, name) < 1:
            raise InputError(f"{name} is {getattr(settings, name)}; accepted: 1 and above")
    if dtype == torch.float16 and device.type == "cpu":
        raise InputError("float16 does not train on the CPU; take --dtype bfloat16 or float32")
    if device.index:
        raise InputError(
            f"training takes the first GPU it sees; for {device} set "
            f"CUDA_VISIBLE_DEVICES={device.index} and leave --device out"
        )


def settings_from(given: Mapping[str, Any], stage: str, preset: str | None) -> TrainSettings:
    """Settings out of what was given on the command line.

    Raises:
        InputError: If model or data are missing.

    Examples:
        >>> settings_from({"model": "m", "train_file": "t.txt", "lr": None}, "keft", None).lr
        1e-05
    """
    changes = {k: v for k, v in given.items() if v is not None}
    if preset is not None:
        return TrainSettings.from_preset(preset, stage, **changes)
    lacking = [n for n in ("model", "train_file") if n not in changes]
    if lacking:
        raise InputError(
            "say what to train: --model and --train-file, or --preset and --train-file"
        )
    base = TrainSettings(stage, changes["model"], changes["train_file"])
    if stage == "keft":
        base = replace(base, lr=1e-5)
    return replace(base, **changes)

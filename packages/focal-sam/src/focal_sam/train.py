"""Training and evaluation of an image classifier, on one device or under torchrun.

`train` is a plain loop: the sharpness method is the one line that differs from any other training
script. Under ``torchrun`` (or ``accelerate launch``) the same loop runs on several processes, with
DDP or FSDP2.
"""

import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from focal_sam.ccsam import CCSAM
from focal_sam.losses import (
    ClassBalancedWeights,
    DRWSchedule,
    FocalLoss,
    LDAMLoss,
    LogitAdjustedLoss,
    VSLoss,
)
from focal_sam.methods import ASAM, SAM, FocalSAM, ImbSAM
from focal_sam.models import create_model
from focal_sam.presets import get_preset
from focal_sam.schedule import RhoScheduler, StepRho
from focal_sam.sharpness import SharpnessMethod
from focal_sam.training_data import ImageData, load_data
from shared_core.checkpoints import check_same
from shared_core.device import autocast, seed_everything
from shared_core.errors import InputError
from shared_core.parallel import Processes, join_processes
from shared_core.run import RunFolder, atomic_path, progress

__all__ = [
    "LOSSES",
    "METHODS",
    "TrainSettings",
    "create_loss",
    "create_method",
    "evaluate",
    "load_trained",
    "train",
]

METHODS = ("sgd", "sam", "asam", "imbsam", "ccsam", "focal")
LOSSES = ("ce", "la", "vs", "ldam", "focal", "cb")
WEIGHTS = "model.safetensors"
BEST = "best.safetensors"


@dataclass(frozen=True)
class TrainSettings:
    """Everything a run depends on; ``config.json`` holds it.

    Attributes:
        data: Embedded name, path or hub id of the images; with lists, the folder of the images.
        model: A name of `focal_sam.models.create_model`.
        method: ``sgd``, ``sam``, ``asam``, ``imbsam``, ``ccsam`` or ``focal``.
        loss: ``ce``, ``la``, ``vs``, ``ldam``, ``focal`` (Lin et al.) or ``cb`` (class-balanced).
        drw: Re-weight classes from 80 % of the epochs on.
        test_data: See `focal_sam.training_data.load_data`.
        train_list: See `focal_sam.training_data.load_data`.
        test_list: See `focal_sam.training_data.load_data`.
        transform: See `focal_sam.training_data.load_data`.
        imbalance_ratio: See `focal_sam.training_data.load_data`.
        rho: ρ (the noise ratio of CC-SAM).
        rho_late: ρ of the last fifth of the epochs, if another.
        gamma: γ of Focal-SAM.
        lam: λ of Focal-SAM.
        threshold: ImbSAM's tail: classes with fewer training images.
        lr: Learning rate at the start.
        lr_schedule: ``cosine`` to 0, or ``step``: five epochs of warm-up, a hundredth from 80 %
            and a ten-thousandth from 90 % of the epochs on.
        momentum: Of SGD.
        weight_decay: Of SGD.
        batch_size: Images per step, over all processes.
        epochs: Passes over the training set.
        amp: Mixed precision.
        select: ``final`` tests the last weights; ``best-val`` those that did best on images held
            out of the training set.
        few_below: Classes with fewer training images are few-shot.
        many_above: Classes with more training images are many-shot.
        fsdp: Shard parameters over the processes with FSDP2.
        workers: Processes that load images.
        seed: Of the subset, the initial weights, the order of the batches and the augmentation.
    """

    data: str
    model: str = "resnet32"
    method: str = "focal"
    loss: str = "la"
    drw: bool = False
    test_data: str | None = None
    train_list: str | None = None
    test_list: str | None = None
    transform: str = "none"
    imbalance_ratio: int | float | None = None
    rho: float = 0.2
    rho_late: float | None = None
    gamma: float = 2.0
    lam: float = 0.8
    threshold: int = 20
    lr: float = 0.1
    lr_schedule: str = "cosine"
    momentum: float = 0.9
    weight_decay: float = 2e-4
    batch_size: int = 64
    epochs: int = 200
    amp: bool = False
    select: str = "final"
    few_below: int = 20
    many_above: int = 100
    fsdp: bool = False
    workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, accepted in (
            ("method", METHODS),
            ("loss", LOSSES),
            ("lr_schedule", ("cosine", "step")),
            ("select", ("final", "best-val")),
        ):
            if getattr(self, name) not in accepted:
                raise InputError(
                    f"{name} is {getattr(self, name)!r}; accepted: {', '.join(accepted)}"
                )
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("lr", "momentum", "weight_decay"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise InputError(f"{name} is {getattr(self, name)}; it must be 0 or above")
        if self.fsdp and self.select == "best-val":
            raise InputError("--select best-val keeps weights of one process; leave out --fsdp")

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> "TrainSettings":
        """The settings of a preset, with `changes` that are not ``None``.

        Raises:
            InputError: If there is no such preset, or it needs images that are not given.

        Examples:
            >>> TrainSettings.from_preset("cifar100lt-resnet32", epochs=2).gamma
            3.2
        """
        preset = get_preset(name)
        known = {f.name for f in fields(cls)}
        values = {k: v for k, v in asdict(preset).items() if k in known}
        values["data"] = preset.source
        values |= {k: v for k, v in changes.items() if v is not None}
        if values["data"] == preset.source and "/" not in preset.source.split(" ")[0]:
            raise InputError(
                f"{name} needs images of your own: --data FOLDER --train-list FILE --test-list FILE"
            )
        return cls(**values)


def create_method(
    settings: TrainSettings, model: nn.Module, class_counts: list[int]
) -> SharpnessMethod:
    """The sharpness method that the settings name; for ``sgd``, one with ρ = 0.

    Examples:
        >>> settings = TrainSettings("digits", method="imbsam", rho=0.3)
        >>> type(create_method(settings, nn.Linear(2, 2), [50, 5])).__name__
        'ImbSAM'
    """
    s = settings
    match s.method:
        case "sgd":
            return SharpnessMethod(model, 1.0, rho=0.0)
        case "sam":
            return SAM(model, s.rho)
        case "asam":
            return ASAM(model, s.rho)
        case "imbsam":
            return ImbSAM(model, class_counts, s.rho, s.threshold)
        case "ccsam":
            return CCSAM(model, class_counts, s.rho)
    return FocalSAM(model, class_counts, s.rho, s.gamma, s.lam)


def create_loss(name: str, class_counts: list[int]) -> nn.Module:
    """The per-sample loss of that name.

    Examples:
        >>> create_loss("la", [50, 5])(torch.zeros(1, 2), torch.tensor([1])).shape
        torch.Size([1])
    """
    match name:
        case "la":
            return LogitAdjustedLoss(class_counts)
        case "vs":
            return VSLoss(class_counts)
        case "ldam":
            return LDAMLoss(class_counts)
        case "focal":
            return FocalLoss()
    return nn.CrossEntropyLoss(reduction="none")


def _distributed(model: nn.Module, settings: TrainSettings, processes: Processes) -> nn.Module:
    if settings.fsdp:
        if processes.world == 1:
            raise InputError("--fsdp shards over several processes; start it with torchrun")
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)  # in place
        return model
    if processes.world > 1:
        return nn.parallel.DistributedDataParallel(model)
    return model


def _lr_factor(settings: TrainSettings, epoch: int) -> float:
    """The learning rate of an epoch (from 0) over that of the start."""
    share = epoch / settings.epochs
    if settings.lr_schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * share))
    warm_up = min(1.0, (epoch + 1) / 5)
    return warm_up * (0.0001 if share >= 0.9 else 0.01 if share >= 0.8 else 1.0)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: Dataset[Any],
    class_counts: list[int],
    *,
    few_below: int = 20,
    many_above: int = 100,
    batch_size: int = 256,
    device: torch.device | None = None,
    workers: int = 0,
) -> dict[str, float]:
    """Accuracies in percent: overall, by training frequency, balanced, of the worst class.

    Args:
        model: Maps images to logits; raw logits decide, whatever the training loss adjusted.
        dataset: Pairs of an image tensor and a label.
        class_counts: TRAINING images of each class.
        few_below: Classes with fewer of them are few-shot.
        many_above: Classes with more of them are many-shot.
        batch_size: Images per pass.
        device: Where the model is; by default the CPU.
        workers: Processes that load images.

    Examples:
        >>> data = load_data("digits", transform="none")
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
        >>> sorted(evaluate(model, data.test, data.counts))[:3]
        ['balanced', 'few', 'harmonic_mean']
    """
    from shared_core.metrics import ShotAccuracy

    device = device or torch.device("cpu")
    metric = ShotAccuracy(class_counts, many=many_above, few=few_below, sync_on_compute=False).to(
        device
    )
    was_training = model.training
    model.eval()
    try:
        loader = DataLoader(dataset, batch_size=batch_size, num_workers=workers)
        for images, labels in progress(loader, description="testing", unit="batch"):
            metric.update(model(images.to(device)).float(), labels.to(device))
    finally:
        model.train(was_training)
    return {key: 100 * value.item() for key, value in metric.compute().items()}


class _Trainer:
    """The parts of one run, built alike by a fresh start and a resumed one."""

    def __init__(self, settings: TrainSettings, data: ImageData, processes: Processes) -> None:
        s, device = settings, processes.device
        self.settings, self.data, self.processes, self.device = s, data, processes, device
        seed_everything(s.seed)
        self.model = _distributed(_model(s, data, device), s, processes)
        self.method = create_method(s, self.model, data.counts)
        self.criterion = create_loss(s.loss, data.counts).to(device)
        self.class_weights = self._class_weights()
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(
            trainable, lr=s.lr, momentum=s.momentum, weight_decay=s.weight_decay
        )
        self.rho = (
            StepRho(self.method, s.epochs, self.method.rho, s.rho_late)
            if s.rho_late is not None
            else RhoScheduler(self.method, self.method.rho)
        )
        half = torch.float32
        if s.amp:
            bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
            half = torch.bfloat16 if bf16 else torch.float16
        self.dtype = half
        self.scaler = torch.amp.GradScaler(device.type, enabled=half == torch.float16)
        self.epoch = 0
        self.best = -1.0

    def _class_weights(self) -> ClassBalancedWeights | DRWSchedule | None:
        s, counts = self.settings, self.data.counts
        if s.drw:
            return DRWSchedule(counts, start_epoch=round(0.8 * s.epochs))
        return ClassBalancedWeights(counts) if s.loss == "cb" else None

    def _state_options(self) -> Any:
        from torch.distributed.checkpoint.state_dict import StateDictOptions

        return StateDictOptions(
            full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False
        )

    def weights(self) -> dict[str, Tensor]:
        """The trained parameters and the buffers, whole, on the CPU of the first process."""
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        found = get_model_state_dict(self.model, options=self._state_options())
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def state(self) -> dict[str, Any]:
        """Everything that the next epoch depends on."""
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        return {
            "epoch": self.epoch,
            "best": self.best,
            "model": self.weights(),
            "optimizer": get_optimizer_state_dict(
                self.model, self.optimizer, options=self._state_options()
            ),
            "scaler": self.scaler.state_dict(),
            "method": self.method.state_dict(),
            "rho": self.rho.state_dict(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` gave."""
        from torch.distributed.checkpoint.state_dict import set_state_dict

        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=self._state_options(),
        )
        self.scaler.load_state_dict(state["scaler"])
        self.rho.load_state_dict(state["rho"])
        self.method.load_state_dict(state["method"])
        self.epoch, self.best = state["epoch"], state["best"]

    def run_epoch(self) -> dict[str, float]:
        """One pass over the training set; returns its mean losses."""
        s, processes = self.settings, self.processes
        # Seeding every epoch makes a resumed run draw what an uninterrupted one would have drawn.
        seed_everything(
            (s.seed * 1_000_003 + self.epoch * processes.world + processes.rank) % 2**32
        )
        sampler: DistributedSampler[Any] = DistributedSampler(
            self.data.train, num_replicas=processes.world, rank=processes.rank, seed=s.seed
        )
        sampler.set_epoch(self.epoch)
        size = max(1, s.batch_size // processes.world)
        loader = DataLoader(
            self.data.train,
            batch_size=size,
            sampler=sampler,
            num_workers=s.workers,
            # BatchNorm cannot train on a last batch of one image.
            drop_last=len(sampler) % size == 1,
            generator=torch.Generator().manual_seed(s.seed + self.epoch),
        )
        for group in self.optimizer.param_groups:
            group["lr"] = s.lr * _lr_factor(s, self.epoch)
        if isinstance(self.class_weights, DRWSchedule):
            self.class_weights.set_epoch(self.epoch)
        self.model.train()
        results = []
        bar = progress(loader, description=f"epoch {self.epoch + 1}/{s.epochs}", unit="step")
        for images, labels in bar:
            inputs = images.to(self.device, non_blocking=True)
            targets = labels.to(self.device, non_blocking=True)

            def losses(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
                with autocast(self.device, self.dtype):
                    logits = self.model(inputs)
                values: Tensor = self.criterion(logits.float(), targets)
                weights = self.class_weights
                return values if weights is None else values * weights(targets, values.dtype)

            # Labels stay on the CPU for the method, which can then look at them without waiting.
            result = self.method.backward(losses, labels, scaler=self.scaler)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            results.append(torch.stack([result.loss, result.loss_perturbed, result.sharpness]))
        self.epoch += 1
        self.rho.step()
        loss, perturbed, sharpness = torch.stack(results).mean(0).tolist()
        if not math.isfinite(loss):
            raise InputError(
                f"the loss was {loss} in epoch {self.epoch}: training diverged; lower --lr or --rho"
            )
        return {"loss": loss, "loss_perturbed": perturbed, "sharpness": sharpness}

    def test(self, dataset: Dataset[Any]) -> dict[str, float]:
        """`evaluate` with this run's settings."""
        s = self.settings
        wrapped = isinstance(self.model, nn.parallel.DistributedDataParallel)
        return evaluate(
            self.model.module if wrapped else self.model,  # type: ignore[arg-type]
            dataset,
            self.data.counts,
            few_below=s.few_below,
            many_above=s.many_above,
            device=self.device,
            workers=s.workers,
        )


def train(
    settings: TrainSettings, run: RunFolder, device: torch.device, *, resume: bool = False
) -> dict[str, float]:
    """Train as the settings say, and test.

    The run folder gets ``config.json``, ``log.jsonl`` (a line per epoch), a checkpoint after every
    epoch, and at the end ``model.safetensors`` and ``metrics.json``.

    Args:
        settings: What to do.
        run: Where to write.
        device: Where to compute; under torchrun each process takes its own GPU.
        resume: Continue from the run's checkpoint, if there is one. An interrupted run that is
            resumed ends in the same numbers as one that was not.

    Returns:
        The accuracies of `evaluate` on the test set, in percent.

    Raises:
        InputError: If the data do not fit the settings, or the loss diverges.
    """
    data = _load(settings)
    if resume and run.has_checkpoint:
        check_same(asdict(settings), run.path)
    with join_processes(device) as processes:
        trainer = _Trainer(settings, data, processes)
        if resume and run.has_checkpoint:
            trainer.load(run.load_checkpoint())
            if processes.first:
                run.truncate_log(trainer.epoch)
        elif processes.first:
            run.write_config(
                "focal-sam train",
                {**asdict(settings), "class_counts": data.counts, "class_names": data.class_names},
            )
        started = time.perf_counter()
        while trainer.epoch < settings.epochs:
            line: dict[str, Any] = trainer.run_epoch()
            if data.validation is not None:
                line["validation"] = trainer.test(data.validation)["balanced"]
                if line["validation"] > trainer.best:
                    trainer.best = line["validation"]
                    _save_weights(run.path / BEST, trainer)
            state = trainer.state()
            if processes.first:
                run.log(step=trainer.epoch, lr=trainer.optimizer.param_groups[0]["lr"], **line)
                run.save_checkpoint(state)
        _save_weights(run.path / WEIGHTS, trainer, chosen=run.path / BEST)
        seconds = time.perf_counter() - started
        if processes.world > 1:
            torch.distributed.barrier()
        if data.validation is not None:
            _load_weights(trainer.model, run.path / WEIGHTS)
        accuracies = trainer.test(data.test)
        if processes.first:
            run.write_metrics(
                {"test": accuracies, "epochs": settings.epochs, "class_counts": data.counts},
                timing={"training_seconds": seconds},
            )
    return accuracies


def _load(settings: TrainSettings) -> ImageData:
    return load_data(
        settings.data,
        transform=settings.transform,
        test_source=settings.test_data,
        train_list=settings.train_list,
        test_list=settings.test_list,
        imbalance_ratio=settings.imbalance_ratio,
        validation_fraction=0.1 if settings.select == "best-val" else 0.0,
        seed=settings.seed,
    )


def _model(settings: TrainSettings, data: ImageData, device: torch.device) -> nn.Module:
    options = {"normed": True} if settings.loss == "ldam" and settings.model == "resnet32" else {}
    return create_model(
        settings.model, len(data.class_names), class_names=data.class_names, **options
    ).to(device)


def _saved_settings(folder: Path) -> dict[str, Any]:
    """The settings in a run's ``config.json``."""
    import json

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        settings: dict[str, Any] = config["settings"]
        settings["class_names"], settings["class_counts"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder / 'config.json'} is not that of a training run ({error!r})"
        ) from error
    return settings


def _save_weights(path: Path, trainer: _Trainer, *, chosen: Path | None = None) -> None:
    """Write the weights, or those chosen by validation, under their names in the model."""
    from safetensors.torch import load_file, save_file

    weights = trainer.weights()
    if not trainer.processes.first:
        return
    if chosen is not None and chosen.is_file():
        weights = load_file(chosen)
    with atomic_path(path) as temporary:
        save_file({name: w.detach().contiguous().clone() for name, w in weights.items()}, temporary)


def _load_weights(model: nn.Module, path: Path) -> None:
    """Load what `_save_weights` wrote; what it left out has to be frozen."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a readable safetensors file ({error})") from error
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    assert isinstance(inner, nn.Module)
    missing, unexpected = inner.load_state_dict(weights, strict=False)
    trainable = {n for n, p in inner.named_parameters() if p.requires_grad}
    lost = sorted(trainable & set(missing))
    if lost or unexpected:
        raise InputError(
            f"{path} does not fit the model of its run: "
            f"{lost[0] + ' is missing' if lost else unexpected[0] + ' is unknown'}"
        )


def load_trained(
    folder: str | os.PathLike[str], device: torch.device, **changes: Any
) -> tuple[nn.Module, ImageData, TrainSettings]:
    """The model, the data and the settings of a finished run.

    Args:
        folder: The run's folder, or its ``model.safetensors``.
        device: Where the model goes.
        changes: Settings to change, such as where the data are now.

    Raises:
        InputError: If the folder does not hold a finished run.
    """
    path = Path(folder)
    path = path.parent if path.name == WEIGHTS else path
    for name in ("config.json", WEIGHTS):
        if not (path / name).is_file():
            raise InputError(f"{path} is not the folder of a finished training run: no {name}")
    saved = _saved_settings(path)
    known = {f.name for f in fields(TrainSettings)}
    values = {k: v for k, v in saved.items() if k in known}
    settings = TrainSettings(**(values | {k: v for k, v in changes.items() if v is not None}))
    data = _load(settings)
    if data.class_names != saved["class_names"]:
        raise InputError(
            f"the data have the classes {data.class_names[:3]}…, the run was trained on "
            f"{saved['class_names'][:3]}…"
        )
    model = _model(settings, data, device)
    _load_weights(model, path / WEIGHTS)
    return model.eval(), data, settings

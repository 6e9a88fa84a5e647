"""Training a detector from the command line's settings, with resume, on one device or several."""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from edge_ood._shard import full_state, load_full_state, shard, share_buffers
from edge_ood.data import PairedLoader, check_disjoint
from edge_ood.datasets import MultiLabelImages, UnlabelledImages, eval_transform, train_transform
from edge_ood.detector import OODDetector
from edge_ood.loop import collect, train_edge
from edge_ood.loss import EdgeLoss
from edge_ood.losses import (
    AsymmetricLoss,
    DistributionBalancedLoss,
    FocalMultiLabelLoss,
    MultiLabelEnergyBoundLoss,
    MultiLabelOELoss,
)
from edge_ood.metrics import multilabel_map
from edge_ood.models import MultiLabelModel, create_model, model_from_spec
from edge_ood.settings import TrainSettings
from edge_ood.sources import load_id, load_outliers, outlier_folder
from shared_core.checkpoints import check_same
from shared_core.device import seed_everything, select_dtype
from shared_core.errors import InputError, MissingExtraError
from shared_core.parallel import is_parallel, join_processes
from shared_core.run import RunFolder, save_state

__all__ = ["CyclingSampler", "create_loss", "read_log", "train"]


def create_loss(settings: TrainSettings, class_counts: Tensor, n_train: int) -> nn.Module:
    """The loss that the settings name.

    Examples:
        >>> type(create_loss(TrainSettings("shapes", loss="asl"), torch.ones(2), 9)).__name__
        'AsymmetricLoss'
    """
    s = settings
    shape: dict[str, Any] = {"gap_mask": s.gap_mask, "gather": s.gather}
    match s.loss:
        case "edge":
            return EdgeLoss(s.alpha, s.beta, s.k, s.margin, **shape)
        case "conf":
            return EdgeLoss(s.alpha, 0.0, s.k, s.margin, **shape)
        case "gap":
            return EdgeLoss(0.0, s.beta, s.k, s.margin, **shape)
        case "focal":
            return FocalMultiLabelLoss()
        case "asl":
            return AsymmetricLoss(reduction="mean")
        case "db":
            # A class that only held-out images have has no weight of its own.
            return DistributionBalancedLoss(class_counts.clamp(min=1), n_train)
        case "oe":
            return MultiLabelOELoss()
        case "energy":
            return MultiLabelEnergyBoundLoss()
    return nn.BCEWithLogitsLoss()


class CyclingSampler(Sampler[int]):
    """`per_epoch` indices an epoch out of an endless stream of permutations.

    Epoch e takes the places ``e * per_epoch`` and on, so that all samples come up over the epochs,
    and a resumed run goes on where it stopped without saving anything.

    Args:
        size: Samples of the set.
        per_epoch: Indices per epoch.
        seed: Of the permutations.

    Examples:
        >>> sampler = CyclingSampler(3, 2, seed=0)
        >>> first = list(sampler); sampler.set_epoch(1)
        >>> sorted(first + list(sampler)[:1])
        [0, 1, 2]
    """

    def __init__(self, size: int, per_epoch: int, seed: int) -> None:
        self.size, self.per_epoch, self.seed, self.epoch = size, per_epoch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.per_epoch

    def __iter__(self) -> Iterator[int]:
        start = self.epoch * self.per_epoch
        for turn in range(start // self.size, (start + self.per_epoch - 1) // self.size + 1):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + turn)
            order = torch.randperm(self.size, generator=generator).tolist()
            first = turn * self.size
            yield from order[max(0, start - first) : start + self.per_epoch - first]


def _collate(batch: list[Any]) -> Any:
    """Stack images, and labels where there are some."""
    if isinstance(batch[0], tuple):
        return torch.stack([b[0] for b in batch]), torch.stack([b[1] for b in batch])
    return torch.stack(batch)


def make_accelerator(dtype: torch.dtype, device: torch.device) -> Any:
    """An accelerator if there are several processes, else ``None``.

    Raises:
        MissingExtraError: If accelerate is needed and not installed.

    Examples:
        >>> make_accelerator(torch.float32, torch.device("cpu")) is None
        True
    """
    if not is_parallel():
        return None
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise MissingExtraError("edge-ood", "hf", "accelerate") from error
    from accelerate.utils import DistributedType

    precision = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "no")
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision=precision)
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise InputError(
            f"this command makes no use of an accelerate configuration for "
            f"{accelerator.distributed_type.value}; for FSDP give --fsdp under torchrun, for "
            "DeepSpeed use edge_ood.hf.EdgeHFTrainer"
        )
    return accelerator


class _Run:
    """The parts of a training run, built alike by a fresh start and a resumed one."""

    def __init__(self, settings: TrainSettings, device: torch.device) -> None:
        s = self.settings = settings
        self.dtype = select_dtype(s.dtype, device)
        self.accelerator = make_accelerator(self.dtype, device)
        self.device = device if self.accelerator is None else self.accelerator.device
        self.world = 1 if self.accelerator is None else self.accelerator.num_processes
        self.first = self.accelerator is None or self.accelerator.is_main_process
        seed_everything(s.seed)
        self._load_data()
        self.model = create_model(
            s.model, len(self.class_names), hidden=s.head_hidden, pretrained=s.pretrained
        )
        if s.channels_last and not s.fsdp:  # FSDP shards contiguous parameters alone
            self.model = self.model.to(memory_format=torch.channels_last)
        if s.sync_bn and self.device.type == "cpu":
            raise InputError("--sync-bn works on GPUs alone; leave it out on a CPU")
        if s.sync_bn and self.world > 1:
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)  # type: ignore[no-untyped-call]
        self.model.to(self.device)
        if s.fsdp:
            shard(self.model, self.world, self.dtype)
        self.optimizer = self._inner = self._make_optimizer()
        self.criterion = create_loss(s, self.counts, len(self.train)).to(self.device)
        self.validation_loader: Any = None
        self._make_loaders()
        self.scheduler = self._make_scheduler()
        trained: nn.Module = self.model
        if self.accelerator is not None:
            prepared = self.accelerator.prepare(self.optimizer, self.validation_loader)
            self.optimizer, self.validation_loader = prepared
            if not s.fsdp:
                trained = self.accelerator.prepare(trained)
        self.trained: Any = torch.compile(trained) if s.compile else trained
        half = self.dtype == torch.float16 and self.accelerator is None
        self.scaler = torch.amp.GradScaler(self.device.type) if half else None
        self.epoch, self.best = 0, -1.0

    def _load_data(self) -> None:
        s = self.settings
        augment = train_transform(s.image_size, official=s.official_transforms)
        plain = eval_transform(s.image_size)
        columns = {"image_column": s.image_column}
        labelled = {**columns, "label_column": s.label_column, "seed": s.seed}
        full = load_id(s.id, "train", augment, **labelled)  # type: ignore[arg-type]
        still = MultiLabelImages(full.images, full.targets, full.class_names, plain)
        order = torch.randperm(len(full), generator=torch.Generator().manual_seed(s.seed)).tolist()
        held = max(1, round(s.validation * len(full)))
        if held >= len(full):
            raise InputError(f"{s.id} has {len(full)} training images; too few to hold some out")
        self.validation: Dataset[Any] = Subset(still, sorted(order[:held]))
        chosen = sorted(order[held:])
        self.train: Subset[Any] = Subset(full, chosen)
        self.class_names = full.class_names
        self.counts = full.targets[chosen].sum(0).long()
        self.outliers: UnlabelledImages | None = None
        if s.with_outliers and s.oe is not None:
            self.outliers = load_outliers(s.oe, "train", augment, seed=s.seed, **columns)
            ours, theirs = full.images, self.outliers.images
            if isinstance(ours[0], Path) and isinstance(theirs[0], Path):
                names = "the ID set", "the OE set"
                check_disjoint(ours, theirs, "path", names=names)
                check_disjoint(ours, theirs, "sha1", names=names)

    def _make_optimizer(self) -> torch.optim.Optimizer:
        s = self.settings
        groups = [
            {"params": list(self.model.head.parameters()), "lr": s.lr},
            {
                "params": list(self.model.backbone.parameters()),
                "lr": s.lr if s.backbone_lr is None else s.backbone_lr,
            },
        ]
        decay = s.weight_decay
        if s.optimizer == "sgd":
            momentum, nesterov = s.momentum, s.momentum > 0
            return torch.optim.SGD(
                groups, lr=s.lr, momentum=momentum, nesterov=nesterov, weight_decay=decay
            )
        make = torch.optim.Adam if s.optimizer == "adam" else torch.optim.AdamW
        return make(groups, lr=s.lr, weight_decay=decay)

    def _make_scheduler(self) -> Any:
        s = self.settings
        if s.schedule == "constant":
            return None
        largest = [group["lr"] for group in self.optimizer.param_groups]
        return torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer,
            largest,
            epochs=s.epochs,
            steps_per_epoch=self.steps,
            pct_start=0.2,
            # SGD without momentum has none to cycle.
            cycle_momentum=s.optimizer != "sgd" or s.momentum > 0,
        )

    def _make_loaders(self) -> None:
        s, rank = self.settings, 0
        if self.accelerator is not None:
            rank = self.accelerator.process_index
        size, oe_size = (max(1, b // self.world) for b in (s.batch_size, s.oe_batch_size))
        per_rank = -(-len(self.train) // self.world)
        self.steps = -(-per_rank // size)
        if per_rank % size == 1 and self.steps > 1:
            # BatchNorm cannot train on one image; the sampler leaves it out and others come up.
            per_rank, self.steps = per_rank - 1, self.steps - 1
        common: dict[str, Any] = {
            "num_workers": s.workers,
            "pin_memory": self.device.type == "cuda",
            "collate_fn": _collate,
        }
        self.samplers = [CyclingSampler(len(self.train), per_rank * self.world, s.seed)]
        batches = _Batches(self.samplers[0], size, rank, self.world)
        self.pairs: Any = DataLoader(self.train, batch_sampler=batches, **common)
        if self.outliers is not None:
            count = self.steps * oe_size * self.world
            self.samplers.append(CyclingSampler(len(self.outliers), count, s.seed + 1))
            outliers = _Batches(self.samplers[1], oe_size, rank, self.world)
            self.pairs = PairedLoader(
                self.pairs, DataLoader(self.outliers, batch_sampler=outliers, **common)
            )
        self.validation_loader = DataLoader(self.validation, batch_size=size, **common)

    def before_epoch(self, epoch: int) -> None:
        """Everything random of an epoch depends on its number alone."""
        rank = 0 if self.accelerator is None else self.accelerator.process_index
        seed_everything((self.settings.seed * 1_000_003 + epoch * self.world + rank) % 2**32)
        for sampler in self.samplers:
            sampler.set_epoch(epoch)
        if isinstance(self.pairs, PairedLoader):
            self.pairs.restart()

    @property
    def autocast_dtype(self) -> torch.dtype:
        """That of the loop's own autocast; a model that accelerate prepared has one already."""
        own = self.accelerator is None or self.settings.fsdp
        return self.dtype if own else torch.float32

    def whole_model(self) -> MultiLabelModel:
        """The model without wrappers and shards; all processes have to ask together."""
        if not self.settings.fsdp:
            return self.model
        assert self.model.spec is not None
        whole, state = model_from_spec(self.model.spec), full_state(self.model)
        if self.first:
            whole.load_state_dict(state)
        return whole

    def state(self) -> dict[str, Any]:
        """Everything that the next epoch depends on; all processes have to ask together."""
        sharded = self.settings.fsdp
        return {
            "epoch": self.epoch,
            "best": self.best,
            "model": full_state(self.model) if sharded else self.model.state_dict(),
            "optimizer": (
                full_state(self.model, self._inner) if sharded else self.optimizer.state_dict()
            ),
            "scheduler": None if self.scheduler is None else _plain_state(self.scheduler),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` gave."""
        if self.settings.fsdp:
            load_full_state(self.model, self._inner, state["model"], state["optimizer"])
        else:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.best = state["epoch"], state["best"]


class _Batches(Sampler[list[int]]):
    """This process's part of every batch."""

    def __init__(self, sampler: CyclingSampler, size: int, rank: int, world: int) -> None:
        self.sampler, self.size, self.rank, self.world = sampler, size, rank, world

    def __len__(self) -> int:
        return -(-(len(self.sampler) // self.world) // self.size)

    def __iter__(self) -> Iterator[list[int]]:
        own = list(self.sampler)[self.rank :: self.world]
        for start in range(0, len(own), self.size):
            yield own[start : start + self.size]


def _plain_state(scheduler: Any) -> dict[str, Any]:
    """Its state without functions, which the scheduler makes anew."""
    return {k: v for k, v in scheduler.state_dict().items() if not callable(v)}


def train(
    settings: TrainSettings, run: RunFolder, device: torch.device, *, resume: bool = False
) -> dict[str, Any]:
    """Train as the settings say; leave a calibrated detector in the run folder.

    The folder gets ``config.json``, ``log.jsonl`` (a line per epoch), a checkpoint after every
    epoch, ``best/`` and ``last/`` (detectors, calibrated on the held-out ID images) and
    ``metrics.json``. Several processes: start it with torchrun or ``accelerate launch``.

    Args:
        settings: What to do.
        run: Where to write.
        device: Where to compute; under torchrun each process takes its own GPU.
        resume: Continue from the run's checkpoint, if there is one; ends in the same numbers.

    Returns:
        ``validation_mAP`` of the best and the last epoch, and the thresholds.

    Raises:
        InputError: If settings and data do not fit, or the loss diverges.
    """
    if resume and run.has_checkpoint:
        check_same(asdict(settings), run.path)
    with join_processes(device) as processes:
        return _train(settings, run, processes.device, resume=resume)


def _train(
    settings: TrainSettings, run: RunFolder, device: torch.device, *, resume: bool
) -> dict[str, Any]:
    """`train`, in a process group if there are several processes."""
    parts = _Run(settings, device)
    if resume and run.has_checkpoint:
        parts.load(run.load_checkpoint())
        if parts.first:
            run.truncate_log(parts.epoch)
    elif parts.first:
        run.write_config(
            "edge-ood train",
            {
                **asdict(settings),
                "class_names": parts.class_names,
                "class_counts": parts.counts.tolist(),
            },
            distributions=["edge-ood"],
        )
    started = time.perf_counter()

    def after_epoch(epoch: int, means: dict[str, float]) -> None:
        parts.epoch = epoch + 1
        value, logits = _validate(parts)
        if value > parts.best:
            parts.best = value
            _save_detector(parts, run, "best", logits)
        state = parts.state()
        if parts.first:
            run.log(step=parts.epoch, **means, validation_mAP=value)
            run.save_checkpoint(state)

    train_edge(
        parts.trained,
        parts.pairs,
        parts.criterion,
        parts.optimizer,
        epochs=settings.epochs,
        tau=settings.tau,
        scheduler=parts.scheduler,
        start_epoch=parts.epoch,
        forward_mode=settings.forward_mode,  # type: ignore[arg-type]
        device=parts.device,
        dtype=parts.autocast_dtype,
        scaler=parts.scaler,
        accelerator=parts.accelerator,
        before_epoch=parts.before_epoch,
        after_epoch=after_epoch,
    )
    value, logits = _validate(parts)
    _save_detector(parts, run, "last", logits)
    metrics = {"validation_mAP": {"best": parts.best, "last": value}, "epochs": settings.epochs}
    if parts.first:
        seconds = time.perf_counter() - started
        run.write_metrics(metrics, timing={"training_seconds": seconds})
    return metrics


def _validate(parts: _Run) -> tuple[float, Tensor]:
    if parts.settings.fsdp:
        share_buffers(parts.model)
    out = collect(
        parts.trained,
        parts.validation_loader,
        device=parts.device,
        accelerator=parts.accelerator,
        description="validating",
    )
    present = out.targets.any(0)
    if not bool(present.any()):
        raise InputError("no held-out image has a label; raise --validation-share")
    return multilabel_map(out.logits[:, present], out.targets[:, present]), out.logits


def _save_detector(parts: _Run, run: RunFolder, name: str, logits: Tensor) -> None:
    model = parts.whole_model()
    if not parts.first:
        return
    source = parts.settings.oe if parts.settings.with_outliers else None
    folder = None if source is None else outlier_folder(source)
    detector = OODDetector(model, "joint_energy", class_names=parts.class_names)
    detector.calibrate(logits, parts.settings.recall).save(run.path / name)
    save_state(
        run.path / name / "reference.safetensors",
        {
            "logits": logits,
            "class_counts": parts.counts,
            "size": parts.settings.image_size,
            "oe": None if folder is None else str(folder),
        },
    )


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log, one an epoch.

    Examples:
        >>> folder = getfixture("tmp_path")
        >>> RunFolder(folder).log(step=1, loss=0.5)
        >>> read_log(folder)
        [{'step': 1, 'loss': 0.5}]
    """
    text = (folder / "log.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]

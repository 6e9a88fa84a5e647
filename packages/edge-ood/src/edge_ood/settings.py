"""The settings of a training run, checked before it begins."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from edge_ood.loss import check_settings
from edge_ood.presets import get_preset
from shared_core.errors import InputError

__all__ = ["LOSSES", "TrainSettings"]

LOSSES = ("edge", "conf", "gap", "bce", "focal", "asl", "db", "oe", "energy")
WITH_OUTLIERS = ("edge", "conf", "gap", "oe", "energy")


@dataclass(frozen=True)
class TrainSettings:
    """Everything a run depends on; ``config.json`` holds it.

    Attributes:
        id: ID images; see `edge_ood.sources.load_id`.
        oe: Outliers to train on; see `edge_ood.sources.load_outliers`.
        model: See `edge_ood.models.create_model`.
        pretrained: Whether the backbone begins with its library's weights.
        head_hidden: See `edge_ood.models.MultiLabelHead`.
        loss: One of `LOSSES`.
        alpha: α.
        beta: β.
        k: Size of the tail.
        margin: m.
        tau: Transform epoch.
        gap_mask: ``all`` or ``positives``.
        gather: Whether several processes form one batch for the loss.
        sync_bn: Whether BatchNorm takes its statistics over all processes.
        fsdp: Whether to shard the parameters over the processes (FSDP2) in place of DDP.
        forward_mode: ``joint`` or ``separate``.
        epochs: Passes over the ID images.
        batch_size: ID images per step, over all processes.
        oe_batch_size: OE images per step, over all processes.
        optimizer: ``sgd`` (with Nesterov), ``adam`` or ``adamw``.
        lr: Learning rate; the largest under OneCycle.
        backbone_lr: That of the backbone, if another.
        momentum: Of SGD.
        weight_decay: Weight decay.
        schedule: ``onecycle`` or ``constant``.
        image_size: Pixels per side.
        validation: Share of the ID training images held out, to choose the best epoch by mAP and to
            calibrate the threshold.
        recall: Share of held-out ID images that the threshold keeps.
        official_transforms: The crop of the authors' code.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        channels_last: Memory format of images and weights.
        compile: Whether to compile the model.
        image_column: For ``hf:`` sources.
        label_column: For ``hf:`` sources.
        workers: Processes that load images.
        seed: Of everything random.
    """

    id: str
    oe: str | None = None
    model: str = "small_cnn"
    pretrained: bool = False
    head_hidden: int | None = None
    loss: str = "edge"
    alpha: float = 1.0
    beta: float = 0.1
    k: int | float = 0.25
    margin: float = 0.0
    tau: int | float = 0.5
    gap_mask: str = "all"
    gather: bool = False
    sync_bn: bool = False
    fsdp: bool = False
    forward_mode: str = "joint"
    epochs: int = 20
    batch_size: int = 128
    oe_batch_size: int = 128
    optimizer: str = "adamw"
    lr: float = 3e-3
    backbone_lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 1e-2
    schedule: str = "onecycle"
    image_size: int = 32
    validation: float = 0.1
    recall: float = 0.95
    official_transforms: bool = False
    dtype: str = "float32"
    channels_last: bool = True
    compile: bool = False
    image_column: str = "image"
    label_column: str = "labels"
    workers: int = 0
    seed: int = 2024

    def __post_init__(self) -> None:
        for name, accepted in (
            ("loss", LOSSES),
            ("optimizer", ("sgd", "adam", "adamw")),
            ("schedule", ("onecycle", "constant")),
            ("forward_mode", ("joint", "separate")),
            ("gap_mask", ("all", "positives")),
        ):
            if getattr(self, name) not in accepted:
                raise InputError(
                    f"{name} is {getattr(self, name)!r}; accepted: {', '.join(accepted)}"
                )
        for name in ("epochs", "batch_size", "oe_batch_size", "image_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("lr", "momentum", "weight_decay"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise InputError(f"{name} is {getattr(self, name)}; it must be 0 or above")
        if not 0 < self.validation < 1 or not 0 < self.recall <= 1:
            raise InputError(
                f"validation={self.validation}, recall={self.recall}; accepted: (0, 1) and (0, 1]"
            )
        check_settings(self.alpha, self.beta, self.k, self.margin)
        if self.with_outliers and self.oe is None:
            raise InputError(f"the loss {self.loss} trains on outliers: give --oe")

    @property
    def with_outliers(self) -> bool:
        """Whether the loss reads outliers."""
        return self.loss in WITH_OUTLIERS

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> "TrainSettings":
        """The settings of a preset with `changes` that are not ``None``; the backbone pretrained.

        Raises:
            InputError: If there is no such preset, or the ID images are not given.

        Examples:
            >>> TrainSettings.from_preset("coco-r50", id="coco:data", oe="textures").lr
            0.1
        """
        preset = get_preset(name)
        known = {f.name for f in fields(cls)}
        values = {k: v for k, v in asdict(preset).items() if k in known}
        values |= {"pretrained": True, "dtype": "auto"}
        values |= {k: v for k, v in changes.items() if v is not None}
        if "id" not in values:
            raise InputError(f"{name} needs your images: --id {preset.id_kind}:FOLDER")
        return cls(**values)

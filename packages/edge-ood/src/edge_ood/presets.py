"""The settings of the papers as data: EDGE's runs, and JointEnergy's for parity."""

from dataclasses import dataclass
from typing import Any

from shared_core.errors import InputError

__all__ = ["PRESETS", "Preset", "get_preset"]


@dataclass(frozen=True)
class Preset:
    """One training run.

    Attributes:
        id_kind: Reader of the ID images: ``voc``, ``coco`` or ``nuswide``.
        model: A name of `edge_ood.models.create_model`.
        classes: Number of labels.
        loss: ``edge`` or ``bce``.
        head_hidden: Width of the hidden layer of the head; ``None`` for a linear head.
        alpha: α.
        beta: β.
        k: Size of the tail.
        margin: m.
        tau: Transform epoch, as a fraction of the epochs.
        epochs: Passes over the ID images.
        batch_size: ID images per step.
        oe_batch_size: OE images per step.
        optimizer: ``sgd``, ``adam`` or ``adamw``.
        lr: Learning rate (the largest, under OneCycle).
        backbone_lr: That of the backbone, if another.
        momentum: Of SGD, with Nesterov.
        weight_decay: Weight decay.
        schedule: ``onecycle`` or ``constant``.
        image_size: Pixels per side.
        note: Where the settings come from.
    """

    id_kind: str
    model: str
    classes: int
    loss: str = "edge"
    head_hidden: int | None = 1000
    alpha: float = 1.0
    beta: float = 0.1
    k: float = 0.25
    margin: float = 0.0
    tau: float = 0.5
    epochs: int = 100
    batch_size: int = 128
    oe_batch_size: int = 128
    optimizer: str = "sgd"
    lr: float = 0.1
    backbone_lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: str = "onecycle"
    image_size: int = 256
    note: str = "command line that the EDGE authors publish"


_JE: dict[str, Any] = {
    "loss": "bce",
    "optimizer": "adam",
    "lr": 1e-4,
    "backbone_lr": 1e-5,
    "epochs": 50,
    "batch_size": 200,
    "weight_decay": 0.0,
    "schedule": "constant",
    "note": "Wang et al., NeurIPS 2021 (JointEnergy)",
}
_SETS = {"voc": 20, "coco": 80, "nuswide": 81}

PRESETS: dict[str, Preset] = {
    **{f"{k}-r50": Preset(k, "timm:resnet50.tv_in1k", c) for k, c in _SETS.items()},
    **{
        f"{k}-densenet121": Preset(k, "timm:densenet121.tv_in1k", c, **_JE)
        for k, c in _SETS.items()
    },
    **{
        f"coco-{name}": Preset(
            "coco",
            model,
            80,
            head_hidden=None,
            optimizer="adamw",
            lr=1e-4,
            weight_decay=0.05,
            epochs=20,
            image_size=224,
            note="a modern backbone; settings of ours, not run on COCO",
        )
        for name, model in (
            ("vit-b16", "timm:vit_base_patch16_224.augreg_in21k_ft_in1k"),
            ("convnext-tiny", "timm:convnext_tiny.fb_in22k_ft_in1k"),
            ("hf-r50", "hf:microsoft/resnet-50"),
        )
    },
}


def get_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        InputError: If there is none.

    Examples:
        >>> get_preset("coco-r50").k
        0.25
    """
    if name not in PRESETS:
        raise InputError(f"no preset is called {name!r}; accepted: {', '.join(PRESETS)}")
    return PRESETS[name]

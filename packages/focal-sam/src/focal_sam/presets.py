"""The paper's own settings as data: the eight runs of Focal-SAM, and what is reported of them.

Settings are those of the authors' training scripts (Li et al., "Focal-SAM: Focal Sharpness-Aware
Minimization for Long-Tailed Classification", ICML 2025): logit-adjusted loss, SGD with momentum,
learning rate annealed to 0 by a cosine, seed 0. CIFAR-LT is cut from CIFAR with the exponential
profile; the images of ImageNet-LT and iNaturalist 2018 are the user's own, with the usual text
files of ``path label`` lines (`focal_sam.data.read_image_list`).

Reported figures are incomplete: they were recovered from indexes of the paper's results and from
one of its figures, not from its tables, and each carries its caveat.
"""

from dataclasses import asdict, dataclass
from typing import Any

from shared_core.errors import InputError

__all__ = ["PRESETS", "Preset", "ReportedResult", "get_preset", "shot_thresholds"]

IMAGE_LISTS = 'user-supplied images with "path label" text files'
BASE_LOSS_UNKNOWN = "the base loss and trainer behind this value are not stated where it was found"
READ_BY_EYE = "read by eye from Figure 1b, best setting shown there; approximate"

# (few, many) by data set and imbalance ratio. Classes with fewer than `few` training samples are
# few-shot, those with more than `many` are many-shot.
_SHOTS: dict[str, dict[int | None, tuple[int, int]]] = {
    "CIFAR-10-LT": {10: (835, 2319), 50: (200, 1500), 100: (200, 1000), 200: (100, 800)},
    "CIFAR-100-LT": {10: (99, 265), 50: (20, 100), 100: (20, 100), 200: (10, 60)},
    "ImageNet-LT": {None: (20, 100)},
    "iNaturalist 2018": {None: (20, 100)},
}


def shot_thresholds(dataset: str, imbalance_ratio: int | float | None = None) -> tuple[int, int]:
    """The edges of the few- and many-shot groups that Focal-SAM was evaluated with.

    Args:
        dataset: ``CIFAR-10-LT``, ``CIFAR-100-LT``, ``ImageNet-LT`` or ``iNaturalist 2018``.
        imbalance_ratio: Of a CIFAR-LT data set: 10, 50, 100 or 200.

    Returns:
        ``(few, many)``: classes with fewer than `few` training samples are few-shot, those with
        more than `many` are many-shot.

    Raises:
        InputError: If there are no edges for this data set and ratio.

    Examples:
        >>> shot_thresholds("CIFAR-10-LT", 50)
        (200, 1500)
    """
    if dataset not in _SHOTS:
        raise InputError(f"no data set is called {dataset!r}; accepted: {', '.join(_SHOTS)}")
    edges = _SHOTS[dataset]
    for ratio, shots in edges.items():
        if ratio == imbalance_ratio:
            return shots
    accepted = ", ".join(str(ratio) for ratio in edges)
    raise InputError(
        f"{dataset} has no published group edges for the imbalance ratio {imbalance_ratio}; "
        f"accepted: {accepted}; or choose edges for focal_sam.metrics.shot_groups yourself"
    )


@dataclass(frozen=True)
class ReportedResult:
    """A figure that the paper reports.

    Attributes:
        method: The training method.
        top1: Top-1 accuracy on the balanced test set, in percent.
        caveat: What is not known about the figure.
        imbalance_ratio: Of the CIFAR-LT training set; None where the data set has only one.
        images_per_second: Training speed on the authors' machine, where it is known.
    """

    method: str
    top1: float
    caveat: str
    imbalance_ratio: int | None = None
    images_per_second: float | None = None


@dataclass(frozen=True)
class Preset:
    """The settings of one run.

    Attributes:
        name: What the command line calls it.
        dataset: The data set, by the name the literature has for it.
        source: Hub id of the data set, or what the user has to supply.
        num_classes: Number of classes.
        imbalance_ratio: Most frequent / rarest class of the training set cut from a balanced one
            (exponential profile); None where the data set is long-tailed as it is.
        model: A name for `focal_sam.models.create_model`.
        transform: A name for `focal_sam.transforms.image_transform`.
        few_below: Classes with fewer training samples are few-shot.
        many_above: Classes with more training samples are many-shot.
        rho: Radius ρ of the perturbation.
        gamma: Focal exponent γ.
        lam: Sharpness weight λ. At 1.1 some samples have a negative plain weight; that is meant.
        lr: Learning rate at the start.
        weight_decay: Weight decay, applied at the unperturbed weights.
        batch_size: Images per step.
        epochs: Passes over the training set.
        rho_late: Radius in the late epochs, for the step schedule of ρ; None keeps `rho`.
        rho_late_from: The fraction of the epochs after which ρ is `rho_late`: from the epoch
            (counted from 1) on that reaches it.
        loss: The base loss: ``la``, `focal_sam.losses.LogitAdjustedLoss` with ``tau=1``.
        optimizer: ``sgd``.
        momentum: Of SGD.
        lr_schedule: ``cosine``: annealed to 0 over the epochs.
        amp: Mixed precision over float32 weights. (The authors' CLIP scripts have float16
            weights instead, but for iNaturalist.)
        seed: Of the subset and the training.
        reported: What the paper reports for the data set and the model.

    Examples:
        >>> get_preset("cifar10lt-resnet32").gamma
        3.0
    """

    name: str
    dataset: str
    source: str
    num_classes: int
    imbalance_ratio: int | None
    model: str
    transform: str
    few_below: int
    many_above: int
    rho: float
    gamma: float
    lam: float
    lr: float
    weight_decay: float
    batch_size: int
    epochs: int
    rho_late: float | None = None
    rho_late_from: float = 0.8
    loss: str = "la"
    optimizer: str = "sgd"
    momentum: float = 0.9
    lr_schedule: str = "cosine"
    amp: bool = False
    seed: int = 0
    reported: tuple[ReportedResult, ...] = ()

    def describe(self) -> dict[str, Any]:
        """All settings as a dictionary that `json` can write.

        Examples:
            >>> get_preset("imagenetlt-resnet50").describe()["rho_late"]
            0.2
        """
        return {**asdict(self), "reported": [asdict(result) for result in self.reported]}


def get_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        InputError: If there is none; the message lists the names.

    Examples:
        >>> get_preset("cifar100lt-clip").dataset
        'CIFAR-100-LT'
    """
    if name not in PRESETS:
        raise InputError(f"no preset is called {name!r}; accepted: {', '.join(PRESETS)}")
    return PRESETS[name]


def _preset(name: str, dataset: str, imbalance_ratio: int | None = None, **settings: Any) -> Preset:
    source, num_classes = {
        "CIFAR-10-LT": ("uoft-cs/cifar10", 10),
        "CIFAR-100-LT": ("uoft-cs/cifar100", 100),
        "ImageNet-LT": (IMAGE_LISTS, 1000),
        "iNaturalist 2018": (IMAGE_LISTS, 8142),
    }[dataset]
    few_below, many_above = shot_thresholds(dataset, imbalance_ratio)
    return Preset(
        name=name,
        dataset=dataset,
        source=source,
        num_classes=num_classes,
        imbalance_ratio=imbalance_ratio,
        few_below=few_below,
        many_above=many_above,
        **settings,
    )


def _listed(top1: float, imbalance_ratio: int | None = None) -> ReportedResult:
    return ReportedResult("Focal-SAM", top1, BASE_LOSS_UNKNOWN, imbalance_ratio)


def _plotted(
    method: str, top1: float, images_per_second: float, imbalance_ratio: int | None = None
) -> ReportedResult:
    return ReportedResult(method, top1, READ_BY_EYE, imbalance_ratio, images_per_second)


_CLIP: dict[str, Any] = {
    "model": "clip-vit-b16",
    "transform": "clip",
    "lr": 0.01,
    "weight_decay": 5e-4,
    "batch_size": 128,
    "epochs": 20,
}

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        _preset(
            "cifar10lt-resnet32",
            "CIFAR-10-LT",
            imbalance_ratio=100,
            model="resnet32",
            transform="cifar",
            rho=0.2,
            gamma=3.0,
            lam=0.5,
            lr=0.1,
            weight_decay=2e-4,
            batch_size=64,
            epochs=200,
            reported=(
                _listed(71.7, imbalance_ratio=200),
                _listed(77.2, imbalance_ratio=100),
                _listed(82.0, imbalance_ratio=50),
                _plotted("CC-SAM", 82.5, 1070.0),
                _plotted("Focal-SAM", 83.0, 1620.0),
            ),
        ),
        _preset(
            "cifar100lt-resnet32",
            "CIFAR-100-LT",
            imbalance_ratio=100,
            model="resnet32",
            transform="cifar",
            rho=0.3,
            gamma=3.2,
            lam=0.8,
            lr=0.1,
            weight_decay=1e-3,
            batch_size=64,
            epochs=200,
            reported=(
                _listed(44.0, imbalance_ratio=100),
                _listed(48.1, imbalance_ratio=50),
                _plotted("CC-SAM", 50.0, 550.0),
                _plotted("Focal-SAM", 50.6, 1620.0),
            ),
        ),
        _preset(
            "imagenetlt-resnet50",
            "ImageNet-LT",
            model="resnet50",
            transform="imagenet-lt",
            rho=0.1,
            rho_late=0.2,
            gamma=0.8,
            lam=0.8,
            lr=0.1,
            weight_decay=5e-4,
            batch_size=256,
            epochs=200,
            reported=(
                _listed(54.3),
                _plotted("CC-SAM", 52.4, 75.0),
                _plotted("Focal-SAM", 54.3, 400.0),
            ),
        ),
        _preset(
            "inat2018-resnet50",
            "iNaturalist 2018",
            model="resnet50",
            transform="inat2018",
            rho=0.2,
            gamma=2.0,
            lam=1.1,
            lr=0.2,
            weight_decay=2e-4,
            batch_size=512,
            epochs=200,
            reported=(
                _listed(71.8),
                _plotted("CC-SAM", 71.0, 40.0),
                _plotted("Focal-SAM", 71.8, 410.0),
            ),
        ),
        _preset(
            "cifar10lt-clip",
            "CIFAR-10-LT",
            imbalance_ratio=100,
            rho=0.05,
            gamma=1.5,
            lam=0.7,
            amp=True,
            **_CLIP,
        ),
        _preset(
            "cifar100lt-clip",
            "CIFAR-100-LT",
            imbalance_ratio=100,
            rho=0.05,
            gamma=5.5,
            lam=0.8,
            amp=True,
            **_CLIP,
        ),
        _preset("imagenetlt-clip", "ImageNet-LT", rho=0.05, gamma=0.5, lam=0.8, amp=True, **_CLIP),
        _preset("inat2018-clip", "iNaturalist 2018", rho=0.02, gamma=0.2, lam=1.0, **_CLIP),
    )
}
"""The presets by name."""

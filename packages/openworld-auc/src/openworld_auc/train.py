"""Training of prompts on cached image features: the tower is frozen, so each image is seen once.

Under ``torchrun`` several processes share out images while features are
computed, and prompts while they are tuned; one of them writes.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from openworld_auc import _parallel as parallel
from openworld_auc.gmop import GMoP
from openworld_auc.report import OpenworldReport, openworld_report
from shared_core.device import autocast, select_dtype
from shared_core.errors import InputError
from shared_core.parallel import is_first
from shared_core.run import RunFolder, load_state, progress, save_state

__all__ = ["GMoPTrainer", "TrainConfig", "extract_features"]

Features = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class TrainConfig:
    """The recipe; the defaults are the published one's.

    Attributes:
        lr: Learning rate of SGD.
        lr_detector: That of the detectors; by default the same.
        momentum: Of SGD.
        weight_decay: Of SGD.
        epochs: Passes over the training images; the last one counts, there is no early stopping.
        t_max: Length of the cosine in epochs; by default `epochs`.
        batch_size: Images a step; the last partial batch is kept.
        seed: Of the order of images.
        detectors_per_step: Detectors that a step trains, in turns; by default all K. An
            approximation for many classes, which leaves a detector fewer steps.
        dtype: ``float32``, or ``bfloat16`` or ``float16`` for the text tower under autocast;
            softmax, losses and contexts stay float32. ``auto``: bfloat16 on a GPU that has it.
    """

    lr: float = 0.002
    lr_detector: float | None = None
    momentum: float = 0.0
    weight_decay: float = 0.0
    epochs: int = 40
    t_max: int | None = None
    batch_size: int = 32
    seed: int = 0
    detectors_per_step: int | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or not self.lr > 0:
            raise InputError(
                f"epochs={self.epochs}, batch_size={self.batch_size}, lr={self.lr}; accepted: at "
                "least one epoch, one image a step, and a positive learning rate"
            )
        if self.detectors_per_step is not None and self.detectors_per_step < 1:
            raise InputError(
                f"detectors_per_step is {self.detectors_per_step}; accepted: 1 or more"
            )


@torch.no_grad()
def extract_features(
    backbone: Any,
    data: Any,
    *,
    batch_size: int = 64,
    cache: Path | None = None,
    workers: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Features:
    """Image features and labels of a data set, from a cache where it holds them.

    With torch.distributed each process encodes its share of the images, and all receive all.

    Args:
        backbone: A `ClipBackbone`.
        data: Items are ``(image tensor, label)``.
        batch_size: Images at a time.
        cache: Folder of cached features. A file is named by the backbone's weights, the labels,
            `dtype` and the images: all their values, or, where `data` has ``stamps()``, names,
            sizes and times of the files and the values of one image.
        workers: Processes that load images.
        dtype: Of the image tower under autocast; features are float32.

    Returns:
        Features [n, D] and labels [n], on the CPU.

    Raises:
        InputError: If there are no images, or a cached file is damaged.
    """
    if len(data) == 0:
        raise InputError("there are no images to extract features from")
    device = backbone.scale.device
    path = None
    if cache is not None:
        # One process reads all images for it; the others are told.
        digest = _fingerprint(backbone, data, dtype) if is_first() else None
        digest = parallel.from_first(digest, torch.zeros(12, dtype=torch.uint8, device=device))
        path = cache / f"features-{bytes(digest.tolist()).hex()}.safetensors"
        if parallel.all_true(path.is_file(), device):
            kept = load_state(path)
            return kept["features"], kept["labels"]
    own = parallel.share(len(data))
    part = Subset(data, range(own.start, own.stop))
    loader: Any = DataLoader(part, batch_size=batch_size, num_workers=workers)
    if is_first():
        loader = progress(loader, description="image features", unit="batch")
    features, labels = [], []
    for images, label in loader:
        with autocast(device, dtype):
            features.append(backbone.encode_image(images.to(device)))
        labels.append(torch.as_tensor(label))
    whole = torch.cat(features), torch.cat(labels).to(device)
    result = parallel.gather(whole[0], len(data)).cpu(), parallel.gather(whole[1], len(data)).cpu()
    if path is not None and is_first():
        save_state(path, {"features": result[0], "labels": result[1]})
    return result


def _fingerprint(backbone: Any, data: Any, dtype: torch.dtype) -> Tensor:
    digest = hashlib.sha256(str(dtype).encode())
    for name, tensor in sorted(backbone.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    labels = getattr(data, "targets", None)
    digest.update(repr((len(data), None if labels is None else list(labels))).encode())
    stamps = data.stamps() if hasattr(data, "stamps") else None
    digest.update(repr(stamps).encode())
    # Files tell by their stamps whether they changed; one image tells whether the transform did.
    for index in range(len(data) if stamps is None else 1):
        digest.update(data[index][0].contiguous().numpy().tobytes())
    return torch.tensor(list(digest.digest()[:12]), dtype=torch.uint8)


class GMoPTrainer:
    """Trains the prompts of a `GMoP` with SGD and a cosine per epoch, and evaluates it.

    Args:
        model: The model; its contexts are trained in place.
        train: Features and labels of base-class images from `extract_features`.
        config: The recipe.
        run: Where to log and to save a checkpoint after each epoch.
        resume: Continue the run found there; it ends in the same numbers.

    Raises:
        InputError: If there is nothing to train on or to train, or labels are out of range.
    """

    def __init__(
        self,
        model: GMoP,
        train: tuple[Float[Tensor, "n D"], Int[Tensor, " n"]],
        *,
        config: TrainConfig | None = None,
        run: RunFolder | None = None,
        resume: bool = False,
    ) -> None:
        self.model = model
        self.features, self.labels = train
        self.config = config or TrainConfig()
        self.run = run
        self.resume = resume
        if len(self.features) == 0 or len(self.features) != len(self.labels):
            raise InputError(
                f"there are {len(self.features)} features and {len(self.labels)} labels; accepted: "
                "one label per feature, and at least one"
            )
        if int(self.labels.min()) < 0 or int(self.labels.max()) >= len(model.base_classes):
            raise InputError(
                f"labels reach from {int(self.labels.min())} to {int(self.labels.max())}; accepted:"
                f" 0 to {len(model.base_classes) - 1}, one for each base class"
            )
        if not self.features.isfinite().all():
            raise InputError("image features hold NaN or infinities; look for bad images")
        few = self.config.detectors_per_step
        if few is not None and model.partition and few > len(model.partition):
            raise InputError(
                f"detectors_per_step is {few}; accepted: up to k = {len(model.partition)}"
            )

    def fit(
        self, on_epoch: Callable[[dict[str, float]], None] | None = None
    ) -> list[dict[str, float]]:
        """Train, and give the mean losses of each epoch.

        With torch.distributed all processes call this with the
        same model and features; they share out the prompts of each step and end in the same
        contexts. A `run` is then a folder that all of them see; the first one writes.

        Args:
            on_epoch: Called with each epoch's record.
        """
        config, model = self.config, self.model
        lr_detector = config.lr if config.lr_detector is None else config.lr_detector
        prompts: dict[str, Any] = {"params": list(model.classifier.parameters()), "lr": config.lr}
        groups = [prompts]
        if len(model.detectors):
            groups.append({"params": list(model.detectors.parameters()), "lr": lr_detector})
        optimizer = torch.optim.SGD(
            groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, config.t_max or config.epochs
        )
        device = model.backbone.scale.device
        dtype = select_dtype(config.dtype, device)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        generator = torch.Generator().manual_seed(config.seed)
        history: list[dict[str, float]] = []
        settings = {"train": asdict(config), "model": asdict(model.config), "n": len(self.labels)}
        if self.run is not None and self.resume and self.run.has_checkpoint:
            state = self.run.load_checkpoint()
            if state["settings"] != settings:
                raise InputError(
                    f"{self.run.path} was trained with other settings or data; --resume continues "
                    "a run as it was begun"
                )
            model.load_contexts(state["contexts"])
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
            scaler.load_state_dict(state["scaler"])
            generator.set_state(state["generator"])
            history = state["history"]
        features, labels = self.features.to(device), self.labels.to(device)
        writes = self.run if is_first() else None
        if writes is not None:
            writes.truncate_log(len(history))
        epochs: Iterable[int] = range(len(history), config.epochs)
        if is_first():
            epochs = progress(epochs, description="tuning prompts", unit="epoch")
        for epoch in epochs:
            model.train()
            order = torch.randperm(len(labels), generator=generator).to(device)
            sums: dict[str, Tensor] = {}
            for number, chosen in enumerate(torch.split(order, config.batch_size)):
                turn = self._turn(epoch * -(-len(labels) // config.batch_size) + number)
                with autocast(device, dtype):
                    parts = model.loss(features[chosen], labels[chosen], detectors=turn, split=True)
                optimizer.zero_grad()
                scaler.scale(parts["total"]).backward()  # type: ignore[no-untyped-call]
                parallel.sum_gradients(p for group in groups for p in group["params"])
                scaler.step(optimizer)
                scaler.update()
                for name, value in parts.items():
                    sums[name] = sums.get(name, 0) + value.detach() * len(chosen)
            schedule.step()
            record = {name: float(value) / len(labels) for name, value in sums.items()}
            history.append(record)
            if writes is not None:
                writes.log(step=epoch + 1, **record)
                writes.save_checkpoint(
                    {
                        "settings": settings,
                        "contexts": model.contexts(),
                        "optimizer": optimizer.state_dict(),
                        "schedule": _plain(schedule.state_dict()),
                        "scaler": scaler.state_dict(),
                        "generator": generator.get_state(),
                        "history": history,
                    }
                )
            if on_epoch is not None:
                on_epoch(record)
        model.eval()
        return history

    def _turn(self, step: int) -> list[int] | None:
        """The detectors of a step, if not all of them."""
        few, k = self.config.detectors_per_step, len(self.model.partition)
        if few is None or k == 0:
            return None
        return [(step * few + i) % k for i in range(few)]

    def evaluate(self, base: Features, new: Features, **options: Any) -> OpenworldReport:
        """OpenworldAUC and companions on features of base and new test images.

        Args:
            base: Features and labels among the base classes.
            new: Features and labels among the new classes.
            options: Of `openworld_auc.openworld_report`.

        Raises:
            InputError: If the model has not been told the new classes, or a side is empty.
        """
        return openworld_report(*evaluation(self.model, base, new), **options)


def evaluation(model: GMoP, base: Features, new: Features) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, correctness within the own domain, and domain of test images.

    Args:
        model: With new classes set.
        base: Features and labels among the base classes.
        new: Features and labels among the new classes.
    """
    if not model.new_classes:
        raise InputError("there are no new classes yet; name them with set_classes(new=[...])")
    model.eval()
    device = model.backbone.scale.device
    count = len(base[1])
    output = model(features=torch.cat([base[0], new[0]]).to(device))
    right = [
        output.base_logits[:count].argmax(1).cpu() == base[1],
        output.new_logits[count:].argmax(1).cpu() == new[1],
    ]
    scores = output.base_score.cpu()
    return scores, torch.cat(right), torch.arange(len(scores)) < count


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's state without callables, which a checkpoint cannot hold."""
    kept = (type(None), bool, int, float, str, list)
    return {k: v for k, v in state.items() if isinstance(v, kept)}

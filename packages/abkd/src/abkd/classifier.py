"""Distilling image classifiers: the loop over epochs with accelerate, and a run in a folder."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from abkd.presets import Preset
from abkd.vision import DistillationLoss
from shared_core.errors import InputError
from shared_core.run import RunFolder, atomic_path, progress, to_plain

__all__ = ["VisionSettings", "distill_classifier", "fit", "load_weights", "train_classifier"]


@dataclass(frozen=True)
class VisionSettings:
    """A distillation of classifiers; all of it is written to ``config.json``.

    Args:
        student: A name of `abkd.cifar.create_classifier`.
        teacher: Likewise; ``None`` trains the student by its labels alone, which makes a teacher.
        data: ``digits``, ``shapes``, a folder or file of images, or a hub id.
        teacher_weights: A safetensors file, or a state dict of torch.
        label_column: The column of labels, if it is not clear.
        criterion: ``ab``, ``kd``, ``dkd``, ``lsd`` or ``ttm``; see `abkd.vision.DistillationLoss`.
        alpha: α.
        beta: β.
        temperature: T, if not the criterion's own.
        kd_weight: λ, likewise.
        ce_weight: Likewise.
        lr: Learning rate of SGD.
        momentum: Of SGD.
        weight_decay: Of SGD.
        milestones: Epochs after which the rate is multiplied by `gamma`.
        gamma: That factor.
        batch_size: Images of a step.
        epochs: Passes over the data.
        augment: Random crops (4 pixels of padding) and flips.
        seed: Of weights, order and augmentation.
    """

    student: str
    teacher: str | None
    data: str
    teacher_weights: str | None = None
    label_column: str | None = None
    criterion: str = "ab"
    alpha: float = 0.8
    beta: float = 0.3
    temperature: float | None = None
    kd_weight: float | None = None
    ce_weight: float | None = None
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    milestones: tuple[int, ...] = (150, 180, 210)
    gamma: float = 0.1
    batch_size: int = 64
    epochs: int = 240
    augment: bool = False
    seed: int = 0

    @classmethod
    def from_preset(cls, preset: Preset, **changes: Any) -> "VisionSettings":
        """The settings of a vision preset, with changes.

        Examples:
            >>> from abkd.presets import get_preset
            >>> VisionSettings.from_preset(get_preset("cifar100-resnet56-resnet20")).kd_weight
            32.0
        """
        more = preset.more
        settings = cls(
            preset.student,
            preset.teacher,
            preset.data,
            label_column=more.get("label_column"),
            criterion=preset.criterion,
            alpha=preset.alpha,
            beta=preset.beta,
            temperature=preset.temperature,
            kd_weight=preset.kd_weight,
            ce_weight=preset.ce_weight,
            lr=preset.lr,
            momentum=more["momentum"],
            weight_decay=more["weight_decay"],
            milestones=tuple(more["steps"]),
            gamma=more["gamma"],
            batch_size=preset.batch_size,
            epochs=preset.epochs,
            augment=True,
        )
        return replace(settings, **changes)


def fit(
    kept: nn.Module,
    loss_of: Callable[[Any, int], Tensor],
    loader: Any,
    optimizer: Any,
    scheduler: Any,
    epochs: int,
    *,
    accelerator: Any,
    modules: Iterable[nn.Module],
    evaluate: Callable[[], dict[str, float]],
    seed: int = 0,
    run: RunFolder | None = None,
    resume: bool = False,
    settings: Any = None,
) -> list[dict[str, int | float]]:
    """Train for some epochs, with a checkpoint after each; a resumed run ends in the same numbers.

    Args:
        kept: What is saved and restored.
        loss_of: ``(batch, epoch) -> loss``; epochs count from 1.
        loader: Of batches, prepared by the accelerator.
        optimizer: Likewise.
        scheduler: Stepped once an epoch.
        epochs: How many.
        accelerator: An ``accelerate.Accelerator``.
        modules: What is put in training mode at the start of each epoch.
        evaluate: Called after each epoch.
        seed: With the epoch's number it seeds each epoch.
        run: Where checkpoints and log lines go.
        resume: Go on from the checkpoint there.
        settings: Written into the checkpoint, and compared with it on resume.

    Returns:
        For each epoch its number, loss and what `evaluate` said.

    Raises:
        InputError: If the checkpoint is damaged or is one of other settings.
    """
    history: list[dict[str, int | float]] = []
    modules = list(modules)
    if run is not None and resume and run.has_checkpoint:
        state = run.load_checkpoint()
        if state["settings"] != to_plain(settings):
            raise InputError(
                f"--resume, but the run in {run.path} has other settings (its config.json); give "
                "the same, or choose another --out"
            )
        kept.load_state_dict(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        history = state["history"]
        if accelerator.is_main_process:
            run.truncate_log(len(history))
    epochs_left = range(len(history) + 1, epochs + 1)
    for epoch in progress(epochs_left, description="training", unit="epoch"):
        torch.manual_seed(seed * 100_003 + epoch)
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        for module in modules:
            module.train()
        total, count = torch.zeros((), device=accelerator.device), 0
        for batch in loader:
            loss = loss_of(batch, epoch)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            total, count = total + loss.detach(), count + 1
        scheduler.step()
        line = {"step": epoch, "loss": float(total) / max(count, 1), **evaluate()}
        history.append(line)
        if run is not None and accelerator.is_main_process:
            run.log(**line)
            run.save_checkpoint(
                {
                    "settings": to_plain(settings),
                    "weights": kept.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scheduler": scheduler.state_dict(),
                    "history": history,
                }
            )
    return history


def distill_classifier(
    student: nn.Module,
    teacher: nn.Module | None,
    train_loader: Any,
    test_loader: Any,
    criterion: DistillationLoss | None = None,
    *,
    epochs: int = 240,
    lr: float = 0.05,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    milestones: Iterable[int] = (150, 180, 210),
    gamma: float = 0.1,
    augment: Callable[[Tensor], Tensor] | None = None,
    cpu: bool = False,
    seed: int = 0,
    run: RunFolder | None = None,
    resume: bool = False,
    settings: Any = None,
) -> dict[str, Any]:
    """Train a student classifier on labels and a teacher, with the paper's schedule as default.

    Args:
        student: Images ``[B, …]`` to logits ``[B, C]``.
        teacher: Likewise; ``None`` trains on the labels alone. Put in eval mode; gets no gradient.
        train_loader: Batches ``(images, labels)``.
        test_loader: Likewise.
        criterion: By default `DistillationLoss()`: (0.8, 0.3), T = 4, λ = 32.
        epochs: Passes over the data.
        lr: Of SGD.
        momentum: Of SGD.
        weight_decay: Of SGD.
        milestones: Epochs after which the rate is multiplied by `gamma`.
        gamma: That factor.
        augment: Applied to each batch of training images.
        cpu: Keep to the CPU.
        seed: See `fit`, as all below.
        run: Where checkpoints go.
        resume: Go on from there.
        settings: Compared on resume.

    Returns:
        ``last`` and ``best`` test accuracy in percent (the paper reports the best, which picks the
        epoch on the test set; the last is the honest one), ``best_epoch`` and ``history``.

    Examples:
        >>> x, y = torch.randn(16, 4), torch.arange(16) % 2
        >>> loader = DataLoader(TensorDataset(x, y), batch_size=8)
        >>> nets = nn.Linear(4, 2), nn.Linear(4, 2)
        >>> found = distill_classifier(*nets, loader, loader, epochs=2, cpu=True)
        >>> len(found["history"]), found["best"] >= found["last"]
        (2, True)
    """
    from accelerate import Accelerator

    criterion = criterion or DistillationLoss()
    accelerator = Accelerator(cpu=cpu)
    if teacher is not None:
        teacher = teacher.to(accelerator.device).requires_grad_(False).eval()
    optimizer = torch.optim.SGD(
        student.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay
    )
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(milestones), gamma)
    model, ready, train_loader, test_loader = accelerator.prepare(
        student, optimizer, train_loader, test_loader
    )

    def loss_of(batch: Any, epoch: int) -> Tensor:
        images, labels = batch
        if augment is not None:
            images = augment(images)
        logits = model(images)
        if teacher is None:
            return F.cross_entropy(logits.float(), labels)
        with torch.no_grad():
            theirs = teacher(images)
        criterion.epoch = epoch
        loss: Tensor = criterion(logits, theirs, labels)
        return loss

    def accuracy() -> dict[str, float]:
        model.eval()
        right, count = 0, 0
        with torch.no_grad():
            for images, labels in test_loader:
                found = accelerator.gather_for_metrics((model(images).argmax(-1), labels))
                right += int((found[0] == found[1]).sum())
                count += len(found[1])
        return {"accuracy": 100 * right / max(count, 1)}

    history = fit(
        accelerator.unwrap_model(model), loss_of, train_loader, ready, scheduler, epochs,
        accelerator=accelerator, modules=[model], evaluate=accuracy, seed=seed, run=run,
        resume=resume, settings=settings,
    )  # fmt: skip
    scores = [line["accuracy"] for line in history]
    best = max(range(len(scores)), key=scores.__getitem__)
    return {
        "last": scores[-1],
        "best": scores[best],
        "best_epoch": best + 1,
        "history": history,
    }


def crop_and_flip(images: Tensor) -> Tensor:
    """A random crop out of 4 pixels of padding and a random flip, each image its own."""
    count, _, height, width = images.shape
    padded = F.pad(images, (4, 4, 4, 4))
    top, left = torch.randint(0, 9, (2, count, 1), device=images.device)
    rows = (top + torch.arange(height, device=images.device))[:, :, None]
    columns = left + torch.arange(width, device=images.device)
    flipped = torch.rand(count, 1, device=images.device) < 0.5
    columns = torch.where(flipped, columns.flip(-1), columns)[:, None, :]
    at = torch.arange(count, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[at, rows, columns].permute(0, 3, 1, 2)


def load_weights(model: nn.Module, path: str) -> None:
    """Load a safetensors file, or a state dict of torch (also one under ``model``).

    Raises:
        InputError: If the file is missing, damaged, or does not fit the model.
    """
    from pickle import UnpicklingError

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise InputError(f"there are no weights at {path}")
    try:
        if path.endswith(".safetensors"):
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = state.get("model", state)
        model.load_state_dict(state)
    except (SafetensorError, UnpicklingError, OSError, RuntimeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{path} does not hold weights of this network: {reason}") from error


def _tensors(data: str, split: str, label_column: str | None) -> tuple[Tensor, Tensor, list[str]]:
    """All images of a split, in [0, 1]."""
    import numpy as np

    from shared_core.data.loading import load_images

    images = load_images(data, split=split, label_column=label_column)
    arrays = [np.asarray(images[i][0]) for i in range(len(images))]
    sizes = {a.shape for a in arrays}
    if len(sizes) != 1:
        raise InputError(f"{data} has images of {len(sizes)} sizes; make them one size before")
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float().div_(255)
    return pixels.contiguous(), torch.tensor(images.targets), images.class_names


def train_classifier(
    settings: VisionSettings, out: Path, device: str = "auto", *, resume: bool = False
) -> dict[str, Any]:
    """Run a distillation of classifiers and leave the student in ``out/student.safetensors``.

    Raises:
        InputError: If something cannot be loaded, or the folder holds another run.
    """
    from safetensors.torch import save_file

    from abkd.cifar import create_classifier

    if settings.teacher is not None and settings.teacher_weights is None:
        raise InputError(
            "the teacher has random weights: pass --teacher-weights FILE; abkd train --task vision "
            "--student NAME without a teacher makes such a file"
        )
    criterion = DistillationLoss(
        settings.criterion, settings.alpha, settings.beta, temperature=settings.temperature,
        kd_weight=settings.kd_weight, ce_weight=settings.ce_weight,
    )  # fmt: skip
    run = RunFolder(out, resume=resume)
    x, y, names = _tensors(settings.data, "train", settings.label_column)
    test_x, test_y, _ = _tensors(settings.data, "test", settings.label_column)
    mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True).clamp(min=1e-3)
    torch.manual_seed(settings.seed)
    student = create_classifier(settings.student, len(names))
    teacher = None
    if settings.teacher is not None and settings.teacher_weights is not None:
        teacher = create_classifier(settings.teacher, len(names))
        load_weights(teacher, settings.teacher_weights)
    run.write_config("abkd train", asdict(settings), distributions=["abkd", "accelerate"])
    loaders = [
        DataLoader(
            TensorDataset((images - mean) / std, labels),
            batch_size=settings.batch_size,
            shuffle=shuffle,
        )
        for images, labels, shuffle in ((x, y, True), (test_x, test_y, False))
    ]
    metrics = distill_classifier(
        student, teacher, loaders[0], loaders[1], criterion, epochs=settings.epochs, lr=settings.lr,
        momentum=settings.momentum, weight_decay=settings.weight_decay,
        milestones=settings.milestones, gamma=settings.gamma,
        augment=crop_and_flip if settings.augment else None, cpu=device == "cpu",
        seed=settings.seed, run=run, resume=resume, settings=asdict(settings),
    )  # fmt: skip
    with atomic_path(out / "student.safetensors") as temporary:
        state = {k: v.detach().cpu().contiguous() for k, v in student.state_dict().items()}
        save_file(state, temporary)
    run.write_metrics(metrics)
    return metrics

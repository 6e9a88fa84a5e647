"""The training loop, plain or under accelerate, and the collection of outputs."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from edge_ood.energy import joint_energy
from edge_ood.loss import EdgeLoss, EdgeSchedule
from edge_ood.models import paired_forward
from shared_core.device import autocast
from shared_core.errors import InputError
from shared_core.run import progress

__all__ = ["Outputs", "collect", "train_edge"]

EpochEnd = Callable[[int, dict[str, float]], None]


def train_edge(
    model: nn.Module,
    pairs: Iterable[Any],
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    tau: int | float = 0.5,
    scheduler: Any = None,
    start_epoch: int = 0,
    forward_mode: Literal["joint", "separate"] = "joint",
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    scaler: torch.amp.GradScaler | None = None,
    accelerator: Any = None,
    before_epoch: Callable[[int], None] | None = None,
    after_epoch: EpochEnd | None = None,
) -> list[dict[str, float]]:
    """Train with EDGE, or with a loss that it is compared with.

    Args:
        model: Maps inputs to logits. With an accelerator, prepared by it, as is the optimizer.
        pairs: Gives ``(x_id, y, x_oe)``, or ``(x_id, y)`` without outliers, once an epoch; see
            `edge_ood.PairedLoader`.
        criterion: An `EdgeLoss`; a loss of ID logits, targets and OE logits
            (`edge_ood.losses`); or, for batches without outliers, one of logits and targets.
        optimizer: Steps once a batch.
        epochs: All epochs of the training, also those before `start_epoch`.
        tau: Transform epoch of the gap; see `EdgeSchedule`.
        scheduler: Steps once a batch too.
        start_epoch: The epoch to begin with, after a resume.
        forward_mode: See `edge_ood.models.paired_forward`.
        device: Where batches are sent; by default where the model is.
        dtype: bfloat16 or float16 turn autocast on (without an accelerator, which has its own).
        scaler: Of gradients, for float16.
        accelerator: Of accelerate; does the backward pass and knows the processes.
        before_epoch: Called with the epoch.
        after_epoch: Called with the epoch and its means.

    Returns:
        For each epoch the means of ``loss``, ``l_id``, ``l_conf``, ``l_gap``, ``energy_id`` and,
        with outliers, ``energy_oe``.

    Raises:
        InputError: If the loss is not finite at the end of an epoch.

    Examples:
        >>> model = nn.Linear(3, 2)
        >>> pairs = [(torch.zeros(4, 3), torch.ones(4, 2), torch.ones(4, 3))]
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> history = train_edge(model, pairs, EdgeLoss(), optimizer, epochs=2)
        >>> [epoch["l_gap"] > 0 for epoch in history][0]
        False
    """
    device = device or next(model.parameters()).device
    schedule = EdgeSchedule(tau, epochs)
    history = []
    for epoch in range(start_epoch, epochs):
        if before_epoch is not None:
            before_epoch(epoch)
        model.train()
        steps: list[Tensor] = []
        bar = progress(pairs, description=f"epoch {epoch + 1}/{epochs}", unit="step")
        for batch in bar:
            x, y, *rest = (part.to(device, non_blocking=True) for part in batch)
            with autocast(device, dtype):
                z, outliers = paired_forward(model, x, rest[0] if rest else None, forward_mode)
            loss, parts = _loss(criterion, z, y, outliers, gap=schedule.is_on(epoch))
            optimizer.zero_grad()
            if accelerator is not None:
                accelerator.backward(loss)
                optimizer.step()
            elif scaler is not None:
                scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
                scaler.step(optimizer)
                scaler.update()
            else:
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            if scheduler is not None:
                scheduler.step()
            steps.append(parts)
        if not steps:
            raise InputError("the loader gave no batch; it needs at least one an epoch")
        means = dict(zip(_NAMES, torch.stack(steps).mean(0).tolist(), strict=True))
        if not math.isfinite(means["loss"]):
            raise InputError(
                f"the loss was {means['loss']} in epoch {epoch + 1}: training diverged; "
                "lower the learning rate"
            )
        if math.isnan(means["energy_oe"]):
            del means["energy_oe"]
        history.append(means)
        if after_epoch is not None:
            after_epoch(epoch, means)
    return history


_NAMES = ("loss", "l_id", "l_conf", "l_gap", "energy_id", "energy_oe")


def _loss(
    criterion: nn.Module, z: Tensor, y: Tensor, outliers: Tensor | None, *, gap: bool
) -> tuple[Tensor, Tensor]:
    """The loss, and what is logged of it, which stays on the device."""
    if isinstance(criterion, EdgeLoss):
        out = criterion(z, y, outliers, gap=gap)
        loss, parts = out.loss, [out.l_id, out.l_conf, out.l_gap]
    else:
        with torch.autocast(z.device.type, enabled=False):
            given = (z.float(), y) if outliers is None else (z.float(), y, outliers.float())
            loss = criterion(*given)
        zero = torch.zeros_like(loss)
        parts = [loss if outliers is None else zero, zero, zero]
    with torch.no_grad():
        nan = torch.full_like(loss, math.nan)
        energies = [
            joint_energy(z).mean(),
            nan if outliers is None else joint_energy(outliers).mean(),
        ]
        return loss, torch.stack([loss, *parts, *energies]).detach().float()


class Outputs(NamedTuple):
    """What a model makes of a data set, on the CPU.

    Attributes:
        logits: ``[n, C]``.
        features: ``[n, F]``; empty where they were not asked for.
        targets: ``[n, C]``; empty for unlabelled data.
    """

    logits: Tensor
    features: Tensor
    targets: Tensor


@torch.no_grad()
def collect(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    features: bool = False,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    accelerator: Any = None,
    description: str = "scoring",
) -> Outputs:
    """Run a model over a data set in eval mode and keep logits, features and targets.

    Under several processes (with an accelerator that prepared the loader) every process gets the
    outputs of all, without the samples that fill up the last batch.

    Args:
        model: Maps inputs to logits; for features it needs ``features`` and ``head``.
        loader: Gives ``(x, y)`` or ``x``.
        features: Whether to keep features.
        device: Where batches are sent; by default where the model is.
        dtype: bfloat16 or float16 turn autocast on.
        accelerator: Of accelerate.
        description: Of the progress bar.

    Raises:
        InputError: If the data set is empty.

    Examples:
        >>> collect(nn.Linear(3, 2), [(torch.zeros(4, 3), torch.ones(4, 2))]).logits.shape
        torch.Size([4, 2])
    """
    device = device or next(model.parameters()).device
    inner: Any = accelerator.unwrap_model(model) if accelerator is not None else model
    was_training = model.training
    model.eval()
    rows: list[tuple[Tensor, ...]] = []
    try:
        for x, *y in _batches(progress(loader, description=description, unit="batch")):
            with autocast(device, dtype):
                if features:
                    f = inner.features(x.to(device, non_blocking=True))
                    z = inner.head(f)
                else:
                    z, f = model(x.to(device, non_blocking=True)), x.new_empty(len(x), 0)
            found = (z.float(), f.float().to(device), *(t.to(device) for t in y))
            if accelerator is not None:
                found = accelerator.gather_for_metrics(found)
            rows.append(tuple(part.cpu() for part in found))
    finally:
        model.train(was_training)
    if not rows:
        raise InputError("there is nothing to score: the data set is empty")
    columns = [torch.cat(column) for column in zip(*rows, strict=True)]
    targets = columns[2] if len(columns) > 2 else torch.empty(0)
    return Outputs(columns[0], columns[1], targets)


def _batches(loader: Iterable[Any]) -> Iterator[tuple[Tensor, ...]]:
    for batch in loader:
        yield tuple(batch) if isinstance(batch, tuple | list) else (batch,)

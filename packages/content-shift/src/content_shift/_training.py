"""The loop under every training here: resumable to the bit, one process or several."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shared_core.errors import InputError
from shared_core.parallel import is_parallel
from shared_core.run import RunFolder, progress


def world() -> tuple[int, int]:
    """This process's number and how many there are."""
    if is_parallel():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def generator_of(seed: int, step: int) -> torch.Generator:
    """The randomness of one step, which depends on nothing that came before."""
    return torch.Generator().manual_seed((seed << 32) + step)


def share(rows: Tensor) -> Tensor:
    """This process's part of a batch.

    Raises:
        InputError: If the batch does not divide evenly.
    """
    rank, size = world()
    if len(rows) % size:
        raise InputError(f"a batch of {len(rows)} cannot be shared by {size} processes evenly")
    return rows[rank::size]


def fit(
    trainable: Mapping[str, nn.Parameter],
    groups: Iterable[dict[str, Any]],
    loss_of: Callable[[int], Tensor],
    *,
    steps: int,
    factor: Callable[[int], float] = lambda step: 1.0,
    weight_decay: float = 1e-2,
    clip: float | None = 1.0,
    out: str | Path | None = None,
    resume: bool = False,
    save_every: int = 100,
    description: str = "training",
    told: Callable[[int, float], None] | None = None,
    extra: Any = None,
) -> list[float]:
    """Minimise with AdamW; return the losses of the steps run.

    Args:
        trainable: Parameters by name, which the checkpoint holds.
        groups: Parameter groups with their peak learning rates.
        loss_of: The loss of a step, on this process's share of the batch.
        steps: In all.
        factor: Of the learning rates, by step.
        weight_decay: Of AdamW.
        clip: Norm of the gradient.
        out: Folder of the checkpoint; without one nothing is written.
        resume: Continue the checkpoint found there.
        save_every: Steps between checkpoints.
        description: Of the progress bar.
        told: Told every step and its loss.
        extra: Something with ``state_dict`` and ``load_state_dict`` to keep as well.

    Raises:
        InputError: If there is a checkpoint and `resume` is not set, or the loss is not finite.
    """
    rank, size = world()
    run = RunFolder(out, resume=resume or rank > 0) if out is not None else None
    optimizer = torch.optim.AdamW(list(groups), weight_decay=weight_decay)
    peaks = [group["lr"] for group in optimizer.param_groups]
    first = 0
    if run is not None and resume and run.has_checkpoint:
        state = run.load_checkpoint()
        if set(state["parameters"]) != set(trainable):
            raise InputError(f"the checkpoint in {run.path} is of another model or rank")
        with torch.no_grad():
            for name, p in trainable.items():
                p.copy_(state["parameters"][name])
        optimizer.load_state_dict(state["optimizer"])
        first = int(state["step"])
        if extra is not None:
            extra.load_state_dict(state["extra"])
        if rank == 0:
            run.truncate_log(first)
    losses = []
    with progress(total=steps, description=description, unit="step") as bar:
        bar.update(first)
        for step in range(first, steps):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor(step)
            loss = loss_of(step)
            if not bool(loss.isfinite()):
                raise InputError(
                    f"the loss is not finite at step {step}; lower the learning rate or use "
                    "bfloat16" + (f", and resume {run.path}" if run and run.has_checkpoint else "")
                )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            if size > 1:
                for p in trainable.values():
                    if p.grad is not None:
                        torch.distributed.all_reduce(p.grad)
                        p.grad /= size
            if clip is not None:
                nn.utils.clip_grad_norm_(list(trainable.values()), clip)
            optimizer.step()
            losses.append(float(loss.detach()))
            if told is not None:
                told(step, losses[-1])
            bar.update()
            done = step + 1
            if run is not None and rank == 0:
                run.log(step=done, loss=losses[-1])
                if done % save_every == 0 or done == steps:
                    run.save_checkpoint(
                        {
                            "parameters": {n: p.detach() for n, p in trainable.items()},
                            "optimizer": optimizer.state_dict(),
                            "step": done,
                            "extra": None if extra is None else extra.state_dict(),
                        }
                    )
    return losses

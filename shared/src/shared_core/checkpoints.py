"""Checkpoints of transformers' Trainer that survive a kill at any moment.

The Trainer writes a checkpoint file by file, so one that was interrupted looks like a whole one.
Here each gets a mark once every process has written its part, with a digest of every file; only
marked and unchanged ones are resumed from.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from shared_core.errors import InputError
from shared_core.run import to_plain, write_json

__all__ = ["MARK", "check_same", "checkpoint_to_resume", "last_intact", "whole_checkpoint_marker"]

MARK = "complete.json"


def check_same(settings: Mapping[str, Any], folder: Path) -> None:
    """Compare settings with those in a run's ``config.json``, if there is one.

    Args:
        settings: What the run would go on with.
        folder: The run folder.

    Raises:
        InputError: Naming the first that differs, or if the file is damaged.

    Examples:
        >>> check_same({"seed": 0}, getfixture("tmp_path"))
    """
    path = folder / "config.json"
    if not path.is_file():
        return
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))["settings"]
        differing = [(k, v) for k, v in to_plain(settings).items() if earlier.get(k) != v]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} cannot be read; choose another --out") from error
    for name, value in differing[:1]:
        raise InputError(
            f"--resume with {name}={value!r}, but the run in {folder} has "
            f"{name}={earlier.get(name)!r}; give the same settings, or choose another --out"
        )


def checkpoint_to_resume(
    folder: Path, settings: Mapping[str, Any], *, resume: bool, checkpoints: str = "checkpoints"
) -> Path | None:
    """Where a run of these settings in this folder begins.

    Args:
        folder: The run folder.
        settings: As its ``config.json`` holds them.
        resume: Whether to go on with what is there.
        checkpoints: The folder in it that the Trainer writes to.

    Returns:
        The last intact checkpoint, or ``None`` to begin at the start.

    Raises:
        InputError: If there is an earlier run and `resume` is false, if it had other settings, or
            if all its checkpoints are damaged.

    Examples:
        >>> checkpoint_to_resume(getfixture("tmp_path"), {"seed": 0}, resume=True)
    """
    found = list((folder / checkpoints).glob("checkpoint-*"))
    if not found:
        return None
    if not resume:
        raise InputError(
            f"{folder} holds the checkpoints of an earlier run; continue it with --resume, or "
            "choose another --out"
        )
    check_same(settings, folder)
    return last_intact(found)


def last_intact(found: list[Path]) -> Path | None:
    """The latest checkpoint that was written to the end and has not changed since.

    Args:
        found: Folders named ``checkpoint-STEP``.

    Returns:
        One of them; ``None`` if none was ever whole. Damaged ones are passed over with a warning.

    Raises:
        InputError: If some were whole once, but all of these are damaged.

    Examples:
        >>> last_intact([]) is None
        True
    """
    whole = [path for path in found if (path / MARK).is_file()]
    for path in sorted(whole, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        try:
            if json.loads((path / MARK).read_text(encoding="utf-8"))["files"] == _digests(path):
                return path
        except (OSError, ValueError, KeyError, TypeError):
            pass
        warnings.warn(f"{path} is damaged and passed over", stacklevel=2)
    if whole:
        raise InputError(
            f"all checkpoints in {whole[0].parent} are damaged; delete them to start again, or "
            "choose another --out"
        )
    return None


def whole_checkpoint_marker(base: type) -> Any:
    """A callback for the Trainer that marks checkpoints which all processes have written.

    Args:
        base: ``transformers.TrainerCallback``; handed in, because this package does without
            transformers.

    Examples:
        >>> type(whole_checkpoint_marker(object)).__name__
        'WholeCheckpointMarker'
    """

    class WholeCheckpointMarker(base):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            del control, kwargs
            if args.world_size > 1:
                torch.distributed.barrier()
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if state.is_world_process_zero and folder.is_dir():
                write_json(folder / MARK, {"step": state.global_step, "files": _digests(folder)})

    return WholeCheckpointMarker()


def _digests(folder: Path) -> dict[str, str]:
    """The BLAKE2 digest of every file of a checkpoint but the mark."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MARK):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "blake2b")
        found[path.relative_to(folder).as_posix()] = digest.hexdigest()[:32]
    return found

"""The run folder: settings, numbers, pictures, log lines and checkpoints, never half-written.

One run of a command makes one folder with ``config.json``, ``metrics.json``, ``*.png``,
``log.jsonl`` and, where training can resume, ``checkpoint.safetensors``.
"""

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from shared_core.device import environment
from shared_core.errors import InputError
from shared_core.plots import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "RunFolder",
    "atomic_path",
    "get_rng_state",
    "load_state",
    "progress",
    "save_state",
    "set_rng_state",
    "to_plain",
    "write_json",
]

T = TypeVar("T")


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path` that takes its name only if the block succeeds.

    A crash, an exception or a full disk leaves the old file as it was.

    Examples:
        >>> folder = getfixture("tmp_path")
        >>> with atomic_path(folder / "a.txt") as temporary:
        ...     _ = temporary.write_text("whole")
        >>> (folder / "a.txt").read_text()
        'whole'
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(
        dir=target.parent, prefix=f".{target.name}.", suffix=target.suffix
    )
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def to_plain(value: Any) -> Any:
    """Make a value JSON-ready: tensors become lists, NaN and Inf become ``None``.

    Examples:
        >>> to_plain({"loss": float("nan"), "counts": torch.tensor([2, 1])})
        {'loss': None, 'counts': [2, 1]}
    """
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_plain(v) for v in value]
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return to_plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, atomically; tensors become lists, NaN and Inf become null.

    Examples:
        >>> path = getfixture("tmp_path") / "metrics.json"
        >>> write_json(path, {"accuracy": torch.tensor(0.5), "loss": float("nan")})
        >>> json.loads(path.read_text())
        {'accuracy': 0.5, 'loss': None}
    """
    text = json.dumps(to_plain(value), indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def _flatten(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Move tensors out of a nested state and leave typed JSON behind."""
    if isinstance(value, torch.Tensor):
        key = f"t{len(tensors)}"
        # A safetensors file refuses views and shared storage, so each tensor is stored on its own.
        tensors[key] = value.detach().cpu().contiguous().clone()
        return {"tensor": key}
    if isinstance(value, np.ndarray):
        return {"array": _flatten(torch.from_numpy(value.copy()), tensors)["tensor"]}
    if isinstance(value, Mapping):
        return {"dict": [[_flatten(k, tensors), _flatten(v, tensors)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_flatten(v, tensors) for v in value]}
    if isinstance(value, list):
        return {"list": [_flatten(v, tensors) for v in value]}
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"a checkpoint holds tensors, numbers, strings and nested dicts/lists/tuples of them, "
        f"not {type(value).__name__}"
    )


def _unflatten(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "array":
        return tensors[content].numpy()
    if kind == "dict":
        return {_unflatten(k, tensors): _unflatten(v, tensors) for k, v in content}
    items = (_unflatten(v, tensors) for v in content)
    return tuple(items) if kind == "tuple" else list(items)


def save_state(path: str | os.PathLike[str], state: Any) -> None:
    """Save nested state (tensors, numbers, strings, dicts, lists, tuples) as one safetensors file.

    This is for what `safetensors` alone cannot hold: optimizer and scheduler ``state_dict``s,
    step counters, generator states. Nothing is pickled, and the file appears whole or not at all.

    Raises:
        TypeError: If the state holds anything else.

    Examples:
        >>> path = getfixture("tmp_path") / "state.safetensors"
        >>> save_state(path, {"step": 3, "moments": {0: torch.ones(2)}})
        >>> load_state(path)
        {'step': 3, 'moments': {0: tensor([1., 1.])}}
    """
    tensors: dict[str, torch.Tensor] = {}
    skeleton = json.dumps(_flatten(state, tensors))
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"state": skeleton})


def load_state(path: str | os.PathLike[str]) -> Any:
    """Load what `save_state` wrote, on the CPU.

    Raises:
        InputError: If the file is missing, damaged or not such a file.

    Examples:
        >>> load_state("nowhere.safetensors")
        Traceback (most recent call last):
        shared_core.errors.InputError: there is no checkpoint at nowhere.safetensors
    """
    if not Path(path).is_file():
        raise InputError(f"there is no checkpoint at {os.fspath(path)}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return _unflatten(json.loads(metadata["state"]), tensors)
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise InputError(
            f"{os.fspath(path)} is not a readable checkpoint ({error}); "
            "delete it and start again, or point to another"
        ) from error


def get_rng_state() -> dict[str, Any]:
    """The states of torch's generators (CPU and every CUDA device), for `save_state`.

    Examples:
        >>> state = get_rng_state(); a = torch.rand(())
        >>> set_rng_state(state); bool(a == torch.rand(()))
        True
    """
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore what `get_rng_state` gave. CUDA states are restored for the devices present.

    Examples:
        >>> set_rng_state(get_rng_state())
    """
    torch.set_rng_state(state["cpu"])
    for index, cuda_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda_state, index)


def progress(
    iterable: Iterable[T] | None = None,
    *,
    description: str,
    total: int | None = None,
    unit: str = "it",
) -> Any:
    """A tqdm bar on stderr; silent where stderr is not a terminal.

    Args:
        iterable: What to walk through, or ``None`` to call ``update()`` by hand.
        description: What is being done.
        total: Number of steps, if the iterable has no length.
        unit: What one step is called.

    Examples:
        >>> list(progress([1, 2], description="counting"))
        [1, 2]
    """
    from tqdm import tqdm

    return tqdm(
        iterable, desc=description, total=total, unit=unit, disable=None, dynamic_ncols=True
    )


class RunFolder:
    """The folder of one run.

    Args:
        path: The folder; made if absent.
        resume: Continue a run found there. Without it, a folder that holds a checkpoint is
            refused, so that no training is overwritten by accident.

    Attributes:
        path: The folder.

    Raises:
        InputError: If the path is a file or cannot be written, if it holds a checkpoint and
            `resume` is not set.

    Examples:
        >>> run = RunFolder(getfixture("tmp_path") / "run")
        >>> run.write_config("focal-sam demo", {"seed": 0}); run.log(step=1, loss=0.5)
        >>> run.write_metrics({"accuracy": 0.9}, timing={"seconds": 1.0})
        >>> sorted(p.name for p in run.path.iterdir())
        ['config.json', 'log.jsonl', 'metrics.json']
    """

    CHECKPOINT = "checkpoint.safetensors"

    def __init__(self, path: str | os.PathLike[str], *, resume: bool = False) -> None:
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise InputError(f"--out {self.path} cannot be a folder: {error.strerror}") from error
        if not os.access(self.path, os.W_OK):
            raise InputError(f"--out {self.path} is not writable; choose another folder")
        if self.has_checkpoint and not resume:
            raise InputError(
                f"{self.path} holds the checkpoint of an earlier run; "
                "continue it with --resume, or choose another --out"
            )
        if not resume:
            (self.path / "log.jsonl").unlink(missing_ok=True)

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint to resume from."""
        return (self.path / self.CHECKPOINT).is_file()

    def write_config(
        self, command: str, settings: Mapping[str, Any], *, distributions: Iterable[str] = ()
    ) -> None:
        """Write ``config.json``: the command, all settings, versions and the machine."""
        config = {
            "command": command,
            "settings": settings,
            "environment": environment(*distributions),
        }
        write_json(self.path / "config.json", config)

    def write_metrics(
        self, metrics: Mapping[str, Any], *, timing: Mapping[str, Any] | None = None
    ) -> None:
        """Write ``metrics.json``; what depends on the clock goes under the key ``timing``."""
        write_json(self.path / "metrics.json", {**metrics, "timing": dict(timing or {})})

    def log(self, **record: Any) -> None:
        """Append one line to ``log.jsonl``."""
        line = json.dumps(to_plain(record), ensure_ascii=False, allow_nan=False)
        with open(self.path / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def save_figure(self, name: str, figure: "Figure") -> Path:
        """Write a figure as ``<name>.png``."""
        target = self.path / f"{name}.png"
        with style(), atomic_path(target) as temporary:
            figure.savefig(temporary, format="png")
        return target

    def save_checkpoint(self, state: Any) -> None:
        """Replace the checkpoint by `state` (see `save_state`)."""
        save_state(self.path / self.CHECKPOINT, state)

    def load_checkpoint(self) -> Any:
        """Load the checkpoint (see `load_state`)."""
        return load_state(self.path / self.CHECKPOINT)

    def truncate_log(self, step: int) -> None:
        """Drop the log lines past `step`, which a resumed run will write again."""
        path = self.path / "log.jsonl"
        if not path.is_file():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # a killed run can leave half a last line
                if json.loads(line).get("step", 0) <= step:
                    kept.append(line + "\n")
        with atomic_path(path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")

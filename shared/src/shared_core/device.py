"""Devices, precision, seeds, and honest measurement of time and memory."""

import contextlib
import importlib.metadata
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from shared_core.errors import InputError

__all__ = [
    "MemoryPeak",
    "Timing",
    "autocast",
    "environment",
    "measure_time",
    "own_gpu",
    "peak_memory",
    "seed_everything",
    "select_device",
    "select_dtype",
    "synchronize",
]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _available() -> list[str]:
    names = ["cpu"]
    names += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("mps")
    return names


def own_gpu() -> int:
    """The number of this process's GPU; 0 unless a launcher started several on this machine.

    Examples:
        >>> own_gpu()
        0
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0
    local = int(os.environ.get("LOCAL_RANK", "0"))
    # A launcher may also show each process one GPU alone, which then is number 0 for all.
    return local % (torch.cuda.device_count() or local + 1)


def select_device(name: str = "auto") -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda``, ``cuda:i`` or ``mps`` into a device that is present.

    Args:
        name: The wish; ``auto`` takes CUDA, then MPS, then the CPU. Of several processes that a
            launcher such as torchrun started, each gets a GPU of its own, unless one is named.

    Raises:
        InputError: If the name is not a device or the device is not there; the message lists
            what is there.

    Examples:
        >>> select_device("cpu")
        device(type='cpu')
    """
    available = _available()
    if name == "auto" and "cuda:0" not in available:
        return torch.device(available[-1])
    wanted = f"cuda:{own_gpu()}" if name in ("auto", "cuda") else name
    if wanted not in available:
        raise InputError(f"device {name!r} is not here; available: auto, {', '.join(available)}")
    return torch.device(wanted)


def select_dtype(name: str, device: torch.device) -> torch.dtype:
    """Turn ``auto``, ``float32``, ``bfloat16`` or ``float16`` into a dtype for `device`.

    Args:
        name: The wish; ``auto`` takes bfloat16 on a GPU that computes in it, else float32.
        device: Where the computation will run.

    Raises:
        InputError: If the name is none of the four.

    Examples:
        >>> select_dtype("auto", torch.device("cpu"))
        torch.float32
    """
    if name == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    if name not in _DTYPES:
        raise InputError(f"dtype {name!r} is not known; accepted: auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


def autocast(
    device: torch.device, dtype: torch.dtype
) -> contextlib.AbstractContextManager[Any, bool | None]:
    """Mixed precision for a half `dtype`; does nothing for float32.

    Examples:
        >>> with autocast(torch.device("cpu"), torch.bfloat16):
        ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        torch.bfloat16
    """
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def seed_everything(seed: int, *, deterministic: bool = False) -> None:
    """Seed Python, numpy and torch (all devices) with one number.

    Args:
        seed: From 0 to 2**32 - 1.
        deterministic: Also demand deterministic kernels from torch. Operations that have none
            then raise an error.

    Raises:
        InputError: If the seed is out of range.

    Examples:
        >>> seed_everything(0); a = torch.rand(())
        >>> seed_everything(0); bool(a == torch.rand(()))
        True
    """
    if not 0 <= seed < 2**32:
        raise InputError(f"seed {seed} is out of range; accepted: 0 to {2**32 - 1}")
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - libraries still draw from numpy's global generator
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def synchronize(device: torch.device) -> None:
    """Wait until all queued work on `device` is done.

    Examples:
        >>> synchronize(torch.device("cpu"))
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@dataclass(frozen=True)
class Timing:
    """Seconds of each repeat of a measured call.

    Examples:
        >>> Timing([0.3, 0.1, 0.2]).median
        0.2
    """

    seconds: list[float]

    @property
    def median(self) -> float:
        """The median, in seconds."""
        return statistics.median(self.seconds)

    @property
    def interval(self) -> tuple[float, float]:
        """The first and third quartile, in seconds."""
        if len(self.seconds) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high


def measure_time(
    *calls: Callable[[], object],
    device: torch.device | None = None,
    repeats: int = 10,
    warmup: int = 2,
) -> list[Timing]:
    """Time calls side by side, interleaved, so that drift of the machine hits all alike.

    Args:
        calls: What to time, each without arguments.
        device: Where the work runs (default: the CPU); CUDA is timed with events.
        repeats: Timed rounds; each round runs every call once.
        warmup: Untimed rounds before.

    Returns:
        One `Timing` per call, in order.

    Examples:
        >>> [t] = measure_time(lambda: None, repeats=3)
        >>> len(t.seconds)
        3
    """
    device = device or torch.device("cpu")
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(warmup + repeats):
        for call, kept in zip(calls, seconds, strict=True):
            elapsed = _time_once(call, device)
            if turn >= warmup:
                kept.append(elapsed)
    return [Timing(kept) for kept in seconds]


def _time_once(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        with torch.cuda.device(device):
            start.record()
            call()
            end.record()
            end.synchronize()
        return float(start.elapsed_time(end)) / 1000
    synchronize(device)
    begin = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - begin


@dataclass
class MemoryPeak:
    """Peak memory of a `with peak_memory(...)` block, filled in when the block ends."""

    bytes: int | None = field(default=None)


@contextlib.contextmanager
def peak_memory(device: torch.device | None = None) -> Iterator[MemoryPeak]:
    """Measure how far memory rises above its level at entry, in bytes.

    On CUDA this is the allocator's peak. On the CPU it is the peak resident size of the process,
    which only Linux can reset; elsewhere ``bytes`` stays ``None``.

    Examples:
        >>> with peak_memory(torch.device("cpu")) as peak:
        ...     x = torch.zeros(1000)
        >>> peak.bytes is None or peak.bytes >= 0
        True
    """
    peak = MemoryPeak()
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    resettable = _reset_resident_peak()
    before = _resident("VmRSS") if resettable else 0
    yield peak
    if resettable:
        peak.bytes = max(0, _resident("VmHWM") - before)


def _reset_resident_peak() -> bool:
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


def _resident(key: str) -> int:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    return 0


def environment(*distributions: str) -> dict[str, Any]:
    """Describe the machine and the versions, as a JSON-ready dict.

    Args:
        distributions: Further distributions whose versions to list, such as ``"transformers"``;
            absent ones are left out.

    Examples:
        >>> environment()["versions"]["torch"] == torch.__version__
        True
    """
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("numpy", "shared-core", *distributions):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "platform": sys.platform,
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": gpus,
        "cuda": torch.version.cuda if gpus else None,
        "versions": versions,
    }

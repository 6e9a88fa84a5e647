import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from shared_core.device import (
    Timing,
    autocast,
    environment,
    measure_time,
    peak_memory,
    seed_everything,
    select_device,
    select_dtype,
    synchronize,
)
from shared_core.errors import InputError

CPU = torch.device("cpu")


@pytest.mark.smoke
def test_unknown_device_names_what_is_there() -> None:
    for name in ("tpu", "cuda:99", "", "cpu:3"):
        with pytest.raises(InputError, match=r"available: auto, cpu"):
            select_device(name)


@pytest.mark.parametrize("name", ["cuda", "auto"])
def test_each_process_of_a_launcher_has_its_own_gpu(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert select_device(name) == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert select_device(name) == torch.device("cuda", 0)  # alone, whatever is left over
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert select_device(name) == torch.device("cuda", 1)
    assert select_device("cuda:0") == torch.device("cuda", 0)
    assert select_device("cpu") == torch.device("cpu")
    # Where each process is shown one GPU alone, that is number 0 in each.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert select_device(name) == torch.device("cuda", 0)


def test_auto_prefers_cuda() -> None:
    expected = "cuda" if torch.cuda.is_available() else select_device("auto").type
    assert select_device("auto").type == expected
    assert select_device("cpu") == CPU


def test_dtype_names() -> None:
    assert select_dtype("float16", CPU) == torch.float16
    with pytest.raises(InputError, match="'int8'"):
        select_dtype("int8", CPU)


def test_autocast_leaves_float32_alone() -> None:
    with autocast(CPU, torch.float32):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    with autocast(CPU, torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


@pytest.mark.smoke
def test_one_call_seeds_all_generators() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    seed_everything(5)
    first = draw()
    seed_everything(5)
    assert draw() == first
    seed_everything(6)
    assert draw() != first


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seed_out_of_range(seed: int) -> None:
    with pytest.raises(InputError, match=str(seed)):
        seed_everything(seed)


def test_deterministic_switch_refuses_kernels_without_a_deterministic_form() -> None:
    try:
        seed_everything(0, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_measure_interleaves_and_discards_warmup() -> None:
    order: list[str] = []
    timings = measure_time(
        lambda: order.append("a"), lambda: order.append("b"), repeats=3, warmup=2
    )
    assert order == ["a", "b"] * 5
    assert [len(t.seconds) for t in timings] == [3, 3]
    synchronize(CPU)


def test_timing_quartiles() -> None:
    timing = Timing([4.0, 1.0, 3.0, 2.0, 5.0])
    assert timing.median == 3.0
    assert timing.interval == (2.0, 4.0)
    assert Timing([1.0]).interval == (1.0, 1.0)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset the resident peak")
def test_peak_memory_sees_a_temporary() -> None:
    with peak_memory(CPU) as peak:
        torch.ones(32 * 2**20 // 4).sum()
    assert peak.bytes is not None
    assert 24 * 2**20 < peak.bytes < 256 * 2**20


def test_environment_lists_versions() -> None:
    report = environment("pytest", "surely-not-installed")
    assert report["versions"]["pytest"]
    assert "surely-not-installed" not in report["versions"]


FORBIDDEN = """
import sys, torch
before = set(sys.modules)
import shared_core
import shared_core.run, shared_core.cli, shared_core.device, shared_core.data, shared_core.metrics
heavy = {"transformers", "diffusers", "open_clip", "datasets", "torchvision", "matplotlib.pyplot"}
print(sorted(heavy & (set(sys.modules) - before)))
"""


def test_no_heavy_import() -> None:
    result = subprocess.run(
        [sys.executable, "-c", FORBIDDEN], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"

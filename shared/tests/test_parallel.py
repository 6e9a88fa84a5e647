"""A launcher's processes: what its environment says, and the group they join."""

import contextlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from shared_core import device
from shared_core.errors import InputError
from shared_core.parallel import is_first, is_parallel, join_processes, launched
from shared_core.testing import run_gloo

CPU = torch.device("cpu")


def test_alone() -> None:
    with join_processes(CPU) as here:
        assert (here.rank, here.world, here.first, here.device) == (0, 1, True, CPU)
        assert is_first()
        assert not is_parallel()
        assert not dist.is_initialized()


def test_the_environment_of_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    here = launched(CPU)
    assert (here.rank, here.world, here.first, here.device) == (3, 4, False, CPU)
    assert launched(torch.device("cuda")).device == torch.device("cuda", 1)
    assert launched(torch.device("cuda:0")).device == torch.device("cuda", 0)
    assert launched("cpu").device == CPU
    monkeypatch.setattr(device, "_available", lambda: ["cpu", "cuda:0", "cuda:1"])
    for wish, index in (("auto", 1), ("cuda", 1), ("cuda:0", 0)):
        assert launched(wish).device == torch.device("cuda", index)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert launched("cuda").device == torch.device("cuda", 0)
    with pytest.raises(InputError, match="not here"):
        launched("cuda:7")


def test_a_group_is_begun_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "init_process_group", begun.append)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: begun.append("end"))
    with contextlib.suppress(RuntimeError), join_processes(CPU):
        begun.append("work")
        raise RuntimeError
    assert begun == ["gloo", "work", "end"]


def in_a_group(rank: int, world: int) -> None:
    with join_processes(CPU) as here:
        assert (here.rank, here.world) == (rank, world)
        assert is_parallel()
        assert is_first() == (rank == 0)
    assert dist.is_initialized(), "a group that was there before stays"


def test_two_processes(tmp_path: Path) -> None:
    run_gloo(in_a_group, tmp_path)

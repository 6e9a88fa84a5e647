"""Training with FSDP2 on two processes against one, and resuming it."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from abkd.presets import launch_files
from shared_core.testing import run_gloo

pytestmark = pytest.mark.usefixtures("without_type_checks")


def launch_variables() -> dict[str, str]:
    """What ``accelerate launch`` makes of our file for FSDP2."""
    import yaml

    settings = yaml.safe_load(launch_files()["fsdp2"].read_text())["fsdp_config"]
    found = {k.upper(): str(v) for k, v in settings.items()}
    return {**found, "ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_CPU": "true"}


def let_accelerate_shard_on_the_cpu() -> None:
    """Accelerate takes FSDP on accelerators alone; torch can on a CPU too."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    begin = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **more: Any) -> None:
        begin(self, *args, fsdp_plugin=fsdp_plugin, **more)
        kind = DistributedType.FSDP
        self.distributed_type = PartialState._shared_state["distributed_type"] = kind
        if fsdp_plugin is not None:  # the state is shared, and asked for without one later
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init


def two_processes(rank: int, world: int, folder: str, settings: Any) -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": "29591",
        **launch_variables(),
    }  # fmt: skip
    let_accelerate_shard_on_the_cpu()
    from abkd.train import train
    from abkd.trainer import DistillationTrainer

    plain_step, steps = DistillationTrainer.training_step, []

    def step(self: Any, model: Any, *args: Any, **more: Any) -> Any:
        assert all(isinstance(p, DTensor) for p in model.parameters())
        assert all(p.any() for p in self.teacher.parameters())
        steps.append(self.state.global_step)
        return plain_step(self, model, *args, **more)

    DistillationTrainer.training_step = step  # type: ignore[method-assign]
    out = Path(folder) / "two"
    mine = dataclasses.replace(settings, batch_size=1)
    whole = train(mine, out, "cpu")
    dist.barrier()
    if rank == 0:  # as if it had been killed in its third step
        shutil.rmtree(out / "checkpoints/checkpoint-3")
        shutil.move(out / "student", out / "whole")
        shutil.move(out / "log.jsonl", out / "whole.jsonl")
    dist.barrier()
    assert train(mine, out, "cpu", resume=True) == whole
    assert steps == [0, 0, 1, 1, 2, 2, 2, 2]


# Accelerate's own words about resuming with FSDP, and torch's about its checkpoints.
@pytest.mark.filterwarnings("ignore")
def test_two_processes_with_fsdp2_equal_one_and_resume(
    pair: list[str], tmp_path: Path, warm_processes: Any
) -> None:
    from safetensors.torch import load_file

    from abkd.train import TrainSettings, train

    settings = TrainSettings(
        student=pair[2], teacher=pair[4], data=pair[6], max_steps=3, save_steps=2, batch_size=2,
        accumulation=2, lr=3e-3, ce_weight=0.5, max_length=32,
    )  # fmt: skip
    train(settings, tmp_path / "one", "cpu")
    run_gloo(two_processes, tmp_path, str(tmp_path), settings)
    names = ("one/log.jsonl", "two/whole.jsonl", "two/log.jsonl")
    one, *others = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()] for name in names
    )
    for lines in others:
        for key in ("loss", "kd", "ce", "agreement", "grad_norm"):
            found, wanted = ([line[key] for line in some if key in line] for some in (lines, one))
            assert found == pytest.approx(wanted, rel=1e-4), key
    wanted = load_file(tmp_path / "one/student/model.safetensors")
    for folder in ("whole", "student"):
        found = load_file(tmp_path / "two" / folder / "model.safetensors")
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    start = load_file(Path(pair[2]) / "model.safetensors")
    assert any(not torch.allclose(found[k], v, atol=1e-4) for k, v in start.items())

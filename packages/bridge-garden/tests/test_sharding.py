"""Hybrid training with FSDP2 on two processes against one, and resuming it."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from abkd.presets import launch_files
from bridge_garden.train import TrainSettings, train
from shared_core.run import RunFolder
from shared_core.testing import run_gloo

CPU = torch.device("cpu")
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
        "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": "29593",
        **launch_variables(),
    }  # fmt: skip
    let_accelerate_shard_on_the_cpu()
    from bridge_garden.trainer import HybridTrainer

    plain_step, steps = HybridTrainer.training_step, []

    def step(self: Any, model: Any, *args: Any, **more: Any) -> Any:
        assert all(isinstance(p, DTensor) for p in model.parameters())
        steps.append(self.state.global_step)
        return plain_step(self, model, *args, **more)

    HybridTrainer.training_step = step  # type: ignore[method-assign]
    out = Path(folder) / "two"
    mine = dataclasses.replace(settings, batch_size=1)
    whole = train(mine, RunFolder(out), CPU)
    dist.barrier()
    if rank == 0:  # as if it had been killed in its third step
        shutil.rmtree(out / "checkpoints/checkpoint-3")
        shutil.move(out / "student", out / "whole")
        shutil.copy(out / "log.jsonl", out / "whole.jsonl")
    dist.barrier()
    assert train(mine, RunFolder(out, resume=True), CPU, resume=True) == whole
    assert steps == [0, 0, 1, 1, 2, 2, 2, 2]


@pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="this torch shards on accelerators alone"
)
# Accelerate's own words about resuming with FSDP, and torch's about its checkpoints.
@pytest.mark.filterwarnings("ignore")
def test_two_processes_with_fsdp2_equal_one_and_resume(
    pair: tuple[str, str, str], tmp_path: Path, warm_processes: Any
) -> None:
    """The curriculum's second step is the first with soft labels; risk couples neighbours."""
    from safetensors.torch import load_file

    student, teacher, data = pair
    settings = TrainSettings(
        student=student, teacher=teacher, data=data, weight="curriculum:0.4", risk_alpha=0.1,
        max_steps=3, save_steps=2, batch_size=2, accumulation=2, lr=3e-3,
    )  # fmt: skip
    train(settings, RunFolder(tmp_path / "one"), CPU)
    run_gloo(two_processes, tmp_path, str(tmp_path), settings)
    names = ("one/log.jsonl", "two/whole.jsonl", "two/log.jsonl")
    one, *others = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()] for name in names
    )
    assert [line["weight"] for line in one if "weight" in line] == pytest.approx([0, 0.4, 0.4])
    for lines in others:
        for key in ("step", "loss", "kd", "ce", "risk", "weight", "bridge_fraction", "grad_norm"):
            found, wanted = ([x[key] for x in some if "loss" in x] for some in (lines, one))
            assert found == pytest.approx(wanted, rel=1e-4), key
    wanted = load_file(tmp_path / "one/student/model.safetensors")
    for folder in ("whole", "student"):
        found = load_file(tmp_path / "two" / folder / "model.safetensors")
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    start = load_file(Path(student) / "model.safetensors")
    assert any(not torch.allclose(found[k], v, atol=1e-4) for k, v in start.items())

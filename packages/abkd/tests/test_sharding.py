"""Training with FSDP2 on two processes against one, and resuming it, fused and from logits."""

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


# What the trainer makes of the student's head, and what the loss then sees.
KINDS = {"whole": "FSDPLinear", "resharded": "GatheredHead", "logits": "logits"}


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

    plain_step, plain_loss = DistillationTrainer.training_step, DistillationTrainer.distil
    steps, heads = [], []

    def step(self: Any, model: Any, *args: Any, **more: Any) -> Any:
        assert all(isinstance(p, DTensor) for p in model.parameters())
        assert all(p.any() for p in self.teacher.parameters())
        steps.append(self.state.global_step)
        # Accelerate wraps the head on its own, and FSDP then keeps it whole until backward.
        self.accelerator.unwrap_model(model).get_output_embeddings().set_reshard_after_forward(
            kind == "resharded"
        )
        return plain_step(self, model, *args, **more)

    def distil(self: Any, student: Any, *args: Any) -> Any:
        told = "logits" if student.hidden is None else type(student.head).__name__
        heads.append(told)
        return plain_loss(self, student, *args)

    DistillationTrainer.training_step = step  # type: ignore[method-assign]
    DistillationTrainer.distil = distil  # type: ignore[method-assign]
    for kind in KINDS:
        out = Path(folder) / f"two-{kind}"
        mine = dataclasses.replace(settings, batch_size=1, fused=kind != "logits")
        whole = train(mine, out, "cpu")
        dist.barrier()
        if rank == 0:  # as if it had been killed in its third step
            shutil.rmtree(out / "checkpoints/checkpoint-3")
            shutil.move(out / "student", out / "whole")
            shutil.move(out / "log.jsonl", out / "whole.jsonl")
        dist.barrier()
        assert train(mine, out, "cpu", resume=True) == whole
    assert steps == [0, 0, 1, 1, 2, 2, 2, 2] * 3
    assert heads == [name for name in KINDS.values() for _ in range(8)]


@pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="this torch shards on accelerators alone"
)
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
    log = [json.loads(line) for line in (tmp_path / "one/log.jsonl").read_text().splitlines()]
    wanted = load_file(tmp_path / "one/student/model.safetensors")
    start = load_file(Path(pair[2]) / "model.safetensors")
    assert any(not torch.allclose(wanted[k], v, atol=1e-4) for k, v in start.items())
    for kind in KINDS:
        two = tmp_path / f"two-{kind}"
        for name in ("whole.jsonl", "log.jsonl"):
            lines = [json.loads(line) for line in (two / name).read_text().splitlines()]
            for key in ("loss", "kd", "ce", "agreement", "grad_norm"):
                found, one = ([x[key] for x in some if key in x] for some in (lines, log))
                assert found == pytest.approx(one, rel=1e-4), key
        for name in ("whole", "student"):
            found = load_file(two / name / "model.safetensors")
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)

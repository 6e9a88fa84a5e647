"""Training with FSDP2 on two processes against one, and resuming it."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from gmsa.demo import save_tour
from gmsa.inspection import launch_file
from gmsa.train import TrainSettings, train
from shared_core.testing import run_gloo

CPU = torch.device("cpu")


def launch_variables() -> dict[str, str]:
    """What ``accelerate launch`` makes of our file for FSDP2."""
    settings = yaml.safe_load(launch_file("fsdp2"))["fsdp_config"]
    found = {k.upper(): str(v).lower() for k, v in settings.items() if isinstance(v, bool | int)}
    found |= {k.upper(): v for k, v in settings.items() if isinstance(v, str)}
    return {**found, "ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_CPU": "true"}


def let_accelerate_shard_on_the_cpu() -> None:
    """accelerate takes FSDP on accelerators alone; torch can on a CPU too."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    begin = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        kind = DistributedType.FSDP
        self.distributed_type = PartialState._shared_state["distributed_type"] = kind
        if fsdp_plugin is not None:  # the state is shared, and asked for without one later
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init


def two_processes(rank, world, folder, stages):
    from torch.distributed.tensor import DTensor

    from gmsa.trainer import GMSATrainer

    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": "29587",
        **launch_variables(),
    }  # fmt: skip
    let_accelerate_shard_on_the_cpu()
    plain_step, steps = GMSATrainer.training_step, []

    def step(self, model, *args, **kwargs):
        assert all(isinstance(p, DTensor) for p in model.parameters())
        steps.append(self.state.global_step)
        return plain_step(self, model, *args, **kwargs)

    GMSATrainer.training_step = step
    for settings in stages:
        out = Path(folder) / f"two-{settings.stage}"
        mine = dataclasses.replace(settings, batch_size=1)
        whole = train(mine, out, CPU)["history"]
        torch.distributed.barrier()
        if rank == 0:  # as if it had been killed in its third step
            shutil.rmtree(out / "checkpoints/checkpoint-3")
            shutil.move(out / "model", out / "whole")
            (out / "history.json").write_text(json.dumps(whole))
        torch.distributed.barrier()
        assert train(mine, out, CPU, resume=True)["history"] == whole
    assert steps == [0, 1, 2, 2] * len(stages)


# The names of the checkpoint files, and accelerate's own words about resuming with FSDP.
@pytest.mark.filterwarnings("ignore")
def test_two_processes_with_fsdp2_equal_one_and_resume(tmp_path) -> None:
    save_tour(tmp_path, 24)
    first = TrainSettings(
        "autoencoding", str(tmp_path / "base"), str(tmp_path / "train.jsonl"), rates=(2, 4),
        encoder_layers=2, lora_r=4, lora_alpha=8, lora_dropout=0.0, steps=3, lr=1e-3, batch_size=2,
        max_length=64, save_steps=2, dtype="float32",
    )  # fmt: skip
    stages = [first, dataclasses.replace(first, stage="keft")]
    histories = [train(s, tmp_path / s.stage, CPU)["history"] for s in stages]
    run_gloo(two_processes, tmp_path, str(tmp_path), stages)
    for settings, alone in zip(stages, histories, strict=True):
        two = tmp_path / f"two-{settings.stage}"
        together = json.loads((two / "history.json").read_text())
        for key in ("loss", "token_accuracy", "grad_norm"):
            expected = [line[key] for line in alone]
            assert [line[key] for line in together] == pytest.approx(expected, rel=1e-4)
        names = ["compressor.safetensors"]
        if settings.stage == "keft":
            names.append("decoder/model.safetensors")
        for name in names:
            wanted = load_file(tmp_path / settings.stage / "model" / name)
            for folder in ("whole", "model"):  # the run in one go, and the resumed one
                found = load_file(two / folder / name)
                assert found.keys() == wanted.keys()
                for key, value in wanted.items():
                    torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)
    start = load_file(tmp_path / "base/model.safetensors")
    tuned = load_file(tmp_path / "two-keft/model/decoder/model.safetensors")
    assert any(not torch.allclose(tuned[k], v, atol=1e-4) for k, v in start.items())

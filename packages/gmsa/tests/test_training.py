"""Samples, batches and the trainer, on one process and on two."""

import dataclasses
import gc
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainingArguments

from gmsa import GMSAConfig, GMSAModel
from gmsa.data import AutoencodingDataset, GMSADataCollator, QADataset
from gmsa.demo import save_tour, tiny_compressor
from gmsa.demo_base import tiny_model
from gmsa.inspection import launch_file
from gmsa.rates import draw_rate
from gmsa.train import TrainSettings, train
from gmsa.trainer import GMSATrainer
from shared_core.testing import run_gloo

CPU = torch.device("cpu")


def samples(count=10):
    """A data set of random ids, of contexts of several lengths."""
    data = AutoencodingDataset([], tiny_compressor().tokenizer)
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        ids = torch.randint(2, 60, (3 + i % 5,), generator=generator).tolist()
        data.rows.append({"context": ids, "prompt": [5] * (1 + i % 2), "target": [*ids, 1]})
    return data


def make(folder, stage, decoder_tuning="full", *, dropout=0.0, kind=GMSATrainer, **changes):
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "save_steps": 3,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **changes,
    }
    return kind(
        GMSAModel.from_backbone(
            tiny_model(), GMSAConfig(encoder_layers=2, lora_r=4, lora_dropout=dropout)
        ),
        TrainingArguments(str(folder), **settings),
        stage=stage,
        decoder_tuning=decoder_tuning,
        train_dataset=samples(),
        data_collator=GMSADataCollator(0, [2, 3], seed=7),
    )


def weights(trainer):
    return {k: v.detach().clone() for k, v in trainer.model.state_dict().items()}


def test_targets_are_what_was_encoded() -> None:
    tokenizer = tiny_compressor().tokenizer
    data = AutoencodingDataset(["ba be bi bo", "ba be"], tokenizer, 4, "Restate")
    cut, whole = data[0], data[1]
    assert cut["context"] == cut["target"] == tokenizer.convert_tokens_to_ids(["ba", "be", "bi"])
    assert whole["target"] == [*whole["context"], tokenizer.eos_token_id]
    qa = QADataset([{"input": "ba be bi", "prompt": "bo", "answer": [" ", "be"]}], tokenizer, 3)
    assert qa.rows[0]["context"] == cut["context"][:2]
    assert qa.rows[0]["target"] == [cut["context"][1], tokenizer.eos_token_id]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda t: AutoencodingDataset([""], t), "context 0 has no tokens"),
        (lambda t: AutoencodingDataset(["ba"], t, 1, "Restate"), "the instruction 1 tokens"),
        (lambda t: AutoencodingDataset(["ba"], t, 0), "max_length is 0"),
        (lambda t: QADataset([{"input": "ba", "prompt": "be"}], t), "record 0 has no 'answer'"),
        (
            lambda t: QADataset([{"input": "ba", "prompt": "be", "answer": ""}], t),
            "no answer that is not empty",
        ),
        (
            lambda t: QADataset([{"input": "ba", "prompt": "be", "answer": "bi"}], t, 1),
            "no context within 1",
        ),
        (lambda t: GMSADataCollator(0, [4], "often"), "accepted: sample, batch, fixed"),
    ],
)
def test_bad_data_is_refused(build, message) -> None:
    with pytest.raises(ValueError, match=message):
        build(tiny_compressor().tokenizer)


def test_rates_belong_to_samples() -> None:
    data = samples()
    data.set_epoch(2)
    rows = [data[i] for i in range(10)]
    collate = GMSADataCollator(0, [2, 3], seed=7)
    expected = [draw_rate([2, 3], 7, 2, i) for i in range(10)]
    assert len(set(expected)) == 2
    halves = [*collate(rows[::2])["rate"].tolist(), *collate(rows[1::2])["rate"].tolist()]
    assert halves == expected[::2] + expected[1::2]
    assert GMSADataCollator(0, [2, 3], "batch", 7)(rows)["rate"].tolist() == expected[:1] * 10
    assert GMSADataCollator(0, [3, 2], "fixed")(rows)["rate"].tolist() == [3] * 10


@pytest.mark.parametrize(
    ("stage", "tuning"), [("autoencoding", "full"), ("keft", "full"), ("keft", "lora")]
)
def test_resuming_is_exact(tmp_path, stage, tuning) -> None:
    whole = make(tmp_path / "whole", stage, tuning, dropout=0.2)
    before = weights(whole)
    whole.train()
    expected = weights(whole)
    logged = [entry for entry in whole.state.log_history if "loss" in entry]
    assert len(logged) == 6
    assert all(0 <= entry["token_accuracy"] <= 1 for entry in logged)
    again = make(tmp_path / "whole", stage, tuning, dropout=0.2)
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
    found = weights(again)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    moved = {name for name, value in expected.items() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.startswith("decoder.") == (stage == "keft") for name in moved)


def test_persistent_workers_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="leave it off"):
        make(tmp_path, "keft", dataloader_persistent_workers=True, dataloader_num_workers=1)


class InOrder(GMSATrainer):
    """Reads its samples in order, so that one process can take what two took."""

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def launch_variables():
    """What ``accelerate launch`` makes of our file for FSDP2."""
    settings = yaml.safe_load(launch_file("fsdp2"))["fsdp_config"]
    found = {k.upper(): str(v).lower() for k, v in settings.items() if isinstance(v, bool | int)}
    found |= {k.upper(): v for k, v in settings.items() if isinstance(v, str)}
    return {**found, "ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_CPU": "true"}


def let_accelerate_shard_on_the_cpu():
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


def _two_processes(rank, world, folder, expected, stages):
    gc.freeze()  # the Trainer collects garbage at every turn, mostly among what was imported
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": "29583",
    }  # fmt: skip
    _replicated(Path(folder), expected)
    _sharded(rank, Path(folder), stages)
    gc.unfreeze()


def _replicated(folder, expected):
    """DDP gives the weights that one process gave."""
    for stage, wanted in expected.items():
        trainer = make(
            folder, stage, kind=InOrder, max_steps=3, save_strategy="no", ddp_backend="gloo",
            ddp_find_unused_parameters=False, optim="sgd", per_device_train_batch_size=1,
        )  # fmt: skip
        trainer.train()
        assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
        for name, value in weights(trainer).items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6)


def _sharded(rank, folder, stages):
    """FSDP2, in one go and resumed after a step; what it leaves is compared by the caller."""
    from accelerate.state import AcceleratorState, GradientState
    from torch.distributed.tensor import DTensor

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    os.environ |= launch_variables()
    let_accelerate_shard_on_the_cpu()
    plain_step, steps = GMSATrainer.training_step, []

    def step(self, model, *args, **kwargs):
        assert all(isinstance(p, DTensor) for p in model.parameters())
        steps.append(self.state.global_step)
        return plain_step(self, model, *args, **kwargs)

    GMSATrainer.training_step = step
    for settings in stages:
        out = folder / f"two-{settings.stage}"
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
def test_two_processes_equal_one_with_ddp_and_with_fsdp2_which_resumes(tmp_path) -> None:
    """One pair of processes for both ways, because starting a pair costs more than they do."""
    expected = {}
    for stage in ("autoencoding", "keft"):
        alone = make(tmp_path, stage, kind=InOrder, max_steps=3, save_strategy="no", optim="sgd")
        before = weights(alone)
        alone.train()
        expected[stage] = weights(alone)
        assert any(not torch.equal(v, before[k]) for k, v in expected[stage].items())
    save_tour(tmp_path, 24)
    first = TrainSettings(
        "autoencoding", str(tmp_path / "base"), str(tmp_path / "train.jsonl"), rates=(2, 4),
        encoder_layers=1, lora_r=4, lora_alpha=8, lora_dropout=0.0, steps=3, lr=1e-3, batch_size=2,
        max_length=64, save_steps=2, dtype="float32",
    )  # fmt: skip
    stages = [first, dataclasses.replace(first, stage="keft")]
    histories = [train(s, tmp_path / s.stage, CPU)["history"] for s in stages]

    run_gloo(_two_processes, tmp_path, str(tmp_path), expected, stages)

    for settings, history in zip(stages, histories, strict=True):
        two = tmp_path / f"two-{settings.stage}"
        together = json.loads((two / "history.json").read_text())
        for key in ("loss", "token_accuracy", "grad_norm"):
            wanted = [line[key] for line in history]
            assert [line[key] for line in together] == pytest.approx(wanted, rel=1e-4)
        names = ["compressor.safetensors"]
        if settings.stage == "keft":
            names.append("decoder/model.safetensors")
        for name in names:
            one = load_file(tmp_path / settings.stage / "model" / name)
            for kind in ("whole", "model"):  # the run in one go, and the resumed one
                found = load_file(two / kind / name)
                assert found.keys() == one.keys()
                for key, value in one.items():
                    torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)
    start = load_file(tmp_path / "base/model.safetensors")
    tuned = load_file(tmp_path / "two-keft/model/decoder/model.safetensors")
    assert any(not torch.allclose(tuned[k], v, atol=1e-4) for k, v in start.items())

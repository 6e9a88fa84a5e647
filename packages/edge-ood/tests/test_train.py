"""Training from settings: resume, every loss, presets, two processes."""

import dataclasses
import json
import os

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("torchvision")

import edge_ood.train as training
from edge_ood import OODDetector
from edge_ood._shard import shard
from edge_ood.datasets import MultiLabelImages, UnlabelledImages
from edge_ood.presets import PRESETS
from edge_ood.settings import TrainSettings
from edge_ood.shapes import known_images, outlier_images
from edge_ood.train import train
from shared_core.errors import InputError
from shared_core.run import RunFolder
from shared_core.testing import run_gloo

CPU = torch.device("cpu")
TINY = TrainSettings("shapes", "shapes", epochs=3, batch_size=32, oe_batch_size=16, tau=1, beta=1.0)


def few_images(source, split="train", transform=None, **options):
    scenes = known_images(0, 100, split)
    targets = torch.from_numpy(scenes.labels).float()
    return MultiLabelImages(scenes.images, targets, scenes.class_names, transform)


def few_outliers(source, split="train", transform=None, **options):
    images = list(outlier_images(0, 40)["objects"])
    return UnlabelledImages(images=images, transform=transform)


@pytest.fixture(autouse=True)
def small_data(monkeypatch):
    monkeypatch.setattr(training, "load_id", few_images)
    monkeypatch.setattr(training, "load_outliers", few_outliers)


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_an_interrupted_run_ends_in_the_same_numbers(tmp_path, monkeypatch):
    whole = train(TINY, RunFolder(tmp_path / "whole"), CPU)
    lines = log(tmp_path / "whole")
    assert [line["l_gap"] > 0 for line in lines] == [False, True, True]
    save = RunFolder.save_checkpoint

    def interrupted(self, state):
        save(self, state)
        if state["epoch"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "save_checkpoint", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(TINY, RunFolder(tmp_path / "parts"), CPU)
    monkeypatch.setattr(RunFolder, "save_checkpoint", save)
    resumed = train(TINY, RunFolder(tmp_path / "parts", resume=True), CPU, resume=True)
    assert resumed == whole
    assert log(tmp_path / "parts") == lines
    first, second = (
        OODDetector.load(tmp_path / name / "last").model.state_dict() for name in ("whole", "parts")
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
    with pytest.raises(InputError, match=r"--resume with lr=1\.0.* has lr=0\.003"):
        train(
            dataclasses.replace(TINY, lr=1.0),
            RunFolder(tmp_path / "parts", resume=True),
            CPU,
            resume=True,
        )


@pytest.mark.parametrize("loss", ["gap", "bce", "focal", "asl", "db", "oe", "energy", "conf"])
def test_every_loss_trains(loss, tmp_path):
    settings = dataclasses.replace(
        TINY, loss=loss, epochs=1, tau=0, optimizer="sgd", lr=0.01, schedule="constant"
    )
    metrics = train(settings, RunFolder(tmp_path), CPU)
    assert 0 < metrics["validation_mAP"]["last"] <= 1
    detector = OODDetector.load(tmp_path / "best")
    assert detector.threshold is not None
    assert len(detector.class_names) == 20


def two(rank, world, folder, fsdp):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="localhost",
        MASTER_PORT="29574",
        ACCELERATE_USE_CPU="1",
    )
    training.load_id, training.load_outliers = few_images, few_outliers
    # Training ends alike on both, and only the first writes.
    settings = dataclasses.replace(TINY, epochs=1, gather=True, tau=0)
    metrics = train(settings, RunFolder(folder / str(rank)), CPU)
    if rank:
        assert not (folder / "1" / "metrics.json").exists()
    else:
        assert (folder / "0" / "best" / "detector.json").is_file()
        assert json.loads((folder / "0" / "metrics.json").read_text())["epochs"] == 1
    assert 0 < metrics["validation_mAP"]["last"] <= 1
    if fsdp:
        sharded(folder, dataclasses.replace(settings, epochs=2), rank)


def sharded(folder, settings, rank):
    """FSDP2 gives the run that DDP gives, also when it was interrupted."""
    settings = dataclasses.replace(settings, optimizer="sgd", lr=0.05)
    train(settings, RunFolder(folder / f"ddp{rank}"), CPU)
    settings = dataclasses.replace(settings, fsdp=True)
    whole = train(settings, RunFolder(folder / f"fsdp{rank}"), CPU)
    parts = folder / "parts"  # one folder, from which both resume
    real, calls = training._validate, []

    def stop(run_parts):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(run_parts)

    training._validate = stop
    with pytest.raises(KeyboardInterrupt):
        train(settings, RunFolder(parts, resume=True), CPU)
    training._validate = real
    dist.barrier()
    again = train(settings, RunFolder(parts, resume=True), CPU, resume=True)
    assert again["validation_mAP"]["last"] == pytest.approx(
        whole["validation_mAP"]["last"], abs=1e-6
    )
    if rank == 0:
        runs = [OODDetector.load(folder / f / "last").model for f in ("ddp0", "fsdp0", "parts")]
        first, second, third = (model.state_dict() for model in runs)
        for key, value in first.items():
            torch.testing.assert_close(second[key], value, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(third[key], second[key], rtol=1e-6, atol=1e-6)


def test_two_processes(tmp_path):
    pytest.importorskip("accelerate")
    # FSDP2 needs CPU streams, which torch has had since 2.7 or so.
    run_gloo(two, tmp_path, tmp_path, hasattr(torch.cpu.Stream(), "record_event"))


def test_one_process_cannot_shard(tmp_path):
    with pytest.raises(InputError, match="torchrun"):
        train(dataclasses.replace(TINY, fsdp=True), RunFolder(tmp_path), CPU)
    with pytest.raises(InputError, match="take bfloat16"):
        shard(torch.nn.Linear(2, 2), 2, torch.float16)


def test_presets_are_whole():
    for name, preset in PRESETS.items():
        oe = "outliers" if preset.loss == "edge" else None
        settings = TrainSettings.from_preset(name, id=f"{preset.id_kind}:data", oe=oe, epochs=2)
        assert settings.pretrained
        assert settings.epochs == 2
        assert settings.model == preset.model
    assert PRESETS["coco-r50"].lr == 0.1
    with pytest.raises(InputError, match="--id coco:FOLDER"):
        TrainSettings.from_preset("coco-r50")
    with pytest.raises(InputError, match="no preset is called 'coco'"):
        TrainSettings.from_preset("coco")


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"oe": None}, "give --oe"),
        ({"loss": "ce"}, "loss is 'ce'"),
        ({"epochs": 0}, "epochs is 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"validation": 1.0}, "validation=1.0"),
        ({"optimizer": "lamb"}, "optimizer is 'lamb'"),
        ({"forward_mode": "two"}, "forward_mode is 'two'"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(TINY, **changes)

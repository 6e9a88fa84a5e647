"""Training runs: what is saved, that resuming changes nothing, that several processes agree."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from focal_sam.presets import PRESETS
from focal_sam.train import (
    LOSSES,
    METHODS,
    TrainSettings,
    _lr_factor,
    create_loss,
    create_method,
    evaluate,
    load_trained,
    train,
)
from focal_sam.training_data import load_data
from shared_core.errors import InputError
from shared_core.run import RunFolder
from shared_core.testing import run_gloo

CPU = torch.device("cpu")
QUICK = TrainSettings(
    "digits",
    model="small_cnn",
    imbalance_ratio=20,
    epochs=2,
    batch_size=128,
    rho=0.05,
    few_below=30,
    many_above=80,
)


def metrics(run: RunFolder) -> dict[str, object]:
    found = json.loads((run.path / "metrics.json").read_text())
    found.pop("timing")
    return found


@pytest.mark.smoke
def test_a_run_leaves_what_is_needed_to_test_it_again(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    accuracies = train(QUICK, run, CPU)
    names = {p.name for p in run.path.iterdir()}
    assert names == {
        "config.json",
        "log.jsonl",
        "metrics.json",
        "checkpoint.safetensors",
        "model.safetensors",
    }
    lines = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[1]["loss"] < lines[0]["loss"]
    model, data, settings = load_trained(run.path, CPU)
    assert settings == QUICK
    again = evaluate(model, data.test, data.counts, few_below=30, many_above=80)
    assert again == pytest.approx(accuracies, nan_ok=True)


@pytest.mark.parametrize("changes", [{}, {"select": "best-val", "drw": True, "method": "sam"}])
def test_a_resumed_run_is_the_same_run(tmp_path: Path, changes: dict[str, object]) -> None:
    settings = dataclasses.replace(QUICK, epochs=3, rho_late=0.1, **changes)
    whole = RunFolder(tmp_path / "whole")
    train(settings, whole, CPU)
    parts = RunFolder(tmp_path / "parts")

    class StopError(Exception):
        """Ends training in the middle of an epoch."""

    class Stopping(RunFolder):
        def save_checkpoint(self, state: dict[str, object]) -> None:
            if state["epoch"] == 2:
                raise StopError
            super().save_checkpoint(state)

    with pytest.raises(StopError):
        train(settings, Stopping(parts.path), CPU)
    assert not (parts.path / "metrics.json").exists()
    train(settings, RunFolder(parts.path, resume=True), CPU, resume=True)
    assert metrics(parts) == metrics(whole)
    assert (parts.path / "log.jsonl").read_text() == (whole.path / "log.jsonl").read_text()
    for name in ("model.safetensors",):
        assert (parts.path / name).read_bytes() == (whole.path / name).read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(tmp_path: Path, method: str) -> None:
    settings = dataclasses.replace(QUICK, method=method, epochs=1, batch_size=64)
    run = RunFolder(tmp_path / method)
    train(settings, run, CPU)
    [line] = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    assert (line["sharpness"] == 0) == (method == "sgd")


def test_mixed_precision_and_ldam(tmp_path: Path) -> None:
    settings = dataclasses.replace(QUICK, amp=True, epochs=1, loss="ldam", lr_schedule="step")
    assert train(settings, RunFolder(tmp_path / "run"), CPU)["overall"] > 0


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_per_sample(name: str) -> None:
    loss = create_loss(name, [50, 5])
    assert loss(torch.randn(3, 2), torch.tensor([0, 1, 1])).shape == (3,)


def test_methods_get_the_settings() -> None:
    settings = TrainSettings("digits", rho=0.3, gamma=1.5, lam=1.1)
    method = create_method(settings, nn.Linear(2, 2), [50, 5])
    assert method.rho == 0.3
    expected = 1.1 * (1 - torch.tensor([50 / 55, 5 / 55], dtype=torch.float64)) ** 1.5
    torch.testing.assert_close(method.weights.values, expected)


def test_learning_rates() -> None:
    cosine = TrainSettings("digits", epochs=4)
    assert [round(_lr_factor(cosine, e), 4) for e in range(4)] == [1.0, 0.8536, 0.5, 0.1464]
    step = TrainSettings("digits", epochs=200, lr_schedule="step")
    found = [_lr_factor(step, e) for e in (0, 4, 159, 160, 179, 180)]
    assert found == pytest.approx([0.2, 1, 1, 0.01, 0.01, 0.0001])


@pytest.mark.parametrize("name", PRESETS)
def test_presets_become_settings(name: str) -> None:
    settings = TrainSettings.from_preset(name, data="images")
    preset = PRESETS[name]
    for field in ("rho", "rho_late", "gamma", "lam", "lr", "weight_decay", "epochs", "amp"):
        assert getattr(settings, field) == getattr(preset, field)


class TestData:
    def test_the_tail_is_cut_and_named(self) -> None:
        data = load_data("digits", transform="none", imbalance_ratio=20)
        assert (data.counts[0], data.counts[-1]) == (138, 6)
        assert len(data.train) == sum(data.counts)
        image, _ = data.train[0]
        assert image.shape == (3, 8, 8)

    def test_validation_images_are_held_out_of_training(self) -> None:
        whole = load_data("digits", transform="none", imbalance_ratio=20)
        data = load_data("digits", transform="none", imbalance_ratio=20, validation_fraction=0.1)
        assert data.validation is not None
        assert len(data.train) + len(data.validation) == len(whole.train)
        assert sum(data.counts) == len(data.train)
        kept = {tuple(x.flatten().tolist()) for x, _ in data.train}
        held = [tuple(x.flatten().tolist()) for x, _ in data.validation]
        assert not kept & set(held)
        assert {label for _, label in data.validation} == set(range(10))

    def test_image_lists(self, tmp_path: Path) -> None:
        import PIL.Image

        for i in range(4):
            PIL.Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(tmp_path / f"{i}.png")
        for split in ("train", "test"):
            (tmp_path / f"{split}.txt").write_text("0.png 0\n1.png 1\n2.png 0\n3.png 1\n")
        data = load_data(
            str(tmp_path),
            transform="none",
            train_list=str(tmp_path / "train.txt"),
            test_list=str(tmp_path / "test.txt"),
        )
        assert data.counts == [2, 2]

    def test_errors(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="together, or neither"):
            load_data("x", transform="none", train_list="a.txt")
        file = tmp_path / "images.parquet"
        file.write_bytes(b"")
        with pytest.raises(InputError, match="--test-data"):
            load_data(str(file), transform="none")
        with pytest.raises(InputError, match="no transform is called 'rotate'"):
            load_data("digits", transform="rotate")


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "adam"}, "method is 'adam'; accepted: sgd"),
        ({"loss": "mse"}, "loss is 'mse'"),
        ({"lr_schedule": "linear"}, "lr_schedule is 'linear'"),
        ({"select": "best-test"}, "select is 'best-test'"),
        ({"epochs": 0}, "epochs is 0"),
        ({"lr": -1.0}, r"lr is -1\.0"),
        ({"fsdp": True, "select": "best-val"}, "leave out --fsdp"),
    ],
)
def test_wrong_settings(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainSettings("digits", **changes)


def test_presets_that_need_images() -> None:
    with pytest.raises(InputError, match="--train-list FILE"):
        TrainSettings.from_preset("imagenetlt-resnet50")


def test_divergence_is_said(tmp_path: Path) -> None:
    settings = dataclasses.replace(QUICK, lr=1e20, epochs=3)
    with pytest.raises(InputError, match="training diverged; lower --lr"):
        train(settings, RunFolder(tmp_path / "run"), CPU)


def test_one_process_cannot_shard(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="torchrun"):
        train(dataclasses.replace(QUICK, fsdp=True), RunFolder(tmp_path / "run"), CPU)


class TestLoading:
    def test_unfinished_runs(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"no config\.json"):
            load_trained(tmp_path, CPU)

    def test_damaged_runs(self, tmp_path: Path) -> None:
        run = RunFolder(tmp_path / "run")
        train(dataclasses.replace(QUICK, epochs=1), run, CPU)
        weights = run.path / "model.safetensors"
        whole = weights.read_bytes()
        weights.write_bytes(whole[:100])
        with pytest.raises(InputError, match="not a readable safetensors file"):
            load_trained(run.path, CPU)
        weights.write_bytes(whole)
        config = json.loads((run.path / "config.json").read_text())
        config["settings"]["model"] = "resnet32"
        (run.path / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match="does not fit the model"):
            load_trained(weights, CPU)
        (run.path / "config.json").write_text("{")
        with pytest.raises(InputError, match="is not that of a training run"):
            load_trained(run.path, CPU)


def _train_together(rank: int, world: int, folder: str, fsdp: bool) -> None:
    settings = dataclasses.replace(QUICK, epochs=1, fsdp=fsdp)
    train(settings, RunFolder(folder, resume=True), CPU)


NEW_ENOUGH = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream(), "record_event"),
    reason=f"torch {torch.__version__} cannot run FSDP2 on a CPU",
)


@pytest.mark.parametrize(
    "fsdp", [pytest.param(False, id="ddp"), pytest.param(True, id="fsdp2", marks=NEW_ENOUGH)]
)
def test_two_processes_write_one_run(tmp_path: Path, fsdp: bool) -> None:
    run_gloo(_train_together, tmp_path, str(tmp_path / "run"), fsdp)
    run = RunFolder(tmp_path / "run", resume=True)
    found = metrics(run)
    assert found["test"]["overall"] > 10
    model, data, _ = load_trained(run.path, CPU)
    again = evaluate(model, data.test, data.counts, few_below=30, many_above=80)
    assert again["overall"] == pytest.approx(found["test"]["overall"])


def test_cifar_recipe(tmp_path: Path, tenfold_data: Path) -> None:
    """The CIFAR-10-LT preset on real images, cut down to one short epoch."""
    settings = TrainSettings.from_preset(
        "cifar10lt-resnet32",
        data=str(tenfold_data / "cifar10-train.parquet"),
        test_data=str(tenfold_data / "cifar10-test.parquet"),
        model="small_cnn",
        epochs=1,
    )
    run = RunFolder(tmp_path / "run")
    accuracies = train(settings, run, CPU)
    config = json.loads((run.path / "config.json").read_text())["settings"]
    assert config["class_counts"][0] == 2000
    assert config["class_counts"][-1] == 20
    assert accuracies["many"] > accuracies["few"] or accuracies["overall"] > 10

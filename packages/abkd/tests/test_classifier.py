"""Classifiers: the networks, the loop, and the command that trains a real one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from abkd.cifar import create_classifier
from abkd.classifier import crop_and_flip, distill_classifier, load_weights
from abkd.cli import main
from abkd.vision import DistillationLoss
from shared_core.run import RunFolder
from shared_core.testing import CliResult

Run = Callable[..., CliResult]
pytestmark = pytest.mark.usefixtures("without_type_checks")


# Parameters in millions as the tables of the field state them for 100 classes.
@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("resnet20", 0.28), ("resnet56", 0.86), ("resnet110", 1.74), ("resnet8x4", 1.23),
        ("resnet32x4", 7.43), ("wrn-16-2", 0.70), ("wrn-40-1", 0.57), ("wrn-40-2", 2.26),
        ("vgg8", 3.97), ("vgg13", 9.46),
    ],
)  # fmt: skip
def test_the_networks_have_the_published_sizes(name: str, millions: float) -> None:
    with torch.device("meta"):
        model = create_classifier(name, 100)
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 100)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)


def test_crops_and_flips_are_windows_of_the_image() -> None:
    images = torch.arange(2 * 3 * 6 * 6).reshape(2, 3, 6, 6).float() + 1
    torch.manual_seed(0)
    found = crop_and_flip(images)
    padded = nn.functional.pad(images, (4, 4, 4, 4))
    for one, source in zip(found, padded, strict=True):
        windows = [source[:, i : i + 6, j : j + 6] for i in range(9) for j in range(9)]
        assert any(torch.equal(one, w) or torch.equal(one, w.flip(-1)) for w in windows)
    assert not torch.equal(found, crop_and_flip(images))


def task() -> tuple[Any, Any]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(96, 6, generator=g)
    y = (x @ torch.randn(6, 3, generator=g)).argmax(-1)
    return tuple(
        DataLoader(TensorDataset(x[s], y[s]), batch_size=16, shuffle=s.start is None)
        for s in (slice(None, 64), slice(64, None))
    )  # type: ignore[return-value]


def nets() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(1)
    return nn.Linear(6, 3), nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


@pytest.mark.smoke
def test_a_student_learns_from_a_teacher_that_stays_as_it_is() -> None:
    student, teacher = nets()
    distill_classifier(teacher, None, *task(), epochs=20, lr=0.1, cpu=True)
    teacher.requires_grad_(False)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    found = distill_classifier(
        student, teacher.train(), *task(), DistillationLoss("ab", ce_weight=0.0), epochs=15,
        lr=0.02, cpu=True,
    )  # fmt: skip
    assert found["last"] > 80
    assert found["best"] == max(line["accuracy"] for line in found["history"])
    assert found["history"][found["best_epoch"] - 1]["accuracy"] == found["best"]
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert not teacher.training


def test_an_interrupted_run_goes_on_and_ends_in_the_same_numbers(tmp_path: Path) -> None:
    options: dict[str, Any] = {"epochs": 4, "lr": 0.05, "cpu": True, "settings": {"lr": 0.05}}
    options["augment"] = lambda x: x + 0.1 * torch.randn_like(x)
    student, teacher = nets()
    whole = distill_classifier(
        student, teacher, *task(), run=RunFolder(tmp_path / "whole"), **options
    )
    calls = []

    def stop(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 10:  # in the third epoch
            raise KeyboardInterrupt
        return x + 0.1 * torch.randn_like(x)

    with pytest.raises(KeyboardInterrupt):
        distill_classifier(
            nets()[0], teacher, *task(), run=RunFolder(tmp_path / "cut"),
            **{**options, "augment": stop},
        )  # fmt: skip
    again, _ = nets()
    run = RunFolder(tmp_path / "cut", resume=True)
    found = distill_classifier(again, teacher, *task(), run=run, resume=True, **options)
    assert found == whole
    assert all(
        torch.equal(a, b) for a, b in zip(again.parameters(), student.parameters(), strict=True)
    )
    lines = [(tmp_path / n / "log.jsonl").read_text() for n in ("whole", "cut")]
    assert lines[0] == lines[1]
    with pytest.raises(ValueError, match="other settings"):
        distill_classifier(
            again, teacher, *task(), run=run, resume=True, **{**options, "settings": {"lr": 1}}
        )


def test_the_command_trains_a_teacher_and_a_student(run_cli: Run) -> None:
    common = ["train", "--task", "vision", "--data", "digits", "--device", "cpu"]
    common += ["--batch-size", 256, "--json", "--epochs", 2]
    made = run_cli(main, *common, "--student", "resnet8", "--out", "teacher")
    assert made.code == 0, made.stderr
    student = [*common, "--student", "wrn-10-1", "--teacher", "resnet8"]
    refused = run_cli(main, *student)
    assert refused.code == 2
    assert "pass --teacher-weights FILE" in refused.stderr
    student += ["--teacher-weights", "teacher/student.safetensors"]
    for criterion in ("dkd", "ab"):
        shown = run_cli(main, *student, "--criterion", criterion, "--out", criterion)
        assert shown.code == 0, shown.stderr
        summary = json.loads(shown.stdout)
        assert summary["best"] >= summary["last"] > 10
        written = json.loads((Path(criterion) / "metrics.json").read_text())
        assert written["history"] == summary["history"]
    model = create_classifier("wrn-10-1", 10)
    load_weights(model, "ab/student.safetensors")
    assert run_cli(main, *student, "--out", "ab").code == 2  # there is a checkpoint
    again = run_cli(main, *student, "--criterion", "ab", "--out", "ab", "--resume")
    assert json.loads(again.stdout)["history"] == summary["history"]


def test_errors(tmp_path: Path, run_cli: Run) -> None:
    with pytest.raises(ValueError, match="there are no weights at none"):
        load_weights(nn.Linear(2, 2), "none")
    (tmp_path / "bad.safetensors").write_bytes(b"not safetensors")
    torch.save({"model": {"weight": torch.zeros(3, 3)}}, tmp_path / "other.pt")
    for name in ("bad.safetensors", "other.pt"):
        with pytest.raises(ValueError, match="does not hold weights of this network"):
            load_weights(nn.Linear(2, 2), str(tmp_path / name))
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match="no classifier is called 'resnet21'"):
        create_classifier("resnet21", 10)
    shown = run_cli(main, "train", "--task", "vision", "--student", "a", "--data", "digits",
                    "--lora-r", 4)  # fmt: skip
    assert shown.code == 2
    assert "--lora-r has no part in a run of vision" in shown.stderr
    assert "accepted: language, vision, clip" in run_cli(main, "train", "--task", "x").stderr

"""Marks of whole checkpoints, and which of them a run goes on from."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from shared_core.checkpoints import (
    MARK,
    check_same,
    checkpoint_to_resume,
    last_intact,
    whole_checkpoint_marker,
)
from shared_core.errors import InputError
from shared_core.run import RunFolder

SETTINGS = {"lr": 0.1, "seed": 0, "path": Path("a")}


def save(run: Path, step: int, *, marked: bool = True) -> Path:
    folder = run / "checkpoints" / f"checkpoint-{step}"
    (folder / "parts").mkdir(parents=True)
    (folder / "weights.bin").write_bytes(bytes([step]))
    (folder / "parts" / "optimizer.bin").write_bytes(b"state")
    if marked:
        args = SimpleNamespace(world_size=1, output_dir=str(folder.parent))
        state = SimpleNamespace(global_step=step, is_world_process_zero=True)
        whole_checkpoint_marker(object).on_save(args, state, None, model=None)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    RunFolder(tmp_path).write_config("x train", SETTINGS)
    return tmp_path


def test_the_last_whole_one_by_number_is_resumed(run: Path) -> None:
    save(run, 9)
    tenth = save(run, 10)
    save(run, 11, marked=False)
    assert checkpoint_to_resume(run, SETTINGS, resume=True) == tenth


def test_only_the_first_process_marks(run: Path) -> None:
    folder = save(run, 1, marked=False)
    args = SimpleNamespace(world_size=1, output_dir=str(folder.parent))
    state = SimpleNamespace(global_step=1, is_world_process_zero=False)
    whole_checkpoint_marker(object).on_save(args, state, None)
    assert not (folder / MARK).exists()


def test_nothing_whole_begins_at_the_start(run: Path) -> None:
    assert checkpoint_to_resume(run, SETTINGS, resume=False) is None
    save(run, 1, marked=False)
    assert checkpoint_to_resume(run, SETTINGS, resume=True) is None


@pytest.mark.parametrize("damage", ["changed", "lost", "added", "mark"])
def test_a_damaged_one_is_passed_over_for_the_one_before(run: Path, damage: str) -> None:
    first, second = save(run, 1), save(run, 2)
    match damage:
        case "changed":
            (second / "weights.bin").write_bytes(b"other")
        case "lost":
            (second / "parts" / "optimizer.bin").unlink()
        case "added":
            (second / "more.bin").touch()
        case "mark":
            (second / MARK).write_text("{")
    with pytest.warns(UserWarning, match="checkpoint-2 is damaged and passed over"):
        assert checkpoint_to_resume(run, SETTINGS, resume=True) == first


def test_all_damaged_is_an_error(run: Path) -> None:
    folder = save(run, 1)
    (folder / "weights.bin").unlink()
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(InputError, match=r"all checkpoints in .*checkpoints are damaged"),
    ):
        last_intact([folder])


def test_an_earlier_run_is_not_written_over(run: Path) -> None:
    save(run, 1)
    with pytest.raises(InputError, match="--resume, or choose another --out"):
        checkpoint_to_resume(run, SETTINGS, resume=False)


def test_other_settings_are_named(run: Path) -> None:
    save(run, 1)
    with pytest.raises(InputError, match=r"lr=0.2, but the run in .* has lr=0.1"):
        checkpoint_to_resume(run, SETTINGS | {"lr": 0.2}, resume=True)
    check_same(SETTINGS | {"path": Path("a")}, run)


@pytest.mark.parametrize("text", ["{", "[]", "{}", json.dumps({"settings": 3})])
def test_a_damaged_config_is_an_error(run: Path, text: str) -> None:
    (run / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config.json cannot be read"):
        check_same(SETTINGS, run)

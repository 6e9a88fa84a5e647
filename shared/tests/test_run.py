import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared_core.errors import InputError
from shared_core.plots import new_figure
from shared_core.run import (
    RunFolder,
    atomic_path,
    get_rng_state,
    load_state,
    progress,
    save_state,
    set_rng_state,
    to_plain,
    write_json,
)
from shared_core.testing import examples

leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False)
    | st.text()
)
states = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=4) | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.mark.smoke
@examples(40)
@given(state=states)
def test_state_round_trip(tmp_path_factory: pytest.TempPathFactory, state: object) -> None:
    path = tmp_path_factory.mktemp("state") / "s.safetensors"
    save_state(path, state)
    assert load_state(path) == state


@pytest.mark.smoke
def test_optimizer_state_round_trip_is_exact(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    save_state(tmp_path / "s", {"optimizer": optimizer.state_dict(), "rng": get_rng_state()})
    state = load_state(tmp_path / "s")
    other = torch.optim.AdamW(model.parameters())
    other.load_state_dict(state["optimizer"])
    for p in model.parameters():
        for key, value in optimizer.state[p].items():
            assert torch.equal(torch.as_tensor(other.state[p][key]), torch.as_tensor(value))


def test_shared_storage_views_and_dtypes_survive(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    state = {
        "view": base.T,
        "base": base,
        "half": base.half(),
        "bf16": base.bfloat16(),
        "empty": torch.empty(0, 3),
        "numpy": np.arange(3),
    }
    save_state(tmp_path / "s", state)
    loaded = load_state(tmp_path / "s")
    for key in ("view", "base", "half", "bf16", "empty"):
        assert loaded[key].dtype == state[key].dtype  # type: ignore[attr-defined]
        assert torch.equal(loaded[key], state[key])  # type: ignore[arg-type]
    assert isinstance(loaded["numpy"], np.ndarray)
    assert loaded["numpy"].tolist() == [0, 1, 2]


def test_state_refuses_objects(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not object"):
        save_state(tmp_path / "s", {"x": object()})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["truncate", "garbage", "foreign", "missing"])
def test_damaged_checkpoint_is_a_clear_error(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_state(path, {"w": torch.ones(100)})
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:-40])
    elif damage == "garbage":
        path.write_bytes(b"\xff" * 64)
    elif damage == "foreign":
        from safetensors.torch import save_file

        save_file({"w": torch.ones(2)}, path)
    else:
        path.unlink()
    with pytest.raises(InputError, match=r"checkpoint"):
        load_state(path)


@pytest.mark.smoke
def test_atomic_path_keeps_the_old_file_on_failure(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")

    def fail() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fail()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_atomic_path_keeps_usual_permissions(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    with atomic_path(tmp_path / "atomic") as temporary:
        temporary.write_text("x")
    assert (tmp_path / "atomic").stat().st_mode == plain.stat().st_mode


KILLED = """
import sys, torch
from shared_core.run import RunFolder
run = RunFolder(sys.argv[1])
for step in range(10**6):
    run.save_checkpoint({"step": step, "w": torch.full((200_000,), float(step))})
    print(step, flush=True)
"""


def test_sigkill_leaves_a_readable_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while int(process.stdout.readline()) < 5:
            pass
        os.kill(process.pid, signal.SIGKILL)
    state = RunFolder(tmp_path, resume=True).load_checkpoint()
    assert state["step"] >= 5
    assert bool((state["w"] == state["step"]).all())


def test_write_json_is_valid_and_plain(tmp_path: Path) -> None:
    value = {"a": float("inf"), 3: (np.float32(0.5), torch.ones(2)), "p": Path("x")}
    write_json(tmp_path / "m.json", value)
    expected = {"a": None, "3": [0.5, [1.0, 1.0]], "p": "x"}
    assert json.loads((tmp_path / "m.json").read_text()) == expected == to_plain(value)


def test_run_folder_refuses_to_overwrite_a_checkpoint(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.log(step=1, loss=float("nan"))
    run.save_checkpoint({"step": 1})
    with pytest.raises(InputError, match="--resume"):
        RunFolder(tmp_path)
    assert RunFolder(tmp_path, resume=True).load_checkpoint() == {"step": 1}
    assert json.loads((tmp_path / "log.jsonl").read_text()) == {"step": 1, "loss": None}


def test_run_folder_refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    for path in (tmp_path / "f", tmp_path / "f" / "below"):
        with pytest.raises(InputError, match="cannot be a folder"):
            RunFolder(path)


def test_truncate_log_drops_later_and_broken_lines(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.truncate_log(0)
    for step in range(5):
        run.log(step=step)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 1, "lo')
    run.truncate_log(2)
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2]


def test_figures_are_written_whole(tmp_path: Path) -> None:
    figure, axes = new_figure()
    axes.plot([0, 1], [0, 1])
    path = RunFolder(tmp_path).save_figure("curve", figure)
    assert path.name == "curve.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_rng_state_replays_every_generator() -> None:
    state = get_rng_state()
    first = torch.randn(5)
    set_rng_state(state)
    assert torch.equal(first, torch.randn(5))


def test_progress_passes_items_through(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress(range(3), description="x")) == [0, 1, 2]
    assert capsys.readouterr().err == ""

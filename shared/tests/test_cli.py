import errno
import json
import warnings
from collections.abc import Callable

import pytest
import typer

from shared_core.cli import (
    Device,
    Json,
    Out,
    Quick,
    Seed,
    command,
    format_table,
    new_app,
    run_app,
    show_result,
)
from shared_core.device import select_device
from shared_core.errors import InputError, MissingExtraError
from shared_core.testing import CliResult

RunCli = Callable[..., CliResult]


def make(body: Callable[[], None] = lambda: None) -> Callable[[list[str]], int]:
    app = new_app("tool", "A tool of the tests.")

    @command(app)
    def demo(
        out: Out = None,
        seed: Seed = 0,
        device: Device = "auto",
        json: Json = False,
        quick: Quick = False,
    ) -> None:
        """Show the method at work."""
        select_device(device)
        body()
        show_result({"seed": seed, "out": out}, f"seed {seed}", as_json=json)

    return lambda argv: run_app(app, argv)


@pytest.mark.smoke
def test_result_as_text_and_as_json(run_cli: RunCli) -> None:
    assert run_cli(make(), "demo", "--seed", 3).stdout == "seed 3\n"
    result = run_cli(make(), "demo", "--json", "--out", "x")
    assert (result.code, json.loads(result.stdout)) == (0, {"seed": 0, "out": "x"})
    assert result.stderr == ""


@pytest.mark.smoke
def test_help_teaches(run_cli: RunCli) -> None:
    top = run_cli(make(), "--help")
    assert top.code == 0
    assert "A tool of the tests." in top.stdout
    assert "Show the method at work." in top.stdout
    text = run_cli(make(), "demo", "--help").stdout
    for option in ("--out", "--seed", "--device", "--json", "--quick", "--debug"):
        assert option in text


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["demo", "--sede", "1"], "--sede"),
        (["dmo"], "dmo"),
        (["demo", "--seed", "x"], "x"),
        (["demo", "--seed", "-1"], "-1"),
        (["demo", "--device", "tpu"], "'tpu'"),
        ([], "demo"),
    ],
)
def test_bad_usage_is_code_2(run_cli: RunCli, argv: list[str], expected: str) -> None:
    result = run_cli(make(), *argv)
    assert result.code == 2
    assert expected in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    if argv:
        assert len(result.stderr.strip().splitlines()) <= 2


def raiser(error: BaseException) -> Callable[[], None]:
    def body() -> None:
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (InputError("counts must be positive, not -3"), 2, "not -3"),
        (MissingExtraError("d", "e", "n"), 2, "pip install 'd[e]'"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "f.json"), 1, "disk is full"),
        (RuntimeError("boom"), 1, "--debug"),
    ],
)
def test_errors_become_codes(
    run_cli: RunCli, error: BaseException, code: int, expected: str
) -> None:
    result = run_cli(make(raiser(error)), "demo")
    assert result.code == code
    assert expected in result.stderr
    assert len(result.stderr.strip().splitlines()) <= 2


def test_debug_shows_the_traceback(run_cli: RunCli) -> None:
    result = run_cli(make(raiser(RuntimeError("boom"))), "demo", "--debug")
    assert result.code == 1
    assert "Traceback" in result.stderr


def test_typer_exit_code_passes_through(run_cli: RunCli) -> None:
    assert run_cli(make(raiser(typer.Exit(3))), "demo").code == 3


def test_tables_align_and_leave_gaps_for_none() -> None:
    rows = [
        {"method": "SGD", "all": "91.9", "gain": None},
        {"method": "Focal-SAM", "all": "93.0", "gain": "+1.1"},
    ]
    lines = format_table(rows).splitlines()
    assert lines[0] == "method      all  gain"
    assert lines[3] == "Focal-SAM  93.0  +1.1"
    assert format_table([]) == ""


@pytest.mark.filterwarnings("default:the weights are flat")
def test_warnings_are_one_line_without_a_place(run_cli: Callable[..., CliResult]) -> None:
    """With --debug they are what the interpreter shows."""
    app = new_app("tool", "A tool.")

    @command(app)
    def warn() -> None:
        """Warn."""
        warnings.warn("the weights are flat", stacklevel=1)

    shown = run_cli(lambda argv: run_app(app, argv), "warn").stderr
    assert shown == "tool: note: the weights are flat\n"

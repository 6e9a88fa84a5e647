"""The frame of a command line: common options, one-line errors, exit codes, one summary.

A package's ``cli.py`` makes an app with `new_app`, adds commands with `command`, and ends in
``def main(argv=None): return run_app(app, argv)``. What a person reads while waiting goes to
stderr (`say`); the result goes to stdout once, as a table or, with ``--json``, as one JSON object
(`show_result`).

Exit codes: 0 ran; 2 bad input or usage; 130 interrupted; 1 anything else.
"""

import errno
import functools
import inspect
import itertools
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from shared_core.errors import InputError, MissingExtraError
from shared_core.run import to_plain

__all__ = [
    "Debug",
    "Device",
    "Json",
    "Out",
    "Plots",
    "Quick",
    "Resume",
    "Seed",
    "command",
    "format_table",
    "new_app",
    "run_app",
    "say",
    "show_result",
]

Out = Annotated[
    Path | None,
    typer.Option("--out", help="Folder of the run.  [default: runs/<command>/<name>]"),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of every random draw.", min=0)]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:<i> or mps.")]
Json = Annotated[
    bool, typer.Option("--json", help="Print the summary as one JSON object on stdout.")
]
Quick = Annotated[bool, typer.Option("--quick", help="A small version, in under 40 seconds.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run found in --out.")]
Plots = Annotated[bool, typer.Option("--plots/--no-plots", help="Whether to draw the pictures.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

# typer carries its own click since 0.26 and uses the installed one before; its exceptions'
# ancestors are the same classes under either.
_UsageError, _ClickException = typer.BadParameter.__mro__[1:3]

F = TypeVar("F", bound=Callable[..., None])


def new_app(name: str, help: str) -> typer.Typer:
    """Make the typer app of one package.

    Args:
        name: The command, such as ``"focal-sam"``.
        help: One or two sentences: what the method does.

    Examples:
        >>> new_app("focal-sam", "Sharpness-aware training.").info.name
        'focal-sam'
    """
    app = typer.Typer(
        name=name, help=help, no_args_is_help=True, rich_markup_mode=None, add_completion=True
    )
    # With a callback, an app of one command still wants that command's name.
    app.callback()(lambda: None)
    app.info.help = help
    return app


def command(app: typer.Typer, name: str | None = None) -> Callable[[F], F]:
    """Register a function as a command of `app`, with the common option ``--debug`` added.

    Args:
        app: The app.
        name: The command's name, if not the function's.

    Examples:
        >>> app = new_app("tool", "A tool.")
        >>> @command(app)
        ... def hello(seed: Seed = 0) -> None:
        ...     "Say hello."
        ...     print("hello", seed)
        >>> run_app(app, ["hello", "--seed", "3"])
        hello 3
        0
    """

    def register(function: F) -> F:
        signature = inspect.signature(function)
        parameters = [
            *signature.parameters.values(),
            inspect.Parameter(
                "debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug
            ),
        ]

        @functools.wraps(function)
        def wrapper(*args: Any, debug: bool = False, **kwargs: Any) -> None:
            del debug  # `run_app` reads it from the arguments, for errors that come before this
            function(*args, **kwargs)

        wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {**function.__annotations__, "debug": Debug}
        app.command(name)(wrapper)
        return function

    return register


def say(message: str) -> None:
    """Tell the person at the terminal something, on stderr.

    Examples:
        >>> say("training 4 methods")
    """
    print(message, file=sys.stderr, flush=True)


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay out rows as an aligned text table, numbers to the right.

    Args:
        rows: One mapping a row; the first row's keys are the columns.

    Examples:
        >>> print(format_table([{"method": "SAM", "accuracy": 92.4}]))
        method  accuracy
        ------  --------
        SAM         92.4
    """
    if not rows:
        return ""
    columns = list(rows[0])
    cells = [["" if row.get(c) is None else str(row.get(c, "")) for c in columns] for row in rows]
    widths = [max(len(c), *(len(line[i]) for line in cells)) for i, c in enumerate(columns)]
    left = [isinstance(rows[0][c], str) and not str(rows[0][c])[:1].isdigit() for c in columns]

    def lay_out(line: Sequence[str]) -> str:
        parts = [
            text.ljust(width) if is_left else text.rjust(width)
            for text, width, is_left in zip(line, widths, left, strict=True)
        ]
        return "  ".join(parts).rstrip()

    return "\n".join([lay_out(columns), "  ".join("-" * w for w in widths), *map(lay_out, cells)])


def show_result(summary: Mapping[str, Any], text: str, *, as_json: bool) -> None:
    """Print the result on stdout: `text` for a person, or `summary` as one JSON object.

    Examples:
        >>> show_result({"accuracy": 0.5}, "accuracy 50 %", as_json=True)
        {"accuracy": 0.5}
    """
    print(json.dumps(to_plain(summary), allow_nan=False) if as_json else text, flush=True)


def run_app(app: typer.Typer, argv: Sequence[str] | None = None) -> int:
    """Run a command line and turn every outcome into an exit code.

    Args:
        app: The app.
        argv: The arguments (default: the process's).

    Returns:
        0, 1, 2 or 130.

    Examples:
        >>> run_app(new_app("tool", "A tool."), ["--help"]) # doctest: +ELLIPSIS
        Usage: tool [OPTIONS] COMMAND [ARGS]...
        ...
        0
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = app.info.name or "command"
    try:
        with warnings.catch_warnings():
            if "--debug" not in arguments:
                warnings.showwarning = functools.partial(_note, name)
            outcome = typer.main.get_command(app).main(
                args=list(arguments), prog_name=name, standalone_mode=False
            )
        code = outcome if isinstance(outcome, int) else 0
    except typer.Exit as stop:
        code = stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        return _report(name, error, arguments)
    if code == 130:
        say(f"{name}: interrupted")
    return code


def _note(name: str, message: Warning | str, *where: Any, **more: Any) -> None:
    """Show a warning as a line for a person, without the place in our code that raised it."""
    say(f"{name}: note: {message}")


def _value_given(error: Any, arguments: Sequence[str]) -> str:
    """Name the offending value, which newer versions of typer leave out of their message."""
    names = getattr(getattr(error, "param", None), "opts", [])
    for option, value in itertools.pairwise(arguments):
        if option in names:
            return f" (got {value!r})"
    return ""


def _report(name: str, error: Exception, arguments: Sequence[str]) -> int:
    """Print an error as one or two lines and choose the exit code."""
    debug = "--debug" in arguments
    if type(error).__name__ == "NoArgsIsHelpError":
        say(error.format_message())  # type: ignore[attr-defined]
        return 2
    if debug and not isinstance(error, _UsageError):
        traceback.print_exception(error)
    if isinstance(error, _ClickException):
        message = " ".join(str(error.format_message()).split())  # type: ignore[attr-defined]
        context = getattr(error, "ctx", None)
        path = context.command_path if context else name
        say(f"{name}: {message}{_value_given(error, arguments)}\nTry '{path} --help'.")
        return 2
    if isinstance(error, InputError | MissingExtraError):
        say(f"{name}: {error}")
        return 2
    if isinstance(error, BrokenPipeError):
        # The reader went away; without this the interpreter complains again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        say(f"{name}: the disk is full: {error.filename or error}; files already written are whole")
        return 1
    hint = "" if debug else " (--debug shows the traceback)"
    say(f"{name}: {type(error).__name__}: {error}{hint}")
    return 1

"""The page of all command lines, read off the code: ``python docs/commands.py`` writes it anew.

All packages have to be installed. A test compares the page with what this makes, and refuses an
option that means two things.
"""

import importlib
import inspect
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "commands.md"
# What the frame of the command lines gives to all packages (`shared_core.cli`).
HOUSE = ("--out", "--seed", "--device", "--json", "--quick", "--resume", "--plots", "--debug")


@dataclass(frozen=True)
class Option:
    """One option of one command."""

    package: str
    command: str
    name: str
    kind: str
    help: str
    required: bool


@dataclass(frozen=True)
class Command:
    """One command of a package: what it does, and its arguments and options."""

    package: str
    name: str
    summary: str
    arguments: tuple[str, ...]
    options: tuple[Option, ...]
    required: tuple[tuple[str, str], ...]
    """Names and kinds of what has no default: options such as ``--data``, arguments as ``TEXT``."""


def _kind(annotation: Any) -> str:
    """How a value is written: ``Path | None`` takes what ``Path`` takes, so do lists of it."""
    inner = [a for a in get_args(annotation) if a is not type(None)]
    if get_origin(annotation) is list or (inner and len(inner) == 1):
        return _kind(inner[0])
    return getattr(annotation, "__name__", str(annotation))


@dataclass(frozen=True)
class Argument:
    """One argument of one command, which stands without a name."""

    name: str
    kind: str
    required: bool


def _parameters(package: str, command: str, function: Any) -> Iterator[Option | Argument]:
    for parameter in inspect.signature(function).parameters.values():
        assert get_origin(parameter.annotation) is Annotated, (package, command, parameter)
        annotation, info = get_args(parameter.annotation)[:2]
        required = parameter.default is inspect.Parameter.empty
        if isinstance(info, typer.models.ArgumentInfo):
            yield Argument(parameter.name.upper(), _kind(annotation), required)
            continue
        # In an Annotated option the first name stands where the default otherwise does.
        names = [str(info.default), *(info.param_decls or ())]
        long = [d.split("/")[0] for d in names if d.startswith("--")]
        name = long[0] if long else "--" + parameter.name.replace("_", "-")
        help = " ".join((info.help or "").split())
        yield Option(package, command, name, _kind(annotation), help, required)


def commands() -> list[Command]:
    """Every command of every package, in alphabetical order."""
    found = []
    for file in sorted(ROOT.glob("packages/*/pyproject.toml")):
        package = tomllib.loads(file.read_text(encoding="utf-8"))["project"]["name"]
        app = importlib.import_module(f"{package.replace('-', '_')}.cli").app
        for entry in app.registered_commands:
            function: Any = entry.callback
            name = entry.name or function.__name__.replace("_", "-")
            parts = list(_parameters(package, name, function))
            found.append(
                Command(
                    package,
                    name,
                    (inspect.getdoc(function) or "").split("\n\n")[0].replace("\n", " "),
                    tuple(p.name for p in parts if isinstance(p, Argument)),
                    tuple(p for p in parts if isinstance(p, Option)),
                    tuple((p.name, p.kind) for p in parts if p.required),
                )
            )
    return sorted(found, key=lambda c: (c.package, c.name))


def page(found: list[Command]) -> str:
    """The page: house options, commands, and options that several packages have."""
    packages = sorted({c.package for c in found})
    lines = [
        "# Command lines",
        "",
        "Every package brings one command, named like itself. This page is made from the code by",
        "`docs/commands.py`; a test keeps it true.",
        "",
        "The house's options mean the same wherever they stand; a command has those that do "
        "something there.",
        "",
        "| option | meaning |",
        "|---|---|",
    ]
    options = [o for c in found for o in c.options]
    for name in HOUSE:
        texts = {o.help for o in options if o.name == name}
        lines += [f"| `{name}` | {' / '.join(sorted(texts))} |"]
    lines += ["", "Exit codes: 0 it ran; 2 bad input or usage; 130 interrupted; 1 anything else."]
    for package in packages:
        lines += ["", f"## {package}", "", "| command | what it does | options |", "|---|---|---|"]
        for command in (c for c in found if c.package == package):
            words = " ".join([command.name, *command.arguments])
            own = ", ".join(f"`{o.name}`" for o in command.options if o.name != "--debug")
            lines += [f"| `{words}` | {command.summary} | {own} |"]
    lines += [
        *["", "## Options that several packages have", ""],
        *["| option | value | packages |", "|---|---|---|"],
    ]
    for name in sorted({o.name for o in options} - set(HOUSE)):
        holders = sorted({o.package for o in options if o.name == name})
        if len(holders) > 1:
            kinds = sorted({o.kind for o in options if o.name == name})
            lines += [f"| `{name}` | {', '.join(kinds)} | {', '.join(holders)} |"]
    return "\n".join(lines).replace("<", "&lt;") + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(commands()), encoding="utf-8")

"""The page of the papers' runs: every command on it is one that its program understands."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import typer.main

PAGE = Path(__file__).resolve().parent.parent / "docs" / "recipes.md"
PACKAGES = sorted(file.parent.name for file in PAGE.parent.parent.glob("packages/*/pyproject.toml"))
GETTERS = {
    "preset": {"get_preset", "get_benchmark", "load_preset"},
    "recipe": {"get_recipe"},
}
TEXT = PAGE.read_text(encoding="utf-8")


def commands(text: str) -> list[list[str]]:
    """The words of each command in the blocks of a page."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def called(words: list[str]) -> tuple[str, list[str]]:
    """The package that a command calls, by name or through torchrun, and what it is given."""
    if words[0] == "torchrun":
        at = words.index("-m")
        return words[at + 1].removesuffix(".cli").replace("_", "-"), words[at + 2 :]
    return words[0], words[1:]


def test_every_package_has_a_section_with_its_own_commands() -> None:
    parts = re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]
    assert [part.split("\n", 1)[0] for part in parts] == PACKAGES
    for part in parts:
        name = part.split("\n", 1)[0]
        assert {called(words)[0] for words in commands(part)} == {name}
        assert "Hardware: " in part


@pytest.mark.parametrize("words", commands(TEXT), ids=" ".join)
def test_the_program_understands_the_command(words: list[str]) -> None:
    package, given = called(words)
    group = typer.main.get_command(importlib.import_module(f"{package.replace('-', '_')}.cli").app)
    presets = importlib.import_module(f"{package.replace('-', '_')}.presets")
    command = group.commands[given[0]]
    with command.make_context(given[0], given[1:]) as context:
        for option in ("preset", "recipe"):
            if value := context.params.get(option):
                [getter] = GETTERS[option] & set(vars(presets))
                getattr(presets, getter)(value)  # which refuses what it does not know

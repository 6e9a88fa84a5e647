"""One way of doing things: the page of command lines is true, and the house's options are one."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))
from commands import HOUSE, PAGE, Option, commands, page  # noqa: E402 - docs/ is no package

ALL = commands()
OPTIONS = [option for command in ALL for option in command.options]


def test_the_page_of_command_lines_is_made_from_the_code() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(ALL), "run: python docs/commands.py"


@pytest.mark.parametrize("name", HOUSE)
def test_an_option_of_the_house_takes_one_kind_of_value(name: str) -> None:
    assert len({option.kind for option in OPTIONS if option.name == name}) == 1


@pytest.mark.parametrize("name", ["--device", "--json", "--quick", "--resume", "--plots"])
def test_an_option_of_the_house_has_one_meaning(name: str) -> None:
    assert len({option.help for option in OPTIONS if option.name == name}) == 1


def holders(name: str, options: list[Option]) -> set[str]:
    return {option.package for option in options if option.name == name}


def test_every_package_has_a_demo_with_the_options_of_the_house() -> None:
    packages = {command.package for command in ALL}
    of_demos = [o for c in ALL if c.name == "demo" for o in c.options]
    for name in ("--out", "--seed", "--device", "--json", "--quick"):
        assert holders(name, of_demos) == packages, name


def test_every_command_can_answer_in_json() -> None:
    assert [c for c in ALL if "--json" not in {o.name for o in c.options}] == []


def test_the_same_number_is_called_the_same() -> None:
    for name, kind in {
        **{"--lr": "float", "--weight-decay": "float", "--temperature": "float"},
        **{"--batch-size": "int", "--max-steps": "int", "--max-length": "int", "--workers": "int"},
        **{"--max-new-tokens": "int", "--lora-r": "int", "--repeats": "int", "--seeds": "int"},
        **{"--dtype": "str", "--model": "str", "--data": "str", "--preset": "str"},
    }.items():
        assert {option.kind for option in OPTIONS if option.name == name} == {kind}, name

"""What the front page promises: the two commands, the table, the code, no foreign packages."""

import itertools
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLDERS = {
    tomllib.loads(file.read_text(encoding="utf-8"))["project"]["name"]: file.parent
    for file in sorted(ROOT.glob("packages/*/pyproject.toml"))
}


def bare_installs(text: str, names: set[str]) -> list[str]:
    """The pip or uv commands in a text that would ask an index for one of `names`."""
    found = []
    for line in text.splitlines():
        for command in re.findall(r"(?:pip|uv) (?:install|add|tool install)\b([^`&|;]*)", line):
            words = [re.split(r"[\[=<>~!]", word.strip("\"'"))[0] for word in command.split()]
            # "name @ url" says where the distribution comes from
            located = {word for word, after in itertools.pairwise(words) if after == "@"}
            if set(words) & names - located:
                found.append(line.strip())
    return found


def test_the_readme_has_a_row_for_every_package() -> None:
    rows = re.findall(r"^\| \[([\w-]+)\]\((packages/[\w-]+)/README\.md\) \|", README, re.MULTILINE)
    folders = {dist: f"packages/{folder.name}" for dist, folder in FOLDERS.items()}
    assert dict(rows) == folders


def test_the_ci_runs_the_test_command_of_the_readme() -> None:
    block = re.search(r"^```(?:bash|sh|console|shell)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    commands = [line.split(" #")[0].strip() for line in block[1].splitlines()]
    assert commands == [
        "python -m pip install uv && uvx nox -s demo",
        "python -m pip install uv && uvx nox",
    ]
    assert (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()[-1] == commands[1]


def test_the_code_on_the_front_page_runs() -> None:
    [code] = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(code, names)
    assert names["loss"].isfinite()
    assert code.count("# ") == 3


def test_nothing_asks_an_index_for_one_of_our_names() -> None:
    planned = set(re.findall(r"^\| \[?([a-z][\w-]+)\]?[^|]*\|", README, re.MULTILINE))
    names = (planned | {"shared-core", *FOLDERS}) - {"package"}
    assert {"lede", "diffeat", "focal-sam"} <= names
    files = [ROOT / "noxfile.py", ROOT / ".ci/run", ROOT / "mkdocs.yml", *ROOT.glob("*.md")]
    files += [*ROOT.glob(".github/workflows/*.yml"), *ROOT.glob("benchmarks/*.md")]
    files += [folder / "README.md" for folder in (ROOT / "shared", *FOLDERS.values())]
    found = {f.name: bare_installs(f.read_text(encoding="utf-8"), names) for f in files}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "line",
    [
        "pip install lede",
        "python -m pip install -U 'lede[all]>=0.1'",
        "uv add torch lede",
        "`pip install lede` and go",
    ],
)
def test_a_bare_install_is_seen(line: str) -> None:
    assert bare_installs(line, {"lede"})


@pytest.mark.parametrize(
    "line",
    [
        "pip install ./packages/lede",
        'pip install "lede @ git+$REPOSITORY#subdirectory=packages/lede"',
        "pip install lede-0.1.0-py3-none-any.whl",
        "pip install uv && lede demo",
    ],
)
def test_an_install_from_elsewhere_is_let_through(line: str) -> None:
    assert bare_installs(line, {"lede"}) == []

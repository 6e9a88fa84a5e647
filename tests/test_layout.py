"""The rules of the house that can be read off the tree: rooms, imports, names, no unpickling."""

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {
    *["accelerate", "datasets", "diffusers", "lightning", "matplotlib", "open_clip", "pandas"],
    *["peft", "scipy", "sklearn", "timm", "tokenizers", "torchmetrics", "torchvision"],
    *["transformers", "typer"],
}


@dataclass(frozen=True)
class Package:
    folder: Path

    @cached_property
    def data(self) -> dict[str, Any]:
        return tomllib.loads((self.folder / "pyproject.toml").read_text(encoding="utf-8"))

    @property
    def dist(self) -> str:
        return self.data["project"]["name"]

    @property
    def module(self) -> str:
        [init] = self.folder.glob("src/*/__init__.py")
        return init.parent.name

    @property
    def source(self) -> Path:
        return self.folder / "src" / self.module

    def requirements(self, *, development: bool) -> set[str]:
        """The names that it asks for at run time, extras included, or with its groups too."""
        project = self.data["project"]
        lists = [project["dependencies"], *project.get("optional-dependencies", {}).values()]
        if development:
            lists += self.data.get("dependency-groups", {}).values()
        return {re.match(r"[\w.-]+", line)[0] for lines in lists for line in lines}


SHARED = Package(ROOT / "shared")
METHODS = [Package(file.parent) for file in sorted(ROOT.glob("packages/*/pyproject.toml"))]
PACKAGES = [SHARED, *METHODS]
DIST_OF = {package.module: package.dist for package in PACKAGES}
every_package = pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.dist)
every_method = pytest.mark.parametrize("package", METHODS, ids=lambda p: p.dist)


def python_files(*folders: Path) -> Iterator[Path]:
    for folder in folders:
        yield from (f for f in sorted(folder.rglob("*.py")) if "__pycache__" not in f.parts)


def imported_roots(file: Path) -> set[str]:
    """The top-level names that a file imports anywhere, also inside functions."""
    roots = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            roots.add(node.module.split(".")[0])
    return roots


def unpickling(source: str) -> list[str]:
    """The calls in a piece of source that would run code found in a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name == "pickle.loads" and ast.unparse(node.args[0]).startswith("pickle.dumps("):
            continue  # a round trip of an object at hand
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        module, _, function = name.rpartition(".")
        if (
            (module in {"pickle", "dill", "cloudpickle", "joblib"} and "load" in function.lower())
            or function in {"Unpickler", "read_pickle"}
            or (name == "torch.load" and given.get("weights_only") != "True")
            or (name in {"np.load", "numpy.load"} and given.get("allow_pickle") == "True")
        ):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@every_package
def test_every_package_has_the_same_rooms(package: Package) -> None:
    rooms = ["README.md", "LICENSE", "pyproject.toml", f"src/{package.module}/py.typed"]
    if package is not SHARED:
        rooms += [f"src/{package.module}/{name}.py" for name in ("cli", "demo", "presets")]
    assert [room for room in rooms if not (package.folder / room).is_file()] == []
    assert list(package.folder.glob("tests/test_*.py"))
    assert (package.folder / "README.md").read_text(encoding="utf-8").startswith("# ")
    if package is not SHARED:
        assert package.folder.name == package.dist
        assert package.data["project"]["scripts"] == {package.dist: f"{package.module}.cli:main"}
        assert package.module == package.dist.replace("-", "_")


@every_package
def test_every_package_carries_the_license(package: Package) -> None:
    assert (package.folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


@every_package
def test_the_version_is_said_alike_in_both_places(package: Package) -> None:
    init = (package.source / "__init__.py").read_text(encoding="utf-8")
    assert f'__version__ = "{package.data["project"]["version"]}"' in init


@every_package
def test_siblings_come_from_the_workspace_and_never_from_an_index(package: Package) -> None:
    siblings = package.requirements(development=True) & set(DIST_OF.values()) - {package.dist}
    sources = package.data["tool"]["uv"]["sources"]
    assert {name: sources.get(name) for name in siblings} == {
        name: {"workspace": True} for name in siblings
    }


@every_package
def test_a_package_imports_only_the_siblings_that_it_declares(package: Package) -> None:
    declared = package.requirements(development=False)
    for file in python_files(package.source):
        siblings = {DIST_OF[root] for root in imported_roots(file) & set(DIST_OF)}
        assert siblings - {package.dist} <= declared, file


def test_the_packages_depend_on_each_other_as_planned() -> None:
    planned = {"bridge-garden": {"abkd"}, "content-shift": {"diffeat"}}
    methods = {p.dist for p in METHODS}
    for package in METHODS:
        siblings = package.requirements(development=False) & methods - {package.dist}
        assert siblings == planned.get(package.dist, set()), package.dist


def test_the_packages_do_not_depend_on_each_other_in_a_circle() -> None:
    names = set(DIST_OF.values())
    graph = {p.dist: p.requirements(development=False) & names - {p.dist} for p in PACKAGES}
    assert next(iter(graphlib.TopologicalSorter(graph).static_order())) == SHARED.dist


def test_the_core_imports_no_model_library() -> None:
    for file in python_files(SHARED.source):
        assert not imported_roots(file) & {"transformers", "diffusers", "open_clip"}, file


@every_method
def test_the_method_does_not_know_its_command_line(package: Package) -> None:
    for file in python_files(package.source):
        if file.stem in {"cli", "__main__"}:
            continue
        text = file.read_text(encoding="utf-8")
        assert f"{package.module}.cli" not in text, file
        assert "shared_core.cli" not in text or file.stem == "demo", file


@every_package
def test_examples_stand_in_sections_that_the_site_shows_as_code(package: Package) -> None:
    for file in python_files(package.source):
        assert not re.search(r"^ *Example:$", file.read_text(encoding="utf-8"), re.MULTILINE), file


@every_package
def test_importing_a_package_costs_what_importing_torch_costs(package: Package) -> None:
    program = (
        "import sys, torch; before = set(sys.modules)\n"
        f"import {package.module}\n"
        "loaded = set(sys.modules) - before\n"
        "compiler = loaded & {'torch._dynamo', 'torch._inductor'}\n"
        "print(*{name.split('.')[0] for name in loaded} | compiler)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    loaded = set(run.stdout.split())
    assert package.module in loaded
    assert loaded & (HEAVY | {"sympy", "torch._dynamo", "torch._inductor"}) == set()


def test_the_lock_knows_one_index_and_takes_siblings_from_their_folders() -> None:
    lock = tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))
    sources = {package["name"]: package["source"] for package in lock["package"]}
    for package in PACKAGES:
        folder = package.folder.relative_to(ROOT).as_posix()
        assert sources.pop(package.dist) == {"editable": folder}
    assert sources.pop("tenfold") == {"virtual": "."}
    assert {str(source) for source in sources.values()} == {
        str({"registry": "https://pypi.org/simple"})
    }


def test_nothing_unpickles() -> None:
    folders = [*(p.folder for p in PACKAGES), *(ROOT / f for f in ("tests", "docs", "benchmarks"))]
    for file in [ROOT / "noxfile.py", *python_files(*folders)]:
        assert unpickling(file.read_text(encoding="utf-8")) == [], file


@pytest.mark.parametrize(
    "source",
    [
        "pickle.load(f)",
        "pickle.loads(data)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "joblib.load(path)",
        "pandas.read_pickle(path)",
        "pickle.Unpickler(f).load()",
    ],
)
def test_unpickling_is_seen(source: str) -> None:
    assert unpickling(source)


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path, weights_only=True)",
        "np.load(path)",
        "json.load(f)",
        "pickle.loads(pickle.dumps(x))",
    ],
)
def test_harmless_loading_is_let_through(source: str) -> None:
    assert unpickling(source) == []

"""The table of measured ratios: it is that of the result files, and a regression is noticed."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


def script(path: Path) -> ModuleType:
    """A script as a module. Its folder must not be searched: files there are named as packages."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for their module there
    spec.loader.exec_module(module)
    return module


compare = script(ROOT / "benchmarks" / "compare.py")
RATIOS, RESULTS, Ratio = compare.RATIOS, compare.RESULTS, compare.Ratio
met, table, value_of, worse = compare.met, compare.table, compare.value_of, compare.worse


def test_every_ratio_stands_in_a_result_file() -> None:
    missing = [(r.file, r.path) for r in RATIOS if value_of(r, RESULTS) is None]
    assert not missing
    packages = {file.parent.name for file in ROOT.glob("packages/*/pyproject.toml")}
    assert {r.package for r in RATIOS} == packages


def test_the_page_is_that_of_the_results() -> None:
    again = "run python benchmarks/compare.py --page"
    assert compare.PAGE.read_text(encoding="utf-8") == compare.page(RESULTS), again


@pytest.mark.parametrize(
    ("small", "factor", "noticed"),
    [
        (False, 0.7, True),
        (False, 0.9, False),
        (False, 2, False),
        (True, 1.4, True),
        (True, 1.1, False),
        (True, 0.5, False),
    ],
)
def test_a_regression_beyond_noise_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: bool, factor: float, noticed: bool
) -> None:
    ratio = next(r for r in RATIOS if r.small == small)
    shutil.copytree(RESULTS, tmp_path / "now")
    file = tmp_path / "now" / f"{ratio.file}.json"
    found = inner = json.loads(file.read_text(encoding="utf-8"))
    for key in ratio.path[:-1]:
        inner = inner[key]
    inner[ratio.path[-1]] *= factor
    file.write_text(json.dumps(found), encoding="utf-8")
    lines = list(worse(RESULTS, tmp_path / "now"))
    assert len(lines) == noticed
    argv = ["compare.py", "--results", str(tmp_path / "now"), "--before", str(RESULTS)]
    monkeypatch.setattr(sys, "argv", argv)
    assert compare.main() == noticed


def test_targets_are_judged_and_a_lacking_file_is_left_out(tmp_path: Path) -> None:
    at_least = Ratio("a", "a", ("x",), "", 2)
    at_most = Ratio("a", "a", ("x",), "", 2, small=True)
    assert [met(at_least, v) for v in (1.9, 2, 2.1)] == ["missed", "met", "met"]
    assert [met(at_most, v) for v in (1.9, 2, 2.1)] == ["met", "met", "missed"]
    assert met(Ratio("a", "a", ("x",), ""), 1) == ""
    assert len(table(tmp_path).splitlines()) == 2

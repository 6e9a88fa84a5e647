"""The search over α and β: the grid, the rounds, resuming, the picture."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from abkd.cli import main
from abkd.heatmap import Search, search_grid
from shared_core.testing import CliResult

Run = Callable[..., CliResult]
pytestmark = pytest.mark.usefixtures("without_type_checks")


@pytest.mark.smoke
def test_the_grid_is_that_of_the_authors() -> None:
    pairs = search_grid()
    assert {round(a + b, 6) for a, b in pairs} == {0.9, 1.0, 1.1, 1.2}
    assert (0.2, 0.7) in pairs
    assert (0.1, 0.8) in pairs
    assert (0.8, 0.3) in pairs
    assert all(a > 0 and b > 0 for a, b in pairs)
    assert len(pairs) == len(set(pairs)) == 8 + 9 + 10 + 11


def test_a_search_halves_resumes_and_draws(
    pair: list[str], run_cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    import abkd.heatmap as the_heatmap

    argv = ["heatmap", *pair[1:7], "--sums", "0.9,1.2", "--alpha-step", "0.4", "--max-steps", 2]
    argv += ["--rounds", 2, "--keep", "0.4", "--batch-size", 4, "--lr", "0.01", "--device", "cpu"]
    argv += ["--json", "--out", "h"]
    calls = []
    real = the_heatmap._Trial.__call__

    def stop(self: Any, *cell: Any) -> dict[str, float]:
        calls.append(cell)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, *cell)

    monkeypatch.setattr(the_heatmap._Trial, "__call__", stop)
    assert run_cli(main, *argv).code == 130
    assert len(json.loads(Path("h/cells.json").read_text())) == 3
    refused = run_cli(main, *argv)
    assert refused.code == 2
    assert "continue it with --resume" in refused.stderr
    refused = run_cli(main, *argv, "--resume", "--lr", "0.02")
    assert refused.code == 2
    assert "other settings" in refused.stderr
    shown = run_cli(main, *argv, "--resume")
    assert shown.code == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert len(calls) == 4 + 1 + 2  # the cell that was cut, and those after it
    cells = found["cells"]
    first = [c for c in cells if c["round"] == 0]
    assert [(c["alpha"], c["beta"]) for c in first] == search_grid((0.9, 1.2), 0.4)
    assert {c["steps"] for c in cells} == {2, 4}
    second = {(c["alpha"], c["beta"]) for c in cells if c["round"] == 1}
    ranked = sorted(first, key=lambda c: c["ce"])
    assert second == {(c["alpha"], c["beta"]) for c in ranked[:2]}
    assert found["best"]["ce"] == min(c["ce"] for c in cells if c["round"] == 1)
    assert Path("h/heatmap.png").stat().st_size > 10_000
    monkeypatch.setattr(the_heatmap._Trial, "__call__", real)
    whole = run_cli(main, *argv[:-1], "w")
    assert json.loads(whole.stdout)["cells"] == cells


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--metric", "loss"], "accepted: ce, fkl"),
        (["--sums", "a"], "pass numbers with commas"),
        (["--sums", "0"], "have to be above 0"),
        (["--keep", "1.5"], "a share between 0 and 1"),
        (["--data", "./none.jsonl"], "none.jsonl"),
    ],
)
def test_errors(pair: list[str], run_cli: Run, options: list[str], message: str) -> None:
    shown = run_cli(main, "heatmap", *pair[1:7], "--device", "cpu", *options)
    assert shown.code == 2
    assert message in shown.stderr


def test_what_is_not_a_number_comes_last() -> None:
    search = Search(metric="agreement")
    assert sorted([0.2, float("nan"), 0.9], key=search.better)[:2] == [0.9, 0.2]

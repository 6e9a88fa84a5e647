"""Scores of any model from a file: csv, parquet or npz."""

import csv
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from shared_core.errors import InputError

__all__ = ["ScoresFile", "read_scores"]

_TRUE, _FALSE = {"1", "true", "yes", "base", "1.0"}, {"0", "false", "no", "new", "0.0"}
_ACCEPTED = "accepted: score, is_base (or domain: base/new), and correct (or pred and target)"


class ScoresFile(NamedTuple):
    """What a file of scores holds.

    Attributes:
        scores: Detector scores, float64, [n].
        correct: Bool, or float64 in [0, 1], [n].
        is_base: Bool, [n].
        target: Class of each sample as an index, if the file has it.
        joint_correct: Whether a classifier of all classes is right, if the file has it.
    """

    scores: Tensor
    correct: Tensor
    is_base: Tensor
    target: Tensor | None
    joint_correct: Tensor | None = None


def read_scores(path: str | Path) -> ScoresFile:
    r"""Read scores, correctness and domain of test samples.

    Columns (npz: arrays) are ``score``, larger meaning more base-like; ``is_base`` (0/1,
    true/false) or ``domain`` (base/new); and ``correct``, or ``pred`` and
    ``target`` within the sample's own domain. If there is ``joint_correct``, it says whether one
    classifier that chooses among all classes, base and new, is right.

    Args:
        path: A ``.csv``, ``.tsv``, ``.parquet`` or ``.npz`` file.

    Raises:
        InputError: If the file or a column is missing or cannot be read.
        MissingExtraError: If parquet is asked for without the extra ``data``.

    Examples:
        >>> path = getfixture("tmp_path") / "scores.csv"
        >>> _ = path.write_text("score,correct,domain\n0.9,1,base\n0.1,1,new\n")
        >>> read_scores(path).is_base
        tensor([ True, False])
    """
    source = Path(path)
    if not source.is_file():
        raise InputError(f"there is no file {source}")
    columns = _columns(source)
    if "score" not in columns:
        raise InputError(f"{source} has no column 'score', but {_names(columns)}; {_ACCEPTED}")
    scores = torch.from_numpy(_numbers(source, "score", columns["score"]))
    domain = next((n for n in ("is_base", "domain") if n in columns), None)
    if domain is None:
        raise InputError(f"{source} has no column 'is_base', but {_names(columns)}; {_ACCEPTED}")
    is_base = torch.from_numpy(_truth(source, domain, columns[domain]))
    target = None
    if "target" in columns:
        _, indices = np.unique(columns["target"].astype(str), return_inverse=True)
        target = torch.from_numpy(indices.astype(np.int64))
    if "correct" in columns:
        correct = torch.from_numpy(_correctness(source, "correct", columns["correct"]))
    elif "pred" in columns and "target" in columns:
        same = columns["pred"].astype(str) == columns["target"].astype(str)
        correct = torch.from_numpy(np.asarray(same))
    else:
        raise InputError(f"{source} has no column 'correct', but {_names(columns)}; {_ACCEPTED}")
    joint = None
    if "joint_correct" in columns:
        joint = torch.from_numpy(_correctness(source, "joint_correct", columns["joint_correct"]))
    return ScoresFile(scores, correct, is_base, target, joint)


def _names(columns: dict[str, Any]) -> str:
    return ", ".join(columns) or "nothing"


def _columns(path: Path) -> dict[str, np.ndarray]:
    kind = path.suffix.lower()
    try:
        if kind in (".csv", ".tsv"):
            with open(path, newline="", encoding="utf-8-sig") as file:
                rows = list(csv.reader(file, delimiter="\t" if kind == ".tsv" else ","))
            if len(rows) < 2:
                raise InputError(f"{path} has no rows under a line of column names")
            header = [name.strip() for name in rows[0]]
            body = [row for row in rows[1:] if row]
            for number, row in enumerate(rows[1:], start=2):
                if row and len(row) != len(header):
                    raise InputError(
                        f"line {number} of {path} has {len(row)} fields, the first {len(header)}"
                    )
            return {n: np.array(c) for n, c in zip(header, zip(*body, strict=True), strict=True)}
        if kind == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: arrays[name].ravel() for name in arrays.files}
        if kind == ".parquet":
            from shared_core.data.loading import load_rows

            table = load_rows(path).with_format("numpy")
            return {name: np.asarray(table[:][name]) for name in table.column_names}
    except InputError:
        raise
    except (OSError, ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    raise InputError(f"{path} is of no known kind; accepted: .csv, .tsv, .parquet, .npz")


def _numbers(path: Path, name: str, values: np.ndarray) -> np.ndarray:
    try:
        return values.astype(np.float64)
    except ValueError as error:
        raise InputError(f"column {name!r} of {path} does not hold numbers: {error}") from error


def _truth(path: Path, name: str, values: np.ndarray) -> np.ndarray:
    words = np.char.lower(np.char.strip(values.astype(str)))
    true, false = np.isin(words, list(_TRUE)), np.isin(words, list(_FALSE))
    unknown = ~(true | false)
    if unknown.any():
        raise InputError(
            f"column {name!r} of {path} holds {str(words[unknown][0])!r}; accepted: 1/0, "
            "true/false, base/new"
        )
    return np.asarray(true)


def _correctness(path: Path, name: str, values: np.ndarray) -> np.ndarray:
    words = np.char.lower(np.char.strip(values.astype(str)))
    if np.isin(words, list(_TRUE | _FALSE)).all():
        return _truth(path, name, values)
    return _numbers(path, name, values)

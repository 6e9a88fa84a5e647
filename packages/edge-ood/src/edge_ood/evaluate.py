"""Evaluation from saved logits and scores: no model, no images, any number of rows.

Logits in ``.npy`` and ``.safetensors`` are read through a memory map, in chunks of rows (scores)
and of columns (mAP); ``.npz``, and bfloat16, are read whole. In memory lie a score per row and a
byte per label. Nothing is unpickled.
"""

import json
import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from edge_ood.metrics import COCO_GRID, VOC_GRID, bucket_report, precision_areas, tail_curve
from edge_ood.scorers import get_scorer, list_scorers
from shared_core.errors import InputError
from shared_core.metrics import ood_metrics
from shared_core.run import load_state, progress

__all__ = [
    "Tables",
    "evaluate",
    "evaluation_rows",
    "figures",
    "open_array",
    "open_tables",
    "parse_grid",
    "score_array",
]

_ROWS = 65536
_COLUMNS = 16
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2"}
_DTYPES |= {"I8": "i1", "U8": "u1", "BOOL": "?"}


def open_array(path: str | os.PathLike[str], key: str | None = None) -> np.ndarray:
    """Open a table of numbers ``[n, C]`` (or ``[n]``).

    Args:
        path: A ``.npy``, ``.npz`` or ``.safetensors`` file; bfloat16 is read as float32.
        key: Which array of an ``.npz`` or ``.safetensors`` file; without it, ``logits``, or the
            only one.

    Raises:
        InputError: If the file is missing, damaged, of another kind, or the array is not clear.

    Examples:
        >>> path = getfixture("tmp_path") / "z.npy"
        >>> np.save(path, np.zeros((3, 2), dtype=np.float32))
        >>> open_array(path).shape
        (3, 2)
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"there is no file {file}")
    try:
        if file.suffix == ".npy":
            array: np.ndarray = np.load(file, mmap_mode="r")
        elif file.suffix == ".npz":
            with np.load(file) as archive:
                array = archive[_choose(list(archive), key, file)]
        elif file.suffix == ".safetensors":
            array = _open_safetensors(file, key)
        else:
            raise InputError(f"{file} is of no known kind; accepted: .npy, .npz, .safetensors")
    except InputError:
        raise
    except Exception as error:  # numpy, zipfile and safetensors each have their own
        raise InputError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error
    if array.ndim not in (1, 2) or array.dtype.kind not in "fiub":
        raise InputError(
            f"{file} holds shape {list(array.shape)} and dtype {array.dtype}; accepted: [n, C] "
            "numbers"
        )
    return array


def _choose(names: list[str], key: str | None, file: Path) -> str:
    if key is not None and key in names:
        return key
    if key is None and "logits" in names:
        return "logits"
    if key is None and len(names) == 1:
        return names[0]
    raise InputError(f"{file} holds {', '.join(names) or 'nothing'}; name one of them")


def _open_safetensors(file: Path, key: str | None) -> np.ndarray:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:  # which checks the header
        name = _choose(list(opened.keys()), key, file)
        with open(file, "rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            entry = json.loads(raw.read(length))[name]
        if entry["dtype"] not in _DTYPES or 0 in entry["shape"]:
            tensor = opened.get_tensor(name)
            array: np.ndarray = tensor.float().numpy()
            return array
    start, shape = 8 + length + entry["data_offsets"][0], tuple(entry["shape"])
    # The library's own slices copy, and cannot take the place of an array.
    return np.memmap(file, _DTYPES[entry["dtype"]], "r", start, shape)


class Tables(NamedTuple):
    """What there is to evaluate of one set.

    Attributes:
        logits: ``[n, C]``.
        labels: ``[n, C]``, if there are some.
        counts: Training samples of each class, if known.
        scores: Scores computed elsewhere, by scorer.
    """

    logits: np.ndarray
    labels: np.ndarray | None
    counts: list[int] | None
    scores: dict[str, Tensor]


def open_tables(
    path: str | os.PathLike[str],
    labels: str | os.PathLike[str] | None = None,
    counts: str | os.PathLike[str] | None = None,
) -> Tables:
    """Open logits and what lies beside them.

    Args:
        path: A file of logits, or a folder that ``edge-ood score`` wrote.
        labels: A file of labels in place of the folder's.
        counts: A file of class counts in place of the folder's.

    Raises:
        InputError: As `open_array`.

    Examples:
        >>> folder = getfixture("tmp_path")
        >>> np.save(folder / "logits.npy", np.zeros((3, 2), dtype=np.float32))
        >>> open_tables(folder).logits.shape
        (3, 2)
    """
    where = Path(path)
    scores: dict[str, Tensor] = {}
    if where.is_dir():
        labels = _beside(where / "labels.npy") if labels is None else labels
        counts = _beside(where / "train_counts.npy") if counts is None else counts
        table = where / "scores.safetensors"
        scores = load_state(table) if table.is_file() else {}
        where = where / "logits.npy"
    return Tables(
        open_array(where),
        None if labels is None else open_array(labels),
        None if counts is None else [int(c) for c in open_array(counts).ravel()],
        scores,
    )


def _beside(path: Path) -> Path | None:
    return path if path.is_file() else None


def _chunks(array: np.ndarray, description: str) -> Iterator[Tensor]:
    starts = range(0, len(array), _ROWS)
    for start in progress(starts, description=description, unit="chunk"):
        # A copy, since torch warns about read-only memory.
        part = torch.from_numpy(np.array(array[start : start + _ROWS]))
        yield part if part.dtype == torch.float64 else part.float()


def score_array(array: np.ndarray, scorer: Any, name: str = "logits") -> Tensor:
    """Scores ``[n]`` of a table of logits, chunk by chunk.

    Raises:
        InputError: If the table is empty or not two-dimensional, or a score is NaN or infinite.

    Examples:
        >>> score_array(np.zeros((2, 3), dtype=np.float32), get_scorer("max_logit"))
        tensor([0., 0.])
    """
    if array.ndim != 2 or 0 in array.shape:
        raise InputError(f"{name} have shape {list(array.shape)}; accepted: [n, C], not empty")
    scores = torch.cat([scorer.score(part) for part in _chunks(array, scorer.name)])
    return _finite(scores, scorer.name, name)


def _finite(scores: Tensor, scorer: str, name: str) -> Tensor:
    bad = ~scores.isfinite()
    if bad.any():
        raise InputError(
            f"{int(bad.sum())} of {len(scores)} {scorer} scores of {name} are NaN or "
            f"infinite, the first at row {int(bad.nonzero()[0])}; remove or repair these rows"
        )
    return scores


def evaluate(
    id_logits: np.ndarray,
    ood_logits: Mapping[str, np.ndarray],
    labels: np.ndarray | None = None,
    *,
    scorers: Sequence[str] = ("joint_energy",),
    id_scores: Mapping[str, Tensor] | None = None,
    ood_scores: Mapping[str, Mapping[str, Tensor]] | None = None,
    class_counts: Sequence[int] | None = None,
    fit_logits: np.ndarray | None = None,
    rule: Literal["nearest", "at_least"] = "nearest",
    grid: Sequence[int] | None = None,
    topk: int = 5,
) -> dict[str, Any]:
    """Evaluate scores of logits: detection for each OOD set, mAP, and the spectrum of labels.

    Args:
        id_logits: Logits of the ID test set, ``[n, C]``.
        ood_logits: Those of each OOD set, by name.
        labels: Labels of the ID test set, 0 or 1, ``[n, C]``; for mAP, tail curve and buckets.
        scorers: Names of scorers of logits; ``["all"]`` takes all of them (those that have to be
            fitted only with `fit_logits`).
        id_scores: Scores of the ID test set that were computed elsewhere, by scorer, ``[n]``, high
            = ID: those of features and of inputs, which logits alone do not give
            (`edge_ood.scoring.score_source` writes them). They are evaluated beside `scorers`.
        ood_scores: For each OOD set the same.
        class_counts: TRAINING samples of each class; without them classes are ordered by the
            labels evaluated, as in the published protocol.
        fit_logits: Held-out ID logits to fit LOF and isolation forests on.
        rule: See `shared_core.metrics.ood_metrics`.
        grid: See `edge_ood.tail_curve`.
        topk: k of the score ``topk_energy``.

    Returns:
        ``scorers`` with ``ood``, ``mean``, ``tail_curve`` and ``buckets`` of each; ``mAP`` and
        ``mAP_trapezoid``; ``order_by``. Rates are fractions.

    Raises:
        InputError: If tables do not fit together, or a scorer needs more than logits.

    Examples:
        >>> z = np.array([[3.0, -1.0], [-2.0, 2.0]], dtype=np.float32)
        >>> found = evaluate(z, {"noise": z - 5}, np.eye(2))
        >>> found["scorers"]["joint_energy"]["mean"]["auroc"], found["mAP"]
        (1.0, 1.0)
    """
    if not ood_logits:
        raise InputError("there is no OOD set; give at least one")
    for name, array in ood_logits.items():
        if array.ndim != 2 or array.shape[1] != id_logits.shape[-1]:
            raise InputError(
                f"the OOD set {name} has shape {list(array.shape)}, the ID logits "
                f"{list(id_logits.shape)}; both need the same number of labels"
            )
    targets = _labels(labels, id_logits)
    if class_counts is not None and len(class_counts) != id_logits.shape[1]:
        raise InputError(f"{len(class_counts)} class counts for {id_logits.shape[1]} labels")
    order: Literal["train", "eval"] = "eval" if class_counts is None else "train"
    result: dict[str, Any] = {"n_id": len(id_logits), "scorers": {}}
    made = {s.name: s for s in _make_scorers(scorers, fit_logits, topk)}
    given = _given_scores(id_logits, ood_logits, id_scores or {}, ood_scores or {})
    for chosen in [*made, *(n for n in given if n not in made)]:
        if chosen in made:
            inside = score_array(id_logits, made[chosen], "the ID set")
            outside = {n: score_array(a, made[chosen], n) for n, a in ood_logits.items()}
        else:
            inside, outside = given[chosen]
        metrics = {n: dict(ood_metrics(inside, s, rule=rule)) for n, s in outside.items()}
        keys = [k for k in next(iter(metrics.values())) if not k.startswith("n_")]
        entry: dict[str, Any] = {
            "ood": metrics,
            "mean": {k: statistics.fmean(m[k] for m in metrics.values()) for k in keys},
        }
        if targets is not None:
            together = torch.cat(list(outside.values()))
            entry["tail_curve"] = tail_curve(
                inside,
                targets,
                together,
                class_counts=class_counts,
                order_by=order,
                grid=grid,
                rule=rule,
            )
            entry["buckets"] = bucket_report(
                inside, targets, together, class_counts=class_counts, order_by=order, rule=rule
            )
        result["scorers"][chosen] = entry
    if targets is not None:
        result |= _mean_precisions(id_logits, targets)
        result["order_by"] = order
    return result


def _given_scores(
    id_logits: np.ndarray,
    ood_logits: Mapping[str, np.ndarray],
    id_scores: Mapping[str, Tensor],
    ood_scores: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    """Scores computed elsewhere, checked against the logits of the same samples."""
    strangers = set(ood_scores) - set(ood_logits)
    if strangers:
        raise InputError(f"there are scores of {min(strangers)!r}, but no such OOD set")

    def checked(scores: Tensor, rows: int, scorer: str, name: str) -> Tensor:
        if scores.shape != (rows,):
            raise InputError(
                f"{scorer} scores of {name} have shape {list(scores.shape)} for {rows} rows of "
                "logits; score and logits come from one run of edge-ood score"
            )
        return _finite(scores, scorer, name)

    given = {}
    for scorer, scores in id_scores.items():
        lacking = [n for n in ood_logits if scorer not in ood_scores.get(n, {})]
        if lacking:
            raise InputError(f"the ID set has scores of {scorer}, the OOD set {lacking[0]} has not")
        outside = {
            n: checked(ood_scores[n][scorer], len(a), scorer, n) for n, a in ood_logits.items()
        }
        given[scorer] = checked(scores, len(id_logits), scorer, "the ID set"), outside
    return given


def _mean_precisions(id_logits: np.ndarray, targets: Tensor) -> dict[str, Any]:
    areas: list[tuple[float, float]] = []
    for start in range(0, id_logits.shape[1], _COLUMNS):
        z = torch.from_numpy(np.array(id_logits[:, start : start + _COLUMNS]))
        z = z if z.dtype == torch.float64 else z.float()
        found = precision_areas(z, targets[:, start : start + _COLUMNS])
        areas += zip(*(values.tolist() for values in found), strict=True)
    present = [pair for pair in areas if not math.isnan(pair[0])]
    step, trapezoid = zip(*present, strict=True) if present else ((), ())
    return {
        "mAP": statistics.fmean(step) if step else None,
        "mAP_trapezoid": statistics.fmean(trapezoid) if trapezoid else None,
        "classes_without_positives": len(areas) - len(present),
    }


def _labels(labels: np.ndarray | None, id_logits: np.ndarray) -> Tensor | None:
    if labels is None:
        return None
    if labels.shape != id_logits.shape:
        raise InputError(
            f"labels have shape {list(labels.shape)}, the ID logits {list(id_logits.shape)}; "
            "both need one row a sample and one column a label"
        )
    table = torch.empty(labels.shape, dtype=torch.bool)
    for start in range(0, len(labels), _ROWS):
        part = np.asarray(labels[start : start + _ROWS])
        if not ((part == 0) | (part == 1)).all():
            raise InputError("labels hold other numbers than 0 and 1")
        table[start : start + _ROWS] = torch.from_numpy(part != 0)
    return table


def _make_scorers(names: Sequence[str], fit_logits: np.ndarray | None, topk: int) -> list[Any]:
    known = list_scorers("logits")
    fitted = ("lof", "iforest")
    if list(names) == ["all"]:
        names = [n for n in known if n not in fitted or fit_logits is not None]
    made = []
    for name in names:
        if name not in known:
            raise InputError(
                f"scorer {name!r} cannot work on saved logits; accepted: all, {', '.join(known)}"
            )
        if name in fitted and fit_logits is None:
            raise InputError(f"scorer {name} has to be fitted: give held-out ID logits (--fit)")
        scorer = get_scorer(name, **({"k": topk} if name == "topk_energy" else {}))
        if fit_logits is not None:
            scorer.fit(torch.from_numpy(np.array(fit_logits)).float())
        made.append(scorer)
    return made


def parse_grid(text: str | None, classes: int) -> list[int] | None:
    """The j of a tail curve: ``voc``, ``coco`` (as published), or numbers by commas.

    Raises:
        InputError: If it is none of these.

    Examples:
        >>> parse_grid("0,1,3", 20), parse_grid("voc", 6)
        ([0, 1, 3], [0, 1, 3, 5])
    """
    if text is None:
        return None
    if text in ("voc", "coco"):
        published = VOC_GRID if text == "voc" else COCO_GRID
        return [j for j in published if j < classes]
    try:
        return [int(j) for j in text.split(",")]
    except ValueError as error:
        raise InputError(f"--grid {text}; accepted: voc, coco, or numbers by commas") from error


def evaluation_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A table of an evaluation: one row a scorer and OOD set, in percent, and means.

    Examples:
        >>> z = np.array([[3.0], [2.0]], dtype=np.float32)
        >>> evaluation_rows(evaluate(z, {"noise": z - 5}))[0]["AUROC %"]
        100.0
    """
    titles = {"fpr95": "FPR95 %", "auroc": "AUROC %", "aupr_in": "AUPR %"}
    titles["fpr95_ood_positive"] = "FPR95 (OOD positive) %"
    rows = []
    for scorer, entry in result["scorers"].items():
        sets = {**entry["ood"], **({"mean": entry["mean"]} if len(entry["ood"]) > 1 else {})}
        for name, metrics in sets.items():
            values = {title: round(100 * metrics[key], 2) for key, title in titles.items()}
            rows.append({"score": scorer, "OOD set": name, **values})
    return rows


def figures(
    result: Mapping[str, Any], id_logits: np.ndarray, ood_logits: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Pictures of an evaluation: ROC and precision-recall, scores, and tail curves.

    Args:
        result: What `evaluate` gave.
        id_logits: As given to it; of many rows, an even part is drawn.
        ood_logits: The same.
    """
    from edge_ood import plots

    def some(array: np.ndarray) -> Tensor:
        part = torch.from_numpy(np.array(array[:: max(1, len(array) // 100_000)]))
        scores: Tensor = get_scorer("joint_energy").score(part.float())
        return scores

    inside, outside = some(id_logits), {n: some(a) for n, a in ood_logits.items()}
    drawn = {
        "roc": plots.plot_curves({n: (inside, s) for n, s in outside.items()}),
        "energies": plots.plot_energies({"all": {"ID": inside, **outside}}),
    }
    curves = {n: e["tail_curve"] for n, e in result["scorers"].items() if "tail_curve" in e}
    if curves:
        drawn["tail_curve"] = plots.plot_tail_curves(curves)
    return drawn

"""The evaluation protocol: known and unknown images in one shuffled stream, fresh for every set.

Scores are ranked by their margins, which never tie by saturation; ``rank_by="score"`` has the
published code's ties. Two false-positive rates are in use and are different numbers: ``fpr95``
counts known images as positive (MCM, NegLabel), ``fpr95_ood_positive`` unknown ones (OpenOOD, the
published InterNeg code).
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from internet_neg.detector import InterNegDetector, OODOutput
from internet_neg.errors import InterNegError
from shared_core.metrics import ood_metrics
from shared_core.run import progress

__all__ = [
    "CONVENTIONS",
    "StreamResult",
    "compare",
    "read_imglist",
    "run_stream",
    "stream_metrics",
]

#: The two false-positive rates, as tables of this package call them.
CONVENTIONS = {
    "FPR95 (ID+)": "unknown images accepted where 95 % of the known ones are (MCM, NegLabel)",
    "FPR95 (OOD+)": "known images rejected where 95 % of the unknown ones are (InterNeg, OpenOOD)",
}


@dataclass
class StreamResult:
    """One stream, in its own order.

    Attributes:
        output: What the detector said of all images.
        order: Position of each image of the stream in the data that was given.
        growth: After each batch: ``seen``, ``gated``, ``accepted`` and ``bank``.
    """

    output: OODOutput
    order: Int[Tensor, " n"]
    growth: list[dict[str, int]] = field(default_factory=list)


def run_stream(
    detector: InterNegDetector,
    features: Float[Tensor, "n D"],
    *,
    batch_size: int = 256,
    seed: int | None = 0,
    update: bool = True,
) -> StreamResult:
    """Reset the detector, then score all embeddings batch by batch.

    Args:
        detector: A fitted detector.
        features: Image embeddings.
        batch_size: Images at a time; results depend on it where the detector learns.
        seed: Of the order; None keeps the given one.
        update: Whether the detector learns from the stream.

    Examples:
        >>> from internet_neg import InterNegConfig
        >>> detector = InterNegDetector.from_features(
        ...     torch.eye(3)[:1], torch.eye(3)[:1], torch.eye(3)[1:],
        ...     config=InterNegConfig(text_only=True, negatives=2, groups=1),
        ... )
        >>> run_stream(detector, torch.eye(3), batch_size=2).output.pred.tolist()
        [0, 0, 0]
    """
    if not len(features) or batch_size < 1:
        raise InterNegError(f"{len(features)} images in batches of {batch_size}; both at least 1")
    generator = torch.Generator().manual_seed(seed or 0)
    n = len(features)
    order = torch.arange(n) if seed is None else torch.randperm(n, generator=generator)
    detector.reset()
    outputs, growth, gated, accepted = [], [], 0, 0
    for start in progress(range(0, n, batch_size), description=detector.title, unit="batch"):
        part = order[start : start + batch_size].to(features.device)
        out = detector.predict(features=features[part], update=update)
        outputs.append(out)
        gated, accepted = gated + int(out.gated.sum()), accepted + int(out.accepted.sum())
        seen = min(start + batch_size, n)
        growth.append(
            {"seen": seen, "gated": gated, "accepted": accepted, "bank": len(detector.bank)}
        )
    joined: list[Any] = [
        None if columns[0] is None else torch.cat(columns) for columns in zip(*outputs, strict=True)
    ]
    return StreamResult(OODOutput(*joined), order, growth)


def stream_metrics(
    result: StreamResult,
    n_id: int,
    labels: Int[Tensor, " n"] | None = None,
    rank_by: Literal["margin", "score"] = "margin",
) -> dict[str, Any]:
    """Metrics of a stream whose first `n_id` given images are known.

    Args:
        result: What `run_stream` returned.
        n_id: Number of known images.
        labels: Their classes, for the ID accuracy.
        rank_by: ``margin``, or ``score`` with its ties.

    Returns:
        What `shared_core.metrics.ood_metrics` returns, ``id_accuracy`` (None without labels), and
        the share of known and of unknown images that were gated.
    """
    if rank_by not in ("margin", "score"):
        raise InterNegError(f"rank_by={rank_by!r}; accepted: margin, score")
    values = getattr(result.output, rank_by).cpu()
    known = result.order < n_id
    found: dict[str, Any] = dict(ood_metrics(values[known], values[~known]))
    found["id_accuracy"] = None
    if labels is not None:
        own = labels[result.order[known]]
        found["id_accuracy"] = float((result.output.pred.cpu()[known] == own).double().mean())
    gated = result.output.gated.cpu().double()
    found["gated_id"] = float(gated[known].mean())
    found["gated_ood"] = float(gated[~known].mean())
    found["bank"] = result.growth[-1]["bank"]
    return found


def compare(
    detectors: Mapping[str, InterNegDetector],
    known: Float[Tensor, "n D"],
    unknown: Mapping[str, Float[Tensor, "_ D"]],
    *,
    labels: Int[Tensor, " n"] | None = None,
    batch_size: int = 256,
    seeds: Sequence[int] = (0,),
    rank_by: Literal["margin", "score"] = "margin",
) -> tuple[dict[str, dict[str, dict[str, Any]]], dict[tuple[str, str], StreamResult]]:
    """All detectors on the same embeddings and streams.

    Args:
        detectors: Fitted detectors by name.
        known: Embeddings of known images.
        unknown: Embeddings of every set of unknown images, by name.
        labels: Classes of the known images.
        batch_size: Images at a time.
        seeds: Of the order of the streams; metrics are means over them.
        rank_by: See `stream_metrics`.

    Returns:
        Metrics by detector and set, with ``average`` over the sets, where each metric has a list of
        its values by seed under ``by_seed``; and the stream of the first seed by detector and set.
    """
    if not unknown or not seeds:
        raise InterNegError("give at least one set of unknown images and one seed")
    table: dict[str, dict[str, dict[str, Any]]] = {}
    streams: dict[tuple[str, str], StreamResult] = {}
    for name, detector in detectors.items():
        table[name] = {}
        for ood, features in unknown.items():
            runs = []
            for seed in seeds:
                joined = torch.cat([known, features.to(known)])
                result = run_stream(detector, joined, batch_size=batch_size, seed=seed)
                streams.setdefault((name, ood), result)
                runs.append(stream_metrics(result, len(known), labels, rank_by))
            table[name][ood] = {**_mean(runs), "by_seed": runs}
        sets = [{k: v for k, v in e.items() if k != "by_seed"} for e in table[name].values()]
        table[name]["average"] = _mean(sets)
    return table, streams


def _mean(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        key: None if runs[0][key] is None else sum(run[key] for run in runs) / len(runs)
        for key in runs[0]
    }


def read_imglist(
    path: str | os.PathLike[str], root: str | os.PathLike[str]
) -> tuple[list[Path], list[int]]:
    r"""Images and labels of an OpenOOD list, ``relative/path label`` a line; -1 is unknown.

    Args:
        path: The list.
        root: The folder that the paths are relative to.

    Raises:
        InterNegError: If it is missing, or a line is not of that form.

    Examples:
        >>> path = getfixture("tmp_path") / "list.txt"
        >>> _ = path.write_text("a/x y.jpg 3\nb.jpg -1\n")
        >>> [file.name for file in read_imglist(path, "images")[0]]
        ['x y.jpg', 'b.jpg']
    """
    images, labels = [], []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InterNegError(f"cannot read the image list {path}: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, _, label = line.rpartition(" ")
        try:
            labels.append(int(label))
        except ValueError:
            name = ""
        if not name.strip():
            raise InterNegError(f"{path}, line {number}: {line!r} is not 'path label'")
        images.append(Path(root) / name.strip())
    if not images:
        raise InterNegError(f"the image list {path} is empty")
    return images, labels

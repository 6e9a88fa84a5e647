"""Scoring files and image sets with a saved detector, and setting its threshold."""

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from edge_ood.datasets import eval_transform, train_transform
from edge_ood.detector import CONFIG, OODDetector
from edge_ood.evaluate import open_array, score_array
from edge_ood.loop import collect
from edge_ood.scorers import get_scorer, list_scorers
from edge_ood.sources import load_id, load_outliers
from shared_core.device import seed_everything
from shared_core.errors import InputError
from shared_core.run import RunFolder, atomic_path, load_state

__all__ = ["calibrate_folder", "score_source"]

REFERENCE = "reference.safetensors"
_TABLES = (".npy", ".npz", ".safetensors")


def score_source(
    checkpoint: Path,
    source: str,
    run: RunFolder,
    *,
    scorer: str = "joint_energy",
    split: str = "test",
    official_transforms: bool = False,
    batch_size: int = 128,
    columns: tuple[str, str] = ("image", "labels"),
    seed: int = 2024,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Score a table of logits or a set of images; writes ``scores.csv`` and more into `run`.

    Images also leave ``logits.npy``; labelled ones ``labels.npy`` and, where training kept them,
    ``train_counts.npy``: what ``edge-ood eval`` reads.

    Args:
        checkpoint: Folder of a detector.
        source: A file of logits, a folder of images, or a set of `edge_ood.sources`.
        run: Where to write.
        scorer: Name of a score of logits.
        split: Of a named set.
        official_transforms: The random training transform instead of the deterministic one.
        batch_size: Images at once.
        columns: Image and label column of ``hf:`` sources.
        seed: Of embedded data and of the official transforms.
        device: By default the CPU.

    Returns:
        ``n``, ``mean``, ``kept`` (share that the threshold accepts, where there is one for this
        score) and ``files``.

    Raises:
        InputError: If the source is not there, or the scorer needs more than logits.
    """
    if scorer not in list_scorers("logits") or scorer in ("lof", "iforest"):
        usable = [n for n in list_scorers("logits") if n not in ("lof", "iforest")]
        raise InputError(f"scorer {scorer!r} cannot be used here; accepted: {', '.join(usable)}")
    detector = OODDetector.load(checkpoint)
    files = ["scores.csv"]
    names: list[str] | None = None
    if source.endswith(_TABLES):
        scores = score_array(open_array(source), get_scorer(scorer), source)
    else:
        reference = _reference(checkpoint)
        seed_everything(seed)
        size = int(reference.get("size", 224))
        official = official_transforms
        transform = train_transform(size, official=True) if official else eval_transform(size)
        data = _images(source, split, transform, columns, seed, detector.class_names)
        loader = DataLoader(data, batch_size=batch_size)
        model = detector.model.to(device or torch.device("cpu"))
        out = collect(model, loader)
        scores = get_scorer(scorer).score(out.logits)
        tables = {"logits.npy": out.logits, "labels.npy": out.targets}
        tables["train_counts.npy"] = reference.get("class_counts", torch.empty(0))
        for name, table in tables.items():
            if table.numel() and (name != "train_counts.npy" or out.targets.numel()):
                _save(run.path / name, table.numpy())
                files.append(name)
        if isinstance(data.images[0], str | Path):
            names = [str(image) for image in data.images]
    threshold = detector.threshold if scorer == detector.scorer.name else None
    kept = None if threshold is None else scores >= threshold
    with (
        atomic_path(run.path / "scores.csv") as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["sample", "score", *([] if kept is None else ["is_id"])])
        for index, value in enumerate(scores.tolist()):
            sample = index if names is None else names[index]
            writer.writerow([sample, value, *([] if kept is None else [int(kept[index])])])
    share = None if kept is None else float(kept.float().mean())
    return {"n": len(scores), "mean": float(scores.mean()), "kept": share, "files": files}


def _images(
    source: str, split: str, transform: Any, columns: tuple[str, str], seed: int, names: Any
) -> Any:
    image_column, label_column = columns
    kind = source.partition(":")[0]
    if source == "shapes" or kind in ("voc", "coco", "nuswide", "folder"):
        return load_id(source, split, transform, seed=seed, class_names=names)
    if kind == "hf":
        try:
            return load_id(
                source,
                split,
                transform,
                image_column=image_column,
                label_column=label_column,
                class_names=names,
            )
        except InputError as error:
            # A table without labels is a set of unknown images.
            if f"no column {label_column!r}" not in str(error):
                raise
    return load_outliers(source, split, transform, seed=seed, image_column=image_column)


def _reference(checkpoint: Path) -> dict[str, Any]:
    """What training kept beside the detector: held-out logits, class counts, image size."""
    path = Path(checkpoint) / REFERENCE
    return dict(load_state(path)) if path.is_file() else {}


def _save(path: Path, table: np.ndarray) -> None:
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, table, allow_pickle=False)


def calibrate_folder(
    checkpoint: Path,
    out: Path,
    id_logits: Path | None = None,
    recall: float = 0.95,
    scorer: str | None = None,
) -> dict[str, Any]:
    """Set the threshold of a saved detector.

    Args:
        checkpoint: Its folder.
        out: Where to write it; the same folder changes it in place.
        id_logits: A file of held-out ID logits; by default those that training kept.
        recall: Share of them to keep.
        scorer: Another score of logits; by default the detector's.

    Returns:
        ``out``, ``scorer``, ``recall``, ``threshold`` and ``n``.

    Raises:
        InputError: If there are no held-out logits, or the detector's score reads more than logits.
    """
    detector = OODDetector.load(checkpoint)
    if scorer is not None:
        detector = OODDetector(detector.model, scorer, class_names=detector.class_names)
    if detector.scorer.requires != "logits":
        raise InputError(
            f"the score {detector.scorer.name} reads {detector.scorer.requires}; calibrate it in "
            "Python: detector.calibrate(...)"
        )
    if id_logits is not None:
        logits = torch.from_numpy(np.array(open_array(id_logits))).float()
    else:
        logits = _reference(checkpoint).get("logits", torch.empty(0))
    if logits.ndim != 2 or len(logits) == 0:
        raise InputError(f"{checkpoint} kept no held-out logits; give --id-logits FILE")
    detector.calibrate(logits, recall).save(out)
    kept = Path(checkpoint) / REFERENCE
    if kept.is_file() and Path(out).resolve() != Path(checkpoint).resolve():
        shutil.copyfile(kept, Path(out) / REFERENCE)
    assert (Path(out) / CONFIG).is_file()
    return {
        "out": str(out),
        "scorer": detector.scorer.name,
        "recall": recall,
        "threshold": detector.threshold,
        "n": len(logits),
    }

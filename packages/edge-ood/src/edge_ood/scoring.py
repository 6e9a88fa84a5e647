"""Scoring files and image sets with a saved detector, and setting its threshold."""

import csv
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from edge_ood.data import check_disjoint
from edge_ood.datasets import STD, eval_transform, train_transform
from edge_ood.detector import OODDetector
from edge_ood.evaluate import open_array, score_array
from edge_ood.harness import choose_scorers, make_scorers, score_outputs
from edge_ood.loop import Outputs, collect
from edge_ood.sources import load_id, load_outliers
from shared_core.device import seed_everything
from shared_core.errors import InputError
from shared_core.run import RunFolder, atomic_path, load_state, save_state

__all__ = ["calibrate_folder", "score_source"]

REFERENCE = "reference.safetensors"
_TABLES = (".npy", ".npz", ".safetensors")
_NOTHING = torch.empty(0), torch.empty(0)


def score_source(
    checkpoint: Path,
    source: str,
    run: RunFolder,
    *,
    scorers: Sequence[str] = ("joint_energy",),
    fit: str | None = None,
    features: bool = False,
    odin: Mapping[str, Any] | None = None,
    split: str = "test",
    official_transforms: bool = False,
    batch_size: int = 128,
    columns: tuple[str, str] = ("image", "labels"),
    seed: int = 2024,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Score a table of logits or a set of images; writes tables into `run`.

    ``scores.csv`` and ``scores.safetensors`` hold a column per scorer. Images also leave
    ``logits.npy``, ``features.npy`` (if asked for, or read by a scorer) and, if labelled,
    ``labels.npy`` and, where training kept them, ``train_counts.npy``: what ``edge-ood eval``
    reads, and `fit`.

    Args:
        checkpoint: Folder of a detector.
        source: A file of logits, a folder of images, or a set of `edge_ood.sources`.
        run: Where to write.
        scorers: Names of scorers, or ``all``.
        fit: What to fit scorers on: a folder that this function wrote of ID images, or a file of
            ID logits for LOF and isolation forests.
        features: Whether to keep features in any case.
        odin: Arguments of ODIN; by default a step of 0.0014.
        split: Of a named set.
        official_transforms: The random training transform instead of the deterministic one.
        batch_size: Images at once.
        columns: Image and label column of ``hf:`` sources.
        seed: Of embedded data and of the official transforms.
        device: By default the CPU.

    Returns:
        ``n``, ``scorers`` (of each the ``mean``, and ``kept``, the share that the threshold
        accepts, where there is one for this score) and ``files``.

    Raises:
        InputError: If the source is not there, or what a scorer needs is not.
    """
    table = source.endswith(_TABLES)
    names = choose_scorers(scorers, fitted=fit is not None, images=not table)
    detector = OODDetector.load(checkpoint)
    known = None if fit is None else _fit_outputs(fit)
    options = {"odin": {"eps": 0.0014, "std": list(STD), **(odin or {})}}
    made = make_scorers(names, detector.model, known, options=options)
    if detector.scorer.name in made and detector.scorer.requires == "logits":
        made[detector.scorer.name] = detector.scorer
    files = ["scores.csv", "scores.safetensors"]
    samples: list[str] | None = None
    if table:
        logits = open_array(source)
        scores = {name: score_array(logits, scorer, source) for name, scorer in made.items()}
    else:
        reference = _reference(checkpoint)
        size = int(reference.get("size", 224))
        official = official_transforms
        transform = train_transform(size, official=True) if official else eval_transform(size)
        data = _images(source, split, transform, columns, seed, detector.class_names)
        _check_unseen(data.images, reference.get("oe"), source)
        loader = DataLoader(data, batch_size=batch_size)
        device = device or torch.device("cpu")
        model = detector.model.to(device)
        features = features or any(s.requires == "features" for s in made.values())
        seed_everything(seed)
        out = collect(model, loader, features=features)
        seed_everything(seed)  # ODIN reads the images as they were
        scores = score_outputs(made, out, model, loader, device)
        tables = {"logits.npy": out.logits, "features.npy": out.features}
        tables["labels.npy"] = out.targets
        if out.targets.numel():
            tables["train_counts.npy"] = reference.get("class_counts", torch.empty(0))
        for name, kept_table in tables.items():
            if kept_table.numel():
                _save(run.path / name, kept_table.numpy())
                files.append(name)
        if isinstance(data.images[0], str | Path):
            samples = [str(image) for image in data.images]
    threshold = detector.threshold if detector.scorer.name in scores else None
    kept = None if threshold is None else scores[detector.scorer.name] >= threshold
    save_state(run.path / "scores.safetensors", {k: v.float() for k, v in scores.items()})
    with (
        atomic_path(run.path / "scores.csv") as temporary,
        open(temporary, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["sample", *scores, *([] if kept is None else ["is_id"])])
        rows = zip(*(column.tolist() for column in scores.values()), strict=True)
        for index, values in enumerate(rows):
            sample = index if samples is None else samples[index]
            writer.writerow([sample, *values, *([] if kept is None else [int(kept[index])])])
    found = {n: {"mean": float(v.mean()), "kept": None} for n, v in scores.items()}
    if kept is not None:
        found[detector.scorer.name]["kept"] = float(kept.float().mean())
    n = len(next(iter(scores.values())))
    return {"n": n, "scorers": found, "files": files}


def _fit_outputs(fit: str) -> Outputs:
    """ID logits, features and labels that scoring wrote into a folder, or logits of a file."""

    def read(path: Path) -> Tensor:
        if not path.is_file():
            return torch.empty(0)
        return torch.from_numpy(np.array(open_array(path))).float()

    path = Path(fit)
    if not path.is_dir():
        return Outputs(torch.from_numpy(np.array(open_array(path))).float(), *_NOTHING)
    if not (path / "logits.npy").is_file():
        raise InputError(f"{path} holds no logits.npy; let edge-ood score --features write it")
    return Outputs(*(read(path / f"{name}.npy") for name in ("logits", "features", "labels")))


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


def _check_unseen(images: Sequence[Any], outliers: str | None, source: str) -> None:
    """Warn if some of the images trained the model as outliers, which would flatter its scores."""
    if not isinstance(images[0], Path) or outliers is None:
        return
    try:
        trained_on = load_outliers(outliers).images
    except InputError:  # the folder is no longer there, or empty
        return
    names = source, f"the outliers {outliers}, which trained this model,"
    if not check_disjoint(images, trained_on, names=names, on_overlap="warn"):
        check_disjoint(images, trained_on, "sha1", names=names, on_overlap="warn")


def _reference(checkpoint: Path) -> dict[str, Any]:
    """What training kept beside the detector: held-out logits, class counts, size, OE folder."""
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
    return {
        "out": str(out),
        "scorer": detector.scorer.name,
        "recall": recall,
        "threshold": detector.threshold,
        "n": len(logits),
    }

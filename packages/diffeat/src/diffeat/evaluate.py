"""The paper's protocols on any data: semantic correspondence, label-scarce segmentation."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from diffeat.extractor import FeatureExtractor
from diffeat.probe import IGNORE, LinearProbe, PixelMLPEnsemble, iou_of, nn_correspondence, pck
from diffeat.ranking import LabelledImages, batches
from shared_core.errors import InputError
from shared_core.metrics import confusion_matrix
from shared_core.run import progress

__all__ = ["Pair", "correspond", "ignore_rare", "read_pairs", "segment"]

SIDE = 512  # the image that keypoints are matched in


@dataclass(frozen=True)
class Pair:
    """Two images of one category with the same keypoints.

    Attributes:
        source, target: Image files.
        category: Name of the class.
        source_points, target_points: (x, y) in pixels of each image, ``[N, 2]``.
        box: The target object: left, top, right, bottom.
    """

    source: Path
    target: Path
    category: str
    source_points: Tensor
    target_points: Tensor
    box: tuple[float, float, float, float]


def read_pairs(folder: Path, split: str = "test", limit: int | None = None) -> list[Pair]:
    """Read pairs of a folder with the layout of SPair-71k.

    Args:
        folder: Holds ``PairAnnotation/<split>/*.json`` and ``JPEGImages/<category>/``.
        split: Name of the split.
        limit: At most so many, evenly spread over the sorted files.

    Raises:
        InputError: If there are none, or a file is not of this layout.
    """
    files = sorted((folder / "PairAnnotation" / split).glob("*.json"))
    if not files:
        raise InputError(
            f"{folder} holds no PairAnnotation/{split}/*.json; give a folder laid out as SPair-71k"
        )
    if limit is not None and limit < len(files):
        files = [files[i * len(files) // limit] for i in range(limit)]
    pairs = []
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            images = folder / "JPEGImages" / content["category"]
            left, top, right, bottom = map(float, content["trg_bndbox"])
            source, target = (
                torch.tensor(content[key], dtype=torch.float32).view(-1, 2)
                for key in ("src_kps", "trg_kps")
            )
            pair = Pair(
                images / content["src_imname"],
                images / content["trg_imname"],
                content["category"],
                source,
                target,
                (left, top, right, bottom),
            )
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise InputError(f"{file} is no pair of SPair-71k: {error!r}") from error
        if len(source) != len(target) or not len(source):
            raise InputError(f"{file}: {len(source)} source and {len(target)} target keypoints")
        pairs.append(pair)
    return pairs


def correspond(
    fx: FeatureExtractor,
    pairs: Sequence[Pair],
    *,
    prompt: Any = "",
    t: int = 50,
    alpha: float = 0.1,
    side: int = 128,
    seed: int = 0,
) -> dict[str, Any]:
    """PCK of nearest-neighbour matching (Meng et al., appendix C.1), keypoints of all pairs pooled.

    Args:
        fx: The extractor, with a size.
        pairs: From `read_pairs`.
        prompt: One prompt for all images.
        t: Timestep.
        alpha: Threshold.
        side: Of the maps that layers are resized to and joined at.
        seed: Of the noise, which is named by the image file.

    Returns:
        ``pck_image`` and ``pck_box`` (thresholds relative to the target image and to its object),
        ``pairs``, ``keypoints``, and ``categories`` with the same for each.

    Raises:
        InputError: If an image cannot be read.
    """
    right: dict[str, list[Tensor]] = {}
    counts: dict[str, int] = {}
    with progress(total=len(pairs), description="matching", unit="pair") as bar:
        for pair in pairs:
            images = [_open(file) for file in (pair.source, pair.target)]
            ids = [f"{pair.category}/{file.name}" for file in (pair.source, pair.target)]
            maps = fx(images, prompt, t, ids=ids, seed=seed).concat(side).float()
            scales = [torch.tensor([SIDE / i.width, SIDE / i.height]) for i in images]
            points = (pair.source_points * scales[0]).clamp(0, SIDE - 1)
            found = nn_correspondence(maps[:1], maps[1:], points.to(maps.device), size=SIDE).cpu()
            found = found / scales[1]
            left, top, end, bottom = pair.box
            by = (max(images[1].size), max(end - left, bottom - top))
            hits = [pck(found, pair.target_points, float(length), alpha) for length in by]
            right.setdefault(pair.category, []).append(torch.stack(hits, 1))
            counts[pair.category] = counts.get(pair.category, 0) + 1
            bar.update()
    tables = {name: torch.cat(parts).double() for name, parts in sorted(right.items())}
    rows = [{"category": n, "pairs": counts[n], **_shares(table)} for n, table in tables.items()]
    everything = _shares(torch.cat(list(tables.values())))
    return {"alpha": alpha, "pairs": len(pairs), **everything, "categories": rows}


def _shares(table: Tensor) -> dict[str, Any]:
    image, box = table.mean(0).tolist()
    return {"keypoints": len(table), "pck_image": image, "pck_box": box}


def _open(file: Path) -> Image.Image:
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except OSError as error:
        raise InputError(f"{file} cannot be read as an image: {error}") from error


def ignore_rare(labels: Int[Tensor, "B H W"], least: int = 20) -> Int[Tensor, "B H W"]:
    """Labels with 255 where a class has fewer than `least` pixels in an image (DDPM-seg).

    Example:
        >>> ignore_rare(torch.tensor([[[0, 0, 1]]]), 2).tolist()
        [[[0, 0, 255]]]
    """
    kept = labels.clone()
    for row, label in zip(kept, labels, strict=True):
        values, counts = label.unique(return_counts=True)
        row[torch.isin(label, values[counts < least])] = IGNORE
    return kept


def segment(
    fx: FeatureExtractor,
    train: LabelledImages,
    test: LabelledImages,
    *,
    classes: int,
    probe: Literal["mlp", "ridge"] = "mlp",
    networks: int = 10,
    epochs: int = 100,
    prompt: Any = "",
    t: int = 50,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, Any]:
    """Segment with all layers of an extractor together, from few labelled images (DDPM-seg).

    Layers are resized to the label maps and joined; every labelled pixel is a sample. Classes of
    fewer than 20 pixels in an image are ignored there.

    Args:
        fx: The extractor.
        train: Images and label maps ``[N, H, W]`` to fit on.
        test: The same, to report on.
        classes: Number of classes.
        probe: ``mlp``, networks that vote on each pixel; or ``ridge``.
        networks: How many vote.
        epochs: Of each network, at most.
        prompt: One prompt for all images.
        t: Timestep.
        batch_size: Images per forward.
        seed: Of noise, weights and order.

    Returns:
        ``miou``, ``iou`` by class (``None`` where a class occurs nowhere), and with ``mlp`` also
        ``uncertainty``, the mean of the top decile of the networks' disagreement.

    Raises:
        InputError: If `probe` is unknown.
    """
    if probe not in ("mlp", "ridge"):
        raise InputError(f"probe={probe!r}; accepted: mlp, ridge")
    train, test = ((images, ignore_rare(labels)) for images, labels in (train, test))
    height, width = train[1].shape[-2:]
    ridge = LinearProbe(classes)
    rows, targets = [], []
    for features, labels in batches(fx, train, t, batch_size, prompt, seed, "train"):
        joined = features.concat((height, width)).float()
        if probe == "ridge":
            ridge.update(joined, labels)
        else:
            rows.append(joined.permute(0, 2, 3, 1).flatten(0, 2))
            targets.append(labels.flatten())
    networks_ = None
    if probe == "mlp":
        pixels, classes_of = torch.cat(rows), torch.cat(targets)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            networks_ = PixelMLPEnsemble(pixels.shape[1], classes, networks).to(pixels.device)
        networks_.fit(pixels, classes_of.to(pixels.device), epochs=epochs, seed=seed)
    table = torch.zeros(classes, classes, dtype=torch.float64)
    doubts = []
    for features, labels in batches(fx, test, t, batch_size, prompt, seed, "test"):
        joined = features.concat((height, width)).float()
        if networks_ is None:
            table += ridge.confusion(joined, labels).sum(0).cpu()
            continue
        with torch.no_grad():
            votes, doubt = networks_(joined.permute(0, 2, 3, 1).flatten(0, 2))
        truth = labels.flatten()
        table += confusion_matrix(votes.cpu(), truth, classes, ignore_index=IGNORE).double()
        tenth = doubt.view(len(labels), -1)
        doubts.append(tenth.topk(max(1, tenth.shape[1] // 10), 1).values.mean(1).cpu())
    hit = table.diagonal()
    union = table.sum(0) + table.sum(1) - hit
    iou = [float(h / u) if u else None for h, u in zip(hit, union, strict=True)]
    found = {"miou": float(iou_of(table)), "iou": iou}
    return found | ({"uncertainty": float(torch.cat(doubts).mean())} if doubts else {})

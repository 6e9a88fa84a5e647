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
from torch.nn import functional as F

from diffeat._labelled import LabelledImages, batches
from diffeat._matching import match
from diffeat.features import Features
from diffeat.probe import IGNORE, ConvCorrespondence, LinearProbe, PixelMLPEnsemble, iou_of, pck
from diffeat.segmentation import SegmentationHead, train_segmentation
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

    def points_at(self, side: int) -> tuple[Tensor, Tensor]:
        """Both images' keypoints as positions (x, y) of maps of `side` x `side`.

        Raises:
            InputError: If an image cannot be read.
        """
        found = []
        for file, points in (
            (self.source, self.source_points), (self.target, self.target_points)
        ):  # fmt: skip
            image = _open(file)
            scaled = points * torch.tensor([side / image.width, side / image.height])
            found.append(scaled.round().long().clamp(0, side - 1))
        return found[0], found[1]


def read_pairs(folder: Path, split: str = "test", limit: int | None = None) -> list[Pair]:
    """Read pairs of a folder with the layout of SPair-71k.

    Args:
        folder: Holds ``PairAnnotation/<split>/*.json`` and ``JPEGImages/<category>/``.
        split: Name of the split; or a JSON file, a list of pairs as Diffusion Hyperfeatures has
            them (``source_path``, ``source_points``, ``target_bounding_box``, ...).
        limit: At most so many, evenly spread over the sorted files.

    Raises:
        InputError: If there are none, or a file is not of this layout.
    """
    if split.endswith(".json"):
        rows, files = _read_list(Path(split)), [Path(split)]
        files = files * len(rows)
    else:
        files = sorted((folder / "PairAnnotation" / split).glob("*.json"))
        if not files:
            raise InputError(
                f"{folder} holds no PairAnnotation/{split}/*.json; give a folder laid out as "
                "SPair-71k"
            )
        rows = []
    if limit is not None and limit < len(files):
        chosen = [i * len(files) // limit for i in range(limit)]
        files, rows = [files[i] for i in chosen], [rows[i] for i in chosen] if rows else []
    pairs = []
    for i, file in enumerate(files):
        try:
            content = rows[i] if rows else json.loads(file.read_text(encoding="utf-8"))
            pair = _pair(folder / "JPEGImages", content, listed=bool(rows))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise InputError(f"{file} is no pair of SPair-71k: {error!r}") from error
        if len(pair.source_points) != len(pair.target_points) or not len(pair.source_points):
            raise InputError(
                f"{file}: {len(pair.source_points)} source and {len(pair.target_points)} target "
                "keypoints"
            )
        pairs.append(pair)
    return pairs


def _read_list(file: Path) -> list[Any]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read as a list of pairs: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{file} is no list of pairs: a JSON list of objects")
    return rows


def _pair(images: Path, content: dict[str, Any], *, listed: bool) -> Pair:
    names = {
        False: ("src_imname", "trg_imname", "src_kps", "trg_kps", "trg_bndbox"),
        True: (
            "source_path", "target_path", "source_points", "target_points", "target_bounding_box"
        ),
    }[listed]  # fmt: skip
    source, target, source_points, target_points, box = (content[name] for name in names)
    category = content["category"]
    folder = images if listed and "/" in source else images / category
    left, top, right, bottom = map(float, box)
    return Pair(
        folder / source,
        folder / target,
        category,
        torch.tensor(source_points, dtype=torch.float32).view(-1, 2),
        torch.tensor(target_points, dtype=torch.float32).view(-1, 2),
        (left, top, right, bottom),
    )


def pair_features(fx: Any, pair: Pair, prompt: Any, t: Any, seed: int, **options: Any) -> Features:
    """Features of both images of a pair, source first.

    Raises:
        InputError: If an image cannot be read.
    """
    images = [_open(file) for file in (pair.source, pair.target)]
    ids = [f"{pair.category}/{file.name}" for file in (pair.source, pair.target)]
    found: Features = fx(images, prompt, t, ids=ids, seed=seed, **options)
    return found


def correspond(
    fx: Any,
    pairs: Sequence[Pair],
    *,
    prompt: Any = "",
    t: Any = 50,
    alpha: float = 0.1,
    side: int = 128,
    seed: int = 0,
    head: ConvCorrespondence | None = None,
    **options: Any,
) -> dict[str, Any]:
    """PCK of nearest-neighbour matching (Meng et al., appendix C.1), keypoints of all pairs pooled.

    Layers are enlarged one at a time, so that memory is that of the widest one.

    Args:
        fx: The extractor, with a size (or several, `diffeat.aggregate.MultiModel`).
        pairs: From `read_pairs`.
        prompt: One prompt for all images.
        t: Timestep.
        alpha: Threshold.
        side: Of the maps that layers are resized to and joined at.
        seed: Of the noise, which is named by the image file.
        head: A trained convolution over the joined layers (`diffeat.train`).
        options: Of the extractor, such as ``ensemble``.

    Returns:
        ``pck_image`` and ``pck_box`` (thresholds relative to the target image and to its object),
        over the keypoints of all pairs pooled; the means over pairs ``pck_image_by_pair`` and
        ``pck_box_by_pair``; ``pairs``, ``keypoints``, and ``categories`` with the same for each.

    Raises:
        InputError: If an image cannot be read.
    """
    right: dict[str, list[Tensor]] = {}
    with progress(total=len(pairs), description="matching", unit="pair") as bar:
        for pair in pairs:
            images = [_open(file) for file in (pair.source, pair.target)]
            with torch.no_grad():
                features = pair_features(fx, pair, prompt, t, seed, **options)
                scales = [torch.tensor([SIDE / i.width, SIDE / i.height]) for i in images]
                points = (pair.source_points * scales[0]).clamp(0, SIDE - 1).round().long()
                found = _match(features, points, side, head)
            found = found / scales[1]
            left, top, end, bottom = pair.box
            by = (max(images[1].size), max(end - left, bottom - top))
            hits = [pck(found, pair.target_points, float(length), alpha) for length in by]
            right.setdefault(pair.category, []).append(torch.stack(hits, 1))
            bar.update()
    rows = [
        {"category": name, "pairs": len(parts), **_shares(parts)}
        for name, parts in sorted(right.items())
    ]
    everything = _shares([part for parts in right.values() for part in parts])
    return {"alpha": alpha, "pairs": len(pairs), **everything, "categories": rows}


def _match(
    features: Features, points: Tensor, side: int, head: ConvCorrespondence | None
) -> Tensor:
    """Pixels of the target for whole pixels of the source."""
    if head is not None:
        joined = head(features.concat(side).float())
        layers: Any = [(joined[0], joined[1])]
        where = points.to(joined.device)
    else:
        one_by_one = (Features({n: v}).resize(side)[n] for n, v in features.items())
        layers = ((both[0], both[1]) for both in one_by_one)
        where = points.to(next(iter(features.values())).device)
    return match(layers, where, SIDE).cpu()


def _shares(parts: Sequence[Tensor]) -> dict[str, Any]:
    table = torch.cat(list(parts)).double()
    image, box = table.mean(0).tolist()
    image_by_pair, box_by_pair = torch.stack([p.double().mean(0) for p in parts]).mean(0).tolist()
    return {
        "keypoints": len(table),
        "pck_image": image,
        "pck_box": box,
        "pck_image_by_pair": image_by_pair,
        "pck_box_by_pair": box_by_pair,
    }


def _open(file: Path) -> Image.Image:
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except OSError as error:
        raise InputError(f"{file} cannot be read as an image: {error}") from error


def ignore_rare(labels: Int[Tensor, "B H W"], least: int = 20) -> Int[Tensor, "B H W"]:
    """Labels with 255 where a class has fewer than `least` pixels in an image (DDPM-seg).

    Examples:
        >>> ignore_rare(torch.tensor([[[0, 0, 1]]]), 2).tolist()
        [[[0, 0, 255]]]
    """
    kept = labels.clone()
    for row, label in zip(kept, labels, strict=True):
        values, counts = label.unique(return_counts=True)
        row[torch.isin(label, values[counts < least])] = IGNORE
    return kept


@dataclass(frozen=True)
class Tables:
    """What a probe made of test images.

    Attributes:
        tables: Pixels of each true class (rows) predicted as each class, ``[N, K, K]``.
        channels: Of the features.
        doubts: Disagreement of the networks, by image; empty with other probes.
    """

    tables: Tensor
    channels: int
    doubts: Tensor


def segment(
    fx: Any,
    train: LabelledImages,
    test: LabelledImages,
    *,
    classes: int,
    probe: Literal["mlp", "ridge", "head"] = "mlp",
    networks: int = 10,
    epochs: int = 100,
    prompt: Any = "",
    t: Any = 50,
    batch_size: int = 8,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Segment with all layers of an extractor together, from few labelled images (DDPM-seg).

    Layers are resized to the label maps and joined; every labelled pixel is a sample. Classes of
    fewer than 20 pixels in an image are ignored there.

    Args:
        fx: The extractor (or several, `diffeat.aggregate.MultiModel`).
        train: Images and label maps ``[N, H, W]`` to fit on.
        test: The same, to report on.
        classes: Number of classes.
        probe: ``mlp``, networks that vote on each pixel; ``ridge``; or ``head``, a
            `SegmentationHead` trained as for large data sets, without the rule about rare classes.
        networks: How many vote.
        epochs: Of each network, at most.
        prompt: One prompt for all images.
        t: Timestep.
        batch_size: Images per forward.
        seed: Of noise, weights and order.
        options: With ``head`` those of `diffeat.segmentation.train_segmentation` and ``channels``;
            else those of the extractor, such as ``noise``.

    Returns:
        ``miou``, ``iou`` by class (``None`` where a class occurs nowhere), and with ``mlp`` also
        ``uncertainty``, the mean of the top decile of the networks' disagreement.

    Raises:
        InputError: If `probe` is unknown.
    """
    found = tables_of(
        fx, train, test, classes=classes, probe=probe, networks=networks, epochs=epochs,
        prompt=prompt, t=t, batch_size=batch_size, seed=seed, **options,
    )  # fmt: skip
    table = found.tables.sum(0)
    hit = table.diagonal()
    union = table.sum(0) + table.sum(1) - hit
    iou = [float(h / u) if u else None for h, u in zip(hit, union, strict=True)]
    shown = {"miou": float(iou_of(table)), "iou": iou}
    return shown | ({"uncertainty": float(found.doubts.mean())} if len(found.doubts) else {})


def tables_of(
    fx: Any,
    train: LabelledImages,
    test: LabelledImages,
    *,
    classes: int,
    prompt: Any,
    t: Any,
    batch_size: int,
    seed: int,
    probe: str = "mlp",
    networks: int = 10,
    epochs: int = 100,
    **options: Any,
) -> Tables:
    """Fit a probe and give its confusion matrices by test image; see `segment`."""
    if probe not in ("mlp", "ridge", "head"):
        raise InputError(f"probe={probe!r}; accepted: mlp, ridge, head")
    if probe == "head":
        channels = options.pop("channels", 512)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = SegmentationHead.of(fx, classes, channels=channels).to(fx.device)
            train_segmentation(fx, head, train, prompt=prompt, t=t, seed=seed, **options)
        parts = []
        for features, labels in batches(fx, test, t, batch_size, prompt, seed, "test"):
            with torch.no_grad():
                scores = head({n: v.to(fx.device) for n, v in features.items()})
            size = labels.shape[-2:]
            big = F.interpolate(scores, size, mode="bilinear", align_corners=False)
            parts += [
                confusion_matrix(guess, label, classes, ignore_index=IGNORE).double()
                for guess, label in zip(big.argmax(1).cpu(), labels, strict=True)
            ]
        return Tables(torch.stack(parts), channels, torch.zeros(0))
    train, test = ((images, ignore_rare(labels)) for images, labels in (train, test))
    height, width = train[1].shape[-2:]
    ridge = LinearProbe(classes)
    rows, targets, channels = [], [], 0
    for features, labels in batches(fx, train, t, batch_size, prompt, seed, "train", **options):
        joined = features.concat((height, width)).float()
        channels = joined.shape[1]
        if probe == "ridge":
            ridge.update(joined, labels)
        else:
            rows.append(joined.permute(0, 2, 3, 1).flatten(0, 2))
            targets.append(labels.flatten())
    voters = None
    if probe == "mlp":
        pixels, classes_of = torch.cat(rows), torch.cat(targets)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            voters = PixelMLPEnsemble(channels, classes, networks).to(pixels.device)
        voters.fit(pixels, classes_of.to(pixels.device), epochs=epochs, seed=seed)
    tables, doubts = [], [torch.zeros(0)]
    for features, labels in batches(fx, test, t, batch_size, prompt, seed, "test", **options):
        joined = features.concat((height, width)).float()
        if voters is None:
            tables.append(ridge.confusion(joined, labels).cpu())
            continue
        with torch.no_grad():
            votes, doubt = voters(joined.permute(0, 2, 3, 1).flatten(0, 2))
        guesses = votes.cpu().view(labels.shape)
        tables.append(
            torch.stack(
                [
                    confusion_matrix(guess, label, classes, ignore_index=IGNORE).double()
                    for guess, label in zip(guesses, labels, strict=True)
                ]
            )
        )
        tenth = doubt.view(len(labels), -1)
        doubts.append(tenth.topk(max(1, tenth.shape[1] // 10), 1).values.mean(1).cpu())
    return Tables(torch.cat(tables), channels, torch.cat(doubts))

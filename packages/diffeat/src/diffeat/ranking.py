"""Rank activations by a probe in one pass over the data, without storing a feature."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffeat.extractor import FeatureExtractor
from diffeat.filters import paper_candidates
from diffeat.naming import list_activations
from diffeat.probe import LinearProbe, iou_of
from diffeat.selection import Layers, Selection
from shared_core.errors import InputError
from shared_core.run import progress

__all__ = ["LabelledImages", "rank"]

LabelledImages = tuple[Tensor, Tensor]


def batches(
    fx: FeatureExtractor,
    data: LabelledImages,
    t: int,
    batch_size: int,
    prompt: Any,
    seed: int,
    first_id: str,
) -> Iterator[tuple[Any, Tensor]]:
    """Features and labels, batch by batch; noise is named by the image's number."""
    images, labels = data
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        ids = [f"{first_id}{i}" for i in range(start, start + len(images[part]))]
        yield fx(images[part], prompt, t, ids=ids, seed=seed), labels[part]


def rank(
    fx: FeatureExtractor,
    train: LabelledImages,
    test: LabelledImages,
    *,
    classes: int,
    candidates: Layers = "all",
    timesteps: Sequence[int] = (50,),
    prompt: Any = None,
    batch_size: int = 8,
    penalty: float = 1e-3,
    components: int | None = None,
    bootstrap: int = 200,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """MIoU of a ridge probe on every candidate, from one pass over each set and timestep.

    Args:
        fx: The extractor; its own layers do not matter.
        train: Images and label maps ``[N, H, W]`` to fit on.
        test: The same, to report on.
        classes: Number of classes.
        candidates: ``paper`` (`paper_candidates`), ``all`` (every activation but maps), or layers.
        timesteps: Of the noise.
        prompt: See `FeatureExtractor`.
        batch_size: Images per forward.
        penalty: See `LinearProbe`.
        components: See `LinearProbe`.
        bootstrap: Resamplings of the test images for the 90 % interval.
        seed: Of noise and resampling.

    Returns:
        Rows of ``name, t, channels, miou, low, high``, best first.

    Raises:
        InputError: If images and labels do not fit.
    """
    for images, labels in (train, test):
        if len(images) != len(labels) or not len(images):
            raise InputError(f"{len(images)} images and {len(labels)} label maps; give as many")
    if candidates == "paper":
        names: tuple[str, ...] = tuple(paper_candidates(fx.backbone))
    elif candidates == "all":
        names = tuple(i.name for i in list_activations(fx.backbone))
    else:
        names = Selection.parse(candidates).resolve(fx.backbone)
    before = fx.layers
    fx.layers = names
    rows = []
    try:
        for t in timesteps:
            rows += _rank_at(
                fx,
                train,
                test,
                t,
                classes,
                prompt,
                batch_size,
                penalty,
                components,
                bootstrap,
                seed,
            )
    finally:
        fx.layers = before
    return sorted(rows, key=lambda row: -row["miou"])


def _rank_at(
    fx: FeatureExtractor,
    train: LabelledImages,
    test: LabelledImages,
    t: int,
    classes: int,
    prompt: Any,
    batch_size: int,
    penalty: float,
    components: int | None,
    bootstrap: int,
    seed: int,
) -> list[dict[str, Any]]:
    probes = {n: LinearProbe(classes, penalty=penalty, components=components) for n in fx.layers}
    channels: dict[str, int] = {}
    steps = -(-len(train[0]) // batch_size) - (-len(test[0]) // batch_size)
    with progress(total=steps, description=f"ranking at t={t}", unit="batch") as bar:
        for features, labels in batches(fx, train, t, batch_size, prompt, seed, "train"):
            for name, value in features.items():
                channels[name] = value.shape[1]
                probes[name].update(value, labels)
            bar.update()
        tables: dict[str, list[Tensor]] = {name: [] for name in probes}
        for features, labels in batches(fx, test, t, batch_size, prompt, seed, "test"):
            for name, value in features.items():
                tables[name].append(probes[name].confusion(value, labels).cpu())
            bar.update()
    generator = torch.Generator().manual_seed(seed)
    count = len(test[0])
    drawn = torch.randint(count, (bootstrap, count), generator=generator)
    rows = []
    for name, parts in tables.items():
        table = torch.cat(parts)
        again = iou_of(table[drawn].sum(1)).sort().values.tolist()
        rows.append(
            {
                "name": name,
                "t": t,
                "channels": channels[name],
                "miou": float(iou_of(table.sum(0))),
                "low": again[int(0.05 * bootstrap)] if bootstrap else None,
                "high": again[int(0.95 * bootstrap)] if bootstrap else None,
            }
        )
    return rows


def load_labelled(
    samples: Sequence[tuple[str, Any]], folder: Path, fx: FeatureExtractor, test_share: float
) -> tuple[LabelledImages, LabelledImages]:
    """Images and their label PNGs as a training and a test set, at the extractor's size.

    Raises:
        InputError: If a label map is missing or either set would be empty.
    """
    import numpy as np
    from PIL import Image

    maps = []
    for name, _ in samples:
        file = (folder / name).with_suffix(".png")
        if not file.is_file():
            raise InputError(f"there is no label map {file} for the image {name}")
        with Image.open(file) as opened:
            image: Image.Image = opened
            if image.mode not in ("L", "P", "I;16", "I"):
                raise InputError(f"{file} is {image.mode}; accepted: one channel of class numbers")
            size = fx.size and (fx.size[1], fx.size[0])
            image = image.resize(size, Image.Resampling.NEAREST) if size else image
            maps.append(torch.from_numpy(np.array(image).astype("int64")))
    cut = round(len(samples) * (1 - test_share))
    if not 0 < cut < len(samples):
        raise InputError(f"--test-share {test_share} of {len(samples)} images leaves an empty set")
    pixels = ((fx.pixels([image for _, image in samples]) + 1) * 127.5).round().to(torch.uint8)
    labels = torch.stack(maps)
    return (pixels[:cut], labels[:cut]), (pixels[cut:], labels[cut:])

"""Rank activations by a probe in one pass over the data, without storing a feature."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from diffeat._labelled import LabelledImages, batches, load_labelled
from diffeat.evaluate import tables_of
from diffeat.extractor import FeatureExtractor
from diffeat.filters import auto_candidates, paper_candidates
from diffeat.measure import noise_ratio
from diffeat.naming import list_activations
from diffeat.probe import LinearProbe, iou_of
from diffeat.selection import Layers, Selection
from shared_core.errors import InputError
from shared_core.run import progress

__all__ = ["LabelledImages", "load_labelled", "rank"]


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
    probe: Literal["ridge", "mlp"] = "ridge",
    networks: int = 10,
    epochs: int = 100,
    **options: Any,
) -> list[dict[str, Any]]:
    """MIoU of a probe on every candidate; of ridge probes in one pass over each set and timestep.

    Args:
        fx: The extractor; its own layers do not matter.
        train: Images and label maps ``[N, H, W]`` to fit on.
        test: The same, to report on.
        classes: Number of classes.
        candidates: ``paper`` (`paper_candidates`), ``auto`` (`auto_candidates`, with noise measured
            on some of the training images), ``all`` (every activation but maps), or layers.
        timesteps: Of the noise.
        prompt: See `FeatureExtractor`.
        batch_size: Images per forward.
        penalty: See `LinearProbe`.
        components: See `LinearProbe`.
        bootstrap: Resamplings of the test images for the 90 % interval.
        seed: Of noise and resampling.
        probe: ``ridge``; or ``mlp``, the label-scarce protocol (`diffeat.evaluate.segment`) on one
            candidate after another, as the authors rank.
        networks: Of the protocol.
        epochs: Of the protocol.
        options: Of the extractor, such as ``noise``.

    Returns:
        Rows of ``name, t, channels, miou, low, high``, best first.

    Raises:
        InputError: If images and labels do not fit, or `probe` is unknown.
    """
    if probe not in ("ridge", "mlp"):
        raise InputError(f"probe={probe!r}; accepted: ridge, mlp")
    for images, labels in (train, test):
        if len(images) != len(labels) or not len(images):
            raise InputError(f"{len(images)} images and {len(labels)} label maps; give as many")
    if candidates == "paper":
        names: tuple[str, ...] = tuple(paper_candidates(fx.backbone))
    elif candidates == "auto":
        some = train[0][:16]
        names = tuple(_auto(fx, some, timesteps[0], prompt, seed, batch_size, options))
    elif candidates == "all":
        names = tuple(i.name for i in list_activations(fx.backbone))
    else:
        names = Selection.parse(candidates).resolve(fx.backbone)
    before = fx.layers
    fx.layers = names
    rows = []
    try:
        for t in timesteps:
            if probe == "mlp":
                rows += _one_by_one(
                    fx, names, train, test, t, bootstrap, seed, classes=classes, prompt=prompt,
                    batch_size=batch_size, networks=networks, epochs=epochs, **options,
                )  # fmt: skip
            else:
                rows += _rank_at(
                    fx, train, test, t, classes, prompt, batch_size, penalty, components,
                    bootstrap, seed, options,
                )  # fmt: skip
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
    options: dict[str, Any],
) -> list[dict[str, Any]]:
    probes = {n: LinearProbe(classes, penalty=penalty, components=components) for n in fx.layers}
    channels: dict[str, int] = {}
    steps = -(-len(train[0]) // batch_size) - (-len(test[0]) // batch_size)
    with progress(total=steps, description=f"ranking at t={t}", unit="batch") as bar:
        for features, labels in batches(fx, train, t, batch_size, prompt, seed, "train", **options):
            for name, value in features.items():
                channels[name] = value.shape[1]
                probes[name].update(value, labels)
            bar.update()
        tables: dict[str, list[Tensor]] = {name: [] for name in probes}
        for features, labels in batches(fx, test, t, batch_size, prompt, seed, "test", **options):
            for name, value in features.items():
                tables[name].append(probes[name].confusion(value, labels).cpu())
            bar.update()
    return [
        _row(name, t, channels[name], torch.cat(parts), bootstrap, seed)
        for name, parts in tables.items()
    ]


def _row(
    name: str, t: int, channels: int, table: Tensor, bootstrap: int, seed: int
) -> dict[str, Any]:
    """A row of the ranking from the confusion matrices of the test images."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(table), (bootstrap, len(table)), generator=generator)
    again = iou_of(table[drawn].sum(1)).sort().values.tolist()
    return {
        "name": name,
        "t": t,
        "channels": channels,
        "miou": float(iou_of(table.sum(0))),
        "low": again[int(0.05 * bootstrap)] if bootstrap else None,
        "high": again[int(0.95 * bootstrap)] if bootstrap else None,
    }


def _one_by_one(
    fx: FeatureExtractor,
    names: Sequence[str],
    train: LabelledImages,
    test: LabelledImages,
    t: int,
    bootstrap: int,
    seed: int,
    **options: Any,
) -> list[dict[str, Any]]:
    rows = []
    for name in progress(names, description=f"ranking at t={t}", unit="activation"):
        fx.layers = [name]
        found = tables_of(fx, train, test, t=t, seed=seed, **options)
        rows.append(_row(name, t, found.channels, found.tables, bootstrap, seed))
    return rows


def _auto(
    fx: FeatureExtractor,
    images: Tensor,
    t: int,
    prompt: Any,
    seed: int,
    batch_size: int,
    options: dict[str, Any],
) -> list[str]:
    """`auto_candidates` with the noise of two draws, averaged over batches."""
    fx_layers = fx.layers
    ups = [i.name for i in list_activations(fx.backbone) if i.stage == "up"]
    noise: dict[str, list[float]] = {}
    fx.layers = ups
    try:
        for start in range(0, len(images), batch_size):
            part = images[start : start + batch_size]
            a, b = (fx(part, prompt, t, seed=seed + draw, **options) for draw in (0, 1))
            for name in ups:
                noise.setdefault(name, []).append(noise_ratio(a[name], b[name]))
    finally:
        fx.layers = fx_layers
    return auto_candidates(fx.backbone, {n: sum(v) / len(v) for n, v in noise.items()})

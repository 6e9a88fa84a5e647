"""Ranking outlier sets that are named as on the command line."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from edge_ood.datasets import eval_transform
from edge_ood.detector import OODDetector
from edge_ood.dilation import OERank, OESelector
from edge_ood.models import create_model
from edge_ood.sources import load_id, load_outliers
from shared_core.errors import InputError

__all__ = ["rank_sources"]


def rank_sources(
    id_set: str,
    candidates: Mapping[str, str],
    *,
    model: str,
    pretrained: bool = True,
    checkpoint: Path | None = None,
    k: int = 32,
    batch_size: int = 64,
    max_batches: int = 100,
    variant: str = "paper",
    prefer: str = "smallest",
    image_size: int = 256,
    seed: int = 0,
    device: torch.device | None = None,
) -> tuple[list[OERank], OESelector]:
    """Rank sets of outliers by their dilation distance to an ID set.

    Args:
        id_set: See `edge_ood.sources.load_id`.
        candidates: Names and sets; see `edge_ood.sources.load_outliers`.
        model: Backbone before fine-tuning; see `edge_ood.models.create_model`.
        pretrained: Whether it has its library's weights.
        checkpoint: Folder of a detector whose backbone to take instead.
        k: See `OESelector`, as all that are not listed.
        batch_size: Rows a spectrum.
        max_batches: Batches of each set.
        variant: Of the distance.
        prefer: ``smallest`` or ``largest``.
        image_size: Pixels per side.
        seed: Of the order of images.
        device: By default the CPU.

    Returns:
        The ranking, and the selector, which holds the ID spectrum.

    Raises:
        InputError: If a set or the model is not there, or an option is not known.
    """
    if variant not in ("paper", "official", "full") or prefer not in ("smallest", "largest"):
        raise InputError(
            f"--variant {variant} --prefer {prefer}; accepted: paper, official, full; "
            "smallest, largest"
        )
    transform = eval_transform(image_size)
    data = load_id(id_set, "train", transform, seed=seed)
    sets = {n: load_outliers(s, "train", transform, seed=seed) for n, s in candidates.items()}
    network: Any = (
        create_model(model, 1, pretrained=pretrained)
        if checkpoint is None
        else OODDetector.load(checkpoint).model
    )
    device = device or torch.device("cpu")
    backbone = network.to(device).backbone
    selector = OESelector(backbone, k, batch_size, max_batches, variant, prefer, device)  # type: ignore[arg-type]
    selector.fit(_loader(data, batch_size, seed))
    return selector.rank({n: _loader(s, batch_size, seed) for n, s in sets.items()}), selector


def _loader(data: Dataset[Any], batch_size: int, seed: int) -> Any:
    """Batches in an order drawn with the seed, for a part of a set has to be like the whole."""
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(data, batch_size=batch_size, shuffle=True, generator=generator)

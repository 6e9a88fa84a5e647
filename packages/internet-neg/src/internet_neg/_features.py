"""Features in parts: shared out among processes, and kept on disk as soon as a part is there.

A part's name holds a fingerprint of the model's weights and of what was embedded. So an extraction
that was interrupted goes on where it stopped, and equal parts of other runs are not computed again.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internet_neg._parallel import gather_counts, gather_rows, own_share
from internet_neg.encoders import DualEncoder
from shared_core.errors import InputError
from shared_core.parallel import is_parallel
from shared_core.run import load_state, progress, save_state

__all__ = ["features_in_parts", "text_features"]


def features_in_parts(
    encoder: DualEncoder,
    kind: str,
    items: Sequence[str],
    compute: Callable[[slice], Tensor],
    *,
    part: int,
    folder: Path | None = None,
    sync: bool = False,
) -> Tensor:
    """Features [n, D] of items, in their order.

    Args:
        encoder: Whose features they are.
        kind: ``texts`` or ``images``.
        items: What tells one item from another.
        compute: Features of a slice of the items.
        part: Items a part.
        folder: Where parts are kept; None keeps none.
        sync: With torch.distributed, whether every rank computes some of the parts. All ranks have
            to call, with the same items; all get all features.
    """
    pieces = [slice(start, min(start + part, len(items))) for start in range(0, len(items), part)]
    shared = sync and is_parallel()
    if shared:
        first, last = own_share(len(pieces))
        pieces = pieces[first:last]
    model = "" if folder is None else encoder.fingerprint()
    found = [torch.zeros(0, encoder.dim, device=encoder.device)]
    bar: Any = pieces
    if len(pieces) > 1:
        bar = progress(pieces, description=f"{kind[:-1]} features", unit="part")
    for piece in bar:
        if folder is None:
            found.append(compute(piece).float())
            continue
        digest = hashlib.sha256(f"{kind} {model}".encode())
        for item in items[piece]:
            digest.update(b"\0" + item.encode())
        path = folder / f"{kind}-{digest.hexdigest()[:32]}.safetensors"
        found.append(_kept(path, lambda piece=piece: compute(piece).float()).to(encoder.device))
    rows = torch.cat(found)
    if not shared:
        return rows
    counts, _ = gather_counts(len(rows), rows.device)
    return gather_rows(rows, counts)


def _kept(path: Path, compute: Callable[[], Tensor]) -> Tensor:
    """What the file holds, or else what is computed, which then is kept in it."""
    if path.is_file():
        try:
            read: Tensor = load_state(path)
            return read
        except InputError:
            path.unlink()  # a damaged part is made anew
    features = compute()
    save_state(path, features)
    return features


def text_features(
    encoder: DualEncoder,
    prompts: Sequence[str],
    folder: Path | None = None,
    *,
    sync: bool = False,
    part: int = 2048,
) -> Tensor:
    """Features [n, D] of prompts; see `features_in_parts`."""
    if folder is None and not (sync and is_parallel()):
        return encoder.encode_text(prompts)  # at once, so that all are sorted by length

    def compute(piece: slice) -> Tensor:
        return encoder.encode_text(prompts[piece])

    return features_in_parts(
        encoder, "texts", prompts, compute, part=part, folder=folder, sync=sync
    )

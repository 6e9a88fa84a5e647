"""Features on disk: one file per sample, resumable, the same bytes when run again."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffeat.extractor import FeatureExtractor
from diffeat.features import Features
from shared_core.errors import InputError
from shared_core.run import progress, write_json

__all__ = ["FeatureCache", "extract_to_disk"]


def _file(folder: Path, sample: str) -> Path:
    """A sample's file; names that are no plain file name are hashed."""
    plain = sample.replace("-", "").replace("_", "").replace(".", "").isalnum()
    name = sample if plain and len(sample) < 120 else hashlib.sha256(sample.encode()).hexdigest()
    return folder / "samples" / f"{name}.safetensors"


def _say(prompt: Any) -> str | None:
    """A prompt for the manifest: itself, or a hash of its embedding."""
    if prompt is None or isinstance(prompt, str):
        return prompt
    states = prompt if isinstance(prompt, Tensor) else prompt.states
    content = states.detach().float().cpu().contiguous().numpy().tobytes()
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def extract_to_disk(
    fx: FeatureExtractor,
    samples: Sequence[tuple[str, Any]],
    out: str | os.PathLike[str],
    *,
    batch_size: int = 8,
    prompt: Any = None,
    t: int = 50,
    seed: int = 0,
    ensemble: int = 1,
    dtype: torch.dtype | None = None,
    resume: bool = True,
    shard: tuple[int, int] = (0, 1),
) -> Path:
    """Extract features of named images, skipping those that are there already.

    Args:
        fx: The extractor.
        samples: Pairs of a name and an image (PIL, or a tensor ``[3, H, W]``). The name decides the
            noise, so that shards and batches do not matter.
        out: The folder.
        batch_size: Images per forward. Run again with the same one the bytes are the same.
        prompt: One prompt for all, or its embedding.
        t: Timestep.
        seed: Of the noise.
        ensemble: Noise draws averaged.
        dtype: As what to store; float16 halves the space. By default the backbone's.
        resume: Continue a folder written with the same settings.
        shard: This process's number and how many there are, such as (rank, world size).

    Returns:
        The folder.

    Raises:
        InputError: If names repeat, or the folder holds features of other settings.
    """
    folder = Path(out)
    names = [name for name, _ in samples]
    if len(set(names)) != len(names) or not names:
        raise InputError("samples need names, each only once, and at least one of them")
    rank, world = shard
    if not 0 <= rank < world:
        raise InputError(f"shard={shard}; accepted: a number from 0 below how many there are")
    settings = {
        "backbone": fx.identity(),
        "layers": list(fx.layers),
        "prompt": _say(prompt),
        "t": t,
        "seed": seed,
        "ensemble": ensemble,
        "dtype": str(dtype or fx.dtype),
        "size": list(fx.size) if fx.size else None,
    }
    manifest = folder / "manifest.json"
    if manifest.is_file():
        found = _read_manifest(manifest)
        if not resume or found != settings:
            differs = [k for k in settings if found.get(k) != settings[k]]
            raise InputError(
                f"{folder} holds features with other {', '.join(differs) or 'runs'}; choose "
                "another folder, or resume with the same settings"
            )
    else:
        write_json(manifest, settings)
    mine = samples[rank::world]
    # A batch of which anything is missing runs again as it was: other companions would change the
    # last bits of a feature.
    parts = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    parts = [p for p in parts if not all(_file(folder, name).is_file() for name, _ in p)]
    with progress(total=sum(map(len, parts)), description="extracting", unit="image") as bar:
        for part in parts:
            images = [image for _, image in part]
            tensors = isinstance(images[0], Tensor)
            features = fx(
                torch.stack(images) if tensors else images,
                prompt,
                t,
                seed=seed,
                ids=[name for name, _ in part],
                ensemble=ensemble,
                out_dtype=dtype,
            ).to("cpu")
            for row, (name, _) in enumerate(part):
                if not _file(folder, name).is_file():
                    one = Features({k: v[row : row + 1] for k, v in features.items()})
                    one.save(_file(folder, name))
            bar.update(len(part))
    if rank == 0:
        write_json(folder / "index.json", names)
    return folder


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}; is this a feature folder?") from error
    return content


class FeatureCache(Mapping[str, Features]):
    """Features that `extract_to_disk` wrote, by sample, read when asked for.

    Args:
        path: The folder.

    Attributes:
        settings: How they were extracted.

    Raises:
        InputError: If it is no such folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.settings = _read_manifest(self.path / "manifest.json")
        index = self.path / "index.json"
        names = json.loads(index.read_text()) if index.is_file() else []
        self._names = [n for n in names if _file(self.path, n).is_file()]

    def __getitem__(self, name: str) -> Features:
        file = _file(self.path, name)
        if not file.is_file():
            raise KeyError(name)
        return Features.load(file)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

"""Features on disk: resumable, the same bytes when run again, in the form that reads best."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffeat._stores import Store, make_store
from diffeat.aggregate import MultiModel
from diffeat.extractor import FeatureExtractor
from diffeat.features import Features
from shared_core.errors import InputError
from shared_core.run import atomic_path, progress, write_json

__all__ = ["FeatureCache", "extract_to_disk"]

PCA_IMAGES = 64  # images that principal components are fitted on


def _say(prompt: Any) -> Any:
    """A prompt for the manifest: itself, or a hash of its embedding."""
    if prompt is None or isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Mapping):
        return {name: _say(one) for name, one in prompt.items()}
    states = prompt if isinstance(prompt, Tensor) else prompt.states
    content = states.detach().float().cpu().contiguous().numpy().tobytes()
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def extract_to_disk(
    fx: FeatureExtractor | MultiModel,
    samples: Sequence[tuple[str, Any]],
    out: str | os.PathLike[str],
    *,
    batch_size: int = 8,
    prompt: Any = None,
    t: int | Sequence[int] = 50,
    seed: int = 0,
    ensemble: int = 1,
    noise: Literal["seeded", "shared", "none", "inversion"] = "seeded",
    dtype: torch.dtype | None = None,
    format: Literal["safetensors", "npy", "memmap"] = "safetensors",
    layout: Literal["per-sample", "per-layer"] | None = None,
    pca: int | None = None,
    resume: bool = True,
    shard: tuple[int, int] = (0, 1),
) -> Path:
    """Extract features of named images, skipping those that are there already.

    Args:
        fx: The extractor, or several.
        samples: Pairs of a name and an image (PIL, or a tensor ``[3, H, W]``). The name decides the
            noise, so that shards and batches do not matter.
        out: The folder.
        batch_size: Images per forward. Run again with the same one the bytes are the same.
        prompt: One prompt for all, or its embedding.
        t: Timestep, or several.
        seed: Of the noise.
        ensemble: Noise draws averaged.
        noise: See `FeatureExtractor.make_noise`.
        dtype: As what to store; float16 halves the space. By default the backbone's.
        format: ``safetensors``; ``npy``, which numpy reads alone; or ``memmap``, one array
            ``[N, C, H, W]`` a layer, for random access to many samples (all of one size).
        layout: ``per-sample``, all layers of an image together, or ``per-layer``. By default the
            former; ``memmap`` is always the latter.
        pca: Store that many principal components of each layer, fitted on the positions of the
            first 64 samples, in place of its channels.
        resume: Continue a folder written with the same settings.
        shard: This process's number and how many there are, such as (rank, world size).

    Returns:
        The folder.

    Raises:
        InputError: If names repeat, the folder holds features with other settings, or the format
            cannot hold these features.

    Examples:
        >>> from diffeat.demo import build_extractor, shapes_data
        >>> samples = list(zip("ab", shapes_data(2, "test")[0]))
        >>> folder = extract_to_disk(
        ...     build_extractor(), samples, getfixture("tmp_path"), prompt="", format="memmap"
        ... )
        >>> FeatureCache(folder)["b"]
        Features(up-level1-repeat1-vit-out: [1, 48, 8, 8])
    """
    folder = Path(out)
    names = [name for name, _ in samples]
    if len(set(names)) != len(names) or not names:
        raise InputError("samples need names, each only once, and at least one of them")
    rank, world = shard
    if not 0 <= rank < world:
        raise InputError(f"shard={shard}; accepted: a number from 0 below how many there are")
    if pca is not None and pca < 1:
        raise InputError(f"pca={pca}; accepted: 1 and more, or None")
    times = [t] if isinstance(t, int) else list(t)
    stored = dtype or fx.dtype
    settings = {
        "backbone": fx.identity(),
        "layers": list(fx.layers),
        "features": fx.feature_names(times),
        "prompt": _say(prompt),
        "t": times if len(times) > 1 else times[0],
        "seed": seed,
        "ensemble": ensemble,
        "noise": noise,
        "dtype": str(stored),
        "size": list(fx.size) if fx.size else None,
        "format": format,
        "layout": layout or ("per-layer" if format == "memmap" else "per-sample"),
        "pca": pca,
    }
    if format == "memmap":  # rows of an array: other samples would be another array
        settings["samples"] = hashlib.sha256("\n".join(names).encode()).hexdigest()
    store = make_store(folder, settings, names, stored)
    _check_manifest(folder, settings, resume)
    write_json(folder / "index.json", names)

    def features_of(part: Sequence[tuple[str, Any]]) -> Features:
        images = [image for _, image in part]
        found = fx(
            torch.stack(images) if isinstance(images[0], Tensor) else images,
            prompt,
            times if len(times) > 1 else times[0],
            noise=noise,
            seed=seed,
            ids=[name for name, _ in part],
            ensemble=ensemble,
            out_dtype=None if pca else stored,
        )
        return found.to("cpu")

    components = None
    if pca is not None:
        components = _components(folder, features_of, samples[:PCA_IMAGES], batch_size, pca)
    mine = samples[rank::world]
    # A batch of which anything is missing runs again as it was: other companions would change the
    # last bits of a feature.
    parts = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    parts = [p for p in parts if not all(store.has(name) for name, _ in p)]
    with progress(total=sum(map(len, parts)), description="extracting", unit="image") as bar:
        for part in parts:
            features = features_of(part)
            if components is not None:
                features = Features(
                    {n: _project(v, *components[n]).to(stored) for n, v in features.items()}
                )
            for row, (name, _) in enumerate(part):
                if not store.has(name):
                    one = Features({k: v[row : row + 1] for k, v in features.items()})
                    store.write(name, one)
            bar.update(len(part))
    return folder


def _check_manifest(folder: Path, settings: dict[str, Any], resume: bool) -> None:
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        write_json(manifest, settings)
        return
    found = _read_manifest(manifest)
    if not resume or found != settings:
        differs = [k for k in settings if found.get(k) != settings[k]]
        raise InputError(
            f"{folder} holds features with other {', '.join(differs) or 'runs'}; choose "
            "another folder, or resume with the same settings"
        )


def _components(
    folder: Path, features_of: Any, samples: Sequence[Any], batch_size: int, count: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and principal directions ``[C, n]`` of each layer, fitted once and kept."""
    file = folder / "pca.safetensors"
    if not file.is_file():
        sums: dict[str, tuple[int, Tensor, Tensor]] = {}
        for start in range(0, len(samples), batch_size):
            for name, value in features_of(samples[start : start + batch_size]).items():
                x = value.double().permute(0, 2, 3, 1).flatten(0, 2)
                n, total, gram = sums.get(name, (0, torch.zeros(()), torch.zeros(())))
                sums[name] = n + len(x), total + x.sum(0), gram + x.T @ x
        found = {}
        for name, (n, total, gram) in sums.items():
            mean = total / n
            _, vectors = torch.linalg.eigh(gram / n - mean[:, None] * mean)
            top = vectors.flip(1)[:, :count]
            # The sign of an eigenvector is arbitrary; its largest entry is made positive.
            signs = top.gather(0, top.abs().argmax(0, keepdim=True)).sign()
            found[f"mean {name}"] = mean.float()
            found[f"directions {name}"] = (top * signs).float().contiguous()
        with atomic_path(file) as temporary:
            save_file(found, temporary)
    kept = load_file(file)
    layers = [key.removeprefix("mean ") for key in kept if key.startswith("mean ")]
    return {name: (kept[f"mean {name}"], kept[f"directions {name}"]) for name in layers}


def _project(value: Tensor, mean: Tensor, directions: Tensor) -> Tensor:
    centred = value.float() - mean[:, None, None]
    return torch.einsum("bchw,cn->bnhw", centred, directions)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}; is this a feature folder?") from error
    return content


class FeatureCache(Mapping[str, Features]):
    """Features that `extract_to_disk` wrote, by sample, read when asked for.

    Arrays (``npy``, ``memmap``) are mapped into memory, not read.

    Args:
        path: The folder.
        layers: Read only these; by default all.

    Attributes:
        settings: How they were extracted.

    Raises:
        InputError: If it is no such folder, or a layer is not there.
    """

    def __init__(self, path: str | os.PathLike[str], layers: Sequence[str] | None = None) -> None:
        self.path = Path(path)
        self.settings = _read_manifest(self.path / "manifest.json")
        stored = self.settings.get("features", [])
        unknown = [name for name in layers or () if name not in stored]
        if unknown:
            raise InputError(f"{self.path} does not hold {', '.join(unknown)}; it holds {stored}")
        self.layers = [n for n in stored if layers is None or n in layers]
        index = self.path / "index.json"
        names = json.loads(index.read_text()) if index.is_file() else []
        self._store: Store = make_store(self.path, self.settings, names, None)
        self._names = [n for n in names if self._store.has(n)]

    def __getitem__(self, name: str) -> Features:
        if not self._store.has(name):
            raise KeyError(name)
        return self._store.read(name, self.layers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

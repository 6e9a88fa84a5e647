"""Feature buckets: the features of several recipes for every image, in one pass, on disk."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from content_shift._state import session
from content_shift.recipe import Inputs, Recipe, Technique
from content_shift.techniques import load_recipe, read_file
from diffeat import FeatureExtractor, Features, PromptEmbedding, Selection
from shared_core.errors import InputError
from shared_core.run import progress, write_json

__all__ = ["FeatureBucket", "FeatureSpec", "extract_bucket", "load_specs"]


@dataclass(frozen=True)
class FeatureSpec:
    """One feature of a bucket.

    Attributes:
        name: Of the feature.
        recipe: Techniques under which it is extracted.
        layers: By default the extractor's; ``attn`` alone is an attention feature, which
            amalgamation appends unweighted.
        t: Timestep.
        seed: Of the noise.
    """

    name: str
    recipe: Recipe = field(default_factory=Recipe)
    layers: Any = None
    t: int = 50
    seed: int = 0

    @property
    def attention(self) -> bool:
        """Whether it is an attention feature."""
        return self.layers in ("attn", ["attn"], ("attn",))

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for a recipe file."""
        return {
            "name": self.name, "layers": self.layers, "t": self.t, "seed": self.seed,
            "techniques": self.recipe.to_dict(),
        }  # fmt: skip


def load_specs(source: str | os.PathLike[str]) -> list[FeatureSpec]:
    """Features of a bucket from a YAML or JSON file: a list of the fields of `FeatureSpec`.

    Raises:
        InputError: If it cannot be read or is no such list.

    Examples:
        >>> path = getfixture("tmp_path") / "r.yaml"
        >>> _ = path.write_text("- {name: fine, techniques: [{technique: Prompt, text: a horse}]}")
        >>> load_specs(path)[0].recipe
        Prompt(text='a horse')
    """
    content = read_file(source)
    if not isinstance(content, list) or not all(isinstance(e, dict) for e in content):
        raise InputError(f"{source} is no list of features with name and techniques")
    found = []
    for entry in content:
        unknown = set(entry) - {"name", "techniques", "layers", "t", "seed"}
        if "name" not in entry or unknown:
            raise InputError(
                f"{source}: a feature has {sorted(entry)}; accepted: name, techniques, layers, t, "
                "seed"
            )
        rest = {key: entry[key] for key in ("layers", "t", "seed") if key in entry}
        found.append(
            FeatureSpec(str(entry["name"]), load_recipe(entry.get("techniques", [])), **rest)
        )
    return found


def _digest(tensors: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for x in tensors:
        some = x.detach().flatten()[:: max(1, x.numel() // 64)].float().cpu()
        digest.update(some.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _describe(value: Any) -> Any:
    """An argument for the manifest: itself, or what tells it from another."""
    if isinstance(value, Technique):
        shown = {f.name: _describe(getattr(value, f.name)) for f in fields(value) if f.init}  # type: ignore[arg-type]
        return {"technique": type(value).__name__, **shown}
    if isinstance(value, nn.Module):
        return f"{type(value).__name__}:{_digest(list(value.parameters()))}"
    if isinstance(value, Tensor):
        return f"tensor:{_digest([value])}"
    if isinstance(value, PromptEmbedding):
        return f"prompt:{_digest([value.states])}"
    if isinstance(value, Mapping):
        return {str(k): _describe(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_describe(v) for v in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return getattr(value, "__qualname__", type(value).__qualname__)


def _file(folder: Path, sample: str) -> Path:
    return folder / "samples" / f"{hashlib.sha256(sample.encode()).hexdigest()[:32]}.safetensors"


def extract_bucket(
    fx: FeatureExtractor,
    features: Sequence[FeatureSpec] | Mapping[str, Recipe | Technique],
    samples: Sequence[tuple[str, Any]],
    out: str | os.PathLike[str],
    *,
    prompt: Any = None,
    batch_size: int = 8,
    dtype: torch.dtype | None = None,
    resume: bool = True,
    shard: tuple[int, int] = (0, 1),
) -> "FeatureBucket":
    """Extract every feature of every image, one file an image; images are encoded once.

    Latents, edges and prompts are shared by all recipes, LoRA weights live side by side in the one
    backbone, and every forward stops after its last layer.

    Args:
        fx: The extractor.
        features: What to extract, or recipes by name at t = 50.
        samples: Pairs of a name and an image (PIL, or a tensor ``[3, H, W]``); the name decides the
            noise.
        out: The folder.
        prompt: Where a recipe sets none.
        batch_size: Images per forward. Run again with the same one the bytes are the same.
        dtype: As what to store; by default the backbone's.
        resume: Continue a folder written with the same settings.
        shard: This process's number and how many there are, such as (rank, world size).

    Raises:
        InputError: If names repeat, a layer is unknown, or the folder holds other features.
    """
    folder = Path(out)
    if isinstance(features, Mapping):
        features = [FeatureSpec(name, Recipe(recipe)) for name, recipe in features.items()]
    names = [name for name, _ in samples]
    titles = [spec.name for spec in features]
    if len(set(names)) != len(names) or not names or len(set(titles)) != len(titles) or not titles:
        raise InputError("samples and features need names, each only once, and at least one each")
    if any("/" in title for title in titles):
        raise InputError("names of features hold no slash")
    rank, world = shard
    if not 0 <= rank < world:
        raise InputError(f"shard={shard}; accepted: a number from 0 below how many there are")
    layers = {
        spec.name: fx.layers if spec.layers is None
        else Selection.parse(spec.layers).resolve(fx.backbone)
        for spec in features
    }  # fmt: skip
    settings = {
        "backbone": fx.identity(),
        "features": [
            {
                "name": spec.name, "layers": list(layers[spec.name]), "t": spec.t,
                "seed": spec.seed, "attention": spec.attention,
                "techniques": [_describe(t) for t in spec.recipe.techniques],
            }
            for spec in features
        ],
        "prompt": _describe(prompt),
        "dtype": str(dtype or fx.dtype),
        "size": list(fx.size) if fx.size else None,
    }  # fmt: skip
    _check_manifest(folder / "manifest.json", settings, resume)
    kept = [t for spec in features for t in spec.recipe.techniques if not t.exclusive]
    mine = list(range(len(samples)))[rank::world]
    batches = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    batches = [b for b in batches if not all(_file(folder, names[i]).is_file() for i in b)]
    bar = progress(total=sum(map(len, batches)), description="extracting", unit="image")
    with session(fx, kept if batches else ()), bar:
        for index in batches:
            images = [samples[i][1] for i in index]
            inputs = Inputs.prepare(
                fx, torch.stack(images) if isinstance(images[0], Tensor) else images,
                ids=[names[i] for i in index], index=index, total=len(samples),
            )  # fmt: skip
            found: dict[str, Tensor] = {}
            for spec in features:
                with spec.recipe.applied(fx) as opened:
                    maps = spec.recipe.features(
                        fx, opened, inputs, layers=layers[spec.name], t=spec.t, prompt=prompt,
                        seed=spec.seed,
                    )  # fmt: skip
                found |= {
                    f"{spec.name}/{n}": m.to("cpu", dtype or fx.dtype) for n, m in maps.items()
                }
            for row, i in enumerate(index):
                if not _file(folder, names[i]).is_file():
                    one = Features({k: v[row : row + 1] for k, v in found.items()})
                    one.save(_file(folder, names[i]))
            bar.update(len(index))
    if rank == 0:
        write_json(folder / "index.json", names)
    return FeatureBucket(folder)


def _check_manifest(path: Path, settings: dict[str, Any], resume: bool) -> None:
    plain = json.loads(json.dumps(settings))
    if path.is_file():
        found = _read(path)
        if not resume or found != plain:
            differs = [k for k in plain if found.get(k) != plain[k]]
            raise InputError(
                f"{path.parent} holds features with other {', '.join(differs) or 'runs'}; choose "
                "another folder, or resume with the same settings"
            )
    else:
        write_json(path, plain)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}; is this a feature bucket?") from error


class FeatureBucket(Mapping[str, dict[str, Features]]):
    """What `extract_bucket` wrote: by sample, the features by name, read when asked for.

    Args:
        path: The folder.

    Attributes:
        settings: How they were extracted.
        plain: Names of the features that amalgamation weighs.
        attention: Names of those that it appends.

    Raises:
        InputError: If it is no such folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.settings: dict[str, Any] = _read(self.path / "manifest.json")
        index = self.path / "index.json"
        self._names = [
            n for n in (_read(index) if index.is_file() else []) if _file(self.path, n).is_file()
        ]
        listed = self.settings["features"]
        self.plain = [f["name"] for f in listed if not f["attention"]]
        self.attention = [f["name"] for f in listed if f["attention"]]

    def __getitem__(self, name: str) -> dict[str, Features]:
        file = _file(self.path, name)
        if not file.is_file():
            raise KeyError(name)
        found: dict[str, dict[str, Tensor]] = {}
        for key, value in Features.load(file).items():
            title, _, layer = key.partition("/")
            found.setdefault(title, {})[layer] = value
        return {title: Features(maps) for title, maps in found.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def load(
        self, names: Sequence[str], side: int | tuple[int, int]
    ) -> tuple[Float[Tensor, "batch b channels height width"], Tensor | None]:
        """Samples as `Amalgamation` takes them: features stacked, attention features joined.

        The layers of a feature are resized to `side` and joined.

        Args:
            names: Samples.
            side: Side of the maps, or (height, width).

        Raises:
            InputError: If a sample is missing, or features differ in width.
        """
        stacks, extras = [], []
        for name in names:
            try:
                found = self[name]
            except KeyError:
                raise InputError(f"{self.path} holds no features of {name!r}") from None
            joined = [found[title].concat(side).float()[0] for title in self.plain]
            widths = [len(x) for x in joined]
            if len(set(widths)) != 1:
                raise InputError(f"the features have {widths} channels; amalgamation wants equal")
            stacks.append(torch.stack(joined))
            if self.attention:
                extras.append(
                    torch.cat([found[title].concat(side).float()[0] for title in self.attention])
                )
        return torch.stack(stacks), torch.stack(extras) if extras else None

"""GATE: does a technique keep features at the input image? Two tests before integrating it.

`score` and `evaluate` are the paper's quantitative test (eq. 1 and 2), `img2img` its qualitative
one; `reconstruction_gain` puts the latter into one forward and is the more reliable of the two.
"""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from content_shift._state import session
from content_shift.closeness import closeness
from content_shift.img2img import Img2Img, img2img
from content_shift.recipe import Inputs, Recipe, Technique
from content_shift.score import contours, difference, laplacian, score, score_of_differences
from diffeat import FeatureExtractor
from shared_core.errors import InputError
from shared_core.run import RunFolder, progress, to_plain

__all__ = [
    "GateReport",
    "Img2Img",
    "clean_images",
    "contours",
    "difference",
    "evaluate",
    "img2img",
    "laplacian",
    "reconstruction_gain",
    "score",
    "shift_map",
]

Applied = Technique | Recipe


@dataclass(frozen=True)
class GateReport:
    """Scores of several techniques on the same images and noise.

    Attributes:
        settings: How they were taken.
        table: Rows of ``technique, layer, score, std`` (over draws), ``images``.
        pooled: Rows of ``technique, score, std`` (mean over layers), and, where reconstructions
            were asked for, ``gain, gain_std`` in dB.
        per_image: Score of each image by technique and layer, averaged over draws.
    """

    settings: dict[str, Any]
    table: list[dict[str, Any]]
    pooled: list[dict[str, Any]]
    per_image: dict[str, dict[str, list[float]]] = field(repr=False)

    def rank(self, by: str = "score") -> list[str]:
        """Names of the techniques, best first.

        Args:
            by: ``score`` (eq. 2, pooled) or ``gain`` (of the reconstruction).

        Raises:
            InputError: If there are no gains, or `by` is neither.
        """
        if by not in ("score", "gain") or any(row.get(by) is None for row in self.pooled):
            raise InputError(f"by={by!r}; accepted: score, or gain where reconstructions were made")
        return [r["technique"] for r in sorted(self.pooled, key=lambda r: -float(r[by]))]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            "settings": self.settings,
            "table": self.table,
            "pooled": self.pooled,
            "ranking": self.rank(),
            "per_image": self.per_image,
        }

    def save(self, folder: Path, *, plot: bool = True) -> None:
        """Write ``gate.json`` and the picture ``gate.png``."""
        from content_shift.plots import plot_gate
        from shared_core.run import write_json

        write_json(Path(folder) / "gate.json", self.to_dict())
        if plot:
            RunFolder(folder, resume=True).save_figure("gate", plot_gate(self.table, self.pooled))


def parts(
    fx: FeatureExtractor, images: Any, batch_size: int, ids: Sequence[str | int] | None, seed: int
) -> Iterator[Inputs]:
    """Images in batches, encoded."""
    total = 1 if not isinstance(images, Tensor | Sequence) else len(images)
    if isinstance(images, Tensor) and images.ndim == 3:
        images, total = images[None], 1
    elif not isinstance(images, Tensor | Sequence):
        images = [images]
    names = list(range(total)) if ids is None else list(ids)
    if len(names) != total or not total:
        raise InputError(f"{len(names)} ids for {total} images; at least one image is needed")
    for start in range(0, total, batch_size):
        index = list(range(start, min(start + batch_size, total)))
        yield Inputs.prepare(
            fx, images[start : start + batch_size], ids=[names[i] for i in index], seed=seed,
            index=index, total=total,
        )  # fmt: skip


def clean_images(
    fx: FeatureExtractor, recipe: Applied, inputs: Inputs, **options: Any
) -> Float[Tensor, "batch 3 height width"]:
    """What the model takes the clean image to be, from one prediction, decoded.

    ``x_0 = (x_t - sqrt(1 - abar) eps) / sqrt(abar)`` for models that predict noise.

    Args:
        fx: The extractor.
        recipe: The technique.
        inputs: The images.
        options: ``t``, ``prompt``, ``seed``, ``draw``, as of `Recipe.conditioned`.
    """
    recipe = Recipe(recipe)
    with recipe.applied(fx) as opened:
        ctx = recipe.conditioned(fx, opened, inputs, **options)
        return fx.decode(ctx.clean_estimate()).to(inputs.pixels.device)


def reconstruction_gain(
    fx: FeatureExtractor,
    technique: Applied,
    images: Any,
    t: int = 100,
    metric: str = "psnr",
    *,
    prompt: Any = None,
    draws: int = 1,
    seed: int = 0,
    ids: Sequence[str | int] | None = None,
    batch_size: int = 8,
    reduction: str = "mean",
) -> Tensor:
    """How much closer one-step reconstructions come to the input under a technique; same noise.

    Args:
        fx: The extractor.
        technique: What is judged.
        images: See `diffeat.FeatureExtractor.pixels`.
        t: Timestep; noise has to hide something for a technique to bring it back.
        metric: ``psnr`` (decibels), ``ssim`` or ``edge`` (F1).
        prompt: Where the technique sets none, and without it.
        draws: Noise draws to average over.
        seed: Of the noise.
        ids: Names of the samples.
        batch_size: Images per forward.
        reduction: ``mean``, or ``none`` for one gain an image.

    Examples:
        >>> from diffeat.demo import build_extractor
        >>> from content_shift.techniques import CFG
        >>> reconstruction_gain(build_extractor(), CFG(1.0), torch.rand(2, 3, 32, 32), prompt="")
        tensor(0.)
    """
    if reduction not in ("mean", "none"):
        raise InputError(f"reduction={reduction!r}; accepted: mean, none")
    found: list[Tensor] = []
    for inputs in parts(fx, images, batch_size, ids, seed):
        gains = torch.zeros(len(inputs.pixels))
        for draw in range(draws):
            given: dict[str, Any] = {"t": t, "prompt": prompt, "seed": seed, "draw": draw}
            close = [
                closeness(clean_images(fx, r, inputs, **given), inputs.pixels, metric).cpu()
                for r in (Recipe(technique), Recipe())
            ]
            gains += (close[0] - close[1]) / draws
        found.append(gains)
    every = torch.cat(found)
    return every.mean() if reduction == "mean" else every


def evaluate(
    fx: FeatureExtractor,
    techniques: Mapping[str, Applied],
    images: Any,
    t: int = 50,
    draws: int = 2,
    ref_t: int = 0,
    layers: Any = None,
    *,
    prompt: Any = None,
    ref: str = "plain",
    normalize: str | None = None,
    kernel: str = "5pt",
    padding: str = "replicate",
    reconstruction: bool = True,
    seed: int = 0,
    ids: Sequence[str | int] | None = None,
    batch_size: int = 8,
) -> GateReport:
    """Score techniques on every layer (eq. 2) and by reconstruction gain, streaming over images.

    The anchor is the same layer at the same t from the same noise without a technique. Only sums
    are kept, no features.

    Args:
        fx: The extractor.
        techniques: By name.
        images: See `diffeat.FeatureExtractor.pixels`.
        t: Timestep.
        draws: Noise draws; the spread over them is reported.
        ref_t: Timestep of the noise-free reference.
        layers: By default the extractor's.
        prompt: Without a technique, and where one sets none.
        ref: ``plain``: reference without technique, as published; ``same``: with it, because
            control shifts activations even at t = 0.
        normalize: See `content_shift.gate.difference`.
        kernel: See `content_shift.gate.laplacian`.
        padding: See `content_shift.gate.laplacian`.
        reconstruction: Also measure `reconstruction_gain` (a whole forward a technique).
        seed: Of the noise.
        ids: Names of the samples.
        batch_size: Images per forward.

    Raises:
        ZeroAnchor: If the noise does not reach a layer.
        InputError: If anything does not fit.
    """
    if ref not in ("plain", "same"):
        raise InputError(f"ref={ref!r}; accepted: plain, same")
    if draws < 1 or not techniques:
        raise InputError("give at least one technique and one draw")
    recipes = {name: Recipe(value) for name, value in techniques.items()}
    names = fx.layers if layers is None else tuple([layers] if isinstance(layers, str) else layers)
    how: dict[str, Any] = {"kernel": kernel, "padding": padding, "normalize": normalize}
    # Eq. 1 by technique, layer and draw: [images]. The anchor's depend on the reference.
    diffs: dict[Any, list[Tensor]] = {}
    gains: dict[Any, list[Tensor]] = {}
    kept = [x for r in recipes.values() for x in r.techniques if not x.exclusive]
    total = 1 if not isinstance(images, Tensor | Sequence) else len(images)
    bar = progress(total=total, description="scoring", unit="image")
    with session(fx, kept), bar:

        def reference(recipe: Recipe, inputs: Inputs) -> Any:
            with recipe.applied(fx) as opened:
                return recipe.features(
                    fx, opened, inputs, layers=names, t=ref_t, prompt=prompt, noise="none",
                    seed=seed,
                )  # fmt: skip

        def look(recipe: Recipe, inputs: Inputs, draw: int) -> tuple[Any, Tensor | None]:
            """Features, and how close the reconstruction comes, from the same forward."""
            given: dict[str, Any] = {"t": t, "prompt": prompt, "seed": seed, "draw": draw}
            with recipe.applied(fx) as opened:
                if not reconstruction:
                    return recipe.features(fx, opened, inputs, layers=names, **given), None
                found, clean = recipe.features_and_estimate(
                    fx, opened, inputs, layers=names, **given
                )
            shown = fx.decode(clean).to(inputs.pixels.device)
            return found, closeness(shown, inputs.pixels)

        for inputs in parts(fx, images, batch_size, ids, seed):
            references = {
                name: reference(recipe, inputs)
                for name, recipe in ((None, Recipe()), *(recipes.items() if ref == "same" else ()))
            }
            for draw in range(draws):
                anchor, before = look(Recipe(), inputs, draw)
                for name, recipe in recipes.items():
                    wanted = references[name if ref == "same" else None]
                    mine, after = look(recipe, inputs, draw)
                    for layer in mine:
                        pair = [difference(f[layer], wanted[layer], **how)
                                for f in (mine, anchor)]  # fmt: skip
                        stacked = torch.stack(pair).cpu()
                        diffs.setdefault((name, layer, draw), []).append(stacked)
                    if before is not None and after is not None:
                        gains.setdefault((name, draw), []).append((after - before).cpu())
            bar.update(len(inputs.pixels))
    settings = {
        "t": t, "draws": draws, "ref_t": ref_t, "ref": ref, "layers": list(names), "seed": seed,
        "images": total, **how,
    }  # fmt: skip
    return _report(settings, list(recipes), list(names), draws, diffs, gains)


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _report(
    settings: dict[str, Any], names: Sequence[str], layers: Sequence[str], draws: int,
    diffs: Mapping[Any, list[Tensor]], gains: Mapping[Any, list[Tensor]],
) -> GateReport:  # fmt: skip
    table, pooled = [], []
    per_image: dict[str, dict[str, list[float]]] = {}
    for name in names:
        of_layers = []
        for layer in layers:
            joined = [torch.cat(diffs[name, layer, draw], 1).double() for draw in range(draws)]
            scores = [float(score_of_differences(*pair, where=layer)) for pair in joined]
            each = torch.stack(
                [score_of_differences(*p, reduction="none", where=layer) for p in joined]
            )
            per_image.setdefault(name, {})[layer] = to_plain(each.mean(0))
            of_layers.append(scores)
            table.append(
                {
                    "technique": name,
                    "layer": layer,
                    "score": statistics.fmean(scores),
                    "std": _spread(scores),
                    "images": joined[0].shape[1],
                }
            )
        means = [statistics.fmean(column) for column in zip(*of_layers, strict=True)]
        row: dict[str, Any] = {
            "technique": name, "score": statistics.fmean(means), "std": _spread(means),
        }  # fmt: skip
        if gains:
            of_draws = [float(torch.cat(gains[name, draw]).mean()) for draw in range(draws)]
            row |= {"gain": statistics.fmean(of_draws), "gain_std": _spread(of_draws)}
        pooled.append(row)
    return GateReport(json.loads(json.dumps(settings)), table, pooled, per_image)


def shift_map(
    fx: FeatureExtractor,
    image: Any,
    t: int = 50,
    technique: Applied | None = None,
    *,
    layer: str | None = None,
    prompt: Any = None,
    seed: int = 0,
    draw: int = 0,
    kernel: str = "5pt",
    padding: str = "replicate",
) -> Float[Tensor, "height width"]:
    """Where the content of one image shifts: eq. 1 position by position, at the layer's size.

    Args:
        fx: The extractor.
        image: One image.
        t: Timestep.
        technique: By default none.
        layer: By default the extractor's last.
        prompt: Where the technique sets none.
        seed: Of the noise.
        draw: Of the noise.
        kernel: See `content_shift.gate.laplacian`.
        padding: See `content_shift.gate.laplacian`.

    Raises:
        InputError: If there is more than one image.
    """
    inputs = next(parts(fx, image, 2, None, seed))
    if inputs.total != 1:
        raise InputError(f"shift_map looks at one image; {inputs.total} were given")
    name = layer or fx.layers[-1]
    given: dict[str, Any] = {"prompt": prompt, "seed": seed, "layers": [name], "inputs": inputs}
    reference = Recipe()(fx, t=0, noise="none", **given)[name]
    recipe = Recipe() if technique is None else Recipe(technique)
    found = recipe(fx, t=t, draw=draw, **given)[name]
    lines = [contours(x, kernel=kernel, padding=padding)[0] for x in (reference, found)]
    return (lines[0] - lines[1]).abs()

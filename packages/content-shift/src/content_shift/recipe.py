"""Recipes: techniques composed in order, applied to an extractor, and taken off again.

A technique says what it changes for a batch in a `Patch`. A recipe merges the patches in order,
runs the extractor with them, and leaves it as it was.
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Optional, Union

import torch
from torch import Tensor

from content_shift._state import Session, models_of, session
from diffeat import FeatureExtractor, Features, PromptEmbedding, capture
from diffeat.naming import find_activations
from shared_core.errors import InputError

__all__ = ["Context", "Inputs", "Patch", "Recipe", "Technique"]

ResidualsOf = Callable[[Tensor, float, PromptEmbedding | None], Mapping[str, Any]]


@dataclass(eq=False)
class Inputs:
    """A batch of images, encoded once for all recipes.

    Attributes:
        pixels: ``[B, 3, H, W]`` in [0, 1], at the extractor's size.
        latents: Clean latents.
        ids: Names of the samples, which decide their noise.
        index: Places of the images in the data set, for captions by number.
        total: Images in the data set.
        shared: What techniques compute from the pixels alone, such as edges, by key.
    """

    pixels: Tensor
    latents: Tensor
    ids: list[str | int]
    index: list[int]
    total: int
    shared: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def prepare(
        cls,
        fx: FeatureExtractor,
        images: Any,
        *,
        ids: Sequence[str | int] | None = None,
        value_range: str = "0,1",
        seed: int = 0,
        index: Sequence[int] | None = None,
        total: int | None = None,
    ) -> "Inputs":
        """Check, resize and encode images.

        Raises:
            InputError: If the images do not fit the extractor, or the ids the images.
        """
        pixels = fx.pixels(images, value_range)
        latents = fx.encode_images(pixels, "-1,1", seed=seed)
        batch = len(pixels)
        names: list[str | int] = list(range(batch)) if ids is None else list(ids)
        if len(names) != batch:
            raise InputError(f"{len(names)} ids for {batch} images")
        place = list(range(batch)) if index is None else list(index)
        shown = (pixels / 2 + 0.5).clamp(0, 1)
        return cls(shown, latents, names, place, batch if total is None else total)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """`make()`, computed the first time that this key is asked for."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    def pick(self, values: Sequence[Any] | Tensor, what: str) -> Any:
        """The values that belong to these images, of one value an image of the data set.

        Raises:
            InputError: If there are not as many values as images.
        """
        if len(values) != self.total:
            raise InputError(f"{len(values)} {what} for {self.total} images; give one an image")
        if isinstance(values, Tensor):
            return values[self.index]
        return [values[i] for i in self.index]


@dataclass(eq=False)
class Patch:
    """What a technique changes for one batch; what stays ``None`` is left alone.

    Attributes:
        prompt: Text, texts, or an embedding. The last one counts.
        residuals: Function of (x_t, time, embedding): a ControlNet's residuals, which add up.
        residuals_key: What tells them from others at the same latent, time and prompt; recipes
            that share all of it compute them once a batch. ``None`` does not share.
        adapters: Weights of loaded adapters by name.
        x_t: Another noisy latent, or a function of the finished `Context` that returns one; the
            functions run last, in order, each from what the one before gave.
        added: Entries of ``added_cond_kwargs`` beside those that the backbone always gets.
        backbone_kwargs: Further arguments of the backbone.
        guidance: Scale of classifier-free guidance in every prediction.
        ensemble: Noise draws that features are averaged over.
        time: Timestep that the backbone is told for the features.
    """

    prompt: Any = None
    residuals: ResidualsOf | None = None
    residuals_key: Any = None
    adapters: Mapping[str, float] = field(default_factory=dict)
    x_t: Any = None
    added: Mapping[str, Any] = field(default_factory=dict)
    backbone_kwargs: Mapping[str, Any] = field(default_factory=dict)
    guidance: float | None = None
    ensemble: int | None = None
    time: int | None = None


class Context:
    """One batch at one timestep and draw, with what the techniques have changed so far.

    Attributes:
        fx, inputs, t, seed, draw: What the call was given.
        noise: The noise of this draw, ``None`` at t = 0 without noise.
        x_t: The noisy latents.
        prompt: As given so far; an embedding once the context is finished.
    """

    def __init__(
        self, fx: FeatureExtractor, inputs: Inputs, t: int, prompt: Any, noise: Any, seed: int,
        draw: int,
    ) -> None:  # fmt: skip
        self.fx, self.inputs, self.t, self.prompt = fx, inputs, t, prompt
        self.seed, self.draw, self.time = seed, draw, t
        self.noise: Tensor | None
        self.noise, self.x_t = self._start(noise)
        self._common = isinstance(noise, str)
        self.guidance, self.ensemble = 1.0, 1
        self.adapters: dict[str, float] = {}
        self._residuals: list[ResidualsOf] = []
        self._keys: list[Any] = []
        self._added: dict[str, Any] = {}
        self._kwargs: dict[str, Any] = {}
        self._starts: list[Any] = []

    def _start(self, noise: Any) -> tuple[Tensor | None, Tensor]:
        """Noise and noisy latent; recipes on the same batch share both."""
        fx, inputs = self.fx, self.inputs

        def make() -> tuple[Tensor | None, Tensor]:
            drawn = fx.make_noise(
                inputs.latents, noise, ids=inputs.ids, seed=self.seed, draw=self.draw
            )
            if drawn is None:
                return None, inputs.latents
            return drawn, fx.schedule.add_noise(inputs.latents, drawn, self.t)

        if not isinstance(noise, str):
            return make()
        found: tuple[Tensor | None, Tensor] = inputs.once(
            ("start", noise, self.seed, self.draw, self.t), make
        )
        return found

    def merge(self, patch: Patch) -> None:
        """Take over what a technique changes."""
        if patch.prompt is not None:
            self.prompt = patch.prompt
        if patch.residuals is not None:
            self._residuals.append(patch.residuals)
            self._keys.append(patch.residuals_key)
        self.adapters.update(patch.adapters)
        self._added.update(patch.added)
        self._kwargs.update(patch.backbone_kwargs)
        if patch.x_t is not None:
            self._starts.append(patch.x_t)
        if patch.guidance is not None:
            self.guidance = patch.guidance
        if patch.ensemble is not None:
            self.ensemble = patch.ensemble
        if patch.time is not None:
            self.time = patch.time

    def finish(self, opened: Session, *, walk: bool = True) -> None:
        """Activate the adapters, embed the prompt, walk to the latent that is looked at."""
        opened.activate(self.adapters)
        self.prompt = self._embed(self.prompt)
        for start in self._starts if walk else ():
            self.x_t = start(self) if callable(start) else start

    def _embed(self, prompt: Any) -> PromptEmbedding | None:
        if prompt is None or isinstance(prompt, PromptEmbedding):
            return prompt
        if isinstance(prompt, Tensor):
            return PromptEmbedding(prompt)
        # Prompts are remembered by text alone, so a changed text tower must not use that memory.
        towers = models_of(self.fx)[1:]
        if any(getattr(tower, "peft_config", None) for tower in towers) and self.fx.text:
            key = ("prompt", prompt if isinstance(prompt, str) else tuple(prompt),
                   tuple(sorted(self.adapters.items())))  # fmt: skip
            words = (prompt,) if isinstance(prompt, str) else tuple(prompt)
            text = self.fx.text
            found: PromptEmbedding = self.inputs.once(key, lambda: text(words))
            return found
        return self.fx.encode_prompt(prompt)

    def _arguments(self, x: Tensor, embedding: PromptEmbedding | None) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self._residuals:
            found["residuals"] = self._sum
            if self._common and x is self.x_t and not self._starts and None not in self._keys:
                key = ("residuals", id(x), id(embedding), *self._keys)
                # The embedding is kept, so that no other one takes its place in memory.
                found["residuals"] = lambda x, time, words: self.inputs.once(
                    (*key, time), lambda: (embedding, self._sum(x, time, words))
                )[1]
        kwargs = dict(self._kwargs)
        if self._added:
            kwargs["added_cond_kwargs"] = {**added_conditions(self.fx, x, embedding), **self._added}
        if kwargs:
            found["backbone_kwargs"] = kwargs
        return found

    def _sum(self, x: Tensor, time: float, embedding: PromptEmbedding | None) -> Mapping[str, Any]:
        total: dict[str, Any] = {}
        for residuals in self._residuals:
            for name, value in residuals(x, time, embedding).items():
                if name not in total:
                    total[name] = value
                elif isinstance(value, Tensor):
                    total[name] = total[name] + value
                else:
                    total[name] = tuple(a + b for a, b in zip(total[name], value, strict=True))
        return total

    def run(self, layers: Any = None) -> Features:
        """Features of one forward under everything merged."""
        names = self.fx.layers if layers is None else layers
        found = self.fx.run(
            self.x_t, self.time, self.prompt, layers=names, **self._arguments(self.x_t, self.prompt)
        )
        dtype = self.fx.dtype
        maps = {name: value.to(dtype) for name, value in found.items()}
        if layers is None and "vae-out" in self.fx.layers:
            maps["vae-out"] = self.inputs.latents.to(dtype)
        return Features(maps, found.infos)

    def predict(self, x: Tensor, t: int) -> Tensor:
        """The backbone's prediction at (x, t) under everything merged, guidance included."""
        output = self.fx.predict(x, t, self.prompt, **self._arguments(x, self.prompt)).float()
        if self.guidance != 1:
            empty = self._embed("")
            free = self.fx.predict(x, t, empty, **self._arguments(x, empty)).float()
            output = free + self.guidance * (output - free)
        return output

    def run_and_estimate(self, layers: Any) -> tuple[Features, Tensor]:
        """What `run` and `clean_estimate` give, from one forward where one is enough."""
        if self.guidance != 1:  # the last forward is then that of the empty prompt
            return self.run(layers), self.clean_estimate()
        with capture(self.fx.backbone, layers, stop=False) as cap:
            clean = self.clean_estimate()
        dtype = self.fx.dtype
        maps = {name: value.to(dtype) for name, value in cap.features.items()}
        return Features(maps, cap.features.infos), clean

    def clean_estimate(self) -> Tensor:
        """The clean latents that one prediction at x_t implies."""
        return self.fx.schedule.predict_clean(
            self.x_t.float(), self.predict(self.x_t, self.time), self.time
        )


def added_conditions(
    fx: FeatureExtractor, x: Tensor, embedding: PromptEmbedding | None
) -> dict[str, Tensor]:
    """SDXL's pooled text and time ids (size, crop corner, target size); nothing for other models.

    Raises:
        InputError: If the pooled text is missing.
    """
    config: Any = fx.backbone.config
    if getattr(config, "addition_embed_type", None) != "text_time":
        return {}
    if embedding is None or embedding.pooled is None:
        raise InputError("SDXL's ControlNets and adapters need the pooled text embedding as well")
    embedding = embedding.to(x.device, x.dtype).expand(len(x))
    height, width = (side * fx.vae_factor for side in x.shape[-2:])
    ids = (height, width, 0, 0, *((6.0,) if fx.aesthetic else (height, width)))
    assert embedding.pooled is not None
    return {
        "text_embeds": embedding.pooled,
        "time_ids": torch.tensor([ids], dtype=x.dtype, device=x.device).expand(len(x), -1),
    }


class Technique:
    """Something that steers generation, used to keep features at the input image.

    A technique of your own defines `condition`, and `setup` and `teardown` if it changes the model;
    ``+`` composes.

    Attributes:
        exclusive: Whether it changes the backbone for everyone while it is set up.
        controls: Whether it acts on skip connections only, out of reach of down and mid stage.
    """

    exclusive: ClassVar[bool] = False
    controls: ClassVar[bool] = False

    def setup(self, fx: FeatureExtractor, opened: Session) -> None:
        """Check the backbone and load what is needed."""

    def condition(self, ctx: Context) -> Patch:
        """What changes for this batch."""
        raise NotImplementedError

    def teardown(self, fx: FeatureExtractor) -> None:
        """Take off what `setup` changed, beyond modules, processors, flags and adapters.

        Those are put back by the recipe.
        """

    def __add__(self, other: Union["Technique", "Recipe"]) -> "Recipe":
        return Recipe(self) + other

    def __call__(self, fx: FeatureExtractor, images: Any = None, **options: Any) -> Features:
        """See `Recipe.__call__`."""
        return Recipe(self)(fx, images, **options)

    def to_dict(self) -> dict[str, Any]:
        """Its class and arguments as plain data.

        Raises:
            InputError: If an argument is no plain data, such as a module or a tensor.
        """
        found: dict[str, Any] = {"technique": type(self).__name__}
        for one in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, one.name)
            if one.init and value != one.default:
                if not _plain(value):
                    raise InputError(
                        f"{type(self).__name__}({one.name}=...) holds a {type(value).__name__}, "
                        "which cannot be written to a recipe; give a path, a hub id or text"
                    )
                found[one.name] = list(value) if isinstance(value, tuple) else value
        return found


def _plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _plain(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, str | int | float | bool)


class Recipe:
    """Techniques in order; without any it is the extractor alone.

    Where two techniques set the same thing (the prompt), the later one counts; ControlNets and
    adapters add up; walks of the latent (`PreDenoise`) come last, under everything else.

    Args:
        techniques: Techniques or recipes.

    Examples:
        >>> from content_shift.techniques import CFG, Prompt
        >>> len(Prompt("a horse") + CFG(1.0))
        2
        >>> from diffeat.demo import build_extractor
        >>> fx = build_extractor()
        >>> Prompt("a picture of circle")(fx, torch.rand(1, 3, 32, 32), t=50)
        Features(up-level1-repeat1-vit-out: [1, 48, 8, 8])
    """

    def __init__(self, *techniques: Union[Technique, "Recipe"]) -> None:
        parts: list[Technique] = []
        for item in techniques:
            if isinstance(item, Recipe):
                parts.extend(item.techniques)
            elif isinstance(item, Technique):
                parts.append(item)
            else:
                raise InputError(f"{type(item).__name__} is no technique; see cs.techniques")
        self.techniques: tuple[Technique, ...] = tuple(parts)

    def __add__(self, other: Union[Technique, "Recipe"]) -> "Recipe":
        return Recipe(self, other)

    def __len__(self) -> int:
        return len(self.techniques)

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.techniques)) or "Recipe()"

    def to_dict(self) -> list[dict[str, Any]]:
        """Its techniques as plain data; `content_shift.load_recipe` reads it back."""
        return [technique.to_dict() for technique in self.techniques]

    def applied(self, fx: FeatureExtractor) -> AbstractContextManager[Session]:
        """Set the techniques up on an extractor; they are taken off when the block ends."""
        return session(fx, self.techniques)

    def conditioned(
        self, fx: FeatureExtractor, opened: Session, inputs: Inputs, *, t: int = 50,
        prompt: Any = None, noise: Any = "seeded", seed: int = 0, draw: int = 0,
        walk: bool = True,
    ) -> Context:  # fmt: skip
        """A batch with everything merged, inside `applied`; without `walk` it stays at x_t."""
        fx.schedule.check(t)
        ctx = Context(fx, inputs, t, prompt, noise, seed, draw)
        for technique in self.techniques:
            ctx.merge(technique.condition(ctx))
        ctx.finish(opened, walk=walk)
        return ctx

    def features(
        self, fx: FeatureExtractor, opened: Session, inputs: Inputs, *, layers: Any = None,
        draw: int = 0, **options: Any,
    ) -> Features:  # fmt: skip
        """Features inside `applied`; options are those of `conditioned`."""
        self._warn(fx, layers)
        ctx = self.conditioned(fx, opened, inputs, draw=draw, **options)
        if ctx.ensemble == 1:
            return ctx.run(layers)
        sums: dict[str, Tensor] = {}
        infos: Any = {}
        # Draws of different calls never meet: call k uses k n to k n + n - 1.
        for number in range(draw * ctx.ensemble, (draw + 1) * ctx.ensemble):
            found = self.conditioned(fx, opened, inputs, draw=number, **options).run(layers)
            infos = found.infos
            for name, value in found.items():
                sums[name] = sums[name] + value.float() if name in sums else value.float()
        return Features({n: (v / ctx.ensemble).to(fx.dtype) for n, v in sums.items()}, infos)

    def features_and_estimate(
        self, fx: FeatureExtractor, opened: Session, inputs: Inputs, *, layers: Any,
        **options: Any,
    ) -> tuple[Features, Tensor]:  # fmt: skip
        """`features`, and the clean latents of `Context.clean_estimate`, in one forward."""
        self._warn(fx, layers)
        ctx = self.conditioned(fx, opened, inputs, **options)
        if ctx.ensemble == 1:
            return ctx.run_and_estimate(layers)
        return self.features(fx, opened, inputs, layers=layers, **options), ctx.clean_estimate()

    def _warn(self, fx: FeatureExtractor, layers: Any) -> None:
        if not any(t.controls for t in self.techniques):
            return
        names = [
            name
            for name in (fx.layers if layers is None else layers)
            if name not in ("attn", "vae-out") and not name.startswith("module:")
        ]
        if not names:
            return
        infos = find_activations(fx.backbone, names)
        out_of_reach = [info.name for info in infos if info.stage in ("down", "mid")]
        if out_of_reach:
            warnings.warn(
                "control acts on skip connections and after the mid block, so it does not change "
                f"{', '.join(out_of_reach)}",
                stacklevel=4,
            )

    def __call__(
        self,
        fx: FeatureExtractor,
        images: Any = None,
        t: int = 50,
        *,
        prompt: Any = None,
        noise: Any = "seeded",
        seed: int = 0,
        draw: int = 0,
        ids: Sequence[str | int] | None = None,
        layers: Any = None,
        inputs: Optional["Inputs"] = None,
    ) -> Features:
        """Features of images under the recipe, from the same noise as ``fx(images, prompt, t)``.

        Args:
            fx: The extractor; it is left as it was.
            images: PIL images or tensors, see `diffeat.FeatureExtractor.pixels`.
            t: Timestep.
            prompt: Where the recipe sets none.
            noise: ``seeded``, ``shared``, ``none`` or a tensor.
            seed: Of the noise.
            draw: Number of the noise draw.
            ids: Names of the samples, which decide their noise.
            layers: Other layers than the extractor's, names only.
            inputs: From `Inputs.prepare`, in place of images.

        Raises:
            InputError: If anything does not fit.
            UnsupportedTechnique: If a technique cannot act on this backbone.
            IncompatibleControl: If a ControlNet was made for another backbone.
        """
        if (images is None) == (inputs is None):
            raise InputError("give either images or inputs")
        batch = inputs or Inputs.prepare(fx, images, ids=ids, seed=seed)
        with self.applied(fx) as opened:
            return self.features(
                fx, opened, batch, t=t, prompt=prompt, noise=noise, seed=seed, draw=draw,
                layers=layers,
            )  # fmt: skip

"""The techniques, and recipes in files.

``Prompt``, ``Captions``, ``ControlNet`` and ``LoRA`` are the paper's three (prompts by hand or by a
captioner); ``CFG`` and ``IPAdapter`` its negative and weak results; ``PreDenoise`` its walk from an
earlier timestep; ``NoiseEnsemble`` is DIFT's, ``Inversion`` DDIM's, ``CleanBackbone`` CleanDIFT's.
"""

import json
import os
from collections.abc import Callable as Function
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from content_shift.adapters import CleanBackbone, IPAdapter, LoRA
from content_shift.control import ControlNet
from content_shift.recipe import Context, Patch, Recipe, Technique
from shared_core.errors import InputError

__all__ = [
    "CFG",
    "Callable",
    "Captions",
    "CleanBackbone",
    "ControlNet",
    "IPAdapter",
    "Inversion",
    "LoRA",
    "NoiseEnsemble",
    "PreDenoise",
    "Prompt",
    "load_recipe",
    "read_file",
]


@dataclass(eq=False)
class Prompt(Technique):
    """One prompt for all images: detailed, and true to them (paper A.1).

    Args:
        text: The prompt.

    Examples:
        >>> Prompt("a horse, high quality").to_dict()
        {'technique': 'Prompt', 'text': 'a horse, high quality'}
    """

    text: str

    def condition(self, ctx: Context) -> Patch:
        """The prompt."""
        return Patch(prompt=self.text)


@dataclass(eq=False)
class Captions(Technique):
    """A prompt of its own for each image.

    For attention features use one prompt for all: their channels are its tokens. On labelled data
    a caption that names the classes tells the probe the answer; see the README.

    Args:
        captions: A list, one an image; a mapping from sample ids; or a function from pixels
            ``[B, 3, H, W]`` in [0, 1] to a list, such as `content_shift.caption.Captioner`.
    """

    captions: Any

    def condition(self, ctx: Context) -> Patch:
        """The captions of this batch."""
        inputs = ctx.inputs
        if isinstance(self.captions, Mapping):
            missing = [i for i in inputs.ids if i not in self.captions]
            if missing:
                raise InputError(f"there is no caption for {missing[0]!r} ({len(missing)} missing)")
            return Patch(prompt=[self.captions[i] for i in inputs.ids])
        if callable(self.captions):
            make = self.captions
            found = inputs.once(("captions", id(make)), lambda: list(make(inputs.pixels)))
            if len(found) != len(inputs.pixels):
                raise InputError(f"{len(found)} captions for {len(inputs.pixels)} images")
            return Patch(prompt=found)
        return Patch(prompt=inputs.pick(self.captions, "captions"))


@dataclass(eq=False)
class CFG(Technique):
    """Classifier-free guidance: what the paper tried without success.

    It acts on predictions, which `PreDenoise`, `reconstruction_gain` and `img2img` use. A feature
    of a single forward comes from the conditional pass and does not change.

    Args:
        scale: Guidance; 1 changes nothing.
    """

    scale: float

    def condition(self, ctx: Context) -> Patch:
        """The scale."""
        return Patch(guidance=self.scale)


@dataclass(eq=False)
class PreDenoise(Technique):
    """Begin at an earlier timestep and walk to t, so that attention gets sharper (paper 4.2).

    DDIM steps of 1 on the 1000-step grid. Meant for use with control; up to 10 steps.

    Args:
        from_t: Where the walk begins.
    """

    from_t: int = 60

    def condition(self, ctx: Context) -> Patch:
        """The walk, under everything else that the recipe does."""
        if self.from_t < ctx.t:
            raise InputError(f"PreDenoise begins at {self.from_t}, after t={ctx.t}")
        ctx.fx.schedule.check(self.from_t)
        if ctx.fx.schedule.flow:
            raise InputError("PreDenoise is defined for variance-preserving models")
        return Patch(x_t=self._walk)

    def _walk(self, ctx: Context) -> Tensor:
        schedule = ctx.fx.schedule
        x = ctx.inputs.latents
        if ctx.noise is not None:
            x = schedule.add_noise(x, ctx.noise, self.from_t)
        for now in range(self.from_t, ctx.t, -1):
            clean = schedule.predict_clean(x, ctx.predict(x, now), now)
            signal, scale = schedule.signal_and_noise(now)
            x = schedule.add_noise(clean, (x - signal * clean) / scale, now - 1)
        return x


@dataclass(eq=False)
class NoiseEnsemble(Technique):
    """Features averaged over n draws of noise (DIFT uses 8), at n times the cost.

    Args:
        n: Draws; 1 changes nothing.
    """

    n: int = 8

    def __post_init__(self) -> None:
        if self.n < 1:
            raise InputError(f"NoiseEnsemble({self.n}); accepted: 1 and more")

    def condition(self, ctx: Context) -> Patch:
        """The number of draws."""
        return Patch(ensemble=self.n)


@dataclass(eq=False)
class Inversion(Technique):
    """The model's own noise for the image (DDIM inversion) in place of a drawn one.

    The inversion sees the prompt and the adapters, not the control.

    Args:
        steps: Of the inversion.
    """

    steps: int = 100

    def condition(self, ctx: Context) -> Patch:
        """The inverted latents."""
        return Patch(x_t=lambda c: c.fx.invert(c.inputs.latents, c.t, c.prompt, steps=self.steps))


@dataclass(eq=False)
class Callable(Technique):
    """A technique of your own as a function from the `Context` to a `Patch`.

    Args:
        function: The function.

    Examples:
        >>> Callable(lambda ctx: Patch(prompt="a horse")).function(None).prompt
        'a horse'
    """

    function: Function[[Context], Patch]

    def condition(self, ctx: Context) -> Patch:
        """What the function says."""
        return self.function(ctx)


_CLASSES: dict[str, type[Technique]] = {
    c.__name__: c
    for c in (
        *(CFG, Captions, CleanBackbone, ControlNet, IPAdapter, Inversion, LoRA, NoiseEnsemble),
        *(PreDenoise, Prompt),
    )
}


def load_recipe(source: Sequence[Mapping[str, Any]] | str | os.PathLike[str]) -> Recipe:
    """A recipe from what `Recipe.to_dict` gave, or from a YAML or JSON file of it.

    Raises:
        InputError: If a technique or an argument is unknown, or the file cannot be read.

    Examples:
        >>> load_recipe([{"technique": "Prompt", "text": "a horse"}])
        Prompt(text='a horse')
    """
    content = read_file(source) if isinstance(source, str | os.PathLike) else source
    parts: list[Technique] = []
    if not isinstance(content, Sequence) or isinstance(content, str):
        raise InputError("a recipe is a list of techniques, such as [{technique: Prompt, text: …}]")
    for entry in content:
        given = dict(entry) if isinstance(entry, Mapping) else {}
        name = given.pop("technique", None)
        if name not in _CLASSES:
            raise InputError(f"technique {name!r}; accepted: {', '.join(_CLASSES)}")
        try:
            parts.append(_CLASSES[name](**given))
        except TypeError as error:
            reason = str(error).split("() ")[-1]
            raise InputError(f"technique {name}: {reason}") from error
    return Recipe(*parts)


def read_file(source: str | os.PathLike[str]) -> Any:
    """The content of a YAML or JSON file.

    Raises:
        InputError: If it cannot be read.
    """
    import yaml

    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"the recipe {path} cannot be read: {reason}") from error

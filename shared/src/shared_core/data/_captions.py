"""Sentences about the objects of the shapes world, true to their attributes."""

from typing import Literal

import numpy as np
from jaxtyping import Int

from shared_core.data._attributes import BACKGROUNDS, COLORS, FILLS, SHAPES
from shared_core.data._draws import uniforms
from shared_core.errors import InputError

__all__ = ["Style", "captions"]

Style = Literal["clip", "full", "simple"]

# What a web-like caption names, and how often.
_CORES = (
    ("{color} {shape}", 0.30),
    ("{fill} {color} {shape}", 0.15),
    ("{shape}", 0.15),
    ("{fill} {shape}", 0.08),
    ("this is a {color} photo", 0.08),
    ("this is a {fill} photo", 0.06),
    ("this is a {background} photo", 0.06),
    ("{color} {shape} on a {background} background", 0.053),
    ("{fill} {color} {shape} on a {background} background", 0.027),
    ("{shape} on a {background} background", 0.026),
    ("{fill} {shape} on a {background} background", 0.014),
)
_CORES_WITHOUT_OBJECT = (
    ("{background} background", 0.8),
    ("this is a {background} photo", 0.2),
)
_TEMPLATES = (
    "a photo of a {}",
    "the nice {}",
    "a picture of the {}",
    "a good photo of the {}",
    "{}",
)


def captions(attributes: Int[np.ndarray, "n 4"], seed: int, style: Style) -> list[str]:
    """One caption per row of attributes; see `shared_core.data.shapes.ShapesWorld.captions`."""
    if style not in ("clip", "full", "simple"):
        raise InputError(f"style {style!r} is not known; accepted: clip, full, simple")
    draws = uniforms(seed, "caption", np.arange(len(attributes)), 2)
    return [
        _caption(row, core, template, style)
        for row, (core, template) in zip(attributes.tolist(), draws.tolist(), strict=True)
    ]


def _caption(attributes: list[int], core: float, template: float, style: Style) -> str:
    shape, color, fill, background = attributes
    words = {"background": BACKGROUNDS[background]}
    if shape >= 0:
        words |= {"shape": SHAPES[shape], "color": COLORS[color], "fill": FILLS[fill]}
    if style == "simple":
        return ("{color} {shape}" if shape >= 0 else "{background} background").format(**words)
    if style == "full":
        sentence = "a photo of a {fill} {color} {shape} on a {background} background"
        if shape < 0:
            sentence = "a photo of a {background} background"
        return sentence.format(**words)
    phrase = _draw(_CORES if shape >= 0 else _CORES_WITHOUT_OBJECT, core).format(**words)
    if phrase.startswith("this is"):  # a sentence of its own
        return phrase
    return _TEMPLATES[int(template * len(_TEMPLATES))].format(phrase)


def _draw(choices: tuple[tuple[str, float], ...], uniform: float) -> str:
    for phrase, share in choices:
        uniform -= share
        if uniform < 0:
            return phrase
    return choices[-1][0]

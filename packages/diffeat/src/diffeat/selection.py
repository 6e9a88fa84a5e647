"""Which activations to capture: names, patterns, presets, published layer lists."""

import fnmatch
import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Union

from torch import nn

from diffeat.errors import ActivationNotFound
from diffeat.naming import ActivationInfo, activations_by_name, find_activation, unwrap
from shared_core.errors import InputError

__all__ = ["ATTENTION", "VAE", "Layers", "Selection"]

ATTENTION = "attn"  # the cross-attention maps of the up stage, joined into one feature
VAE = "vae-out"  # the clean latent, which no backbone module gives

Layers = Union[str, os.PathLike[str], Sequence[str], Mapping[str, bool], "Selection"]


@dataclass(frozen=True)
class Selection:
    """Names and patterns of activations, not yet tied to a model.

    Attributes:
        items: Names, globs (``up-*-res-out``), regular expressions (``re:up-level[01].*-out``) or
            ``module:`` addresses.

    Raises:
        InputError: If there is none.

    Examples:
        >>> Selection.parse("sd15-legacy").items[0]
        'up-level0-upsampler-out'
    """

    items: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.items:
            raise InputError("the selection is empty; name at least one activation or a preset")
        unique = tuple(dict.fromkeys(self.items))
        if unique != self.items:
            twice = sorted({item for item in self.items if self.items.count(item) > 1})
            warnings.warn(f"named more than once: {', '.join(twice)}", stacklevel=3)
            object.__setattr__(self, "items", unique)

    @classmethod
    def parse(cls, layers: Layers) -> "Selection":
        """Read a preset's name, names by commas, a list, a published dict, or a JSON file of one.

        Raises:
            InputError: If it is empty, or a file that is no layer list.

        Examples:
            >>> Selection.parse({"unet-in": True, "unet-out": False}).items
            ('unet-in',)
        """
        from diffeat.presets import PRESETS

        if isinstance(layers, Selection):
            return layers
        if isinstance(layers, os.PathLike) or (
            isinstance(layers, str) and layers.endswith(".json")
        ):
            return cls.parse(_read(Path(layers)))
        if isinstance(layers, str):
            if layers in PRESETS:
                return cls(PRESETS[layers].layers)
            return cls(tuple(part.strip() for part in layers.split(",") if part.strip()))
        if isinstance(layers, Mapping):
            return cls(tuple(name for name, wanted in layers.items() if wanted))
        return cls(tuple(layers))

    def resolve(
        self, model: nn.Module, known: Mapping[str, ActivationInfo] | None = None
    ) -> tuple[str, ...]:
        """The names that this selects in a model, in order of execution.

        ``attn`` and ``vae-out`` come last; ``module:`` addresses in the order of `items` before
        them. Patterns never match the additional names (see `list_activations`) nor maps, unless
        they end in ``-map``.

        Args:
            model: A backbone.
            known: What `diffeat.naming.activations_by_name` gave, if it is at hand.

        Raises:
            ActivationNotFound: If a name or pattern matches nothing.

        Examples:
            >>> from diffeat.presets import build_topology
            >>> Selection(("unet-out", "up-level3-*-vit-out")).resolve(build_topology("sd15"))[-1]
            'unet-out'
        """
        model = unwrap(model)
        if all(item.startswith("module:") for item in self.items):
            return tuple(find_activation(model, item).name for item in self.items)
        everything = list((activations_by_name(model) if known is None else known).values())
        order = {info.name: info.order for info in everything}
        patterns = [i.name for i in everything if not i.extra and i.source != "map"]
        maps = [i.name for i in everything if i.source == "map"]
        chosen: dict[str, None] = {}
        addresses, last = [], []
        for item in self.items:
            if item in (ATTENTION, VAE):
                last.append(item)
            elif item.startswith("module:"):
                addresses.append(find_activation(model, item).name)
            elif item in order:
                chosen[item] = None
            else:
                pool = maps if item.endswith("-map") else patterns
                matched = _match(item, pool)
                if not matched:
                    raise ActivationNotFound(item, [*order, ATTENTION, VAE])
                chosen.update(dict.fromkeys(matched))
        return (*sorted(chosen, key=order.__getitem__), *addresses, *last)


def _match(item: str, names: Iterable[str]) -> list[str]:
    if item.startswith("re:"):
        try:
            pattern = re.compile(item[3:])
        except re.error as error:
            raise InputError(f"{item} is not a regular expression: {error}") from error
        return [name for name in names if pattern.fullmatch(name)]
    return fnmatch.filter(names, item)


def _read(path: Path) -> list[str] | dict[str, bool]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"the layer list {path} cannot be read: {error}") from error
    if isinstance(content, dict) and all(isinstance(v, bool) for v in content.values()):
        return content
    if isinstance(content, list) and all(isinstance(v, str) for v in content):
        return content
    raise InputError(f"{path} is no layer list: a JSON object name -> true, or a list of names")

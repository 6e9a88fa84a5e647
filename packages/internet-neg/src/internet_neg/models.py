"""Finding a model by what a person types."""

import os
from pathlib import Path

import torch

from internet_neg.encoders import HFClipEncoder, OpenClipEncoder
from internet_neg.errors import InterNegError
from internet_neg.mini_clip import FILE, load_mini_clip
from internet_neg.presets import MODELS

__all__ = ["load_encoder"]


def load_encoder(
    model: str | os.PathLike[str],
    pretrained: str | None = None,
    *,
    library: str | None = None,
    device: torch.device | None = None,
) -> OpenClipEncoder | HFClipEncoder:
    """An encoder by name.

    Args:
        model: A key of `internet_neg.presets.MODELS`, a folder with a mini-CLIP, an architecture of
            open_clip, open_clip's ``hf-hub:ID`` or ``local-dir:PATH``, or a hub id or folder of
            transformers.
        pretrained: Weights for open_clip: a tag or a file.
        library: ``open_clip``, ``hf`` or ``mini``, if it is known; otherwise a folder with a
            mini-CLIP is one, weights or such a prefix mean open_clip, and a slash transformers.
        device: Where to; by default the CPU.

    Raises:
        InterNegError: If it cannot be loaded.

    Examples:
        >>> load_encoder("ViT-B-16")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        internet_neg.errors.InterNegError: which weights for ViT-B-16? give --pretrained ...
    """
    name = os.fspath(model)
    if library is None and pretrained is None and name in MODELS:
        preset = MODELS[name]
        name, pretrained, library = preset.model, preset.pretrained, preset.library
    whole = name.startswith(("hf-hub:", "local-dir:"))  # the architecture with its weights
    if library is None:
        if (Path(name) / FILE).is_file():
            library = "mini"
        elif pretrained is None and not whole and ("/" in name or Path(name).is_dir()):
            library = "hf"
        else:
            library = "open_clip"
    if library == "mini":
        return load_mini_clip(name, device)
    if library == "hf":
        return HFClipEncoder.from_pretrained(name, device=device)
    if library != "open_clip":
        raise InterNegError(f"library {library!r}; accepted: open_clip, hf, mini")
    if pretrained is None and not whole:
        raise InterNegError(
            f"which weights for {name}? give --pretrained (such as openai), or a model of: "
            f"{', '.join(MODELS)}"
        )
    return OpenClipEncoder.from_pretrained(name, pretrained, device=device)

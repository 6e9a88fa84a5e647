"""A mini-CLIP: an open_clip model of half a million weights, trained on the procedural world.

It stands in for CLIP where nothing may be downloaded, and goes the same way through every other
part of this package as a large model does.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from internet_neg.encoders import OpenClipEncoder
from internet_neg.errors import InterNegError
from shared_core.contrastive import WordTokenizer, captioned_shapes, train_contrastive
from shared_core.data.shapes import BACKGROUNDS, COLORS, FILLS, SHAPES
from shared_core.run import load_state, save_state

__all__ = ["build_mini_clip", "load_mini_clip", "pixels_of", "save_mini_clip", "train_mini_clip"]

FILE = "mini_clip.safetensors"
CONTEXT = 16
WORDS = (
    *(*SHAPES, *COLORS, *FILLS, *BACKGROUNDS),
    *["a", "photo", "of", "the", "nice", "picture", "good", "this", "is", "on", "background"],
)


def _config(vocab_size: int) -> dict[str, Any]:
    return {
        "embed_dim": 64,
        "vision_cfg": {
            "image_size": 32,
            "patch_size": 32,
            "width": 32,
            "layers": 1,
            "head_width": 32,
        },
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": vocab_size,
            "width": 64,
            "heads": 4,
            "layers": 2,
        },
    }


def _image_tower(dim: int) -> nn.Module:
    """Six convolutions. On images this small they learn several times faster than a ViT does."""
    layers: list[nn.Module] = []
    before = 3
    for width in (32, 64, 128):
        for stride in (2, 1):
            layers += [
                nn.Conv2d(before, width, 3, stride, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
            before = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4 * 4, dim))


def pixels_of(image: Any) -> Tensor:
    """A PIL image as the mini-CLIP takes it: 32 pixels a side, channels first, from 0 to 1."""
    array = np.asarray(image.convert("RGB").resize((32, 32)), dtype=np.float32)
    return torch.from_numpy(array.transpose(2, 0, 1) / 255)


def build_mini_clip(words: tuple[str, ...] = WORDS, *, seed: int = 0) -> OpenClipEncoder:
    """An untrained mini-CLIP.

    Args:
        words: Its whole vocabulary; other words are unknown to it.
        seed: Of the weights.

    Examples:
        >>> encoder = build_mini_clip()
        >>> encoder.placeholder[0], encoder.dim
        ('$', 64)
    """
    from open_clip.model import CLIP

    tokenizer = WordTokenizer(sorted(set(words)), context_length=CONTEXT)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIP(**_config(tokenizer.vocab_size))
        model.visual = _image_tower(64)
    model.to(memory_format=torch.channels_last)
    encoder = OpenClipEncoder(model, tokenizer, pixels_of)
    encoder.words = tokenizer.words  # type: ignore[attr-defined]
    return encoder


def train_mini_clip(
    *, steps: int = 400, images: int = 20_000, seed: int = 0, device: torch.device | None = None
) -> tuple[OpenClipEncoder, list[dict[str, Any]]]:
    """Train a mini-CLIP on captioned shapes, as CLIP was on the web: all attributes are named.

    Args:
        steps: Training steps of 256 images.
        images: Images in all.
        seed: Of weights, images, captions and order.
        device: Where to train.

    Returns:
        The encoder and the history of the loss.

    Examples:
        >>> encoder, history = train_mini_clip(steps=1, images=300)
        >>> history[0]["loss"] > 0
        True
    """
    encoder = build_mini_clip(seed=seed)
    pixels, captions = captioned_shapes(images, seed=seed)
    trained = train_contrastive(
        encoder.model,
        pixels,
        captions,
        tokenizer=encoder.tokenize,
        steps=steps,
        seed=seed,
        device=device,
    )
    return encoder, trained.history


def save_mini_clip(folder: str | os.PathLike[str], encoder: OpenClipEncoder) -> None:
    """Write a mini-CLIP into a folder, as one safetensors file."""
    state = {"words": encoder.words, "weights": dict(encoder.model.state_dict())}  # type: ignore[attr-defined]
    save_state(Path(folder) / FILE, state)


def load_mini_clip(
    folder: str | os.PathLike[str], device: torch.device | None = None
) -> OpenClipEncoder:
    """Load what `save_mini_clip` wrote.

    Raises:
        InterNegError: If it is not there or damaged.

    Examples:
        >>> folder = getfixture("tmp_path")
        >>> save_mini_clip(folder, build_mini_clip(seed=3))
        >>> load_mini_clip(folder).fingerprint() == build_mini_clip(seed=3).fingerprint()
        True
    """
    state = load_state(Path(folder) / FILE)
    encoder = build_mini_clip(tuple(state["words"]))
    try:
        encoder.model.load_state_dict(state["weights"])
    except RuntimeError as error:
        raise InterNegError(f"{folder} holds a mini-CLIP of another shape") from error
    encoder.model.to(device or "cpu")
    encoder.source = {"library": "mini", "model": str(Path(folder).resolve()), "pretrained": None}
    return encoder

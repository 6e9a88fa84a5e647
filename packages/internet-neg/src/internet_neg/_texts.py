"""Text features, computed once for a model and its prompts and then kept on disk."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from internet_neg.encoders import DualEncoder
from shared_core.errors import InputError
from shared_core.run import load_state, save_state

__all__ = ["cached_text_features"]


def cached_text_features(
    encoder: DualEncoder, prompts: Sequence[str], folder: Path | None
) -> Tensor:
    """Features [n, D] of prompts, read from `folder` if they are there, else written to it."""
    if folder is None:
        return encoder.encode_text(prompts)
    digest = hashlib.sha256(encoder.fingerprint().encode())
    for prompt in prompts:
        digest.update(b"\0" + prompt.encode())
    path = folder / f"texts-{digest.hexdigest()[:32]}.safetensors"
    if path.is_file():
        try:
            features: Tensor = load_state(path)
            return features.to(encoder.device)
        except InputError:
            path.unlink()  # a damaged cache is made anew
    features = encoder.encode_text(prompts)
    save_state(path, features)
    return features

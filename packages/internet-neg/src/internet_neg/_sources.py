"""What `InterNegDetector` is fitted from: vocabulary and proxies behind what a user may give."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from internet_neg.config import InterNegConfig
from internet_neg.encoders import DualEncoder
from internet_neg.errors import InterNegError
from internet_neg.proxies import ProxyBuilder, embed_images, stream_proxies
from internet_neg.transforms import load_transform
from internet_neg.vocabulary import Vocabulary

__all__ = ["resolve_proxies", "resolve_vocabulary"]


def resolve_vocabulary(given: str | Vocabulary | Iterable[str]) -> Vocabulary:
    """The vocabulary that ``wordnet``, a `Vocabulary` or words stand for."""
    if isinstance(given, Vocabulary):
        return given
    if not isinstance(given, str):
        return Vocabulary(tuple(given))
    if given != "wordnet":
        raise InterNegError(
            f"vocabulary {given!r}; accepted: wordnet, a Vocabulary (from_file reads one), or words"
        )
    return Vocabulary.wordnet()


def resolve_proxies(
    encoder: DualEncoder,
    classnames: Sequence[str],
    config: InterNegConfig,
    source: Any,
    T: Tensor,
    unlabelled: Any,
    sync: bool,
) -> Tensor:
    """Proxies [K, D] from what `InterNegDetector.fit` takes; T are the class texts."""
    if isinstance(source, Tensor):
        return source
    if isinstance(source, str) and source == "text":
        warnings.warn(
            "no images of the known classes: their texts stand in as proxies, which makes the "
            "choice of negatives intra-modal",
            stacklevel=4,
        )
        return T
    if isinstance(source, str) and source == "stream":
        if unlabelled is None:
            raise InterNegError("source='stream' needs unlabelled images")
        warnings.warn(
            "no labelled images: confident images of the stream stand in as proxies",
            stacklevel=4,
        )
        is_embedded = isinstance(unlabelled, Tensor) and unlabelled.ndim == 2
        transform = load_transform(config.transform, encoder)
        v = unlabelled
        if not is_embedded:
            v = embed_images(encoder, unlabelled, transform=transform)
        return stream_proxies(v, T, encoder.scale)
    builder = ProxyBuilder(
        encoder,
        classnames,
        shots=config.shots,
        transform=config.transform,
        seed=config.seed,
        sync=sync,
    )
    return builder.build(source)

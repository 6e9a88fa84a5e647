"""Contrastive training of a small image-text model, CLIP's way, in one call.

It takes any model with CLIP's interface and trains it on images with captions: the procedural
world (`captioned_shapes`) or your own. It is for models small enough to be made on the spot, in
demos and tests; pretraining a large one is another library's work. Radford et al. (ICML 2021).
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from shared_core.device import autocast
from shared_core.errors import InputError
from shared_core.run import progress

__all__ = [
    "ImageTextModel",
    "TrainedContrastive",
    "WordTokenizer",
    "captioned_shapes",
    "contrastive_loss",
    "train_contrastive",
]


class ImageTextModel(Protocol):
    """What a model has to offer: CLIP's two encoders and its logarithmic scale.

    Attributes:
        logit_scale: The parameter whose exponential multiplies the cosines.
    """

    logit_scale: nn.Parameter

    def encode_image(self, image: Tensor) -> Tensor:
        """Features [b, D] of images [b, C, H, W]; they need not be normalized."""

    def encode_text(self, text: Tensor) -> Tensor:
        """Features [b, D] of token ids [b, context]; they need not be normalized."""


class WordTokenizer:
    """Whole words as tokens: 0 pads, 1 starts, 2 is any unknown word, and the largest id ends.

    That the end has the largest id is what CLIP's text tower expects of the place it reads.
    Letters are lowered, punctuation is dropped; ``$`` is a word of its own, free to be a
    placeholder.

    Args:
        words: The vocabulary, each word once; ``$`` is added if absent.
        context_length: Length of every row. Longer texts lose their last words, never the end.

    Raises:
        InputError: If a word comes twice or is not one token, or the context is below 3.

    Examples:
        >>> tokenizer = WordTokenizer.from_texts(["a red star", "a blue bar"], context_length=6)
        >>> tokenizer.words
        ['$', 'a', 'bar', 'blue', 'red', 'star']
        >>> tokenizer(["A red star.", "a $ moon"]).tolist()
        [[1, 4, 7, 8, 9, 0], [1, 4, 3, 2, 9, 0]]
    """

    pad_id, sot_id, unknown_id = 0, 1, 2

    def __init__(self, words: Sequence[str], context_length: int = 16) -> None:
        self.words = list(words) if "$" in words else ["$", *words]
        for word in self.words:
            if _split(word) != [word]:
                raise InputError(f"{word!r} is not one lower-case word; split texts by from_texts")
        self._ids = {word: index for index, word in enumerate(self.words, start=3)}
        if len(self._ids) < len(self.words):
            raise InputError("a word of the vocabulary comes twice; give each word once")
        if context_length < 3:
            raise InputError(f"context_length={context_length}; it has to be 3 or more")
        self.context_length = context_length
        self.eot_id = len(self.words) + 3
        self.vocab_size = self.eot_id + 1

    @classmethod
    def from_texts(cls, texts: Sequence[str], context_length: int = 16) -> "WordTokenizer":
        """A tokenizer whose vocabulary is all words of some texts, in alphabetical order."""
        return cls(sorted({word for text in texts for word in _split(text)}), context_length)

    def __call__(self, texts: str | Sequence[str]) -> Int[Tensor, "n context"]:
        """Token ids of texts, padded to the context length."""
        texts = [texts] if isinstance(texts, str) else texts
        rows = torch.zeros(len(texts), self.context_length, dtype=torch.long)
        for row, text in zip(rows, texts, strict=True):
            words = _split(text)[: self.context_length - 2]
            ids = [self._ids.get(word, self.unknown_id) for word in words]
            row[: len(ids) + 2] = torch.tensor([self.sot_id, *ids, self.eot_id])
        return rows


def _split(text: str) -> list[str]:
    return re.findall(r"\w+|\$", text.lower())


def contrastive_loss(
    image_features: Float[Tensor, "b D"],
    text_features: Float[Tensor, "t D"],
    scale: Float[Tensor, ""],
    targets: Int[Tensor, " b"],
) -> Float[Tensor, ""]:
    """Symmetric contrastive loss in which a text may belong to several images.

    Images choose their text by cross entropy; texts choose among all images with the target spread
    evenly over their own. With one text per image it is CLIP's loss.

    Args:
        image_features: Features of the images; normalized here.
        text_features: Features of the *different* texts of the batch; normalized here.
        scale: Multiplies the cosines.
        targets: Which text belongs to each image. Every text has at least one image.

    Examples:
        >>> eye = torch.eye(3)
        >>> value = contrastive_loss(eye, eye, torch.tensor(1.0), torch.arange(3))
        >>> round(value.item(), 4)  # log(e + 2) - 1
        0.5514
    """
    images = F.normalize(image_features.float(), dim=-1)
    texts = F.normalize(text_features.float(), dim=-1)
    logits = scale.float() * images @ texts.T
    own = F.one_hot(targets, len(texts)).to(logits.dtype)
    spread = (own / own.sum(0)).T
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, spread)) / 2


@dataclass
class TrainedContrastive:
    """What `train_contrastive` returns.

    Attributes:
        model: The trained model, in evaluation mode.
        history: A record of some of the steps: ``step``, ``loss``, ``scale`` and ``lr``.
    """

    model: Any
    history: list[dict[str, float]] = field(default_factory=list)


def train_contrastive(
    model: Any,
    images: Any,
    captions: Sequence[str],
    *,
    tokenizer: Callable[[list[str]], Tensor],
    transform: Callable[[Any], Tensor] | None = None,
    steps: int = 400,
    batch_size: int = 256,
    lr: float = 2e-3,
    warmup: int = 20,
    weight_decay: float = 0.05,
    betas: tuple[float, float] = (0.9, 0.98),
    max_scale: int | float = 100.0,
    seed: int = 0,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> TrainedContrastive:
    """Train a CLIP-like model on images with captions, with AdamW and a cosine schedule.

    The global random state is restored at the end; the same seed, model and data give the same
    weights on the same machine.

    Args:
        model: An `ImageTextModel` and `torch.nn.Module`; trained in place.
        images: A tensor [n, C, H, W] ready for the model, or with `transform` any sequence of
            images; an item may be a pair whose first element is the image.
        captions: One caption per image. Equal captions in a batch are one text.
        tokenizer: Turns a list of captions into token ids.
        transform: Turns one image into a tensor [C, H, W] when it is needed.
        steps: Training steps.
        batch_size: Images per step, at most n.
        lr: Peak learning rate.
        warmup: Steps in which the learning rate rises linearly.
        weight_decay: Of matrices; vectors and scalars are not decayed.
        betas: Of AdamW.
        max_scale: The scale is not let above it.
        seed: Of the order of the images and of random layers.
        device: Where to train; by default the CPU.
        dtype: Of mixed precision; float32 is none.

    Raises:
        InputError: If lengths do not fit, there are fewer than two images, a number is out of
            range, or the loss is not finite any more.

    Examples:
        >>> class Towers(torch.nn.Module):
        ...     def __init__(self, words):
        ...         super().__init__()
        ...         self.image = torch.nn.Linear(3 * 16 * 16, 8)
        ...         self.text = torch.nn.EmbeddingBag(words, 8, padding_idx=0)
        ...         self.logit_scale = torch.nn.Parameter(torch.tensor(2.66))
        ...     def encode_image(self, image):
        ...         return self.image(image.flatten(1))
        ...     def encode_text(self, text):
        ...         return self.text(text)
        >>> images, captions = captioned_shapes(64, size=16)
        >>> tokenizer = WordTokenizer.from_texts(captions)
        >>> trained = train_contrastive(
        ...     Towers(tokenizer.vocab_size), images, captions, tokenizer=tokenizer, steps=20,
        ...     batch_size=32,
        ... )
        >>> trained.history[-1]["loss"] < trained.history[0]["loss"]
        True
    """
    _check_training(images, captions, transform, steps, batch_size, lr)
    device = device or torch.device("cpu")
    numbers: dict[str, int] = {}
    caption_ids = torch.tensor([numbers.setdefault(c, len(numbers)) for c in captions])
    tokens = tokenizer(list(numbers))
    model.to(device).train()
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _warmup_cosine(step, steps, warmup)
    )
    order = torch.Generator().manual_seed(seed)
    batches = _batches(len(captions), min(batch_size, len(captions)), order)
    result = TrainedContrastive(model)
    every = max(1, steps // 50)
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        for step in progress(range(steps), description="contrastive training", unit="step"):
            chosen = next(batches)
            texts, targets = torch.unique(caption_ids[chosen], return_inverse=True)
            pixels = _pixels(images, chosen, transform).to(device)
            with autocast(device, dtype):
                image_features = model.encode_image(pixels)
                text_features = model.encode_text(tokens[texts].to(device))
            scale = model.logit_scale.exp().reshape(())
            loss = contrastive_loss(image_features, text_features, scale, targets.to(device))
            if step % every == 0 or step == steps - 1:
                # Read only here: reading the loss waits for the device.
                record = {"loss": loss.item(), "scale": scale.item()}
                if not math.isfinite(record["loss"]):
                    raise InputError(
                        f"the contrastive loss is {record['loss']} at step {step}; "
                        f"lower the learning rate (lr={lr}) or look for bad images"
                    )
                rate = optimizer.param_groups[0]["lr"]
                result.history.append({"step": step, **record, "lr": rate})
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(max=math.log(max_scale))
    model.eval()
    return result


def captioned_shapes(
    n: int, *, seed: int = 0, size: int = 32
) -> tuple[Float[Tensor, "n 3 {size} {size}"], list[str]]:
    """Images of the procedural world with web-like captions about all attributes.

    Args:
        n: How many.
        seed: Of the world and of the captions.
        size: Pixels per side.

    Returns:
        Pixels from 0 to 1 and one caption each.

    Examples:
        >>> images, captions = captioned_shapes(2)
        >>> images.shape, len(captions)
        (torch.Size([2, 3, 32, 32]), 2)
    """
    from shared_core.data.shapes import ShapesWorld, image_tensor

    world = ShapesWorld(seed, size)
    batch = world.sample(n)
    return image_tensor(batch.images), world.captions(batch.attrs, seed)


def _check_training(
    images: Any, captions: Sequence[str], transform: Any, steps: int, batch_size: int, lr: float
) -> None:
    if len(images) != len(captions):
        raise InputError(f"there are {len(images)} images but {len(captions)} captions")
    if len(captions) < 2:
        raise InputError("contrastive training needs two images with captions or more")
    if transform is None and not (isinstance(images, Tensor) and images.ndim == 4):
        raise InputError(
            "without a transform, images have to be a tensor [n, C, H, W] ready for the model"
        )
    if steps < 1 or batch_size < 2 or not lr > 0:
        raise InputError(
            f"steps={steps}, batch_size={batch_size}, lr={lr}; accepted: at least one step, at "
            "least two images a step, and a positive learning rate"
        )


def _batches(n: int, size: int, generator: torch.Generator) -> Any:
    """Batches of indices without end; each pass over the data is in a new order."""
    while True:
        order = torch.randperm(n, generator=generator)
        yield from torch.split(order[: n // size * size], size)


def _pixels(images: Any, chosen: Tensor, transform: Callable[[Any], Tensor] | None) -> Tensor:
    if transform is None:
        pixels: Tensor = images[chosen]
        return pixels
    items = (images[index] for index in chosen.tolist())
    return torch.stack([transform(i[0] if isinstance(i, tuple) else i) for i in items])


def _warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """The share of the peak learning rate: up in a line, then down half a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

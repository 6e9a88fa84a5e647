"""The two towers of CLIP-like models behind one interface: open_clip and Hugging Face.

Everything here meets the model through its own modules. A causal text tower is run only up to the
last end token, which gives the same features for a fraction of the work; others run in full.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from internet_neg.errors import InterNegError
from shared_core.run import progress

__all__ = ["DualEncoder", "HFClipEncoder", "OpenClipEncoder"]

PLACEHOLDERS = ("$", "*", "q", "x")


@runtime_checkable
class DualEncoder(Protocol):
    """What the method asks of a model. Features need not be normalized.

    Attributes:
        preprocess: Turns a PIL image into a tensor [C, H, W].
    """

    preprocess: Callable[[Any], Tensor]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""

    @property
    def dim(self) -> int:
        """Width D of image and text features."""

    @property
    def text_width(self) -> int:
        """Width W of a token embedding."""

    @property
    def scale(self) -> float:
        """s, the exponential of the model's ``logit_scale``."""

    @property
    def placeholder(self) -> tuple[str, int]:
        """A word that is one token, and that token."""

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Features [B, D] of preprocessed images [B, C, H, W]."""

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Features [n, D] of texts."""

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids [n, context]."""

    def useful_length(self, ids: Tensor) -> int:
        """How many columns of the ids have to be run to get the features."""

    def token_embedding(self, ids: Tensor) -> Tensor:
        """Token embeddings [n, L, W] of ids [n, L]."""

    def encode_text_from_embeddings(self, embeddings: Tensor, ids: Tensor) -> Tensor:
        """Text features [n, D] of token embeddings [n, L, W], pooled where the ids say."""

    def fingerprint(self) -> str:
        """A name for the weights: other weights, another name."""


class _Encoder:
    """What both libraries' encoders share."""

    def __init__(
        self,
        model: nn.Module,
        preprocess: Callable[[Any], Tensor],
        embedding: nn.Module,
        placeholder: str | None,
    ) -> None:
        self.model = model.eval()
        self.preprocess = preprocess
        self._embedding = embedding
        self._placeholder = placeholder
        #: How `internet_neg.models.load_encoder` finds this model again.
        self.source: dict[str, Any] = {}

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.model.parameters()).dtype

    @property
    def scale(self) -> float:
        """s, the exponential of the model's ``logit_scale``."""
        return float(self.model.logit_scale.detach().float().exp())  # type: ignore[operator]

    @property
    def text_width(self) -> int:
        """Width of a token embedding."""
        return int(self._embedding.weight.shape[1])  # type: ignore[index]

    def to(self, device: torch.device) -> "_Encoder":
        """Move the model; returns the encoder."""
        self.model.to(device)
        return self

    @cached_property
    def placeholder(self) -> tuple[str, int]:
        """A word that is one token, and that token."""
        candidates = (self._placeholder,) if self._placeholder else PLACEHOLDERS
        probe = self.tokenize(["photo"])[0]
        for word in candidates:
            # The one column in which two one-word sentences differ, if there is just one.
            different = (self.tokenize([word])[0] != probe).nonzero().flatten()
            if len(different) == 1:
                return word, int(self.tokenize([word])[0][different[0]])
        raise InterNegError(
            f"none of {', '.join(map(repr, candidates))} is one token of this tokenizer; give the "
            "encoder a placeholder that is"
        )

    def tokenize(self, texts: Sequence[str]) -> Int[Tensor, "n L"]:
        """Token ids, padded to the context length."""
        raise NotImplementedError

    def useful_length(self, ids: Int[Tensor, "n L"]) -> int:
        """How many columns have to be run to get the features."""
        return int(self._ends(ids).max()) + 1 if self._truncates else ids.shape[1]

    def _ends(self, ids: Tensor) -> Tensor:
        """Where the tower reads each text."""
        raise NotImplementedError

    def _text_features(self, ids: Tensor) -> Tensor:
        raise NotImplementedError

    def _image_features(self, pixels: Tensor) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def encode_image(self, pixels: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D"]:
        """Features of preprocessed images; not normalized."""
        return self._image_features(pixels.to(self.device, self.dtype))

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str], batch_size: int = 512) -> Float[Tensor, "n D"]:
        """Features of texts, short ones first so that each batch runs only as long as it needs."""
        if not len(texts):
            return torch.zeros(0, self.dim, device=self.device)
        ids = self.tokenize(list(texts))
        full = ids.shape[1]
        lengths = self._ends(ids) + 1 if self._truncates else torch.full((len(ids),), full)
        if self._truncates and (lengths == full).any():
            warnings.warn(
                f"{int((lengths == full).sum())} of {len(ids)} texts reach the end of the context "
                f"({full} tokens) and may have been cut",
                stacklevel=2,
            )
        features = torch.empty(len(ids), self.dim, device=self.device)
        order = lengths.argsort(stable=True)
        parts = order.split(batch_size)  # type: ignore[no-untyped-call]
        # Few batches are one part of a longer extraction, which has a bar of its own.
        bar = (
            progress(parts, description="text features", unit="batch") if len(parts) > 4 else parts
        )
        for part in bar:
            length = int(lengths[part].max())
            found = self._text_features(ids[part, :length].to(self.device))
            features[part.to(self.device)] = found.to(features.dtype)
        return features

    @cached_property
    def dim(self) -> int:
        """Width of image and text features."""
        with torch.no_grad():
            return int(self._text_features(self.tokenize(["a"]).to(self.device)).shape[-1])

    _truncates = False

    def token_embedding(self, ids: Int[Tensor, "n L"]) -> Float[Tensor, "n L W"]:
        """Embeddings of token ids."""
        found: Tensor = self._embedding(ids.to(self.device))
        return found

    def encode_text_from_embeddings(
        self, embeddings: Float[Tensor, "n L W"], ids: Int[Tensor, "n L"]
    ) -> Float[Tensor, "n D"]:
        """Text features of token embeddings, pooled where the ids say; not normalized."""
        with self._given_embeddings(embeddings):
            return self._text_features(ids.to(self.device))

    @contextmanager
    def _given_embeddings(self, embeddings: Tensor) -> Iterator[None]:
        """The token embedding layer answers with `embeddings`, whatever it is asked."""
        handle = self._embedding.register_forward_hook(lambda *_: embeddings)
        try:
            yield
        finally:
            handle.remove()

    def fingerprint(self) -> str:
        """A name for the weights: other weights, another name."""
        digest = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            flat = value.detach().reshape(-1)
            # A sample of every weight and its sum: reading all bytes of a large model takes long.
            sample = flat[:: max(1, len(flat) // 256)].double().cpu()
            total = flat.double().sum().cpu() if value.is_floating_point() else flat.sum().cpu()
            digest.update(f"{name}{tuple(value.shape)}".encode())
            digest.update(sample.numpy().tobytes() + total.numpy().tobytes())
        return digest.hexdigest()


class OpenClipEncoder(_Encoder):
    """An open_clip model: ``CLIP``, or ``CustomTextCLIP`` with any text tower.

    The model is put into evaluation mode; its weights are never changed. A ``logit_bias`` plays no
    part, since a constant added to every logit cancels in the score.

    Args:
        model: The model.
        tokenizer: Turns a list of texts into token ids.
        preprocess: Turns a PIL image into a tensor.
        placeholder: A word that is one token, if not found by itself.

    Raises:
        InterNegError: If the tokenizer does not end texts where the text tower reads them.

    Examples:
        >>> from internet_neg.mini_clip import build_mini_clip
        >>> encoder = build_mini_clip()  # an OpenClipEncoder
        >>> encoder.encode_text(["a red star", "a blue bar on a wavy background"]).shape
        torch.Size([2, 64])
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Callable[[list[str]], Tensor],
        preprocess: Callable[[Any], Tensor],
        *,
        placeholder: str | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._tower: Any = getattr(model, "text", model)
        super().__init__(model, preprocess, _input_embedding(self._tower), placeholder)
        tower = self._tower
        pool = getattr(tower, "pool_type", None) or getattr(tower, "text_pool_type", None)
        self._pool = pool if hasattr(tower, "ln_final") else None
        self._eos_id: int = getattr(tower, "eos_id", getattr(tower, "text_eos_id", -1))
        self._truncates = (
            self._pool in ("argmax", "eos")
            and getattr(tower, "attn_mask", None) is not None
            and getattr(tower, "cls_emb", None) is None
        )
        self._check_end()

    @classmethod
    def from_pretrained(
        cls, model: str, pretrained: str | None = None, *, device: torch.device | None = None
    ) -> "OpenClipEncoder":
        """A model of open_clip by architecture and weights.

        Args:
            model: Such as ``ViT-B-16-quickgelu``; or, with weights, ``hf-hub:ID`` or
                ``local-dir:PATH``.
            pretrained: A tag such as ``openai``, or a file of weights.
            device: Where to; by default the CPU.

        Raises:
            InterNegError: If open_clip knows no such model or weights.
        """
        import open_clip

        if pretrained == "openai" and "quickgelu" not in model.lower():
            warnings.warn(
                f"OpenAI's weights were trained with QuickGELU: taking {model}-quickgelu",
                stacklevel=2,
            )
            model = f"{model}-quickgelu"
        try:
            network, _, preprocess = open_clip.create_model_and_transforms(
                model, pretrained=pretrained, device=device or "cpu"
            )
            tokenizer = open_clip.get_tokenizer(model)
        except (RuntimeError, ValueError, KeyError, OSError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise InterNegError(
                f"open_clip cannot load {model!r} with weights {pretrained!r}: {reason}"
            ) from error
        encoder = cls(network, tokenizer, preprocess)
        encoder.source = {"library": "open_clip", "model": model, "pretrained": pretrained}
        return encoder

    def tokenize(self, texts: Sequence[str]) -> Int[Tensor, "n L"]:
        """Token ids, padded to the context length."""
        return self._tokenizer(list(texts))

    def _ends(self, ids: Tensor) -> Tensor:
        """Where the tower reads each text."""
        if self._pool == "eos":
            return torch.eq(ids, self._eos_id).int().argmax(dim=-1)
        return ids.argmax(dim=-1)

    def _check_end(self) -> None:
        """A tower that reads another place than the end would give features of half a sentence."""
        if self._pool not in ("argmax", "eos"):
            return
        ids = self.tokenize(["a", "photo of the night", "this is a very large red photo"])
        rows = torch.arange(len(ids))
        tokens = ids[rows, self._ends(ids)]
        if self._pool == "eos" and not torch.eq(tokens, self._eos_id).all():
            raise InterNegError(
                f"the text tower reads at token {self._eos_id}, which the tokenizer does not "
                "write; give the tokenizer that the model was trained with"
            )
        if len(tokens.unique()) > 1:  # type: ignore[no-untyped-call]
            raise InterNegError(
                "the text tower reads at the largest token id, which is not the tokenizer's end of "
                "text; give the tokenizer that the model was trained with"
            )

    def _image_features(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.model.encode_image(pixels)  # type: ignore[operator]
        return found

    def _text_features(self, ids: Tensor) -> Tensor:
        if self._truncates:
            return self._causal(self._embedding(ids), ids)
        found: Tensor = self.model.encode_text(ids)  # type: ignore[operator]
        return found

    def encode_text_from_embeddings(
        self, embeddings: Float[Tensor, "n L W"], ids: Int[Tensor, "n L"]
    ) -> Float[Tensor, "n D"]:
        """Text features of token embeddings, pooled where the ids say; not normalized."""
        if self._truncates:
            return self._causal(embeddings, ids.to(self.device))
        return super().encode_text_from_embeddings(embeddings, ids)

    def _causal(self, x: Tensor, ids: Tensor) -> Tensor:
        """The causal tower on the first columns: what comes after the end cannot reach it."""
        tower, length = self._tower, ids.shape[1]
        cast = tower.transformer.get_cast_dtype()
        x = x.to(cast) + tower.positional_embedding[:length].to(cast)
        x = tower.transformer(x, attn_mask=tower.attn_mask[:length, :length])
        x = tower.ln_final(x)
        pooled = x[torch.arange(len(x), device=x.device), self._ends(ids)]
        projection = tower.text_projection
        if projection is None:
            return pooled
        found: Tensor = (
            projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection
        )
        return found


def _input_embedding(tower: Any) -> nn.Module:
    if hasattr(tower, "token_embedding"):
        found: nn.Module = tower.token_embedding
        return found
    if hasattr(getattr(tower, "transformer", None), "get_input_embeddings"):
        found = tower.transformer.get_input_embeddings()
        return found
    raise InterNegError(
        f"a {type(tower).__name__} has no token embedding; accepted: text towers of open_clip, and "
        "its Hugging Face text towers"
    )


class HFClipEncoder(_Encoder):
    """A Hugging Face ``CLIPModel`` or ``SiglipModel``.

    Args:
        model: The model; it is put into evaluation mode.
        tokenizer: Its tokenizer.
        preprocess: Turns a PIL image into a tensor.
        placeholder: A word that is one token, if not found by itself.

    Examples:
        >>> HFClipEncoder.from_pretrained("openai/clip-vit-base-patch16")  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        preprocess: Callable[[Any], Tensor],
        *,
        placeholder: str | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        text: Any = getattr(model, "text_model", None)
        if text is None or not hasattr(model, "get_text_features"):
            raise InterNegError(
                f"a {type(model).__name__} is no CLIP-like model; accepted: CLIPModel, SiglipModel"
            )
        super().__init__(model, preprocess, text.embeddings.token_embedding, placeholder)
        self._context = int(text.embeddings.position_embedding.weight.shape[0])
        # SigLIP attends both ways and reads the last position, padding or not.
        self._truncates = "siglip" not in type(model).__name__.lower()
        self._eos_id: int = getattr(text, "eos_token_id", 2)
        if self._truncates:
            self._check_end()

    @classmethod
    def from_pretrained(cls, name: str, *, device: torch.device | None = None) -> "HFClipEncoder":
        """A model of the hub, or of a local folder.

        Args:
            name: Such as ``openai/clip-vit-base-patch16``.
            device: Where to; by default the CPU.

        Raises:
            InterNegError: If it cannot be loaded.
            MissingExtraError: If transformers is not installed.
        """
        from shared_core.errors import MissingExtraError

        try:
            from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
        except ImportError as error:
            raise MissingExtraError("internet-neg", "hf", "transformers") from error
        try:
            model = AutoModel.from_pretrained(name)
            tokenizer = AutoTokenizer.from_pretrained(name)
            processor = AutoImageProcessor.from_pretrained(name)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InterNegError(f"transformers cannot load {name!r}: {reason}") from error

        def preprocess(image: Any) -> Tensor:
            pixels: Tensor = processor(image, return_tensors="pt")["pixel_values"][0]
            return pixels

        encoder = cls(model.to(device or "cpu"), tokenizer, preprocess)
        encoder.source = {"library": "hf", "model": name, "pretrained": None}
        return encoder

    def tokenize(self, texts: Sequence[str]) -> Int[Tensor, "n L"]:
        """Token ids, padded to the context length."""
        ids: Tensor = self._tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=self._context,
            return_tensors="pt",
        )["input_ids"]
        return ids

    def _ends(self, ids: Tensor) -> Tensor:
        if self._eos_id == 2:  # CLIP configurations with the old wrong id
            return ids.argmax(dim=-1)
        return torch.eq(ids, self._eos_id).int().argmax(dim=-1)

    def _check_end(self) -> None:
        ids = self.tokenize(["a", "photo of the night"])
        ends = ids[torch.arange(2), self._ends(ids)]
        wrong = self._eos_id != 2 and bool((ends != self._eos_id).any())
        if wrong or ends[0] != ends[1]:
            raise InterNegError(
                "the text tower reads where the tokenizer does not end a text; give the tokenizer "
                "that the model was trained with"
            )

    def _image_features(self, pixels: Tensor) -> Tensor:
        return _pooled(self.model.get_image_features(pixel_values=pixels))  # type: ignore[operator]

    def _text_features(self, ids: Tensor) -> Tensor:
        return _pooled(self.model.get_text_features(input_ids=ids))  # type: ignore[operator]


def _pooled(output: Any) -> Tensor:
    """Transformers 5 wraps the features in an output."""
    found: Tensor = getattr(output, "pooler_output", output)
    return found

"""CLIP models behind one interface: text features from embeddings instead of token ids.

The adapters read an open_clip ``CLIP`` or ``CustomTextCLIP``, or a Hugging Face ``CLIPModel``, and
need neither library themselves. Where a sequence is read (its end token) is taken from the token
ids, never from embeddings.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from openworld_auc._prefix import hf_blocks, open_clip_blocks, run_after_prefixes
from shared_core.errors import InputError, MissingExtraError

__all__ = ["ClipBackbone", "HFBackbone", "OpenClipBackbone", "as_backbone", "load_backbone"]


class ClipBackbone(Protocol):
    """What prompt tuning needs of an image-text model.

    One that has ``shares_prefixes = True`` and ``encode_with_prefix``, as the adapters below have,
    can be used with ``GMoPConfig(prefix_cache=True)``.

    Attributes:
        context_length: Longest sequence.
        text_width: Width W of token embeddings.
        has_start: Whether sequences begin with a start token.
    """

    context_length: int
    text_width: int
    has_start: bool

    @property
    def scale(self) -> Tensor:
        """What multiplies the cosines, 1/τ."""

    def encode_image(self, images: Tensor) -> Tensor:
        """Normalised float32 features [b, D]."""

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Token ids [t, context]."""

    def end_index(self, ids: Tensor) -> Tensor:
        """Position at which each sequence is read, [t]."""

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Token embeddings [t, length, W], without positions."""

    def encode_prompt_embeds(self, embeds: Tensor, end_index: Tensor) -> Tensor:
        """Normalised float32 features [t, D] of embedded sequences."""


class _Backbone(nn.Module):
    """What the adapters have in common: frozen parameters and bookkeeping of tokens."""

    context_length: int
    text_width: int
    has_start: bool
    end_id: int | None

    def __init__(self, model: nn.Module, tokenizer: Callable[..., Any]) -> None:
        super().__init__()
        self.model: Any = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer

    def train(self, mode: bool = True) -> "_Backbone":
        """Stay in evaluation mode: the backbone is frozen."""
        return super().train(False)

    @property
    def scale(self) -> Tensor:
        """What multiplies the cosines, 1/τ."""
        return cast(Tensor, self.model.logit_scale.detach().float().exp().reshape(()))

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return cast(torch.device, self.model.logit_scale.device)

    def _look_at_tokenizer(self) -> None:
        ids = self.tokenize(["a", "the", "a photo of the night"])
        self.has_start = bool(ids[0, 0] == ids[1, 0])
        self.context_length = min(self.context_length, ids.shape[1])
        # A tower that reads another place than the end would give features of half a sentence.
        read = ids[torch.arange(3, device=ids.device), self.end_index(ids)].tolist()
        wanted = read[0] if self.reads_largest else self.end_id
        if set(read) != {wanted}:
            raise InputError(
                "the text tower does not read where the tokenizer ends a text (it looks for "
                f"{'the largest token' if self.reads_largest else f'token {self.end_id}'}); pass "
                "the tokenizer that the model was trained with"
            )

    def tokenize(self, texts: Sequence[str]) -> Int[Tensor, "t context"]:
        """Token ids of texts."""
        return cast(Tensor, self.tokenizer(list(texts))).to(self.device)

    @property
    def reads_largest(self) -> bool:
        """Whether a sequence is read at its largest token id, rather than at the end id."""
        raise NotImplementedError

    def end_index(self, ids: Int[Tensor, "t length"]) -> Int[Tensor, " t"]:
        """Position at which each sequence is read."""
        if self.reads_largest:
            return ids.argmax(1)
        return torch.eq(ids, cast(int, self.end_id)).int().argmax(1)

    def _blocks(self) -> list[Any] | None:
        """The text tower's blocks, taken apart; None if that cannot be."""
        raise NotImplementedError

    def _positions(self) -> Tensor:
        """Embedding of each position, in the dtype of the text tower."""
        raise NotImplementedError

    def _read(self, stream: Tensor, at: Tensor) -> Tensor:
        """Normalised float32 features from what the last block gives."""
        raise NotImplementedError

    @property
    def shares_prefixes(self) -> bool:
        """Whether `encode_with_prefix` can be used."""
        return self._blocks() is not None

    def encode_with_prefix(
        self,
        prefix: Float[Tensor, "p n W"],
        suffix: Float[Tensor, "t m W"],
        end_index: Int[Tensor, " t"],
        *,
        lengths: Sequence[int],
        counts: Sequence[int],
    ) -> Float[Tensor, "t D"]:
        """Features of embedded sequences that begin alike, the beginnings computed once.

        Args:
            prefix: The beginnings, padded on the right.
            suffix: What follows; the suffixes of a prefix are in a row.
            end_index: Where in its suffix a sequence is read.
            lengths: Of the beginnings, without padding.
            counts: How many suffixes each beginning has.
        """
        positions = self._positions()
        start = torch.cat(
            [positions[None, n : n + suffix.shape[1]].expand(c, -1, -1)
             for n, c in zip(lengths, counts, strict=True)]
        )  # fmt: skip
        stream = run_after_prefixes(
            cast(list[Any], self._blocks()),
            prefix.to(positions.dtype) + positions[: prefix.shape[1]],
            lengths,
            suffix.to(positions.dtype) + start,
            counts,
        )
        return self._read(stream, end_index)


class OpenClipBackbone(_Backbone):
    """An open_clip ``CLIP`` or ``CustomTextCLIP`` with its tokenizer.

    Args:
        model: The model; it is frozen in place.
        tokenizer: Turns a list of texts into padded token ids [t, context].

    Raises:
        InputError: If its text tower looks both ways or reads another place than the end token
            (SigLIP, CoCa), or wraps a foreign model; or if the tokenizer is another model's.
    """

    def __init__(self, model: nn.Module, tokenizer: Callable[..., Any]) -> None:
        super().__init__(model, tokenizer)
        tower: Any = getattr(model, "text", model)
        if not hasattr(tower, "token_embedding"):
            raise InputError(
                "the text tower has no token_embedding; accepted: open_clip's own text towers "
                "(CLIP, CustomTextCLIP), not those that wrap a Hugging Face model"
            )
        self.pool = getattr(tower, "pool_type", getattr(tower, "text_pool_type", "argmax"))
        causal = tower.attn_mask is not None
        if (
            self.pool not in ("argmax", "eos")
            or not causal
            or getattr(tower, "cls_emb", None) is not None
        ):
            raise InputError(
                f"the text tower pools by {self.pool!r} and is{'' if causal else ' not'} causal; "
                "accepted: causal towers that read their end token (argmax or eos), as CLIP's do, "
                "and not those of SigLIP or CoCa"
            )
        self.end_id = getattr(tower, "eos_id", getattr(tower, "text_eos_id", None))
        self.context_length = tower.context_length
        self.text_width = tower.token_embedding.embedding_dim
        self._look_at_tokenizer()

    @property
    def _tower(self) -> Any:
        return getattr(self.model, "text", self.model)

    def encode_image(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b D"]:
        """Normalised float32 features."""
        return F.normalize(self.model.encode_image(images).float(), dim=-1)

    @property
    def reads_largest(self) -> bool:
        """Whether the tower pools at the largest token id."""
        return bool(self.pool == "argmax")

    def embed_tokens(self, ids: Int[Tensor, "t length"]) -> Float[Tensor, "t length W"]:
        """Token embeddings, without positions."""
        return cast(Tensor, self._tower.token_embedding(ids))

    def encode_prompt_embeds(
        self, embeds: Float[Tensor, "t length W"], end_index: Int[Tensor, " t"]
    ) -> Float[Tensor, "t D"]:
        """Normalised float32 features of embedded sequences."""
        tower, length = self._tower, embeds.shape[1]
        positions = self._positions()
        x = embeds.to(positions.dtype) + positions[:length]
        x = tower.transformer(x, attn_mask=tower.attn_mask[:length, :length])
        return self._read(x, end_index)

    def _blocks(self) -> list[Any] | None:
        return open_clip_blocks(self._tower.transformer)

    def _positions(self) -> Tensor:
        tower = self._tower
        return cast(Tensor, tower.positional_embedding.to(tower.transformer.get_cast_dtype()))

    def _read(self, stream: Tensor, at: Tensor) -> Tensor:
        tower = self._tower
        x = tower.ln_final(stream)[torch.arange(len(stream), device=stream.device), at]
        projection = tower.text_projection
        if isinstance(projection, nn.Linear):
            x = projection(x)
        elif projection is not None:
            x = x @ projection
        return F.normalize(x.float(), dim=-1)


class HFBackbone(_Backbone):
    """A Hugging Face ``CLIPModel`` with its tokenizer.

    Args:
        model: The model; it is frozen in place.
        tokenizer: A transformers tokenizer, or a callable from texts to ids [t, context].

    Raises:
        InputError: If the tokenizer does not end texts where the text tower reads them.
    """

    def __init__(self, model: nn.Module, tokenizer: Callable[..., Any]) -> None:
        super().__init__(model, tokenizer)
        config = self.model.config.text_config
        self.context_length = config.max_position_embeddings
        self.text_width = config.hidden_size
        self.end_id = config.eos_token_id
        self._look_at_tokenizer()

    def tokenize(self, texts: Sequence[str]) -> Int[Tensor, "t context"]:
        """Token ids of texts, padded to the context length."""
        if not hasattr(self.tokenizer, "pad_token"):
            return super().tokenize(texts)
        longest = self.model.config.text_config.max_position_embeddings
        given = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=longest,
            return_tensors="pt",
        )
        return cast(Tensor, given["input_ids"]).to(self.device)

    def encode_image(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b D"]:
        """Normalised float32 features."""
        pooled = self.model.vision_model(pixel_values=images).pooler_output
        return F.normalize(self.model.visual_projection(pooled).float(), dim=-1)

    @property
    def reads_largest(self) -> bool:
        """Whether the configuration is an old one with a wrong id; the end has the largest."""
        return bool(self.end_id == 2)

    def embed_tokens(self, ids: Int[Tensor, "t length"]) -> Float[Tensor, "t length W"]:
        """Token embeddings, without positions."""
        return cast(Tensor, self.model.text_model.embeddings.token_embedding(ids))

    def encode_prompt_embeds(
        self, embeds: Float[Tensor, "t length W"], end_index: Int[Tensor, " t"]
    ) -> Float[Tensor, "t D"]:
        """Normalised float32 features of embedded sequences."""
        tower, length = self.model.text_model, embeds.shape[1]
        x = tower.embeddings(inputs_embeds=embeds)
        mask = torch.full((length, length), -torch.inf, dtype=x.dtype, device=x.device).triu(1)
        mask = mask.expand(len(x), 1, length, length)
        x = tower.encoder(inputs_embeds=x, attention_mask=mask).last_hidden_state
        return self._read(x, end_index)

    def _blocks(self) -> list[Any] | None:
        return hf_blocks(self.model.text_model.encoder)

    def _positions(self) -> Tensor:
        return cast(Tensor, self.model.text_model.embeddings.position_embedding.weight)

    def _read(self, stream: Tensor, at: Tensor) -> Tensor:
        x = self.model.text_model.final_layer_norm(stream)
        x = x[torch.arange(len(x), device=x.device), at]
        return F.normalize(self.model.text_projection(x).float(), dim=-1)


def as_backbone(model: Any, tokenizer: Callable[..., Any] | None = None) -> Any:
    """The adapter for a model: open_clip's, Hugging Face's, or itself if it is one already.

    Args:
        model: An open_clip ``CLIP`` or ``CustomTextCLIP``, a ``CLIPModel``, or a `ClipBackbone`.
        tokenizer: The model's tokenizer; not needed for a `ClipBackbone`.

    Raises:
        InputError: If it is none of them, or the tokenizer is missing.
    """
    if hasattr(model, "encode_prompt_embeds"):
        return model
    if tokenizer is None:
        raise InputError("a CLIP model comes with its tokenizer: pass tokenizer=")
    if hasattr(model, "text_model") and hasattr(model, "visual_projection"):
        return HFBackbone(model, tokenizer)
    if hasattr(model, "encode_image") and hasattr(model, "visual"):
        return OpenClipBackbone(model, tokenizer)
    raise InputError(
        f"{type(model).__name__} is no known image-text model; accepted: open_clip CLIP and "
        "CustomTextCLIP, transformers CLIPModel, or an object with the methods of ClipBackbone"
    )


def load_backbone(
    name: str, pretrained: str | None = None, *, device: torch.device | None = None
) -> tuple[Any, Callable[..., Tensor]]:
    """Load a backbone and its evaluation transform by the library's own loader.

    Args:
        name: An open_clip architecture such as ``ViT-B-16-quickgelu`` or ``hf-hub:...``; or, as
            ``hf:ID``, a Hugging Face id or local folder of a ``CLIPModel``.
        pretrained: The open_clip weights: a tag such as ``openai``, or a file.
        device: Where to put it.

    Raises:
        InputError: If there is no such model.
        MissingExtraError: If transformers is needed and not installed.
    """
    device = device or torch.device("cpu")
    if name.startswith("hf:"):
        return _load_hf(name.removeprefix("hf:"), device)
    import open_clip

    if not name.startswith(("hf-hub:", "local-dir:")) and name not in open_clip.list_models():
        raise InputError(
            f"open_clip has no model {name!r}; accepted: such as ViT-B-16-quickgelu, hf-hub:ID, "
            "or hf:ID for a transformers CLIPModel"
        )
    if pretrained is not None and (open_clip.get_pretrained_cfg(name, pretrained) or {}).get(
        "quick_gelu"
    ):
        faithful = f"{name}-quickgelu"
        if "quickgelu" not in name and faithful in open_clip.list_models():
            warnings.warn(
                f"the weights {pretrained} were trained with QuickGELU: taking {faithful}",
                stacklevel=2,
            )
            name = faithful
    try:
        model, _, transform = open_clip.create_model_and_transforms(name, pretrained=pretrained)
        tokenizer = open_clip.get_tokenizer(name)
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(f"cannot load {name} ({pretrained}): {_reason(error)}") from error
    return OpenClipBackbone(model.to(device), tokenizer), transform


def _reason(error: Exception) -> str:
    """The first sentence of what a library says."""
    return (str(error).strip() or repr(error)).splitlines()[0].split(". ")[0]


def _load_hf(name: str, device: torch.device) -> tuple[Any, Callable[..., Tensor]]:
    try:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel
    except ImportError as error:
        raise MissingExtraError("openworld-auc", "hf", "transformers") from error
    try:
        model = CLIPModel.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
        processor = AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load {name}: {_reason(error)}") from error

    def transform(image: Any) -> Tensor:
        return cast(Tensor, processor(image, return_tensors="pt")["pixel_values"][0])

    return HFBackbone(model.to(device), tokenizer), transform

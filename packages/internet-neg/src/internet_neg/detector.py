"""InterNeg as a detector: fit to the known classes, then score images one batch after another."""

import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from internet_neg._checks import check_classnames, check_embeddings, normalize
from internet_neg._features import text_features
from internet_neg._outputs import NegativeText, OODOutput
from internet_neg._parallel import gather_counts, gather_rows
from internet_neg._saving import read_description, read_state, write_detector
from internet_neg._sources import resolve_proxies, resolve_vocabulary
from internet_neg.bank import NegativeBank
from internet_neg.config import InterNegConfig
from internet_neg.encoders import DualEncoder
from internet_neg.errors import InterNegError, NotFittedError
from internet_neg.inversion import InversionTemplates, imagenet_templates, invert_images
from internet_neg.proxies import embed_images
from internet_neg.score import Score, group_negatives, score_with_groups
from internet_neg.selection import admissible, deviation, select_negatives
from internet_neg.transforms import load_transform
from internet_neg.vocabulary import Vocabulary
from shared_core.data.prompts import fill
from shared_core.device import select_dtype
from shared_core.parallel import is_parallel
from shared_core.run import progress

__all__ = ["InterNegDetector", "NegativeText", "OODOutput"]


class InterNegDetector:
    """Zero-shot OOD detection with inter-modal negative texts (Xu et al., CVPR 2026).

    `fit` chooses negative texts with the help of a few images of each known class. `predict` scores
    a batch, turns images that are confidently unknown into further negative texts, and keeps those
    for the rest of the stream: results depend on the order of the images and on the batch size,
    unless ``update=False`` or ``text_only``.

    Args:
        encoder: The model; None for embeddings of your own (see `from_features`).
        classnames: Names of the known classes.
        config: Settings; the defaults are the published ones.
        vocabulary: ``wordnet``, a `Vocabulary`, or words.
        cache_dir: Folder in which text embeddings are kept, by model and prompts; None keeps none.

    Raises:
        InterNegError: If class names are blank or repeated.

    Examples:
        >>> from internet_neg.mini_clip import build_mini_clip
        >>> encoder = build_mini_clip()  # untrained: its texts stand in for images here
        >>> proxies = encoder.encode_text(["The nice red star.", "The nice blue bar."])
        >>> config = InterNegConfig(groups=1, negatives=3, templates=("a photo of a {}",))
        >>> detector = InterNegDetector(
        ...     encoder, ["red star", "blue bar"], config, ["ring", "heart", "pink gear"]
        ... ).fit(proxies)
        >>> out = detector.predict(torch.rand(4, 3, 32, 32))
        >>> out.score.shape, sorted(text.word for text in detector.negatives)
        (torch.Size([4]), ['heart', 'pink gear', 'ring'])
    """

    #: The method's name in tables.
    title = "InterNeg"

    def __init__(
        self,
        encoder: DualEncoder | None,
        classnames: Sequence[str],
        config: InterNegConfig | None = None,
        vocabulary: str | Vocabulary | Iterable[str] = "wordnet",
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        self.encoder = encoder
        self.classnames = check_classnames(classnames)
        self.config = config or InterNegConfig()
        self.vocabulary = vocabulary
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        #: Words of the vocabulary that name known classes and were left out.
        self.removed_words: list[str] = []
        #: Smallest margin that counts as known; see `calibrate`.
        self.threshold: float | None = None
        self._scale: float | None = None
        self._templates: InversionTemplates | None = None
        self._T: Tensor | None = None
        self._words: list[tuple[str, str]] = []

    # Fitting

    def fit(self, source: Any, *, unlabelled: Any = None, sync: bool = False) -> "InterNegDetector":
        """Choose the negative texts.

        Args:
            source: Labelled images of the known classes, whose mean embeddings are the proxies: a
                data set or loader of (image, label), a mapping from class names to images or paths,
                a folder with a subfolder for each class, ``{"features": [n, D], "labels": [n]}``,
                or the proxies [K, D] themselves. Without any: ``"text"`` takes the class texts in
                their place, ``"stream"`` confident images of `unlabelled`; both are extensions.
            unlabelled: Images or embeddings for ``source="stream"``.
            sync: With torch.distributed, whether the ranks share out the embedding of words and
                images; all have to call, with the same arguments, and all get the same detector.

        Returns:
            The detector.

        Raises:
            InterNegError: If a class has no image, a label or shape is wrong, an embedding is not
                finite, or there are more groups than negatives.
            NoAdmissibleNegativesError: If no word can be used.
        """
        if self.encoder is None:
            raise InterNegError("without an encoder, make the detector by from_features")
        config = self.config
        self._scale = self.encoder.scale
        T = normalize(self._texts(config.class_prompt, self.classnames))
        P = self._proxies(source, T, unlabelled, sync)
        every = resolve_vocabulary(self.vocabulary)
        left, self.removed_words = every.without(self.classnames, config.dedup)
        parts = []
        for prompt, words, kept in (
            (config.noun_prompt, every.nouns, set(left.nouns)),
            (config.adjective_prompt, every.adjectives, set(left.adjectives)),
        ):
            # All words are embedded, so that what is cached serves other class names too.
            found = normalize(self._texts(prompt, words, sync))
            parts.append(found[[i for i, word in enumerate(words) if word in kept]])
        return self._fit(T, P, parts[0], parts[1], left)

    @classmethod
    def from_features(
        cls,
        class_texts: Float[Tensor, "K D"],
        proxies: Float[Tensor, "K D"],
        nouns: Float[Tensor, "n D"],
        adjectives: Float[Tensor, "m D"] | None = None,
        *,
        scale: float = 100.0,
        config: InterNegConfig | None = None,
        classnames: Sequence[str] | None = None,
        vocabulary: Vocabulary | None = None,
        encoder: DualEncoder | None = None,
    ) -> "InterNegDetector":
        """A fitted detector from embeddings, without a model; then images come as embeddings too.

        Args:
            class_texts: T, text embeddings of the classes.
            proxies: P, image proxies of the classes.
            nouns: Embeddings of candidate nouns, or of all candidates.
            adjectives: Embeddings of candidate adjectives.
            scale: s of the model.
            config: Settings; without an encoder they need ``text_only=True``, which is the default.
            classnames: Names of the classes, for reports.
            vocabulary: The candidates' words, for reports.
            encoder: Needed for the stream's extra negatives.

        Examples:
            >>> detector = InterNegDetector.from_features(
            ...     torch.eye(3)[:1], torch.eye(3)[:1], torch.eye(3)[1:],
            ...     config=InterNegConfig(text_only=True, negatives=2, groups=1),
            ... )
            >>> detector.predict(features=torch.eye(3)).pred.tolist()
            [0, 0, 0]
        """
        config = config or InterNegConfig(text_only=encoder is None)
        names = classnames or [f"class {i}" for i in range(len(class_texts))]
        detector = cls(encoder, names, config, vocabulary or "wordnet")
        if encoder is None and not config.text_only:
            raise InterNegError(
                "inverting images needs an encoder: give one, or InterNegConfig(text_only=True)"
            )
        detector._scale = scale
        if adjectives is None:
            adjectives = nouns[:0]
        if vocabulary is None:
            vocabulary = Vocabulary(
                tuple(f"noun {i}" for i in range(len(nouns))),
                tuple(f"adjective {i}" for i in range(len(adjectives))),
            )
        found = (len(vocabulary.nouns), len(vocabulary.adjectives))
        if found != (len(nouns), len(adjectives)):
            raise InterNegError(
                f"the vocabulary has {found[0]} nouns and {found[1]} adjectives, the embeddings "
                f"{len(nouns)} and {len(adjectives)}"
            )
        T = detector._checked("class texts", class_texts)
        P = detector._checked("proxies", proxies, T)
        return detector._fit(
            T,
            P,
            detector._checked("nouns", nouns, T),
            detector._checked("adjectives", adjectives, T),
            vocabulary,
        )

    def _fit(
        self, T: Tensor, P: Tensor, nouns: Tensor, adjectives: Tensor, vocabulary: Vocabulary
    ) -> "InterNegDetector":
        if T.shape[0] != len(self.classnames):
            raise InterNegError(f"{len(T)} class texts for {len(self.classnames)} class names")
        adj, noun = self._choose(nouns, adjectives, T, P)
        self._words = [(vocabulary.adjectives[i], "adj") for i in adj.tolist()]
        self._words += [(vocabulary.nouns[i], "noun") for i in noun.tolist()]
        N = torch.cat([adjectives[adj], nouns[noun]])
        self._set(T, P, N)
        return self

    def _choose(
        self, nouns: Tensor, adjectives: Tensor, T: Tensor, P: Tensor
    ) -> tuple[Tensor, Tensor]:
        M = min(self.config.negatives, len(nouns) + len(adjectives))
        return select_negatives(nouns, adjectives, T, P, M, self.config.chunk_size)

    def _set(self, T: Tensor, P: Tensor, N: Tensor) -> None:
        config = self.config
        if 0 < len(N) < config.groups:
            raise InterNegError(
                f"groups={config.groups} of {len(N)} negative texts; lower groups or take a larger "
                "vocabulary"
            )
        self._T, self._P, self._N = T, P, N
        self._bank = NegativeBank(
            config.extra, T.shape[1], T.device, getattr(torch, config.bank_dtype)
        )
        self.reset()

    def _texts(self, prompt: str, words: Sequence[str], sync: bool = False) -> Tensor:
        assert self.encoder is not None
        return text_features(self.encoder, fill(prompt, words), self.cache_dir, sync=sync)

    def _proxies(self, source: Any, T: Tensor, unlabelled: Any, sync: bool = False) -> Tensor:
        assert self.encoder is not None
        found = resolve_proxies(
            self.encoder, self.classnames, self.config, source, T, unlabelled, sync
        )
        return T if found is T else self._checked("proxies", found, T)

    def _checked(self, name: str, x: Tensor, beside: Tensor | None = None) -> Tensor:
        check_embeddings(name, x, None if beside is None else beside.shape[1])
        return normalize(x if beside is None else x.to(beside.device))

    # Scoring

    @torch.no_grad()
    def predict(
        self,
        images: Any = None,
        *,
        features: Float[Tensor, "B D"] | None = None,
        update: bool = True,
        sync: bool = False,
    ) -> OODOutput:
        """Score a batch, and learn from it what unknown images look like.

        Args:
            images: A preprocessed tensor [B, C, H, W], or PIL images and paths.
            features: Image embeddings [B, D] in their place.
            update: False scores with what is known and changes nothing; safe from several threads.
            sync: With torch.distributed, whether the batches of all ranks are one joint batch, in
                rank order; every rank then keeps the same bank. All ranks have to call.

        Raises:
            NotFittedError: Before `fit`.
            InterNegError: If embeddings are not finite or do not fit.
        """
        T = self._fitted()
        if (images is None) == (features is None):
            raise InterNegError("give either images or features")
        v = self._embed(images) if features is None else features
        check_embeddings("images", v, T.shape[1])
        v = normalize(v.to(T.device))
        first = self._score(v)
        nothing = torch.zeros(len(v), dtype=torch.bool, device=v.device)
        gated = (first.score <= self.config.beta) if self._gates(update) else nothing
        accepted = nothing
        if self._gates(update):
            accepted, changed = self._extend(v, gated, sync and is_parallel())
            if changed:
                again = nothing.logical_not() if self.config.rescore == "batch" else accepted
                second = self._score(v)
                first = Score(
                    torch.where(again, second.score, first.score),
                    torch.where(again, second.margin, first.margin),
                )
            self._warn_of_gate_rate()
        pred = (v @ T.T).argmax(dim=-1) if len(v) else torch.zeros(0, dtype=torch.long)
        is_id = None if self.threshold is None else first.margin >= self.threshold
        return OODOutput(first.score, first.margin, pred, is_id, gated, accepted)

    def _gates(self, update: bool) -> bool:
        # S can underflow to 0, so a gate at 0 has to be off by definition.
        return update and not self.config.text_only and self.config.beta > 0

    def _score(self, v: Tensor) -> Score:
        return score_with_groups(v, self._fitted(), self._grouped, self.scale)

    def _extend(self, v: Tensor, gated: Tensor, shared: bool) -> tuple[Tensor, bool]:
        """Invert gated images and offer what is admissible to the bank.

        Returns which images were accepted, and whether any image of the joint batch was gated.
        """
        config, T = self.config, self._fitted()
        where = gated.nonzero().flatten()
        counts, before = gather_counts(len(where), v.device) if shared else ([len(where)], 0)
        sizes, offset = gather_counts(len(v), v.device) if shared else ([len(v)], 0)
        total = sum(counts)
        sources = self._seen + offset + where
        self._seen += sum(sizes)
        self._gated += total
        generator = torch.Generator().manual_seed(config.seed + self._batch)
        self._batch += 1
        accepted = torch.zeros_like(gated)
        if total == 0:
            return accepted, False
        e = self._invert(v[where], generator, total, before)
        if shared:
            e, sources = gather_rows(e, counts), gather_rows(sources, counts)
        keep = torch.ones(total, dtype=torch.bool, device=v.device)
        if config.filter_inverted:
            keep = admissible(e, T, self._P, config.chunk_size)
        accepted[where] = keep[before : before + len(where)]
        self._bank.insert(e[keep], deviation(e[keep], T, self._P), sources[keep])
        self._regroup()
        return accepted, True

    def _invert(
        self, v: Tensor, generator: torch.Generator, total: int, before: int
    ) -> Float[Tensor, "b D"]:
        """Texts for this rank's images, drawn as one process would draw for the joint batch."""
        config, encoder = self.config, self.encoder
        if encoder is None:
            raise InterNegError("inverting images needs an encoder; score with update=False")
        if self._templates is None:
            self._templates = InversionTemplates(encoder, config.templates or imagenet_templates())
        mine = slice(before, before + len(v))
        tokens = torch.randn(total, encoder.text_width, generator=generator)
        which = torch.randint(
            len(self._templates), (config.inversion_steps, total), generator=generator
        )
        if not len(v):
            return v.new_zeros(0, v.shape[1])
        found = invert_images(
            encoder,
            v,
            steps=config.inversion_steps,
            lr=config.inversion_lr,
            weight_decay=config.inversion_weight_decay,
            templates=self._templates,
            final_template=config.final_template,
            init_tokens=tokens[mine] * config.inversion_init_std,
            template_index=which[:, mine],
            mean_over=total,
            dtype=select_dtype(config.dtype, encoder.device),
        )
        assert isinstance(found, Tensor)
        return found.to(v)

    def stream(self, loader: Iterable[Any], *, show_progress: bool = True) -> Iterator[OODOutput]:
        """Score batch after batch.

        Args:
            loader: Batches: tensors of images [B, C, H, W] or embeddings [B, D], lists of images or
                paths, or pairs whose first element is one of these.
            show_progress: Whether to show a bar.
        """
        batches = progress(loader, description="stream", unit="batch") if show_progress else loader
        for item in batches:
            batch = item[0] if isinstance(item, tuple) else item
            if isinstance(batch, Tensor) and batch.ndim == 2:
                yield self.predict(features=batch)
            else:
                yield self.predict(batch)

    def reset(self) -> "InterNegDetector":
        """Forget the stream: an empty bank, as after `fit`."""
        self._bank.clear()
        self._seen = self._batch = self._gated = 0
        self._warned = False
        self._regroup()
        return self

    def calibrate(self, known: OODOutput | Float[Tensor, " n"], tpr: float = 0.95) -> float:
        """Set the threshold behind `OODOutput.is_id`, so that a share `tpr` of known images pass.

        Args:
            known: What `predict` said of known images, or their scores.
            tpr: The share, in (0, 1].

        Returns:
            The threshold of the margin.

        Raises:
            InterNegError: If there is no score, one is NaN, or `tpr` is out of range.
        """
        if isinstance(known, OODOutput):
            margins = known.margin
        else:
            # A saturated score of 1 is only known to be above the largest number below 1.
            margins = torch.logit(torch.as_tensor(known).double(), eps=2.0**-53)
        if not len(margins) or margins.isnan().any() or not 0 < tpr <= 1:
            raise InterNegError(
                f"{len(margins)} scores and tpr={tpr}; accepted: at least one score, none of them "
                "NaN, and 0 < tpr <= 1"
            )
        kept = math.ceil(tpr * len(margins))
        self.threshold = float(margins.sort(descending=True).values[kept - 1])
        return self.threshold

    # What it knows

    @property
    def scale(self) -> float:
        """s, from the model or the setting ``temperature``."""
        if self.config.temperature is not None:
            return 1 / self.config.temperature
        if self._scale is None:
            raise NotFittedError
        return self._scale

    @property
    def bank(self) -> NegativeBank:
        """The extra negatives of the stream so far."""
        self._fitted()
        return self._bank

    @property
    def negatives(self) -> list[NegativeText]:
        """The chosen words: adjectives, then nouns, each from the largest deviation down."""
        values = deviation(self._N, self._fitted(), self._P).tolist()
        pairs = zip(self._words, values, strict=True)
        return [NegativeText(word, pos, value) for (word, pos), value in pairs]

    @property
    def gate_rate(self) -> float:
        """Share of the stream's images that were inverted."""
        return self._gated / self._seen if self._seen else 0.0

    def explain(self, features: Float[Tensor, "B D"], k: int = 5) -> list[dict[str, Any]]:
        """The most similar class names and negative words of each image, with their cosines.

        Args:
            features: Image embeddings.
            k: How many of each.
        """
        T = self._fitted()
        v = self._checked("images", features, T)
        found: list[dict[str, Any]] = [{} for _ in v]
        sides = {"known": (T, self.classnames), "negative": (self._N, [w for w, _ in self._words])}
        for name, (texts, words) in sides.items():
            cosines, best = (v @ texts.T).topk(min(k, len(texts)), dim=1)
            for entry, row, where in zip(found, cosines.tolist(), best.tolist(), strict=True):
                entry[name] = [(words[i], value) for i, value in zip(where, row, strict=True)]
        return found

    def _fitted(self) -> Tensor:
        if self._T is None:
            raise NotFittedError
        return self._T

    def _embed(self, images: Any) -> Tensor:
        if isinstance(images, Tensor) and images.ndim == 2:
            return images
        if self.encoder is None:
            raise InterNegError("without an encoder, give features in place of images")
        transform = load_transform(self.config.transform, self.encoder)
        return embed_images(self.encoder, images, transform=transform)

    def _regroup(self) -> None:
        Z = torch.cat([self._N, self._bank.embeddings.to(self._N)])
        self._grouped = group_negatives(Z, self.config.groups, self.config.group_permute)

    def _warn_of_gate_rate(self) -> None:
        limit = self.config.max_gate_rate
        if not self._warned and self._seen >= 256 and self.gate_rate > limit:
            self._warned = True
            warnings.warn(
                f"{self.gate_rate:.0%} of the stream's images so far have S <= {self.config.beta}: "
                "known images may be among those inverted; check that the median score of known "
                "images is above 0.5, else raise the scale, lower negatives, or lower beta",
                stacklevel=3,
            )

    # Saving

    def state_dict(self) -> dict[str, Any]:
        """Everything that `fit` and the stream left behind, as tensors, numbers and strings."""
        return {
            "class_texts": self._fitted(),
            "proxies": self._P,
            "negatives": self._N,
            "words": [list(pair) for pair in self._words],
            "removed_words": self.removed_words,
            "scale": self._scale,
            "threshold": self.threshold,
            "bank": self._bank.state_dict(),
            "stream": [self._seen, self._batch, self._gated],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            InterNegError: If it is of other classes or of another width.
        """
        T = state["class_texts"]
        if len(T) != len(self.classnames):
            raise InterNegError(
                f"the saved state has {len(T)} classes, this detector {len(self.classnames)}"
            )
        if self.encoder is not None and self.encoder.dim != T.shape[1]:
            raise InterNegError(
                f"the saved state has {T.shape[1]} dimensions, the encoder {self.encoder.dim}"
            )
        device = T.device if self.encoder is None else self.encoder.device
        self._words = [(word, pos) for word, pos in state["words"]]
        self.removed_words = list(state["removed_words"])
        self._scale, self.threshold = state["scale"], state["threshold"]
        self._set(T.to(device), state["proxies"].to(device), state["negatives"].to(device))
        self._bank.load_state_dict(state["bank"])
        self._seen, self._batch, self._gated = state["stream"]
        self._regroup()

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``config.json`` and ``detector.safetensors`` into a folder.

        Args:
            folder: Made if absent. The model's weights are not written.
        """
        write_detector(
            Path(folder),
            self.state_dict(),
            {
                "method": self.title,
                "classnames": self.classnames,
                "config": self.config.to_dict(),
                "model": getattr(self.encoder, "source", {}),
                "fingerprint": None if self.encoder is None else self.encoder.fingerprint(),
            },
        )

    @classmethod
    def from_pretrained(
        cls, folder: str | os.PathLike[str], encoder: DualEncoder | None = None
    ) -> "InterNegDetector":
        """A detector from what `save_pretrained` wrote, its stream included.

        Args:
            folder: The folder.
            encoder: The model it was fitted with; None where only embeddings will be scored.

        Raises:
            InterNegError: If the folder holds no detector, or the encoder has other weights.
        """
        names, config, fingerprint = read_description(Path(folder), cls.title)
        if encoder is not None and fingerprint not in (None, encoder.fingerprint()):
            raise InterNegError(
                f"the detector in {folder} was fitted with other weights than this encoder's"
            )
        detector = cls(encoder, names, config)
        detector.load_state_dict(read_state(Path(folder)))
        return detector

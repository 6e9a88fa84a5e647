"""GMoP, gated mixture of prompts: a prompt for each role in open-world classification.

A tuned prompt g classifies base classes, K tuned prompts r_k detect what is base, and a
hand-written prompt h classifies new classes. CoOp (one tuned prompt in all roles) and zero-shot
CLIP are other settings of the same model, so that they compare fairly.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from openworld_auc._checks import check_choice
from openworld_auc.backbone import as_backbone
from openworld_auc.fusion import erf_scores
from openworld_auc.losses import SURROGATES, Surrogate, gated_pairwise_auc_loss
from openworld_auc.partition import Partition, pseudo_partition
from openworld_auc.prompts import (
    Fixed,
    PromptLearner,
    clean_names,
    encode_prompts,
    fix,
    template_features,
)
from shared_core.errors import InputError
from shared_core.run import atomic_path, write_json

__all__ = ["GMoP", "GMoPConfig", "GMoPOutput"]


@dataclass(frozen=True)
class GMoPConfig:
    """Settings of `GMoP`; the defaults are the paper's.

    Attributes:
        n_ctx: Context length of the base classifier's prompt.
        n_ctx_detector: Context length of each detector's prompt.
        k: Number K of detectors.
        lam: Weight λ of the gated ranking term.
        alpha: Weight α of the detectors' own cross entropy.
        gate: Weight of a sample in a pair from the probability p of its true class: ``sigmoid`` is
            σ(p), ``prob`` is p, ``hard`` is whether the class is right, ``none`` is 1.
        detach_gate: Whether the gate passes no gradient to g. The published code lets it pass.
        surrogate: Pair loss; see `openworld_auc.losses`.
        margin: Of the pair loss.
        base_prompt: ``tuned``, or ``template`` for a zero-shot base classifier.
        new_prompt: ``template``, or ``tuned`` to use g's prompt for new classes too, as CoOp does.
        detector: ``tuned``; ``mcm``, the largest base probability over all names; ``sum`` of the
            base probabilities; or ``erf``, both of these by their ranks among the images of one
            call, so give it a whole test set (`openworld_auc.fusion.erf_scores`).
        detector_prompt: The prompt of ``mcm``, ``sum`` and ``erf``: ``tuned`` or ``template``.
        detector_vocab: Names in a tuned detector's softmax when testing: ``all``, or ``pseudo``,
            those it was trained with.
        fuse: How K detectors become one: ``max`` or ``mean``.
        score_space: ``probability``, or ``logodds`` of it, which does not saturate near 1.
        partition: ``mod`` or ``random``; see `openworld_auc.pseudo_partition`.
        official_padding: Repeat an accident of the published code; see there.
        template: The hand-written prompt.
        init: A phrase as the first context of g; otherwise it is random.
        seed: Of random contexts and partitions.
        chunk: Sequences encoded at a time, for a thousand classes and more; what they need for the
            backward pass is computed anew there.
        prefix_cache: Compute what all sequences of a prompt begin with, the start token and the
            context, once in a step instead of for each class. Exact; the more it saves, the longer
            the contexts.
        compile: Whether training runs the text tower through ``torch.compile``, or with which of
            its backends. The shapes of a training step never change.
    """

    n_ctx: int = 4
    n_ctx_detector: int = 16
    k: int = 3
    lam: float = 1.0
    alpha: float = 0.5
    gate: Literal["sigmoid", "prob", "hard", "none"] = "sigmoid"
    detach_gate: bool = True
    surrogate: Surrogate = "square"
    margin: float = 1.0
    base_prompt: Literal["tuned", "template"] = "tuned"
    new_prompt: Literal["tuned", "template"] = "template"
    detector: Literal["tuned", "mcm", "sum", "erf"] = "tuned"
    detector_prompt: Literal["tuned", "template"] = "tuned"
    detector_vocab: Literal["all", "pseudo"] = "all"
    fuse: Literal["max", "mean"] = "max"
    score_space: Literal["probability", "logodds"] = "probability"
    partition: Literal["mod", "random"] = "mod"
    official_padding: bool = False
    template: str = "a photo of a {}."
    init: str | None = None
    seed: int = 0
    chunk: int | None = None
    prefix_cache: bool = False
    compile: bool | str = False

    def __post_init__(self) -> None:
        if self.chunk is not None and self.chunk < 1:
            raise InputError(f"chunk is {self.chunk}; accepted: at least one sequence at a time")
        if isinstance(self.compile, str):
            known = torch.compiler.list_backends(exclude_tags=())
            check_choice("compile", self.compile, tuple(known))
        check_choice("gate", self.gate, ("sigmoid", "prob", "hard", "none"))
        check_choice("surrogate", self.surrogate, SURROGATES)
        for name in ("base_prompt", "new_prompt", "detector_prompt"):
            check_choice(name, getattr(self, name), ("tuned", "template"))
        check_choice("detector", self.detector, ("tuned", "mcm", "sum", "erf"))
        check_choice("detector_vocab", self.detector_vocab, ("all", "pseudo"))
        check_choice("fuse", self.fuse, ("max", "mean"))
        check_choice("score_space", self.score_space, ("probability", "logodds"))
        if self.lam < 0 or self.alpha < 0:
            raise InputError(f"lam={self.lam}, alpha={self.alpha}; both have to be at least 0")


class GMoPOutput(NamedTuple):
    """What `GMoP` says about images.

    Attributes:
        base_logits: Over base classes, [b, C_b].
        new_logits: Over new classes, [b, C_n], or None without new classes.
        base_score: Detector score r, larger means more base-like, float32, [b].
        detector_scores: Score of each detector, [b] each; empty unless tuned.
    """

    base_logits: Tensor
    new_logits: Tensor | None
    base_score: Tensor
    detector_scores: tuple[Tensor, ...]


class GMoP(nn.Module):
    """Frozen CLIP with a prompt for each role; only contexts train.

    Args:
        backbone: An open_clip or Hugging Face CLIP model with `tokenizer`, or a `ClipBackbone`.
        base_classes: Names of the base classes, in the order of their labels.
        config: Settings.
        tokenizer: The model's tokenizer.

    Raises:
        InputError: If names are empty or repeated, or k does not fit the number of base classes.

    Source:
        Hua et al. (ICML 2025), the GMoP section; details as in the published code.
    """

    _columns: Tensor
    _parts: list[Partition]

    CONFIG, WEIGHTS = "gmop.json", "contexts.safetensors"

    def __init__(
        self,
        backbone: Any,
        base_classes: Sequence[str],
        *,
        config: GMoPConfig | None = None,
        tokenizer: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        self.config = config = config or GMoPConfig()
        self.backbone = as_backbone(backbone, tokenizer)
        self.base_classes = clean_names(base_classes, "base class")
        # The names that `partition` counts.
        self._parted = self.base_classes
        self.new_classes: list[str] = []
        generator = torch.Generator().manual_seed(config.seed)
        self.classifier = PromptLearner(
            self.backbone, config.n_ctx, init=config.init, generator=generator
        )
        self.detectors = nn.ModuleList()
        self.partition = []
        if config.detector == "tuned":
            self.partition = pseudo_partition(
                len(self.base_classes),
                config.k,
                scheme=config.partition,
                generator=generator,
                official_padding=config.official_padding,
            )
            self.detectors.extend(
                PromptLearner(self.backbone, config.n_ctx_detector, generator=generator)
                for _ in range(config.k)
            )
        self._parts = self.partition
        # Of each base class, its column in each detector's softmax; -1 where it is pseudo-new.
        columns = torch.full((len(self.partition), len(self.base_classes)), -1)
        for row, part in zip(columns, self.partition, strict=True):
            row[list(part.pseudo_base)] = torch.arange(len(part.pseudo_base))
        self.register_buffer("_columns", columns.to(self.backbone.scale.device), persistent=False)
        self._zero_shot = template_features(self.backbone, self.base_classes, config.template)
        self._tested: dict[str, Any] | None = None
        self._fixed: dict[tuple[tuple[str, ...], int], Fixed] = {}
        if config.prefix_cache and not getattr(self.backbone, "shares_prefixes", False):
            raise InputError(
                "prefix_cache is for text towers of plain attention blocks (open_clip's, Hugging "
                "Face's CLIP); this one attends in a way of its own: leave it off"
            )
        self._tower = _compiled(self.backbone, config.compile) if config.compile else None

    def train(self, mode: bool = True) -> "GMoP":
        """Forget text features when training may change them; the backbone stays as it is."""
        if mode:
            self._tested = None
        return super().train(mode)

    def set_classes(self, new: Sequence[str] = (), base: Sequence[str] | None = None) -> "GMoP":
        """Say what the new classes are called; nothing is trained for them.

        Args:
            new: Names of the new classes.
            base: Other base classes, if wanted (contexts fit any names). Of the trained names, some
                in any order, each stays in its part of the tuned detectors; as many other names
                take the parts by position.

        Raises:
            InputError: If names are empty, repeated, or in both lists; if the detectors' parts do
                not fit.
        """
        base = self.base_classes if base is None else clean_names(base, "base class")
        new = clean_names(new, "new class")
        both = sorted(set(base) & set(new))
        if both:
            raise InputError(f"{both[0]!r} is in both lists; a class is base or new")
        by_name = set(base) <= set(self._parted)
        if self.partition and not by_name and len(base) != len(self._parted):
            raise InputError(
                f"there are {len(base)} base names, but the detectors part "
                f"{len(self._parted)} of them; give as many, or some of the same"
            )
        if by_name:
            self._parts = _parts_of(self.partition, self._parted, base)
        else:
            self._parts, self._parted = self.partition, base
        if base != self.base_classes:
            self._zero_shot = template_features(self.backbone, base, self.config.template)
        self.base_classes, self.new_classes = base, new
        self._tested = None
        self._fixed.clear()
        return self

    def encode_image(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b D"]:
        """Normalised float32 features, without gradient."""
        with torch.no_grad():
            return cast(Tensor, self.backbone.encode_image(images))

    def _logits(self, features: Tensor, texts: Tensor) -> Tensor:
        # In float32 also under autocast: half-precision softmax maxima saturate and tie.
        with torch.autocast(features.device.type, enabled=False):
            return cast(Tensor, self.backbone.scale * features.float() @ texts.float().T)

    def loss(
        self,
        features: Float[Tensor, "b D"],
        targets: Int[Tensor, " b"],
        *,
        base_logits: Float[Tensor, "b C_b"] | None = None,
        new_logits: Float[Tensor, "b C_b"] | None = None,
        detectors: Sequence[int] | None = None,
        split: bool = False,
    ) -> dict[str, Float[Tensor, ""]]:
        """The objective of a batch of base-class images.

        ``L = CE(g) + α/K sum_k CE_k + λ/K sum_k AUC_k``: CE_k over the pseudo-base classes of
        detector k, AUC_k over pairs of its pseudo-base and pseudo-new samples, each gated by the
        probability that g (pseudo-base) or zero-shot CLIP (pseudo-new) gives the true class. A
        detector without a pair in the batch adds nothing, and the sum is still divided by K.

        Args:
            features: Normalised image features.
            targets: Labels among the base classes.
            base_logits: Of a base classifier of your own, in the place of g: its cross entropy and
                its gates; g's prompt is left alone.
            new_logits: Over the base classes, of a classifier of new classes of your own, in the
                place of zero-shot CLIP.
            detectors: Train only these, and divide by their number; an approximation of K.
            split: Whether the processes of torch.distributed, all with the same batch, share out
                the prompts; the gradients of all processes are then to be added up.

        Returns:
            ``total``, and its parts before weighting ``ce``, ``warm`` and ``auc``.

        Raises:
            InputError: If a label is out of range or the shapes do not fit.
        """
        config = self.config
        if self.base_classes != self._parted:
            raise InputError(
                "the model is set to some of the trained classes, or to another order; train with "
                "those it was made for"
            )
        if targets.shape != features.shape[:1]:
            raise InputError(f"there are {len(features)} features, but {len(targets)} labels")
        count = len(self.base_classes)
        if len(targets) and targets.device.type == "cpu":
            low, high = int(targets.min()), int(targets.max())
            if low < 0 or high >= count:
                raise InputError(
                    f"label {low if low < 0 else high} is outside [0, {count}): "
                    f"there are {count} base classes, counted from 0"
                )
        for name, given in (("base_logits", base_logits), ("new_logits", new_logits)):
            if given is not None and given.shape != (len(targets), count):
                raise InputError(
                    f"{name} has shape {list(given.shape)}; accepted: {[len(targets), count]}, a "
                    "column for each base class"
                )
        trains_detectors = bool(self.partition) and (config.lam > 0 or config.alpha > 0)
        chosen = range(len(self.partition)) if detectors is None else detectors
        parts = [self.partition[k] for k in chosen] if trains_detectors else []
        prompts: list[tuple[PromptLearner, Sequence[str]]] = []
        if base_logits is None:
            prompts.append((self.classifier, self.base_classes))
        for k, part in zip(chosen, parts, strict=False):
            names = [self.base_classes[c] for c in part.vocabulary]
            prompts.append((cast(PromptLearner, self.detectors[k]), names))
        texts = self._encode(prompts, split=split, tower=self._tower)
        if base_logits is None:
            base_logits = self._logits(features, texts.pop(0))
        if new_logits is None:
            new_logits = self._logits(features, self._zero_shot)
        ce = F.cross_entropy(base_logits, targets)
        gate_base, gate_new = self._gates(base_logits, new_logits, targets)
        warm, auc = ce.new_zeros(()), ce.new_zeros(())
        # No branch on what the batch holds: a GPU would have to wait for each.
        for k, text in zip(chosen if parts else (), texts, strict=True):
            column = self._columns[k][targets]
            is_base = column >= 0
            has_pair = is_base.any() & ~is_base.all()
            detector = self._logits(features, text)
            each = F.cross_entropy(detector, column.clamp(min=0), reduction="none")
            warm = warm + torch.where(is_base & has_pair, each, 0).sum() / is_base.sum().clamp(1)
            auc = auc + gated_pairwise_auc_loss(
                detector.softmax(1).amax(1),
                is_base,
                torch.where(is_base, gate_base, gate_new),
                surrogate=config.surrogate,
                margin=config.margin,
            )
        divisor = max(1, len(parts))
        warm, auc = warm / divisor, auc / divisor
        total = ce + config.alpha * warm + config.lam * auc
        return {"total": total, "ce": ce, "warm": warm, "auc": auc}

    def _gates(self, base: Tensor, new: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """φ_b from the base classifier in training, φ_n from zero-shot prompts."""
        gates = []
        for values in (base.detach() if self.config.detach_gate else base, new):
            if self.config.gate == "none":
                gates.append(torch.ones_like(values[:, 0]))
            elif self.config.gate == "hard":
                gates.append((values.argmax(1) == targets).to(values.dtype))
            else:
                p = values.softmax(1).gather(1, targets[:, None])[:, 0]
                gates.append(p if self.config.gate == "prob" else p.sigmoid())
        return gates[0], gates[1]

    def _encode(
        self, prompts: Sequence[tuple[PromptLearner, Sequence[str]]], **options: Any
    ) -> list[Tensor]:
        fixed = []
        for learner, names in prompts:
            key = (tuple(names), len(learner.ctx))
            if key not in self._fixed:
                self._fixed[key] = fix(self.backbone, names, len(learner.ctx))
            fixed.append(self._fixed[key])
        config = self.config
        return encode_prompts(
            self.backbone,
            prompts,
            chunk=config.chunk,
            prefix_cache=config.prefix_cache,
            fixed=fixed,
            **options,
        )

    def _texts(self) -> dict[str, Any]:
        """Text features of all roles; in evaluation mode they are computed once."""
        if self._tested is not None:
            return self._tested
        config = self.config
        both = [*self.base_classes, *self.new_classes]
        names = both if config.detector_vocab == "all" else self.base_classes
        with torch.no_grad():
            learners = [cast(PromptLearner, d) for d in self.detectors]
            prompts = [(self.classifier, both), *((d, names) for d in learners)]
            tuned, *detectors = self._encode(prompts)
            if self.new_classes:
                new = template_features(self.backbone, self.new_classes, config.template)
                template = torch.cat([self._zero_shot, new])
            else:
                template = self._zero_shot
        sources = {"tuned": tuned, "template": template}
        count = len(self.base_classes)
        texts = {
            "base": sources[config.base_prompt][:count],
            "new": sources[config.new_prompt][count:],
            "detection": sources[config.detector_prompt],
            "detectors": detectors,
        }
        if not self.training:
            self._tested = texts
        return texts

    @torch.no_grad()
    def forward(
        self,
        images: Float[Tensor, "b 3 h w"] | None = None,
        features: Float[Tensor, "b D"] | None = None,
    ) -> GMoPOutput:
        """Logits of both classifiers and the detector's score, for testing.

        Args:
            images: Pixels, preprocessed for the backbone.
            features: In their place: features of `encode_image`.

        Raises:
            InputError: If not exactly one of the two is given.
        """
        if (images is None) == (features is None):
            raise InputError("give exactly one of images and features")
        if features is None:
            features = self.encode_image(cast(Tensor, images))
        texts = self._texts()
        scores = tuple(
            self._detector_score(self._logits(features, text), part)
            for part, text in zip(self._parts, texts["detectors"], strict=True)
        )
        if scores:
            stacked = torch.stack(scores)
            score = stacked.amax(0) if self.config.fuse == "max" else stacked.mean(0)
        else:
            score = self._untuned_score(self._logits(features, texts["detection"]))
        new = self._logits(features, texts["new"]) if self.new_classes else None
        return GMoPOutput(self._logits(features, texts["base"]), new, score, scores)

    def _detector_score(self, logits: Tensor, part: Any) -> Tensor:
        """r_k: the largest pseudo-base probability, in a softmax over the vocabulary."""
        if self.config.detector_vocab == "pseudo":
            vocabulary = torch.tensor(part.vocabulary, device=logits.device)
            logits, columns = logits[:, vocabulary], list(range(len(part.pseudo_base)))
        else:
            columns = list(part.pseudo_base)
        return self._largest(logits, torch.tensor(columns, device=logits.device))

    def _largest(self, logits: Tensor, columns: Tensor) -> Tensor:
        best = logits[:, columns].max(1)
        if self.config.score_space == "probability":
            return (best.values - logits.logsumexp(1)).exp()
        others = logits.scatter(1, columns[best.indices][:, None], -torch.inf)
        return best.values - others.logsumexp(1)

    def _untuned_score(self, logits: Tensor) -> Tensor:
        count = len(self.base_classes)
        if self.config.detector == "erf":
            return erf_scores(logits, count)
        if self.config.detector == "mcm":
            return self._largest(logits, torch.arange(count, device=logits.device))
        base = logits[:, :count].logsumexp(1)
        if self.config.score_space == "probability":
            return (base - logits.logsumexp(1)).exp()
        return base - logits[:, count:].logsumexp(1)

    def detect(self, features: Float[Tensor, "b D"]) -> Float[Tensor, " b"]:
        """Detector scores r of image features; larger means more base-like."""
        return cast(Tensor, self(features=features).base_score)

    def predict(self, images: Float[Tensor, "b 3 h w"], threshold: float) -> list[str]:
        """Class names by two stages: base classes where r > threshold, new ones elsewhere.

        Args:
            images: Pixels, preprocessed for the backbone.
            threshold: For example from `openworld_auc.fit_threshold`.

        Raises:
            InputError: If `set_classes` has not named new classes.
        """
        output = self(images)
        if output.new_logits is None:
            raise InputError("there are no new classes yet; name them with set_classes(new=[...])")
        base, new = output.base_logits.argmax(1), output.new_logits.argmax(1)
        return [
            self.base_classes[b] if is_base else self.new_classes[n]
            for is_base, b, n in zip(
                (output.base_score > threshold).tolist(), base.tolist(), new.tolist(), strict=True
            )
        ]

    def contexts(self) -> dict[str, Tensor]:
        """A copy of the trained tensors by name, on the CPU."""
        kept = {n: p for n, p in self.named_parameters() if p.requires_grad}
        return {n: p.detach().to("cpu", copy=True).contiguous() for n, p in kept.items()}

    def load_contexts(self, tensors: dict[str, Tensor]) -> None:
        """Take contexts as `contexts` gave them.

        Raises:
            InputError: If names or shapes differ.
        """
        own = {n: p for n, p in self.named_parameters() if p.requires_grad}
        shapes = {n: list(p.shape) for n, p in own.items()}
        given = {n: list(t.shape) for n, t in tensors.items()}
        if shapes != given:
            raise InputError(f"the contexts are {given}; this model needs {shapes}")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])
        self._tested = None

    def save_pretrained(self, folder: str | Path) -> None:
        """Write contexts and settings, a few kilobytes; the backbone is not copied."""
        target = Path(folder)
        with atomic_path(target / self.WEIGHTS) as temporary:
            save_file(self.contexts(), temporary)
        settings = {
            "config": asdict(self.config),
            "base_classes": self._parted,
            "new_classes": self.new_classes,
        }
        write_json(target / self.CONFIG, settings)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        backbone: Any,
        *,
        tokenizer: Callable[..., Any] | None = None,
        template: str | None = None,
    ) -> "GMoP":
        """Load what `save_pretrained` wrote onto a backbone of the same kind.

        Args:
            folder: The folder.
            backbone: As in the constructor.
            tokenizer: The model's tokenizer.
            template: Another hand-written prompt than the saved one.

        Raises:
            InputError: If files are missing or damaged, or do not fit the backbone.
        """
        source = Path(folder)
        try:
            settings = json.loads((source / cls.CONFIG).read_text(encoding="utf-8"))
            tensors = load_file(source / cls.WEIGHTS)
            changes = {} if template is None else {"template": template}
            config = GMoPConfig(**{**settings["config"], **changes})
            base, new = settings["base_classes"], settings["new_classes"]
        except FileNotFoundError as error:
            raise InputError(
                f"{source} is not the folder of tuned prompts: {error.filename} is missing"
            ) from error
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise InputError(f"the prompts in {source} cannot be read: {error}") from error
        model = cls(backbone, base, config=config, tokenizer=tokenizer)
        model.load_contexts(tensors)
        return model.set_classes(new).eval()


def _parts_of(
    partition: Sequence[Partition], parted: Sequence[str], names: Sequence[str]
) -> list[Partition]:
    """The parts of some of the classes, by their places among `names`."""
    place = {name: index for index, name in enumerate(names)}
    found = []
    for part in partition:
        kept = (
            tuple(place[parted[c]] for c in side if parted[c] in place)
            for side in (part.pseudo_base, part.pseudo_new, part.vocabulary)
        )
        found.append(Partition(*kept))
        if not found[-1].pseudo_base:
            raise InputError(
                f"of {len(names)} base classes a detector knows only pseudo-new ones; give more of "
                "the classes it was trained with"
            )
    return found


def _compiled(backbone: Any, backend: bool | str) -> SimpleNamespace:
    """The backbone's two ways to encode text, compiled for shapes that do not change."""
    names = ("encode_prompt_embeds", "encode_with_prefix")
    how: dict[str, Any] = {"dynamic": False}
    if isinstance(backend, str):
        how["backend"] = backend
    return SimpleNamespace(
        **{n: torch.compile(getattr(backbone, n), **how) for n in names if hasattr(backbone, n)}
    )

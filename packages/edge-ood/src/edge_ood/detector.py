"""A detector to deploy: a model, a score and a threshold, saved in one folder."""

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edge_ood.models import model_from_spec
from edge_ood.scorers import get_scorer
from shared_core.errors import InputError
from shared_core.run import atomic_path, write_json

__all__ = ["DetectorOutput", "OODDetector", "PytorchOODAdapter", "threshold_at_recall"]

CONFIG, WEIGHTS, SCORER = "detector.json", "model.safetensors", "scorer.safetensors"


class DetectorOutput(NamedTuple):
    """What a detector says about a batch.

    Attributes:
        score: High means ID, ``[B]``.
        is_id: Whether the score reaches the threshold, ``[B]``.
        labels: Labels with a probability of at least 0.5, ``[B, C]``; for samples that are not ID
            they mean nothing.
    """

    score: Float[Tensor, " B"]
    is_id: Bool[Tensor, " B"]
    labels: Bool[Tensor, "B C"]


def threshold_at_recall(scores: Float[Tensor, " n"], recall: float = 0.95) -> float:
    """The largest threshold that at least this share of ID scores reaches.

    Args:
        scores: Scores of held-out ID samples.
        recall: In (0, 1].

    Raises:
        InputError: If there are no scores, some are NaN, or the recall is out of range.

    Examples:
        >>> threshold_at_recall(torch.arange(20.0), 0.95)
        1.0
    """
    if not 0 < recall <= 1:
        raise InputError(f"recall is {recall}; it has to lie in (0, 1]")
    if scores.ndim != 1 or len(scores) == 0 or bool(scores.isnan().any()):
        raise InputError(
            f"ID scores have shape {list(scores.shape)}; accepted: [n], not empty, without NaN"
        )
    # 0.95 * 20 is a hair above 19 in floating point.
    keep = min(len(scores), max(1, math.ceil(recall * len(scores) - 1e-9)))
    return float(scores.sort(descending=True).values[keep - 1])


class OODDetector:
    """Says whether a sample shows anything that the model knows, and what.

    Args:
        model: Maps inputs to logits; for scores of features it has ``features`` and ``head``
            (`edge_ood.models.MultiLabelModel`).
        scorer: A scorer of logits or features, fitted if it needs that, or the name of one.
        threshold: Scores from it up are ID; ``calibrate`` finds it.
        class_names: Of the labels.

    Examples:
        >>> detector = OODDetector(nn.Linear(3, 2), "joint_energy")
        >>> detector.calibrate(torch.randn(100, 2)).predict(torch.zeros(4, 3)).is_id.shape
        torch.Size([4])
    """

    def __init__(
        self,
        model: nn.Module,
        scorer: Any = "joint_energy",
        threshold: float | None = None,
        class_names: list[str] | None = None,
    ) -> None:
        self.model = model
        self.scorer = get_scorer(scorer) if isinstance(scorer, str) else scorer
        self.threshold = threshold
        self.recall: float | None = None
        self.class_names = class_names
        self._attach_head()

    def _attach_head(self) -> None:
        if getattr(self.scorer, "head", ...) is None and hasattr(self.model, "head"):
            head: Any = self.model.head
            self.scorer.head = head.last if self.scorer.name == "vim" and len(head) == 1 else head
        if getattr(self.scorer, "model", ...) is None:
            self.scorer.model = self.model

    def calibrate(
        self, values: Tensor, recall: float = 0.95, *, inputs: bool = False
    ) -> "OODDetector":
        """Set the threshold that keeps a share of held-out ID samples.

        Args:
            values: ID logits ``[n, C]``, or features for a score of features.
            recall: The share to keep.
            inputs: Whether `values` are inputs of the model instead.
        """
        scores = self._evaluate(values)[1] if inputs else self.scorer.score(values)
        self.threshold, self.recall = threshold_at_recall(scores, recall), recall
        return self

    @torch.no_grad()
    def _evaluate(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and scores."""
        was_training = self.model.training
        self.model.eval()
        try:
            if self.scorer.requires == "features":
                inner: Any = self.model
                features = inner.features(x)
                return inner.head(features), self.scorer.score(features)
            logits = self.model(x)
            given = x if self.scorer.requires == "inputs" else logits
            return logits, self.scorer.score(given)
        finally:
            self.model.train(was_training)

    def score(self, x: Tensor) -> Float[Tensor, " B"]:
        """Scores of a batch of inputs; high means ID."""
        return self._evaluate(x)[1]

    def predict(self, x: Tensor) -> DetectorOutput:
        """Decide about a batch of inputs.

        Raises:
            InputError: If there is no threshold yet.
        """
        if self.threshold is None:
            raise InputError("the detector has no threshold; call calibrate on held-out ID logits")
        logits, score = self._evaluate(x)
        return DetectorOutput(score, score >= self.threshold, logits.sigmoid() >= 0.5)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the detector: ``detector.json``, the weights, and what the scorer learned.

        Raises:
            InputError: If the scorer cannot be saved (those of scikit-learn).
        """
        path, state = Path(folder), self.scorer.state()
        weights = {k: v.detach().cpu().contiguous().clone() for k, v in _state(self.model).items()}
        with atomic_path(path / WEIGHTS) as temporary:
            save_file(weights, temporary)
        if state:
            with atomic_path(path / SCORER) as temporary:
                save_file({k: v.cpu().contiguous() for k, v in state.items()}, temporary)
        config = {
            "scorer": self.scorer.name,
            "options": self.scorer.options(),
            "threshold": self.threshold,
            "recall": self.recall,
            "class_names": self.class_names,
            "model": getattr(self.model, "spec", None),
        }
        write_json(path / CONFIG, config)  # last: a folder with it is whole

    @classmethod
    def load(cls, folder: str | os.PathLike[str], model: nn.Module | None = None) -> "OODDetector":
        """Read a detector.

        Args:
            folder: What `save` wrote.
            model: The model to load the weights into, if it is none of `create_model`'s.

        Raises:
            InputError: If a file is missing or damaged, or does not fit the model.
        """
        path = Path(folder)
        try:
            config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
            spec, name, options = config["model"], config["scorer"], config["options"]
        except FileNotFoundError as error:
            raise InputError(
                f"{path} is not the folder of a detector, such as RUN/best: it has no {CONFIG}"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is not the folder of a detector ({error!r})") from error
        if model is None and spec is None:
            raise InputError(
                f"the model in {path} was not made by create_model; pass it: "
                "OODDetector.load(folder, model)"
            )
        model = model_from_spec(spec) if model is None else model
        load_weights(model, path / WEIGHTS)
        scorer = get_scorer(name, **options)
        if (path / SCORER).is_file() and hasattr(scorer, "load_state"):
            scorer.load_state(_read(path / SCORER))
        detector = cls(model.eval(), scorer, config["threshold"], config["class_names"])
        detector.recall = config["recall"]
        return detector

    def as_pytorch_ood(self) -> "PytorchOODAdapter":
        """The same with the interface of pytorch-ood, where a HIGH score means OUTLIER."""
        return PytorchOODAdapter(self)


class PytorchOODAdapter:
    """A detector with the four methods of pytorch-ood's detectors.

    Scores are ours negated: high means outlier, as pytorch-ood and its metrics have it.

    Args:
        detector: Ours.

    Examples:
        >>> adapter = OODDetector(nn.Linear(3, 2)).as_pytorch_ood()
        >>> adapter.predict_features(torch.zeros(1, 2))
        tensor([-1.3863])
    """

    def __init__(self, detector: OODDetector) -> None:
        self.detector = detector

    def fit(self, loader: Any, device: Any = None) -> "PytorchOODAdapter":
        """Fit on the ID samples of a loader of ``(x, y)``; rows of y that are all < 0 are OOD.

        Raises:
            InputError: If no ID sample is left.
        """
        from edge_ood.loop import collect

        where = None if device is None else torch.device(device)
        needs = self.detector.scorer.requires
        if needs == "inputs":
            return self
        out = collect(self.detector.model, loader, features=needs == "features", device=where)
        return self.fit_features(out.features if needs == "features" else out.logits, out.targets)

    def fit_features(self, x: Tensor, y: Tensor) -> "PytorchOODAdapter":
        """Fit on features (logits, for a score of logits) and labels ``[n, C]`` or ``[n]``."""
        known = ~(y < 0).reshape(len(y), -1).all(1)
        if not bool(known.any()):
            raise InputError("all rows of y are negative, which means OOD; fit needs ID samples")
        self.detector.scorer.fit(x[known], y[known])
        return self

    def predict(self, x: Tensor) -> Tensor:
        """Outlier scores of inputs."""
        return -self.detector.score(x)

    def predict_features(self, x: Tensor) -> Tensor:
        """Outlier scores of features (logits, for a score of logits)."""
        scores: Tensor = self.detector.scorer.score(x)
        return -scores

    __call__ = predict


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a readable safetensors file ({error})") from error


def load_weights(model: nn.Module, path: Path) -> None:
    """Load weights, all of them.

    Raises:
        InputError: If the file is missing, damaged, or does not fit the model.
    """
    try:
        model.load_state_dict(_read(path))
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise InputError(
            f"{path} does not fit the model: {' '.join(lines[1:2] or lines).strip()}"
        ) from error

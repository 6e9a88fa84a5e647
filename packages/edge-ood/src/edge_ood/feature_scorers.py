"""Scorers that read more than the logits of a sample: features, the head, inputs, a fitted model.

`fit` takes ID samples: features ``[n, F]`` (pooled outputs of the backbone) with labels where the
method needs them, or logits for LOF and isolation forests. scikit-learn is imported on first use.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from edge_ood.scorers import LogitScorer, check_scores_input, get_scorer
from shared_core.errors import InputError

__all__ = ["KNN", "LOF", "ODIN", "SCORERS", "IForest", "Mahalanobis", "ReAct", "ViM"]

_CHUNK = 4096


class _Fitted:
    """The base of scorers that learn tensors, named in `learned`, from ID samples."""

    name: ClassVar[str]
    requires: ClassVar[str] = "features"
    learned: ClassVar[tuple[str, ...]] = ()

    def state(self) -> dict[str, Tensor]:
        """What `fit` learned, as tensors that can be saved."""
        self._check_fitted()
        return {key: getattr(self, key) for key in self.learned}

    def load_state(self, state: dict[str, Tensor]) -> "_Fitted":
        """Take what `state` gave."""
        missing = [key for key in self.learned if key not in state]
        if missing:
            raise InputError(f"scorer {self.name}: its saved state lacks {', '.join(missing)}")
        for key in self.learned:
            setattr(self, key, state[key])
        return self

    def _check_fitted(self) -> None:
        if any(getattr(self, key, None) is None for key in self.learned):
            raise InputError(
                f"scorer {self.name} has not been fitted; call fit on ID samples first"
            )

    def _values(self, values: Tensor) -> Tensor:
        self._check_fitted()
        return check_scores_input(values, self.requires)

    def options(self) -> dict[str, Any]:
        """The arguments that make this scorer again."""
        return {}


def _perturb(x: Tensor, loss: Tensor, eps: float, std: Tensor | None) -> Tensor:
    """``x - eps sign(∂loss/∂x) / std``, with sign(0) = 1 as in the published code."""
    [gradient] = torch.autograd.grad(loss, x)
    step = torch.where(gradient >= 0, 1.0, -1.0).to(x.dtype)
    if std is not None:
        step = step / std.to(x).view(1, -1, *[1] * (x.ndim - 2))
    return (x - eps * step).detach()


class ODIN:
    """ODIN for several labels: a small step on the input, then the largest (or summed) probability.

    The step lowers the BCE between the logits and their own decisions at 0.5, of the most likely
    label (``max``) or summed over labels (``sum``), averaged over the batch; the temperature enters
    the score alone.

    Args:
        model: Maps inputs to logits ``[n, C]``. Without it, `score` takes logits and the step is
            left out.
        temperature: T of ``sigmoid(z / T)``.
        eps: Length of the step per input value, before the division by `std`.
        method: ``max`` or ``sum``.
        std: Standard deviations of the channels that the inputs were normalised with.

    Source:
        Liang et al., ICLR 2018, in the multi-label form of Wang et al., NeurIPS 2021.

    Examples:
        >>> ODIN(nn.Linear(3, 2), eps=0.01).score(torch.zeros(4, 3)).shape
        torch.Size([4])
    """

    name: ClassVar[str] = "odin"
    requires: ClassVar[str] = "inputs"

    def __init__(
        self,
        model: Callable[[Tensor], Tensor] | None = None,
        temperature: float = 1.0,
        eps: float = 0.0,
        method: Literal["max", "sum"] = "max",
        std: Tensor | list[float] | None = None,
    ) -> None:
        if not temperature > 0 or eps < 0:
            raise InputError(f"temperature={temperature}, eps={eps}; accepted: T > 0, eps >= 0")
        if method not in ("max", "sum"):
            raise InputError(f"method is {method!r}; accepted: 'max', 'sum'")
        self.model, self.temperature, self.eps, self.method = model, temperature, eps, method
        self.std = None if std is None else torch.as_tensor(std)

    def fit(self, values: Tensor, targets: Tensor | None = None) -> "ODIN":
        """Nothing to learn."""
        return self

    def state(self) -> dict[str, Tensor]:
        """Empty."""
        return {}

    def options(self) -> dict[str, Any]:
        """The arguments that make this scorer again, the model left out."""
        std = None if self.std is None else self.std.tolist()
        given = {"temperature": self.temperature, "eps": self.eps, "method": self.method}
        return {**given, "std": std}

    def score(self, values: Tensor) -> Float[Tensor, " n"]:
        """Score inputs (logits, if there is no model)."""
        if self.model is None and self.eps:
            raise InputError("ODIN with eps > 0 needs the model, for the gradient of the inputs")
        if self.model is None:
            z = check_scores_input(values, "logits")
        else:
            x = values
            if self.eps:
                with torch.enable_grad():
                    x = values.detach().clone().requires_grad_()
                    x = _perturb(x, self._loss(self.model(x)), self.eps, self.std)
            with torch.no_grad():
                z = check_scores_input(self.model(x), "logits")
        probabilities = torch.sigmoid(z / self.temperature)
        return probabilities.amax(1) if self.method == "max" else probabilities.sum(1)

    def _loss(self, z: Tensor) -> Tensor:
        decided = (torch.sigmoid(z.detach() / self.temperature) >= 0.5).to(z.dtype)
        losses = F.binary_cross_entropy_with_logits(z, decided, reduction="none")
        if self.method == "sum":
            return losses.sum(1).mean()
        return losses.gather(1, z.detach().argmax(1, keepdim=True)).mean()


class Mahalanobis(_Fitted):
    """Distance to the nearest class mean under one pooled covariance.

    ``max_c -½ (f - μ_c)ᵀ P (f - μ_c)``. A sample counts once for each of its labels, in the means
    and in the covariance. Sums are taken in one pass, in float64.

    Args:
        reduce: ``max`` over classes, or ``sum``.
        shrinkage: Share s of the isotropic part: ``(1 - s) S + s tr(S)/F I``.

    Source:
        Lee et al., NeurIPS 2018, in the multi-label form of Wang et al., NeurIPS 2021.

    Examples:
        >>> features = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
        >>> scorer = Mahalanobis().fit(features, torch.ones(50, 1))
        >>> bool(scorer.score(features).mean() > scorer.score(features + 9).mean())
        True
    """

    name = "mahalanobis"
    learned = ("means", "whitening")
    means: Tensor
    whitening: Tensor

    def __init__(self, reduce: Literal["max", "sum"] = "max", shrinkage: float = 1e-4) -> None:
        if reduce not in ("max", "sum"):
            raise InputError(f"reduce is {reduce!r}; accepted: 'max', 'sum'")
        if not 0 <= shrinkage <= 1:
            raise InputError(f"shrinkage is {shrinkage}; accepted: 0 to 1")
        self.reduce, self.shrinkage = reduce, shrinkage

    def fit(self, values: Float[Tensor, "n F"], targets: Tensor | None = None) -> "Mahalanobis":
        """Learn from ID features and their labels ``[n, C]``.

        Raises:
            InputError: If there are no labels at all, or their number is not that of the features.
        """
        f = check_scores_input(values, "features").double()
        if targets is None or len(targets) != len(f):
            raise InputError("Mahalanobis needs the labels of its features, one row [C] a sample")
        y = targets.to(f)
        counts = y.sum(0)
        present = counts > 0
        if not bool(present.any()):
            raise InputError("no sample has a label; Mahalanobis needs class means")
        y, counts = y[:, present], counts[present]
        means = (y.T @ f) / counts[:, None]
        weight = y.sum(1)
        # Σ_c Σ_i y_ic (f_i - μ_c)(f_i - μ_c)ᵀ, with features centred first against cancellation.
        center = (weight @ f) / weight.sum()
        g, m = f - center, means - center
        scatter = (g * weight[:, None]).T @ g - (m * counts[:, None]).T @ m
        covariance = scatter / weight.sum()
        size = covariance.shape[0]
        isotropic = covariance.diagonal().mean().clamp(min=1e-12)
        eye = torch.eye(size, dtype=f.dtype, device=f.device)
        covariance = (1 - self.shrinkage) * covariance + self.shrinkage * isotropic * eye
        values_, vectors = torch.linalg.eigh(covariance)
        floor = values_[-1].clamp(min=1e-300) * 1e-12
        self.means = means
        self.whitening = vectors / values_.clamp(min=float(floor)).sqrt()
        return self

    def score(self, values: Float[Tensor, "n F"]) -> Float[Tensor, " n"]:
        """Score features."""
        f = self._values(values).double()
        means = self.means.to(f) @ self.whitening.to(f)
        parts = []
        for chunk in torch.split(f @ self.whitening.to(f), _CHUNK):
            half = -0.5 * torch.cdist(chunk, means) ** 2
            parts.append(half.amax(1) if self.reduce == "max" else half.sum(1))
        return torch.cat(parts).to(values.dtype if values.dtype == torch.float64 else torch.float32)

    def options(self) -> dict[str, Any]:
        """The arguments that make this scorer again."""
        return {"reduce": self.reduce, "shrinkage": self.shrinkage}


class KNN(_Fitted):
    """Minus the distance to the k-th nearest ID feature, of unit length.

    Args:
        k: Which neighbour.
        max_bank: Keep at most this many ID features, chosen evenly.

    Source:
        Sun et al., "Out-of-Distribution Detection with Deep Nearest Neighbors", ICML 2022.

    Examples:
        >>> bank = torch.eye(3)
        >>> KNN(k=1).fit(bank).score(torch.tensor([[2.0, 0.0, 0.0], [-1.0, 0.0, 0.0]]))
        tensor([-0.0000, -1.4142])
    """

    name = "knn"
    learned = ("bank",)
    bank: Tensor

    def __init__(self, k: int = 50, max_bank: int = 50_000) -> None:
        if k < 1 or max_bank < 1:
            raise InputError(f"k={k}, max_bank={max_bank}; both must be at least 1")
        self.k, self.max_bank = k, max_bank

    def fit(self, values: Float[Tensor, "n F"], targets: Tensor | None = None) -> "KNN":
        """Keep ID features."""
        f = F.normalize(check_scores_input(values, "features"), dim=1)
        if len(f) == 0:
            raise InputError("there are no ID features to fit on")
        every = -(-len(f) // self.max_bank)
        self.bank = f[::every].contiguous()
        return self

    def score(self, values: Float[Tensor, "n F"]) -> Float[Tensor, " n"]:
        """Score features, in chunks."""
        f = F.normalize(self._values(values), dim=1)
        bank, k = self.bank.to(f), min(self.k, len(self.bank))
        parts = [
            torch.cdist(chunk, bank).kthvalue(k, dim=1).values for chunk in torch.split(f, _CHUNK)
        ]
        return -torch.cat(parts)

    def options(self) -> dict[str, Any]:
        """The arguments that make this scorer again."""
        return {"k": self.k, "max_bank": self.max_bank}


class ReAct(_Fitted):
    """Features clipped at a percentile of the ID features, then the head, then a logit score.

    Args:
        head: Maps features to logits.
        p: The percentile, in (0, 100].
        base: Name of the logit score.

    Source:
        Sun et al., "ReAct: Out-of-distribution Detection With Rectified Activations", NeurIPS 2021.

    Examples:
        >>> head = nn.Linear(3, 2)
        >>> ReAct(head, p=90).fit(torch.rand(20, 3)).score(torch.rand(4, 3)).shape
        torch.Size([4])
    """

    name = "react"
    learned = ("threshold",)
    threshold: Tensor

    def __init__(
        self,
        head: Callable[[Tensor], Tensor] | None = None,
        p: int | float = 90,
        base: str = "joint_energy",
    ) -> None:
        if not 0 < p <= 100:
            raise InputError(f"p is {p}; it has to lie in (0, 100]")
        self.head, self.p, self.base = head, p, base
        self._base = _logit_scorer(base)

    def fit(self, values: Float[Tensor, "n F"], targets: Tensor | None = None) -> "ReAct":
        """Learn the threshold from ID features."""
        flat = check_scores_input(values, "features").flatten()
        if flat.numel() == 0:
            raise InputError("there are no ID features to fit on")
        # torch.quantile is limited to 2**24 values.
        place = max(1, min(flat.numel(), round(self.p / 100 * flat.numel())))
        self.threshold = flat.kthvalue(place).values
        return self

    @torch.no_grad()
    def score(self, values: Float[Tensor, "n F"]) -> Float[Tensor, " n"]:
        """Score features."""
        if self.head is None:
            raise InputError("ReAct needs the model's head: ReAct(head=...)")
        f = self._values(values)
        return self._base.score(self.head(f.minimum(self.threshold.to(f))))

    def options(self) -> dict[str, Any]:
        """The arguments that make this scorer again, the head left out."""
        return {"p": self.p, "base": self.base}


class ViM(_Fitted):
    """Virtual-logit matching: the logit score minus α times the norm outside the ID subspace.

    Args:
        head: The last linear layer; features are centred where it gives zero logits.
        dim: Dimension of the ID subspace; by default half the features, at most 1000.
        base: The logit score, ``logsumexp`` as published or ``joint_energy``.

    Source:
        Wang et al., "ViM: Out-Of-Distribution with Virtual-logit Matching", CVPR 2022.

    Examples:
        >>> scorer = ViM(nn.Linear(6, 2)).fit(torch.randn(40, 6))
        >>> scorer.score(torch.randn(4, 6)).shape
        torch.Size([4])
    """

    name = "vim"
    learned = ("origin", "residual", "alpha")
    origin: Tensor
    residual: Tensor
    alpha: Tensor

    def __init__(
        self, head: nn.Linear | None = None, dim: int | None = None, base: str = "logsumexp"
    ) -> None:
        if head is not None and not isinstance(head, nn.Linear):
            raise InputError(
                f"ViM needs a linear head, not {type(head).__name__}; of a head with hidden layers "
                "pass its last layer, and as features the input of that layer"
            )
        self.head, self.dim, self.base = head, dim, base
        self._base = _logit_scorer(base)

    def _linear(self) -> nn.Linear:
        if self.head is None:
            raise InputError("ViM needs the model's last linear layer: ViM(head=...)")
        return self.head

    @torch.no_grad()
    def fit(self, values: Float[Tensor, "n F"], targets: Tensor | None = None) -> "ViM":
        """Learn the subspace and α from ID features."""
        head, f = self._linear(), check_scores_input(values, "features")
        weight = head.weight.double()
        bias = weight.new_zeros(len(weight)) if head.bias is None else head.bias.double()
        origin = -torch.linalg.pinv(weight) @ bias
        centered = f.double() - origin
        size = f.shape[1]
        dim = min(size // 2, 1000) if self.dim is None else self.dim
        if not 0 <= dim < size:
            raise InputError(f"dim is {dim} for {size} features; it has to lie in [0, {size - 1}]")
        _, vectors = torch.linalg.eigh(centered.T @ centered / max(1, len(f)))
        residual = vectors[:, : size - dim]
        norms = (centered @ residual).norm(dim=1)
        largest = head(f).amax(1).double()
        self.origin, self.residual = origin, residual
        self.alpha = largest.mean() / norms.mean().clamp(min=1e-12)
        return self

    @torch.no_grad()
    def score(self, values: Float[Tensor, "n F"]) -> Float[Tensor, " n"]:
        """Score features."""
        f = self._values(values)
        wide = f.double()
        norm = ((wide - self.origin.to(wide)) @ self.residual.to(wide)).norm(dim=1)
        score: Tensor = self._base.score(self._linear()(f))
        score = score - (self.alpha.to(wide) * norm).to(f.dtype)
        return score

    def options(self) -> dict[str, Any]:
        """The arguments that make this scorer again, the head left out."""
        return {"dim": self.dim, "base": self.base}


class _Sklearn:
    """A scikit-learn novelty detector on logits, fitted on held-out ID logits."""

    name: ClassVar[str]
    requires: ClassVar[str] = "logits"

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._model: Any = None

    def _make(self) -> Any:
        raise NotImplementedError

    def fit(self, values: Float[Tensor, "n C"], targets: Tensor | None = None) -> "_Sklearn":
        """Fit on ID logits."""
        z = check_scores_input(values, "logits")
        self._model = self._make().fit(z.double().cpu().numpy())
        return self

    def score(self, values: Float[Tensor, "n C"]) -> Float[Tensor, " n"]:
        """Score logits."""
        if self._model is None:
            raise InputError(f"scorer {self.name} has not been fitted; call fit on ID logits first")
        z = check_scores_input(values, "logits")
        return torch.from_numpy(self._model.score_samples(z.double().cpu().numpy())).float()

    def state(self) -> dict[str, Tensor]:
        """Refused: scikit-learn's models can only be pickled.

        Raises:
            InputError: Always.
        """
        raise InputError(
            f"scorer {self.name} cannot be saved without pickle; keep its ID logits and fit again"
        )

    def options(self) -> dict[str, Any]:
        """The arguments that make this scorer again."""
        return dict(self._options)


class LOF(_Sklearn):
    """Local outlier factor of the logits (Breunig et al., SIGMOD 2000), by scikit-learn.

    Args:
        options: Of `sklearn.neighbors.LocalOutlierFactor`.

    Examples:
        >>> z = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
        >>> bool(LOF().fit(z).score(z).mean() > LOF().fit(z).score(z + 20).mean())
        True
    """

    name = "lof"

    def _make(self) -> Any:
        from sklearn.neighbors import LocalOutlierFactor

        return LocalOutlierFactor(**{"n_neighbors": 20, **self._options, "novelty": True})


class IForest(_Sklearn):
    """Isolation forest of the logits (Liu et al., ICDM 2008), by scikit-learn.

    Args:
        options: Of `sklearn.ensemble.IsolationForest`.

    Examples:
        >>> z = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
        >>> scorer = IForest(n_estimators=10).fit(z)
        >>> bool(scorer.score(z).mean() > scorer.score(z + 20).mean())
        True
    """

    name = "iforest"

    def _make(self) -> Any:
        from sklearn.ensemble import IsolationForest

        return IsolationForest(**{"random_state": 0, **self._options})


def _logit_scorer(name: str) -> LogitScorer:
    scorer = get_scorer(name)
    if not isinstance(scorer, LogitScorer):
        raise InputError(f"base is {name!r}, which is no logit score")
    return scorer


SCORERS: dict[str, Any] = {s.name: s for s in (LOF, IForest, Mahalanobis, KNN, ReAct, ViM, ODIN)}

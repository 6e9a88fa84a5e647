"""Scores that say how in-distribution a sample is, from the logits alone; HIGH means ID.

All scorers have the same two methods: `fit` learns what it needs from ID samples (nothing here) and
`score` gives one number per sample. Scorers of features and of inputs are in
`edge_ood.feature_scorers`.
"""

from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from edge_ood.energy import joint_energy, label_energies
from shared_core.errors import InputError

__all__ = [
    "LOGIT_SCORERS",
    "MSP",
    "JointEnergy",
    "LogSumExp",
    "LogitScorer",
    "MaxEnergy",
    "MaxLogit",
    "MaxProb",
    "Scorer",
    "SumProb",
    "TopKEnergy",
    "check_scores_input",
    "get_scorer",
    "list_scorers",
]


@runtime_checkable
class Scorer(Protocol):
    """What every scorer can do.

    Attributes:
        name: Its name in `get_scorer`.
        requires: What `fit` and `score` read: ``logits``, ``features`` or ``inputs``.
    """

    name: ClassVar[str]
    requires: ClassVar[str]

    def fit(self, values: Tensor, targets: Tensor | None = None) -> "Scorer":
        """Learn from ID samples, ``[n, ...]``."""
        ...

    def score(self, values: Tensor) -> Tensor:
        """One score per sample, ``[n]``; high means ID."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What `fit` learned, as tensors that can be saved."""
        ...


def check_scores_input(values: Tensor, name: str) -> Tensor:
    """Half precision as float32; anything but a table of numbers is refused.

    Raises:
        InputError: Saying what was given.
    """
    if values.ndim != 2 or values.shape[1] == 0 or not values.is_floating_point():
        raise InputError(
            f"{name} have shape {list(values.shape)} and dtype {values.dtype}; accepted: "
            "floating point, one row per sample"
        )
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


class LogitScorer:
    """The base of scorers that need nothing but logits ``[n, C]``."""

    name: ClassVar[str]
    requires: ClassVar[str] = "logits"

    def fit(self, values: Tensor, targets: Tensor | None = None) -> "LogitScorer":
        """Nothing to learn."""
        return self

    def score(self, values: Float[Tensor, "n C"]) -> Float[Tensor, " n"]:
        """Score logits."""
        return self._score(check_scores_input(values, "logits"))

    def _score(self, z: Tensor) -> Tensor:
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """Empty."""
        return {}

    def options(self) -> dict[str, Any]:
        """The arguments that make this scorer again."""
        return {}


class JointEnergy(LogitScorer):
    """Sum over labels of ``log(1 + exp(z_c))``; see `edge_ood.joint_energy`.

    Examples:
        >>> JointEnergy().score(torch.zeros(1, 2))
        tensor([1.3863])
    """

    name = "joint_energy"

    def _score(self, z: Tensor) -> Tensor:
        return joint_energy(z)


class MaxEnergy(LogitScorer):
    """Largest label energy.

    Examples:
        >>> MaxEnergy().score(torch.zeros(1, 2))
        tensor([0.6931])
    """

    name = "max_energy"

    def _score(self, z: Tensor) -> Tensor:
        return label_energies(z).amax(1)


class TopKEnergy(LogitScorer):
    """Sum of the k largest label energies.

    Args:
        k: From 1 (`MaxEnergy`) to the number of labels (`JointEnergy`).

    Examples:
        >>> TopKEnergy(1).score(torch.zeros(1, 2))
        tensor([0.6931])
    """

    name = "topk_energy"

    def __init__(self, k: int = 5) -> None:
        if k < 1:
            raise InputError(f"k is {k}; it must be at least 1")
        self.k = k

    def _score(self, z: Tensor) -> Tensor:
        return label_energies(z).topk(min(self.k, z.shape[1]), dim=1).values.sum(1)

    def options(self) -> dict[str, Any]:
        """The arguments that make this scorer again."""
        return {"k": self.k}


class MaxLogit(LogitScorer):
    """Largest logit (Hendrycks et al., ICML 2022).

    Examples:
        >>> MaxLogit().score(torch.tensor([[1.0, 2.0]]))
        tensor([2.])
    """

    name = "max_logit"

    def _score(self, z: Tensor) -> Tensor:
        return z.amax(1)


class MSP(LogitScorer):
    """Largest softmax probability (Hendrycks and Gimpel, ICLR 2017).

    Examples:
        >>> MSP().score(torch.zeros(1, 2))
        tensor([0.5000])
    """

    name = "msp"

    def _score(self, z: Tensor) -> Tensor:
        return z.softmax(1).amax(1)


class MaxProb(LogitScorer):
    """Largest sigmoid probability.

    Examples:
        >>> MaxProb().score(torch.zeros(1, 2))
        tensor([0.5000])
    """

    name = "max_prob"

    def _score(self, z: Tensor) -> Tensor:
        return z.sigmoid().amax(1)


class SumProb(LogitScorer):
    """Sum of the sigmoid probabilities.

    Examples:
        >>> SumProb().score(torch.zeros(1, 2))
        tensor([1.])
    """

    name = "sum_prob"

    def _score(self, z: Tensor) -> Tensor:
        return z.sigmoid().sum(1)


class LogSumExp(LogitScorer):
    """The multi-class free energy ``log Σ exp(z_c)`` (Liu et al., NeurIPS 2020).

    Examples:
        >>> LogSumExp().score(torch.zeros(1, 2))
        tensor([0.6931])
    """

    name = "logsumexp"

    def _score(self, z: Tensor) -> Tensor:
        return z.logsumexp(1)


LOGIT_SCORERS: dict[str, type[LogitScorer]] = {
    scorer.name: scorer
    for scorer in (
        JointEnergy,
        MaxEnergy,
        TopKEnergy,
        MaxLogit,
        MSP,
        MaxProb,
        SumProb,
        LogSumExp,
    )
}


def _all_scorers() -> dict[str, Any]:
    from edge_ood import feature_scorers

    return {**LOGIT_SCORERS, **feature_scorers.SCORERS}


def get_scorer(name: str, **options: Any) -> Any:
    """Make a scorer by name.

    Args:
        name: One of `list_scorers`.
        options: Its arguments.

    Raises:
        InputError: If there is no such scorer, or it takes no such argument.

    Examples:
        >>> get_scorer("topk_energy", k=3).k
        3
    """
    known = _all_scorers()
    if name not in known:
        raise InputError(f"no scorer is called {name!r}; accepted: {', '.join(known)}")
    try:
        return known[name](**options)
    except TypeError as error:
        raise InputError(f"scorer {name}: {error}") from error


def list_scorers(requires: str | None = None) -> list[str]:
    """Names of the scorers, all or those that need ``logits``, ``features`` or ``inputs``.

    Examples:
        >>> list_scorers("logits")[:3]
        ['joint_energy', 'max_energy', 'topk_energy']
        >>> list_scorers("inputs")
        ['odin']
    """
    return [n for n, s in _all_scorers().items() if requires in (None, s.requires)]

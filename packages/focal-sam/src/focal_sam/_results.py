"""What the functions of `focal_sam.analysis` return."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class GroupResult:
    """What every result says about its groups.

    Attributes:
        groups: The classes of each group.
        counts: Samples of each group.
        losses: Mean loss of each group at θ.
        empty: The groups without samples; their numbers are NaN.
        eval_mode: Whether the model ran in evaluation mode.
    """

    groups: dict[str, list[int]]
    counts: dict[str, int]
    losses: dict[str, float]
    empty: list[str]
    eval_mode: bool

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, strings, lists and dicts."""
        return asdict(self)


@dataclass(frozen=True)
class ClassSharpness(GroupResult):
    """What `class_sharpness` returns, beside `groups`, `counts`, `losses`, `empty`, `eval_mode`.

    Attributes:
        sharpness: ``L_g(θ + ε) - L_g(θ)`` of each group, for ``"random"`` its mean.
        standard_error: Of that mean; NaN for ``"ascent"`` and for a single direction.
        rho: The radius ``||ε||``.
        mode: ``"ascent"`` or ``"random"``.
        samples: Number of directions.
    """

    sharpness: dict[str, float]
    standard_error: dict[str, float]
    rho: float
    mode: str
    samples: int


@dataclass(frozen=True)
class HessianEigenvalues(GroupResult):
    """What `class_hessian_eigs` returns, beside `groups`, `counts`, `losses`, `empty`, `eval_mode`.

    Attributes:
        top: The k largest eigenvalues of each group, descending (none for ``which="bottom"``).
        bottom: The k smallest, ascending (none for ``which="top"``). Negative ones show a saddle.
        converged: Whether the tolerance was reached.
        products: Hessian-vector products it took.
        backend: ``"lanczos"`` or ``"curvlinops"``.
    """

    top: dict[str, list[float]]
    bottom: dict[str, list[float]]
    converged: dict[str, bool]
    products: dict[str, int]
    backend: str


@dataclass(frozen=True)
class ClassSpectrum(GroupResult):
    """What `class_spectrum` returns, beside `groups`, `counts`, `losses`, `empty`, `eval_mode`.

    Attributes:
        grid: Eigenvalues at which the density is given, ``[points]``, shared by all groups.
        density: Spectral density of each group, ``[points]``; it integrates to 1.
        ritz_values: Nodes of the quadrature of each group, one list per random vector.
        ritz_weights: Their weights; each list sums to 1.
        bandwidth: Standard deviation of the Gaussian each node is drawn out to.
        dimension: Number of trainable parameters, that is of eigenvalues.
    """

    grid: list[float]
    density: dict[str, list[float]]
    ritz_values: dict[str, list[list[float]]]
    ritz_weights: dict[str, list[list[float]]]
    bandwidth: float
    dimension: int


@dataclass(frozen=True)
class ClassTrace(GroupResult):
    """What `hutchinson_trace` returns, beside `groups`, `counts`, `losses`, `empty`, `eval_mode`.

    Attributes:
        trace: Estimated trace of each group's Hessian.
        standard_error: Of the estimate; NaN for a single random vector.
        samples: Number of random vectors.
        dimension: Number of trainable parameters.
    """

    trace: dict[str, float]
    standard_error: dict[str, float]
    samples: int
    dimension: int


@dataclass(frozen=True)
class LossSurface(GroupResult):
    """What `loss_surface_2d` returns, beside `groups`, `counts`, `losses`, `empty`, `eval_mode`.

    Attributes:
        coordinates: Steps along either direction, ``[steps]``; 1 is the length of the weights.
        surface: Mean loss of each group, ``[steps][steps]``: row i, column j is the loss at
            ``θ + coordinates[j] d_1 + coordinates[i] d_2``.
    """

    coordinates: list[float]
    surface: dict[str, list[list[float]]]

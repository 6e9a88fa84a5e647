"""Eigenvalues and spectral quadrature of a symmetric operator known by its products."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from focal_sam._surface import GroupLoss
from shared_core.errors import InputError, MissingExtraError

Which = Literal["top", "bottom", "both"]
Product = Callable[[Tensor], Tensor]

CHUNK = 32


class _Basis:
    """Orthonormal vectors, kept in chunks so that memory grows with the number there is."""

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []
        self.size = 0

    def append(self, vector: Tensor) -> None:
        row = self.size % CHUNK
        if row == 0:
            self._chunks.append(vector.new_empty(CHUNK, len(vector)))
        self._chunks[-1][row] = vector
        self.size += 1

    def __getitem__(self, index: int) -> Tensor:
        return self._chunks[index // CHUNK][index % CHUNK]

    def remove_from(self, vector: Tensor) -> Tensor:
        """The part of `vector` orthogonal to the basis. Twice is enough (Kahan, Parlett)."""
        for _ in range(2):
            for number, chunk in enumerate(self._chunks):
                rows = chunk[: self.size - number * CHUNK]
                vector = vector - rows.T @ (rows @ vector)
        return vector


class Lanczos:
    """Lanczos with full re-orthogonalisation from one or several start vectors.

    With b start vectors this is band Lanczos (Ruhe, 1979): each step orthogonalises the product
    with the next basis vector, and the projection of the operator has b off-diagonals. It finds
    eigenvalues of multiplicity up to b, of which one start vector would find one copy.

    Args:
        product: The operator, ``[P]`` to ``[P]``.
        starts: Start vectors, ``[b][P]``.
        wide: The dtype of the projection.

    Attributes:
        steps: Products taken.
    """

    def __init__(
        self,
        product: Product,
        starts: list[Tensor],
        wide: torch.dtype,
    ) -> None:
        self._product, self._wide = product, wide
        self._width = len(starts)
        self._dimension = len(starts[0])
        self._tiny = 100 * torch.finfo(starts[0].dtype).eps
        self._basis = _Basis()
        # Column j holds the coefficients of A q_j on q_j and the vectors after it.
        self._columns: list[list[float]] = []
        self._scale = 0.0
        for start in starts:
            vector = self._basis.remove_from(start)
            self._basis.append(vector / torch.linalg.vector_norm(vector))

    @property
    def steps(self) -> int:
        return len(self._columns)

    @property
    def exhausted(self) -> bool:
        """Whether the basis spans all that can be reached."""
        return self.steps == self._basis.size

    def step(self) -> None:
        """Take one more product."""
        j = self.steps
        vector = self._product(self._basis[j]).to(self._wide)
        if not vector.isfinite().all():
            raise InputError(
                "a Hessian-vector product is not finite: the loss has no second derivative at "
                "these parameters (a square root or a norm at 0, for example)"
            )
        # Only the neighbours in the band have true coefficients; the rest is rounding.
        first, last = max(0, j - self._width), self._basis.size
        neighbours = torch.stack([self._basis[i] for i in range(first, last)]).to(self._wide)
        coefficients = neighbours @ vector
        vector = vector - neighbours.T @ coefficients
        column: list[float] = coefficients[j - first :].tolist()
        self._scale = max(self._scale, torch.linalg.vector_norm(coefficients).item())
        self._columns.append(column)
        if last == self._dimension:
            return
        rest = self._basis.remove_from(vector.to(self._basis[0].dtype))
        norm = torch.linalg.vector_norm(rest, dtype=self._wide).item()
        if norm > self._tiny * self._scale:
            column.append(norm)
            self._basis.append(rest / norm)

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values, ascending, the residual norm of each, and its vector's first component.

        Returns:
            Three float64 tensors ``[steps]`` on the CPU.
        """
        m = self.steps
        projection = torch.zeros(self._basis.size, m, dtype=torch.float64)
        for j, column in enumerate(self._columns):
            values = torch.tensor(column, dtype=torch.float64)
            projection[j : j + len(column), j] = values
            projection[j, j : j + len(column)] = values[: m - j]
        values, vectors = torch.linalg.eigh(projection[:m])
        residuals = torch.linalg.vector_norm(projection[m:] @ vectors, dim=0)
        return values, residuals, vectors[0]


@dataclass(frozen=True)
class Extremes:
    """The ends of a spectrum: largest first, smallest first."""

    top: list[float]
    bottom: list[float]
    products: int
    converged: bool


def _ends(values: Tensor, k: int, which: Which) -> tuple[list[float], list[float]]:
    """The k largest, descending, and the k smallest, ascending, of ascending values."""
    top = values.flip(0)[:k].tolist() if which != "bottom" else []
    bottom = values[:k].tolist() if which != "top" else []
    return top, bottom


def lanczos_extremes(
    loss: GroupLoss, k: int, which: Which, *, tol: float, max_iter: int, seed: int
) -> Extremes:
    """The k largest and smallest eigenvalues of the Hessian of `loss`."""
    space = loss.space
    generator = torch.Generator().manual_seed(seed)
    starts = [space.random_vector(generator) for _ in range(k)]
    lanczos = Lanczos(loss.hessian_product, starts, space.wide)
    # Fewer Ritz values than this cannot show both ends.
    least = min(space.dimension, 2 * k + 2)
    converged = False
    while not converged and not lanczos.exhausted and lanczos.steps < max(max_iter, k):
        lanczos.step()
        if lanczos.exhausted or (lanczos.steps >= least and lanczos.steps % 4 == 0):
            converged = _converged(lanczos, k, which, tol)
    values, _, _ = lanczos.ritz()
    top, bottom = _ends(values, k, which)
    return Extremes(top, bottom, lanczos.steps, converged or lanczos.exhausted)


def _converged(lanczos: Lanczos, k: int, which: Which, tol: float) -> bool:
    values, residuals, _ = lanczos.ritz()
    # An eigenvalue that is next to nothing beside the largest is not resolved any further.
    allowed = tol * values.abs().clamp_min(1e-3 * values.abs().max())
    fine = residuals <= allowed
    top = bool(fine[-k:].all()) or which == "bottom"
    bottom = bool(fine[:k].all()) or which == "top"
    return top and bottom


class _GroupCriterion(nn.Module):
    """A criterion as curvlinops takes it: summed, over a group."""

    reduction = "sum"

    def __init__(self, loss: GroupLoss) -> None:
        super().__init__()
        self._criterion = loss.space.criterion
        self._member, self._count = loss._member, loss.count

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        losses = self._criterion(logits, target)[self._member[target]]
        return losses.sum() / self._count


class _Batches:
    """The batches of a group, to be walked any number of times."""

    def __init__(self, loss: GroupLoss) -> None:
        self._loss = loss

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        for x, y, _ in self._loss.batches():
            yield x, y


def has_curvlinops() -> bool:
    """Whether the extra is installed."""
    try:
        import curvlinops  # noqa: F401
        import scipy.sparse.linalg  # noqa: F401
    except ImportError:
        return False
    return True


def curvlinops_extremes(
    loss: GroupLoss, k: int, which: Which, *, tol: float, max_iter: int, seed: int
) -> Extremes:
    """As `lanczos_extremes`, by curvlinops' Hessian and scipy's ARPACK."""
    if not has_curvlinops():
        raise MissingExtraError("focal-sam", "analysis", "curvlinops-for-pytorch with scipy")
    import numpy as np
    from curvlinops import HessianLinearOperator
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    space = loss.space
    hessian = HessianLinearOperator(
        space.model,
        _GroupCriterion(loss),
        space.parameters,
        _Batches(loss),
        check_deterministic=False,
        num_data=loss.count,
    ).to_scipy()
    products = 0

    def product(vector: Any) -> Any:
        nonlocal products
        products += 1
        return hessian @ vector.reshape(-1).astype(hessian.dtype)

    size = space.dimension
    wanted = 2 * k if which == "both" else k
    if wanted >= size:  # ARPACK wants fewer than there are
        dense = np.stack([product(row) for row in np.eye(size)])
        values = np.linalg.eigvalsh((dense + dense.T) / 2)
        return Extremes(*_ends(torch.from_numpy(values), k, which), products, True)
    generator = torch.Generator().manual_seed(seed)
    start = space.random_vector(generator).cpu().double().numpy()
    converged = True
    try:
        values = eigsh(
            LinearOperator((size, size), matvec=product, dtype=np.float64),
            k=wanted,
            which={"both": "BE", "top": "LA", "bottom": "SA"}[which],
            v0=start,
            tol=tol,
            maxiter=max_iter,
            return_eigenvectors=False,
        )
    except ArpackNoConvergence:
        converged, values = False, np.full(wanted, np.nan)
    ordered = torch.from_numpy(np.sort(values))
    return Extremes(*_ends(ordered, k, which), products, converged)


def quadrature(loss: GroupLoss, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the spectral measure of `start`, from `steps` products.

    Returns:
        Eigenvalue estimates and their weights, which sum to 1, float64 on the CPU.
    """
    lanczos = Lanczos(loss.hessian_product, [start], loss.space.wide)
    while lanczos.steps < steps and not lanczos.exhausted:
        lanczos.step()
    values, _, first = lanczos.ritz()
    return values, first**2

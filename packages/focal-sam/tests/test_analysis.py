"""Sharpness, curvature and surfaces of each class's loss, against dense derivations."""

import copy
import json
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian
from torch.utils.data import DataLoader, TensorDataset

from focal_sam.analysis import (
    class_hessian_eigs,
    class_sharpness,
    class_spectrum,
    hutchinson_trace,
    loss_surface_2d,
)
from shared_core.errors import InputError
from shared_core.run import to_plain
from shared_core.testing import examples

# Forward-mode derivatives make torch import a module that scripts functions, once per process.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:.torch.jit.script. is deprecated:FutureWarning",
    r"ignore:.torch.jit.script. is deprecated:DeprecationWarning",
)

CALLS: dict[str, Callable[..., Any]] = {
    "ascent": lambda m, d, **o: class_sharpness(m, d, 0.2, **o),
    "random": lambda m, d, **o: class_sharpness(m, d, 0.2, mode="random", samples=3, **o),
    "eigs": lambda m, d, **o: class_hessian_eigs(m, d, **o),
    "spectrum": lambda m, d, **o: class_spectrum(m, d, samples=2, steps=5, **o),
    "trace": lambda m, d, **o: hutchinson_trace(m, d, samples=3, **o),
    "surface": lambda m, d, **o: loss_surface_2d(m, d, steps=3, **o),
}
GROUPS = {"head": [0, 1], "tail": [2], "all": [0, 1, 2]}


def data(n: int = 40, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(n, 4, generator=generator, dtype=dtype)
    y = torch.multinomial(torch.tensor([0.6, 0.3, 0.1]), n, True, generator=generator)
    y[:3] = torch.arange(3)
    return x, y


def mlp(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


@pytest.fixture
def without_shape_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run as outside the tests: wrong arguments reach our own checks, and nothing draws random
    numbers to choose which element of a list to check."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


class Dense:
    """The group loss as a function of a flat float64 vector, derived with torch.func."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, classes: list[int]) -> None:
        self.model = copy.deepcopy(model).double().eval()
        keep = torch.isin(y, torch.tensor(classes))
        self.x, self.y = x[keep].double(), y[keep]
        named = {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}
        self.shapes = {n: p.shape for n, p in named.items()}
        self.theta = torch.cat([p.flatten() for p in named.values()])

    def loss(self, theta: Tensor) -> Tensor:
        pieces = theta.split([s.numel() for s in self.shapes.values()])
        given_ = {n: v.view(s) for (n, s), v in zip(self.shapes.items(), pieces, strict=True)}
        return F.cross_entropy(functional_call(self.model, given_, (self.x,)), self.y)

    def eigenvalues(self) -> Tensor:
        return torch.linalg.eigvalsh(hessian(self.loss)(self.theta))

    def sharpness(self, rho: float) -> float:
        slope = grad(self.loss)(self.theta)
        moved = self.theta + rho * slope / slope.norm()
        return (self.loss(moved) - self.loss(self.theta)).item()


class Quadratic(nn.Module):
    """Class c has the loss ``½ θᵀ A_c θ + b_c·θ`` with `pick` as criterion."""

    def __init__(self, matrices: list[Tensor], theta: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("A", torch.stack(matrices))
        size = len(matrices[0])
        self.theta = nn.Parameter(torch.zeros(size).double() if theta is None else theta)

    def forward(self, x: Tensor) -> Tensor:
        values = 0.5 * torch.einsum("i,cij,j->c", self.theta, self.A, self.theta)
        return values.expand(len(x), -1)


def pick(logits: Tensor, y: Tensor) -> Tensor:
    return logits.gather(1, y[:, None])[:, 0]


def with_spectrum(values: list[float], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = len(values)
    q = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    return q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q.T


def one_of_each(classes: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.zeros(classes, 1), torch.arange(classes))]


# Sharpness


@pytest.mark.smoke
@pytest.mark.parametrize("rho", [1e-3, 0.3])
def test_ascent_sharpness_equals_its_definition(rho: float) -> None:
    model, (x, y) = mlp(), data()
    result = class_sharpness(model, [(x, y)], rho, groups=GROUPS)
    for name, classes in GROUPS.items():
        dense = Dense(model, x, y, classes)
        assert result.sharpness[name] == pytest.approx(dense.sharpness(rho), rel=1e-9)
        assert result.losses[name] == pytest.approx(dense.loss(dense.theta).item(), rel=1e-12)
        assert result.counts[name] == len(dense.y)
    assert (result.rho, result.mode, result.groups) == (rho, "ascent", GROUPS)


def test_by_default_every_class_is_a_group() -> None:
    model, (x, y) = mlp(), data()
    result = class_sharpness(model, [(x, y)], 0.1)
    assert result.groups == {"0": [0], "1": [1], "2": [2]}
    assert result.sharpness["2"] == pytest.approx(Dense(model, x, y, [2]).sharpness(0.1))


def test_a_criterion_of_ones_own_is_used() -> None:
    model, batches = mlp(), [data()]
    twice = class_sharpness(
        model, batches, 0.1, criterion=lambda z, y: 2 * F.cross_entropy(z, y, reduction="none")
    )
    once = class_sharpness(model, batches, 0.1)
    assert twice.sharpness["0"] == pytest.approx(2 * once.sharpness["0"], rel=1e-12)


@pytest.mark.parametrize("mode", ["ascent", "random"])
def test_no_radius_no_sharpness(mode: Any) -> None:
    result = class_sharpness(mlp(), [data()], 0.0, mode=mode, samples=2)
    assert set(result.sharpness.values()) == {0.0}


def test_a_stationary_point_has_no_direction_up() -> None:
    model = Quadratic([torch.eye(4).double()])
    assert class_sharpness(model, one_of_each(1), 0.5, criterion=pick).sharpness == {"0": 0.0}


@pytest.mark.parametrize("rho", [0.1, 2.0])
def test_random_directions_have_length_rho(rho: float) -> None:
    # Around 0, ½||ε||² is ρ²/2 in every direction.
    model = Quadratic([torch.eye(6).double(), 3 * torch.eye(6).double()])
    result = class_sharpness(model, one_of_each(2), rho, criterion=pick, mode="random", samples=4)
    assert result.sharpness["0"] == pytest.approx(rho**2 / 2, rel=1e-6)
    assert result.sharpness["1"] == pytest.approx(3 * rho**2 / 2, rel=1e-6)
    assert result.standard_error["0"] == pytest.approx(0, abs=1e-6 * rho**2)


def test_random_sharpness_averages_the_trace_within_its_standard_error() -> None:
    matrix = with_spectrum([5.0, 1.0, 0.5, 0.0, -1.0, 0.25])
    model = Quadratic([matrix])
    result = class_sharpness(model, one_of_each(1), 1.0, criterion=pick, mode="random", samples=300)
    expected = matrix.trace().item() / 12
    assert abs(result.sharpness["0"] - expected) < 5 * result.standard_error["0"]
    # The variance of ½ uᵀAu over the unit sphere in n dimensions.
    n, trace = 6, matrix.trace().item()
    variance = 0.25 * 2 * ((matrix @ matrix).trace().item() - trace**2 / n) / (n * (n + 2))
    assert result.standard_error["0"] == pytest.approx(math.sqrt(variance / 300), rel=0.3)


def test_filter_normalised_random_directions_have_length_rho_too() -> None:
    model = mlp()
    start = [p.detach().clone() for p in model.parameters()]
    seen: list[Tensor] = []

    def watching(logits: Tensor, y: Tensor) -> Tensor:
        seen.append(
            torch.stack([(p - s).norm() for p, s in zip(model.parameters(), start, strict=True)])
        )
        return F.cross_entropy(logits, y, reduction="none")

    class_sharpness(
        model,
        [data()],
        0.4,
        criterion=watching,
        mode="random",
        samples=2,
        filter_normalized=True,
    )
    for lengths in seen[1:]:
        assert lengths.norm().item() == pytest.approx(0.4, rel=1e-6)
        assert lengths[1] == lengths[3] == 0  # biases
        ratio = start[0].norm() / start[2].norm()
        assert (lengths[0] / lengths[2]).item() == pytest.approx(ratio.item(), rel=1e-6)


# Eigenvalues


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 3])
def test_eigenvalues_match_a_dense_decomposition(dtype: torch.dtype, k: int) -> None:
    model, (x, y) = mlp(dtype), data(dtype=dtype)
    result = class_hessian_eigs(model, [(x, y)], k, groups=GROUPS)
    for name, classes in GROUPS.items():
        expected = Dense(model, x, y, classes).eigenvalues()
        scale = expected.abs().max().item()
        assert result.top[name] == pytest.approx(
            expected.flip(0)[:k].tolist(), rel=1e-3, abs=1e-6 * scale
        )
        assert result.bottom[name] == pytest.approx(
            expected[:k].tolist(), rel=1e-3, abs=1e-6 * scale
        )
        assert result.converged[name]
    assert result.bottom["all"][0] < -1e-3  # the test has a saddle to find


def test_eigenvalues_of_a_larger_model_converge_long_before_its_dimension() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 24), nn.Tanh(), nn.Linear(24, 3)).double()
    x, y = data(60)
    result = class_hessian_eigs(model, [(x, y)], 2, groups={"all": [0, 1, 2]})
    expected = Dense(model, x, y, [0, 1, 2]).eigenvalues()
    assert result.top["all"] == pytest.approx(expected.flip(0)[:2].tolist(), rel=1e-3)
    assert result.bottom["all"] == pytest.approx(expected[:2].tolist(), rel=1e-3)
    assert result.products["all"] < len(expected) / 2


@pytest.mark.parametrize(("which", "top", "bottom"), [("top", 2, 0), ("bottom", 0, 2)])
def test_one_end_alone(which: Any, top: int, bottom: int) -> None:
    model, (x, y) = mlp(), data()
    result = class_hessian_eigs(model, [(x, y)], 2, which=which, groups={**GROUPS})
    expected = Dense(model, x, y, [0, 1]).eigenvalues()
    assert result.top["head"] == pytest.approx(expected.flip(0)[:top].tolist(), rel=1e-3)
    assert result.bottom["head"] == pytest.approx(expected[:bottom].tolist(), rel=1e-3)


def test_repeated_eigenvalues_are_found_as_often_as_they_occur() -> None:
    values = [3.0, 3.0, 3.0, 1.0, 0.0, 0.0, 0.0, -2.0, -2.0, *[0.1 * i for i in range(30)]]
    model = Quadratic([with_spectrum(values)])
    result = class_hessian_eigs(model, one_of_each(1), 3, criterion=pick)
    assert result.top["0"] == pytest.approx([3.0, 3.0, 3.0], rel=1e-3)
    assert result.bottom["0"] == pytest.approx([-2.0, -2.0, 0.0], rel=1e-3, abs=1e-3)


def test_the_null_space_of_a_softmax_regression_shows() -> None:
    # Adding a vector to all rows changes nothing: 5 directions without curvature.
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    result = class_hessian_eigs(model, [data()], 5, groups={"all": [0, 1, 2]})
    assert result.bottom["all"] == pytest.approx([0.0] * 5, abs=1e-9)
    assert result.top["all"][-1] > 1e-3


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e-12, 1e12])
def test_an_operator_of_one_eigenvalue(scale: float) -> None:
    model = Quadratic([scale * torch.eye(8).double()])
    result = class_hessian_eigs(model, one_of_each(1), 2, criterion=pick)
    assert result.top["0"] == pytest.approx([scale] * 2, rel=1e-9)
    assert result.bottom["0"] == pytest.approx([scale] * 2, rel=1e-9)
    assert result.products["0"] == 2  # no more than there is to find


class PartlyLinear(nn.Module):
    """Class 0 has the loss ``a + b²`` and class 1 the loss ``a + c``."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.ones(()).double()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.a + self.b**2, self.a + self.c]).expand(len(x), -1)


def test_a_loss_that_is_linear_in_some_parameters_or_all() -> None:
    result = class_hessian_eigs(PartlyLinear(), one_of_each(2), 2, criterion=pick)
    assert result.top["0"] == pytest.approx([2.0, 0.0])
    for zeros in (result.bottom["0"], result.top["1"], result.bottom["1"]):
        assert zeros == pytest.approx([0.0, 0.0], abs=1e-12)


def test_one_parameter() -> None:
    model = Quadratic([2 * torch.eye(1).double()])
    result = class_hessian_eigs(model, one_of_each(1), criterion=pick)
    assert result.top["0"] == result.bottom["0"] == pytest.approx([2.0])


@examples(25)
@given(
    values=st.lists(st.floats(-10, 10).map(lambda v: round(v, 3)), min_size=2, max_size=12),
    k=st.integers(1, 3),
    seed=st.integers(0, 5),
)
def test_any_spectrum(values: list[float], k: int, seed: int) -> None:
    k = min(k, len(values))
    model = Quadratic([with_spectrum(values, seed)])
    result = class_hessian_eigs(model, one_of_each(1), k, criterion=pick, seed=seed)
    scale = max(map(abs, values))
    top, bottom = sorted(values, reverse=True)[:k], sorted(values)[:k]
    assert result.top["0"] == pytest.approx(top, rel=1e-3, abs=1e-5 * scale + 1e-12)
    assert result.bottom["0"] == pytest.approx(bottom, rel=1e-3, abs=1e-5 * scale + 1e-12)


@pytest.mark.parametrize("sign", [1, -1])
def test_both_ends_are_waited_for(sign: int) -> None:
    # One end stands apart and is found at once, the other is crowded.
    values = [-10.0 * sign, *[sign * 5 * i / 59 for i in range(60)]]
    model = Quadratic([with_spectrum(values)])
    results = {
        which: class_hessian_eigs(model, one_of_each(1), criterion=pick, which=which)
        for which in ("top", "bottom", "both")
    }
    for which in ("top", "both"):
        assert results[which].top["0"] == pytest.approx([max(values)], rel=1e-3)
    for which in ("bottom", "both"):
        assert results[which].bottom["0"] == pytest.approx([min(values)], rel=1e-3)
    easy, hard = ("bottom", "top") if sign > 0 else ("top", "bottom")
    assert results[easy].products["0"] < results[hard].products["0"]
    assert results["both"].products == results[hard].products


def test_too_few_products_are_admitted() -> None:
    model = Quadratic([with_spectrum([float(i) for i in range(40)])])
    with pytest.warns(UserWarning, match="of 0 did not reach tol"):
        result = class_hessian_eigs(model, one_of_each(1), criterion=pick, max_iter=5)
    assert result.converged == {"0": False}
    assert result.products == {"0": 5}


def test_seeds_decide_the_digits_and_nothing_else_does() -> None:
    model, batches = mlp(torch.float32), [data(dtype=torch.float32)]
    first = class_hessian_eigs(model, batches, seed=1)
    torch.rand(10)
    assert class_hessian_eigs(model, batches, seed=1) == first
    other = class_hessian_eigs(model, batches, seed=2)
    assert other.top != first.top
    assert other.top["0"] == pytest.approx(first.top["0"], rel=1e-3)


@pytest.mark.parametrize("backend", ["curvlinops", "auto"])
def test_curvlinops_agrees(backend: Any) -> None:
    pytest.importorskip("curvlinops")
    model, batches = mlp(), [data()]
    groups = {name: GROUPS[name] for name in ("head", "tail")}
    theirs = class_hessian_eigs(model, batches, 2, groups=groups, backend=backend)
    ours = class_hessian_eigs(model, batches, 2, groups=groups)
    assert (theirs.backend, ours.backend) == ("curvlinops", "lanczos")
    for name in groups:
        assert theirs.top[name] == pytest.approx(ours.top[name], rel=1e-3)
        assert theirs.bottom[name] == pytest.approx(ours.bottom[name], rel=1e-3)


@pytest.mark.parametrize("eval_mode", [True, False])  # the group's samples, or whole batches
def test_curvlinops_takes_streams(eval_mode: bool) -> None:
    pytest.importorskip("curvlinops")
    x, y = data(20)
    batches = list(zip(x.split(9), y.split(9), strict=True))
    options: dict[str, Any] = {"groups": {"head": [0, 1]}, "eval_mode": eval_mode, "which": "top"}
    theirs = class_hessian_eigs(mlp(), batches, backend="curvlinops", **options)
    ours = class_hessian_eigs(mlp(), batches, **options)
    assert theirs.top["head"] == pytest.approx(ours.top["head"], rel=1e-3)
    assert theirs.bottom["head"] == []


def test_curvlinops_with_as_many_eigenvalues_as_parameters() -> None:
    pytest.importorskip("curvlinops")
    model = nn.Linear(2, 2, bias=False).double()
    batches = [(torch.randn(9, 2).double(), torch.randint(2, (9,)))]
    groups = {"all": [0, 1]}
    theirs = class_hessian_eigs(model, batches, 2, groups=groups, backend="curvlinops")
    ours = class_hessian_eigs(model, batches, 2, groups=groups)
    assert theirs.top["all"] == pytest.approx(ours.top["all"], rel=1e-6)


def test_without_the_extra_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "curvlinops", None)
    with pytest.raises(ImportError, match=r"pip install 'focal-sam\[analysis\]'"):
        class_hessian_eigs(mlp(), [data()], backend="curvlinops")
    assert class_hessian_eigs(mlp(), [data()], backend="auto").backend == "lanczos"


# Spectrum and trace


def area(density: Any, grid: Any) -> float:
    return torch.trapezoid(torch.as_tensor(density), torch.as_tensor(grid)).item()


def test_spectral_density_of_a_known_spectrum() -> None:
    values = [4.0] * 2 + [0.0] * 7 + [-1.0]
    model = Quadratic([with_spectrum(values)])
    result = class_spectrum(
        model, one_of_each(1), criterion=pick, samples=200, steps=6, points=2000, bandwidth=0.05
    )
    grid, density = np.array(result.grid), np.array(result.density["0"])
    assert area(density, grid) == pytest.approx(1, abs=1e-3)
    # The nodes that carry mass are the three distinct eigenvalues.
    for nodes, weights in zip(result.ritz_values["0"], result.ritz_weights["0"], strict=True):
        carrying = [v for v, w in zip(nodes, weights, strict=True) if w > 1e-6]
        assert {round(v, 6) + 0.0 for v in carrying} <= {-1.0, 0.0, 4.0}
    assert all(sum(w) == pytest.approx(1) for w in result.ritz_weights["0"])
    for value, share in [(4.0, 0.2), (0.0, 0.7), (-1.0, 0.1)]:
        near = abs(grid - value) < 0.4
        assert area(density[near], grid[near]) == pytest.approx(share, abs=0.05)
    peak = density[abs(grid - 4) < 0.4].max()
    # A Gaussian of the bandwidth, of about a fifth of the mass.
    assert peak == pytest.approx(0.2 / (0.05 * math.sqrt(2 * math.pi)), rel=0.25)
    assert result.dimension == 10


def test_quadrature_gives_the_moments_of_the_hessian() -> None:
    model, (x, y) = mlp(), data()
    result = class_spectrum(model, [(x, y)], groups=GROUPS, samples=36, steps=8)
    for name, classes in GROUPS.items():
        assert [len(nodes) for nodes in result.ritz_values[name]] == [8] * 36
        expected = Dense(model, x, y, classes).eigenvalues()
        for power in (1, 2):
            moments = [
                sum(w * v**power for v, w in zip(nodes, weights, strict=True))
                for nodes, weights in zip(
                    result.ritz_values[name], result.ritz_weights[name], strict=True
                )
            ]
            error = np.std(moments) / 6
            assert abs(np.mean(moments) - (expected**power).mean().item()) < 5 * error


def test_a_spectrum_of_one_point() -> None:
    model = Quadratic([torch.zeros(3, 3).double()])
    result = class_spectrum(model, one_of_each(1), criterion=pick, samples=2)
    assert area(result.density["0"], result.grid) == pytest.approx(1, abs=1e-3)


def test_trace_of_a_diagonal_hessian_has_no_variance() -> None:
    model = Quadratic([torch.diag(torch.arange(5.0).double()), torch.eye(5).double()])
    result = hutchinson_trace(model, one_of_each(2), criterion=pick, samples=3)
    assert result.trace == pytest.approx({"0": 10.0, "1": 5.0})
    assert result.standard_error == pytest.approx({"0": 0.0, "1": 0.0}, abs=1e-12)


def test_trace_lies_within_its_standard_error() -> None:
    model, (x, y) = mlp(), data()
    result = hutchinson_trace(model, [(x, y)], groups=GROUPS, samples=200)
    for name, classes in GROUPS.items():
        dense = Dense(model, x, y, classes)
        matrix = hessian(dense.loss)(dense.theta)
        assert abs(result.trace[name] - matrix.trace().item()) < 5 * result.standard_error[name]
        off = matrix - torch.diag(matrix.diag())
        error = math.sqrt(2 * (off**2).sum().item() / 200)
        assert result.standard_error[name] == pytest.approx(error, rel=0.25)


def test_one_random_vector_has_no_standard_error() -> None:
    assert math.isnan(hutchinson_trace(mlp(), [data()], samples=1).standard_error["0"])


# Surfaces


class Displacements(nn.Module):
    """Logit f: squared distance of filter f from the start; then of a bias and norm weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2, 2).double())
        self.bias = nn.Parameter(torch.randn(3).double())
        self.norm = nn.LayerNorm([2, 2]).double()
        self.start = copy.deepcopy([self.weight.data, self.bias.data, self.norm.weight.data])

    def forward(self, x: Tensor) -> Tensor:
        filters = ((self.weight - self.start[0]) ** 2).sum(dim=(1, 2))
        rest = ((self.bias - self.start[1]) ** 2).sum() + (
            (self.norm.weight - self.start[2]) ** 2
        ).sum()
        return torch.cat([filters, rest[None]]).expand(len(x), -1)


def test_surface_directions_are_filter_normalised() -> None:
    torch.manual_seed(1)
    model = Displacements()
    norms = model.weight.detach().pow(2).sum(dim=(1, 2)).tolist()
    result = loss_surface_2d(model, one_of_each(4), criterion=pick, steps=5, radius=0.5)
    assert result.coordinates == [-0.5, -0.25, 0.0, 0.25, 0.5]
    for name, norm in zip("012", norms, strict=True):
        surface = result.surface[name]
        for i, c in enumerate(result.coordinates):
            assert surface[2][i] == pytest.approx(c**2 * norm, rel=1e-6)
            assert surface[i][2] == pytest.approx(c**2 * norm, rel=1e-6)
        # ||a d1 + b d2||² + ||a d1 - b d2||² = 2 (a² + b²) ||w||²
        assert surface[0][3] + surface[4][3] == pytest.approx(
            2 * (0.5**2 + 0.25**2) * norm, rel=1e-6
        )
        assert abs(surface[0][4] - surface[4][4]) > 1e-6 * norm  # two directions, not one
    assert {v for row in result.surface["3"] for v in row} == {0.0}


def test_rows_of_the_surface_follow_the_second_direction() -> None:
    model, batches = mlp(), [data()]
    seen: list[list[Tensor]] = []

    def watching(logits: Tensor, y: Tensor) -> Tensor:
        seen.append([p.detach().clone() for p in model.parameters()])
        return F.cross_entropy(logits, y, reduction="none")

    result = loss_surface_2d(model, batches, criterion=watching, groups=GROUPS, steps=3)
    start, points = seen[0], seen[1:]
    right, above = points[5], points[7]  # the grid is walked row by row
    x, y = batches[0]
    for place, (row, column) in {5: (1, 2), 7: (2, 1)}.items():
        parameters = dict(zip(dict(model.named_parameters()), points[place], strict=True))
        logits = functional_call(model, parameters, (x,))
        loss = F.cross_entropy(logits, y).item()
        assert result.surface["all"][row][column] == pytest.approx(loss, rel=1e-12)
    corner = points[8]
    for s, r, a, c in zip(start, right, above, corner, strict=True):
        torch.testing.assert_close(c - s, (r - s) + (a - s))


def test_the_middle_of_the_surface_is_theta() -> None:
    result = loss_surface_2d(mlp(torch.float32), [data(dtype=torch.float32)], steps=7, radius=0.7)
    assert result.coordinates[3] == 0.0
    assert {g: s[3][3] for g, s in result.surface.items()} == result.losses


# Data


class Pairs(nn.Module):
    """A model that takes a dict."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: dict[str, Any]) -> Tensor:
        return self.model(x["rows"][0])


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", ["shuffled", "dict"])
def test_batches_do_not_matter(call: str, kind: str) -> None:
    model, (x, y) = mlp(), data()
    used: nn.Module = model
    loader: Any = DataLoader(TensorDataset(x, y), batch_size=7, shuffle=True)
    if kind == "dict":
        pieces = zip(x.split(7), y.split(7), strict=True)
        loader, used = [[{"rows": [x]}, y.tolist()] for x, y in pieces], Pairs(model)
    whole = CALLS[call](model, [(x, y)], groups=GROUPS).to_dict()
    streamed = CALLS[call](used, loader, groups=GROUPS).to_dict()
    for key in ("sharpness", "top", "bottom", "density", "trace", "surface", "losses"):
        for name in GROUPS:
            if key in whole:
                torch.testing.assert_close(
                    torch.tensor(streamed[key][name]), torch.tensor(whole[key][name])
                )


def test_a_small_group_of_a_large_loader_is_read_once() -> None:
    x, y = data()
    walks = 0

    class Counted(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            nonlocal walks
            walks += 1
            return super().__getitem__(index)

    loader = DataLoader(Counted(x, y), batch_size=7)
    class_hessian_eigs(mlp(), loader, groups={"tail": [2]})
    assert walks == 2 * len(y)  # the losses at θ, then the group's samples


def test_a_group_runs_no_batch_larger_than_the_loaders() -> None:
    model, (x, y) = mlp(), data()
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    loader = list(zip(x.split(7), y.split(7), strict=True))
    class_sharpness(model, loader, 0.1, groups={"head": [0, 1]})
    assert max(sizes) == 7


def test_inputs_of_several_shapes_are_not_packed_together() -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool1d(4), nn.Flatten(), mlp())
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(5, 1, length, generator=generator).double(), torch.tensor([0, 1, 2, 0, 1]))
        for length in (8, 12, 8)
    ]
    result = class_sharpness(model, batches, 0.1, groups={"tail": [2]})
    pooled = torch.cat([F.adaptive_avg_pool1d(x, 4)[:, 0] for x, _ in batches])
    labels = torch.cat([y for _, y in batches])
    expected = class_sharpness(model[2], [(pooled, labels)], 0.1, groups={"tail": [2]})
    assert result.sharpness["tail"] == pytest.approx(expected.sharpness["tail"], rel=1e-9)


@pytest.mark.parametrize("call", CALLS)
def test_groups_without_samples_are_nan_and_named(call: str) -> None:
    x, y = data()
    keep = y != 1
    groups: dict[str, list[int]] = {"a": [0], "none": [1], "no class": [], "b": [2]}
    result = CALLS[call](mlp(), [(x[keep], y[keep])], groups=groups)
    assert result.empty == ["none", "no class"]
    assert result.counts["none"] == 0
    assert math.isnan(result.losses["none"])
    plain = result.to_dict()
    for key in ("sharpness", "top", "bottom", "density", "trace", "surface"):
        if key in plain:
            assert np.isnan(plain[key]["none"]).all()
            assert np.isfinite(plain[key]["a"]).all()


@pytest.mark.parametrize("call", CALLS)
def test_no_group_with_samples_is_no_error(call: str) -> None:
    x, y = data()
    result = CALLS[call](mlp(), [(x, y % 2)], groups={"none": [2]})
    assert result.empty == ["none"]


@pytest.mark.parametrize("call", CALLS)
def test_results_are_ready_for_json(call: str) -> None:
    result = CALLS[call](mlp(), [data()]).to_dict()
    assert json.loads(json.dumps(to_plain(result))) == json.loads(
        json.dumps(result).replace("NaN", "null")
    )


# The model stays as it was


class Noisy(nn.Module):
    """All that has state: batch norm, dropout, a buffer set anew, a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(4, 3)
        self.unused = nn.Linear(2, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        random.random()
        np.random.rand()  # noqa: NPY002
        return self.head(self.drop(torch.tanh(self.norm(self.frozen(x)))))


def noisy() -> Noisy:
    torch.manual_seed(5)
    model = Noisy()
    model(torch.randn(64, 4) * 2 + 1)
    model.head.weight.grad = torch.ones(3, 4)
    model.drop.eval()
    with torch.no_grad():
        model.head.bias[0] = -0.0
    return model


def fingerprint(model: nn.Module, generator: torch.Generator) -> list[Any]:
    numbers: tuple[Any, ...] = np.random.get_state()  # type: ignore[assignment] # noqa: NPY002
    tensors = [*model.parameters(), *model.buffers()]
    return [
        [(id(t), t.detach().numpy().tobytes(), t.requires_grad) for t in tensors],
        [None if p.grad is None else (id(p.grad), p.grad.tolist()) for p in model.parameters()],
        [m.training for m in model.modules()],
        torch.get_rng_state().tolist(),
        generator.get_state().tolist(),
        random.getstate(),
        [numbers[1].tolist(), *numbers[2:]],
    ]


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("fails", [None, KeyboardInterrupt])
@pytest.mark.parametrize("eval_mode", [True, False])
@pytest.mark.parametrize("call", CALLS)
def test_nothing_is_left_behind(
    call: str, eval_mode: bool, fails: type[BaseException] | None
) -> None:
    model = noisy()
    x, y = data(dtype=torch.float32)
    generator = torch.Generator().manual_seed(11)
    loader = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True, generator=generator)
    seen = 0

    def criterion(logits: Tensor, target: Tensor) -> Tensor:
        nonlocal seen
        seen += 1
        if fails is not None and seen > 4:  # beyond the losses at θ
            raise fails("in the middle")
        return F.cross_entropy(logits, target, reduction="none")

    before = fingerprint(model, generator)
    options: dict[str, Any] = {"criterion": criterion, "eval_mode": eval_mode, "groups": GROUPS}
    if fails is None:
        assert CALLS[call](model, loader, **options).eval_mode is eval_mode
    else:
        with pytest.raises(fails):
            CALLS[call](model, loader, **options)
    assert seen > 4
    assert fingerprint(model, generator) == before


def test_evaluation_mode_uses_the_running_statistics() -> None:
    model = noisy()
    x, y = data(dtype=torch.float32)
    result = class_sharpness(model, [(x, y)], 0.1, groups=GROUPS)
    assert result.eval_mode
    dense = Dense(model, x, y, [2])
    assert result.losses["tail"] == pytest.approx(dense.loss(dense.theta).item(), rel=1e-5)


def test_training_flags_can_be_kept() -> None:
    model = noisy()
    model.drop.train()
    x, y = data(dtype=torch.float32)
    model.calls.zero_()
    torch.manual_seed(21)
    result = class_sharpness(model, [(x, y)], 0.1, groups=GROUPS, eval_mode=False)
    torch.manual_seed(21)
    losses = F.cross_entropy(copy.deepcopy(model)(x), y, reduction="none")
    expected = losses[y == 2].mean().item()
    assert result.losses["tail"] == pytest.approx(expected, rel=1e-6)
    # The same dropout masks in every pass.
    still = class_sharpness(model, [(x, y)], 0.0, groups=GROUPS, eval_mode=False)
    assert set(still.sharpness.values()) == {0.0}


def test_augmentation_repeats_in_every_pass() -> None:
    x, y = data()

    class Augmented(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            row, label = super().__getitem__(index)
            return row + torch.randn(4) * random.random() + np.random.rand(), label  # noqa: NPY002

    loader = DataLoader(Augmented(x, y), batch_size=16, shuffle=True)
    result = loss_surface_2d(mlp(), loader, groups=GROUPS, steps=3)
    assert {g: s[1][1] for g, s in result.surface.items()} == result.losses


def test_frozen_parameters_stay_out() -> None:
    model, (x, y) = mlp(), data()
    model[0].requires_grad_(False)
    result = class_hessian_eigs(model, [(x, y)], 2, groups=GROUPS)
    expected = Dense(model, x, y, [0, 1]).eigenvalues()
    assert len(expected) == 18
    assert result.top["head"] == pytest.approx(expected.flip(0)[:2].tolist(), rel=1e-3)
    assert hutchinson_trace(model, [(x, y)]).dimension == 18


def test_tied_parameters_count_once() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 4).double()
    model = nn.Sequential(layer, nn.Tanh(), layer)
    x, y = data()
    assert class_spectrum(model, [(x, y)], samples=1, steps=3).dimension == 20
    result = class_sharpness(model, [(x, y)], 0.1, groups=GROUPS)
    assert result.sharpness["tail"] == pytest.approx(Dense(model, x, y, [2]).sharpness(0.1))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_may_be_off_around_it(mode: Callable[[], Any]) -> None:
    model, batches = mlp(), [data()]
    with mode():
        inside = class_hessian_eigs(model, batches)
    assert inside == class_hessian_eigs(model, batches)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(1, 12)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(x[:, None, :, None]).chunk(3, dim=-1)
        return self.head(F.scaled_dot_product_attention(q, k, v).mean(dim=(1, 2)))


def test_attention_has_a_second_derivative() -> None:
    torch.manual_seed(0)
    model = Attention()
    x, y = data(dtype=torch.float32)
    result = class_hessian_eigs(model, [(x, y)], groups=GROUPS)

    class Written(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.mix(x[:, None, :, None]).chunk(3, dim=-1)
            weights = torch.softmax(q @ k.transpose(-1, -2) / 2, dim=-1)
            return self.head((weights @ v).mean(dim=(1, 2)))

    written = Written()
    written.load_state_dict(model.state_dict())
    expected = Dense(written, x, y, [0, 1, 2]).eigenvalues()
    assert result.top["all"] == pytest.approx([expected[-1].item()], rel=1e-3)
    assert result.bottom["all"] == pytest.approx([expected[0].item()], rel=1e-3)


def test_compiled_models_have_a_second_derivative() -> None:
    model, batches = mlp(), [data()]
    compiled = torch.compile(model, backend="aot_eager")
    assert class_hessian_eigs(compiled, batches).top == class_hessian_eigs(model, batches).top


# Errors


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, d: class_sharpness(m, d, -1.0), "rho is -1.0"),
        (lambda m, d: class_sharpness(m, d, math.nan), "rho is nan"),
        (lambda m, d: class_sharpness(m, d, 0.1, mode="up"), "accepted: 'ascent', 'random'"),
        (lambda m, d: class_sharpness(m, d, 0.1, samples=0), "samples is 0"),
        (lambda m, d: class_hessian_eigs(m, d, 0), "k is 0"),
        (lambda m, d: class_hessian_eigs(m, d, 44), "k is 44, but there are 43 trainable"),
        (lambda m, d: class_hessian_eigs(m, d, which="all"), "which is 'all'"),
        (lambda m, d: class_hessian_eigs(m, d, backend="dense"), "backend is 'dense'"),
        (lambda m, d: class_hessian_eigs(m, d, tol=0.0), "tol is 0.0"),
        (lambda m, d: class_spectrum(m, d, bandwidth=0.0), "bandwidth is 0.0"),
        (lambda m, d: class_spectrum(m, d, steps=0), "steps is 0"),
        (lambda m, d: hutchinson_trace(m, d, samples=0), "samples is 0"),
        (lambda m, d: loss_surface_2d(m, d, steps=1), "steps is 1"),
        (lambda m, d: loss_surface_2d(m, d, radius=math.inf), "radius is inf"),
        (lambda m, d: class_sharpness(m, d, 0.1, groups={}), "groups is empty"),
        (lambda m, d: class_sharpness(m, d, 0.1, groups={"a": [3]}), "'a' names class 3"),
        (lambda m, d: class_sharpness(m, d, 0.1, groups={"a": [1, 1]}), "a class twice"),
        (lambda m, d: class_sharpness(m, [], 0.1), "the loader gave no samples"),
        (lambda m, d: class_sharpness(m, iter(d), 0.1), "which can be walked once"),
        (lambda m, d: class_sharpness(m, d[0], 0.1), r"pass \[\(x, y\)\]"),
        (lambda m, d: class_sharpness(m, [(d[0][0], d[0][0])], 0.1), "labels have shape"),
        (lambda m, d: class_sharpness(m, [(d[0][0], d[0][1] + 1)], 0.1), "label 3 is outside"),
        (lambda m, d: class_sharpness(m, [(d[0][0], d[0][1] - 1)], 0.1), "label -1 is outside"),
        (lambda m, d: class_sharpness(m, [(d[0][0][1:], d[0][1])], 0.1), "it has to return logits"),
        (lambda m, d: class_sharpness(m.half(), d, 0.1), "dtype torch.float16"),
        (lambda m, d: class_sharpness(m.requires_grad_(False), d, 0.1), "nothing to move"),
        (
            lambda m, d: class_sharpness(m, d, 0.1, criterion=nn.CrossEntropyLoss()),
            "reduction='none'",
        ),
        (
            lambda m, d: class_hessian_eigs(m, d, criterion=lambda z, y: pick(z, y).detach()),
            "does not depend on any trainable parameter",
        ),
        (
            lambda m, d: hutchinson_trace(m, d, criterion=lambda z, y: pick(z, y) * math.nan),
            "the loss of a sample of class 0 is nan at θ",
        ),
        (
            lambda m, d: class_sharpness(
                m, d, 1e4, criterion=lambda z, y: F.cross_entropy(z.exp(), y, reduction="none")
            ),
            r"at distance 10000 of θ \(a smaller rho",
        ),
        (
            lambda m, d: loss_surface_2d(
                m,
                d,
                radius=1e5,
                criterion=lambda z, y: F.cross_entropy(z.exp(), y, reduction="none"),
            ),
            "a smaller radius may help",
        ),
        (
            lambda m, d: loss_surface_2d(
                nn.Sequential(m.requires_grad_(False), nn.BatchNorm1d(3).double()), d
            ),
            "directions vanish",
        ),
    ],
)
def test_bad_input(call: Callable[..., Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(mlp(), [data()])


@pytest.mark.parametrize("call", ["eigs", "trace", "spectrum"])
def test_a_loss_without_second_derivative(call: str) -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.theta = nn.Parameter(torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            return (self.theta.abs() ** 1.5).expand(len(x), -1)

    with pytest.raises(InputError, match="second derivative"):
        CALLS[call](Root(), one_of_each(3), criterion=pick)


@pytest.mark.parametrize("call", ["ascent", "random"])
def test_a_loader_that_changes_is_refused(call: str) -> None:
    class Changing:
        def __init__(self) -> None:
            self.walks = 0

        def __iter__(self) -> Iterator[Any]:
            self.walks += 1
            x, y = data()
            yield x[self.walks :], y[self.walks :]

    with pytest.raises(InputError, match="other samples in a second pass"):
        CALLS[call](mlp(), Changing(), groups={"all": [0, 1, 2]})


def test_a_gradient_that_is_not_finite() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.theta = nn.Parameter(torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.theta.sqrt().expand(len(x), -1)

    with pytest.raises(InputError, match="gradient of group '0' is not finite"):
        class_sharpness(Root(), one_of_each(2), 0.1, criterion=pick)

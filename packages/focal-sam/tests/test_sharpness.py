"""The engine: values, invariants, what must stand still, what must be restored."""

import contextlib
import copy
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from focal_sam import SAM, FocalSAM, FocalWeights, SharpnessMethod
from focal_sam.losses import LogitAdjustedLoss, VSLoss
from shared_core.testing import examples

COUNTS = [50, 12, 3]
Reference = Callable[..., dict[str, Tensor]]


def network(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def batch(
    size: int = 9, seed: int = 1, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 5, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.arange(size) % 3


def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), y, reduction="none")


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(
    model: nn.Module, expected: dict[str, Tensor], **tolerance: float
) -> None:
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], **({"rtol": 1e-10, "atol": 1e-12} | tolerance)
        )


def plain_gradient(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    value = losses(model, x, y).mean()
    found = torch.autograd.grad(value, list(model.parameters()))
    return dict(zip(dict(model.named_parameters()), found, strict=True))


class PassCounter:
    """Counts forward passes of a model and backward passes through its first layer's output."""

    def __init__(self, model: nn.Sequential) -> None:
        self.forwards = self.backwards = 0
        model[-1].register_forward_hook(self._forward)

    def _forward(self, module: nn.Module, args: object, output: Tensor) -> None:
        self.forwards += 1
        if output.requires_grad:
            output.register_hook(self._backward)

    def _backward(self, gradient: Tensor) -> None:
        self.backwards += 1


@pytest.mark.smoke
@pytest.mark.parametrize("lam", [0.3, 0.8, 1.1])
@pytest.mark.parametrize("gamma", [0.5, 3.0])
def test_gradient_equals_independent_derivation(
    focal_sam_gradient: Reference, gamma: float, lam: float
) -> None:
    model, (x, y) = network(), batch()
    n = torch.tensor(COUNTS, dtype=torch.float64)
    expected = focal_sam_gradient(model, x, y, lam * (1 - n / n.sum()) ** gamma, 0.2)
    FocalSAM(model, COUNTS, 0.2, gamma, lam).backward(lambda: losses(model, x, y), y)
    assert_equal_gradients(model, expected)


CRITERIA = {
    "ce": lambda: nn.CrossEntropyLoss(reduction="none"),
    "la": lambda: LogitAdjustedLoss(COUNTS),
    "vs": lambda: VSLoss(COUNTS),
}


@pytest.mark.parametrize("eta", [None, 0.0, 0.01])
@pytest.mark.parametrize("loss", CRITERIA)
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_four_steps_of_training(
    focal_sam_gradient: Reference, kind: str, loss: str, eta: float | None
) -> None:
    model, criterion = network(), CRITERIA[loss]()
    twin = copy.deepcopy(model)

    def optimizer(of: nn.Module) -> torch.optim.Optimizer:
        if kind == "adamw":
            return torch.optim.AdamW(of.parameters(), lr=0.01)
        return torch.optim.SGD(of.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)

    weights = FocalWeights(COUNTS, 2.0, 0.8).values
    method = FocalSAM(model, COUNTS, 0.2, 2.0, 0.8, adaptive=eta is not None, eta=eta or 0.0)
    ours, theirs = optimizer(model), optimizer(twin)
    for step in range(4):
        x, y = batch(seed=step)
        result = method.backward(lambda x=x, y=y: criterion(model(x), y), y)
        expected = focal_sam_gradient(
            twin, x, y, weights, 0.2, losses=lambda m, x, y: criterion(m(x), y), eta=eta
        )
        torch.testing.assert_close(result.loss, criterion(twin(x), y).mean().detach())
        ours.step()
        ours.zero_grad()
        for name, p in twin.named_parameters():
            p.grad = expected[name]
        theirs.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-10)


def test_gradient_equals_finite_differences_of_the_objective_at_fixed_epsilon() -> None:
    """λ ∇L^γ at θ + ε and ∇[L - λ L^γ] at θ, ε held: the derivative of their sum of losses."""
    model, (x, y) = network(), batch()
    method = FocalSAM(model, COUNTS, 0.3, 2.0, 0.8)
    w = method.weights(y, torch.float64)
    theta = [p.detach().clone() for p in model.parameters()]
    ascent = method.ascent_gradient(lambda: losses(model, x, y), y)
    norm = torch.stack([(g**2).sum() for g in ascent]).sum().sqrt()
    epsilon = [0.3 * g / norm for g in ascent]
    method.backward(lambda: losses(model, x, y), y)
    direction = [torch.randn_like(p) for p in theta]

    def objective(t: float) -> float:
        values = []
        for shift, weight in ((epsilon, w), ([0 * e for e in epsilon], 1 - w)):
            with torch.no_grad():
                for p, start, e, d in zip(model.parameters(), theta, shift, direction, strict=True):
                    p.copy_(start + e + t * d)
                values.append((weight * losses(model, x, y)).mean().item())
        return sum(values)

    slope = (objective(1e-5) - objective(-1e-5)) / 2e-5
    inner = sum(
        (p.grad * d).sum().item() for p, d in zip(model.parameters(), direction, strict=True)
    )
    assert inner == pytest.approx(slope, rel=1e-7)


def test_quadratic_closed_form() -> None:
    """l_s = (1/2) θ'Aθ with weights λ: the gradient is Aθ + λρ A Aθ / ||Aθ||."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    A = root @ root.T
    theta = torch.randn(6, generator=generator, dtype=torch.float64).requires_grad_()
    method = SharpnessMethod([theta], 0.8, rho=0.3)
    result = method.backward(lambda: (0.5 * theta @ A @ theta).expand(4))
    direction = A @ theta.detach()
    expected = direction + 0.8 * 0.3 * A @ direction / direction.norm()
    torch.testing.assert_close(theta.grad, expected)
    torch.testing.assert_close(result.grad_norm, 0.8 * direction.norm())


@pytest.mark.parametrize("weighted", [True, False])
def test_no_sharpness_is_plain_training(weighted: bool) -> None:
    model, (x, y) = network(), batch()
    expected = plain_gradient(model, x, y)
    method = FocalSAM(model, COUNTS, 0.0 if weighted else 0.2, 2.0, 0.8 if weighted else 0.0)
    result = method.backward(lambda: losses(model, x, y), y)
    assert_equal_gradients(model, expected, rtol=0.0, atol=0.0)
    assert result.sharpness == 0
    assert result.loss_perturbed == result.loss


def test_gamma_zero_is_sam() -> None:
    model, (x, y) = network(), batch()
    FocalSAM(model, COUNTS, 0.2, 0.0, 1.0).backward(lambda: losses(model, x, y), y)
    found = gradients(model)
    twin = network()
    SAM(twin, 0.2).backward(lambda: losses(twin, x, y))
    assert_equal_gradients(twin, found, atol=1e-12)


@pytest.mark.parametrize(
    ("gamma", "lam", "rho", "expected"),
    [
        (2.0, 0.8, 0.2, (2, 3)),
        (0.0, 1.0, 0.2, (2, 2)),
        (0.0, 0.8, 0.2, (2, 2)),
        (2.0, 0.0, 0.2, (1, 1)),
        (2.0, 0.8, 0.0, (1, 1)),
    ],
)
def test_number_of_passes(gamma: float, lam: float, rho: float, expected: tuple[int, int]) -> None:
    model, (x, y) = network(), batch()
    counter = PassCounter(model)
    FocalSAM(model, COUNTS, rho, gamma, lam).backward(lambda: losses(model, x, y), y)
    assert (counter.forwards, counter.backwards) == expected


def test_number_of_passes_of_one_class_and_of_recompute() -> None:
    model, (x, y) = network(), batch()
    counter = PassCounter(model)
    one = torch.full_like(y, 1)
    FocalSAM(model, COUNTS).backward(lambda: losses(model, x, one), one)
    assert (counter.forwards, counter.backwards) == (2, 2)
    counter.forwards = counter.backwards = 0
    method = FocalSAM(model, COUNTS, passes="recompute")
    method.backward(lambda: losses(model, x, y), y)
    assert (counter.forwards, counter.backwards) == (3, 3)


@pytest.mark.parametrize("lam", [0.8, 1.1, 1.0])
def test_uniform_shortcut_equals_the_long_path(lam: float) -> None:
    """A weight function hides from the engine that all weights are equal."""
    model, (x, y) = network(), batch()
    extra = torch.ones((), dtype=torch.float64, requires_grad=True)

    def closure() -> Tensor:
        return extra * losses(model, x, y)

    options = {"perturb": lambda name, p: name.startswith("0.")}
    long = SharpnessMethod(model, lambda y: torch.full((len(y),), lam), 0.2, **options)
    long_result = long.backward(closure, y)
    expected, expected_extra = gradients(model), extra.grad
    model.zero_grad()
    extra.grad = None
    result = SharpnessMethod(model, lam, 0.2, **options).backward(closure, y)
    assert_equal_gradients(model, expected, rtol=1e-6)
    torch.testing.assert_close(extra.grad, expected_extra, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(result.grad_norm, long_result.grad_norm, rtol=1e-6, atol=0)
    torch.testing.assert_close(result.sharpness, long_result.sharpness, rtol=1e-5, atol=1e-9)


def test_recompute_equals_shared() -> None:
    model, (x, y) = network(), batch()
    FocalSAM(model, COUNTS, passes="shared").backward(lambda: losses(model, x, y), y)
    expected = gradients(model)
    model.zero_grad()
    FocalSAM(model, COUNTS, passes="recompute").backward(lambda: losses(model, x, y), y)
    assert_equal_gradients(model, expected)


@pytest.mark.parametrize("passes", ["shared", "recompute"])
def test_gradients_accumulate_into_what_is_there(passes: str) -> None:
    model, (x, y) = network(), batch()
    method = FocalSAM(model, COUNTS, passes=passes)
    method.backward(lambda: losses(model, x, y), y)
    once = {n: 2 * g for n, g in gradients(model).items()}
    method.backward(lambda: losses(model, x, y), y)
    assert_equal_gradients(model, once)


@pytest.mark.parametrize("lam", [1.0, 0.8])
def test_gradients_of_uniform_weights_accumulate_too(lam: float) -> None:
    model, (x, y) = network(), batch()
    method = SharpnessMethod(model, lam, 0.2)
    method.backward(lambda: losses(model, x, y), y)
    once = {n: 2 * g for n, g in gradients(model).items()}
    method.backward(lambda: losses(model, x, y), y)
    assert_equal_gradients(model, once)


@examples(10)
@given(
    rho=st.floats(1e-3, 2.0),
    gamma=st.floats(0.5, 6),
    lam=st.floats(0.05, 1.5),
    factor=st.floats(1e-3, 1e3),
)
def test_epsilon_has_radius_rho_whatever_the_scale_of_the_loss(
    rho: float, gamma: float, lam: float, factor: float
) -> None:
    model, (x, y) = network(), batch()
    method = FocalSAM(model, COUNTS, rho, gamma, lam)
    theta = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    moves = []
    for scale in (1.0, factor):
        g = method.ascent_gradient(lambda scale=scale: scale * losses(model, x, y), y)
        with method.perturbed(g):
            moves.append(nn.utils.parameters_to_vector(model.parameters()).detach() - theta)
    assert moves[0].norm().item() == pytest.approx(rho, rel=1e-6)
    torch.testing.assert_close(moves[1], moves[0], rtol=1e-6, atol=1e-12)


def test_adaptive_epsilon_has_radius_rho_in_the_scaled_space() -> None:
    model, (x, y) = network(), batch()
    method = FocalSAM(model, COUNTS, 0.5, adaptive=True)
    theta = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    g = method.ascent_gradient(lambda: losses(model, x, y), y)
    with method.perturbed(g):
        move = nn.utils.parameters_to_vector(model.parameters()).detach() - theta
    assert (move / theta.abs()).norm().item() == pytest.approx(0.5, rel=1e-6)


def test_a_group_radius_scales_its_slice_of_a_global_norm() -> None:
    model, (x, y) = network(), batch()
    theta = [p.detach().clone() for p in model.parameters()]
    groups = [{"params": model[2].parameters(), "rho": 0.6}]
    method = SAM(model, 0.2, params=groups)
    g = method.ascent_gradient(lambda: losses(model, x, y))
    by_name = dict(zip([id(p) for p in method._parameters()], g, strict=True))
    norm = torch.stack([(v**2).sum() for v in g]).sum().sqrt()
    with method.perturbed(g):
        for p, start in zip(model.parameters(), theta, strict=True):
            rho = 0.6 if any(p is q for q in model[2].parameters()) else 0.2
            torch.testing.assert_close(p.detach() - start, rho * by_name[id(p)] / norm)


def test_only_chosen_parameters_move(focal_sam_gradient: Reference) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)).double()
    x, y = batch()
    weights = FocalWeights(COUNTS).values
    for perturb, names in (
        ("norm_only", ["1.weight", "1.bias"]),
        ("no_norm_bias", ["0.weight", "2.weight"]),
        (lambda name, p: name == "2.bias", ["2.bias"]),
    ):
        expected = focal_sam_gradient(model, x, y, weights, 0.2, names=names)
        for passes in ("shared", "recompute"):
            model.zero_grad()
            method = FocalSAM(model, COUNTS, 0.2, perturb=perturb, passes=passes)
            method.backward(lambda: losses(model, x, y), y)
            assert_equal_gradients(model, expected)


def test_scaled_losses_scale_the_gradient() -> None:
    model, (x, y) = network(torch.float32), batch(dtype=torch.float32)
    FocalSAM(model, COUNTS).backward(lambda: losses(model, x, y), y)
    expected = gradients(model)
    model.zero_grad()
    FocalSAM(model, COUNTS).backward(lambda: losses(model, x, y), y, scale=2.0**16)
    found = {n: g / 2.0**16 for n, g in gradients(model).items()}
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7)


def test_batch_order_does_not_matter() -> None:
    model, (x, y) = network(), batch()
    FocalSAM(model, COUNTS).backward(lambda: losses(model, x, y), y)
    expected = gradients(model)
    model.zero_grad()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    FocalSAM(model, COUNTS).backward(lambda: losses(model, x[order], y[order]), y[order])
    assert_equal_gradients(model, expected)


def test_soft_labels_weigh_by_expectation() -> None:
    model, (x, y) = network(), batch()
    method = FocalSAM(model, COUNTS)
    method.backward(lambda: losses(model, x, y), nn.functional.one_hot(y, 3).double())
    found = gradients(model)
    model.zero_grad()
    method.backward(lambda: losses(model, x, y), y)
    assert_equal_gradients(model, found)


def test_results_are_means_over_the_batch() -> None:
    model, (x, y) = network(), batch()
    method = FocalSAM(model, COUNTS, 0.2)
    w = method.weights(y, torch.float64)
    at_theta = losses(model, x, y).detach()
    g = method.ascent_gradient(lambda: losses(model, x, y), y)
    with method.perturbed(g):
        there = losses(model, x, y).detach()
    result = method.backward(lambda: (losses(model, x, y), "logits"), y)
    torch.testing.assert_close(result.loss, at_theta.mean())
    torch.testing.assert_close(result.loss_perturbed, there.mean())
    torch.testing.assert_close(result.sharpness, (w * (there - at_theta)).mean())
    torch.testing.assert_close(result.grad_norm, torch.stack([v.norm() for v in g]).norm())
    assert result.aux == "logits"
    assert not result.skipped
    assert not result.loss.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_parameters_are_restored_bit_for_bit(dtype: torch.dtype) -> None:
    model, (x, y) = network(dtype), batch(dtype=dtype)
    before = copy.deepcopy(model.state_dict())
    pointers = [p.data_ptr() for p in model.parameters()]
    seen = []

    def closure() -> Tensor:
        seen.append(model[0].weight.detach().clone())
        return losses(model, x, y)

    FocalSAM(model, COUNTS, 0.5).backward(closure, y)
    assert not torch.equal(seen[0], seen[1])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert pointers == [p.data_ptr() for p in model.parameters()]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_parameters_are_restored_after_an_exception(error: type[BaseException]) -> None:
    model, (x, y) = network(), batch()
    norm = nn.BatchNorm1d(5).double()
    whole = nn.Sequential(norm, *model)
    before = copy.deepcopy(whole.state_dict())
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise error
        return losses(whole, x, y)

    method = FocalSAM(whole, COUNTS)
    with pytest.raises(error):
        method.backward(closure, y)
    for name, value in model.state_dict().items():
        index, rest = name.split(".", 1)
        assert torch.equal(value, before[f"{int(index) + 1}.{rest}"])
    assert norm.running_mean is not None
    assert norm.track_running_stats
    method.backward(lambda: losses(whole, x, y), y)


def test_parameters_unused_in_one_pass_are_restored_or_left() -> None:
    model, (x, y) = network(), batch()
    extra = nn.Parameter(torch.ones(3, dtype=torch.float64))
    never = nn.Parameter(torch.ones(2, dtype=torch.float64))
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        shift = extra if len(calls) == 1 else 0
        return nn.functional.cross_entropy(model(x) + shift, y, reduction="none")

    SAM([*model.parameters(), extra, never]).backward(closure)
    assert torch.equal(extra, torch.ones_like(extra))
    assert never.grad is None


def test_frozen_parameters_do_not_move() -> None:
    model, (x, y) = network(), batch()
    model[0].requires_grad_(False)
    seen = []

    def closure() -> Tensor:
        seen.append([model[0].weight.clone(), model[2].weight.detach().clone()])
        return losses(model, x, y)

    FocalSAM(model, COUNTS).backward(closure, y)
    assert torch.equal(seen[0][0], seen[1][0])
    assert not torch.equal(seen[0][1], seen[1][1])
    assert model[0].weight.grad is None


def test_tied_parameters_move_once() -> None:
    torch.manual_seed(0)
    first = nn.Linear(3, 3).double()
    second = nn.Linear(3, 3, bias=False).double()
    second.weight = first.weight
    model = nn.Sequential(first, second)
    theta = first.weight.detach().clone()
    method = SAM([*first.parameters(), *second.parameters()], 0.1)
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    g = method.ascent_gradient(lambda: losses(model, x, y))
    with method.perturbed(g):
        norm = torch.stack([v.norm() for v in g]).norm()
        torch.testing.assert_close(first.weight.detach() - theta, 0.1 * g[0] / norm)


class TestBatchNorm:
    def model(self, **options: object) -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.BatchNorm1d(5, **options), nn.Linear(5, 3)).double()

    @pytest.mark.parametrize("momentum", [0.1, None])
    @pytest.mark.parametrize("passes", ["shared", "recompute"])
    def test_freeze_counts_the_pass_at_theta_only(
        self, momentum: float | None, passes: str
    ) -> None:
        model, (x, y) = self.model(momentum=momentum), batch()
        twin = copy.deepcopy(model)
        FocalSAM(model, COUNTS, 0.5, passes=passes).backward(lambda: losses(model, x, y), y)
        twin(x)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            assert torch.equal(getattr(model[0], name), getattr(twin[0], name))

    def test_update_counts_both(self) -> None:
        model, (x, y) = self.model(), batch()
        method = FocalSAM(model, COUNTS, 0.5, bn_perturbed="update")
        method.backward(lambda: losses(model, x, y), y)
        assert model[0].num_batches_tracked == 2

    def test_instance_norm_and_evaluation_mode(self) -> None:
        torch.manual_seed(0)
        x, y = torch.randn(6, 4, 8), torch.arange(6) % 3
        model = nn.Sequential(
            nn.InstanceNorm1d(4, track_running_stats=True), nn.Flatten(), nn.Linear(32, 3)
        )
        twin = copy.deepcopy(model)
        method = FocalSAM(model, COUNTS, 0.5)
        method.backward(lambda: losses(model, x, y), y)
        twin(x)
        assert torch.equal(model[0].running_mean, twin[0].running_mean)
        model.eval()
        method.backward(lambda: losses(model, x, y), y)
        assert torch.equal(model[0].running_mean, twin[0].running_mean)

    def test_a_nan_batch_leaves_no_trace_of_the_second_pass(self) -> None:
        model, (x, y) = self.model(), batch()
        twin = copy.deepcopy(model)
        x[0, 0] = math.nan
        result = FocalSAM(model, COUNTS).backward(lambda: losses(model, x, y), y)
        twin(x)
        assert result.skipped
        torch.testing.assert_close(
            model[0].running_var, twin[0].running_var, equal_nan=True, rtol=0, atol=0
        )


class TestRandomness:
    def masks(self, rng: str, passes: str = "auto") -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.5), nn.Linear(7, 3))
        seen: list[Tensor] = []
        model[1].register_forward_hook(lambda m, a, out: seen.append(out.detach() == 0))
        x, y = batch(dtype=torch.float32)
        method = FocalSAM(model, COUNTS, 1e-4, rng=rng, passes=passes)
        method.backward(lambda: losses(model, x, y), y)
        seen.append(torch.rand(4))
        return seen

    def test_replay_gives_both_passes_the_same_masks(self) -> None:
        first, second, after = self.masks("replay")
        assert torch.equal(first, second)
        *others, after_three = self.masks("replay", "recompute")
        assert len(others) == 3
        assert all(torch.equal(first, m) for m in others)
        assert torch.equal(after, after_three)  # the stream goes on as after one pass

    def test_fresh_draws_anew(self) -> None:
        first, second, _ = self.masks("fresh")
        assert not torch.equal(first, second)


class TestAccumulation:
    def test_micro_batches_average_their_own_gradients(self) -> None:
        model = network()
        method = FocalSAM(model, COUNTS)
        parts = [batch(seed=s) for s in range(3)]
        total: dict[str, Tensor] = {}
        for x, y in parts:
            model.zero_grad()
            method.backward(lambda x=x, y=y: losses(model, x, y), y)
            for n, g in gradients(model).items():
                total[n] = total.get(n, 0) + g / 3
        model.zero_grad()
        for x, y in parts:
            method.backward(lambda x=x, y=y: losses(model, x, y), y, scale=1 / 3)
        assert_equal_gradients(model, total)

    @pytest.mark.parametrize("passes", ["shared", "recompute"])
    @pytest.mark.parametrize("weights", ["focal", "uniform"])
    def test_full_mode_is_the_gradient_of_the_whole_batch(self, weights: str, passes: str) -> None:
        model, (x, y) = network(), batch(10)
        gamma = 2.0 if weights == "focal" else 0.0
        method = FocalSAM(model, COUNTS, 0.2, gamma, passes=passes)
        whole = method.backward(lambda: (losses(model, x, y), "all"), y)
        expected = gradients(model)
        model.zero_grad()
        parts = [slice(0, 1), slice(1, 4), slice(4, 10)]  # the first has one class only
        result = method.accumulate(
            [lambda s=s: (losses(model, x[s], y[s]), s) for s in parts], [y[s] for s in parts]
        )
        assert_equal_gradients(model, expected, rtol=1e-8)
        torch.testing.assert_close(result.loss, whole.loss)
        torch.testing.assert_close(result.sharpness, whole.sharpness)
        assert result.aux == parts

    def test_wrong_arguments(self) -> None:
        method = FocalSAM(network(), COUNTS)
        with pytest.raises(ValueError, match="one target per closure"):
            method.accumulate([], [])
        with pytest.raises(ValueError, match="1 closures and 0 targets"):
            method.accumulate([lambda: None], [])


class TestScaler:
    def scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cpu", init_scale=2.0**16)

    def test_scaled_and_unscaled_training_agree(self) -> None:
        model, (x, y) = network(torch.float32), batch(dtype=torch.float32)
        twin, scaler = copy.deepcopy(model), self.scaler()
        ours = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        theirs = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
        method, plain = FocalSAM(model, COUNTS), FocalSAM(twin, COUNTS)
        for _ in range(3):
            ours.zero_grad()
            result = method.backward(lambda: losses(model, x, y), y, scaler=scaler)
            scaler.step(ours)
            scaler.update()
            theirs.zero_grad()
            expected = plain.backward(lambda: losses(twin, x, y), y)
            theirs.step()
            torch.testing.assert_close(result.grad_norm, expected.grad_norm)
            torch.testing.assert_close(result.loss, expected.loss)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("where", ["theta", "ascent"])
    def test_overflow_skips_the_step_and_halves_the_scale_once(self, where: str) -> None:
        model, (x, y) = network(torch.float32), batch(dtype=torch.float32)
        before, scaler = copy.deepcopy(model.state_dict()), self.scaler()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        calls: list[int] = []

        def closure() -> Tensor:
            calls.append(1)
            values = losses(model, x, y)
            if where == "ascent" and len(calls) == 1:
                # An overflow of the ascent gradient alone; the pass at θ + ε is finite.
                values.register_hook(lambda g: g * math.inf)
            return values * (math.inf if where == "theta" else 1)

        result = FocalSAM(model, COUNTS).backward(closure, y, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        assert result.skipped
        assert scaler.get_scale() == 2.0**15
        assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())

    def test_an_overflowed_norm_poisons_gradients_that_are_finite(self) -> None:
        p = torch.zeros(2, requires_grad=True)
        scaler = self.scaler()
        method = SAM([p], 0.1)
        calls: list[int] = []

        def closure() -> Tensor:
            calls.append(1)
            slope = 1e30 if len(calls) == 1 else 1.0
            return (slope * p.sum()).expand(2)

        result = method.backward(closure, scaler=scaler)
        assert result.skipped
        assert not p.grad.isfinite().all()
        assert torch.equal(p, torch.zeros(2))


def test_non_finite_losses_are_reported_and_weights_restored() -> None:
    model, (x, y) = network(), batch()
    before = copy.deepcopy(model.state_dict())
    x[0] = math.inf
    seen = []

    def closure() -> Tensor:
        seen.append(model[0].weight.detach().clone())
        return losses(model, x, y)

    result = FocalSAM(model, COUNTS).backward(closure, y)
    assert result.skipped
    assert torch.equal(seen[0], seen[1])  # ε was 0
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_zero_gradient_moves_nothing(dtype: torch.dtype) -> None:
    p = torch.ones(3, dtype=dtype, requires_grad=True)
    result = SAM([p], 0.1).backward(lambda: (0 * p).sum().expand(2))
    assert not result.skipped
    assert torch.equal(p.grad, torch.zeros_like(p))
    assert torch.equal(p, torch.ones_like(p))


def test_half_precision_parameters_that_swallow_epsilon_warn() -> None:
    model = nn.Linear(64, 3).to(torch.bfloat16)
    x, y = torch.randn(6, 64, dtype=torch.bfloat16), torch.arange(6) % 3
    method = FocalSAM(model, COUNTS, 1e-4)
    with pytest.warns(UserWarning, match="lost to the rounding"):
        method.backward(lambda: losses(model, x, y), y)
    assert method.stats["eps_lost"] > 0.5


def test_interval_takes_plain_steps_between(focal_sam_gradient: Reference) -> None:
    model, (x, y) = network(), batch()
    method = FocalSAM(model, COUNTS, 0.2, interval=2)
    sharp = focal_sam_gradient(model, x, y, method.weights.values, 0.2)
    for expected in (sharp, plain_gradient(model, x, y), sharp):
        model.zero_grad()
        method.backward(lambda: losses(model, x, y), y)
        assert_equal_gradients(model, expected)


def test_uniform_tolerance_treats_flat_weights_as_one() -> None:
    model, (x, y) = network(), batch()
    counter = PassCounter(model)
    weights = torch.tensor([0.79, 0.80, 0.81], dtype=torch.float64)
    exact = SharpnessMethod(model, weights, 0.2)
    exact.backward(lambda: losses(model, x, y), y)
    expected = gradients(model)
    model.zero_grad()
    assert counter.backwards == 3
    SharpnessMethod(model, weights, 0.2, uniform_tol=0.02).backward(lambda: losses(model, x, y), y)
    assert counter.backwards == 5
    assert_equal_gradients(model, expected, rtol=0.05, atol=1e-3)


@pytest.mark.smoke
def test_resumed_training_is_the_same_training() -> None:
    def run(resume_at: int | None) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.3), nn.BatchNorm1d(7), nn.Linear(7, 3))
        parts = build(model)
        for step in range(6):
            if step == resume_at:
                state = copy.deepcopy([part.state_dict() for part in (model, *parts)])
                random = torch.get_rng_state()
                torch.manual_seed(123)
                model = nn.Sequential(
                    nn.Linear(5, 7), nn.Dropout(0.3), nn.BatchNorm1d(7), nn.Linear(7, 3)
                )
                parts = build(model)
                for part, saved in zip((model, *parts), state, strict=True):
                    part.load_state_dict(saved)
                torch.set_rng_state(random)
            method, optimizer, scheduler, scaler = parts
            x, y = batch(seed=step, dtype=torch.float32)
            method.backward(lambda m=model, x=x, y=y: losses(m, x, y), y, scaler=scaler)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scheduler.step()
            method.set_rho(0.1 + 0.01 * method.steps)
        return model

    def build(model: nn.Module) -> tuple[object, ...]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return (
            FocalSAM(model, COUNTS, interval=2),
            optimizer,
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6),
            torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2),
        )

    whole, resumed = run(None), run(3)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])


def test_state_holds_nothing_of_the_size_of_the_model() -> None:
    method = FocalSAM(network(), COUNTS, interval=3)
    assert method.state_dict() == {"steps": 0, "rho": [0.2], "interval": 3}
    with pytest.raises(ValueError, match="2 parameter groups"):
        method.load_state_dict({"steps": 0, "rho": [0.1, 0.2], "interval": 1})


def test_complex_parameters_move_as_pairs_of_real_ones() -> None:
    torch.manual_seed(0)
    z = torch.randn(4, dtype=torch.complex128).requires_grad_()
    pair = torch.view_as_real(z.detach()).clone().requires_grad_()

    def value(parts: Tensor) -> Tensor:
        return ((parts**2).sum(-1) ** 2).sum().expand(2)

    method = SAM([z], 0.2)
    method.backward(lambda: value(torch.view_as_real(z)))
    SAM([pair], 0.2).backward(lambda: value(pair))
    torch.testing.assert_close(torch.view_as_real(z.grad), pair.grad)


def test_parametrized_and_channels_last_models() -> None:
    torch.manual_seed(0)
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3, padding=1))
    model = nn.Sequential(conv, nn.Flatten(), nn.Linear(64, 3)).to(
        memory_format=torch.channels_last
    )
    before = copy.deepcopy(model.state_dict())
    x, y = torch.randn(6, 3, 4, 4).to(memory_format=torch.channels_last), torch.arange(6) % 3
    seen = []

    def closure() -> Tensor:
        seen.append(conv.parametrizations.weight.original1.detach().clone())
        return losses(model, x, y)

    FocalSAM(model, COUNTS).backward(closure, y)
    assert not torch.equal(*seen)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_works_inside_no_grad_and_with_autocast_in_the_closure() -> None:
    model, (x, y) = network(torch.float32), batch(dtype=torch.float32)

    def closure() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return losses(model, x, y)

    with torch.no_grad():
        FocalSAM(model, COUNTS).backward(closure, y)
    assert all(g.dtype == torch.float32 for g in gradients(model).values())


def test_autocast_around_both_passes_sees_the_perturbed_weights() -> None:
    """Autocast caches half-precision copies of weights while its block lasts."""
    model, (x, y) = network(torch.float32), batch(dtype=torch.float32)
    method = FocalSAM(model, COUNTS, 0.5)

    def inside() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return losses(model, x, y)

    expected = method.backward(inside, y).sharpness
    found = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        outside = method.backward(lambda: losses(model, x, y), y).sharpness
    assert expected > 0
    torch.testing.assert_close(outside, expected)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, found[name])


def test_checkpointed_models() -> None:
    from torch.utils.checkpoint import checkpoint

    model, (x, y) = network(), batch()
    FocalSAM(model, COUNTS).backward(lambda: losses(model, x, y), y)
    expected = gradients(model)
    for reentrant in (False, True):
        for weights in (COUNTS, None):
            model.zero_grad()
            start = x.clone().requires_grad_()

            def forward(start: Tensor = start, reentrant: bool = reentrant) -> Tensor:
                hidden = checkpoint(model[:2], start, use_reentrant=reentrant)
                return nn.functional.cross_entropy(model[2](hidden), y, reduction="none")

            method = SAM(model, 0.2) if weights is None else FocalSAM(model, COUNTS)
            method.backward(forward, y)
            if weights is not None:
                assert_equal_gradients(model, expected)
                model.zero_grad()
                method.backward(forward, y)
                assert_equal_gradients(model, expected)


@pytest.mark.parametrize("warm", [False, True])
def test_compiled_model(warm: bool) -> None:
    """After an ordinary step, a compiled graph can be walked only once.

    The backend is inductor's without its code generation, which takes most of a minute.
    """
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    )
    x, y = torch.randn(9, 3, 8, 8), torch.arange(9) % 3
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    if warm:
        losses(compiled, x, y).mean().backward()
        model.zero_grad()
    twin = copy.deepcopy(model)
    FocalSAM(twin, COUNTS).backward(lambda: losses(twin, x, y), y)
    method = FocalSAM(compiled, COUNTS)
    with contextlib.ExitStack() as stack:
        if warm:
            stack.enter_context(pytest.warns(UserWarning, match="one more forward pass"))
        method.backward(lambda: losses(compiled, x, y), y)
    assert method.passes == ("recompute" if warm else "auto")
    assert_equal_gradients(model, gradients(twin), rtol=1e-4, atol=1e-6)
    for name in ("num_batches_tracked", "running_mean"):
        torch.testing.assert_close(getattr(model[1], name), getattr(twin[1], name))


@pytest.mark.usefixtures("without_type_checks")
class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"rho": -1.0}, "rho is -1.0"),
            ({"rho": math.nan}, "rho is nan"),
            ({"eta": -0.1}, "eta is -0.1"),
            ({"interval": 0}, "interval is 0"),
            ({"bn_perturbed": "keep"}, "bn_perturbed is 'keep'.*'freeze', 'update'"),
            ({"rng": "same"}, "rng is 'same'"),
            ({"passes": "three"}, "passes is 'three'"),
            ({"sync": "none"}, "sync is 'none'"),
            ({"perturb": "bias"}, "perturb is 'bias'"),
            ({"params": [{"params": [], "lr": 1.0}]}, "has rho and adaptive, not"),
        ],
    )
    def test_arguments(self, options: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            SharpnessMethod(network(), 1.0, **({"rho": 0.1} | options))

    def test_gamma_and_lam(self) -> None:
        with pytest.raises(ValueError, match="gamma is -1"):
            FocalSAM(network(), COUNTS, gamma=-1.0)
        with pytest.raises(ValueError, match="lam is inf"):
            FocalSAM(network(), COUNTS, lam=math.inf)
        with pytest.raises(ValueError, match=r"class_counts\[1\] is 0"):
            FocalSAM(network(), [5, 0, 2])

    def test_set_rho(self) -> None:
        with pytest.raises(ValueError, match=r"rho is -0\.1"):
            FocalSAM(network(), COUNTS).set_rho(-0.1)

    def test_nothing_to_train(self) -> None:
        with pytest.raises(ValueError, match="nothing to train"):
            SAM(network().requires_grad_(False))
        model, (x, y) = network(), batch()
        method = SAM(model)
        model.requires_grad_(False)
        with pytest.raises(ValueError, match="requires a gradient any more"):
            method.backward(lambda: losses(model, x, y))

    def test_closures(self) -> None:
        model, (x, y) = network(), batch()
        method = FocalSAM(model, COUNTS)
        with pytest.raises(ValueError, match=r"reduction='none'"):
            method.backward(lambda: losses(model, x, y).mean(), y)
        with pytest.raises(ValueError, match="9 losses for 8 labels"):
            method.backward(lambda: losses(model, x, y), y[:8])
        with pytest.raises(ValueError, match="batch is empty"):
            method.backward(lambda: losses(model, x[:0], y[:0]), y[:0])
        with pytest.raises(RuntimeError, match="do not depend on any parameter"):
            method.backward(lambda: losses(model, x, y).detach(), y)
        other = torch.ones(9, dtype=torch.float64, requires_grad=True)
        with pytest.raises(RuntimeError, match="any of the perturbed parameters"):
            method.backward(lambda: 2 * other, y)

    @pytest.mark.parametrize("label", [3, -1])
    def test_labels(self, label: int) -> None:
        model, y = network(), batch()[1].clone()
        y[2] = label
        called = []
        with pytest.raises(IndexError, match=f"label {label}"):
            FocalSAM(model, COUNTS).backward(lambda: called.append(1), y)
        assert not called

    def test_labels_are_needed_for_class_weights(self) -> None:
        model, (x, y) = network(), batch()
        with pytest.raises(ValueError, match="needs the labels"):
            FocalSAM(model, COUNTS).backward(lambda: losses(model, x, y))

    def test_weight_functions(self) -> None:
        model, (x, y) = network(), batch()
        method = SharpnessMethod(model, lambda y: torch.ones(2), 0.1)
        with pytest.raises(ValueError, match="the weight function returned shape"):
            method.backward(lambda: losses(model, x, y), y)

    def test_nesting(self) -> None:
        model, (x, y) = network(), batch()
        method = FocalSAM(model, COUNTS)
        g = method.ascent_gradient(lambda: losses(model, x, y), y)
        with method.perturbed(g):
            with pytest.raises(RuntimeError, match="inside perturbed"):
                method.backward(lambda: losses(model, x, y), y)
            with pytest.raises(RuntimeError, match="already in force"), method.perturbed(g):
                pass

    def test_sparse_gradients(self) -> None:
        table = nn.Embedding(4, 3, sparse=True)
        y = torch.tensor([0, 1])
        with pytest.raises(NotImplementedError, match="sparse=False"):
            SAM(table).backward(lambda: losses(table, torch.tensor([0, 1]), y))


def test_no_wait_for_the_device_in_a_step() -> None:
    """Nothing in a default step turns a tensor into a number (labels on the CPU apart)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class NoScalars(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            assert func is not torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    model = network(torch.float32).to("meta")
    method = SharpnessMethod(model, lambda y: torch.ones(len(y), device="meta"), 0.1)
    x, y = torch.randn(9, 5, device="meta"), torch.zeros(9, dtype=torch.long, device="meta")
    with NoScalars():
        method.backward(lambda: losses(model, x, y), y)

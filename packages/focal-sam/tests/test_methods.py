"""The family: what each member is a special case of, and known peers' formulas."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from focal_sam import ASAM, SAM, FocalSAM, ImbSAM, SharpnessMethod

COUNTS = [50, 12, 3]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def batch(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(9, 5, generator=generator, dtype=torch.float64), torch.arange(9) % 3


def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), y, reduction="none")


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters()}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-12)


def textbook_sam_step(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    rho: float,
    scale: Callable[[str, Tensor], Tensor] = lambda name, p: torch.ones_like(p),
) -> dict[str, Tensor]:
    """Gradient at θ + ρ T² g / ||T g||, in place on a copy, as SAM's and ASAM's papers have it."""
    import copy

    twin = copy.deepcopy(model)
    losses(twin, x, y).mean().backward()
    named = dict(twin.named_parameters())
    scales = {n: scale(n, p.detach()) for n, p in named.items()}
    norm = torch.stack([(scales[n] * p.grad).norm() for n, p in named.items()]).norm()
    with torch.no_grad():
        for n, p in named.items():
            p += rho * scales[n] ** 2 * p.grad / norm
    twin.zero_grad()
    losses(twin, x, y).mean().backward()
    return gradients(twin)


@pytest.mark.smoke
def test_sam_over_ten_steps_of_momentum() -> None:
    model, twin = network(), network()
    optimizers = [
        torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        for m in (model, twin)
    ]
    method = SAM(model, 0.1)
    for step in range(10):
        x, y = batch(step)
        method.backward(lambda x=x, y=y: losses(model, x, y))
        for name, gradient in textbook_sam_step(twin, x, y, 0.1).items():
            twin.get_parameter(name).grad = gradient
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_asam_scales_weights_and_leaves_biases() -> None:
    model, (x, y) = network(), batch()
    ASAM(model, 0.5, eta=0.01).backward(lambda: losses(model, x, y))

    def scale(name: str, p: Tensor) -> Tensor:
        return p.abs() + 0.01 if name.endswith("weight") else torch.ones_like(p)

    assert_close(gradients(model), textbook_sam_step(model, x, y, 0.5, scale))


def test_asam_with_biases_scaled() -> None:
    model, (x, y) = network(), batch()
    ASAM(model, 0.5, eta=0.0, adaptive_bias=True).backward(lambda: losses(model, x, y))
    assert_close(gradients(model), textbook_sam_step(model, x, y, 0.5, lambda name, p: p.abs()))


@pytest.mark.parametrize("multiplier", [1.0, 2.0])
def test_imbsam(focal_sam_gradient: Callable[..., dict[str, Tensor]], multiplier: float) -> None:
    model, (x, y) = network(), batch()
    tail = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    expected = focal_sam_gradient(model, x, y, tail, 0.2, ascent_factor=multiplier)
    method = ImbSAM(model, COUNTS, 0.2, threshold=20, tail_multiplier=multiplier)
    method.backward(lambda: losses(model, x, y), y)
    assert_close(gradients(model), expected)


def test_imbsam_is_a_zero_one_weighting() -> None:
    model, (x, y) = network(), batch()
    ImbSAM(model, COUNTS, 0.2, threshold=12).backward(lambda: losses(model, x, y), y)
    expected = gradients(model)
    model.zero_grad()
    method = SharpnessMethod(model, torch.tensor([0.0, 0.0, 1.0]), 0.2)
    method.backward(lambda: losses(model, x, y), y)
    assert_close(gradients(model), expected)


@pytest.mark.parametrize("multiplier", [1.0, 2.0])
def test_imbsam_batches_of_one_kind(multiplier: float) -> None:
    """Without tail samples: the plain gradient. With nothing else: SAM, times the multiplier."""
    model, (x, _) = network(), batch()
    method = ImbSAM(model, COUNTS, 0.2, tail_multiplier=multiplier)
    head, tail = torch.zeros(9, dtype=torch.long), torch.full((9,), 2)
    result = method.backward(lambda: losses(model, x, head), head)
    expected = torch.autograd.grad(losses(model, x, head).mean(), list(model.parameters()))
    assert_close(gradients(model), dict(zip(gradients(model), expected, strict=True)))
    assert result.grad_norm == 0
    model.zero_grad()
    method.backward(lambda: losses(model, x, tail), tail)
    sam = textbook_sam_step(model, x, tail, 0.2)
    assert_close(gradients(model), {n: multiplier * g for n, g in sam.items()})


def test_a_tail_multiplier_reports_what_it_multiplied() -> None:
    model, (x, y) = network(), batch()
    once = ImbSAM(model, COUNTS, 0.2).backward(lambda: losses(model, x, y), y)
    twice = ImbSAM(model, COUNTS, 0.2, tail_multiplier=2.0).backward(lambda: losses(model, x, y), y)
    torch.testing.assert_close(twice.grad_norm, 2 * once.grad_norm)
    torch.testing.assert_close(twice.sharpness, 2 * once.sharpness)


def test_a_weight_above_one_is_not_clamped(
    focal_sam_gradient: Callable[..., dict[str, Tensor]],
) -> None:
    model, (x, y) = network(), batch()
    weights = torch.tensor([1.05, 1.5, -0.2], dtype=torch.float64)
    expected = focal_sam_gradient(model, x, y, weights, 0.2)
    SharpnessMethod(model, weights, 0.2).backward(lambda: losses(model, x, y), y)
    assert_close(gradients(model), expected)


def test_one_class_in_all_the_world_is_plain_training() -> None:
    """π = 1 makes c = 0 for every γ > 0."""
    model, (x, _) = network(), batch()
    y = torch.zeros(9, dtype=torch.long)
    FocalSAM(model, [50], gamma=2.0).backward(lambda: losses(model, x, y), y)
    expected = torch.autograd.grad(losses(model, x, y).mean(), list(model.parameters()))
    assert_close(gradients(model), dict(zip(gradients(model), expected, strict=True)))


def test_a_batch_of_one(focal_sam_gradient: Callable[..., dict[str, Tensor]]) -> None:
    model, (x, y) = network(), batch()
    method = FocalSAM(model, COUNTS, 0.2)
    expected = focal_sam_gradient(model, x[:1], y[:1], method.weights.values, 0.2)
    method.backward(lambda: losses(model, x[:1], y[:1]), y[:1])
    assert_close(gradients(model), expected)


def test_classes_absent_from_training() -> None:
    model, (x, y) = network(), batch()
    method = FocalSAM(model, [50, 0, 3], gamma=2.0, lam=0.8, allow_empty=True)
    method.backward(lambda: losses(model, x, y), y)
    assert method.weights.values[1] == 0.8


def test_negative_tail_multiplier_is_refused() -> None:
    with pytest.raises(ValueError, match="tail_multiplier is -1"):
        ImbSAM(network(), COUNTS, tail_multiplier=-1.0)


def test_schedules_set_the_radius_of_every_group() -> None:
    model = network()
    method = SAM(model, 0.1, params=[{"params": model[2].parameters(), "rho": 0.3}])
    assert method.rho == 0.3
    method.set_rho(0.2)
    assert [g.rho for g in method.groups] == [0.2, 0.2]

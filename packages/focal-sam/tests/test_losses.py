import math
from decimal import Decimal, localcontext

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from focal_sam.losses import (
    ClassBalancedWeights,
    DRWSchedule,
    FocalLoss,
    LDAMLoss,
    LogitAdjustedLoss,
    VSLoss,
    class_balanced_weights,
)
from shared_core.errors import InputError
from shared_core.testing import examples

COUNTS = [500, 97, 20, 5]
repeatable = examples(60)
cross_entropy = nn.CrossEntropyLoss(reduction="none")

with_labels = {
    "la": LogitAdjustedLoss(COUNTS, tau=1.5),
    "vs": VSLoss(COUNTS, gamma=0.3, tau=0.75),
    "ldam": LDAMLoss(COUNTS, max_margin=0.5, scale=4.0),
    "focal": FocalLoss(gamma=2.0),
}
with_distributions = {name: loss for name, loss in with_labels.items() if name != "ldam"}
every_loss = pytest.mark.parametrize("criterion", with_labels.values(), ids=with_labels)
every_soft_loss = pytest.mark.parametrize(
    "criterion", with_distributions.values(), ids=with_distributions
)


@pytest.fixture
def without_shape_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let wrong shapes reach our own checks, as they do outside the tests."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def batch(size: int = 9, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(size, len(COUNTS), generator=generator, dtype=dtype)
    target = torch.arange(size) % len(COUNTS)
    return logits, target[torch.randperm(size, generator=generator)]


def distributions(size: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(size, len(COUNTS), generator=generator, dtype=torch.float64).softmax(dim=1)


def negative_log_softmax(z: list, label: int) -> float:
    highest = max(z)
    return highest + math.log(math.fsum(math.exp(v - highest) for v in z)) - z[label]


def by_hand(name: str, logits: Tensor, target: Tensor) -> Tensor:
    """The losses of `with_labels`, one sample after the other, in plain float arithmetic."""
    total = sum(COUNTS)
    losses = []
    for z, y in zip(logits.tolist(), target.tolist(), strict=True):
        if name == "la":
            z = [v + 1.5 * math.log(n / total + 1e-9) for v, n in zip(z, COUNTS, strict=True)]
        elif name == "vs":
            inverse = [(1 / n) ** 0.3 for n in COUNTS]
            divisors = [d / min(inverse) for d in inverse]
            z = [
                v / d + 0.75 * math.log(n / total)
                for v, d, n in zip(z, divisors, COUNTS, strict=True)
            ]
        elif name == "ldam":
            roots = [n**-0.25 for n in COUNTS]
            margins = [0.5 * r / max(roots) for r in roots]
            z = [4.0 * (v - (margins[y] if j == y else 0)) for j, v in enumerate(z)]
        loss = negative_log_softmax(z, y)
        losses.append((1 - math.exp(-loss)) ** 2 * loss if name == "focal" else loss)
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.smoke
@pytest.mark.parametrize("name", with_labels)
def test_losses_follow_their_formulas(name: str) -> None:
    logits, target = batch()
    expected = by_hand(name, logits, target)
    torch.testing.assert_close(with_labels[name](logits, target), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", with_labels)
def test_single_precision_rounds_the_same_losses(name: str) -> None:
    logits, target = batch(dtype=torch.float32)
    loss = with_labels[name](logits, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), by_hand(name, logits, target), rtol=2e-6, atol=2e-6)


@pytest.mark.smoke
@pytest.mark.parametrize(
    "criterion",
    [
        LogitAdjustedLoss(COUNTS, tau=0.0),
        VSLoss(COUNTS, gamma=0.0, tau=0.0),
        LDAMLoss(COUNTS, max_margin=0.0, scale=1.0),
        FocalLoss(gamma=0.0),
        LogitAdjustedLoss([7] * 4),
        VSLoss([7] * 4),
    ],
    ids=lambda criterion: repr(criterion).partition("\n")[0],
)
def test_limits_that_are_cross_entropy(criterion: nn.Module) -> None:
    logits, target = batch()
    expected = cross_entropy(logits, target)
    torch.testing.assert_close(criterion(logits, target), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
def test_vs_without_scaling_is_logit_adjustment_up_to_the_small_constant(tau: float) -> None:
    logits, target = batch()
    vs, la = VSLoss(COUNTS, gamma=0.0, tau=tau), LogitAdjustedLoss(COUNTS, tau=tau)
    # log(π + 1e-9) - log π is at most 1e-9 / π.
    bound = 2 * tau * 1e-9 * sum(COUNTS) / min(COUNTS)
    difference = (vs(logits, target) - la(logits, target)).abs().max()
    assert 0 < difference <= bound


def test_logit_adjustment_with_tau_one_is_balanced_softmax() -> None:
    logits, target = batch()
    counts = torch.tensor(COUNTS, dtype=torch.float64)
    ratio = (
        counts[target]
        * logits.gather(1, target[:, None])[:, 0].exp()
        / (counts * logits.exp()).sum(1)
    )
    torch.testing.assert_close(
        LogitAdjustedLoss(COUNTS)(logits, target), -ratio.log(), rtol=0, atol=1e-6
    )


def test_rare_classes_have_the_larger_margin() -> None:
    losses = LDAMLoss(COUNTS)(torch.zeros(4, 4), torch.arange(4))
    assert losses.diff().gt(0).all()
    assert LDAMLoss(COUNTS).margins.values.max() == 0.5


def test_an_empty_class_is_shifted_to_the_bottom_only_if_allowed() -> None:
    loss = LogitAdjustedLoss([9, 1, 0], allow_empty=True)(
        torch.zeros(2, 3, dtype=torch.float64), torch.tensor([0, 2])
    )
    normaliser = math.log(0.9 + 0.1 + 3e-9)
    expected = [normaliser - math.log(0.9 + 1e-9), normaliser - math.log(1e-9)]
    assert loss.tolist() == pytest.approx(expected, rel=1e-12)
    with pytest.raises(InputError, match=r"class_counts\[2\] is 0.*allow_empty=True"):
        LogitAdjustedLoss([9, 1, 0])


@every_loss
def test_gradients_of_labels(criterion: nn.Module) -> None:
    logits, target = batch(5)
    assert torch.autograd.gradcheck(lambda z: criterion(z, target), logits.requires_grad_())


@every_soft_loss
def test_gradients_of_distributions(criterion: nn.Module) -> None:
    logits, _ = batch(5)
    soft = distributions(5)
    assert torch.autograd.gradcheck(lambda z: criterion(z, soft), logits.requires_grad_())


@every_soft_loss
def test_distributions_average_over_the_labels(criterion: nn.Module) -> None:
    logits, _ = batch(6)
    soft = distributions(6)
    expected = sum(
        soft[:, label] * criterion(logits, torch.full((6,), label)) for label in range(len(COUNTS))
    )
    torch.testing.assert_close(criterion(logits, soft), expected, rtol=1e-12, atol=1e-12)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_of_any_size(criterion: nn.Module, dtype: torch.dtype) -> None:
    logits, target = batch(64, dtype=torch.float32)
    logits[::2] *= 1e4 / logits[::2].abs().max()
    logits[0], logits[1] = -1e4, 1e4
    rounded = logits.to(dtype).requires_grad_()
    loss = criterion(rounded, target)
    assert loss.dtype == torch.float32
    assert loss.isfinite().all()
    exact = criterion(rounded.detach().double(), target)
    # What float32 leaves of a difference of two (scaled) logits this large.
    rounding = torch.finfo(torch.float32).eps * 4e4
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=rounding)
    loss.sum().backward()
    assert rounded.grad is not None
    assert rounded.grad.dtype == dtype
    assert rounded.grad.isfinite().all()


@every_loss
def test_a_sample_ignores_the_rest_of_the_batch(criterion: nn.Module) -> None:
    logits, target = batch(12)
    loss = criterion(logits, target)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(criterion(logits[order], target[order]), loss[order])
    more = torch.cat([logits, 50 * torch.ones(3, 4, dtype=torch.float64)])
    padded = criterion(more, torch.cat([target, torch.tensor([3, 3, 3])]))
    torch.testing.assert_close(padded[:12], loss)
    assert criterion(logits[:0], target[:0]).shape == (0,)


@repeatable
@given(shift=st.floats(-50, 50), seed=st.integers(0, 50))
def test_a_constant_added_to_all_logits_changes_nothing(shift: float, seed: int) -> None:
    logits, target = batch(seed=seed)
    for criterion in (with_labels["la"], with_labels["ldam"], with_labels["focal"]):
        torch.testing.assert_close(
            criterion(logits + shift, target), criterion(logits, target), rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("gamma", [0.2, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_focal_loss_of_a_sure_prediction_has_a_finite_gradient(
    gamma: float, dtype: torch.dtype
) -> None:
    logits = torch.tensor([[800.0, 0.0], [0.0, 800.0]], dtype=dtype, requires_grad=True)
    loss = FocalLoss(gamma)(logits, torch.tensor([0, 0]))
    loss.sum().backward()
    assert loss.tolist() == [0.0, 800.0]
    assert logits.grad is not None
    assert logits.grad.tolist() == [[0.0, 0.0], [-1.0, 1.0]]


@every_loss
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_every_integer_type(criterion: nn.Module, dtype: torch.dtype) -> None:
    logits, target = batch()
    assert criterion(logits, target.to(dtype)).equal(criterion(logits, target))


every_kind = pytest.mark.parametrize(
    ("kind", "arguments"),
    [(LogitAdjustedLoss, [COUNTS]), (VSLoss, [COUNTS]), (LDAMLoss, [COUNTS]), (FocalLoss, [])],
    ids=with_labels,
)


@every_kind
def test_reductions(kind: type, arguments: list) -> None:
    logits, target = batch()
    losses = kind(*arguments)(logits, target)
    mean = kind(*arguments, reduction="mean")(logits, target)
    torch.testing.assert_close(mean, losses.sum() / len(target))
    torch.testing.assert_close(kind(*arguments, reduction="sum")(logits, target), losses.sum())


@pytest.mark.usefixtures("without_shape_checks")
@every_kind
def test_unknown_reduction(kind: type, arguments: list) -> None:
    with pytest.raises(InputError, match="reduction is 'avg'; accepted: 'none', 'mean', 'sum'"):
        kind(*arguments, reduction="avg")


@pytest.mark.parametrize("name", ["la", "vs", "ldam"])
def test_a_loss_first_used_in_inference_mode_can_train_later(name: str) -> None:
    kind = {"la": LogitAdjustedLoss, "vs": VSLoss, "ldam": LDAMLoss}[name]
    criterion = kind(COUNTS)
    logits, target = batch(dtype=torch.float32)
    with torch.inference_mode():
        criterion(logits, target)
    criterion(logits.requires_grad_(), target).sum().backward()
    assert logits.grad is not None


@every_loss
def test_moving_a_loss_to_half_precision_rounds_nothing(criterion: nn.Module) -> None:
    logits, target = batch(dtype=torch.float32)
    before = criterion(logits, target)
    assert criterion.half()(logits, target).equal(before)
    assert not criterion.state_dict()


def test_losses_print_their_settings() -> None:
    assert repr(VSLoss(COUNTS, gamma=0.05, tau=0.75)) == (
        "VSLoss(gamma=0.05, tau=0.75, reduction='none')"
    )
    assert repr(LogitAdjustedLoss(COUNTS)) == "LogitAdjustedLoss(tau=1.0, reduction='none')"
    assert repr(LDAMLoss(COUNTS)) == "LDAMLoss(max_margin=0.5, scale=30.0, reduction='none')"
    assert repr(FocalLoss()) == "FocalLoss(gamma=2.0, reduction='none')"


@every_loss
@pytest.mark.parametrize("label", [-1, -100, 4])
def test_labels_outside_the_classes(criterion: nn.Module, label: int) -> None:
    with pytest.raises(IndexError, match=rf"label {label} is outside \[0, 4\)"):
        criterion(torch.zeros(3, 4), torch.tensor([0, label, 1]))


@pytest.mark.usefixtures("without_shape_checks")
@every_loss
@pytest.mark.parametrize(
    ("logits", "target"),
    [
        ((3, 4, 2), torch.zeros(3, dtype=torch.int64)),
        ((4,), torch.zeros(4, dtype=torch.int64)),
    ],
)
def test_logits_that_are_no_matrix(criterion: nn.Module, logits: tuple, target: Tensor) -> None:
    with pytest.raises(InputError, match=rf"logits have the shape \[{logits[0]}.*expected \[B, "):
        criterion(torch.zeros(logits), target)


@pytest.mark.parametrize("name", ["la", "vs", "ldam"])
def test_logits_with_other_classes_than_the_counts(name: str) -> None:
    with pytest.raises(InputError, match=r"logits have the shape \[3, 5\]: expected \[B, 4\]"):
        with_labels[name](torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64))


@pytest.mark.usefixtures("without_shape_checks")
@every_loss
@pytest.mark.parametrize(
    "target",
    [
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(3, 1, dtype=torch.int64),
        torch.zeros(3, dtype=torch.bool),
        torch.zeros(3, dtype=torch.complex64),
    ],
)
def test_targets_that_do_not_fit(criterion: nn.Module, target: Tensor) -> None:
    with pytest.raises(InputError, match=r"target has the shape.*expected labels \[3\]"):
        criterion(torch.zeros(3, 4), target)


@pytest.mark.usefixtures("without_shape_checks")
@every_soft_loss
def test_distributions_that_do_not_fit(criterion: nn.Module) -> None:
    with pytest.raises(InputError, match=r"\[3, 5\] and the type torch.float32.*\[3, 4\]"):
        criterion(torch.zeros(3, 4), torch.zeros(3, 5))


def test_ldam_refuses_distributions() -> None:
    with pytest.raises(InputError, match=r"soft labels of shape \[3, 4\].*one target class"):
        LDAMLoss(COUNTS)(torch.zeros(3, 4), torch.full((3, 4), 0.25))


@pytest.mark.parametrize("value", [-0.5, math.nan, math.inf])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (LogitAdjustedLoss, "tau"),
        (VSLoss, "gamma"),
        (VSLoss, "tau"),
        (LDAMLoss, "max_margin"),
        (LDAMLoss, "scale"),
    ],
)
def test_numbers_out_of_range(kind: type, name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{name} is {value}; it must be finite and at least 0"):
        kind(COUNTS, **{name: value})


def test_focal_gamma_out_of_range() -> None:
    with pytest.raises(InputError, match=r"gamma is -1\.0"):
        FocalLoss(-1.0)


def test_ldam_scale_zero() -> None:
    with pytest.raises(InputError, match="scale is 0"):
        LDAMLoss(COUNTS, scale=0.0)


@pytest.mark.parametrize("kind", [VSLoss, LDAMLoss, class_balanced_weights, DRWSchedule])
@pytest.mark.parametrize("count", [0, -3])
def test_counts_below_one(kind: type, count: int) -> None:
    with pytest.raises(InputError, match=rf"class_counts\[1\] is {count};") as error:
        kind([5, count])
    assert "allow_empty" not in str(error.value)


@repeatable
@given(
    counts=st.lists(st.integers(1, 5000), min_size=1, max_size=12),
    beta=st.sampled_from([0.0, 0.3, 0.9, 0.999, 0.9999, 0.999999]),
)
def test_class_balanced_weights_follow_the_formula(counts: list, beta: float) -> None:
    with localcontext() as context:
        context.prec = 60
        exact = [(1 - Decimal(beta)) / (1 - Decimal(beta) ** n) for n in counts]
        expected = [float(w * len(counts) / sum(exact)) for w in exact]
    weights = class_balanced_weights(counts, beta)
    assert weights.tolist() == pytest.approx(expected, rel=1e-11)
    assert weights.sum().item() == pytest.approx(len(counts), rel=1e-12)


def test_class_balanced_weights_at_their_limits() -> None:
    assert class_balanced_weights(COUNTS, 0.0).tolist() == [1.0] * 4
    assert class_balanced_weights([7] * 5).tolist() == pytest.approx([1.0] * 5, rel=1e-15)
    inverse = torch.tensor(COUNTS, dtype=torch.float64).reciprocal()
    nearly_one = class_balanced_weights(COUNTS, 1 - 1e-12)
    torch.testing.assert_close(nearly_one, 4 * inverse / inverse.sum(), rtol=1e-8, atol=0)


@pytest.mark.parametrize("beta", [-0.1, 1.0, 1.5, math.nan])
def test_beta_out_of_range(beta: float) -> None:
    with pytest.raises(InputError, match=f"beta is {beta}: it must lie in"):
        class_balanced_weights(COUNTS, beta)


def test_weighted_losses_are_averaged_over_samples_not_weights() -> None:
    logits, target = batch()
    weights = ClassBalancedWeights(COUNTS, beta=0.999)
    assert weights.beta == 0.999
    mean = (cross_entropy(logits, target) * weights(target, torch.float64)).mean()
    torch_sum = nn.CrossEntropyLoss(class_balanced_weights(COUNTS, 0.999), reduction="sum")
    torch.testing.assert_close(mean, torch_sum(logits, target) / len(target))


def test_deferred_weights_begin_at_their_epoch() -> None:
    drw = DRWSchedule(COUNTS, start_epoch=2, beta=0.99)
    target = torch.tensor([3, 0, 1])
    balanced = class_balanced_weights(COUNTS, 0.99)[target]
    assert drw(target).tolist() == [1.0] * 3
    seen = {}
    for epoch in (0, 1, 2, 3, 1):
        drw.set_epoch(epoch)
        seen[epoch] = drw(target, torch.float64)
    assert all(seen[epoch].tolist() == [1.0] * 3 for epoch in (0, 1))
    assert all(seen[epoch].equal(balanced) for epoch in (2, 3))


def test_deferred_weights_of_distributions() -> None:
    drw = DRWSchedule(COUNTS, start_epoch=0)
    soft = distributions(5)
    torch.testing.assert_close(
        drw(soft, torch.float64), (soft * class_balanced_weights(COUNTS)).sum(dim=1)
    )


def test_negative_epochs() -> None:
    with pytest.raises(InputError, match="start_epoch is -1"):
        DRWSchedule(COUNTS, start_epoch=-1)
    with pytest.raises(InputError, match="epoch is -2"):
        DRWSchedule(COUNTS).set_epoch(-2)

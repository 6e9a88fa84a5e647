"""CC-SAM against its formulas, written out once more."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from focal_sam import CCSAM

COUNTS = [50, 12, 1]
RATIO, FLAT = 0.05, 0.3


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    return x, torch.tensor([0, 2, 1, 0, 0, 1, 2, 0])


def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), y, reduction="none")


def expected_gradient(
    model: nn.Module, x: Tensor, y: Tensor, names: list[str]
) -> dict[str, Tensor]:
    theta = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}

    def at(parameters: dict[str, Tensor]) -> Tensor:
        logits = torch.func.functional_call(model, parameters, (x,))
        return nn.functional.cross_entropy(logits, y, reduction="none")

    size = sum(theta[n].numel() for n in names)
    w_norm = math.sqrt(sum((theta[n] ** 2).sum().item() for n in names))
    total = (1 - FLAT) * at(theta).mean()
    for k in y.unique().tolist():
        of_class = y == k
        g = torch.autograd.grad(at(theta)[of_class].mean(), [theta[n] for n in names])
        g_norm = math.sqrt(sum((v**2).sum().item() for v in g))
        n_k = max(COUNTS[k] - 1, 1)
        radius = (
            RATIO * math.sqrt(w_norm) / (math.sqrt(g_norm) * math.sqrt(2) * n_k**0.25 * size**0.25)
        )
        noise = {n: radius * v / g_norm * math.sqrt(size) for n, v in zip(names, g, strict=True)}
        moved = {n: p + noise[n] if n in noise else p for n, p in theta.items()}
        total = total + FLAT * at(moved)[of_class].sum() / len(y)
    found = torch.autograd.grad(total, list(theta.values()))
    return dict(zip(theta, found, strict=True))


@pytest.mark.parametrize(
    ("scope", "names"),
    [
        ("classifier", ["2.weight", "2.bias"]),
        ("all", ["0.weight", "0.bias", "2.weight", "2.bias"]),
    ],
)
def test_gradient_equals_independent_derivation(scope: str, names: list[str]) -> None:
    model, (x, y) = network(), batch()
    before = copy.deepcopy(model.state_dict())
    expected = expected_gradient(model, x, y, names)
    method = CCSAM(model, COUNTS, RATIO, FLAT, scope=scope)
    result = method.backward(lambda: (losses(model, x, y), "aux"), y)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-9, atol=1e-12)
        assert torch.equal(p, before[name])
    assert result.loss_perturbed > result.loss
    assert result.aux == "aux"
    assert not model[2]._forward_hooks


def test_no_noise_is_plain_training() -> None:
    model, (x, y) = network(), batch()
    expected = torch.autograd.grad(losses(model, x, y).mean(), list(model.parameters()))
    for ratio, flat in ((0.0, 0.3), (0.05, 0.0)):
        model.zero_grad()
        CCSAM(model, COUNTS, ratio, flat).backward(lambda: losses(model, x, y), y)
        for p, g in zip(model.parameters(), expected, strict=True):
            assert torch.equal(p.grad, g)


@pytest.mark.parametrize(("scope", "passes"), [("classifier", 2), ("all", 4)])
def test_number_of_forward_passes(scope: str, passes: int) -> None:
    model, (x, y) = network(), batch()
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    CCSAM(model, COUNTS, RATIO, scope=scope).backward(lambda: losses(model, x, y), y)
    assert len(seen) == passes


def test_running_statistics_and_dropout_stand_still() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    x, y = batch()
    masks = []
    model[1].register_forward_hook(lambda m, a, out: masks.append(out.detach() == 0))
    CCSAM(model, COUNTS, RATIO).backward(lambda: losses(model, x, y), y)
    assert model[0].num_batches_tracked == 1
    assert torch.equal(*masks)


@pytest.mark.usefixtures("without_type_checks")
class TestErrors:
    def test_arguments(self) -> None:
        with pytest.raises(ValueError, match=r"flat_ratio is 1\.5"):
            CCSAM(network(), COUNTS, flat_ratio=1.5)
        with pytest.raises(ValueError, match="scope is 'head'"):
            CCSAM(network(), COUNTS, scope="head")
        with pytest.raises(ValueError, match="has no option adaptive"):
            CCSAM(network(), COUNTS, adaptive=True)
        with pytest.raises(ValueError, match="pass its classifier"):
            CCSAM(nn.Sequential(nn.Conv2d(1, 1, 1)), COUNTS)

    def test_labels(self) -> None:
        model, (x, y) = network(), batch()
        method = CCSAM(model, COUNTS)
        with pytest.raises(ValueError, match="integer labels"):
            method.backward(lambda: losses(model, x, y))
        with pytest.raises(IndexError, match="label 7"):
            method.backward(lambda: losses(model, x, y), y + 5)

    def test_what_has_no_meaning_for_it(self) -> None:
        model, (x, y) = network(), batch()
        method = CCSAM(model, COUNTS)
        with pytest.raises(ValueError, match="no joint perturbation"):
            method.accumulate([lambda: losses(model, x, y)] * 2, [y, y])
        with pytest.raises(NotImplementedError, match="for each class"):
            method.ascent_gradient(lambda: losses(model, x, y), y)
        with pytest.raises(NotImplementedError, match="for each class"), method.perturbed([]):
            pass

    def test_classifiers_that_do_not_see_samples(self) -> None:
        model, (x, y) = network(), batch()
        method = CCSAM(model, COUNTS, RATIO)
        with pytest.raises(ValueError, match="one row per sample"):
            method.backward(lambda: losses(model, torch.cat([x, x]), torch.cat([y, y]))[:8], y)

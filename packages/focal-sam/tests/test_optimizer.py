"""The optimizer-style wrapper: whose state it is, and that weights cannot be forgotten."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from focal_sam import ASAM, CCSAM, SAM, FocalSAM, SAMOptimizer

COUNTS = [50, 12, 3]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def batch(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(9, 5, generator=generator, dtype=torch.float64), torch.arange(9) % 3


def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), y, reduction="none")


def trained(method: type = FocalSAM, steps: int = 3) -> nn.Module:
    """The reference: `SharpnessMethod.backward` and a plain optimizer."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sharpness = method(model, COUNTS) if method is FocalSAM else method(model)
    for step in range(steps):
        x, y = batch(step)
        sharpness.backward(lambda x=x, y=y: losses(model, x, y), y)
        optimizer.step()
        optimizer.zero_grad()
    return model


def assert_same(model: nn.Module, other: nn.Module) -> None:
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], rtol=1e-12, atol=1e-12)


@pytest.mark.smoke
def test_step_with_a_closure() -> None:
    model = network()
    optimizer = SAMOptimizer(torch.optim.SGD, FocalSAM(model, COUNTS), lr=0.1, momentum=0.9)
    for step in range(3):
        x, y = batch(step)
        loss = optimizer.step(lambda x=x, y=y: losses(model, x, y), y)
        optimizer.zero_grad()
        assert loss == optimizer.last.loss
    assert_same(model, trained())


@pytest.mark.parametrize("method", [SAM, ASAM])
def test_two_steps(method: type) -> None:
    model = network()
    optimizer = SAMOptimizer(torch.optim.SGD, method(model), lr=0.1, momentum=0.9)
    for step in range(3):
        x, y = batch(step)
        losses(model, x, y).mean().backward()
        optimizer.first_step(zero_grad=True)
        losses(model, x, y).mean().backward()
        optimizer.second_step(zero_grad=True)
    assert_same(model, trained(method))


def test_three_steps() -> None:
    model = network()
    optimizer = SAMOptimizer(torch.optim.SGD, FocalSAM(model, COUNTS), lr=0.1, momentum=0.9)
    for step in range(3):
        x, y = batch(step)
        weighted, rest = optimizer.split(losses(model, x, y), y)
        weighted.backward(retain_graph=True)
        optimizer.first_step()
        rest.backward()
        optimizer.second_step()
        weighted, _ = optimizer.split(losses(model, x, y), y)
        weighted.backward()
        optimizer.third_step(zero_grad=True)
    assert_same(model, trained())
    assert optimizer.method.steps == 3


def test_unweighted_losses_are_refused() -> None:
    model, (x, y) = network(), batch()
    before = copy.deepcopy(dict(model.named_parameters()))
    optimizer = SAMOptimizer(torch.optim.SGD, FocalSAM(model, COUNTS), lr=0.1)
    losses(model, x, y).mean().backward()
    with pytest.raises(RuntimeError, match="weights classes"):
        optimizer.first_step()
    weighted, rest = optimizer.split(losses(model, x, y), y)
    optimizer.zero_grad()
    weighted.backward(retain_graph=True)
    optimizer.first_step()
    rest.backward()
    optimizer.second_step()
    losses(model, x, y).mean().backward()
    with pytest.raises(RuntimeError, match="before third_step"):
        optimizer.third_step()
    optimizer.restore()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])


def test_steps_out_of_order() -> None:
    model = network()
    optimizer = SAMOptimizer(torch.optim.SGD, SAM(model), lr=0.1)
    with pytest.raises(RuntimeError, match=r"second_step\(\) is out of order"):
        optimizer.second_step()
    with pytest.raises(RuntimeError, match=r"third_step\(\) is out of order"):
        optimizer.third_step()
    ccsam = SAMOptimizer(torch.optim.SGD, CCSAM(model, COUNTS), lr=0.1)
    with pytest.raises(RuntimeError, match="for each class"):
        ccsam.first_step()


def test_no_closure_gives_the_recipe() -> None:
    optimizer = SAMOptimizer(torch.optim.SGD, SAM(network()), lr=0.1)
    with pytest.raises(RuntimeError, match=r"needs a closure.*criterion"):
        optimizer.step()


def test_wrong_bases() -> None:
    model = network()
    with pytest.raises(TypeError, match="already built"):
        SAMOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), SAM(model), lr=0.2)


@pytest.mark.usefixtures("without_type_checks")
def test_what_is_no_optimizer() -> None:
    with pytest.raises(TypeError, match="not a torch"):
        SAMOptimizer("sgd", SAM(network()))


def test_state_is_the_base_optimizers_own_before_and_after_loading() -> None:
    model, (x, y) = network(), batch()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = SAMOptimizer(base, FocalSAM(model, COUNTS))
    optimizer.step(lambda: losses(model, x, y), y)
    saved = copy.deepcopy(optimizer.state_dict())
    plain = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    plain.load_state_dict(saved)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    assert optimizer.defaults is base.defaults
    for p in model.parameters():
        assert torch.equal(base.state[p]["momentum_buffer"], plain.state[p]["momentum_buffer"])
    optimizer.param_groups[0]["lr"] = 0.0
    weight = model[1].weight.detach().clone()
    optimizer.step(lambda: losses(model, x, y), y)
    assert torch.equal(model[1].weight, weight)


def test_schedulers_and_hooks_reach_the_base_optimizer() -> None:
    model = network()
    optimizer = SAMOptimizer(torch.optim.SGD, FocalSAM(model, COUNTS), lr=0.1, momentum=0.9)
    plain_model = network()
    plain = torch.optim.SGD(plain_model.parameters(), lr=0.1, momentum=0.9)
    method = FocalSAM(plain_model, COUNTS)
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 4) for o in (optimizer, plain)]
    calls: list[object] = []
    optimizer.register_step_post_hook(lambda *args: calls.append(args[0]))
    for step in range(4):
        x, y = batch(step)
        optimizer.step(lambda x=x, y=y: losses(model, x, y), y)
        optimizer.zero_grad()
        method.backward(lambda x=x, y=y: losses(plain_model, x, y), y)
        plain.step()
        plain.zero_grad()
        for scheduler in schedulers:
            scheduler.step()
    assert_same(model, plain_model)
    assert calls == [optimizer.base] * 4


def test_running_statistics_wait_between_the_steps() -> None:
    model, (x, y) = network(), batch()
    optimizer = SAMOptimizer(torch.optim.SGD, SAM(model), lr=0.1)
    losses(model, x, y).mean().backward()
    optimizer.first_step()
    losses(model, x, y).mean().backward()
    optimizer.second_step()
    assert model[0].num_batches_tracked == 1


def test_added_groups_copies_and_text() -> None:
    model = network()
    optimizer = SAMOptimizer(torch.optim.SGD, SAM(model), lr=0.1)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "lr": 0.5})
    assert [g["lr"] for g in optimizer.base.param_groups] == [0.1, 0.5]
    assert "SAM" in repr(optimizer)
    assert "SGD" in repr(optimizer)
    twin = copy.deepcopy(optimizer)
    assert [g["lr"] for g in twin.param_groups] == [0.1, 0.5]
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True)["param_groups"][1]["lr"] == 0.5


def test_methods_built_over_parameters() -> None:
    model, (x, y) = network(), batch()
    optimizer = SAMOptimizer(torch.optim.SGD, SAM(model.parameters()), lr=0.1)
    before = model[1].weight.detach().clone()
    optimizer.step(lambda: losses(model, x, y))
    assert not torch.equal(model[1].weight, before)

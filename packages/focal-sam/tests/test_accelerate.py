import os

import pytest

pytest.importorskip("accelerate")

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from focal_sam.methods import FocalSAM
from shared_core.testing import run_gloo

COUNTS = [60, 30, 10]
RHO, GAMMA, LAM = 0.3, 2.0, 0.9


@pytest.fixture(autouse=True)
def fresh_state():
    """An accelerator keeps its settings for the process."""
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def data(size):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (size,), generator=generator)


def loader(size, batch_size=4):
    return DataLoader(TensorDataset(*data(size)), batch_size=batch_size)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def method(model, **options):
    return FocalSAM(model, COUNTS, rho=RHO, gamma=GAMMA, lam=LAM, **options)


criterion = nn.CrossEntropyLoss(reduction="none")


def difference(a, b):
    return max(
        (p.detach() - q.detach()).abs().max().item()
        for p, q in zip(a.parameters(), b.parameters(), strict=True)
    )


@pytest.fixture
def gradient(focal_sam_gradient):
    """The gradient of a batch from its definition."""
    weights = LAM * (1 - torch.tensor(COUNTS, dtype=torch.float64) / sum(COUNTS)) ** GAMMA

    def compute(model, x, y):
        return list(focal_sam_gradient(model, x, y, weights, RHO).values())

    return compute


@pytest.fixture
def by_hand(gradient):
    """Trains on lists of micro-batches, each step with their mean gradient."""

    def train(model, steps):
        optimizer = sgd(model)
        for batches in steps:
            gradients = [gradient(model, *batch) for batch in batches]
            for parameter, *parts in zip(model.parameters(), *gradients, strict=True):
                parameter.grad = sum(parts) / len(parts)
            optimizer.step()
        return model

    return train


@pytest.mark.smoke
def test_a_plain_loop_with_three_changed_lines(by_hand):
    accelerator = Accelerator(cpu=True)
    plain = network()
    optimizer = sgd(plain)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    model, wrapped, batches = accelerator.prepare(plain, optimizer, loader(12))
    fsam = method(model)
    for x, y in batches:
        closure = lambda: criterion(model(x), y)  # noqa: E731, B023
        fsam.backward(closure, y, accelerator=accelerator)
        wrapped.step()
        wrapped.zero_grad()
    scheduler.step()
    assert difference(plain, by_hand(network(), [[b] for b in loader(12)])) < 1e-12
    assert wrapped.optimizer is optimizer
    assert type(optimizer) is torch.optim.SGD
    assert set(optimizer.state_dict()["state"][0]) == {"momentum_buffer"}


def test_accumulation_is_the_mean_of_the_micro_gradients(by_hand):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    plain, calls = network(), []
    plain.register_forward_hook(lambda *_: calls.append(1))
    model, optimizer, batches = accelerator.prepare(plain, sgd(plain), loader(16))
    fsam = method(model)
    for x, y in batches:
        with accelerator.accumulate(model):
            fsam.backward(lambda: criterion(model(x), y), y, accelerator=accelerator)  # noqa: B023
            optimizer.step()
            optimizer.zero_grad()
    first, second, third, fourth = loader(16)
    assert difference(plain, by_hand(network(), [[first, second], [third, fourth]])) < 1e-12
    assert len(calls) == 2 * 4


def test_clipping_sees_the_finished_gradient(gradient):
    accelerator = Accelerator(cpu=True)
    plain = network()
    model, _optimizer, batches = accelerator.prepare(plain, sgd(plain), loader(4))
    [(x, y)] = batches
    method(model).backward(lambda: criterion(model(x), y), y, accelerator=accelerator)
    norm = accelerator.clip_grad_norm_(model.parameters(), 0.01)
    expected = gradient(network(), *data(4))
    whole = torch.cat([g.flatten() for g in expected]).norm()
    assert norm.item() == pytest.approx(whole.item(), rel=1e-12)
    for parameter, gradient in zip(plain.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient * 0.01 / (whole + 1e-6))


def test_bfloat16_equals_a_plain_loop_with_autocast(by_hand):
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    plain = network(torch.float32)
    model, optimizer, batches = accelerator.prepare(plain, sgd(plain), loader(12))
    fsam, sharpness = method(model), []
    for x, y in batches:
        closure = lambda: criterion(model(x.float()), y)  # noqa: E731, B023
        sharpness.append(fsam.backward(closure, y, accelerator=accelerator).sharpness.item())
        optimizer.step()
        optimizer.zero_grad()

    other = network(torch.float32)
    optimizer, fsam = sgd(other), method(other)
    for x, y in loader(12):

        def closure(x=x, y=y):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = other(x.float())
            assert logits.dtype == torch.bfloat16
            return criterion(logits.float(), y)

        fsam.backward(closure, y)
        optimizer.step()
        optimizer.zero_grad()
    assert difference(plain, other) == 0
    assert min(sharpness) > 0.01
    # Half precision is not far from the truth.
    assert difference(plain.double(), by_hand(network(), [[b] for b in loader(12)])) < 0.02


class Watched(torch.amp.GradScaler):
    """A gradient scaler for the CPU that counts its updates."""

    def __init__(self):
        super().__init__("cpu", init_scale=1024.0)
        self.updates = 0

    def update(self, new_scale=None):
        self.updates += 1
        super().update(new_scale)


@pytest.mark.parametrize("factor", [1.0, float("inf")])
def test_the_accelerators_scaler_scales_both_passes(factor, by_hand):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    accelerator.scaler = Watched()
    plain = network()
    model, optimizer, batches = accelerator.prepare(plain, sgd(plain), loader(8))
    fsam = method(model)
    for x, y in batches:
        with accelerator.accumulate(model):
            closure = lambda: factor * criterion(model(x), y)  # noqa: E731, B023
            result = fsam.backward(closure, y, accelerator=accelerator)
            optimizer.step()
            optimizer.zero_grad()
    assert accelerator.scaler.updates == 1
    skipped = factor > 1
    assert bool(result.skipped) is skipped
    assert accelerator.optimizer_step_was_skipped is skipped
    assert accelerator.scaler.get_scale() == (512 if skipped else 1024)
    expected = network() if skipped else by_hand(network(), [list(loader(8))])
    assert difference(plain, expected) < 1e-9


def _join(rank, world):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29571",
        "ACCELERATE_USE_CPU": "1",
    }


def _train(accelerator, size, **options):
    """Train by accelerate; return the wrapped and the plain model."""
    plain = network()
    model, optimizer, batches = accelerator.prepare(plain, sgd(plain), loader(size, 2))
    fsam = method(model, **options)
    for x, y in batches:
        with accelerator.accumulate(model):
            fsam.backward(lambda: criterion(model(x), y), y, accelerator=accelerator)  # noqa: B023
            optimizer.step()
            optimizer.zero_grad()
    return model, plain


def _ddp(rank, world, expected):
    _join(rank, world)
    for sync in ("local", "global"):
        accelerator = Accelerator(cpu=True)
        model, whole = _train(accelerator, 16, sync=sync)
        assert isinstance(model, nn.parallel.DistributedDataParallel)
        assert difference(whole, expected[sync]) < 1e-12
    AcceleratorState._reset_state(False)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    _, whole = _train(accelerator, 16)
    assert difference(whole, expected["accumulated"]) < 1e-12


def test_ddp_averages_the_gradients_of_two_processes(tmp_path, by_hand):
    batches = list(loader(16, 2))
    # accelerate deals the batches out in turn, so what both processes see at once are neighbours.
    expected = {
        "local": by_hand(network(), [batches[i : i + 2] for i in range(0, 8, 2)]),
        "global": by_hand(network(), [[batch] for batch in loader(16, 4)]),
        "accumulated": by_hand(network(), [batches[:4], batches[4:]]),
    }
    run_gloo(_ddp, tmp_path, expected)

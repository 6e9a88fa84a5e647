"""The training loop against a loop by hand, and two processes against one."""

import math
import os

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from edge_ood import EdgeLoss, edge_loss, joint_energy
from edge_ood.loop import collect, train_edge
from edge_ood.losses import MultiLabelOELoss
from edge_ood.models import create_model
from shared_core.errors import InputError
from shared_core.testing import run_gloo


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batch(n, m, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=g, dtype=torch.float64)
    y = (torch.rand(n, 3, generator=g) < 0.4).double()
    return x, y, torch.randn(m, 5, generator=g, dtype=torch.float64) + 1


@pytest.mark.smoke
def test_it_equals_a_loop_by_hand():
    pairs = [batch(6, 4, 1), batch(3, 4, 2)]
    ours, theirs = network(), network()
    found = train_edge(
        ours, pairs, EdgeLoss(beta=1.0), torch.optim.SGD(ours.parameters(), 0.1), epochs=4, tau=2
    )
    optimizer = torch.optim.SGD(theirs.parameters(), 0.1)
    for epoch in range(4):
        losses = []
        for x, y, outliers in pairs:
            optimizer.zero_grad()
            z = theirs(torch.cat([x, outliers]))
            n = len(x)
            loss = edge_loss(z[:n], y, z[n:], beta=1.0 if epoch >= 2 else 0.0).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert found[epoch]["loss"] == pytest.approx(sum(losses) / 2, rel=1e-6)
        assert (found[epoch]["l_gap"] > 0) == (epoch >= 2)
        assert found[epoch]["energy_id"] > 0
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_resuming_finds_its_place_in_the_schedule():
    pairs = [batch(6, 4)]
    whole, parts = network(), network()
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (whole, parts)]
    train_edge(whole, pairs, EdgeLoss(beta=1.0), optimizers[0], epochs=6, tau=0.5)

    class StopError(Exception):
        pass

    def stop(epoch, means):
        if epoch == 3:
            raise StopError

    options = {"epochs": 6, "tau": 0.5}
    with pytest.raises(StopError):
        train_edge(parts, pairs, EdgeLoss(beta=1.0), optimizers[1], after_epoch=stop, **options)
    train_edge(parts, pairs, EdgeLoss(beta=1.0), optimizers[1], start_epoch=4, **options)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(a, b)


def test_losses_of_every_kind_and_mixed_precision():
    x, y, outliers = (t.float() for t in batch(6, 4))
    for criterion, given in (
        (nn.BCEWithLogitsLoss(), (x, y)),
        (MultiLabelOELoss(), (x, y, outliers)),
        (EdgeLoss(), (x, y, outliers)),
    ):
        model = network().float()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        [means] = train_edge(model, [given], criterion, optimizer, epochs=1, dtype=torch.bfloat16)
        assert math.isfinite(means["loss"])
        assert ("energy_oe" in means) == (len(given) == 3)


@pytest.mark.usefixtures("without_type_checks")
def test_errors():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(InputError, match="no batch"):
        train_edge(model, [], EdgeLoss(), optimizer, epochs=1)
    x, y, outliers = batch(6, 4)
    with pytest.raises(InputError, match="diverged"):
        train_edge(model, [(x * math.inf, y, outliers)], EdgeLoss(), optimizer, epochs=1)
    with pytest.raises(InputError, match="nothing to score"):
        collect(model, [])


def test_collect():
    model = create_model("small_cnn", 3).train()
    x = torch.randn(5, 3, 32, 32)
    out = collect(model, [(x[:3], torch.ones(3, 3)), (x[3:], torch.zeros(2, 3))], features=True)
    assert model.training
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(out.logits, model(x))
        torch.testing.assert_close(out.features, model.features(x))
    assert out.targets.sum() == 9
    assert collect(model, [x]).targets.numel() == 0


def gathered(rank, world):
    """The joined batch on one process is what two processes compute with gather=True."""
    for sizes, outlier_sizes in (((6, 6), (4, 4)), ((7, 3), (2, 5))):
        whole = batch(sum(sizes), sum(outlier_sizes))
        options = {"beta": 1.0, "k": 0.4, "margin": 0.2}
        single = network()
        z, oe = single(whole[0]), single(whole[2])
        expected = edge_loss(z, whole[1], oe, **options)
        expected.loss.backward()
        start, oe_start = sum(sizes[:rank]), sum(outlier_sizes[:rank])
        mine = slice(start, start + sizes[rank])
        others = slice(oe_start, oe_start + outlier_sizes[rank])
        model = DistributedDataParallel(network())
        both = model(torch.cat([whole[0][mine], whole[2][others]]))
        n = sizes[rank]
        out = EdgeLoss(gather=True, **options)(both[:n], whole[1][mine], both[n:])
        out.loss.backward()
        torch.testing.assert_close(out.loss, expected.loss, rtol=1e-12, atol=0)
        assert out.n_tail == expected.n_tail
        for a, b in zip(model.parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)
        # Without it, every process has a tail of its own.
        local = edge_loss(both[:n].detach(), whole[1][mine], both[n:].detach(), **options)
        alone = edge_loss(z[mine].detach(), whole[1][mine], oe[others].detach(), **options)
        torch.testing.assert_close(local.loss, alone.loss)
    dist.barrier()


def accelerated(rank, world):
    """Evaluation gathers every sample once, whatever the last batch holds."""
    accelerate = pytest.importorskip("accelerate")
    from torch.utils.data import DataLoader, TensorDataset

    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="localhost",
        MASTER_PORT="29573",
        ACCELERATE_USE_CPU="1",
    )
    accelerator = accelerate.Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    x, y, _ = batch(11, 1)
    model = network()
    loader = accelerator.prepare(DataLoader(TensorDataset(x, y), batch_size=2))
    out = collect(model, loader, accelerator=accelerator)
    assert len(out.logits) == 11
    with torch.no_grad():
        expected = joint_energy(network()(x)).float()
    torch.testing.assert_close(joint_energy(out.logits).sort().values, expected.sort().values)


def both_cases(rank, world):
    gathered(rank, world)
    accelerated(rank, world)


def test_two_processes(tmp_path):
    pytest.importorskip("accelerate")
    run_gloo(both_cases, tmp_path)

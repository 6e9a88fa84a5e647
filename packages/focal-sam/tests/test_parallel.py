"""DDP and FSDP2 on two CPU processes against their single-process definitions."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from focal_sam import CCSAM, SAM, FocalSAM, SharpnessMethod
from shared_core.testing import run_gloo

COUNTS = [50, 12, 3]


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def shard(rank: int, sizes: tuple[int, ...] = (6, 6)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(sizes), 5, generator=generator, dtype=torch.float64)
    y = torch.arange(sum(sizes)) ** 2 % 3
    start = sum(sizes[:rank])
    return x[start : start + sizes[rank]], y[start : start + sizes[rank]]


def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), y, reduction="none")


def gradient(method_of: type, model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    method = method_of(model, COUNTS) if method_of is not SAM else SAM(model, 0.2)
    method.backward(lambda: losses(model, x, y), y)
    return [p.grad.clone() for p in model.parameters()]


def count_all_reduces(model: DistributedDataParallel) -> list[int]:
    """Sizes of the gradient buckets that DDP sends from now on."""
    sent: list[int] = []

    def hook(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        sent.append(bucket.buffer().numel())
        work = dist.all_reduce(bucket.buffer() / dist.get_world_size(), async_op=True)
        future = work.get_future()
        return future.then(lambda f: f.value()[0])

    model.register_comm_hook(None, hook)
    return sent


def ddp_local(rank: int, world: int) -> None:
    for method in (FocalSAM, SAM, CCSAM):
        each = [gradient(method, network(), *shard(r)) for r in range(world)]
        expected = [torch.stack(g).mean(0) for g in zip(*each, strict=True)]
        model = DistributedDataParallel(network())
        sent = count_all_reduces(model)
        found = gradient(method, model, *shard(rank))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
        assert len(sent) == 1


def ddp_bucket_views(rank: int, world: int) -> None:
    model = DistributedDataParallel(network(), gradient_as_bucket_view=True)
    plain = DistributedDataParallel(network())
    for of in (model, plain):
        method = SharpnessMethod(of, 0.8, 0.2)
        focal = FocalSAM(of, COUNTS)
        optimizer = torch.optim.SGD(of.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            x, y = shard(rank)
            method.backward(lambda of=of, x=x, y=y: losses(of, x, y), y, scale=0.5)
            focal.backward(lambda of=of, x=x, y=y: losses(of, x, y), y, scale=0.5)
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def ddp_global(rank: int, world: int) -> None:
    for sizes in ((6, 6), (8, 3)):
        both = [shard(r, sizes) for r in range(world)]
        x, y = torch.cat([b[0] for b in both]), torch.cat([b[1] for b in both])
        single = network()
        expected_result = FocalSAM(single, COUNTS).backward(
            lambda m=single, x=x, y=y: losses(m, x, y), y
        )
        model = DistributedDataParallel(network())
        sent = count_all_reduces(model)
        method = FocalSAM(model, COUNTS, sync="global")
        x, y = shard(rank, sizes)
        result = method.backward(lambda m=model, x=x, y=y: losses(m, x, y), y)
        for p, q in zip(model.parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(result.grad_norm, expected_result.grad_norm, rtol=1e-6, atol=0)
        assert len(sent) == 1  # beside the one of the ascent gradient


def ddp_accumulation(rank: int, world: int) -> None:
    parts = [slice(0, 2), slice(2, 6)]
    single = [network() for _ in range(world)]
    for r, m in enumerate(single):
        x, y = shard(r)
        FocalSAM(m, COUNTS).backward(lambda m=m, x=x, y=y: losses(m, x, y), y)
    model = DistributedDataParallel(network())
    sent = count_all_reduces(model)
    x, y = shard(rank)
    FocalSAM(model, COUNTS).accumulate(
        [lambda s=s: losses(model, x[s], y[s]) for s in parts], [y[s] for s in parts]
    )
    for p, *q in zip(model.parameters(), *(m.parameters() for m in single), strict=True):
        torch.testing.assert_close(p.grad, torch.stack([v.grad for v in q]).mean(0))
    assert len(sent) == 1


def fsdp2(rank: int, world: int) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    for method_of in (FocalSAM, SAM):
        for sizes in ((6, 6), (8, 3)):
            both = [shard(r, sizes) for r in range(world)]
            x, y = torch.cat([b[0] for b in both]), torch.cat([b[1] for b in both])
            single = network(torch.float32)
            expected = gradient(method_of, single, x.float(), y)
            model = network(torch.float32)
            for layer in (model[0], model[2]):
                fully_shard(layer)
            fully_shard(model)
            model.set_requires_gradient_sync(False)  # as a loop that accumulates has it
            before = [p.full_tensor().clone() for p in model.parameters()]
            x, y = shard(rank, sizes)
            found = gradient(method_of, model, x.float(), y)
            for p, g, old, e in zip(model.parameters(), found, before, expected, strict=True):
                assert isinstance(g, DTensor)
                torch.testing.assert_close(g.full_tensor(), e, rtol=1e-4, atol=1e-6)
                assert torch.equal(p.full_tensor(), old)


def all_of_ddp(rank: int, world: int) -> None:
    """One pair of processes for all: starting them takes longer than what they do."""
    for case in (ddp_local, ddp_bucket_views, ddp_global, ddp_accumulation):
        case(rank, world)


def test_two_processes(tmp_path: Path) -> None:
    run_gloo(all_of_ddp, tmp_path)


@pytest.mark.skipif(
    not hasattr(torch.cpu.Stream(), "record_event"),
    reason=f"torch {torch.__version__} cannot run FSDP2 on a CPU",
)
def test_two_processes_with_fsdp2(tmp_path: Path) -> None:
    run_gloo(fsdp2, tmp_path)


def test_fsdp1_is_refused() -> None:
    class FullyShardedDataParallel(nn.Linear):
        """Looks like FSDP1 to a check by name."""

    with pytest.raises(NotImplementedError, match="fully_shard"):
        SAM(nn.Sequential(FullyShardedDataParallel(2, 2)))

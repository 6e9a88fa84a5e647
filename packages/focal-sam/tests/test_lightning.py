import importlib
import sys

import pytest

pytest.importorskip("lightning")

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from focal_sam.lightning import FocalSAMMixin
from focal_sam.methods import SAM, FocalSAM
from shared_core.errors import InputError, MissingExtraError

COUNTS = [60, 30, 10]
RHO, GAMMA, LAM = 0.3, 2.0, 0.9

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "The 'train_dataloader' does not have many workers",
        "The number of training batches",
        "You are trying to `self.log",
        "`isinstance.treespec, LeafSpec.` is deprecated",
    )
]


class Classifier(FocalSAMMixin):
    def __init__(self, scheduler=None, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(5, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)
        ).double()
        self.scheduler = scheduler
        self.results = []

    def configure_sharpness(self, model):
        return FocalSAM(model, COUNTS, rho=RHO, gamma=GAMMA, lam=LAM)

    def training_losses(self, batch):
        x, y = batch
        return F.cross_entropy(self.layers(x), y, reduction="none")

    def training_step(self, batch, batch_idx):
        self.results.append(self.sharpness_step(batch, batch_idx))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        if self.scheduler is None:
            return optimizer
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule} | self.scheduler}


def data(size=10):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (size,), generator=generator)
    return x, y


def loader(size=10, batch_size=4):
    return DataLoader(TensorDataset(*data(size)), batch_size=batch_size)


def trainer(folder, **options):
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(folder),
    }
    return Trainer(**(settings | options))


@pytest.fixture
def gradient(focal_sam_gradient):
    """The gradient of a batch from its definition."""
    weights = LAM * (1 - torch.tensor(COUNTS, dtype=torch.float64) / sum(COUNTS)) ** GAMMA

    def compute(layers, x, y):
        return list(focal_sam_gradient(layers, x, y, weights, RHO).values())

    return compute


@pytest.fixture
def by_hand(gradient):
    """Trains on lists of micro-batches, each step with their mean gradient."""

    def train(layers, steps, rates=None, clip=None, scale=1.0):
        optimizer = torch.optim.SGD(layers.parameters(), lr=0.1, momentum=0.9)
        for turn, batches in enumerate(steps):
            for group in optimizer.param_groups:
                group["lr"] = rates[turn] if rates else 0.1
            gradients = [gradient(layers, *batch) for batch in batches]
            for parameter, *parts in zip(layers.parameters(), *gradients, strict=True):
                parameter.grad = scale * sum(parts) / len(parts)
            if clip:
                nn.utils.clip_grad_norm_(layers.parameters(), clip)
            optimizer.step()
        return layers

    return train


def difference(a, b):
    return max(
        (p - q).abs().max().item() for p, q in zip(a.parameters(), b.parameters(), strict=True)
    )


@pytest.mark.smoke
def test_training_follows_the_definition(tmp_path, by_hand):
    model = Classifier()
    trainer(tmp_path, max_epochs=2).fit(model, loader())
    steps = [[batch] for batch in loader()] * 2
    assert difference(model.layers, by_hand(Classifier().layers, steps)) < 1e-12
    assert len(model.results) == 6
    assert model.sharpness.steps == 6
    assert not any(p.grad is not None for p in model.parameters())


def test_two_forward_passes_per_micro_batch(tmp_path):
    model, calls = Classifier(), []
    model.layers.register_forward_hook(lambda *_: calls.append(1))
    model.accumulate = 2
    trainer(tmp_path).fit(model, loader())
    assert len(calls) == 6


def test_accumulation_takes_the_mean_of_what_is_there(tmp_path, by_hand):
    model = Classifier()
    model.accumulate = 2
    runner = trainer(tmp_path, max_epochs=2)
    runner.fit(model, loader())
    first, second, third = loader()
    steps = [[first, second], [third]] * 2
    assert difference(model.layers, by_hand(Classifier().layers, steps)) < 1e-12
    assert runner.global_step == 4


def test_an_iterable_of_unknown_length_ends_with_a_step(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from loader()

    model = Classifier()
    model.accumulate = 2
    runner = trainer(tmp_path)
    runner.fit(model, DataLoader(Stream(), batch_size=None))
    assert runner.global_step == 2


@pytest.mark.parametrize(
    ("scheduler", "rates"),
    [
        ({"interval": "step"}, [0.1, 0.05, 0.025, 0.0125, 0.00625, 0.003125]),
        ({"interval": "step", "frequency": 2}, [0.1, 0.1, 0.05, 0.05, 0.025, 0.025]),
        ({"interval": "epoch"}, [0.1] * 3 + [0.05] * 3),
    ],
)
def test_schedulers_step(scheduler, rates, tmp_path, by_hand):
    model = Classifier(scheduler)
    trainer(tmp_path, max_epochs=2).fit(model, loader())
    steps = [[batch] for batch in loader()] * 2
    assert difference(model.layers, by_hand(Classifier().layers, steps, rates)) < 1e-12


def test_several_optimizers_and_a_scheduler_that_needs_a_metric(tmp_path, by_hand):
    class Two(Classifier):
        def configure_optimizers(self):
            first, _, _, last = self.layers
            halves = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (first, last)]
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(halves[0])
            every_other = torch.optim.lr_scheduler.ExponentialLR(halves[1], 0.5)
            config = {"scheduler": every_other, "interval": "step", "frequency": 2}
            return halves, [{"scheduler": plateau}, config]

    model = Two()
    trainer(tmp_path).fit(model, loader())
    steps = [[batch] for batch in loader()]
    reference = by_hand(Classifier().layers, steps)
    assert difference(model.layers[0], reference[0]) < 1e-12
    assert model.trainer.optimizers[1].param_groups[0]["lr"] == 0.05


def test_clipping_acts_on_the_finished_gradient(tmp_path, by_hand):
    model = Classifier()
    model.accumulate, model.clip_val = 2, 0.05
    trainer(tmp_path).fit(model, loader(8))
    steps = [list(loader(8))]
    expected = by_hand(Classifier().layers, steps, clip=0.05)
    assert difference(model.layers, expected) < 1e-12
    assert difference(expected, by_hand(Classifier().layers, steps)) > 1e-3


class Watched(torch.amp.GradScaler):
    """A gradient scaler for the CPU that counts its calls."""

    def __init__(self):
        super().__init__("cpu", init_scale=1024.0)
        self.calls = []
        self.scaled = 0

    def scale(self, outputs):
        self.scaled += 1
        return super().scale(outputs)

    def unscale_(self, optimizer):
        self.calls.append("unscale_")
        super().unscale_(optimizer)

    def update(self, new_scale=None):
        self.calls.append("update")
        super().update(new_scale)


def with_scaler(model, folder, scaler):
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    trainer(folder, plugins=[plugin]).fit(model, loader(8))


class OwnPrecision(Classifier):
    """Computes in float64 in spite of autocast, so that a scaler changes nothing but the scale."""

    def training_losses(self, batch):
        with torch.autocast("cpu", enabled=False):
            return super().training_losses(batch)


def test_a_scaler_scales_both_passes_and_updates_once_a_step(tmp_path, by_hand):
    model, scaler = OwnPrecision(), Watched()
    model.accumulate, model.clip_val = 2, 0.05
    with_scaler(model, tmp_path, scaler)
    expected = by_hand(Classifier().layers, [list(loader(8))], clip=0.05)
    assert difference(model.layers, expected) < 1e-9
    assert scaler.calls == ["unscale_", "update"]
    # Not the two backward passes alone: the ascent gradient of a half may not underflow either.
    assert scaler.scaled > 2 * 2


def test_an_overflow_skips_the_step_and_halves_the_scale(tmp_path):
    class Overflows(OwnPrecision):
        def training_losses(self, batch):
            return super().training_losses(batch) * float("inf")

    model, scaler = Overflows(), Watched()
    with_scaler(model, tmp_path, scaler)
    assert difference(model.layers, Classifier().layers) == 0
    assert scaler.get_scale() == 1024 / 4
    assert all(bool(r.skipped) for r in model.results)


def test_bfloat16_perturbs_what_autocast_sees(tmp_path):
    class Single(Classifier):
        def configure_sharpness(self, model):
            return SAM(model, rho=0.5)

        def training_losses(self, batch):
            logits = self.layers(batch[0].float())
            assert logits.dtype == torch.bfloat16
            return F.cross_entropy(logits.float(), batch[1], reduction="none")

    model = Single().float()
    trainer(tmp_path, precision="bf16-mixed").fit(model, loader(4))
    [result] = model.results
    assert result.sharpness > 0.1


def test_default_step_logs_and_targets_are_found(tmp_path):
    class Logging(Classifier):
        training_step = FocalSAMMixin.training_step

        def training_losses(self, batch):
            return super().training_losses((batch["x"], batch["labels"])), batch["x"]

    x, y = data(4)
    model = Logging()
    runner = trainer(tmp_path)
    runner.fit(model, DataLoader([{"x": a, "labels": b} for a, b in zip(x, y, strict=True)], 4))
    expected = F.cross_entropy(Classifier().layers(x), y).item()
    assert runner.callback_metrics["train_loss"].item() == pytest.approx(expected, rel=1e-6)
    assert runner.callback_metrics["train_sharpness"] > 0
    with pytest.raises(InputError, match="the batch is a Tensor without 'labels'"):
        model.training_target(x)


class Changing(Classifier):
    """A method whose radius and phase have to be in the checkpoint."""

    def configure_sharpness(self, model):
        return FocalSAM(model, COUNTS, rho=RHO, interval=2)

    def on_train_batch_start(self, batch, batch_idx):
        # Lightning restores no generators.
        torch.manual_seed(self.global_step)

    def training_step(self, batch, batch_idx):
        self.sharpness.set_rho(self.sharpness.rho * 0.9)
        super().training_step(batch, batch_idx)


def test_resumed_training_is_bit_identical(tmp_path):
    def fit(epochs, **options):
        model = Changing({"interval": "step"}, dropout=0.3)
        runner = trainer(tmp_path, max_epochs=epochs)
        runner.fit(model, loader(), **options)
        return model, runner

    whole, _ = fit(3)
    _, runner = fit(1)
    runner.save_checkpoint(tmp_path / "one.ckpt", weights_only=False)
    assert torch.load(tmp_path / "one.ckpt", weights_only=True)["sharpness_method"]["steps"] == 3
    resumed, _ = fit(3, ckpt_path=tmp_path / "one.ckpt")
    assert difference(whole.layers, resumed.layers) == 0
    assert resumed.sharpness.state_dict() == whole.sharpness.state_dict()
    assert resumed.sharpness.steps == 9
    assert len(resumed.results) == 6


def test_the_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.delitem(sys.modules, "focal_sam.lightning")
    with pytest.raises(MissingExtraError, match=r"focal-sam\[lightning\]"):
        importlib.import_module("focal_sam.lightning")


def test_messages_of_what_is_missing(tmp_path):
    class Empty(FocalSAMMixin):
        pass

    with pytest.raises(NotImplementedError, match=r"Empty\.configure_sharpness"):
        Empty().configure_sharpness(None)
    with pytest.raises(NotImplementedError, match=r"Empty\.training_losses"):
        Empty().training_losses(None)


def test_it_mixes_with_a_module_of_ones_own(tmp_path, by_hand):
    class Own(LightningModule):
        def __init__(self):
            super().__init__()
            self.layers = Classifier().layers
            self.saved = []

        def on_save_checkpoint(self, checkpoint):
            self.saved.append(set(checkpoint))

    class Mixed(FocalSAMMixin, Own):
        configure_sharpness = Classifier.configure_sharpness
        training_losses = Classifier.training_losses

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    model = Mixed()
    runner = trainer(tmp_path)
    runner.fit(model, loader())
    steps = [[batch] for batch in loader()]
    assert difference(model.layers, by_hand(Classifier().layers, steps)) < 1e-12
    runner.save_checkpoint(tmp_path / "a.ckpt")
    assert model.saved


def test_one_all_reduce_of_the_whole_gradient_a_step(tmp_path, by_hand, gradient):
    """DDP with one process, whose communication hook plays the part of a second one."""
    sent = []

    def hook(state, bucket):
        sent.append(bucket.buffer().clone())
        future = torch.futures.Future()
        future.set_result(bucket.buffer() / 2)
        return future

    class Hooked(Classifier):
        def on_train_start(self):
            self.trainer.strategy.model.register_comm_hook(None, hook)

    model = Hooked()
    model.accumulate = 2
    strategy = DDPStrategy(process_group_backend="gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        runner = trainer(tmp_path, strategy=strategy, use_distributed_sampler=False)
        runner.fit(model, loader(16))
    finally:
        dist.destroy_process_group()
    assert isinstance(model._sharpness.model, DistributedDataParallel)
    assert model.sharpness.model is model  # Lightning took the wrapper off
    assert model.sharpness.steps == 4
    first, second, third, fourth = loader(16)
    reference = Classifier().layers
    gradients = [gradient(reference, *batch) for batch in (first, second)]
    whole = torch.cat([(a + b).flatten() / 2 for a, b in zip(*gradients, strict=True)])
    assert len(sent) == 2
    assert (sent[0].sort().values - whole.sort().values).abs().max() < 1e-12
    halved = by_hand(reference, [[first, second], [third, fourth]], scale=0.5)
    assert difference(model.layers, halved) < 1e-12

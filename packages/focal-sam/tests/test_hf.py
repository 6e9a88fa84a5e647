import importlib
import itertools
import json
import os
import sys

import pytest

pytest.importorskip("transformers")

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from focal_sam.hf import FocalSAMTrainer
from focal_sam.methods import SAM, FocalSAM
from shared_core.errors import InputError, MissingExtraError
from shared_core.testing import run_gloo

COUNTS = [60, 30, 10]
CLASSES = len(COUNTS)
RHO, GAMMA, LAM = 0.3, 2.0, 0.9

pytestmark = pytest.mark.filterwarnings("ignore:`torch.cpu.amp.autocast:FutureWarning")


def vit(dropout=0.0):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=CLASSES,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=0.0,
    )
    return ViTForImageClassification(config).double()


def bert(dropout=0.0):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
        num_labels=CLASSES,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config).double()


class Plain(nn.Module):
    """A model outside transformers, whose forward takes no further keywords."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3))
        self.double()

    def forward(self, pixel_values, labels=None):
        logits = self.layers(pixel_values)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return {"logits": logits} if loss is None else {"loss": loss, "logits": logits}


def images(size=24):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 1, 8, 8, generator=generator, dtype=torch.float64)
    y = torch.multinomial(torch.tensor([0.6, 0.3, 0.1]), size, True, generator=generator)
    return [{"pixel_values": a, "labels": int(b)} for a, b in zip(x, y, strict=True)]


def sentences(size=24):
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(20, (size, 6), generator=generator)
    return [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": int(row[0]) % 3}
        for row in x
    ]


class Recorder:
    """A collator that remembers the batches it made."""

    def __init__(self):
        self.batches = []

    def __call__(self, samples):
        batch = {k: torch.stack([torch.as_tensor(s[k]) for s in samples]) for k in samples[0]}
        self.batches.append(batch)
        return batch


def arguments(folder, **options):
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**(settings | options))


def sgd(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)


def focal(**options):
    return lambda model: FocalSAM(
        model, COUNTS, **({"rho": RHO, "gamma": GAMMA, "lam": LAM} | options)
    )


def parameters(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def largest_difference(a, b):
    return max((a[n] - b[n]).abs().max().item() for n in a)


def cross_entropy(logits, labels):
    return torch.logsumexp(logits, 1) - logits.gather(1, labels[:, None]).squeeze(1)


@pytest.fixture
def gradient(focal_sam_gradient):
    """The gradient of a batch from its definition."""
    weights = LAM * (1 - torch.tensor(COUNTS, dtype=torch.float64) / sum(COUNTS)) ** GAMMA

    def compute(model, batch, criterion=cross_entropy):
        [x] = [v for k, v in batch.items() if k in ("pixel_values", "input_ids")]
        return focal_sam_gradient(
            model,
            x,
            batch["labels"],
            weights,
            RHO,
            losses=lambda call, x, y: criterion(call(x)["logits"], y),
        )

    return compute


@pytest.fixture
def by_hand(gradient):
    """Trains on lists of micro-batches that have shares of the step; returns each step's loss."""

    def train(model, steps, shares=None, criterion=cross_entropy):
        optimizer, scheduler = sgd(model)
        losses = []
        for batches, weights in zip(steps, shares or [[1.0]] * len(steps), strict=True):
            parts = [gradient(model, batch, criterion) for batch in batches]
            for name, parameter in model.named_parameters():
                parameter.grad = sum(w * g[name] for w, g in zip(weights, parts, strict=True))
            with torch.no_grad():
                means = [criterion(model(**b)["logits"], b["labels"]).mean() for b in batches]
            losses.append(sum(w * m.item() for w, m in zip(weights, means, strict=True)))
            optimizer.step()
            scheduler.step()
        return losses

    return train


@pytest.mark.smoke
@pytest.mark.parametrize(("make", "data"), [(vit, images), (bert, sentences), (Plain, images)])
def test_training_follows_the_definition(make, data, tmp_path, by_hand):
    model, recorder = make(), Recorder()
    optimizer, scheduler = sgd(model)
    trainer = FocalSAMTrainer(
        model,
        arguments(tmp_path),
        train_dataset=data(),
        data_collator=recorder,
        optimizers=(optimizer, scheduler),
        sharpness=focal(),
    )
    trainer.train()
    reference = make()
    by_hand(reference, [[b] for b in recorder.batches[:3]])
    assert largest_difference(parameters(model), parameters(reference)) < 1e-12
    assert trainer.optimizer.optimizer is optimizer
    assert type(optimizer) is torch.optim.SGD
    assert type(scheduler) is torch.optim.lr_scheduler.StepLR
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert trainer.sharpness.steps == 3


def test_a_micro_batch_is_two_forward_passes_in_training_mode(tmp_path, monkeypatch):
    class Modal(torch.optim.SGD):
        """An optimizer with modes, as schedule-free ones have."""

        def train(self):
            events.append("optimizer")

    class Watched(FocalSAMTrainer):
        def compute_loss_context_manager(self):
            events.append("context")
            return super().compute_loss_context_manager()

    events = []
    monkeypatch.setattr("focal_sam.hf.clear_device_cache", lambda: events.append("cache"))
    model = vit().eval()
    model.vit.embeddings.register_forward_hook(lambda module, *_: events.append(module.training))
    optimizer = Modal(model.parameters(), lr=0.1)
    Watched(
        model,
        arguments(tmp_path, gradient_accumulation_steps=2, max_steps=2, torch_empty_cache_steps=2),
        train_dataset=images(),
        optimizers=(optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2)),
        sharpness=focal(),
    ).train()
    passes = ["optimizer", "context", True, "context", True]
    assert events == [*passes, "cache"] * 2 + passes * 2


class CountingScaler(torch.amp.GradScaler):
    """A gradient scaler for the CPU that counts its updates."""

    def __init__(self):
        super().__init__("cpu", init_scale=1024.0)
        self.updates = 0

    def update(self, new_scale=None):
        self.updates += 1
        super().update(new_scale)


def test_a_scaler_updates_once_a_step_and_skips_an_overflow(tmp_path, by_hand):
    def criterion(logits, labels):
        calls.append(1)
        # Each of the two micro-batches of a step is seen twice; the second step overflows.
        return cross_entropy(logits, labels) * (float("inf") if len(calls) > 4 else 1)

    calls, model, recorder = [], vit(), Recorder()
    trainer = FocalSAMTrainer(
        model,
        arguments(tmp_path, max_steps=2, gradient_accumulation_steps=2),
        train_dataset=images(),
        data_collator=recorder,
        optimizers=sgd(model),
        sharpness=focal(),
        criterion=criterion,
    )
    trainer.accelerator.scaler = CountingScaler()
    trainer.train()
    reference = vit()
    by_hand(reference, [recorder.batches[:2]], [[0.5, 0.5]])
    assert largest_difference(parameters(model), parameters(reference)) < 1e-9
    assert trainer.accelerator.scaler.updates == 2
    assert trainer.accelerator.scaler.get_scale() == 512
    assert bool(trainer.last_step.skipped)


# Ten samples in batches of four: 4, 4 and 2. A model that takes `num_items_in_batch` gives every
# sample of a step the same weight; another every micro-batch.
@pytest.mark.parametrize(
    ("make", "accumulation", "groups", "shares"),
    [
        (vit, 3, [3, 3], [[0.4, 0.4, 0.2]] * 2),
        (Plain, 3, [3, 3], [[1 / 3] * 3] * 2),
        (vit, 2, [2, 1], [[0.5, 0.5], [1.0]]),
        (Plain, 2, [2, 1], [[0.5, 0.5], [1.0]]),
    ],
)
def test_accumulation_is_the_trainers_mean(make, accumulation, groups, shares, tmp_path, by_hand):
    model, recorder = make(), Recorder()
    trainer = FocalSAMTrainer(
        model,
        arguments(
            tmp_path,
            max_steps=2,
            gradient_accumulation_steps=accumulation,
            logging_strategy="steps",
            logging_steps=1,
        ),
        train_dataset=images(10),
        data_collator=recorder,
        optimizers=sgd(model),
        sharpness=focal(),
    )
    trainer.train()
    batches = iter(recorder.batches)
    steps = [[next(batches) for _ in range(size)] for size in groups]
    reference = make()
    losses = by_hand(reference, steps, shares)
    assert largest_difference(parameters(model), parameters(reference)) < 1e-12
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, abs=6e-5)  # the log may hold four digits


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (vit, {"gradient_accumulation_steps": 3, "max_grad_norm": 0.05}),
        (vit, {"gradient_accumulation_steps": 3, "average_tokens_across_devices": False}),
        (vit, {"label_smoothing_factor": 0.2}),
        (Plain, {"gradient_accumulation_steps": 3, "max_grad_norm": 0.05}),
    ],
)
def test_without_a_radius_it_is_the_plain_trainer(make, options, tmp_path):
    kinds, results, logs = (Trainer, FocalSAMTrainer), [], []
    for kind in kinds:
        model = make()
        extra = {"sharpness": focal(rho=0.0)} if kind is FocalSAMTrainer else {}
        trainer = kind(
            model,
            arguments(tmp_path, max_steps=4, logging_strategy="steps", logging_steps=1, **options),
            train_dataset=images(10),
            eval_dataset=images(6),
            optimizers=sgd(model),
            **extra,
        )
        trainer.train()
        results.append(parameters(model))
        logs.append(
            [e["loss"] for e in trainer.state.log_history if "loss" in e]
            + [trainer.evaluate()["eval_loss"]]
        )
    # The Trainer sums the smoothing term in float32.
    tolerance = 1e-8 if "label_smoothing_factor" in options else 1e-12
    assert largest_difference(*results) < tolerance
    assert logs[1] == pytest.approx(logs[0], abs=1.1e-4)


def test_clipping_acts_on_the_finished_gradient(tmp_path, gradient):
    model, recorder, norms = vit(), Recorder(), []
    optimizer, scheduler = sgd(model)
    before = parameters(model)
    optimizer.register_step_pre_hook(
        lambda *_: norms.append({n: p.grad.clone() for n, p in model.named_parameters()})
    )
    FocalSAMTrainer(
        model,
        arguments(tmp_path, max_steps=1, max_grad_norm=0.01),
        train_dataset=images(),
        data_collator=recorder,
        optimizers=(optimizer, scheduler),
        sharpness=focal(),
    ).train()
    reference = vit()
    assert largest_difference(before, parameters(reference)) == 0
    whole = gradient(reference, recorder.batches[0])
    norm = torch.cat([g.flatten() for g in whole.values()]).norm()
    assert norm > 0.01
    expected = {n: g * 0.01 / (norm + 1e-6) for n, g in whole.items()}
    assert largest_difference(norms[0], expected) < 1e-12


def test_a_criterion_trains_and_evaluates(tmp_path, by_hand):
    offsets = torch.tensor([0.5, -0.2, -1.0], dtype=torch.float64)

    def criterion(logits, labels):
        return F.cross_entropy(logits + offsets, labels, reduction="none")

    model, recorder = vit(), Recorder()
    held_out = images(7)
    trainer = FocalSAMTrainer(
        model,
        arguments(tmp_path, per_device_eval_batch_size=3),
        train_dataset=images(),
        eval_dataset=held_out,
        data_collator=recorder,
        optimizers=sgd(model),
        sharpness=focal(),
        criterion=criterion,
        compute_metrics=lambda p: {"shape": list(p.predictions.shape)},
    )
    trainer.train()
    reference = vit()
    by_hand(reference, [[b] for b in recorder.batches[:3]], criterion=criterion)
    assert largest_difference(parameters(model), parameters(reference)) < 1e-12
    model.eval()
    x = torch.stack([s["pixel_values"] for s in held_out])
    y = torch.tensor([s["labels"] for s in held_out])
    metrics = trainer.evaluate()
    with torch.no_grad():
        expected = criterion(model(x).logits, y).mean().item()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert metrics["eval_shape"] == [7, 3]


class Bare(Plain):
    """A model that returns its logits as they are."""

    def forward(self, pixel_values):
        return self.layers(pixel_values)


class Pair(Plain):
    """A model that returns a tuple."""

    def forward(self, pixel_values):
        return self.layers(pixel_values), pixel_values


@pytest.mark.parametrize("make", [Bare, Pair])
def test_models_without_named_outputs(make, tmp_path, by_hand):
    model, recorder = make(), Recorder()
    trainer = FocalSAMTrainer(
        model,
        arguments(tmp_path, label_names=["labels"], remove_unused_columns=False),
        train_dataset=images(),
        eval_dataset=images(5),
        data_collator=recorder,
        optimizers=sgd(model),
        sharpness=focal(),
        compute_metrics=lambda p: {"shape": list(p.predictions.shape)},
    )
    trainer.train()
    reference = Plain()
    by_hand(reference, [[b] for b in recorder.batches[:3]])
    assert largest_difference(parameters(model), parameters(reference)) < 1e-12
    assert trainer.evaluate()["eval_shape"] == [5, 3]


def test_soft_labels_share_a_step_by_samples(tmp_path):
    data = [s | {"labels": F.one_hot(torch.tensor(s["labels"]), 3).double()} for s in images(10)]
    results = []
    for samples in (images(10), data):
        model = vit()
        FocalSAMTrainer(
            model,
            arguments(tmp_path, max_steps=2, gradient_accumulation_steps=3),
            train_dataset=samples,
            data_collator=Recorder(),
            optimizers=sgd(model),
            sharpness=focal(),
        ).train()
        results.append(parameters(model))
    assert largest_difference(*results) < 1e-12


def test_bfloat16_computes_both_passes_in_autocast(tmp_path):
    model, dtypes = vit(dropout=0.1).float(), []
    model.classifier.register_forward_hook(lambda m, i, o: dtypes.append(o.dtype))
    trainer = FocalSAMTrainer(
        model,
        arguments(tmp_path, bf16=True, max_steps=1),
        train_dataset=[s | {"pixel_values": s["pixel_values"].float()} for s in images(4)],
        sharpness=lambda model: SAM(model, rho=0.5),
    )
    trainer.train()
    assert dtypes == [torch.bfloat16] * 2
    assert trainer.last_step.loss.dtype == torch.float32
    assert trainer.last_step.sharpness > 0.01


class ShrinkRadius:
    """A radius that changes while training, so that it has to be in the checkpoint."""

    def __init__(self, method):
        self.method = method
        backward = method.backward
        method.backward = lambda *a, **k: (self.shrink(), backward(*a, **k))[1]

    def shrink(self):
        self.method.set_rho(self.method.rho * 0.8)


def changing(model):
    method = FocalSAM(model, COUNTS, rho=0.5, interval=3)
    ShrinkRadius(method)
    return method


def test_resumed_training_is_bit_identical(tmp_path):
    def trainer(model, folder, **options):
        return FocalSAMTrainer(
            model,
            arguments(folder, save_strategy="steps", save_steps=4, max_steps=8, **options),
            train_dataset=sentences(10),
            sharpness=changing,
        )

    whole = bert(dropout=0.2)
    one = trainer(whole, tmp_path / "whole", gradient_accumulation_steps=2)
    one.train()
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    state = json.loads((checkpoint / "sharpness.json").read_text())
    # Two epochs of two micro-batches and one.
    assert state["steps"] == 6
    assert state["rho"] == pytest.approx([0.5 * 0.8**6])
    resumed = bert(dropout=0.2)
    other = trainer(resumed, tmp_path / "other", gradient_accumulation_steps=2)
    other.train(resume_from_checkpoint=str(checkpoint))
    assert largest_difference(parameters(whole), parameters(resumed)) == 0
    assert other.sharpness.state_dict() == one.sharpness.state_dict()
    assert not list(checkpoint.glob(".sharpness*"))


def test_a_checkpoint_of_the_plain_trainer_can_be_continued(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    Trainer(vit(), arguments(tmp_path, max_steps=2, **settings), train_dataset=images()).train()
    trainer = FocalSAMTrainer(
        vit(),
        arguments(tmp_path, max_steps=4, **settings),
        train_dataset=images(),
        sharpness=focal(),
    )
    with pytest.warns(UserWarning, match=r"no sharpness\.json"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    assert trainer.sharpness.steps == 2


def test_a_new_model_gets_a_new_method(tmp_path):
    trainer = FocalSAMTrainer(
        model_init=lambda: vit(),
        args=arguments(tmp_path),
        train_dataset=images(),
        sharpness=focal(),
    )
    trainer.train()
    first = trainer.sharpness
    trainer.train()
    assert trainer.sharpness is not first
    assert trainer.sharpness.model is trainer.model_wrapped


def test_the_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "focal_sam.hf")
    with pytest.raises(MissingExtraError, match=r"focal-sam\[hf\]"):
        importlib.import_module("focal_sam.hf")


def test_refusals(tmp_path):
    def make(model=None, *, criterion=None, sharpness=SAM, **options):
        extra = {"compute_loss_func": options.pop("compute_loss_func", None)}
        return FocalSAMTrainer(
            model or vit(),
            arguments(tmp_path, **options),
            train_dataset=images(),
            sharpness=sharpness,
            criterion=criterion,
            **extra,
        )

    with pytest.raises(InputError, match="compute_loss_func returns one loss"):
        make(compute_loss_func=lambda *a, **k: None)
    with pytest.raises(InputError, match=r"label_smoothing_factor is 0\.1 beside a criterion"):
        make(criterion=F.cross_entropy, label_smoothing_factor=0.1)
    with pytest.raises(InputError, match="'lomo', which steps inside the backward pass"):
        make(optim="lomo")
    model = vit()
    model.config.problem_type = "multi_label_classification"
    with pytest.raises(InputError, match=r"'multi_label_classification'.*pass criterion="):
        make(model)
    make(model, criterion=F.cross_entropy)
    with pytest.raises(InputError, match="sharpness returned float"):
        make(sharpness=lambda model: 0.05).train()
    with pytest.raises(TypeError, match="sharpness"):
        FocalSAMTrainer(vit(), arguments(tmp_path))


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    monkeypatch.setattr(Trainer, "_wrap_model", lambda self, model, **k: model)
    with pytest.raises(InputError, match=r"2 GPUs in one process.*torchrun"):
        FocalSAMTrainer(vit(), arguments(tmp_path), train_dataset=images(), sharpness=SAM)


def test_batches_without_labels_or_logits(tmp_path):
    unlabelled = [{"pixel_values": s["pixel_values"]} for s in images()]
    with pytest.raises(InputError, match="pixel_values but no labels"):
        FocalSAMTrainer(vit(), arguments(tmp_path), train_dataset=unlabelled, sharpness=SAM).train()

    class Headless(Plain):
        def forward(self, pixel_values, labels=None):
            return {"features": self.layers(pixel_values)}

    with pytest.raises(InputError, match="features but no logits"):
        FocalSAMTrainer(
            Headless(), arguments(tmp_path), train_dataset=images(), sharpness=SAM
        ).train()


def _two_trainers(rank, world, folder, expected):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29581",
    }

    class InOrder(FocalSAMTrainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    for sync in ("local", "global"):
        model = vit()
        trainer = InOrder(
            model,
            arguments(
                folder,
                max_steps=2,
                gradient_accumulation_steps=2,
                accelerator_config={"even_batches": False},
                ddp_backend="gloo",
                ddp_find_unused_parameters=False,
            ),
            train_dataset=images(14),
            optimizers=sgd(model),
            sharpness=focal(sync=sync),
        )
        trainer.train()
        assert isinstance(trainer.sharpness.model, nn.parallel.DistributedDataParallel)
        # What the processes hold of a joined batch is a float32.
        tolerance = 1e-12 if sync == "local" else 1e-8
        assert largest_difference(parameters(model), expected[sync]) < tolerance


def test_two_processes_weigh_all_samples_alike(tmp_path, by_hand):
    """Fourteen samples in batches of 4, 4, 4 and 2, dealt out in turn."""

    def trained(sizes):
        collate, data = Recorder(), iter(images(14))
        step = [collate(list(itertools.islice(data, size))) for size in sizes]
        model = vit()
        by_hand(model, [step] * 2, [[size / 14 for size in sizes]] * 2)
        return parameters(model)

    expected = {"local": trained([4, 4, 4, 2]), "global": trained([8, 6])}
    run_gloo(_two_trainers, tmp_path, str(tmp_path), expected)

"""EDGE under the Trainer of transformers: images, texts, resume, schedule."""

import pytest

pytest.importorskip("transformers")

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from edge_ood import EdgeLoss, edge_loss
from edge_ood.hf import EdgeHFTrainer, _Endless
from shared_core.errors import InputError

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
PROBLEM = {"num_labels": 3, "problem_type": "multi_label_classification", "intermediate_size": 16}


def vit():
    torch.manual_seed(0)
    config = ViTConfig(**SMALL, **PROBLEM, image_size=8, patch_size=4, hidden_dropout_prob=0.0)
    return ViTForImageClassification(config)


def bert():
    torch.manual_seed(0)
    config = BertConfig(**SMALL, **PROBLEM, vocab_size=20, max_position_embeddings=16)
    return BertForSequenceClassification(config)


def images(n, seed=0, shift=0.0):
    g = torch.Generator().manual_seed(seed)
    return [
        {
            "pixel_values": torch.randn(3, 8, 8, generator=g) + shift,
            "labels": (torch.rand(3, generator=g) < 0.5).float(),
        }
        for _ in range(n)
    ]


def texts(n, length, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        {
            "input_ids": torch.randint(20, (length,), generator=g),
            "attention_mask": torch.ones(length, dtype=torch.long),
            "labels": (torch.rand(3, generator=g) < 0.5).float(),
        }
        for _ in range(n)
    ]


def arguments(folder, **options):
    settings = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-2,
    }
    return TrainingArguments(str(folder), **{**settings, **options})


def test_a_step_is_the_loss_of_both_batches(tmp_path):
    model, data, outliers = vit(), images(8), images(6, 1, 2.0)
    trainer = EdgeHFTrainer(
        model,
        arguments(tmp_path, max_steps=2),
        train_dataset=data,
        oe_dataset=outliers,
        criterion=EdgeLoss(beta=1.0),
    )
    batch = trainer.data_collator(data[:4])
    trainer.state.max_steps, trainer.state.global_step = 2, 1
    model.train()
    loss = trainer.compute_loss(model, dict(batch))
    chosen = next(iter(_Endless(6, 4, trainer.args.seed, 1, 0, 1)))
    theirs = torch.stack([outliers[i]["pixel_values"] for i in chosen])
    z = model(pixel_values=batch["pixel_values"]).logits
    expected = edge_loss(z, batch["labels"], model(pixel_values=theirs).logits, beta=1.0)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-6)
    assert trainer.last_output.n_tail == 1
    assert not trainer.last_output.loss.requires_grad
    trainer.state.global_step = 0  # half of two steps is the first
    assert not trainer._gap_is_on()
    model.eval()
    found, outputs = trainer.compute_loss(model, dict(batch), return_outputs=True)
    torch.testing.assert_close(found, torch.nn.BCEWithLogitsLoss()(outputs.logits, batch["labels"]))


def test_it_trains_evaluates_and_resumes(tmp_path):
    def run(folder, resume=None, **options):
        trainer = EdgeHFTrainer(
            bert(),
            arguments(folder, **options),
            train_dataset=texts(16, 6),
            eval_dataset=texts(6, 6, 2),
            oe_dataset=texts(10, 6, 1),
            tau=0.5,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = run(tmp_path / "whole", **saving)
    assert whole.last_output.n_tail == 1
    assert whole.evaluate()["eval_loss"] > 0
    again = run(tmp_path / "whole", resume=str(tmp_path / "whole/checkpoint-2"), **saving)
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_texts_of_another_length_take_two_passes(tmp_path):
    for length in (6, 9):
        trainer = EdgeHFTrainer(
            bert(),
            arguments(tmp_path, max_steps=1, gradient_accumulation_steps=2),
            train_dataset=texts(8, 6),
            oe_dataset=texts(5, length, 1),
            tau=0,
        )
        trainer.train()
        assert trainer.last_output.l_conf > 0


def test_outliers_of_several_processes_do_not_overlap():
    streams = [iter(_Endless(8, 2, 3, 0, rank, 2)) for rank in range(2)]
    seen = [index for _ in range(2) for stream in streams for index in next(stream)]
    assert sorted(seen) == list(range(8))
    late = iter(_Endless(8, 2, 3, 1, 0, 2))
    assert next(late) == seen[4:6]


@pytest.mark.usefixtures("without_type_checks")
def test_errors(tmp_path):
    with pytest.raises(InputError, match="oe_dataset"):
        EdgeHFTrainer(vit(), arguments(tmp_path), oe_dataset=[])
    with pytest.raises(InputError, match="tau"):
        EdgeHFTrainer(vit(), arguments(tmp_path), oe_dataset=images(2), tau=-1)
    with pytest.raises(InputError, match="compute_loss_func"):
        EdgeHFTrainer(
            vit(), arguments(tmp_path), oe_dataset=images(2), compute_loss_func=lambda *a: 0
        )
    trainer = EdgeHFTrainer(vit(), arguments(tmp_path), oe_dataset=images(2))
    for labels in (None, torch.ones(4).long()):
        with pytest.raises(InputError, match=r"float labels \[B, C\]"):
            trainer.compute_loss(trainer.model, {"labels": labels})

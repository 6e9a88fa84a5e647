"""The trainer: the recipe's loss, exact resuming, and what it is good for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments, default_data_collator

from lede import demo
from lede.early_exit import EarlyExitConfig, early_exit_loss, exit_quality
from lede.testing import tiny_model
from lede.trainer import EarlyExitTrainer


def trainer(folder: Path, p_max: float = 0.3, **changes: Any) -> EarlyExitTrainer:
    rows = torch.randint(64, (24, 10), generator=torch.Generator().manual_seed(0))
    args = TrainingArguments(
        str(folder),
        **{
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "report_to": "none",
            "use_cpu": True,
            "save_strategy": "no",
            "dataloader_pin_memory": False,
            **changes,
        },
    )
    return EarlyExitTrainer(
        tiny_model(),
        args,
        early_exit=EarlyExitConfig(p_max=p_max, rotation=2),
        train_dataset=[{"input_ids": r, "labels": r} for r in rows],
        eval_dataset=[{"input_ids": r, "labels": r} for r in rows[:8]],
        data_collator=default_data_collator,
    )


@pytest.mark.smoke
def test_the_loss_is_the_recipes_at_the_trainers_step(tmp_path: Path) -> None:
    t = trainer(tmp_path)
    ids = torch.randint(64, (3, 10))
    t.state.global_step, t.state.max_steps = 3, 9
    for training in (True, False):
        t.model.train(training)
        torch.manual_seed(1)
        found = t.compute_loss(t.model, {"input_ids": ids, "labels": ids})
        torch.manual_seed(1)
        if training:
            expected = early_exit_loss(t.model, ids, ids, t.early_exit, step=3, total=9)
        else:
            expected = t.model(ids, labels=ids).loss
        torch.testing.assert_close(found, expected)


def test_resuming_ends_in_the_same_numbers(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "a")
    whole.train()
    trainer(tmp_path / "b", save_strategy="steps", save_steps=2).train()
    again = trainer(tmp_path / "b")
    again.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    losses = [[h["loss"] for h in t.state.log_history if "loss" in h] for t in (whole, again)]
    assert losses[0] == losses[1]


def test_evaluation_is_of_the_last_layer(tmp_path: Path) -> None:
    t = trainer(tmp_path)
    ids = torch.stack([row["input_ids"] for row in t.eval_dataset])
    with torch.no_grad():
        expected = t.model(ids, labels=ids).loss.item()
    assert t.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_refusals(tmp_path: Path) -> None:
    name = "gradient_checkpointing"  # transformers 5.24 calls it activation_checkpointing
    if "activation_checkpointing" in TrainingArguments.__dataclass_fields__:
        name = "activation_checkpointing"
    with pytest.raises(ValueError, match="gradient_checkpointing"):
        trainer(tmp_path, **{name: True})


def test_exit_quality_against_hidden_states() -> None:
    model = tiny_model().train()
    ids = torch.randint(64, (5, 9))
    found = exit_quality(model, ids, batch_size=2)
    assert model.training
    with torch.no_grad():
        out = model.eval()(ids, output_hidden_states=True)
        early = model.lm_head(model.model.norm(out.hidden_states[2]))
    loss = torch.nn.functional.cross_entropy(early[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    same = (early.argmax(-1) == out.logits.argmax(-1))[:, :-1].double().mean()
    assert found["loss"][1] == pytest.approx(loss.item(), rel=1e-5)
    assert found["agreement"][1] == pytest.approx(same.item())
    assert found["agreement"][3] == 1.0


def test_the_recipe_makes_early_exits_better() -> None:
    """The same small model and steps, with the recipe and without."""
    settings = demo.DemoSettings(layers=6, hidden=32, train_steps=50, batch=8, window=48)
    model = demo.train_model(settings, 0)
    found = demo.compare_recipes(model, settings, 0)
    recipe, plain = found["recipe"], found["plain"]
    for layer in (0, 1, 2):
        assert recipe["loss"][layer] < plain["loss"][layer] - 0.02
    assert sum(recipe["agreement"][:3]) > sum(plain["agreement"][:3]) + 0.05

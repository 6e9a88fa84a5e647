"""Hybrid distillation on transformers' trainer: the same loss, invariances, resume, top-k."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
from transformers import LlamaConfig, LlamaForCausalLM

from bridge_garden import Risk, StepInfo, hybrid_loss
from bridge_garden.trainer import HybridConfig, HybridTrainer
from shared_core.errors import InputError

# transformers fills float settings with ints.
pytestmark = pytest.mark.usefixtures("without_type_checks")


def model(vocab: int = 24, seed: int = 0, width: int = 16) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=width,
            intermediate_size=width,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
        )
    )


def rows(count: int = 8) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(count):
        ids = torch.randint(24, (5 + i % 4,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return made


def trainer(
    folder: Path, student: Any = None, teacher: Any = None, **changes: Any
) -> HybridTrainer:
    more = {k: changes.pop(k) for k in ("weight_fn", "peft_config", "data") if k in changes}
    settings: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "dataloader_pin_memory": False,
        "lr_scheduler_type": "constant",
        **changes,
    }
    return HybridTrainer(
        student or model(),
        teacher or model(26, seed=1, width=32),
        HybridConfig(str(folder), **settings),
        train_dataset=more.get("data", rows()),
        weight=more.get("weight_fn"),
        peft_config=more.get("peft_config"),
    )


def weights(found: HybridTrainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in found.model.named_parameters()}


@pytest.mark.parametrize("fused", [True, False])
def test_the_loss_is_that_of_the_function(tmp_path: Path, fused: bool) -> None:
    found = trainer(
        tmp_path, weight="confidence", hard_labels="labels", risk_alpha=0.2, fused=fused
    )
    batch = found.data_collator(rows()[:3])
    value = found.compute_loss(found.model.eval(), dict(batch))
    with torch.no_grad():
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        s, t = found.model(**inputs).logits, found.teacher(**inputs).logits
    expected = hybrid_loss(
        s,
        t,
        batch["labels"],
        weight="confidence",
        hard_labels="labels",
        risk=Risk(0.2),
        vocab=24,
        shift=True,
        at=StepInfo(0, 4),
    )
    torch.testing.assert_close(value, expected.loss, rtol=1e-5, atol=1e-6)
    assert found.last_output.risk > 0


def test_accumulation_is_one_batch(tmp_path: Path) -> None:
    kw = {"max_steps": 2, "weight": "entropy", "hard_labels": "labels", "risk_alpha": 0.1}
    one = trainer(tmp_path, per_device_train_batch_size=4, **kw)
    many = trainer(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4, **kw)
    for t in (one, many):
        t.train()
    torch.testing.assert_close(weights(many), weights(one), rtol=1e-4, atol=1e-5)


def test_resume_continues_the_curriculum(tmp_path: Path) -> None:
    kw = {"weight": "curriculum:0.4", "save_strategy": "steps", "save_steps": 2}
    whole = trainer(tmp_path / "a", **kw)
    whole.train()
    again = trainer(tmp_path / "a", **kw)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    torch.testing.assert_close(weights(again), weights(whole), rtol=0, atol=0)
    log = [line["weight"] for line in whole.state.log_history if "weight" in line]
    assert log == pytest.approx([0.0, 0.4, 0.4, 0.4])


def test_the_teacher_stays_and_the_log_tells(tmp_path: Path) -> None:
    found = trainer(tmp_path, risk_alpha=0.1)
    before = {n: p.clone() for n, p in found.teacher.named_parameters()}
    found.train()
    torch.testing.assert_close(dict(found.teacher.named_parameters()), before, rtol=0, atol=0)
    line = next(line for line in found.state.log_history if "loss" in line)
    assert {"kd", "ce", "risk", "weight", "bridge_fraction", "garden_fraction"} <= line.keys()
    assert found.vocab_size == 24


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_adapters_and_checkpointing_in_bfloat16(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    found = trainer(
        tmp_path, peft_config=config, bf16=True, gradient_checkpointing=True, max_steps=1
    )
    found.train()
    assert all("lora" in n for n, p in found.model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("weight", ["confidence", "entropy", "entropy:power", "confidence:label"])
def test_topk_teacher_with_every_class_is_the_teacher(tmp_path: Path, weight: str) -> None:
    teacher = model(24, seed=1, width=32).eval()
    data = rows()
    stored = []
    for row in data:
        with torch.no_grad():
            lp = torch.log_softmax(teacher(torch.tensor([row["input_ids"]])).logits[0], -1)
        # A row's entry at t is the teacher's view of the token at t.
        lp = torch.cat([lp[:1], lp[:-1]])
        values, ids = lp.sort(-1, descending=True)
        stored.append({**row, "topk_ids": ids.tolist(), "topk_logprobs": values.tolist()})
    kw = {"weight": weight, "max_steps": 2}
    online = trainer(tmp_path, teacher=teacher, **kw)
    online.train()
    args = HybridConfig(**{**online.args.to_dict(), "output_dir": str(tmp_path)})
    offline = HybridTrainer(model(), None, args, train_dataset=stored)
    offline.train()
    torch.testing.assert_close(weights(offline), weights(online), rtol=1e-3, atol=1e-4)


def test_a_loss_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    student = model()
    with torch.no_grad():
        student.lm_head.weight.fill_(float("nan"))
    found = trainer(tmp_path, student=student, fused=False)
    with pytest.raises(InputError, match="the loss is nan at step 0"):
        found.train()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": "bold"}, "no weight is called"),
        ({"hard_labels": "gold"}, "teacher_argmax, labels, both_agree"),
        ({"risk_alpha": -1.0}, "risk alpha"),
        ({"kd_weight": 0.5}, "λ shares"),
        ({"risk_alpha": 0.1, "risk_gamma": 0.9, "risk_terminal": "official"}, "micro-batches"),
    ],
)
def test_impossible_settings(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        trainer(tmp_path, **changes)

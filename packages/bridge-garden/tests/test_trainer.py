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
from shared_core.testing import run_gloo

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
    names = ("weight_fn", "peft_config", "data", "cls")
    more = {k: changes.pop(k) for k in names if k in changes}
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
    return more.get("cls", HybridTrainer)(
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


def test_a_sharded_student_cannot_skip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Trainer

    real = Trainer.__init__

    def sharded(self: Any, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(Trainer, "__init__", sharded)
    with pytest.raises(InputError, match="nonfinite='raise'"):
        trainer(tmp_path, nonfinite="skip")


def test_an_unknown_kind_of_arguments(tmp_path: Path) -> None:
    from abkd.trainer import DistillationConfig

    args = DistillationConfig(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(InputError, match="pass a HybridConfig"):
        HybridTrainer(model(), model(26, seed=1), args, train_dataset=rows())


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


class Blind(torch.nn.Module):
    """A teacher that knows nothing but NaN of a text with token 23 in it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = model(26, seed=1, width=32)
        self.config = self.model.config
        self.get_output_embeddings = lambda: None  # so that logits are asked for

    def forward(self, input_ids: torch.Tensor, **more: Any) -> Any:
        out = self.model(input_ids, **more)
        bad = (input_ids == 23).any(-1)
        out.logits = torch.where(bad[:, None, None], torch.nan, out.logits)
        return out


def with_bad_rows() -> list[dict[str, list[int]]]:
    """Eight rows of which the third and fourth have token 23, and no other has."""
    data = rows()
    for i, row in enumerate(data):
        for ids in row.values():
            ids[:] = [v if v == -100 else v % 22 for v in ids]
        if i in (2, 3):
            row["input_ids"][0] = 23
    return data


def test_a_micro_batch_that_is_not_finite_is_skipped_and_counted(tmp_path: Path) -> None:
    data = with_bad_rows()
    kw = {
        "teacher": Blind(), "data": data, "weight": "static:0.3", "risk_alpha": 0.2,
        "hard_labels": "labels", "max_steps": 1, "gradient_accumulation_steps": 4,
        "optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.5,
    }  # fmt: skip
    # In the order of the data, so that one micro-batch of four is bad.
    from torch.utils.data import SequentialSampler

    class InOrder(HybridTrainer):
        def _get_train_sampler(self, *args: Any) -> SequentialSampler:
            return SequentialSampler(data)

    found = trainer(tmp_path, nonfinite="skip", cls=InOrder, **kw)
    start = {n: p.detach().clone() for n, p in found.model.named_parameters()}
    reference = model()
    found.train()
    line = found.state.log_history[0]
    assert line["skipped"] == 1
    assert all(isinstance(v, int | float) and v == v for v in line.values())
    # The good rows over the tokens of all eight, in one batch of plain logits.
    good = found.data_collator([row for i, row in enumerate(data) if i not in (2, 3)])
    inputs = {k: good[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        t = found.teacher.model(**inputs).logits
    count = sum(v != -100 for row in data for v in row["labels"])
    loss = hybrid_loss(
        reference(**inputs).logits, t, good["labels"], weight="static:0.3", shift=True,
        hard_labels="labels", risk=Risk(0.2), vocab=24, n_valid=float(count),
    ).loss  # fmt: skip
    loss.backward()
    for name, p in reference.named_parameters():
        step = (start[name] - found.model.get_parameter(name)) / 0.5
        torch.testing.assert_close(step, p.grad, rtol=1e-4, atol=1e-6)
    with pytest.raises(InputError, match=r"the loss is nan at step 0 \(soft nan"):
        trainer(tmp_path, nonfinite="raise", cls=InOrder, **kw).train()
    # An evaluation that is not finite has no number to report.
    again = trainer(tmp_path, nonfinite="skip", cls=InOrder, **kw)
    with pytest.raises(InputError, match="the loss is nan"):
        again.evaluate(data)
    # Nothing can be skipped any more once the student itself is lost.
    with torch.no_grad():
        again.model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match="the student's weights are not finite at step 0"):
        again.train()


def test_on_policy_data_have_the_teachers_hard_labels(tmp_path: Path) -> None:
    found = trainer(
        tmp_path, on_policy_fraction=1.0, max_new_tokens=4, weight="static:0.1", risk_alpha=0.1
    )
    seen: list[dict[str, Any]] = []
    losses: list[float] = []
    real = found.compute_loss

    def keep(model: Any, inputs: Any, *args: Any, **more: Any) -> Any:
        seen.append({k: v.clone() for k, v in inputs.items()})
        with torch.no_grad():
            i = {k: inputs[k] for k in ("input_ids", "attention_mask")}
            losses.append(
                hybrid_loss(
                    model(**i).logits, found.teacher(**i).logits, inputs["labels"], vocab=24,
                    weight="static:0.1", risk=Risk(0.1), shift=True,
                ).loss.item()
            )  # fmt: skip
        return real(model, inputs, *args, **more)

    found.compute_loss = keep  # type: ignore[method-assign]
    found.train()
    prompts = {tuple(row["input_ids"][:2]) for row in rows()}
    answers = {tuple(row["input_ids"][2:]) for row in rows()}
    for batch in seen:
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            assert tuple(ids[:2].tolist()) in prompts
            assert tuple(ids[labels != -100].tolist()) not in answers
    logged = [line["loss"] for line in found.state.log_history if "loss" in line]
    assert logged == pytest.approx(losses, rel=1e-3)


@pytest.mark.parametrize("fused", [True, False])
def test_risk_does_not_cross_packed_sequences(tmp_path: Path, fused: bool) -> None:
    found = trainer(tmp_path, fused=fused, risk_alpha=5.0, hard_labels="labels", weight="hard")
    a, b = [3, 4, 5, 6], [7, 8, 9]
    # Every token counts, the first of the second sequence as well.
    packed = {
        "input_ids": torch.tensor([a + b]),
        "labels": torch.tensor([a + b]),
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2]]),
    }
    value = found.compute_loss(found.model.eval(), dict(packed))
    inputs = {k: packed[k] for k in ("input_ids", "position_ids")}
    with torch.no_grad():
        z, t = found.model(**inputs).logits, found.teacher(**inputs).logits
    kw = {"weight": "hard", "hard_labels": "labels", "risk": Risk(5.0), "vocab": 24, "shift": True}
    apart = torch.tensor([[0] * 4 + [1] * 3])
    expected = hybrid_loss(z, t, packed["labels"], segments=apart, **kw).loss
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    assert (hybrid_loss(z, t, packed["labels"], **kw).loss - expected).abs() > 1e-3


SHARED = {
    "max_steps": 2, "optim": "sgd", "max_grad_norm": 0.0, "gradient_accumulation_steps": 2,
    "weight": "confidence", "hard_labels": "labels", "risk_alpha": 0.2, "learning_rate": 0.1,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "fused": {},
    "plain": {"fused": False},
    "skip": {"nonfinite": "skip", "weight": "static:0.4"},
}


def shared_case(name: str, folder: Path, size: int) -> HybridTrainer:
    kw = {**SHARED, **CASES[name], "per_device_train_batch_size": size}
    if name == "skip":
        kw.update(teacher=Blind(), data=with_bad_rows())
    return trainer(folder, **kw)


def _in_two_processes(rank: int, world: int, folder: str) -> None:
    import os

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", ACCELERATE_USE_CPU="true")
    from safetensors.torch import save_file

    for name in CASES:
        found = shared_case(name, Path(folder), 2)
        assert found.accelerator.num_processes == world
        found.train()
        if rank == 0:
            losses = [line["loss"] for line in found.state.log_history if "loss" in line]
            skipped = [line.get("skipped", 0) for line in found.state.log_history if "loss" in line]
            save_file(
                {**weights(found), "losses": torch.tensor(losses), "skip": torch.tensor(skipped)},
                Path(folder) / f"{name}.safetensors",
            )


def test_two_processes_equal_one(tmp_path: Path, warm_processes: Any) -> None:
    """Responses of unequal length on the two sides: one denominator, or the weights differ."""
    from safetensors.torch import load_file

    run_gloo(_in_two_processes, tmp_path, str(tmp_path))
    for name in CASES:
        one = shared_case(name, tmp_path, 4)
        one.train()
        two = load_file(tmp_path / f"{name}.safetensors")
        lines = [line for line in one.state.log_history if "loss" in line]
        losses, skipped = two.pop("losses"), two.pop("skip")
        torch.testing.assert_close(two, weights(one), rtol=0, atol=1e-6)
        assert losses.tolist() == pytest.approx([line["loss"] for line in lines], rel=1e-3)
        if name == "skip":
            # A bad row on one side is a batch less on both.
            assert skipped.tolist() == [line["skipped"] for line in lines]
            assert 0 < sum(skipped.tolist()) < 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nonfinite": "zero"}, "accepted: raise, skip"),
        ({"on_policy_fraction": 0.2, "hard_labels": "labels"}, "student's own tokens"),
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

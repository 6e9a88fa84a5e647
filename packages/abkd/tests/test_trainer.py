"""The trainer on tiny real models: the loss it takes, accumulation, resume, LoRA, processes."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from abkd.data import CompletionCollator, tokenize_row
from abkd.divergence import ab_divergence
from abkd.objective import DistillationOutput
from shared_core.testing import run_gloo

# The Trainer's own arguments are looser than their annotations.
pytestmark = pytest.mark.usefixtures("without_type_checks")

TOKENS = 30  # that mean something; the heads are padded beyond


def models(student_rows: int = 32, teacher_rows: int = 36) -> tuple[Any, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    common = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    torch.manual_seed(0)
    student = Qwen2ForCausalLM(
        Qwen2Config(vocab_size=student_rows, hidden_size=8, intermediate_size=16,
                    num_hidden_layers=1, tie_word_embeddings=False, **common)
    )  # fmt: skip
    teacher = LlamaForCausalLM(
        LlamaConfig(vocab_size=teacher_rows, hidden_size=16, intermediate_size=32,
                    num_hidden_layers=2, initializer_range=0.5, **common)
    )  # fmt: skip
    return student, teacher


class Tokens:
    """As much of a tokenizer as the trainer asks for."""

    pad_token_id = 0
    padding_side = "right"

    def get_vocab(self) -> dict[str, int]:
        return {f"t{i}": i for i in range(TOKENS)}

    def save_pretrained(self, folder: str) -> None:
        (Path(folder) / "tokens.txt").write_text("t")


def rows(count: int = 8, seed: int = 0) -> list[dict[str, list[int]]]:
    g = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        ids = torch.randint(1, TOKENS, (4 + i % 5,), generator=g).tolist()
        found.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return found


def trainer(folder: Path, data: Any = None, student: Any = None, **settings: Any) -> Any:
    from abkd.trainer import DistillationConfig, DistillationTrainer

    mine, teacher = models()
    names = ("peft_config", "cls", "eval_dataset", "pretrain_dataset")
    options = {k: settings.pop(k) for k in names if k in settings}
    defaults = {
        "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1,
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
        "dataloader_pin_memory": False,
    }  # fmt: skip
    args = DistillationConfig(str(folder), **{**defaults, **settings})
    return options.pop("cls", DistillationTrainer)(
        student or mine, teacher, args, train_dataset=data or rows(),
        processing_class=Tokens(), **options,
    )  # fmt: skip


def weights(model: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.smoke
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_is_that_of_the_response_over_the_shared_tokens(
    tmp_path: Path, fused: bool, side: str
) -> None:
    t = trainer(tmp_path, fused=fused, temperature=2.0)
    batch = CompletionCollator(0, side)(rows(5))
    loss = t.compute_loss(t.model, batch)
    total, count = torch.tensor(0.0), 0
    for row in rows(5):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        z, p = (m(input_ids=ids).logits[:, :-1, :TOKENS] for m in (t.model, t.teacher))
        keep = labels[:, 1:] != -100
        d = ab_divergence(z, p.detach(), 0.2, 0.7, temperature=2.0, reduction="none")
        total, count = total + 4 * d[keep].sum(), count + keep.sum()
    torch.testing.assert_close(loss, total / count, rtol=1e-4, atol=1e-6)
    loss.backward()
    gradient = t.model.lm_head.weight.grad
    assert (gradient[TOKENS:] == 0).all()
    assert gradient[:TOKENS].abs().sum() > 0


@pytest.mark.parametrize("fused", [True, False])
def test_accumulation_equals_one_batch(tmp_path: Path, fused: bool) -> None:
    results = []
    for size, steps in ((8, 1), (2, 4)):
        t = trainer(
            tmp_path, fused=fused, ce_weight=0.5, max_steps=1, optim="sgd", max_grad_norm=0.0,
            per_device_train_batch_size=size, gradient_accumulation_steps=steps,
        )  # fmt: skip
        t.train()
        results.append((weights(t.model), t.state.log_history[0]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-6)
    for name in ("loss", "kd", "ce", "student_entropy", "agreement"):
        assert results[0][1][name] == pytest.approx(results[1][1][name], rel=1e-4)


def test_heads_of_qwen_sizes_train_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen2.5: 152,064 rows (7B) and 151,936 (3B and below) for 151,665 tokens."""
    tokens = 151_665
    student, teacher = models(151_936, 152_064)
    with torch.no_grad():
        teacher.lm_head.weight[tokens:] = 9.0  # padding rows that would take all the mass
    found = {f"t{i}": i for i in range(tokens)}
    monkeypatch.setattr(Tokens, "get_vocab", lambda self: found)
    mine = (student, teacher)
    monkeypatch.setattr(f"{__name__}.models", lambda: mine)
    t = trainer(tmp_path, max_steps=1, optim="sgd", learning_rate=1.0, max_grad_norm=0.0)
    assert t.vocab_size == tokens
    head = student.lm_head.weight
    before = head.detach().clone()
    batch = CompletionCollator(0)(rows(3))
    loss = t.compute_loss(t.model, batch)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    z, p = (m(**inputs).logits[:, :-1, :tokens].detach() for m in mine)
    expected = ab_divergence(z, p, 0.2, 0.7, mask=batch["labels"][:, 1:] != -100)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-6)
    t.train()
    assert torch.equal(head[tokens:], before[tokens:])
    assert not torch.equal(head[:tokens], before[:tokens])


def test_training_learns_and_leaves_the_teacher_alone(tmp_path: Path) -> None:
    t = trainer(tmp_path, max_steps=60, learning_rate=3e-2, lr_scheduler_type="constant")
    before = weights(t.teacher).clone()
    t.teacher.train()  # a caller may have left it there
    t.train()
    losses = [line["kd"] for line in t.state.log_history if "kd" in line]
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(weights(t.teacher), before)
    assert not t.teacher.training
    assert all(p.grad is None and not p.requires_grad for p in t.teacher.parameters())
    t.save_model(str(tmp_path / "final"))
    again = type(t.model).from_pretrained(tmp_path / "final")
    assert torch.equal(weights(again), weights(t.model))


@pytest.mark.parametrize(
    "settings", [{"bf16": True}, {"gradient_checkpointing": True}, {"fused": False, "bf16": True}]
)
def test_precision_and_checkpointing(tmp_path: Path, settings: dict[str, Any]) -> None:
    t = trainer(tmp_path, **settings)
    t.train()
    assert t.state.global_step == 3
    plain = trainer(tmp_path)
    plain.train()
    tolerance = 0.05 if "bf16" in settings else 1e-5
    torch.testing.assert_close(weights(t.model), weights(plain.model), rtol=0, atol=tolerance)


def test_resume_ends_in_the_same_numbers(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "a", max_steps=6, warmup_steps=2)
    whole.train()
    first = trainer(
        tmp_path / "b", max_steps=6, warmup_steps=2, save_steps=3, save_strategy="steps"
    )
    first.train()
    again = trainer(tmp_path / "b", max_steps=6, warmup_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    assert torch.equal(weights(again.model), weights(whole.model))
    names = ("loss", "kd", "student_entropy")
    for a, b in zip(whole.state.log_history[:6], again.state.log_history[:6], strict=True):
        assert [a[n] for n in names] == [b[n] for n in names]


def test_lora(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    t = trainer(tmp_path, peft_config=peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    base = {n: p.clone() for n, p in t.model.named_parameters() if not p.requires_grad}
    t.train()
    moved = {n: p for n, p in t.model.named_parameters() if p.requires_grad}
    assert any(p.abs().sum() > 0 for n, p in moved.items() if "lora_B" in n)
    assert all(torch.equal(base[n], p) for n, p in t.model.named_parameters() if n in base)


def test_evaluation(tmp_path: Path) -> None:
    t = trainer(tmp_path, eval_dataset=rows(4, seed=1))
    found = t.evaluate()["eval_loss"]
    batch = CompletionCollator(0)(rows(4, seed=1))
    assert found == pytest.approx(t.compute_loss(t.model, batch).item(), rel=1e-5)


def test_top_k_columns_take_the_teachers_place(tmp_path: Path) -> None:
    from abkd.trainer import DistillationConfig, DistillationTrainer

    _, teacher = models()
    data = []
    for row in rows():
        logits = teacher(input_ids=torch.tensor([row["input_ids"]])).logits[0, :, :TOKENS]
        lp = logits.log_softmax(-1).detach()
        first = torch.zeros(1, TOKENS)  # the list at t is the distribution of token t
        top = torch.cat([first.log_softmax(-1), lp[:-1]]).topk(TOKENS)
        data.append({**row, "topk_ids": top.indices, "topk_logprobs": top.values})
    online = trainer(tmp_path)
    args = online.args
    assert isinstance(args, DistillationConfig)
    offline = DistillationTrainer(models()[0], None, args, data, processing_class=Tokens())
    collate = CompletionCollator(0)
    torch.testing.assert_close(
        offline.compute_loss(offline.model, collate(data)),
        online.compute_loss(online.model, collate(rows())),
    )
    offline.train()
    online.train()
    torch.testing.assert_close(weights(offline.model), weights(online.model), rtol=0, atol=1e-3)


def test_the_loss_can_be_overridden(tmp_path: Path) -> None:
    from abkd.trainer import DistillationTrainer

    class Hybrid(DistillationTrainer):
        def loss_options(self) -> dict[str, Any]:
            return dict(
                super().loss_options(), ce_weight=1.0, hard_labels="teacher_argmax",
                weight_fn=lambda seen: (1 - seen.teacher_max_prob, seen.teacher_max_prob),
                return_label_logits=True,
            )  # fmt: skip

        def assemble_loss(self, output: DistillationOutput, labels: Tensor) -> Tensor:
            assert output.per_token_kd.shape == labels.shape
            gap = (output.student_lse[:, 1:] - output.label_logit[:, :-1]).square()
            return output.loss + 0.025 * gap.sum() / output.n_valid

    losses = []
    for fused in (True, False):
        t = trainer(tmp_path, cls=Hybrid, fused=fused)
        loss = t.compute_loss(t.model, CompletionCollator(0)(rows()))
        loss.backward()
        losses.append((loss, t.model.lm_head.weight.grad[:TOKENS]))
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.parametrize("fused", [True, False])
def test_a_pretraining_mix_adds_its_cross_entropy(tmp_path: Path, fused: bool) -> None:
    text = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows(6, seed=3)]
    results = []
    for size, steps in ((4, 2), (8, 1)):
        t = trainer(
            tmp_path, fused=fused, pretrain_dataset=text, pretrain_weight=0.5, max_steps=1,
            per_device_train_batch_size=size, gradient_accumulation_steps=steps,
        )  # fmt: skip
        drawn = []
        real = t._pretrain_batch
        t._pretrain_batch = lambda *a, real=real, drawn=drawn: drawn.append(real(*a)) or drawn[-1]
        start = copy.deepcopy(t.model)
        t.train()
        total, count = torch.tensor(0.0), 0
        for batch in drawn:  # the cross-entropy over all tokens of the step
            labels = batch["labels"][:, 1:]
            inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
            logits = start(**inputs).logits[:, :-1, :TOKENS].flatten(0, 1)
            total += torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")
            count += int((labels != -100).sum())
        line = t.state.log_history[0]
        assert sum(len(batch["labels"]) for batch in drawn) == 8
        assert line["pretrain_ce"] == pytest.approx(float(total.detach() / count), rel=1e-4)
        assert line["loss"] == pytest.approx(line["kd"] + 0.5 * line["pretrain_ce"], rel=1e-4)
        results.append(line["kd"])
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_on_policy_responses_are_the_students_own_and_survive_a_resume(tmp_path: Path) -> None:
    data = rows()
    options = {"on_policy_fraction": 1.0, "max_new_tokens": 5, "max_steps": 4}
    whole = trainer(tmp_path / "a", **options)
    seen = []
    real = whole.compute_loss
    whole.compute_loss = lambda m, i, *a, **k: seen.append(dict(i)) or real(m, i, *a, **k)
    whole.train()
    prompts = {tuple(row["input_ids"][:2]) for row in data}
    for batch in seen:
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            counted = ids[labels != -100]
            assert tuple(ids[:2].tolist()) in prompts
            assert (labels[:2] == -100).all()
            assert len(counted) == 5
            assert tuple(counted.tolist()) not in {tuple(r["input_ids"][2:]) for r in data}
    trainer(tmp_path / "b", save_steps=2, save_strategy="steps", **options).train()
    again = trainer(tmp_path / "b", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    assert torch.equal(weights(again.model), weights(whole.model))
    half = trainer(tmp_path, **{**options, "on_policy_fraction": 0.5})
    drawn = []
    half._draw_responses = lambda batch, place, real=half._draw_responses: drawn.append(
        real(batch, place) or batch["labels"].shape[1]
    )
    half.train()
    assert 7 in drawn
    assert set(drawn) != {7}


def test_fine_tuning_without_a_teacher(tmp_path: Path) -> None:
    from abkd.trainer import DistillationTrainer

    args = trainer(tmp_path, kd_weight=0.0, ce_weight=1.0, max_steps=2).args
    for fused in (True, False):
        args.fused = fused
        tuned = DistillationTrainer(models()[0], None, args, rows(), processing_class=Tokens())
        size = tuned.vocab_size
        batch = CompletionCollator(0)(rows(4))
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        logits = tuned.model(**inputs).logits[:, :-1, :size].flatten(0, 1)
        expected = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten())
        torch.testing.assert_close(tuned.compute_loss(tuned.model, batch), expected)
        tuned.train()
        assert tuned.state.log_history[0]["ce"] > 0


def test_empty_responses_are_harmless(tmp_path: Path) -> None:
    t = trainer(tmp_path)
    data = rows(4)
    data[1]["labels"] = [-100] * len(data[1]["labels"])
    collate = CompletionCollator(0)
    with_empty = t.compute_loss(t.model, collate(data))
    torch.testing.assert_close(
        with_empty, t.compute_loss(t.model, collate([data[0], *data[2:]])), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("fused", [True, False])
def test_packed_sequences_equal_separate_rows(tmp_path: Path, fused: bool) -> None:
    t = trainer(tmp_path, fused=fused)
    data = rows(4)
    packed = {
        "input_ids": torch.cat([torch.tensor(row["input_ids"]) for row in data])[None],
        "labels": torch.cat([torch.tensor(row["labels"]) for row in data])[None],
        "position_ids": torch.cat([torch.arange(len(r["input_ids"])) for r in data])[None],
    }
    apart = t.compute_loss(t.model, CompletionCollator(0)(data))
    torch.testing.assert_close(t.compute_loss(t.model, packed), apart, rtol=1e-4, atol=1e-6)
    together = {**packed, "position_ids": torch.arange(packed["labels"].shape[1])[None]}
    assert (t.compute_loss(t.model, together) - apart).abs() > 1e-4


def test_softcapped_and_scaled_heads_are_seen(tmp_path: Path) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    gemma = Gemma2ForCausalLM(
        Gemma2Config(vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
                     num_attention_heads=2, num_key_value_heads=1, head_dim=4,
                     final_logit_softcapping=0.5, initializer_range=0.7, pad_token_id=0)
    )  # fmt: skip
    batch = CompletionCollator(0)(rows())
    fused, plain = (
        trainer(tmp_path, student=copy.deepcopy(gemma), fused=f).compute_loss(gemma, batch)
        for f in (True, False)
    )
    torch.testing.assert_close(fused, plain)


def test_an_unknown_change_of_logits_is_noticed(tmp_path: Path) -> None:
    t = trainer(tmp_path)
    t.model.register_forward_hook(
        lambda m, a, out: type(out)(logits=2 * out.logits + torch.arange(32))
    )
    with pytest.raises(ValueError, match="set fused=False"):
        t.compute_loss(t.model, CompletionCollator(0)(rows()))


def _in_two_processes(rank: int, world: int, folder: str, fused: bool) -> None:
    t = trainer(
        Path(folder), fused=fused, max_steps=2, optim="sgd", max_grad_norm=0.0,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, ce_weight=0.5,
        ddp_backend="gloo",
    )  # fmt: skip
    assert t.accelerator.num_processes == world
    t.train()
    if rank == 0:
        from safetensors.torch import save_file

        save_file({"weights": weights(t.model)}, Path(folder) / f"{fused}.safetensors")


def _both(rank: int, world: int, folder: str) -> None:
    import os

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", ACCELERATE_USE_CPU="true")
    for fused in (True, False):
        _in_two_processes(rank, world, folder, fused)


def test_two_processes_equal_one(tmp_path: Path, warm_processes: Any) -> None:
    from safetensors.torch import load_file

    run_gloo(_both, tmp_path, str(tmp_path))
    one = trainer(
        tmp_path, max_steps=2, optim="sgd", max_grad_norm=0.0, per_device_train_batch_size=8,
        ce_weight=0.5,
    )  # fmt: skip
    one.train()
    for fused in (True, False):
        two = load_file(tmp_path / f"{fused}.safetensors")["weights"]
        torch.testing.assert_close(two, weights(one.model), rtol=0, atol=1e-6)


def test_rows_of_text() -> None:
    class Words:
        eos_token_id = 9

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [int(w) for w in text.split()]}

    row = tokenize_row({"prompt": "1 2", "completion": "3 4"}, Words(), None)
    assert row == {"input_ids": [1, 2, 3, 4, 9], "labels": [-100, -100, 3, 4, 9]}
    assert tokenize_row({"text": "5"}, Words(), None)["labels"] == [5, 9]
    whole = tokenize_row({"question": "1", "answer": "2"}, Words(), 2, completion_only=False)
    assert whole == {"input_ids": [1, 2], "labels": [1, 2]}
    cut = tokenize_row({"prompt": "1 2 3", "completion": "4"}, Words(), None, max_prompt=2)
    assert cut == {"input_ids": [2, 3, 4, 9], "labels": [-100, -100, 4, 9]}
    with pytest.raises(ValueError, match="accepted: input_ids and labels"):
        tokenize_row({"story": "5"}, Words(), None)
    with pytest.raises(ValueError, match="need a tokenizer"):
        tokenize_row({"text": "5"}, None, None)


def test_errors(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    from abkd.trainer import DistillationConfig, DistillationTrainer

    student, teacher = models()
    args = DistillationConfig(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="pass a DistillationConfig"):
        DistillationTrainer(student, teacher, TrainingArguments(str(tmp_path), use_cpu=True))
    with pytest.raises(ValueError, match="there is no teacher"):
        DistillationTrainer(student, None, args, rows())
    with pytest.raises(ValueError, match="are one model"):
        DistillationTrainer(student, student, args, rows())

    class Other(Tokens):
        def get_vocab(self) -> dict[str, int]:
            return {**super().get_vocab(), "t7": 8, "t8": 7}

    with pytest.raises(ValueError, match="differ from id 7 on: 't7'"):
        DistillationTrainer(
            student, teacher, args, rows(), processing_class=Tokens(),
            teacher_processing_class=Other(),
        )  # fmt: skip
    many = DistillationConfig(str(tmp_path), use_cpu=True, on_policy_fraction=1.5)
    with pytest.raises(ValueError, match="accepted: 0 to 1"):
        DistillationTrainer(student, teacher, many, rows())
    own = DistillationConfig(str(tmp_path), use_cpu=True, on_policy_fraction=0.5)
    topk = [{**row, "topk_ids": [], "topk_logprobs": []} for row in rows()]
    with pytest.raises(ValueError, match="need the teacher itself"):
        DistillationTrainer(student, None, own, topk)
    smooth = DistillationConfig(str(tmp_path), use_cpu=True, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="label_smoothing_factor has no part"):
        DistillationTrainer(student, teacher, smooth, rows())
    bad = DistillationConfig(str(tmp_path), use_cpu=True, divergence="kl")
    with pytest.raises(ValueError, match="divergence is 'kl'"):
        DistillationTrainer(student, teacher, bad, rows())

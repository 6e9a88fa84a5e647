"""Exposure bias: zero for the teacher itself, right for an enumerable process, refusals."""

import pytest
import torch

from bridge_garden import exact_decomposition, exposure_bias, exposure_from_losses
from bridge_garden.exposure import sample
from bridge_garden.ledger import Ledger, WindowStudent
from shared_core.errors import InputError

TINY = Ledger(
    modulus=2, ops=(0.7, 0.3), fillers=2, fillers_per_round=1, rounds=2, slip=0.1, window=2
)


def teacher(ids: torch.Tensor) -> torch.Tensor:
    return TINY.probs(ids).log().clamp(min=-1e4)


@pytest.mark.smoke
def test_a_student_that_is_the_teacher_has_no_error() -> None:
    report = exposure_bias(teacher, teacher, [[0]] * 20, max_new_tokens=7)
    assert report.fit == pytest.approx(0, abs=1e-12)
    assert report.bias == pytest.approx(0, abs=1e-12)


def test_estimates_agree_with_enumeration() -> None:
    student = WindowStudent(TINY.vocab_size, window=2, width=8, embedding=4)
    exact = exact_decomposition(TINY, student.on_states, {TINY.initial: 1.0})
    report = exposure_bias(
        student, teacher, [[0]] * 300, max_new_tokens=TINY.length - 1, batch_size=300
    )
    assert abs(report.fit - exact.fit) < 3 * report.fit_error
    assert abs(report.inference - exact.inference) < 3 * report.inference_error
    assert abs(report.bias - exact.bias) < 3 * report.bias_error
    assert sum(report.per_position_fit) / len(report.per_position_fit) == pytest.approx(report.fit)
    assert report.positions_fit == [300] * (TINY.length - 1)
    assert report.teacher_side == "rollouts"


def test_same_seed_same_report_and_references_are_named() -> None:
    student = WindowStudent(TINY.vocab_size, window=2, width=8, embedding=4)
    kw = {"max_new_tokens": 4, "n_rollouts": 2, "batch_size": 3}
    prompts = [[0], [0, 1, 4], [0, 2]]
    one = exposure_bias(student, teacher, prompts, seed=3, **kw)
    assert exposure_bias(student, teacher, prompts, seed=3, **kw) == one
    assert exposure_bias(student, teacher, prompts, seed=4, **kw).bias != one.bias
    known = exposure_bias(student, teacher, prompts, references=[[1, 4], [5], [3, 3, 3]], **kw)
    assert known.teacher_side == "references"
    assert known.positions_fit == [6, 4, 2]
    with pytest.raises(InputError, match="2 references for 3"):
        exposure_bias(student, teacher, prompts, references=[[1], [2]], **kw)


def test_the_end_token_ends_a_rollout() -> None:
    def model(ids: torch.Tensor) -> torch.Tensor:
        logits = torch.full((*ids.shape, 3), -30.0)
        logits[..., 1] = torch.where(ids == 0, 30.0, -30.0)  # after 0 comes 1
        logits[..., 2] = torch.where(ids == 1, 30.0, -30.0)  # after 1 the end
        return logits

    ids, mask, start = sample(
        model,
        [[0], [0, 0]],
        max_new_tokens=6,
        generator=torch.Generator().manual_seed(0),
        eos_token_id=2,
    )
    assert start == 2
    assert ids.tolist() == [[0, 0, 1, 2], [0, 0, 1, 2]]
    assert mask.tolist() == [[False, True, True, True], [True] * 4]
    report = exposure_bias(model, model, [[0]], max_new_tokens=6, eos_token_id=2)
    assert report.positions_inference == [1, 1]


def test_report_of_losses_by_hand() -> None:
    theirs = torch.tensor([[1.0, 3.0], [2.0, 9.0]])
    mask = torch.tensor([[True, True], [True, False]])
    own = torch.tensor([[4.0], [6.0]])
    report = exposure_from_losses(theirs, own, mask)
    assert (report.fit, report.inference, report.bias) == (2.0, 5.0, 3.0)
    assert report.per_position_fit == [1.5, 3.0]
    assert report.inference_error == pytest.approx(1.0)
    grouped = exposure_from_losses(
        own.repeat(2, 1), own.repeat(2, 1), groups=torch.tensor([0, 1, 0, 1])
    )
    assert grouped.fit_error == pytest.approx(1.0)  # two prompts, however many rollouts
    with pytest.raises(InputError, match="no position"):
        exposure_from_losses(theirs, own, torch.zeros_like(mask))
    with pytest.raises(InputError, match="NaN"):
        exposure_from_losses(theirs * float("nan"), own, mask)


def test_a_transformers_model_with_its_cache_and_left_padding() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).eval()
    kw = {"max_new_tokens": 5, "temperature": 1.0}
    cached, _, start = sample(
        model, [[3], [5, 6, 7]], generator=torch.Generator().manual_seed(0), **kw
    )

    def plain(ids: torch.Tensor) -> torch.Tensor:
        pads = (ids == 0).long().cumprod(-1)
        mask = 1 - pads
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        return model(input_ids=ids, attention_mask=mask, position_ids=positions).logits

    again, _, _ = sample(plain, [[3], [5, 6, 7]], generator=torch.Generator().manual_seed(0), **kw)
    assert start == 3
    assert torch.equal(cached, again)
    report = exposure_bias(model, model, [[3], [5, 6, 7]], max_new_tokens=3)
    assert report.bias == pytest.approx(0, abs=1e-6)
    other = LlamaForCausalLM(LlamaConfig(**{**config.to_dict(), "vocab_size": 33})).train()
    assert exposure_bias(other, model, [[3], [5, 6]], max_new_tokens=3).fit > 0
    assert other.training


def test_errors() -> None:
    for prompts in ([], [[]]):
        with pytest.raises(InputError, match="at least one token"):
            exposure_bias(teacher, teacher, prompts, max_new_tokens=2)
    for bad in ({"temperature": 0.0}, {"max_new_tokens": 0}, {"n_rollouts": 0}, {"batch_size": 0}):
        with pytest.raises(InputError, match=r"above 0|at least 1"):
            exposure_bias(teacher, teacher, [[0]], **{"max_new_tokens": 2, **bad})

"""λ along a text, the teacher that is trained where none is given, and answers that are scored."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bridge_garden.evaluate
from bridge_garden import StepInfo, annotate
from bridge_garden.bench import measure_losses, naive_hybrid
from bridge_garden.evaluate import evaluate_answers
from bridge_garden.hybrid import hybrid_loss
from bridge_garden.risk import Risk
from shared_core.errors import InputError

TABLE = torch.randn(7, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
OTHER = torch.randn(7, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
IDS = [3, 1, 6, 0, 2]


def teacher(ids: Tensor) -> Tensor:
    return 3 * TABLE[ids]


def student(ids: Tensor) -> Tensor:
    return OTHER[ids]


@pytest.mark.smoke
def test_what_is_told_of_each_token_in_numpy() -> None:
    z = 3 * TABLE.numpy()[IDS[:-1]]
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    found = annotate(teacher, IDS)
    np.testing.assert_allclose(found.weight, 1 - p.max(-1), rtol=1e-12)
    np.testing.assert_allclose(found.max_prob, p.max(-1), rtol=1e-12)
    np.testing.assert_allclose(found.entropy, -(p * np.log(p)).sum(-1), rtol=1e-12)
    label = p[range(4), IDS[1:]]
    np.testing.assert_allclose(found.label_prob, label, rtol=1e-12)
    assert (found.ids, found.argmax) == (IDS[1:], p.argmax(-1).tolist())
    by_entropy = annotate(teacher, IDS, weight="entropy").weight
    np.testing.assert_allclose(by_entropy, np.array(found.entropy) / math.log(7), rtol=1e-12)
    by_label = annotate(teacher, IDS, weight="confidence:label").weight
    np.testing.assert_allclose(by_label, 1 - label, rtol=1e-12)
    # Two of seven classes are padding rows of the head.
    cut = annotate(teacher, [3, 1, 0], vocab=5)
    few = np.exp(z[0, :5]) / np.exp(z[0, :5]).sum()
    assert cut.weight[0] == pytest.approx(1 - few.max())


def test_weights_that_look_at_the_student_or_at_the_step() -> None:
    z, t = student(torch.tensor([IDS])), teacher(torch.tensor([IDS]))
    y = torch.tensor([IDS])
    expected = hybrid_loss(z, t, y, weight="wsl", shift=True).weight[0].tolist()
    assert annotate(teacher, IDS, student=student, weight="wsl").weight == pytest.approx(expected)
    half = annotate(teacher, IDS, weight="curriculum:0.4", at=StepInfo(10, 100)).weight
    assert half == pytest.approx([0.2] * 4)


@pytest.mark.usefixtures("without_type_checks")
def test_errors() -> None:
    with pytest.raises(InputError, match="give at least 2"):
        annotate(teacher, [3])
    with pytest.raises(InputError, match="no weight is called"):
        annotate(teacher, IDS, weight="bold")
    with pytest.raises(InputError, match="outside"):
        annotate(teacher, IDS, weight=lambda seen, at: seen.teacher_max_prob + 1)


def test_a_teacher_is_trained_on_the_text_that_python_ships() -> None:
    pytest.importorskip("tokenizers")
    from bridge_garden.small_teacher import SENTENCE, small_teacher

    model, tokenizer = small_teacher(30, vocab=300, width=16, window=8)
    again, _ = small_teacher(30, vocab=300, width=16, window=8)
    assert not model.training
    torch.testing.assert_close(model.state_dict(), again.state_dict(), rtol=0, atol=0)
    ids = tokenizer(SENTENCE)["input_ids"]
    assert tokenizer.decode(ids).replace(" ", "") == SENTENCE.replace(" ", "")
    found = annotate(model, ids, vocab=300)
    assert len(found.weight) == len(ids) - 1
    with torch.no_grad():
        loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss
    assert 0 < loss < math.log(300) - 0.3  # better than knowing nothing


def test_answers_are_scored_by_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def generate(model: Any, tokenizer: Any, prompts: Any, **more: Any) -> list[str]:
        asked.update(more, prompts=list(prompts))
        return ["so it is 5.0", "#### 7", "I do not know", "The answer is: 1,000."]

    monkeypatch.setattr(bridge_garden.evaluate, "generate", generate)
    rows = [
        {"question": "2+3?", "answer": "2+3=5\n#### 5"}, {"question": "3+3?", "answer": "#### 6"},
        {"question": "4?", "answer": "#### 4"}, {"question": "10^3?", "answer": "#### 1000"},
    ]  # fmt: skip
    metrics, lines = evaluate_answers(None, None, rows, seed=4, temperature=0.5, batch_size=2)
    assert asked["prompts"] == ["2+3?", "3+3?", "4?", "10^3?"]
    assert (asked["seed"], asked["temperature"], asked["batch_size"]) == (4, 0.5, 2)
    assert [line["score"] for line in lines] == [100, 0, 0, 100]
    assert metrics["exact_match"] == 50
    assert metrics["standard_error"] == pytest.approx(np.std([1, 0, 0, 1], ddof=1) * 50)
    with pytest.raises(InputError, match="no rows"):
        evaluate_answers(None, None, [])
    with pytest.raises(InputError, match="question and answer"):
        evaluate_answers(None, None, [{"text": "a"}])


def test_the_formula_that_the_benchmark_compares_with() -> None:
    h, th = torch.randn(1, 6, 3), torch.randn(1, 6, 4)
    W, tW = torch.randn(9, 3), torch.randn(9, 4)
    y = (th @ tW.T).argmax(-1)
    y[0, 1] = (y[0, 1] + 1) % 9
    for labels, alpha in ((None, 0.0), (y, 0.4)):
        risk = None if labels is None else Risk(alpha)
        ours = hybrid_loss(h @ W.T, th @ tW.T, labels, risk=risk).loss
        torch.testing.assert_close(naive_hybrid(h, W, th, tW, labels, alpha), ours)


def test_the_benchmark_compares_equal_things() -> None:
    found = measure_losses(32, 101, 8, repeats=1)
    assert all(v < 1e-5 for v in found["relative_differences"].values())
    seconds, ratios = found["seconds"], found["ratios"]
    assert ratios["chain over hybrid, time"] == seconds["chain"] / seconds["hybrid"]
    assert ratios["naive over hybrid, time"] == seconds["naive"] / seconds["hybrid"]
    assert ratios["hybrid over soft, time"] == seconds["hybrid"] / seconds["soft"]

"""Scores of generated texts."""

from typing import Any

import pytest
import torch

from abkd.evaluation import exact_match, generate, prompts_and_references, rouge_l


def test_rouge_l_is_that_of_rouge_score_and_the_best_over_references() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer")
    texts = ["the cats were running home", "nothing in common", ""]
    answers = [["a dog", "a cat runs home"], ["entirely other words"], ["x"]]
    found = rouge_l(texts, answers)
    stem, bare = (scorer.RougeScorer(["rougeL"], use_stemmer=s) for s in (True, False))
    # "cat", "run" and "home" in order: precision 3/5, recall 3/4
    assert found == pytest.approx([100 * 2 * 0.6 * 0.75 / 1.35, 0, 0])
    assert found[0] == 100 * stem.score(answers[0][1], texts[0])["rougeL"].fmeasure
    assert found[0] > 100 * bare.score(answers[0][1], texts[0])["rougeL"].fmeasure
    assert rouge_l(texts[:1], ["a cat runs home"]) == found[:1]


def test_exact_match() -> None:
    texts = ["3 + 4 = 7", "The answer is: 1,200.0", "#### 5\nand 6", "", "The answer is yes."]
    answers = ["#### 7", ["#### 1200", "no"], "#### 6", "#### 1", "The answer is: yes"]
    assert exact_match(texts, answers) == [100, 100, 0, 0, 100]


def test_errors() -> None:
    with pytest.raises(ValueError, match="1 predictions with 2 references"):
        exact_match(["a"], ["b", "c"])
    with pytest.raises(ValueError, match="has no reference"):
        exact_match(["a"], [[]])
    with pytest.raises(ValueError, match="no rows"):
        prompts_and_references([])
    with pytest.raises(ValueError, match="needs prompt and completion"):
        prompts_and_references([{"text": "a"}])
    assert prompts_and_references([{"question": "a", "answer": "b"}]) == (["a"], [["b"]])


@pytest.mark.usefixtures("without_type_checks")
def test_padding_does_not_change_what_is_generated() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    class Letters:
        pad_token_id, eos_token_id = 0, 1

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [ord(c) - 95 for c in text]}

        def batch_decode(self, ids: Any, skip_special_tokens: bool) -> list[str]:
            return ["".join(chr(i + 95) for i in row if i > 1) for row in ids.tolist()]

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=28, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                    num_attention_heads=2, initializer_range=0.5)
    )  # fmt: skip
    prompts = ["abc", "a", "hello"]
    options = {"max_new_tokens": 5, "temperature": 0.0}
    together = generate(model, Letters(), prompts, batch_size=3, **options)
    assert together == generate(model, Letters(), prompts, batch_size=1, **options)
    state = torch.get_rng_state()
    drawn = [generate(model, Letters(), prompts, max_new_tokens=5, seed=s) for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_compare_equals_its_definitions() -> None:
    from types import SimpleNamespace

    from abkd.evaluation import compare

    class Fixed(torch.nn.Module):
        device = torch.device("cpu")

        def __init__(self, seed: int, classes: int) -> None:
            super().__init__()
            self.table = torch.randn(10, classes, generator=torch.Generator().manual_seed(seed))

        def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=self.table[input_ids])

    student, teacher = Fixed(0, 6), Fixed(1, 8)
    ids = torch.tensor([[1, 2, 3], [4, 5, 0]])
    labels = torch.tensor([[-100, 2, 3], [-100, -100, 0]])
    found = compare(student, teacher, [{"input_ids": ids, "labels": labels}], vocab=6)
    before, after = torch.tensor([1, 2, 5]), torch.tensor([2, 3, 0])
    q, p = (m.table[before, :6].double().softmax(-1) for m in (student, teacher))
    expected = {
        "ce": -q.gather(1, after[:, None]).log().mean(),
        "fkl": (p * (p / q).log()).sum(-1).mean(),
        "rkl": (q * (q / p).log()).sum(-1).mean(),
        "tv": 0.5 * (p - q).abs().sum(-1).mean(),
        "student_entropy": -(q * q.log()).sum(-1).mean(),
        "teacher_entropy": -(p * p.log()).sum(-1).mean(),
        "agreement": (p.argmax(-1) == q.argmax(-1)).double().mean(),
    }
    assert found == {name: pytest.approx(float(v), rel=1e-5) for name, v in expected.items()}
    with pytest.raises(ValueError, match="no token that counts"):
        compare(student, teacher, [{"input_ids": ids, "labels": torch.full_like(ids, -100)}])

import math
from collections import Counter

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared_core.errors import InputError
from shared_core.metrics import (
    exact_match,
    normalize_answer,
    rouge_l,
    sub_exact_match,
    token_accuracy,
    token_f1,
)
from shared_core.testing import examples

words = st.lists(st.sampled_from(["a", "cat", "the", "sat", "mat", "on"]), max_size=12)
repeatable = examples(150)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Cat.", "cat"),
        ("  an  apple,\n a day ", "apple day"),
        ("U.S.A.", "usa"),
        ("theory of anthems", "theory of anthems"),
        ("A", ""),
        ("?!", ""),
        ("Ünïcode – naïve", "ünïcode – naïve"),
        ("rock'n'roll", "rocknroll"),
        ("a.the", "athe"),  # punctuation goes before articles, as in the SQuAD evaluation
    ],
)
def test_normalisation(text: str, normal: str) -> None:
    assert normalize_answer(text) == normal
    assert normalize_answer(normal) == normal


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("prediction", "references", "exact", "sub", "f1"),
    [
        ("The cat.", "cat", 1, 1, 1),
        ("a black cat", "cat", 0, 1, 2 / 3),
        ("dog", ["cat", "Dog!"], 1, 1, 1),
        ("cat cat", "cat", 0, 1, 2 / 3),
        ("concatenate", "cat", 0, 1, 0),
        ("", "cat", 0, 0, 0),
        ("the", "a", 1, 1, 1),
        ("cat", "the", 0, 0, 0),
        ("", "", 1, 1, 1),
        ("cat sat", ["mat sat on", "cat"], 0, 1, 2 / 3),
    ],
)
def test_hand_computed_answers(
    prediction: str, references: str | list, exact: float, sub: float, f1: float
) -> None:
    assert exact_match(prediction, references) == exact
    assert sub_exact_match(prediction, references) == sub
    assert token_f1(prediction, references) == pytest.approx(f1, 1e-12)


@given(words, words)
@repeatable
def test_f1_is_the_harmonic_mean_of_bag_precision_and_recall(left: list, right: list) -> None:
    p = [w for w in left if w not in ("a", "the")]
    r = [w for w in right if w not in ("a", "the")]
    shared = sum(min(Counter(p)[w], Counter(r)[w]) for w in set(p))
    if not p or not r:
        expected = float(p == r)
    elif shared == 0:
        expected = 0.0
    else:
        precision, recall = shared / len(p), shared / len(r)
        expected = 2 * precision * recall / (precision + recall)
    value = token_f1(" ".join(left), " ".join(right))
    assert value == pytest.approx(expected, 1e-12)
    assert value == pytest.approx(token_f1(" ".join(right), " ".join(left)), 1e-12)


@given(st.text("ab t,.he", max_size=12), st.text("ab t,.he", max_size=12))
@repeatable
def test_sub_exact_match_is_never_below_exact_match(prediction: str, reference: str) -> None:
    assert sub_exact_match(prediction, reference) >= exact_match(prediction, reference)
    assert exact_match(prediction, [reference, prediction]) == 1.0


def table_lcs(first: list, second: list) -> int:
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            best = max(table[i][j + 1], table[i + 1][j])
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else best
    return table[-1][-1]


@given(words, words)
@repeatable
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(left: list, right: list) -> None:
    length = table_lcs(left, right)
    expected = 0.0
    if length:
        precision, recall = length / len(left), length / len(right)
        expected = 2 * precision * recall / (precision + recall)
    assert rouge_l(" ".join(left), " ".join(right)) == pytest.approx(expected, 1e-12)


def test_rouge_l_of_long_texts() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (
        [f"w{i}" for i in torch.randint(0, 9, (n,), generator=generator)] for n in (150, 210)
    )
    expected = 2 * table_lcs(first, second) / 360
    assert rouge_l(" ".join(first), " ".join(second)) == pytest.approx(expected, 1e-12)


def test_rouge_l_words_stems_and_references() -> None:
    assert rouge_l("Hello, WORLD-2!", "hello world 2") == 1.0
    assert rouge_l("été", "t") == 1.0  # words are ASCII, as in the rouge_score package
    assert rouge_l("", "hello") == rouge_l("hello", "") == rouge_l("", "") == 0.0
    assert rouge_l("x y", ["q", "x z", "x y z"]) == pytest.approx(0.8)

    def strip_s(word: str) -> str:
        return word.removesuffix("s")

    assert rouge_l("cats cats", "cat cat", stem=strip_s) == 1.0
    assert rouge_l("gas", "ga", stem=strip_s) == 0.0  # three characters are not stemmed


@pytest.mark.parametrize("metric", [exact_match, sub_exact_match, token_f1, rouge_l])
def test_a_missing_reference_is_refused(metric: object) -> None:
    with pytest.raises(InputError, match="there is no reference"):
        metric("cat", [])


def test_token_accuracy_counts_labelled_positions() -> None:
    labels = torch.tensor([[1, 2, -100, 4], [-100, 6, 7, 8]])
    predictions = torch.tensor([[1, 0, -100, 4], [5, 6, 0, 0]])
    assert token_accuracy(predictions, labels).item() == pytest.approx(3 / 6)
    assert token_accuracy(labels, labels).item() == 1.0
    assert token_accuracy(predictions, labels, ignore_index=4).item() == pytest.approx(3 / 7)
    assert math.isnan(token_accuracy(labels, torch.full_like(labels, -100)).item())


def test_token_accuracy_refuses_other_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(InputError, match=r"\[3\] and labels \[1, 3\]"):
        token_accuracy(torch.tensor([1, 2, 3]), torch.tensor([[1, 2, 3]]))

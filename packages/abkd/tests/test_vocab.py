"""Sizes of heads, tokenizers that agree and that do not."""

import pytest

from abkd import VocabularyMismatchError, align_vocab


class Tokenizer:
    def __init__(self, *tokens: str) -> None:
        self.tokens = tokens

    def get_vocab(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}


def test_sizes() -> None:
    assert align_vocab(151_936, 152_064) == 151_936
    assert align_vocab(5, 6, Tokenizer("a", "b", "c")) == 3
    assert align_vocab(5, 6, Tokenizer("a", "b"), Tokenizer("a", "b", "added")) == 2
    assert align_vocab(2, 6, Tokenizer("a", "b", "c")) == 2


def test_configs_and_models() -> None:
    from transformers import LlamaConfig

    assert align_vocab(LlamaConfig(vocab_size=40), LlamaConfig(vocab_size=48)) == 40


def test_mismatch() -> None:
    with pytest.raises(VocabularyMismatchError, match=r"id 1 on: 'b' .student., 'c' .teacher."):
        align_vocab(5, 5, Tokenizer("a", "b"), Tokenizer("a", "c", "b"))
    with pytest.raises(VocabularyMismatchError, match="5 rows and the teacher's 6"):
        align_vocab(5, 6, mode="strict")
    with pytest.raises(ValueError, match="vocab is 'pad'"):
        align_vocab(5, 6, mode="pad")

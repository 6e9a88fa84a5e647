from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

pytest_plugins = ["shared_core.testing"]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """The models of these tests are so small that threads make them slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def save_word_model() -> Callable[[Path], list[str]]:
    """Write a small model with a tokenizer of whole words to a folder; gives the words."""

    def save(folder: Path) -> list[str]:
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        from lede.testing import tiny_model

        words = [f"w{i}" for i in range(60)]
        vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", *words])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>"
        ).save_pretrained(folder)
        tiny_model("llama", layers=5).save_pretrained(folder)
        return words

    return save

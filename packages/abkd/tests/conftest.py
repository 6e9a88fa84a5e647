import functools
import json
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest_plugins = ["shared_core.testing"]


def pytest_configure(config: pytest.Config) -> None:
    # transformers 5.24 renames these; transformers itself and peft still use the old names.
    for name in ("gradient_checkpointing", "is_gradient_checkpointing"):
        config.addinivalue_line(
            "filterwarnings", f"ignore:`{name}` is deprecated and will be removed:FutureWarning"
        )


def _textbook(z: Tensor, t: Tensor, alpha: float, beta: float, tau: float = 1.0) -> Tensor:
    """D^(α,β) of §4.1 of the paper and its limits, by probabilities in float64, per row."""
    q = torch.softmax(z.double() / tau, -1)
    p = torch.softmax(t.double() / tau, -1)
    s = alpha + beta
    if alpha == 0 and beta == 0:
        terms = 0.5 * (p.log() - q.log()) ** 2
    elif beta == 0:
        terms = (p**alpha * (p**alpha / q**alpha).log() - p**alpha + q**alpha) / alpha**2
    elif alpha == 0:
        terms = (q**beta * (q**beta / p**beta).log() - q**beta + p**beta) / beta**2
    elif s == 0:
        terms = ((q**alpha / p**alpha).log() + (q**alpha / p**alpha) ** -1 - 1) / alpha**2
    else:
        terms = -(p**alpha * q**beta - alpha / s * p**s - beta / s * q**s) / (alpha * beta)
    return terms.sum(-1)


@pytest.fixture
def textbook() -> Callable[..., Tensor]:
    """The definition, written out with probabilities, that the package is compared with."""
    return _textbook


@pytest.fixture
def pair(tmp_path: Path) -> list[str]:
    """A tiny Qwen student and Llama teacher with heads of unequal size, and data, on disk."""
    pytest.importorskip("tokenizers")
    pytest.importorskip("datasets")
    import torch
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    from shared_core.data.text import train_bpe

    text = ["The quick brown fox jumps over the lazy dog. " * 4]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(text, 270), pad_token="<pad>", eos_token="<eos>"
    )
    common: dict[str, Any] = {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    student = Qwen2ForCausalLM(
        Qwen2Config(vocab_size=288, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                    **common)
    )  # fmt: skip
    teacher = LlamaForCausalLM(
        LlamaConfig(vocab_size=320, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                    initializer_range=0.3, **common)
    )  # fmt: skip
    for name, model in (("student", student), ("teacher", teacher)):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    rows = [{"prompt": "The quick", "completion": f" brown fox {i}"} for i in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [
        "train", "--student", str(tmp_path / "student"), "--teacher", str(tmp_path / "teacher"),
        "--data", str(tmp_path / "data.jsonl"), "--max-steps", "30", "--save-steps", "5",
        "--batch-size", "2", "--accumulation", "2", "--lr", "0.003", "--device", "cpu",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def warm_processes() -> Iterator[Any]:
    """Processes forked from one that has the libraries: to import them takes each 13 s of its own.

    The context for `multiprocessing`; `shared_core.testing.run_gloo` uses it as well.
    """
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(
        [
            "abkd.trainer",
            "transformers.models.auto",
            "transformers.models.llama.modeling_llama",
            "transformers.models.qwen2.modeling_qwen2",
            "shared_core.testing",
        ]
    )
    with pytest.MonkeyPatch.context() as patch:
        start = functools.partial(torch.multiprocessing.start_processes, start_method="forkserver")
        patch.setattr(torch.multiprocessing, "spawn", start)
        yield fork

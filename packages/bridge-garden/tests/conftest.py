import functools
import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest_plugins = ["shared_core.testing"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str, str]:
    """A student and a teacher with heads of unequal size, in folders, and rows."""
    pytest.importorskip("accelerate")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<eos>", "<unk>", *"0123456789+=", "is", "the", "sum"]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>"
    )
    for name, size, width in (("student", 20, 16), ("teacher", 24, 32)):
        torch.manual_seed(width)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=size,
                hidden_size=width,
                intermediate_size=width,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=64,
                eos_token_id=0,
                bos_token_id=0,
            )
        )
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    lines = [json.dumps({"prompt": f"{i} + 1 =", "completion": str(i + 1)}) for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return tuple(str(tmp_path / n) for n in ("student", "teacher", "rows.jsonl"))


@pytest.fixture(scope="module")
def warm_processes() -> Iterator[Any]:
    """Processes forked from one that has the libraries: to import them takes each 13 s of its own.

    The context for `multiprocessing`; `shared_core.testing.run_gloo` uses it as well.
    """
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(
        [
            "bridge_garden.trainer",
            "transformers.models.auto",
            "transformers.models.llama.modeling_llama",
            "shared_core.testing",
        ]
    )
    with pytest.MonkeyPatch.context() as patch:
        start = functools.partial(torch.multiprocessing.start_processes, start_method="forkserver")
        patch.setattr(torch.multiprocessing, "spawn", start)
        yield fork

"""What compression is compared with: the whole prompt, none of it, a part of it.

Pooling and memory tokens are compressors too: train them with ``merging="embeddings"`` or
``merging="memory"``. At rate 1, ``merging="embeddings", alignment="none"`` is the whole prompt
with a decoder that was fine-tuned.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from shared_core.errors import InputError, MissingExtraError

__all__ = [
    "BASELINES",
    "answer_plain",
    "check_baselines",
    "llmlingua2",
    "shorten",
    "truncate",
]

BASELINES = ("full", "closed-book", "truncation", "truncation-end", "llmlingua2")
"""Baselines by name: the whole context, none, its first or last ⌈n / r⌉ tokens, LLMLingua-2."""

LLMLINGUA2 = "microsoft/llmlingua-2-xlm-roberta-large-meetingbank"


def check_baselines(text: str | None) -> list[str]:
    """The baselines that a list with commas names.

    Raises:
        InputError: If there is no such baseline.

    Examples:
        >>> check_baselines("full,truncation")
        ['full', 'truncation']
    """
    names = [name.strip() for name in (text or "").split(",") if name.strip()]
    unknown = [name for name in names if name not in BASELINES]
    if unknown:
        raise InputError(f"no baseline is called {unknown[0]!r}; accepted: {', '.join(BASELINES)}")
    return names


def truncate(text: str, tokenizer: Any, rate: int, *, keep: str = "start") -> str:
    """A text's first or last ⌈n / r⌉ tokens, as a text.

    Args:
        text: The text.
        tokenizer: Whose tokens count.
        rate: r.
        keep: ``start`` or ``end``.

    Raises:
        InputError: If `keep` is not accepted.

    Examples:
        >>> from gmsa.demo_base import tokenizer
        >>> truncate("ba be bi bo bu", tokenizer(), 2, keep="end")
        'bi bo bu'
    """
    if keep not in ("start", "end"):
        raise InputError(f"keep is {keep!r}; accepted: start, end")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    kept = -(-len(ids) // rate)
    chosen = ids[:kept] if keep == "start" else ids[len(ids) - kept :]
    shortened: str = tokenizer.decode(chosen)
    return shortened


def llmlingua2(model: str | None = None, device: str = "cpu") -> Callable[[str, int], str]:
    """LLMLingua-2 (Pan et al., 2024), as its own package computes it.

    Args:
        model: Hub id or folder of its token classifier; the large one by default.
        device: Where it runs.

    Returns:
        A function of a text and a rate to the shortened text.

    Raises:
        MissingExtraError: If llmlingua is not installed.
        InputError: If its weights cannot be loaded.
    """
    try:
        from llmlingua import PromptCompressor
    except ImportError as error:
        raise MissingExtraError("gmsa", "llmlingua", "llmlingua") from error
    name = model or LLMLINGUA2
    try:
        compressor = PromptCompressor(name, device_map=device, use_llmlingua2=True)
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise InputError(
            f"LLMLingua-2 cannot load {name}: {reason}; give a folder with its weights"
        ) from error

    def shortened(text: str, rate: int) -> str:
        found: str = compressor.compress_prompt([text], rate=1 / rate)["compressed_prompt"]
        return found

    return shortened


def shorten(
    name: str, tokenizer: Any, *, llmlingua2_model: str | None = None, device: str = "cpu"
) -> Callable[[str, int], str]:
    """A baseline as a function of a text and a rate to the text that is left.

    Raises:
        InputError: If there is no such baseline.

    Examples:
        >>> shorten("closed-book", None)("a text", 4)
        ''
    """
    check_baselines(name)
    if name == "llmlingua2":
        return llmlingua2(llmlingua2_model, device)
    if name == "full":
        return lambda text, rate: text
    if name == "closed-book":
        return lambda text, rate: ""
    keep = "end" if name == "truncation-end" else "start"
    return lambda text, rate: truncate(text, tokenizer, rate, keep=keep)


@torch.no_grad()
def answer_plain(
    model: Any,
    tokenizer: Any,
    contexts: Sequence[str],
    prompts: Sequence[str],
    *,
    template: str = "{context}\n{prompt}",
    **gen_kwargs: Any,
) -> list[str]:
    """Answers of a plain language model to contexts and prompts as text.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer, which adds its special tokens here.
        contexts: One a prompt; empty for none.
        prompts: The questions.
        template: Holds ``{context}`` and ``{prompt}``.
        gen_kwargs: Those of ``generate``.

    Raises:
        InputError: If the template lacks a field.
    """
    for field in ("{context}", "{prompt}"):
        if field not in template:
            raise InputError(f"the template {template!r} has no {field}")
    texts = [
        template.replace("{prompt}", p).replace("{context}", c).strip()
        for c, p in zip(contexts, prompts, strict=True)
    ]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    width = max(len(row) for row in rows)
    pad = tokenizer.pad_token_id
    place = model.get_input_embeddings().weight.device
    ids = torch.tensor([[pad] * (width - len(r)) + list(r) for r in rows], device=place)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=place)
    options: dict[str, Any] = {"max_new_tokens": 100, "do_sample": False, "pad_token_id": pad}
    if not gen_kwargs.get("do_sample", False):
        options.update(temperature=None, top_p=None, top_k=None)
    new = model.generate(ids, attention_mask=mask, **{**options, **gen_kwargs})[:, width:]
    return [a.strip() for a in tokenizer.batch_decode(new, skip_special_tokens=True)]

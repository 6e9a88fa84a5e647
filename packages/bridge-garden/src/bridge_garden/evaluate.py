"""A model's own answers to held-out questions, scored by their final number."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from abkd.evaluation import exact_match, generate, prompts_and_references

__all__ = ["evaluate_answers"]


def evaluate_answers(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    batch_size: int = 8,
    seed: int = 0,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Let a model answer, and compare final numbers with those of the references.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer.
        rows: With ``question`` and ``answer`` (as GSM8K has), or ``prompt`` and ``completion``.
        max_new_tokens: Length of an answer.
        temperature: Of sampling; 0 is greedy.
        batch_size: Rows at once.
        seed: Of the sampling.

    Returns:
        ``exact_match`` in percent with its standard error and the number of rows; and a line for
        each row, with prompt, answer and score.

    Raises:
        InputError: If there are no rows, or they lack these columns.
    """
    prompts, references = prompts_and_references(rows)
    answers = generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        temperature=temperature,
        seed=seed,
    )
    scores = exact_match(answers, references)
    n = len(scores)
    mean = sum(scores) / n
    error = None
    if n > 1:
        error = math.sqrt(sum((s - mean) ** 2 for s in scores) / (n - 1) / n)
    lines = [
        {"prompt": p, "answer": a, "score": s}
        for p, a, s in zip(prompts, answers, scores, strict=True)
    ]
    return {"exact_match": mean, "standard_error": error, "rows": n}, lines

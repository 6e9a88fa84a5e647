"""Scores of generated answers: ROUGE-L as the paper's tables have it, and exact match."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from abkd.divergence import divergence
from shared_core.errors import InputError, MissingExtraError

__all__ = [
    "compare",
    "exact_match",
    "final_answer",
    "generate",
    "prompts_and_references",
    "rouge_l",
]


def rouge_l(predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> list[float]:
    """ROUGE-L (F-measure, Porter stemmer) times 100 of each text, the best over its references.

    Raises:
        InputError: If the two lists have unequal lengths, or a text has no reference.
        MissingExtraError: If rouge-score is not installed.
    """
    several = _references(predictions, references)
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise MissingExtraError("abkd", "evaluation", "rouge-score") from error
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return [
        100 * max(scorer.score(one, text)["rougeL"].fmeasure for one in allowed)
        for text, allowed in zip(predictions, several, strict=True)
    ]


def final_answer(text: str) -> str:
    r"""The answer a solution ends in: after ``####`` or "The answer is", else the last number.

    Examples:
        >>> [final_answer(t) for t in ("2 + 2 = 4\n#### 1,004", "The answer is: $7.50.", "or 3")]
        ['1004', '7.5', '3']
    """
    marked: list[str] = re.findall(r"(?:####|[Tt]he answer is:?)\s*([^\n]*)", text)
    tail = marked[-1] if marked else text
    numbers: list[str] = re.findall(r"-?\d[\d,]*(?:\.\d+)?", tail)
    if not numbers:
        return tail.strip().rstrip(".") if marked else ""
    number = (numbers[0] if marked else numbers[-1]).replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


def exact_match(
    predictions: Sequence[str], references: Sequence[str | Sequence[str]]
) -> list[float]:
    """100 where the `final_answer` of a text is that of one of its references, else 0.

    Examples:
        >>> exact_match(["so 5 it is", "none"], ["#### 5", "#### 6"])
        [100.0, 0.0]
    """
    several = _references(predictions, references)
    return [
        100.0 * bool((found := final_answer(text)) and found in {final_answer(a) for a in allowed})
        for text, allowed in zip(predictions, several, strict=True)
    ]


def _references(
    predictions: Sequence[str], references: Sequence[str | Sequence[str]]
) -> list[list[str]]:
    if len(predictions) != len(references):
        raise InputError(
            f"{len(predictions)} predictions with {len(references)} references; each prediction "
            "needs one reference or one list of them"
        )
    several = [[one] if isinstance(one, str) else list(one) for one in references]
    if not all(several):
        raise InputError("a prediction has no reference; leave it out, or give one")
    return several


def prompts_and_references(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Prompts, and the accepted answers of each, from rows of text.

    Args:
        rows: With ``prompt`` and ``completion``, or ``question`` and ``answer``; the second of them
            may be a list of accepted texts.

    Raises:
        InputError: If there are no rows, or one has neither pair of columns.
    """
    prompts, answers = [], []
    for row in rows:
        names = ("prompt", "completion") if "prompt" in row else ("question", "answer")
        if not all(name in row for name in names):
            raise InputError(
                f"the data have the columns {', '.join(row)}; evaluation needs prompt and "
                "completion, or question and answer"
            )
        prompts.append(str(row[names[0]]))
        answers.append([row[names[1]]] if isinstance(row[names[1]], str) else list(row[names[1]]))
    if not prompts:
        raise InputError("the data have no rows")
    return prompts, answers


@torch.no_grad()
def compare(
    student: Any, teacher: Any, batches: Iterable[Mapping[str, Any]], vocab: int | None = None
) -> dict[str, float]:
    """How near a student is to its teacher on held-out text, by measures that no loss favours.

    Args:
        student: A causal language model of transformers; put in eval mode.
        teacher: Likewise.
        batches: With ``input_ids``, ``attention_mask`` and ``labels`` (-100 does not count).
        vocab: Rows of the heads to use; by default those of the smaller.

    Returns:
        Means over the tokens that count: ``ce`` against the labels, ``fkl``, ``rkl``, ``tv``,
        ``student_entropy``, ``teacher_entropy``, and ``agreement`` of the most probable tokens.

    Raises:
        InputError: If no token counts.
    """
    student.eval()
    teacher.eval()
    sums: dict[str, float] = {}
    count = 0
    for batch in batches:
        inputs = {k: v.to(student.device) for k, v in batch.items() if k != "labels"}
        labels = batch["labels"][:, 1:].to(student.device)
        keep = labels != -100
        if not keep.any():
            continue
        logits = [model(**inputs).logits[:, :-1][keep] for model in (student, teacher)]
        size = vocab or min(x.shape[-1] for x in logits)
        lq, lp = (x[:, :size].float().log_softmax(-1) for x in logits)
        found = {
            "ce": -lq.gather(-1, labels[keep].unsqueeze(-1)).sum(),
            "fkl": divergence("fkl", lq, lp, reduction="sum"),
            "rkl": divergence("rkl", lq, lp, reduction="sum"),
            "tv": divergence("tv", lq, lp, reduction="sum"),
            "student_entropy": -(lq.exp() * lq).sum(),
            "teacher_entropy": -(lp.exp() * lp).sum(),
            "agreement": (lq.argmax(-1) == lp.argmax(-1)).sum(),
        }
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + float(value)
        count += int(keep.sum())
    if not count:
        raise InputError("the held-out text has no token that counts")
    return {name: value / count for name, value in sums.items()}


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """A continuation of each prompt, sampled from all tokens (greedy at temperature 0).

    Args:
        model: A causal language model of transformers; left in eval mode.
        tokenizer: Its tokenizer.
        prompts: Texts.
        max_new_tokens: Length of a continuation.
        batch_size: Prompts at once, padded at the left.
        temperature: 1 as in the paper.
        seed: Seeds the sampling, and leaves torch's generators as they were.
    """
    from shared_core.run import progress

    model.eval()
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    drawn: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        drawn = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompts]
    starts = range(0, len(ids), batch_size)
    texts = []
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        for start in progress(starts, description="generating", unit="batch"):
            some = ids[start : start + batch_size]
            width = max(len(one) for one in some)
            tokens = torch.tensor([[pad] * (width - len(one)) + one for one in some])
            mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in some])
            found = model.generate(
                input_ids=tokens.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_new_tokens,
                pad_token_id=pad,
                eos_token_id=tokenizer.eos_token_id,
                **drawn,
            )
            texts += tokenizer.batch_decode(found[:, width:], skip_special_tokens=True)
    return texts

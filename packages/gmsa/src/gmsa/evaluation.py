"""Scores of answers and reconstructions."""

from collections.abc import Sequence
from typing import Any

from shared_core.errors import InputError, MissingExtraError
from shared_core.metrics.text import exact_match, sub_exact_match, token_f1

__all__ = ["bert_score", "prefix_match", "qa_metrics", "reconstruction_metrics", "text_metrics"]


def _check_pairs(predictions: Sequence[Any], references: Sequence[Any]) -> None:
    if not predictions or len(predictions) != len(references):
        raise InputError(f"{len(predictions)} predictions for {len(references)} references")


def qa_metrics(
    predictions: Sequence[str], references: Sequence[str | Sequence[str]]
) -> dict[str, float]:
    """Exact match, substring match and F1, each the mean over items in [0, 1].

    ``em``, ``sub_em`` and ``f1`` take the best reference, ``f1_first`` the first. A table with EM
    above F1 cannot come from ``em`` and ``f1``: it is substring match beside the first reference.

    Raises:
        InputError: If there are none, or numbers differ.

    Examples:
        >>> qa_metrics(["in Paris"], [["Paris", "Paris, France"]])["sub_em"]
        1.0
    """
    _check_pairs(predictions, references)
    lists = [[r] if isinstance(r, str) else list(r) for r in references]
    n = len(lists)
    pairs = list(zip(predictions, lists, strict=True))
    return {
        "em": sum(exact_match(p, r) for p, r in pairs) / n,
        "sub_em": sum(sub_exact_match(p, r) for p, r in pairs) / n,
        "f1": sum(token_f1(p, r) for p, r in pairs) / n,
        "f1_first": sum(token_f1(p, r[0]) for p, r in pairs) / n,
    }


def prefix_match(predicted: Sequence[int], reference: Sequence[int]) -> float:
    """Length of the longest common prefix over the reference's length.

    Examples:
        >>> prefix_match([1, 2, 9], [1, 2, 3, 4])
        0.5
    """
    if not reference:
        return float(not predicted)
    common = 0
    for one, other in zip(predicted, reference, strict=False):
        if one != other:
            break
        common += 1
    return common / len(reference)


def reconstruction_metrics(
    predictions: Sequence[Sequence[int]],
    references: Sequence[Sequence[int]],
    texts: tuple[Sequence[str], Sequence[str]] | None = None,
) -> dict[str, float]:
    """Prefix match, token accuracy and exact match of token ids; BLEU where texts are given.

    Args:
        predictions: Generated token ids.
        references: The contexts' token ids.
        texts: Predicted and reference texts, for BLEU by sacrebleu in [0, 1].

    Raises:
        InputError: If there are none, or numbers differ.
        MissingExtraError: If BLEU is asked for and sacrebleu is not installed.

    Examples:
        >>> reconstruction_metrics([[1, 2, 3]], [[1, 2, 4]])["exact"]
        0.0
    """
    _check_pairs(predictions, references)
    pairs = [(list(p), list(r)) for p, r in zip(predictions, references, strict=True)]
    hits = sum(a == b for p, r in pairs for a, b in zip(p, r, strict=False))
    found = {
        "prefix_em": sum(prefix_match(p, r) for p, r in pairs) / len(pairs),
        "token_acc": hits / max(1, sum(max(len(p), len(r)) for p, r in pairs)),
        "exact": sum(p == r for p, r in pairs) / len(pairs),
    }
    if texts is not None:
        found["bleu"] = text_metrics(*texts, rouge=False)["bleu"]
    return found


def text_metrics(
    predictions: Sequence[str], references: Sequence[str], *, rouge: bool = True
) -> dict[str, float]:
    """BLEU of the corpus by sacrebleu, and mean ROUGE-1/2/L F1 by rouge-score, in [0, 1].

    Args:
        predictions: The restated texts.
        references: The texts.
        rouge: Whether ROUGE is wanted.

    Raises:
        InputError: If there are none, or numbers differ.
        MissingExtraError: If a library is not installed.
    """
    _check_pairs(predictions, references)
    try:
        import sacrebleu
    except ImportError as error:
        raise MissingExtraError("gmsa", "metrics", "sacrebleu") from error
    found = {"bleu": sacrebleu.corpus_bleu(list(predictions), [list(references)]).score / 100}
    if not rouge:
        return found
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise MissingExtraError("gmsa", "metrics", "rouge-score") from error
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(kinds)
    scores = [scorer.score(r, p) for p, r in zip(predictions, references, strict=True)]
    return found | {k: sum(s[k].fmeasure for s in scores) / len(scores) for k in kinds}


def bert_score(
    predictions: Sequence[str], references: Sequence[str], model: str, *, device: str = "cpu"
) -> float:
    """Mean BERTScore F1 by bert-score (Zhang et al., 2020), not rescaled.

    Args:
        predictions: The restated texts.
        references: The texts.
        model: Hub id or folder of the encoder, such as ``roberta-large``.
        device: Where it runs.

    Raises:
        InputError: If there are none, numbers differ, or the encoder cannot be loaded.
        MissingExtraError: If bert-score is not installed.
    """
    _check_pairs(predictions, references)
    try:
        from bert_score import BERTScorer
        from bert_score.utils import model2layers
    except ImportError as error:
        raise MissingExtraError("gmsa", "bertscore", "bert-score") from error
    from transformers import AutoConfig

    try:
        layers = model2layers.get(model) or AutoConfig.from_pretrained(model).num_hidden_layers
        scorer = BERTScorer(model_type=model, num_layers=layers, device=device)
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise InputError(f"the encoder {model!r} cannot be loaded: {reason}") from error
    _, _, f1 = scorer.score(list(predictions), list(references))
    return float(f1.mean())

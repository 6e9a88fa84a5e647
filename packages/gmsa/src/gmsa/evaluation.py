"""Scores of answers and reconstructions."""

from collections.abc import Sequence

from shared_core.errors import InputError, MissingExtraError
from shared_core.metrics.text import exact_match, sub_exact_match, token_f1

__all__ = ["prefix_match", "qa_metrics", "reconstruction_metrics"]


def qa_metrics(
    predictions: Sequence[str], references: Sequence[str | Sequence[str]]
) -> dict[str, float]:
    """Exact match, substring match and F1, each the mean over items in [0, 1].

    ``em``, ``sub_em`` and ``f1`` take the best reference, ``f1_first`` the first. A table with EM
    above F1 cannot come from ``em`` and ``f1``: it is substring match beside the first reference.

    Raises:
        InputError: If there are none, or numbers differ.

    Example:
        >>> qa_metrics(["in Paris"], [["Paris", "Paris, France"]])["sub_em"]
        1.0
    """
    if not predictions or len(predictions) != len(references):
        raise InputError(f"{len(predictions)} predictions for {len(references)} references")
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

    Example:
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

    Example:
        >>> reconstruction_metrics([[1, 2, 3]], [[1, 2, 4]])["exact"]
        0.0
    """
    if not predictions or len(predictions) != len(references):
        raise InputError(f"{len(predictions)} predictions for {len(references)} references")
    pairs = [(list(p), list(r)) for p, r in zip(predictions, references, strict=True)]
    hits = sum(a == b for p, r in pairs for a, b in zip(p, r, strict=False))
    found = {
        "prefix_em": sum(prefix_match(p, r) for p, r in pairs) / len(pairs),
        "token_acc": hits / max(1, sum(max(len(p), len(r)) for p, r in pairs)),
        "exact": sum(p == r for p, r in pairs) / len(pairs),
    }
    if texts is not None:
        try:
            import sacrebleu
        except ImportError as error:
            raise MissingExtraError("gmsa", "metrics", "sacrebleu") from error
        found["bleu"] = sacrebleu.corpus_bleu(list(texts[0]), [list(texts[1])]).score / 100
    return found

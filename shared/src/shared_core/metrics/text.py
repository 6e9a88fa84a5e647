"""Text metrics: exact match, token F1, ROUGE-L and token accuracy.

Exact match and F1 compare normalised answers as the SQuAD evaluation does (Rajpurkar et al.,
"SQuAD: 100,000+ Questions for Machine Comprehension of Text", EMNLP 2016): lower case, without
ASCII punctuation, without the articles a, an and the, white space collapsed. Functions score one
prediction; with several references the best one counts.
"""

import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

from jaxtyping import Float, Int
from torch import Tensor

from shared_core.errors import InputError

__all__ = [
    "exact_match",
    "normalize_answer",
    "rouge_l",
    "sub_exact_match",
    "token_accuracy",
    "token_f1",
]

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NOT_ALPHANUMERIC = re.compile(r"[^a-z0-9]+")


def normalize_answer(text: str) -> str:
    """Lower-case, drop ASCII punctuation and articles, collapse white space.

    Examples:
        >>> normalize_answer("The  U.S. Open, a tournament")
        'us open tournament'
    """
    without_articles = _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION))
    return " ".join(without_articles.split())


def exact_match(prediction: str, references: str | Sequence[str]) -> float:
    """1.0 if the normalised prediction equals a normalised reference, else 0.0.

    Args:
        prediction: The predicted answer.
        references: The right answer, or several.

    Raises:
        InputError: If there is no reference.

    Examples:
        >>> exact_match("The Eiffel Tower.", ["Eiffel tower", "La Tour Eiffel"])
        1.0
    """
    predicted = normalize_answer(prediction)
    return float(any(predicted == normalize_answer(r) for r in _as_list(references)))


def sub_exact_match(prediction: str, references: str | Sequence[str]) -> float:
    """1.0 if a normalised reference is a substring of the normalised prediction, else 0.0.

    Also known as best subspan exact match (Liu et al., "Lost in the Middle", TACL 2024). A
    reference that normalises to nothing matches only a prediction that does so too, so the value
    is never below `exact_match` nor true of every prediction.

    Args:
        prediction: The predicted answer.
        references: The right answer, or several.

    Raises:
        InputError: If there is no reference.

    Examples:
        >>> sub_exact_match("It is in Paris, France.", "Paris")
        1.0
    """
    predicted = normalize_answer(prediction)
    normalized = [normalize_answer(r) for r in _as_list(references)]
    return float(any(r in predicted if r else not predicted for r in normalized))


def token_f1(prediction: str, references: str | Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the normalised words, counted as a bag.

    Args:
        prediction: The predicted answer.
        references: The right answer, or several; the best F1 counts.

    Returns:
        F1 in [0, 1]. If either side has no words, 1 if both have none, else 0.

    Raises:
        InputError: If there is no reference.

    Examples:
        >>> token_f1("red apple pie", "the apple pie")
        0.8
    """
    predicted = normalize_answer(prediction).split()
    return max(_f1(predicted, normalize_answer(r).split()) for r in _as_list(references))


def _f1(predicted: list[str], reference: list[str]) -> float:
    if not predicted or not reference:
        return float(predicted == reference)
    common = (Counter(predicted) & Counter(reference)).total()
    return 2 * common / (len(predicted) + len(reference))


def rouge_l(
    prediction: str,
    references: str | Sequence[str],
    *,
    stem: Callable[[str], str] | None = None,
) -> float:
    """ROUGE-L: F1 of the longest common subsequence of words (Lin, "ROUGE", 2004).

    Words are the runs of a-z and 0-9 of the lower-cased text, as in the ``rouge_score`` package.

    Args:
        prediction: The predicted text.
        references: The reference text, or several; the best F1 counts.
        stem: Stems each word longer than three characters, for example
            ``nltk.stem.PorterStemmer().stem``. By default words stay as they are.

    Returns:
        F1 in [0, 1]; 0 if either side has no words.

    Raises:
        InputError: If there is no reference.

    Examples:
        >>> rouge_l("the cat is on the mat", "the cat sat on the mat")
        0.8333333333333334
    """
    predicted = _rouge_words(prediction, stem)
    return max(_lcs_f1(predicted, _rouge_words(r, stem)) for r in _as_list(references))


def _rouge_words(text: str, stem: Callable[[str], str] | None) -> list[str]:
    words = _NOT_ALPHANUMERIC.sub(" ", text.lower()).split()
    return words if stem is None else [stem(w) if len(w) > 3 else w for w in words]


def _lcs_f1(predicted: list[str], reference: list[str]) -> float:
    if not predicted or not reference:
        return 0.0
    return 2 * _lcs_length(predicted, reference) / (len(predicted) + len(reference))


def _lcs_length(first: list[str], second: list[str]) -> int:
    """Length of the longest common subsequence, one row of the table per big-integer step.

    Bit i of `row` is 0 where the table's row rises at column i (Hyyrö, "Bit-parallel LCS-length
    computation revisited", 2004), so a step costs O(len(first) / word size).
    """
    positions: defaultdict[str, int] = defaultdict(int)
    for i, word in enumerate(first):
        positions[word] |= 1 << i
    full = (1 << len(first)) - 1
    row = full
    for word in second:
        matches = row & positions.get(word, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(first) - row.bit_count()


def _as_list(references: str | Sequence[str]) -> Sequence[str]:
    references = [references] if isinstance(references, str) else references
    if not references:
        raise InputError("there is no reference to compare the prediction with")
    return references


def token_accuracy(
    predictions: Int[Tensor, "*batch tokens"],
    labels: Int[Tensor, "*batch tokens"],
    *,
    ignore_index: int = -100,
) -> Float[Tensor, ""]:
    """Fraction of positions where the predicted token is the label.

    Predictions and labels are compared position by position: a causal model's predictions have to
    be shifted by one before.

    Args:
        predictions: Token ids, for example ``logits.argmax(-1)``, shape [..., tokens].
        labels: The right token ids, same shape.
        ignore_index: Label of positions that do not count.

    Returns:
        Accuracy in [0, 1], pooled over all positions; NaN if none counts.

    Raises:
        InputError: If the shapes differ.

    Examples:
        >>> import torch
        >>> token_accuracy(torch.tensor([[5, 6, 7]]), torch.tensor([[5, 0, -100]]))
        tensor(0.5000)
    """
    if predictions.shape != labels.shape:
        raise InputError(
            f"predictions have shape {list(predictions.shape)} and labels {list(labels.shape)}; "
            "they have to be equal"
        )
    counted = labels != ignore_index
    return ((predictions == labels) & counted).sum() / counted.sum()

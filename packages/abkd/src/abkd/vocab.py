"""The vocabulary that teacher and student share.

Heads are padded to round numbers: Qwen2.5 7B has 152,064 rows and 1.5B has 151,936, for the same
tokenizer of 151,665 tokens. The rows past the tokenizer's length belong to no token, so both heads
are cut to it, and the softmax runs over what is left. Zero logits for missing rows would be
probability for tokens that do not exist.
"""

from typing import Any

from shared_core.errors import InputError

__all__ = ["VocabularyMismatchError", "align_vocab"]


class VocabularyMismatchError(InputError):
    """Teacher and student do not speak the same tokens.

    Examples:
        >>> issubclass(VocabularyMismatchError, ValueError)
        True
    """


def shared_size(student: int, teacher: int, vocab: int | str) -> int:
    """The number of rows that both heads are cut to."""
    if isinstance(vocab, int):
        if not 1 <= vocab <= min(student, teacher):
            raise InputError(
                f"vocab is {vocab}, but the heads have {student} (student) and {teacher} (teacher) "
                "rows; accepted: 1 to the smaller of them"
            )
        return vocab
    if vocab == "intersection":
        return min(student, teacher)
    if vocab != "strict":
        raise InputError(f"vocab is {vocab!r}; accepted: 'strict', 'intersection' or a number")
    if student != teacher:
        raise VocabularyMismatchError(
            f"the student's head has {student} rows and the teacher's {teacher}; if they share a "
            "tokenizer, pass vocab=len(tokenizer) (or 'intersection')"
        )
    return student


def align_vocab(
    student: Any,
    teacher: Any,
    student_tokenizer: Any = None,
    teacher_tokenizer: Any = None,
    mode: str = "intersection",
) -> int:
    """The size to cut both heads to, after seeing that their tokens agree.

    Args:
        student: A config (or model) of transformers, or the number of rows of the head.
        teacher: Likewise.
        student_tokenizer: What has ``get_vocab()``, such as a tokenizer of transformers.
        teacher_tokenizer: Likewise; by default the student's is taken for both.
        mode: ``intersection`` cuts unequal heads; ``strict`` raises.

    Returns:
        The size of the smaller head; with tokenizers, at most their largest id + 1. Where one
        tokenizer goes on after the other ends (added tokens), the shorter one counts.

    Raises:
        VocabularyMismatchError: If the tokenizers give a token different ids (the first one is
            named), or the sizes differ with ``strict``.

    Examples:
        >>> align_vocab(151936, 152064)
        151936
    """
    sizes = _rows(student), _rows(teacher)
    size = shared_size(*sizes, mode)
    if student_tokenizer is None and teacher_tokenizer is None:
        return size
    vocabs = [t.get_vocab() for t in (student_tokenizer, teacher_tokenizer) if t is not None]
    if len(vocabs) == 2:
        _check_tokens(*vocabs)
    longest: list[int] = [max(v.values()) + 1 for v in vocabs]
    return min(size, *longest)


def _rows(source: Any) -> int:
    if isinstance(source, int):
        return source
    config = getattr(source, "config", source)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(text.vocab_size)


def _check_tokens(student: dict[str, int], teacher: dict[str, int]) -> None:
    """Refuse tokenizers that differ, naming the first token by id."""
    if student == teacher:
        return
    ids = [{index: token for token, index in vocab.items()} for vocab in (student, teacher)]
    for index in range(min(max(i) for i in ids) + 1):
        mine, theirs = ids[0].get(index), ids[1].get(index)
        if mine != theirs:
            raise VocabularyMismatchError(
                f"the tokenizers differ from id {index} on: {mine!r} (student), {theirs!r} "
                "(teacher). Distil between models of one tokenizer; for others see ULD or GOLD "
                "in the library trl"
            )

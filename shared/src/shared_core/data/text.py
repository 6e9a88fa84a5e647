"""The text that CPython ships, as a corpus for language models, and two tokenizers.

Every Python holds the language reference (`pydoc_data.topics`, what ``help("for")`` prints; about
0.4 MB) and the source of its standard library (60 modules are used here; about 1.9 MB). Both are
read from the running interpreter, so the text depends on the Python version: name the version next
to numbers measured on it.
"""

import functools
import hashlib
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from shared_core.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "ByteTokenizer",
    "Document",
    "pydoc_documents",
    "pydoc_text",
    "token_windows",
    "train_bpe",
]

Kind = Literal["docs", "code"]
Split = Literal["train", "validation", "test"]

_MODULES = (
    "argparse ast base64 bdb bisect calendar cmd code codecs colorsys configparser contextlib copy "
    "csv dataclasses difflib enum filecmp fileinput fnmatch fractions ftplib functools getopt "
    "gettext glob gzip heapq imaplib ipaddress linecache mimetypes netrc optparse pickle pkgutil "
    "platform plistlib poplib pprint queue random sched selectors shelve shlex shutil smtplib "
    "socketserver statistics subprocess tempfile textwrap threading timeit tokenize traceback uuid "
    "wave weakref"
)
# With this salt both kinds split close to 80/10/10 by characters as well as by documents.
_SPLIT_SALT = "2007"
_PASSAGE = 60  # characters; shorter paragraphs repeat by chance


@dataclass(frozen=True)
class Document:
    """One document of the corpus.

    Attributes:
        name: The topic or module, such as ``"for"`` or ``"argparse"``.
        kind: ``docs`` (language reference) or ``code`` (standard-library source).
        split: ``train``, ``validation`` or ``test``; decided by a hash of kind and name.
        text: The text itself.
    """

    name: str
    kind: Kind
    split: Split
    text: str


def pydoc_documents(
    split: Split | None = None, *, kind: Kind | Literal["all"] = "docs"
) -> list[Document]:
    """The documents of the corpus, by kind and name.

    About 80 % of the documents and of the text are for training, 10 % for validation and 10 % for
    testing. Topics that only repeat passages of a longer topic are left out, so that held-out text
    does not occur in the training text. Modules that this Python lacks are skipped.

    Args:
        split: ``train``, ``validation`` or ``test``; by default all three.
        kind: ``docs``, ``code`` or ``all``.

    Raises:
        InputError: If `split` or `kind` is unknown, or this Python was installed without the text.

    Examples:
        >>> [d.name for d in pydoc_documents("test")][:2]
        ['comparisons', 'execmodel']
    """
    if split not in (None, "train", "validation", "test"):
        raise InputError(f"split {split!r} is not known; accepted: train, validation, test")
    if kind not in ("docs", "code", "all"):
        raise InputError(f"kind {kind!r} is not known; accepted: docs, code, all")
    kinds: tuple[Kind, ...] = ("docs", "code") if kind == "all" else (kind,)
    documents = [d for k in kinds for d in _documents(k)]
    return [d for d in documents if split is None or d.split == split]


def pydoc_text(split: Split | None = None, *, kind: Kind | Literal["all"] = "docs") -> str:
    """The corpus as one string: the documents of `pydoc_documents`, separated by a blank line.

    Args:
        split: ``train``, ``validation`` or ``test``; by default all three.
        kind: ``docs``, ``code`` or ``all``.

    Raises:
        InputError: As `pydoc_documents`.

    Examples:
        >>> "for_stmt" in pydoc_text()
        True
    """
    return "\n\n".join(d.text.strip("\n") for d in pydoc_documents(split, kind=kind)) + "\n"


@functools.cache
def _documents(kind: Kind) -> tuple[Document, ...]:
    texts = _topics() if kind == "docs" else _modules()
    if not texts:
        raise InputError(
            f"this Python was installed without its {kind} (some system packages leave them out); "
            "install a full CPython, or use text files of your own"
        )
    return tuple(
        Document(name, kind, _split_of(f"{kind}/{name}"), texts[name]) for name in sorted(texts)
    )


def _split_of(name: str) -> Split:
    digest = hashlib.sha256(f"{_SPLIT_SALT}/{name}".encode()).digest()
    place = int.from_bytes(digest[:8]) / 2**64
    return "train" if place < 0.8 else "validation" if place < 0.9 else "test"


def _topics() -> dict[str, str]:
    """The topics of ``help()`` without those that mostly repeat a longer one."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return {}
    kept: dict[str, str] = {}
    seen: set[str] = set()
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        passages = [p for p in map(str.strip, topics[name].split("\n\n")) if len(p) > _PASSAGE]
        repeated = sum(len(p) for p in passages if p in seen)
        if passages and repeated > sum(map(len, passages)) / 2:
            continue
        seen.update(passages)
        kept[name] = topics[name]
    return kept


def _modules() -> dict[str, str]:
    """The source of the listed modules, read without importing them."""
    library = Path(sysconfig.get_path("stdlib"))
    texts = {}
    for name in _MODULES.split():
        for path in (library / f"{name}.py", library / name / "__init__.py"):
            if path.is_file():
                texts[name] = path.read_text(encoding="utf-8")
                break
    return texts


class ByteTokenizer:
    """UTF-8 bytes as tokens: ids 0 to 255 are bytes, then padding, begin and end of text.

    Nothing is trained and nothing is lost: ``decode(encode(text)) == text``.

    Attributes:
        pad_id: 256.
        bos_id: 257, begin of text.
        eos_id: 258, end of text.
        vocab_size: 259.

    Examples:
        >>> tokenizer = ByteTokenizer()
        >>> tokenizer.encode("né")
        [110, 195, 169]
        >>> tokenizer.decode([257, 110, 195, 169, 258])
        'né'
    """

    pad_id = 256
    bos_id = 257
    eos_id = 258
    vocab_size = 259

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""
        return list(text.encode())

    def decode(self, ids: Iterable[int] | Int[Tensor, "tokens"]) -> str:
        """The text of ids; special tokens vanish, bytes that are not UTF-8 become U+FFFD.

        Args:
            ids: Token ids, in a one-dimensional tensor or any iterable.

        Raises:
            InputError: If an id is not in the vocabulary.
        """
        values = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        for value in values:
            if not 0 <= value < self.vocab_size:
                raise InputError(f"id {value} is not in the vocabulary, 0 to {self.vocab_size - 1}")
        return bytes(v for v in values if v < 256).decode(errors="replace")


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    *,
    special_tokens: Sequence[str] = ("<pad>", "<bos>", "<eos>"),
) -> "Tokenizer":
    """Train a byte-level BPE tokenizer (that of GPT-2) with the `tokenizers` library.

    It is lossless, like `ByteTokenizer`. For transformers, wrap it as
    ``PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", ...)``.

    Args:
        texts: The texts to train on.
        vocab_size: Size of the vocabulary with special tokens and the 256 bytes; a small corpus
            can run out of pairs to merge before.
        special_tokens: Tokens with the first ids; `encode` adds none of them by itself.

    Raises:
        InputError: If `vocab_size` cannot hold the bytes and the special tokens.
        MissingExtraError: If `tokenizers` is not installed.

    Examples:
        >>> tokenizer = train_bpe(["low lower lowest"] * 9, vocab_size=265)
        >>> tokenizer.encode("lower").tokens
        ['low', 'e', 'r']
        >>> tokenizer.token_to_id("<eos>")
        2
    """
    smallest = 256 + len(special_tokens)
    if vocab_size < smallest:
        raise InputError(
            f"vocab_size={vocab_size}; 256 bytes and {len(special_tokens)} special tokens need at "
            f"least {smallest}"
        )
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise MissingExtraError("shared-core", "data", "tokenizers") from error
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def token_windows(
    texts: str | Iterable[str],
    tokenizer: Any,
    length: int,
    *,
    separator: int | None = None,
) -> Int[Tensor, "windows {length}"]:
    """Tokenize texts, join them, and cut the stream into windows for language modelling.

    Windows do not overlap and cross the borders between texts; the last, incomplete one is
    dropped. Labels are the same windows, shifted by the model.

    Args:
        texts: The texts, in order.
        tokenizer: What encodes them: its ``encode(text)`` gives ids, or an object with ``ids``.
            `ByteTokenizer`, the `tokenizers` and the transformers libraries' all do.
        length: Tokens per window.
        separator: An id to put after every text, such as ``tokenizer.eos_id``.

    Returns:
        Token ids, int64, shape [windows, length].

    Raises:
        InputError: If `length` is below 1 or the texts do not fill one window.

    Examples:
        >>> token_windows(["abc", "de"], ByteTokenizer(), 3, separator=ByteTokenizer.eos_id)
        tensor([[ 97,  98,  99],
                [258, 100, 101]])
    """
    if length < 1:
        raise InputError(f"length={length}; a window holds at least 1 token")
    end = [] if separator is None else [separator]
    pieces = []
    for text in [texts] if isinstance(texts, str) else texts:
        encoded = tokenizer.encode(text)
        ids = encoded.ids if hasattr(encoded, "ids") else encoded
        pieces.append(np.asarray([*ids, *end], dtype=np.int64))
    stream = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)
    count = len(stream) // length
    if count == 0:
        raise InputError(
            f"the texts have {len(stream)} tokens, fewer than one window of {length}; "
            "shorten the windows or give more text"
        )
    return torch.from_numpy(stream[: count * length].reshape(count, length))

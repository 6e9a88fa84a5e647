"""The words that negative texts are chosen from: WordNet's nouns and adjectives, or your own.

The corpus of this line of work is the first lemma of every WordNet 3.0 synset, lower case,
without the nouns for animals and food. It comes with the package, read from the WordNet 3.0
database (licence in ``data/WORDNET_LICENSE``). The broken entries of the published adjective
list, such as ``[abeyant``, are absent.
"""

import csv
import gzip
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path

from internet_neg.errors import InterNegError
from shared_core.run import atomic_path

__all__ = ["EXCLUDED", "Vocabulary", "read_wordnet_folder", "write_rows"]

EXCLUDED = ("noun.animal", "noun.food")

# Lexicographer files by their number in the database (WordNet 3.0, lexnames).
_NOUN_FILES = (
    *("Tops", "act", "animal", "artifact", "attribute", "body", "cognition", "communication"),
    *("event", "feeling", "food", "group", "location", "motive", "object", "person"),
    *("phenomenon", "plant", "possession", "process", "quantity", "relation", "shape", "state"),
    *("substance", "time"),
)
_FILES = {
    **{number: f"noun.{name}" for number, name in enumerate(_NOUN_FILES, start=3)},
    **{0: "adj.all", 1: "adj.pert", 44: "adj.ppl"},
}

Row = tuple[str, str, str]  # word, noun or adj, lexicographer file


@dataclass(frozen=True)
class Vocabulary:
    """Candidate words in a fixed order, each once; a word in both parts counts as a noun.

    Attributes:
        nouns: Words for the noun prompt.
        adjectives: Words for the adjective prompt.

    Raises:
        InterNegError: If there is no word.

    Examples:
        >>> Vocabulary(("dog", "cat", "dog"), ("red", "cat"))
        Vocabulary(nouns=('dog', 'cat'), adjectives=('red',))
    """

    nouns: tuple[str, ...]
    adjectives: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        nouns = dict.fromkeys(self.nouns)
        adjectives = [word for word in dict.fromkeys(self.adjectives) if word not in nouns]
        object.__setattr__(self, "nouns", tuple(nouns))
        object.__setattr__(self, "adjectives", tuple(adjectives))
        for word in (*self.nouns, *self.adjectives):
            if not isinstance(word, str) or not word.strip():
                raise InterNegError(f"the vocabulary holds {word!r}; every entry has to be a word")
        if not self:
            raise InterNegError("the vocabulary holds no word; give at least one")

    def __len__(self) -> int:
        return len(self.nouns) + len(self.adjectives)

    @cached_property
    def hash(self) -> str:
        """A fingerprint of words and order."""
        text = "\n".join(self.nouns) + "\n\n" + "\n".join(self.adjectives)
        return hashlib.sha256(text.encode()).hexdigest()

    @classmethod
    def wordnet(cls, exclude: Iterable[str] = EXCLUDED) -> "Vocabulary":
        """The words that come with the package.

        Args:
            exclude: Lexicographer files to leave out; a word stays if another file has it too.

        Raises:
            InterNegError: If a file is not known.

        Examples:
            >>> len(Vocabulary.wordnet()) > 70_000
            True
        """
        packed = files("internet_neg").joinpath("data/wordnet.tsv.gz").read_bytes()
        lines = gzip.decompress(packed).decode().splitlines()
        rows = [(word, pos, file) for word, pos, file in (line.split("\t") for line in lines)]
        return cls._from_rows(rows, exclude)

    @classmethod
    def from_wordnet_folder(
        cls, folder: str | os.PathLike[str], exclude: Iterable[str] = EXCLUDED
    ) -> "Vocabulary":
        """The same from the database files ``data.noun`` and ``data.adj`` of another WordNet.

        Args:
            folder: Debian's ``/usr/share/wordnet``, NLTK's ``corpora/wordnet``, or such.
            exclude: As `wordnet`.
        """
        return cls._from_rows(read_wordnet_folder(folder), exclude)

    @classmethod
    def _from_rows(cls, rows: Sequence[Row], exclude: Iterable[str]) -> "Vocabulary":
        left_out = set(exclude)
        if unknown := sorted(left_out - set(_FILES.values())):
            raise InterNegError(
                f"WordNet has no lexicographer file {unknown[0]!r}; "
                f"accepted: {', '.join(_FILES.values())}"
            )
        kept = [(word, pos) for word, pos, file in rows if file not in left_out]
        return cls(
            tuple(word for word, pos in kept if pos == "noun"),
            tuple(word for word, pos in kept if pos == "adj"),
        )

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "Vocabulary":
        r"""Words of a text, CSV or JSON file.

        A text file has a word a line, ``#`` before comments, and after a tab the part ``adj`` or
        ``noun`` if wanted (nouns otherwise). CSV has a header with ``word`` and perhaps ``pos``.
        JSON is a list of words, or an object with the lists ``nouns`` and ``adjectives``.

        Raises:
            InterNegError: If the file is missing or is not such a file.

        Examples:
            >>> path = getfixture("tmp_path") / "words.txt"
            >>> _ = path.write_text("# tools\nwrench\nrusty\tadj\n")
            >>> Vocabulary.from_file(path)
            Vocabulary(nouns=('wrench',), adjectives=('rusty',))
        """
        file = Path(path)
        try:
            text = file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise InterNegError(f"cannot read the vocabulary {file}: {error}") from error
        if file.suffix.lower() == ".json":
            return cls._from_json(file, text)
        pairs: list[tuple[str, str]] = []
        if file.suffix.lower() == ".csv":
            table = csv.DictReader(io.StringIO(text))
            if "word" not in (table.fieldnames or ()):
                raise InterNegError(f"{file} has no column 'word'; give it a header with one")
            pairs = [(row["word"] or "", row.get("pos") or "noun") for row in table]
        else:
            for line in text.splitlines():
                word, _, pos = line.partition("#")[0].strip().partition("\t")
                if word:
                    pairs.append((word.strip(), pos.strip() or "noun"))
        for word, pos in pairs:
            if pos not in ("noun", "adj"):
                raise InterNegError(f"{file}: {word!r} is a {pos!r}; accepted: noun, adj")
        nouns = tuple(word for word, pos in pairs if pos == "noun")
        return cls(nouns, tuple(word for word, pos in pairs if pos == "adj"))

    @classmethod
    def _from_json(cls, file: Path, text: str) -> "Vocabulary":
        try:
            value = json.loads(text)
        except ValueError as error:
            raise InterNegError(f"{file} is not JSON: {error}") from error
        if isinstance(value, dict):
            value = {"nouns": (), "adjectives": (), **value}
            nouns, adjectives = value.pop("nouns"), value.pop("adjectives")
            if value or not isinstance(nouns, Sequence) or not isinstance(adjectives, Sequence):
                raise InterNegError(f"{file}: accepted: the two lists 'nouns' and 'adjectives'")
            return cls(tuple(nouns), tuple(adjectives))
        if not isinstance(value, list):
            raise InterNegError(f"{file} is no list of words")
        return cls(tuple(value))

    def without(
        self, classnames: Iterable[str], dedup: str = "casefold"
    ) -> tuple["Vocabulary", list[str]]:
        """The vocabulary without the known classes' names, and the words that went.

        Args:
            classnames: Names of the classes.
            dedup: ``casefold`` compares without case, spaces for underscores; ``exact`` literally.

        Raises:
            InterNegError: If no word is left.

        Examples:
            >>> Vocabulary(("dog", "cat")).without(["Dog"])
            (Vocabulary(nouns=('cat',), adjectives=()), ['dog'])
        """

        def key(word: str) -> str:
            return word if dedup == "exact" else " ".join(word.replace("_", " ").casefold().split())

        names = {key(name) for name in classnames}
        parts = [[w for w in part if key(w) not in names] for part in (self.nouns, self.adjectives)]
        gone = [word for word in (*self.nouns, *self.adjectives) if key(word) in names]
        return Vocabulary(tuple(parts[0]), tuple(parts[1])), gone


def read_wordnet_folder(folder: str | os.PathLike[str]) -> list[Row]:
    """First lemma, part of speech and lexicographer file of every noun and adjective synset.

    Args:
        folder: Where ``data.noun`` and ``data.adj`` are.

    Returns:
        Each row once, in alphabetical order.

    Raises:
        InterNegError: If a file is missing or is no WordNet database.
    """
    rows = set()
    for name, pos in (("data.noun", "noun"), ("data.adj", "adj")):
        path = Path(folder) / name
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InterNegError(f"cannot read {path}: {error}; install WordNet 3.0") from error
        for line in lines:
            if line.startswith("  "):  # the licence
                continue
            parts = line.split(" ", 5)
            if len(parts) < 6 or not parts[1].isdigit() or int(parts[1]) not in _FILES:
                raise InterNegError(f"{path} is no WordNet database: {line[:60]!r}")
            lemma = re.sub(r"\((a|p|ip)\)$", "", parts[4])
            rows.add((lemma.replace("_", " ").lower(), pos, _FILES[int(parts[1])]))
    return sorted(rows)


def write_rows(path: str | os.PathLike[str], rows: Sequence[Row]) -> None:
    """Write rows as the gzipped table that the package carries; equal rows give equal bytes.

    Args:
        path: Where to.
        rows: What `read_wordnet_folder` returned.
    """
    text = "".join("\t".join(row) + "\n" for row in rows)
    packed = gzip.compress(text.encode(), compresslevel=9, mtime=0)
    with atomic_path(path) as temporary:
        temporary.write_bytes(packed)

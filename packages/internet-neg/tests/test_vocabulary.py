"""Words: WordNet as it is shipped and as it is built, files of one's own, names that go."""

import gzip
import json
from importlib.resources import files
from pathlib import Path

import pytest

from internet_neg import InterNegError, Vocabulary
from internet_neg.vocabulary import read_wordnet_folder, write_rows

DATABASE = """\
  1 This software is provided under a licence.  \n\
00000001 05 n 01 Great_Dane 0 001 @ 00000002 n 0000 | a large dog  \n\
00000002 06 n 02 wrench 0 spanner 0 000 | a tool  \n\
00000003 06 n 01 fluff 0 000 | something light  \n\
00000004 04 n 01 fluff 1 000 | a blunder  \n\
"""
ADJECTIVES = "00000001 00 a 02 galore(ip) 0 abundant 0 000 | plenty  \n\
00000002 01 a 01 fluff 0 000 | x  \n00000003 44 s 01 outgoing(a) 0 000 | leaving  \n"


@pytest.fixture
def database(tmp_path: Path) -> Path:
    (tmp_path / "data.noun").write_text(DATABASE)
    (tmp_path / "data.adj").write_text(ADJECTIVES)
    return tmp_path


@pytest.mark.smoke
def test_the_shipped_words_are_whole() -> None:
    words = Vocabulary.wordnet()
    assert len(words.nouns) == 58_514  # as counted in WordNet 3.0 without animals and food
    assert 12_000 < len(words.adjectives) < 14_006  # those that are also nouns are gone
    assert not set(words.nouns) & set(words.adjectives)
    for word in (*words.nouns, *words.adjectives):
        assert word == word.strip().lower()
        assert not set(word) & set("[]()_\t")
    for word in ("abeyant", "beautiful"):  # head adjectives that the published list breaks
        assert word in words.adjectives
    everything = Vocabulary.wordnet(exclude=())
    assert "great dane" in everything.nouns
    assert "great dane" not in words.nouns
    folder = files("internet_neg").joinpath("data")
    assert "Princeton University" in folder.joinpath("WORDNET_LICENSE").read_text()
    assert len(folder.joinpath("wordnet.tsv.gz").read_bytes()) < 1_500_000


def test_reading_and_writing_a_database(database: Path) -> None:
    rows = read_wordnet_folder(database)
    assert ("great dane", "noun", "noun.animal") in rows
    assert ("galore", "adj", "adj.all") in rows
    words = Vocabulary.from_wordnet_folder(database)
    assert words.nouns == ("fluff", "wrench")
    assert words.adjectives == ("galore", "outgoing")
    kept = Vocabulary.from_wordnet_folder(database, exclude=["noun.act"])
    assert kept.nouns == ("fluff", "great dane", "wrench")  # another file has it too
    write_rows(database / "one.gz", rows)
    write_rows(database / "two.gz", read_wordnet_folder(database))
    assert (database / "one.gz").read_bytes() == (database / "two.gz").read_bytes()
    assert gzip.decompress((database / "one.gz").read_bytes()).count(b"\n") == len(rows)


def test_databases_that_are_none(database: Path) -> None:
    with pytest.raises(InterNegError, match=r"no lexicographer file 'noun.zoo'"):
        Vocabulary.from_wordnet_folder(database, exclude=["noun.zoo"])
    (database / "data.adj").write_text("hello\n")
    with pytest.raises(InterNegError, match="is no WordNet database: 'hello'"):
        Vocabulary.from_wordnet_folder(database)
    with pytest.raises(InterNegError, match="install WordNet"):
        Vocabulary.from_wordnet_folder(database / "nowhere")


def test_files_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "words.csv"
    path.write_text("word,pos\nwrench,noun\nrusty,adj\ngear,\n")
    expected = Vocabulary(("wrench", "gear"), ("rusty",))
    assert Vocabulary.from_file(path) == expected
    path = tmp_path / "words.json"
    path.write_text(json.dumps({"nouns": ["wrench", "gear"], "adjectives": ["rusty"]}))
    assert Vocabulary.from_file(path) == expected
    path.write_text(json.dumps(["wrench", "gear"]))
    assert Vocabulary.from_file(path).nouns == ("wrench", "gear")
    path = tmp_path / "words.txt"
    path.write_text("wrench # a tool\n\nrusty\tadj\ngear\n")
    assert Vocabulary.from_file(path) == expected
    assert expected.hash != Vocabulary(("gear", "wrench"), ("rusty",)).hash


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("w.txt", "red\tverb\n", "'red' is a 'verb'"),
        ("w.txt", "# nothing\n", "holds no word"),
        ("w.csv", "name\nred\n", "no column 'word'"),
        ("w.csv", "word\n \n", r"holds ' '"),
        ("w.json", "{", "is not JSON"),
        ("w.json", "3", "is no list"),
        ("w.json", '{"verbs": []}', "the two lists"),
        ("w.json", "[3]", "holds 3"),
        ("absent.txt", None, "cannot read the vocabulary"),
    ],
)
def test_files_that_are_none(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InterNegError, match=message):
        Vocabulary.from_file(tmp_path / name)


def test_class_names_go_with_and_without_case() -> None:
    words = Vocabulary(("great dane", "dog", "cat"), ("red",))
    left, gone = words.without(["Great_Dane", "Cat", "bird"])
    assert (left.nouns, left.adjectives, gone) == (("dog",), ("red",), ["great dane", "cat"])
    assert words.without(["Cat", "dog"], "exact")[1] == ["dog"]
    with pytest.raises(InterNegError, match="holds no word"):
        Vocabulary(("dog",)).without(["dog"])

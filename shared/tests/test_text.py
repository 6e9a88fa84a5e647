import sys
import sysconfig
from pathlib import Path

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared_core.data import text as text_module
from shared_core.data.text import (
    ByteTokenizer,
    pydoc_documents,
    pydoc_text,
    token_windows,
    train_bpe,
)
from shared_core.errors import InputError, MissingExtraError
from shared_core.testing import examples

SPLITS = ("train", "validation", "test")
repeatable = examples(60)


@pytest.fixture(autouse=True)
def without_type_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let wrong arguments reach our own checks, as they do outside the tests."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def fresh_corpus() -> None:
    text_module._documents.cache_clear()
    yield
    text_module._documents.cache_clear()


def passages(text: str) -> set[str]:
    return {p for p in map(str.strip, text.split("\n\n")) if len(p) > 60}


@pytest.mark.smoke
@pytest.mark.parametrize("kind", ["docs", "code"])
def test_splits_partition_the_documents_about_80_10_10(kind: str) -> None:
    whole = pydoc_documents(kind=kind)
    parts = {split: pydoc_documents(split, kind=kind) for split in SPLITS}
    assert sorted(d.name for part in parts.values() for d in part) == [d.name for d in whole]
    assert {d.kind for d in whole} == {kind}
    total = sum(len(d.text) for d in whole)
    shares = {split: sum(len(d.text) for d in part) / total for split, part in parts.items()}
    assert shares == pytest.approx({"train": 0.8, "validation": 0.1, "test": 0.1}, abs=0.03)


def test_a_document_stays_in_its_split() -> None:
    # Fixed for ever: numbers measured on a split stay comparable over machines and versions.
    split = {(d.kind, d.name): d.split for d in pydoc_documents(kind="all")}
    assert split["docs", "specialnames"] == split["code", "argparse"] == "train"
    assert split["docs", "calls"] == "validation"
    assert split["docs", "comparisons"] == split["docs", "execmodel"] == "test"


def test_held_out_documentation_does_not_occur_in_training() -> None:
    seen = passages(pydoc_text("train"))
    for split in ("validation", "test"):
        held_out = passages(pydoc_text(split))
        repeated = sum(map(len, held_out & seen)) / sum(map(len, held_out))
        assert repeated < 0.01


def test_topics_that_repeat_others_are_left_out_but_no_text_is_lost() -> None:
    from pydoc_data.topics import topics

    kept = passages(pydoc_text())
    everything = passages("\n\n".join(topics.values()))
    assert len(pydoc_documents()) < len(topics)
    assert sum(map(len, kept)) > 0.95 * sum(map(len, everything))


def test_code_is_the_source_of_the_standard_library() -> None:
    texts = {d.name: d.text for d in pydoc_documents(kind="code")}
    assert len(texts) > 50
    for name in ("heapq", "textwrap"):
        source = Path(sysconfig.get_path("stdlib"), f"{name}.py").read_text("utf-8")
        assert texts[name] == source


def test_text_joins_the_documents() -> None:
    names = [d.name for d in pydoc_documents("test", kind="all")]
    assert names == [d.name for k in ("docs", "code") for d in pydoc_documents("test", kind=k)]
    text = pydoc_text("test")
    position = 0
    for document in pydoc_documents("test"):
        position = text.index(document.text.strip("\n"), position)
    assert text.endswith("\n")
    assert pydoc_documents() is not pydoc_documents()  # the caller may change the list


def test_unknown_split_and_kind_are_refused() -> None:
    with pytest.raises(InputError, match="split 'valid' is not known; accepted: train"):
        pydoc_documents("valid")
    with pytest.raises(InputError, match="kind 'prose' is not known; accepted: docs, code, all"):
        pydoc_text(kind="prose")


@pytest.mark.usefixtures("fresh_corpus")
def test_a_python_without_its_text_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(InputError, match="installed without its docs"):
        pydoc_documents()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(InputError, match="installed without its code"):
        pydoc_text(kind="code")
    (tmp_path / "heapq.py").write_text("# heap\n", encoding="utf-8")
    (tmp_path / "shelve").mkdir()
    (tmp_path / "shelve" / "__init__.py").write_text("# shelf\n", encoding="utf-8")
    found = {d.name: d.text for d in pydoc_documents(kind="code")}
    assert found == {"heapq": "# heap\n", "shelve": "# shelf\n"}


@pytest.mark.smoke
@given(st.text())
@repeatable
def test_bytes_are_lossless(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert bytes(ids).decode() == text == tokenizer.decode(ids)
    assert tokenizer.decode(torch.tensor([257, *ids, 258, 256], dtype=torch.long)) == text


def test_bytes_that_are_not_text() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([0xC3, 258]) == "�"
    specials = {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id}
    assert specials == set(range(256, tokenizer.vocab_size))
    for wrong in (-1, 259):
        with pytest.raises(InputError, match=f"id {wrong} is not in the vocabulary, 0 to 258"):
            tokenizer.decode([65, wrong])


def test_bpe_is_lossless_and_repeatable() -> None:
    texts = [d.text for d in pydoc_documents("validation")]
    tokenizer = train_bpe(texts, 400)
    assert tokenizer.get_vocab_size() == 400
    assert tokenizer.to_str() == train_bpe(texts, 400).to_str()
    assert [tokenizer.token_to_id(t) for t in ("<pad>", "<bos>", "<eos>")] == [0, 1, 2]
    for text in (texts[0], "  Ünïcode 漢字 \U0001f600\n\ttabs  ", ""):
        encoding = tokenizer.encode(text)
        assert tokenizer.decode(encoding.ids) == text
    assert len(tokenizer.encode(texts[0]).ids) < len(texts[0].encode()) * 0.7


def test_bpe_merges_the_most_frequent_pair_first() -> None:
    tokenizer = train_bpe(["ab ab ab cd"], 257, special_tokens=())
    assert tokenizer.encode("ab").tokens == ["ab"]
    assert tokenizer.encode("cd").tokens == ["c", "d"]


def test_bpe_refuses_a_vocabulary_without_all_bytes() -> None:
    with pytest.raises(InputError, match="vocab_size=258; 256 bytes and 3 special tokens need"):
        train_bpe(["text"], 258)


def test_bpe_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingExtraError, match=r"tokenizers .* 'shared-core\[data\]'"):
        train_bpe(["text"], 300)


@given(st.lists(st.text("ab\n", max_size=9), max_size=6), st.integers(1, 7), st.booleans())
@repeatable
def test_windows_cut_the_stream_without_overlap(texts: list, length: int, ends: bool) -> None:
    separator = 258 if ends else None
    stream = [i for t in texts for i in (*t.encode(), *([258] if ends else []))]
    if len(stream) < length:
        with pytest.raises(InputError, match=f"{len(stream)} tokens, fewer than one window"):
            token_windows(texts, ByteTokenizer(), length, separator=separator)
        return
    windows = token_windows(texts, ByteTokenizer(), length, separator=separator)
    assert windows.dtype == torch.int64
    assert windows.shape == (len(stream) // length, length)
    assert windows.flatten().tolist() == stream[: windows.numel()]


def test_windows_of_any_tokenizer() -> None:
    tokenizer = train_bpe(["ab ab"], 260)
    windows = token_windows("ab ab ab", tokenizer, 2)
    assert windows.flatten().tolist() == tokenizer.encode("ab ab ab").ids[: windows.numel()]
    generator = (t for t in ("ab", "cd"))
    assert token_windows(generator, ByteTokenizer(), 4).tolist() == [[97, 98, 99, 100]]
    with pytest.raises(InputError, match="length=0; a window holds at least 1 token"):
        token_windows("ab", ByteTokenizer(), 0)

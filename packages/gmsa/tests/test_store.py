"""The store: what goes in comes out, whoever is killed, and only to its own compressor."""

import json
import os

import pytest
import torch

import gmsa.store
from gmsa import SoftTokens, SoftTokenStore, StoreMismatchError
from gmsa.demo import tiny_compressor

TEXTS = ["ba be bi bo bu", "ca ce ci", "da de di do du fa fe"]
IDS = ["a", "b", "c"]


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip(dtype, tmp_path) -> None:
    compressor = tiny_compressor()
    store = SoftTokenStore(tmp_path / "s", compressor, dtype=dtype, shard_size=2)
    store.add(IDS, TEXTS, rate=2)
    assert len(list((tmp_path / "s").glob("*.safetensors"))) == 2
    reader = SoftTokenStore(tmp_path / "s")
    got = reader.get(["c", "a"])
    expected = compressor.compress([TEXTS[2]], 2).to(getattr(torch, dtype))
    torch.testing.assert_close(got[:1].embeds, expected.embeds, atol=1e-6, rtol=1e-2)
    again = SoftTokenStore(tmp_path / "t", compressor, dtype=dtype)
    again.add(["c", "a"], got)
    assert torch.equal(again.get(["c", "a"]).embeds, got.embeds)
    assert got.lengths.tolist() == [4, 3]
    assert reader.verify() == []
    with pytest.raises(ValueError, match="reads only"):
        reader.add(["d"], ["ba"])


def test_another_compressor_is_refused(tmp_path) -> None:
    SoftTokenStore(tmp_path, tiny_compressor()).add(IDS, TEXTS)
    with pytest.raises(StoreMismatchError, match="was written by compressor"):
        SoftTokenStore(tmp_path, tiny_compressor(seed=1))


@pytest.mark.parametrize("victim", ["save_file", "write_json"])
def test_a_write_killed_half_way_leaves_the_store_readable(victim, tmp_path, monkeypatch) -> None:
    compressor = tiny_compressor()
    store = SoftTokenStore(tmp_path, compressor)
    store.add(["a"], TEXTS[:1])
    before = store.get(["a"]).embeds

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gmsa.store, victim, killed)
        with pytest.raises(KeyboardInterrupt):
            store.add(["a", "b"], TEXTS[1:])
    # A killed process would also have left its lock.
    (tmp_path / ".writing").write_text("999999999")
    reopened = SoftTokenStore(tmp_path, compressor)
    assert list(reopened) == ["a"]
    assert torch.equal(reopened.get(["a"]).embeds, before)
    reopened.add(["b"], TEXTS[1:2])
    assert reopened.verify() == []


def test_errors(tmp_path) -> None:
    compressor = tiny_compressor()
    with pytest.raises(ValueError, match="there is no store"):
        SoftTokenStore(tmp_path / "none")
    store = SoftTokenStore(tmp_path / "s", compressor)
    store.add(IDS, TEXTS)
    with pytest.raises(ValueError, match="not among the 3 documents"):
        store.get(["z"])
    with pytest.raises(ValueError, match="occurs twice"):
        store.add(["a", "a"], TEXTS[:2])
    with pytest.raises(ValueError, match="2 ids for 1"):
        store.add(["a", "b"], TEXTS[:1])
    (tmp_path / "s" / ".writing").write_text(str(os.getpid()))
    with pytest.raises(ValueError, match="is being written by process"):
        store.add(["z"], TEXTS[:1])
    [shard] = (tmp_path / "s").glob("*.safetensors")
    shard.write_bytes(b"nothing")
    assert SoftTokenStore(tmp_path / "s").verify() == IDS
    index = tmp_path / "s" / "index.json"
    index.write_text(json.dumps({"format": 1}))
    with pytest.raises(ValueError, match="is damaged"):
        SoftTokenStore(tmp_path / "s")


def test_soft_tokens_files_and_parts(tmp_path) -> None:
    soft = tiny_compressor().compress(TEXTS, 2)
    soft.save(tmp_path / "soft.safetensors")
    again = SoftTokens.load(tmp_path / "soft.safetensors")
    assert torch.equal(again.embeds, soft.embeds)
    one, two, three = soft.unbatch()
    joined = SoftTokens.cat([three, one])
    assert torch.equal(joined.embeds, torch.cat([three.embeds, one.embeds], 1))
    assert joined.n_tokens.tolist() == [12]
    with pytest.raises(ValueError, match="differ in width, dtype"):
        SoftTokens.batch([one, two.to(torch.float16)])
    with pytest.raises(ValueError, match="there are no soft tokens at"):
        SoftTokens.load(tmp_path / "none")

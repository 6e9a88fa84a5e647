"""Pieces of a context against the whole."""

import pytest
import torch

from gmsa.streaming import StreamingCompressor, compress_long, compress_windows


@pytest.mark.smoke
@pytest.mark.parametrize("chunk", [1, 3, 5, 8, 50])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
@torch.no_grad()
def test_exact_for_any_split(family, chunk, tiny_gmsa, ragged) -> None:
    model = tiny_gmsa(family)
    ids, _ = ragged([22, 22])
    whole = model.compress(ids, rate=4)
    pieces = compress_long(model, ids, 4, chunk)
    torch.testing.assert_close(pieces.embeds, whole.embeds, atol=1e-5, rtol=1e-5)
    assert torch.equal(pieces.n_tokens, whole.n_tokens)


@torch.no_grad()
def test_windows(tiny_gmsa, ragged) -> None:
    model = tiny_gmsa()
    ids, _ = ragged([22])
    one = compress_windows(model, ids, 4, 100)
    whole = model.compress(ids, rate=4)
    torch.testing.assert_close(one.embeds, whole.embeds)
    many = compress_windows(model, ids, 4, 8, batch_size=1)
    assert many.embeds.shape == whole.embeds.shape
    merged = torch.cat([model.merge(p, None, 4)[0] for p in ids.split(8, 1)], 1)
    torch.testing.assert_close(many.embeds, model.align(merged))
    assert not torch.allclose(many.embeds, whole.embeds, atol=1e-3)


@pytest.mark.usefixtures("without_type_checks")
def test_refused(tiny_gmsa, ragged) -> None:
    model, (ids, _) = tiny_gmsa(), ragged([6])
    with pytest.raises(ValueError, match="no multiple of the rate"):
        compress_windows(model, ids, 4, 6)
    with pytest.raises(ValueError, match="chunk_size is 0"):
        compress_long(model, ids, 4, 0)
    with pytest.raises(ValueError, match="nothing was fed"):
        StreamingCompressor(model, 4).finish()
    with pytest.raises(ValueError, match="cannot be streamed"):
        StreamingCompressor(tiny_gmsa(merging="memory"), 4)
    stream = StreamingCompressor(model, 4)
    stream.push(ids)
    stream.finish()
    with pytest.raises(ValueError, match="is finished"):
        stream.push(ids)

"""Pieces of a context against the whole."""

from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

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


def memory(call: Callable[[], object]) -> tuple[int, int]:
    """Bytes of PyTorch's CPU allocator: the most at once in a call, and what its result keeps."""
    call()  # what is made once, such as tables of rotations
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = call()
    held = peak = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    del result
    return peak, held


@torch.no_grad()
def test_memory_of_compressing(tiny_lm, tiny_gmsa) -> None:
    sizes = {"max_position_embeddings": 2048, "hidden_size": 32, "intermediate_size": 128}

    def measure(run, n=1024, layers=2, vocab_size=60):
        lm = tiny_lm(layers=layers, vocab_size=vocab_size, **sizes)
        model = tiny_gmsa(lm=lm, encoder_layers=layers)
        return memory(lambda: run(model, torch.arange(n)[None] % 60))

    def at_once(model, ids):
        return model.compress(ids, rate=4)

    def pieces(model, ids):
        stream = StreamingCompressor(model, rate=4)
        for part in ids.split(64, dim=1):
            stream.push(part)
        return stream

    def windows(model, ids):
        return compress_windows(model, ids, 4, 64, batch_size=1)

    growth = {}
    for run in (at_once, pieces, windows):
        peak, kept = measure(run)
        assert peak > kept > 1024 * 32  # 1024 / 4 soft tokens of 32 numbers are 32 KiB
        # The vocabulary does not enter: logits of this one alone would take 200 MB.
        assert measure(run, vocab_size=50_000) == (peak, kept)
        growth[run] = [b - a for a, b in zip((peak, kept), measure(run, 2048), strict=True)]
    # What lower layers made is not kept.
    assert measure(at_once, layers=6)[0] < 1.05 * measure(at_once)[0]
    # A stream keeps for a token keys and values of two layers (two heads of 8), and for four
    # tokens a soft token with its keys and values.
    assert growth[pieces][1] == 1024 * 4 * (2 * 2 * 16 + (32 + 2 * 16) // 4)
    assert growth[pieces][0] < 0.4 * growth[at_once][0]
    assert growth[windows][0] < 0.25 * growth[at_once][0]


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

"""The targets of speed and memory, measured beside a pipeline in the authors' style.

`OfficialStyle` restates how the authors' code computes soft tokens and the loss: complete causal
language models for encoder and alignment, whose logits are thrown away, pooling row by row, and
logits over the whole sequence. It uses the very modules of the compressor it is compared with.
"""

import copy
import ctypes
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gmsa.compressor import GMSACompressor
from gmsa.configuration import GMSAConfig
from gmsa.merging import group_merge
from gmsa.model import GMSAModel
from gmsa.store import SoftTokenStore
from gmsa.streaming import compress_long, compress_windows
from shared_core.device import measure_time, peak_memory
from shared_core.errors import InputError

__all__ = [
    "CASES",
    "TARGETS",
    "OfficialStyle",
    "against_targets",
    "check_cases",
    "largest_tensor",
    "latency",
    "latency_figure",
    "pool_by_row",
    "run_case",
]

QWEN_VOCABULARY = 151_936


def _model(
    layers: int, width: int, vocab: int, k: int, device: torch.device, positions: int = 8192
) -> GMSAModel:
    """A random compressor of some size."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    backbone = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=max(1, width // 64),
            max_position_embeddings=positions,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
            tie_word_embeddings=True,
        )
    ).to(device)
    config = GMSAConfig(encoder_layers=k, lora_r=16, lora_dropout=0.0)
    return GMSAModel.from_backbone(backbone, config)


def pool_by_row(hidden: Tensor, mask: Tensor, rates: Tensor) -> Tensor:
    """Group means with a loop over rows and groups, padded to the longest."""
    rows = []
    for b in range(len(hidden)):
        valid = hidden[b][mask[b].bool()]
        rate = int(rates[b])
        rows.append(torch.stack([part.mean(0) for part in torch.split(valid, rate)]))
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


class OfficialStyle(nn.Module):
    """The same weights as a compressor, used as the authors' code uses them.

    Args:
        model: The compressor, on a Llama.

    Examples:
        >>> model = _model(2, 64, 50, 1, torch.device("cpu"))
        >>> ids = torch.arange(2, 12)[None]
        >>> soft = OfficialStyle(model).compress(ids, 4)
        >>> bool(torch.allclose(soft, model.compress(ids, rate=4).embeds, atol=1e-5))
        True
    """

    def __init__(self, model: GMSAModel) -> None:
        super().__init__()
        self.decoder = model.decoder
        self.encoder, self.lsa = (self._causal(model, part) for part in (model.encoder, model.lsa))

    @staticmethod
    def _causal(model: GMSAModel, trunk: Any) -> Any:
        """A whole causal language model around some blocks."""
        with torch.device("meta"):
            causal = type(model.decoder)(copy.deepcopy(trunk.config))
        causal.model, causal.lm_head = trunk, model.decoder.lm_head
        return causal

    def compress(self, ids: Tensor, rate: int) -> Tensor:
        """Soft tokens of full rows."""
        out = self.encoder(input_ids=ids, output_hidden_states=True, use_cache=False)
        hidden = out.hidden_states[-1]
        rates = torch.full((len(ids),), rate)
        merged = pool_by_row(hidden, torch.ones_like(ids), rates)
        out = self.lsa(inputs_embeds=merged, output_hidden_states=True, use_cache=False)
        soft: Tensor = out.hidden_states[-1]
        return soft

    def loss(self, ids: Tensor, prompt: Tensor, rate: int) -> Tensor:
        """The autoencoding loss, with logits at every position."""
        table = self.decoder.get_input_embeddings()
        soft = self.compress(ids, rate)
        embeds = torch.cat([soft, table(prompt), table(ids)], 1)
        logits = self.decoder(inputs_embeds=embeds, use_cache=False).logits
        start = soft.shape[1] + prompt.shape[1]
        labels = torch.cat([ids.new_full((len(ids), start), -100), ids], 1)
        return F.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
        )


def _side_by_side(
    calls: dict[str, Callable[[], object]], device: torch.device, repeats: int
) -> dict[str, dict[str, Any]]:
    """Median seconds and peak bytes of calls, taken in turns."""
    timings = measure_time(*calls.values(), device=device, repeats=repeats, warmup=1)
    found: dict[str, dict[str, Any]] = {}
    for (name, call), timing in zip(calls.items(), timings, strict=True):
        _return_free_memory()
        with peak_memory(device) as peak:
            call()
        found[name] = {"seconds": timing.median, "peak_bytes": peak.bytes}
    return found


def _return_free_memory() -> None:
    """Give what the C library keeps for later back, so that its use shows; Linux alone has it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _ratio(found: dict[str, dict[str, Any]], over: str, under: str, key: str) -> float | None:
    above, below = found[over][key], found[under][key]
    return above / below if above and below else None


class _Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            # A view of a weight is none of its own.
            if isinstance(value, Tensor) and value._base is None:
                self.numel = max(self.numel, value.numel())
        return out


def largest_tensor(call: Callable[[], object]) -> int:
    """Elements of the largest tensor that a call makes, views apart.

    Examples:
        >>> largest_tensor(lambda: torch.ones(3, 4) + 1)
        12
    """
    seen = _Largest()
    with seen:
        call()
    return seen.numel


def bench_compress(
    device: torch.device, repeats: int, *, n: int = 2048, vocab: int = QWEN_VOCABULARY,
    width: int = 512, k: int = 4,
) -> dict[str, Any]:  # fmt: skip
    """`compress` beside the official style, with the vocabulary of Qwen3."""
    model = _model(k, width, vocab, k, device)
    official = OfficialStyle(model).eval()
    ids = torch.randint(2, vocab, (1, n), device=device)
    with torch.no_grad():
        found = _side_by_side(
            {
                "ours": lambda: model.compress(ids, rate=4),
                "official style": lambda: official.compress(ids, 4),
            },
            device,
            repeats,
        )
        gap = (model.compress(ids, rate=4).embeds - official.compress(ids, 4)).abs().max()
        largest = largest_tensor(lambda: model.compress(ids, rate=4))
    return {
        "n": n, "vocabulary": vocab, "width": width, "encoder_layers": k, "measured": found,
        "official over ours, time": _ratio(found, "official style", "ours", "seconds"),
        "ours over official, peak memory": _ratio(found, "ours", "official style", "peak_bytes"),
        "largest difference": float(gap),
        "largest tensor of ours over n V": largest / (n * vocab),
    }  # fmt: skip


def bench_merge(
    device: torch.device, repeats: int, *, rows: int = 32, n: int = 2048, width: int = 1024
) -> dict[str, Any]:
    """`group_merge` of ragged rows beside a loop over rows, and of full rows beside a copy."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, n, width, generator=generator).to(device)
    lengths = torch.randint(n // 4, n + 1, (rows,), generator=generator)
    lengths[0] = n
    mask = (torch.arange(n) < lengths[:, None]).to(device)
    rates = torch.tensor([4, 8])[torch.arange(rows) % 2].to(device)
    # Merging at rate 4 reads all and writes a quarter into memory it asks for; so does the copy,
    # which moves as many bytes: a quarter into new memory, the rest into memory at hand.
    flat, quarter = hidden.view(-1), hidden.numel() // 4
    part = flat[: quarter + 3 * quarter // 2]
    at_hand = torch.empty_like(part)

    def copy_as_merging() -> Tensor:
        at_hand[quarter:].copy_(part[quarter:])
        return part[:quarter].clone()

    wanted = hidden.clone().requires_grad_()

    def with_gradient(merge: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        [found] = torch.autograd.grad(merge(wanted, mask, rates).sum(), wanted)
        return found

    found = _side_by_side(
        {
            "ours, ragged": lambda: group_merge(hidden, mask, rates),
            "loop over rows": lambda: pool_by_row(hidden, mask, rates),
            "ours, ragged, with its gradient": lambda: with_gradient(
                lambda h, m, r: group_merge(h, m, r)[0]
            ),
            "loop over rows, with its gradient": lambda: with_gradient(pool_by_row),
            "ours, full rows": lambda: group_merge(hidden, None, 4),
            "copy of as many bytes": copy_as_merging,
            "copy of as many bytes, all into memory at hand": lambda: at_hand.copy_(part),
        },
        device,
        repeats,
    )
    ours, _ = group_merge(hidden, mask, rates)
    gap = (ours - pool_by_row(hidden, mask, rates)).abs().max()

    def over(above: str, below: str) -> float | None:
        return _ratio(found, above, below, "seconds")

    return {
        "rows": rows, "n": n, "width": width, "measured": found,
        "loop over ours, time": over("loop over rows", "ours, ragged"),
        "loop over ours with gradients, time": over(
            "loop over rows, with its gradient", "ours, ragged, with its gradient"
        ),
        "full rows over a copy of as many bytes, time": over(
            "ours, full rows", "copy of as many bytes"
        ),
        "full rows over a copy into memory at hand, time": over(
            "ours, full rows", "copy of as many bytes, all into memory at hand"
        ),
        "largest difference": float(gap),
    }  # fmt: skip


def bench_train(
    device: torch.device, repeats: int, *, n: int = 512, vocab: int = QWEN_VOCABULARY,
    width: int = 256,
) -> dict[str, Any]:  # fmt: skip
    """A step of the autoencoding stage beside the official style."""
    model = _model(4, width, vocab, 2, device)
    official = OfficialStyle(model)
    model.train()
    ids = torch.randint(2, vocab, (1, n), device=device)
    prompt = ids[:, :6]
    trained = [p for p in model.parameters() if p.requires_grad]

    def ours() -> Tensor:
        loss = model(ids, prompt_ids=prompt, labels=ids, rate=4).loss
        torch.autograd.grad(loss, trained)
        found: Tensor = loss.detach()
        return found

    def theirs() -> Tensor:
        loss = official.loss(ids, prompt, 4)
        torch.autograd.grad(loss, trained)
        return loss.detach()

    found = _side_by_side({"ours": ours, "official style": theirs}, device, repeats)
    gap = abs(float(ours() - theirs()))
    return {
        "n": n, "vocabulary": vocab, "width": width, "measured": found,
        "official over ours, time": _ratio(found, "official style", "ours", "seconds"),
        "ours over official, peak memory": _ratio(found, "ours", "official style", "peak_bytes"),
        "difference of the losses": gap,
    }  # fmt: skip


def latency(
    lengths: tuple[int, ...], rates: tuple[int, ...], device: torch.device, repeats: int,
    *, layers: int = 8, width: int = 128, k: int = 2, new: int = 16,
) -> list[dict[str, Any]]:  # fmt: skip
    """Seconds from context to answer: full prompt, compressed now, and from stored soft tokens.

    Every run makes the same number of tokens; what it takes until the first is ``first``.

    Args:
        lengths: Context lengths n.
        rates: Compression rates.
        device: Where.
        repeats: Timed rounds.
        layers: N.
        width: d.
        k: Encoder layers.
        new: Tokens generated.

    Returns:
        A row a length, rate and way: ``first`` and ``total`` in seconds, and ``speed-up`` of the
        total over the full prompt's.
    """
    model = _model(layers, width, 1000, k, device)
    prompt = torch.arange(10, 18, device=device)[None]

    def generate(embeds: Tensor, count: int) -> Tensor:
        made: Tensor = model.decoder.generate(
            inputs_embeds=embeds,
            attention_mask=embeds.new_ones(embeds.shape[:2], dtype=torch.long),
            max_new_tokens=count, min_new_tokens=count, do_sample=False,
        )  # fmt: skip
        return made

    table = model.get_input_embeddings()
    rows: list[dict[str, Any]] = []
    for n in lengths:
        ids = torch.randint(20, 1000, (1, n), device=device)
        with torch.no_grad():
            kept = {rate: model.compress(ids, rate=rate) for rate in rates}

            def full(count: int, ids: Tensor = ids) -> Tensor:
                return generate(table(torch.cat([ids, prompt], 1)), count)

            def now(count: int, rate: int, ids: Tensor = ids) -> Tensor:
                soft = model.compress(ids, rate=rate)
                return generate(model.decoder_inputs(soft, prompt)[0], count)

            def stored(count: int, rate: int, kept: dict[int, Any] = kept) -> Tensor:
                return generate(model.decoder_inputs(kept[rate], prompt)[0], count)

            ways: list[tuple[str, int, Callable[[int], Tensor]]] = [("full prompt", 1, full)]
            for rate in rates:
                ways.append(("GMSA", rate, lambda c, r=rate: now(c, r)))
                ways.append(("GMSA, stored", rate, lambda c, r=rate: stored(c, r)))
            calls = [(lambda w=way, c=count: w(c)) for _, _, way in ways for count in (1, new)]
            timings = measure_time(*calls, device=device, repeats=repeats, warmup=1)
        for number, (name, rate, _) in enumerate(ways):
            first, total = (timings[2 * number + i].median for i in (0, 1))
            rows.append(
                {"n": n, "way": name, "rate": rate, "first": round(first, 4),
                 "total": round(total, 4), "speed-up": round(timings[1].median / total, 2)}
            )  # fmt: skip
    return rows


def bench_answer(
    device: torch.device, repeats: int, *, lengths: tuple[int, ...] = (512, 2048, 4096)
) -> dict[str, Any]:
    """From context to answer, beside the full prompt."""
    rows = latency(lengths, (4, 8), device, repeats)
    last = {(r["way"], r["rate"]): r["speed-up"] for r in rows if r["n"] == lengths[-1]}
    return {
        "layers": 8, "encoder_layers": 2, "width": 128, "new tokens": 16, "rows": rows,
        f"speed-up at n = {lengths[-1]}, rate 4": last["GMSA", 4],
        f"speed-up at n = {lengths[-1]}, rate 4, stored": last["GMSA, stored", 4],
    }  # fmt: skip


def bench_store(
    device: torch.device, repeats: int, *, documents: int = 32, n: int = 2048, width: int = 512
) -> dict[str, Any]:
    """Reading documents from a store, beside compressing them again; and padding in batches."""
    from gmsa.demo_base import tokenizer

    model = _model(8, width, 1000, 2, device)
    compressor = GMSACompressor(model, tokenizer())
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(6, 90, (documents, n), generator=generator)
    names = [str(i) for i in range(documents)]
    one = compressor.compress_ids([rows[0].tolist()], 4)
    with tempfile.TemporaryDirectory() as folder:
        store = SoftTokenStore(folder, compressor, dtype="float32")
        soft = one[[0] * documents]
        store.add(names, soft)

        def read() -> object:
            return SoftTokenStore(folder).get(names)

        def read_one() -> object:
            return store.get(names[:1])

        found = _side_by_side(
            {
                "read all": read,
                "read one": read_one,
                "compress one again": lambda: compressor.compress_ids([rows[0].tolist()], 4),
            },
            device,
            repeats,
        )
        started = time.perf_counter()
        for name in names:  # a row at a time, views of the mapped file
            store.get([name]).embeds.sum()
        walked = time.perf_counter() - started
    size = soft.embeds.numel() * soft.embeds.element_size()
    lengths = torch.randint(16, n, (256,), generator=generator).sort().values.view(-1, 8)
    padding = 1 - lengths.sum() / (lengths.max(1).values * 8).sum()
    return {
        "documents": documents, "n": n, "width": width, "measured": found,
        "read MB/s, as one batch": size / 1e6 / found["read all"]["seconds"],
        "read MB/s, one by one": size / 1e6 / walked,
        "compress again over read, time": _ratio(
            found, "compress one again", "read one", "seconds"
        ),
        "padding of 256 texts in batches of 8 by length": float(padding),
    }  # fmt: skip


def bench_stream(
    device: torch.device, repeats: int, *, n: int = 8192, width: int = 512, chunk: int = 512
) -> dict[str, Any]:
    """A long context at once, in exact pieces, and in windows that forget what came before."""
    model = _model(4, width, 1000, 4, device)
    ids = torch.randint(2, 1000, (1, n), device=device)
    with torch.no_grad():
        found = _side_by_side(
            {
                "exact, in pieces": lambda: compress_long(model, ids, 4, chunk),
                "windows": lambda: compress_windows(model, ids, 4, chunk, batch_size=1),
                "at once": lambda: model.compress(ids, rate=4),
            },
            device,
            repeats,
        )
        whole = model.compress(ids, rate=4).embeds
        gap = (compress_long(model, ids, 4, chunk).embeds - whole).abs().max()
    return {
        "n": n, "width": width, "encoder_layers": 4, "chunk": chunk, "measured": found,
        "pieces over at once, peak memory": _ratio(
            found, "exact, in pieces", "at once", "peak_bytes"
        ),
        "windows over at once, peak memory": _ratio(found, "windows", "at once", "peak_bytes"),
        "pieces over at once, time": _ratio(found, "exact, in pieces", "at once", "seconds"),
        "largest difference": float(gap),
    }  # fmt: skip


CASES: dict[str, Callable[[torch.device, int], dict[str, Any]]] = {
    "compress": bench_compress,
    "merge": bench_merge,
    "train": bench_train,
    "answer": bench_answer,
    "store": bench_store,
    "stream": bench_stream,
}
"""What can be measured, by name."""

TARGETS = {
    "compress": {"official over ours, time": 1.5, "ours over official, peak memory": -0.25},
    "merge": {"loop over ours, time": 1.3, "full rows over a copy of as many bytes, time": -1.5},
    "train": {"official over ours, time": 1.2, "ours over official, peak memory": -0.7},
    "answer": {
        "speed-up at n = 4096, rate 4": 2.0, "speed-up at n = 4096, rate 4, stored": 3.0,
    },
    "store": {
        "compress again over read, time": 5.0, "read MB/s, one by one": 500.0,
        "padding of 256 texts in batches of 8 by length": -0.1,
    },
    "stream": {"pieces over at once, peak memory": -0.99},
}  # fmt: skip
"""Least values on a CPU; where negative, the number without its sign is the largest."""


def check_cases(text: str) -> list[str]:
    """The cases that a list with commas names.

    Raises:
        InputError: If there is no such case.

    Examples:
        >>> check_cases("merge,store")
        ['merge', 'store']
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise InputError(f"bench has no case {unknown[0]!r}; accepted: {', '.join(CASES)}")
    return names


def run_case(name: str, device: torch.device, repeats: int) -> dict[str, Any]:
    """Measure one of `CASES` on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return CASES[name](device, repeats)
    finally:
        torch.set_num_threads(threads)


def against_targets(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a target: what was measured, what was wanted, and whether it was met.

    Examples:
        >>> against_targets({"merge": {"loop over ours, time": 2.0}})[0]["met"]
        'yes'
    """
    rows = []
    for case, found in results.items():
        for key, target in TARGETS.get(case, {}).items():
            value = found.get(key)
            if value is None:
                continue
            met = value >= target if target > 0 else value <= -target
            rows.append(
                {"case": case, "what": key, "measured": round(value, 3),
                 "target": f"{'≥' if target > 0 else '≤'} {abs(target):g}",
                 "met": "yes" if met else "no"}
            )  # fmt: skip
    return rows


def latency_figure(rows: list[dict[str, Any]]) -> Any:
    """A figure of the seconds to an answer by context length.

    Examples:
        >>> rows = [{"n": 64, "way": "full prompt", "rate": 1, "first": 1.0, "total": 2.0}]
        >>> latency_figure(rows).axes[0].get_xlabel()
        'tokens of the context'
    """
    from shared_core.plots import COLORS, new_figure

    figure, axes = new_figure(1, 1)
    ways = list(dict.fromkeys((row["way"], row["rate"]) for row in rows))
    for number, (way, rate) in enumerate(ways):
        some = [row for row in rows if (row["way"], row["rate"]) == (way, rate)]
        label = way if rate == 1 else f"{way}, {rate}x"
        xs, ys = [row["n"] for row in some], [row["total"] for row in some]
        axes.plot(xs, ys, marker="o", color=COLORS[number % len(COLORS)], label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    lengths = sorted({row["n"] for row in rows})
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.tick_params(axis="x", which="minor", bottom=False)
    axes.set_xlabel("tokens of the context")
    axes.set_ylabel("seconds to the answer")
    axes.legend()
    return figure

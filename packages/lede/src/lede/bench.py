"""Policies in real decoding, side by side: interleaved per prompt, with intervals.

Every contender gets the same model, threads and prompts, and ours the same cache. Tokens per second
are compared prompt by prompt with plain decoding in the same repeat; the interval is a bootstrap
over prompts. The counted cost beside it, from the same rounds, is touched by no noise.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lede.cost import CostModel
from lede.decoding import SelfSpeculativeDecoder
from lede.policies import AutoregressivePolicy, ConfidencePolicy, Policy, StaticPolicy
from lede.stats import DecodeStats, Round
from shared_core.device import synchronize
from shared_core.run import progress

__all__ = [
    "Contender",
    "Measured",
    "assisted",
    "bench",
    "bench_rows",
    "generate_with",
    "plain",
    "speedups",
    "sweep_rows",
    "usual_contenders",
]

Contender = Callable[[Tensor], tuple[Tensor, DecodeStats | None]]

NO_DRAFTS = "our loop, no drafts"


def generate_with(decoder: SelfSpeculativeDecoder, policy: Policy, **settings: Any) -> Contender:
    """Our decoder with a policy."""

    def run(ids: Tensor) -> tuple[Tensor, DecodeStats | None]:
        out = decoder.generate(ids, policy=policy, **settings)
        return out.sequences, out.stats

    return run


def plain(model: Any, **settings: Any) -> Contender:
    """``model.generate``, token by token."""
    return lambda ids: (model.generate(ids, **settings), None)


def assisted(model: Any, exit_layer: int, num_draft: int, **settings: Any) -> Contender:
    """The transformers library's own ``assistant_early_exit`` with a constant number of drafts."""

    def run(ids: Tensor) -> tuple[Tensor, DecodeStats | None]:
        config = model.generation_config
        names = (
            "num_assistant_tokens",
            "num_assistant_tokens_schedule",
            "assistant_confidence_threshold",
        )
        before = {name: getattr(config, name) for name in names}
        for name, value in zip(names, (num_draft, "constant", 0.0), strict=True):
            setattr(config, name, value)
        try:
            return model.generate(ids, assistant_early_exit=exit_layer, **settings), None
        finally:
            for name, value in before.items():
                setattr(config, name, value)

    return run


@dataclass
class Measured:
    """What one contender did.

    Attributes:
        seconds: By repeat and prompt.
        tokens: Generated, by prompt.
        same: Whether all its tokens were the reference's.
        stats: By prompt, of the last repeat; empty for loops that are not ours.
    """

    seconds: np.ndarray
    tokens: np.ndarray
    same: bool = True
    stats: list[DecodeStats] = field(default_factory=list)

    @property
    def log(self) -> list[Round]:
        """The rounds of all prompts."""
        return [r._replace(row=i) for i, s in enumerate(self.stats) for r in s.log]


def bench(
    contenders: Mapping[str, Contender],
    prompts: list[Tensor],
    device: torch.device,
    *,
    repeats: int = 3,
    reference: str,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Measured]:
    """Run every contender on every prompt, in turns that rotate, after one warm-up.

    Args:
        contenders: By name.
        prompts: Token ids [1, P] each.
        device: Of the model, to wait for.
        repeats: Timed turns.
        reference: Whose tokens the others must give.
        clock: Seconds; ``time.process_time`` on a processor that others use too.
    """
    names = list(contenders)
    shape = (repeats, len(prompts))
    found = {n: Measured(np.zeros(shape), np.zeros(len(prompts), dtype=np.int64)) for n in names}
    expected = [contenders[reference](ids)[0] for ids in prompts]
    for name in names:
        contenders[name](prompts[0])
    turns = [(r, i) for r in range(repeats) for i in range(len(prompts))]
    for turn, (r, i) in enumerate(progress(turns, description="timing", unit="prompt")):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            synchronize(device)
            began = clock()
            sequences, stats = contenders[name](prompts[i])
            synchronize(device)
            one = found[name]
            one.seconds[r, i] = clock() - began
            one.tokens[i] = sequences.shape[1] - prompts[i].shape[1]
            one.same &= torch.equal(sequences, expected[i])
            if stats is not None and r == repeats - 1:
                one.stats.append(stats)
    return found


def speedups(
    found: Mapping[str, Measured],
    reference: str,
    cost: CostModel | None = None,
    *,
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Tokens per second and their ratio to the reference's, with a 95 % interval over prompts.

    Also the ratio to our loop without drafts: plain decoding with our cache, compiled where the
    rounds are.

    The time of a prompt is the median of its repeats. With a cost model, also the speedup in
    counted cost, of loops that are ours.
    """
    rng = np.random.default_rng(seed)
    base = np.median(found[reference].seconds, 0)
    pick = rng.integers(len(base), size=(draws, len(base)))
    out: dict[str, dict[str, Any]] = {}
    for name, one in found.items():
        taken = np.median(one.seconds, 0)
        ratio = base.sum() / taken.sum()
        spread = np.quantile(base[pick].sum(1) / taken[pick].sum(1), [0.025, 0.975])
        out[name] = {
            "tokens_per_second": float(one.tokens.sum() / taken.sum()),
            "speedup": float(ratio),
            "interval": [float(v) for v in spread],
            "values": (found[reference].seconds.sum(1) / one.seconds.sum(1)).tolist(),
            "same_tokens": one.same,
        }
        if NO_DRAFTS in found:
            out[name]["over_no_drafts"] = float(
                np.median(found[NO_DRAFTS].seconds, 0).sum() / taken.sum()
            )
        if one.stats:
            total = DecodeStats(one.stats[0].depth, log=one.log)
            if cost is not None:
                plain_cost = float(one.tokens.sum()) * cost.autoregressive
                out[name]["counted"] = plain_cost / total.cost(cost)
            out[name] |= {
                "acceptance": total.acceptance_rate,
                "exit": total.mean_exit_layer,
                "draft": total.mean_draft_len,
            }
    return out


def usual_contenders(
    decoder: SelfSpeculativeDecoder,
    pair: tuple[int, int],
    learned: Policy | None = None,
    **settings: Any,
) -> dict[str, Contender]:
    """Plain ``generate``, ``assistant_early_exit``, our plain loop, and our policies.

    These are none, a static pair, a threshold, and the learned one.

    Args:
        decoder: Ours; compiled or not.
        pair: Exit and drafts of the static rounds, ours and the library's.
        learned: A trained policy.
        settings: For ``generate``.
    """
    settings = {"do_sample": False, **settings}
    ours: dict[str, Policy] = {
        NO_DRAFTS: AutoregressivePolicy(),
        f"static {pair[0]},{pair[1]}": StaticPolicy(*pair),
        "confidence threshold 0.4": ConfidencePolicy(pair[0], 0.4),
    }
    if learned is not None:
        ours["LEDE"] = learned
    return {
        "generate": plain(decoder.model, **settings),
        "assistant_early_exit": assisted(decoder.model, *pair, **settings),
        **{name: generate_with(decoder, p, **settings) for name, p in ours.items()},
    }


def bench_rows(policies: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a table, from what `speedups` returned."""
    return [
        {
            "policy": name,
            "tokens/s": f"{p['tokens_per_second']:.1f}",
            "speedup": f"{p['speedup']:.2f}",
            "over no drafts": f"{p['over_no_drafts']:.2f}" if "over_no_drafts" in p else "",
            "95 %": "{:.2f} to {:.2f}".format(*p["interval"]),
            "counted": f"{p['counted']:.2f}" if "counted" in p else "",
            "same tokens": str(p["same_tokens"]),
        }
        for name, p in policies.items()
    ]


def sweep_rows(exits: tuple[int, ...], grid: np.ndarray) -> list[dict[str, Any]]:
    """A table of the static grid: a row per exit, a column per draft length."""
    return [
        {"exit": e, **{str(d + 1): round(float(v), 3) for d, v in enumerate(values)}}
        for e, values in zip(exits, grid, strict=True)
    ]

"""Experience from real rounds: for sampling, where no table replays every policy.

At the start of every round each candidate exit drafts as far as the budget goes and is verified;
then the round of one exit, drawn at random, is committed. All exits are seen from every start, so
that a shorter draft's outcome is known by its prefix. With sampling a draft counts with the
probability min(1, p / q) with which it is accepted, not with the draw's outcome: the expected
number of tokens, at lower variance. Greedy roll-outs agree with the table of `collect`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lede._rounds import Rounds
from lede.decoding import SelfSpeculativeDecoder
from lede.policies import AutoregressivePolicy, Observation, chance
from lede.probe import AcceptanceProbe
from shared_core.errors import InputError
from shared_core.run import progress

__all__ = ["Episodes", "collect_rollouts"]


@dataclass
class Episodes:
    """All outcomes of rounds from N starts: for each candidate, what every pass would show.

    Attributes:
        exits: Candidates, m of them.
        depth: Layers, L.
        max_draft: Longest draft, D.
        text: Text of each start, [N].
        position: Its position, [N].
        features: p₁, margin, entropy (and the probe's outputs) after pass i = 1 .. D,
            [N, m, D, 3 or 5].
        alive: Probability that all drafts before pass i = 1 .. D + 1 are accepted, [N, m, D + 1];
            0 or 1 for greedy decoding.
        agree: Agreement with the candidate before, [N, m].
        limit: Drafts that the budget allows, [N].
        prefix: Product of p₁ before pass i, [N, m, D].
        chain: Product of the probe's chances before pass i, [N, m, D]; 1 without a probe.
        ema: Moving average of acceptance at the start, [N].
        last_accepted: Drafts accepted in the round before over D, [N].
        probe: What gave the last features.
    """

    exits: tuple[int, ...]
    depth: int
    max_draft: int
    text: np.ndarray
    position: np.ndarray
    features: np.ndarray
    alive: np.ndarray
    agree: np.ndarray
    limit: np.ndarray
    prefix: np.ndarray
    chain: np.ndarray
    ema: np.ndarray
    last_accepted: np.ndarray
    probe: AcceptanceProbe | None = None

    def __len__(self) -> int:
        return len(self.text)


def products(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Products of p₁ and of the probe's chances before each pass, from features [..., D, F]."""
    prefix = np.ones_like(features[..., 0])
    prefix[..., 1:] = np.cumprod(features[..., :-1, 0], -1)
    chain = np.ones_like(prefix)
    if features.shape[-1] > 3:
        chain[..., 1:] = np.cumprod(chance(features[..., :-1, 3]), -1)
    return prefix, chain


class _Explorer(AutoregressivePolicy):
    """Drafts as long as it may at a given exit, and notes what it sees on the way."""

    autoregressive = False
    uses_features = True

    def __init__(self, probe: AcceptanceProbe | None) -> None:
        self.probe, self.exit = probe, 0
        self.seen: list[Observation] = []

    def probes(self, layer: int) -> bool:
        return True

    def choose_exit(self, observation: Observation) -> np.ndarray:
        return np.where(observation.layer == self.exit, 1.0, -1.0)

    def keep_drafting(self, observation: Observation) -> np.ndarray:
        self.seen.append(observation)
        return np.ones(len(observation))


def collect_rollouts(
    decoder: SelfSpeculativeDecoder,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 128,
    batch_size: int = 64,
    probe: AcceptanceProbe | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> Episodes:
    """Decode with random exits and note the outcome of every exit and draft length at each round.

    Args:
        decoder: Whose candidates and longest draft to try.
        input_ids: Prompts [B, P], left-padded.
        attention_mask: Of the prompts.
        max_new_tokens: Tokens to generate from each.
        batch_size: Prompts at a time.
        probe: Of hidden states, to note beside the distribution's features.
        seed: Of exits and draws.
        kwargs: For ``generate``, such as ``do_sample`` and ``temperature``.

    Raises:
        InputError: If there is no prompt, or no text is longer than one token.

    Examples:
        >>> from lede.testing import tiny_model
        >>> decoder = SelfSpeculativeDecoder(tiny_model(layers=3), [1, 2], max_draft=3)
        >>> ids = torch.ones(2, 3, dtype=torch.long)
        >>> collect_rollouts(decoder, ids, max_new_tokens=6, do_sample=True).alive.shape[1:]
        (2, 4)
    """
    if len(input_ids) == 0:
        raise InputError("no prompts; collect from at least one")
    rng = np.random.default_rng(seed)
    parts: list[dict[str, np.ndarray]] = []
    explorer = _Explorer(probe)
    devices = [decoder.runner.device] if decoder.runner.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        chunks = range(0, len(input_ids), batch_size)
        for first in progress(chunks, description="rolling out", unit="batch"):
            chosen = slice(first, first + batch_size)
            mask = None if attention_mask is None else attention_mask[chosen]

            def explore(rounds: Rounds, first: int = first) -> None:
                while not rounds.done.all():
                    parts.append(_round(rounds, explorer, decoder.exits, first, rng))

            decoder.generate(
                input_ids[chosen],
                attention_mask=mask,
                policy=explorer,
                max_new_tokens=max_new_tokens,
                advance=explore,
                **kwargs,
            )
    merged = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
    keep = merged["limit"] > 0
    if not keep.any():
        raise InputError("no text is longer than one token; generate more")
    merged = {name: value[keep] for name, value in merged.items()}
    prefix, chain = products(merged["features"])
    return Episodes(
        decoder.exits,
        decoder.runner.depth,
        decoder.max_draft,
        prefix=prefix,
        chain=chain,
        probe=probe,
        **merged,
    )


def _round(
    rounds: Rounds,
    explorer: _Explorer,
    exits: Sequence[int],
    first: int,
    rng: np.random.Generator,
) -> dict[str, np.ndarray]:
    """Try every exit from here, commit one, and tell what was seen, for the unfinished rows."""
    rows = np.flatnonzero(~rounds.done)
    total, longest = len(rounds.n), rounds.max_draft
    shape = (total, len(exits), longest)
    features = np.zeros((*shape, 3 if explorer.probe is None else 5))
    alive = np.zeros((total, len(exits), longest + 1))
    alive[..., 0] = 1
    agree = np.zeros(shape[:2])
    limit = np.clip(rounds.max_length - rounds.n - 1, 0, longest)
    attempts = []
    for j, layer in enumerate(exits):
        explorer.exit = layer
        explorer.seen.clear()
        attempts.append(rounds.attempt(chances=True))
        for seen in explorer.seen:
            i = int(seen.index[0]) - 1
            parts = [seen.p1, seen.margin, seen.entropy]
            features[seen.rows, j, i, :3] = np.stack(parts, -1)
            if seen.probe is not None:
                features[seen.rows, j, i, 3:] = seen.probe
            agree[seen.rows, j] = seen.agree
        chances = attempts[-1].chances
        assert chances is not None
        alive[:, j, 1 : chances.shape[1] + 1] = np.cumprod(chances, -1)
        # A greedy draft ends where an exit proposes the end of the text.
        limit = np.minimum(limit, attempts[-1].passes - 1)
    note = {
        "text": first + rows,
        "position": rounds.n[rows] - rounds.prompt,
        "features": features[rows],
        "alive": alive[rows].astype(np.float32),
        "agree": agree[rows],
        "limit": limit[rows],
        "ema": rounds.ema[rows].copy(),
        "last_accepted": rounds.last_accepted[rows].copy(),
    }
    rounds.commit(attempts[int(rng.integers(len(exits)))])
    return note

"""Experience as a table: the outcome of every exit and every draft length from every position.

Greedy decoding needs no exploration. While all drafts are right, a branch from any start is the
text itself, so one teacher-forced pass over a generated text gives an exit's distribution at all
positions. After its first wrong draft a branch depends only on where that draft stands, not on
where the round began: the text before it is the same. So a short continuation from every wrong
prediction, for each exit, completes a table in which every greedy policy can be replayed exactly.
(A table that ends a chain at its first wrong draft looks cheaper and misleads: a small model is
often confident on its own wrong branch.)
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lede.adapters import LayerRunner
from lede.cache import RaggedCache
from lede.decoding import SelfSpeculativeDecoder, left_padding
from lede.features import confidence_features
from lede.probe import AcceptanceProbe
from shared_core.errors import InputError
from shared_core.run import load_state, progress, save_state

__all__ = ["ExperienceTable", "collect"]


@dataclass
class ExperienceTable:
    """What every exit would do at every position of B generated texts.

    Position t means t committed tokens after the prompt; the pass there predicts token t.

    Attributes:
        exits: Candidate exits, m of them.
        depth: Layers, L.
        max_draft: Longest draft, D.
        lengths: Generated tokens of each text, [B].
        tokens: The texts' generated tokens, [B, T].
        top: Each exit's most likely token, [B, m, T].
        features: Each exit's p₁, margin and entropy, then the probe's outputs if there is one,
            [B, m, T, 3 or 5].
        branch: Index of the continuation after a wrong prediction, [B, m, T]; -1 where right.
        branch_top: Most likely tokens along the continuations, [M, D - 1].
        branch_features: Their features, [M, D - 1, 3 or 5]. Empty for a teacher-only table.
        eos: Tokens that end a text.
        segment: A label per text, for reports.
        probe: What gave the last features.
    """

    exits: tuple[int, ...]
    depth: int
    max_draft: int
    lengths: np.ndarray
    tokens: np.ndarray
    top: np.ndarray
    features: np.ndarray
    branch: np.ndarray
    branch_top: np.ndarray
    branch_features: np.ndarray
    eos: tuple[int, ...] = ()
    segment: tuple[str, ...] = ()
    probe: AcceptanceProbe | None = None

    def __post_init__(self) -> None:
        if len(self.lengths) == 0 or self.top.shape[2] == 0:
            raise InputError("the experience is empty; collect from at least one prompt")
        inside = np.arange(self.top.shape[2]) < self.lengths[:, None, None]
        self.right = (self.top == self.tokens[:, None]) & inside
        agree = np.zeros(self.top.shape)
        agree[:, 1:] = self.top[:, 1:] == self.top[:, :-1]
        self.agree = agree

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def complete(self) -> bool:
        """Whether the continuations are there, so that dynamic policies replay exactly."""
        return bool(len(self.branch_top) or self.right.all())

    def leading(self) -> np.ndarray:
        """Right predictions in a row from each position, [B, m, T]."""
        run = np.zeros(self.right.shape, dtype=np.int64)
        run[..., -1] = self.right[..., -1]
        for t in range(self.right.shape[2] - 2, -1, -1):
            run[..., t] = np.where(self.right[..., t], run[..., t + 1] + 1, 0)
        return run

    def select(self, rows: Sequence[int] | np.ndarray) -> "ExperienceTable":
        """The table of some of the texts."""
        rows = np.asarray(rows)
        return ExperienceTable(
            self.exits,
            self.depth,
            self.max_draft,
            self.lengths[rows],
            self.tokens[rows],
            self.top[rows],
            self.features[rows],
            self.branch[rows],
            self.branch_top,
            self.branch_features,
            self.eos,
            tuple(self.segment[r] for r in rows) if self.segment else (),
            self.probe,
        )

    @classmethod
    def cat(cls, tables: Sequence["ExperienceTable"]) -> "ExperienceTable":
        """The texts of several tables of the same decoder, in one.

        Args:
            tables: One or more; they are left as they are.

        Raises:
            InputError: If there is none, or their exits, depths, draft lengths or probes differ.
        """
        if not tables:
            raise InputError("no tables; give one or more")
        first = tables[0]
        for other in tables[1:]:
            for name in ("exits", "depth", "max_draft", "eos"):
                if getattr(other, name) != getattr(first, name):
                    raise InputError(
                        f"the tables differ in {name}: {getattr(first, name)} and "
                        f"{getattr(other, name)}; they must be of one decoder"
                    )
            if (first.probe is None) != (other.probe is None) or (
                first.probe and other.probe and not _same(first.probe.weights, other.probe.weights)
            ):
                raise InputError("the tables were collected with different probes")
        segment = [label for t in tables for label in t.segment]
        return _concatenate(list(tables), tuple(segment))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as one safetensors file."""
        names = [n for n in self.__dataclass_fields__ if n not in ("segment", "probe")]
        state = {name: getattr(self, name) for name in names}
        probe = self.probe.weights if self.probe else None
        save_state(path, {**state, "segment": list(self.segment), "probe": probe})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ExperienceTable":
        """Read what `save` wrote.

        Raises:
            InputError: If the file is missing, damaged or something else.
        """
        state = load_state(path)
        try:
            probe = AcceptanceProbe(state["probe"]) if state["probe"] else None
            return cls(**{**state, "segment": tuple(state["segment"]), "probe": probe})
        except (TypeError, KeyError) as error:
            raise InputError(f"{os.fspath(path)} is not saved experience ({error})") from error


def collect(
    decoder: SelfSpeculativeDecoder,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 128,
    mode: str = "branch",
    batch_size: int = 64,
    branch_batch: int = 256,
    segment: Sequence[str] = (),
    probe: AcceptanceProbe | None = None,
    keep_hidden: list[Tensor] | None = None,
    **kwargs: Any,
) -> ExperienceTable:
    """Generate greedily from prompts and tabulate every exit at every position.

    Args:
        decoder: Whose candidates and longest draft to tabulate.
        input_ids: Prompts [B, P], left-padded.
        attention_mask: Of the prompts.
        max_new_tokens: Tokens to generate from each.
        mode: ``branch`` replays every policy exactly; ``teacher`` leaves out what follows a wrong
            draft, exact for static policies only.
        batch_size: Prompts at a time.
        branch_batch: Continuations at a time.
        segment: A label per prompt, for reports.
        probe: Of hidden states, to tabulate beside the distribution's features.
        keep_hidden: A list to receive normed hidden states [B, m, T, C] in half precision.
        kwargs: For ``generate``, such as ``eos_token_id`` and ``pad_token_id``.

    Raises:
        InputError: If the mode is unknown, there is no prompt, or sampling is asked for.
    """
    if mode not in ("branch", "teacher"):
        raise InputError(f"mode={mode!r}; accepted: branch, teacher")
    if kwargs.get("do_sample"):
        raise InputError("the table is of greedy decoding; leave out do_sample")
    if len(input_ids) == 0:
        raise InputError("no prompts; collect from at least one")
    parts = []
    chunks = range(0, len(input_ids), batch_size)
    for first in progress(chunks, description="collecting", unit="batch"):
        chosen = slice(first, first + batch_size)
        mask = None if attention_mask is None else attention_mask[chosen]
        with torch.no_grad():
            parts.append(
                _tabulate(
                    decoder,
                    input_ids[chosen],
                    mask,
                    max_new_tokens,
                    mode,
                    branch_batch,
                    probe,
                    keep_hidden,
                    kwargs,
                )
            )
    return _concatenate(parts, tuple(segment))


def _tabulate(
    decoder: SelfSpeculativeDecoder,
    prompts: Tensor,
    mask: Tensor | None,
    max_new_tokens: int,
    mode: str,
    branch_batch: int,
    probe: AcceptanceProbe | None,
    keep_hidden: list[Tensor] | None,
    kwargs: dict[str, Any],
) -> ExperienceTable:
    runner, exits = decoder.runner, decoder.exits
    width = prompts.shape[1]
    prompts = prompts.to(runner.device)
    if mask is not None:
        mask = mask.to(runner.device)
    settings = {"do_sample": False, "max_new_tokens": max_new_tokens, **kwargs}
    given = decoder.model.generate(prompts, attention_mask=mask, **settings)
    tokens = given[:, width:].cpu().numpy()
    rows, count = tokens.shape
    config = decoder.model.generation_config
    found = settings.get("eos_token_id", config.eos_token_id)
    eos = () if found is None else tuple(np.atleast_1d(found).tolist())
    is_end = np.isin(tokens, eos)
    lengths = np.where(is_end.any(1), is_end.argmax(1) + 1, count)
    padding = left_padding(prompts, mask)
    cache = RaggedCache(runner.depth, given.shape[1])
    frame = runner.frame(np.zeros(rows, dtype=np.int64), given.shape[1] - 1, padding, cache)
    hidden = runner.embed(given[:, :-1])
    top = np.zeros((rows, len(exits), count), dtype=np.int64)
    features = np.zeros((rows, len(exits), count, 5 if probe else 3))
    layer, kept = 0, []
    for j, stop in enumerate(exits):
        hidden = runner.run(hidden, layer, stop, frame, cache)
        layer = stop
        normed = runner.normalize(hidden[:, width - 1 :])
        if keep_hidden is not None:
            kept.append(normed.half().cpu())
        features[:, j], best = _look(runner, normed, probe, j)
        top[:, j] = best.cpu().numpy()
    if keep_hidden is not None:
        keep_hidden.append(torch.stack(kept, 1))
    branch = np.full(top.shape, -1, dtype=np.int64)
    steps = decoder.max_draft - 1
    branch_top, branch_features = [], []
    if mode == "branch" and steps:
        known = 0
        for j in range(len(exits)):
            wrong = (top[:, j] != tokens) & (np.arange(count) < lengths[:, None])
            where = np.argwhere(wrong)
            branch[where[:, 0], j, where[:, 1]] = known + np.arange(len(where))
            known += len(where)
            for first in range(0, len(where), branch_batch):
                row, t = where[first : first + branch_batch].T
                drafted, looks = _continue(
                    decoder, cache, row, width + t, top[row, j, t], padding[row], j, steps, probe
                )
                branch_top.append(drafted)
                branch_features.append(looks)
    return ExperienceTable(
        exits,
        runner.depth,
        decoder.max_draft,
        lengths,
        tokens,
        top,
        features,
        branch,
        np.concatenate(branch_top) if branch_top else np.zeros((0, steps), dtype=np.int64),
        np.concatenate(branch_features)
        if branch_features
        else np.zeros((0, steps, features.shape[-1])),
        eos,
        (),
        probe,
    )


def _look(
    runner: LayerRunner, normed: Tensor, probe: AcceptanceProbe | None, candidate: int
) -> tuple[np.ndarray, Tensor]:
    """Features of normed hidden states, float64 on the host, and the most likely tokens."""
    seen, best = confidence_features(runner.head(normed))
    if probe is not None:
        seen = torch.cat([seen, probe(normed, candidate)], -1)
    return seen.double().cpu().numpy(), best


def _continue(
    decoder: SelfSpeculativeDecoder,
    cache: RaggedCache,
    rows: np.ndarray,
    slots: np.ndarray,
    wrong: np.ndarray,
    padding: np.ndarray,
    candidate: int,
    steps: int,
    probe: AcceptanceProbe | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Feed wrong drafts at their slots and draft on: top tokens [M, steps], features."""
    runner, layer = decoder.runner, decoder.exits[candidate]
    length = min(int(slots.max()), cache.capacity)
    branch = cache.gather(torch.from_numpy(rows), layers=layer, length=length, extra=steps + 1)
    token = torch.from_numpy(wrong).to(runner.device)
    top, features = [], []
    for step in range(steps):
        frame = runner.frame(slots + step, 1, padding, branch)
        hidden = runner.run(runner.embed(token[:, None]), 0, layer, frame, branch)
        seen, token = _look(runner, runner.normalize(hidden[:, -1]), probe, candidate)
        top.append(token.cpu().numpy())
        features.append(seen)
    return np.stack(top, 1), np.stack(features, 1)


def _same(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def _concatenate(parts: list[ExperienceTable], segment: tuple[str, ...]) -> ExperienceTable:
    longest = max(p.tokens.shape[1] for p in parts)

    def join(name: str, axis: int, fill: int) -> np.ndarray:
        out = []
        for part in parts:
            value = getattr(part, name)
            pad = [(0, 0)] * value.ndim
            pad[axis] = (0, longest - value.shape[axis])
            out.append(np.pad(value, pad, constant_values=fill))
        return np.concatenate(out)

    offsets = np.cumsum([0, *(len(p.branch_top) for p in parts)])
    parts = [
        replace(part, branch=np.where(part.branch < 0, -1, part.branch + offset))
        for part, offset in zip(parts, offsets, strict=False)
    ]
    first = parts[0]
    return ExperienceTable(
        first.exits,
        first.depth,
        first.max_draft,
        np.concatenate([p.lengths for p in parts]),
        join("tokens", 1, 0),
        join("top", 2, 0),
        join("features", 2, 0),
        join("branch", 2, -1),
        np.concatenate([p.branch_top for p in parts]),
        np.concatenate([p.branch_features for p in parts]),
        first.eos,
        segment,
        first.probe,
    )

"""One generation: the rounds of self-speculative decoding over a shared cache (section 2.2)."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lede.adapters import LayerRunner
from lede.cache import RaggedCache
from lede.compiled import CompiledRunner
from lede.features import confidence_features
from lede.policies import EMA_START, Observation, Policy, chance, updated_ema
from lede.stats import DecodeStats, Round
from lede.verification import verify_greedy, verify_sampled

COLLAPSED = 0.1  # moving average of the accepted share below which drafting is of no use


@dataclass
class Look:
    """What is seen at an exit.

    Hidden states [B, 1, C] and features [B, 3] (NaN without a head); where the head ran, processed
    logits [B, V] and top tokens [B]; if there is a probe, the normed states and its outputs [B, 2].
    """

    hidden: Tensor
    features: np.ndarray
    normed: Tensor | None = None
    scores: Tensor | None = None
    top: Tensor | None = None
    top_host: np.ndarray | None = None
    probe: np.ndarray | None = None


@dataclass
class Attempt:
    """What a round came to before it is committed.

    Accepted drafts [B], the target's token after them [B], drafts [B, k - 1], early passes [B],
    the exit, heads and looks at exits [B], and on demand the chance with which each draft is
    accepted [B, k - 1].
    """

    accepted: np.ndarray
    final: np.ndarray
    drafts: np.ndarray
    passes: np.ndarray
    layer: int
    heads: np.ndarray
    looks: np.ndarray
    chances: np.ndarray | None = None


class Rounds:
    """The state of one call of ``generate`` and the round that advances it.

    Row b's committed tokens are ``tokens[b, :n[b]]``, its last one not yet fed. At the start of a
    round every layer's cache holds the first n - 1 positions.
    """

    def __init__(
        self,
        runner: LayerRunner | CompiledRunner,
        policy: Policy,
        exits: Sequence[int],
        max_draft: int,
        prompt: Tensor,
        padding: np.ndarray,
        max_length: int,
        *,
        eos: Sequence[int] = (),
        sample: bool = False,
        processors: Callable[[Tensor, Tensor], Tensor] | None = None,
        criteria: Sequence[Callable[..., Any]] = (),
        generator: torch.Generator | None = None,
        min_active: float = 0.5,
        static_cache: bool = False,
        verifier: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = verify_greedy,
        fallback_rounds: int | None = None,
    ) -> None:
        rows, width = prompt.shape
        self.runner, self.policy, self.exits = runner, policy, tuple(exits)
        self.max_draft, self.max_length, self.min_active = max_draft, max_length, min_active
        self.eos, self.sample, self.processors = np.array(eos, dtype=np.int64), sample, processors
        self.criteria, self.generator = criteria, generator
        self.verifier = verifier
        self.fallback_rounds, self._useless = fallback_rounds, 0
        self.prompt, self.padding = width, padding
        self.tokens = np.zeros((rows, max(max_length, width)), dtype=np.int64)
        self.tokens[:, :width] = prompt.cpu().numpy()
        self.n = np.full(rows, width)
        self.done = self.n >= max_length
        self.ema = np.full(rows, EMA_START)
        self.last_accepted = np.zeros(rows)
        self.tokens_made = 0
        self._told: list[np.ndarray] = []  # a row per round, as `Round`
        runner.prepare()
        capacity = max_length + max_draft + 1
        self.cache = (
            runner.cache(rows, capacity)
            if isinstance(runner, CompiledRunner)
            else RaggedCache(runner.depth, capacity, static=static_cache)
        )
        self._shadow: dict[int, list[Tensor]] = {}
        self._unseen = np.full((rows, 3), np.nan)
        policy.reset(rows, self.exits, runner.depth, max_draft)
        if width > 1:
            head = prompt[:, :-1].to(runner.device)
            frame = runner.frame(np.zeros(rows, dtype=np.int64), width - 1, padding, self.cache)
            runner.run(runner.embed(head), 0, runner.depth, frame, self.cache)

    @property
    def stats(self) -> DecodeStats:
        """What was done so far."""
        log = [Round(*row) for told in self._told for row in told.tolist()]
        return DecodeStats(
            self.runner.depth,
            self.tokens_made,
            log=log,
            lossless=getattr(self.verifier, "lossless", True),
        )

    def _pass(self, hidden: Tensor, first: int, last: int, starts: np.ndarray) -> Tensor:
        """Run layers first..last, noting the hidden states at candidates if a policy asks."""
        frame = self.runner.frame(starts, hidden.shape[1], self.padding, self.cache)
        if not self.policy.wants_shadow:
            return self.runner.run(hidden, first, last, frame, self.cache)
        for stop in [*(c for c in self.exits if first < c < last), last]:
            hidden = self.runner.run(hidden, first, stop, frame, self.cache)
            if stop in self.exits:
                self._shadow.setdefault(stop, []).append(hidden)
            first = stop
        return hidden

    def _processed(self, scores: Tensor, drafts: Sequence[Tensor]) -> Tensor:
        """Apply the logits processors with each row's own prefix, drafts included."""
        if self.processors is None:
            return scores
        later = torch.stack(list(drafts), 1) if drafts else None
        out = torch.empty_like(scores)
        for length in np.unique(self.n):
            rows = np.flatnonzero(self.n == length)
            prefix = torch.from_numpy(self.tokens[rows, :length]).to(scores.device)
            group = torch.from_numpy(rows).to(scores.device)
            if later is not None:
                prefix = torch.cat([prefix, later[group]], 1)
            own = _narrowed(self.processors, group, len(self.n))
            out[group] = own(prefix, scores[group])
        return out

    def _look(self, hidden: Tensor, layer: int, drafts: Sequence[Tensor], head: bool) -> Look:
        """What a policy may see of an exit: probe and, if wanted, distribution; one small copy."""
        look = Look(hidden[:, -1:], self._unseen)
        parts = []
        if self.policy.probe is not None:
            look.normed = self.runner.normalize(look.hidden)
        if head:
            scores = self._scores(look, drafts)
            features, look.top = confidence_features(scores)
            parts = [features.double(), look.top[:, None].double()]
        if look.normed is not None:
            outputs = self.policy.probe(look.normed[:, -1], self.exits.index(layer))
            parts.append(outputs.double().to(look.normed.device))
        if not parts:
            return look
        host = torch.cat(parts, 1).cpu().numpy()
        if np.isnan(host[~self.done]).any():
            raise RuntimeError(f"NaN logits at the exit after layer {layer}")
        if head:
            look.features, look.top_host = host[:, :3], host[:, 3].astype(np.int64)
            host = host[:, 4:]
        if self.policy.probe is not None:
            look.probe = host
        return look

    def _scores(self, look: Look, drafts: Sequence[Tensor]) -> Tensor:
        """Run the head at a look; norm and head in one call where the norm has not run."""
        run = self.runner
        raw = run.logits(look.hidden) if look.normed is None else run.head(look.normed)
        look.scores = self._processed(raw[:, -1], drafts)
        return look.scores

    def _run_head(self, look: Look, drafts: Sequence[Tensor]) -> None:
        """The distribution to draft from, where no decision needed it."""
        look.top = self._scores(look, drafts).argmax(-1)
        if len(self.eos) and not self.sample:
            look.top_host = look.top.cpu().numpy()

    def _observe(
        self,
        look: Look | None,
        layer: int,
        index: int,
        agree: np.ndarray,
        prefix: np.ndarray,
        chain: np.ndarray,
    ) -> Observation:
        rows = len(self.n)
        features = self._unseen if look is None else look.features
        return Observation(
            rows=np.arange(rows),
            layer=np.full(rows, layer),
            index=np.full(rows, index),
            p1=features[:, 0],
            margin=features[:, 1],
            entropy=features[:, 2],
            agree=agree,
            ema=self.ema,
            prefix=prefix,
            last_accepted=self.last_accepted,
            probe=None if look is None else look.probe,
            chain=chain,
        )

    def _walk(
        self, hidden: Tensor, start: np.ndarray
    ) -> tuple[Tensor, int, Look | None, np.ndarray]:
        """Climb the candidates until the policy exits; phase one of the decision process."""
        layer, look, before = 0, None, None
        one = np.ones(len(self.n))
        agree = np.zeros(len(self.n))
        active = np.flatnonzero(~self.done)
        for candidate in self.exits:
            hidden = self._pass(hidden, layer, candidate, start)
            layer, look = candidate, None
            if self.policy.probes(candidate):
                look = self._look(hidden, candidate, [], self.policy.needs_head)
                self._heads += self.policy.needs_head
                self._looks += 1
                if before is not None:
                    agree = np.asarray(look.top_host == before, dtype=float)
                before = look.top_host
            if candidate == self.exits[-1]:
                break
            seen = self._observe(look, candidate, 1, agree, one, one)
            if self.policy.choose_exit(seen[active]).sum() > 0:
                break
        return hidden, layer, look, agree

    def step(self) -> None:
        """One round of every unfinished row: walk, draft, verify, commit."""
        self.commit(self.attempt())

    def attempt(self, *, chances: bool = False) -> "Attempt":
        """Walk, draft and verify. Nothing is committed: the cache's next writes undo it.

        Args:
            chances: Also tell the probability with which each draft is accepted.
        """
        rows = len(self.n)
        start = self.n - 1
        budget = np.clip(self.max_length - self.n - 1, 0, self.max_draft)
        budget[self.done] = 0
        last = torch.from_numpy(self.tokens[np.arange(rows), start]).to(self.runner.device)
        hidden = self.runner.embed(last[:, None])
        self._shadow.clear()
        self.policy.start_round(self.n - self.prompt)
        depth = self.runner.depth
        drafts: list[Tensor] = []
        q: list[Tensor] = []
        passes = np.ones(rows, dtype=np.int64)
        self._heads, self._looks = (np.zeros(rows, dtype=np.int64) for _ in range(2))
        given_up = self.fallback_rounds is not None and self._useless >= self.fallback_rounds
        if self.policy.autoregressive or given_up or not budget.any():
            layer, hidden = depth, self._pass(hidden, 0, depth, start)
        else:
            hidden, layer, look, agree = self._walk(hidden, start)
            hidden = self._draft(hidden, layer, look, agree, budget, drafts, q, passes)
            hidden = self._pass(hidden, layer, depth, start)
        scores = self.runner.logits(hidden)
        if self.processors is not None:
            parts = [self._processed(scores[:, i], drafts[:i]) for i in range(scores.shape[1])]
            scores = torch.stack(parts, 1)
        counts = torch.from_numpy(passes - 1).to(scores.device)
        active = torch.from_numpy(~self.done).to(scores.device)
        proposed = torch.stack(drafts, 1) if drafts else counts.new_zeros((rows, 0))
        proposed = proposed.to(scores.device)
        width = proposed.shape[1]
        if self.sample:
            p = torch.softmax(scores, -1)
            broken = torch.isnan(p[active]).any()
            q_all = torch.stack(q, 1).to(p.device) if q else p[:, :0]
            # NaN cannot be drawn from; finished rows are looked at no more.
            p = p.nan_to_num(1.0)
            accepted, final = verify_sampled(p, q_all, proposed, counts, self.generator)
            share = _accept_chances(p[:, :width], q_all, proposed) if chances else None
        else:
            top, predictions = scores.max(-1)
            broken = torch.isnan(top[active]).any()
            accepted, final = self.verifier(predictions, proposed, counts)
            share = (predictions[:, :width] == proposed).double() if chances else None
        told = torch.cat([accepted[:, None], final[:, None], proposed], 1)
        taken = torch.cat([told, broken.long().expand(rows, 1)], 1).cpu().numpy()
        if taken[0, -1]:
            raise RuntimeError(f"NaN logits after the last layer ({depth})")
        return Attempt(
            taken[:, 0],
            taken[:, 1],
            taken[:, 2:-1],
            passes,
            layer,
            self._heads.copy(),
            self._looks.copy(),
            None if share is None else share.cpu().numpy(),
        )

    def _draft(
        self,
        hidden: Tensor,
        layer: int,
        look: Look | None,
        agree: np.ndarray,
        budget: np.ndarray,
        drafts: list[Tensor],
        q: list[Tensor],
        passes: np.ndarray,
    ) -> Tensor:
        """Draft at the exit until the policy stops; phase two. Returns hidden states [B, k, C]."""
        rows = len(self.n)
        states = [hidden]
        limit = self.policy.max_drafts(np.arange(rows), np.full(rows, layer))
        limit = np.minimum(limit, budget)
        wants = ~self.done
        least = max(1.0, self.min_active * float(wants.sum()))
        prefix, chain = np.ones(rows), np.ones(rows)
        decides = self.policy.uses_features
        while True:
            index = len(states)
            wants = wants & (limit >= index)
            if not wants.any():
                break
            if look is None:
                look = self._look(hidden, layer, drafts, self.policy.needs_head and decides)
                if decides:
                    self._heads += wants & self.policy.needs_head
                    self._looks += wants
            if decides:
                seen = self._observe(look, layer, index, agree, prefix, chain)
                asked = np.flatnonzero(wants)
                wants[asked[self.policy.keep_drafting(seen[asked]) <= 0]] = False
                if not wants.any():
                    break
            if look.scores is None:
                self._run_head(look, drafts)
                self._heads += wants
            assert look.scores is not None
            assert look.top is not None
            if len(self.eos) and not self.sample:
                # A right end of text is committed by the verification itself, so it is not drafted.
                # When sampling, stopping because of the token drawn would bias the output.
                wants &= ~np.isin(np.asarray(look.top_host), self.eos)
            if wants.sum() < least:
                break
            if self.sample:
                q.append(torch.softmax(look.scores, -1))
                token = torch.multinomial(q[-1], 1, generator=self.generator)[:, 0]
            else:
                token = look.top
            if decides:
                prefix = prefix * look.features[:, 0]
                if look.probe is not None:
                    chain = chain * chance(look.probe[:, 0])
            drafts.append(token)
            passes += wants
            hidden = self.runner.embed(token[:, None].to(self.runner.device))
            hidden = self._pass(hidden, 0, layer, self.n - 1 + index)
            states.append(hidden)
            look = None
        return torch.cat(states, 1)

    def commit(self, done: "Attempt") -> None:
        """Append accepted drafts and the target's token; end rows at EOS, limits and criteria."""
        accepted, passes, drafts = done.accepted, done.passes, done.drafts
        active = np.flatnonzero(~self.done)
        shadow = self._shadow_shares(done) if self._shadow else None
        rows = np.arange(len(self.n))
        new = np.concatenate([drafts, np.zeros_like(done.final)[:, None]], 1)
        new[rows, accepted] = done.final
        count = accepted + 1
        if len(self.eos):
            ends = np.isin(new, self.eos) & (np.arange(new.shape[1]) < count[:, None])
            ended: np.ndarray = np.asarray(ends.any(1))
            count = np.where(ended, ends.argmax(1) + 1, count)
            self.done[active] |= ended[active]
        before = self.n.copy()
        for i in range(int(count[active].max())):
            has = active[count[active] > i]
            self.tokens[has, before[has] + i] = new[has, i]
        if self.criteria:
            for row in active:
                for i in range(int(count[row])):
                    if self._stopped(int(row), int(before[row]) + i + 1):
                        count[row], self.done[row] = i + 1, True
                        self.tokens[row, before[row] + i + 1 :] = 0
                        break
        self.n[active] += count[active]
        self.done[active] |= self.n[active] >= self.max_length
        kept = np.minimum(accepted, count)
        self.tokens_made += int(count[active].sum())
        at, layer = before - self.prompt, np.full_like(passes, done.layer)
        columns = (rows, at, layer, passes, kept, done.heads, done.looks)
        self._told.append(np.stack(columns, 1)[active])
        drafted = passes - 1
        self.ema[active] = updated_ema(self.ema, accepted, drafted)[active]
        useless = bool((self.ema[active] < COLLAPSED).all())
        self._useless = self._useless + 1 if useless else 0
        self.last_accepted[active] = accepted[active] / self.max_draft
        shares = None if shadow is None else shadow[active]
        self.policy.end_round(active, accepted[active], drafted[active], shares)

    def _stopped(self, row: int, length: int) -> bool:
        ids = torch.from_numpy(self.tokens[row : row + 1, :length]).to(self.runner.device)
        return any(bool(torch.as_tensor(c(ids, None)).all()) for c in self.criteria)

    def _shadow_shares(self, done: "Attempt") -> np.ndarray:
        """Each candidate's share of right predictions at the tokens just verified, [B, m]."""
        accepted, final, drafts = done.accepted, done.final, done.drafts
        width = drafts.shape[1] + 1
        truth = np.concatenate([drafts, np.zeros_like(final)[:, None]], 1)
        truth[np.arange(len(final)), accepted] = final
        judged = np.arange(width) <= accepted[:, None]
        shares = []
        for candidate in self.exits:
            predicted = self.runner.logits(torch.cat(self._shadow[candidate], 1)).argmax(-1)
            right = (predicted.cpu().numpy() == truth) & judged
            shares.append(right.sum(1) / judged.sum(1))
        return np.stack(shares, 1)


def _accept_chances(p: Tensor, q: Tensor, drafts: Tensor) -> Tensor:
    """min(1, p(y) / q(y)) of each draft."""
    p_y, q_y = (d.gather(2, drafts[..., None])[..., 0].double() for d in (p, q))
    return (p_y / q_y).clamp(max=1)


def _narrowed(processors: Any, group: Tensor, rows: int) -> Any:
    """The processors for some of the rows: some keep a tensor with an entry per row."""
    if len(group) == rows:
        return processors
    out = type(processors)()
    for processor in processors:
        per_row = {
            name: value[group.to(value.device)]
            for name, value in vars(processor).items()
            if name == "prompt_ignore_length" and isinstance(value, Tensor)
        }
        if per_row:
            processor = copy.copy(processor)
            vars(processor).update(per_row)
        out.append(processor)
    return out

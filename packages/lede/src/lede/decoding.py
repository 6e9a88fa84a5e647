"""Self-speculative decoding on a transformers model: same tokens as ``generate``, fewer layers."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lede._rounds import Rounds
from lede.adapters import layer_runner
from lede.compiled import CompiledRunner
from lede.policies import Policy, StaticPolicy
from lede.stats import DecodeStats
from lede.verification import verify_greedy
from shared_core.errors import InputError

__all__ = ["LedeOutput", "SelfSpeculativeDecoder", "check_exits", "custom_generate"]

Verifier = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def check_exits(exit_layers: Sequence[int], depth: int, max_draft: int) -> tuple[int, ...]:
    """Check candidate exits and the longest draft against a model's depth.

    Raises:
        InputError: If an exit is not in 1 .. depth - 1, the exits are not in rising order, or
            `max_draft` is below 1.

    Examples:
        >>> check_exits([2, 4], depth=8, max_draft=12)
        (2, 4)
    """
    exits = tuple(int(e) for e in exit_layers)
    if not exits or any(not 1 <= e < depth for e in exits):
        raise InputError(f"exit_layers={exits}; accepted: one or more of 1 to {depth - 1}")
    if list(exits) != sorted(set(exits)):
        raise InputError(f"exit_layers={exits} must rise without repeating: {sorted(set(exits))}")
    if max_draft < 1:
        raise InputError(f"max_draft={max_draft}; it must be at least 1")
    return exits


class LedeOutput(dict[str, Any]):
    """Sequences and what decoding did; keys are attributes too, as in a ``ModelOutput``.

    Attributes:
        sequences: Token ids [B, S], prompt included, padded at the right.
        stats: Counts and the round log.
    """

    sequences: Tensor
    stats: DecodeStats

    def __init__(self, sequences: Tensor, stats: DecodeStats) -> None:
        super().__init__(sequences=sequences, stats=stats)
        self.sequences, self.stats = sequences, stats


class SelfSpeculativeDecoder:
    """Draft with the first layers, verify with the rest, and let a policy choose how.

    Args:
        model: A causal language model of transformers whose family `lede.adapters` supports.
        exit_layers: Candidate exits, rising, each in 1 .. L - 1.
        max_draft: Longest draft of a round (the paper caps all dynamic methods at 12).
        policy: Who decides; by default a `StaticPolicy` at the middle candidate.
        cache: ``dynamic``: attention sees the filled part of the preallocated cache; ``static``:
            all of it, masked, so that shapes do not change.
        compile: Run the layers as compiled graphs over a static cache (see `lede.compiled`); on
            CUDA as CUDA graphs. A string names another backend of ``torch.compile``. The first
            calls compile; a decoder keeps its graphs as long as batch size and rounded length stay.
        min_active: In a batch, drafting ends when fewer than this share of rows want more.
        verifier: Instead of `lede.verification.verify_greedy`, such as
            `lede.testing.ScriptedVerifier`; for greedy decoding.
        fallback_rounds: Decode plainly to the end once the moving average of the accepted share has
            been below a tenth, in all rows, for so many rounds in a row; ``None`` for never. A
            replay (`lede.simulate`) does not know of it.

    Raises:
        InputError: For bad exits, an unsupported model or an unknown cache.

    Examples:
        >>> from lede.testing import tiny_model
        >>> model = tiny_model("llama", layers=4)
        >>> decoder = SelfSpeculativeDecoder(model, [1, 2], policy=StaticPolicy(2, 3))
        >>> prompt = torch.tensor([[1, 2, 3]])
        >>> out = decoder.generate(prompt, max_new_tokens=8)
        >>> same = model.generate(prompt, max_new_tokens=8, do_sample=False)
        >>> torch.equal(out.sequences, same)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        exit_layers: Sequence[int],
        *,
        max_draft: int = 12,
        policy: Policy | None = None,
        cache: str = "dynamic",
        compile: bool | str = False,
        min_active: float = 0.5,
        verifier: Verifier = verify_greedy,
        fallback_rounds: int | None = None,
    ) -> None:
        self.model: Any = model
        self.runner = layer_runner(model)
        self.exits = check_exits(exit_layers, self.runner.depth, max_draft)
        self.max_draft = max_draft
        middle = self.exits[len(self.exits) // 2]
        self.policy: Policy = policy or StaticPolicy(middle, min(4, max_draft))
        if cache not in ("dynamic", "static"):
            raise InputError(f"cache={cache!r}; accepted: dynamic, static")
        self.static_cache = cache == "static"
        self.compiled: CompiledRunner | None = None
        if compile:
            backend = compile if isinstance(compile, str) else "inductor"
            self.compiled = CompiledRunner(self.runner, self.exits, max_draft, backend=backend)
        self.min_active = min_active
        self.verifier = verifier
        if fallback_rounds is not None and fallback_rounds < 1:
            raise InputError(f"fallback_rounds={fallback_rounds}; accepted: at least 1, or None")
        self.fallback_rounds = fallback_rounds

    def generate(
        self,
        input_ids: Tensor,
        *,
        policy: Policy | None = None,
        streamer: Any = None,
        generator: torch.Generator | None = None,
        advance: Callable[[Rounds], None] = Rounds.step,
        **kwargs: Any,
    ) -> LedeOutput:
        """Generate as ``model.generate(input_ids, **kwargs)`` would, in fewer layer passes.

        Everything that ``generate`` prepares (its config, processors, stopping criteria, budget)
        is prepared by it; only the loop is ours.

        Args:
            input_ids: Prompts [B, P], left-padded (with `attention_mask` among `kwargs`).
            policy: Instead of the decoder's own.
            streamer: A streamer of transformers, for a batch of one.
            generator: Of the random numbers when sampling.
            advance: Called with the rounds until every row is done; experience is collected so.
            kwargs: As for ``generate``.

        Raises:
            InputError: For beams and other modes than greedy and sampling, right padding, an empty
                prompt, ``use_cache=False``.
            NotImplementedError: If scores, hidden states or attentions are asked for.
            RuntimeError: If an exit gives NaN.
        """
        if input_ids.ndim != 2 or input_ids.shape[1] == 0:
            raise InputError(
                f"input_ids has shape {tuple(input_ids.shape)}; a prompt has at least one token "
                "and the shape [batch, length]"
            )
        found: list[DecodeStats] = []

        def loop(model: Any, input_ids: Tensor, **given: Any) -> Tensor:
            sequences, stats = self._decode(
                input_ids, policy or self.policy, streamer, generator, advance, **given
            )
            found.append(stats)
            return sequences

        wanted = {"return_dict_in_generate": False, **kwargs}
        _refuse_outputs(kwargs)
        with torch.no_grad():
            sequences = self.model.generate(
                input_ids, custom_generate=loop, streamer=streamer, **wanted
            )
        return LedeOutput(sequences, found[0])

    def _decode(
        self,
        input_ids: Tensor,
        policy: Policy,
        streamer: Any,
        generator: torch.Generator | None,
        advance: Callable[[Rounds], None] = Rounds.step,
        *,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        attention_mask: Tensor | None = None,
        use_cache: bool = True,
        **unused: Any,
    ) -> tuple[Tensor, DecodeStats]:
        began = time.perf_counter()
        _check_mode(generation_config, use_cache)
        if generation_config.do_sample and self.verifier is not verify_greedy:
            raise InputError("verifier= is for greedy decoding; leave it out to sample")
        rows = input_ids.shape[0]
        if streamer is not None and rows > 1:
            raise InputError(f"a streamer takes one sequence at a time, not a batch of {rows}")
        padding = left_padding(input_ids, attention_mask)
        eos = generation_config._eos_token_tensor
        pad = generation_config._pad_token_tensor
        others = [
            c
            for c in stopping_criteria
            if type(c).__name__ not in ("MaxLengthCriteria", "EosTokenCriteria")
        ]
        training = self.model.training
        self.model.eval()
        try:
            rounds = Rounds(
                self.compiled or self.runner,
                policy,
                self.exits,
                self.max_draft,
                input_ids,
                padding,
                int(generation_config.max_length),
                eos=[] if eos is None else eos.flatten().tolist(),
                sample=bool(generation_config.do_sample),
                processors=logits_processor if len(logits_processor) else None,
                criteria=others,
                generator=generator,
                min_active=self.min_active,
                static_cache=self.static_cache,
                verifier=self.verifier,
                fallback_rounds=self.fallback_rounds,
            )
            while not rounds.done.all():
                before = int(rounds.n[0])
                advance(rounds)
                if streamer is not None:
                    for token in rounds.tokens[0, before : rounds.n[0]]:
                        streamer.put(torch.tensor([token]))
        finally:
            self.model.train(training)
        if streamer is not None:
            streamer.end()
        fill = 0 if pad is None else int(pad.flatten()[0])
        width = int(rounds.n.max())
        past = np.arange(width) >= rounds.n[:, None]
        tokens = np.where(past, fill, rounds.tokens[:, :width])
        stats = rounds.stats
        stats.wall_s = time.perf_counter() - began
        return torch.from_numpy(tokens).to(input_ids.device), stats


def left_padding(input_ids: Tensor, attention_mask: Tensor | None) -> np.ndarray:
    """Padding tokens at the left of each row.

    Raises:
        InputError: If a row has padding at its right or inside, or nothing but padding.

    Examples:
        >>> left_padding(torch.ones(1, 3), torch.tensor([[0, 1, 1]]))
        array([1])
    """
    if attention_mask is None:
        return np.zeros(len(input_ids), dtype=np.int64)
    mask = attention_mask.bool().cpu().numpy()
    if not mask[:, -1].all() or (np.diff(mask.astype(int), axis=1) < 0).any():
        raise InputError(
            "the batch is padded at the right or inside; pad at the left "
            "(tokenizer.padding_side = 'left')"
        )
    return np.asarray((~mask).sum(1), dtype=np.int64)


def _refuse_outputs(asked: Any) -> None:
    names = ("output_scores", "output_logits", "output_hidden_states", "output_attentions")
    given = asked if isinstance(asked, dict) else vars(asked)
    refused = [name for name in names if given.get(name)]
    if refused:
        raise NotImplementedError(
            f"{', '.join(refused)}: a round has no per-token value of these; leave them out"
        )


def _check_mode(config: Any, use_cache: bool) -> None:
    mode = config.get_generation_mode().value
    if mode not in ("greedy_search", "sample"):
        raise InputError(
            f"generation mode {mode!r} is not supported; accepted: greedy search and sampling "
            "(num_beams=1, no penalty_alpha)"
        )
    if not use_cache:
        raise InputError("use_cache=False: self-speculative decoding needs its cache; leave it out")
    _refuse_outputs(config)


def custom_generate(
    policy: Policy,
    *,
    exit_layers: Sequence[int] | None = None,
    max_draft: int | None = None,
    compile: bool | str = False,
    **options: Any,
) -> Callable[..., Any]:
    """A loop for ``model.generate(..., custom_generate=lede.custom_generate(policy))``.

    transformers does not hand ``streamer`` to such a loop: pass it as ``lede_streamer``, or use
    `SelfSpeculativeDecoder.generate`. Either way it gets the prompt first, as from ``generate``.

    Args:
        policy: Who decides.
        exit_layers: Candidates; by default the policy's own.
        max_draft: Longest draft; by default the policy's own, else 12.
        compile: See `SelfSpeculativeDecoder`; the graphs are kept while the model is the same.
        options: Further ones of `SelfSpeculativeDecoder`, such as
            ``fallback_rounds``.

    Returns:
        A callable that returns token ids, or a `LedeOutput` with
        ``return_dict_in_generate=True``.

    Raises:
        InputError: If the policy names no exits and none are given.

    Examples:
        >>> from lede.testing import tiny_model
        >>> model = tiny_model("llama", layers=4)
        >>> loop = custom_generate(StaticPolicy(2, 3))
        >>> model.generate(torch.tensor([[1, 2]]), max_new_tokens=4, custom_generate=loop).shape
        torch.Size([1, 6])
    """
    own = getattr(policy, "exits", None) or (
        [policy.exit_layer] if hasattr(policy, "exit_layer") else None
    )
    exits = exit_layers or own
    if not exits:
        raise InputError(f"{policy!r} names no exits; give exit_layers=(2, 4, …)")
    own_longest = int(getattr(policy, "longest", 12))
    longest = max_draft if max_draft else own_longest

    made: list[SelfSpeculativeDecoder] = []

    def loop(model: Any, input_ids: Tensor, lede_streamer: Any = None, **given: Any) -> Any:
        if not made or made[0].model is not model:
            made[:] = [
                SelfSpeculativeDecoder(
                    model, exits, max_draft=longest, policy=policy, compile=compile, **options
                )
            ]
        decoder = made[0]
        if lede_streamer is not None:
            lede_streamer.put(input_ids.cpu())
        sequences, stats = decoder._decode(input_ids, policy, lede_streamer, None, **given)
        if given["generation_config"].return_dict_in_generate:
            return LedeOutput(sequences, stats)
        return sequences

    return loop

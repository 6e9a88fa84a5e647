"""The same tokens as ``generate``, with fewer layer passes."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lede
from lede import SelfSpeculativeDecoder, StaticPolicy
from lede._rounds import Rounds
from lede.cache import RaggedCache
from lede.testing import TINY_MODEL_TYPES, tiny_model

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
EXITS = (1, 2, 3)


def prompts(rows: int = 3, width: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(1, 64, (rows, width), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : 4 // row] = 0
    return ids, mask


def q_policy(seed: int = 0, **changes: Any) -> lede.QPolicy:
    """Random weights: decisions all over the place."""
    generator = np.random.default_rng(seed)
    shapes = {"w1": (13, 8), "b1": 8, "w2": (8, 8), "b2": 8, "w3": (8, 12), "b3": 12}
    weights = {k: generator.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    return lede.QPolicy(weights, EXITS, 4, 5, **changes)


POLICIES = {
    "autoregressive": lede.AutoregressivePolicy,
    "static": lambda: StaticPolicy(2, 4),
    "confidence": lambda: lede.ConfidencePolicy(3, 0.3),
    "confidence_exit": lambda: lede.ConfidenceExitPolicy(0.5, 0.2),
    "draft_verify": lambda: lede.DraftVerifyPolicy(1, 0.4),
    "del": lambda: lede.DELPolicy(0.05),
    "q": q_policy,
    "q_draft": lambda: q_policy(1, mode="draft_only", exit_layer=2),
    "q_exit": lambda: q_policy(2, mode="exit_only", num_draft=3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_generate(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype=dtype)
    ids, mask = prompts()
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    alone = model.generate(ids[:1], **settings)
    if (family, dtype) == ("gemma2", torch.float64):
        # Eager attention in float64 makes NaN of padding: there, each row is generated alone.
        rows = [model.generate(i[m > 0][None], **settings) for i, m in zip(ids, mask, strict=True)]
        batch = torch.cat(
            [torch.cat([i[None], r[:, -8:]], 1) for i, r in zip(ids, rows, strict=True)]
        )
    else:
        batch = model.generate(ids, attention_mask=mask, **settings)
    decoder = SelfSpeculativeDecoder(model, EXITS, max_draft=5)
    for name, make in POLICIES.items():
        out = decoder.generate(ids, attention_mask=mask, policy=make(), **settings)
        assert torch.equal(out.sequences, batch), name
        one = decoder.generate(ids[:1], policy=make(), **settings)
        assert torch.equal(one.sequences, alone), name
        stats = one.stats
        assert stats.tokens == stats.accepted + stats.rounds == 8
        assert stats.accepted <= stats.drafted
        assert {r.exit for r in stats.log} <= {*EXITS, 4}


@pytest.mark.parametrize("family", [f for f in TINY_MODEL_TYPES if f not in FAMILIES])
def test_further_families(family: str) -> None:
    model = tiny_model(family)
    ids, mask = prompts()
    settings = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, attention_mask=mask, **settings)
    decoder = SelfSpeculativeDecoder(model, EXITS, policy=q_policy(), max_draft=5)
    assert torch.equal(decoder.generate(ids, attention_mask=mask, **settings).sequences, expected)


@pytest.mark.smoke
def test_smoke() -> None:
    model = tiny_model()
    ids, _ = prompts(1)
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)
    decoder = SelfSpeculativeDecoder(model, EXITS, policy=q_policy(), max_draft=5)
    assert torch.equal(decoder.generate(ids, max_new_tokens=12).sequences, expected)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_cache_and_attention_implementations(static: bool, attention: str) -> None:
    model = tiny_model("mistral")
    model.set_attn_implementation(attention)
    ids, mask = prompts()
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, attention_mask=mask, **settings)
    decoder = SelfSpeculativeDecoder(
        model, EXITS, policy=StaticPolicy(2, 3), cache="static" if static else "dynamic"
    )
    assert torch.equal(decoder.generate(ids, attention_mask=mask, **settings).sequences, expected)


@pytest.mark.parametrize("new", [1, 2, 3])
@pytest.mark.parametrize("width", [1, 4])
def test_short_prompts_and_budgets(new: int, width: int) -> None:
    model = tiny_model()
    ids = prompts(1, width)[0]
    expected = model.generate(ids, max_new_tokens=new, do_sample=False)
    decoder = SelfSpeculativeDecoder(model, (1, 3), policy=StaticPolicy(3, 9), max_draft=9)
    assert torch.equal(decoder.generate(ids, max_new_tokens=new).sequences, expected)


@pytest.mark.parametrize("name", ["static", "q", "del"])
def test_end_of_text(name: str) -> None:
    """Every second token in turn is the end: accepted, rejected, drafted, final ones."""
    model = tiny_model()
    ids, mask = prompts()
    free = model.generate(ids, attention_mask=mask, max_new_tokens=18, do_sample=False)
    decoder = SelfSpeculativeDecoder(model, EXITS, policy=POLICIES[name](), max_draft=5)
    ended = padded = 0
    for end in sorted(set(free[:, 9:].flatten().tolist()))[::2]:
        settings = {"max_new_tokens": 18, "eos_token_id": end, "pad_token_id": 0}
        expected = model.generate(ids, attention_mask=mask, do_sample=False, **settings)
        found = decoder.generate(ids, attention_mask=mask, **settings).sequences
        assert torch.equal(found, expected), end
        ended += int((expected[:, 9:] == end).any(1).sum())
        padded += int((expected[:, -1] == 0).sum())
    assert ended > 3
    assert padded > 0


def test_processors_criteria_and_streamer() -> None:
    from transformers import MaxTimeCriteria, StoppingCriteria
    from transformers.generation.streamers import BaseStreamer

    model = tiny_model()
    ids, mask = prompts()
    decoder = SelfSpeculativeDecoder(model, EXITS, policy=StaticPolicy(3, 4), max_draft=5)
    settings = {
        "max_new_tokens": 20,
        "repetition_penalty": 1.5,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[5], [7, 9]],
        "pad_token_id": 0,
    }
    expected = model.generate(ids, attention_mask=mask, do_sample=False, **settings)
    found = decoder.generate(ids, attention_mask=mask, **settings).sequences
    assert torch.equal(found, expected)

    class AtThirteen(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= 13)

    class Keeps(BaseStreamer):
        def __init__(self) -> None:
            self.seen: list[int] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    streamer = Keeps()
    criteria = [AtThirteen(), MaxTimeCriteria(1000.0)]
    out = decoder.generate(
        ids[:1], max_new_tokens=20, stopping_criteria=criteria, streamer=streamer
    )
    assert out.sequences.shape == (1, 13)
    assert streamer.ended
    assert streamer.seen == out.sequences[0].tolist()
    streamer = Keeps()
    loop = lede.custom_generate(StaticPolicy(3, 4), max_draft=5)
    same = model.generate(ids[:1], max_new_tokens=20, custom_generate=loop, lede_streamer=streamer)
    assert streamer.ended
    assert streamer.seen == same[0].tolist()


def test_criteria_of_single_rows_in_a_batch() -> None:
    """A criterion that ends each row elsewhere, in the middle of accepted drafts too.

    The library pads ended rows only if there is an end of text; ours are padded always.
    """
    from transformers import StoppingCriteria

    model = tiny_model()
    ids, mask = prompts()
    settings = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    free = model.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :]
    stops = {int(row[at]) for row, at in zip(free, (4, 11, 17), strict=True)}
    settings["eos_token_id"] = min(set(range(1, 64)) - set(free.flatten().tolist()))

    class AtTokens(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
            last = input_ids[:, -1]
            return torch.tensor([int(token) in stops for token in last], device=last.device)

    expected = model.generate(ids, attention_mask=mask, stopping_criteria=[AtTokens()], **settings)
    lengths = set()
    for policy in (StaticPolicy(3, 4), StaticPolicy(1, 5), lede.ConfidencePolicy(2, 0.2)):
        decoder = SelfSpeculativeDecoder(model, EXITS, policy=policy, max_draft=5)
        found = decoder.generate(
            ids, attention_mask=mask, stopping_criteria=[AtTokens()], **settings
        ).sequences
        assert torch.equal(found, expected)
        lengths |= {int((row != 0).sum()) for row in found[:, ids.shape[1] :]}
    assert len(lengths) > 1


def test_a_scripted_verifier_accepts_as_told_and_says_so() -> None:
    from lede.testing import ScriptedVerifier

    model = tiny_model()
    ids, _ = prompts(1)
    rates = []
    for acceptance in (0.0, 0.5, 1.0):
        decoder = SelfSpeculativeDecoder(
            model, EXITS, policy=StaticPolicy(2, 1), verifier=ScriptedVerifier(acceptance)
        )
        out = decoder.generate(ids, max_new_tokens=120, pad_token_id=0)
        assert not out.stats.lossless
        assert not out.stats.to_dict()["lossless"]
        rates.append(out.stats.acceptance_rate)
    assert rates[0] == 0
    assert rates[1] == pytest.approx(0.5, abs=0.15)
    assert rates[2] == 1
    assert SelfSpeculativeDecoder(model, EXITS).generate(ids, max_new_tokens=3).stats.lossless
    with pytest.raises(ValueError, match="0 to 1"):
        ScriptedVerifier(1.5)
    with pytest.raises(ValueError, match="leave it out to sample"):
        decoder.generate(ids, do_sample=True, max_new_tokens=2, pad_token_id=0)


def test_useless_drafting_is_given_up() -> None:
    """Once the moving average, 0.7 · 0.8^rounds, has been below 0.1 for five rounds."""
    from lede.testing import ScriptedVerifier

    model = tiny_model()
    ids, mask = prompts()
    settings = {"max_new_tokens": 40, "pad_token_id": 0, "attention_mask": mask}
    policy = StaticPolicy(1, 3)
    never = ScriptedVerifier(0.0)  # what is committed is the model's own nevertheless
    decoder = SelfSpeculativeDecoder(model, EXITS, policy=policy, verifier=never, fallback_rounds=5)
    out = decoder.generate(ids, **settings)
    assert torch.equal(out.sequences, model.generate(ids, do_sample=False, **settings))
    exits = [r.exit for r in out.stats.log if r.row == 0]
    below = next(n for n in range(99) if 0.7 * 0.8**n < 0.1)  # after so many rounds
    assert exits == [1] * (below + 4) + [4] * (40 - below - 4)
    assert decoder.generate(ids, **settings).stats.log == out.stats.log  # a new call tries anew
    stubborn = SelfSpeculativeDecoder(model, EXITS, policy=policy, verifier=never)
    assert all(r.exit == 1 for r in stubborn.generate(ids, **settings).stats.log[:-3])
    with pytest.raises(ValueError, match="at least 1"):
        SelfSpeculativeDecoder(model, EXITS, fallback_rounds=0)


@pytest.mark.smoke
def test_custom_generate_leaves_the_model_as_it_was() -> None:
    model = tiny_model().train()
    before = copy.deepcopy(model.config.to_dict()), [id(x) for x in model.model.layers]
    ids, _ = prompts(1)
    loop = lede.custom_generate(StaticPolicy(2, 3))
    found = model.generate(ids, max_new_tokens=9, do_sample=False, custom_generate=loop)
    assert model.training
    assert torch.equal(found, model.eval().generate(ids, max_new_tokens=9, do_sample=False))
    out = model.generate(ids, max_new_tokens=9, custom_generate=loop, return_dict_in_generate=True)
    assert torch.equal(out.sequences, found)
    assert out["stats"].tokens == 9
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight.fill_(torch.nan)
    model.train()
    with pytest.raises(RuntimeError, match="NaN logits after the last layer"):
        model.generate(ids, max_new_tokens=9, do_sample=False, custom_generate=loop)
    assert model.training
    assert before == (model.config.to_dict(), [id(x) for x in model.model.layers])
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(torch.nan)
    decoder = SelfSpeculativeDecoder(model, (2,), policy=lede.ConfidencePolicy(2, 0.5))
    with pytest.raises(RuntimeError, match="NaN logits at the exit after layer 2"):
        decoder.generate(ids, max_new_tokens=9)


def test_each_layer_runs_as_often_as_the_round_says() -> None:
    model = tiny_model()
    calls = [0] * 4
    head: list[int] = []
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    model.lm_head.register_forward_hook(lambda m, a, o: head.append(a[0].shape[1]))
    ids, _ = prompts(1)
    decoder = SelfSpeculativeDecoder(model, (2,), policy=StaticPolicy(2, 3))
    log = decoder.generate(ids, max_new_tokens=20, do_sample=False).stats.log
    early = sum(r.passes for r in log)
    assert calls == [early + 1] * 2 + [len(log) + 1] * 2  # one more of all: the prompt
    drafts = sum(r.passes - 1 for r in log)
    assert sum(head) == drafts + early  # one per draft, k per verification, none on the prompt
    assert len(head) == drafts + len(log)


@pytest.mark.parametrize("name", ["static", "q", "del"])
def test_cache_equals_a_fresh_prefill_after_every_round(name: str) -> None:
    model = tiny_model("qwen3", dtype=torch.float64)
    ids, mask = prompts()
    decoder = SelfSpeculativeDecoder(model, EXITS, max_draft=5)
    padding = (1 - mask).sum(1).numpy()
    with torch.no_grad():
        rounds = Rounds(decoder.runner, POLICIES[name](), EXITS, 5, ids, padding, 30)
        while not rounds.done.all():
            rounds.step()
            for row in range(3):
                n, pad = int(rounds.n[row]), int(padding[row])
                text = torch.from_numpy(rounds.tokens[row : row + 1, pad : n - 1])
                fresh = RaggedCache(4, n)
                frame = decoder.runner.frame(np.array([0]), n - 1 - pad, np.array([0]), fresh)
                decoder.runner.run(decoder.runner.embed(text), 0, 4, frame, fresh)
                for kind in ("keys", "values"):
                    for ours, theirs in zip(
                        getattr(rounds.cache, kind), getattr(fresh, kind), strict=True
                    ):
                        torch.testing.assert_close(
                            ours[row, :, pad : n - 1],
                            theirs[0, :, : n - 1 - pad],
                            rtol=1e-12,
                            atol=1e-12,
                        )


def test_ranges_of_layers_compose_to_the_model() -> None:
    model = tiny_model("gemma3_text", dtype=torch.float64)
    ids, _ = prompts(2)
    runner = lede.adapters.layer_runner(model)
    cache = RaggedCache(4, 9)
    frame = runner.frame(np.zeros(2, dtype=np.int64), 9, np.zeros(2, dtype=np.int64), cache)
    with torch.no_grad():
        hidden = runner.run(runner.embed(ids), 0, 2, frame, cache)
        logits = runner.shape_logits(
            model.lm_head(model.model.norm(runner.run(hidden, 2, 4, frame, cache)))
        )
        torch.testing.assert_close(logits, model(ids).logits, rtol=1e-12, atol=1e-12)


def test_half_precision_differs_only_at_near_ties() -> None:
    model = tiny_model(dtype=torch.bfloat16)
    ids, _ = prompts(1)
    expected = model.generate(ids, max_new_tokens=30, do_sample=False)[0]
    decoder = SelfSpeculativeDecoder(model, EXITS, policy=StaticPolicy(2, 3))
    found = decoder.generate(ids, max_new_tokens=30, do_sample=False).sequences[0]
    differ = (found != expected).nonzero()
    if len(differ):
        at = int(differ[0])
        with torch.no_grad():
            top = model(expected[None, :at]).logits[0, -1].float().topk(2).values
        assert top[0] - top[1] < 1e-2 * top[0].abs()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exit_layers": (0, 2)}, "accepted: one or more of 1 to 3"),
        ({"exit_layers": (2, 4)}, "accepted: one or more of 1 to 3"),
        ({"exit_layers": ()}, "accepted: one or more of 1 to 3"),
        ({"exit_layers": (2, 1)}, "must rise without repeating"),
        ({"exit_layers": (2, 2)}, "must rise without repeating"),
        ({"exit_layers": (2,), "max_draft": 0}, "at least 1"),
        ({"exit_layers": (2,), "cache": "paged"}, "accepted: dynamic, static"),
    ],
)
def test_bad_settings(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelfSpeculativeDecoder(tiny_model(), **change)


def test_bad_calls() -> None:
    model = tiny_model()
    ids, mask = prompts()
    decoder = SelfSpeculativeDecoder(model, EXITS, policy=StaticPolicy(2, 3))
    for settings, error, message in (
        ({"num_beams": 2}, ValueError, "beam_search"),
        ({"use_cache": False}, ValueError, "use_cache=False"),
        ({"attention_mask": mask.flip(1)}, ValueError, "pad at the left"),
        ({"output_scores": True}, NotImplementedError, "output_scores"),
        ({"output_hidden_states": True}, NotImplementedError, "output_hidden_states"),
    ):
        with pytest.raises(error, match=message):
            decoder.generate(ids, max_new_tokens=4, pad_token_id=0, **settings)
    with pytest.raises(ValueError, match="at least one token"):
        decoder.generate(ids[:, :0], max_new_tokens=4)
    with pytest.raises(ValueError, match="one sequence at a time"):
        decoder.generate(ids, max_new_tokens=4, streamer=_Null(), pad_token_id=0)
    with pytest.raises(ValueError, match="not among the decoder's exit_layers"):
        SelfSpeculativeDecoder(model, (1,), policy=StaticPolicy(3, 3)).generate(
            ids[:1], max_new_tokens=4
        )
    with pytest.raises(ValueError, match="names no exits"):
        lede.custom_generate(lede.AutoregressivePolicy())
    with pytest.raises(lede.PolicyMismatchError, match="trained for exits"):
        SelfSpeculativeDecoder(model, (1, 2), policy=q_policy(), max_draft=5).generate(
            ids[:1], max_new_tokens=4
        )


class _Null:
    def put(self, value: torch.Tensor) -> None:
        """Forget it."""

    def end(self) -> None:
        """Nothing to end."""


def test_unsupported_models_are_refused_by_name() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=16)
    with pytest.raises(lede.UnsupportedModelError, match=r"GPT2LMHeadModel.*supported: gemma2"):
        SelfSpeculativeDecoder(GPT2LMHeadModel(config), (1,))
    model = tiny_model()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(lede.UnsupportedModelError, match="accepted: sdpa, eager"):
        SelfSpeculativeDecoder(model, (1,))


def test_return_sequences_are_expanded_and_training_mode_is_kept() -> None:
    model = tiny_model()
    ids, _ = prompts(2)
    decoder = SelfSpeculativeDecoder(model, EXITS, policy=StaticPolicy(2, 3))
    out = decoder.generate(
        ids, max_new_tokens=5, do_sample=True, num_return_sequences=2, pad_token_id=0
    )
    assert out.sequences.shape == (4, 14)
    assert torch.equal(out.sequences[::2, :9], ids)


def test_assistant_early_exit_gives_the_same_tokens_with_more_work() -> None:
    """Positions times layers: theirs runs the early layers again when it verifies."""
    model = tiny_model("llama")
    ids, _ = prompts(1)
    work = [0]
    for layer in model.model.layers:
        layer.register_forward_hook(lambda m, a, o: work.__setitem__(0, work[0] + a[0].shape[1]))
    model.generation_config.num_assistant_tokens = 4
    model.generation_config.num_assistant_tokens_schedule = "constant"
    model.generation_config.assistant_confidence_threshold = 0.0
    theirs = model.generate(ids, max_new_tokens=24, do_sample=False, assistant_early_exit=2)
    their_work, work[0] = work[0], 0
    decoder = SelfSpeculativeDecoder(model, (2,), policy=StaticPolicy(2, 4))
    ours = decoder.generate(ids, max_new_tokens=24, do_sample=False).sequences
    assert torch.equal(ours, theirs)
    assert work[0] < 0.9 * their_work


@pytest.mark.parametrize("kind", ["hooks", "offload"])
def test_models_spread_over_devices(kind: str, tmp_path: Path) -> None:
    """Accelerate's hooks around every part, as a device map makes them; and weights on disk."""
    from accelerate import disk_offload, dispatch_model

    model = tiny_model()
    ids, mask = prompts()
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, attention_mask=mask, **settings)
    if kind == "hooks":
        parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
        parts += [f"model.layers.{i}" for i in range(4)]
        model = dispatch_model(model, dict.fromkeys(parts, "cpu"), force_hooks=True)
    else:
        model = disk_offload(model, tmp_path, execution_device="cpu")
        assert model.model.layers[2].mlp.up_proj.weight.device.type == "meta"
    decoder = SelfSpeculativeDecoder(
        model, EXITS, policy=POLICIES["confidence_exit"](), max_draft=5
    )
    found = decoder.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(found.sequences, expected)
    assert found.stats.drafted > 0


@pytest.mark.cuda
def test_on_a_gpu_in_half_precision() -> None:
    model = tiny_model(dtype=torch.float32).cuda()
    ids = prompts(1)[0].cuda()
    expected = model.generate(ids, max_new_tokens=20, do_sample=False)
    decoder = SelfSpeculativeDecoder(model, EXITS, policy=q_policy(), max_draft=5)
    assert torch.equal(decoder.generate(ids, max_new_tokens=20).sequences, expected)
    half = SelfSpeculativeDecoder(model.half(), EXITS, policy=q_policy(), max_draft=5)
    assert half.generate(ids, max_new_tokens=20).sequences.shape == (1, 29)

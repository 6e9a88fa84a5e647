"""Compiled segments over a static cache: the eager tokens, and a bounded number of graphs."""

from collections.abc import Iterator
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

import lede
from lede import SelfSpeculativeDecoder, StaticPolicy
from lede.testing import tiny_model

EXITS, LONGEST = (1, 2), 3


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Nothing compiled before; no checks of shapes at run time, which no graph can hold."""
    torch._dynamo.reset()
    counters.clear()
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
    torch._dynamo.reset()


def q_policy() -> lede.QPolicy:
    generator = np.random.default_rng(3)
    shapes = {"w1": (13, 8), "b1": 8, "w2": (8, 8), "b2": 8, "w3": (8, 8), "b3": 8}
    weights = {k: generator.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    return lede.QPolicy(weights, EXITS, 3, LONGEST)


def same(model: Any, decoder: SelfSpeculativeDecoder, ids: torch.Tensor, **settings: Any) -> Any:
    common = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    policy = settings.pop("policy")
    expected = model.generate(ids, **common, **settings)
    out = decoder.generate(ids, policy=policy, **common, **settings)
    assert torch.equal(out.sequences, expected)
    return out.stats


def test_tokens_are_the_eager_ones_and_graphs_are_bounded() -> None:
    model = tiny_model(layers=3)
    decoder = SelfSpeculativeDecoder(model, EXITS, max_draft=LONGEST, compile="eager")
    compiled = decoder.compiled
    assert compiled is not None
    assert compiled.buckets == (1, 2, 4)
    compiled.warm_up(1, 40)
    m, b = len(EXITS), len(compiled.buckets)
    assert compiled.graphs == counters["stats"]["unique_graphs"] == m + m * b + 1 + b
    ids = torch.randint(1, 64, (1, 20), generator=torch.Generator().manual_seed(1))
    policies = (
        StaticPolicy(1, 3),
        StaticPolicy(2, 2),
        q_policy(),
        lede.ConfidenceExitPolicy(0.5, 0.2),
        lede.AutoregressivePolicy(),
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for policy in policies:
            for width in (1, 20):
                stats = same(model, decoder, ids[:, :width], policy=policy)
                assert policy.autoregressive or stats.drafted > 0
        # What a broken call left in the cache is not seen by the next.
        weight = model.model.layers[0].mlp.down_proj.weight
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.fill_(torch.nan)
        with pytest.raises(RuntimeError, match="NaN logits"):
            decoder.generate(ids, policy=StaticPolicy(2, 2), max_new_tokens=4)
        with torch.no_grad():
            weight.copy_(kept)
        same(model, decoder, ids[:, :5], policy=StaticPolicy(2, 2))
    assert compiled.graphs == counters["stats"]["unique_graphs"] == m + m * b + 1 + b


def test_ragged_batches_windows_and_eager_attention() -> None:
    """Gemma 3: two kinds of layers with their own rotary angles, masks added to the scores."""
    model = tiny_model("gemma3_text", layers=2, attn_implementation="eager")
    decoder = SelfSpeculativeDecoder(model, (1,), max_draft=2, compile="eager")
    ids = torch.randint(1, 64, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :4] = mask[2, :2] = 0
    stats = same(model, decoder, ids, attention_mask=mask, policy=StaticPolicy(1, 2))
    assert stats.accepted > 0
    assert decoder.compiled is not None
    assert decoder.compiled.graphs <= 8


def test_a_longer_call_makes_a_larger_cache_and_custom_generate_keeps_the_graphs() -> None:
    model = tiny_model(layers=2)
    loop = lede.custom_generate(StaticPolicy(1, 2), max_draft=2, compile="eager")
    ids = torch.randint(1, 64, (1, 4), generator=torch.Generator().manual_seed(1))
    made = []
    for new in (6, 6, 80):
        settings = {"max_new_tokens": new, "do_sample": False}
        found = model.generate(ids, custom_generate=loop, **settings)
        assert torch.equal(found, model.generate(ids, **settings))
        made.append(counters["stats"]["unique_graphs"])
    assert made[0] == made[1] < made[2]


def test_a_changed_model_is_compiled_anew() -> None:
    """Calls do not look at the model; each generation does: at weights, hooks, dtype, autocast."""
    model = tiny_model(layers=2)
    decoder = SelfSpeculativeDecoder(model, (1,), max_draft=2, compile="eager")
    ids = torch.randint(1, 64, (1, 4), generator=torch.Generator().manual_seed(1))
    policy = StaticPolicy(1, 2)

    def tokens() -> list[int]:
        same(model, decoder, ids, policy=policy)
        found = decoder.generate(ids, policy=policy, max_new_tokens=12, pad_token_id=0)
        assert decoder.compiled is not None
        made.append(decoder.compiled.graphs)
        return found.sequences[0].tolist()

    made: list[int] = []
    mlp = model.model.layers[1].mlp
    seen = [tokens(), tokens()]
    assert seen[0] == seen[1]
    before = counters["stats"]["unique_graphs"]
    mlp.down_proj.weight = torch.nn.Parameter(-mlp.down_proj.weight.detach())
    seen.append(tokens())
    assert counters["stats"]["unique_graphs"] > before
    handle = mlp.register_forward_hook(lambda module, given, out: -out)
    seen.append(tokens())
    assert seen[3] == seen[0] != seen[2]
    handle.remove()
    assert tokens() == seen[2]
    model.double()
    tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = counters["stats"]["unique_graphs"]
        decoder.generate(ids, policy=policy, max_new_tokens=3, pad_token_id=0)
        assert counters["stats"]["unique_graphs"] > before
    assert max(made) <= 8


def test_refusals() -> None:
    from accelerate import dispatch_model

    with pytest.raises(ValueError, match=r"compile='fast'; accepted: True, False, .*inductor"):
        SelfSpeculativeDecoder(tiny_model(), (1,), compile="fast")
    names = ["model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head"]
    spread = dispatch_model(tiny_model(), dict.fromkeys(names, "cpu"), force_hooks=True)
    with pytest.raises(ValueError, match="the whole model on one device"):
        SelfSpeculativeDecoder(spread, (1,), compile=True)


@pytest.mark.cuda
def test_cuda_graphs_give_the_eager_tokens() -> None:
    model = tiny_model(layers=3).cuda()
    decoder = SelfSpeculativeDecoder(model, EXITS, max_draft=LONGEST, compile=True)
    ids = torch.randint(1, 64, (1, 9), generator=torch.Generator().manual_seed(1)).cuda()
    for policy in (StaticPolicy(2, 3), q_policy(), lede.AutoregressivePolicy()):
        for _ in range(3):  # warm-up, recording, replay
            same(model, decoder, ids, policy=policy)

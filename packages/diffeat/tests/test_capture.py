"""Captured tensors are those of the model, and the model is as before afterwards."""

import sys
import threading
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor
from torch import nn
from torch.nn import functional as F

from diffeat import MapTooLarge, Recorder, capture, find_activation, list_activations
from shared_core.errors import InputError

ALL = ["up-*", "down-*", "mid-*", "unet-*"]


def state(model: nn.Module) -> list[Any]:
    return [
        (len(m._forward_hooks), len(m._forward_pre_hooks), getattr(m, "processor", None))
        for m in model.modules()
    ]


@pytest.mark.smoke
@torch.no_grad()
def test_stopping_changes_nothing(sd15: nn.Module, call: dict[str, Any]) -> None:
    plain = sd15(**call).sample
    with capture(sd15, ALL, stop=False) as full:
        out = sd15(**call).sample
    assert torch.equal(out, plain)
    assert torch.equal(full.features["unet-out"], plain)
    assert len(full.features) == 165
    ran = []
    late = sd15.up_blocks[3].register_forward_hook(lambda *a: ran.append(1))
    names = ["up-level1-repeat1-vit-block0-cross-q", "up-level2-repeat0-res-increment"]
    with capture(sd15, names) as part:
        sd15(**call)
    late.remove()
    assert not ran
    for name in names:
        assert torch.equal(part.features[name], full.features[name])
        assert part.features[name].is_contiguous()


@torch.no_grad()
def test_identities_between_activations(sd15: nn.Module, call: dict[str, Any]) -> None:
    p = "up-level1-repeat1"
    block = sd15.up_blocks[1].attentions[1].transformer_blocks[0]
    resnet = sd15.up_blocks[1].resnets[1]
    names = [f"{p}-{s}" for s in ("res-in", "res-increment", "res-out", "vit-in", "vit-out")] + [
        f"{p}-vit-block0-{s}"
        for s in ("self-out", "cross-q", "cross-out", "ffn-inner", "ffn-out", "out")
    ]
    with capture(sd15, [*names, "module:up_blocks.1.attentions.1.proj_in"], stop=False) as cap:
        sd15(**call)
    f = cap.features
    shortcut = resnet.conv_shortcut(f[f"{p}-res-in"])
    expected = (shortcut + f[f"{p}-res-increment"]) / resnet.output_scale_factor
    assert torch.equal(f[f"{p}-res-out"], expected)
    first = f["module:up_blocks.1.attentions.1.proj_in"]
    h1 = first + f[f"{p}-vit-block0-self-out"]
    h2 = h1 + f[f"{p}-vit-block0-cross-out"]
    torch.testing.assert_close(f[f"{p}-vit-block0-out"], h2 + f[f"{p}-vit-block0-ffn-out"])
    tokens = h1.flatten(2).transpose(1, 2)
    q = block.attn2.to_q(block.norm2(tokens)).transpose(1, 2).unflatten(2, h1.shape[-2:])
    torch.testing.assert_close(f[f"{p}-vit-block0-cross-q"], q)
    out = sd15.up_blocks[1].attentions[1].proj_out(f[f"{p}-vit-block0-out"])
    torch.testing.assert_close(f[f"{p}-vit-out"] - f[f"{p}-vit-in"], out, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("processor", [None, AttnProcessor()])
def test_maps(tiny: Any, call: dict[str, Any], processor: Any) -> None:
    model = tiny("sd15")
    if processor is not None:
        model.set_attn_processor(processor)
    p = "up-level2-repeat1-vit-block0"
    plain = model(**call).sample
    other = model.up_blocks[1].attentions[0].transformer_blocks[0].attn2
    names = [f"{p}-{s}" for s in ("self-map", "cross-map", "cross-q", "cross-k", "cross-v")]
    with capture(model, [*names, f"{p}-cross-out"], stop=False, heads="keep") as cap:
        assert type(other.processor).__name__ in ("AttnProcessor2_0", "AttnProcessor")
        assert torch.equal(model(**call).sample, plain)
    f = cap.features
    attn = model.up_blocks[2].attentions[1].transformer_blocks[0].attn2
    assert f[f"{p}-cross-k"].shape == (2, 16, 1, 5)
    heads, size = attn.heads, f[f"{p}-cross-q"].shape[-2:]
    q, k, v = (f[f"{p}-cross-{s}"].flatten(2).unflatten(1, (heads, -1)) for s in "qkv")
    scores = torch.einsum("bhcn,bhcl->bhnl", q.double(), k.double()) / q.shape[2] ** 0.5
    probabilities = scores.softmax(-1)
    got = f[f"{p}-cross-map"].unflatten(1, (heads, 5))
    expected = probabilities.transpose(2, 3).unflatten(3, size)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-4)
    joined = torch.einsum("bhnl,bhcl->bnhc", probabilities, v.double()).flatten(2).float()
    out = attn.to_out[0](joined).transpose(1, 2).unflatten(2, size)
    torch.testing.assert_close(f[f"{p}-cross-out"], out, atol=1e-5, rtol=1e-4)
    with capture(model, [f"{p}-cross-map", f"{p}-self-map"]) as mean:
        model(**call)
    torch.testing.assert_close(mean.features[f"{p}-cross-map"], got.mean(1))
    assert mean.features[f"{p}-self-map"].shape == (2, size[0] * size[1], *size)
    for value in mean.features.values():
        torch.testing.assert_close(value.sum(1), torch.ones_like(value[:, 0]))


@torch.no_grad()
def test_attn_joins_the_cross_attention_of_the_up_stage(sd15: nn.Module, call: Any) -> None:
    sources = ["up-level1-*-cross-map", "up-level2-*-cross-map"]
    with capture(sd15, [*sources, "attn"]) as cap:
        sd15(**call)
    by_level = [
        torch.stack([v for n, v in cap.features.items() if n.startswith(f"up-level{i}")]).mean(0)
        for i in (1, 2)
    ]
    expected = torch.cat([F.interpolate(m, size=(16, 24)) for m in by_level], 1)
    torch.testing.assert_close(cap.features["attn"], expected)


@torch.no_grad()
def test_tokens_lie_row_by_row(sd15: nn.Module, call: dict[str, Any]) -> None:
    name = "down-level0-repeat0-vit-block0-out"
    block = sd15.down_blocks[0].attentions[0].transformer_blocks[0]

    def mark(module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(out)
        out[:, 3 * 24 + 7] = 1.0
        return out

    handle = block.register_forward_hook(mark)
    try:
        with capture(sd15, [name]) as cap:
            sd15(**call)
    finally:
        handle.remove()
    assert cap.features[name].shape[-2:] == (16, 24)
    assert cap.features[name][0, 0].nonzero().tolist() == [[3, 7]]


def test_everything_is_restored(sd15: nn.Module, call: dict[str, Any]) -> None:
    before = state(sd15)
    names = ["up-level1-repeat0-vit-block0-cross-map", "unet-out"]
    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error), capture(sd15, names):
            raise error
        assert state(sd15) == before
    with pytest.raises(Exception), capture(sd15, names):  # noqa: B017,PT011 - the model's own error
        sd15(torch.zeros(1, 3, 8, 8), 1, torch.zeros(1, 5, 8))
    assert state(sd15) == before
    with torch.no_grad(), capture(sd15, names):
        assert state(sd15) != before
        sd15(**call)
    assert state(sd15) == before


@torch.no_grad()
def test_nested_captures_stop_their_own(sd15: nn.Module, call: dict[str, Any]) -> None:
    reached = []
    with capture(sd15, ["unet-out"], stop=False) as outer:
        with capture(sd15, ["mid-vit-out"]) as inner:
            sd15(**call)
            reached.append("after inner")
        reached.append("outer goes on")
        sd15(**call)
    assert reached == ["outer goes on"]
    assert "mid-vit-out" in inner.features
    assert "unet-out" in outer.features
    with capture(sd15, ["mid-vit-out"]) as first:
        with capture(sd15, ["unet-out"]):
            sd15(**call)
        raise AssertionError("the outer capture had all it wanted")
    assert torch.equal(first.features["mid-vit-out"], inner.features["mid-vit-out"])


def test_threads_see_their_own_calls(sd15: nn.Module, call: dict[str, Any]) -> None:
    found = {}
    gate = threading.Barrier(2)

    def work(key: int) -> None:
        sample = call["sample"] + key
        with torch.no_grad(), capture(sd15, ["up-level1-upsampler-out"]) as cap:
            gate.wait()
            sd15(**{**call, "sample": sample})
        found[key] = cap.features["up-level1-upsampler-out"]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for key in range(2):
        with torch.no_grad(), capture(sd15, ["up-level1-upsampler-out"]) as cap:
            sd15(**{**call, "sample": call["sample"] + key})
        torch.testing.assert_close(found[key], cap.features["up-level1-upsampler-out"])


def test_gradients_flow(tiny: Any, call: dict[str, Any]) -> None:
    model = tiny("sd15").double()
    given = {k: v.double() if v.is_floating_point() else v for k, v in call.items()}
    x = given["sample"].requires_grad_()

    def value(sample: torch.Tensor) -> torch.Tensor:
        with capture(model, ["mid-vit-out"], detach=False) as cap:
            model(**{**given, "sample": sample})
        return cap.features["mid-vit-out"].pow(2).sum()

    value(x).backward()
    direction = torch.randn_like(x)
    step = 1e-5
    with torch.no_grad():
        slope = (value(x + step * direction) - value(x - step * direction)) / (2 * step)
    torch.testing.assert_close((x.grad * direction).sum(), slope, rtol=1e-5, atol=1e-8)
    assert model.down_blocks[0].resnets[0].conv1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@torch.no_grad()
def test_half_precision(tiny: Any, call: dict[str, Any], dtype: torch.dtype, name: str) -> None:
    layers = f"{name}-practical"
    model = tiny(name)
    if name == "sdxl":
        ids = torch.tensor([[128.0, 128, 0, 0, 128, 128]]).repeat(2, 1)
        added = {"text_embeds": torch.randn(2, 8), "time_ids": ids}
        call = {**call, "added_cond_kwargs": added}
    with capture(model, layers) as full:
        model(**call)
    model = model.to(dtype)
    half = {k: v.to(dtype) if k != "timestep" and k != "added_cond_kwargs" else v
            for k, v in call.items()}  # fmt: skip
    if name == "sdxl":
        half["added_cond_kwargs"] = {k: v.to(dtype) for k, v in call["added_cond_kwargs"].items()}
    with capture(model, layers, dtype=torch.float32) as cap:
        model(**half)
    assert len(cap.features) == 4
    for key, b in full.features.items():
        a = cap.features[key]
        assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.999
        # Bfloat16 rounds to 2^-9; through the 70 blocks of SDXL's layout that adds up to 2.1 %.
        limit = 3e-2 if (name, dtype) == ("sdxl", torch.bfloat16) else 2e-2
        assert (a - b).norm() / b.norm() < limit


@pytest.mark.usefixtures("without_type_checks")
@torch.no_grad()
def test_recorder_keeps_chosen_steps(sd15: nn.Module, call: dict[str, Any]) -> None:
    with Recorder(sd15, ["mid-vit-out"], steps=[0, 2], cfg="cond") as record:
        for i in range(3):
            sd15(**{**call, "sample": call["sample"] + i})
    assert list(record.features) == [0, 2]
    with capture(sd15, ["mid-vit-out"]) as cap:
        sd15(**{**call, "sample": call["sample"] + 2})
    assert torch.equal(record.features[2]["mid-vit-out"], cap.features["mid-vit-out"][1:])
    with pytest.raises(InputError, match="cfg"):
        Recorder(sd15, ["mid-vit-out"], cfg="half")


def test_activation_checkpointing_fires_hooks_once(tiny: Any, call: dict[str, Any]) -> None:
    model = tiny("sd15").train()
    model.enable_gradient_checkpointing()
    with capture(
        model, ["mid-vit-out", "up-level1-repeat0-res-out"], stop=False, detach=False
    ) as c:
        model(**call).sample.sum().backward()
    model.disable_gradient_checkpointing()
    with torch.no_grad(), capture(model, ["mid-vit-out"]) as plain:
        model(**call)
    torch.testing.assert_close(c.features["mid-vit-out"], plain.features["mid-vit-out"])


def test_errors(tiny: Any, call: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("sd15")
    name = "mid-vit-block0-self-map"
    monkeypatch.setattr(sys.modules["diffeat.capture"], "LIMIT", 10)
    with pytest.raises(MapTooLarge, match="allow_large"), capture(model, [name]):
        model(**call)
    with torch.no_grad(), capture(model, [name], allow_large=True) as cap:
        model(**call)
    assert name in cap.features
    model.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(SlicedAttnProcessor(1))
    large = capture(model, [name], allow_large=True)
    with pytest.raises(NotImplementedError, match="Sliced"), torch.no_grad(), large:
        model(**call)
    model = tiny("sd15")
    model.fuse_qkv_projections()
    with pytest.raises(InputError, match="unfuse"):
        capture(model, ["mid-vit-block0-self-q"])
    with pytest.raises(InputError, match="compiled"):
        capture(torch.compile(tiny("sd15")), ["unet-in"])
    with pytest.raises(InputError, match="heads"):
        capture(model, ["unet-in"], heads="max")
    with pytest.raises(InputError, match="vae-out"):
        capture(model, ["vae-out"])
    skipped = tiny("sd15")
    skipped.mid_block = None
    assert not [i for i in list_activations(skipped) if i.stage == "mid"]
    with pytest.raises(KeyError):
        find_activation(skipped, "mid-vit-out")

"""Values, names and order against the authors' extraction, restated as a forward of its own.

`Official` walks through a U-Net as the authors' changed copies of diffusers do and stores each
tensor at the point where they store it: increments before the residual is added, queries, keys and
values before the heads are split, maps after the softmax. It calls no module of the model; it only
reads weights, and nothing of the package.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, PNDMScheduler
from torch import Tensor
from torch.nn import functional as F

from diffeat import FeatureExtractor, PromptEmbedding, Selection, capture

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


class Official:
    """One forward of a text-conditional U-Net; `store` holds every activation by its name."""

    def __init__(self, unet: Any) -> None:
        self.unet, self.store = unet, {}

    def __call__(
        self, x: Tensor, t: float, text: Tensor, pooled: Tensor | None = None, ids: Any = None
    ) -> Tensor:
        unet = self.unet
        self.store, self.text = {"unet-in": x}, text
        embedded = self.mlp(unet.time_embedding, self.sinusoid(torch.tensor([t]), unet.conv_in))
        if pooled is not None:
            width = unet.config.addition_time_embed_dim
            times = self.sinusoid(ids.flatten(), width=width).view(len(x), -1)
            embedded = embedded + self.mlp(unet.add_embedding, torch.cat([pooled, times], 1))
        self.time = F.silu(embedded)
        x = self.store["unet-after-conv-in"] = self.conv(unet.conv_in, x)
        skips = [x]
        for level, block in enumerate(unet.down_blocks):
            for r, resnet in enumerate(block.resnets):
                x = self.stage(f"down-level{level}-repeat{r}", block, r, resnet, x)
                skips.append(x)
            for module in block.downsamplers or []:
                x = self.conv(module.conv, x, stride=2)
                self.store[f"down-level{level}-downsampler-out"] = x
                skips.append(x)
        mid = unet.mid_block
        x = self.resnet("mid-repeat0", mid.resnets[0], x)
        x = self.vit("mid-vit", mid.attentions[0], x)
        x = self.resnet("mid-repeat1", mid.resnets[1], x)
        for level, block in enumerate(unet.up_blocks):
            for r, resnet in enumerate(block.resnets):
                x = torch.cat([x, skips.pop()], 1)
                x = self.stage(f"up-level{level}-repeat{r}", block, r, resnet, x)
            for module in block.upsamplers or []:
                x = self.conv(module.conv, F.interpolate(x, scale_factor=2.0, mode="nearest"))
                self.store[f"up-level{level}-upsampler-out"] = x
        x = self.conv(unet.conv_out, F.silu(self.group(unet.conv_norm_out, x)))
        self.store["unet-out"] = x
        return x

    def sinusoid(self, t: Tensor, like: Any = None, width: int = 0) -> Tensor:
        width = width or like.weight.shape[0]
        rates = [math.exp(-math.log(10000) * i / (width // 2)) for i in range(width // 2)]
        angles = t.float()[:, None] * torch.tensor(rates)
        return torch.cat([angles.cos(), angles.sin()], 1)

    def linear(self, layer: Any, x: Tensor) -> Tensor:
        return F.linear(x, layer.weight, layer.bias)

    def conv(self, layer: Any, x: Tensor, stride: int = 1) -> Tensor:
        return F.conv2d(x, layer.weight, layer.bias, stride, padding=layer.weight.shape[-1] // 2)

    def group(self, layer: Any, x: Tensor) -> Tensor:
        return F.group_norm(x, layer.num_groups, layer.weight, layer.bias, layer.eps)

    def layer(self, layer: Any, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias, layer.eps)

    def mlp(self, layer: Any, x: Tensor) -> Tensor:
        return self.linear(layer.linear_2, F.silu(self.linear(layer.linear_1, x)))

    def stage(self, name: str, block: Any, r: int, resnet: Any, x: Tensor) -> Tensor:
        x = self.resnet(name, resnet, x)
        return (
            self.vit(f"{name}-vit", block.attentions[r], x) if hasattr(block, "attentions") else x
        )

    def resnet(self, name: str, m: Any, x: Tensor) -> Tensor:
        h = self.conv(m.conv1, F.silu(self.group(m.norm1, x)))
        h = h + self.linear(m.time_emb_proj, self.time)[:, :, None, None]
        h = self.conv(m.conv2, F.silu(self.group(m.norm2, h)))
        self.store[f"{name}-res-increment"] = h
        x = x if m.conv_shortcut is None else self.conv(m.conv_shortcut, x)
        out = self.store[f"{name}-res-out"] = (x + h) / m.output_scale_factor
        return out

    def vit(self, name: str, m: Any, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        h = self.group(m.norm, x)
        if m.proj_in.weight.ndim == 4:
            h = self.conv(m.proj_in, h).flatten(2).transpose(1, 2)
        else:
            h = self.linear(m.proj_in, h.flatten(2).transpose(1, 2))
        for i, block in enumerate(m.transformer_blocks):
            h = self.block(f"{name}-block{i}", block, h)
        if m.proj_out.weight.ndim == 4:
            h = self.conv(m.proj_out, h.transpose(1, 2).unflatten(2, size))
        else:
            h = self.linear(m.proj_out, h).transpose(1, 2).unflatten(2, size)
        out = self.store[f"{name}-out"] = x + h
        return out

    def block(self, name: str, m: Any, h: Tensor) -> Tensor:
        inside = self.layer(m.norm1, h)
        h = h + self.attention(f"{name}-self", m.attn1, inside, inside, "qkv")
        h = h + self.attention(f"{name}-cross", m.attn2, self.layer(m.norm2, h), self.text, "q")
        value, gate = self.linear(m.ff.net[0].proj, self.layer(m.norm3, h)).chunk(2, -1)
        inner = self.store[f"{name}-ffn-inner"] = value * F.gelu(gate)
        out = self.store[f"{name}-out"] = h + self.linear(m.ff.net[2], inner)
        return out

    def attention(self, name: str, m: Any, x: Tensor, context: Tensor, kept: str) -> Tensor:
        parts = {"q": self.linear(m.to_q, x), "k": self.linear(m.to_k, context)}
        parts["v"] = self.linear(m.to_v, context)
        for letter in kept:
            self.store[f"{name}-{letter}"] = parts[letter]
        q, k, v = (p.unflatten(-1, (m.heads, -1)).transpose(1, 2) for p in parts.values())
        maps = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        self.store[f"{name}-map"] = maps
        return self.linear(m.to_out[0], (maps @ v).transpose(1, 2).flatten(2))


def spatial(value: Tensor, size: torch.Size) -> Tensor:
    """As the authors turn stored tokens into maps; stored attention is averaged over heads."""
    if value.ndim == 4 and value.shape[-2:] != size and value.shape[2] == size.numel():
        value = value.mean(1)
    if value.ndim == 3:
        value = value.transpose(1, 2).unflatten(2, size)
    return value


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.smoke
@pytest.mark.parametrize(("name", "plain", "maps"), [("sd15", 165, 197), ("sdxl", 472, 612)])
@torch.no_grad()
def test_every_activation_is_the_authors(
    name: str, plain: int, maps: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    unet = request.getfixturevalue(name)
    official = Official(unet)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 4, 16, 16, generator=generator)
    text = torch.randn(2, 7, 8, generator=generator)
    conditions: dict[str, Any] = {}
    pooled, ids = None, None
    if name == "sdxl":
        pooled = torch.randn(2, 8, generator=generator)
        ids = torch.tensor([[128.0, 128, 0, 0, 128, 128]]).repeat(2, 1)
        conditions = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}
    out = official(x, 50, text, pooled, ids)
    assert distance(unet(x, 50, text, **conditions).sample, out) < 1e-5
    names = list(official.store)
    assert len(names) == maps
    assert len([n for n in names if not n.endswith("-map")]) == plain
    # A published list is a JSON object of names and booleans.
    file = tmp_path / "published.json"
    file.write_text(json.dumps(dict.fromkeys(sorted(names), True)))
    assert Selection.parse(str(file)).resolve(unet) == tuple(names)
    with capture(unet, file, stop=False) as cap:
        unet(x, 50, text, **conditions)
    assert list(cap.features) == names
    worst = {}
    for key, value in cap.features.items():
        expected = spatial(official.store[key], value.shape[-2:])
        assert value.shape == expected.shape, key
        worst[key] = distance(value, expected)
    key = max(worst, key=worst.__getitem__)
    assert worst[key] <= 1e-4, (key, worst[key])


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("kind", ["pndm", "euler"])
@torch.no_grad()
def test_the_whole_call_is_the_authors(sd15: Any, kind: str) -> None:
    """Image-to-image plumbing with 1,000 steps, noise, one forward, selected layers, ``attn``."""
    if kind == "pndm":
        scheduler: Any = PNDMScheduler(**SD, skip_prk_steps=True, steps_offset=1)
    else:
        scheduler = EulerDiscreteScheduler(**SD, timestep_spacing="leading", steps_offset=1)
    layers = ["up-level1-repeat1-vit-block0-cross-q", "up-level3-repeat0-vit-block0-self-k", "attn"]
    fx = FeatureExtractor(sd15, scheduler=scheduler, layers=layers)
    clean, noise = torch.randn(1, 4, 16, 16), torch.randn(1, 4, 16, 16)
    text = torch.randn(1, 5, 8)
    scheduler.set_timesteps(1000)
    start = max(1000 - min(int(1000 * (50 / 1000)), 1000), 0)
    t = scheduler.timesteps[start * scheduler.order]
    if kind == "euler":
        scheduler.set_begin_index(start)
    noisy = scheduler.add_noise(clean, noise, t[None])
    official = Official(sd15)
    official(scheduler.scale_model_input(noisy, t), float(t), text)
    mode = {"pndm": "official", "euler": "exact"}[kind]
    found = fx(latents=clean, prompt=PromptEmbedding(text), t=50, noise=noise, t_mode=mode)
    for key in layers[:2]:
        assert distance(found[key], spatial(official.store[key], found[key].shape[-2:])) < 1e-4
    # The authors keep the cross-attention of the up stage at 1/32 to 1/16 of the image's side.
    sides: dict[int, list[Tensor]] = {}
    for key, value in official.store.items():
        side = math.isqrt(value.shape[2]) if key.endswith("cross-map") else 0
        if key.startswith("up") and 128 / 32 <= side <= 128 / 16:
            sides.setdefault(side, []).append(
                value.mean(1).transpose(1, 2).unflatten(2, (side,) * 2)
            )
    means = [F.interpolate(torch.stack(sides[s]).mean(0), (16, 16)) for s in sorted(sides)]
    assert distance(found["attn"], torch.cat(means, 1)) < 1e-4

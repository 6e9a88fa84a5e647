"""From images to features: latents, noise, timesteps, batches, and the real loading path."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from PIL import Image
from torch import nn

from diffeat import FeatureExtractor, Features, PromptEmbedding, Schedule, capture, seeded_noise
from shared_core.errors import InputError

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.smoke
def test_noise_is_the_formula_at_exactly_t(fx: FeatureExtractor) -> None:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, 0)
    signal, scale = fx.schedule.signal_and_noise(50)
    assert signal == pytest.approx(float(abar[50] ** 0.5), abs=1e-6)
    assert (signal, scale) == pytest.approx((0.975488, 0.220053), abs=1e-5)
    x0 = torch.randn(3, 4, 8, 8)
    eps = torch.randn(3, 4, 8, 8)
    assert torch.equal(fx.schedule.add_noise(x0, eps, 50), signal * x0 + scale * eps)
    clean = fx.schedule.predict_clean(fx.schedule.add_noise(x0, eps, 300), eps, 300)
    torch.testing.assert_close(clean, x0, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_official_timesteps() -> None:
    stock = PNDMScheduler(**SD, skip_prk_steps=True, steps_offset=1)
    assert Schedule(stock).official_timestep(50) == 51
    euler = EulerDiscreteScheduler(**SD, timestep_spacing="leading", steps_offset=1)
    schedule = Schedule(euler)
    assert schedule.official_timestep(50) == 50
    assert [round(v, 6) for v in Schedule(stock).signal_and_noise(51)] == [0.974948, 0.222432]
    # Euler adds unscaled noise and rescales the model's input; that is the same x_t.
    euler.set_timesteps(1000)
    time = euler.timesteps[950:951]
    x0, eps = torch.randn(1, 4, 4, 4), torch.randn(1, 4, 4, 4)
    euler.set_begin_index(950)
    given = euler.scale_model_input(euler.add_noise(x0, eps, time), time)
    torch.testing.assert_close(given, schedule.add_noise(x0, eps, 50), atol=2e-6, rtol=1e-6)


def test_flows_are_linear() -> None:
    schedule = Schedule(FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert schedule.signal_and_noise(250) == (0.75, 0.25)
    assert schedule.model_time(250) == 250
    shifted = Schedule(FlowMatchEulerDiscreteScheduler(shift=3.0), shift_timesteps=True)
    assert shifted.flow_time(250) == pytest.approx(0.5)


def test_noise_depends_on_the_sample_alone(fx: FeatureExtractor) -> None:
    a = seeded_noise(["a", "b", "c"], (4, 2), seed=3)
    assert torch.equal(a[[2, 0]], seeded_noise(["c", "a"], (4, 2), seed=3))
    for other in (seeded_noise(["a"], (4, 2), seed=4), seeded_noise(["a"], (4, 2), seed=3, draw=1)):
        assert not torch.equal(a[:1], other)
    latents = torch.randn(3, 4, 16, 16)
    whole = fx(latents=latents, prompt="a cat", ids=["a", "b", "c"], seed=3)
    part = fx(latents=latents[[2, 0]], prompt="a cat", ids=["c", "a"], seed=3)
    for name, value in part.items():
        torch.testing.assert_close(value, whole[name][[2, 0]], atol=1e-5, rtol=1e-5)
    shared = fx.make_noise(latents, "shared")
    assert shared is not None
    assert torch.equal(shared[0], shared[2])


def test_a_call_is_its_parts(fx: FeatureExtractor) -> None:
    """Against a forward written out by hand."""
    latents = torch.randn(2, 4, 16, 16)
    prompt = fx.encode_prompt("a cat")
    found = fx(latents=latents, prompt="a cat", t=50, seed=5)
    noise = seeded_noise([0, 1], (4, 16, 16), seed=5)
    abar = fx.schedule.scheduler.alphas_cumprod[50].double()
    x_t = (abar.sqrt() * latents + (1 - abar).sqrt() * noise).float()
    with torch.no_grad(), capture(fx.backbone, fx.layers) as cap:
        fx.backbone(x_t, 50, prompt.states.expand(2, -1, -1))
    for name in fx.layers:
        torch.testing.assert_close(found[name], cap.features[name], atol=1e-5, rtol=1e-5)
    clean = fx(latents=latents, prompt="a cat", t=0, noise="none")
    with torch.no_grad(), capture(fx.backbone, fx.layers) as cap:
        fx.backbone(latents, 0, prompt.states.expand(2, -1, -1))
    for name in fx.layers:
        torch.testing.assert_close(clean[name], cap.features[name], atol=1e-5, rtol=1e-5)


def test_ensembles_and_several_timesteps(fx: FeatureExtractor) -> None:
    latents = torch.randn(1, 4, 16, 16)
    noise = torch.randn(1, 4, 16, 16)
    same = fx(latents=latents, prompt="x", noise=noise, ensemble=3)
    once = fx(latents=latents, prompt="x", noise=noise)
    mean = fx(latents=latents, prompt="x", ensemble=2, seed=1)
    draws = [
        fx(latents=latents, prompt="x", noise=seeded_noise([0], (4, 16, 16), seed=1, draw=d))
        for d in range(2)
    ]
    for name in fx.layers:
        torch.testing.assert_close(same[name], once[name])
        torch.testing.assert_close(mean[name], (draws[0][name] + draws[1][name]) / 2)
    several = fx(latents=latents, prompt="x", t=[50, 100], noise=noise)
    assert list(several) == [f"{n}@t{t}" for t in (50, 100) for n in fx.layers]
    assert torch.equal(several[f"{fx.layers[0]}@t50"], once[fx.layers[0]])


def test_residuals_reach_the_up_stage_only(fx: FeatureExtractor) -> None:
    fx.layers = ["mid-vit-out", "up-level1-upsampler-out", "down-level2-repeat0-res-out"]
    latents, seen = torch.randn(1, 4, 16, 16), []

    def residuals(x_t: torch.Tensor, time: float, prompt: Any) -> dict[str, Any]:
        seen.append((x_t, time))
        sides = [(8, 16)] * 3 + [(8, 8)] + [(16, 8)] * 2 + [(16, 4)] + [(32, 4)] * 2 + [(32, 2)] * 3
        down = tuple(torch.ones(1, c, s, s) for c, s in sides)
        return {
            "down_block_additional_residuals": down,
            "mid_block_additional_residual": torch.ones(1, 32, 2, 2),
        }

    plain = fx(latents=latents, prompt="x")
    steered = fx(latents=latents, prompt="x", residuals=residuals)
    assert seen[0][1] == 50
    for name in fx.layers:
        assert torch.equal(plain[name], steered[name]) == (not name.startswith("up"))
    fx.layers = "sd15-practical"


def test_inversion_returns_to_the_latent(fx: FeatureExtractor) -> None:
    """With a model that always predicts the same noise, inversion is the closed form."""

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv_in = self.conv_out = nn.Conv2d(4, 4, 1)
            self.down_blocks = self.up_blocks = nn.ModuleList()
            self.mid_block = None
            self.config: Any = type("Config", (), {"cross_attention_dim": None})()

        def forward(self, sample: torch.Tensor, timestep: Any) -> Any:
            return (torch.full_like(sample, 0.5),)

    one = FeatureExtractor(Constant(), scheduler=fx.schedule.scheduler, layers=["module:conv_in"])
    x0 = torch.randn(1, 4, 4, 4)
    start = one.schedule.add_noise(x0, torch.full_like(x0, 0.5), 0)
    there = one.invert(start, 100, steps=10)
    expected = one.schedule.add_noise(x0, torch.full_like(x0, 0.5), 100)
    torch.testing.assert_close(there, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("without_type_checks")
def test_from_pretrained_on_a_saved_pipeline(tmp_path: Path, pipeline: Path) -> None:
    folder = pipeline
    fx = FeatureExtractor.from_pretrained(str(folder), layers="sd15-legacy")
    assert fx.size == (32, 32)
    assert fx.vae_factor == 2
    image = Image.new("RGB", (50, 40), (200, 30, 60))
    found = fx([image, image], "a c")
    assert found.concat("max").shape == (2, 32 + 32 + 16 + 8, 16, 16)
    assert fx.feature_info[0] == {
        "name": "up-level0-upsampler-out",
        "channels": 32,
        "reduction": 8,
        "module": "up_blocks.0.upsamplers.0",
    }
    x = fx.pixels(image)
    with torch.no_grad():
        mode = fx.vae.encode(x).latent_dist.mode() * 0.18215
    torch.testing.assert_close(fx.encode_images(image), mode)
    pipe = fx.pipeline
    expected, _ = pipe.encode_prompt("a c", "cpu", 1, False)
    assert torch.equal(fx.encode_prompt("a c").states, expected)
    fx.drop_text_encoder()
    assert fx([image], "a c")  # remembered
    with pytest.raises(InputError, match="no text encoder"):
        fx([image], "a")
    assert 0 < fx.stop_fraction(prompt="a c") <= 1
    with pytest.raises(KeyError, match="nearest"):
        FeatureExtractor.from_pretrained(str(folder), layers="mid-vit-ot")
    with pytest.raises(InputError, match="offload"):
        FeatureExtractor.from_pretrained(str(folder), layers="unet-in", offload="all")
    with pytest.raises(InputError, match=r"model_index.json"):
        FeatureExtractor.from_pretrained(str(tmp_path), layers="unet-in")
    with pytest.raises(InputError, match="cannot be loaded"):
        FeatureExtractor.from_pretrained("nobody/nothing", layers="unet-in")


def test_backbones_can_be_trained(tiny: Any) -> None:
    fx = FeatureExtractor(tiny("sd15"), scheduler=DDIMScheduler(**SD), layers=["mid-vit-out"])
    fx.train_backbone()
    fx(latents=torch.randn(1, 4, 16, 16), prompt=torch.randn(1, 5, 8))[
        "mid-vit-out"
    ].sum().backward()
    assert any(p.grad is not None for p in fx.backbone.parameters())


@pytest.mark.usefixtures("without_type_checks")
def test_vae_out_and_features(fx: FeatureExtractor, tmp_path: Path) -> None:
    latents = torch.randn(1, 4, 16, 16)
    fx.layers = ["unet-in", "vae-out", "up-level1-upsampler-out"]
    found = fx(latents=latents, prompt="x", noise="none", t=0)
    fx.layers = "sd15-practical"
    assert torch.equal(found["vae-out"], latents)
    assert torch.equal(found["unet-in"], latents)
    found.save(tmp_path / "f.safetensors")
    again = Features.load(tmp_path / "f.safetensors")
    assert list(again) == list(found)
    assert all(torch.equal(again[n], found[n]) for n in found)
    assert found.resize("min")["unet-in"].shape[-1] == 8
    assert found.concat(4).shape[-2:] == (4, 4)
    (tmp_path / "g.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="no readable features"):
        Features.load(tmp_path / "g.safetensors")
    with pytest.raises(InputError, match="max, min"):
        found.concat("middle")  # type: ignore[arg-type]


@pytest.mark.usefixtures("without_type_checks")
def test_bad_input(fx: FeatureExtractor) -> None:
    x = torch.rand(1, 4, 16, 16)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"latents": x, "t": 1000}, "0 to 999"),
        ({"latents": x, "t": -1}, "0 to 999"),
        ({"latents": x, "t": []}, "t is empty"),
        ({"latents": x, "ensemble": 0}, "ensemble=0"),
        ({"latents": x, "noise": "some"}, "seeded, shared"),
        ({"latents": x, "noise": torch.zeros(1, 4, 2, 2)}, "same shape"),
        ({"latents": x, "ids": [1, 2]}, "2 ids for 1"),
        ({"latents": x, "t_mode": "about"}, "exact, official"),
        ({"latents": x, "prompt": ["a", "b"]}, "2 prompts for 1"),
        ({}, "either images or latents"),
        ({"images": torch.zeros(0, 3, 16, 16)}, "at least 1"),
        ({"images": torch.full((1, 3, 16, 16), 200.0)}, "divide by 255"),
        ({"images": torch.full((1, 3, 16, 16), torch.nan)}, "NaN"),
        ({"images": torch.rand(1, 3, 17, 16)}, "multiples of 8"),
        ({"images": torch.zeros(1, 3, 16, 16, dtype=torch.int32)}, "uint8 or floating"),
        ({"images": []}, "no images"),
    ]
    for given, message in cases:
        with pytest.raises(InputError, match=message):
            fx(**{"prompt": "a", **given})
    with pytest.raises(InputError, match="needs a prompt"):
        fx(latents=x)


def test_prompt_embeddings_can_be_given(fx: FeatureExtractor) -> None:
    latents = torch.randn(2, 4, 16, 16)
    states = fx.encode_prompt(["one", "three"]).states
    by_text = fx(latents=latents, prompt=["one", "three"])
    for given in (states, PromptEmbedding(states)):
        found = fx(latents=latents, prompt=given)
        assert all(torch.equal(found[n], by_text[n]) for n in fx.layers)

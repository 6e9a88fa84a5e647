"""With diffusers' own pipelines, ControlNets and LoRA weights, on a tiny random pipeline."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline
from PIL import Image
from torch import nn

from diffeat import FeatureCache, FeatureExtractor, Recorder, capture, list_activations
from diffeat.aggregate import MultiModel
from diffeat.cli import main
from diffeat.presets import build_topology
from shared_core.errors import InputError
from shared_core.testing import CliResult

LAYERS = ["down-level0-repeat0-vit-block0-self-q", "up-level1-repeat1-vit-block0-cross-q"]


def test_recorder_while_a_pipeline_generates(pipeline: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(pipeline)
    pipe.set_progress_bar_config(disable=True)
    found, images = {}, []
    for half in ("both", "cond", "uncond", None):
        generator = torch.Generator().manual_seed(0)
        given = {"num_inference_steps": 3, "guidance_scale": 4.0, "height": 32, "width": 32}
        given |= {"generator": generator, "output_type": "latent"}
        if half is None:
            images.append(pipe("a c", **given).images)
            continue
        with Recorder(pipe.unet, LAYERS, steps=[0, 2], cfg=half) as record:
            images.append(pipe("a c", **given).images)
        assert list(record.features) == [0, 2]
        found[half] = record.features
    assert all(torch.equal(image, images[-1]) for image in images)
    for step in (0, 2):
        for name in LAYERS:
            both = found["both"][step][name]
            assert len(both) == 2
            assert torch.equal(both[:1], found["uncond"][step][name])
            assert torch.equal(both[1:], found["cond"][step][name])
    # The prompt reaches the up stage; the first query of the down stage has not seen it yet.
    first = found["both"][0]
    assert torch.equal(*first[LAYERS[0]])
    assert not torch.equal(*first[LAYERS[1]])


def test_residuals_of_a_real_controlnet(fx: FeatureExtractor) -> None:
    from diffusers import ControlNetModel

    torch.manual_seed(0)
    control = ControlNetModel.from_unet(
        fx.backbone, conditioning_channels=3, load_weights_from_unet=True
    ).eval()
    for layer in [*control.controlnet_down_blocks, control.controlnet_mid_block]:
        nn.init.normal_(layer.weight, 0, 0.5)  # they begin at zero, without any effect
    picture = torch.rand(2, 3, 128, 128)

    def residuals(x_t: torch.Tensor, time: float, prompt: Any) -> dict[str, Any]:
        down, mid = control(x_t, time, prompt.states, picture, return_dict=False)
        return {
            "down_block_additional_residuals": down,
            "mid_block_additional_residual": mid,
        }

    x_t = torch.randn(2, 4, 16, 16)
    prompt = fx.encode_prompt("a cat")
    with torch.no_grad():
        found = fx.run(x_t, 50, prompt, residuals=residuals)
        states = prompt.states.expand(2, -1, -1)
        down, mid = control(x_t, 50, states, picture, return_dict=False)
        with capture(fx.backbone, fx.layers) as cap:
            fx.backbone(
                x_t, 50, states,
                down_block_additional_residuals=down, mid_block_additional_residual=mid,
            )  # fmt: skip
    plain = fx.run(x_t, 50, prompt)
    for name in fx.layers:
        torch.testing.assert_close(found[name], cap.features[name])
        assert not torch.allclose(found[name], plain[name])


def test_lora_that_the_pipeline_loads(pipeline: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="LoRA weights need peft")
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers

    plain = FeatureExtractor.from_pretrained(str(pipeline), LAYERS)
    before = list_activations(plain.backbone, maps=True, extra=True)
    x_t = torch.randn(1, 4, 16, 16)
    prompt = plain.encode_prompt("a c")
    expected = plain.run(x_t, 50, prompt)
    tuned = plain.pipeline.unet
    torch.manual_seed(0)
    tuned.add_adapter(
        # The saved weights do not hold alpha; a loader takes it to be the rank.
        peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
    )
    changed = plain.run(x_t, 50, prompt)
    state = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(tuned))
    StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", unet_lora_layers=state)
    loaded = FeatureExtractor.from_pretrained(str(pipeline), LAYERS, lora=str(tmp_path / "lora"))
    assert list_activations(loaded.backbone, maps=True, extra=True) == before
    found = loaded.run(x_t, 50, prompt)
    for name in LAYERS:
        torch.testing.assert_close(found[name], changed[name])
        assert not torch.allclose(found[name], expected[name])


def test_three_models_of_a_combined_preset(
    pipeline: Path,
    sdxl_pipeline: Path,
    tmp_path: Path,
    run_cli: Callable[..., CliResult],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids = [str(sdxl_pipeline), str(pipeline), str(sdxl_pipeline)]
    both = MultiModel.from_pretrained("xl-t", ids, size=32)
    picture = Image.effect_noise((50, 40), 80).convert("RGB")
    found = both([picture, picture], "a c", ids=["x", "y"])
    assert tuple(found) == both.layers == tuple(both.feature_names([50]))
    assert [n.partition("/")[0] for n in found] == (
        ["sdxl-practical"] * 4 + ["sd15-amalgam"] * 5 + ["playground-amalgam"]
    )
    alone = FeatureExtractor.from_pretrained(ids[1], "sd15-amalgam", size=32)
    for name, value in alone([picture, picture], "a c", ids=["x", "y"]).items():
        assert torch.equal(found[f"sd15-amalgam/{name}"], value)
    assert both.size == (32, 32)
    assert len(both.feature_info) == 10
    assert both.identity() != MultiModel({"a": both.extractors["sd15-amalgam"]}).identity()
    # Those on other devices run at the same time; here they only say that they are.
    places = iter(["cpu:0", "cpu:1", "cpu:2"] * 9)
    with monkeypatch.context() as patch:
        patch.setattr(FeatureExtractor, "device", property(lambda self: next(places)))
        patch.setattr(FeatureExtractor, "__call__", lambda self, *a, **k: {"a": torch.ones(1)})
        assert list(both(picture)) == [f"{name}/a" for name in both.extractors]
    with pytest.raises(InputError, match="joins no models"):
        MultiModel.from_pretrained("sd15-practical")
    picture.save(tmp_path / "0.png")
    given = ["extract", "--input", "0.png", "--layers", "xl-t", "--model", ",".join(ids)]
    shown = run_cli(main, *given, "--size", 32, "--out", "x", "--json")
    assert shown.code == 0, shown.stderr
    assert json.loads(shown.stdout)["layers"] == list(found)
    assert list(FeatureCache("x")["0.png"]) == list(found)


def test_a_preset_in_pixel_space_with_its_own_timesteps(
    tmp_path: Path, run_cli: Callable[..., CliResult]
) -> None:
    torch.manual_seed(0)
    unet = build_topology(
        "ddpm-bedroom", device="cpu", sample_size=64, norm_num_groups=4,
        block_out_channels=(4, 4, 8, 8, 16, 16),
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "pipe")
    for i in range(2):
        Image.effect_noise((70, 60), 80).convert("RGB").save(tmp_path / f"{i}.png")
    given = ["extract", "--input", ".", "--layers", "ddpm-seg", "--model", "pipe"]
    shown = run_cli(main, *given, "--out", "x", "--format", "npy", "--layout", "per-layer")
    assert shown.code == 0, shown.stderr
    cache = FeatureCache("x")
    assert cache.settings["noise"] == "shared"
    features = cache["1.png"]
    assert [n.rpartition("@")[2] for n in features] == ["t50"] * 5 + ["t150"] * 5 + ["t250"] * 5
    assert sum(v.shape[1] for v in features.values()) == 3 * (16 + 8 + 8 + 8 + 4)
    assert features["up-level2-repeat0-res-out@t50"].shape[-1] == 8
    fx = FeatureExtractor.from_pretrained("pipe", "ddpm-seg")
    with Image.open("1.png") as image:
        found = fx(image, t=[50, 150, 250], noise="shared")
    for name, value in found.items():
        torch.testing.assert_close(features[name], value, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("offload", "method"),
    [
        ("model", "enable_model_cpu_offload"),
        ("sequential", "enable_sequential_cpu_offload"),
        ("group", "enable_group_offload"),
    ],
)
def test_offloading_is_the_pipelines(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch, offload: Any, method: str
) -> None:
    """The options go to diffusers; whether they save memory shows on a GPU."""
    asked: list[Any] = []
    monkeypatch.setattr(DiffusionPipeline, method, lambda self, *a, **k: asked.append((a, k)))
    FeatureExtractor.from_pretrained(str(pipeline), LAYERS, offload=offload)
    assert len(asked) == 1

"""With diffusers' own pipelines, ControlNets and LoRA weights, on a tiny random pipeline."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diffeat import FeatureExtractor, Recorder, capture, list_activations

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

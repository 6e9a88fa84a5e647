"""Every family of the list, on tiny random models, through the extractor."""

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)

from diffeat import FeatureExtractor, PromptEmbedding, list_activations
from shared_core.errors import InputError


def words(dim: int, pooled: int | None = None, **extra: Any) -> PromptEmbedding:
    return PromptEmbedding(
        torch.randn(1, 5, dim), pooled=None if pooled is None else torch.randn(1, pooled), **extra
    )


def family(name: str) -> tuple[Any, PromptEmbedding | None, dict[str, Any], int]:
    torch.manual_seed(0)
    if name == "ddpm":
        model: Any = UNet2DModel(
            sample_size=16,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
        return model, None, {}, 3
    if name == "if":
        model = UNet2DConditionModel(
            sample_size=16,
            in_channels=3,
            out_channels=6,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            layers_per_block=1,
            attention_head_dim=4,
            cross_attention_dim=8,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            resnet_time_scale_shift="scale_shift",
        )
        return model, words(8), {}, 3
    small = {"num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 16, "patch_size": 2}
    if name == "dit":
        model = DiTTransformer2DModel(
            **small, in_channels=4, num_layers=2, norm_num_groups=4, num_embeds_ada_norm=10
        )
        return model, None, {"class_labels": torch.tensor([1, 2])}, 4
    if name == "pixart":
        model = PixArtTransformer2DModel(
            **small,
            in_channels=4,
            num_layers=2,
            cross_attention_dim=16,
            caption_channels=8,
            use_additional_conditions=False,
        )
        return model, words(8, mask=torch.ones(1, 5)), {}, 4
    if name == "hunyuan":
        model = HunyuanDiT2DModel(
            **small,
            in_channels=4,
            hidden_size=16,
            num_layers=2,
            cross_attention_dim=8,
            cross_attention_dim_t5=8,
            pooled_projection_dim=4,
            text_len=5,
            text_len_t5=5,
            activation_fn="gelu-approximate",
        )
        extra = {
            "encoder_hidden_states_t5": torch.randn(1, 5, 8),
            "text_embedding_mask_t5": torch.ones(1, 5),
        }
        return model, words(8, mask=torch.ones(1, 5), extra=extra), {}, 4
    if name == "sd3":
        model = SD3Transformer2DModel(
            **small,
            in_channels=4,
            num_layers=2,
            joint_attention_dim=8,
            caption_projection_dim=16,
            pooled_projection_dim=6,
            out_channels=4,
            pos_embed_max_size=16,
        )
        return model, words(8, 6), {}, 4
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=6,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    return model, words(8, 6), {}, 4


@pytest.mark.parametrize("name", ["ddpm", "if", "dit", "pixart", "hunyuan", "sd3", "flux"])
def test_every_activation_of_every_family(name: str) -> None:
    model, prompt, options, channels = family(name)
    flow = name in ("sd3", "flux")
    scheduler = FlowMatchEulerDiscreteScheduler() if flow else DDIMScheduler()
    infos = list_activations(model, maps=True, extra=True)
    fx = FeatureExtractor(model, scheduler=scheduler, layers=[i.name for i in infos])
    height, width = (16, 16) if name == "dit" else (16, 24)
    latents = torch.randn(2, channels, height, width)
    found = fx(latents=latents, prompt=prompt, stop=False, **options)
    assert set(found) == {i.name for i in infos}
    for info in infos:
        value = found[info.name]
        assert value.isfinite().all()
        if info.text_side:
            # HunyuanDiT has two text towers, whose tokens it joins.
            assert value.shape[2:] == (1, 10 if name == "hunyuan" else 5)
            continue
        side = (height // info.reduction, width // info.reduction)
        assert tuple(value.shape[-2:]) == side, info.name
        if info.channels is not None:
            assert value.shape[1] == info.channels, info.name
        if info.source == "map" and not flow:
            torch.testing.assert_close(value.sum(1), torch.ones(2, *side), atol=1e-5, rtol=1e-5)
    stopped = fx(latents=latents, prompt=prompt, **options)
    for key, value in found.items():
        assert torch.equal(value, stopped[key])
    if flow:
        # Image and text keys together are one softmax.
        both = found["vit-block0-self-map"].sum(1) + found["vit-block0-cross-map"].sum(1)
        torch.testing.assert_close(both, torch.ones_like(both), atol=1e-5, rtol=1e-5)
    prediction = fx.predict(latents, 50, prompt, **options)
    assert prediction.shape == latents.shape
    again = fx(
        latents=latents[1:], prompt=prompt, ids=[1], **{k: v[1:] for k, v in options.items()}
    )
    for key, value in again.items():
        torch.testing.assert_close(value, found[key][1:], atol=1e-4, rtol=1e-4)


def test_missing_conditions_are_named(sdxl: Any) -> None:
    fx = FeatureExtractor(sdxl, scheduler=DDIMScheduler(), layers="sdxl-practical")
    latents = torch.randn(1, 4, 16, 16)
    with pytest.raises(InputError, match="needs a prompt"):
        fx(latents=latents)
    with pytest.raises(InputError, match="pooled"):
        fx(latents=latents, prompt=torch.randn(1, 5, 8))
    pooled = PromptEmbedding(torch.randn(1, 5, 8), pooled=torch.randn(1, 8))
    assert fx(latents=latents, prompt=pooled).concat().shape[1] == 32 + 32 + 16 + 16
    model, _, _, _ = family("dit")
    fx = FeatureExtractor(model, scheduler=DDIMScheduler(), layers=["vit-out"])
    with pytest.raises(InputError, match="class_labels"):
        fx(latents=latents)


def test_flux_packs_as_its_pipeline_does() -> None:
    from diffusers import FluxPipeline

    from diffeat import _families

    model, prompt, _, _ = family("flux")
    x = torch.randn(2, 4, 8, 12)
    assert prompt is not None
    given = _families.arguments(
        model,
        x,
        50.0,
        prompt.expand(2),
        labels=None,
        added=None,
        image_size=(64, 96),
        aesthetic=False,
    )
    assert torch.equal(given["hidden_states"], FluxPipeline._pack_latents(x, 2, 4, 8, 12))
    ids = FluxPipeline._prepare_latent_image_ids(2, 4, 6, "cpu", torch.float32)
    assert torch.equal(given["img_ids"], ids)

"""Tiny models of every family, with the layout of the real ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diffeat import FeatureExtractor, PromptEmbedding
from diffeat.presets import build_topology

pytest_plugins = ["shared_core.testing"]

SMALL: dict[str, dict[str, Any]] = {
    "sd15": {
        "sample_size": 16,
        "block_out_channels": (8, 16, 32, 32),
        "attention_head_dim": 2,
        "cross_attention_dim": 8,
        "norm_num_groups": 4,
    },
    "sdxl": {
        "sample_size": 16,
        "block_out_channels": (8, 16, 32),
        "attention_head_dim": (1, 2, 2),
        "cross_attention_dim": 8,
        "norm_num_groups": 4,
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + 8,
    },
}


def _tiny(name: str) -> nn.Module:
    torch.manual_seed(0)
    return build_topology(name, device="cpu", **SMALL[name])


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], nn.Module]:
    """Builds the tiny U-Net with the layout of ``sd15`` or ``sdxl``."""
    return _tiny


@pytest.fixture(scope="session")
def sd15() -> nn.Module:
    return _tiny("sd15")


@pytest.fixture(scope="session")
def sdxl() -> nn.Module:
    return _tiny("sdxl")


@pytest.fixture
def call(sd15: nn.Module) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "sample": torch.randn(2, 4, 16, 24, generator=generator),
        "timestep": torch.tensor([50, 50]),
        "encoder_hidden_states": torch.randn(2, 5, 8, generator=generator),
    }


@pytest.fixture
def fx(sd15: nn.Module) -> FeatureExtractor:
    """An extractor on latents of the tiny SD1.5, with SD's noise schedule."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    )

    def text(prompts: Any) -> PromptEmbedding:
        rows = []
        for prompt in prompts:
            generator = torch.Generator().manual_seed(len(prompt))
            rows.append(torch.randn(5, 8, generator=generator))
        return PromptEmbedding(torch.stack(rows))

    return FeatureExtractor(sd15, scheduler=scheduler, layers="sd15-practical", text=text)


def _text(folder: Path, kind: str = "CLIPTextModel") -> tuple[Any, Any]:
    """A tiny tokenizer and text tower."""
    transformers = pytest.importorskip("transformers", reason="text towers need transformers")
    words = ["<|startoftext|>", "<|endoftext|>", "a", "a</w>", "c</w>"]
    (folder / "vocab.json").write_text(str({w: i for i, w in enumerate(words)}).replace("'", '"'))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8
    )
    text = getattr(transformers, kind)(
        transformers.CLIPTextConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=8, bos_token_id=0, eos_token_id=1,
            projection_dim=8,
        )
    )  # fmt: skip
    return tokenizer, text


def _vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, scaling_factor=0.18215,
    )  # fmt: skip


def _scheduler() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        clip_sample=False,
    )  # fmt: skip


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real Stable Diffusion pipeline on disk, random and tiny."""
    folder, unet = tmp_path_factory.mktemp("pipeline"), _tiny("sd15")
    tokenizer, text = _text(folder)
    from diffusers import StableDiffusionPipeline

    torch.manual_seed(0)
    StableDiffusionPipeline(
        vae=_vae(), text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder / "pipe")  # fmt: skip
    return folder / "pipe"


@pytest.fixture(scope="session")
def sdxl_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real SDXL pipeline on disk, random and tiny."""
    folder = tmp_path_factory.mktemp("sdxl")
    tokenizer, first = _text(folder)
    _, second = _text(folder, "CLIPTextModelWithProjection")
    from diffusers import StableDiffusionXLPipeline

    torch.manual_seed(0)
    unet = build_topology(
        "sdxl", device="cpu", **{**SMALL["sdxl"], "cross_attention_dim": 16}
    )  # two towers, joined
    StableDiffusionXLPipeline(
        vae=_vae(), text_encoder=first, text_encoder_2=second, tokenizer=tokenizer,
        tokenizer_2=tokenizer, unet=unet, scheduler=_scheduler(), add_watermarker=False,
    ).save_pretrained(folder / "pipe")  # fmt: skip
    return folder / "pipe"

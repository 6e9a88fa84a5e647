"""Tiny models with the layout of the real ones."""

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
        "sample_size": 8,
        "block_out_channels": (8, 16, 16, 16),
        "attention_head_dim": 2,
        "cross_attention_dim": 8,
        "norm_num_groups": 4,
    },
    "sdxl": {
        "sample_size": 8,
        "block_out_channels": (8, 16, 16),
        "attention_head_dim": (1, 2, 2),
        "transformer_layers_per_block": (1, 1, 2),
        "cross_attention_dim": 8,
        "norm_num_groups": 4,
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + 8,
    },
}
SMALL["sd21"] = {**SMALL["sd15"], "attention_head_dim": (1, 2, 2, 2)}


def _scheduler() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        steps_offset=1, set_alpha_to_one=False,
    )  # fmt: skip


class _Pool(nn.Module):
    """A stand-in for a VAE: 8 x 8 pixels become one of four latent channels, and back."""

    def __init__(self) -> None:
        super().__init__()
        from types import SimpleNamespace

        self.config = SimpleNamespace(scaling_factor=0.5, shift_factor=0.0, spatial_factor=8)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        pooled = nn.functional.avg_pool2d(x, 8)
        return torch.cat([pooled, pooled.mean(1, keepdim=True)], 1)

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.interpolate(x[:, :3], scale_factor=8)


def _text(prompts: Any) -> PromptEmbedding:
    rows, pools = [], []
    for prompt in prompts:
        generator = torch.Generator().manual_seed(len(prompt))
        rows.append(torch.randn(5, 8, generator=generator))
        pools.append(torch.randn(8, generator=generator))
    return PromptEmbedding(torch.stack(rows), pooled=torch.stack(pools))


def _extractor(name: str, layers: Any = None) -> FeatureExtractor:
    torch.manual_seed(0)
    unet = build_topology(name, device="cpu", **SMALL[name])
    chosen = layers or ("sdxl-legacy" if name == "sdxl" else "sd15-legacy")
    return FeatureExtractor(
        unet, scheduler=_scheduler(), layers=chosen, vae=_Pool(), text=_text, size=64
    )


def _control(backbone: Any, *, fresh: bool = False, seed: int = 1) -> Any:
    from diffusers import ControlNetModel

    torch.manual_seed(seed)
    net = ControlNetModel.from_unet(
        backbone, conditioning_channels=3, conditioning_embedding_out_channels=(4, 4, 8, 8)
    ).eval()
    for layer in () if fresh else (*net.controlnet_down_blocks, net.controlnet_mid_block):
        nn.init.normal_(layer.weight, 0, 0.3)  # they begin at zero, without any effect
    if not fresh:
        nn.init.normal_(net.controlnet_cond_embedding.conv_out.weight, 0, 0.3)
    return net


@pytest.fixture
def extractor() -> Callable[..., FeatureExtractor]:
    """Builds a tiny extractor with the layout of ``sd15``, ``sd21`` or ``sdxl``."""
    return _extractor


@pytest.fixture
def fx() -> FeatureExtractor:
    return _extractor("sd15")


@pytest.fixture
def control() -> Callable[..., Any]:
    """Builds a ControlNet for a backbone, by default one that has an effect."""
    return _control


@pytest.fixture
def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return nn.functional.interpolate(
        torch.rand(3, 3, 8, 8, generator=generator), (64, 64), mode="nearest"
    )


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real Stable Diffusion pipeline on disk, random and tiny."""
    folder = tmp_path_factory.mktemp("pipeline")
    transformers = pytest.importorskip("transformers", reason="text towers need transformers")
    from diffusers import AutoencoderKL, StableDiffusionPipeline

    torch.manual_seed(0)
    unet = build_topology("sd15", device="cpu", **{**SMALL["sd15"], "sample_size": 16})
    words = ["<|startoftext|>", "<|endoftext|>", "a", "a</w>", "c</w>"]
    (folder / "vocab.json").write_text(str({w: i for i, w in enumerate(words)}).replace("'", '"'))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8
    )
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=8, bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, scaling_factor=0.18215,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder / "pipe")  # fmt: skip
    return folder / "pipe"

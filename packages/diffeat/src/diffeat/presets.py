"""The published selections and the models that they belong to, as data."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from shared_core.errors import InputError

__all__ = ["MODELS", "PRESETS", "PROMPTS", "TOPOLOGIES", "Preset", "build_topology", "get_preset"]

MODELS = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21": "stabilityai/stable-diffusion-2-1-base",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sdxl-turbo": "stabilityai/sdxl-turbo",
    "playground": "playgroundai/playground-v2-1024px-aesthetic",
    "pixart-sigma": "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
    "pixart-sigma-512": "PixArt-alpha/PixArt-Sigma-XL-2-512-MS",
    "pixart-alpha": "PixArt-alpha/PixArt-XL-2-512x512",
    "ddpm-bedroom": "google/ddpm-ema-bedroom-256",
    "if": "DeepFloyd/IF-I-L-v1.0",
    "hunyuan": "Tencent-Hunyuan/HunyuanDiT-Diffusers",
    "flux": "black-forest-labs/FLUX.1-dev",
    "sd3": "stabilityai/stable-diffusion-3-medium-diffusers",
}

PROMPTS = {
    "spair": "a highly realistic photo that may contain an aeroplane, a bicycle, a bird, a boat, "
    "a bottle, a bus, a car, a cat, a chair, a cow, a dog, a horse, a motorbike, a person, "
    "a plant within a pot, a sheep, a train, or a tv monitor.",
    "ade20k": "a highly realistic photo of the real world. It can be an indoor scene, or an "
    "outdoor scene, or a photo of nature. high quality.",
    "cityscapes": "An urban street scene with multiple lanes, various buildings, traffic lights, "
    "cars in the lanes, and pedestrians, highly realistic.",
    "horse21": "a photo of a horse",
}

_SD15: dict[str, Any] = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": 8,
}
_SDXL: dict[str, Any] = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

_DDPM: dict[str, Any] = {
    "sample_size": 256,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": (*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
    "layers_per_block": 2,
}

# Settings of diffusers' U-Nets where they differ from the defaults of their class.
TOPOLOGIES: dict[str, dict[str, Any]] = {
    "sd15": _SD15,
    "sd21": {
        **_SD15,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": _SDXL,
    "playground": _SDXL,
    "ddpm-bedroom": _DDPM,
}

CLASSES = {"ddpm-bedroom": "UNet2DModel"}  # the others are UNet2DConditionModel


@dataclass(frozen=True)
class Preset:
    """A published selection of activations.

    Attributes:
        layers: Names.
        topology: Key of `MODELS` and of `TOPOLOGIES`.
        size: Side of the input image in pixels.
        channels: All channels together, with 77 text tokens for ``attn``.
        t: Timestep of 1000.
        ensemble: Noise draws that are averaged.
        timesteps: If there are several, in place of `t`; `channels` are those of all.
        noise: ``seeded`` by sample, or ``shared`` by all.
        source: Where it is published.
    """

    layers: tuple[str, ...]
    topology: str
    size: int
    channels: int
    t: int = 50
    ensemble: int = 1
    source: str = ""
    timesteps: tuple[int, ...] = ()
    noise: str = "seeded"

    def call_options(self) -> dict[str, Any]:
        """How an extractor is called for this preset: ``t``, and what differs from its defaults.

        Examples:
            >>> PRESETS["dift-sd21"].call_options()
            {'t': 261, 'ensemble': 8}
        """
        found: dict[str, Any] = {"t": list(self.timesteps) or self.t}
        if self.ensemble > 1:
            found["ensemble"] = self.ensemble
        if self.noise != "seeded":
            found["noise"] = self.noise
        return found

    def describe(self) -> dict[str, Any]:
        """All of it as plain data, with the model's hub id."""
        return {**asdict(self), "model": MODELS[self.topology]}


_SDXL_PRACTICAL = (
    "up-level0-repeat0-vit-block5-out",
    "up-level0-repeat0-vit-block7-out",
    "up-level1-repeat0-vit-block0-cross-q",
    "up-level1-repeat0-vit-block0-out",
)

PRESETS: dict[str, Preset] = {
    "sd15-practical": Preset(
        (
            "up-level1-repeat1-vit-block0-cross-q",
            "up-level1-repeat2-res-out",
            "up-level2-repeat1-vit-block0-cross-q",
            "up-level3-repeat0-vit-block0-self-k",
        ),
        "sd15",
        512,
        3520,
        source="paper, B.1",
    ),
    "sd15-legacy": Preset(
        (
            "up-level0-upsampler-out",
            "up-level1-upsampler-out",
            "up-level2-upsampler-out",
            "up-level3-repeat2-vit-out",
        ),
        "sd15",
        512,
        3520,
        source="the usual choice: outputs of the resolutions",
    ),
    "sdxl-practical": Preset(_SDXL_PRACTICAL, "sdxl", 1024, 3840, source="paper, B.2"),
    "sdxl-legacy": Preset(
        (
            "up-level0-upsampler-out",
            "up-level1-upsampler-out",
            "up-level2-repeat2-res-out",
        ),
        "sdxl",
        1024,
        2240,
        source="the usual choice: outputs of the resolutions",
    ),
    "sd15-amalgam": Preset(
        (
            "up-level1-repeat1-vit-block0-cross-q",
            "up-level2-repeat1-vit-block0-cross-q",
            "up-level2-upsampler-out",
            "up-level3-repeat0-vit-block0-self-k",
            "attn",
        ),
        "sd15",
        512,
        3034,
        source="paper, B.3",
    ),
    "playground-amalgam": Preset(
        ("up-level0-repeat0-vit-block3-out",), "playground", 1024, 1280, source="paper, B.3"
    ),
    "sdxl-seg": Preset(
        (*_SDXL_PRACTICAL, "up-level1-upsampler-out"), "sdxl", 1024, 4480, source="paper, B.4"
    ),
    "playground-seg": Preset(
        (
            "up-level0-repeat0-vit-block5-out",
            "up-level1-repeat0-vit-block0-cross-q",
            "up-level1-upsampler-out",
        ),
        "playground",
        1024,
        2560,
        source="paper, B.4",
    ),
    "vpd": Preset(
        (
            "up-level0-repeat1-res-out",
            "up-level1-repeat1-vit-out",
            "up-level2-repeat1-vit-out",
            "attn",
        ),
        "sd15",
        512,
        3354,
        source="VPD, with its attention maps",
    ),
    "hyperfeatures": Preset(
        tuple(f"up-level{i}-repeat{r}-res-increment" for i in range(4) for r in range(3)),
        "sd15",
        512,
        10560,
        source="Diffusion Hyperfeatures, its layers at one timestep",
    ),
    "dift-sd21": Preset(
        ("up-level1-upsampler-out",), "sd21", 768, 1280, t=261, ensemble=8, source="DIFT"
    ),
    "ddpm-seg": Preset(
        (
            "up-level1-upsampler-out",
            "up-level2-repeat0-res-out",
            "up-level2-repeat1-res-out",
            "up-level2-upsampler-out",
            "up-level4-repeat0-res-out",
        ),
        "ddpm-bedroom",
        256,
        4224,
        timesteps=(50, 150, 250),
        noise="shared",
        source="DDPM-seg, decoder blocks 5, 6, 7, 8, 12 of a pixel-space model",
    ),
}

# Presets whose features are those of several models, joined (`diffeat.aggregate.MultiModel`).
COMBINED: dict[str, tuple[str, ...]] = {
    "xl-t": ("sdxl-practical", "sd15-amalgam", "playground-amalgam"),
    "xl-t-seg": ("sdxl-seg", "playground-seg"),
}


def get_preset(name: str) -> Preset:
    """The preset of this name.

    Raises:
        InputError: If there is none.

    Examples:
        >>> get_preset("sdxl-practical").channels
        3840
    """
    if name not in PRESETS:
        raise InputError(f"there is no preset {name!r}; accepted: {', '.join(PRESETS)}")
    return PRESETS[name]


def build_topology(name: str, device: str = "meta", **changes: Any) -> nn.Module:
    """A U-Net with the layout of a known model, by default without memory for its weights.

    Args:
        name: Key of `TOPOLOGIES`.
        device: Where; ``meta`` allocates nothing.
        changes: Settings of the U-Net to change, such as narrower channels for a test.

    Raises:
        InputError: If the layout is not known.

    Examples:
        >>> next(build_topology("sd15").parameters()).device
        device(type='meta')
    """
    if name not in TOPOLOGIES:
        raise InputError(f"there is no topology {name!r}; accepted: {', '.join(TOPOLOGIES)}")
    import diffusers

    with torch.device(device):
        kind = getattr(diffusers, CLASSES.get(name, "UNet2DConditionModel"))
        model: nn.Module = kind(**{**TOPOLOGIES[name], **changes})
    return model.eval()

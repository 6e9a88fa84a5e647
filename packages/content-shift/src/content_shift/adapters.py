"""Techniques that bring weights of their own into the backbone: LoRA, IP-Adapter, CleanDIFT."""

import hashlib
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from content_shift._state import TEXT_TOWERS, Session, quiet_loading
from content_shift.errors import AdapterClash, UnsupportedTechnique
from content_shift.recipe import Context, Patch, Technique
from diffeat import FeatureExtractor
from shared_core.errors import InputError, MissingExtraError

__all__ = ["CleanBackbone", "IPAdapter", "LoRA"]


@dataclass(eq=False)
class LoRA(Technique):
    """Low-rank weights of the data's style (paper A.3), any file that diffusers or kohya writes.

    All LoRAs of all recipes live in one backbone; each call switches to its own.

    Args:
        weights: Folder, file, hub id, or a state dict.
        weight: Strength; 0 changes nothing.
        name: Of the adapter; by default made from the source.

    Examples:
        >>> LoRA("horse.safetensors", weight=0.8).adapter[:5]
        'lora_'
    """

    weights: Any
    weight: float = 1.0
    name: str | None = None

    @property
    def adapter(self) -> str:
        """The adapter's name."""
        source = self.weights if isinstance(self.weights, str) else str(id(self.weights))
        return self.name or f"lora_{hashlib.sha256(source.encode()).hexdigest()[:10]}"

    def setup(self, fx: FeatureExtractor, opened: Session) -> None:
        """Load the weights, unless they are there already."""
        if importlib.util.find_spec("peft") is None:
            raise MissingExtraError("content-shift", "lora", "peft")
        name = self.adapter
        if name in opened.sources and opened.sources[name] == _key(self.weights):
            return
        if name in opened.there or name in opened.sources:
            raise AdapterClash(name)
        opened.sources[name] = _key(self.weights)
        try:
            with quiet_loading():
                _load_lora(fx, self.weights, name)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"the LoRA {_say(self.weights)} cannot be loaded: {reason}") from error
        if name not in (getattr(fx.backbone, "peft_config", None) or {}):
            raise InputError(
                f"the LoRA {_say(self.weights)} holds no weights for this {_class(fx.backbone)}"
            )
        opened.activate({})

    def condition(self, ctx: Context) -> Patch:
        """Its adapter with its weight."""
        return Patch(adapters={self.adapter: self.weight})


def _key(weights: Any) -> Any:
    return os.path.realpath(weights) if isinstance(weights, str) else id(weights)


def _say(weights: Any) -> str:
    return weights if isinstance(weights, str) else "state dict"


def _class(model: nn.Module) -> str:
    return type(model).__name__


def _load_lora(fx: FeatureExtractor, weights: Any, name: str) -> None:
    source = dict(weights) if isinstance(weights, Mapping) else weights
    given: dict[str, Any] = {}
    if isinstance(source, str) and Path(source).is_file():
        given["weight_name"] = Path(source).name
        source = str(Path(source).parent)
    config: Any = fx.backbone.config
    if not hasattr(fx.backbone, "down_blocks"):
        if not hasattr(fx.pipeline, "load_lora_weights"):
            raise UnsupportedTechnique(
                "LoRA", type(fx.backbone), "without its pipeline; use from_pretrained"
            )
        fx.pipeline.load_lora_weights(source, adapter_name=name, **given)
        return
    from diffusers.loaders import lora_pipeline

    loader = lora_pipeline.StableDiffusionLoraLoaderMixin
    if getattr(config, "addition_embed_type", None) == "text_time":
        loader = lora_pipeline.StableDiffusionXLLoraLoaderMixin
        given["unet_config"] = config
    state, alphas, metadata = loader.lora_state_dict(source, return_lora_metadata=True, **given)
    if any(key.startswith("unet.") for key in state):
        loader.load_lora_into_unet(
            state, network_alphas=alphas, unet=fx.backbone, adapter_name=name, metadata=metadata
        )
    for tower in TEXT_TOWERS[:2]:
        if isinstance(getattr(fx.pipeline, tower, None), nn.Module):
            _load_into_tower(getattr(fx.pipeline, tower), tower, state, alphas, metadata, name)


def _load_into_tower(
    tower: nn.Module, prefix: str, state: Mapping[str, Tensor], alphas: Any, metadata: Any,
    name: str,
) -> None:  # fmt: skip
    """Text weights by peft itself: the way through transformers is tied to certain versions."""
    import peft
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft

    own = {k.removeprefix(f"{prefix}."): v for k, v in state.items() if k.startswith(f"{prefix}.")}
    if not own:
        return
    own = convert_state_dict_to_peft(convert_state_dict_to_diffusers(own))
    if not hasattr(tower, "text_model"):  # newer releases of transformers have one level less
        own = {k.removeprefix("text_model."): v for k, v in own.items()}
    ranks = {k.removesuffix(".lora_B.weight"): v.shape[1] for k, v in own.items() if "lora_B" in k}
    known = {k.removeprefix(f"{prefix}."): v for k, v in (alphas or {}).items()}
    common = (metadata or {}).get(f"{prefix}.lora_alpha")
    strength = {}
    for layer, rank in ranks.items():
        hits = [v for k, v in known.items() if k.startswith(layer) or layer in k]
        strength[layer] = float(hits[0]) if hits else float(common or rank)
    settings = peft.LoraConfig(
        r=max(ranks.values()), lora_alpha=max(strength.values()), target_modules=list(ranks),
        rank_pattern=ranks, alpha_pattern=strength,
    )  # fmt: skip
    peft.inject_adapter_in_model(settings, tower, name)
    peft.set_peft_model_state_dict(tower, own, adapter_name=name)


@dataclass(eq=False)
class IPAdapter(Technique):
    """Steer by an embedding of the input image: variation rather than control (weaker, paper A.2).

    Args:
        weights: Hub id, folder or file of an IP-Adapter, or its state dict.
        scale: Strength; 0 changes nothing.
        weight_name: File in the repository.
        subfolder: Folder in the repository.
        embeds: Image embeddings, ``[N, 1, D]``, one an image, in place of those that the
            pipeline's image encoder makes.
    """

    exclusive: ClassVar[bool] = True

    weights: Any = "h94/IP-Adapter"
    scale: float = 1.0
    weight_name: str = "ip-adapter_sd15.safetensors"
    subfolder: str = "models"
    embeds: Tensor | None = None
    _state: Any = field(default=None, init=False, repr=False)

    def setup(self, fx: FeatureExtractor, opened: Session) -> None:
        """Put the adapter's attention into the backbone."""
        backbone: Any = fx.backbone
        if not hasattr(backbone, "_load_ip_adapter_weights"):
            raise UnsupportedTechnique(
                "IPAdapter", type(fx.backbone), "diffusers has no IP-Adapter for it"
            )
        if self.embeds is None and getattr(fx.pipeline, "image_encoder", None) is None:
            raise InputError(
                "IPAdapter needs an image encoder: load it into the pipeline "
                "(fx.pipeline.image_encoder), or pass embeds="
            )
        if self._state is None:
            self._state = self._read()
        backbone._load_ip_adapter_weights([self._state], low_cpu_mem_usage=False)
        backbone.requires_grad_(False)
        for processor in backbone.attn_processors.values():
            if hasattr(processor, "to_k_ip"):
                processor.scale = [self.scale]

    def _read(self) -> Any:
        if isinstance(self.weights, Mapping):
            return self.weights
        from diffusers.utils import _get_model_file
        from safetensors import safe_open

        try:
            file = self.weights
            if not Path(file).is_file():
                with quiet_loading():
                    file = _get_model_file(
                        file, weights_name=self.weight_name, subfolder=self.subfolder
                    )
            found: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118
                    part, _, rest = key.partition(".")
                    found[part][rest] = tensors.get_tensor(key)
        except (OSError, KeyError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"the IP-Adapter {self.weights} cannot be read: {reason}") from error
        return found

    def condition(self, ctx: Context) -> Patch:
        """Embeddings of the batch's images."""
        if self.embeds is not None:
            embeds = ctx.inputs.pick(self.embeds, "image embeddings")
        else:
            embeds = ctx.inputs.once(("image_embeds",), lambda: self._encode(ctx))
        embeds = embeds.to(ctx.fx.device, ctx.fx.dtype)
        return Patch(added={"image_embeds": [embeds]})

    def _encode(self, ctx: Context) -> Tensor:
        pipe = ctx.fx.pipeline
        images = list(ctx.inputs.pixels.cpu())
        pixels = pipe.feature_extractor(images, return_tensors="pt", do_rescale=False).pixel_values
        encoder = pipe.image_encoder
        dtype = next(encoder.parameters()).dtype
        with torch.no_grad():
            found: Tensor = encoder(pixels.to(ctx.fx.device, dtype)).image_embeds
        return found[:, None]


@dataclass(eq=False)
class CleanBackbone(Technique):
    """Weights made for clean images (CleanDIFT, CVPR 2025): no noise is added at all.

    The U-Net's parameters are exchanged while the recipe runs, and put back.

    Args:
        weights: A safetensors file, a diffusers U-Net folder or hub id, a module or a state dict.
        time: Timestep that the backbone is told; by default that of the call.
    """

    exclusive: ClassVar[bool] = True

    weights: Any
    time: int | None = None
    _state: Any = field(default=None, init=False, repr=False)
    _before: Any = field(default=None, init=False, repr=False)

    def setup(self, fx: FeatureExtractor, opened: Session) -> None:
        """Exchange the parameters."""
        if self._state is None:
            self._state = self._read(fx)
        ours = dict(fx.backbone.named_parameters())
        missing = [n for n in ours if n not in self._state]
        wrong = [n for n, p in ours.items() if n not in missing and self._state[n].shape != p.shape]
        if missing or wrong:
            raise InputError(
                f"these weights do not fit the backbone: {len(missing)} missing, {len(wrong)} of "
                f"another shape, such as {(missing + wrong)[0]}"
            )
        self._before = [(p, p.data) for p in ours.values()]
        for name, p in ours.items():
            p.data = self._state[name].to(p.device, p.dtype)

    def teardown(self, fx: FeatureExtractor) -> None:
        """Put the parameters back."""
        for parameter, data in self._before or ():
            parameter.data = data
        self._before = None

    def condition(self, ctx: Context) -> Patch:
        """The clean latents."""
        return Patch(x_t=ctx.inputs.latents, time=self.time)

    def _read(self, fx: FeatureExtractor) -> Mapping[str, Tensor]:
        if isinstance(self.weights, Mapping):
            return self.weights
        if isinstance(self.weights, nn.Module):
            return self.weights.state_dict()
        try:
            if Path(self.weights).is_file():
                from safetensors.torch import load_file

                return load_file(self.weights)
            loaded = type(fx.backbone).from_pretrained(self.weights)  # type: ignore[attr-defined]
            state: Mapping[str, Tensor] = loaded.state_dict()
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"the weights {self.weights} cannot be loaded: {reason}") from error
        return state

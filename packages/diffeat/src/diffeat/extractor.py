"""Images in, named feature maps out: encode, add noise, run the backbone until all is there."""

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from diffeat import _families, _images
from diffeat._loading import load_pipeline, native_size
from diffeat.capture import Capture
from diffeat.features import Features
from diffeat.naming import find_activation
from diffeat.noise import Schedule, seeded_noise
from diffeat.prompts import PipelineText, PromptEmbedding
from diffeat.selection import ATTENTION, VAE, Layers, Selection
from shared_core.errors import InputError

__all__ = ["FeatureExtractor", "Images", "Residuals"]

Images = Tensor | Image.Image | Sequence[Image.Image]
Prompt = str | Sequence[str] | Tensor | PromptEmbedding | None
Noise = Literal["seeded", "shared", "none", "inversion"] | Tensor
Residuals = Mapping[str, Any] | Callable[[Tensor, float, PromptEmbedding | None], Mapping[str, Any]]


class FeatureExtractor:
    """Features of a frozen diffusion model.

    Args:
        backbone: A diffusers U-Net or transformer.
        scheduler: The scheduler that belongs to it.
        layers: What to extract; see `Selection.parse`.
        vae: Turns images into latents; ``None`` for pixel-space models.
        text: Turns a list of prompts into a `PromptEmbedding`.
        size: Side of the images, or (height, width); they are resized to it, not cropped. By
            default images of any fitting size are taken as they are.
        vae_sample: Draw the latent from the VAE's posterior, as the authors' code does, instead of
            taking its mode.
        shift_timesteps: Apply a flow scheduler's static shift.
        aesthetic: SDXL refiner's time ids.
        pipeline: The pipeline that the parts came from, kept for whoever wants it.

    Attributes:
        backbone, vae, text, pipeline: The parts, free to be changed (adapters, processors).
        schedule: The forward process (`Schedule`).
        layers: Names in order of execution; assign a new selection at any time.

    Raises:
        ActivationNotFound: If a layer is unknown.
        UnsupportedBackbone: If the backbone is no known diffusion model.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        scheduler: Any,
        layers: Layers,
        vae: Any = None,
        text: Callable[[Sequence[str]], PromptEmbedding] | None = None,
        size: int | tuple[int, int] | None = None,
        vae_sample: bool = False,
        shift_timesteps: bool = False,
        aesthetic: bool = False,
        pipeline: Any = None,
    ) -> None:
        _families.family(backbone)
        self.backbone, self.vae, self.text, self.pipeline = backbone, vae, text, pipeline
        self.schedule = Schedule(scheduler, shift_timesteps=shift_timesteps)
        self.size = (size, size) if isinstance(size, int) else size
        self.vae_sample, self.aesthetic = vae_sample, aesthetic
        self._training = False
        self._prompts: dict[tuple[str, ...], PromptEmbedding] = {}
        self.layers = layers
        backbone.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        layers: Layers,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        size: int | tuple[int, int] | None = None,
        variant: str | None = None,
        revision: str | None = None,
        offload: Literal["model", "sequential", "group"] | None = None,
        lora: str | None = None,
        **options: Any,
    ) -> "FeatureExtractor":
        """Load a diffusers pipeline by hub id or local folder.

        Args:
            model: Hub id, folder, or a key of `diffeat.presets.MODELS`.
            layers: See `Selection.parse`; a preset also sets the size.
            dtype: Of the weights.
            device: Where the backbone runs.
            size: Side of the images; by default the preset's or the model's own.
            variant: Such as ``fp16``.
            revision: Of the hub repository.
            offload: diffusers' offloading: ``model``, ``sequential`` or ``group``.
            lora: LoRA weights to load into the pipeline.
            options: Passed to the constructor.

        Raises:
            InputError: If it is no pipeline folder and cannot be fetched.
        """
        pipe = load_pipeline(model, dtype, variant, revision, lora)
        backbone = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
        if backbone is None:
            raise InputError(f"{model}: a {type(pipe).__name__} holds neither unet nor transformer")
        # Names are checked before weights move anywhere.
        selection = Selection.parse(layers)
        selection.resolve(backbone)
        if offload == "model":
            pipe.enable_model_cpu_offload(device=device)
        elif offload == "sequential":
            pipe.enable_sequential_cpu_offload(device=device)
        elif offload == "group":
            pipe.enable_group_offload(torch.device(device))
        elif offload is None:
            pipe.to(device)
        else:
            raise InputError(f"offload={offload!r}; accepted: model, sequential, group")
        vae = getattr(pipe, "vae", None)
        return cls(
            backbone,
            scheduler=pipe.scheduler,
            layers=layers,
            vae=vae,
            text=PipelineText(pipe) if hasattr(pipe, "encode_prompt") else None,
            size=size or native_size(layers, backbone, vae),
            aesthetic=bool(getattr(pipe.config, "requires_aesthetics_score", False)),
            pipeline=pipe,
            **options,
        )

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of what is extracted, in order of execution."""
        return self._layers

    @layers.setter
    def layers(self, layers: Layers) -> None:
        self._layers = Selection.parse(layers).resolve(self.backbone)

    @property
    def device(self) -> torch.device:
        """Where the backbone computes."""
        return torch.device(
            getattr(self.pipeline, "_execution_device", None)
            or next(self.backbone.parameters()).device
        )

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the backbone."""
        return next(self.backbone.parameters()).dtype

    @property
    def vae_factor(self) -> int:
        """Pixels per latent, along a side."""
        if self.vae is None:
            return 1
        known = getattr(self.vae.config, "spatial_factor", None)
        return int(known or 2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Name, channels, pixels per position, and module of each layer."""
        rows = []
        for name in self._layers:
            if name in (ATTENTION, VAE):
                rows.append({"name": name, "channels": None, "reduction": self.vae_factor})
                continue
            info = find_activation(self.backbone, name)
            reduction = info.reduction and info.reduction * self.vae_factor
            rows.append(
                {
                    "name": name,
                    "channels": info.channels,
                    "reduction": reduction,
                    "module": info.module_path,
                }
            )
        return rows

    def feature_names(self, times: Sequence[int]) -> list[str]:
        """Names of what a call with these timesteps gives, in order."""
        names = [name for name in self._layers if name != VAE]
        found = [f"{n}@t{t}" if len(times) > 1 else n for t in times for n in names]
        return [*found, *(name for name in self._layers if name == VAE)]

    def train_backbone(self, mode: bool = True) -> None:
        """Keep the graph, so that a loss on the features trains the backbone."""
        self._training = mode
        self.backbone.requires_grad_(mode)

    def encode_prompt(self, prompt: str | Sequence[str]) -> PromptEmbedding:
        """Embed one prompt or one per image; remembered by text.

        Raises:
            InputError: If there is no text encoder (any more).
        """
        prompts = (prompt,) if isinstance(prompt, str) else tuple(prompt)
        if prompts not in self._prompts:
            if self.text is None:
                raise InputError(
                    "there is no text encoder to embed this prompt; encode prompts before "
                    "drop_text_encoder(), or pass a PromptEmbedding"
                )
            self._prompts[prompts] = self.text(prompts)
        return self._prompts[prompts]

    def drop_text_encoder(self) -> None:
        """Free the text towers; prompts encoded so far keep working."""
        self.text = None
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            if getattr(self.pipeline, name, None) is not None:
                setattr(self.pipeline, name, None)

    def _embedding(self, prompt: Prompt) -> PromptEmbedding | None:
        if prompt is None or isinstance(prompt, PromptEmbedding):
            return prompt
        if prompt == "" and self.text is None and not _families.takes_text(self.backbone):
            return None
        if isinstance(prompt, Tensor):
            return PromptEmbedding(prompt)
        return self.encode_prompt(prompt)

    def pixels(self, images: Images, value_range: str = "0,1") -> Tensor:
        """Images as floats in [-1, 1], ``[B, 3, H, W]``, resized to `size`.

        Args:
            images: PIL images, uint8 ``[B, 3, H, W]``, or floats in `value_range`.
            value_range: Of float tensors: ``0,1`` or ``-1,1``.

        Raises:
            InputError: If they are empty, not finite, out of range, or of an unfit size.
        """
        if isinstance(images, Image.Image):
            images = [images]
        if isinstance(images, Tensor):
            x = _images.from_tensor(images, value_range)
            if self.size and tuple(x.shape[-2:]) != self.size:
                x = F.interpolate(x, self.size, mode="bilinear", align_corners=False)
        else:
            x = _images.from_pil(images, self.size)
        step = self.vae_factor * _families.granularity(self.backbone)
        if x.shape[-2] % step or x.shape[-1] % step:
            raise InputError(
                f"images of {x.shape[-2]}x{x.shape[-1]} pixels; this model wants multiples of "
                f"{step}: pass size=(height, width) to the extractor"
            )
        return x

    def encode_images(self, images: Images, value_range: str = "0,1", *, seed: int = 0) -> Tensor:
        """Clean latents ``[B, C, h, w]``, float32: the posterior's mode (or a draw), scaled.

        Args:
            images: See `pixels`.
            value_range: See `pixels`.
            seed: Of the draw, with ``vae_sample=True``.
        """
        x = self.pixels(images, value_range).to(self.device)
        if self.vae is None:
            return x.to(self.dtype).float()
        return _images.encode(self.vae, x, sample=self.vae_sample, seed=seed)

    def decode(self, latents: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` in [0, 1] of clean latents.

        Raises:
            InputError: If the VAE has no decoder.
        """
        x = latents if self.vae is None else _images.decode(self.vae, latents)
        return (x.float() / 2 + 0.5).clamp(0, 1)

    def make_noise(
        self,
        latents: Tensor,
        noise: Noise = "seeded",
        *,
        ids: Sequence[str | int] | None = None,
        seed: int = 0,
        draw: int = 0,
    ) -> Tensor | None:
        """The noise of a call, like `latents`; ``None`` for ``noise="none"``.

        Args:
            latents: Clean latents.
            noise: ``seeded`` by sample id, ``shared`` by all samples, ``none``, or a tensor.
            ids: Names of the samples; by default 0, 1, ...
            seed: Of the run.
            draw: Number of the draw.

        Raises:
            InputError: If the ids do not fit, or the tensor's shape.
        """
        batch = latents.shape[0]
        if isinstance(noise, Tensor):
            if noise.shape != latents.shape or not noise.isfinite().all():
                raise InputError(
                    f"noise {list(noise.shape)} for latents {list(latents.shape)}; give finite "
                    "noise of the same shape"
                )
            return noise.to(latents)
        if noise == "none":
            return None
        if noise not in ("seeded", "shared"):
            raise InputError(
                f"noise={noise!r}; accepted: seeded, shared, none, inversion, or a tensor"
            )
        names = list(range(batch)) if ids is None else list(ids)
        if len(names) != batch:
            raise InputError(f"{len(names)} ids for {batch} images")
        if noise == "shared":
            return (
                seeded_noise(["shared"], latents.shape[1:], seed=seed, draw=draw)
                .to(latents)
                .expand_as(latents)
            )
        return seeded_noise(names, latents.shape[1:], seed=seed, draw=draw).to(latents)

    def _arguments(
        self,
        x_t: Tensor,
        t: int,
        prompt: Prompt,
        class_labels: Tensor | None,
        added: dict[str, Tensor] | None,
        residuals: Residuals | None,
        backbone_kwargs: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        embedding = self._embedding(prompt)
        x_t = x_t.to(self.device, self.dtype)
        if embedding is not None:
            embedding = embedding.to(self.device, self.dtype).expand(x_t.shape[0])
        time = self.schedule.model_time(t)
        size = (x_t.shape[-2] * self.vae_factor, x_t.shape[-1] * self.vae_factor)
        found = _families.arguments(
            self.backbone,
            x_t,
            time,
            embedding,
            labels=None if class_labels is None else class_labels.to(self.device),
            added=added,
            image_size=size,
            aesthetic=self.aesthetic,
        )
        if residuals is not None:
            given = residuals(x_t, time, embedding) if callable(residuals) else residuals
            found.update(given)
        found.update(backbone_kwargs or {})
        return found

    def run(
        self,
        x_t: Tensor,
        t: int,
        prompt: Prompt = None,
        *,
        class_labels: Tensor | None = None,
        added: dict[str, Tensor] | None = None,
        residuals: Residuals | None = None,
        backbone_kwargs: Mapping[str, Any] | None = None,
        layers: Layers | None = None,
        stop: bool = True,
    ) -> Features:
        """Features of one forward from x_t as given, at exactly t.

        Args:
            x_t: Noisy latents ``[B, C, h, w]``.
            t: Timestep.
            prompt: See `__call__`.
            class_labels: Of class-conditional models, ``[B]``.
            added: In place of the ``added_cond_kwargs`` that are made by default.
            residuals: More arguments of the backbone, or a function of (x_t, time, embedding) that
                returns them: ``down_block_additional_residuals`` and
                ``mid_block_additional_residual`` of a ControlNet.
            backbone_kwargs: Further arguments, such as ``cross_attention_kwargs``.
            layers: Other layers than the extractor's.
            stop: End the forward after the last of them.
        """
        items = self._layers if layers is None else Selection.parse(layers).items
        wanted = [item for item in items if item != VAE]
        if not wanted:
            return Features({})
        cap = Capture(self.backbone, wanted, stop=stop, detach=not self._training)
        given = self._arguments(x_t, t, prompt, class_labels, added, residuals, backbone_kwargs)
        with nullcontext() if self._training else torch.no_grad(), cap:
            self.backbone(**given)
        return cap.features

    def predict(
        self,
        x_t: Tensor,
        t: int,
        prompt: Prompt = None,
        *,
        class_labels: Tensor | None = None,
        added: dict[str, Tensor] | None = None,
        residuals: Residuals | None = None,
        backbone_kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """The model's full prediction ``[B, C, h, w]`` at x_t; arguments as in `run`."""
        given = self._arguments(x_t, t, prompt, class_labels, added, residuals, backbone_kwargs)
        with nullcontext() if self._training else torch.no_grad():
            output = self.backbone(**given)
        return _families.unpack(self.backbone, output, x_t)

    def invert(self, latents: Tensor, t: int, prompt: Prompt = None, *, steps: int = 100) -> Tensor:
        """x_t by DDIM inversion: the model's own noise for these latents, in `steps` steps.

        Raises:
            InputError: For flow models.
        """
        if self.schedule.flow:
            raise InputError("inversion is defined for variance-preserving models")
        times = sorted({round(t * i / steps) for i in range(steps + 1)})
        x = latents
        for now, following in itertools.pairwise(times):
            output = self.predict(x, now, prompt).float()
            clean = self.schedule.predict_clean(x.float(), output, now)
            signal, scale = self.schedule.signal_and_noise(now)
            x = self.schedule.add_noise(clean, (x.float() - signal * clean) / scale, following)
        return x

    def __call__(
        self,
        images: Images | None = None,
        prompt: Prompt = None,
        t: int | Sequence[int] = 50,
        *,
        noise: Noise = "seeded",
        seed: int = 0,
        ids: Sequence[str | int] | None = None,
        ensemble: int = 1,
        latents: Tensor | None = None,
        value_range: str = "0,1",
        t_mode: Literal["exact", "official"] = "exact",
        class_labels: Tensor | None = None,
        added: dict[str, Tensor] | None = None,
        residuals: Residuals | None = None,
        backbone_kwargs: Mapping[str, Any] | None = None,
        out_dtype: torch.dtype | None = None,
        stop: bool = True,
    ) -> Features:
        """Features of images (Meng et al., section 3): encode, add noise to time t, one forward.

        Args:
            images: See `pixels`; or pass `latents`.
            prompt: Text, one per image or one for all; or its embedding.
            t: Timestep of 1000, or several, whose features are named ``...@t<t>``.
            noise: See `make_noise`; also ``inversion``.
            seed: Of the noise.
            ids: Names of the samples, which decide their noise.
            ensemble: Number of noise draws; features are averaged in float32.
            latents: Clean latents from `encode_images`, in place of images.
            value_range: See `pixels`.
            t_mode: ``official`` runs the timestep that the authors' code really runs.
            class_labels: See `run`.
            added: See `run`.
            residuals: See `run`.
            backbone_kwargs: See `run`.
            out_dtype: Of the features; by default the backbone's.
            stop: See `run`.

        Raises:
            InputError: If anything does not fit, before the backbone runs.
        """
        if (images is None) == (latents is None):
            raise InputError("give either images or latents")
        if ensemble < 1:
            raise InputError(f"ensemble={ensemble}; accepted: 1 and more")
        if t_mode not in ("exact", "official"):
            raise InputError(f"t_mode={t_mode!r}; accepted: exact, official")
        times = [t] if isinstance(t, int) else list(t)
        if not times:
            raise InputError("t is empty; give a timestep or several")
        for one in times:
            self.schedule.check(one)
        if latents is None:
            assert images is not None
            latents = self.encode_images(images, value_range, seed=seed)
        embedding = self._embedding(prompt)
        if embedding is not None:
            embedding.expand(latents.shape[0])
        common: dict[str, Any] = {
            "class_labels": class_labels,
            "added": added,
            "residuals": residuals,
            "backbone_kwargs": backbone_kwargs,
            "stop": stop,
        }
        found: dict[str, Tensor] = {}
        infos: dict[str, Any] = {}
        for one in times:
            exact = self.schedule.official_timestep(one) if t_mode == "official" else one
            suffix = f"@t{one}" if len(times) > 1 else ""
            sums: dict[str, Tensor] = {}
            for draw in range(ensemble):
                x_t = self._noised(latents, exact, embedding, noise, ids, seed, draw)
                features = self.run(x_t, exact, embedding, **common)
                infos.update({name + suffix: i for name, i in features.infos.items()})
                if ensemble == 1:
                    sums = dict(features)
                for name, value in features.items() if ensemble > 1 else ():
                    sums[name] = sums[name] + value.float() if name in sums else value.float()
            for name, value in sums.items():
                mean = value if ensemble == 1 else value / ensemble
                found[name + suffix] = mean.to(out_dtype or self.dtype)
        if VAE in self._layers:
            found[VAE] = latents.to(out_dtype or self.dtype)
        return Features(found, infos)

    def _noised(
        self,
        latents: Tensor,
        t: int,
        prompt: Prompt,
        noise: Noise,
        ids: Sequence[str | int] | None,
        seed: int,
        draw: int,
    ) -> Tensor:
        if isinstance(noise, str) and noise == "inversion":
            return self.invert(latents, t, prompt)
        drawn = self.make_noise(latents, noise, ids=ids, seed=seed, draw=draw)
        return latents if drawn is None else self.schedule.add_noise(latents, drawn, t)

    def stop_fraction(
        self, size: int | tuple[int, int] | None = None, prompt: Prompt = None
    ) -> float:
        """Share of the backbone's floating-point operations that run before the forward stops.

        Args:
            size: Side of the image; by default the extractor's.
            prompt: If the model wants one.

        Raises:
            InputError: If no size is known.
        """
        from torch.utils.flop_counter import FlopCounterMode

        side = (size, size) if isinstance(size, int) else size or self.size
        if side is None:
            raise InputError("give the size of the image")
        channels = getattr(self.backbone.config, "in_channels", 3)
        h, w = (s // self.vae_factor for s in side)
        channels = channels // 4 if _families.family(self.backbone) == "flux" else channels
        x = torch.zeros(1, channels, h, w)
        counts = []
        for stop in (True, False):
            with FlopCounterMode(display=False) as counter:
                self.run(x, 0, prompt, stop=stop)
            counts.append(counter.get_total_flops())
        return float(counts[0] / counts[1])

    def identity(self) -> str:
        """A short hash of the backbone's configuration and weights, for caches."""
        config: Any = self.backbone.config
        # diffusers' own notes (with an underscore) come in another order in every process.
        settings = sorted((k, str(v)) for k, v in dict(config).items() if not k.startswith("_"))
        digest = hashlib.sha256(str(settings).encode())
        for name, p in self.backbone.named_parameters():
            some = p.detach().flatten()[:: max(1, p.numel() // 8)][:8].float().cpu()
            digest.update(name.encode() + some.numpy().tobytes())
        return digest.hexdigest()[:16]

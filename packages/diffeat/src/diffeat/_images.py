"""Pixels in, latents out: images checked and scaled, the VAE's two directions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from shared_core.errors import InputError


def encode(vae: Any, x: Tensor, *, sample: bool, seed: int) -> Tensor:
    """Clean latents, float32: the posterior's mode, or a seeded draw of it, scaled and shifted."""
    config, dtype = vae.config, _dtype(vae)
    upcast = dtype == torch.float16 and bool(getattr(config, "force_upcast", False))
    if upcast:  # SDXL's VAE overflows in half precision
        vae.to(torch.float32)
    try:
        with torch.no_grad():
            encoded = vae.encode(x.to(torch.float32 if upcast else dtype))
    finally:
        if upcast:
            vae.to(dtype)
    posterior = getattr(encoded, "latent_dist", None)
    if posterior is None:
        latents = encoded.latents if hasattr(encoded, "latents") else encoded
    elif sample:
        latents = posterior.sample(torch.Generator(x.device).manual_seed(seed))
    else:
        latents = posterior.mode()
    scale, shift = _scaling(config)
    scaled: Tensor = (latents.float() - shift) * scale
    return scaled


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Pixels in [-1, 1] of clean latents."""
    scale, shift = _scaling(vae.config)
    with torch.no_grad():
        decoded = vae.decode((latents / scale + shift).to(_dtype(vae)))
    return decoded if isinstance(decoded, Tensor) else decoded.sample


def _dtype(vae: Any) -> torch.dtype:
    return next((p.dtype for p in vae.parameters()), torch.float32)


def _scaling(config: Any) -> tuple[float, float]:
    return getattr(config, "scaling_factor", 1.0), getattr(config, "shift_factor", None) or 0.0


def from_tensor(images: Tensor, value_range: str) -> Tensor:
    """Checked pixels in [-1, 1] of uint8 or floating images."""
    if images.ndim == 3:
        images = images.unsqueeze(0)
    if images.ndim != 4 or images.shape[0] == 0 or images.shape[1] != 3:
        raise InputError(f"images are {list(images.shape)}; accepted: [B, 3, H, W], B at least 1")
    if images.dtype == torch.uint8:
        return images.float() / 127.5 - 1
    if not images.is_floating_point():
        raise InputError(f"images are {images.dtype}; accepted: uint8 or floating point")
    if value_range not in ("0,1", "-1,1"):
        raise InputError(f"value_range={value_range!r}; accepted: '0,1', '-1,1'")
    images = images.float()
    if not images.isfinite().all():
        raise InputError("images hold NaN or infinite values")
    lowest = 0.0 if value_range == "0,1" else -1.0
    if images.max() > 1.5 or images.min() < lowest - 0.5:
        raise InputError(
            f"float images range from {images.min():.3g} to {images.max():.3g}; expected "
            f"[{value_range}]: divide by 255, pass uint8, or value_range='-1,1'"
        )
    return images * 2 - 1 if value_range == "0,1" else images


def from_pil(images: Sequence[Image.Image], size: tuple[int, int] | None) -> Tensor:
    """Pixels in [-1, 1] of PIL images, resized (not cropped) to `size`."""
    if not images:
        raise InputError("there are no images")
    rows = []
    for image in images:
        image = image.convert("RGB")
        if size is not None:
            image = image.resize((size[1], size[0]), Image.Resampling.BICUBIC)
        rows.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    if len({row.shape for row in rows}) > 1:
        raise InputError("images differ in size; pass size=(height, width) to the extractor")
    return torch.stack(rows).float() / 127.5 - 1

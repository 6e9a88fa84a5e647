"""Label-free measures of an activation: noise, granularity, locality; and its picture by PCA.

They make the three properties of Meng et al. (NeurIPS 2024, section 4) measurable; the paper shows
them in pictures, the estimators are ours.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from shared_core.errors import InputError

__all__ = ["hf_ratio", "locality", "noise_ratio", "pca_image"]

Maps = Float[Tensor, "batch channels height width"]


def _check(features: Tensor) -> Tensor:
    if features.ndim != 4 or features.numel() == 0:
        raise InputError(f"features are {list(features.shape)}; accepted: [B, C, H, W], not empty")
    if not features.isfinite().all():
        raise InputError("features hold NaN or infinite values")
    return features.double()


def noise_ratio(first: Maps, second: Maps) -> float:
    """Share of an activation's variance that comes from the noise drawn, from two draws.

    ``E_x Var_eps[f] / Var[f]`` by channel, averaged over channels: half the mean squared difference
    of the draws over the variance of all values.

    Args:
        first: Features of some images with one draw of noise.
        second: Features of the same images with another.

    Raises:
        InputError: If the shapes differ or values are not finite.

    Examples:
        >>> x = torch.randn(2, 3, 8, 8)
        >>> noise_ratio(x, x)
        0.0
    """
    a, b = _check(first), _check(second)
    if a.shape != b.shape:
        raise InputError(f"the draws are {list(a.shape)} and {list(b.shape)}; give equal shapes")
    within = ((a - b) ** 2).mean((0, 2, 3)) / 2
    total = torch.cat([a, b]).var((0, 2, 3), correction=0)
    used = total > 0
    return float((within[used] / total[used]).mean()) if used.any() else 0.0


def hf_ratio(features: Maps) -> float:
    """Share of the spectrum's power above half the Nyquist frequency, the mean apart.

    Args:
        features: Maps of at least 4 x 4 positions.

    Raises:
        InputError: If they are smaller or not finite.

    Examples:
        >>> checks = (torch.arange(8)[:, None] + torch.arange(8)) % 2
        >>> hf_ratio(checks[None, None].float())
        1.0
    """
    x = _check(features)
    height, width = x.shape[-2:]
    if min(height, width) < 4:
        raise InputError(f"maps of {height}x{width}; accepted: at least 4x4")
    power = torch.fft.fft2(x - x.mean((2, 3), keepdim=True)).abs() ** 2
    rows = torch.fft.fftfreq(height, device=x.device).abs()[:, None]
    columns = torch.fft.fftfreq(width, device=x.device).abs()[None]
    high = torch.maximum(rows, columns) > 0.25
    total = power.sum((0, 2, 3))
    used = total > 0
    share = (power * high).sum((0, 2, 3))[used] / total[used]
    return round(float(share.mean()), 12) if used.any() else 0.0


def locality(features: Maps) -> float:
    """Mean cosine similarity of neighbouring positions minus that of positions far apart.

    Far means more than a quarter of the height. High values show that an activation knows where it
    is, as self-attention queries and keys do even without positional embeddings.

    Args:
        features: Maps of at least 4 x 4 positions, or 1,024 of them at most.

    Raises:
        InputError: If they are smaller or not finite.

    Examples:
        >>> locality(torch.ones(1, 2, 8, 8))
        0.0
    """
    x = _check(features)
    if min(x.shape[-2:]) < 4:
        raise InputError(f"maps of {x.shape[-2]}x{x.shape[-1]}; accepted: at least 4x4")
    side = min(32, x.shape[-2]), min(32, x.shape[-1])
    x = F.normalize(F.adaptive_avg_pool2d(x, side), dim=1)
    height, width = side
    near = torch.cat(
        [
            (x[:, :, 1:] * x[:, :, :-1]).sum(1).flatten(1),
            (x[..., 1:] * x[..., :-1]).sum(1).flatten(1),
        ],
        1,
    ).mean()
    tokens = x.flatten(2)
    cosine = torch.einsum("bcn,bcm->nm", tokens, tokens) / len(x)
    place = torch.cartesian_prod(torch.arange(height), torch.arange(width)).double().to(x.device)
    far = torch.cdist(place, place) > height / 4
    return round(float(near - cosine[far].mean()), 12)


def pca_image(features: Maps, n: int = 3) -> Float[Tensor, "batch n height width"]:
    """The first principal components of the positions of all images, each scaled to [0, 1].

    Args:
        features: Maps.
        n: Number of components; missing ones are zero.

    Raises:
        InputError: If values are not finite.

    Examples:
        >>> pca_image(torch.randn(2, 8, 4, 4)).shape
        torch.Size([2, 3, 4, 4])
    """
    x = _check(features)
    batch, channels, height, width = x.shape
    tokens = x.permute(0, 2, 3, 1).reshape(-1, channels)
    tokens = tokens - tokens.mean(0)
    _, vectors = torch.linalg.eigh(tokens.T @ tokens)
    top = vectors.flip(1)[:, :n]
    # The sign of an eigenvector is arbitrary; its largest entry is made positive.
    signs = top.gather(0, top.abs().argmax(0, keepdim=True)).sign()
    scores = tokens @ (top * signs)
    low, high = scores.quantile(0.01, 0), scores.quantile(0.99, 0)
    scores = ((scores - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    scores = F.pad(scores, (0, n - scores.shape[1]))
    return scores.view(batch, height, width, n).permute(0, 3, 1, 2).float()

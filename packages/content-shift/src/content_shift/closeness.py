"""How close two images are: PSNR, SSIM, and agreement of edges, all in plain torch."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from shared_core.errors import InputError

__all__ = ["METRICS", "closeness", "edge_f1", "psnr", "sobel", "ssim"]

Pictures = Float[Tensor, "batch channels height width"]
PerImage = Float[Tensor, " batch"]


def psnr(images: Pictures, originals: Pictures) -> PerImage:
    """Peak signal-to-noise ratio in decibels of images in [0, 1]; at most 100.

    Examples:
        >>> psnr(torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.1)).item()
        20.0
    """
    error = ((images.double() - originals.double()) ** 2).mean((1, 2, 3))
    return (-10 * error.clamp_min(1e-10).log10()).float()


def ssim(images: Pictures, originals: Pictures) -> PerImage:
    """Structural similarity (Wang et al., 2004): Gaussian window of 11, sigma 1.5, on [0, 1].

    Windows lie wholly inside the image; smaller images use one that fits.

    Examples:
        >>> x = torch.rand(2, 3, 16, 16)
        >>> ssim(x, x).tolist()
        [1.0, 1.0]
    """
    x, y = images.double(), originals.double()
    side = min(11, *x.shape[-2:])
    side -= 1 - side % 2
    at = torch.arange(side, dtype=x.dtype, device=x.device) - side // 2
    line = torch.exp(-(at**2) / (2 * 1.5**2))
    window = line[:, None] * line
    kernel = (window / window.sum()).expand(x.shape[1], 1, side, side)

    def blur(z: Tensor) -> Tensor:
        return F.conv2d(z, kernel, groups=x.shape[1])

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    value = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return value.mean((1, 2, 3)).float()


def sobel(images: Pictures) -> Float[Tensor, "batch 1 height width"]:
    """Magnitude of the Sobel gradient of the mean over channels, clipped to [0, 1].

    Examples:
        >>> sobel(torch.ones(1, 3, 5, 5)).abs().max().item()
        0.0
    """
    grey = F.pad(images.float().mean(1, keepdim=True), (1, 1, 1, 1), "replicate")
    across = grey.new_tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])[None, None]
    gradient = [F.conv2d(grey, k) for k in (across, across.transpose(2, 3))]
    return (gradient[0] ** 2 + gradient[1] ** 2).sqrt().clamp(0, 1)


def edge_f1(images: Pictures, originals: Pictures, threshold: float = 0.25) -> PerImage:
    """F1 of edges (Sobel magnitude above a threshold) with a tolerance of one pixel.

    Two images without any edge agree wholly.

    Examples:
        >>> x = torch.rand(2, 3, 8, 8)
        >>> edge_f1(x, x).tolist()
        [1.0, 1.0]
    """
    mine, theirs = ((sobel(x) > threshold).float() for x in (images, originals))
    near = [F.max_pool2d(x, 3, 1, 1) for x in (mine, theirs)]
    counts = [x.sum((1, 2, 3)) for x in (mine, theirs)]
    precision = (mine * near[1]).sum((1, 2, 3)) / counts[0].clamp_min(1)
    recall = (theirs * near[0]).sum((1, 2, 3)) / counts[1].clamp_min(1)
    f1 = 2 * precision * recall / (precision + recall).clamp_min(1e-12)
    return torch.where(counts[0] + counts[1] == 0, 1.0, f1)


METRICS = {"psnr": psnr, "ssim": ssim, "edge": edge_f1}


def closeness(images: Pictures, originals: Pictures, metric: str = "psnr") -> PerImage:
    """One of ``psnr``, ``ssim`` and ``edge``, image by image.

    Raises:
        InputError: If the metric is unknown or the shapes differ.

    Examples:
        >>> closeness(torch.ones(1, 3, 8, 8), torch.ones(1, 3, 8, 8), "ssim").item()
        1.0
    """
    if metric not in METRICS:
        raise InputError(f"metric={metric!r}; accepted: {', '.join(METRICS)}")
    if images.shape != originals.shape:
        raise InputError(f"images {list(images.shape)} and {list(originals.shape)} differ")
    return METRICS[metric](images, originals)

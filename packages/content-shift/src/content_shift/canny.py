"""Canny edges as OpenCV finds them, in plain torch: what the paper's ControlNet is given."""

import importlib.util

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from shared_core.errors import InputError, MissingExtraError

__all__ = ["canny"]

TAN_22 = 13573  # tan(22.5 degrees) in 15 bits, as OpenCV rounds it


def canny(
    images: Float[Tensor, "batch channels height width"],
    low: int = 100,
    high: int = 200,
    *,
    backend: str = "auto",
) -> Float[Tensor, "batch 3 height width"]:
    """Edges of images in [0, 1]: three equal channels of 0 and 1.

    Sobel gradients of aperture 3 with L1 norm, of the channel where it is largest; suppression of
    non-maxima; hysteresis. The arithmetic is OpenCV's, in integers.

    Args:
        images: Of 1 or 3 channels.
        low: Lower threshold, of 0 to 255 scaled gradients.
        high: Upper threshold.
        backend: ``torch``, ``opencv`` (faster on the CPU; needs the extra ``canny``), or ``auto``:
            OpenCV where it is installed.

    Raises:
        InputError: If values lie outside [0, 1], or an option is unknown.
        MissingExtraError: If OpenCV is asked for and not there.

    Examples:
        >>> square = torch.zeros(1, 3, 16, 16); square[..., 4:12, 4:12] = 1
        >>> canny(square, backend="torch").sum(1).bool().sum().item() > 20
        True
    """
    if backend not in ("auto", "torch", "opencv"):
        raise InputError(f"backend={backend!r}; accepted: auto, torch, opencv")
    if not 0 <= low <= high:
        raise InputError(f"thresholds {low} and {high}; accepted: 0 <= low <= high")
    if images.shape[1] not in (1, 3) or not bool(((images >= 0) & (images <= 1)).all()):
        raise InputError("Canny wants images of 1 or 3 channels with values in [0, 1]")
    has_opencv = importlib.util.find_spec("cv2") is not None
    if backend == "opencv" and not has_opencv:
        raise MissingExtraError("content-shift", "canny", "opencv-python-headless")
    pixels = (images.float() * 255).round().to(torch.uint8)
    use = backend == "opencv" or (backend == "auto" and has_opencv)
    edges = _with_opencv(pixels, low, high) if use else _with_torch(pixels, low, high)
    return edges.float().unsqueeze(1).expand(-1, 3, -1, -1)


def _with_opencv(pixels: Tensor, low: int, high: int) -> Tensor:
    import cv2

    rows = [
        torch.from_numpy(cv2.Canny(image.permute(1, 2, 0).contiguous().numpy(), low, high))
        for image in pixels.cpu()
    ]
    return (torch.stack(rows) > 0).to(pixels.device)


def _with_torch(pixels: Tensor, low: int, high: int) -> Tensor:
    x = F.pad(pixels.float(), (1, 1, 1, 1), "replicate")
    # Sums of a few bytes: exact in float32.
    across = x[..., 2:] - x[..., :-2]
    dx = across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]
    down = x[..., 2:, :] - x[..., :-2, :]
    dy = down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]
    magnitude, channel = (dx.abs() + dy.abs()).max(1, keepdim=True)
    dx, dy = (d.gather(1, channel)[:, 0].long() for d in (dx, dy))
    m = magnitude[:, 0].long()
    around = F.pad(m, (1, 1, 1, 1))
    height, width = m.shape[1:]

    def near(row: int, column: int) -> Tensor:
        return around[:, 1 + row : 1 + row + height, 1 + column : 1 + column + width]

    ax, ay = dx.abs(), dy.abs() << 15
    flat, steep = ay < ax * TAN_22, ay > ax * TAN_22 + (ax << 16)
    falling = (dx < 0) != (dy < 0)
    diagonal = torch.where(
        falling,
        (m > near(-1, 1)) & (m > near(1, -1)),
        (m > near(-1, -1)) & (m > near(1, 1)),
    )
    level = (m > near(0, -1)) & (m >= near(0, 1))
    upright = (m > near(-1, 0)) & (m >= near(1, 0))
    ridge = torch.where(flat, level, torch.where(steep, upright, diagonal)) & (m > low)
    edges = ridge & (m > high)
    while True:  # weak ridges that touch an edge become edges
        grown = F.max_pool2d(edges.float(), 3, 1, 1).bool() & ridge
        if bool((grown == edges).all()):
            return edges
        edges = grown

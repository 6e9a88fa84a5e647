"""The GATE score (Meng et al., NeurIPS 2024, eq. 1 and 2): whose contours are the input's?

The reference is a feature with hardly any noise (t = 0), the anchor one with more content shift.
Contours are norms of a Laplacian over channels; a technique scores 1 where its feature has the
reference's contours, 0 where it is as far from them as the anchor, and below 0 where it is farther.
The paper fixes neither the kernel nor the borders; here they are arguments.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from content_shift.errors import ZeroAnchor
from shared_core.errors import InputError

__all__ = ["contours", "difference", "laplacian", "score", "score_of_differences"]

Maps = Float[Tensor, "batch channels height width"]

KERNELS: dict[str, list[list[float]]] = {
    "5pt": [[0, 1, 0], [1, -4, 1], [0, 1, 0]],
    "9pt": [[1, 1, 1], [1, -8, 1], [1, 1, 1]],
}
PADDINGS = {"replicate": "replicate", "zero": "constant", "reflect": "reflect"}


def _check(features: Tensor, what: str) -> Tensor:
    if features.ndim != 4 or features.numel() == 0:
        raise InputError(f"{what} is {list(features.shape)}; accepted: [B, C, H, W], not empty")
    if not features.isfinite().all():
        raise InputError(f"{what} holds NaN or infinite values; extract in bfloat16 or float32")
    return features if features.dtype == torch.float64 else features.float()


def laplacian(features: Maps, *, kernel: str = "5pt", padding: str = "replicate") -> Maps:
    """The discrete Laplacian of every channel, in float32 (float64 stays).

    Args:
        features: Maps of any floating type.
        kernel: ``5pt`` (the four neighbours minus four times the centre) or ``9pt`` (all eight).
        padding: Of the borders: ``replicate``, ``zero`` or ``reflect``.

    Raises:
        InputError: If an option is unknown, or a map is too small to be reflected.

    Examples:
        >>> ramp = torch.arange(4.0).expand(1, 1, 4, 4)
        >>> laplacian(ramp)[0, 0, 0].tolist()
        [1.0, 0.0, 0.0, -1.0]
    """
    if kernel not in KERNELS or padding not in PADDINGS:
        raise InputError(
            f"kernel={kernel!r}, padding={padding!r}; accepted: {', '.join(KERNELS)}; "
            f"{', '.join(PADDINGS)}"
        )
    if padding == "reflect" and min(features.shape[-2:]) < 2:
        raise InputError("a map with a side of 1 cannot be reflected; use padding='replicate'")
    x = features if features.dtype == torch.float64 else features.float()
    batch, channels, height, width = x.shape
    x = F.pad(x.reshape(batch * channels, 1, height, width), (1, 1, 1, 1), PADDINGS[padding])
    weight = x.new_tensor(KERNELS[kernel])[None, None]
    return F.conv2d(x, weight).view(batch, channels, height, width)


def contours(
    features: Maps, *, kernel: str = "5pt", padding: str = "replicate"
) -> Float[Tensor, "batch height width"]:
    """``||Lap(F)_ij||_2`` over the channels, position by position (eq. 1).

    Examples:
        >>> delta = torch.zeros(1, 1, 3, 3); delta[..., 1, 1] = 1
        >>> contours(delta)[0, 1].tolist()
        [1.0, 4.0, 1.0]
    """
    lines: Tensor = laplacian(features, kernel=kernel, padding=padding).norm(dim=1)
    return lines


def difference(
    features: Maps,
    reference: Maps,
    *,
    kernel: str = "5pt",
    padding: str = "replicate",
    normalize: str | None = None,
) -> Float[Tensor, " batch"]:
    """Eq. 1, image by image: ``sum_ij | ||Lap(F_ref)_ij||_2 - ||Lap(F)_ij||_2 |``.

    Args:
        features: The features that are judged.
        reference: Features of the same images at t = 0.
        kernel: See `laplacian`.
        padding: See `laplacian`.
        normalize: ``channel`` divides both by the reference's standard deviation over positions,
            channel by channel, so that wide channels do not decide alone.

    Raises:
        InputError: If shapes differ or values are not finite.

    Examples:
        >>> x = torch.randn(2, 3, 8, 8)
        >>> difference(x, x).tolist()
        [0.0, 0.0]
    """
    f, ref = _check(features, "the feature"), _check(reference, "the reference")
    if f.shape != ref.shape:
        raise InputError(f"features {list(f.shape)} and reference {list(ref.shape)} differ")
    if normalize not in (None, "channel"):
        raise InputError(f"normalize={normalize!r}; accepted: None, 'channel'")
    if normalize == "channel":
        std = ref.std((2, 3), correction=0, keepdim=True)
        scale = torch.where(std > 0, 1 / std.clamp_min(torch.finfo(std.dtype).tiny), 0.0)
        f, ref = f * scale, ref * scale
    ours, theirs = (contours(x, kernel=kernel, padding=padding) for x in (f, ref))
    return (theirs - ours).abs().sum((1, 2))


def score_of_differences(
    diff: Float[Tensor, " batch"],
    diff_anchor: Float[Tensor, " batch"],
    *,
    reduction: str = "mean",
    where: str = "the feature",
) -> Tensor:
    """Eq. 2 from eq. 1's sums: ``(diff_anchor - diff) / diff_anchor``.

    Args:
        diff: Eq. 1 of the technique's features.
        diff_anchor: Eq. 1 of the anchor's.
        reduction: ``mean`` scores the data set (means over images before dividing); ``none``
            gives one score an image.
        where: What is named in an error.

    Raises:
        ZeroAnchor: If an anchor equals its reference.
        InputError: If the anchor's difference is negative or NaN.

    Examples:
        >>> score_of_differences(torch.tensor([1.0, 1.0]), torch.tensor([2.0, 6.0]))
        tensor(0.7500)
    """
    if reduction not in ("mean", "none"):
        raise InputError(f"reduction={reduction!r}; accepted: mean, none")
    below = diff_anchor.mean() if reduction == "mean" else diff_anchor
    if not bool((below >= 0).all()):
        raise InputError(f"{where}: the anchor's difference is negative or NaN")
    if bool((below == 0).any()):
        raise ZeroAnchor(where)
    above = diff.mean() if reduction == "mean" else diff
    return (below - above) / below


def score(
    features: Maps,
    reference: Maps,
    anchor: Maps,
    *,
    kernel: str = "5pt",
    padding: str = "replicate",
    normalize: str | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Eq. 2: 1 for the reference's contours, 0 for the anchor's shift, below 0 for more shift.

    Args:
        features: Features under a technique.
        reference: Features at t = 0, without noise.
        anchor: Features without the technique, from the same noise.
        kernel: See `laplacian`.
        padding: See `laplacian`.
        normalize: See `difference`.
        reduction: See `score_of_differences`.

    Raises:
        ZeroAnchor: If the anchor equals the reference.
        InputError: If shapes differ or values are not finite.

    Examples:
        >>> ref = torch.randn(1, 2, 8, 8); anchor = ref + torch.randn(1, 2, 8, 8)
        >>> float(score(ref, ref, anchor)), float(score(anchor, ref, anchor))
        (1.0, 0.0)
    """
    options: dict[str, Any] = {"kernel": kernel, "padding": padding, "normalize": normalize}
    below = difference(anchor, reference, **options)
    return score_of_differences(
        difference(features, reference, **options), below, reduction=reduction
    )

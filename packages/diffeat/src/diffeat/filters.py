"""Which activations are worth ranking, decided without training (Meng et al., section 4)."""

import re
from collections.abc import Mapping

from torch import nn

from diffeat.naming import ActivationInfo, list_activations
from shared_core.errors import InputError

__all__ = ["auto_candidates", "paper_candidates"]

CLEAN = ("res-out", "cross-q", "block-out", "vit-out")
BLOCKS_OF_TEN = (0, 1, 3, 5, 7, 9)


def paper_candidates(model: nn.Module) -> list[str]:
    """The paper's qualitative filter: 63 of SDXL's activations, 33 of SD1.5's.

    Only the up stage; no increments (they are noisy); no resolution that is too coarse (SD1.5's
    first) or too noisy (the last); from the clean part what lies between modules and blocks and
    the cross-attention queries; self-attention queries and keys only where noise returns.

    Args:
        model: A U-Net with the layout of SD1.5/2.1 (four resolutions) or SDXL (three, ViT modules
            of 10 and 2 blocks).

    Raises:
        InputError: If the layout is another one; see `auto_candidates`.

    Examples:
        >>> from diffeat.presets import build_topology
        >>> len(paper_candidates(build_topology("sdxl")))
        63
    """
    up = [info for info in list_activations(model) if info.stage == "up"]
    levels = max((info.level or 0 for info in up), default=-1) + 1
    blocks = {
        level: max(
            (i.block or 0 for i in up if i.level == level and i.block is not None), default=-1
        )
        for level in range(levels)
    }
    if levels == 3 and [blocks[i] for i in range(3)] == [9, 1, -1]:
        late = r"up-level1-repeat2-vit-block[01]-self-k|up-level0-upsampler-out"
        clean_levels = (0, 1)
    elif levels == 4 and [blocks[i] for i in range(4)] == [-1, 0, 0, 0]:
        late = (
            r"up-level2-repeat2-vit-block0-self-[qk]|up-level2-upsampler-out|"
            r"up-level3-repeat\d-vit-block0-self-[qk]"
        )
        clean_levels = (1, 2)
    else:
        raise InputError(
            "the paper's filter is known for the layouts of SD1.5/2.1 and SDXL only; use "
            "auto_candidates with measured noise ratios"
        )

    def kept(info: ActivationInfo) -> bool:
        if re.fullmatch(late, info.name):
            return True
        if info.level not in clean_levels or info.kind not in CLEAN:
            return False
        return blocks[info.level] != 9 or info.block is None or info.block in BLOCKS_OF_TEN

    return [info.name for info in up if kept(info)]


def auto_candidates(
    model: nn.Module, noise: Mapping[str, float], *, noise_max: float | None = None
) -> list[str]:
    """The same idea for any U-Net, with measured noise in place of knowledge of the model.

    Keeps, of the up stage, what lies between modules and blocks and cross-attention queries where
    their noise ratio is at most `noise_max`, and self-attention queries and keys where it is more.

    Args:
        model: The U-Net.
        noise: Noise ratio by activation (`diffeat.measure.noise_ratio`).
        noise_max: Where noise begins; by default the mean of the lowest and the highest value of
            the up stage's outputs between modules.

    Raises:
        InputError: If `noise` lacks the up stage.

    Examples:
        >>> from diffeat.presets import build_topology
        >>> unet = build_topology("sd15")
        >>> noise = {a.name: 0.1 + 0.2 * (a.level or 0) for a in list_activations(unet)}
        >>> "up-level3-repeat0-vit-block0-self-k" in auto_candidates(unet, noise)
        True
    """
    up = [info for info in list_activations(model) if info.stage == "up" and info.name in noise]
    clean = [noise[info.name] for info in up if info.kind in CLEAN]
    if not clean:
        raise InputError("noise holds no activation of the up stage; measure those first")
    if noise_max is None:
        noise_max = (min(clean) + max(clean)) / 2
    return [
        info.name
        for info in up
        if (info.kind in CLEAN and noise[info.name] <= noise_max)
        or (info.kind in ("self-q", "self-k") and noise[info.name] > noise_max)
    ]

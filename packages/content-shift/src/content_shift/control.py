"""ControlNet fed with the input image itself (paper A.2), on any diffusers U-Net with text."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from content_shift._state import Session, quiet_loading
from content_shift.canny import canny
from content_shift.closeness import sobel
from content_shift.errors import IncompatibleControl, UnsupportedTechnique
from content_shift.recipe import Context, Patch, Technique, added_conditions
from diffeat import FeatureExtractor, PromptEmbedding
from shared_core.errors import InputError

__all__ = ["PREPROCESS", "ControlNet", "check_control", "skip_channels"]

PREPROCESS: dict[str, Callable[[Tensor], Tensor]] = {
    "canny": canny,
    "sobel": sobel,
    "image": lambda pixels: pixels,
}


def skip_channels(model: Any) -> list[int]:
    """Channels of a U-Net's (or ControlNet's) skip connections, in order, and of its mid block.

    Examples:
        >>> from diffeat.presets import build_topology
        >>> len(skip_channels(build_topology("sd15"))), len(skip_channels(build_topology("sdxl")))
        (13, 10)
    """
    found = [model.conv_in.out_channels]
    for block in model.down_blocks:
        found += [resnet.out_channels for resnet in block.resnets]
        if block.downsamplers is not None:
            found.append(block.downsamplers[0].out_channels)
    return [*found, model.mid_block.resnets[-1].out_channels]


def check_control(backbone: nn.Module, control: nn.Module | None = None) -> None:
    """Refuse what cannot work before anything runs.

    Raises:
        UnsupportedTechnique: If the backbone takes no residuals.
        IncompatibleControl: If the ControlNet's residuals do not fit.
    """
    taken = inspect.signature(backbone.forward).parameters
    if "down_block_additional_residuals" not in taken:
        raise UnsupportedTechnique(
            "ControlNet", type(backbone), "its forward takes no residuals (a U-Net's does)"
        )
    if control is None:
        return
    config: Any = control.config
    theirs, ours = skip_channels(control), skip_channels(backbone)
    widths: Any = backbone.config
    fits = theirs == ours and config.in_channels == widths.in_channels
    if not fits or config.cross_attention_dim != widths.cross_attention_dim:
        raise IncompatibleControl(theirs, ours)


@dataclass(eq=False)
class ControlNet(Technique):
    """Steer by a ControlNet that sees the input image (edges of it), at every forward.

    It acts on the skip connections and behind the mid block: only the up stage changes.

    Args:
        model: Hub id, folder, or a `diffusers.ControlNetModel`.
        preprocess: What is made of the image: ``canny`` (100, 200, as published), ``sobel``,
            ``image``, or a function from pixels ``[B, 3, H, W]`` in [0, 1] to control images.
        scale: Conditioning scale; 0 changes nothing, 1 is the paper's.
        images: Control images in [0, 1], one an image, in place of those made from the input.

    Examples:
        >>> ControlNet("lllyasviel/sd-controlnet-canny").scale
        1.0
    """

    controls: ClassVar[bool] = True

    model: Any
    preprocess: Any = "canny"
    scale: float = 1.0
    images: Tensor | None = None
    _net: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not callable(self.preprocess) and self.preprocess not in PREPROCESS:
            raise InputError(
                f"preprocess={self.preprocess!r}; accepted: {', '.join(PREPROCESS)}, or a function"
            )

    def setup(self, fx: FeatureExtractor, opened: Session) -> None:
        """Load the ControlNet and check that it fits."""
        check_control(fx.backbone)
        if self._net is None:
            self._net = _load(self.model, fx.dtype) if isinstance(self.model, str) else self.model
            self._net.eval().requires_grad_(False)
        check_control(fx.backbone, self._net)
        if next(self._net.parameters()).device != fx.device:
            self._net.to(fx.device)

    def condition(self, ctx: Context) -> Patch:
        """Residuals of every forward, from the batch's control images."""
        picture = self._picture(ctx)
        if self.scale == 0:
            return Patch()
        fx, net = ctx.fx, self._net
        dtype = next(net.parameters()).dtype
        picture = picture.to(fx.device, dtype)

        def residuals(x: Tensor, time: float, prompt: PromptEmbedding | None) -> Mapping[str, Any]:
            assert prompt is not None
            given: dict[str, Any] = {}
            if net.config.addition_embed_type == "text_time":
                added = added_conditions(fx, x, prompt)
                given["added_cond_kwargs"] = {k: v.to(dtype) for k, v in added.items()}
            times = torch.full((len(x),), time, device=x.device, dtype=torch.long)
            with torch.no_grad():
                down, mid = net(
                    x.to(dtype), times, prompt.states.to(dtype), picture,
                    conditioning_scale=self.scale, return_dict=False, **given,
                )  # fmt: skip
            return {
                "down_block_additional_residuals": tuple(d.to(x.dtype) for d in down),
                "mid_block_additional_residual": mid.to(x.dtype),
            }

        own = None if self.images is not None else (net, self.preprocess, self.scale)
        return Patch(residuals=residuals, residuals_key=own)

    def _picture(self, ctx: Context) -> Tensor:
        inputs = ctx.inputs
        if self.images is not None:
            picture = cast(Tensor, inputs.pick(self.images, "control images"))
        else:
            make = self.preprocess if callable(self.preprocess) else PREPROCESS[self.preprocess]
            key = ("control", self.preprocess)
            picture = cast(Tensor, inputs.once(key, lambda: make(inputs.pixels)))
        channels = self._net.config.conditioning_channels
        wanted = (len(inputs.pixels), channels, *inputs.pixels.shape[-2:])
        if tuple(picture.shape) != wanted or picture.min() < 0 or picture.max() > 1:
            raise InputError(
                f"control images {list(picture.shape)} in [{picture.min():.3g}, "
                f"{picture.max():.3g}]; this ControlNet wants {list(wanted)} in [0, 1]"
            )
        return picture


def _load(source: str, dtype: torch.dtype) -> nn.Module:
    from diffusers import ControlNetModel

    try:
        with quiet_loading():
            net: nn.Module = ControlNetModel.from_pretrained(source, torch_dtype=dtype)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"the ControlNet {source} cannot be loaded: {reason}") from error
    return net

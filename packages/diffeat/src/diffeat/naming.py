"""Names of every activation of a diffusion backbone, found from its modules without a forward.

The names are those of the published layer lists (Meng et al., NeurIPS 2024): ``up-level1-repeat0-
vit-block0-cross-q`` is the query of the cross-attention in block 0 of the first ViT module of the
second-lowest resolution of the up stage. Modules are recognised by their structure and class name,
so that nothing here imports diffusers.
"""

import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from diffeat.errors import ActivationNotFound, UnsupportedBackbone

__all__ = [
    "ActivationInfo",
    "alias",
    "find_activation",
    "list_activations",
    "module_activation",
    "unwrap",
]

DITS = ("PixArtTransformer2DModel", "DiTTransformer2DModel", "HunyuanDiT2DModel")
JOINT = ("FluxTransformer2DModel", "SD3Transformer2DModel")


@dataclass(frozen=True)
class ActivationInfo:
    """One activation: its name, where it is, and what shape to expect.

    Attributes:
        name: Canonical name, or ``module:`` address.
        module_path: Dotted path of the module whose output (input, attention) it is.
        kind: What it is, such as ``res-out`` or ``cross-q``.
        stage: ``down``, ``mid``, ``up``, ``vit``, or ``""``.
        level: Resolution within the stage in order of execution.
        repeat: Module within the resolution.
        block: Basic block within the ViT module.
        channels: Channels of the feature map; ``None`` where it depends on the input (maps).
        reduction: Pixels of the model's input per position, along a side.
        order: Rank in the order of execution.
        source: ``output``, ``input`` or ``map`` of the module.
        index: Which item of a tuple output.
        grid: Path of the module whose input gives height and width of a token sequence.
        text_side: Whether its positions are text tokens rather than pixels.
        extra: Whether it is an addition to the published names; patterns do not match those.
    """

    name: str
    module_path: str
    kind: str
    stage: str = ""
    level: int | None = None
    repeat: int | None = None
    block: int | None = None
    channels: int | None = None
    reduction: int | None = None
    order: int = 0
    source: str = "output"
    index: int | None = None
    grid: str = ""
    text_side: bool = False
    extra: bool = False


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP and `torch.compile` wrappers.

    Examples:
        >>> layer = nn.Linear(1, 1)
        >>> unwrap(nn.DataParallel(layer)) is layer
        True
    """
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _base(module: Any) -> Any:
    """The layer inside a PEFT wrapper, which knows its sizes."""
    return getattr(module, "base_layer", module)


def _attention(
    path: str, attention: Any, kind: str, at: dict[str, Any], *, text_keys: bool
) -> Iterator[ActivationInfo]:
    """Query, key, value, map and output of one attention module."""
    for part in ("q", "k", "v"):
        projection = getattr(attention, f"to_{part}", None)
        if projection is not None:
            text = text_keys and part != "q"
            yield ActivationInfo(
                f"{kind}-{part}",
                f"{path}.to_{part}",
                f"{kind}-{part}",
                channels=_base(projection).out_features,
                text_side=text,
                extra=text,
                **at,
            )
    yield ActivationInfo(f"{kind}-map", path, f"{kind}-map", source="map", **at)


def _basic_block(
    path: str, block: Any, number: int, at: dict[str, Any]
) -> Iterator[ActivationInfo]:
    """The activations of one basic block (self-attention, cross-attention, feed-forward)."""
    at = {**at, "block": number}
    width = _base(block.ff.net[-1]).out_features
    if getattr(block, "attn1", None) is not None:
        crossed = bool(getattr(block, "only_cross_attention", False))
        yield from _attention(f"{path}.attn1", block.attn1, "self", at, text_keys=crossed)
        yield ActivationInfo(
            "self-out", f"{path}.attn1", "self-out", channels=width, extra=True, **at
        )
    if getattr(block, "attn2", None) is not None:
        yield from _attention(f"{path}.attn2", block.attn2, "cross", at, text_keys=True)
        yield ActivationInfo(
            "cross-out", f"{path}.attn2", "cross-out", channels=width, extra=True, **at
        )
    inner = _base(block.ff.net[-1]).in_features
    yield ActivationInfo("ffn-inner", f"{path}.ff.net.0", "ffn-inner", channels=inner, **at)
    yield ActivationInfo("ffn-out", f"{path}.ff", "ffn-out", channels=width, extra=True, **at)
    yield ActivationInfo("out", path, "block-out", channels=width, **at)


def _vit(path: str, module: Any, channels: int, at: dict[str, Any]) -> Iterator[ActivationInfo]:
    """A Transformer2DModel, or a bare attention module (pixel-space U-Nets, DeepFloyd IF)."""
    at = {**at, "grid": path}
    yield ActivationInfo("in", path, "vit-in", source="input", channels=channels, extra=True, **at)
    if hasattr(module, "transformer_blocks"):
        for i, block in enumerate(module.transformer_blocks):
            for info in _basic_block(f"{path}.transformer_blocks.{i}", block, i, at):
                yield replace(info, name=f"block{i}-{info.name}")
    else:
        kind = "cross" if getattr(module, "add_k_proj", None) is not None else "self"
        for info in _attention(path, module, kind, {**at, "block": 0}, text_keys=False):
            yield replace(info, name=f"block0-{info.name}")
    yield ActivationInfo("out", path, "vit-out", channels=channels, **at)


def _resnet(path: str, module: Any, at: dict[str, Any]) -> Iterator[ActivationInfo]:
    width = _base(module.conv2).out_channels
    yield ActivationInfo(
        "in", path, "res-in", source="input", channels=module.in_channels, extra=True, **at
    )
    yield ActivationInfo("increment", f"{path}.conv2", "res-increment", channels=width, **at)
    yield ActivationInfo("out", path, "res-out", channels=width, **at)


def _resampler(path: str, module: Any, kind: str, at: dict[str, Any]) -> Iterator[ActivationInfo]:
    """A down- or upsampler; in some models it is a residual module."""
    if hasattr(module, "conv2"):
        for info in _resnet(path, module, at):
            suffix = info.kind.removeprefix("res-")
            if suffix != "in":
                yield replace(info, name=f"{kind}-{suffix}", kind=f"{kind}-{suffix}")
        return
    width = getattr(module, "out_channels", None) or module.channels
    yield ActivationInfo(f"{kind}-out", path, f"{kind}-out", channels=width, **at)


def _prefixed(prefix: str, found: Iterator[ActivationInfo]) -> Iterator[ActivationInfo]:
    for info in found:
        yield replace(info, name=prefix + info.name)


def _level(path: str, block: Any, stage: str, level: int, reduction: int) -> Iterator[Any]:
    at: dict[str, Any] = {"stage": stage, "level": level, "reduction": reduction}
    vits = list(getattr(block, "attentions", None) or [])
    for r, resnet in enumerate(block.resnets):
        here = {**at, "repeat": r}
        name = f"{stage}-level{level}-repeat{r}-"
        yield from _prefixed(f"{name}res-", _resnet(f"{path}.resnets.{r}", resnet, here))
        if r < len(vits) and vits[r] is not None:
            width = _base(resnet.conv2).out_channels
            yield from _prefixed(
                f"{name}vit-", _vit(f"{path}.attentions.{r}", vits[r], width, here)
            )


def _unet(model: Any) -> Iterator[ActivationInfo]:
    conv_in = _base(model.conv_in)
    first: dict[str, Any] = {"reduction": 1}
    yield ActivationInfo(
        "unet-in", "conv_in", "unet-in", source="input", channels=conv_in.in_channels, **first
    )
    yield ActivationInfo(
        "unet-after-conv-in", "conv_in", "unet-in", channels=conv_in.out_channels, **first
    )
    reduction = 1
    for level, block in enumerate(model.down_blocks):
        path = f"down_blocks.{level}"
        yield from _level(path, block, "down", level, reduction)
        for module in (getattr(block, "downsamplers", None) or [])[:1]:
            reduction *= 2
            at: dict[str, Any] = {"stage": "down", "level": level, "reduction": reduction}
            yield from _prefixed(
                f"down-level{level}-",
                _resampler(f"{path}.downsamplers.0", module, "downsampler", at),
            )
    mid = getattr(model, "mid_block", None)
    if mid is not None:
        vits = list(getattr(mid, "attentions", None) or [])
        for r, resnet in enumerate(mid.resnets):
            at = {"stage": "mid", "repeat": r, "reduction": reduction}
            yield from _prefixed(
                f"mid-repeat{r}-res-", _resnet(f"mid_block.resnets.{r}", resnet, at)
            )
            if r < len(vits) and vits[r] is not None:
                width = _base(resnet.conv2).out_channels
                prefix = "mid-vit-" if r == 0 else f"mid-repeat{r}-vit-"
                yield from _prefixed(prefix, _vit(f"mid_block.attentions.{r}", vits[r], width, at))
    for level, block in enumerate(model.up_blocks):
        path = f"up_blocks.{level}"
        yield from _level(path, block, "up", level, reduction)
        for module in (getattr(block, "upsamplers", None) or [])[:1]:
            reduction //= 2
            at = {"stage": "up", "level": level, "reduction": reduction}
            yield from _prefixed(
                f"up-level{level}-", _resampler(f"{path}.upsamplers.0", module, "upsampler", at)
            )
    out = _base(model.conv_out)
    yield ActivationInfo("unet-out", "conv_out", "unet-out", channels=out.out_channels, **first)


def _dit(model: Any) -> Iterator[ActivationInfo]:
    field = "blocks" if hasattr(model, "blocks") else "transformer_blocks"
    blocks = getattr(model, field)
    width = _base(blocks[0].ff.net[-1]).out_features
    at: dict[str, Any] = {"stage": "vit", "reduction": model.config.patch_size}
    yield ActivationInfo("vit-in", "pos_embed", "vit-in", channels=width, **at)
    for i, block in enumerate(blocks):
        yield from _prefixed(f"vit-block{i}-", _basic_block(f"{field}.{i}", block, i, at))
    last = f"{field}.{len(blocks) - 1}"
    yield ActivationInfo("vit-out", last, "vit-out", channels=width, **at)


def _joint_block(path: str, block: Any, number: int, at: dict[str, Any]) -> Iterator[Any]:
    """A block whose attention joins text and image tokens (SD3, Flux); image side only."""
    at = {**at, "block": number}
    double = hasattr(block, "ff")
    width = _base(block.attn.to_q).in_features
    for part in ("q", "k", "v"):
        projection = getattr(block.attn, f"to_{part}")
        yield ActivationInfo(
            part, f"{path}.attn.to_{part}", part, channels=_base(projection).out_features, **at
        )
    for part in ("cross", "self"):
        yield ActivationInfo(f"{part}-map", f"{path}.attn", f"{part}-map", source="map", **at)
    inner = f"{path}.attn.to_out.0" if double else f"{path}.attn"
    yield ActivationInfo("attn-out", inner, "attn-out", channels=width, **at)
    if double:
        yield ActivationInfo("norm-out", f"{path}.norm2", "norm-out", channels=width, **at)
        hidden = _base(block.ff.net[-1]).in_features
        yield ActivationInfo("ffn-inner", f"{path}.ff.net.0", "ffn-inner", channels=hidden, **at)
    else:
        hidden = _base(block.proj_mlp).out_features
        yield ActivationInfo("ffn-inner", f"{path}.act_mlp", "ffn-inner", channels=hidden, **at)
    yield ActivationInfo("out", path, "block-out", channels=width, index=1, **at)


def _joint(model: Any) -> Iterator[ActivationInfo]:
    flux = _class(model) == "FluxTransformer2DModel"
    at: dict[str, Any] = {"stage": "vit", "reduction": 2 if flux else model.config.patch_size}
    first = "x_embedder" if flux else "pos_embed"
    width = _base(model.transformer_blocks[0].attn.to_q).in_features
    yield ActivationInfo("vit-in", first, "vit-in", channels=width, **at)
    paths = [(f"transformer_blocks.{i}", b) for i, b in enumerate(model.transformer_blocks)]
    singles = getattr(model, "single_transformer_blocks", [])
    paths += [(f"single_transformer_blocks.{i}", b) for i, b in enumerate(singles)]
    for i, (path, block) in enumerate(paths):
        yield from _prefixed(f"vit-block{i}-", _joint_block(path, block, i, at))
    yield ActivationInfo("vit-out", paths[-1][0], "vit-out", channels=width, index=1, **at)


def _class(model: nn.Module) -> str:
    """The family of a model: the nearest class in its ancestry that we know."""
    known = {*DITS, *JOINT}
    return next((c.__name__ for c in type(model).__mro__ if c.__name__ in known), "")


# What was listed of a model by name, and the modules that it had then.
_listed: WeakKeyDictionary[nn.Module, tuple[list[int], dict[str, ActivationInfo]]] = (
    WeakKeyDictionary()
)


def _all(model: nn.Module) -> list[ActivationInfo]:
    return list(activations_by_name(model).values())


def activations_by_name(model: nn.Module) -> dict[str, ActivationInfo]:
    """Every activation; listed anew only when a module was added, replaced or removed.

    To see that, each call walks over all modules: what needs the result twice, keeps it.

    Raises:
        UnsupportedBackbone: If the model's class is not known.

    Examples:
        >>> from diffeat.presets import build_topology
        >>> activations_by_name(build_topology("sd15"))["unet-out"].module_path
        'conv_out'
    """
    model = unwrap(model)
    modules = _tree(model)
    known = _listed.get(model)
    if known is None or known[0] != modules:
        known = _listed[model] = (modules, {info.name: info for info in _list(model)})
    return known[1]


def _tree(model: nn.Module) -> list[int]:
    """Which modules there are; several times as fast as `modules`, which also makes their names."""
    found, waiting = [], [model]
    while waiting:
        module = waiting.pop()
        found.append(id(module))
        waiting.extend(child for child in module._modules.values() if child is not None)
    return found


def _list(model: nn.Module) -> list[ActivationInfo]:
    if all(hasattr(model, part) for part in ("conv_in", "down_blocks", "up_blocks", "conv_out")):
        found = _unet(model)
    elif _class(model) in DITS:
        found = _dit(model)
    elif _class(model) in JOINT:
        found = _joint(model)
    else:
        raise UnsupportedBackbone(type(model))
    try:
        return [replace(info, order=i) for i, info in enumerate(found)]
    except AttributeError as error:  # a U-Net of blocks that we have never seen
        raise UnsupportedBackbone(type(model)) from error


def list_activations(
    model: nn.Module, *, maps: bool = False, extra: bool = False, pattern: str | None = None
) -> list[ActivationInfo]:
    """List the activations of a backbone in order of execution, without running it.

    Works on models on the ``meta`` device, so a configuration is enough.

    Args:
        model: A diffusers U-Net (UNet2DModel, UNet2DConditionModel) or transformer (DiT, PixArt,
            HunyuanDiT, SD3, Flux).
        maps: Also attention maps.
        extra: Also the names that the published lists do not have: ``self-out``, ``cross-out``,
            ``ffn-out``, ``cross-k``, ``cross-v``, ``vit-in``, ``res-in``.
        pattern: Keep only names that match this glob.

    Raises:
        UnsupportedBackbone: If the model's class is not known.
        ActivationNotFound: If nothing matches the pattern.

    Examples:
        >>> from diffeat.presets import build_topology
        >>> names = [a.name for a in list_activations(build_topology("sd15"))]
        >>> len(names), names[3]
        (165, 'down-level0-repeat0-res-out')
    """
    found = [
        info for info in _all(model) if (maps or info.source != "map") and (extra or not info.extra)
    ]
    if pattern is None:
        return found
    kept = [info for info in found if fnmatch.fnmatchcase(info.name, pattern)]
    if not kept:
        raise ActivationNotFound(pattern, [info.name for info in found])
    return kept


def module_activation(model: nn.Module, address: str) -> ActivationInfo:
    """The activation at ``module:<dotted.path>[#k][@in]``: any module's output or input.

    Raises:
        ActivationNotFound: If there is no such module.

    Examples:
        >>> module_activation(nn.Sequential(nn.Linear(2, 3)), "module:0@in").source
        'input'
    """
    matched = re.fullmatch(r"module:([\w.]*)(?:#(\d+))?(@in)?", address)
    paths = dict(unwrap(model).named_modules())
    if matched is None or matched[1] not in paths:
        raise ActivationNotFound(address, [f"module:{path}" for path in paths])
    return ActivationInfo(
        address,
        matched[1],
        "module",
        source="input" if matched[3] else "output",
        index=int(matched[2]) if matched[2] else None,
    )


def find_activation(model: nn.Module, name: str) -> ActivationInfo:
    """The activation with exactly this name, additions and maps included.

    Raises:
        ActivationNotFound: With the five nearest names.

    Examples:
        >>> from diffeat.presets import build_topology
        >>> find_activation(build_topology("sd15"), "mid-vit-out").module_path
        'mid_block.attentions.0'
    """
    return find_activations(model, [name])[0]


def find_activations(
    model: nn.Module, names: Sequence[str], known: Mapping[str, ActivationInfo] | None = None
) -> list[ActivationInfo]:
    """The activations with exactly these names; see `find_activation`.

    Args:
        model: A backbone.
        names: The names.
        known: What `activations_by_name` gave, if it is at hand.
    """
    found = {} if known is None else known
    if known is None and not all(name.startswith("module:") for name in names):
        found = activations_by_name(model)
    infos = []
    for name in names:
        if name.startswith("module:"):
            infos.append(module_activation(model, name))
        elif name in found:
            infos.append(found[name])
        else:
            raise ActivationNotFound(name, found)
    return infos


def alias(model: nn.Module, name: str) -> str:
    """Translate a canonical name to its ``module:`` address, or such an address back.

    Raises:
        ActivationNotFound: If there is none.

    Examples:
        >>> from diffeat.presets import build_topology
        >>> unet = build_topology("sd15")
        >>> alias(unet, "unet-in"), alias(unet, "module:conv_out")
        ('module:conv_in@in', 'unet-out')
    """
    known = [info for info in _all(model) if info.source != "map"]
    if not name.startswith("module:"):
        return _address(find_activation(model, name))
    addresses: dict[str, str] = {}
    for info in known:  # of two names for one tensor the first is the specific one
        addresses.setdefault(_address(info), info.name)
    if name not in addresses:
        raise ActivationNotFound(name, addresses)
    return addresses[name]


def _address(info: ActivationInfo) -> str:
    index = "" if info.index is None else f"#{info.index}"
    return f"module:{info.module_path}{index}{'@in' if info.source == 'input' else ''}"

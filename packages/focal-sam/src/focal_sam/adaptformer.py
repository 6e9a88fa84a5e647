"""CLIP with AdaptFormer: a frozen vision tower, small adapters in every block, a cosine head.

This is the fine-tuning recipe of LIFT (Shi et al., "Long-tail learning with foundation model:
heavy fine-tuning hurts", ICML 2024), which Focal-SAM's CLIP experiments train. AdaptFormer (Chen
et al., NeurIPS 2022) adds to each transformer block, beside its MLP,

    x + MLP(norm(x)) + s * Up(ReLU(Down(LN(x)))),

with ``Up`` zero at first, so that training starts from CLIP itself. The head takes the cosine,
times 25, with the feature before CLIP's projection, and starts from the text features of the class
names.

Models of open_clip and of transformers both work. The adapters are put in by forward hooks, so the
library's own classes, names and checkpoints stay as they are.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from focal_sam.models import NormedLinear
from shared_core.errors import InputError, MissingExtraError

__all__ = ["AdaptFormer", "CLIPAdaptFormer", "bottleneck_size", "clip_adaptformer"]

PROMPTS_AT_ONCE = 256


def bottleneck_size(num_classes: int, num_blocks: int = 12) -> int:
    """Width of the adapters: ``2^max(0, floor(log2(C / (2 L))))`` for C classes and L blocks.

    It keeps all adapters together near the size of the head (LIFT).

    Args:
        num_classes: Number of classes C.
        num_blocks: Number of transformer blocks L; 12 in ViT-B.

    Raises:
        InputError: If a number is below 1.

    Examples:
        >>> [bottleneck_size(classes) for classes in (10, 100, 1000, 8142)]
        [1, 4, 32, 256]
    """
    if num_classes < 1 or num_blocks < 1:
        raise InputError(
            f"num_classes={num_classes} and num_blocks={num_blocks}; both have to be at least 1"
        )
    whole = num_classes // (2 * num_blocks)
    return 1 << max(0, whole.bit_length() - 1)


class AdaptFormer(nn.Module):
    """The adapter ``s * Up(ReLU(Down(LN(x))))``, zero at first.

    Args:
        features: Width of the block.
        bottleneck: Width in between.

    Attributes:
        scale: The learnable factor s, ``[1]``, at first 1.

    Raises:
        InputError: If a width is below 1.

    Examples:
        >>> adapter = AdaptFormer(8, bottleneck=2)
        >>> adapter(torch.randn(3, 5, 8)).abs().max().item()
        0.0
    """

    def __init__(self, features: int, bottleneck: int) -> None:
        super().__init__()
        if features < 1 or bottleneck < 1:
            raise InputError(
                f"features={features} and bottleneck={bottleneck}; both have to be at least 1"
            )
        self.norm = nn.LayerNorm(features)
        self.down = nn.Linear(features, bottleneck)
        self.up = nn.Linear(bottleneck, features)
        # One element rather than none: FSDP2 cannot shard a scalar.
        self.scale = nn.Parameter(torch.ones(1))
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Float[Tensor, "*tokens features"]) -> Float[Tensor, "*tokens features"]:
        """What the adapter adds to the MLP's output.

        Args:
            x: ``[..., features]``, the input of the block's MLP branch, before its norm.
        """
        x = x.to(self.norm.weight.dtype)
        added: Tensor = self.scale * self.up(F.relu(self.down(self.norm(x))))
        return added


class _ParallelBranch:
    """Two hooks that add an adapter beside the MLP of a block.

    The MLP sees only normalised tokens, so the hook on its norm keeps what the adapter starts from.
    """

    def __init__(self, adapter: AdaptFormer) -> None:
        self.adapter = adapter
        self.x: Tensor | None = None

    def enter(self, norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.x = args[0]

    def leave(self, mlp: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x, self.x = self.x, None
        if x is None:
            raise RuntimeError(
                "the MLP of a block with an adapter was called alone; call (or checkpoint) whole "
                "blocks, because the adapter starts from the input of the norm before the MLP"
            )
        added: Tensor = self.adapter(x)
        return output + added.to(output.dtype)


class CLIPAdaptFormer(nn.Module):
    """A frozen CLIP vision tower with adapters, and a cosine head: images to logits.

    Made by `clip_adaptformer`. Only the adapters and the head require gradients; they are float32
    where the tower is in half precision. ``train()`` leaves the tower in evaluation mode.

    Args:
        tower: A vision tower that gives the feature before the projection, as a tensor, as the
            first of a tuple, or as ``pooler_output``. It is frozen in place.
        branches: The norm and the MLP of each block.
        class_weights: The head's weights at first, ``[classes, features]``.
        class_names: The name of each class.
        bottleneck: Width of the adapters.
        scale: Factor on the cosines.

    Attributes:
        tower: The frozen vision tower.
        adapters: One `AdaptFormer` per block.
        head: The `NormedLinear` head.
        class_names: The names of the classes.

    Raises:
        InputError: If the blocks have adapters already, or the width is below 1.
    """

    def __init__(
        self,
        tower: nn.Module,
        branches: Sequence[tuple[nn.Module, nn.Module]],
        class_weights: Float[Tensor, "classes features"],
        class_names: Sequence[str],
        *,
        bottleneck: int,
        scale: float | int,
    ) -> None:
        super().__init__()
        for norm, mlp in branches:
            if any(
                isinstance(getattr(hook, "__self__", None), _ParallelBranch)
                for hook in (*norm._forward_pre_hooks.values(), *mlp._forward_hooks.values())
            ):
                raise InputError("this model has adapters already; load a fresh one")
        self.tower = tower.requires_grad_(False)
        self.class_names = list(class_names)
        like = next(tower.parameters())
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.adapters = nn.ModuleList()
        for norm, mlp in branches:
            assert isinstance(norm.weight, Tensor)
            adapter = AdaptFormer(norm.weight.shape[0], bottleneck).to(like.device, dtype)
            branch = _ParallelBranch(adapter)
            norm.register_forward_pre_hook(branch.enter)
            mlp.register_forward_hook(branch.leave)
            self.adapters.append(adapter)
        head = NormedLinear(class_weights.shape[1], len(class_names), scale)
        self.head = head.to(like.device, dtype)
        with torch.no_grad():
            self.head.weight.copy_(class_weights)
        self.train()

    def features(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch features"]:
        """The pooled feature after the last norm, before CLIP's projection.

        Args:
            images: ``[B, 3, H, W]`` of the tower's size, standardised with CLIP's mean and standard
                deviation (the transform ``clip``).
        """
        output = self.tower(images)
        if isinstance(output, tuple):
            output = output[0]
        pooled: Tensor = getattr(output, "pooler_output", output)
        return pooled

    def forward(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch classes"]:
        """The logits, ``scale * cos(feature, class weight)``.

        Args:
            images: As `features` takes them.
        """
        logits: Tensor = self.head(self.features(images))
        return logits

    def train(self, mode: bool = True) -> "CLIPAdaptFormer":
        """Set the mode of adapters and head; the frozen tower stays in evaluation mode."""
        super().train(mode)
        self.tower.eval()
        return self

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """Adapters and head alone, under the names of ``state_dict()``.

        Save it with `shared_core.run.save_state` or ``safetensors.torch.save_file``.
        """
        return {k: v for k, v in self.state_dict().items() if not k.startswith("tower.")}

    def load_trainable_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `trainable_state_dict` gave.

        Raises:
            InputError: If names or shapes are not those of this model; nothing is loaded then.
        """
        own = self.trainable_state_dict()
        differing = sorted(own.keys() ^ state.keys())
        if differing:
            kind = "missing" if differing[0] in own else "unknown"
            raise InputError(
                f"the state is not one of these adapters: {differing[0]} is {kind} "
                f"({len(differing)} such names in all)"
            )
        for name, value in own.items():
            if state[name].shape != value.shape:
                raise InputError(
                    f"{name} has the shape {tuple(state[name].shape)} in the state and "
                    f"{tuple(value.shape)} in the model; were the classes or the bottleneck others?"
                )
        self.load_state_dict(dict(state), strict=False)


def clip_adaptformer(
    model: nn.Module | str,
    class_names: Sequence[str],
    *,
    pretrained: str | None = None,
    tokenizer: Callable[..., Any] | None = None,
    template: str = "a photo of a {}.",
    bottleneck: int | None = None,
    scale: float | int = 25.0,
) -> CLIPAdaptFormer:
    """Make an image classifier from CLIP and the names of the classes.

    With the text feature ``t`` of a class (normalised), the projection ``proj`` and the feature
    ``f`` before it, CLIP's own similarity is ``f @ proj @ t`` up to the length of ``f @ proj``. So
    the head starts from ``normalize(proj @ t)``, and the logits are exactly
    ``scale * cos(f, normalize(proj @ t))`` until the first training step. Their ranking can differ
    from that of zero-shot CLIP, by the length of ``proj @ t``.

    Args:
        model: A transformers id or folder (``"openai/clip-vit-base-patch16"``), an open_clip name
            together with `pretrained` (``"ViT-B-16"``, ``"openai"``), or a loaded model of either
            library together with its `tokenizer`. A loaded model is changed in place: it is put in
            evaluation mode, its vision tower is frozen and gets the adapters.
        class_names: The name of each class; underscores are read as spaces.
        pretrained: Tag or path of open_clip weights.
        tokenizer: The model's tokenizer.
        template: The prompt, with ``{}`` for the class name.
        bottleneck: Width of the adapters; by default `bottleneck_size`.
        scale: Factor on the cosines.

    Raises:
        InputError: If the model cannot be loaded or is not a CLIP with a vision transformer, has
            adapters already, lacks its tokenizer, or a name, the template or the width is no good.
        MissingExtraError: If open_clip or transformers is needed and not installed.

    Examples:
        >>> from transformers import CLIPConfig, CLIPModel
        >>> sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2,
        ...          "num_attention_heads": 2}
        >>> clip = CLIPModel(CLIPConfig(
        ...     text_config={**sizes, "vocab_size": 9, "eos_token_id": 8, "bos_token_id": 7},
        ...     vision_config={**sizes, "image_size": 8, "patch_size": 4}, projection_dim=4))
        >>> def tokenizer(prompts, **_):
        ...     return {"input_ids": torch.tensor([[7, len(p) % 7, 8] for p in prompts])}
        >>> model = clip_adaptformer(clip, ["eel", "newt"], tokenizer=tokenizer)
        >>> model(torch.zeros(3, 3, 8, 8)).shape
        torch.Size([3, 2])
        >>> sorted({name.split(".")[0] for name in model.trainable_state_dict()})
        ['adapters', 'head']
    """
    if isinstance(class_names, str) or not class_names:
        raise InputError(f"class_names is {class_names!r}; accepted: a list of at least one name")
    if "{}" not in template:
        raise InputError(f"template is {template!r}; it needs {{}} where the class name goes")
    if isinstance(model, str):
        model, loaded_tokenizer = _load(model, pretrained)
        tokenizer = tokenizer or loaded_tokenizer
    elif tokenizer is None:
        raise InputError("a loaded model needs its tokenizer, to make the head from class names")
    elif pretrained is not None:
        raise InputError(f"pretrained={pretrained!r} goes with a name; the model is loaded already")
    model.eval()
    parts = _parts(model, tokenizer)
    prompts = [template.format(name.replace("_", " ")) for name in class_names]
    if bottleneck is None:
        bottleneck = bottleneck_size(len(class_names), len(parts.branches))
    return CLIPAdaptFormer(
        parts.tower,
        parts.branches,
        _class_weights(parts, prompts),
        class_names,
        bottleneck=bottleneck,
        scale=scale,
    )


@dataclass
class _Parts:
    """What the two libraries call by different names.

    Attributes:
        tower: The vision tower, giving the feature before the projection.
        branches: The norm and the MLP of each vision block.
        projection: From features to the space shared with texts, ``[features, shared]``.
        encode: From prompts to text features ``[prompts, shared]``.
    """

    tower: nn.Module
    branches: list[tuple[nn.Module, nn.Module]]
    projection: Tensor
    encode: Callable[[list[str]], Tensor]


@torch.no_grad()
def _class_weights(parts: _Parts, prompts: list[str]) -> Tensor:
    """``normalize(proj @ t)`` of each prompt, ``[prompts, features]``."""
    batches = [
        parts.encode(prompts[start : start + PROMPTS_AT_ONCE])
        for start in range(0, len(prompts), PROMPTS_AT_ONCE)
    ]
    text = torch.cat(batches)
    dtype = torch.promote_types(text.dtype, torch.float32)
    text = F.normalize(text.to(dtype), dim=-1)
    return F.normalize(text @ parts.projection.to(dtype).T, dim=-1)


def _parts(model: Any, tokenizer: Callable[..., Any]) -> _Parts:
    if hasattr(model, "visual") and hasattr(model, "encode_text"):
        return _open_clip_parts(model, tokenizer)
    if hasattr(model, "vision_model") and hasattr(model, "visual_projection"):
        return _transformers_parts(model, tokenizer)
    raise InputError(
        f"{type(model).__name__} is not a CLIP that is known here; accepted: open_clip.CLIP (or "
        "CustomTextCLIP) and transformers.CLIPModel"
    )


def _open_clip_parts(model: Any, tokenizer: Callable[..., Any]) -> _Parts:
    visual = model.visual
    blocks = getattr(getattr(visual, "transformer", None), "resblocks", None)
    projection = getattr(visual, "proj", None)
    if blocks is None or not isinstance(projection, Tensor):
        raise InputError(
            f"the vision tower is a {type(visual).__name__}; accepted: open_clip's "
            "VisionTransformer with a projection, as in ViT-B-16"
        )
    # The same blocks and weights under a second roof, which stops before the projection: the
    # model that was passed in keeps its own.
    tower = copy.copy(visual)
    tower._parameters = visual._parameters.copy()
    tower.proj = None

    def encode(prompts: list[str]) -> Tensor:
        features: Tensor = model.encode_text(tokenizer(prompts).to(projection.device))
        return features

    return _Parts(tower, [(block.ln_2, block.mlp) for block in blocks], projection, encode)


def _transformers_parts(model: Any, tokenizer: Callable[..., Any]) -> _Parts:
    projection = model.visual_projection.weight

    def encode(prompts: list[str]) -> Tensor:
        tokens = tokenizer(
            prompts,
            padding=True,
            truncation=True,
            max_length=model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        # CLIP reads from left to right up to the end token, so padding after it needs no mask.
        output = model.get_text_features(input_ids=tokens["input_ids"].to(projection.device))
        features: Tensor = getattr(output, "pooler_output", output)
        return features

    layers = model.vision_model.encoder.layers
    branches = [(layer.layer_norm2, layer.mlp) for layer in layers]
    return _Parts(model.vision_model, branches, projection.T, encode)


def _load(name: str, pretrained: str | None) -> tuple[nn.Module, Callable[..., Any]]:
    """A model and its tokenizer, loaded by the library that the arguments point to."""
    from_open_clip = pretrained is not None or name.startswith(("hf-hub:", "local-dir:"))
    if not from_open_clip and "/" not in name and not Path(name).is_dir():
        raise InputError(
            f"{name!r} is neither a folder nor a transformers id such as "
            "openai/clip-vit-base-patch16; an open_clip name needs pretrained= beside it"
        )
    try:
        return _load_open_clip(name, pretrained) if from_open_clip else _load_transformers(name)
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise InputError(f"cannot load the CLIP model {name!r}: {reason}") from error


def _load_open_clip(name: str, pretrained: str | None) -> tuple[nn.Module, Callable[..., Any]]:
    try:
        import open_clip
    except ImportError as error:
        raise MissingExtraError("focal-sam", "clip", "open_clip_torch") from error
    # OpenAI's weights were trained with another GELU than the configuration of the same name has,
    # about which open_clip only warns.
    tag = open_clip.get_pretrained_cfg(name.replace("/", "-"), pretrained or "")
    model = open_clip.create_model(
        name, pretrained=pretrained, force_quick_gelu=bool(tag.get("quick_gelu"))
    )
    return model, open_clip.get_tokenizer(name)


def _load_transformers(name: str) -> tuple[nn.Module, Callable[..., Any]]:
    try:
        from transformers import AutoTokenizer, CLIPModel
    except ImportError as error:
        raise MissingExtraError("focal-sam", "clip", "transformers") from error
    return CLIPModel.from_pretrained(name), AutoTokenizer.from_pretrained(name)

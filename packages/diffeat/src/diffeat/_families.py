"""How each family of backbones wants its forward to be called."""

from typing import Any

import torch
from torch import Tensor

from diffeat.errors import UnsupportedBackbone
from diffeat.naming import unwrap
from diffeat.prompts import PromptEmbedding
from shared_core.errors import InputError


def _config(model: Any, name: str, default: Any = None) -> Any:
    return getattr(getattr(model, "config", None), name, default)


def family(model: Any) -> str:
    """One of unet (with text), pixel (without), dit, pixart, hunyuan, sd3, flux."""
    model = unwrap(model)
    classes = {c.__name__ for c in type(model).__mro__}
    for name, key in (
        ("PixArtTransformer2DModel", "pixart"),
        ("DiTTransformer2DModel", "dit"),
        ("HunyuanDiT2DModel", "hunyuan"),
        ("SD3Transformer2DModel", "sd3"),
        ("FluxTransformer2DModel", "flux"),
    ):
        if name in classes:
            return key
    if hasattr(model, "down_blocks") and hasattr(model, "conv_in"):
        return "unet" if _config(model, "cross_attention_dim") is not None else "pixel"
    raise UnsupportedBackbone(type(model))


def takes_text(model: Any) -> bool:
    """Whether its forward wants a prompt."""
    return family(model) not in ("pixel", "dit")


def granularity(model: Any) -> int:
    """What the sides of the model's input must be divisible by."""
    model = unwrap(model)
    if hasattr(model, "down_blocks"):
        halvings = sum(1 for block in model.down_blocks if getattr(block, "downsamplers", None))
        return int(2**halvings)
    return 2 if family(model) == "flux" else int(_config(model, "patch_size", 1))


def arguments(
    model: Any,
    x_t: Tensor,
    time: float,
    embedding: PromptEmbedding | None,
    *,
    labels: Tensor | None,
    added: dict[str, Tensor] | None,
    image_size: tuple[int, int],
    aesthetic: bool,
) -> dict[str, Any]:
    """Keyword arguments of one forward of `model` at x_t ``[B, C, H, W]``.

    Raises:
        InputError: If the model wants a prompt, pooled text or labels that are not there.
    """
    model = unwrap(model)
    kind, batch, device = family(model), x_t.shape[0], x_t.device
    dtype = x_t.dtype if kind in ("sd3", "flux", "hunyuan") else torch.long
    times = torch.full((batch,), time, device=device, dtype=dtype)
    if takes_text(model) and embedding is None:
        raise InputError(f"{type(model).__name__} needs a prompt; pass prompt='...'")
    if kind in ("pixel", "dit"):
        wanted = kind == "dit" or _config(model, "num_class_embeds") is not None
        if wanted and labels is None:
            raise InputError(f"{type(model).__name__} is class-conditional; pass class_labels")
        name = "sample" if kind == "pixel" else "hidden_states"
        found: dict[str, Any] = {name: x_t, "timestep": times}
        if wanted:
            found["class_labels"] = labels
        return found
    assert embedding is not None
    if kind == "flux":
        return _flux(model, x_t, times / 1000, embedding)
    name = "sample" if kind == "unet" else "hidden_states"
    found = {name: x_t, "timestep": times, "encoder_hidden_states": embedding.states}
    found.update(embedding.extra)
    if kind == "sd3":
        found["pooled_projections"] = _pooled(model, embedding)
    elif kind == "pixart":
        found["encoder_attention_mask"] = embedding.mask
        found["added_cond_kwargs"] = _pixart_conditions(model, x_t, image_size)
    elif kind == "hunyuan":
        found["text_embedding_mask"] = embedding.mask
        found.update(_hunyuan(model, x_t, image_size))
    elif _config(model, "addition_embed_type") == "text_time":
        found["added_cond_kwargs"] = added or {
            "text_embeds": _pooled(model, embedding),
            "time_ids": _time_ids(x_t, image_size, aesthetic),
        }
    elif _config(model, "addition_embed_type") is not None and added is not None:
        found["added_cond_kwargs"] = added
    if labels is not None:
        found["class_labels"] = labels
    return found


def _pooled(model: Any, embedding: PromptEmbedding) -> Tensor:
    if embedding.pooled is None:
        raise InputError(
            f"{type(model).__name__} needs the pooled text embedding as well: "
            "PromptEmbedding(states, pooled=...), or pass added={'text_embeds':…, 'time_ids':…}"
        )
    return embedding.pooled


def _time_ids(x_t: Tensor, size: tuple[int, int], aesthetic: bool) -> Tensor:
    height, width = size
    # original size, crop corner, then target size or the refiner's aesthetic score of 6
    ids = (height, width, 0, 0, *((6.0,) if aesthetic else (height, width)))
    return torch.tensor([ids], dtype=x_t.dtype, device=x_t.device).expand(x_t.shape[0], -1)


def _pixart_conditions(model: Any, x_t: Tensor, size: tuple[int, int]) -> dict[str, Any]:
    if not getattr(model, "use_additional_conditions", False):
        return {"resolution": None, "aspect_ratio": None}
    height, width = size
    like: dict[str, Any] = {"dtype": x_t.dtype, "device": x_t.device}
    return {
        "resolution": torch.tensor([[height, width]], **like).expand(x_t.shape[0], -1),
        "aspect_ratio": torch.tensor([[height / width]], **like).expand(x_t.shape[0], -1),
    }


def _hunyuan(model: Any, x_t: Tensor, size: tuple[int, int]) -> dict[str, Any]:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    height, width = size
    rows, columns = (side // model.config.patch_size for side in x_t.shape[-2:])
    rotary = get_2d_rotary_pos_embed(
        model.inner_dim // model.num_heads,
        ((0, 0), (rows, columns)),
        (rows, columns),
        device=x_t.device,
        output_type="pt",
    )
    batch = x_t.shape[0]
    found: dict[str, Any] = {"image_rotary_emb": rotary}
    if model.config.use_style_cond_and_image_meta_size:
        meta = torch.tensor(
            [[height, width, height, width, 0, 0]], dtype=x_t.dtype, device=x_t.device
        )
        found["image_meta_size"] = meta.repeat(batch, 1)
        found["style"] = torch.zeros(batch, dtype=torch.long, device=x_t.device)
    return found


def _flux(model: Any, x_t: Tensor, times: Tensor, embedding: PromptEmbedding) -> dict[str, Any]:
    """Latents as a sequence of 2 x 2 patches, with the position of each."""
    batch, _, height, width = x_t.shape
    rows, columns = height // 2, width // 2
    packed = torch.nn.functional.pixel_unshuffle(x_t, 2).flatten(2).transpose(1, 2)
    ids = torch.zeros(rows, columns, 3, device=x_t.device, dtype=x_t.dtype)
    ids[..., 1] = torch.arange(rows, device=x_t.device)[:, None]
    ids[..., 2] = torch.arange(columns, device=x_t.device)[None]
    found: dict[str, Any] = {
        "hidden_states": packed,
        "timestep": times,
        "encoder_hidden_states": embedding.states,
        "pooled_projections": _pooled(model, embedding),
        "img_ids": ids.flatten(0, 1),
        "txt_ids": torch.zeros(embedding.states.shape[1], 3, device=x_t.device, dtype=x_t.dtype),
    }
    if model.config.guidance_embeds:
        found["guidance"] = torch.full((batch,), 1.0, device=x_t.device, dtype=x_t.dtype)
    return found


def unpack(model: Any, output: Any, x_t: Tensor) -> Tensor:
    """The model's prediction with the shape of x_t; learned variances are dropped."""
    value: Tensor = output[0] if isinstance(output, tuple) else output.sample
    if family(model) == "flux":
        rows, columns = (side // 2 for side in x_t.shape[-2:])
        value = value.transpose(1, 2).reshape(len(x_t), -1, rows, columns)
        value = torch.nn.functional.pixel_shuffle(value, 2)
    return value[:, : x_t.shape[1]]

"""Saving and loading of what was trained, without the frozen base."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from gmsa._backbone import load_causal_lm, lora_layers, lora_state
from gmsa.stages import add_decoder_lora, unshare_base
from shared_core.errors import InputError
from shared_core.run import atomic_path, to_plain

if TYPE_CHECKING:
    from gmsa.model import GMSAModel

__all__ = [
    "COMPRESSOR_NAME",
    "base_fingerprint",
    "fingerprint",
    "is_checkpoint",
    "load_compressor",
    "load_into",
    "save_compressor",
]

COMPRESSOR_NAME = "compressor.safetensors"
DECODER_NAME = "decoder"
ADAPTER_NAME = "adapter_model.safetensors"

# What has to agree between the base that was trained on and the base that is loaded.
_BASE_KEYS = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def _trained(model: "GMSAModel") -> dict[str, Tensor]:
    """The compressor's own tensors, by the names they are stored under."""
    found: dict[str, Tensor] = {}
    if model.encoder is not None:
        if not any(True for _ in lora_layers(model.encoder)):
            raise InputError(
                "the encoder's LoRA was merged into its weights and cannot be saved; "
                "save before merge_encoder_lora()"
            )
        found |= {f"encoder.{k}": v for k, v in lora_state(model.encoder).items()}
    if model.lsa is not None:
        found |= {f"lsa.layers.{k}": v for k, v in model.lsa.layers.state_dict().items()}
    for name in ("projection", "memory"):
        part: nn.Module | None = getattr(model, name)
        if part is not None:
            found |= {f"{name}.{k}": v for k, v in part.state_dict().items()}
    return found


def _gathered(state: dict[str, Tensor], given: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The tensors of `state` out of a gathered ``state_dict`` of the whole model."""
    if given is None:
        return state
    plain = {key.replace(".lora_A.default.", ".lora_A.").replace(".lora_B.default.", ".lora_B."): v
             for key, v in given.items()}  # fmt: skip
    lacking = sorted(set(state) - set(plain))
    if lacking:
        raise InputError(f"the state_dict to save lacks {lacking[0]} and {len(lacking) - 1} others")
    return {key: plain[key] for key in state}


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    plain = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(plain, temporary, metadata={"format": "pt"})


def save_compressor(
    model: "GMSAModel",
    folder: str | os.PathLike[str],
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write config, trained tensors and fine-tuned decoder; see `GMSAModel.save_pretrained`."""
    target = Path(folder)
    tensors = _gathered(_trained(model), state_dict)
    target.mkdir(parents=True, exist_ok=True)
    tuning = model.config.decoder_tuning
    decoder_state = None
    if state_dict is not None:
        # A gathered state has tied tensors twice, and no longer shows that they are.
        own = {k for k, _ in (*model.decoder.named_parameters(), *model.decoder.named_buffers())}
        plain = {k.removeprefix("decoder."): v for k, v in state_dict.items()}
        decoder_state = {k: v for k, v in plain.items() if k in own}
    if tuning != "none":
        # In a folder of its own first, so that a crash leaves no half-written decoder.
        temporary = Path(tempfile.mkdtemp(dir=target, prefix=f".{DECODER_NAME}."))
        try:
            if tuning == "full":
                model.decoder.save_pretrained(temporary, state_dict=decoder_state)
            else:
                _save_decoder_lora(model, temporary, decoder_state)
            temporary.chmod(0o755)
            _swap_in(temporary, target / DECODER_NAME)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    _write_tensors(target / COMPRESSOR_NAME, tensors)
    with atomic_path(target / "config.json") as path:
        path.write_text(
            json.dumps(to_plain(json.loads(model.config.to_json_string(use_diff=False))), indent=2)
            + "\n",
            encoding="utf-8",
        )


def _swap_in(new: Path, final: Path) -> None:
    """Give a folder its name; the one that had it is deleted last, and put back on failure."""
    if not final.exists():
        os.replace(new, final)
        return
    aside = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}.old."))
    try:
        os.replace(final, aside / final.name)
        try:
            os.replace(new, final)
        except OSError:
            os.replace(aside / final.name, final)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _save_decoder_lora(
    model: "GMSAModel", folder: Path, state_dict: Mapping[str, Tensor] | None
) -> None:
    """Write the decoder's LoRA as PEFT would, so that `PeftModel.from_pretrained` takes it."""
    tensors = _gathered(lora_state(model.decoder), state_dict)
    _write_tensors(folder / ADAPTER_NAME, {f"base_model.model.{k}": v for k, v in tensors.items()})
    config: LoraConfig = model.decoder.peft_config["default"]
    config.base_model_name_or_path = model.config.base_model_name_or_path
    config.save_pretrained(str(folder))


def is_checkpoint(name: str | os.PathLike[str]) -> bool:
    """Whether a folder is a checkpoint of a compressor (rather than of a plain model)."""
    return (Path(name) / COMPRESSOR_NAME).is_file()


def _folder(name: str | os.PathLike[str], hub_kwargs: Mapping[str, Any]) -> Path:
    """The local folder of a checkpoint, fetched from the hub if it is an id."""
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists() or not isinstance(name, str) or name.count("/") != 1 or name[0] in "./~":
        raise InputError(f"there is no checkpoint at {os.fspath(name)}: it is not a folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, **hub_kwargs))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{name} is no folder and cannot be fetched: {reason}") from error


def load_compressor(
    cls: "type[GMSAModel]",
    name: str | os.PathLike[str],
    *,
    base_model: str | os.PathLike[str] | nn.Module | None,
    share_base: bool,
    check_base: bool,
    hub_kwargs: Mapping[str, Any],
    load_kwargs: Mapping[str, Any],
) -> "GMSAModel":
    """Load a checkpoint strictly; see `GMSAModel.from_pretrained`."""
    from gmsa.configuration import GMSAConfig

    folder = _folder(name, hub_kwargs)
    for needed in ("config.json", COMPRESSOR_NAME):
        if not (folder / needed).is_file():
            raise InputError(f"{folder} is no GMSA checkpoint: there is no {needed}")
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if settings.get("model_type") != GMSAConfig.model_type:
            raise InputError(f"{folder} holds a {settings.get('model_type')!r}, no 'gmsa' model")
        config = GMSAConfig.from_dict(settings)
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise InputError(f"{folder}/config.json is damaged: {error}") from error
    base = base_model if base_model is not None else config.base_model_name_or_path
    if base is None:
        raise InputError(f"{folder} does not say what its base model is; give base_model=…")
    if isinstance(base, str) and base.startswith(".") and (folder / base).is_dir():
        base = (folder / base).resolve()  # "../base": beside the checkpoint
    decoder: Any = base if isinstance(base, nn.Module) else load_causal_lm(base, **load_kwargs)
    found = decoder.config.to_dict()
    for key in _BASE_KEYS:
        if key in config.base_config and found.get(key) != config.base_config[key]:
            raise InputError(
                f"the base model has {key} {found.get(key)!r}; the checkpoint was trained on "
                f"{config.base_config[key]!r}"
            )
    if check_base and config.base_fingerprint not in (None, base_fingerprint(decoder)):
        raise InputError(
            f"the base model {'given' if isinstance(base, nn.Module) else os.fspath(base)} has "
            f"other weights than the one that {folder} was trained on; give that one as "
            "base_model, or check_base=False if it was only rounded or quantised"
        )
    tuning, config.decoder_tuning = config.decoder_tuning, "none"
    if not isinstance(base, nn.Module):
        config.base_model_name_or_path = os.fspath(base)
    model: GMSAModel = cls(config, decoder, share_base=share_base)
    if tuning == "full":
        unshare_base(model)
        model.decoder = load_causal_lm(folder / DECODER_NAME, **load_kwargs)
        place, dtype = next(decoder.parameters()).device, next(decoder.parameters()).dtype
        model.decoder.to(device=place, dtype=dtype)
    elif tuning == "lora":
        add_decoder_lora(model)
    model.config.decoder_tuning = tuning
    load_into(model, folder, decoder=tuning == "lora")
    model.requires_grad_(False)
    model.eval()
    return model


def load_into(model: "GMSAModel", folder: str | os.PathLike[str], *, decoder: bool) -> None:
    """Load the trained tensors of a checkpoint into a model, strictly.

    Args:
        model: A model of the same settings.
        folder: The checkpoint.
        decoder: Whether to load the decoder as well.

    Raises:
        InputError: If files are missing or damaged, or a tensor is missing, unexpected or of
            another shape.
    """
    source = Path(folder)
    _fill(_trained(model), _read(source / COMPRESSOR_NAME), source / COMPRESSOR_NAME)
    if not decoder:
        return
    if model.config.decoder_tuning == "lora":
        path = source / DECODER_NAME / ADAPTER_NAME
        stored = {k.removeprefix("base_model.model."): v for k, v in _read(path).items()}
        _fill(lora_state(model.decoder), stored, path)
    elif model.config.decoder_tuning == "full":
        files = sorted((source / DECODER_NAME).glob("*.safetensors"))
        if not files:
            raise InputError(f"there is no decoder in {source / DECODER_NAME}")
        stored = {k: v for file in files for k, v in _read(file).items()}
        # Of tied tensors only one name is stored.
        wanted = dict(model.decoder.named_parameters())
        _fill(wanted, stored, source / DECODER_NAME)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read ({error})") from error


@torch.no_grad()
def _fill(own: Mapping[str, Tensor], stored: Mapping[str, Tensor], path: Path) -> None:
    for what, names in (
        ("lacks", sorted(set(own) - set(stored))),
        ("has the unexpected", sorted(set(stored) - set(own))),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(
                f"{path} {what} {names[0]}{more}: it was written with other settings "
                "(encoder_layers, lsa_layers, alignment, merging)"
            )
    for name, tensor in stored.items():
        if own[name].shape != tensor.shape:
            raise InputError(
                f"{path}: {name} has shape {list(tensor.shape)}, the model {list(own[name].shape)}"
            )
    for name, tensor in stored.items():
        value = own[name]
        if isinstance(value, DTensor):  # sharded (FSDP2): each process takes its part
            tensor = distribute_tensor(tensor.to(value.dtype), value.device_mesh, value.placements)
        value.copy_(tensor)


@torch.no_grad()
def fingerprint(model: "GMSAModel") -> str:
    """A hash of all that soft tokens depend on: settings and weights, the base's included.

    The decoder's fine-tuning does not count. Of each tensor at most 4096 values, evenly spread and
    rounded to bfloat16, and their number enter, so it takes little time and is the same after
    saving in bfloat16 and loading in float32.

    Examples:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from gmsa import GMSAConfig, GMSAModel
        >>> backbone = LlamaForCausalLM(LlamaConfig(
        ...     vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        ...     num_attention_heads=2))
        >>> model = GMSAModel.from_backbone(backbone, GMSAConfig(encoder_layers=1, lora_r=4))
        >>> before = fingerprint(model)
        >>> with torch.no_grad():
        ...     _ = model.lsa.layers[0].mlp.down_proj.weight.add_(1)
        >>> fingerprint(model) == before
        False
    """
    config = model.config
    names = ["encoder_layers", "merging", "alignment", "encoder_final_norm", "lsa_final_norm"]
    settings = {n: getattr(config, n) for n in [*names, "lsa_layers", "lora_r", "lora_alpha"]}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    parts: dict[str, Any] = {
        name: getattr(model, name) for name in ("encoder", "lsa", "projection", "memory")
    }
    if model.encoder is None:
        parts["embeddings"] = model.get_input_embeddings()
    for name, part in parts.items():
        if part is None:
            continue
        for key, value in sorted(part.state_dict().items()):
            _digest(digest, f"{name}.{key}", value)
    return digest.hexdigest()[:32]


@torch.no_grad()
def base_fingerprint(decoder: nn.Module) -> str | None:
    """A hash of a language model's weights, made as in `fingerprint`.

    ``None`` where the weights are not all here (another process holds them, or nobody yet).

    Examples:
        >>> from gmsa.demo_base import tiny_model
        >>> base_fingerprint(tiny_model(0)) == base_fingerprint(tiny_model(1))
        False
    """
    digest = hashlib.sha256()
    for name, parameter in decoder.named_parameters():
        if parameter.device.type == "meta" or not parameter.numel():
            return None
        _digest(digest, name, parameter)
    return digest.hexdigest()[:32]


def _digest(digest: Any, name: str, value: Tensor) -> None:
    """Add at most 4096 values of a tensor, evenly spread, to a hash."""
    flat = value.detach().flatten()
    step = max(1, len(flat) // 4096)
    sample = flat[::step].to(torch.bfloat16).view(torch.int16).cpu().numpy()
    digest.update(f"{name}:{list(value.shape)}".encode())
    digest.update(sample.tobytes())

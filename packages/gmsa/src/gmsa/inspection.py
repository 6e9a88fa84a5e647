"""What presets, checkpoints, stores and launch files there are."""

import json
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from gmsa._checkpoint import COMPRESSOR_NAME, is_checkpoint
from gmsa.presets import PRESETS
from gmsa.store import INDEX, SoftTokenStore
from shared_core.errors import InputError

__all__ = ["LAUNCH", "describe", "launch_file", "list_presets"]

LAUNCH = ("ddp", "fsdp2", "deepspeed-zero2", "deepspeed-zero3")
"""Ways to train on several GPUs, by the names of their files for ``accelerate launch``."""


def launch_file(name: str) -> str:
    """The text of a file for ``accelerate launch --config_file``.

    Raises:
        InputError: If there is none of that name.

    Examples:
        >>> "distributed_type: FSDP" in launch_file("fsdp2")
        True
    """
    if name not in LAUNCH:
        raise InputError(f"there is no launch file {name!r}; accepted: {', '.join(LAUNCH)}")
    return files("gmsa").joinpath("launch", f"{name}.yaml").read_text(encoding="utf-8")


def list_presets() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """All presets, whole and as rows of a table.

    Examples:
        >>> list_presets()[1][0]["rates"]
        '4,8'
    """
    found = {name: asdict(preset) for name, preset in PRESETS.items()}
    rows = [
        {"preset": n, "model": p["model"] or "yours", "rates": ",".join(map(str, p["rates"])),
         "drawn": p["rate_sampling"], "k": p["encoder_layers"], "k_LSA": p["lsa_layers"],
         "AE": f"{p['ae_steps']} @ {p['ae_lr']:g}", "KEFT": f"{p['keft_steps']} @ {p['keft_lr']:g}",
         "dtype": p["dtype"]}
        for n, p in found.items()
    ]  # fmt: skip
    return found, rows


def describe(folder: Path, *, verify: bool = False) -> dict[str, Any]:
    """What a folder is: a checkpoint with its settings, or a store with its documents.

    Args:
        folder: The folder.
        verify: Read every document of a store and name those that are damaged.

    Raises:
        InputError: If it is neither.

    Examples:
        >>> from gmsa.demo import tiny_compressor
        >>> folder = getfixture("tmp_path") / "saved"
        >>> tiny_compressor().model.save_pretrained(folder)
        >>> describe(folder)["encoder_layers"]
        1
    """
    if (folder / INDEX).is_file():
        store = SoftTokenStore(folder)
        lengths = [store.lengths(name) for name in store]
        found: dict[str, Any] = {
            "kind": "store",
            "documents": len(store),
            "tokens": sum(n for n, _ in lengths),
            "soft_tokens": sum(g for _, g in lengths),
            "dtype": store.dtype,
            "fingerprint": store.fingerprint,
        }
        return found | ({"damaged": store.verify()} if verify else {})
    if not is_checkpoint(folder):
        raise InputError(
            f"{folder} is neither a checkpoint ({COMPRESSOR_NAME}) nor a store ({INDEX})"
        )
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = (
        *("base_model_name_or_path", "encoder_layers", "lsa_layers", "merging", "alignment"),
        *("rates", "rate_sampling", "lora_r", "lora_alpha", "decoder_tuning", "base_fingerprint"),
    )
    with safe_open(folder / COMPRESSOR_NAME, framework="pt") as file:
        shapes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118
    numbers = 0
    for shape in shapes:
        product = 1
        for side in shape:
            product *= side
        numbers += product
    return {"kind": "checkpoint", **{n: config.get(n) for n in names}, "trained_numbers": numbers}

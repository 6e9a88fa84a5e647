"""A detector's folder: ``config.json`` and ``detector.safetensors``."""

import json
from pathlib import Path
from typing import Any

from internet_neg.config import InterNegConfig
from internet_neg.errors import InterNegError
from shared_core.run import load_state, save_state, write_json

__all__ = ["read_description", "read_state", "write_detector"]


def write_detector(folder: Path, state: dict[str, Any], description: dict[str, Any]) -> None:
    """Write both files, the description last: a folder that has one is whole."""
    save_state(folder / "detector.safetensors", state)
    write_json(folder / "config.json", description)


def read_description(folder: Path, title: str) -> tuple[list[str], InterNegConfig, str | None]:
    """Class names, settings and the fingerprint of the weights.

    Raises:
        InterNegError: If there is no detector, or one of another method than `title`.
    """
    try:
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        names, fingerprint = list(saved["classnames"]), saved["fingerprint"]
        config, method = InterNegConfig.from_dict(saved["config"]), saved["method"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InterNegError(f"{folder} holds no detector: {error}") from error
    if method != title:
        raise InterNegError(f"{folder} holds a {method}, not a {title}")
    return names, config, fingerprint


def read_state(folder: Path) -> dict[str, Any]:
    """The tensors, numbers and strings of a detector."""
    state: dict[str, Any] = load_state(folder / "detector.safetensors")
    return state

"""Whether a run may be continued: only with the settings that it was begun with."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared_core.errors import InputError
from shared_core.run import to_plain

__all__ = ["check_same"]


def check_same(settings: Mapping[str, Any], folder: Path) -> None:
    """Compare settings with those in a run's ``config.json``, if there is one.

    Raises:
        InputError: Naming the first that differs, or if the file is damaged.

    Example:
        >>> check_same({"seed": 0}, getfixture("tmp_path"))
    """
    path = folder / "config.json"
    if not path.is_file():
        return
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} cannot be read; choose another --out") from error
    for name, value in to_plain(settings).items():
        if earlier.get(name) != value:
            raise InputError(
                f"--resume with {name}={value!r}, but the run in {folder} has "
                f"{name}={earlier.get(name)!r}; give the same settings, or choose another --out"
            )

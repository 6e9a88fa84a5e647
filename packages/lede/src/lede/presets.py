"""The paper's models and candidates as data: LayerSkip checkpoints on the hub."""

from dataclasses import dataclass

from shared_core.errors import InputError

__all__ = ["DATASETS", "PRESETS", "Preset", "get_preset"]


@dataclass(frozen=True)
class Preset:
    """A checkpoint and its candidate exits.

    Attributes:
        model: Hub id (gated: ask for access on its page, then log in).
        exit_layers: Candidates; those of the paper are not published, these are ours.
        layers: Depth.
    """

    model: str
    exit_layers: tuple[int, ...]
    layers: int


PRESETS = {
    "layerskip-llama3.2-1b": Preset("facebook/layerskip-llama3.2-1B", (2, 3, 4, 6, 8), 16),
    "llama2-7b": Preset("facebook/layerskip-llama2-7B", (4, 6, 8, 10, 12), 32),
    "llama2-13b": Preset("facebook/layerskip-llama2-13B", (6, 9, 12, 15), 40),
    "codellama-7b": Preset("facebook/layerskip-codellama-7B", (4, 6, 8, 10, 12), 32),
    "codellama-34b": Preset("facebook/layerskip-codellama-34B", (8, 12, 16, 20), 48),
    "llama3-8b": Preset("facebook/layerskip-llama3-8B", (4, 6, 8, 10, 12), 32),
    "llama2-70b": Preset("facebook/layerskip-llama2-70B", (10, 14, 18, 24), 80),
}

DATASETS = {
    "alpaca": "tatsu-lab/alpaca",
    "topv2": "WillHeld/top_v2",
    "cnn_dailymail": "cnn_dailymail",
    "xsum": "xsum",
    "humaneval": "openai_humaneval",
    "gsm8k": "gsm8k",
}


def get_preset(name: str) -> Preset:
    """A preset by name.

    Raises:
        InputError: If there is none of that name.

    Example:
        >>> get_preset("llama2-7b").exit_layers
        (4, 6, 8, 10, 12)
    """
    if name not in PRESETS:
        raise InputError(f"no preset is called {name!r}; accepted: {', '.join(PRESETS)}")
    return PRESETS[name]

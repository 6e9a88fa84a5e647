"""The paper's models and candidates as data: LayerSkip checkpoints on the hub."""

from dataclasses import dataclass

from shared_core.errors import InputError

__all__ = ["DATASETS", "PRESETS", "Preset", "Prompts", "get_preset"]


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


@dataclass(frozen=True)
class Prompts:
    """A data set of the paper or of LayerSkip and how a prompt is made of it.

    Attributes:
        source: Hub id.
        column: Of the text.
        name: Configuration, if it has several.
        test: Whether it has a test split; else prompts come from the training split.
        template: ``{}`` stands for the text, ``{words}`` for its first 100 words.
    """

    source: str
    column: str
    name: str | None = None
    test: bool = True
    template: str = "{}"

    def format(self, text: str) -> str:
        """The prompt of one text.

        Examples:
            >>> DATASETS["xsum"].format("It rained.").splitlines()
            ['Article: It rained.', 'Summary:']
        """
        if self.template == "{words}":
            return " ".join(text.split()[:100])
        return self.template.replace("{}", text)


DATASETS = {
    "alpaca": Prompts("tatsu-lab/alpaca", "instruction", test=False),
    "topv2": Prompts("WillHeld/top_v2", "utterance"),
    "cnn_dailymail": Prompts("cnn_dailymail", "article", "3.0.0", template="{words}"),
    "cnn_dailymail-summary": Prompts(
        "cnn_dailymail", "article", "3.0.0", template="Article: {}\nSummary:"
    ),
    "xsum": Prompts("xsum", "document", template="Article: {}\nSummary:"),
    "humaneval": Prompts("openai_humaneval", "prompt"),
    "gsm8k": Prompts("gsm8k", "question", "main"),
}


def get_preset(name: str) -> Preset:
    """A preset by name.

    Raises:
        InputError: If there is none of that name.

    Examples:
        >>> get_preset("llama2-7b").exit_layers
        (4, 6, 8, 10, 12)
    """
    if name not in PRESETS:
        raise InputError(f"no preset is called {name!r}; accepted: {', '.join(PRESETS)}")
    return PRESETS[name]

"""The paper's own settings as data: one entry for each run of its tables.

Language settings follow the authors' scripts, which made the tables: no hard term, T = 1. (The
published GPT-2 script hard-codes α = 0, β = 1, plain reverse KL; its α and β arguments have no
effect. The values here are those it was meant to be called with.) Vision and CLIP settings follow
the authors' README.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shared_core.errors import InputError

__all__ = ["PRESETS", "Preset", "get_preset", "launch_files"]

DOLLY = "databricks/databricks-dolly-15k"


@dataclass(frozen=True)
class Preset:
    """A run of the paper.

    Attributes:
        task: ``language``, ``vision`` or ``clip``.
        teacher: Hub id or architecture; ``None`` is fine-tuning on the labels.
        student: Hub id or architecture.
        data: Hub id of the data.
        alpha: α.
        beta: β.
        temperature: τ.
        temperature_power: r in τ^r.
        kd_weight: Weight of the soft term.
        ce_weight: Weight of the hard term.
        lr: Learning rate.
        batch_size: Examples per step over all processes.
        epochs: Passes over the data.
        max_length: Tokens of an example.
        criterion: The vision loss.
        more: What else the authors set.
        reported: What the paper reports of it (ROUGE-L).
    """

    task: str
    teacher: str | None
    student: str
    data: str
    alpha: float
    beta: float
    temperature: float = 1.0
    temperature_power: float = 0.0
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    lr: float = 5e-4
    batch_size: int = 32
    epochs: int = 20
    max_length: int = 512
    criterion: str = "ab"
    more: dict[str, Any] = field(default_factory=dict)
    reported: dict[str, float] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """The preset as plain data."""
        return asdict(self)


_LANGUAGE: dict[str, Any] = {
    "weight_decay": 1e-2,
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "cosine",
    "max_prompt": 256,
    "pretrain_data": "Skylion007/openwebtext",
    "evaluation": "ROUGE-L, T=1, seeds 10, 20, 30, 40, 50",
}
_GPT2: dict[str, Any] = {
    "task": "language",
    "teacher": "openai-community/gpt2-xl",
    "data": DOLLY,
    "alpha": 0.2,
    "beta": 0.7,
}
_SFT: dict[str, Any] = {
    "task": "language",
    "teacher": None,
    "data": DOLLY,
    "alpha": 0.0,
    "beta": 0.0,
    "kd_weight": 0.0,
    "ce_weight": 1.0,
    "more": {k: v for k, v in _LANGUAGE.items() if k != "pretrain_data"},
}
_SFT_LLAMA: dict[str, Any] = {
    **_SFT,
    "more": {**_SFT["more"], "lora": {"r": 16, "lora_alpha": 64, "lora_dropout": 0.1}},
}
_CIFAR: dict[str, Any] = {
    "task": "vision",
    "data": "uoft-cs/cifar100",
    "temperature": 4.0,
    "kd_weight": 32.0,
    "ce_weight": 1.0,
    "lr": 0.05,
    "batch_size": 64,
    "epochs": 240,
    "alpha": 0.8,
    "beta": 0.3,
    "more": {
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "steps": [150, 180, 210],
        "gamma": 0.1,
        "label_column": "fine_label",
    },
}
_PAIRS = {
    "wrn-40-2": ["wrn-16-2", "wrn-40-1"],
    "resnet56": ["resnet20"],
    "resnet110": ["resnet20", "resnet32", "resnet44"],
    "resnet32x4": ["resnet8x4"],
    "vgg13": ["vgg8"],
}

_ASSUMED = {"assumed": "α and β are those of the plain loss; the paper's are not stated"}

PRESETS: dict[str, Preset] = {
    "gpt2-xl-dolly-sft": Preset(
        student="openai-community/gpt2-xl", lr=5e-5, batch_size=2, epochs=10, **_SFT
    ),
    "gpt2-small-dolly-sft": Preset(student="openai-community/gpt2", lr=5e-4, epochs=3, **_SFT),
    "openllama-7b-dolly-sft": Preset(
        student="openlm-research/open_llama_7b_v2", batch_size=4, **_SFT_LLAMA
    ),
    "openllama-3b-dolly-sft": Preset(
        student="openlm-research/open_llama_3b_v2", batch_size=8, **_SFT_LLAMA
    ),
    "gpt2-small-dolly": Preset(
        student="openai-community/gpt2",
        more=_LANGUAGE,
        reported={"dolly": 25.65, "selfinst": 13.47, "vicuna": 16.06, "sni": 26.47, "unni": 29.32},
        **_GPT2,
    ),
    "gpt2-medium-dolly": Preset(
        student="openai-community/gpt2-medium", lr=3e-4, batch_size=16, more=_LANGUAGE, **_GPT2
    ),
    "gpt2-large-dolly": Preset(
        student="openai-community/gpt2-large",
        lr=1e-4,
        batch_size=64,
        epochs=10,
        more=_LANGUAGE,
        **_GPT2,
    ),
    "openllama-3b-dolly": Preset(
        "language",
        "openlm-research/open_llama_7b_v2",
        "openlm-research/open_llama_3b_v2",
        DOLLY,
        0.1,
        0.8,
        lr=2.5e-4,
        epochs=10,
        more={**_LANGUAGE, "lora": {"r": 16, "lora_alpha": 64, "lora_dropout": 0.1}},
    ),
    "qwen2.5-1.5b-metamath": Preset(
        "language",
        "Qwen/Qwen2.5-7B-Instruct",
        "Qwen/Qwen2.5-1.5B-Instruct",
        "meta-math/MetaMathQA",
        0.2,
        0.7,
        lr=5e-5,
        epochs=3,
        more={
            **{k: v for k, v in _LANGUAGE.items() if k != "pretrain_data"},
            "assumed": "learning rate and epochs are not published",
        },
    ),
    **{
        f"cifar100-{teacher}-{student}": Preset(teacher=teacher, student=student, **_CIFAR)
        for teacher, students in _PAIRS.items()
        for student in students
    },
    "cifar100-lsd-resnet56-resnet20": Preset(
        teacher="resnet56",
        student="resnet20",
        criterion="lsd",
        **{
            **_CIFAR,
            "alpha": 0.9,
            "temperature": 2.0,
            "temperature_power": 2.0,
            "kd_weight": 9.0,
            "ce_weight": 0.1,
        },
    ),
    "cifar100-dkd-resnet56-resnet20": Preset(
        teacher="resnet56",
        student="resnet20",
        criterion="dkd",
        **{
            **_CIFAR,
            "temperature_power": 2.0,
            "kd_weight": 1.0,
            "more": {**_CIFAR["more"], "warmup_epochs": 20, "non_target_weight": 8.0, **_ASSUMED},
        },
    ),
    "cifar100-ttm-resnet56-resnet20": Preset(
        teacher="resnet56",
        student="resnet20",
        criterion="ttm",
        **{
            **_CIFAR,
            "temperature": 1.0,
            "kd_weight": 1.0,
            "more": {**_CIFAR["more"], "exponent": 0.1, **_ASSUMED},
        },
    ),
    "clip-base-to-new": Preset(
        "clip",
        "ViT-L-14",
        "ViT-B-16",
        "11 data sets, base and new classes",
        0.8,
        0.4,
        kd_weight=100.0,
        lr=1e-4,
        batch_size=8,
        more={
            "student_weights": "openai",
            "teacher_weights": "openai",
            "prompts": 4,
            "depth": 9,
            "grid": "α 0.5 to 1.2, α+β 1.0 to 1.3",
            "optimizer": "SGD, cosine, 1 warm-up epoch at 1e-5",
            "teacher_prompts": "the authors' teacher has PromptSRC prompts of the base classes",
        },
    ),
}


def get_preset(name: str) -> Preset:
    """A preset by name.

    Raises:
        InputError: If there is none of that name.

    Examples:
        >>> get_preset("gpt2-small-dolly").alpha
        0.2
    """
    if name not in PRESETS:
        raise InputError(f"no preset is called {name!r}; accepted: {', '.join(PRESETS)}")
    return PRESETS[name]


def launch_files() -> dict[str, Path]:
    """The files for ``accelerate launch --config_file`` that come with the package.

    Examples:
        >>> sorted(launch_files())
        ['ddp', 'fsdp2', 'zero1', 'zero2', 'zero3']
    """
    folder = Path(__file__).parent / "launch"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}

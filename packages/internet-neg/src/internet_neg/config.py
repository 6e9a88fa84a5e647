"""The settings of the method, checked when they are made."""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from internet_neg.errors import InterNegError
from shared_core.data.prompts import check_template

__all__ = ["InterNegConfig"]


@dataclass(frozen=True)
class InterNegConfig:
    """Settings of InterNeg; the defaults are the published ones.

    Attributes:
        negatives: M, the number of negative texts chosen from the vocabulary.
        extra: E, the most extra negatives kept from the stream.
        beta: Images with S <= beta are inverted; 0 turns the gate off.
        groups: G; 5 for the far benchmarks, 1 for the near ones and for few classes.
        inversion_steps: Optimizer steps of the inversion.
        inversion_lr: Its learning rate.
        inversion_weight_decay: Its weight decay.
        inversion_init_std: Standard deviation of the pseudo words' start.
        final_template: ``last``, ``mean``, or a template; see `invert_images`.
        templates: Templates of the inversion; None is the 80 of CLIP for ImageNet.
        shots: Images of each class that make its proxy, at most; None takes all.
        class_prompt: Prompt of the class names.
        noun_prompt: Prompt of nouns.
        adjective_prompt: Prompt of adjectives.
        rescore: After a gated image, ``batch`` scores the whole batch again (the published code),
            ``accepted`` only the images whose text entered the bank (Algorithm 1).
        dedup: How words are compared with class names to leave them out: ``casefold`` or ``exact``.
        text_only: Whether to do without the stream's extra negatives.
        transform: Of images, when the detector embeds them: ``clip`` is the model's own,
            ``openood`` OpenOOD's; see `internet_neg.transforms.load_transform`.
        percentile_mode: Of NegLabel, ``linear`` or ``index``; see `neglabel_select`.
        filter_inverted: Whether inverted texts have to be admissible; False is an ablation.
        temperature: 1 / s. None takes the model's own scale.
        group_permute: Whether negatives are permuted before they are grouped.
        max_gate_rate: Above this share of gated images a stream warns once.
        seed: Of every draw.
        chunk_size: Words compared at a time while choosing.
        dtype: ``float32``, ``bfloat16``, ``float16`` or ``auto``, of the inversion's text tower.
        bank_dtype: ``float32``, or ``float16`` as the published code.

    Raises:
        InterNegError: If a value is out of range.

    Examples:
        >>> InterNegConfig(groups=1).beta
        0.35
    """

    negatives: int = 2000
    extra: int = 2000
    beta: float = 0.35
    groups: int = 5
    inversion_steps: int = 10
    inversion_lr: float = 0.02
    inversion_weight_decay: float = 0.01
    inversion_init_std: float = 0.02
    final_template: str = "last"
    templates: tuple[str, ...] | None = None
    shots: int | None = 16
    class_prompt: str = "The nice {}."
    noun_prompt: str = "The nice {}."
    adjective_prompt: str = "This is a {} photo."
    rescore: Literal["batch", "accepted"] = "batch"
    dedup: Literal["casefold", "exact"] = "casefold"
    transform: Literal["clip", "openood"] = "clip"
    percentile_mode: Literal["linear", "index"] = "linear"
    text_only: bool = False
    filter_inverted: bool = True
    temperature: float | None = None
    group_permute: bool = True
    max_gate_rate: float = 0.5
    seed: int = 0
    chunk_size: int = 8192
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    bank_dtype: Literal["float32", "float16"] = "float32"

    def __post_init__(self) -> None:
        if self.templates is not None:
            object.__setattr__(self, "templates", tuple(self.templates))
        for name in ("negatives", "extra", "groups", "inversion_steps", "chunk_size"):
            if getattr(self, name) < 1:
                raise InterNegError(f"{name}={getattr(self, name)}; it has to be at least 1")
        if self.shots is not None and self.shots < 1:
            raise InterNegError(f"shots={self.shots}; it has to be at least 1")
        for name in ("beta", "max_gate_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise InterNegError(f"{name}={getattr(self, name)}; it has to lie in [0, 1]")
        if not self.inversion_lr > 0:
            raise InterNegError(f"inversion_lr={self.inversion_lr}; it has to be positive")
        for name in ("inversion_weight_decay", "inversion_init_std", "seed"):
            if getattr(self, name) < 0:
                raise InterNegError(f"{name}={getattr(self, name)}; it may not be negative")
        if self.temperature is not None and not self.temperature > 0:
            raise InterNegError(f"temperature={self.temperature}; it has to be positive")
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal and getattr(self, name) not in get_args(hint):
                accepted = ", ".join(get_args(hint))
                raise InterNegError(f"{name}={getattr(self, name)!r}; accepted: {accepted}")
        if self.final_template not in ("last", "mean"):
            check_template(self.final_template)
        prompts = (self.class_prompt, self.noun_prompt, self.adjective_prompt)
        for template in (*prompts, *(self.templates or ())):
            check_template(template)

    def to_dict(self) -> dict[str, Any]:
        """All settings, JSON-ready.

        Examples:
            >>> InterNegConfig.from_dict(InterNegConfig(beta=0.2).to_dict()).beta
            0.2
        """
        values = asdict(self)
        values["templates"] = None if self.templates is None else list(self.templates)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "InterNegConfig":
        """Settings from what `to_dict` gave.

        Raises:
            InterNegError: If a name is not known.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise InterNegError(
                f"there is no setting {unknown[0]!r}; accepted: {', '.join(sorted(known))}"
            )
        if values.get("templates") is not None:
            values = {**values, "templates": tuple(values["templates"])}
        return cls(**values)

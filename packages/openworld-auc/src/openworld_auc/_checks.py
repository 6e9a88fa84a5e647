"""Checks of arguments that several modules make."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shared_core.errors import InputError


class Samples(NamedTuple):
    """Checked test samples, split into the two domains.

    Attributes:
        base_scores: Scores s of the base samples, [N_b], float32 or float64.
        base_correct: Whether (or how much) the base classifier is right, bool or float64, [N_b].
        new_scores: Scores u of the new samples, [N_n].
        new_correct: Whether the classifier of new classes is right, [N_n].
        half: Whether the scores came in half precision.
    """

    base_scores: Tensor
    base_correct: Tensor
    new_scores: Tensor
    new_correct: Tensor
    half: bool = False


def check_choice(name: str, value: object, accepted: Sequence[str]) -> None:
    """Refuse a word that is not one of those accepted."""
    if value not in accepted:
        raise InputError(f"{name} is {value!r}; accepted: {', '.join(map(repr, accepted))}")


def check_level(level: int | float) -> None:
    """Refuse a confidence level outside (0, 1)."""
    if not 0 < level < 1:
        raise InputError(f"level is {level}; accepted: a number in (0, 1), such as 0.95")


def check_scores(scores: Tensor, name: str = "scores") -> Tensor:
    """Take scores to a dtype that represents them exactly, on a device that has float64."""
    if scores.ndim != 1 or not scores.is_floating_point():
        raise InputError(
            f"{name} has shape {list(scores.shape)} and dtype {scores.dtype}; "
            "accepted: one floating-point score per sample, shape [n]"
        )
    scores = scores.detach()
    if scores.device.type == "mps":
        scores = scores.cpu()
    invalid = scores.isnan()
    if invalid.any():
        raise InputError(
            f"{int(invalid.sum())} of {len(scores)} {name} are NaN, the first at index "
            f"{int(invalid.nonzero()[0])}; a NaN cannot be ranked, so remove or repair them"
        )
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def check_correct(correct: Tensor, length: int, device: torch.device) -> Tensor:
    """Take correctness to bool or to float64 in [0, 1]."""
    if correct.shape != (length,):
        raise InputError(
            f"correct has shape {list(correct.shape)}, but there are {length} scores; "
            "accepted: one value per score"
        )
    correct = correct.detach().to(device)
    if correct.dtype == torch.bool:
        return correct
    inside = (correct >= 0) & (correct <= 1)
    if not inside.all():
        value = correct[~inside][0].item()
        raise InputError(
            f"correct holds {value}; accepted: bool, or numbers in [0, 1] such as the probability "
            "of the true class"
        )
    if not correct.is_floating_point():
        return correct.bool()
    return correct.double()


def check_domain(is_base: Tensor, length: int, device: torch.device) -> Tensor:
    """Take the domain of each sample to bool."""
    if is_base.shape != (length,):
        raise InputError(
            f"is_base has shape {list(is_base.shape)}, but there are {length} scores; "
            "accepted: one value per score"
        )
    is_base = is_base.detach().to(device)
    if is_base.dtype == torch.bool:
        return is_base
    if not ((is_base == 0) | (is_base == 1)).all():
        raise InputError(
            "is_base holds values other than 0 and 1; accepted: bool, or 1 for base and 0 for new"
        )
    return is_base == 1


def check_samples(scores: Tensor, correct: Tensor, is_base: Tensor) -> Samples:
    """Check one evaluation and split it into its domains, which both need a sample."""
    values = check_scores(scores)
    right = check_correct(correct, len(values), values.device)
    base = check_domain(is_base, len(values), values.device)
    new = ~base
    half = scores.dtype in (torch.float16, torch.bfloat16)
    samples = Samples(values[base], right[base], values[new], right[new], half)
    for name, side in (("base", samples.base_scores), ("new", samples.new_scores)):
        if len(side) == 0:
            raise InputError(
                f"there are no {name} samples; OpenworldAUC ranks base samples against new ones "
                "and needs both"
            )
    return samples


def check_weights(weight: Tensor, is_base: Tensor) -> tuple[Tensor, Tensor]:
    """Check sample weights and split them into the two domains, as float64."""
    if weight.shape != is_base.shape:
        raise InputError(
            f"sample_weight has shape {list(weight.shape)}, but there are {len(is_base)} scores; "
            "accepted: one weight per score"
        )
    values = weight.detach().to("cpu" if weight.device.type == "mps" else weight.device).double()
    if not (values.isfinite() & (values >= 0)).all():
        raise InputError("sample_weight holds a negative or infinite value or NaN; accepted: >= 0")
    base = check_domain(is_base, len(values), values.device)
    split = values[base], values[~base]
    for name, side in zip(("base", "new"), split, strict=True):
        if side.sum() == 0:
            raise InputError(f"all weights of {name} samples are 0; give one of them a weight")
    return split

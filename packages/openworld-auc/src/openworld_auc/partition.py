"""Base classes parted into pseudo-base and pseudo-new ones, a different part for each detector."""

from typing import Literal, NamedTuple

import torch

from openworld_auc._checks import check_choice
from shared_core.errors import InputError

__all__ = ["Partition", "pseudo_partition"]


class Partition(NamedTuple):
    """The classes of one detector.

    Attributes:
        pseudo_base: Classes that it should score high.
        pseudo_new: Classes that play the part of new ones; its softmax has no column for them.
        vocabulary: The classes of its softmax: the pseudo-base ones, and with the padding of the
            published code sometimes one more.
    """

    pseudo_base: tuple[int, ...]
    pseudo_new: tuple[int, ...]
    vocabulary: tuple[int, ...]


def pseudo_partition(
    num_classes: int,
    k: int = 3,
    *,
    scheme: Literal["mod", "random"] = "mod",
    generator: torch.Generator | None = None,
    official_padding: bool = False,
) -> list[Partition]:
    """Part the base classes k times, so that each is pseudo-new for exactly one detector.

    Args:
        num_classes: Number of base classes.
        k: Number of detectors.
        scheme: Class i is pseudo-new for detector ``i mod k`` (``mod``), or for a random one, with
            sizes that differ by at most one.
        generator: Of the random scheme.
        official_padding: Repeat an accident of the published code: where the vocabularies would
            differ in size, class k is added to the softmax of detector k if it is short of one,
            although its images stay pseudo-new.

    Raises:
        InputError: If not 2 <= k <= num_classes, or the scheme is not known.

    Examples:
        >>> [part.pseudo_new for part in pseudo_partition(5, 3)]
        [(0, 3), (1, 4), (2,)]
    """
    check_choice("scheme", scheme, ("mod", "random"))
    if not 2 <= k <= num_classes:
        raise InputError(
            f"k is {k} for {num_classes} base classes; accepted: from 2 to the number of classes, "
            "so that every detector has pseudo-base and pseudo-new ones"
        )
    order = list(range(num_classes))
    if scheme == "random":
        order = torch.randperm(num_classes, generator=generator).tolist()
    largest = num_classes - num_classes // k
    parts = []
    for detector in range(k):
        new = sorted(order[detector::k])
        base = [c for c in range(num_classes) if c not in set(new)]
        padded = [detector] if official_padding and len(base) < largest else []
        parts.append(Partition(tuple(base), tuple(new), (*base, *padded)))
    return parts

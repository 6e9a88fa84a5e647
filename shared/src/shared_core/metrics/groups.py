"""Groups of classes by how often they occur in training: many, medium and few shots."""

from collections.abc import Sequence

from jaxtyping import Int
from torch import Tensor

from shared_core.errors import InputError

__all__ = ["shot_groups"]


def shot_groups(
    train_counts: Sequence[int] | Int[Tensor, "classes"],
    *,
    many: int = 100,
    few: int = 20,
    many_inclusive: bool = False,
    few_inclusive: bool = False,
) -> dict[str, list[int]]:
    """Split classes by their number of training samples.

    The defaults are those of ImageNet-LT (Liu et al., "Large-Scale Long-Tailed Recognition in an
    Open World", CVPR 2019): many-shot classes have more than 100 training samples, few-shot
    classes less than 20, medium-shot classes the rest.

    Args:
        train_counts: Training samples of each class; classes without any are few-shot.
        many: Edge of the many-shot group.
        few: Edge of the few-shot group.
        many_inclusive: Whether a class with exactly `many` samples is many-shot.
        few_inclusive: Whether a class with exactly `few` samples is few-shot.

    Returns:
        Ascending class indices under ``many``, ``medium`` and ``few``; groups can be empty.

    Raises:
        InputError: If there are no classes, a count is negative, or the groups overlap.

    Examples:
        >>> shot_groups([500, 100, 20, 5])
        {'many': [0], 'medium': [1, 2], 'few': [3]}
        >>> shot_groups([500, 100, 20, 5], many_inclusive=True, few_inclusive=True)
        {'many': [0, 1], 'medium': [], 'few': [2, 3]}
    """
    counts = [int(count) for count in train_counts]
    if not counts:
        raise InputError("train_counts is empty; it needs one number per class")
    for label, count in enumerate(counts):
        if count < 0:
            raise InputError(f"class {label} has the training count {count}; counts are >= 0")
    if few > many or (few == many and many_inclusive and few_inclusive):
        raise InputError(
            f"the groups overlap: few={few} (inclusive={few_inclusive}) is not below "
            f"many={many} (inclusive={many_inclusive})"
        )
    groups: dict[str, list[int]] = {"many": [], "medium": [], "few": []}
    for label, count in enumerate(counts):
        if count > many or (many_inclusive and count == many):
            groups["many"].append(label)
        elif count < few or (few_inclusive and count == few):
            groups["few"].append(label)
        else:
            groups["medium"].append(label)
    return groups

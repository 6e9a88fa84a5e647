"""Which column of a table holds the labels, the images or the text."""

from collections.abc import Mapping, Sequence
from typing import Any

from shared_core.errors import InputError


def find_column(
    features: Mapping[str, Any],
    wanted: str | None,
    *,
    role: str,
    candidates: Sequence[str],
    usual: Sequence[str],
) -> str:
    """The column that plays a role: the wanted one, the only candidate, or one with a usual name.

    Args:
        features: The columns and their types.
        wanted: The user's choice, if any.
        role: ``label``, ``image`` or ``text``.
        candidates: Columns whose type alone says that they play the role.
        usual: Usual names of such a column, the most usual first. They decide between several
            candidates, or among all columns if there is no candidate.

    Raises:
        InputError: If the wanted column is not there or no column stands out.
    """
    columns = ", ".join(features) or "none"
    if wanted is not None:
        if wanted not in features:
            raise InputError(f"there is no column {wanted!r}; available: {columns}")
        return wanted
    if len(candidates) == 1:
        return candidates[0]
    for name in usual:
        if name in (candidates or features):
            return name
    raise InputError(
        f"it is not clear which column holds the {role}; name it with {role}_column=; "
        f"available: {columns}"
    )


def find_label_column(features: Mapping[str, Any], wanted: str | None) -> str:
    """The label column of a Hugging Face data set; columns with class names are candidates."""
    named = [name for name, feature in features.items() if hasattr(feature, "names")]
    return find_column(
        features, wanted, role="label", candidates=named, usual=("label", "labels", "target")
    )

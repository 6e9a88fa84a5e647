"""What can go wrong, each with what to do about it."""

import difflib
from collections.abc import Iterable

from shared_core.errors import InputError

__all__ = ["ActivationNotFound", "MapTooLarge", "UnsupportedBackbone"]


class ActivationNotFound(KeyError, InputError):  # noqa: N818 - a KeyError says it is one
    """No activation has this name; the message lists the five nearest.

    Args:
        wanted: The name or pattern.
        names: All names there are.

    Examples:
        >>> print(ActivationNotFound("mid-vit-ou", ["mid-vit-out", "unet-in"]))
        no activation is called 'mid-vit-ou'; nearest: mid-vit-out, unet-in
    """

    def __init__(self, wanted: str, names: Iterable[str]) -> None:
        nearest = difflib.get_close_matches(wanted, list(names), n=5, cutoff=0.0)
        self.nearest = nearest
        self.message = f"no activation is called {wanted!r}; nearest: {', '.join(nearest)}"
        super().__init__(self.message)

    def __str__(self) -> str:
        return self.message


class UnsupportedBackbone(TypeError, InputError):  # noqa: N818
    """The activations of this model have no canonical names; ``module:`` addresses work.

    Args:
        model: The model's class.

    Examples:
        >>> print(UnsupportedBackbone(int))
        int has no canonical activation names; address its modules as 'module:<dotted.path>'
    """

    def __init__(self, model: type) -> None:
        super().__init__(
            f"{model.__name__} has no canonical activation names; address its modules as "
            "'module:<dotted.path>'"
        )


class MapTooLarge(MemoryError, InputError):  # noqa: N818
    """An attention map would take more memory than the guard lets through.

    Args:
        name: The activation.
        size: Bytes of the map before it is averaged over heads.
        limit: Bytes allowed.

    Examples:
        >>> print(MapTooLarge("mid-vit-block0-self-map", 4 << 30, 2 << 30))
        mid-vit-block0-self-map would take 4.0 GiB (limit 2.0 GiB); pass allow_large=True, or use a
        smaller image or batch
    """

    def __init__(self, name: str, size: int, limit: int) -> None:
        gib = 1 << 30
        super().__init__(
            f"{name} would take {size / gib:.1f} GiB (limit {limit / gib:.1f} GiB); pass "
            "allow_large=True, or use a smaller image or batch"
        )

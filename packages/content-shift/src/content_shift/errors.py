"""What can go wrong, each with what to do about it."""

from collections.abc import Sequence

from shared_core.errors import InputError

__all__ = ["AdapterClash", "IncompatibleControl", "UnsupportedTechnique", "ZeroAnchor"]


class ZeroAnchor(InputError):  # noqa: N818 - a ValueError says it is one
    """The anchor is as close to the reference as can be, so that nothing can be told beside it.

    Args:
        where: What was compared, such as a layer.

    Examples:
        >>> print(ZeroAnchor("up-level1-repeat0-res-out"))
        up-level1-repeat0-res-out: the anchor equals the reference, so eq. 2 would divide by zero;
        take the anchor at a later timestep, or a layer that the noise reaches
    """

    def __init__(self, where: str) -> None:
        super().__init__(
            f"{where}: the anchor equals the reference, so eq. 2 would divide by zero; take the "
            "anchor at a later timestep, or a layer that the noise reaches"
        )


class IncompatibleControl(InputError):  # noqa: N818
    """A ControlNet's residuals do not fit the backbone's skip connections.

    Args:
        control: Channels of the ControlNet's residuals, in order.
        backbone: Channels of the backbone's skip connections, in order.

    Examples:
        >>> print(IncompatibleControl([8], [8, 16]))
        the ControlNet gives 1 residuals of channels [8], the backbone takes 2 of [8, 16]; use a
        ControlNet made for this backbone
    """

    def __init__(self, control: Sequence[int], backbone: Sequence[int]) -> None:
        super().__init__(
            f"the ControlNet gives {len(control)} residuals of channels {list(control)}, the "
            f"backbone takes {len(backbone)} of {list(backbone)}; use a ControlNet made for this "
            "backbone"
        )


class UnsupportedTechnique(TypeError, InputError):  # noqa: N818
    """The backbone has no place where this technique could act.

    Args:
        technique: Its name.
        backbone: The backbone's class.
        reason: What is missing.

    Examples:
        >>> print(UnsupportedTechnique("ControlNet", int, "its forward takes no residuals"))
        ControlNet cannot act on int: its forward takes no residuals
    """

    def __init__(self, technique: str, backbone: type, reason: str) -> None:
        super().__init__(f"{technique} cannot act on {backbone.__name__}: {reason}")


class AdapterClash(InputError):  # noqa: N818
    """Two different LoRA weights want the same adapter name.

    Args:
        name: The name.

    Examples:
        >>> print(AdapterClash("horse"))
        an adapter called 'horse' is already there with other weights; give this LoRA another name=
    """

    def __init__(self, name: str) -> None:
        super().__init__(
            f"an adapter called {name!r} is already there with other weights; give this LoRA "
            "another name="
        )

"""What can be wrong with a model or a policy, beside plain bad input."""

from shared_core.errors import InputError

__all__ = ["PolicyMismatchError", "UnsupportedModelError"]


class UnsupportedModelError(InputError):
    """The model's family has no adapter, or its attention cannot be run layer by layer.

    Examples:
        >>> issubclass(UnsupportedModelError, ValueError)
        True
    """


class PolicyMismatchError(InputError):
    """A policy was made for other exits, another depth or other features than it is used with.

    Examples:
        >>> issubclass(PolicyMismatchError, ValueError)
        True
    """

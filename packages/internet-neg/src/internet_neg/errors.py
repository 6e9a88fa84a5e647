"""The errors of this package; all are bad input, which command lines show in a line."""

from shared_core.errors import InputError

__all__ = ["InterNegError", "NoAdmissibleNegativesError", "NotFittedError"]


class InterNegError(InputError):
    """Bad input: what was wrong, what is accepted, what to do.

    Examples:
        >>> issubclass(InterNegError, ValueError)
        True
    """


class NotFittedError(InterNegError):
    """A detector was asked for scores before it saw the known classes.

    Examples:
        >>> print(NotFittedError())
        the detector has not seen the known classes yet; call fit first
    """

    def __init__(self) -> None:
        super().__init__("the detector has not seen the known classes yet; call fit first")


class NoAdmissibleNegativesError(InterNegError):
    """No word of the vocabulary is farther from every class than the class's own name.

    Examples:
        >>> issubclass(NoAdmissibleNegativesError, InterNegError)
        True
    """

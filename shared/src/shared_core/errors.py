"""The one exception that means "your input, not our code"."""


class InputError(ValueError):
    """Bad input or usage: what was wrong, what is accepted, what to do.

    Command lines print the message (one or two lines) and exit with code 2.

    Examples:
        >>> from shared_core.errors import InputError
        >>> issubclass(InputError, ValueError)
        True
    """


class MissingExtraError(ImportError):
    """An optional dependency is not installed; the message holds the command that installs it.

    Args:
        distribution: The distribution whose extra is missing, such as ``"focal-sam"``.
        extra: The name of the extra, such as ``"vision"``.
        needs: What the feature needs, such as ``"torchvision"``.

    Examples:
        >>> from shared_core.errors import MissingExtraError
        >>> print(MissingExtraError("focal-sam", "vision", "torchvision"))
        torchvision is not installed: pip install 'focal-sam[vision]'
    """

    def __init__(self, distribution: str, extra: str, needs: str) -> None:
        super().__init__(f"{needs} is not installed: pip install '{distribution}[{extra}]'")

"""Which compression rate a training sample gets (section "training" of the paper: at random)."""

import hashlib
from collections.abc import Sequence

from shared_core.errors import InputError

__all__ = ["SAMPLINGS", "check_rates", "draw_rate", "parse_rates"]

SAMPLINGS = ("sample", "batch", "fixed")


def check_rates(rates: Sequence[int], name: str = "rates") -> list[int]:
    """The rates as a list, checked to be whole numbers from 1 on and at least one.

    Raises:
        InputError: If they are not.

    Examples:
        >>> check_rates((4, 8))
        [4, 8]
    """
    found = list(rates)
    if not found or any(isinstance(r, bool) or not isinstance(r, int) or r < 1 for r in found):
        raise InputError(f"{name} are {found}; accepted: one or more whole numbers from 1 on")
    return found


def parse_rates(text: str) -> list[int]:
    """The rates in a list with commas.

    Raises:
        InputError: If one is not a whole number from 1 on.

    Examples:
        >>> parse_rates("4,8")
        [4, 8]
    """
    try:
        return check_rates([int(part) for part in text.split(",")])
    except ValueError:
        raise InputError(
            f"rates are {text!r}; accepted: whole numbers from 1 on, by commas"
        ) from None


def draw_rate(rates: Sequence[int], seed: int, epoch: int, index: int) -> int:
    """Draw the compression rate of one sample, uniformly.

    The draw depends on its arguments alone, so it is the same for any number of workers and
    processes, and a resumed run repeats it.

    Args:
        rates: The rates to choose from.
        seed: Of the run.
        epoch: The number of times that the data set was gone through before.
        index: The sample's place in the data set.

    Raises:
        InputError: If a rate is not a whole number from 1 on.

    Examples:
        >>> [draw_rate([4, 8], seed=0, epoch=0, index=i) for i in range(6)]
        [4, 8, 4, 4, 4, 8]
    """
    choices = check_rates(rates)
    # Not Python's generator: seeding one costs far more than hashing three numbers.
    key = f"{seed}/{epoch}/{index}".encode()
    drawn = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")
    return choices[drawn * len(choices) >> 64]

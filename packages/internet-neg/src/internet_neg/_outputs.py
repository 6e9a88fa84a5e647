"""What a detector says: of its words, and of a batch of images."""

from typing import NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["NegativeText", "OODOutput"]


class NegativeText(NamedTuple):
    """A chosen word: the word, ``noun`` or ``adj``, and its deviation (None where not used)."""

    word: str
    pos: str
    deviation: float | None


class OODOutput(NamedTuple):
    """What a detector says of a batch.

    Attributes:
        score: S in [0, 1]; high is in-distribution.
        margin: Ranks as the score does, without its ties by saturation.
        pred: The most similar known class.
        is_id: Whether the margin reaches the calibrated threshold; None before `calibrate`.
        gated: Whether the image was inverted into a text.
        accepted: Whether that text was admissible and offered to the bank.
    """

    score: Float[Tensor, " B"]
    margin: Float[Tensor, " B"]
    pred: Int[Tensor, " B"]
    is_id: Bool[Tensor, " B"] | None
    gated: Bool[Tensor, " B"]
    accepted: Bool[Tensor, " B"]

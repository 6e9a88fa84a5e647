"""The hard term alone, from hidden states: text without a teacher, such as a pretraining mix."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from abkd.fused import Head, fused_loss
from abkd.objective import SETTINGS, TeacherChunk
from abkd.statistics import TokenStatistics
from abkd.terms import Terms

__all__ = ["fused_linear_cross_entropy"]


class _NoTeacher:
    """A teacher's side that is not there: no soft term, and the student's own statistics."""

    def part(self, rows: slice) -> "_NoTeacher":
        """Itself."""
        del rows
        return self

    def compare(
        self, lq: Tensor, q: Tensor, terms: Terms, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Nothing to compare with."""
        del q, terms, temperature
        none = lq.new_zeros(len(lq))
        return none, torch.zeros_like(lq), none

    def statistics(self, rows: Tensor, labels: Tensor | None, lq: Tensor) -> TokenStatistics:
        """Those of the student for both."""
        return TokenStatistics(rows, labels, lq, lq)


def fused_linear_cross_entropy(
    hidden: Float[Tensor, "*batch width"],
    weight: Float[Tensor, "rows width"],
    labels: Int[Tensor, "*batch"],
    *,
    bias: Float[Tensor, " rows"] | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab: int | None = None,
    n_valid: Tensor | float | None = None,
    chunk_size: int | str = "auto",
) -> Float[Tensor, ""]:
    """Cross-entropy from hidden states and head, without logits of all tokens.

    Args:
        hidden: ``[..., H]``, aligned with the labels (shift them before).
        weight: The head, ``[V, H]``.
        labels: ``[...]``; -100 marks tokens that do not count.
        bias: ``[V]``.
        softcap: See `abkd.fused_linear_ab_divergence`, as all below.
        logit_scale: A factor of the logits.
        vocab: Rows of the head to use; by default all.
        n_valid: The denominator; by default the tokens that count.
        chunk_size: Tokens computed at once, or ``auto``.

    Raises:
        InputError: As `abkd.distillation_loss`.

    Examples:
        >>> h, W = torch.randn(5, 4), torch.randn(9, 4)
        >>> y = torch.tensor([0, 3, -100, 8, 2])
        >>> expected = torch.nn.functional.cross_entropy(h @ W.T, y)
        >>> bool(torch.isclose(fused_linear_cross_entropy(h, W, y, chunk_size=2), expected))
        True
    """

    def teacher(at: Tensor) -> TeacherChunk:
        del at
        return _NoTeacher()

    head = Head(vocab or len(weight), logit_scale, softcap)
    settings = {**SETTINGS, "labels": labels, "ce_weight": 1.0, "n_valid": n_valid}
    return fused_loss(hidden, weight, bias, head, teacher, chunk_size, settings).loss

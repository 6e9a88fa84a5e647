"""What is known of the tokens of a chunk while their logits are at hand.

A loss that weighs its terms token by token (by the teacher's confidence, its entropy, the student's
agreement) asks here. Everything is computed on first use from the chunk's log-probabilities, so
what is not asked for costs nothing, and no tensor of [N, V] is made.
"""

import math
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from shared_core.errors import InputError

__all__ = ["STATISTICS", "TokenStatistics"]

STATISTICS = (
    "teacher_max_prob",
    "teacher_argmax",
    "teacher_entropy",
    "teacher_label_prob",
    "student_max_prob",
    "student_argmax",
    "student_entropy",
    "student_label_prob",
    "student_label_log_prob",
)


class TokenStatistics:
    """Teacher and student statistics of the tokens of one chunk, at temperature 1.

    Entropies are in nats. A top-k teacher's tail mass is spread evenly over the classes that it
    does not list.

    Args:
        rows: Position of each token among all tokens given to the loss, ``[C]``.
        labels: Labels of the tokens ``[C]``, if there are any.
        student_log_probs: ``[C, V]``.
        teacher_log_probs: ``[C, V]``, or ``[C, K]`` of a top-k teacher.
        topk_ids: Classes ``[C, K]`` of a top-k teacher.

    Attributes:
        rows: As given: the index into your own per-token tensors.
        labels: As given.
        vocab_size: V, the classes that teacher and student share (no padding rows).

    Examples:
        >>> lp = torch.tensor([[0.5, 0.25, 0.25]]).log()
        >>> seen = TokenStatistics(torch.tensor([0]), None, lp, lp)
        >>> seen.teacher_max_prob, seen.teacher_entropy
        (tensor([0.5000]), tensor([1.0397]))
    """

    def __init__(
        self,
        rows: Int[Tensor, " C"],
        labels: Int[Tensor, " C"] | None,
        student_log_probs: Float[Tensor, "C V"],
        teacher_log_probs: Float[Tensor, "C K"],
        topk_ids: Int[Tensor, "C K"] | None = None,
    ) -> None:
        self.rows = rows
        self.labels = labels
        self.vocab_size: int = student_log_probs.shape[-1]
        self._lq, self._lp, self._ids = student_log_probs, teacher_log_probs, topk_ids

    @cached_property
    def _tail(self) -> Tensor:
        """Mass that a top-k teacher does not list, ``[C]``."""
        return (1 - torch.exp(self._lp).sum(-1)).clamp(min=0)

    @property
    def _unlisted(self) -> int:
        return self.vocab_size - self._lp.shape[-1]

    @cached_property
    def _teacher_top(self) -> tuple[Tensor, Tensor]:
        value, index = _top(self._lp)
        if self._ids is not None:
            index = self._ids.gather(-1, index.unsqueeze(-1)).squeeze(-1)
        return torch.exp(value), index

    @cached_property
    def _student_top(self) -> tuple[Tensor, Tensor]:
        value, index = _top(self._lq)
        return torch.exp(value), index

    @property
    def teacher_max_prob(self) -> Float[Tensor, " C"]:
        """max_a p(a)."""
        return self._teacher_top[0]

    @property
    def teacher_argmax(self) -> Int[Tensor, " C"]:
        """The teacher's most probable class."""
        return self._teacher_top[1]

    @cached_property
    def teacher_entropy(self) -> Float[Tensor, " C"]:
        """-Σ p log p."""
        entropy = _entropy(self._lp)
        if self._ids is not None and self._unlisted:
            entropy = entropy - torch.xlogy(self._tail, self._tail / self._unlisted)
        return entropy

    def teacher_power_sum(self, gamma: float) -> Float[Tensor, " C"]:
        """Σ p^γ: 1 for a one-hot teacher, V^(1-γ) for a uniform one (0 < γ < 1).

        Raises:
            InputError: If γ is not positive.
        """
        if not (gamma > 0 and math.isfinite(gamma)):
            raise InputError(f"gamma is {gamma}; it must be finite and above 0")
        total = torch.exp(gamma * self._lp).sum(-1)
        if self._ids is not None and self._unlisted:
            total = total + self._unlisted * (self._tail / self._unlisted) ** gamma
        return total

    @cached_property
    def teacher_label_prob(self) -> Float[Tensor, " C"]:
        """p(label)."""
        labels = self._labels()
        if self._ids is None:
            return torch.exp(self._lp.gather(-1, labels).squeeze(-1))
        hit = self._ids == labels
        listed = (torch.exp(self._lp) * hit).sum(-1)
        return torch.where(hit.any(-1), listed, self._tail / max(self._unlisted, 1))

    @property
    def student_max_prob(self) -> Float[Tensor, " C"]:
        """max_a q(a)."""
        return self._student_top[0]

    @property
    def student_argmax(self) -> Int[Tensor, " C"]:
        """The student's most probable class."""
        return self._student_top[1]

    @cached_property
    def student_entropy(self) -> Float[Tensor, " C"]:
        """-Σ q log q."""
        return _entropy(self._lq)

    @property
    def student_label_prob(self) -> Float[Tensor, " C"]:
        """q(label)."""
        return torch.exp(self.student_label_log_prob)

    @cached_property
    def student_label_log_prob(self) -> Float[Tensor, " C"]:
        """Log q(label), also where q(label) is too small for its type."""
        return self._lq.gather(-1, self._labels()).squeeze(-1)

    def _labels(self) -> Tensor:
        if self.labels is None:
            raise InputError("the probability of the label was asked for, but no labels were given")
        return self.labels.unsqueeze(-1)


def _entropy(log_probs: Tensor) -> Tensor:
    # The bound takes the place of -inf, which times its mass of 0 would be NaN.
    bounded = log_probs.clamp(min=torch.finfo(log_probs.dtype).min)
    return -torch.exp(log_probs).mul_(bounded).sum(-1)


def _top(log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's maximum and the first class that has it."""
    if log_probs.device.type != "cpu":
        value, index = log_probs.max(-1)
        return value, index
    # NumPy finds the place twelve times as fast as torch does on a CPU.
    index = torch.from_numpy(log_probs.detach().numpy().argmax(-1))
    return log_probs.gather(-1, index.unsqueeze(-1)).squeeze(-1), index

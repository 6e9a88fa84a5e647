"""The risk penalty inside the one pass over a fused head's chunks.

The penalty couples neighbours, Δ = V(next) - f(a*), and V is known only chunk by chunk. But
V = CE + f(a*), so a position's part through V is more weight on its own cross-entropy, decided when
its chunk is at hand. What is left moves single logits: a dot product for each token, outside.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from abkd import DistillationOutput, TokenStatistics
from bridge_garden.risk import Risk, reduce_risk, risk_terms, successors

__all__ = ["LabelLogits", "OnePassRisk", "one_pass"]


def one_pass(risk: Risk | None, hard_labels: str) -> bool:
    """Whether the penalty can be had in one pass; else abkd goes over the chunks again.

    A discount or the rule of ``both_agree`` would change the added weight as well.
    """
    return risk is not None and risk.gamma == 1 and hard_labels != "both_agree"


@dataclass
class LabelLogits:
    """Single logits of a head, ``[n]`` of them instead of ``[n, V]``.

    Attributes:
        hidden: ``[N, H]``.
        weight: ``[V, H]``.
        bias: ``[V]``.
        softcap: See `abkd.fused_linear_ab_divergence`.
        scale: Likewise.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    softcap: float | None = None
    scale: float = 1.0

    def __call__(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """The logits of one token for each row, rounded as the head rounds them."""
        kind = self.hidden.device.type
        low = self.hidden.dtype
        if low != torch.float64 and torch.is_autocast_enabled(kind):
            low = torch.get_autocast_dtype(kind)
        high = torch.float64 if low == torch.float64 else torch.float32
        with torch.autocast(kind, enabled=False):
            h, w = (t.to(low).to(high) for t in (self.hidden[rows], self.weight[tokens]))
            found = (h * w).sum(-1)
            if self.bias is not None:
                found = found + self.bias[tokens].to(low).to(high)
            found = found.to(low).to(high) * self.scale
            return (
                found if self.softcap is None else self.softcap * torch.tanh(found / self.softcap)
            )


class OnePassRisk:
    """λ and the penalty for one call of a fused loss.

    Args:
        logits: The student's single logits.
        weight: λ of a chunk, ``TokenStatistics -> [C]``.
        risk: The settings, with γ = 1.
        labels: ``[B, T]``.
        valid: ``[B, T]``.
        segments: ``[B, T]``, or ``None``.
        hard_labels: ``labels`` or ``teacher_argmax``.
    """

    def __init__(
        self,
        logits: LabelLogits,
        weight: Callable[[TokenStatistics], Tensor],
        risk: Risk,
        labels: Tensor,
        valid: Tensor,
        segments: Tensor | None,
        hard_labels: str,
    ) -> None:
        self.logits, self.weight, self.risk = logits, weight, risk
        self.valid, self.segments = valid, segments
        self.argmax = hard_labels == "teacher_argmax"
        self.labels = torch.where(valid, labels, 0).flatten()
        # Only those that count are looked at: the others may hold anything, and 0 · NaN is NaN.
        rows = valid.flatten().nonzero().squeeze(-1)
        found = logits(rows, self.labels[rows])
        self.label_logit = found.new_zeros(len(self.labels)).index_put((rows,), found)
        self.coupled = successors(valid, segments).flatten() & valid.flatten()
        zeros = torch.zeros_like(self.label_logit.detach())
        self.lse, self.share, self.extra = zeros, zeros.clone(), zeros.clone()
        self.target = self.labels.clone()

    def __call__(self, seen: TokenStatistics) -> tuple[Tensor, Tensor]:
        """The weights of a chunk: λ, and 1 - λ with what the penalty adds."""
        rows = seen.rows
        lam = self.weight(seen)
        own = self.label_logit.detach()
        self.lse[rows] = own[rows] - seen.student_label_log_prob.to(own.dtype)
        self.share[rows] = (1 - lam).to(self.share.dtype)
        if self.argmax:
            self.target[rows] = seen.teacher_argmax
        # Those before a chunk's rows are in it or in an earlier one.
        before = (rows - 1).clamp(min=0)
        reward = own[before] - self.lse[rows]
        slope = (self.risk.alpha / 2) * self.share[before] * reward
        follows = self.coupled[before] & (self.target[before] == self.labels[before]) & (rows > 0)
        self.extra[rows] = torch.where(follows, -slope, 0.0)
        return lam, self.share[rows] + self.extra[rows]

    def finish(self, out: DistillationOutput) -> tuple[Tensor, Tensor, Tensor]:
        """The loss with the gradient that was left, the hard term, and the penalty."""
        shape = self.valid.shape
        value = self.label_logit.detach().reshape(shape)
        follows = (self.target == self.labels).reshape(shape)
        each, ends = risk_terms(
            value, self.lse.reshape(shape), self.valid, self.risk, follows=follows,
            segments=self.segments,
        )  # fmt: skip
        share = self.share.reshape(shape)
        penalty = reduce_risk(share * each, ends, self.valid, out.n_valid, self.segments)
        after = successors(self.valid, self.segments)
        next_value = torch.zeros_like(self.lse)
        next_value[:-1] = self.lse[1:]
        reward = value.flatten() - torch.where(after.flatten(), next_value, 0.0)
        penalised = self.valid & follows & (after if self.risk.terminal == "skip" else self.valid)
        slope = torch.where(penalised.flatten(), self.share * reward, 0.0) * (self.risk.alpha / 2)
        left = (slope * self.label_logit).sum()
        some = self.extra.nonzero().squeeze(-1)
        left = left + (self.extra[some] * self.logits(some, self.target[some])).sum()
        left = left / out.n_valid
        hard = (share * out.per_token_ce).sum() / out.n_valid
        loss = out.loss + (left - left.detach()) + (hard - out.ce + penalty).to(out.loss.dtype)
        return loss, hard, penalty

"""The risk-guided hard label: a penalty on the reward that the student's logits imply.

Read logits as soft Q-values: V(s) = logsumexp f(·|s) is the value of a state and
r = f(a*|s) - V([s,a*]) the reward of the label. The χ²-regularised inverse-RL objective punishes
large rewards::

    ℓ'_hard = -log π(a*|s) + (α/4) Δ²,    Δ = V([s,a*]) - f(a*|s)

[s,a*] is the next position only if a* is the token that really follows; elsewhere there is no Δ.
Δ moves with a constant added to all logits of a position: the penalty pins their scale.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from shared_core.errors import InputError

__all__ = ["Risk", "risk_penalty", "risk_terms"]

Terminal = Literal["skip", "official"]


@dataclass(frozen=True)
class Risk:
    """Settings of the risk-guided hard label.

    Args:
        alpha: α; 0.1 in the paper, 0.05 in the authors' code.
        gamma: Discount γ; 1 in the paper, 0.9999 in the authors' code. Below 1 it also discounts
            the hard label's cross-entropy, by γ to the index among the valid tokens.
        terminal: What happens at the last valid token, which has no successor: ``skip`` leaves it
            out; ``official`` takes V = 0 after it, and for γ < 1 adds the terminal term.

    Raises:
        InputError: If α is negative, γ not in (0, 1], or `terminal` unknown.

    Examples:
        >>> Risk(alpha=0.05, gamma=0.9999, terminal="official").alpha
        0.05
    """

    alpha: float = 0.1
    gamma: float = 1.0
    terminal: Terminal = "skip"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha < float("inf"):
            raise InputError(f"risk alpha is {self.alpha}; accepted: 0 or above, finite")
        if not 0 < self.gamma <= 1:
            raise InputError(f"risk gamma is {self.gamma}; accepted: above 0, at most 1")
        if self.terminal not in ("skip", "official"):
            raise InputError(f"risk terminal is {self.terminal!r}; accepted: skip, official")


def discounts(valid: Tensor, gamma: float, segments: Tensor | None = None) -> Tensor:
    """γ to the index of each token among the valid ones of its sequence, float64 ``[B, T]``."""
    count = valid.long().cumsum(-1)
    if segments is not None:
        starts = torch.ones_like(valid)
        starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
        before = torch.where(starts, count - valid.long(), 0).cummax(-1).values
        count = count - before
    dtype = torch.float32 if valid.device.type == "mps" else torch.float64
    return torch.where(valid, gamma ** (count - 1).clamp(min=0).to(dtype), 0.0)


def successors(valid: Tensor, segments: Tensor | None = None) -> Tensor:
    """Which tokens have a valid one of the same sequence right after them, ``[B, T]``."""
    after = torch.zeros_like(valid)
    after[:, :-1] = valid[:, 1:]
    if segments is not None:
        after[:, :-1] &= segments[:, 1:] == segments[:, :-1]
    return after


def risk_terms(
    label_logit: Float[Tensor, "B T"],
    lse: Float[Tensor, "B T"],
    valid: Bool[Tensor, "B T"],
    risk: Risk,
    *,
    follows: Bool[Tensor, "B T"] | None = None,
    segments: Int[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """The penalty of each token, and the terminal term of each sequence at its last token.

    Args:
        label_logit: f(a*|s), the label's logit.
        lse: V(s), logsumexp of the logits.
        valid: Which tokens count.
        risk: The settings.
        follows: Where the hard label is the token that follows (default: everywhere). Elsewhere
            the next position is not [s,a*].
        segments: Ids of the sequences packed in a row; a penalty never crosses them.

    Returns:
        Two tensors: (α/4)γ^i Δ² (0 where there is none), and the terminal terms.

    Examples:
        >>> l, v = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
        >>> risk_terms(l, v, torch.tensor([[True, True]]), Risk(alpha=0.4))[0]
        tensor([[0.9000, 0.0000]])
    """
    follows = valid if follows is None else valid & follows
    after = successors(valid, segments)
    last = valid & ~after
    next_value = torch.cat([lse[:, 1:], torch.zeros_like(lse[:, :1])], dim=1)
    reward = label_logit - torch.where(after, risk.gamma * next_value, 0.0)
    penalised = follows & (after if risk.terminal == "skip" else valid)
    scale = (risk.alpha / 4) * discounts(valid, risk.gamma, segments).to(lse.dtype)
    # Masked before squaring: a padded position may hold anything, and 0 · inf is NaN.
    each = scale * torch.where(penalised, reward, 0.0).square()
    if risk.terminal == "skip":
        return each, torch.zeros_like(each)
    ends = (1 - risk.gamma) * scale * torch.where(last, lse, 0.0).square()
    return each, ends


def risk_penalty(
    logits: Float[Tensor, "B T V"],
    labels: Int[Tensor, "B T"],
    mask: Bool[Tensor, "B T"] | None = None,
    *,
    alpha: float = 0.1,
    gamma: float = 1.0,
    terminal: Terminal = "skip",
    segments: Int[Tensor, "B T"] | None = None,
    n_valid: Tensor | float | None = None,
    ignore_index: int = -100,
) -> Float[Tensor, ""]:
    """The risk penalty, mean over valid tokens: (1/n) Σ (α/4) γ^i (f(y_t|s_t) - γ V(s_{t+1}))².

    Half-precision logits are computed in float32.

    Args:
        logits: Aligned with the labels: those at t predict ``labels[t]``.
        labels: The tokens that follow; `ignore_index` marks those that do not count.
        mask: Which tokens count, beside the labels.
        alpha: See `Risk`, as γ and `terminal`.
        gamma: γ.
        terminal: ``skip`` or ``official``.
        segments: Ids of packed sequences.
        n_valid: The denominator (default: the valid tokens here).
        ignore_index: The label of tokens that do not count.

    Returns:
        A scalar with gradient; 0 where no sequence has two valid tokens (``skip``). The terminal
        terms are averaged over sequences, as in the authors' code.

    Raises:
        InputError: As `Risk`; if shapes differ.

    Examples:
        >>> logits = torch.zeros(1, 2, 4)
        >>> risk_penalty(logits, torch.tensor([[1, 2]]), alpha=0.4)  # 0.1 (log 4)² / 2
        tensor(0.0961)
    """
    risk = Risk(alpha, gamma, terminal)
    if logits.shape[:-1] != labels.shape or labels.ndim != 2:
        raise InputError(
            f"logits have shape {list(logits.shape)} and labels {list(labels.shape)}; they must be "
            "[B, T, V] and [B, T]"
        )
    valid = labels != ignore_index
    if mask is not None:
        valid = valid & mask
    z = logits if logits.dtype == torch.float64 else logits.float()
    label_logit = z.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    each, ends = risk_terms(label_logit, torch.logsumexp(z, -1), valid, risk, segments=segments)
    return reduce_risk(each, ends, valid, n_valid, segments)


def reduce_risk(
    each: Tensor,
    ends: Tensor,
    valid: Tensor,
    n_valid: Tensor | float | None,
    segments: Tensor | None,
) -> Tensor:
    """Tokens over n_valid, terminal terms over the sequences that have a valid token."""
    starts = torch.zeros_like(valid)
    starts[:, 1:] = valid[:, :-1]
    if segments is not None:
        starts[:, 1:] &= segments[:, 1:] == segments[:, :-1]
    sequences = (valid & ~starts).sum().clamp(min=1)
    count = valid.sum().clamp(min=1) if n_valid is None else n_valid
    return each.sum() / count + ends.sum() / sequences

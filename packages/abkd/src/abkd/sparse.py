"""Teachers of whom only the K most probable classes of each token are known.

With m = 1 - Σ p over the listed classes and q_tail likewise, ``tail="residual"`` compares K + 1
classes, the tail being one: a lower bound of the dense D where α + β = 1 (data processing), and the
dense D itself at K = V. The tail's gradient reaches each unlisted class by its share q_j/q_tail.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from abkd._checks import check_choice, check_floating
from abkd.divergence import upcast
from abkd.fused import Head, fused_loss
from abkd.objective import SETTINGS, DistillationOutput, TeacherChunk, plain_loss
from abkd.statistics import TokenStatistics
from abkd.terms import Terms
from shared_core.errors import InputError

__all__ = ["sparse_ab_divergence", "sparse_distillation_loss"]


class TopKChunk:
    """A chunk of a top-k teacher: classes and log-probabilities ``[C, K]``."""

    def __init__(self, ids: Tensor, log_probs: Tensor, tail: str) -> None:
        self.ids, self.lp, self.tail = ids, log_probs, tail

    def part(self, rows: slice) -> "TopKChunk":
        """Some of its tokens."""
        return TopKChunk(self.ids[rows], self.lp[rows], self.tail)

    def compare(
        self, lq: Tensor, q: Tensor, terms: Terms, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """D over the listed classes (and the tail), and its derivative."""
        none = torch.zeros_like(lq)
        listed, lp = lq.gather(-1, self.ids), self.lp.to(lq.dtype)
        if self.tail == "renormalize":
            lp = torch.log_softmax(lp / temperature, -1)
            lq_listed = torch.log_softmax(listed, -1)
            value, w = terms(lq_listed, lp)
            w = w - lq_listed.exp() * w.sum(-1, keepdim=True)
            return value, none.scatter_(-1, self.ids, w), torch.zeros_like(value)
        if self.tail == "ignore" or self.ids.shape[-1] == lq.shape[-1]:
            value, w = terms(listed, lp)
            return value, none.scatter_(-1, self.ids, w), w.sum(-1)
        unlisted = lq.scatter(-1, self.ids, -torch.inf)
        lq_tail = torch.logsumexp(unlisted, -1, keepdim=True)
        mass = torch.exp(lp.double()).sum(-1, keepdim=True)
        lp_tail = torch.log1p(-mass.clamp(max=1 - 1e-12)).to(lq.dtype)
        value, w = terms(torch.cat([listed, lq_tail], -1), torch.cat([lp, lp_tail], -1))
        shares = torch.exp(unlisted - lq_tail).mul_(w[:, -1:])
        return value, shares.scatter_(-1, self.ids, w[:, :-1]), w.sum(-1)

    def statistics(self, rows: Tensor, labels: Tensor | None, lq: Tensor) -> TokenStatistics:
        """With the tail's mass spread evenly over the unlisted classes."""
        return TokenStatistics(rows, labels, lq, self.lp.to(lq.dtype), self.ids)


def sparse_distillation_loss(
    student: Float[Tensor, "*batch classes"] | tuple[Tensor, Tensor],
    topk_ids: Int[Tensor, "*batch K"],
    topk_logprobs: Float[Tensor, "*batch K"],
    *,
    tail: str = "residual",
    vocab: int | None = None,
    student_bias: Tensor | None = None,
    student_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    chunk_size: int | str | None = None,
    **settings: Any,
) -> DistillationOutput:
    """`abkd.distillation_loss` with a top-k teacher; from logits, or from hidden states and a head.

    Args:
        student: Logits ``[..., V]``, or ``(hidden [..., H], weight [V, H])``, which makes no
            logits of all tokens.
        topk_ids: The listed classes ``[..., K]``, each once.
        topk_logprobs: The teacher's log-probabilities of them, at temperature 1.
        tail: ``residual``: the unlisted mass is one more class; ``renormalize``: both over the
            listed classes; ``ignore``: the listed terms alone.
        vocab: Rows of the head to use; by default all.
        student_bias: See `abkd.fused_linear_ab_divergence`, as the next two.
        student_softcap: c.
        student_logit_scale: A factor.
        chunk_size: Tokens computed at once.
        settings: All other keywords of `abkd.distillation_loss`.

    Raises:
        InputError: As there; also for ids out of range or listed twice, log-probabilities whose
            masses exceed 1, and a temperature other than 1 unless ``renormalize``.

    Examples:
        >>> lp = torch.randn(2, 5).log_softmax(-1)
        >>> z = torch.randn(2, 5, requires_grad=True)
        >>> top = lp.topk(2)
        >>> sparse_distillation_loss(z, top.indices, top.values, alpha=0.5, beta=0.5).n_valid
        2.0
    """
    unknown = settings.keys() - SETTINGS.keys()
    if unknown:
        raise InputError(f"unknown setting {min(unknown)!r}; accepted: {', '.join(SETTINGS)}")
    chosen = {**SETTINGS, **settings}
    check_choice("tail", tail, "residual", "renormalize", "ignore")
    if chosen["temperature"] != 1 and tail != "renormalize":
        raise InputError(
            f"temperature is {chosen['temperature']}: the unlisted mass at another temperature "
            "than 1 cannot be known from top-k; pass tail='renormalize'"
        )
    source = student if isinstance(student, Tensor) else student[0]
    classes = vocab or (len(student[1]) if isinstance(student, tuple) else source.shape[-1])
    mask = chosen["mask"]
    if chosen["labels"] is not None:
        counted = chosen["labels"] != chosen["ignore_index"]
        mask = counted if mask is None else mask.bool() & counted
    check_topk(topk_ids, topk_logprobs, source.shape[:-1], classes, mask)
    ids = topk_ids.reshape(-1, topk_ids.shape[-1]).long()
    log_probs = upcast(topk_logprobs.detach().reshape(ids.shape))

    def teacher(at: Tensor) -> TeacherChunk:
        return TopKChunk(ids[at], log_probs[at], tail)

    if isinstance(student, Tensor):
        size = chunk_size if isinstance(chunk_size, int) else None
        return plain_loss(student[..., :classes], teacher, size, chosen)
    head = Head(classes, student_logit_scale, student_softcap)
    return fused_loss(
        student[0], student[1], student_bias, head, teacher, chunk_size or "auto", chosen
    )


def sparse_ab_divergence(
    student: Float[Tensor, "*batch classes"] | tuple[Tensor, Tensor],
    topk_ids: Int[Tensor, "*batch K"],
    topk_logprobs: Float[Tensor, "*batch K"],
    *,
    alpha: float = 0.2,
    beta: float = 0.7,
    tail: str = "residual",
    **settings: Any,
) -> Tensor:
    """Mean D^(α,β) against a top-k teacher; see `sparse_distillation_loss`.

    Examples:
        >>> lp = torch.tensor([[0.5, 0.3, 0.2]]).log()
        >>> z = torch.zeros(1, 3)
        >>> dense = sparse_ab_divergence(z, torch.tensor([[0, 1, 2]]), lp, alpha=1.0, beta=0.0)
        >>> top1 = sparse_ab_divergence(z, torch.tensor([[0]]), lp[:, :1], alpha=1.0, beta=0.0)
        >>> bool(0 < top1 < dense)
        True
    """
    options = {"alpha": alpha, "beta": beta, "tail": tail, **settings}
    return sparse_distillation_loss(student, topk_ids, topk_logprobs, **options).loss


def check_topk(
    ids: Tensor, log_probs: Tensor, shape: torch.Size, classes: int, mask: Tensor | None = None
) -> None:
    """Refuse lists that are not a part of a distribution over `classes`."""
    check_floating(topk_logprobs=log_probs)
    if ids.is_floating_point():
        raise InputError(f"topk_ids have dtype {ids.dtype}; they must be integers")
    if ids.shape != log_probs.shape or ids.shape[:-1] != shape or ids.shape[-1] < 1:
        raise InputError(
            f"topk_ids have shape {list(ids.shape)} and topk_logprobs {list(log_probs.shape)}; "
            f"both must be {[*shape, 'K']}"
        )
    if ids.numel() == 0 or ids.device.type != "cpu":
        return
    if mask is not None:
        ids, log_probs = ids[mask.bool()], log_probs[mask.bool()]
        if ids.numel() == 0:
            return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= classes:
        bad = low if low < 0 else high
        raise InputError(f"top-k id {bad} is outside [0, {classes}), the student's vocabulary")
    ordered = ids.sort(-1).values
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        raise InputError("a token lists a class twice in topk_ids; list each class once")
    mass = float(torch.exp(log_probs.double()).sum(-1).max())
    if not mass <= 1 + 1e-3:
        raise InputError(
            f"the probabilities of a token's top-k sum to {mass:.4f}; pass log-probabilities "
            "(of a softmax over all classes), not logits"
        )

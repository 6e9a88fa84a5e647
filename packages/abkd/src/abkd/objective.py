"""The objective: soft term D(p‖q) and hard term CE, weighed token by token, in one pass.

Equation 7 of the paper with the weights made explicit::

    ℓ = 1/n Σ_t [ kd_weight τ^r u_t D(p_t^τ‖q_t^τ) + ce_weight v_t (-log q_t(label_t)) ]

n is the number of valid tokens, the same for both terms; u and v are weights of each token, given
as tensors or computed from `TokenStatistics` while the logits of a chunk are at hand.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from abkd._checks import (
    IGNORE_INDEX,
    as_rows,
    check_choice,
    check_chunk_size,
    check_labels,
    check_pair,
    check_temperature,
    detached_teacher,
    uncompiled,
    wants_grad,
    warn_no_valid,
)
from abkd.divergence import chunk_rows, scaled_gradient, upcast, wide
from abkd.statistics import STATISTICS, TokenStatistics
from abkd.terms import ABTerms, Terms, divergence_terms
from shared_core.errors import InputError

__all__ = ["ABDivergenceLoss", "DistillationOutput", "WeightFunction", "distillation_loss"]

HardLabels = Literal["labels", "teacher_argmax", "both_agree"]
WeightFunction = Callable[[TokenStatistics], tuple[Tensor | None, Tensor | None]]

SETTINGS: dict[str, Any] = {
    "divergence": "ab",
    "alpha": 0.2,
    "beta": 0.7,
    "mix": None,
    "temperature": 1.0,
    "temperature_power": 0.0,
    "kd_weight": 1.0,
    "ce_weight": 0.0,
    "labels": None,
    "mask": None,
    "token_weight": None,
    "ce_token_weight": None,
    "weight_fn": None,
    "hard_labels": "labels",
    "n_valid": None,
    "statistics": (),
    "return_label_logits": False,
    "ignore_index": IGNORE_INDEX,
}


def settings_among(arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of a function's arguments that are settings of the objective."""
    return {name: arguments[name] for name in SETTINGS}


@dataclass
class DistillationOutput:
    """What a distillation loss returns.

    Attributes:
        loss: The weighted objective, a scalar with gradient.
        kd: Σ u D / n, without kd_weight and τ^r; detached.
        ce: Σ v CE / n, without ce_weight; detached (0 where no hard term was asked for).
        n_valid: n, the denominator: a number or a scalar tensor.
        per_token_kd: D of each token, unweighted, 0 where masked; detached.
        per_token_ce: CE of each token, likewise.
        soft_weight: u of each token, 0 where masked; detached.
        hard_weight: v of each token, likewise.
        statistics: What was asked for by `statistics=`, a tensor per token for each name.
        label_logit: With ``return_label_logits``: the student's logit of the hard label, per
            token, 0 where masked. Differentiable.
        student_lse: With ``return_label_logits``: logsumexp of the student's logits over the
            shared vocabulary, likewise differentiable.
    """

    loss: Tensor
    kd: Tensor
    ce: Tensor
    n_valid: Tensor | float
    per_token_kd: Tensor
    per_token_ce: Tensor
    soft_weight: Tensor
    hard_weight: Tensor
    statistics: dict[str, Tensor] = field(default_factory=dict)
    label_logit: Tensor | None = None
    student_lse: Tensor | None = None


@runtime_checkable
class TeacherChunk(Protocol):
    """The teacher's side of a chunk: dense logits or a top-k list."""

    def part(self, rows: slice) -> "TeacherChunk":
        """Some of its tokens."""

    def compare(
        self, lq: Tensor, q: Tensor, terms: Terms, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """D of each token, w ``[C, V]`` and u ``[C]``; by the logits over τ, D moves w - q u."""

    def statistics(self, rows: Tensor, labels: Tensor | None, lq: Tensor) -> TokenStatistics:
        """The chunk's statistics at temperature 1."""


class DenseChunk:
    """A teacher of whom all logits are known, ``[C, V]``."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    @cached_property
    def lp(self) -> Tensor:
        """Log-probabilities at temperature 1."""
        return torch.log_softmax(self.logits, -1)

    def part(self, rows: slice) -> "DenseChunk":
        """Some of its tokens."""
        return DenseChunk(self.logits[rows])

    def compare(
        self, lq: Tensor, q: Tensor, terms: Terms, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """D, w and Σ w."""
        lp = self.lp if temperature == 1 else torch.log_softmax(self.logits / temperature, -1)
        lp = lp.to(lq.dtype)
        if isinstance(terms, ABTerms):
            value, w = terms.with_probabilities(lq, lp, q)
        else:
            value, w = terms(lq, lp)
        return value, w, w.sum(-1)

    def statistics(self, rows: Tensor, labels: Tensor | None, lq: Tensor) -> TokenStatistics:
        """From the log-probabilities at temperature 1."""
        return TokenStatistics(rows, labels, lq, self.lp)


@dataclass
class Objective:
    """The settings of one call and the per-token results it fills in."""

    terms: Terms
    temperature: float
    kd_factor: float
    ce_weight: float
    hard_labels: str
    labels: Tensor | None
    token_weight: Tensor | None
    ce_token_weight: Tensor | None
    weight_fn: WeightFunction | None
    names: Sequence[str]
    n_valid: Tensor | float
    label_logits: bool
    count: int
    results: dict[str, Tensor] = field(default_factory=dict)

    def allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        """Make room for a number per token."""
        names = ["kd", "ce", "soft", "hard", "label_logit", "lse"]
        self.results = {n: torch.zeros(self.count, dtype=dtype, device=device) for n in names}
        for name in self.names:
            kind = torch.int64 if name.endswith("argmax") else dtype
            self.results[name] = torch.zeros(self.count, dtype=kind, device=device)
        self.results["target"] = torch.zeros(self.count, dtype=torch.int64, device=device)

    @property
    def needs_target(self) -> bool:
        """Whether a hard label plays a part."""
        return self.ce_weight != 0 or self.label_logits

    def chunk(self, logits: Tensor, teacher: TeacherChunk, rows: Tensor, with_grad: bool) -> None:
        """Fill in the results of a chunk's tokens; put the loss's gradient in place of the logits.

        Args:
            logits: The student's ``[C, V]``, float32 at least; overwritten.
            teacher: The same tokens' teacher.
            rows: The tokens' positions ``[C]``.
            with_grad: Whether the gradient is wanted.
        """
        tau = self.temperature
        lq1 = torch.log_softmax(logits, -1) if tau == 1 or self._needs_plain else None
        lq = lq1 if tau == 1 else torch.log_softmax(logits / tau, -1)
        assert lq is not None
        labels = None if self.labels is None else self.labels[rows]
        seen = teacher.statistics(rows, labels, lq if lq1 is None else lq1)
        q = torch.exp(lq)
        value, w, pull = teacher.compare(lq, q, self.terms, tau)
        soft, hard = self._weights(rows, seen, value)
        keep = self.results
        keep["kd"][rows] = value.to(keep["kd"].dtype)
        keep["soft"][rows], keep["hard"][rows] = soft, hard
        for name in self.names:
            keep[name][rows] = getattr(seen, name)
        if self.needs_target:
            assert lq1 is not None
            target = self._target(seen)
            log_prob = lq1.gather(-1, target.unsqueeze(-1)).squeeze(-1)
            label_logit = logits.gather(-1, target.unsqueeze(-1)).squeeze(-1)
            keep["ce"][rows] = -log_prob
            keep["target"][rows] = target
            keep["label_logit"][rows] = label_logit
            keep["lse"][rows] = label_logit - log_prob
        if not with_grad:
            return
        by_kd = soft * (self.kd_factor / tau) / self.n_valid
        by_q = -by_kd * pull
        if not self.ce_weight:
            torch.addcmul(w.mul_(by_kd.unsqueeze(-1)), q, by_q.unsqueeze(-1), out=logits)
            return
        # At τ = 1 both terms pull by the same q.
        factor = (hard * (self.ce_weight / self.n_valid)).to(q.dtype)
        if tau == 1:
            by_q = by_q + factor
        torch.addcmul(w.mul_(by_kd.unsqueeze(-1)), q, by_q.unsqueeze(-1), out=logits)
        if tau != 1:
            assert lq1 is not None
            logits.addcmul_(torch.exp(lq1), factor.unsqueeze(-1))
        logits.scatter_add_(-1, target.unsqueeze(-1), -factor.unsqueeze(-1))

    @property
    def _needs_plain(self) -> bool:
        return self.needs_target or bool(self.names) or self.weight_fn is not None

    def _weights(self, rows: Tensor, seen: TokenStatistics, like: Tensor) -> tuple[Tensor, Tensor]:
        soft = hard = torch.ones_like(like)
        if self.token_weight is not None:
            soft = soft * self.token_weight[rows]
        if self.ce_token_weight is not None:
            hard = hard * self.ce_token_weight[rows]
        if self.weight_fn is not None:
            for_soft, for_hard = self.weight_fn(seen)
            for name, given in (("soft", for_soft), ("hard", for_hard)):
                if given is not None and given.shape != like.shape:
                    raise InputError(
                        f"weight_fn returned {name} weights of shape {list(given.shape)}; "
                        f"this chunk has {len(like)} tokens, so it must be [{len(like)}]"
                    )
            soft = soft if for_soft is None else soft * for_soft
            hard = hard if for_hard is None else hard * for_hard
        if self.hard_labels == "both_agree":
            hard = hard * (seen.teacher_argmax == seen.labels)
        return soft.detach().to(like.dtype), hard.detach().to(like.dtype)

    def _target(self, seen: TokenStatistics) -> Tensor:
        if self.hard_labels == "teacher_argmax":
            return seen.teacher_argmax
        assert seen.labels is not None
        return seen.labels

    def totals(self) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, kd and ce."""
        r = self.results
        kd = (r["soft"] * r["kd"]).sum() / self.n_valid
        ce = (r["hard"] * r["ce"]).sum() / self.n_valid
        loss = self.kd_factor * kd
        return (loss + self.ce_weight * ce if self.ce_weight else loss), kd, ce

    def differentiable(self) -> tuple[Tensor, Tensor, Tensor]:
        """What an autograd function returns: loss, label logits and logsumexp."""
        r = self.results
        return self.totals()[0], r["label_logit"].clone(), r["lse"].clone()

    def output(
        self, shape: torch.Size, loss: Tensor, label_logit: Tensor, lse: Tensor
    ) -> DistillationOutput:
        """Put the results into the caller's shape."""
        r = self.results
        _, kd, ce = self.totals()
        return DistillationOutput(
            loss,
            kd,
            ce,
            self.n_valid,
            per_token_kd=r["kd"].reshape(shape),
            per_token_ce=r["ce"].reshape(shape),
            soft_weight=r["soft"].reshape(shape),
            hard_weight=r["hard"].reshape(shape),
            statistics={name: r[name].reshape(shape) for name in self.names},
            label_logit=label_logit.reshape(shape) if self.label_logits else None,
            student_lse=lse.reshape(shape) if self.label_logits else None,
        )


def prepare(
    shape: torch.Size,
    classes: int,
    device: torch.device,
    *,
    divergence: str | Terms,
    alpha: float,
    beta: float,
    mix: float | None,
    temperature: float,
    temperature_power: float,
    kd_weight: float,
    ce_weight: float,
    labels: Tensor | None,
    mask: Tensor | None,
    token_weight: Tensor | None,
    ce_token_weight: Tensor | None,
    weight_fn: WeightFunction | None,
    hard_labels: str,
    n_valid: Tensor | float | None,
    statistics: Sequence[str],
    return_label_logits: bool,
    ignore_index: int,
) -> tuple[Objective, Tensor]:
    """Check the arguments that all losses share; the objective and the rows that count."""
    check_temperature(temperature)
    check_choice("hard_labels", hard_labels, "labels", "teacher_argmax", "both_agree")
    for name in statistics:
        check_choice("statistics", name, *STATISTICS)
    wants_hard = bool(ce_weight) or return_label_logits
    if labels is None and wants_hard and hard_labels != "teacher_argmax":
        raise InputError(
            f"hard_labels={hard_labels!r} needs labels; pass them, or choose 'teacher_argmax'"
        )
    flat = as_rows("labels", labels, shape)
    given = as_rows("mask", mask, shape)
    valid = None if given is None else given.bool()
    if flat is not None:
        counted = flat != ignore_index
        valid = counted if valid is None else valid & counted
    # Without a mask all rows count, and an accelerator need not be waited for.
    rows = torch.arange(shape.numel(), device=device) if valid is None else valid.nonzero()[:, 0]
    if flat is not None:
        check_labels(flat[rows], classes)
    if len(rows) == 0:
        warn_no_valid()
    if n_valid is None:
        n_valid = float(max(len(rows), 1))
    elif not isinstance(n_valid, Tensor) and not n_valid > 0:
        raise InputError(f"n_valid is {n_valid}; it is the number of valid tokens, above 0")
    terms = divergence
    if isinstance(terms, str):
        terms = divergence_terms(terms, alpha=alpha, beta=beta, mix=mix)
    objective = Objective(
        terms,
        temperature,
        kd_weight * temperature**temperature_power,
        ce_weight,
        hard_labels,
        flat,
        as_rows("token_weight", token_weight, shape),
        as_rows("ce_token_weight", ce_token_weight, shape),
        weight_fn,
        tuple(statistics),
        n_valid,
        return_label_logits,
        shape.numel(),
    )
    return objective, rows


class _PlainLoss(torch.autograd.Function):
    """The objective on logits that exist; returns loss, label logits and logsumexp."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Callable[[Tensor], TeacherChunk],
        objective: Objective,
        rows: Tensor,
        chunk: int,
        with_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradient = torch.zeros_like(student) if with_grad else None
        objective.allocate(upcast(student[:0]).dtype, student.device)
        for at in torch.split(rows, chunk):
            logits = upcast(student[at])
            objective.chunk(logits, teacher(at), at, with_grad)
            if gradient is not None:
                gradient[at] = logits.to(gradient.dtype)
        ctx.rows, ctx.chunk = rows, chunk
        ctx.save_for_backward(gradient, student, objective.results["target"])
        ctx.set_materialize_grads(False)
        return objective.differentiable()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_loss: Any, by_label: Any, by_lse: Any) -> Any:
        gradient, student, target = ctx.saved_tensors
        out = torch.zeros_like(gradient) if by_loss is None else scaled_gradient(gradient, by_loss)
        if by_label is not None or by_lse is not None:
            for at in torch.split(ctx.rows, ctx.chunk):
                extra = label_gradient(upcast(student[at]), target[at], at, by_label, by_lse)
                out[at] += extra.to(out.dtype)
        return out, None, None, None, None, None


def label_gradient(
    logits: Tensor, target: Tensor, at: Tensor, by_label: Tensor | None, by_lse: Tensor | None
) -> Tensor:
    """Gradient by the logits of what depends on the label's logit and on logsumexp."""
    if by_lse is None:
        gradient = torch.zeros_like(logits)
    else:
        gradient = torch.softmax(logits, -1).mul_(by_lse[at].unsqueeze(-1))
    if by_label is not None:
        source = by_label[at].unsqueeze(-1).to(gradient.dtype)
        gradient.scatter_add_(-1, target.unsqueeze(-1), source)
    return gradient


@uncompiled
def plain_loss(
    student_logits: Tensor,
    teacher: Callable[[Tensor], TeacherChunk],
    chunk_size: int | None,
    settings: dict[str, Any],
) -> DistillationOutput:
    """The objective on the student's logits ``[..., V]`` with any kind of teacher."""
    check_chunk_size(chunk_size)
    shape, classes = student_logits.shape[:-1], student_logits.shape[-1]
    objective, rows = prepare(shape, classes, student_logits.device, **settings)
    found = _PlainLoss.apply(
        student_logits.reshape(-1, classes),
        teacher,
        objective,
        rows,
        chunk_rows(chunk_size, classes, student_logits.device, cpu=1 << 19),
        wants_grad(student_logits),
    )
    return objective.output(shape, *found)


def distillation_loss(
    student_logits: Float[Tensor, "*batch classes"],
    teacher_logits: Float[Tensor, "*batch classes"],
    labels: Int[Tensor, "*batch"] | None = None,
    *,
    divergence: str | Terms = "ab",
    alpha: float = 0.2,
    beta: float = 0.7,
    mix: float | None = None,
    temperature: float = 1.0,
    temperature_power: float = 0.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    mask: Bool[Tensor, "*batch"] | Float[Tensor, "*batch"] | None = None,
    token_weight: Float[Tensor, "*batch"] | None = None,
    ce_token_weight: Float[Tensor, "*batch"] | None = None,
    weight_fn: WeightFunction | None = None,
    hard_labels: HardLabels = "labels",
    n_valid: Tensor | float | None = None,
    statistics: Sequence[str] = (),
    return_label_logits: bool = False,
    chunk_size: int | None = None,
    detach_teacher: bool = False,
    ignore_index: int = IGNORE_INDEX,
) -> DistillationOutput:
    """The distillation objective on logits: soft and hard term, weighed token by token.

    `abkd.fused_linear_ab_divergence` is the same objective from hidden states, without logits of
    all tokens. Logits are aligned with labels (no shift).

    Args:
        student_logits: ``[..., V]``.
        teacher_logits: ``[..., V]``; gets no gradient.
        labels: ``[...]``; `ignore_index` marks tokens that do not count.
        divergence: A name of `abkd.DIVERGENCES`, or terms ``(lq, lp) -> (value, w)``.
        alpha: α.
        beta: β.
        mix: See `abkd.divergence_terms`.
        temperature: τ of the soft term; the hard term and the statistics are at 1.
        temperature_power: r in τ^r, the factor of the soft term (2 is Hinton's).
        kd_weight: Weight of the soft term.
        ce_weight: Weight of the hard term; 0 skips it.
        mask: Which tokens count, beside the labels.
        token_weight: u per token; a factor of the soft term.
        ce_token_weight: v per token; a factor of the hard term.
        weight_fn: Called for each chunk with its `abkd.TokenStatistics`, under no_grad; returns
            weights ``(soft [C], hard [C])`` that multiply u and v, or ``None`` for 1.
        hard_labels: ``labels``; ``teacher_argmax``; or ``both_agree``: labels, where they are the
            teacher's argmax, no hard term elsewhere.
        n_valid: The denominator; by default the tokens that count here. Pass the global number
            under gradient accumulation or data parallelism.
        statistics: Names of `abkd.statistics.STATISTICS` to return for every token.
        return_label_logits: Return the hard label's logit and logsumexp, differentiable.
        chunk_size: Tokens computed at once.
        detach_teacher: Accept a teacher that requires gradients.
        ignore_index: The label of tokens that do not count.

    Raises:
        InputError: As `abkd.ab_divergence`; also for missing or impossible labels, per-token
            tensors or weights of a wrong shape, unknown names.

    Examples:
        >>> student = torch.zeros(1, 2, 3, requires_grad=True)
        >>> teacher = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])
        >>> out = distillation_loss(
        ...     student, teacher, hard_labels="teacher_argmax", divergence="fkl", ce_weight=1.0,
        ...     weight_fn=lambda seen: (1 - seen.teacher_max_prob, seen.teacher_max_prob))
        >>> out.soft_weight, out.hard_weight
        (tensor([[0.2130, 0.6667]]), tensor([[0.7870, 0.3333]]))
        >>> out.loss.backward(); student.grad[0, 0]
        tensor([-0.3106,  0.1553,  0.1553])
    """
    settings = settings_among(locals())
    check_pair(student_logits, teacher_logits)
    flat = detached_teacher(teacher_logits, detach_teacher).reshape(-1, teacher_logits.shape[-1])
    return plain_loss(student_logits, lambda at: DenseChunk(wide(flat[at])), chunk_size, settings)


class ABDivergenceLoss(nn.Module):
    """`distillation_loss` as a module, for classifiers and language models alike.

    Args:
        alpha: α.
        beta: β.
        temperature: τ.
        temperature_power: r in τ^r; 2 keeps the soft term's gradient at the hard term's scale when
            τ changes, 0 is the paper's vision setting (whose λ plays that part).
        ce_weight: Weight of the hard term.
        kd_weight: Weight λ of the soft term.
        ignore_index: The label of tokens that do not count.
        divergence: Any of `abkd.DIVERGENCES` in place of ``ab``.

    Raises:
        InputError: If a setting is impossible.

    Examples:
        >>> criterion = ABDivergenceLoss(0.8, 0.3, temperature=4.0, ce_weight=1.0)
        >>> out = criterion(torch.randn(8, 10), torch.randn(8, 10), torch.arange(8))
        >>> out.loss.shape, out.n_valid
        (torch.Size([]), 8.0)
    """

    def __init__(
        self,
        alpha: float = 0.2,
        beta: float = 0.7,
        temperature: float = 1.0,
        temperature_power: float = 2.0,
        ce_weight: float = 0.0,
        kd_weight: float = 1.0,
        ignore_index: int = IGNORE_INDEX,
        divergence: str = "ab",
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        self.terms = divergence_terms(divergence, alpha=alpha, beta=beta)
        self.temperature = temperature
        self.temperature_power = temperature_power
        self.ce_weight = ce_weight
        self.kd_weight = kd_weight
        self.ignore_index = ignore_index

    def forward(
        self,
        student_logits: Float[Tensor, "*batch classes"],
        teacher_logits: Float[Tensor, "*batch classes"],
        labels: Int[Tensor, "*batch"] | None = None,
        mask: Bool[Tensor, "*batch"] | None = None,
    ) -> DistillationOutput:
        """The objective; see `distillation_loss`."""
        return distillation_loss(
            student_logits,
            teacher_logits,
            labels,
            divergence=self.terms,
            temperature=self.temperature,
            temperature_power=self.temperature_power,
            kd_weight=self.kd_weight,
            ce_weight=self.ce_weight,
            mask=mask,
            ignore_index=self.ignore_index,
        )

"""The α-β-divergence between a teacher p and a student q, stable in every corner, and its kin.

Wang et al., "ABKD: Pursuing a Proper Allocation of the Probability Mass in Knowledge Distillation
via α-β-Divergence", ICML 2025 (arXiv 2505.04560), Definition 4.1; the divergence itself is that of
Cichocki, Cruces and Amari, "Generalized Alpha-Beta Divergences", Entropy 2011. With log p = lp,
log q = lq, d = lp - lq and s = α + β::

    D(p‖q) = -1/(αβ) Σ_k [ p^α q^β - α/s p^s - β/s q^s ]

and its limits on the axes (with the factors 1/α² and 1/β²). All of them are one formula,

    D(p‖q) = Σ_k q^s (φ_s(d) - φ_α(d)) / β,    φ_c(d) = expm1(c d)/c,  φ_0(d) = d,

whose summands are never negative, and whose derivative by lq_k is w_k = -q_k^s φ_α(d_k). By the
logits z of q = softmax(z/τ) the gradient is (w_j - q_j Σ_k w_k)/τ.

Every divergence here is given by its *terms*: a function of (lq, lp) that returns the value, summed
over classes, and w, its derivative by lq with the classes taken as independent. The gradient is
computed in the forward pass, chunk by chunk, so that autograd keeps one tensor instead of a chain.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from abkd._checks import (
    as_rows,
    check_choice,
    check_chunk_size,
    check_exponents,
    check_pair,
    check_temperature,
    detached_teacher,
    uncompiled,
    wants_grad,
    warn_no_valid,
)
from shared_core.errors import InputError

__all__ = [
    "DIVERGENCES",
    "Terms",
    "ab_divergence",
    "ab_divergence_from_log_probs",
    "divergence",
    "divergence_terms",
]

Terms = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Reduction = Literal["mean", "sum", "none"]

DIVERGENCES = (
    "ab",
    "fkl",
    "rkl",
    "jsd",
    "tv",
    "skew_fkl",
    "skew_rkl",
    "hellinger",
    "alpha",
    "beta",
    "wsd",
    "akl",
)
_MIX = {"jsd": 0.5, "skew_fkl": 0.1, "skew_rkl": 0.1, "wsd": 0.5, "akl": 0.5}

_ZERO = 1e-6  # exponents below this are on the axis
_SMALL = 1e-2  # below this, float32 cannot hold the divided differences
_NEAR = 0.3  # where the series of eight terms is exact to the last bit of float32
_FACTORIALS = [1.0 / math.factorial(n + 1) for n in range(1, 9)]


# --- the α-β-divergence -------------------------------------------------------------------------


def ab_terms(
    lq: Float[Tensor, "*batch classes"],
    lp: Float[Tensor, "*batch classes"],
    alpha: float,
    beta: float,
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch classes"]]:
    """Value and w of D^(α,β)(p‖q) for log-probabilities (or any log-masses) lq and lp.

    Args:
        lq: The student's log-probabilities, ``[..., V]``, float32 or float64; -inf is mass zero.
        lp: The teacher's, same shape.
        alpha: α, any real number.
        beta: β, any real number.

    Returns:
        D summed over classes ``[...]`` and w = ∂D/∂lq ``[..., V]``. Infinite where the divergence
        is: q = 0 < p with β ≤ 0, or p = 0 < q with α ≤ 0.

    Example:
        >>> lq, lp = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
        >>> value, w = ab_terms(lq, lp, 1.0, 0.0)  # forward KL: Σ p (lp - lq), w = q - p
        >>> value, w
        (tensor(0.3681), tensor([-0.4000,  0.4000]))
    """
    exponents = (alpha, beta, alpha + beta)
    if lq.dtype == torch.float32 and any(_ZERO <= abs(c) < _SMALL for c in exponents):
        value, w = _ab_exact(lq.double(), lp.double(), alpha, beta)
        return value.float(), w.float()
    # The direct form costs a third of the exact one and is as good unless p and q nearly agree;
    # asking which rows those are would make an accelerator wait, so there all rows are exact.
    if lq.dtype != torch.float32 or lq.device.type != "cpu" or abs(alpha + beta) < _ZERO:
        return _ab_exact(lq, lp, alpha, beta)
    if min(abs(alpha), abs(beta)) < _ZERO:
        values, w = _ab_far(lq, lp, _difference(lq, lp), alpha, beta)
        value, condition = values.sum(-1), 2 * torch.exp(lq * (alpha + beta)).sum(-1)
        condition /= (alpha + beta) ** 2
    else:
        x = torch.exp(lq * (alpha + beta))
        total = x.sum(-1)
        w = torch.exp((lp * alpha).add_(lq, alpha=beta)).neg_().add_(x).div_(alpha)
        y = torch.mul(lp, alpha + beta, out=x).exp_()
        value = ((y.sum(-1) - total) / (alpha + beta) + w.sum(-1)) / beta
        condition = total * ((1 / abs(alpha + beta) + 1 / abs(alpha)) / abs(beta))
    # What cancels in the value (`condition`), against the value.
    close = value < condition * (1e4 * torch.finfo(torch.float32).eps)
    if close.any():
        value[close], w[close] = _ab_exact(lq[close], lp[close], alpha, beta)
    return value, w


def _ab_exact(lq: Tensor, lp: Tensor, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
    """The series where p and q nearly agree, the direct form elsewhere."""
    s = alpha + beta
    d = _difference(lq, lp)
    if abs(s) < _ZERO and abs(alpha) < _ZERO:
        return (0.5 * d * d).sum(-1), -d
    values, w = _ab_far(lq, lp, d, alpha, beta)
    x = torch.exp(s * lq) if s else torch.ones_like(lq)
    near = d.abs() < _NEAR / max(abs(s), abs(alpha))
    values = torch.where(near, x * _series(d, s, alpha), values)
    phi = torch.expm1(alpha * d) / alpha if abs(alpha) >= _ZERO else d
    w = torch.where(near, -x * phi, w)
    return values.sum(-1), w


def _ab_far(lq: Tensor, lp: Tensor, d: Tensor, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
    """Summands and w in products of exponentials, which cannot overflow for α, β ≥ 0."""
    s = alpha + beta
    if abs(alpha) < _ZERO:
        x = torch.exp(beta * lq)
        w = -_times(x, d)
        return ((torch.exp(beta * lp) - x) / beta + w) / beta, w
    if abs(beta) < _ZERO:
        x, y = torch.exp(alpha * lq), torch.exp(alpha * lp)
        w = (x - y) / alpha
        return (_times(y, d) + w) / alpha, w
    if abs(s) < _ZERO:
        rise = torch.expm1(alpha * d)
        return (rise - alpha * d) / alpha**2, -rise / alpha
    x = torch.exp(s * lq)
    w = (x - torch.exp(alpha * lp + beta * lq)) / alpha
    return ((torch.exp(s * lp) - x) / s + w) / beta, w


def _series(d: Tensor, s: float | Tensor, alpha: float | Tensor) -> Tensor:
    """(φ_s(d) - φ_α(d))/β for small d: Σ_n h_{n-1} d^{n+1}/(n+1)!, h_m = Σ_i s^i α^{m-i}."""
    h: list[Any] = [1.0]
    power = s
    for _ in range(7):
        h.append(h[-1] * alpha + power)
        power = power * s
    total = torch.zeros_like(d)
    for coefficient, inverse in zip(reversed(h), reversed(_FACTORIALS), strict=True):
        total = total.mul_(d).add_(coefficient * inverse)
    return total.mul_(d).mul_(d)


def _difference(lq: Tensor, lp: Tensor) -> Tensor:
    """Lp - lq, and 0 where both are -inf: a class that neither has contributes nothing."""
    inf = math.inf
    return (lp - lq).nan_to_num_(nan=0.0, posinf=inf, neginf=-inf)


def _times(mass: Tensor, log: Tensor) -> Tensor:
    """Mass times log, and 0 where the mass is 0 whatever the log."""
    return (mass * log).masked_fill_(mass == 0, 0.0)


def _ab_terms_each(lq: Tensor, lp: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """`ab_terms` with exponents of each row ``[..., 1]``, in float64."""
    dtype = lq.dtype
    lq, lp, alpha, beta = (t.double() for t in (lq, lp, alpha, beta))
    s, d = alpha + beta, _difference(lq, lp)

    def safe(value: Tensor) -> Tensor:
        return torch.where(value.abs() < _ZERO, 1.0, value)

    def power(exponent: Tensor, log: Tensor) -> Tensor:
        return torch.where(exponent == 0, 1.0, torch.exp(exponent * log))

    x, y = power(s, lq), power(s, lp)
    crossed = (
        x
        * torch.exp((alpha * d).clamp(max=0))
        * torch.where(alpha * d > 0, torch.exp((alpha * d).clamp(min=0, max=700)), 1.0)
    )
    direct = torch.exp(alpha * lp + beta * lq)
    crossed = torch.where(direct.isfinite(), direct, crossed)
    w = torch.where(alpha.abs() < _ZERO, -_times(x, d), (x - crossed) / safe(alpha))
    values = ((y - x) / safe(s) + w) / safe(beta)
    on_beta = (_times(y, d) + w) / safe(alpha)
    on_s = (torch.expm1(alpha * d) - alpha * d) / safe(alpha) ** 2
    values = torch.where(s.abs() < _ZERO, on_s, values)
    values = torch.where(beta.abs() < _ZERO, on_beta, values)
    near = torch.maximum(s.abs(), alpha.abs()) * d.abs() < _NEAR
    values = torch.where(near, x * _series(d, s, alpha), values)
    phi = torch.where(alpha.abs() < _ZERO, d, torch.expm1(alpha * d) / safe(alpha))
    w = torch.where(near, -x * phi, w)
    return values.sum(-1).to(dtype), w.to(dtype)


# --- its kin ------------------------------------------------------------------------------------


def _jsd_terms(lq: Tensor, lp: Tensor, mix: float) -> tuple[Tensor, Tensor]:
    lm = torch.logaddexp(lp + math.log(mix), lq + math.log1p(-mix))
    from_q = _times(torch.exp(lq), lq - lm)
    from_p = _times(torch.exp(lp), lp - lm)
    return (mix * from_p + (1 - mix) * from_q).sum(-1), (1 - mix) * from_q


def _tv_terms(lq: Tensor, lp: Tensor) -> tuple[Tensor, Tensor]:
    q = torch.exp(lq)
    excess = q - torch.exp(lp)
    return 0.5 * excess.abs().sum(-1), 0.5 * q * excess.sign()


def _skew_fkl_terms(lq: Tensor, lp: Tensor, mix: float) -> tuple[Tensor, Tensor]:
    lm = torch.logaddexp(lp + math.log(mix), lq + math.log1p(-mix))
    p = torch.exp(lp)
    return _times(p, lp - lm).sum(-1), -(1 - mix) * p * torch.exp(_difference(lm, lq))


def _skew_rkl_terms(lq: Tensor, lp: Tensor, mix: float) -> tuple[Tensor, Tensor]:
    lm = torch.logaddexp(lp + math.log1p(-mix), lq + math.log(mix))
    q = torch.exp(lq)
    values = _times(q, lq - lm)
    return values.sum(-1), values + q * (1 - mix * torch.exp(_difference(lm, lq)))


def _wsd_terms(lq: Tensor, lp: Tensor, mix: float) -> tuple[Tensor, Tensor]:
    return _blend(lq, lp, torch.full(lq.shape[:-1], mix, dtype=lq.dtype, device=lq.device))


def _akl_terms(lq: Tensor, lp: Tensor, mix: float) -> tuple[Tensor, Tensor]:
    p, order = torch.sort(torch.exp(lp), dim=-1, descending=True, stable=True)
    head = p.cumsum(-1) < mix
    gap = (p - torch.exp(lq).gather(-1, order)).abs()
    total = gap.sum(-1)
    in_head = (gap * head).sum(-1)
    return _blend(lq, lp, torch.where(total > 0, in_head / total, 0.5))


def _blend(lq: Tensor, lp: Tensor, forward: Tensor) -> tuple[Tensor, Tensor]:
    """A mixture of forward and reverse KL with weights of each row."""
    fkl, w_fkl = ab_terms(lq, lp, 1.0, 0.0)
    rkl, w_rkl = ab_terms(lq, lp, 0.0, 1.0)
    reverse = 1 - forward
    w = w_fkl * forward.unsqueeze(-1) + w_rkl * reverse.unsqueeze(-1)
    return forward * fkl + reverse * rkl, w


def _hellinger_terms(lq: Tensor, lp: Tensor) -> tuple[Tensor, Tensor]:
    value, w = ab_terms(lq, lp, 0.5, 0.5)
    return value / 4, w / 4


def divergence_terms(
    name: str = "ab", *, alpha: float = 0.2, beta: float = 0.7, mix: float | None = None
) -> Terms:
    """The terms of a divergence by name: what `divergence` and the fused losses are built on.

    Args:
        name: One of `DIVERGENCES`:
            ``ab`` D^(α,β); ``fkl`` KL(p‖q) = ab(1, 0); ``rkl`` KL(q‖p) = ab(0, 1);
            ``alpha`` ab(α, 1-α); ``beta`` ab(1, β); ``hellinger`` ½Σ(√p-√q)²; ``tv`` ½Σ|p-q|;
            ``jsd`` mix·KL(p‖m) + (1-mix)·KL(q‖m) with m = mix·p + (1-mix)·q;
            ``skew_fkl`` KL(p‖mix·p + (1-mix)·q); ``skew_rkl`` KL(q‖mix·q + (1-mix)·p) (DistiLLM,
            Ko et al., ICML 2024); ``wsd`` mix·KL(p‖q) + (1-mix)·KL(q‖p); ``akl`` the same with
            the weight of each token taken from where teacher and student differ, in the head of
            teacher mass `mix` or in the tail (Wu et al., COLING 2025).
        alpha: α of ``ab`` and ``alpha``.
        beta: β of ``ab`` and ``beta``.
        mix: The number of the others; by default 0.1 for the skewed ones, 0.5 for the rest.

    Returns:
        A function ``(lq, lp) -> (value [...], w [..., V])``.

    Raises:
        InputError: If the name is unknown, an exponent is not finite, or `mix` not in (0, 1).

    Example:
        >>> lq, lp = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
        >>> divergence_terms("tv")(lq, lp)[0]
        tensor(0.4000)
    """
    check_choice("divergence", name, *DIVERGENCES)
    if name in _MIX:
        mix = _MIX[name] if mix is None else mix
        if not 0 < mix < 1:
            raise InputError(f"mix is {mix}; {name} needs it between 0 and 1, both excluded")
        function = {
            "jsd": _jsd_terms,
            "skew_fkl": _skew_fkl_terms,
            "skew_rkl": _skew_rkl_terms,
            "wsd": _wsd_terms,
            "akl": _akl_terms,
        }[name]
        return functools.partial(function, mix=mix)
    if name in ("tv", "hellinger"):
        return _tv_terms if name == "tv" else _hellinger_terms
    pairs = {
        "ab": (alpha, beta),
        "alpha": (alpha, 1 - alpha),
        "beta": (1.0, beta),
        "fkl": (1.0, 0.0),
        "rkl": (0.0, 1.0),
    }
    check_exponents(*pairs[name])
    return functools.partial(ab_terms, alpha=pairs[name][0], beta=pairs[name][1])


# --- with gradients -----------------------------------------------------------------------------


def upcast(logits: Tensor) -> Tensor:
    """A fresh tensor in float32, or float64 where the input has it."""
    return logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32, copy=True)


def chunk_rows(chunk_size: int | str | None, classes: int, device: torch.device, cpu: int) -> int:
    """Rows of a chunk: as asked, or so that it fits the cache (CPU) or a quarter GB (others)."""
    if isinstance(chunk_size, int):
        return chunk_size
    return max(1, (cpu if device.type == "cpu" else 1 << 26) // classes)


class _Divergence(torch.autograd.Function):
    """Value of each row; the gradient by the student is made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        terms: Callable[..., tuple[Tensor, Tensor]],
        rows: Tensor | None,
        temperature: float,
        chunk: int,
        with_grad: bool,
        normalize: bool,
    ) -> Tensor:
        count = len(student)
        value = torch.zeros(count, dtype=upcast(student[:0]).dtype, device=student.device)
        gradient = None
        if with_grad:
            gradient = torch.zeros_like(student) if rows is not None else torch.empty_like(student)
        total = count if rows is None else len(rows)
        for start in range(0, total, chunk):
            at: Any = slice(start, min(start + chunk, total))
            if rows is not None:
                at = rows[at]
            lq, lp = upcast(student[at]), upcast(teacher[at])
            if lq.dtype != lp.dtype:
                lq, lp = lq.double(), lp.double()
            if normalize:
                lq = torch.log_softmax(lq.div_(temperature), -1)
                lp = torch.log_softmax(lp.div_(temperature), -1)
            found, w = terms(lq, lp, at) if _takes_rows(terms) else terms(lq, lp)
            value[at] = found.to(value.dtype)
            if gradient is not None:
                if normalize:
                    w = w.addcmul_(lq.exp_(), w.sum(-1, keepdim=True), value=-1).div_(temperature)
                gradient[at] = w.to(gradient.dtype)
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_value: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        scaled = gradient * grad_value.unsqueeze(-1).to(gradient.dtype)
        return scaled, None, None, None, None, None, None, None


class _EachRow:
    """Terms with exponents of each row."""

    def __init__(self, alpha: Tensor, beta: Tensor) -> None:
        self.alpha, self.beta = alpha.reshape(-1, 1), beta.reshape(-1, 1)

    def __call__(self, lq: Tensor, lp: Tensor, at: Any) -> tuple[Tensor, Tensor]:
        return _ab_terms_each(lq, lp, self.alpha[at], self.beta[at])


def _takes_rows(terms: object) -> bool:
    return isinstance(terms, _EachRow)


@uncompiled
def _reduced(
    student: Tensor,
    teacher: Tensor,
    terms: Callable[..., tuple[Tensor, Tensor]],
    *,
    temperature: float,
    mask: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    chunk_size: int | None,
    detach_teacher: bool,
    normalize: bool = True,
) -> Tensor:
    check_pair(student, teacher)
    check_temperature(temperature)
    check_chunk_size(chunk_size)
    check_choice("reduction", reduction, "mean", "sum", "none")
    teacher = detached_teacher(teacher, detach_teacher)
    shape, classes = student.shape[:-1], student.shape[-1]
    valid, weights = as_rows("mask", mask, shape), as_rows("weight", weight, shape)
    rows = None if valid is None else valid.bool().nonzero().squeeze(-1)
    count = student.numel() // classes if rows is None else len(rows)
    if count == 0:
        warn_no_valid()
    value: Tensor = _Divergence.apply(
        student.reshape(-1, classes),
        teacher.reshape(-1, classes),
        terms,
        rows,
        temperature,
        chunk_rows(chunk_size, classes, student.device, cpu=1 << 19),
        wants_grad(student),
        normalize,
    )
    if weights is not None:
        value = value * weights
    if reduction == "none":
        return value.reshape(shape)
    total: Tensor = value.sum()
    return total if reduction == "sum" else total / max(count, 1)


def ab_divergence(
    student_logits: Float[Tensor, "*batch classes"],
    teacher_logits: Float[Tensor, "*batch classes"],
    alpha: float | Tensor = 0.2,
    beta: float | Tensor = 0.7,
    *,
    temperature: float = 1.0,
    mask: Bool[Tensor, "*batch"] | Float[Tensor, "*batch"] | None = None,
    reduction: Reduction = "mean",
    weight: Float[Tensor, "*batch"] | None = None,
    chunk_size: int | None = None,
    detach_teacher: bool = False,
) -> Tensor:
    """D^(α,β)(softmax(teacher/τ) ‖ softmax(student/τ)), Definition 4.1 of the paper.

    Computed in float32 at least, with the closed-form gradient; finite for all finite logits where
    α, β ≥ 0. There is no factor τ²: see `ABDivergenceLoss`.

    Args:
        student_logits: z, ``[..., V]``, any float type. Logits of -inf are mass zero.
        teacher_logits: Same shape; gets no gradient.
        alpha: α, a number or a value per token ``[...]`` (not differentiated).
        beta: β, likewise. (1, 0) is forward KL, (0, 1) reverse KL.
        temperature: τ.
        mask: Which tokens count ``[...]``; the others cost nothing. Default: all.
        reduction: ``mean`` over the tokens that count, ``sum``, or ``none`` for ``[...]``.
        weight: A factor per token ``[...]``; does not change the denominator of the mean.
        chunk_size: Tokens computed at once; by default what the caches hold.
        detach_teacher: Accept teacher logits that require gradients, and ignore that.

    Returns:
        A scalar, or ``[...]``. Without a token that counts: 0, with a warning. Infinite where the
        divergence is (q = 0 < p with β ≤ 0, p = 0 < q with α ≤ 0).

    Raises:
        InputError: If shapes, classes, devices or dtypes do not fit, an exponent is not finite,
            the temperature is not positive, or the teacher requires gradients.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[2.0, 1.0, 0.0]])
        >>> ab_divergence(student, teacher, 0.2, 0.7)
        tensor(1.2293)
        >>> kl = torch.nn.functional.kl_div(
        ...     student.log_softmax(-1), teacher.log_softmax(-1), log_target=True,
        ...     reduction="batchmean")
        >>> bool(torch.isclose(ab_divergence(student, teacher, 1.0, 0.0), kl))
        True
    """
    return _reduced(
        student_logits,
        teacher_logits,
        _ab(alpha, beta, student_logits),
        temperature=temperature,
        mask=mask,
        weight=weight,
        reduction=reduction,
        chunk_size=chunk_size,
        detach_teacher=detach_teacher,
    )


def _ab(
    alpha: float | Tensor, beta: float | Tensor, like: Tensor
) -> Callable[..., tuple[Tensor, Tensor]]:
    if not isinstance(alpha, Tensor) and not isinstance(beta, Tensor):
        return divergence_terms("ab", alpha=alpha, beta=beta)
    check_exponents(alpha, beta)
    shape = like.shape[:-1]
    try:
        each = [torch.as_tensor(v, device=like.device).expand(shape) for v in (alpha, beta)]
    except RuntimeError as error:
        raise InputError(
            f"alpha and beta must be numbers or tensors that fit the tokens {list(shape)}"
        ) from error
    return _EachRow(*each)


def ab_divergence_from_log_probs(
    student_log_probs: Float[Tensor, "*batch classes"],
    teacher_log_probs: Float[Tensor, "*batch classes"],
    alpha: float | Tensor = 0.2,
    beta: float | Tensor = 0.7,
    *,
    mask: Bool[Tensor, "*batch"] | Float[Tensor, "*batch"] | None = None,
    reduction: Reduction = "mean",
    weight: Float[Tensor, "*batch"] | None = None,
    chunk_size: int | None = None,
    detach_teacher: bool = False,
) -> Tensor:
    """`ab_divergence` for those who hold log-probabilities, or any logs of non-negative masses.

    Args:
        student_log_probs: lq, ``[..., V]``; the gradient is w = ∂D/∂lq.
        teacher_log_probs: lp, same shape.
        alpha: See `ab_divergence`, as all below.
        beta: β.
        mask: Which tokens count.
        reduction: ``mean``, ``sum`` or ``none``.
        weight: A factor per token.
        chunk_size: Tokens computed at once.
        detach_teacher: Accept a teacher that requires gradients.

    Raises:
        InputError: As `ab_divergence`.

    Example:
        >>> lq, lp = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log()
        >>> ab_divergence_from_log_probs(lq, lp, 0.5, 0.5)  # 2 Σ (√p - √q)²
        tensor(0.1363)
    """
    return _reduced(
        student_log_probs,
        teacher_log_probs,
        _ab(alpha, beta, student_log_probs),
        temperature=1.0,
        mask=mask,
        weight=weight,
        reduction=reduction,
        chunk_size=chunk_size,
        detach_teacher=detach_teacher,
        normalize=False,
    )


def divergence(
    name: str,
    student_logits: Float[Tensor, "*batch classes"],
    teacher_logits: Float[Tensor, "*batch classes"],
    *,
    alpha: float = 0.2,
    beta: float = 0.7,
    mix: float | None = None,
    temperature: float = 1.0,
    mask: Bool[Tensor, "*batch"] | Float[Tensor, "*batch"] | None = None,
    reduction: Reduction = "mean",
    weight: Float[Tensor, "*batch"] | None = None,
    chunk_size: int | None = None,
    detach_teacher: bool = False,
) -> Tensor:
    """Any of `DIVERGENCES` between teacher and student, with its closed-form gradient.

    Args:
        name: See `divergence_terms`, as `alpha`, `beta` and `mix`.
        student_logits: See `ab_divergence`, as all below.
        teacher_logits: Same shape.
        alpha: α.
        beta: β.
        mix: The number of the mixtures.
        temperature: τ.
        mask: Which tokens count.
        reduction: ``mean``, ``sum`` or ``none``.
        weight: A factor per token.
        chunk_size: Tokens computed at once.
        detach_teacher: Accept a teacher that requires gradients.

    Raises:
        InputError: As `ab_divergence` and `divergence_terms`.

    Example:
        >>> z = torch.tensor([[0.0, 1.0]])
        >>> [round(divergence(n, z, -z).item(), 3) for n in ("fkl", "jsd", "tv", "hellinger")]
        [0.462, 0.111, 0.462, 0.113]
    """
    return _reduced(
        student_logits,
        teacher_logits,
        divergence_terms(name, alpha=alpha, beta=beta, mix=mix),
        temperature=temperature,
        mask=mask,
        weight=weight,
        reduction=reduction,
        chunk_size=chunk_size,
        detach_teacher=detach_teacher,
    )

"""Divergences between teacher and student logits, with gradients made in the forward pass.

`abkd.terms` gives value and derivative by the student's log-probabilities; here they meet softmax,
temperature, masks and reductions. The gradient by the logits, (w_j - q_j Σ_k w_k)/τ, is computed
chunk by chunk beside the value, so that autograd keeps one tensor instead of a chain.
"""

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
from abkd.terms import ab_terms_each, divergence_terms
from shared_core.errors import InputError

__all__ = ["ab_divergence", "ab_divergence_from_log_probs", "divergence"]

Reduction = Literal["mean", "sum", "none"]


def upcast(logits: Tensor) -> Tensor:
    """A fresh tensor in float32, or float64 where the input has it."""
    return logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32, copy=True)


def wide(logits: Tensor) -> Tensor:
    """In float32, or float64 where the input has it; the input itself if it is wide enough."""
    return logits if logits.dtype == torch.float64 else logits.float()


def scaled_gradient(gradient: Tensor, factor: Tensor) -> Tensor:
    """A gradient made in the forward pass times the upstream one, in place where that can be.

    What the graph keeps for another backward pass (``retain_graph=True``) is left as it is.
    """
    factor = factor.to(gradient.dtype)
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    if keeps is None or keeps():
        return gradient * factor
    return gradient.detach().mul_(factor)


def chunk_rows(
    chunk_size: int | str | None, classes: int, device: torch.device, cpu: int, least: int = 1
) -> int:
    """Rows of a chunk: as asked, or so that it holds `cpu` numbers (CPU) or a quarter GB (others).

    But at least `least`.
    """
    if isinstance(chunk_size, int):
        return chunk_size
    return max(least, (cpu if device.type == "cpu" else 1 << 26) // classes)


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
            lq, lp = wide(student[at]), wide(teacher[at])
            if lq.dtype != lp.dtype:
                lq, lp = lq.double(), lp.double()
            if normalize:
                lq = torch.log_softmax(lq if temperature == 1 else lq / temperature, -1)
                lp = torch.log_softmax(lp if temperature == 1 else lp / temperature, -1)
            found, w = terms(lq, lp, at) if _takes_rows(terms) else terms(lq, lp)
            value[at] = found.to(value.dtype)
            if gradient is None:
                continue
            if normalize:
                w = w.addcmul_(lq.exp_(), w.sum(-1, keepdim=True), value=-1)
                if temperature != 1:
                    w.div_(temperature)
            gradient[at] = w.to(gradient.dtype)
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_value: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        scaled = scaled_gradient(gradient, grad_value.unsqueeze(-1))
        return scaled, None, None, None, None, None, None, None


class _EachRow:
    """Terms with exponents of each row."""

    def __init__(self, alpha: Tensor, beta: Tensor) -> None:
        self.alpha, self.beta = alpha.reshape(-1, 1), beta.reshape(-1, 1)

    def __call__(self, lq: Tensor, lp: Tensor, at: Any) -> tuple[Tensor, Tensor]:
        return ab_terms_each(lq, lp, self.alpha[at], self.beta[at])


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

    Examples:
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

    Examples:
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

    Examples:
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

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

Every divergence is given by its *terms*: a function of (lq, lp) that returns the value, summed
over classes, and w, its derivative by lq with the classes taken as independent.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from abkd._checks import check_choice, check_exponents
from shared_core.errors import InputError

__all__ = ["DIVERGENCES", "Terms", "ab_terms", "ab_terms_each", "divergence_terms"]

Terms = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ABTerms:
    """`ab_terms` with its exponents: what `divergence_terms` returns for all of the α-β kind."""

    alpha: float
    beta: float

    def __call__(self, lq: Tensor, lp: Tensor) -> tuple[Tensor, Tensor]:
        """Value ``[...]`` and w ``[..., V]``."""
        return ab_terms(lq, lp, self.alpha, self.beta)

    def with_probabilities(self, lq: Tensor, lp: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """The same where q = exp(lq) is at hand and w goes through softmax.

        Of forward KL's w = q - p the gradient by logits, w - q Σ w, keeps the p alone (Σ q = 1),
        so its w is -p here and one exponential less.
        """
        if (self.alpha, self.beta) != (1, 0) or lq.dtype != torch.float32:
            return self(lq, lp)
        p = torch.exp(lp)
        total = q.sum(-1)
        value = (lp - lq).mul_(p).sum(-1) + total - p.sum(-1)
        close = ~(value >= 2 * total * _CANCELS)
        if lq.device.type != "cpu" or close.any():
            return self(lq, lp)
        return value, p.neg_()


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
_CANCELS = 1e4 * torch.finfo(torch.float32).eps  # of what cancels: a value below is not trusted
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

    Examples:
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
    value, w, cancels = _ab_direct(lq, lp, alpha, beta)
    # Rows whose value is lost in what cancels there, or is 0 times infinity.
    close = ~(value >= cancels * _CANCELS)
    if close.any():
        value[close], w[close] = _ab_exact(lq[close], lp[close], alpha, beta)
    return value, w


def _ab_direct(lq: Tensor, lp: Tensor, alpha: float, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """The direct form for s ≠ 0 in few passes: value, w, and the size of what cancels."""
    s = alpha + beta
    x = torch.mul(lq, s).exp_()
    total = x.sum(-1)
    if abs(beta) < _ZERO:
        y = torch.mul(lp, alpha).exp_()
        w = x.sub_(y).div_(alpha)
        return (y.mul_(lp - lq).sum(-1) + w.sum(-1)) / alpha, w, 2 * total / alpha**2
    if abs(alpha) < _ZERO:
        w = (lq - lp).mul_(x)
        y = torch.mul(lp, beta, out=x).exp_()
        return ((y.sum(-1) - total) / beta + w.sum(-1)) / beta, w, 2 * total / beta**2
    w = torch.mul(lp, alpha).add_(lq, alpha=beta).exp_().sub_(x).div_(-alpha)
    y = torch.mul(lp, s, out=x).exp_()
    value = ((y.sum(-1) - total) / s + w.sum(-1)) / beta
    return value, w, total * ((1 / abs(s) + 1 / abs(alpha)) / abs(beta))


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
    """Lp - lq, and 0 where both are -inf: a class that neither has contributes nothing.

    NaN stays NaN: a teacher that has overflowed must not look like one that agrees.
    """
    return (lp - lq).masked_fill_(lp == lq, 0.0)


def _times(mass: Tensor, log: Tensor) -> Tensor:
    """Mass times log, and 0 where the mass is 0 whatever the log."""
    return (mass * log).masked_fill_(mass == 0, 0.0)


def ab_terms_each(lq: Tensor, lp: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
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


def _mixture(lq: Tensor, lp: Tensor, on_p: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The masses q and p, m = on_p p + (1 - on_p) q, and log m."""
    q, p = torch.exp(lq), torch.exp(lp)
    m = torch.add(p * on_p, q, alpha=1 - on_p)
    return q, p, m, torch.log(m)


def _jsd_terms(lq: Tensor, lp: Tensor, mix: float) -> tuple[Tensor, Tensor]:
    q, p, _, lm = _mixture(lq, lp, mix)
    from_q, from_p = _times(q, lq - lm), _times(p, lm.neg_().add_(lp))
    return mix * from_p.sum(-1) + (1 - mix) * from_q.sum(-1), from_q.mul_(1 - mix)


def _tv_terms(lq: Tensor, lp: Tensor) -> tuple[Tensor, Tensor]:
    q = torch.exp(lq)
    excess = q - torch.exp(lp)
    return 0.5 * excess.abs().sum(-1), 0.5 * q * excess.sign()


def _skew_fkl_terms(lq: Tensor, lp: Tensor, mix: float) -> tuple[Tensor, Tensor]:
    q, p, m, lm = _mixture(lq, lp, mix)
    return _times(p, lp - lm).sum(-1), -(1 - mix) * p * _share(q, m)


def _skew_rkl_terms(lq: Tensor, lp: Tensor, mix: float) -> tuple[Tensor, Tensor]:
    q, _, m, lm = _mixture(lq, lp, 1 - mix)
    values = _times(q, lq - lm)
    return values.sum(-1), values + q * (1 - mix * _share(q, m))


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """Part over whole, and 0 where there is none of it."""
    return (part / whole).masked_fill_(part == 0, 0.0)


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

    Examples:
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
    return ABTerms(*pairs[name])

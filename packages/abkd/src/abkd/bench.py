"""Time and memory of the losses, side by side with the formulas written out plainly."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from abkd.divergence import ab_divergence
from abkd.fused import fused_linear_ab_divergence
from shared_core.device import measure_time, peak_memory

__all__ = ["measure_losses", "plain_ab", "plain_kl"]


def plain_ab(student: Tensor, teacher: Tensor, alpha: float, beta: float) -> Tensor:
    """D^(α,β) from two softmaxes and three powers, as one would write it down."""
    q, p = torch.softmax(student.float(), -1), torch.softmax(teacher.float(), -1)
    s = alpha + beta
    terms = p**alpha * q**beta - alpha / s * p**s - beta / s * q**s
    return -(terms.sum(-1) / (alpha * beta)).mean()


def plain_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Forward KL by ``F.kl_div``."""
    lq, lp = F.log_softmax(student.float(), -1), F.log_softmax(teacher.float(), -1)
    return F.kl_div(lq, lp, log_target=True, reduction="batchmean")


def measure_losses(
    tokens: int,
    classes: int,
    width: int,
    *,
    alpha: float = 0.2,
    beta: float = 0.7,
    repeats: int = 5,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Forward and backward of each loss on random inputs, in turns.

    Args:
        tokens: N.
        classes: V.
        width: Hidden size of student and teacher.
        alpha: α.
        beta: β.
        repeats: Timed rounds.
        device: By default the CPU.

    Returns:
        ``losses``: median seconds and peak bytes above the level before, by name; ``ratios``.

    Example:
        >>> list(measure_losses(2, 8, 4, repeats=1)["ratios"])[0]
        'plain_ab over ab, time'
    """
    device = device or torch.device("cpu")
    g = torch.Generator().manual_seed(0)
    shapes = [(tokens, width), (classes, width), (tokens, width), (classes, width)]
    h, W, th, tW = (torch.randn(*s, generator=g).to(device) for s in shapes)
    z, t = (h @ W.T).requires_grad_(), th @ tW.T
    h.requires_grad_()
    W.requires_grad_()

    def on_logits(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
        def call() -> None:
            torch.autograd.grad(loss(z, t), z)

        return call

    def plain_heads() -> None:
        torch.autograd.grad(plain_ab(h @ W.T, th @ tW.T, alpha, beta), [h, W])

    def fused_heads() -> None:
        found = fused_linear_ab_divergence(h, W, th, tW, alpha=alpha, beta=beta)
        torch.autograd.grad(found.loss, [h, W])

    def matmuls() -> None:
        with torch.no_grad():
            for rows in range(0, tokens, 64):
                some, theirs = h[rows : rows + 64], th[rows : rows + 64]
                logits = some @ W.T
                _ = theirs @ tW.T
                _ = logits @ W
                _ = logits.T @ some

    calls: dict[str, Callable[[], None]] = {
        "plain_ab": on_logits(lambda a, b: plain_ab(a, b, alpha, beta)),
        "plain_kl": on_logits(plain_kl),
        "ab": on_logits(lambda a, b: ab_divergence(a, b, alpha, beta)),
        "forward KL": on_logits(lambda a, b: ab_divergence(a, b, 1.0, 0.0)),
        "heads and plain_ab": plain_heads,
        "fused": fused_heads,
        "matrix products alone": matmuls,
    }
    timings = measure_time(*calls.values(), device=device, repeats=repeats, warmup=1)
    losses: dict[str, dict[str, Any]] = {}
    for (name, call), timing in zip(calls.items(), timings, strict=True):
        with peak_memory(device) as peak:
            call()
        losses[name] = {"seconds": timing.median, "peak_bytes": peak.bytes}

    def ratio(first: str, second: str, key: str) -> float | None:
        over, under = losses[first][key], losses[second][key]
        return over / under if over and under else None

    ratios = {
        "plain_ab over ab, time": ratio("plain_ab", "ab", "seconds"),
        "plain_kl over forward KL, time": ratio("plain_kl", "forward KL", "seconds"),
        "ab over plain_ab, memory": ratio("ab", "plain_ab", "peak_bytes"),
        "fused over heads and plain_ab, time": ratio("fused", "heads and plain_ab", "seconds"),
        "fused over heads and plain_ab, memory": ratio("fused", "heads and plain_ab", "peak_bytes"),
        "fused over matrix products, time": ratio("fused", "matrix products alone", "seconds"),
    }
    return {"losses": losses, "ratios": ratios}

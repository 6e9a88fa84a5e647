"""Time and memory of the losses, side by side with plain formulas and with what else there is."""

import contextlib
import ctypes
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from abkd.divergence import ab_divergence, divergence
from abkd.fused import fused_linear_ab_divergence
from shared_core.device import measure_time, peak_memory

__all__ = ["measure_losses", "measure_side_by_side", "plain_ab", "plain_kl"]


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


def _trl_jsd() -> Callable[[Tensor, Tensor], Tensor] | None:
    """The Jensen-Shannon divergence of TRL's GKD trainer, where TRL is installed."""
    if importlib.util.find_spec("trl") is None:
        return None
    with warnings.catch_warnings(action="ignore"):
        try:
            gkd = importlib.import_module("trl.experimental.gkd")
        except ImportError:  # older versions have it on their front page
            gkd = importlib.import_module("trl")
    loss: Callable[..., Tensor] = gkd.GKDTrainer.generalized_jsd_loss
    return lambda z, t: loss(z, t, beta=0.5)


def _liger_jsd() -> Any:
    """Liger-Kernel's chunked JSD with both heads (plain torch: it has no kernel of its own)."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    liger = importlib.import_module("liger_kernel.chunked_loss")
    return liger.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=False
    )


def measure_side_by_side(
    calls: Mapping[str, Callable[[], object]],
    *,
    device: torch.device,
    repeats: int = 5,
    warmup: int = 1,
) -> dict[str, dict[str, Any]]:
    """Median seconds of each call, in turns, and then the peak memory of one more of each.

    Args:
        calls: What is to be measured, by name.
        device: Where it runs.
        repeats: Timed rounds.
        warmup: Rounds before.

    Returns:
        ``seconds`` and ``peak_bytes`` above the level before, by name.

    Examples:
        >>> found = measure_side_by_side({"sum": lambda: sum(range(9))},
        ...                              device=torch.device("cpu"), repeats=1)
        >>> list(found["sum"])
        ['seconds', 'peak_bytes']
    """
    timings = measure_time(*calls.values(), device=device, repeats=repeats, warmup=warmup)
    found: dict[str, dict[str, Any]] = {}
    for (name, call), timing in zip(calls.items(), timings, strict=True):
        # What is freed goes back to the system, so that the resident size shows what a call takes.
        with contextlib.suppress(OSError, AttributeError):  # glibc only
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        with peak_memory(device) as peak:
            call()
        found[name] = {"seconds": timing.median, "peak_bytes": peak.bytes}
    return found


def measure_losses(
    tokens: int,
    classes: int,
    width: int,
    *,
    alpha: float = 0.2,
    beta: float = 0.7,
    repeats: int = 5,
    warmup: int = 1,
    seed: int = 0,
    device: torch.device | None = None,
    heads_only: bool = False,
) -> dict[str, Any]:
    """Forward and backward of each loss on random inputs, in turns.

    Beside ours: the α-β formula and ``F.kl_div`` written out; and, where they are installed, the
    JSD of TRL's GKD trainer and Liger-Kernel's JSD with heads.

    Args:
        tokens: N.
        classes: V.
        width: Hidden size of student and teacher.
        alpha: α.
        beta: β.
        repeats: Timed rounds.
        warmup: Rounds before.
        seed: Of the inputs.
        device: By default the CPU.
        heads_only: Leave out what takes logits that are there.

    Returns:
        ``losses``: median seconds and peak bytes above the level before, by name; ``ratios``;
        ``peers``: the libraries that were found.

    Examples:
        >>> list(measure_losses(2, 8, 4, repeats=1)["ratios"])[0]
        'plain_ab over ab, time'
    """
    device = device or torch.device("cpu")
    g = torch.Generator().manual_seed(seed)
    shapes = [(tokens, width), (classes, width), (tokens, width), (classes, width)]
    h, W, th, tW = (torch.randn(*s, generator=g).to(device) for s in shapes)
    z, t = (h[:0] @ W.T, th[:0] @ tW.T) if heads_only else (h @ W.T, th @ tW.T)
    z.requires_grad_()
    h.requires_grad_()
    W.requires_grad_()
    trl, liger = _trl_jsd(), _liger_jsd()

    def on_logits(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
        def call() -> None:
            torch.autograd.grad(loss(z, t), z)

        return call

    def fused_heads(name: str = "ab", head: Tensor = W) -> Callable[[], None]:
        def call() -> None:
            found = fused_linear_ab_divergence(
                h, head, th, tW, divergence=name, alpha=alpha, beta=beta
            )
            torch.autograd.grad(found.loss, [h, head] if head.requires_grad else [h])

        return call

    def plain_heads() -> None:
        torch.autograd.grad(plain_ab(h @ W.T, th @ tW.T, alpha, beta), [h, W])

    def liger_heads(head: Tensor) -> Callable[[], None]:
        labels = torch.zeros(tokens, dtype=torch.long, device=device)

        def call() -> None:
            found = liger(h, head, th, tW, labels)
            torch.autograd.grad(found, [h, head] if head.requires_grad else [h])

        return call

    def matmuls() -> None:
        with torch.no_grad():
            for rows in range(0, tokens, 64):
                some, theirs = h[rows : rows + 64], th[rows : rows + 64]
                logits = some @ W.T
                _ = theirs @ tW.T
                _ = logits @ W
                _ = logits.T @ some

    calls: dict[str, Callable[[], None]] = {}
    if not heads_only:
        calls |= {
            "plain_ab": on_logits(lambda a, b: plain_ab(a, b, alpha, beta)),
            "plain_kl": on_logits(plain_kl),
            "ab": on_logits(lambda a, b: ab_divergence(a, b, alpha, beta)),
            "forward KL": on_logits(lambda a, b: ab_divergence(a, b, 1.0, 0.0)),
        }
        if trl is not None:
            calls |= {
                "TRL JSD": on_logits(trl),
                "JSD": on_logits(lambda a, b: divergence("jsd", a, b)),
            }
    calls |= {
        "heads and plain_ab": plain_heads,
        "fused": fused_heads(),
        "matrix products alone": matmuls,
    }
    if liger is not None:
        calls |= {
            "Liger JSD": liger_heads(W),
            "fused JSD": fused_heads("jsd"),
            "Liger JSD, frozen head": liger_heads(W.detach()),
            "fused JSD, frozen head": fused_heads("jsd", W.detach()),
        }
    losses = measure_side_by_side(calls, device=device, repeats=repeats, warmup=warmup)
    ratios = {
        f"{first} over {second}, {what}": losses[first][key] / losses[second][key]
        for first, second, what, key in _RATIOS
        if first in losses and second in losses and losses[first][key] and losses[second][key]
    }
    peers = [name for name, found in (("trl", trl), ("liger-kernel", liger)) if found is not None]
    return {"losses": losses, "ratios": ratios, "peers": peers}


_RATIOS = (
    ("plain_ab", "ab", "time", "seconds"),
    ("plain_kl", "forward KL", "time", "seconds"),
    ("ab", "plain_ab", "memory", "peak_bytes"),
    ("forward KL", "plain_kl", "memory", "peak_bytes"),
    ("JSD", "TRL JSD", "time", "seconds"),
    ("JSD", "TRL JSD", "memory", "peak_bytes"),
    ("fused", "heads and plain_ab", "time", "seconds"),
    ("fused", "heads and plain_ab", "memory", "peak_bytes"),
    ("fused", "matrix products alone", "time", "seconds"),
    ("fused JSD", "Liger JSD", "time", "seconds"),
    ("fused JSD", "Liger JSD", "memory", "peak_bytes"),
    ("fused JSD, frozen head", "Liger JSD, frozen head", "time", "seconds"),
)

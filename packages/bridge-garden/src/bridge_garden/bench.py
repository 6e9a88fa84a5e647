"""Time and memory of the hybrid loss, beside soft labels alone and beside the formula written out.

Measured, forward and backward from hidden states, in turns:

- ``hybrid``: `bridge_garden.fused_hybrid_loss` with the confidence weight;
- ``hybrid_risk``: the same with the risk-guided hard label;
- ``soft``: `abkd.fused_linear_ab_divergence` with the forward KL alone;
- ``chain``: the hybrid loss as the published training step goes through it, each softmax anew;
- ``naive``: the same formula on full logits in as few operations as torch has for it;
- ``naive_risk``: that with the penalty.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import abkd
from abkd.bench import measure_side_by_side
from bridge_garden.hybrid import fused_hybrid_loss
from bridge_garden.risk import Risk

__all__ = ["measure_losses", "naive_hybrid", "published_chain"]


def naive_hybrid(
    h: Tensor, W: Tensor, th: Tensor, tW: Tensor, y: Tensor | None = None, alpha: float = 0.0
) -> Tensor:
    """λ KL + (1 - λ) CE of the teacher's argmax, on full logits, as one would write it down.

    Args:
        h: The student's hidden states ``[1, N, H]``.
        W: Its head ``[V, H]``.
        th: The teacher's hidden states.
        tW: Its head.
        y: Labels ``[1, N]``, for the risk.
        alpha: α of the risk; 0 is without.
    """
    z = (h @ W.T).float()
    lq = F.log_softmax(z, -1)
    with torch.no_grad():
        lp = F.log_softmax((th @ tW.T).float(), -1)
        top, argmax = lp.exp().max(-1)
    kl = F.kl_div(lq, lp, log_target=True, reduction="none").sum(-1)
    ce = -lq.gather(-1, argmax.unsqueeze(-1)).squeeze(-1)
    each = (1 - top) * kl + top * ce
    if alpha and y is not None:
        value = torch.logsumexp(z, -1)
        delta = value[:, 1:] - z.gather(-1, y.unsqueeze(-1)).squeeze(-1)[:, :-1]
        follows = (argmax == y)[:, :-1]
        penalty = torch.where(follows, top[:, :-1] * alpha / 4 * delta.square(), 0.0)
        each = each + F.pad(penalty, (0, 1))
    return each.mean()


def published_chain(h: Tensor, W: Tensor, th: Tensor, tW: Tensor) -> Tensor:
    """The same value by the steps of the authors' `compute_loss`, in our own words.

    The shift copies both logits; the soft term takes two log-softmaxes and a softmax, λ a softmax
    of its own, the hard term another log-softmax, and the entropies for the log a softmax and a
    logarithm of each side.
    """
    z = (h @ W.T)[0].clone()
    with torch.no_grad():
        t = (th @ tW.T)[0].clone()
    lq, lp = F.log_softmax(z.float(), -1), F.log_softmax(t.float(), -1)
    soft = (F.softmax(t.float(), -1) * (lp - lq)).sum(-1)
    weight = 1 - F.softmax(t.float(), -1).amax(-1)
    hard = F.cross_entropy(z.float(), t.argmax(-1), reduction="none")
    with torch.no_grad():
        for logits in (z, t):
            p = F.softmax(logits.float(), -1)
            _ = -(p * torch.log(p + 1e-12)).sum(-1).mean()
    return (weight * soft + (1 - weight) * hard).mean()


def measure_losses(
    tokens: int,
    classes: int,
    width: int,
    *,
    repeats: int = 5,
    warmup: int = 1,
    seed: int = 0,
    chunk_size: int | str = "auto",
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Seconds and peak memory of each loss with its gradients, on random inputs.

    Args:
        tokens: N.
        classes: V.
        width: Hidden size of student and teacher.
        repeats: Timed rounds.
        warmup: Rounds before.
        seed: Of the inputs.
        chunk_size: Tokens that our losses compute at once, or ``auto``.
        device: By default the CPU; bfloat16 on a GPU.

    Returns:
        ``seconds`` (medians) and ``peak_bytes`` above the level before, by name, and ratios.

    Examples:
        >>> sorted(measure_losses(4, 11, 2, repeats=1)["seconds"])
        ['chain', 'hybrid', 'hybrid_risk', 'naive', 'naive_risk', 'soft']
    """
    device = device or torch.device("cpu")
    g = torch.Generator().manual_seed(seed)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=g)).to(device, dtype)

    h = draw(1, tokens, width).requires_grad_()
    W = draw(classes, width, scale=width**-0.5).requires_grad_()
    th, tW = draw(1, tokens, width), draw(classes, width, scale=3 * width**-0.5)
    with torch.no_grad():  # half of the labels are the teacher's choice, which risk looks at
        y = torch.randint(classes, (1, tokens), generator=g).to(device)
        y[:, ::2] = (th[:, ::2] @ tW.T).argmax(-1)

    def step(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            h.grad = W.grad = None
            loss().backward()  # type: ignore[no-untyped-call]
            h.grad = W.grad = None

        return run

    def hybrid(risk: Risk | None) -> Tensor:
        return fused_hybrid_loss(h, W, th, tW, y, risk=risk, chunk_size=chunk_size).loss

    losses: dict[str, Callable[[], Tensor]] = {
        "hybrid": lambda: hybrid(None),
        "hybrid_risk": lambda: hybrid(Risk(0.1)),
        "soft": lambda: (
            abkd.fused_linear_ab_divergence(
                h, W, th, tW, divergence="fkl", chunk_size=chunk_size
            ).loss
        ),
        "chain": lambda: published_chain(h, W, th, tW),
        "naive": lambda: naive_hybrid(h, W, th, tW),
        "naive_risk": lambda: naive_hybrid(h, W, th, tW, y, 0.1),
    }
    calls = {name: step(loss) for name, loss in losses.items()}
    found = measure_side_by_side(calls, device=device, repeats=repeats, warmup=warmup)
    seconds = {name: entry["seconds"] for name, entry in found.items()}
    peaks = {name: entry["peak_bytes"] for name, entry in found.items()}
    differences = {}
    with torch.no_grad():
        pairs = (("hybrid", "chain"), ("hybrid", "naive"), ("hybrid_risk", "naive_risk"))
        for ours, theirs in pairs:
            a, b = losses[ours](), losses[theirs]()
            differences[f"{ours} from {theirs}"] = float(abs(a - b) / b)
    return {
        "tokens": tokens,
        "classes": classes,
        "width": width,
        "chunk_size": chunk_size,
        "dtype": str(dtype),
        "seconds": seconds,
        "peak_bytes": peaks,
        "ratios": {
            "hybrid over soft, time": seconds["hybrid"] / seconds["soft"],
            "hybrid with risk over soft, time": seconds["hybrid_risk"] / seconds["soft"],
            "chain over hybrid, time": seconds["chain"] / seconds["hybrid"],
            "naive over hybrid, time": seconds["naive"] / seconds["hybrid"],
            "naive over hybrid, both with risk, time": seconds["naive_risk"]
            / seconds["hybrid_risk"],
            **{
                f"hybrid over {theirs}, memory": peaks["hybrid"] / peaks[theirs]
                for theirs in ("chain", "naive")
                if peaks["hybrid"] and peaks[theirs]
            },
        },
        "relative_differences": differences,
    }

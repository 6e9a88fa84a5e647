"""The hybrid loss beside pure soft labels and beside a plain restatement of the formula.

Run with ``nox -s bench -- bridge-garden``. Measured, forward and backward from hidden states:

- ``hybrid``: `bridge_garden.fused_hybrid_loss` with the confidence weight;
- ``hybrid_risk``: the same with the risk-guided hard label;
- ``soft``: `abkd.fused_linear_ab_divergence` with the forward KL alone;
- ``naive``: the hybrid formula on full logits with log_softmax, kl_div and cross_entropy.

And exact κ by dynamic programming beside a plain recursion over all texts.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import abkd
from bridge_garden import Risk, exact_kappa, fused_hybrid_loss
from bridge_garden.ledger import Ledger, LedgerState, WindowStudent
from shared_core.device import environment, measure_time, peak_memory, select_device
from shared_core.run import write_json


def naive(h: Tensor, W: Tensor, th: Tensor, tW: Tensor) -> Tensor:
    """λ KL + (1 - λ) CE of the teacher's argmax, on full logits."""
    lq = F.log_softmax(h @ W.T, -1)
    with torch.no_grad():
        lp = F.log_softmax(th @ tW.T, -1)
        top, argmax = lp.exp().max(-1)
    kl = F.kl_div(lq, lp, log_target=True, reduction="none").sum(-1)
    ce = -lq.gather(-1, argmax.unsqueeze(-1)).squeeze(-1)
    return ((1 - top) * kl + top * ce).mean()


def losses(N: int, V: int, H: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """Seconds and peak memory of a loss and its gradients."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    h = torch.randn(1, N, H, device=device, dtype=dtype, requires_grad=True)
    W = (torch.randn(V, H, device=device, dtype=dtype) / H**0.5).requires_grad_()
    th = torch.randn(1, N, H, device=device, dtype=dtype)
    tW = torch.randn(V, H, device=device, dtype=dtype) * 3 / H**0.5
    y = torch.randint(V, (1, N), device=device)

    def step(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            h.grad = W.grad = None
            loss().backward()

        return run

    calls = {
        "hybrid": step(lambda: fused_hybrid_loss(h, W, th, tW).loss),
        "hybrid_risk": step(lambda: fused_hybrid_loss(h, W, th, tW, y, risk=Risk(0.1)).loss),
        "soft": step(lambda: abkd.fused_linear_ab_divergence(h, W, th, tW, divergence="fkl").loss),
        "naive": step(lambda: naive(h, W, th, tW)),
    }
    timings = measure_time(*calls.values(), device=device, repeats=repeats, warmup=1)
    found: dict[str, Any] = {"N": N, "V": V, "H": H, "dtype": str(dtype)}
    found["seconds"] = {name: t.median for name, t in zip(calls, timings, strict=True)}
    found["peak_bytes"] = {}
    for name, call in calls.items():
        with peak_memory(device) as peak:
            call()
        found["peak_bytes"][name] = peak.bytes
    s = found["seconds"]
    found["hybrid_over_soft"] = s["hybrid"] / s["soft"]
    found["risk_over_soft"] = s["hybrid_risk"] / s["soft"]
    found["naive_over_hybrid"] = s["naive"] / s["hybrid"]
    ours = fused_hybrid_loss(h, W, th, tW).loss
    found["relative_difference_from_naive"] = abs(ours - naive(h, W, th, tW)).item() / ours.item()
    return found


def kappa(repeats: int) -> dict[str, Any]:
    """Exact κ of the first state: dynamic programming against recursion over all texts."""
    ledger = Ledger(modulus=2, ops=(0.6, 0.4), fillers=2, fillers_per_round=1, rounds=3, window=2)
    student = WindowStudent(ledger.vocab_size, window=2, width=8)

    def to_go(state: LedgerState) -> float:
        if ledger.is_terminal(state):
            return 0.0
        p = ledger.next_dist(state)
        lq = torch.log_softmax(student.on_states([state])[0].double(), -1)
        total = (torch.xlogy(p, p) - p * lq).sum().item()
        for a in p.nonzero().flatten().tolist():
            total += p[a].item() * to_go(ledger.step(state, a))
        return total

    def recursive() -> list[float]:
        return [to_go(ledger.step(ledger.initial, a)) for a in range(ledger.vocab_size)]

    def dynamic() -> Tensor:
        return exact_kappa(ledger, student.on_states, [ledger.initial])

    Q = torch.tensor(recursive(), dtype=torch.float64)
    difference = (dynamic()[0] - (Q - (ledger.next_dist(ledger.initial) * Q).sum())).abs().max()
    slow, fast = measure_time(recursive, dynamic, repeats=repeats, warmup=0)
    return {
        "seconds": {"recursive": slow.median, "dynamic": fast.median},
        "recursive_over_dynamic": slow.median / fast.median,
        "largest_difference": difference.item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--note", default="", help="What to say of the machine.")
    options = parser.parse_args()
    device = select_device(options.device)
    sizes = [(512, 50_000, 128)] if device.type == "cpu" else [(8192, 151_936, 2048)]
    results: dict[str, Any] = {
        f"{N}x{V}": losses(N, V, H, options.repeats, device) for N, V, H in sizes
    }
    results["kappa"] = kappa(3)
    results["note"] = options.note
    results["environment"] = environment("bridge-garden", "abkd")
    name = f"bridge_garden-{device.type}.json"
    write_json(options.out / name, results)
    print(options.out / name)


if __name__ == "__main__":
    main()

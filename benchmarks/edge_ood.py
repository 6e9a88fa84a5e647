"""EDGE beside naive restatements and pytorch-ood: loss, gap, spectra, evaluation from logits.

Run with ``nox -s bench -- edge-ood``. The naive versions are the published formulas written out in
the plainest way:

- the loss with ``log(1 + exp(z))`` and ``-log(1 - sigmoid(z))``, every pair of the gap in a matrix;
- the spectrum by a full decomposition of the feature matrix, batch by batch;
- logits gathered by stacking a growing array batch by batch, with Python lists for each class.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edge_ood import edge_loss, energy_gap
from edge_ood.dilation import singular_values
from edge_ood.evaluate import evaluate
from edge_ood.scorers import get_scorer
from shared_core.device import environment, measure_time, select_device
from shared_core.metrics import ood_metrics
from shared_core.run import write_json


def plain_loss(z: Tensor, y: Tensor, oe: Tensor) -> Tensor:
    """The formulas as published, alpha 1, beta 0.1, k a quarter."""
    probabilities = torch.sigmoid(z)
    l_id = -(y * probabilities.log() + (1 - y) * (1 - probabilities).log()).mean()
    l_conf = -(1 - torch.sigmoid(oe)).log().mean()
    energy, outside = (torch.log(1 + torch.exp(v)).sum(1) for v in (z, oe))
    tail = torch.topk(-energy, len(z) // 4).values
    pairs = outside.view(-1, 1) + tail.view(1, -1)
    return l_id + l_conf + 0.1 * torch.clamp(pairs, min=0).mean()


def ratios(
    calls: dict[str, Callable[[], Any]], device: torch.device, repeats: int
) -> dict[str, Any]:
    """Medians and quartiles of calls timed in turns, and each as a multiple of the first."""
    timings = measure_time(*calls.values(), device=device, repeats=repeats)
    first = timings[0].median
    return {
        name: {
            "milliseconds": 1000 * t.median,
            "quartiles": [1000 * s for s in t.interval],
            "times_the_first": t.median / first,
        }
        for name, t in zip(calls, timings, strict=True)
    }


def with_backward(function: Callable[..., Tensor], *leaves: Tensor) -> Callable[[], Any]:
    def call() -> Any:
        return torch.autograd.grad(function(), leaves)

    return call


def loss(device: torch.device, repeats: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    z, oe = (torch.randn(128, 80, generator=g).to(device).requires_grad_() for _ in range(2))
    y = (torch.rand(128, 80, generator=g) < 0.05).float().to(device)
    ours, plain = edge_loss(z, y, oe).loss, plain_loss(z, y, oe)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
    calls = {
        "edge_loss": with_backward(lambda: edge_loss(z, y, oe).loss, z, oe),
        "plain": with_backward(lambda: plain_loss(z, y, oe), z, oe),
    }
    return ratios(calls, device, 20 * repeats)


def gap(device: torch.device, repeats: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    tail, outside = (
        (torch.rand(n, generator=g) * 20).to(device).requires_grad_() for n in (2048, 8192)
    )
    values = [energy_gap(tail, outside, 0.0, how)[0] for how in ("sorted", "pairwise")]
    torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=1e-6)
    calls = {
        how: with_backward(lambda how=how: energy_gap(tail, outside, 0.0, how)[0], tail, outside)
        for how in ("sorted", "pairwise")
    }
    return ratios(calls, device, repeats)


def spectra(device: torch.device, repeats: int) -> dict[str, Any]:
    features = torch.randn(128, 2048, generator=torch.Generator().manual_seed(0)).to(device)
    difference = singular_values(features) - torch.linalg.svdvals(features.double())
    calls = {
        "gram_float64": lambda: singular_values(features),
        "svd": lambda: torch.linalg.svd(features),
        "svdvals": lambda: torch.linalg.svdvals(features),
    }
    found = ratios(calls, device, repeats)
    return {**found, "largest_difference_from_float64": difference.abs().max().item()}


def stacked(batches: list[np.ndarray], labels: list[np.ndarray]) -> None:
    """Accumulate as the published evaluation does."""
    logits, targets = np.empty((0, 80)), [[] for _ in range(80)]
    for batch, y in zip(batches, labels, strict=True):
        logits = np.vstack((logits, batch))
        for c in range(80):
            targets[c].extend(y[:, c].tolist())


def evaluation(repeats: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    y = (rng.random((40_000, 80)) < 0.04).astype(np.uint8)
    z = (rng.normal(size=y.shape) + 4 * y - 3).astype(np.float32)
    far = (rng.normal(size=(10_000, 80)) - 3).astype(np.float32)
    batches = [z[i : i + 200] for i in range(0, len(z), 200)]
    labels = [y[i : i + 200] for i in range(0, len(z), 200)]
    calls = {
        "evaluate, 8 scores, mAP, tail curves": lambda: evaluate(
            z, {"far": far}, y, scorers=["all"]
        ),
        "plain accumulation of the logits alone": lambda: stacked(batches, labels),
    }
    return ratios(calls, torch.device("cpu"), max(1, repeats // 5))


def peer(repeats: int) -> dict[str, Any]:
    """JointEnergy has no peer there; the multi-class energy and the metrics have one."""
    try:
        from pytorch_ood.detector import EnergyBased
        from pytorch_ood.metrics.ood import OODMetrics
    except ImportError as error:
        return {"left_out": str(error)}
    g = torch.Generator().manual_seed(0)
    inside, outside = (
        torch.randn(20_000, 80, generator=g) + 0.3,
        torch.randn(20_000, 80, generator=g),
    )
    ours, theirs = get_scorer("logsumexp"), EnergyBased.score
    torch.testing.assert_close(ours.score(inside), -theirs(inside))
    a, b = ours.score(inside), ours.score(outside)

    def their_metrics() -> Any:
        metrics = OODMetrics()
        metrics.update(-a, torch.zeros(len(a)))
        metrics.update(-b, -torch.ones(len(b)))
        return metrics.compute()

    found = ood_metrics(a, b)
    scores = {"logsumexp": lambda: ours.score(inside), "pytorch_ood": lambda: theirs(inside)}
    metrics = {"ood_metrics": lambda: ood_metrics(a, b), "pytorch_ood": their_metrics}
    cpu = torch.device("cpu")
    return {
        "energy_score": ratios(scores, cpu, repeats),
        "metrics": ratios(metrics, cpu, repeats),
        "auroc": {"ours": found["auroc"], "pytorch_ood": float(their_metrics()["AUROC"])},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--note", default=None, help="What else the machine was doing.")
    arguments = parser.parse_args()
    device = select_device(arguments.device)
    result: dict[str, Any] = {
        "loss_128_128_80": loss(device, arguments.repeats),
        "gap_8192_2048": gap(device, arguments.repeats),
        "spectrum_128_2048": spectra(device, arguments.repeats),
        "evaluation_40000_80": evaluation(arguments.repeats),
        "pytorch_ood": peer(arguments.repeats),
        "repeats": arguments.repeats,
        "note": arguments.note,
        "environment": environment("edge-ood", "pytorch-ood"),
    }
    write_json(arguments.out / f"edge_ood-{device.type}.json", result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

"""EDGE beside naive restatements and pytorch-ood: loss, gap, spectra, evaluation from logits.

Run with ``nox -s bench -- edge-ood``. The naive versions are the published formulas written out in
the plainest way:

- the loss with ``log(1 + exp(z))`` and ``-log(1 - sigmoid(z))``, every pair of the gap in a matrix;
- the spectrum by a full decomposition of the feature matrix, batch by batch;
- logits gathered by stacking a growing array batch by batch, with Python lists for each class;
- training images read at full size, flipped, then cropped; float32; a wait for the loss every step.

``--only NAME`` runs one part: ``loss``, ``gap``, ``spectrum``, ``evaluation``, ``pytorch_ood``; and
two that run only when named: ``rows`` (the command on ``--rows`` rows of logits, in a folder of its
own that is removed; Linux) and ``throughput`` (images a second of training, meant for a GPU).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edge_ood import EdgeLoss, PairedLoader, edge_loss, energy_gap
from edge_ood.datasets import MultiLabelImages, UnlabelledImages, train_transform
from edge_ood.dilation import singular_values
from edge_ood.evaluate import evaluate
from edge_ood.loop import train_edge
from edge_ood.models import create_model
from edge_ood.scorers import LOGIT_SCORERS, get_scorer
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
    scorers = [*LOGIT_SCORERS, "iforest"]
    batches = [z[i : i + 200] for i in range(0, len(z), 200)]
    labels = [y[i : i + 200] for i in range(0, len(z), 200)]
    calls = {
        "evaluate, 9 scores, mAP, tail curves": lambda: evaluate(
            z, {"far": far}, y, scorers=scorers, fit_logits=z[:2000]
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


def many_rows(rows: int, labels: int = 20) -> dict[str, Any]:
    """``edge-ood eval`` in a process of its own: seconds, and its largest anonymous memory."""
    with tempfile.TemporaryDirectory(prefix="edge-ood-rows-") as name:
        folder, rng = Path(name), np.random.default_rng(0)
        tables = {
            "id": (rows, np.float32),
            "y": (rows, np.uint8),
            "far": (rows // 10, np.float32),
        }
        opened = {
            n: np.lib.format.open_memmap(folder / f"{n}.npy", "w+", dtype, (size, labels))
            for n, (size, dtype) in tables.items()
        }
        chances = 0.3 / np.arange(1, labels + 1)
        for start in range(0, rows, 2**18):
            part = slice(start, min(rows, start + 2**18))
            y = rng.random((part.stop - start, labels), dtype=np.float32) < chances
            opened["y"][part] = y
            opened["id"][part] = rng.standard_normal(y.shape, np.float32) + 4 * y - 3
        for start in range(0, rows // 10, 2**18):
            part = opened["far"][start : start + 2**18]
            part[:] = rng.standard_normal(part.shape, np.float32) - 3.5
        for table in opened.values():
            table.flush()
        size = sum(f.stat().st_size for f in folder.iterdir())
        opened.clear()
        words = ["eval", "--id-logits", "id.npy", "--labels", "y.npy", "--ood-logits", "far.npy"]
        command = [sys.executable, "-P", "-m", "edge_ood.cli", *words, "--no-plots", "--json"]
        started, peak = time.perf_counter(), 0
        with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
            status = Path(f"/proc/{process.pid}/status")
            while process.poll() is None:
                lines = [v for v in status.read_text().splitlines() if v.startswith("RssAnon")]
                peak = max([peak, *(int(line.split()[1]) * 1024 for line in lines)])
                time.sleep(0.05)
            assert process.stdout is not None
            found = json.loads(process.stdout.read())
        return {
            "command": f"edge-ood {' '.join(words)} --no-plots",
            "rows": rows,
            "labels": labels,
            "files_bytes": size,
            "seconds": time.perf_counter() - started,
            "peak_anonymous_bytes": peak,
            "auroc": found["scorers"]["joint_energy"]["mean"]["auroc"],
        }


def throughput(
    device: torch.device, repeats: int, model: str, size: int, batch: int, workers: int
) -> dict[str, Any]:
    """Images (ID and OE) a second in training: ours, and a loop as published, on the same files."""
    import PIL.Image
    from torchvision.transforms import v2

    steps, classes, rng = 6, 20, np.random.default_rng(0)
    normalize = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    normalize.append(v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    crop = v2.RandomResizedCrop(size, scale=(0.5, 1.0), antialias=True)
    published = v2.Compose([v2.RandomHorizontalFlip(), crop, *normalize])
    with tempfile.TemporaryDirectory(prefix="edge-ood-images-") as name:
        files = []
        for i in range(2 * steps * batch):
            coarse = rng.integers(0, 255, (15, 20, 3), dtype=np.uint8)
            files.append(Path(name) / f"{i}.jpg")
            PIL.Image.fromarray(coarse).resize((640, 480)).save(files[-1])
        half = len(files) // 2
        targets = (
            torch.rand(half, classes, generator=torch.Generator().manual_seed(0)) < 0.1
        ).float()

        def loaders(transform: Any, **options: Any) -> tuple[Any, Any]:
            names = [str(i) for i in range(classes)]
            known = MultiLabelImages(files[:half], targets, names, transform)
            unknown = UnlabelledImages(images=files[half:], transform=transform)
            options |= {"batch_size": batch, "num_workers": workers, "shuffle": True}
            return tuple(torch.utils.data.DataLoader(d, **options) for d in (known, unknown))  # type: ignore[return-value]

        def network() -> tuple[Any, torch.optim.Optimizer]:
            torch.manual_seed(0)
            made = create_model(model, classes, hidden=1000).to(device)
            return made, torch.optim.SGD(made.parameters(), 0.01, momentum=0.9, nesterov=True)

        pairs = PairedLoader(*loaders(train_transform(size), pin_memory=device.type == "cuda"))
        plain_loaders = loaders(published)
        fast, optimizer = network()
        fast = fast.to(memory_format=torch.channels_last)
        slow, other = network()
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

        def ours() -> None:
            train_edge(
                fast, pairs, EdgeLoss(), optimizer, epochs=1, tau=0, device=device, dtype=dtype
            )

        def plain() -> None:
            for (x, y), outliers in zip(*plain_loaders, strict=True):
                z = slow(torch.cat([x.to(device), outliers.to(device)]))
                value = plain_loss(z[: len(x)], y.to(device), z[len(x) :])
                other.zero_grad()
                value.backward()
                other.step()
                value.item()

        x = torch.randn(2 * batch, 3, size, size, generator=torch.Generator().manual_seed(1))
        y = targets[:batch].to(device)
        with torch.no_grad():
            z = network()[0](x.to(device))
            losses = [edge_loss(z[:batch], y, z[batch:]).loss, plain_loss(z[:batch], y, z[batch:])]
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
        timings = ratios({"ours": ours, "plain": plain}, device, repeats)
        for entry in timings.values():
            entry["images_a_second"] = len(files) / (entry["milliseconds"] / 1000)
        return {"model": model, "pixels": size, "batch": batch, "dtype": str(dtype), **timings}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", default=None, help="One part, kept beside the saved others.")
    parser.add_argument("--rows", type=int, default=10_000_000, help="For --only rows.")
    parser.add_argument("--model", default="timm:resnet50.tv_in1k", help="For throughput.")
    parser.add_argument("--image-size", type=int, default=256, help="For throughput.")
    parser.add_argument("--batch-size", type=int, default=128, help="For throughput.")
    parser.add_argument("--workers", type=int, default=8, help="For throughput.")
    parser.add_argument("--note", default=None, help="What else the machine was doing.")
    given = parser.parse_args()
    device, repeats = select_device(given.device), given.repeats
    training = given.model, given.image_size, given.batch_size, given.workers
    parts: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
        "loss": ("loss_128_128_80", lambda: loss(device, repeats)),
        "gap": ("gap_8192_2048", lambda: gap(device, repeats)),
        "spectrum": ("spectrum_128_2048", lambda: spectra(device, repeats)),
        "evaluation": ("evaluation_40000_80", lambda: evaluation(repeats)),
        "pytorch_ood": ("pytorch_ood", lambda: peer(repeats)),
        "rows": ("evaluation_many_rows", lambda: many_rows(given.rows)),
        "throughput": ("training_throughput", lambda: throughput(device, repeats, *training)),
    }
    if given.only is not None and given.only not in parts:
        parser.error(f"--only {given.only}; accepted: {', '.join(parts)}")
    file = given.out / f"edge_ood-{device.type}.json"
    result: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    chosen = [n for n in parts if n not in ("rows", "throughput")]
    for name in chosen if given.only is None else [given.only]:
        title, measure = parts[name]
        result[title] = measure()
    result |= {
        "repeats": repeats,
        "note": given.note,
        "environment": environment("edge-ood", "pytorch-ood"),
    }
    write_json(file, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

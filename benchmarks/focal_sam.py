"""Focal-SAM's step beside its peers': time, overhead, memory; and a long-tailed CIFAR recipe.

Run with ``nox -s bench -- focal-sam``. Peers:

- ``pytorch_optimizer.SAM``, a SAM optimizer in the usual two-step form;
- a per-tensor Focal-SAM in three steps, which keeps both gradients and the old weights in the
  optimizer's state: the formulas of Li et al. (ICML 2025) restated in the plainest way.

``--cifar`` also trains the CIFAR-10-LT preset on the images that ``TENFOLD_DATA`` names; with
``--epochs`` it takes as long as there is time for.
"""

import argparse
import copy
import dataclasses
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from focal_sam import SAM, FocalSAM, FocalWeights
from focal_sam.bench import measure_steps
from focal_sam.models import resnet32_cifar
from focal_sam.train import TrainSettings, train
from shared_core.device import environment, measure_time, select_device
from shared_core.run import RunFolder, write_json

COUNTS = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
RHO, GAMMA, LAM = 0.2, 3.0, 0.5


class PlainFocalSAM:
    """Three steps, tensor by tensor."""

    def __init__(self, parameters: Any, base: torch.optim.Optimizer) -> None:
        self.parameters, self.base = list(parameters), base
        self.weights = FocalWeights(COUNTS, GAMMA, LAM).values.float()
        self.kept: dict[Tensor, dict[str, Tensor]] = {p: {} for p in self.parameters}

    def step(self, forward: Callable[[], Tensor], y: Tensor) -> None:
        """Take one training step."""
        losses, w = forward(), self.weights.to(y.device)[y]
        (w * losses).mean().backward(retain_graph=True)
        norm = torch.norm(torch.stack([p.grad.norm() for p in self.parameters]))
        ascent = {p: p.grad * (RHO / (norm + 1e-12)) for p in self.parameters}
        self.base.zero_grad()
        ((1 - w) * losses).mean().backward()
        with torch.no_grad():
            for p in self.parameters:
                self.kept[p]["grad"] = p.grad.clone()
                self.kept[p]["old"] = p.data.clone()
                p.add_(ascent[p])
        self.base.zero_grad()
        (w * forward()).mean().backward()
        with torch.no_grad():
            for p in self.parameters:
                p.data = self.kept[p]["old"]
                p.grad.add_(self.kept[p]["grad"])
        self.base.step()
        self.base.zero_grad()


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def contenders(
    model: nn.Module, x: Tensor, y: Tensor
) -> tuple[dict[str, Callable[[], None]], dict[str, nn.Module]]:
    """A step of ours and of each peer, every one on its own copy of the model, and the copies."""
    import pytorch_optimizer

    criterion = nn.CrossEntropyLoss(reduction="none")
    models = {name: copy.deepcopy(model) for name in ("focal", "plain_focal", "sam", "peer_sam")}
    plain = PlainFocalSAM(
        models["plain_focal"].parameters(), sgd(models["plain_focal"].parameters())
    )
    peer = pytorch_optimizer.SAM(
        models["peer_sam"].parameters(), torch.optim.SGD, rho=RHO, lr=0.01, momentum=0.9
    )
    methods = {
        "focal": FocalSAM(models["focal"], COUNTS, RHO, GAMMA, LAM, bn_perturbed="update"),
        "sam": SAM(models["sam"], RHO, bn_perturbed="update"),
    }
    optimizers = {name: sgd(models[name].parameters()) for name in methods}
    labels = y.cpu()

    def ours(name: str) -> Callable[[], None]:
        def step() -> None:
            methods[name].backward(lambda: criterion(models[name](x), y), labels)
            optimizers[name].step()
            optimizers[name].zero_grad()

        return step

    def peer_step() -> None:
        criterion(models["peer_sam"](x), y).mean().backward()
        peer.first_step(zero_grad=True)
        criterion(models["peer_sam"](x), y).mean().backward()
        peer.second_step(zero_grad=True)

    steps = {
        "focal": ours("focal"),
        "plain_focal": lambda: plain.step(lambda: criterion(models["plain_focal"](x), y), y),
        "sam": ours("sam"),
        "peer_sam": peer_step,
    }
    return steps, models


class Free(torch.autograd.Function):
    """Passes its first argument on and gives every parameter itself as gradient, at no cost."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *parameters: Tensor) -> Tensor:
        ctx.gradients = [p.detach() for p in parameters]
        return logits.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients[0], *ctx.gradients


class ManySmallTensors(nn.Module):
    """300 parameters whose gradients cost next to nothing: what is left to time is overhead."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors = nn.ParameterList(torch.randn(64, 64) for _ in range(300))
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, 10]``."""
        logits: Tensor = Free.apply(self.head(x), *self.tensors)
        return logits


def bare_step(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """Focal-SAM's passes and SGD's step, and nothing else: no norm, no perturbation, no copy."""
    parameters = list(model.parameters())
    optimizer, criterion = sgd(parameters), nn.CrossEntropyLoss(reduction="none")
    w = FocalWeights(COUNTS, GAMMA, LAM).values.float().to(y.device)[y]

    def step() -> None:
        losses = criterion(model(x), y)
        torch.autograd.grad((w * losses).mean(), parameters, retain_graph=True)
        ((1 - w) * losses).mean().backward()
        (w * criterion(model(x), y)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def compare(model: nn.Module, x: Tensor, y: Tensor, repeats: int) -> dict[str, Any]:
    """Time all contenders in turns, after seeing that ours and the peers' train alike."""
    steps, models = contenders(model, x, y)
    steps["bare"] = bare_step(copy.deepcopy(model), x, y)
    for step in steps.values():
        for _ in range(3):
            step()
    difference = {
        f"{ours}_and_{peer}": max(
            (p - q).abs().max().item()
            for p, q in zip(models[ours].parameters(), models[peer].parameters(), strict=True)
        )
        for ours, peer in (("focal", "plain_focal"), ("sam", "peer_sam"))
    }
    timings = measure_time(*steps.values(), device=x.device, repeats=repeats)
    seconds = {name: t.median for name, t in zip(steps, timings, strict=True)}
    return {
        "seconds": seconds,
        "largest_weight_difference_after_3_steps": difference,
        "plain_focal_over_focal": seconds["plain_focal"] / seconds["focal"],
        "overhead_of_plain_focal_over_focal": (seconds["plain_focal"] - seconds["bare"])
        / (seconds["focal"] - seconds["bare"]),
        "peer_sam_over_sam": seconds["peer_sam"] / seconds["sam"],
    }


def cifar(epochs: int, device: torch.device, methods: list[str]) -> dict[str, Any]:
    """The CIFAR-10-LT preset on the CIFAR-10 subset (JPEG), shortened."""
    folder = Path(os.environ["TENFOLD_DATA"])
    found: dict[str, Any] = {
        "data": "CIFAR-10 subset (JPEG): 2,000 training images in the largest class, 20 in the "
        "rarest; 400 test images a class",
        "epochs": epochs,
    }
    for method in methods:
        settings = TrainSettings.from_preset(
            "cifar10lt-resnet32",
            data=str(folder / "cifar10-train.parquet"),
            test_data=str(folder / "cifar10-test.parquet"),
            method=method,
            epochs=epochs,
        )
        # ResNet-32's published group edges are for 5,000 images in the largest class.
        settings = dataclasses.replace(settings, few_below=80, many_above=400)
        with tempfile.TemporaryDirectory() as out:
            found[method] = train(settings, RunFolder(out), device)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--cifar", action="store_true")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--methods", default="sgd,sam,focal")
    arguments = parser.parse_args()
    device = select_device(arguments.device)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(arguments.batch_size, 3, 32, 32, generator=generator).to(device)
    y = (torch.arange(arguments.batch_size) % 10).to(device)
    kind = device.type
    if arguments.cifar:
        result = cifar(arguments.epochs, device, arguments.methods.split(","))
        name = f"focal_sam-cifar10lt-{kind}.json"
    else:
        torch.manual_seed(0)
        network, small = resnet32_cifar(10).to(device), ManySmallTensors().to(device)
        result = {
            "resnet32": compare(network, x, y, arguments.repeats),
            "300_small_tensors": compare(small, x[:, 0, 0, :8], y, arguments.repeats),
            "methods_on_resnet32": measure_steps(
                ["sgd", "sam", "imbsam", "ccsam", "focal"],
                "resnet32",
                batch_size=arguments.batch_size,
                repeats=arguments.repeats,
                device=device,
            ),
        }
        name = f"focal_sam-{kind}.json"
    result["environment"] = environment("focal-sam", "pytorch-optimizer")
    write_json(arguments.out / name, result)
    print(arguments.out / name)


if __name__ == "__main__":
    main()

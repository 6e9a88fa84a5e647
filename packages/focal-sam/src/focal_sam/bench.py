"""The cost of a training step of each method, measured side by side."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from focal_sam.models import create_model
from focal_sam.train import METHODS, TrainSettings, create_method
from shared_core.device import autocast, measure_time, peak_memory, seed_everything
from shared_core.errors import InputError

__all__ = ["measure_steps"]

SIZES = {"resnet32": 32, "small_cnn": 32, "resnet50": 224}


def measure_steps(
    methods: Sequence[str],
    model: str = "resnet32",
    *,
    batch_size: int = 8,
    repeats: int = 10,
    device: torch.device | None = None,
    amp: bool = False,
) -> dict[str, dict[str, Any]]:
    """Time whole training steps (gradient, SGD with momentum, zeroing) on random images.

    Args:
        methods: Some of `focal_sam.train.METHODS`; SGD is measured in any case.
        model: ``resnet32``, ``small_cnn`` or ``resnet50``.
        batch_size: Images per step, of ten classes by turns.
        repeats: Timed rounds; in each, every method takes one step.
        device: By default the CPU.
        amp: Mixed precision with bfloat16.

    Returns:
        For each method: ``seconds`` (median) and their ``quartiles``, ``ratio_to_sgd``,
        ``ratio_to_sam`` (``None`` without SAM) and ``peak_bytes`` above the level before the step
        (``None`` but on CUDA: elsewhere memory that earlier steps freed hides the peak).

    Raises:
        InputError: If a method or the model is unknown.

    Examples:
        >>> found = measure_steps(["sam"], "small_cnn", batch_size=2, repeats=1)
        >>> list(found)
        ['sgd', 'sam']
    """
    unknown = [m for m in methods if m not in METHODS]
    if unknown:
        raise InputError(f"no method is called {unknown[0]!r}; accepted: {', '.join(METHODS)}")
    if model not in SIZES:
        raise InputError(f"bench has no model {model!r}; accepted: {', '.join(SIZES)}")
    device = device or torch.device("cpu")
    names = list(dict.fromkeys(["sgd", *methods]))
    steps = {m: _step(m, model, batch_size, device, amp) for m in names}
    timings = measure_time(*steps.values(), device=device, repeats=repeats)
    found: dict[str, dict[str, Any]] = {}
    for (name, step), timing in zip(steps.items(), timings, strict=True):
        with peak_memory(device) as peak:
            step()
        found[name] = {
            "seconds": timing.median,
            "quartiles": list(timing.interval),
            "peak_bytes": peak.bytes if device.type == "cuda" else None,
        }
    for entry in found.values():
        entry["ratio_to_sgd"] = entry["seconds"] / found["sgd"]["seconds"]
        entry["ratio_to_sam"] = (
            entry["seconds"] / found["sam"]["seconds"] if "sam" in found else None
        )
    return found


def _step(
    name: str, model: str, batch_size: int, device: torch.device, amp: bool
) -> Callable[[], None]:
    """One training step, ready to be called again and again."""
    seed_everything(0)
    network = create_model(model, 10).to(device)
    counts = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    settings = TrainSettings(
        "none", method=name, rho=1e-6 if name == "ccsam" else 0.05, threshold=400
    )
    method = create_method(settings, network, counts)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    criterion = nn.CrossEntropyLoss(reduction="none")
    inputs = torch.randn(batch_size, 3, SIZES[model], SIZES[model], device=device)
    labels = torch.arange(batch_size) % 10
    targets = labels.to(device)
    dtype = torch.bfloat16 if amp else torch.float32

    def losses() -> Tensor:
        with autocast(device, dtype):
            logits = network(inputs)
        values: Tensor = criterion(logits.float(), targets)
        return values

    def step() -> None:
        method.backward(losses, labels)
        optimizer.step()
        optimizer.zero_grad()

    return step

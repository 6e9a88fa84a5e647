"""The demo's vision part: a 16-unit network learns from a 256-256 network, on scikit-learn digits.

Every method's weight λ is chosen from one list on three seeds, and reported on ten others.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abkd.divergence import ab_divergence

__all__ = ["METHODS", "run_digits", "tell_digits"]

METHODS = {
    "labels alone": None,
    "forward KL": (1.0, 0.0),
    "reverse KL": (0.0, 1.0),
    "αβ (0.8, 0.3)": (0.8, 0.3),
}
WEIGHTS = (0.5, 2.0, 8.0, 32.0)
TEMPERATURE = 4.0
TUNING_SEEDS = (100, 101, 102)


def _data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from shared_core.data.digits import digit_arrays

    parts = []
    for images, labels in (digit_arrays("train"), digit_arrays("test")):
        x = torch.from_numpy(images).float().reshape(len(labels), -1) / 16
        parts += [x, torch.from_numpy(labels)]
    return parts[0], parts[1], parts[2], parts[3]


def _teacher(x: Tensor, y: Tensor, steps: int) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, weight_decay=1e-4)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(net(x), y))
        optimizer.step()
    return net.eval()


def _students(
    runs: list[tuple[tuple[float, float] | None, float]], data: tuple[Tensor, ...], t: Tensor,
    seed: int, steps: int,
) -> list[float]:  # fmt: skip
    """Test accuracies of one student a run, all from the same start, trained side by side."""
    x, y, test_x, test_y = data
    g = torch.Generator().manual_seed(seed)
    n = len(runs)

    def start(*shape: int) -> Tensor:
        first = torch.randn(*shape, generator=g) * math.sqrt(2 / shape[0])
        return first.expand(n, *shape).clone().requires_grad_()

    w1, w2 = start(64, 16), start(16, 10)
    b1, b2 = (torch.zeros(n, 1, k, requires_grad=True) for k in (16, 10))

    def forward(inputs: Tensor) -> Tensor:
        return torch.relu(inputs @ w1 + b1) @ w2 + b2

    optimizer = torch.optim.Adam([w1, w2, b1, b2], lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        z = forward(x)
        loss = F.cross_entropy(z.flatten(0, 1), y.repeat(n), reduction="sum") / len(y)
        for i, (pair, weight) in enumerate(runs):
            if pair is not None:
                soft = ab_divergence(z[i], t, *pair, temperature=TEMPERATURE)
                loss = loss + weight * soft
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        right = (forward(test_x).argmax(-1) == test_y).float().mean(-1)
    return [100 * float(r) for r in right]


def run_digits(seeds: list[int], *, steps: int = 150) -> dict[str, Any]:
    """Choose λ on the tuning seeds, then train students from the others.

    Returns:
        ``rows``: accuracy, standard error and λ by method; ``teacher``; ``gain`` of αβ over forward
        KL with its standard error, paired by seed.
    """
    data = _data()
    net = _teacher(data[0], data[1], 2 * steps)
    with torch.no_grad():
        t = net(data[0])
        truth = 100 * float((net(data[2]).argmax(-1) == data[3]).float().mean())
    candidates = [(name, w) for name, pair in METHODS.items() for w in WEIGHTS if pair is not None]
    tried = [
        _students([(METHODS[name], w) for name, w in candidates], data, t, seed, steps)
        for seed in TUNING_SEEDS
    ]
    means = torch.tensor(tried).mean(0).tolist()
    chosen: dict[str, float] = {"labels alone": 0.0}
    for (name, weight), mean in sorted(zip(candidates, means, strict=True), key=lambda p: p[1]):
        del mean
        chosen[name] = weight
    runs = [(pair, chosen[name]) for name, pair in METHODS.items()]
    scores = torch.tensor([_students(runs, data, t, seed, steps) for seed in seeds])
    errors = scores.std(0) / math.sqrt(len(seeds)) if len(seeds) > 1 else scores[0] * 0
    gains = scores[:, 3] - scores[:, 1]
    return {
        "rows": {
            name: {
                "accuracy": float(scores[:, i].mean()),
                "standard_error": float(errors[i]),
                "kd_weight": chosen[name],
            }
            for i, name in enumerate(METHODS)
        },
        "teacher": truth,
        "seeds": seeds,
        "gain": float(gains.mean()),
        "gain_error": float(gains.std()) / math.sqrt(len(seeds)) if len(seeds) > 1 else None,
    }


def tell_digits(found: dict[str, Any]) -> str:
    """What was seen, whichever way it went."""
    rows = found["rows"]
    alone, kl, ab = (rows[n]["accuracy"] for n in ("labels alone", "forward KL", "αβ (0.8, 0.3)"))
    text = (
        f"Digits, {len(found['seeds'])} seeds: labels alone {alone:.1f} %, forward KL {kl:.1f} %, "
        f"αβ (0.8, 0.3) {ab:.1f} %, teacher {found['teacher']:.1f} %"
    )
    error = found["gain_error"]
    if error is None:
        return text + "."
    apart = "told apart" if abs(found["gain"]) > 2 * error else "not told apart"
    return f"{text}; αβ and forward KL are {apart} ({found['gain']:+.2f} ± {error:.2f} points)."

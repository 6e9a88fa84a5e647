"""The embedded default: every variant of the method on the ledger, with an exact teacher.

The settings were chosen on seeds 100 and up; the command reports seeds 0 and up.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bridge_garden.exposure import ExposureReport, exposure_from_losses
from bridge_garden.hybrid import hybrid_loss
from bridge_garden.kappa import Decomposition, exact_decomposition, exact_kappa
from bridge_garden.ledger import Ledger, LedgerState, WindowStudent
from bridge_garden.risk import Risk
from bridge_garden.weights import StepInfo, weight_from_string
from shared_core.cli import say
from shared_core.errors import InputError
from shared_core.run import RunFolder, progress

__all__ = [
    "DEFAULT",
    "METHODS",
    "QUICK",
    "DemoSettings",
    "KappaPicture",
    "MethodResult",
    "figures",
    "garden_entropy",
    "kappa_picture",
    "measure",
    "run_demo",
    "run_seed",
    "summarize",
    "table",
    "tell",
    "train_student",
]

METHODS = {
    "soft": "soft",
    "hard": "hard",
    "static": "static:0.5",
    "confidence": "confidence",
    "entropy": "entropy",
    "curriculum": "curriculum:0.5",
    "risk": "static:0.5",
    "sampled": "hard",
    "rkl": "soft",
    "jsd": "soft",
    "on-policy": "soft",
}
"""The methods and their weights. ``risk`` adds the risk-guided hard label with α = 0.1;
``sampled`` takes the teacher's samples as hard labels instead of its argmax; ``rkl`` and ``jsd``
are soft labels by another divergence; ``on-policy`` is soft labels on the student's own texts."""

DEFAULT = ("soft", "hard", "sampled", "static", "confidence", "entropy", "risk")
"""Those that run by default; the curriculum ends much as its static weight does."""

QUICK = ("soft", "hard", "static", "confidence")

TITLES = {
    "soft": "soft labels",
    "hard": "hard labels",
    "static": "static 0.5",
    "confidence": "confidence",
    "entropy": "entropy",
    "curriculum": "curriculum 0.5",
    "risk": "static 0.5 + risk",
    "sampled": "sampled hard labels",
    "rkl": "reverse KL",
    "jsd": "Jensen-Shannon",
    "on-policy": "on-policy soft labels",
}


@dataclass(frozen=True)
class DemoSettings:
    """Settings of the demo, the same for every method.

    Examples:
        >>> DemoSettings().rounds
        14
    """

    rounds: int = 14
    sequences: int = 1500
    steps: int = 300
    batch: int = 32
    lr: float = 4e-3
    weight_decay: float = 0.01
    rollouts: int = 1000
    risk_alpha: float = 0.1


@dataclass(frozen=True)
class MethodResult:
    """What was measured of one student.

    Attributes:
        exposure: Fit, inference error and exposure bias, over positions.
        bridge_bias: Exposure bias of the results alone (per result).
        bridge_accuracy: Share of right results in the student's own texts.
        chain_accuracy: Share of texts with all results right.
        garden_entropy: The student's entropy at fillers, on the teacher's prefixes, in nats.
        student: The trained student.
        seconds: Of the training.
    """

    exposure: ExposureReport
    bridge_bias: float
    bridge_accuracy: float
    chain_accuracy: float
    garden_entropy: float
    student: WindowStudent
    seconds: float


def train_student(
    ledger: Ledger, ids: Tensor, method: str, seed: int, settings: DemoSettings
) -> WindowStudent:
    """Distil the exact teacher into a window student, on its texts or on the student's own.

    Args:
        ledger: The teacher.
        ids: Its texts ``[N, T]``.
        method: One of `METHODS`.
        seed: Of initial weights and batches, the same for every method.
        settings: Of the training.

    Raises:
        InputError: If the method is unknown.
    """
    if method not in METHODS:
        raise InputError(f"no method is called {method!r}; accepted: {', '.join(METHODS)}")
    weight = weight_from_string(METHODS[method])
    risk = Risk(settings.risk_alpha) if method == "risk" else None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        student = WindowStudent(ledger.vocab_size, ledger.window)
    generator = torch.Generator().manual_seed(seed)
    teacher = _log_probs(ledger, ids)
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    for step in range(settings.steps):
        at = torch.randint(len(ids), (settings.batch,), generator=generator)
        texts, known = ids[at], teacher[at]
        if method == "on-policy":
            with torch.no_grad():
                texts = student.sample(settings.batch, ledger.length, generator)
            known = _log_probs(ledger, texts)
        out = hybrid_loss(
            student(texts[:, :-1]),
            known,
            texts[:, 1:],
            weight=weight,
            divergence=method if method in ("rkl", "jsd") else "fkl",
            hard_labels="labels" if method == "sampled" else "teacher_argmax",
            risk=risk,
            at=StepInfo(step, settings.steps),
        )
        optimizer.zero_grad()
        out.loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return student


def _log_probs(ledger: Ledger, ids: Tensor) -> Tensor:
    """The teacher's log-probabilities of what follows each prefix, ``[N, T - 1, V]``."""
    # Log 0 is far below what float32 can tell from 0; -inf would do as well.
    return ledger.probs(ids[:, :-1]).log().clamp(min=-1e4).float()


@torch.no_grad()
def _losses(ledger: Ledger, student: WindowStudent, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Forward KL ``[N, T - 1]`` at every position of texts, and the student's log-probabilities."""
    p = ledger.probs(ids[:, :-1])
    lq = torch.log_softmax(student(ids[:, :-1]).double(), -1)
    return (torch.xlogy(p, p) - p * lq).sum(-1), lq


def measure(
    ledger: Ledger,
    student: WindowStudent,
    seed: int,
    settings: DemoSettings,
    seconds: float = math.nan,
) -> MethodResult:
    """Exposure bias, accuracy and diversity of a student, from rollouts of both sides."""
    generator = torch.Generator().manual_seed(1_000_003 + seed)
    theirs = ledger.sample(settings.rollouts, generator)
    own = student.sample(settings.rollouts, ledger.length, generator)
    fit, lq = _losses(ledger, student, theirs)
    inference, _ = _losses(ledger, student, own)
    slots = ledger.slots()
    results = slots["result"]
    truth = ledger.totals(own)[:, results + 1] + 1
    right = own[:, results + 1] == truth
    entropy = -(lq.exp() * lq).sum(-1)[:, slots["filler"]].mean()
    return MethodResult(
        exposure_from_losses(fit, inference),
        (inference[:, results].mean() - fit[:, results].mean()).item(),
        right.double().mean().item(),
        right.all(1).double().mean().item(),
        entropy.item(),
        student,
        seconds,
    )


def garden_entropy(ledger: Ledger, count: int = 1000) -> float:
    """The teacher's own entropy at fillers, in nats."""
    p = ledger.probs(ledger.sample(count, torch.Generator().manual_seed(0))[:, :-1])
    return -torch.xlogy(p, p).sum(-1)[:, ledger.slots()["filler"]].mean().item()


def run_seed(
    seed: int,
    methods: Sequence[str],
    settings: DemoSettings = DemoSettings(),
    *,
    progress: Callable[[str], object] = lambda method: None,
) -> dict[str, MethodResult]:
    """Train and measure a student by each method, from the same start and batches.

    Args:
        seed: Of data, weights and rollouts.
        methods: Some of `METHODS`.
        settings: Of the demo.
        progress: Called with each method when it is done.

    Raises:
        InputError: If a method is unknown or there is none.

    Examples:
        >>> tiny = DemoSettings(rounds=2, sequences=50, steps=5, rollouts=50)
        >>> found = run_seed(0, ["soft", "hard"], tiny)
        >>> list(found)
        ['soft', 'hard']
    """
    unknown = [m for m in methods if m not in METHODS]
    if unknown or not methods:
        raise InputError(
            f"no method is called {unknown[0] if unknown else ''!r}; accepted: {', '.join(METHODS)}"
        )
    ledger = Ledger(rounds=settings.rounds)
    ids = ledger.sample(settings.sequences, torch.Generator().manual_seed(seed))
    found = {}
    for method in methods:
        started = time.process_time()
        student = train_student(ledger, ids, method, seed, settings)
        seconds = time.process_time() - started
        found[method] = measure(ledger, student, seed, settings, seconds)
        progress(method)
    return found


def run_demo(
    run: RunFolder, methods: Sequence[str], seeds: Sequence[int], *, plots: bool = True
) -> tuple[dict[str, Any], list[str]]:
    """The whole demo in a run folder: students, exact κ, table, pictures.

    Args:
        run: The folder.
        methods: Some of `METHODS`.
        seeds: At least one.
        plots: Draw the pictures.

    Returns:
        What ``metrics.json`` has, and the names of the pictures.

    Raises:
        InputError: If a method is unknown.
    """
    settings = DemoSettings()
    run.write_config(
        "bridge-garden demo",
        {"seeds": list(seeds), "methods": list(methods), **asdict(settings)},
        distributions=["bridge-garden", "abkd"],
    )
    started = time.perf_counter()
    results = []
    with progress(total=len(seeds) * len(methods), description="students", unit="student") as bar:
        for seed in seeds:
            results.append(run_seed(seed, methods, settings, progress=lambda _: bar.update()))
            for name, result in results[-1].items():
                run.log(step=seed, method=name, **result.exposure.to_dict())
    say("exact κ")
    picture = kappa_picture(seeds[0])
    entropy = garden_entropy(Ledger(rounds=settings.rounds))
    summary = summarize(results)
    pictures = []
    if plots:
        say("drawing")
        for name, figure in figures(results, picture, entropy).items():
            pictures.append(run.save_figure(name, figure).name)
    metrics = {
        "methods": summary,
        "teacher_garden_entropy": entropy,
        "kappa": asdict(picture),
        "seeds": list(seeds),
        "summary": {
            "message": tell(summary, entropy),
            "rows": table(summary),
            "picture": "comparison.png" if plots else None,
        },
    }
    training = {m: statistics.fmean(found[m].seconds for found in results) for m in methods}
    run.write_metrics(
        metrics,
        timing={"seconds": time.perf_counter() - started, "cpu_seconds_of_training": training},
    )
    return metrics, pictures


@dataclass(frozen=True)
class KappaPicture:
    """Exact κ on a small ledger, for a student of soft labels.

    Attributes:
        kinds: What the next token of each place is: ``start``, ``filler``, ``op`` or ``result``.
        by_place: Mean κ(s) of each place over the states of the teacher's texts.
        scores: κ(s) of single states.
        weights: λ = 1 - max π_T of the same states.
        score_kinds: Their kinds.
        decomposition: Exact fit, inference error, exposure bias and its causes.
    """

    kinds: list[str]
    by_place: list[float]
    scores: list[float]
    weights: list[float]
    score_kinds: list[str]
    decomposition: Decomposition


def kappa_picture(seed: int, *, steps: int = 250, texts: int = 60, rounds: int = 4) -> KappaPicture:
    """Compute κ without sampling on a ledger of four digits and three fillers.

    Args:
        seed: Of the student.
        steps: Of its training.
        texts: Texts of the teacher whose states are asked about.
        rounds: Of the ledger; every reachable state is visited, so this is kept small.

    Examples:
        >>> picture = kappa_picture(0, steps=2, texts=2, rounds=1)
        >>> len(picture.by_place) == len(picture.kinds)
        True
    """
    ledger = Ledger(
        modulus=4, ops=(0.6, 0.4), fillers=3, fillers_per_round=1, rounds=rounds, window=3
    )
    generator = torch.Generator().manual_seed(seed)
    ids = ledger.sample(500, generator)
    settings = DemoSettings(steps=steps, rounds=ledger.rounds)
    student = train_student(ledger, ids, "soft", seed, settings)
    visits: dict[LedgerState, int] = {}
    for text in ids[:texts].tolist():
        state = ledger.initial
        for token in text[1:]:
            visits[state] = visits.get(state, 0) + 1
            state = ledger.step(state, token)
    states = list(visits)
    exclude = (0,)
    kappa = exact_kappa(ledger, student.on_states, states, exclude=exclude)
    scores = kappa.sum(-1).tolist()
    kinds = [ledger.kind(place) for place in range(1, ledger.length)]
    totals, counts = [0.0] * len(kinds), [0] * len(kinds)
    for state, score in zip(states, scores, strict=True):
        totals[state.place - 1] += visits[state] * score
        counts[state.place - 1] += visits[state]
    return KappaPicture(
        kinds,
        [t / c for t, c in zip(totals, counts, strict=True)],
        scores,
        [1 - ledger.next_dist(s).max().item() for s in states],
        [kinds[s.place - 1] for s in states],
        exact_decomposition(ledger, student.on_states, {ledger.initial: 1.0}, exclude=exclude),
    )


def _spread(values: Sequence[float]) -> dict[str, Any]:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard_error": error, "values": list(values)}


MEASURES: dict[str, Callable[[MethodResult], float]] = {
    "fit": lambda r: r.exposure.fit,
    "inference": lambda r: r.exposure.inference,
    "bias": lambda r: r.exposure.bias,
    "bridge_bias": lambda r: r.bridge_bias,
    "bridge_accuracy": lambda r: r.bridge_accuracy,
    "chain_accuracy": lambda r: r.chain_accuracy,
    "garden_entropy": lambda r: r.garden_entropy,
}


def summarize(results: Sequence[dict[str, MethodResult]]) -> dict[str, Any]:
    """Mean, standard error and values over the seeds, for each method and measure.

    Args:
        results: What `run_seed` returned, one per seed.
    """
    return {
        method: {
            name: _spread([read(r[method]) for r in results]) for name, read in MEASURES.items()
        }
        for method in results[0]
    }


def table(methods: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the printed table, from what `summarize` returned."""

    def show(entry: dict[str, Any]) -> str:
        error = entry["standard_error"]
        return f"{entry['mean']:.3f}" + (f" ±{error:.3f}" if error is not None else "")

    return [
        {
            "method": TITLES[method],
            "fit": show(entry["fit"]),
            "inference error": show(entry["inference"]),
            "exposure bias": show(entry["bias"]),
            "bridge accuracy": show(entry["bridge_accuracy"]),
            "all right": show(entry["chain_accuracy"]),
            "garden entropy": show(entry["garden_entropy"]),
        }
        for method, entry in methods.items()
    ]


def tell(methods: dict[str, Any], teacher_entropy: float) -> str:
    """Say what was seen, losses included.

    Args:
        methods: What `summarize` returned.
        teacher_entropy: Of the teacher at fillers, in nats.
    """
    if not {"soft", "confidence"} <= methods.keys():
        return "Without soft labels and confidence there is nothing to compare."
    soft, mixed = methods["soft"], methods["confidence"]

    def compare(name: str, label: str, low_is_good: bool) -> str:
        pairs = zip(mixed[name]["values"], soft[name]["values"], strict=True)
        found = _spread([a - b for a, b in pairs])
        difference, error = found["mean"], found["standard_error"]
        wins = (difference < 0) == low_is_good
        sure = error is not None and abs(difference) > 2 * error
        unsure = "one seed" if error is None else "no clear difference"
        verdict = ("better" if wins else "worse") if sure else unsure
        size = f"{difference:+.3f}" + (f" ±{error:.3f}" if error is not None else "")
        return f"{label} {size} ({verdict})"

    parts = [
        compare("fit", "fit to the teacher", True),
        compare("bias", "exposure bias", True),
        compare("inference", "inference error", True),
        compare("bridge_accuracy", "bridge accuracy", False),
    ]
    lines = [f"Confidence-weighted against soft labels: {'; '.join(parts)}."]
    kept = mixed["garden_entropy"]["mean"] / teacher_entropy
    lines.append(f"It keeps {kept:.0%} of the teacher's entropy in gardens")
    if "hard" in methods:
        lines[-1] += (
            f", hard labels {methods['hard']['garden_entropy']['mean'] / teacher_entropy:.0%}"
        )
    lines[-1] += "."
    if {"sampled", "hard"} <= methods.keys():
        own, most = (methods[m]["bridge_accuracy"]["mean"] for m in ("sampled", "hard"))
        lines.append(
            f"Hard labels sampled from the teacher have a bridge accuracy of {own:.3f}, its argmax "
            f"{most:.3f}, soft labels {soft['bridge_accuracy']['mean']:.3f}"
            + (": sampling loses the gain." if own < most - 0.02 else ".")
        )
    if {"static", "soft"} <= methods.keys():
        left = methods["static"]["garden_entropy"]["mean"] / teacher_entropy
        lines.append(f"Static mixing keeps {left:.0%} of the entropy in gardens.")
    if {"static", "risk"} <= methods.keys():
        change = (
            methods["risk"]["bridge_accuracy"]["mean"]
            - methods["static"]["bridge_accuracy"]["mean"]
        )
        lines.append(
            f"The risk-guided term changes static mixing's bridge accuracy by {change:+.3f}"
            + ("." if change > 0.01 else ": no gain on this task.")
        )
    return " ".join(lines)


def figures(
    results: Sequence[dict[str, MethodResult]], picture: KappaPicture, teacher_entropy: float
) -> dict[str, Any]:
    """The pictures by name: ``comparison``, ``positions`` and ``kappa``.

    Args:
        results: What `run_seed` returned, one per seed.
        picture: Exact κ of the small ledger.
        teacher_entropy: Of the teacher at fillers, in nats.
    """
    from bridge_garden.plots import plot_comparison, plot_kappa, plot_positions

    first = {TITLES[m]: r.exposure for m, r in results[0].items() if m != "hard"}
    named = {TITLES[m]: entry for m, entry in summarize(results).items()}
    return {
        "comparison": plot_comparison(named, teacher_entropy),
        "positions": plot_positions(first),
        "kappa": plot_kappa(picture),
    }

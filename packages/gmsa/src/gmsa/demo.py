"""The embedded demo: both training stages on a tiny language, beside what one would try first.

Every method starts from the same small language model (`gmsa.demo_base`). Those that fine-tune the
decoder all take the same number of steps in all: what the autoencoding stage uses is given to the
methods that have none.
"""

import json
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gmsa.compressor import GMSACompressor
from gmsa.configuration import GMSAConfig
from gmsa.demo_base import (
    RESTATE,
    continue_text,
    facts,
    load_base,
    optimize,
    tiny_model,
    tokenizer,
)
from gmsa.model import GMSAModel
from shared_core.errors import InputError
from shared_core.run import RunFolder, atomic_path, progress

__all__ = [
    "METHODS",
    "QUICK_METHODS",
    "DemoSettings",
    "figures",
    "run_all",
    "run_jobs",
    "run_method",
    "save_tour",
    "table",
    "tell",
    "tiny_compressor",
]

PLAIN = {"merging": "embeddings", "alignment": "none"}


@dataclass(frozen=True)
class Method:
    """What is compared, with the learning rates that were best for it on other seeds.

    Attributes:
        options: Settings of the compressor.
        autoencodes: Whether it is trained as an autoencoder first.
        tunes: Whether the decoder is fine-tuned.
        ae_lr: Learning rate of the first stage.
        keft_lr: Learning rate of the second.
    """

    options: Mapping[str, Any]
    autoencodes: bool = False
    tunes: bool = True
    ae_lr: float = 4e-3
    keft_lr: float = 2e-3


METHODS: dict[str, Method] = {
    "full prompt": Method(PLAIN, tunes=False),
    "truncation": Method(PLAIN, tunes=False),
    "full prompt, tuned": Method(PLAIN, keft_lr=4e-3),
    "pooling, tuned": Method(PLAIN, keft_lr=1e-3),
    "memory tokens": Method({"merging": "memory", "alignment": "linear"}, True),
    "GMSA": Method({}, True),
    "GMSA without AE": Method({}),
    "GMSA, linear for LSA": Method({"alignment": "linear"}, True, ae_lr=8e-3),
    "GMSA, random LSA": Method({"lsa_init": "random"}, True, ae_lr=8e-3),
}
QUICK_METHODS = ("full prompt", "truncation", "pooling, tuned", "memory tokens", "GMSA")


@dataclass(frozen=True)
class DemoSettings:
    """How long each part trains, and how hard the task is."""

    ae_steps: int = 300
    keft_steps: int = 150
    batch_size: int = 16
    facts: int = 4
    rate: int = 4
    items: int = 512

    def quick(self) -> "DemoSettings":
        """The version that takes less than 40 seconds."""
        return replace(self, ae_steps=200, keft_steps=100, items=256)


def tiny_compressor(seed: int = 0) -> GMSACompressor:
    """An untrained compressor over words of two letters, to try the interface with.

    Examples:
        >>> tiny_compressor().compress("ba be bi", rate=2).lengths
        tensor([2])
    """
    config = GMSAConfig(encoder_layers=1, lora_r=4)
    return GMSACompressor(GMSAModel.from_backbone(tiny_model(seed), config), tokenizer())


def _stage(
    model: GMSAModel,
    stage: str,
    steps: int,
    lr: float,
    rate: int,
    settings: DemoSettings,
    seed: int,
) -> list[float]:
    """One training stage of a compressor; returns its losses."""
    generator = torch.Generator().manual_seed(1000 + seed)
    model.freeze_for_stage(stage)
    model.train()

    def loss() -> Tensor:
        count = int(torch.randint(2, settings.facts + 1, (1,), generator=generator))
        context, question, answer = facts(settings.batch_size, count, generator)
        if stage == "autoencoding":
            question, answer = torch.full((len(context), 1), RESTATE), context
        found: Tensor = model(context, prompt_ids=question, labels=answer, rate=rate).loss
        return found

    trained = [p for p in model.parameters() if p.requires_grad]
    losses = optimize(trained, loss, steps, lr, lambda: None)
    model.eval()
    return losses


@torch.no_grad()
def _measure(
    model: GMSAModel, rate: int, data: tuple[Tensor, Tensor, Tensor], *, restate: bool
) -> dict[str, float]:
    """Shares of questions answered and, if asked for, of tokens restated (teacher-forced)."""
    context, question, answer = data
    soft = model.compress(context, rate=rate)
    new = model.generate(soft, question, max_new_tokens=2, eos_token_id=None)
    found = {"qa": float((new == answer).all(1).float().mean())}
    if restate:
        out = model(soft=soft, prompt_ids=torch.full_like(question[:, :1], RESTATE), labels=context)
        found["restated"] = float(out.num_correct / out.num_label_tokens)
    return found


@torch.no_grad()
def _example(model: GMSAModel, rate: int, data: tuple[Tensor, Tensor, Tensor]) -> dict[str, str]:
    """A context, what was restated of it with wrong words in brackets, a question, the answer."""
    context, question, answer = (part[:1] for part in data)
    words = tokenizer()
    soft = model.compress(context, rate=rate)
    restated = model.generate(
        soft, torch.tensor([[RESTATE]]), max_new_tokens=context.shape[1], eos_token_id=None
    )
    pairs = zip(restated[0].tolist(), context[0].tolist(), strict=True)
    said = [words.decode([a]) if a == b else f"[{words.decode([a])}]" for a, b in pairs]
    return {
        "context": words.decode(context[0]),
        "restated": " ".join(said),
        "question": words.decode(question[0, 1:]),
        "right answer": words.decode(answer[0]),
    }


def run_method(
    name: str, seed: int, settings: DemoSettings, folder: str | None = None
) -> dict[str, Any]:
    """Train one method with one seed and measure it on contexts of its own.

    Args:
        name: One of `METHODS`.
        seed: Of initialisation and contexts.
        settings: How long.
        folder: Where to leave the trained compressor (see `save_tour`), if anywhere.

    Returns:
        ``qa`` (exact match) and, with an autoencoding stage, ``restated`` (teacher-forced token
        accuracy after it) in [0, 1]; for GMSA also ``qa before tuning``, ``example`` and the
        autoencoding stage's ``losses``.

    Examples:
        >>> run_method("truncation", 0, DemoSettings(items=8)).keys()
        dict_keys(['qa'])
    """
    torch.set_num_threads(1)  # the model is small: a second thread would only get in the way
    method = METHODS[name]
    base = load_base()
    data = facts(settings.items, settings.facts, torch.Generator().manual_seed(10**6 + seed))
    context, question, answer = data
    if not method.tunes:
        kept = -(-context.shape[1] // settings.rate)
        seen = context if name == "full prompt" else context[:, -kept:]
        new = continue_text(base, seen, question)
        return {"qa": float((new == answer).all(1).float().mean())}
    torch.manual_seed(seed)
    config = GMSAConfig(
        encoder_layers=1, lora_r=32, lora_alpha=32, lora_dropout=0.0, memory_tokens=16,
        restate_instruction="Restate", **method.options,
    )  # fmt: skip
    model = GMSAModel.from_backbone(base, config)
    rate = 1 if name.startswith("full prompt") else settings.rate
    found: dict[str, Any] = {}
    tuning = settings.keft_steps
    if method.autoencodes:
        steps = settings.ae_steps
        losses = _stage(model, "autoencoding", steps, method.ae_lr, rate, settings, seed)
        before = _measure(model, rate, data, restate=True)
        found = {"restated": before["restated"], "qa before tuning": before["qa"]}
        found |= {"losses": losses, "example": _example(model, rate, data)}
    elif method.options is PLAIN:
        tuning += settings.ae_steps
    _stage(model, "keft", tuning, method.keft_lr, rate, settings, seed)
    found["qa"] = _measure(model, rate, data, restate=False)["qa"]
    if "example" in found:
        soft = model.compress(context[:1], rate=rate)
        new = model.generate(soft, question[:1], max_new_tokens=2, eos_token_id=None)
        found["example"]["answer"] = tokenizer().decode(new[0])
    if folder is not None:
        model.config.base_model_name_or_path = "../base"
        model.save_pretrained(Path(folder) / "compressor")
    return found


def save_tour(folder: Path, count: int = 2000) -> None:
    """Leave the base model and facts as JSON lines, to try the other commands with.

    Args:
        folder: Gets ``base/``, ``train.jsonl`` and ``test.jsonl``.
        count: Records to train with; an eighth as many are left to test with.
    """
    load_base().save_pretrained(folder / "base")
    words = tokenizer()
    words.save_pretrained(folder / "base")
    for name, rows, seed in (("train", count, 0), ("test", max(1, count // 8), 10**6)):
        data = facts(rows, 4, torch.Generator().manual_seed(seed))
        lines = [
            json.dumps({
                "input": words.decode(c), "prompt": words.decode(q), "answer": words.decode(a),
            })
            for c, q, a in zip(*data, strict=True)
        ]  # fmt: skip
        with atomic_path(folder / f"{name}.jsonl") as path:
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def run_jobs(
    jobs: Sequence[tuple[str, int]],
    settings: DemoSettings,
    folder: Path,
    first: int,
    processes: int,
) -> Iterator[tuple[tuple[str, int], dict[str, Any]]]:
    """Run methods with seeds, one a process and core.

    Args:
        jobs: Pairs of a method and a seed.
        settings: How long.
        folder: Gets the GMSA compressor of the first seed.
        first: That seed.
        processes: How many at a time; one runs in this process.

    Yields:
        Each job with its result, as they come.
    """

    def place(job: tuple[str, int]) -> str | None:
        return str(folder) if job == ("GMSA", first) else None

    if processes < 2:
        for job in jobs:
            yield job, run_method(*job, settings, place(job))
        return
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from multiprocessing import get_context

    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(run_method, *job, settings, place(job)): job for job in jobs}
        try:
            for done in as_completed(running):
                yield running[done], done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def run_all(
    run: RunFolder, seed: int, seeds: int, *, quick: bool = False, processes: int | None = None
) -> dict[str, Any]:
    """Everything of the demo but its pictures; what is done is kept in the folder meanwhile.

    Args:
        run: The run's folder.
        seed: The first seed.
        seeds: How many; the quick version takes one.
        quick: Fewer steps and methods.
        processes: Methods trained at a time; by default two where there are two cores.

    Returns:
        ``results`` by method and seed, ``rows``, ``message``, ``example``, ``numbers`` by seed and
        method, ``latency`` and ``rate``.

    Raises:
        InputError: If the folder holds a demo of other settings.
    """
    from gmsa.bench import latency

    settings = DemoSettings()
    methods: tuple[str, ...] = tuple(METHODS)
    if quick:
        settings, seeds, methods = settings.quick(), 1, QUICK_METHODS
    plan = {"seed": seed, "seeds": seeds, "methods": list(methods), **asdict(settings)}
    done: dict[tuple[str, int], Any] = {}
    if run.has_checkpoint:
        stored = run.load_checkpoint()
        if stored["plan"] != plan:
            raise InputError(f"the demo in {run.path} had other settings; choose another --out")
        done = stored["done"]
    run.write_config("gmsa demo", plan, distributions=["gmsa", "transformers"])
    save_tour(run.path)
    chosen = range(seed, seed + seeds)
    jobs = [(n, s) for s in chosen for n in methods if (n, s) not in done]
    # The long ones first, so that two processes end together.
    jobs.sort(key=lambda job: (METHODS[job[0]].autoencodes, METHODS[job[0]].tunes), reverse=True)
    count = processes or (1 if quick else max(1, min(2, os.cpu_count() or 1, len(jobs))))
    found = run_jobs(jobs, settings, run.path, seed, count)
    for job, result in progress(found, description="training", total=len(jobs), unit="model"):
        done[job] = result
        run.log(step=len(done), method=job[0], seed=job[1], answered=result["qa"])
        run.save_checkpoint({"plan": plan, "done": done})
    results = {n: {s: done[n, s] for s in chosen} for n in methods}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        lengths = (256, 1024)
        clock = latency(lengths, (4, 8), torch.device("cpu"), 1 if quick else 3)
    finally:
        torch.set_num_threads(threads)
    (run.path / run.CHECKPOINT).unlink(missing_ok=True)
    numbers = {
        str(s): {
            n: {k: v for k, v in results[n][s].items() if k not in ("losses", "example")}
            for n in methods
        }
        for s in chosen
    }
    return {
        "results": results,
        "rows": table(results),
        "message": tell(results, settings.rate),
        "example": results["GMSA"][seed]["example"],
        "numbers": numbers,
        "latency": clock,
        "rate": settings.rate,
    }


def _spread(values: Sequence[float]) -> float | None:
    return round(100 * statistics.stdev(values), 1) if len(values) > 1 else None


def table(results: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Means and standard deviations over seeds, one row a method, in percent.

    Args:
        results: By method and seed, what `run_method` gave.

    Examples:
        >>> table({"GMSA": {0: {"qa": 0.5, "restated": 0.8}}})[0]["answered %"]
        50.0
    """
    rows = []
    for name, seeds in results.items():
        qa = [r["qa"] for r in seeds.values()]
        restated = [r["restated"] for r in seeds.values() if "restated" in r]
        before = [r["qa before tuning"] for r in seeds.values() if "qa before tuning" in r]
        rows.append({
            "method": name,
            "answered %": round(100 * statistics.mean(qa), 1),
            "std": _spread(qa),
            "before tuning %": round(100 * statistics.mean(before), 1) if before else None,
            "restated %": round(100 * statistics.mean(restated), 1) if restated else None,
        })  # fmt: skip
    return rows


def tell(results: Mapping[str, Mapping[int, Mapping[str, Any]]], rate: int) -> str:
    """What came out, in words, whatever it is: GMSA beside each other method, seed by seed."""
    ours = results["GMSA"]
    mean = 100 * statistics.mean(r["qa"] for r in ours.values())
    parts = [f"At {rate}x compression GMSA answers {mean:.1f} % of the questions."]
    for name, seeds in results.items():
        if name == "GMSA":
            continue
        gaps = [100 * (ours[s]["qa"] - seeds[s]["qa"]) for s in ours]
        mean = statistics.mean(gaps)
        if len(gaps) == 1:
            parts.append(f"{mean:+.1f} points against {name}.")
            continue
        error = statistics.stdev(gaps) / len(gaps) ** 0.5
        sure = "" if abs(mean) > 2 * error else ", which is within the noise"
        parts.append(f"{mean:+.1f} (standard error {error:.1f}) against {name}{sure}.")
    return " ".join(parts)


def figures(
    results: Mapping[str, Mapping[int, Mapping[str, Any]]], rate: int
) -> Iterator[tuple[str, Any]]:
    """The pictures: answers by method, and the autoencoding stage's losses."""
    from shared_core.plots import COLORS, new_figure

    rows = table(results)[::-1]
    figure, axes = new_figure(1, 2, figsize=(10.5, 4.2))
    colors = [COLORS[0] if row["method"].startswith("GMSA") else COLORS[1] for row in rows]
    axes[0].barh([r["method"] for r in rows], [r["answered %"] for r in rows], color=colors)
    for place, row in enumerate(rows):
        values = [100 * r["qa"] for r in results[row["method"]].values()]
        axes[0].plot(values, [place] * len(values), "o", color="black", markersize=3)
    axes[0].set_xlabel("questions answered, % (dots: seeds)")
    axes[0].set_title(f"{rate}x compression")
    trained = [name for name, seeds in results.items() if "losses" in next(iter(seeds.values()))]
    for number, name in enumerate(trained):
        curves = [torch.tensor(r["losses"]) for r in results[name].values()]
        mean = torch.stack(curves).mean(0)
        smooth = mean.unfold(0, min(10, len(mean)), 1).mean(1)
        axes[1].plot(smooth, color=COLORS[number], label=name)
    axes[1].set_xlabel("step of the autoencoding stage")
    axes[1].set_ylabel("cross-entropy (mean of 10 steps)")
    axes[1].set_title("Learning to restate")
    axes[1].legend()
    yield "comparison", figure

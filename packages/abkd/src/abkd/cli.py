"""The command line: parses, calls, prints."""

from pathlib import Path
from typing import Annotated

import typer

from shared_core.cli import (
    Device,
    Json,
    Out,
    Plots,
    Quick,
    Resume,
    Seed,
    command,
    format_table,
    new_app,
    run_app,
    say,
    show_result,
)
from shared_core.errors import InputError

__all__ = ["app", "main"]

app = new_app(
    "abkd",
    "Knowledge distillation with the α-β-divergence (Wang et al., ICML 2025): forward KL, reverse "
    "KL and everything between, for large vocabularies. Begin with: abkd demo",
)


@command(app)
def demo(
    seeds: Annotated[int, typer.Option("--seeds", help="Number of seeds.", min=1)] = 3,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: Json = False,
    quick: Quick = False,
    plots: Plots = True,
) -> None:
    """Fit a student that is too small for its teacher, for a grid of α and β, and compare.

    Nothing is downloaded. --quick takes a coarser grid and fewer steps.
    """
    import time
    from dataclasses import asdict

    import torch

    from abkd import demo as the_demo
    from shared_core.device import select_device
    from shared_core.run import RunFolder, progress

    if select_device(device).type != "cpu":
        raise InputError("the demo's models are tiny and run on the CPU; leave --device out")
    grid = the_demo.GRID[::2] if quick else the_demo.GRID
    settings = the_demo.DemoSettings(steps=100 if quick else 200)
    pairs = [(a, b) for a in grid for b in grid]
    pairs += [p for p in the_demo.NAMED.values() if p not in pairs]
    run = RunFolder(out or Path("runs/abkd/demo"))
    run.write_config(
        "abkd demo",
        {"seed": seed, "seeds": seeds, "grid": grid, **asdict(settings)},
        distributions=["abkd"],
    )
    started = time.perf_counter()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        results = []
        for one in progress(range(seed, seed + seeds), description="fitting", unit="seed"):
            results.append(the_demo.run_seed(one, pairs, settings))
            run.log(step=one, best=float(results[-1]["total variation"].min()))
    finally:
        torch.set_num_threads(threads)
    summary = the_demo.summarize(results, pairs)
    rows, message = the_demo.table(summary), the_demo.tell(summary, results, pairs)
    pictures = []
    if plots:
        say("drawing")
        for name, figure in the_demo.figures(results, pairs, grid).items():
            pictures.append(run.save_figure(name, figure).name)
    metrics = {
        "divergences": summary,
        "seeds": list(range(seed, seed + seeds)),
        "summary": {
            "message": message,
            "rows": rows,
            "picture": "heatmap.png" if plots else None,
        },
    }
    run.write_metrics(metrics, timing={"seconds": time.perf_counter() - started})
    text = f"{format_table(rows)}\n\n{message}\n\n{run.path}: metrics.json"
    show_result(metrics, ", ".join([text, *pictures]), as_json=as_json)


@command(app)
def train(
    preset: Annotated[
        str | None, typer.Option("--preset", help="A run of the paper, such as gpt2-small-dolly.")
    ] = None,
    student: Annotated[
        str | None, typer.Option("--student", help="Hub id or folder of the student.")
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option("--teacher", help="Hub id or folder; none with data of abkd capture."),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="pydoc, a file or folder, or a hub id.")
    ] = None,
    divergence: Annotated[
        str | None, typer.Option("--divergence", help="ab, fkl, rkl, jsd, tv, skew_fkl, …")
    ] = None,
    alpha: Annotated[float | None, typer.Option("--alpha", help="α.")] = None,
    beta: Annotated[float | None, typer.Option("--beta", help="β.")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", help="τ.")] = None,
    kd_weight: Annotated[
        float | None, typer.Option("--kd-weight", help="Weight of the soft term.")
    ] = None,
    ce_weight: Annotated[
        float | None, typer.Option("--ce-weight", help="Weight of the hard term.")
    ] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Learning rate.")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Examples of a micro-batch.", min=1)
    ] = None,
    accumulation: Annotated[
        int | None, typer.Option("--accumulation", help="Micro-batches of a step.", min=1)
    ] = None,
    epochs: Annotated[float | None, typer.Option("--epochs", help="Passes over the data.")] = None,
    max_steps: Annotated[int | None, typer.Option("--max-steps", help="Steps.", min=1)] = None,
    max_length: Annotated[
        int | None, typer.Option("--max-length", help="Tokens of an example.", min=2)
    ] = None,
    save_steps: Annotated[
        int | None, typer.Option("--save-steps", help="Steps between checkpoints.", min=1)
    ] = None,
    lora_r: Annotated[
        int | None, typer.Option("--lora-r", help="Rank of LoRA adapters; 0 trains all.", min=0)
    ] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Mixed precision.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    resume: Resume = False,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Distil a causal language model, from a preset of the paper or from your settings.

    Options override the preset. Several GPUs: torchrun --nproc-per-node 4 -m abkd.cli train …

    Example: abkd train --student Qwen/Qwen2.5-0.5B --teacher Qwen/Qwen2.5-7B --data my.jsonl
    """
    from dataclasses import asdict

    from abkd.train import TrainSettings
    from abkd.train import train as run_training
    from shared_core.device import select_device

    given = {
        "student": student,
        "teacher": teacher,
        "data": data,
        "divergence": divergence,
        "alpha": alpha,
        "beta": beta,
        "temperature": temperature,
        "kd_weight": kd_weight,
        "ce_weight": ce_weight,
        "lr": lr,
        "batch_size": batch_size,
        "accumulation": accumulation,
        "epochs": epochs,
        "max_steps": max_steps,
        "max_length": max_length,
        "save_steps": save_steps,
        "lora_r": lora_r,
        "bf16": bf16 or None,
        "seed": seed,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    if preset is not None:
        settings = TrainSettings.from_preset(preset, **changes)
    elif student is None or data is None:
        raise InputError("say what to train: --preset NAME, or --student … --teacher … --data …")
    else:
        settings = TrainSettings(**{"teacher": None, **changes})  # type: ignore[arg-type]
    chosen = select_device(device)
    if dry_run:
        plan = asdict(settings)
        show_result(plan, "\n".join(f"{k:18} {v}" for k, v in plan.items()), as_json=as_json)
        return
    folder = out or Path(f"runs/abkd/train-{preset or Path(settings.student).name}")
    metrics = run_training(settings, folder, chosen.type, resume=resume)
    rows = [
        {"": when, **{n: round(v, 4) for n, v in metrics[when].items() if isinstance(v, float)}}
        for when in ("first", "last")
    ]
    show_result(
        {"out": str(folder), **metrics}, f"{format_table(rows)}\n\n{folder}", as_json=as_json
    )


@command(app)
def capture(
    teacher: Annotated[str, typer.Option("--teacher", help="Hub id or folder.")],
    data: Annotated[str, typer.Option("--data", help="pydoc, a file or folder, or a hub id.")],
    k: Annotated[int, typer.Option("--k", help="Tokens to keep at each position.", min=1)] = 64,
    max_length: Annotated[
        int, typer.Option("--max-length", help="Tokens of an example.", min=2)
    ] = 512,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Rows at once.", min=1)] = 8,
    resume: Resume = False,
    out: Out = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Write down a teacher's most probable tokens, to train from without it.

    Then: abkd train --student … --data FOLDER, without --teacher.
    """
    from abkd.capture import capture_topk
    from abkd.data import tokenize_dataset
    from abkd.train import load_causal_lm, load_examples, load_tokenizer
    from abkd.vocab import align_vocab
    from shared_core.device import select_device

    chosen = select_device(device)
    model, tokenizer = load_causal_lm(teacher).to(chosen), load_tokenizer(teacher)
    rows = tokenize_dataset(load_examples(data, max_length), tokenizer, max_length)
    folder = out or Path("runs/abkd/capture")
    size = model.config.vocab_size
    vocab = align_vocab(size, size, tokenizer)
    count = capture_topk(
        model, rows, folder, k=k, vocab=vocab, batch_size=batch_size, resume=resume
    )
    summary = {"out": str(folder), "rows": count, "k": k, "vocab": vocab}
    show_result(
        summary, f"{count} rows with the top {k} of {vocab} tokens: {folder}", as_json=as_json
    )


@command(app)
def evaluate(
    model: Annotated[str, typer.Option("--model", help="Hub id or folder of the model.")],
    data: Annotated[str, typer.Option("--data", help="A file or folder, or a hub id.")],
    metric: Annotated[str, typer.Option("--metric", help="rouge_l or exact_match.")] = "rouge_l",
    limit: Annotated[
        int | None, typer.Option("--limit", help="Rows, from the first on.", min=1)
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", help="Length of an answer.", min=1)
    ] = 256,
    temperature: Annotated[
        float, typer.Option("--temperature", help="Of sampling; 0 is greedy.", min=0)
    ] = 1.0,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Rows at once.", min=1)] = 8,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Let a model answer the prompts of a data set and score the answers.

    The data have prompt and completion, or question and answer; several accepted answers may
    stand in a list. exact_match compares the final numbers, as for GSM8K.
    """
    import math

    from abkd import evaluation
    from abkd.train import load_causal_lm, load_examples, load_tokenizer
    from shared_core.device import select_device
    from shared_core.run import RunFolder

    scores_of = {"rouge_l": evaluation.rouge_l, "exact_match": evaluation.exact_match}
    if metric not in scores_of:
        raise InputError(f"--metric is {metric!r}; accepted: {', '.join(scores_of)}")
    scores_of[metric](["a"], ["a"])  # a missing library is told before the work
    chosen = select_device(device)
    rows = [row for row, _ in zip(load_examples(data, 512), range(limit or 10**9), strict=False)]
    prompts, references = evaluation.prompts_and_references(rows)
    network = load_causal_lm(model).to(chosen)
    run = RunFolder(out or Path("runs/abkd/evaluate"))
    settings = {"model": model, "data": data, "metric": metric, "rows": len(rows), "seed": seed}
    settings |= {"max_new_tokens": max_new_tokens, "temperature": temperature}
    run.write_config("abkd evaluate", settings, distributions=["abkd", "transformers"])
    answers = evaluation.generate(
        network, load_tokenizer(model), prompts, max_new_tokens=max_new_tokens,
        batch_size=batch_size, temperature=temperature, seed=seed,
    )  # fmt: skip
    scores = scores_of[metric](answers, references)
    for prompt, answer, score in zip(prompts, answers, scores, strict=True):
        run.log(prompt=prompt, answer=answer, score=score)
    mean = sum(scores) / len(scores)
    spread = sum((s - mean) ** 2 for s in scores) / max(len(scores) - 1, 1)
    metrics = {
        metric: mean,
        "standard_error": math.sqrt(spread / len(scores)) if len(scores) > 1 else None,
        "rows": len(scores),
    }
    run.write_metrics(metrics)
    show_result(metrics, f"{format_table([metrics])}\n\n{run.path}: log.jsonl", as_json=as_json)


@command(app)
def presets(as_json: Json = False) -> None:
    """List the runs of the paper, with their settings and what is reported of them."""
    from abkd.presets import PRESETS

    described = {name: preset.describe() for name, preset in PRESETS.items()}
    columns = ("task", "student", "alpha", "beta", "temperature", "kd_weight", "ce_weight", "lr")
    rows = [{"preset": name, **{c: d[c] for c in columns}} for name, d in described.items()]
    show_result(described, format_table(rows), as_json=as_json)


@command(app)
def bench(
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens of a batch.", min=1)] = 192,
    classes: Annotated[int, typer.Option("--classes", help="Vocabulary.", min=2)] = 50257,
    width: Annotated[int, typer.Option("--width", help="Hidden size of both.", min=1)] = 64,
    repeats: Annotated[int, typer.Option("--repeats", help="Timed rounds.", min=1)] = 5,
    out: Out = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Time the losses beside a plain restatement of the formulas, and measure their memory."""
    from abkd.bench import measure_losses
    from shared_core.device import select_device
    from shared_core.run import RunFolder

    found = measure_losses(tokens, classes, width, repeats=repeats, device=select_device(device))
    if out is not None:
        run = RunFolder(out)
        run.write_config("abkd bench", {"tokens": tokens, "classes": classes, "width": width})
        run.write_metrics({}, timing=found)
    rows = [
        {
            "loss": name,
            "ms": round(1000 * entry["seconds"], 1),
            "peak MiB": round(entry["peak_bytes"] / 2**20) if entry["peak_bytes"] else None,
        }
        for name, entry in found["losses"].items()
    ]
    show_result(found, format_table(rows), as_json=as_json)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return run_app(app, argv)


if __name__ == "__main__":
    raise SystemExit(main())

"""The command line: parses, calls, prints."""

from pathlib import Path
from typing import Annotated, Any

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
    """Three students that are too small for their teachers: a table, a language model, digits.

    The table shows what α and β do on a grid, whose best cell is chosen on other seeds than it is
    reported on; a small Llama teaches a smaller one; a network teaches a 16-unit one. Nothing is
    downloaded. --quick takes a coarser grid, fewer steps and one seed of the language part.
    """
    import time
    from dataclasses import asdict

    import torch

    from abkd import demo as the_demo
    from abkd import demo_digits, demo_language
    from shared_core.device import select_device
    from shared_core.run import RunFolder, progress

    if select_device(device).type != "cpu":
        raise InputError("the demo's models are tiny and run on the CPU; leave --device out")
    grid = the_demo.GRID[::2] if quick else the_demo.GRID
    settings = the_demo.DemoSettings(steps=100 if quick else 200)
    language = demo_language.LanguageSettings()
    if quick:
        language = demo_language.LanguageSettings(
            teacher_width=64, teacher_steps=120, init_steps=20, steps=40, held_out=32
        )
    run = RunFolder(out or Path("runs/abkd/demo"))
    run.write_config(
        "abkd demo",
        {"seed": seed, "seeds": seeds, "grid": grid, **asdict(settings), **asdict(language)},
        distributions=["abkd"],
    )
    started = time.perf_counter()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        cells = [(a, b) for a in grid for b in grid]
        tuning_seeds = range(seed + 1000, seed + (1001 if quick else 1002))
        tuning = [
            the_demo.run_seed(one, cells, settings)
            for one in progress(tuning_seeds, description="table, tuning seeds", unit="seed")
        ]
        best = the_demo.best_cell(tuning, cells)
        pairs = list(dict.fromkeys([*the_demo.NAMED.values(), best]))
        results = []
        for one in progress(range(seed, seed + seeds), description="table", unit="seed"):
            results.append(the_demo.run_seed(one, pairs, settings))
            run.log(step=one, best=float(results[-1]["total variation"][pairs.index(best)]))
        say("language: a teacher, then five students a seed")
        spoken = demo_language.run_language(
            list(range(seed, seed + (1 if quick else seeds))), language
        )
        say("digits")
        seen = demo_digits.run_digits(
            list(range(seed, seed + (3 if quick else 10))), steps=60 if quick else 150
        )
    finally:
        torch.set_num_threads(threads)
    summary = the_demo.summarize(results, pairs)
    rows = the_demo.table(summary)
    told = [
        the_demo.tell(summary, results, pairs, best),
        demo_language.tell_language(spoken),
        demo_digits.tell_digits(seen),
    ]
    pictures = []
    if plots:
        say("drawing")
        drawn = the_demo.figures(tuning, cells, grid, results, pairs)
        drawn["language"] = the_demo.language_figure(spoken)
        for name, figure in drawn.items():
            pictures.append(run.save_figure(name, figure).name)
    metrics = {
        "divergences": summary,
        "best_cell": best,
        "seeds": list(range(seed, seed + seeds)),
        "tuning_seeds": list(tuning_seeds),
        "language": spoken,
        "digits": seen,
        "summary": {
            "message": " ".join(told),
            "rows": rows,
            "picture": "heatmap.png" if plots else None,
        },
    }
    run.write_metrics(metrics, timing={"seconds": time.perf_counter() - started})
    tables = [
        format_table(rows),
        *(
            format_table([{"method": name, **{k: _rounded(v, 3) for k, v in row.items()}}
                          for name, row in part["rows"].items()])
            for part in (spoken, seen)
        ),
    ]  # fmt: skip
    parts = [f"{table}\n\n{message}" for table, message in zip(tables, told, strict=True)]
    text = "\n\n".join([*parts, f"{run.path}: metrics.json"])
    show_result(metrics, ", ".join([text, *pictures]), as_json=as_json)


@command(app)
def train(
    preset: Annotated[
        str | None, typer.Option("--preset", help="A run of the paper, such as gpt2-small-dolly.")
    ] = None,
    task: Annotated[
        str, typer.Option("--task", help="language, vision or clip; a preset knows its own.")
    ] = "language",
    student: Annotated[
        str | None,
        typer.Option("--student", help="Hub id or folder; vision: resnet20, …; clip: ViT-B-16."),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option("--teacher", help="Likewise; none with data of abkd capture."),
    ] = None,
    student_weights: Annotated[
        str | None, typer.Option("--student-weights", help="Clip: a tag of open_clip or a file.")
    ] = None,
    teacher_weights: Annotated[
        str | None, typer.Option("--teacher-weights", help="Vision: a file; clip: a tag or a file.")
    ] = None,
    criterion: Annotated[
        str | None, typer.Option("--criterion", help="Vision: ab, kd, dkd, lsd or ttm.")
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
    depth: Annotated[
        int | None, typer.Option("--depth", help="Clip: blocks with learned prompts.", min=1)
    ] = None,
    pretrain_data: Annotated[
        str | None, typer.Option("--pretrain-data", help="Plain text mixed in, named like --data.")
    ] = None,
    pretrain_weight: Annotated[
        float | None, typer.Option("--pretrain-weight", help="Weight of its cross-entropy.", min=0)
    ] = None,
    on_policy_fraction: Annotated[
        float | None,
        typer.Option(
            "--on-policy-fraction", help="Micro-batches with responses of the student's own."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", help="Length of such a response.", min=1)
    ] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Mixed precision.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    resume: Resume = False,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Distil a causal language model, a classifier or a CLIP tower, from a preset or your settings.

    Options override the preset; those of another task are refused. Several GPUs: accelerate launch
    --config_file FILE -m abkd.cli train … with a file of abkd presets --launch, or torchrun.

    Example: abkd train --student Qwen/Qwen2.5-0.5B --teacher Qwen/Qwen2.5-7B --data my.jsonl

    Example: abkd train --task vision --student resnet20 --teacher resnet56 --teacher-weights
    runs/teacher/student.safetensors --data uoft-cs/cifar100
    """
    from dataclasses import asdict

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
        "pretrain_data": pretrain_data,
        "pretrain_weight": pretrain_weight,
        "on_policy_fraction": on_policy_fraction,
        "max_new_tokens": max_new_tokens,
        "student_weights": student_weights,
        "teacher_weights": teacher_weights,
        "criterion": criterion,
        "depth": depth,
        "bf16": bf16 or None,
        "seed": seed,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    settings, run_training = _plan(preset, task, changes)
    chosen = select_device(device)
    if dry_run:
        plan = asdict(settings)
        show_result(plan, "\n".join(f"{k:20} {v}" for k, v in plan.items()), as_json=as_json)
        return
    folder = out or Path(f"runs/abkd/train-{preset or Path(settings.student).name}")
    metrics = run_training(settings, folder, chosen.type, resume=resume)
    if "history" in metrics:
        rows = [{k: _rounded(v) for k, v in metrics.items() if k != "history"}]
    else:
        rows = [
            {"": when, **{n: _rounded(v) for n, v in metrics[when].items() if n != "step"}}
            for when in ("first", "last")
        ]
    show_result(
        {"out": str(folder), **metrics}, f"{format_table(rows)}\n\n{folder}", as_json=as_json
    )


def _rounded(value: Any, digits: int = 4) -> Any:
    return round(value, digits) if isinstance(value, float) else value


def _plan(preset: str | None, task: str, changes: dict[str, Any]) -> tuple[Any, Any]:
    """The settings of a run and the function that runs it."""
    from abkd.classifier import VisionSettings, train_classifier
    from abkd.clip import CLIPSettings, train_clip
    from abkd.presets import get_preset
    from abkd.train import TrainSettings
    from abkd.train import train as train_language

    found = None if preset is None else get_preset(preset)
    task = task if found is None else found.task
    kinds: dict[str, tuple[Any, Any]] = {
        "language": (TrainSettings, train_language),
        "vision": (VisionSettings, train_classifier),
        "clip": (CLIPSettings, train_clip),
    }
    if task not in kinds:
        raise InputError(f"--task is {task!r}; accepted: {', '.join(kinds)}")
    kind, function = kinds[task]
    for name in changes:
        if name not in kind.__dataclass_fields__:
            raise InputError(f"--{name.replace('_', '-')} has no part in a run of {task}")
    if task != "language" and "epochs" in changes:
        if changes["epochs"] != int(changes["epochs"]):
            raise InputError(f"--epochs is {changes['epochs']}; here it is a whole number")
        changes["epochs"] = int(changes["epochs"])
    if preset is not None and task == "language":
        return kind.from_preset(preset, **changes), function
    if found is not None:
        return kind.from_preset(found, **changes), function
    needed = ("student", "teacher", "data") if task == "clip" else ("student", "data")
    if any(name not in changes for name in needed):
        raise InputError("say what to train: --preset NAME, or --student … --teacher … --data …")
    return kind(**{"teacher": None, **changes}), function


@command(app)
def heatmap(
    student: Annotated[str, typer.Option("--student", help="Hub id or folder.")],
    teacher: Annotated[str, typer.Option("--teacher", help="Hub id or folder.")],
    data: Annotated[str, typer.Option("--data", help="pydoc, a file or folder, or a hub id.")],
    sums: Annotated[str, typer.Option("--sums", help="Values of α + β.")] = "0.9,1.0,1.1,1.2",
    alpha_step: Annotated[float, typer.Option("--alpha-step", help="Step of α.")] = 0.1,
    metric: Annotated[
        str, typer.Option("--metric", help="ce, fkl, rkl, tv, agreement or rouge_l.")
    ] = "ce",
    rounds: Annotated[
        int, typer.Option("--rounds", help="Rounds; each twice as long, with fewer cells.", min=1)
    ] = 3,
    keep: Annotated[float, typer.Option("--keep", help="Share of cells that goes on.")] = 0.25,
    max_steps: Annotated[
        int, typer.Option("--max-steps", help="Steps of a run of the first round.", min=1)
    ] = 50,
    validation: Annotated[
        str | None,
        typer.Option("--validation", help="Held-out data.  [default: every tenth row]"),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", help="Held-out rows to use.", min=1)] = 64,
    lr: Annotated[float, typer.Option("--lr", help="Learning rate.")] = 5e-5,
    batch_size: Annotated[
        int, typer.Option("--batch-size", help="Examples of a micro-batch.", min=1)
    ] = 8,
    accumulation: Annotated[
        int, typer.Option("--accumulation", help="Micro-batches of a step.", min=1)
    ] = 1,
    max_length: Annotated[
        int, typer.Option("--max-length", help="Tokens of an example.", min=2)
    ] = 512,
    bf16: Annotated[bool, typer.Option("--bf16", help="Mixed precision.")] = False,
    resume: Resume = False,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
    plots: Plots = True,
) -> None:
    """Choose α and β for your task: short runs on a grid, the better ones run longer.

    All runs start from the same weights and see the same batches; held-out rows decide.

    Example: abkd heatmap --student gpt2 --teacher gpt2-xl --data my.jsonl --max-steps 50
    """
    from abkd import heatmap as the_heatmap
    from abkd.train import TrainSettings
    from shared_core.device import select_device
    from shared_core.run import RunFolder

    try:
        values = tuple(float(part) for part in sums.split(","))
    except ValueError as error:
        raise InputError(
            f"--sums is {sums!r}; pass numbers with commas, such as 0.9,1.0"
        ) from error
    search = the_heatmap.Search(values, alpha_step, metric, rounds, keep, validation, limit)
    settings = TrainSettings(
        student, teacher, data, max_steps=max_steps, lr=lr, batch_size=batch_size,
        accumulation=accumulation, max_length=max_length, bf16=bf16, seed=seed,
    )  # fmt: skip
    chosen = select_device(device)
    folder = out or Path("runs/abkd/heatmap")
    metrics = the_heatmap.heatmap(settings, search, folder, chosen.type, resume=resume)
    if plots:
        RunFolder(folder, resume=True).save_figure("heatmap", the_heatmap.figure(metrics))
    last = [c for c in metrics["cells"] if c["round"] == rounds - 1]
    last.sort(key=lambda c: search.better(c[metric]))
    rows = [{k: _rounded(v) for k, v in cell.items()} for cell in last[:8]]
    best = metrics["best"]
    text = f"{format_table(rows)}\n\nbest by {metric}: α={best['alpha']:g}, β={best['beta']:g}"
    show_result({"out": str(folder), **metrics}, f"{text}\n{folder}", as_json=as_json)


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
    seeds: Annotated[
        int, typer.Option("--seeds", help="Answers drawn for each row, a seed each.", min=1)
    ] = 1,
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
    settings |= {"max_new_tokens": max_new_tokens, "temperature": temperature, "seeds": seeds}
    run.write_config("abkd evaluate", settings, distributions=["abkd", "transformers"])
    tokenizer = load_tokenizer(model)
    sums = [0.0] * len(rows)
    of_seeds = []
    for one in range(seed, seed + seeds):
        answers = evaluation.generate(
            network, tokenizer, prompts, max_new_tokens=max_new_tokens,
            batch_size=batch_size, temperature=temperature, seed=one,
        )  # fmt: skip
        scores = scores_of[metric](answers, references)
        of_seeds.append(sum(scores) / len(scores))
        sums = [total + score for total, score in zip(sums, scores, strict=True)]
        for prompt, answer, score in zip(prompts, answers, scores, strict=True):
            run.log(seed=one, prompt=prompt, answer=answer, score=score)
    means = [total / seeds for total in sums]
    mean = sum(means) / len(means)
    spread = sum((s - mean) ** 2 for s in means) / max(len(means) - 1, 1)
    metrics: dict[str, Any] = {
        metric: mean,
        "standard_error": math.sqrt(spread / len(means)) if len(means) > 1 else None,
        "rows": len(means),
    }
    if seeds > 1:
        metrics["of_seeds"] = of_seeds
    run.write_metrics(metrics)
    show_result(metrics, f"{format_table([metrics])}\n\n{run.path}: log.jsonl", as_json=as_json)


@command(app)
def presets(
    launch: Annotated[
        bool, typer.Option("--launch", help="List the launch files for accelerate instead.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the runs of the paper, with their settings and what is reported of them."""
    from abkd.presets import PRESETS, launch_files

    if launch:
        files = {name: str(path) for name, path in launch_files().items()}
        rows = [{"launch": name, "file": path} for name, path in files.items()]
        show_result(files, format_table(rows), as_json=as_json)
        return

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
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Time the losses beside a plain restatement of the formulas, and measure their memory.

    TRL and Liger-Kernel run beside them where they are installed.
    """
    from abkd.bench import measure_losses
    from shared_core.device import select_device
    from shared_core.run import RunFolder

    found = measure_losses(
        tokens, classes, width, repeats=repeats, seed=seed, device=select_device(device)
    )
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

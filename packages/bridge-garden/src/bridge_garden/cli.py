"""The command line: parses, calls, prints."""

import math
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
    "bridge-garden",
    "Hybrid hard- and soft-label distillation of language models, and measures of exposure bias "
    "(Wang et al., ICML 2026). Begin with: bridge-garden demo",
)

Student = Annotated[str, typer.Option("--student", help="Hub id or folder of the student.")]
Teacher = Annotated[str, typer.Option("--teacher", help="Hub id or folder of the teacher.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]


@command(app)
def demo(
    seeds: Annotated[int, typer.Option("--seeds", help="Number of seeds.", min=1)] = 5,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            help="Some of soft,hard,static,confidence,entropy,curriculum,risk, by commas.",
        ),
    ] = None,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: Json = False,
    quick: Quick = False,
    plots: Plots = True,
) -> None:
    """Distil an exactly known teacher by every method; measure exposure bias and κ.

    Nothing is downloaded. The students are tiny, so this always runs on the CPU. About two minutes;
    --quick takes two seeds and four methods.
    """
    import time
    from dataclasses import asdict

    from bridge_garden import demo as the_demo
    from bridge_garden.ledger import Ledger
    from shared_core.run import RunFolder, progress

    if device not in ("auto", "cpu"):
        raise InputError(f"--device {device}: the demo's students are tiny and run on the cpu")
    default = the_demo.QUICK if quick else the_demo.DEFAULT
    names = list(default)
    if methods is not None:
        names = [m.strip() for m in methods.split(",") if m.strip()]
    settings = the_demo.DemoSettings()
    count = min(seeds, 2) if quick else seeds
    run = RunFolder(out or Path("runs/bridge-garden/demo"))
    run.write_config(
        "bridge-garden demo",
        {"seed": seed, "seeds": count, "methods": names, **asdict(settings)},
        distributions=["bridge-garden", "abkd"],
    )
    started = time.perf_counter()
    results = []
    with progress(total=count * len(names), description="students", unit="student") as bar:
        for one in range(seed, seed + count):
            found = the_demo.run_seed(one, names, settings, progress=lambda _: bar.update())
            results.append(found)
            for name, result in found.items():
                run.log(step=one, method=name, **result.exposure.to_dict())
    say("exact κ")
    picture = the_demo.kappa_picture(seed)
    entropy = the_demo.garden_entropy(Ledger(rounds=settings.rounds))
    summary = the_demo.summarize(results)
    rows, message = the_demo.table(summary), the_demo.tell(summary, entropy)
    pictures = []
    if plots:
        say("drawing")
        for name, figure in the_demo.figures(results, picture, entropy).items():
            pictures.append(run.save_figure(name, figure).name)
    metrics = {
        "methods": summary,
        "teacher_garden_entropy": entropy,
        "kappa": asdict(picture),
        "seeds": list(range(seed, seed + count)),
        "summary": {
            "message": message,
            "rows": rows,
            "picture": "comparison.png" if plots else None,
        },
    }
    run.write_metrics(metrics, timing={"seconds": time.perf_counter() - started})
    text = f"{format_table(rows)}\n\n{message}\n\n{run.path}: metrics.json"
    show_result(metrics, ", ".join([text, *pictures]), as_json=as_json)


@command(app)
def train(
    preset: Annotated[
        str | None, typer.Option("--preset", help="A pair of the paper, such as qwen2.5-7b-3b.")
    ] = None,
    teacher: Annotated[str | None, typer.Option("--teacher", help="Hub id or folder.")] = None,
    student: Annotated[str | None, typer.Option("--student", help="Hub id or folder.")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", help="A .jsonl with prompt and completion (or messages, text), or a hub id."
        ),
    ] = None,
    weight: Annotated[
        str | None,
        typer.Option(
            "--weight",
            help="λ: confidence[:label], entropy[:power], static:0.2, curriculum:0.5, soft, hard, "
            "wsl, reversed-NAME, NAME*NAME.",
        ),
    ] = None,
    hard_labels: Annotated[
        str | None,
        typer.Option("--hard-labels", help="teacher_argmax, labels or both_agree."),
    ] = None,
    divergence: Annotated[
        str | None, typer.Option("--divergence", help="Of the soft term: fkl, rkl, jsd, tv, ….")
    ] = None,
    risk_alpha: Annotated[
        float | None, typer.Option("--risk-alpha", help="α of the risk-guided hard label.")
    ] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Learning rate.")] = None,
    epochs: Annotated[float | None, typer.Option("--epochs", help="Passes over the data.")] = None,
    max_steps: Annotated[
        int | None, typer.Option("--max-steps", help="Optimizer steps, instead of epochs.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Per device.")] = None,
    accumulation: Annotated[
        int | None, typer.Option("--accumulation", help="Micro-batches per step.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option("--max-length", help="Longer rows are cut.")
    ] = None,
    lora_r: Annotated[
        int | None, typer.Option("--lora-r", help="Rank of LoRA adapters; 0 trains everything.")
    ] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Mixed precision.")] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, a third more time.")
    ] = False,
    save_steps: Annotated[
        int | None, typer.Option("--save-steps", help="Steps between checkpoints.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    resume: Resume = False,
    out: Out = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of every draw.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Distil a teacher into a student with the hybrid loss, on your data.

    Options override the preset. Several GPUs: accelerate launch -m bridge_garden.cli train …

    Example: bridge-garden train --teacher T --student S --data rows.jsonl --weight confidence
    """
    from dataclasses import asdict

    from bridge_garden.presets import get_preset
    from bridge_garden.train import TrainSettings
    from bridge_garden.train import train as run_training
    from shared_core.device import select_device
    from shared_core.run import RunFolder

    chosen = select_device(device)
    changes: dict[str, Any] = {
        "teacher": teacher,
        "student": student,
        "data": data,
        "weight": weight,
        "hard_labels": hard_labels,
        "divergence": divergence,
        "risk_alpha": risk_alpha,
        "lr": lr,
        "epochs": epochs,
        "max_steps": max_steps,
        "batch_size": batch_size,
        "accumulation": accumulation,
        "max_length": max_length,
        "lora_r": lora_r,
        "bf16": bf16 or None,
        "gradient_checkpointing": gradient_checkpointing or None,
        "save_steps": save_steps,
        "seed": seed,
    }
    assumed: tuple[str, ...] = ()
    if preset is not None:
        found = get_preset(preset)
        assumed = found.assumed
        if dry_run and data is None:
            changes["data"] = "(not stated by the paper: pass --data)"
        settings = TrainSettings.from_preset(found, **changes)
    else:
        given = {"teacher": "", "student": "", "data": ""}
        given.update({k: v for k, v in changes.items() if v is not None})
        settings = TrainSettings(**given)  # type: ignore[arg-type]
    if dry_run:
        plan = {**asdict(settings), "assumed": list(assumed)}
        lines = [f"{k:>24}  {v}" for k, v in asdict(settings).items()]
        lines += [f"{'assumed':>24}  {a}" for a in assumed]
        show_result(plan, "\n".join(lines), as_json=as_json)
        return
    run = RunFolder(
        out or Path(f"runs/bridge-garden/train-{preset or Path(settings.student).name}"),
        resume=resume,
    )
    metrics = run_training(settings, run, chosen, resume=resume)
    rows = [{k: round(v, 4) if isinstance(v, float) else v for k, v in metrics.items()}]
    show_result(metrics, f"{format_table(rows)}\n\n{run.path}/student", as_json=as_json)


def _pair(student: str, teacher: str, device: str, dtype: str) -> tuple[Any, Any, Any, Any]:
    from bridge_garden.models import load_model, load_tokenizer
    from shared_core.device import select_device, select_dtype

    chosen = select_device(device)
    kind = select_dtype(dtype, chosen)
    tokenizer = load_tokenizer(student)
    return load_model(student, chosen, kind), load_model(teacher, chosen, kind), tokenizer, chosen


@command(app)
def exposure(
    student: Student,
    teacher: Teacher,
    data: Annotated[
        str,
        typer.Option(
            "--data", help="A .jsonl with prompt, a .txt with a prompt a line, or a hub id."
        ),
    ],
    prompts: Annotated[int, typer.Option("--prompts", help="At most so many.", min=1)] = 64,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", help="Length of the rollouts.", min=1)
    ] = 64,
    n_rollouts: Annotated[int, typer.Option("--rollouts", help="Per prompt.", min=1)] = 1,
    divergence: Annotated[str, typer.Option("--divergence", help="fkl, rkl, jsd, tv, ….")] = "fkl",
    batch_size: Annotated[int, typer.Option("--batch-size", help="Rollouts at once.", min=1)] = 16,
    dtype: Dtype = "auto",
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
    plots: Plots = True,
) -> None:
    """Split a student's error into training fit and exposure bias, from rollouts of both models."""
    import abkd
    from bridge_garden.exposure import exposure_bias
    from bridge_garden.models import encode, read_rows
    from bridge_garden.plots import plot_positions
    from shared_core.run import RunFolder

    rows = read_rows(data, limit=prompts)
    s, t, tokenizer, chosen = _pair(student, teacher, device, dtype)
    texts = [next((str(r[k]) for k in ("prompt", "question", "text") if k in r), "") for r in rows]
    report = exposure_bias(
        s,
        t,
        [encode(tokenizer, text) for text in texts],
        max_new_tokens=max_new_tokens,
        n_rollouts=n_rollouts,
        divergence=divergence,
        batch_size=batch_size,
        seed=seed,
        eos_token_id=tokenizer.eos_token_id,
        vocab=abkd.align_vocab(s, t, tokenizer),
        device=chosen,
    )
    run = RunFolder(out or Path("runs/bridge-garden/exposure"))
    run.write_config(
        "bridge-garden exposure",
        {"student": student, "teacher": teacher, "data": data, "seed": seed},
        distributions=["bridge-garden", "transformers"],
    )
    run.write_metrics(report.to_dict())
    if plots:
        run.save_figure("positions", plot_positions({Path(student).name: report}))
    table = [
        {
            "": name,
            "nats per token": f"{value:.4f}",
            "standard error": f"{error:.4f}" if math.isfinite(error) else None,
        }
        for name, value, error in (
            ("training fit", report.fit, report.fit_error),
            ("inference error", report.inference, report.inference_error),
            ("exposure bias", report.bias, report.bias_error),
        )
    ]
    show_result(report.to_dict(), f"{format_table(table)}\n\n{run.path}", as_json=as_json)


@command(app)
def kappa(
    text: Annotated[str, typer.Argument(help="The text to colour.")],
    student: Student,
    teacher: Teacher,
    n_alternatives: Annotated[
        int, typer.Option("--alternatives", help="Tokens tried, of either kind.", min=1)
    ] = 4,
    horizon: Annotated[int, typer.Option("--horizon", help="Tokens that follow.", min=1)] = 64,
    n_rollouts: Annotated[int, typer.Option("--rollouts", help="Of each.", min=1)] = 8,
    dtype: Dtype = "auto",
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Colour the tokens of a text by κ, what a wrong token there costs later, and by λ."""
    import html

    import abkd
    from bridge_garden.kappa_mc import kappa_mc
    from bridge_garden.models import encode
    from bridge_garden.plots import plot_strip, strip_html
    from shared_core.run import RunFolder, atomic_path

    s, t, tokenizer, chosen = _pair(student, teacher, device, dtype)
    ids = encode(tokenizer, text)
    found = kappa_mc(
        s,
        t,
        ids,
        n_alternatives=n_alternatives,
        horizon=horizon,
        n_rollouts=n_rollouts,
        seed=seed,
        eos_token_id=tokenizer.eos_token_id,
        vocab=abkd.align_vocab(s, t, tokenizer),
        device=chosen,
    )
    tokens = [tokenizer.decode([i]) for i in ids]
    scores, weights = [math.nan] * len(ids), [math.nan] * len(ids)
    for entry in found:
        scores[entry.position], weights[entry.position] = entry.score, entry.weight
    run = RunFolder(out or Path("runs/bridge-garden/kappa"))
    run.write_config(
        "bridge-garden kappa",
        {"text": text, "student": student, "teacher": teacher, "horizon": horizon, "seed": seed},
        distributions=["bridge-garden", "transformers"],
    )
    metrics = {"tokens": tokens, "ids": ids, "positions": [e.to_dict() for e in found]}
    run.write_metrics(metrics)
    run.save_figure("kappa", plot_strip(tokens, scores, "bridge score: mean κ of the alternatives"))
    run.save_figure("weight", plot_strip(tokens, weights, "λ = 1 - max π_T"))
    with atomic_path(run.path / "kappa.html") as temporary:
        page = strip_html([html.escape(token) for token in tokens], scores)
        temporary.write_text(page, encoding="utf-8")
    rows = [
        {"position": e.position, "token": repr(tokens[e.position])}
        | {"score": f"{e.score:.3f}", "λ": f"{e.weight:.3f}"}
        for e in sorted(found, key=lambda e: -e.score)[:10]
    ]
    text_out = f"{format_table(rows)}\n\n{run.path}: kappa.png, weight.png, kappa.html"
    show_result(metrics, text_out, as_json=as_json)


@command(app)
def cost(
    student: Annotated[float, typer.Option("--student-parameters", help="Such as 3e9.")] = 3e9,
    teacher: Annotated[float, typer.Option("--teacher-parameters", help="Such as 7e9.")] = 7e9,
    batch: Annotated[int, typer.Option("--batch-size", help="Sequences per device.")] = 4,
    prompt: Annotated[int, typer.Option("--prompt", help="Tokens of a prompt.")] = 256,
    response: Annotated[int, typer.Option("--response", help="Tokens of a response.")] = 512,
    flops: Annotated[float, typer.Option("--flops", help="Achieved operations/s.")] = 400e12,
    bandwidth: Annotated[float, typer.Option("--bandwidth", help="Achieved bytes/s.")] = 3e12,
    as_json: Json = False,
) -> None:
    """Estimate a step's cost off-policy and on-policy, and show where the ratio comes from."""
    from bridge_garden.cost import cost_account

    found = cost_account(
        student,
        teacher,
        batch=batch,
        prompt=prompt,
        response=response,
        flops=flops,
        bandwidth=bandwidth,
    ).to_dict()
    rows = [
        {"part": k.replace("_", " "), "": f"{v:.3f}" + ("" if k == "ratio" else " s")}
        for k, v in found.items()
    ]
    show_result(found, format_table(rows), as_json=as_json)


@command(app)
def presets(as_json: Json = False) -> None:
    """List the pairs of the paper, with settings, reported numbers and what is assumed."""
    from bridge_garden.presets import PRESETS

    described = {name: preset.describe() for name, preset in PRESETS.items()}
    rows = [
        {
            "preset": name,
            "teacher": p.teacher,
            "student": p.student,
            "weight": p.weight,
            "assumed": "; ".join(p.assumed),
        }
        for name, p in PRESETS.items()
    ]
    show_result(described, format_table(rows), as_json=as_json)


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    return run_app(app, argv)


if __name__ == "__main__":
    raise SystemExit(main())

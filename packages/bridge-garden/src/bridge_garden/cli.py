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
            help="By commas, some of soft,hard,sampled,static,confidence,entropy,curriculum,risk,"
            "rkl,jsd,on-policy.",
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
    from bridge_garden import demo as the_demo
    from shared_core.run import RunFolder

    if device not in ("auto", "cpu"):
        raise InputError(f"--device {device}: the demo's students are tiny and run on the cpu")
    names = list(the_demo.QUICK if quick else the_demo.DEFAULT)
    if methods is not None:
        names = [m.strip() for m in methods.split(",") if m.strip()]
    run = RunFolder(out or Path("runs/bridge-garden/demo"))
    metrics, pictures = the_demo.run_demo(
        run, names, range(seed, seed + (min(seeds, 2) if quick else seeds)), plots=plots
    )
    rows, message = metrics["summary"]["rows"], metrics["summary"]["message"]
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
    nonfinite: Annotated[
        str | None,
        typer.Option("--nonfinite", help="raise, or skip and count micro-batches without a loss."),
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

    Options override the preset. Several GPUs: accelerate launch --config_file FILE -m
    bridge_garden.cli train …, with a file of bridge-garden presets --launch. Without --teacher,
    --data is a folder that bridge-garden capture wrote.

    Example: bridge-garden train --teacher T --student S --data rows.jsonl --weight confidence
    """
    from dataclasses import asdict

    from bridge_garden.train import plan_training
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
        "nonfinite": nonfinite,
        "on_policy_fraction": on_policy_fraction,
        "max_new_tokens": max_new_tokens,
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
    settings, assumed = plan_training(preset, changes, dry_run=dry_run)
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
    from bridge_garden.models import encode, load_pair, prompt_of, read_rows
    from bridge_garden.plots import plot_positions
    from shared_core.run import RunFolder

    rows = read_rows(data, limit=prompts)
    s, t, tokenizer, chosen = load_pair(student, teacher, device, dtype)
    report = exposure_bias(
        s,
        t,
        [encode(tokenizer, prompt_of(row)) for row in rows],
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
    import abkd
    from bridge_garden.kappa_mc import kappa_mc
    from bridge_garden.models import encode, load_pair
    from bridge_garden.plots import save_strip
    from shared_core.run import RunFolder

    s, t, tokenizer, chosen = load_pair(student, teacher, device, dtype)
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
    save_strip(run, "kappa", tokens, scores, "bridge score: mean κ of the alternatives")
    save_strip(run, "weight", tokens, weights, "λ = 1 - max π_T")
    rows = [
        {"position": e.position, "token": repr(tokens[e.position])}
        | {"score": f"{e.score:.3f}", "λ": f"{e.weight:.3f}"}
        for e in sorted(found, key=lambda e: -e.score)[:10]
    ]
    text_out = f"{format_table(rows)}\n\n{run.path}: kappa.png, weight.png, kappa.html"
    show_result(metrics, text_out, as_json=as_json)


@command(app)
def annotate(
    text: Annotated[str | None, typer.Argument(help="The text; by default a sentence.")] = None,
    teacher: Annotated[
        str | None,
        typer.Option("--teacher", help="Hub id or folder; by default a small one is trained here."),
    ] = None,
    student: Annotated[
        str | None, typer.Option("--student", help="For wsl, whose λ looks at the student.")
    ] = None,
    weight: Annotated[
        str, typer.Option("--weight", help="λ; as in bridge-garden train.")
    ] = "confidence",
    dtype: Dtype = "auto",
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Colour the tokens of a text by λ: bridges pale (hard labels), gardens dark (soft labels).

    Without --teacher, a Llama of two layers is first trained on Python's documentation, which
    takes about half a minute and downloads nothing.
    """
    from bridge_garden.annotate import annotate as weights_of
    from bridge_garden.models import encode, load_model, load_tokenizer
    from bridge_garden.plots import save_strip
    from bridge_garden.small_teacher import SENTENCE, small_teacher
    from bridge_garden.weights import weight_from_string
    from shared_core.device import select_device, select_dtype
    from shared_core.run import RunFolder

    chosen = select_device(device)
    kind = select_dtype(dtype, chosen)
    found_weight = weight_from_string(weight)
    if teacher is None:
        model, tokenizer = small_teacher(seed=seed)
        model = model.to(chosen)
    else:
        model, tokenizer = load_model(teacher, chosen, kind), load_tokenizer(teacher)
    other = None if student is None else load_model(student, chosen, kind)
    text = text or SENTENCE
    ids = encode(tokenizer, text)
    found = weights_of(model, ids, student=other, weight=found_weight, device=chosen)
    run = RunFolder(out or Path("runs/bridge-garden/annotate"))
    run.write_config(
        "bridge-garden annotate",
        {"text": text, "teacher": teacher, "student": student, "weight": weight, "seed": seed},
        distributions=["bridge-garden", "transformers"],
    )
    tokens = [tokenizer.decode([i]) for i in ids]
    metrics = {"tokens": tokens, "weight": weight, "positions": found.to_dict()}
    run.write_metrics(metrics)
    save_strip(run, "annotate", tokens, [math.nan, *found.weight], f"λ ({weight})")
    rows = [
        {"token": repr(tokens[i + 1]), "λ": f"{lam:.3f}"}
        | {"teacher's token": repr(tokenizer.decode([found.argmax[i]]))}
        | {"its probability": f"{found.max_prob[i]:.3f}"}
        for i, lam in enumerate(found.weight)
    ]
    text_out = f"{format_table(rows)}\n\n{run.path}: annotate.png, annotate.html"
    show_result(metrics, text_out, as_json=as_json)


@command(app)
def capture(
    teacher: Teacher,
    data: Annotated[str, typer.Option("--data", help="As in bridge-garden train.")],
    k: Annotated[int, typer.Option("--k", help="Tokens to keep at each position.", min=1)] = 64,
    max_length: Annotated[
        int, typer.Option("--max-length", help="Longer rows are cut.", min=2)
    ] = 2048,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Rows at once.", min=1)] = 8,
    dtype: Dtype = "auto",
    resume: Resume = False,
    out: Out = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Write down a teacher's most probable tokens, to train from without it.

    Then: bridge-garden train --student … --data FOLDER, without --teacher.
    """
    import abkd
    from abkd.capture import capture_topk
    from abkd.data import tokenize_dataset
    from bridge_garden.models import load_model, load_tokenizer, read_rows
    from shared_core.device import select_device, select_dtype

    chosen = select_device(device)
    rows = read_rows(data)
    tokenizer = load_tokenizer(teacher)
    model = load_model(teacher, chosen, select_dtype(dtype, chosen))
    vocab = abkd.align_vocab(model, model, tokenizer)
    folder = out or Path("runs/bridge-garden/capture")
    tokenized = tokenize_dataset(rows, tokenizer, max_length)
    count = capture_topk(
        model, tokenized, folder, k=k, vocab=vocab, batch_size=batch_size, resume=resume
    )
    told = f"{count} rows with the top {k} of {vocab} tokens: {folder}"
    show_result({"out": str(folder), "rows": count, "k": k, "vocab": vocab}, told, as_json=as_json)


@command(app)
def evaluate(
    model: Annotated[str, typer.Option("--model", help="Hub id or folder of the model.")],
    data: Annotated[
        str,
        typer.Option(
            "--data", help="A .jsonl with question and answer (or prompt, completion), or a hub id."
        ),
    ],
    limit: Annotated[
        int | None, typer.Option("--limit", help="Rows, from the first on.", min=1)
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", help="Length of an answer.", min=1)
    ] = 256,
    temperature: Annotated[
        float, typer.Option("--temperature", help="Of sampling; 0 is greedy.", min=0)
    ] = 0.0,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Rows at once.", min=1)] = 8,
    dtype: Dtype = "auto",
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Let a model answer questions and compare final numbers, as for GSM8K."""
    from bridge_garden.evaluate import evaluate_answers
    from bridge_garden.models import load_model, load_tokenizer, read_rows
    from shared_core.device import select_device, select_dtype
    from shared_core.run import RunFolder

    chosen = select_device(device)
    rows = read_rows(data, limit=limit)
    tokenizer = load_tokenizer(model)
    network = load_model(model, chosen, select_dtype(dtype, chosen))
    run = RunFolder(out or Path("runs/bridge-garden/evaluate"))
    run.write_config(
        "bridge-garden evaluate",
        {"model": model, "data": data, "limit": limit, "seed": seed}
        | {"max_new_tokens": max_new_tokens, "temperature": temperature},
        distributions=["bridge-garden", "abkd", "transformers"],
    )
    metrics, lines = evaluate_answers(
        network,
        tokenizer,
        rows,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        batch_size=batch_size,
        seed=seed,
    )
    for line in lines:
        run.log(**line)
    run.write_metrics(metrics)
    show_result(metrics, f"{format_table([metrics])}\n\n{run.path}: log.jsonl", as_json=as_json)


@command(app)
def bench(
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens of a batch.", min=2)] = 128,
    classes: Annotated[int, typer.Option("--classes", help="Vocabulary.", min=2)] = 50_000,
    width: Annotated[int, typer.Option("--width", help="Hidden size of both.", min=1)] = 128,
    chunk_size: Annotated[
        int | None, typer.Option("--chunk-size", help="Tokens at once; by default chosen.", min=1)
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", help="Timed rounds.", min=1)] = 5,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Time the hybrid loss beside soft labels alone and a plain restatement; measure memory."""
    from bridge_garden.bench import measure_losses
    from shared_core.device import select_device
    from shared_core.run import RunFolder

    found = measure_losses(
        tokens, classes, width, repeats=repeats, seed=seed, chunk_size=chunk_size or "auto",
        device=select_device(device),
    )  # fmt: skip
    if out is not None:
        run = RunFolder(out)
        run.write_config(
            "bridge-garden bench", {"tokens": tokens, "classes": classes, "width": width}
        )
        run.write_metrics({}, timing=found)
    rows = [
        {"loss": name, "ms": f"{1000 * seconds:.1f}"}
        | {"peak MiB": round(found["peak_bytes"][name] / 2**20)}
        for name, seconds in found["seconds"].items()
    ]
    show_result(found, format_table(rows), as_json=as_json)


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
def presets(
    launch: Annotated[
        bool, typer.Option("--launch", help="List the launch files for accelerate instead.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the pairs of the paper, with settings, reported numbers and what is assumed."""
    from abkd.presets import launch_files
    from bridge_garden.presets import PRESETS

    if launch:
        files = {name: str(path) for name, path in launch_files().items()}
        table = [{"launch": name, "file": path} for name, path in files.items()]
        show_result(files, format_table(table), as_json=as_json)
        return

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

"""The command line: parses, calls, prints."""

from pathlib import Path
from typing import Annotated, Any

import typer

from gmsa import _options as o
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
    "gmsa",
    "Context compression for language models by group merging and layer semantic alignment "
    "(Tang et al., 2025). Begin with: gmsa demo",
)


@command(app)
def demo(
    seeds: Annotated[int, typer.Option("--seeds", help="Number of seeds.", min=1)] = 3,
    processes: Annotated[
        int | None,
        typer.Option("--processes", help="Trained at a time.  [default: 2, or 1 core]", min=1),
    ] = None,
    resume: Resume = False,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: Json = False,
    quick: Quick = False,
    plots: Plots = True,
) -> None:
    """Train both stages on a tiny language of facts, beside truncation, pooling and memory tokens.

    Nothing is downloaded; it runs on the CPU, about two minutes on two cores. --quick takes one
    seed, fewer steps and no ablations. The folder then holds what the other commands need to be
    tried: base/, compressor/, train.jsonl and test.jsonl.
    """
    import time

    from gmsa import demo as the_demo
    from gmsa.bench import latency_figure
    from shared_core.device import select_device
    from shared_core.run import RunFolder

    if select_device(device).type != "cpu":
        raise InputError("the demo's model is too small for a GPU; use --device cpu")
    run = RunFolder(out or Path("runs/gmsa/demo"), resume=resume)
    started = time.perf_counter()
    found = the_demo.run_all(run, seed, seeds, quick=quick, processes=processes)
    clock = found["latency"]
    pictures = []
    if plots:
        say("drawing")
        drawn = [*the_demo.figures(found["results"], found["rate"])]
        drawn.append(("latency", latency_figure(clock)))
        pictures = [run.save_figure(name, figure).name for name, figure in drawn]
    metrics = {
        "seeds": found["numbers"],
        "example": found["example"],
        "summary": {
            "message": found["message"],
            "rows": found["rows"],
            "picture": pictures[0] if pictures else None,
        },
    }
    run.write_metrics(metrics, timing={"seconds": time.perf_counter() - started, "latency": clock})
    example = "\n".join(f"{k}: {v}" for k, v in found["example"].items())
    text = "\n\n".join(
        [
            format_table(found["rows"]),
            found["message"],
            example,
            format_table(clock),
            ", ".join([f"{run.path}: metrics.json", *pictures]),
        ]
    )
    show_result(metrics, text, as_json=as_json)


def _train(
    stage: str, preset: str | None, device: str, out: Path | None, resume: bool, dry_run: bool,
    plots: bool, as_json: bool, **given: Any,
) -> None:  # fmt: skip
    """What both training commands do."""
    from dataclasses import asdict

    from gmsa.rates import parse_rates
    from gmsa.train import curve, settings_from
    from gmsa.train import train as run_training
    from shared_core.device import select_device
    from shared_core.run import RunFolder

    if given["rates"] is not None:
        given["rates"] = tuple(parse_rates(given["rates"]))
    settings = settings_from(given, stage, preset)
    place = select_device(device)
    if dry_run:
        plan = asdict(settings)
        show_result(plan, "\n".join(f"{k:20} {v}" for k, v in plan.items()), as_json=as_json)
        return
    name = "train-ae" if stage == "autoencoding" else "train-keft"
    folder = out or Path(f"runs/gmsa/{name}")
    found = run_training(settings, folder, place, resume=resume)
    history = found.pop("history")
    if not found.pop("first_process"):
        return
    if plots and history:
        RunFolder(folder, resume=True).save_figure("training", curve(history))
    rows = [
        {"": when, **{k: round(found[when][k], 4) for k in ("step", "loss", "token_accuracy")}}
        for when in ("first", "last")
        if found[when]
    ]
    where = f"{folder}: model/, metrics.json, log.jsonl"
    show_result({"out": str(folder), **found}, f"{format_table(rows)}\n\n{where}", as_json=as_json)


@command(app, "train-ae")
def train_ae(
    preset: o.Preset = None, model: o.Model = None, train_file: o.TrainFile = None,
    rates: o.TrainRates = None, rate_sampling: o.Sampling = None, encoder_layers: o.Layers = None,
    lsa_layers: o.LsaLayers = None, alignment: o.Alignment = None, lsa_init: o.LsaInit = None,
    merging: o.Merging = None, memory_tokens: o.MemoryTokens = None, lora_r: o.LoraR = None,
    restate_instruction: o.Instruction = None, steps: o.Steps = None, lr: o.Lr = None,
    batch_size: o.TrainBatch = None, accumulation: o.Accumulation = None,
    max_length: o.MaxLength = None, save_steps: o.SaveSteps = None, dtype: o.TrainDtype = None,
    attn: o.TrainAttn = None, checkpointing: o.Checkpointing = None, report_to: o.ReportTo = None,
    dry_run: o.DryRun = False, resume: Resume = False, out: Out = None, seed: o.StageSeed = None,
    device: Device = "auto", as_json: Json = False, plots: Plots = True,
) -> None:  # fmt: skip
    """First stage: encoder LoRA and alignment learn to restate contexts through a frozen decoder.

    Options override the preset. Several GPUs: accelerate launch --config_file FILE -m gmsa.cli
    train-ae …, with a file of gmsa info --launch. The loss may lie on a plateau for long.

    Example: gmsa train-ae --model Qwen/Qwen3-0.6B --train-file texts.jsonl --rates 4,8
    """
    given = {k: v for k, v in locals().items() if k not in _FRAME}
    _train("autoencoding", preset, device, out, resume, dry_run, plots, as_json, **given)


@command(app, "train-keft")
def train_keft(
    preset: o.Preset = None, model: o.Model = None, train_file: o.TrainFile = None,
    decoder_tuning: Annotated[
        str | None, typer.Option("--decoder-tuning", help="full or lora.  [default: full]")
    ] = None,
    decoder_lora_r: Annotated[
        int | None, typer.Option("--decoder-lora-r", help="Its rank.  [default: 64]", min=1)
    ] = None,
    rates: o.TrainRates = None, rate_sampling: o.Sampling = None, encoder_layers: o.Layers = None,
    lsa_layers: o.LsaLayers = None, alignment: o.Alignment = None, lsa_init: o.LsaInit = None,
    merging: o.Merging = None, memory_tokens: o.MemoryTokens = None, lora_r: o.LoraR = None,
    steps: o.Steps = None, lr: o.Lr = None, batch_size: o.TrainBatch = None,
    accumulation: o.Accumulation = None,
    max_length: o.MaxLength = None, save_steps: o.SaveSteps = None, dtype: o.TrainDtype = None,
    attn: o.TrainAttn = None, checkpointing: o.Checkpointing = None, report_to: o.ReportTo = None,
    dry_run: o.DryRun = False, resume: Resume = False, out: Out = None, seed: o.StageSeed = None,
    device: Device = "auto", as_json: Json = False, plots: Plots = True,
) -> None:  # fmt: skip
    """Second stage: the decoder learns to answer questions from soft tokens.

    --model is what train-ae left (its folder model/). With a plain language model instead there
    was no autoencoding stage: the paper's ablation; then --merging embeddings --alignment none is
    pooling, and with --rates 1 the whole prompt with a tuned decoder.

    Example: gmsa train-keft --model runs/gmsa/train-ae/model --train-file qa.jsonl
    """
    given = {k: v for k, v in locals().items() if k not in _FRAME}
    _train("keft", preset, device, out, resume, dry_run, plots, as_json, **given)


# Options of the frame rather than settings of a stage.
_FRAME = {"preset", "device", "out", "resume", "dry_run", "plots", "as_json"}


@command(app)
def compress(
    checkpoint: o.Checkpoint,
    texts: Annotated[
        list[Path],
        typer.Argument(help="Text files, one document each; or JSON lines with id and input."),
    ],
    store: Annotated[
        Path | None, typer.Option("--store", help="Folder of the store.  [default: OUT/store]")
    ] = None,
    rate: o.Rate = 4,
    chunk_size: Annotated[
        int | None, typer.Option("--chunk-size", help="Tokens at a time, exactly.", min=1)
    ] = None,
    num_shards: Annotated[
        int, typer.Option("--num-shards", help="Parts that processes divide up.", min=1)
    ] = 1,
    shard_id: Annotated[int, typer.Option("--shard-id", help="Which part, from 0.", min=0)] = 0,
    store_dtype: Annotated[str, typer.Option("--store-dtype", help="Of the store.")] = "bfloat16",
    batch_size: o.Batch = 8,
    base_model: o.Base = None,
    dtype: o.Dtype = "auto",
    attn: o.Attn = "sdpa",
    resume: Resume = False,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Compress documents into a store on disk.

    A text file's name is its document's id; a line without "id" gets FILE:NUMBER. --resume leaves
    out documents that the store has. Several GPUs: a process each, with its own --shard-id and
    store.
    """
    from gmsa.compressor import open_compressor
    from gmsa.data import read_documents
    from gmsa.store import SoftTokenStore
    from shared_core.run import RunFolder

    if shard_id >= num_shards:
        raise InputError(f"--shard-id is {shard_id}; accepted: 0 to {num_shards - 1}")
    documents = read_documents(texts)
    run = RunFolder(out or Path("runs/gmsa/compress"))
    compressor = open_compressor(checkpoint, device, seed, dtype, attn, base_model)
    place = store or run.path / "store"
    opened = SoftTokenStore(place, compressor, dtype=store_dtype)
    wanted = list(documents)[shard_id::num_shards]
    new = [name for name in wanted if not (resume and name in opened)]
    settings = {"checkpoint": checkpoint, "store": str(place), "rate": rate, "seed": seed,
                "num_shards": num_shards, "shard_id": shard_id}  # fmt: skip
    run.write_config("gmsa compress", settings, distributions=["gmsa", "transformers"])
    if new:
        opened.add(
            new, [documents[n] for n in new], rate, batch_size=batch_size, chunk_size=chunk_size
        )
    counts = [opened.lengths(name) for name in wanted]
    tokens, soft = (sum(c[i] for c in counts) for i in (0, 1))
    found = {"documents": len(opened), "added": len(new), "tokens": tokens, "soft_tokens": soft,
             "ratio": tokens / soft if soft else None, "store": str(place)}  # fmt: skip
    run.write_metrics(found)
    text = f"{place}: {len(opened)} documents, {len(new)} of them new; {tokens} tokens as {soft}"
    show_result(found, text, as_json=as_json)


@command(app)
def answer(
    checkpoint: o.Checkpoint,
    question: Annotated[list[str], typer.Argument(help="One question or several.")],
    context: Annotated[
        Path | None, typer.Option("--context", help="Text file to answer from.")
    ] = None,
    store: Annotated[
        Path | None, typer.Option("--store", help="Store to answer from, with --ids.")
    ] = None,
    ids: Annotated[
        str | None, typer.Option("--ids", help="Its documents, by commas, put in this order.")
    ] = None,
    rate: o.Rate = 4,
    max_new_tokens: o.NewTokens = 100,
    prompt_template: Annotated[
        str, typer.Option("--prompt-template", help="Around each question.")
    ] = "{prompt}",
    sample: Annotated[bool, typer.Option("--sample", help="Sample rather than greedy.")] = False,
    base_model: o.Base = None,
    dtype: o.Dtype = "auto",
    attn: o.Attn = "sdpa",
    resume: Resume = False,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Answer questions from a compressed text file, or from documents of a store."""
    from gmsa.compressor import open_compressor
    from gmsa.data import read_text
    from gmsa.evaluate import finish, predict
    from gmsa.soft_tokens import SoftTokens
    from gmsa.store import SoftTokenStore

    if (context is None) == (store is None) or (store is None) != (ids is None):
        raise InputError("say what to answer from: --context FILE, or --store FOLDER --ids A,B")
    text = None if context is None else read_text(context)
    compressor = open_compressor(checkpoint, device, seed, dtype, attn, base_model)
    if text is not None:
        soft = compressor.compress(text, rate)
    else:
        kept = SoftTokenStore(store or "", compressor).get((ids or "").split(","))
        soft = SoftTokens.cat(kept.unbatch())

    def make(some: list[int]) -> list[dict[str, Any]]:
        found = compressor.answer(
            [question[i] for i in some], soft, prompt_template=prompt_template,
            max_new_tokens=max_new_tokens, do_sample=sample,
        )  # fmt: skip
        return [
            {"question": question[i], "prediction": a} for i, a in zip(some, found, strict=True)
        ]

    settings = {"checkpoint": checkpoint, "questions": question, "context": str(context or store),
                "ids": ids, "rate": rate, "sample": sample, "seed": seed}  # fmt: skip
    rows = predict("answer", settings, out, len(question), make, resume=resume)
    kept_tokens, all_tokens = int(soft.lengths[0]), int(soft.n_tokens[0])
    found = {"answers": [row["prediction"] for row in rows], "origin_tokens": all_tokens,
             "compressed_tokens": kept_tokens, "ratio": float(soft.ratio[0])}  # fmt: skip
    finish(out, found)
    show_result(found, "\n".join(found["answers"]), as_json=as_json)  # type: ignore[arg-type]


@command(app)
def reconstruct(
    checkpoint: o.Checkpoint,
    texts: Annotated[list[Path], typer.Argument(help="Text files to compress and restate.")],
    rate: o.Rate = 4,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", help="[default: as many as there were]", min=1)
    ] = None,
    base_model: o.Base = None,
    dtype: o.Dtype = "auto",
    attn: o.Attn = "sdpa",
    resume: Resume = False,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Restate text files from their soft tokens, as a compressor can after its first stage."""
    from gmsa.compressor import open_compressor
    from gmsa.data import read_text
    from gmsa.evaluate import finish, predict

    contents = [read_text(path) for path in texts]
    compressor = open_compressor(checkpoint, device, seed, dtype, attn, base_model)

    def make(some: list[int]) -> list[dict[str, Any]]:
        return [
            {"file": str(texts[i]), "prediction": compressor.reconstruct(
                contents[i], rate, max_new_tokens=max_new_tokens)}
            for i in some
        ]  # fmt: skip

    settings = {"checkpoint": checkpoint, "files": [str(t) for t in texts], "rate": rate,
                "max_new_tokens": max_new_tokens, "seed": seed}  # fmt: skip
    rows = predict("reconstruct", settings, out, len(texts), make, resume=resume)
    found = {"texts": [row["prediction"] for row in rows]}
    finish(out, found)
    show_result(found, "\n".join(found["texts"]), as_json=as_json)


@command(app, "eval-qa")
def eval_qa(
    checkpoint: o.Checkpoint,
    eval_file: Annotated[
        Path, typer.Option("--eval-file", help="JSON lines with input, prompt, answer.")
    ],
    rates: o.Rates = "4,8",
    baselines: Annotated[
        str | None,
        typer.Option(
            "--baselines", help="full, closed-book, truncation, truncation-end, llmlingua2."
        ),
    ] = None,
    baseline_model: Annotated[
        str | None,
        typer.Option("--baseline-model", help="What answers there.  [default: the untuned base]"),
    ] = None,
    llmlingua2_model: Annotated[
        str | None, typer.Option("--llmlingua2-model", help="Hub id or folder of its classifier.")
    ] = None,
    limit: o.Limit = None,
    max_new_tokens: o.NewTokens = 100,
    official_generation: Annotated[
        bool, typer.Option("--official-generation", help="Repetition penalty 1.3, as the authors.")
    ] = False,
    prompt_template: Annotated[
        str, typer.Option("--prompt-template", help="Around a question after soft tokens.")
    ] = "{prompt}",
    baseline_template: Annotated[
        str, typer.Option("--baseline-template", help="Around context and question.")
    ] = "{context} {prompt}",
    batch_size: o.Batch = 8,
    base_model: o.Base = None,
    dtype: o.Dtype = "auto",
    attn: o.Attn = "sdpa",
    resume: Resume = False,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
    plots: Plots = True,
) -> None:
    """Score answers from compressed contexts: em, sub_em, f1 (best reference) and f1_first.

    The paper's table has EM above F1, which em and f1 cannot give: compare it with sub_em and
    f1_first.
    """
    from gmsa._backbone import load_causal_lm
    from gmsa.baselines import check_baselines
    from gmsa.compressor import open_compressor
    from gmsa.data import read_records
    from gmsa.evaluate import Predictions, evaluate_qa, qa_figure
    from gmsa.presets import OFFICIAL_GENERATION
    from gmsa.rates import parse_rates
    from shared_core.run import RunFolder

    records = read_records(eval_file)[:limit]
    wanted = parse_rates(rates)
    names = check_baselines(baselines)
    compressor = open_compressor(checkpoint, device, seed, dtype, attn, base_model)
    run = RunFolder(out or Path("runs/gmsa/eval-qa"))
    generation: dict[str, Any] = dict(OFFICIAL_GENERATION) if official_generation else {}
    generation["max_new_tokens"] = max_new_tokens
    settings = {
        "checkpoint": checkpoint, "eval_file": str(eval_file), "rates": wanted, "limit": limit,
        "baselines": names, "baseline_model": baseline_model, "generation": generation,
        "prompt_template": prompt_template, "baseline_template": baseline_template, "seed": seed,
    }  # fmt: skip
    predictions = Predictions(run.path, settings, resume=resume)
    run.write_config("gmsa eval-qa", settings, distributions=["gmsa", "transformers"])
    base = None
    if names:
        untuned = compressor.model.config.base_model_name_or_path
        place = compressor.model.get_input_embeddings().weight
        base = load_causal_lm(baseline_model or untuned, dtype=place.dtype).to(place.device)
    rows = evaluate_qa(
        compressor, records, wanted, predictions, baselines=names, base=base,
        batch_size=batch_size, prompt_template=prompt_template,
        baseline_template=baseline_template, llmlingua2_model=llmlingua2_model, **generation,
    )  # fmt: skip
    _show_scores(run, rows, ("em", "sub_em", "f1"), qa_figure, plots, as_json)


@command(app, "eval-recon")
def eval_recon(
    checkpoint: o.Checkpoint,
    eval_file: Annotated[
        Path, typer.Option("--eval-file", help="JSON lines with input, or a text a line.")
    ],
    rates: o.Rates = "4,8",
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="Only so many first tokens of each.", min=1)
    ] = None,
    metrics_extra: Annotated[
        bool, typer.Option("--texts/--no-texts", help="BLEU and ROUGE (extra metrics).")
    ] = True,
    bertscore_model: Annotated[
        str | None,
        typer.Option("--bertscore-model", help="Encoder of BERTScore, such as roberta-large."),
    ] = None,
    limit: o.Limit = None,
    batch_size: o.Batch = 8,
    base_model: o.Base = None,
    dtype: o.Dtype = "auto",
    attn: o.Attn = "sdpa",
    resume: Resume = False,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
    plots: Plots = True,
) -> None:
    """Score what is restated from soft tokens: prefix match, token accuracy, BLEU and ROUGE."""
    from gmsa.compressor import open_compressor
    from gmsa.data import read_records
    from gmsa.evaluate import Predictions, evaluate_reconstruction, qa_figure
    from gmsa.evaluation import text_metrics
    from gmsa.rates import parse_rates
    from shared_core.run import RunFolder

    records = read_records(eval_file, ("input",))[:limit]
    wanted = parse_rates(rates)
    if metrics_extra:
        text_metrics(["a"], ["a"])  # a missing library is told before the work
    compressor = open_compressor(checkpoint, device, seed, dtype, attn, base_model)
    run = RunFolder(out or Path("runs/gmsa/eval-recon"))
    settings = {"checkpoint": checkpoint, "eval_file": str(eval_file), "rates": wanted,
                "limit": limit, "max_tokens": max_tokens, "seed": seed}  # fmt: skip
    predictions = Predictions(run.path, settings, resume=resume)
    run.write_config("gmsa eval-recon", settings, distributions=["gmsa", "transformers"])
    rows = evaluate_reconstruction(
        compressor, records, wanted, predictions, max_tokens=max_tokens, batch_size=batch_size,
        libraries=metrics_extra, bertscore_model=bertscore_model,
    )  # fmt: skip
    _show_scores(run, rows, ("prefix_em", "token_acc"), qa_figure, plots, as_json)


def _show_scores(
    run: Any, rows: list[dict[str, Any]], keys: tuple[str, ...], draw: Any, plots: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Write and print a table of scores."""
    run.write_metrics({"rows": rows})
    if plots:
        run.save_figure("scores", draw(rows, keys))
    shown = [
        {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows
    ]
    text = f"{format_table(shown)}\n\n{run.path}: metrics.json, predictions.jsonl"
    show_result({"rows": rows}, text, as_json=as_json)


@command(app)
def bench(
    cases: Annotated[
        str,
        typer.Option(
            "--cases", help="Some of compress,merge,train,answer,store,stream, by commas."
        ),
    ] = "compress,merge,train,answer,store,stream",
    repeats: Annotated[int, typer.Option("--repeats", help="Timed rounds.", min=1)] = 5,
    resume: Resume = False,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
    plots: Plots = True,
) -> None:
    """Time and memory beside a pipeline in the authors' style and beside the full prompt.

    One thread on a CPU; medians of rounds taken in turns. --resume leaves out cases that are done.
    """
    from gmsa.bench import against_targets, check_cases, latency_figure, run_case
    from shared_core.device import seed_everything, select_device
    from shared_core.run import RunFolder, load_state, progress, save_state

    names = check_cases(cases)
    place = select_device(device)
    run = RunFolder(out or Path("runs/gmsa/bench"), resume=resume)
    settings = {"cases": names, "repeats": repeats, "device": str(place), "seed": seed}
    run.write_config("gmsa bench", settings, distributions=["gmsa", "transformers"])
    kept = run.path / run.CHECKPOINT
    results: dict[str, Any] = load_state(kept) if resume and kept.is_file() else {}
    for name in progress([n for n in names if n not in results], description="measuring"):
        seed_everything(seed)
        results[name] = run_case(name, place, repeats)
        save_state(kept, results)
    kept.unlink(missing_ok=True)
    if plots and "answer" in results:
        run.save_figure("latency", latency_figure(results["answer"]["rows"]))
    rows = against_targets(results)
    run.write_metrics({}, timing={"targets": rows, **results})
    text = f"{format_table(rows)}\n\n{run.path}: metrics.json"
    show_result({"targets": rows, **results}, text, as_json=as_json)


@command(app)
def info(
    what: Annotated[Path | None, typer.Argument(help="Folder of a checkpoint or a store.")] = None,
    launch: Annotated[
        str | None,
        typer.Option(
            "--launch",
            help="Print a file for accelerate launch: ddp, fsdp2, deepspeed-zero2 or "
            "deepspeed-zero3.",
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every document of a store.")
    ] = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """List the paper's presets, or say what a checkpoint or a store is.

    Example: gmsa info --launch fsdp2 > fsdp2.yaml
    """
    from gmsa.evaluate import finish
    from gmsa.inspection import describe, launch_file, list_presets

    if launch is not None:
        found: dict[str, Any] = {"launch": launch, "file": launch_file(launch)}
        text = found["file"].rstrip("\n")
    elif what is not None:
        found = describe(what, verify=verify)
        text = "\n".join(f"{k:20} {v}" for k, v in found.items())
    else:
        found, rows = list_presets()
        text = format_table(rows)
    finish(out, found)
    show_result(found, text, as_json=as_json)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_app(app, argv)


if __name__ == "__main__":
    raise SystemExit(main())

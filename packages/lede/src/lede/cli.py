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
    "lede",
    "Lossless self-speculative decoding with learned exits (LEDE). Begin with: lede demo",
)

Model = Annotated[str | None, typer.Option("--model", help="Folder or hub id.")]
PresetName = Annotated[str | None, typer.Option("--preset", help="Such as llama2-7b.")]
Exits = Annotated[str | None, typer.Option("--exit-layers", help="Candidates, by commas.")]
MaxDraft = Annotated[int, typer.Option("--max-draft", help="Longest draft.", min=1)]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", help="Tokens to generate.", min=1)]
ExperienceFolder = Annotated[Path, typer.Argument(help="Folder that lede collect wrote.")]
PromptSource = Annotated[
    str, typer.Argument(help="Text file, a prompt a line; or alpaca, humaneval, …, a hub id.")
]
PolicyName = Annotated[
    str | None, typer.Option("--policy", help="Folder or hub id of a trained policy.")
]
Samples = Annotated[int | None, typer.Option("--num-samples", help="Prompts to take.", min=1)]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="Compiled layers over a static cache (on CUDA: CUDA graphs); see the card.",
    ),
]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]


@command(app)
def demo(
    seeds: Annotated[int, typer.Option("--seeds", help="Number of seeds.", min=1)] = 2,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: Json = False,
    quick: Quick = False,
    plots: Plots = True,
) -> None:
    """Train a small early-exit model and its policy on mixed text; compare counted cost.

    Nothing is downloaded. --quick takes one seed, a smaller model and fewer prompts.
    """
    import time
    from dataclasses import asdict

    import torch

    from lede import demo as the_demo
    from lede.simulation import simulate
    from shared_core.device import select_device
    from shared_core.run import RunFolder, progress

    if select_device(device).type != "cpu":
        say("the demo's model is small: it runs on the CPU")
    settings = the_demo.QUICK if quick else the_demo.DemoSettings()
    count = 1 if quick else seeds
    run = RunFolder(out or Path("runs/lede/demo"))
    run.write_config(
        "lede demo",
        {"seed": seed, "seeds": count, **asdict(settings)},
        distributions=["lede", "transformers"],
    )
    began = time.perf_counter()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads slow matrices this small
    results = []
    try:
        total = count * settings.train_steps
        with progress(total=total, description="training the model", unit="step") as bar:
            for one in range(seed, seed + count):
                results.append(the_demo.run_seed(one, settings, tick=bar.update))
                run.log(step=one, speedups=results[-1].speedups)
        recipes = None
        if settings.plain:
            recipes = the_demo.compare_recipes(results[0].model, settings, seed)
    finally:
        torch.set_num_threads(threads)
    summary = the_demo.summarize(results)
    rows, message = the_demo.table(summary), the_demo.tell(results, summary, recipes)
    first = results[0]
    texts = [[chr(int(token)) for token in row] for row in first.test.tokens[:8]]
    rounds = simulate(first.test, first.choice.policy, first.cost).log
    _write_rounds(run, rounds, texts, settings.layers)
    metrics = the_demo.metrics(results, summary, recipes)
    metrics["summary"] = {
        "message": message,
        "rows": rows,
        "picture": "speedups.png" if plots else None,
    }
    run.write_metrics(metrics, timing={"seconds": time.perf_counter() - began})
    drawn = _draw(run) if plots else []
    text = f"{format_table(rows)}\n\n{message}\n\n{run.path}: metrics.json {' '.join(drawn)}"
    show_result(metrics, text, as_json=as_json)


def _write_rounds(run: Any, rounds: Any, texts: list[list[str]], depth: int) -> None:
    from shared_core.run import write_json

    log = [list(r) for r in rounds]
    write_json(run.path / "rounds.json", {"depth": depth, "rounds": log, "texts": texts})


def _draw(run: Any) -> list[str]:
    from lede.plots import draw_run

    return [run.save_figure(name, figure).name for name, figure in draw_run(run.path).items()]


@command(app)
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    model: Model = None,
    preset: PresetName = None,
    policy: PolicyName = None,
    exit_layers: Exits = None,
    num_draft: Annotated[int, typer.Option("--num-draft", help="Without --policy.", min=1)] = 6,
    max_draft: MaxDraft = 12,
    max_new_tokens: NewTokens = 128,
    temperature: Annotated[float, typer.Option("--temperature", help="0: greedy.", min=0)] = 0.0,
    compile: Compile = False,
    dtype: Dtype = "auto",
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Continue a text, with a trained policy or a static pair (the middle of --exit-layers).

    After 32 rounds with hardly an accepted draft it decodes plainly to the end.
    With --out the rounds are kept there, with pictures: where it exited, token by token.
    """
    from lede import QPolicy, SelfSpeculativeDecoder, StaticPolicy
    from lede._loading import load_model, parse_exits, tokenize
    from shared_core.device import seed_everything, select_device, select_dtype
    from shared_core.run import RunFolder

    chosen = select_device(device)
    seed_everything(seed)
    loaded, tokenizer, own = load_model(model, preset, select_dtype(dtype, chosen), chosen)
    exits = parse_exits(exit_layers, own)
    learned = QPolicy.from_pretrained(policy) if policy else None
    if learned is not None:
        exits, max_draft = list(learned.exits), learned.longest
    if not exits:
        raise InputError("say where to exit: --exit-layers 2,4, a --preset, or a --policy")
    decides = learned or StaticPolicy(exits[len(exits) // 2], min(num_draft, max_draft))
    decoder = SelfSpeculativeDecoder(
        loaded, exits, max_draft=max_draft, policy=decides, compile=compile, fallback_rounds=32
    )
    ids, mask = tokenize(tokenizer, [prompt])
    hot = {"do_sample": True, "temperature": temperature}
    settings: dict[str, Any] = hot if temperature else {"do_sample": False}
    found = decoder.generate(
        ids.to(chosen),
        attention_mask=mask.to(chosen),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        **settings,
    )
    text = tokenizer.decode(found.sequences[0], skip_special_tokens=True)
    say(
        f"{found.stats.tokens} tokens in {found.stats.rounds} rounds, "
        f"{found.stats.acceptance_rate:.0%} of drafts accepted"
    )
    metrics = {"text": text, "stats": found.stats.to_dict()}
    if out is not None:
        run = RunFolder(out)
        run.write_config("lede generate", {"prompt": prompt, "model": model, "policy": policy})
        pieces = [tokenizer.decode([t]) for t in found.sequences[0, ids.shape[1] :].tolist()]
        _write_rounds(run, found.stats.log, [pieces], decoder.runner.depth)
        run.write_metrics(metrics)
        _draw(run)
    show_result(metrics, text, as_json=as_json)


@command(app)
def collect(
    prompts: PromptSource,
    model: Model = None,
    preset: PresetName = None,
    exit_layers: Exits = None,
    max_draft: MaxDraft = 12,
    max_new_tokens: NewTokens = 128,
    num_samples: Samples = None,
    probe: Annotated[
        bool,
        typer.Option("--probe/--no-probe", help="Fit a probe on the first half of the prompts."),
    ] = True,
    probe_of: Annotated[
        Path | None, typer.Option("--probe-of", help="Take the probe of this experience instead.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure the cost here; else memory-bound.")
    ] = False,
    dtype: Dtype = "auto",
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Generate greedily from prompts and tabulate what every exit would have drafted.

    For a validation set, give other prompts and --probe-of the training experience. Under torchrun
    each process tabulates its share of the prompts.
    """
    import lede
    from lede._loading import collect_shares, load_decoder, load_experience
    from shared_core.parallel import launched
    from shared_core.run import RunFolder

    here = launched(device)
    decoder, tokenizer, ids, mask = load_decoder(
        prompts,
        num_samples,
        model,
        preset,
        exit_layers,
        max_draft,
        dtype,
        seed,
        here.device,
    )
    run = RunFolder(out or Path("runs/lede/collect"))
    settings = {"model": model, "preset": preset, "exits": decoder.exits, "max_draft": max_draft}
    if here.first:
        run.write_config(
            "lede collect",
            {**settings, "max_new_tokens": max_new_tokens, "probe": probe, "seed": seed},
            distributions=["lede", "transformers"],
        )
    common = {"max_new_tokens": max_new_tokens, "pad_token_id": tokenizer.pad_token_id}
    eye, first = None, 0
    if probe_of is not None:
        eye = load_experience(probe_of)[0].probe
    elif probe:
        first = len(ids) // 2
        if not first:
            raise InputError("a probe takes half of the prompts: give two or more, or --no-probe")
        eye = lede.fit_probe(decoder, ids[:first], attention_mask=mask[:first], seed=seed, **common)
    table = collect_shares(
        decoder, ids[first:], mask[first:], run.path, here.device, probe=eye, **common
    )
    if table is None:  # the first process has it
        return
    table.save(run.path / "experience.safetensors")
    cost = lede.calibrate(decoder) if calibrate else lede.CostModel.memory_bound(table.depth)
    cost.save(run.path / "cost.json")
    static, speedup = lede.best_static(table, cost)
    right = table.right.mean((0, 2)).tolist()
    metrics = {
        "texts": len(table),
        "tokens": int(table.lengths.sum()),
        "right_by_exit": dict(zip(map(str, decoder.exits), right, strict=True)),
        "best_static": {"policy": repr(static), "speedup": speedup},
    }
    run.write_metrics(metrics)
    text = f"{metrics['tokens']} tokens of {len(table)} texts; best static pair here: {static}, "
    show_result(metrics, f"{text}{speedup:.2f} times\n{run.path}", as_json=as_json)


@command(app, "train-policy")
def train_policy(
    experience: ExperienceFolder,
    validation: Annotated[
        Path | None, typer.Option("--validation", help="Experience of other prompts.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", help="Updates.", min=1)] = 2400,
    target: Annotated[
        str, typer.Option("--target", help="expected, returns or bootstrap.")
    ] = "expected",
    algo: Annotated[str, typer.Option("--algo", help="ddqn, cql or fqi.")] = "ddqn",
    out: Out = None,
    seed: Seed = 0,
    plots: Plots = True,
    as_json: Json = False,
) -> None:
    """Train a policy on collected experience; the best checkpoint and mode are saved.

    The mode (exit and length, length only, exit only) is chosen on the validation experience,
    beside the best static pair and threshold: it says so if one of these is faster.
    """
    import lede
    from lede._loading import load_experience
    from shared_core.run import RunFolder

    config = lede.TrainConfig(algo=algo, target=target, steps=steps, seed=seed)
    table, cost = load_experience(experience)
    held_out = load_experience(validation)[0] if validation else table
    run = RunFolder(out or Path("runs/lede/policy"))
    run.write_config(
        "lede train-policy",
        {"steps": steps, "target": target, "algo": algo, "seed": seed},
        distributions=["lede"],
    )
    result = lede.train_policy(table, cost, config, validation=held_out)
    choice = lede.choose_policy([result.policy], table, held_out, cost)
    on_held_out = {k: lede.simulate(held_out, p, cost).speedup for k, p in choice.best.items()}
    mode = max(("full", "draft_only", "exit_only"), key=lambda k: on_held_out[k])
    learned: Any = choice.best[mode]
    learned.save_pretrained(run.path)
    metrics = {
        "mode": mode,
        "speedup_on_training_texts": lede.simulate(table, learned, cost).speedup,
        "best_static_on_training_texts": lede.best_static(table, cost)[1],
        "validation": on_held_out,
        "fastest_on_validation": {"kind": choice.name, "policy": repr(choice.policy)},
        "history": result.history,
    }
    run.write_metrics(metrics)
    if plots and result.history:
        _draw(run)
    rows = [{"policy": k, "speedup": f"{v:.3f}"} for k, v in on_held_out.items()]
    text = f"{format_table(rows)}\n\nsaved: {mode}; fastest on validation: {choice.policy}"
    show_result(metrics, f"{text}\n{run.path}", as_json=as_json)


@command(app)
def simulate(
    experience: ExperienceFolder,
    policy: PolicyName = None,
    as_json: Json = False,
) -> None:
    """Replay policies on collected experience: counted speedup without running the model.

    The static pair and the threshold are the best on this very experience, the oracle knows it.
    """
    import lede
    from lede._loading import load_experience

    table, cost = load_experience(experience)
    entries: dict[str, Any] = {
        "best static pair": lede.best_static(table, cost)[0],
        "best threshold": lede.best_confidence(table, cost)[0],
        "DEL": lede.DELPolicy(),
        "oracle": lede.OraclePolicy(table, cost),
    }
    if policy:
        entries["LEDE"] = lede.QPolicy.from_pretrained(policy)
    rows = []
    for title, one in entries.items():
        found = lede.simulate(table, one, cost, keep_log=True)
        rows.append(
            {
                "policy": title,
                "speedup": round(found.speedup, 4),
                "accepted": round(found.acceptance_rate, 3),
                "mean exit": round(found.mean_exit_layer, 2),
            }
        )
    show_result({"policies": rows}, format_table(rows), as_json=as_json)


@command(app)
def sweep(
    prompts: PromptSource,
    model: Model = None,
    preset: PresetName = None,
    exit_layers: Exits = None,
    max_draft: MaxDraft = 12,
    max_new_tokens: NewTokens = 128,
    num_samples: Samples = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure the cost here; else memory-bound.")
    ] = False,
    dtype: Dtype = "auto",
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
    plots: Plots = True,
    as_json: Json = False,
) -> None:
    """Speedup of every static pair of exit and draft length, from one pass over the texts."""
    import lede
    from lede._loading import load_decoder
    from lede.bench import sweep_rows
    from lede.simulation import static_grid
    from shared_core.run import RunFolder

    decoder, tokenizer, ids, mask = load_decoder(
        prompts, num_samples, model, preset, exit_layers, max_draft, dtype, seed, device
    )
    run = RunFolder(out or Path("runs/lede/sweep"))
    settings = {"model": model, "preset": preset, "exits": decoder.exits, "max_draft": max_draft}
    run.write_config("lede sweep", {**settings, "seed": seed}, distributions=["lede"])
    table = lede.collect(
        decoder,
        ids,
        attention_mask=mask,
        mode="teacher",
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
    )
    cost = lede.calibrate(decoder) if calibrate else lede.CostModel.memory_bound(table.depth)
    grid = static_grid(table, cost)
    best, speedup = lede.best_static(table, cost)
    metrics = {
        "sweep": {"exits": table.exits, "grid": grid},
        "best": {"exit_layer": best.exit_layer, "num_draft": best.num_draft, "speedup": speedup},
    }
    run.write_metrics(metrics)
    if plots:
        _draw(run)
    text = f"{format_table(sweep_rows(table.exits, grid))}\n\nbest: {best}, {speedup:.2f} times"
    show_result(metrics, f"{text}\n{run.path}", as_json=as_json)


@command(app)
def bench(
    prompts: PromptSource,
    model: Model = None,
    preset: PresetName = None,
    policy: PolicyName = None,
    exit_layers: Exits = None,
    static: Annotated[
        str | None,
        typer.Option("--static", help="Exit and drafts, as 4,6; else the middle exit and 6."),
    ] = None,
    max_draft: MaxDraft = 12,
    max_new_tokens: NewTokens = 64,
    num_samples: Samples = None,
    repeats: Annotated[int, typer.Option("--repeats", help="Timed turns.", min=1)] = 3,
    compile: Compile = False,
    dtype: Dtype = "auto",
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
    plots: Plots = True,
    as_json: Json = False,
) -> None:
    """Time policies in real decoding, greedy, one prompt at a time, in turns.

    Beside plain generate: transformers' assistant_early_exit, our loop without drafts, a static
    pair, a threshold, and the trained --policy. With --compile all that is ours is compiled, the
    loop without drafts too. The interval is over prompts.
    """
    import lede
    from lede import bench as the_bench
    from lede._loading import load_decoder, parse_exits
    from shared_core.run import RunFolder

    learned = lede.QPolicy.from_pretrained(policy) if policy else None
    if learned is not None:
        exit_layers, max_draft = ",".join(map(str, learned.exits)), learned.longest
    what = (prompts, num_samples, model, preset, exit_layers, max_draft, dtype)
    decoder, tokenizer, ids, mask = load_decoder(*what, seed, device, compile=compile)
    pair = parse_exits(static, (decoder.exits[len(decoder.exits) // 2], min(6, max_draft)))
    if len(pair) != 2 or pair[0] not in decoder.exits or not 1 <= pair[1] <= max_draft:
        raise InputError(f"--static {static}; give an exit of {decoder.exits} and 1 to {max_draft}")
    common = {"max_new_tokens": max_new_tokens, "pad_token_id": tokenizer.pad_token_id}
    contenders = the_bench.usual_contenders(decoder, (pair[0], pair[1]), learned, **common)
    run = RunFolder(out or Path("runs/lede/bench"))
    settings = {"model": model, "preset": preset, "policy": policy, "repeats": repeats}
    run.write_config(
        "lede bench",
        {**settings, "compile": compile, "seed": seed},
        distributions=["lede", "transformers"],
    )
    if decoder.compiled is not None:
        say("compiling every segment and width")
        decoder.compiled.warm_up(1, ids.shape[1] + max_new_tokens)
    rows = [i[m > 0][None] for i, m in zip(ids, mask, strict=True)]
    device_used = decoder.runner.device
    found = the_bench.bench(contenders, rows, device_used, repeats=repeats, reference="generate")
    cost = lede.CostModel.memory_bound(decoder.runner.depth)
    policies = the_bench.speedups(found, "generate", cost)
    last = list(contenders)[-1]
    texts = [contenders["generate"](row)[0][0, row.shape[1] :].tolist() for row in rows[:8]]
    pieces = [[tokenizer.decode([t]) for t in text] for text in texts]
    _write_rounds(run, found[last].log, pieces, decoder.runner.depth)
    metrics = {"policies": policies, "lossless": all(p["same_tokens"] for p in policies.values())}
    run.write_metrics({**metrics, "speedup": "speedup over generate (wall clock)"})
    if plots:
        _draw(run)
    table = format_table(the_bench.bench_rows(policies))
    show_result(metrics, f"{table}\n\n{run.path}", as_json=as_json)


@command(app)
def plot(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    out: Annotated[Path | None, typer.Option("--out", help="Where to; else the folder.")] = None,
    as_json: Json = False,
) -> None:
    """Draw the pictures of a run folder again from its files."""
    from lede.plots import draw_run
    from shared_core.run import RunFolder

    figures = draw_run(run)
    target = RunFolder(out or run, resume=True)
    drawn = [str(target.save_figure(name, figure)) for name, figure in figures.items()]
    show_result({"pictures": drawn}, "\n".join(drawn), as_json=as_json)


@command(app, "train-exit")
def train_exit(
    model: Model = None,
    preset: PresetName = None,
    data: Annotated[
        str, typer.Option("--data", help="pydoc, a text file, or a file or hub id with texts.")
    ] = "pydoc",
    p_max: Annotated[float, typer.Option("--p-max", help="Dropout of the last layer.")] = 0.1,
    e_scale: Annotated[float, typer.Option("--e-scale", help="Weight of early losses.")] = 0.2,
    curriculum: Annotated[
        str, typer.Option("--curriculum", help="rotational, gradual or all.")
    ] = "rotational",
    rotation: Annotated[int, typer.Option("--rotation", help="Steps of a turn.", min=1)] = 4,
    steps: Annotated[int, typer.Option("--steps", help="Updates.", min=1)] = 500,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Windows.", min=1)] = 8,
    accumulation: Annotated[
        int, typer.Option("--accumulation", help="Micro-batches of a step.", min=1)
    ] = 1,
    length: Annotated[int, typer.Option("--length", help="Tokens of a window.", min=2)] = 256,
    lr: Annotated[float, typer.Option("--lr", help="Learning rate.")] = 2e-5,
    save_steps: Annotated[
        int, typer.Option("--save-steps", help="Steps between checkpoints.", min=1)
    ] = 100,
    bf16: Annotated[bool, typer.Option("--bf16", help="Mixed precision.")] = False,
    resume: Resume = False,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
    plots: Plots = True,
    as_json: Json = False,
) -> None:
    """Make a model exit early: layer dropout and a loss at every exit (LayerSkip's recipe).

    Leaves the model in OUT/model and says how well every layer predicts before and after. Several
    GPUs: torchrun --nproc-per-node 4 -m lede.cli train-exit …
    """
    from lede.presets import get_preset
    from lede.train import TrainExitSettings, quality_rows
    from lede.train import train_exit as run_training
    from shared_core.device import select_device

    name = model or (get_preset(preset).model if preset else None)
    if name is None:
        raise InputError("say which model: --model FOLDER or HUB-ID, or --preset NAME")
    settings = TrainExitSettings(
        name,
        data,
        p_max,
        e_scale,
        curriculum,
        rotation,
        steps=steps,
        batch_size=batch_size,
        accumulation=accumulation,
        length=length,
        lr=lr,
        save_steps=save_steps,
        bf16=bf16,
        seed=seed,
    )
    folder = out or Path("runs/lede/train-exit")
    metrics = run_training(settings, folder, select_device(device), resume=resume)
    if plots:
        from shared_core.run import RunFolder

        _draw(RunFolder(folder, resume=True))
    rows = quality_rows(metrics["exit_quality"])
    show_result(
        {"out": str(folder), **metrics}, f"{format_table(rows)}\n\n{folder}/model", as_json=as_json
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    return run_app(app, argv)


if __name__ == "__main__":
    raise SystemExit(main())

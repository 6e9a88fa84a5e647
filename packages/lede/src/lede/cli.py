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
    settings = the_demo.DemoSettings()
    if quick:
        settings = the_demo.DemoSettings(
            layers=6,
            exits=(1, 2, 3, 4),
            train_steps=110,
            prompts=(32, 16, 16),
            new_tokens=40,
            policy_steps=300,
        )
    count = 1 if quick else seeds
    run = RunFolder(out or Path("runs/lede/demo"))
    run.write_config(
        "lede demo",
        {"seed": seed, "seeds": count, **asdict(settings)},
        distributions=["lede", "transformers"],
    )
    began = time.perf_counter()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results = []
    try:
        total = count * settings.train_steps
        with progress(total=total, description="training the model", unit="step") as bar:
            for one in range(seed, seed + count):
                results.append(the_demo.run_seed(one, settings, tick=bar.update))
                run.log(step=one, speedups=results[-1].speedups)
    finally:
        torch.set_num_threads(threads)
    summary = the_demo.summarize(results)
    rows, message = the_demo.table(summary), the_demo.tell(results, summary)
    if plots:
        from lede import plots as drawing

        first = results[0]
        entries = {
            title: summary[kind]["values"]
            for kind, title in the_demo.TITLES.items()
            if kind in summary
        }
        rounds = simulate(first.test, first.choice.policy, first.cost).log
        run.save_figure("speedups", drawing.plot_speedups(entries))
        run.save_figure("training", drawing.plot_training(first.training[0].history))
        run.save_figure("exits", drawing.plot_exit_histogram(rounds, settings.layers))
        run.save_figure("segments", drawing.plot_segments(first.segments))
        run.save_figure(
            "heatmap",
            drawing.plot_exit_heatmap(list(first.test.tokens[:8]), rounds, chr, settings.layers),
        )
        run.save_figure(
            "acceptance",
            drawing.plot_speed_against_acceptance(
                {
                    the_demo.TITLES[k]: (d["acceptance"], first.speedups[k])
                    for k, d in first.details.items()
                }
            ),
        )
    metrics = {
        "policies": summary,
        "segments": [r.segments for r in results],
        "chosen": [r.choice.name for r in results],
        "tried": [r.choice.tried for r in results],
        "agreement_by_exit": [r.agreement for r in results],
        "predicted_on_training_prompts": [r.training[0].rho for r in results],
        "lossless": all(r.lossless for r in results),
        "summary": {
            "message": message,
            "rows": rows,
            "picture": "speedups.png" if plots else None,
        },
    }
    run.write_metrics(metrics, timing={"seconds": time.perf_counter() - began})
    text = f"{format_table(rows)}\n\n{message}\n\n{run.path}: metrics.json"
    show_result(metrics, text, as_json=as_json)


@command(app)
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    model: Model = None,
    preset: PresetName = None,
    policy: Annotated[
        str | None, typer.Option("--policy", help="Folder or hub id of a trained policy.")
    ] = None,
    exit_layers: Exits = None,
    num_draft: Annotated[int, typer.Option("--num-draft", help="Without --policy.", min=1)] = 6,
    max_draft: MaxDraft = 12,
    max_new_tokens: NewTokens = 128,
    temperature: Annotated[float, typer.Option("--temperature", help="0: greedy.", min=0)] = 0.0,
    dtype: Dtype = "auto",
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Continue a text, with a trained policy or a static pair (the middle of --exit-layers)."""
    from lede import QPolicy, SelfSpeculativeDecoder, StaticPolicy
    from lede._loading import load_model, tokenize
    from shared_core.device import seed_everything, select_device, select_dtype

    chosen = select_device(device)
    seed_everything(seed)
    loaded, tokenizer, own = load_model(model, preset, select_dtype(dtype, chosen), chosen)
    exits = _exits(exit_layers, own)
    learned = QPolicy.from_pretrained(policy) if policy else None
    if learned is not None:
        exits, max_draft = list(learned.exits), learned.longest
    if not exits:
        raise InputError("say where to exit: --exit-layers 2,4, a --preset, or a --policy")
    decides = learned or StaticPolicy(exits[len(exits) // 2], min(num_draft, max_draft))
    decoder = SelfSpeculativeDecoder(loaded, exits, max_draft=max_draft, policy=decides)
    ids, mask = tokenize(tokenizer, [prompt])
    settings: dict[str, Any] = {"do_sample": False}
    if temperature:
        settings = {"do_sample": True, "temperature": temperature}
    out = decoder.generate(
        ids.to(chosen),
        attention_mask=mask.to(chosen),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        **settings,
    )
    text = tokenizer.decode(out.sequences[0], skip_special_tokens=True)
    say(
        f"{out.stats.tokens} tokens in {out.stats.rounds} rounds, "
        f"{out.stats.acceptance_rate:.0%} of drafts accepted"
    )
    show_result({"text": text, "stats": out.stats.to_dict()}, text, as_json=as_json)


def _exits(given: str | None, own: tuple[int, ...] | None) -> list[int]:
    try:
        return [int(e) for e in given.split(",")] if given else list(own or [])
    except ValueError as error:
        raise InputError(f"--exit-layers {given}; give numbers, by commas") from error


@command(app)
def collect(
    prompts: Annotated[Path, typer.Argument(help="Text file, a prompt a line.")],
    model: Model = None,
    preset: PresetName = None,
    exit_layers: Exits = None,
    max_draft: MaxDraft = 12,
    max_new_tokens: NewTokens = 128,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure the cost here; else memory-bound.")
    ] = False,
    dtype: Dtype = "auto",
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Generate greedily from prompts and tabulate what every exit would have drafted."""
    import lede
    from lede._loading import load_model, tokenize
    from shared_core.device import seed_everything, select_device, select_dtype
    from shared_core.run import RunFolder

    chosen = select_device(device)
    seed_everything(seed)
    try:
        lines = [line for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{prompts} is not a readable text file ({error})") from error
    if not lines:
        raise InputError(f"{prompts} holds no prompt; write one a line")
    loaded, tokenizer, own = load_model(model, preset, select_dtype(dtype, chosen), chosen)
    exits = _exits(exit_layers, own)
    if not exits:
        raise InputError("say where to exit: --exit-layers 2,4 or a --preset")
    decoder = lede.SelfSpeculativeDecoder(loaded, exits, max_draft=max_draft)
    ids, mask = tokenize(tokenizer, lines)
    run = RunFolder(out or Path("runs/lede/collect"))
    settings = {"model": model, "preset": preset, "exits": exits, "max_draft": max_draft}
    run.write_config(
        "lede collect",
        {**settings, "max_new_tokens": max_new_tokens, "seed": seed},
        distributions=["lede", "transformers"],
    )
    table = lede.collect(
        decoder,
        ids.to(chosen),
        attention_mask=mask.to(chosen),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
    )
    table.save(run.path / "experience.safetensors")
    cost = lede.calibrate(decoder) if calibrate else lede.CostModel.memory_bound(table.depth)
    cost.save(run.path / "cost.json")
    static, speedup = lede.best_static(table, cost)
    metrics = {
        "texts": len(table),
        "tokens": int(table.lengths.sum()),
        "right_by_exit": dict(zip(map(str, exits), table.right.mean((0, 2)).tolist(), strict=True)),
        "best_static": {"policy": repr(static), "speedup": speedup},
    }
    run.write_metrics(metrics)
    text = f"{metrics['tokens']} tokens of {len(table)} texts; best static pair here: {static}, "
    show_result(metrics, f"{text}{speedup:.2f} times\n{run.path}", as_json=as_json)


def _experience(folder: Path) -> tuple[Any, Any]:
    from lede import CostModel, ExperienceTable

    table = ExperienceTable.load(folder / "experience.safetensors")
    return table, CostModel.load(folder / "cost.json")


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
    algo: Annotated[str, typer.Option("--algo", help="ddqn or cql.")] = "ddqn",
    out: Out = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train a policy on collected experience; the best checkpoint is saved in the folder."""
    import lede
    from shared_core.run import RunFolder

    config = lede.TrainConfig(algo=algo, target=target, steps=steps, seed=seed)
    table, cost = _experience(experience)
    held_out = _experience(validation)[0] if validation else None
    run = RunFolder(out or Path("runs/lede/policy"))
    run.write_config(
        "lede train-policy",
        {"steps": steps, "target": target, "algo": algo, "seed": seed},
        distributions=["lede"],
    )
    result = lede.train_policy(table, cost, config, validation=held_out)
    result.policy.save_pretrained(run.path)
    metrics = {
        "speedup_on_training_texts": result.rho,
        "best_static_on_training_texts": lede.best_static(table, cost)[1],
        "validation": max(value for value, _ in result.checkpoints),
        "history": result.history,
    }
    run.write_metrics(metrics)
    text = f"counted speedup on the training texts {result.rho:.2f}, best static pair "
    text += f"{metrics['best_static_on_training_texts']:.2f}\n{run.path}"
    show_result(metrics, text, as_json=as_json)


@command(app)
def simulate(
    experience: ExperienceFolder,
    policy: Annotated[
        str | None, typer.Option("--policy", help="Folder or hub id of a trained policy.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Replay policies on collected experience: counted speedup without running the model.

    The static pair and the threshold are the best on this very experience, the oracle knows it.
    """
    import lede

    table, cost = _experience(experience)
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


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    return run_app(app, argv)


if __name__ == "__main__":
    raise SystemExit(main())

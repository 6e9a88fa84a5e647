"""The command line: parses, calls, prints."""

import json
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
    "focal-sam",
    "Sharpness-aware training for long-tailed data: Focal-SAM (Li et al., ICML 2025), SAM, ASAM, "
    "ImbSAM and CC-SAM. Begin with: focal-sam demo",
)

# The columns of the demo's table that its summary keeps.
SHORT = ("method", "accuracy %", "vs SGD", "head", "tail")

Trained = Annotated[Path, typer.Argument(help="Folder of a finished training run.")]
Data = Annotated[str | None, typer.Option("--data", help="Where the images are now.")]
TestData = Annotated[str | None, typer.Option("--test-data", help="Where the test images are now.")]


def _groups(counts: list[int], few_below: int, many_above: int) -> dict[str, list[int]]:
    from shared_core.metrics import shot_groups

    found = shot_groups(counts, many=many_above, few=few_below)
    return {name: classes for name, classes in found.items() if classes}


def _round(values: dict[str, float], digits: int = 2) -> dict[str, float | None]:
    return {k: round(v, digits) if math.isfinite(v) else None for k, v in values.items()}


@command(app)
def demo(
    seeds: Annotated[int, typer.Option("--seeds", help="Number of seeds.", min=1)] = 5,
    methods: Annotated[
        str, typer.Option("--methods", help="Some of sgd,sam,imbsam,focal, by commas.")
    ] = "sgd,sam,imbsam,focal",
    imbalance_ratio: Annotated[
        float, typer.Option("--imbalance-ratio", help="Most frequent over rarest class.", min=1)
    ] = 20,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: Json = False,
    quick: Quick = False,
    plots: Plots = True,
) -> None:
    """Train on long-tailed handwritten digits and compare accuracy and sharpness by class group.

    Nothing is downloaded. Two minutes at most; --quick takes two seeds instead of five.
    """
    import time
    from dataclasses import asdict

    import torch

    from focal_sam import demo as the_demo
    from shared_core.device import select_device
    from shared_core.run import RunFolder, progress

    chosen = select_device(device)
    names = [m.strip() for m in methods.split(",") if m.strip()]
    settings = the_demo.DemoSettings(imbalance_ratio=imbalance_ratio)
    count = min(seeds, 2) if quick else seeds
    run = RunFolder(out or Path("runs/focal-sam/demo"))
    run.write_config(
        "focal-sam demo",
        {"seed": seed, "seeds": count, "methods": names, "device": str(chosen), **asdict(settings)},
        distributions=["focal-sam"],
    )
    started = time.perf_counter()
    # The network is small: a second thread would only get in the way.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results = []
    try:
        with progress(total=count * len(names), description="training", unit="model") as bar:
            for one in range(seed, seed + count):
                found = the_demo.run_seed(
                    one, names, settings, device=chosen, progress=lambda _: bar.update()
                )
                results.append(found)
                for name, result in found.items():
                    run.log(step=one, method=name, accuracy=result.overall)
    finally:
        torch.set_num_threads(threads)
    summary = the_demo.summarize(results)
    rows, message = the_demo.table(summary), the_demo.tell(summary, count)
    pictures = []
    if plots:
        say("drawing")
        for name, figure in the_demo.figures(results, seed, settings).items():
            pictures.append(run.save_figure(name, figure).name)
    metrics = {
        "methods": summary,
        "seeds": list(range(seed, seed + count)),
        "summary": {
            "message": message,
            "rows": [{c: row[c] for c in SHORT} for row in rows],
            "picture": "comparison.png" if plots else None,
        },
    }
    run.write_metrics(metrics, timing={"seconds": time.perf_counter() - started})
    text = f"{format_table(rows)}\n\n{message}\n\n{run.path}: metrics.json"
    show_result(metrics, ", ".join([text, *pictures]), as_json=as_json)


@command(app)
def train(
    preset: Annotated[
        str | None,
        typer.Option("--preset", help="A run of the paper, such as cifar100lt-resnet32."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help="digits, shapes, a folder, a parquet file, or a hub id."),
    ] = None,
    test_data: Annotated[
        str | None, typer.Option("--test-data", help="Test images, if not the split 'test'.")
    ] = None,
    train_list: Annotated[
        str | None, typer.Option("--train-list", help="File of 'path label' lines, under --data.")
    ] = None,
    test_list: Annotated[
        str | None, typer.Option("--test-list", help="The same of the test images.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="resnet32, resnet50, clip-vit-b16 or small_cnn."),
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", help="sgd, sam, asam, imbsam, ccsam or focal.")
    ] = None,
    loss: Annotated[
        str | None, typer.Option("--loss", help="ce, la, vs, ldam, focal or cb.")
    ] = None,
    drw: Annotated[
        bool, typer.Option("--drw", help="Re-weight classes in the last fifth of the epochs.")
    ] = False,
    transform: Annotated[
        str | None,
        typer.Option("--transform", help="cifar, imagenet-lt, inat2018, clip or none."),
    ] = None,
    imbalance_ratio: Annotated[
        float | None, typer.Option("--imbalance-ratio", help="Cut balanced data to a long tail.")
    ] = None,
    rho: Annotated[float | None, typer.Option("--rho", help="Radius of the perturbation.")] = None,
    gamma: Annotated[float | None, typer.Option("--gamma", help="Focal exponent.")] = None,
    lam: Annotated[float | None, typer.Option("--lam", help="Weight of the sharpness.")] = None,
    threshold: Annotated[
        int | None, typer.Option("--threshold", help="ImbSAM's tail: fewer images than this.")
    ] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Learning rate.")] = None,
    lr_schedule: Annotated[
        str | None, typer.Option("--lr-schedule", help="cosine or step.")
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option("--weight-decay", help="Weight decay.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Images per step, over all processes.")
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Passes over the data.")] = None,
    select: Annotated[
        str | None,
        typer.Option("--select", help="final, or best-val on images held out of training."),
    ] = None,
    few_below: Annotated[
        int | None, typer.Option("--few-below", help="Few-shot: fewer training images.")
    ] = None,
    many_above: Annotated[
        int | None, typer.Option("--many-above", help="Many-shot: more training images.")
    ] = None,
    workers: Annotated[int, typer.Option("--workers", help="Processes that load images.")] = 0,
    amp: Annotated[bool, typer.Option("--amp", help="Mixed precision.")] = False,
    fsdp: Annotated[bool, typer.Option("--fsdp", help="Shard parameters (with torchrun).")] = False,
    resume: Resume = False,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Train a classifier on long-tailed images, from a preset of the paper or from your settings.

    Options override the preset. Several GPUs: torchrun --nproc-per-node 4 -m focal_sam.cli train …

    Example: focal-sam train --preset cifar10lt-resnet32 --method focal
    """
    from focal_sam.train import TrainSettings
    from focal_sam.train import train as run_training
    from shared_core.device import select_device
    from shared_core.run import RunFolder

    chosen = select_device(device)
    changes = {
        "data": data,
        "test_data": test_data,
        "train_list": train_list,
        "test_list": test_list,
        "model": model,
        "method": method,
        "loss": loss,
        "drw": drw or None,
        "transform": transform,
        "imbalance_ratio": imbalance_ratio,
        "rho": rho,
        "gamma": gamma,
        "lam": lam,
        "threshold": threshold,
        "lr": lr,
        "lr_schedule": lr_schedule,
        "weight_decay": weight_decay,
        "batch_size": batch_size,
        "epochs": epochs,
        "select": select,
        "few_below": few_below,
        "many_above": many_above,
        "workers": workers,
        "amp": amp or None,
        "fsdp": fsdp or None,
        "seed": seed,
    }
    if preset is not None:
        settings = TrainSettings.from_preset(preset, **changes)
    elif data is None:
        raise InputError("say what to train on: --preset NAME, or --data digits|shapes|PATH|HUB-ID")
    else:
        settings = TrainSettings(**{k: v for k, v in changes.items() if v is not None})  # type: ignore[arg-type]
    run = RunFolder(
        out or Path(f"runs/focal-sam/train-{preset or Path(data or '').stem}-{settings.method}"),
        resume=resume,
    )
    accuracies = run_training(settings, run, chosen, resume=resume)
    rows = [{"method": settings.method, **_round(accuracies)}]
    summary = {"out": str(run.path), "test": accuracies}
    show_result(summary, f"{format_table(rows)}\n\n{run.path}", as_json=as_json)


@command(app, "eval")
def evaluate(
    folder: Trained,
    data: Data = None,
    test_data: TestData = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Test the model of a finished training run again, by class group."""
    from focal_sam.train import evaluate as run_evaluation
    from focal_sam.train import load_trained
    from shared_core.device import select_device

    chosen = select_device(device)
    model, images, settings = load_trained(folder, chosen, data=data, test_data=test_data)
    accuracies = run_evaluation(
        model,
        images.test,
        images.counts,
        few_below=settings.few_below,
        many_above=settings.many_above,
        device=chosen,
    )
    rows = [{"run": str(folder), **_round(accuracies)}]
    show_result({"test": accuracies}, format_table(rows), as_json=as_json)


def _training_batches(images: Any, settings: Any, limit: int) -> tuple[list[Any], Any]:
    """Up to `limit` training images in a few batches, and the training loss."""
    import torch
    from torch.utils.data import DataLoader, Subset

    from focal_sam.train import create_loss

    order = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(0))
    some = Subset(images.train, order[:limit].tolist())
    torch.manual_seed(0)  # the augmentation draws from the global generator
    batches = list(DataLoader(some, batch_size=256))
    return batches, create_loss(settings.loss, images.counts)


@command(app)
def sharpness(
    folder: Trained,
    rho: Annotated[float, typer.Option("--rho", help="Distance of the step.", min=0)] = 0.3,
    groups: Annotated[
        str, typer.Option("--groups", help="Some of many,medium,few, by commas.")
    ] = "many,medium,few",
    images: Annotated[
        int, typer.Option("--images", help="At most this many training images.", min=1)
    ] = 2000,
    out: Out = None,
    data: Data = None,
    test_data: TestData = None,
    device: Device = "auto",
    plots: Plots = True,
    as_json: Json = False,
) -> None:
    """Measure one-step sharpness and the largest Hessian eigenvalue of each class group."""
    from focal_sam.analysis import class_hessian_eigs, class_sharpness
    from focal_sam.plots import plot_sharpness_bars
    from focal_sam.train import load_trained
    from shared_core.device import select_device
    from shared_core.run import RunFolder

    chosen = select_device(device)
    model, found, settings = load_trained(folder, chosen, data=data, test_data=test_data)
    available = _groups(found.counts, settings.few_below, settings.many_above)
    wanted = [g.strip() for g in groups.split(",") if g.strip()]
    if not wanted or any(g not in ("many", "medium", "few") for g in wanted):
        raise InputError(f"--groups {groups}; accepted: many, medium, few, by commas")
    kept = {g: available[g] for g in wanted if g in available}
    if not kept:
        raise InputError(f"no class is in {groups}; the data have {', '.join(available)}")
    batches, criterion = _training_batches(found, settings, images)
    criterion = criterion.to(chosen)
    step = class_sharpness(model, batches, rho, criterion=criterion, groups=kept)
    top = class_hessian_eigs(model, batches, 1, which="both", criterion=criterion, groups=kept)
    run = RunFolder(out or Path("runs/focal-sam/sharpness") / Path(folder).resolve().name)
    run.write_config("focal-sam sharpness", {"run": str(folder), "rho": rho, "images": images})
    metrics = {"sharpness": step.to_dict(), "eigenvalues": top.to_dict()}
    run.write_metrics(metrics)
    if plots:
        run.save_figure("sharpness", plot_sharpness_bars(step))
    rows = [
        {
            "group": g,
            "loss": round(step.losses[g], 4),
            f"rise at {rho:g}": round(step.sharpness[g], 4),
            "largest eigenvalue": round(top.top[g][0], 3) if top.top[g] else None,
            "smallest eigenvalue": round(top.bottom[g][0], 3) if top.bottom[g] else None,
        }
        for g in kept
        if g not in step.empty
    ]
    show_result(metrics, f"{format_table(rows)}\n\n{run.path}", as_json=as_json)


@command(app)
def landscape(
    folder: Trained,
    radius: Annotated[
        float, typer.Option("--radius", help="How far to look; 1 is the length of the weights.")
    ] = 0.5,
    steps: Annotated[int, typer.Option("--steps", help="Points along each side.", min=3)] = 15,
    images: Annotated[
        int, typer.Option("--images", help="At most this many training images.", min=1)
    ] = 500,
    seed: Seed = 0,
    out: Out = None,
    data: Data = None,
    test_data: TestData = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Draw the loss of each class group on a random plane around the trained weights."""
    from focal_sam.analysis import loss_surface_2d
    from focal_sam.plots import plot_loss_surface
    from focal_sam.train import load_trained
    from shared_core.device import select_device
    from shared_core.run import RunFolder

    chosen = select_device(device)
    model, found, settings = load_trained(folder, chosen, data=data, test_data=test_data)
    batches, criterion = _training_batches(found, settings, images)
    surface = loss_surface_2d(
        model,
        batches,
        criterion=criterion.to(chosen),
        groups=_groups(found.counts, settings.few_below, settings.many_above),
        steps=steps,
        radius=radius,
        seed=seed,
    )
    run = RunFolder(out or Path("runs/focal-sam/landscape") / Path(folder).resolve().name)
    run.write_config("focal-sam landscape", {"run": str(folder), "radius": radius, "steps": steps})
    run.write_metrics({"surface": surface.to_dict()})
    picture = run.save_figure("landscape", plot_loss_surface(surface))
    show_result({"surface": surface.to_dict()}, str(picture), as_json=as_json)


def _read_counts(source: str) -> list[int]:
    """Class counts from a file (JSON list, or numbers by white space or commas) or such a text."""
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else source
        values = json.loads(text) if text.lstrip().startswith("[") else text.replace(",", " ")
        return [int(v) for v in (values.split() if isinstance(values, str) else values)]
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"--counts {source} is neither a file of class counts nor a list of them, such as "
            "500,120,5"
        ) from error


@command(app)
def weights(
    counts: Annotated[
        str, typer.Option("--counts", help="File of class counts, or the counts by commas.")
    ],
    gamma: Annotated[float, typer.Option("--gamma", help="Focal exponent.")] = 2.0,
    lam: Annotated[float, typer.Option("--lam", help="Weight of the sharpness.")] = 0.8,
    prior: Annotated[
        str, typer.Option("--prior", help="empirical (the paper's), or the extension 'relative'.")
    ] = "empirical",
    out: Out = None,
    plots: Plots = True,
    as_json: Json = False,
) -> None:
    """Show what γ and λ make of your class counts, before any training.

    With many classes the weights are nearly equal and Focal-SAM is nearly SAM: see the last line.
    """
    from focal_sam.plots import plot_class_weights
    from focal_sam.weights import FocalWeights, suggest_gamma
    from shared_core.run import RunFolder

    class_counts = _read_counts(counts)
    made = FocalWeights(class_counts, gamma, lam, prior=prior)  # type: ignore[arg-type]
    described = made.describe()
    suggestion = {
        str(w): suggest_gamma(class_counts, w) for w in (0.9, 0.5, 0.1) if len(class_counts) > 1
    }
    summary = {**described, "suggested_gamma": suggestion}
    if out is not None:
        run = RunFolder(out)
        run.write_config("focal-sam weights", {"counts": class_counts, "gamma": gamma, "lam": lam})
        run.write_metrics({**summary, "weights": made.values})
        if plots:
            run.save_figure("class_weights", plot_class_weights(made))
    rows = [
        {"": "weight", "head": f"{described['head']:.4f}", "tail": f"{described['tail']:.4f}"}
        | {"highest / lowest": f"{described['spread']:.3f}"}
    ]
    hint = ", ".join(f"γ = {g:.3g} for {w}" for w, g in suggestion.items())
    show_result(
        summary,
        f"{format_table(rows)}\n\nTo give the largest class a factor (1 - π)^γ of: {hint}",
        as_json=as_json,
    )


@command(app)
def presets(as_json: Json = False) -> None:
    """List the runs of the paper, with their settings and what is reported of them."""
    from focal_sam.presets import PRESETS

    described = {name: preset.describe() for name, preset in PRESETS.items()}
    columns = ("rho", "gamma", "lam", "lr", "weight_decay", "batch_size", "epochs")
    rows = [
        {"preset": name, "model": d["model"], **{c: d[c] for c in columns}}
        for name, d in described.items()
    ]
    show_result(described, format_table(rows), as_json=as_json)


@command(app)
def bench(
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images per step.", min=1)] = 8,
    repeats: Annotated[int, typer.Option("--repeats", help="Timed rounds.", min=1)] = 10,
    model: Annotated[
        str, typer.Option("--model", help="resnet32, small_cnn or resnet50.")
    ] = "resnet32",
    methods: Annotated[
        str, typer.Option("--methods", help="Some of sgd,sam,asam,imbsam,ccsam,focal, by commas.")
    ] = "sgd,sam,imbsam,ccsam,focal",
    out: Out = None,
    device: Device = "auto",
    amp: Annotated[bool, typer.Option("--amp", help="Mixed precision.")] = False,
    as_json: Json = False,
) -> None:
    """Time a training step of each method, side by side, and measure its memory."""
    from focal_sam.bench import measure_steps
    from shared_core.device import select_device
    from shared_core.run import RunFolder

    names = [m.strip() for m in methods.split(",") if m.strip()]
    found = measure_steps(
        names, model, batch_size=batch_size, repeats=repeats, device=select_device(device), amp=amp
    )
    if out is not None:
        run = RunFolder(out)
        run.write_config(
            "focal-sam bench", {"model": model, "batch_size": batch_size, "repeats": repeats}
        )
        run.write_metrics({}, timing=found)
    rows = [
        {
            "method": name,
            "ms / step": round(1000 * entry["seconds"], 2),
            "of SGD": round(entry["ratio_to_sgd"], 2),
            "of SAM": round(entry["ratio_to_sam"], 2) if entry["ratio_to_sam"] else None,
            "peak MiB": round(entry["peak_bytes"] / 2**20, 1) if entry["peak_bytes"] else None,
        }
        for name, entry in found.items()
    ]
    show_result(found, format_table(rows), as_json=as_json)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return run_app(app, argv)


if __name__ == "__main__":
    raise SystemExit(main())

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
    "edge-ood",
    "Multi-label classifiers that know when an image holds nothing they know: the EDGE loss (Sun "
    "et al., AAAI 2025), scores, choice of outliers, evaluation. Begin with: edge-ood demo",
)

ID_HELP = "shapes, voc:FOLDER, coco:FOLDER, nuswide:FOLDER, folder:CSV or hf:ID."
OE_HELP = "A folder of images, hf:ID, or shapes."
Rule = Annotated[
    str, typer.Option("--rule", help="Threshold of FPR95: nearest (papers) or at_least.")
]
Checkpoint = Annotated[
    Path, typer.Option("--checkpoint", help="Folder of a detector: RUN/best or RUN/last.")
]
ImageColumn = Annotated[str, typer.Option("--image-column", help="Column of images of hf:ID.")]
LabelColumn = Annotated[str, typer.Option("--label-column", help="Column of labels of hf:ID.")]


def _named(values: list[str], option: str) -> dict[str, str]:
    """NAME=VALUE options as a mapping; without a name, the file's or the source's."""
    found: dict[str, str] = {}
    for value in values:
        name, equals, rest = value.partition("=")
        if not equals:
            name, rest = Path(value).stem, value
        if not name or not rest or name in found:
            raise InputError(f"{option} {value}: give NAME=PATH, each name once")
        found[name] = rest
    return found


def _listed(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _rule(rule: str) -> Any:
    if rule not in ("nearest", "at_least"):
        raise InputError(f"--rule {rule}; accepted: nearest, at_least")
    return rule


@command(app)
def demo(
    seeds: Annotated[int, typer.Option("--seeds", help="Number of seeds.", min=1)] = 3,
    methods: Annotated[
        str,
        typer.Option("--methods", help="Some of bce,edge,conf,gap,oe,asl,focal, by commas."),
    ] = "bce,edge,conf",
    full: Annotated[
        bool, typer.Option("--full", help="All methods: also gap alone, OE, ASL and focal.")
    ] = False,
    alpha: Annotated[
        float, typer.Option("--alpha", help="Weight of the confidence term.", min=0)
    ] = 0.3,
    beta: Annotated[float, typer.Option("--beta", help="Weight of the gap term.", min=0)] = 0.1,
    epochs: Annotated[int, typer.Option("--epochs", help="Passes over the images.", min=1)] = 12,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: Json = False,
    quick: Quick = False,
    plots: Plots = True,
) -> None:
    """Train with and without EDGE on images of shapes and see which unknown images are noticed.

    Nothing is downloaded. About two minutes on two cores; --quick takes one seed and smaller sets.
    """
    import dataclasses
    import time

    from edge_ood import demo as the_demo
    from shared_core.device import select_device
    from shared_core.run import RunFolder, progress

    chosen = select_device(device)
    names = list(the_demo.METHODS) if full else _listed(methods)
    the_demo.check_methods(names)
    settings = the_demo.DemoSettings(alpha=alpha, beta=beta, epochs=epochs)
    count = seeds
    if quick:
        count = 1
        settings = dataclasses.replace(settings, train=2000, test=1000, epochs=min(epochs, 8))
    run = RunFolder(out or Path("runs/edge-ood/demo"))
    run.write_config(
        "edge-ood demo",
        {
            "seed": seed,
            "seeds": count,
            "methods": names,
            "device": str(chosen),
            **dataclasses.asdict(settings),
        },
        distributions=["edge-ood"],
    )
    started = time.perf_counter()
    results = []
    with progress(total=count * len(names), description="training", unit="model") as bar:
        for one in range(seed, seed + count):
            found = the_demo.run_seed(
                one, names, settings, device=chosen, progress=lambda _: bar.update()
            )
            results.append(found)
            for name, result in found.methods.items():
                run.log(step=one, method=name, mAP=result.mean_ap, auroc=result.auroc)
    metrics = the_demo.report(results)
    pictures = []
    if plots:
        say("drawing")
        for name, figure in the_demo.figures(results).items():
            pictures.append(run.save_figure(name, figure).name)
    metrics["summary"]["picture"] = "comparison.png" if plots else None
    run.write_metrics(metrics, timing={"seconds": time.perf_counter() - started})
    summary = metrics["summary"]
    text = f"{format_table(summary['rows'])}\n\n{summary['message']}\n\n{run.path}: metrics.json"
    show_result(metrics, ", ".join([text, *pictures]), as_json=as_json)


@command(app)
def train(
    id_set: Annotated[str | None, typer.Option("--id", help=ID_HELP)] = None,
    oe: Annotated[str | None, typer.Option("--oe", help=OE_HELP)] = None,
    preset: Annotated[
        str | None, typer.Option("--preset", help="A run of the paper, such as coco-r50.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="small_cnn, timm:NAME, torchvision:NAME or hf:ID."),
    ] = None,
    pretrained: Annotated[
        bool | None,
        typer.Option("--pretrained/--no-pretrained", help="The backbone's own weights."),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option("--loss", help="edge, conf, gap, bce, focal, asl, db, oe or energy."),
    ] = None,
    alpha: Annotated[float | None, typer.Option("--alpha", help="Confidence weight.")] = None,
    beta: Annotated[float | None, typer.Option("--beta", help="Gap weight.")] = None,
    k: Annotated[
        float | None, typer.Option("--k", help="Tail: a share of the batch, or a number from 2.")
    ] = None,
    margin: Annotated[float | None, typer.Option("--margin", help="Margin of the gap.")] = None,
    tau: Annotated[
        float | None,
        typer.Option("--tau", help="The gap begins: share of the epochs, or an epoch from 1."),
    ] = None,
    gap_mask: Annotated[
        str | None, typer.Option("--gap-mask", help="all (paper) or positives.")
    ] = None,
    gather: Annotated[
        bool, typer.Option("--gather", help="One batch over all processes for the loss.")
    ] = False,
    sync_bn: Annotated[
        bool, typer.Option("--sync-bn", help="BatchNorm statistics over all processes.")
    ] = False,
    fsdp: Annotated[bool, typer.Option("--fsdp", help="Shard parameters (with torchrun).")] = False,
    forward_mode: Annotated[
        str | None,
        typer.Option("--forward-mode", help="joint (one pass of ID and OE) or separate."),
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Passes over the ID set.")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="ID images per step, over all processes.")
    ] = None,
    oe_batch_size: Annotated[
        int | None, typer.Option("--oe-batch-size", help="Outliers per step.")
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option("--optimizer", help="sgd, adam or adamw.")
    ] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Learning rate.")] = None,
    weight_decay: Annotated[
        float | None, typer.Option("--weight-decay", help="Weight decay.")
    ] = None,
    image_size: Annotated[int | None, typer.Option("--image-size", help="Pixels per side.")] = None,
    validation: Annotated[
        float | None, typer.Option("--validation-share", help="Share of ID images held out.")
    ] = None,
    official_transforms: Annotated[
        bool, typer.Option("--official-transforms", help="The authors' crop, scale 0.5 to 2.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")
    ] = None,
    compile_model: Annotated[bool, typer.Option("--compile", help="Compile the model.")] = False,
    image_column: ImageColumn = "image",
    label_column: LabelColumn = "labels",
    workers: Annotated[int, typer.Option("--workers", help="Processes that load images.")] = 0,
    resume: Resume = False,
    out: Out = None,
    seed: Seed = 2024,
    device: Device = "auto",
    plots: Plots = True,
    as_json: Json = False,
) -> None:
    """Train a multi-label classifier with outliers, and leave a calibrated detector.

    Options override the preset. Several GPUs: torchrun --nproc-per-node 4 -m edge_ood.cli train …

    Example: edge-ood train --preset coco-r50 --id coco:DATA --oe OUTLIERS
    """
    from edge_ood.settings import TrainSettings
    from edge_ood.train import read_log
    from edge_ood.train import train as run_training
    from shared_core.device import select_device
    from shared_core.parallel import launched
    from shared_core.run import RunFolder

    chosen = select_device(device)
    given = {
        "id": id_set,
        "oe": oe,
        "model": model,
        "pretrained": pretrained,
        "loss": loss,
        "alpha": alpha,
        "beta": beta,
        "k": None if k is None else int(k) if k > 1 and k == int(k) else k,
        "margin": margin,
        "tau": None if tau is None else int(tau) if tau >= 1 and tau == int(tau) else tau,
        "gap_mask": gap_mask,
        "gather": gather or None,
        "sync_bn": sync_bn or None,
        "fsdp": fsdp or None,
        "forward_mode": forward_mode,
        "epochs": epochs,
        "batch_size": batch_size,
        "oe_batch_size": oe_batch_size,
        "optimizer": optimizer,
        "lr": lr,
        "weight_decay": weight_decay,
        "image_size": image_size,
        "validation": validation,
        "official_transforms": official_transforms or None,
        "dtype": dtype,
        "compile": compile_model or None,
        "image_column": image_column,
        "label_column": label_column,
        "workers": workers,
        "seed": seed,
    }
    if preset is not None:
        settings = TrainSettings.from_preset(preset, **given)
    elif id_set is None:
        raise InputError("say what to train on: --id shapes, or --preset NAME with --id")
    else:
        settings = TrainSettings(**{n: v for n, v in given.items() if v is not None})  # type: ignore[arg-type]
    name = preset or id_set.split(":")[0].replace("/", "-")  # type: ignore[union-attr]
    run = RunFolder(out or Path(f"runs/edge-ood/train-{name}-{settings.loss}"), resume=resume)
    metrics = run_training(settings, run, chosen, resume=resume)
    if not launched(chosen).first:
        return
    if plots:
        from edge_ood.plots import plot_training

        run.save_figure("training", plot_training({settings.loss: read_log(run.path)}))
    percent = {k: round(100 * v, 2) for k, v in metrics["validation_mAP"].items()}
    rows = [{"loss": settings.loss, **{f"validation mAP % ({k})": v for k, v in percent.items()}}]
    text = f"{format_table(rows)}\n\n{run.path}: best, last (detectors), metrics.json"
    show_result({"out": str(run.path), **metrics}, text, as_json=as_json)


@command(app, "select-oe")
def select_oe(
    id_set: Annotated[str, typer.Option("--id", help=ID_HELP)],
    candidates: Annotated[
        list[str], typer.Option("--candidate", help="NAME=FOLDER or NAME=hf:ID; several.")
    ],
    model: Annotated[
        str,
        typer.Option("--model", help="Backbone before fine-tuning: timm:NAME, hf:ID, small_cnn."),
    ] = "timm:resnet50.tv_in1k",
    pretrained: Annotated[
        bool, typer.Option("--pretrained/--no-pretrained", help="The backbone's own weights.")
    ] = True,
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", help="Features of this detector's model instead."),
    ] = None,
    k: Annotated[int, typer.Option("--k", help="Leading singular values.", min=1)] = 32,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Rows a spectrum.", min=2)] = 64,
    max_batches: Annotated[
        int, typer.Option("--max-batches", help="Read at most this many batches.", min=1)
    ] = 100,
    variant: Annotated[str, typer.Option("--variant", help="paper, official or full.")] = "paper",
    prefer: Annotated[str, typer.Option("--prefer", help="smallest or largest.")] = "smallest",
    image_size: Annotated[int, typer.Option("--image-size", help="Pixels per side.")] = 256,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
    plots: Plots = True,
    as_json: Json = False,
) -> None:
    """Rank outlier sets by their dilation distance to the ID set.

    That a smaller distance is better is inferred, not read in the paper; --prefer largest turns it.
    """
    from dataclasses import asdict

    from edge_ood.plots import plot_spectra
    from edge_ood.selection import rank_sources
    from shared_core.device import seed_everything, select_device
    from shared_core.run import RunFolder

    chosen = select_device(device)
    seed_everything(seed)
    named = _named(candidates, "--candidate")
    ranks, selector = rank_sources(
        id_set,
        named,
        model=model,
        pretrained=pretrained,
        checkpoint=checkpoint,
        k=k,
        batch_size=batch_size,
        max_batches=max_batches,
        variant=variant,
        prefer=prefer,
        image_size=image_size,
        seed=seed,
        device=chosen,
    )
    run = RunFolder(out or Path("runs/edge-ood/select-oe"))
    run.write_config(
        "edge-ood select-oe",
        {"id": id_set, "candidates": named, "model": model, "k": k, "variant": variant},
        distributions=["edge-ood"],
    )
    metrics = {"ranking": [asdict(r) for r in ranks], "id_distance": selector.id_distance}
    run.write_metrics(metrics)
    if plots and selector.id_spectrum is not None:
        spectra = {"ID": selector.id_spectrum.tolist(), **{r.name: r.spectrum for r in ranks}}
        run.save_figure("spectra", plot_spectra(spectra, k))
    rows = [
        {
            "candidate": r.name,
            "distance": round(r.distance, 3),
            "samples": r.n,
            "note": "as close as ID to itself" if r.suspicious else "",
        }
        for r in ranks
    ]
    show_result(metrics, f"{format_table(rows)}\n\n{run.path}: metrics.json", as_json=as_json)


@command(app)
def score(
    checkpoint: Checkpoint,
    inputs: Annotated[
        str,
        typer.Option(
            "--input", help=f"Logits (.npy, .npz, .safetensors), a folder of images, or {ID_HELP}"
        ),
    ],
    scorers: Annotated[
        str, typer.Option("--scorers", help="all, or some by commas; see: edge-ood list.")
    ] = "joint_energy",
    fit: Annotated[
        str | None,
        typer.Option("--fit", help="Folder that score --features wrote of ID training images."),
    ] = None,
    features: Annotated[
        bool, typer.Option("--features", help="Keep features.npy, for --fit.")
    ] = False,
    odin_eps: Annotated[
        float, typer.Option("--odin-eps", help="Step of ODIN on the pixels.", min=0)
    ] = 0.0014,
    odin_temperature: Annotated[
        float, typer.Option("--odin-temperature", help="Temperature of ODIN.")
    ] = 1.0,
    split: Annotated[str, typer.Option("--split", help="Split of a named set.")] = "test",
    official_transforms: Annotated[
        bool,
        typer.Option(
            "--official-transforms",
            help="The random TRAINING transform, as the authors' code gives OOD images.",
        ),
    ] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images at once.", min=1)] = 128,
    image_column: ImageColumn = "image",
    label_column: LabelColumn = "labels",
    out: Out = None,
    seed: Seed = 2024,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Score images or logits with a detector: scores.csv, and what edge-ood eval reads.

    Scores of features and of scikit-learn are fitted on ID training images:

    edge-ood score --checkpoint RUN/best --input coco:DATA --split train --features --out train

    edge-ood score --checkpoint RUN/best --input FOLDER --scorers all --fit train --out new
    """
    from edge_ood.scoring import score_source
    from shared_core.device import select_device
    from shared_core.run import RunFolder

    chosen = select_device(device)
    run = RunFolder(out or Path("runs/edge-ood/score") / Path(inputs.replace(":", "-")).stem)
    found = score_source(
        checkpoint,
        inputs,
        run,
        scorers=_listed(scorers),
        fit=fit,
        features=features,
        odin={"eps": odin_eps, "temperature": odin_temperature},
        split=split,
        official_transforms=official_transforms,
        batch_size=batch_size,
        columns=(image_column, label_column),
        seed=seed,
        device=chosen,
    )
    rows = [{"score": name, "n": found["n"], **v} for name, v in found["scorers"].items()]
    text = f"{format_table(rows)}\n\n{run.path}: {', '.join(found['files'])}"
    show_result({"out": str(run.path), **found}, text, as_json=as_json)


@command(app, "eval")
def evaluate(
    id_logits: Annotated[
        Path,
        typer.Option(
            "--id-logits", help="Logits of the ID test set, [n, C], or what score wrote: a folder."
        ),
    ],
    ood_logits: Annotated[
        list[str],
        typer.Option("--ood-logits", help="NAME=FILE of an OOD set, or a folder."),
    ],
    labels: Annotated[
        Path | None,
        typer.Option("--labels", help="Labels, 0 or 1; default: the folder's."),
    ] = None,
    counts: Annotated[
        Path | None,
        typer.Option(
            "--train-counts",
            help="Training samples of each class, [C]; without them --labels order the classes.",
        ),
    ] = None,
    scorers: Annotated[
        str, typer.Option("--scorers", help="all, or some by commas; see: edge-ood list.")
    ] = "joint_energy",
    fit: Annotated[
        Path | None, typer.Option("--fit", help="Held-out ID logits, for lof and iforest.")
    ] = None,
    topk: Annotated[int, typer.Option("--topk", help="k of topk_energy.", min=1)] = 5,
    grid: Annotated[
        str | None, typer.Option("--grid", help="j of the tail curve: voc, coco, or numbers.")
    ] = None,
    rule: Rule = "nearest",
    out: Out = None,
    seed: Seed = 0,
    device: Device = "cpu",
    plots: Plots = True,
    as_json: Json = False,
) -> None:
    """Evaluate from saved logits: FPR95, AUROC, AUPR, mAP, and where along the label frequency.

    Of a folder that edge-ood score wrote, all its scores are evaluated, also of features and ODIN.

    Example: edge-ood eval --id-logits id.npy --labels y.npy --ood-logits dtd=dtd.npy --scorers all
    """
    from edge_ood import evaluate as evaluation
    from shared_core.device import select_device
    from shared_core.run import RunFolder

    select_device(device)  # scores of logits are computed on the CPU, chunk by chunk
    named = _named(ood_logits, "--ood-logits")
    inside = evaluation.open_tables(id_logits, labels, counts)
    opened = {name: evaluation.open_tables(path) for name, path in named.items()}
    outside = {name: tables.logits for name, tables in opened.items()}
    result = evaluation.evaluate(
        inside.logits,
        outside,
        inside.labels,
        scorers=_listed(scorers),
        id_scores=inside.scores,
        ood_scores={name: tables.scores for name, tables in opened.items()},
        class_counts=inside.counts,
        fit_logits=None if fit is None else evaluation.open_array(fit),
        rule=_rule(rule),
        grid=evaluation.parse_grid(grid, inside.logits.shape[-1]),
        topk=topk,
    )
    run = RunFolder(out or Path("runs/edge-ood/eval"))
    run.write_config(
        "edge-ood eval",
        {
            "id_logits": str(id_logits),
            "ood_logits": named,
            "labels": None if labels is None else str(labels),
            "rule": rule,
            "seed": seed,
        },
        distributions=["edge-ood"],
    )
    run.write_metrics(result)
    pictures = evaluation.figures(result, inside.logits, outside) if plots else {}
    names = [run.save_figure(name, figure).name for name, figure in pictures.items()]
    text = format_table(evaluation.evaluation_rows(result))
    if result.get("mAP") is not None:
        text += f"\n\nmAP {100 * result['mAP']:.2f} %"
        text += f" (trapezoid {100 * result['mAP_trapezoid']:.2f} %)"
    text += f"\n\n{run.path}: {', '.join(['metrics.json', *names])}"
    show_result(result, text, as_json=as_json)


@command(app)
def calibrate(
    checkpoint: Checkpoint,
    id_logits: Annotated[
        Path | None,
        typer.Option("--id-logits", help="Held-out ID logits; default: those kept by training."),
    ] = None,
    recall: Annotated[
        float, typer.Option("--recall", help="Share of ID samples to keep, in (0, 1].")
    ] = 0.95,
    scorer: Annotated[
        str | None, typer.Option("--scorer", help="Another score of logits for the detector.")
    ] = None,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Set a detector's threshold so that it keeps a share of held-out ID samples."""
    from edge_ood.scoring import calibrate_folder
    from shared_core.device import select_device

    select_device(device)
    found = calibrate_folder(checkpoint, out or checkpoint, id_logits, recall, scorer)
    rows = [{k: v for k, v in found.items() if k != "out"}]
    show_result(found, f"{format_table(rows)}\n\n{found['out']}", as_json=as_json)


@command(app, "list")
def list_all(
    out: Out = None, seed: Seed = 0, device: Device = "cpu", as_json: Json = False
) -> None:
    """List the scores, losses, presets and kinds of data."""
    from dataclasses import asdict

    from edge_ood.presets import PRESETS
    from edge_ood.scorers import list_scorers
    from edge_ood.settings import LOSSES
    from edge_ood.sources import KINDS
    from shared_core.device import select_device
    from shared_core.run import RunFolder

    select_device(device)
    needs = {r: list_scorers(r) for r in ("logits", "features", "inputs")}
    presets = {name: asdict(preset) for name, preset in PRESETS.items()}
    found = {"scorers": needs, "losses": list(LOSSES), "presets": presets, "id_sets": list(KINDS)}
    if out is not None:
        RunFolder(out).write_metrics(found)
    lines = [f"scores of {r}: {', '.join(names)}" for r, names in needs.items()]
    lines += [f"losses: {', '.join(LOSSES)}", f"ID sets: {', '.join(KINDS)}", "", ""]
    columns = ("model", "loss", "optimizer", "lr", "epochs")
    rows = [{"preset": n, **{c: p[c] for c in columns}} for n, p in presets.items()]
    show_result(found, "\n".join(lines) + format_table(rows), as_json=as_json)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_app(app, argv)


if __name__ == "__main__":
    raise SystemExit(main())

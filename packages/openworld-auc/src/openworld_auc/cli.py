"""The command line: parses, calls, prints."""

import json
import time
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
    "openworld-auc",
    "OpenworldAUC, one threshold-free number for classifiers that meet known and new classes, and "
    "GMoP, prompt tuning for it (Hua et al., ICML 2025). Begin with: openworld-auc demo, or "
    "openworld-auc score FILE for the scores of any model.",
)

Ci = Annotated[str, typer.Option("--ci", help="Interval: placement or bootstrap.")]
ByClass = Annotated[
    bool, typer.Option("--by-class", help="Bootstrap whole classes instead of samples.")
]
Workers = Annotated[int, typer.Option("--workers", help="Processes that load images.", min=0)]
Threshold = Annotated[
    str | None,
    typer.Option(
        "--threshold", help="For overall accuracy: a number, or youden, tpr95, otsu or median."
    ),
]
ScoresArgument = Annotated[
    Path, typer.Argument(help="csv, tsv, parquet or npz: score, correct, is_base.")
]
Data = Annotated[str, typer.Option("--data", help="Image folder, parquet file or hub id.")]
TestData = Annotated[
    str | None, typer.Option("--test-data", help="Test images, if they are elsewhere.")
]
TestSplit = Annotated[str, typer.Option("--test-split", help="Split to test on.")]
SplitFile = Annotated[
    Path | None,
    typer.Option("--split-file", help="A split_zhou_*.json, or csv; --data is its image folder."),
]
Classes = Annotated[
    Path | None,
    typer.Option("--classes", help="File with a class name a line, in place of the data's own."),
]
Cache = Annotated[
    Path | None, typer.Option("--features-cache", help="Folder that keeps image features.")
]


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
    """Show what the metric sees, then tune prompts of a small CLIP that is trained on the spot.

    Nothing is downloaded. Two minutes at most; --quick takes two seeds and less training.
    """
    from dataclasses import asdict

    import torch

    from openworld_auc import demo as the_demo
    from openworld_auc import plots as pictures
    from openworld_auc.report import fit_threshold
    from shared_core.device import select_device
    from shared_core.run import RunFolder, progress

    chosen = select_device(device)
    settings = the_demo.QUICK if quick else the_demo.DemoSettings()
    count = min(seeds, 2) if quick else seeds
    run = RunFolder(out or Path("runs/openworld-auc/demo"))
    run.write_config(
        "openworld-auc demo",
        {"seed": seed, "seeds": count, "device": str(chosen), **asdict(settings)},
        distributions=["openworld-auc", "open_clip_torch"],
    )
    started = time.perf_counter()
    properties, interval = the_demo.metric_properties(seed)
    say("the metric on synthetic scores, in percent:\n" + format_table(properties))
    # The network is small: a second thread would only get in the way.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results = []
    try:
        say("training a small CLIP on captioned shapes")
        backbone = the_demo.pretrain(settings, seed=seed, device=chosen)
        total = count * len(the_demo.methods(settings, seed))
        with progress(total=total, description="tuning prompts", unit="method") as bar:
            for one in range(seed, seed + count):
                result = the_demo.run_seed(backbone, settings, one, lambda _: bar.update())
                results.append(result)
    finally:
        torch.set_num_threads(threads)
    summary = the_demo.summarize(results)
    rows, message = the_demo.table(summary), the_demo.tell(summary, count)
    names = []
    if plots:
        say("drawing")
        case = results[0].evaluations["GMoP"]
        compared = ("zero-shot", "CoOp", "GMoP")
        threshold = fit_threshold(case[0], case[2], rule="tpr95")
        figures = {
            "curves": pictures.curve_figure({n: results[0].evaluations[n] for n in compared}),
            "scores": pictures.histogram_figure(case),
            "ratios": pictures.ratio_figure(case, threshold, [0.1, 0.25, 0.5, 1, 2, 4, 10]),
            "training": pictures.training_figure(results[0].history),
        }
        names = [run.save_figure(name, figure).name for name, figure in figures.items()]
    metrics = {
        "properties": properties,
        "properties_interval": interval._asdict(),
        "methods": summary,
        "seeds": list(range(seed, seed + count)),
        "summary": {
            "message": message,
            "rows": rows,
            "picture": "curves.png" if plots else None,
        },
    }
    run.write_metrics(metrics, timing={"seconds": time.perf_counter() - started})
    text = f"{format_table(rows)}\n\n{message}\n\n{run.path}: metrics.json"
    show_result(metrics, ", ".join([text, *names]), as_json=as_json)


@command(app)
def score(
    file: ScoresArgument,
    threshold: Threshold = None,
    prior: Annotated[
        float | None, typer.Option("--prior", help="Fraction of base samples, for the accuracy.")
    ] = None,
    ci: Ci = "placement",
    by_class: ByClass = False,
    out: Out = None,
    seed: Seed = 0,
    as_json: Json = False,
    plots: Plots = True,
) -> None:
    """Measure any model from a file of its scores; no CLIP is involved.

    Columns: score (larger = more base-like), is_base (or domain: base/new), and correct within
    the sample's own domain (or pred and target). Optional: target, for --by-class; joint_correct,
    of a classifier that chooses among all classes.

    Example: openworld-auc score scores.csv --threshold 0.5
    """
    import torch

    from openworld_auc import plots as pictures
    from openworld_auc.report import openworld_report
    from openworld_auc.scores_file import read_scores
    from shared_core.run import RunFolder

    if by_class:
        ci = "bootstrap"
    given = read_scores(file)
    if by_class and given.target is None:
        raise InputError(f"--by-class needs the column 'target', which {file} lacks")
    case = given[:3]
    found = openworld_report(
        *case,
        threshold=_threshold(threshold),
        prior=prior,
        ci=ci,  # type: ignore[arg-type]
        classes=given.target if by_class else None,
        joint_correct=given.joint_correct,
        generator=torch.Generator().manual_seed(seed),
    )
    run = RunFolder(out or Path("runs/openworld-auc/score") / file.stem)
    run.write_config(
        "openworld-auc score",
        {"file": str(file), "ci": ci, "threshold": threshold, "prior": prior, "seed": seed},
    )
    if plots:
        run.save_figure("curve", pictures.curve_figure({file.stem: case}))
        run.save_figure("scores", pictures.histogram_figure(case))
    run.write_metrics(found.to_dict())
    show_result(found.to_dict(), f"{found.table()}\n\n{run.path}", as_json=as_json)


@command(app)
def compare(
    a: ScoresArgument,
    b: ScoresArgument,
    unpaired: Annotated[
        bool, typer.Option("--unpaired", help="The files hold different samples.")
    ] = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Test whether two models differ, from their scores of the same samples in the same order."""
    from openworld_auc.intervals import compare_openworld_auc
    from openworld_auc.scores_file import read_scores
    from shared_core.run import RunFolder

    first, second = read_scores(a), read_scores(b)
    found = compare_openworld_auc(first[:3], second[:3], paired=not unpaired)
    run = RunFolder(out or Path("runs/openworld-auc/compare") / f"{a.stem}-{b.stem}")
    run.write_config("openworld-auc compare", {"a": str(a), "b": str(b), "paired": not unpaired})
    run.write_metrics(found._asdict())
    text = (
        f"{a.name}: {100 * found.value_a:.2f} %, {b.name}: {100 * found.value_b:.2f} %\n"
        f"difference {100 * found.difference:+.2f} points "
        f"(95 % interval {100 * found.low:+.2f} to {100 * found.high:+.2f}), "
        f"p = {found.p_value:.2g}"
    )
    show_result(found._asdict(), text, as_json=as_json)


@command(app)
def train(
    data: Data,
    preset: Annotated[
        str | None, typer.Option("--preset", help="A benchmark; see openworld-auc presets.")
    ] = None,
    method: Annotated[str, typer.Option("--method", help="gmop, gmop-official or coop.")] = "gmop",
    backbone: Annotated[
        str,
        typer.Option("--model", "--backbone", help="open_clip architecture, hf-hub:ID, or hf:ID."),
    ] = "ViT-B-16-quickgelu",
    pretrained: Annotated[
        str | None, typer.Option("--pretrained", help="open_clip weights: a tag or a file.")
    ] = None,
    test_data: TestData = None,
    test_split: TestSplit = "test",
    split_file: SplitFile = None,
    classes: Classes = None,
    base: Annotated[
        int | None, typer.Option("--base", help="Number of base classes.  [default: half]")
    ] = None,
    shots: Annotated[int, typer.Option("--shots", help="Training images a base class.")] = 16,
    epochs: Annotated[int | None, typer.Option("--epochs", help="Passes over them.")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Images a step.  [default: 32]")
    ] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Learning rate.")] = None,
    k: Annotated[int | None, typer.Option("--k", help="Number of detectors.")] = None,
    lam: Annotated[float | None, typer.Option("--lam", help="Weight of the ranking.")] = None,
    alpha: Annotated[
        float | None, typer.Option("--alpha", help="Weight of the detectors' cross entropy.")
    ] = None,
    template: Annotated[
        str | None, typer.Option("--template", help="Prompt of new classes, with {}.")
    ] = None,
    detectors_per_step: Annotated[
        int | None,
        typer.Option("--detectors-per-step", help="Train so many of them in turns; approximate."),
    ] = None,
    chunk: Annotated[
        int | None,
        typer.Option("--chunk", help="Prompts encoded at a time; saves memory with many classes."),
    ] = None,
    prefix_cache: Annotated[
        bool,
        typer.Option("--prefix-cache", help="Encode what a prompt's sequences share only once."),
    ] = False,
    compile_tower: Annotated[
        bool, typer.Option("--compile", help="Compile the text tower.")
    ] = False,
    dtype: Annotated[
        str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")
    ] = "float32",
    workers: Workers = 0,
    features_cache: Cache = None,
    resume: Resume = False,
    out: Out = None,
    seed: Seed = 1,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Tune prompts on a few images of the base classes, and test on base and new ones.

    Several processes or GPUs: torchrun --nproc-per-node N -m openworld_auc.cli train ...; the
    result is that of one process.

    Example: openworld-auc train --preset oxford_pets --data pets/images
    --split-file split_zhou_OxfordPets.json --model ViT-B-16-quickgelu --pretrained openai
    """
    from dataclasses import asdict, replace

    from openworld_auc import plots as pictures
    from openworld_auc.backbone import load_backbone
    from openworld_auc.evaluate import evaluate_models
    from openworld_auc.gmop import GMoP
    from openworld_auc.train import GMoPTrainer, extract_features
    from shared_core.checkpoints import check_same
    from shared_core.device import select_device, select_dtype
    from shared_core.parallel import join_processes
    from shared_core.run import RunFolder, write_json

    benchmark, preset_of = _recipe(preset, method)
    base = benchmark.base if benchmark is not None and base is None else base
    changes = {"k": k, "lam": lam, "alpha": alpha, "template": template, "seed": seed}
    changes |= {"chunk": chunk, "prefix_cache": prefix_cache, "compile": compile_tower}
    model_config = replace(preset_of.model, **_given(changes))
    changes = {"epochs": epochs, "lr": lr, "seed": seed, "batch_size": batch_size, "dtype": dtype}
    changes["detectors_per_step"] = detectors_per_step
    recipe = replace(preset_of.train, **_given(changes))
    with join_processes(select_device(device)) as here:
        chosen = here.device
        kind = select_dtype(dtype, chosen)
        run = RunFolder(out or Path(f"runs/openworld-auc/train-{preset or method}"), resume=resume)
        # Before the model, whose weights may have to be downloaded.
        parts = _parts(
            data,
            base=base,
            shots=shots,
            seed=seed,
            test_source=test_data,
            test_split=test_split,
            split_file=split_file,
            classes=classes,
        )
        clip, transform = load_backbone(backbone, pretrained, device=chosen)
        parts = parts.with_transform(transform)
        settings = {
            **asdict(model_config),
            **asdict(recipe),
            "method": method,
            "backbone": backbone,
            "pretrained": pretrained,
            "data": data,
            "test_data": test_data,
            "test_split": test_split,
            "split_file": None if split_file is None else str(split_file),
            "classes": None if classes is None else str(classes),
            "base": len(parts.base_classes),
            "shots": shots,
            "seed": seed,
            "dtype": str(kind).removeprefix("torch."),
        }
        if run.has_checkpoint:
            check_same(settings, run.path)
        if here.first:
            run.write_config(
                "openworld-auc train",
                settings,
                distributions=["openworld-auc", "open_clip_torch"],
            )
            write_json(run.path / "manifest.json", parts.manifest)
        cache = features_cache or run.path / "features"
        features = [
            extract_features(clip, part, cache=cache, workers=workers, dtype=kind)
            for part in (parts.train, parts.base, parts.new)
        ]
        model = GMoP(clip, parts.base_classes, config=model_config).set_classes(parts.new_classes)
        started = time.perf_counter()
        trainer = GMoPTrainer(model, features[0], config=recipe, run=run, resume=resume)
        history = trainer.fit()
        seconds = time.perf_counter() - started
        if not here.first:
            return
        model.save_pretrained(run.path)
        run.save_figure("training", pictures.training_figure(history))
        summary, rows = evaluate_models(
            run, {method: model}, *features[1:], history=history, seconds=seconds
        )
        show_result(summary, f"{format_table(rows)}\n\n{run.path}", as_json=as_json)


@command(app, "eval")
def evaluate(
    folder: Annotated[Path, typer.Argument(help="Folder of a finished training run.")],
    data: Annotated[str | None, typer.Option("--data", help="Where the images are now.")] = None,
    test_data: TestData = None,
    preset: Annotated[
        str | None,
        typer.Option("--preset", help="Another benchmark, whose images --data names."),
    ] = None,
    test_split: TestSplit = "test",
    split_file: SplitFile = None,
    classes: Classes = None,
    ratios: Annotated[
        str, typer.Option("--ratios", help="Base to new, by commas, for the picture.")
    ] = "0.1,0.5,1,2,10",
    compare_to: Annotated[
        str, typer.Option("--compare-to", help="zeroshot, or folders of other runs, by commas.")
    ] = "zeroshot",
    ci: Ci = "placement",
    by_class: ByClass = False,
    workers: Workers = 0,
    features_cache: Cache = None,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Test tuned prompts again, beside zero-shot CLIP or other runs, with paired tests.

    With --preset on another benchmark's images: prompts of imagenet on imagenet_v2 or imagenet_r.

    The picture of ratios shows overall accuracy at one threshold, which is fitted on the tested
    samples themselves (95 % of base samples above it): it flatters that accuracy, no other figure.
    """
    from dataclasses import replace

    from openworld_auc import plots as pictures
    from openworld_auc._checks import check_choice
    from openworld_auc.backbone import load_backbone
    from openworld_auc.evaluate import evaluate_models
    from openworld_auc.gmop import GMoP
    from openworld_auc.presets import METHODS, load_preset
    from openworld_auc.report import fit_threshold
    from openworld_auc.train import evaluation, extract_features
    from shared_core.device import select_device, select_dtype
    from shared_core.run import RunFolder

    check_choice("--ci", ci, ("placement", "bootstrap"))
    try:
        told = json.loads((folder / "config.json").read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder} is not the folder of a finished training run") from error
    sweep = _numbers(ratios)
    chosen = select_device(device)
    kind = select_dtype(told["dtype"], chosen)
    elsewhere = None if preset is None else load_preset(preset)
    where: dict[str, Any]
    if elsewhere is not None:
        if data is None:
            raise InputError(f"--preset {preset} reads images of your own: give --data")
        where = {"base": elsewhere[0].base, "test_source": test_data, "test_split": test_split}
        where |= {"split_file": split_file, "classes": classes, "test_only": True}
    else:
        where = {key: told[key] for key in ("base", "shots", "seed", "test_split")}
        where |= {"test_source": test_data or told["test_data"]}
        where |= {"split_file": split_file or told["split_file"]}
        where |= {"classes": classes or told.get("classes")}
    parts = _parts(data or told["data"], **where)
    clip, transform = load_backbone(told["backbone"], told["pretrained"], device=chosen)
    parts = parts.with_transform(transform)
    template = None if elsewhere is None else elsewhere[1].model.template
    model = GMoP.from_pretrained(folder, clip, template=template)
    if elsewhere is not None:
        model.set_classes(parts.new_classes, parts.base_classes)
    cache = features_cache or folder / "features"
    base, new = (
        extract_features(clip, part, cache=cache, workers=workers, dtype=kind)
        for part in (parts.base, parts.new)
    )
    models = {folder.name: model}
    for name in filter(None, (n.strip() for n in compare_to.split(","))):
        if name == "zeroshot":
            config = replace(METHODS[name].model, template=model.config.template)
            other = GMoP(clip, parts.base_classes, config=config).set_classes(parts.new_classes)
        else:
            other = GMoP.from_pretrained(name, clip, template=template)
            if elsewhere is not None:
                other.set_classes(parts.new_classes, parts.base_classes)
        models[Path(name).name] = other
    run = RunFolder(out or Path("runs/openworld-auc/eval") / folder.name)
    run.write_config(
        "openworld-auc eval",
        {
            **{"folder": str(folder), "compare_to": compare_to, "ci": ci, "by_class": by_class},
            **{"preset": preset, "data": data, "seed": seed},
        },
    )
    case = evaluation(model, base, new)
    threshold = fit_threshold(case[0], case[2], rule="tpr95")
    run.save_figure("ratios", pictures.ratio_figure(case, threshold, sweep))
    summary, rows = evaluate_models(
        run,
        models,
        base,
        new,
        ci="bootstrap" if by_class else ci,  # type: ignore[arg-type]
        by_class=by_class,
        seed=seed,
    )
    show_result(summary, f"{format_table(rows)}\n\n{run.path}", as_json=as_json)


@command(app)
def presets(as_json: Json = False) -> None:
    """List the benchmarks of the paper, the methods and the backbones."""
    from dataclasses import asdict

    from openworld_auc.presets import BACKBONES, BENCHMARKS, METHODS

    rows = [
        {
            "preset": b.name,
            "classes": b.classes,
            "base": b.base,
            "epochs": b.epochs,
            "alpha": b.alpha,
            "template": b.template,
            "prompts of": b.train_on,
        }
        for b in BENCHMARKS.values()
    ]
    summary = {
        "benchmarks": {n: {**asdict(b), "template": b.template} for n, b in BENCHMARKS.items()},
        "methods": {n: asdict(m) for n, m in METHODS.items()},
        "backbones": [list(b) for b in BACKBONES],
    }
    backbones = ", ".join(f"{name} ({weights})" for name, weights in BACKBONES)
    text = f"{format_table(rows)}\n\nmethods: {', '.join(METHODS)}\nbackbones: {backbones}"
    show_result(summary, text, as_json=as_json)


def _recipe(preset: str | None, method: str) -> tuple[Any, Any]:
    """The benchmark, if one is named, and the settings of a method that trains."""
    from openworld_auc.presets import METHODS, load_preset

    if preset is not None:
        benchmark, settings = load_preset(preset, method)
    elif method in METHODS:
        benchmark, settings = None, METHODS[method]
    else:
        raise InputError(f"there is no method {method!r}; accepted: {', '.join(METHODS)}")
    if settings.train is None:
        raise InputError(
            f"the method {method!r} trains nothing; accepted: gmop, gmop-official, coop"
        )
    return benchmark, settings


def _given(changes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in changes.items() if value is not None}


def _threshold(text: str | None) -> Any:
    if text is None or text in ("youden", "tpr95", "otsu", "median"):
        return text
    try:
        return float(text)
    except ValueError as error:
        raise InputError(
            f"--threshold is {text!r}; accepted: a number, youden, tpr95, otsu or median"
        ) from error


def _numbers(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"--ratios is {text!r}; accepted: numbers by commas") from error
    if not all(value > 0 for value in values):
        raise InputError(f"--ratios is {text!r}; accepted: positive numbers")
    return values


def _parts(data: str, *, classes: str | Path | None, **options: Any) -> Any:
    from openworld_auc.data import load_openworld_data, read_names

    names = None if classes is None else read_names(classes)
    return load_openworld_data(data, class_names=names, **options)


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments (default: the process's).
    """
    return run_app(app, argv)


if __name__ == "__main__":
    raise SystemExit(main())

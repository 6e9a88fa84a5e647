"""The command line: parses, calls, prints."""

import dataclasses
import json
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
    "internet-neg",
    "InterNeg (Xu et al., CVPR 2026): zero-shot out-of-distribution detection with CLIP-like "
    "models and inter-modal negative texts. Begin with: internet-neg demo",
)

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="A preset (see info), open_clip architecture, hf-hub:ID, local-dir:PATH, or hub id.",
    ),
]
Pretrained = Annotated[
    str | None, typer.Option("--pretrained", help="Weights for open_clip: a tag or a file.")
]
Classes = Annotated[Path | None, typer.Option("--classes", help="File with a class name a line.")]
IdImages = Annotated[
    str | None,
    typer.Option("--id-images", help="Known images: a folder of class folders, or a hub id."),
]
Vocab = Annotated[Path | None, typer.Option("--vocab", help="File of words: text, CSV or JSON.")]
WordnetDir = Annotated[
    Path | None, typer.Option("--wordnet-dir", help="Folder of another WordNet's data.noun.")
]
Exclude = Annotated[
    str | None,
    typer.Option("--exclude", help="Lexicographer files of WordNet to leave out, by commas."),
]
Negatives = Annotated[
    int, typer.Option("-M", "--negatives", help="Negative texts to choose.", min=1)
]
Groups = Annotated[
    int | None,
    typer.Option(
        "-G", "--groups", help="Groups of negatives.  [default: 5 from 100 classes, else 1]"
    ),
]
Beta = Annotated[
    float, typer.Option("--beta", help="Invert images with S up to this; 0 never does.")
]
Cache = Annotated[
    Path, typer.Option("--cache", help="Folder that keeps text embeddings between runs.")
]
Transform = Annotated[
    str | None,
    typer.Option(
        "--transform", help="Of images: clip, the model's own, or openood.  [default: clip]"
    ),
]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Images at a time.", min=1)]

CACHE = Path("runs/internet-neg/cache")


def _legend() -> str:
    from internet_neg.evaluate import CONVENTIONS

    return "\n".join(f"{name}: {meaning}" for name, meaning in CONVENTIONS.items())


def _class_names(classes: Path | None, id_images: str | None) -> list[str]:
    from internet_neg._inputs import labelled_images, read_lines

    if classes is not None:
        return read_lines(classes)
    if id_images is None:
        raise InputError("name the known classes: --classes FILE, or --id-images SOURCE")
    return labelled_images(id_images, "train")[2]


def _encoder(model: str | None, pretrained: str | None, device: str) -> Any:
    from internet_neg.models import load_encoder
    from shared_core.device import select_device

    if model is None:
        raise InputError("which model? --model vit-b16, or an architecture with --pretrained")
    return load_encoder(model, pretrained, device=select_device(device))


@command(app)
def demo(
    steps: Annotated[
        int | None, typer.Option("--steps", help="Training steps of the mini-CLIP.", min=1)
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", help="Number of seeds.", min=1)] = 3,
    ablation: Annotated[
        bool, typer.Option("--ablation", help="InterNeg without its filter too.")
    ] = False,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: Json = False,
    quick: Quick = False,
    plots: Plots = True,
) -> None:
    """Train a mini-CLIP on shapes, then tell unknown shapes and colors from known ones.

    Nothing is downloaded. About two CPU minutes; the mini-CLIP stays in --out, so that
    a second run takes seconds. --quick trains for 60 steps and shows that everything works, not
    how well.
    Exit code 1 if InterNeg is not ahead of NegLabel and NegLabel of MCM, in the means.
    """
    import time
    from dataclasses import asdict

    from internet_neg import demo as the_demo
    from shared_core.device import select_device
    from shared_core.run import RunFolder, progress

    chosen = select_device(device)
    settings = the_demo.DemoSettings(
        steps=steps or (60 if quick else 400),
        images=5000 if quick else 20_000,
        per_set=320 if quick else 800,
        ablation=ablation,
    )
    count = 1 if quick else seeds
    run = RunFolder(out or Path("runs/internet-neg/demo"))
    run.write_config(
        "internet-neg demo",
        {"seed": seed, "seeds": count, "device": str(chosen), **asdict(settings)},
        distributions=["internet-neg", "open_clip_torch"],
    )
    started = time.perf_counter()
    say("mini-CLIP: from the folder, or trained now")
    encoder = the_demo.get_encoder(run, settings, seed, chosen)
    results = [
        the_demo.run_seed(encoder, one, settings)
        for one in progress(range(seed, seed + count), description="seeds", unit="seed")
    ]
    summary = the_demo.summarize(results)
    rows, message = the_demo.table(summary), the_demo.tell(summary, count)
    ordered = the_demo.order_holds(summary)
    if not quick and not ordered:
        message += (
            " The order that the paper found, InterNeg before NegLabel before MCM, is broken."
        )
    pictures = []
    if plots:
        say("drawing")
        for name, figure in the_demo.figures(results).items():
            pictures.append(run.save_figure(name, figure).name)
    metrics = {
        "methods": summary,
        "order_holds": ordered,
        "conventions": the_demo.CONVENTIONS,
        "seeds": list(range(seed, seed + count)),
        "negatives": [text._asdict() for text in results[0].negatives[:20]],
        "summary": {"message": message, "rows": rows, "picture": "roc.png" if plots else None},
    }
    run.write_metrics(metrics, timing={"seconds": time.perf_counter() - started})
    results[0].detector.save_pretrained(run.path / "detector")
    text = f"{format_table(rows)}\n{_legend()}\n\n{message}\n\n{run.path}: metrics.json"
    show_result(metrics, ", ".join([text, *pictures]), as_json=as_json)
    if not quick and not ordered:
        raise typer.Exit(1)


@command(app)
def negatives(
    model: Model = None,
    pretrained: Pretrained = None,
    classes: Classes = None,
    id_images: IdImages = None,
    proxies: Annotated[
        Path | None,
        typer.Option("--proxies", help="Instead of images: another detector's folder, or .npy."),
    ] = None,
    vocab: Vocab = None,
    wordnet_dir: WordnetDir = None,
    exclude: Exclude = None,
    count: Negatives = 2000,
    groups: Groups = None,
    beta: Beta = 0.35,
    text_only: Annotated[
        bool, typer.Option("--text-only", help="Never learn from the stream.")
    ] = False,
    transform: Transform = None,
    cache: Cache = CACHE,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Choose negative texts for your classes, and write a detector that `score` can use.

    Under torchrun the processes share out the embedding of words and images.

    Example: internet-neg negatives --model vit-b16 --id-images shots/ --out my-detector
    """
    from internet_neg._inputs import labelled_images, read_proxies, read_vocabulary
    from internet_neg.benchmark import default_groups
    from internet_neg.config import InterNegConfig
    from internet_neg.detector import InterNegDetector
    from shared_core.parallel import join_processes
    from shared_core.run import RunFolder, atomic_path

    names = _class_names(classes, id_images)
    config = InterNegConfig(
        negatives=count,
        groups=default_groups(groups, len(names)),
        beta=beta,
        text_only=text_only,
        transform=transform or "clip",  # type: ignore[arg-type]  # checked there
        seed=seed,
    )
    vocabulary = read_vocabulary(vocab, wordnet_dir, exclude)
    encoder = _encoder(model, pretrained, device)
    detector = InterNegDetector(encoder, names, config, vocabulary, cache_dir=cache)
    if proxies is not None and id_images is not None:
        raise InputError("give either --id-images or --proxies")
    source: Any = "text"
    if proxies is not None:
        source = read_proxies(proxies)
    elif id_images is not None:
        images, labels, _ = labelled_images(id_images, "train", names)
        source = list(zip(images, labels, strict=True))
    with join_processes(encoder.device) as here:
        # Made before the long work, which should not fail for a folder's sake; by one process.
        run = RunFolder(out or Path("runs/internet-neg/detector")) if here.first else None
        detector.fit(source, sync=True)
    if run is None:
        return
    detector.save_pretrained(run.path)
    chosen = detector.negatives
    with atomic_path(run.path / "negatives.tsv") as temporary:
        lines = [f"{t.word}\t{t.pos}\t{t.deviation:.6f}\n" for t in chosen]
        temporary.write_text("word\tpos\tdeviation\n" + "".join(lines), encoding="utf-8")
    if detector.removed_words:
        say(
            f"left out {len(detector.removed_words)} words that name known classes: "
            + ", ".join(detector.removed_words[:8])
        )
    rows = [
        {"word": t.word, "pos": t.pos, "deviation": round(t.deviation or 0.0, 4)}
        for t in sorted(chosen, key=lambda t: -(t.deviation or 0.0))[:10]
    ]
    summary = {
        "out": str(run.path),
        "classes": len(names),
        "negatives": len(chosen),
        "removed_words": detector.removed_words,
        "top": rows,
    }
    text = f"{format_table(rows)}\n\n{len(chosen)} negative texts: {run.path}/negatives.tsv"
    show_result(summary, text, as_json=as_json)


@command(app)
def score(
    detector: Annotated[Path, typer.Argument(help="Folder that `negatives` or `demo` wrote.")],
    images: Annotated[list[Path], typer.Argument(help="Image files and folders.")],
    update: Annotated[
        bool, typer.Option("--update/--no-update", help="Whether to learn from the stream.")
    ] = True,
    threshold: Annotated[
        float | None, typer.Option("--threshold", help="Known from this score on.")
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out images that cannot be decoded.")
    ] = False,
    model: Model = None,
    pretrained: Pretrained = None,
    batch_size: BatchSize = 256,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder that gets scores.jsonl too.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", help="Seed of every random draw.  [default: the detector's]", min=0),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Score images: a JSON line each, in order, with --json one object for all.

    Scores depend on the order and the batch size unless --no-update is given.

    Example: internet-neg score my-detector photos/ --threshold 0.5
    """
    from internet_neg._inputs import image_files
    from internet_neg.detector import InterNegDetector
    from internet_neg.errors import InterNegError
    from internet_neg.models import load_encoder
    from internet_neg.proxies import read_image
    from shared_core.device import select_device
    from shared_core.run import RunFolder, atomic_path, progress

    if threshold is not None and not 0 <= threshold <= 1:
        raise InputError(f"--threshold {threshold}; scores lie in [0, 1]")
    files = image_files(images)
    if out is not None and out.resolve() == detector.resolve():
        raise InputError(f"--out {out} is the detector's own folder; choose another")
    run = None if out is None else RunFolder(out)
    try:
        source = json.loads((detector / "config.json").read_text(encoding="utf-8"))["model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{detector} holds no detector: {error}") from error
    chosen = select_device(device)
    if model is not None:
        encoder = load_encoder(model, pretrained, device=chosen)
    elif source:
        encoder = load_encoder(
            source["model"], source["pretrained"], library=source["library"], device=chosen
        )
    else:
        raise InputError("the detector does not say which model it was fitted with; give --model")
    loaded = InterNegDetector.from_pretrained(detector, encoder).reset()
    if seed is not None:
        loaded.config = dataclasses.replace(loaded.config, seed=seed)
    if threshold is not None:
        import torch

        loaded.threshold = float(torch.logit(torch.tensor(threshold).double()))
    lines = []
    bar = progress(range(0, len(files), batch_size), description="scoring", unit="batch")
    for start in bar:
        part, pictures = [], []
        for file in files[start : start + batch_size]:
            try:
                pictures.append(read_image(file))
                part.append(file)
            except InterNegError as error:
                if not skip_bad:
                    raise InputError(f"{error} (--skip-bad leaves such images out)") from error
                say(f"internet-neg: left out: {error}")
        if not part:
            continue
        result = loaded.predict(pictures, update=update)
        for i, file in enumerate(part):
            line = {
                "path": str(file),
                "score": float(result.score[i]),
                "margin": float(result.margin[i]),
                "pred": loaded.classnames[int(result.pred[i])],
                "is_id": None if result.is_id is None else bool(result.is_id[i]),
                "gated": bool(result.gated[i]),
                "accepted": bool(result.accepted[i]),
            }
            lines.append(line)
            if not as_json:
                print(json.dumps(line), flush=True)
    if not lines:
        raise InputError("none of the images could be decoded")
    settings = {"batch_size": batch_size, "update": update, "seed": loaded.config.seed}
    if run is not None:
        run.write_config("internet-neg score", {"detector": str(detector), **settings})
        with atomic_path(run.path / "scores.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    if as_json:
        show_result({"images": lines, **settings}, "", as_json=True)


@command(app, "eval")
def evaluate(
    preset: Annotated[
        str | None,
        typer.Option("--preset", help="imagenet-four, imagenet-near or imagenet-far."),
    ] = None,
    data_root: Annotated[
        Path | None,
        typer.Option("--data-root", help="OpenOOD's folder: benchmark_imglist/ and images_*/."),
    ] = None,
    known: Annotated[
        str | None,
        typer.Option("--id", help="Known test images: folder of class folders, list, or hub id."),
    ] = None,
    ood: Annotated[
        list[str] | None,
        typer.Option("--ood", help="NAME=FOLDER, NAME=LIST or NAME=HUB-ID; repeat for more."),
    ] = None,
    id_images: IdImages = None,
    classes: Classes = None,
    methods: Annotated[
        str, typer.Option("--methods", help="Some of mcm,neglabel,text-only,interneg, by commas.")
    ] = "mcm,neglabel,text-only,interneg",
    model: Model = None,
    pretrained: Pretrained = None,
    vocab: Vocab = None,
    wordnet_dir: WordnetDir = None,
    exclude: Exclude = None,
    count: Negatives = 2000,
    groups: Groups = None,
    beta: Beta = 0.35,
    batch_size: BatchSize = 256,
    rank_by: Annotated[
        str, typer.Option("--rank-by", help="margin, or score (the published code's ties).")
    ] = "margin",
    rescore: Annotated[
        str,
        typer.Option("--rescore", help="After gated images: batch, or accepted (Algorithm 1)."),
    ] = "batch",
    percentile_mode: Annotated[
        str, typer.Option("--percentile-mode", help="Of NegLabel: linear, or index.")
    ] = "linear",
    transform: Transform = None,
    cache: Cache = CACHE,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
    plots: Plots = True,
) -> None:
    """Compare the methods on known and unknown images, with shared features.

    Under torchrun the processes share out the embedding of words and images. What is embedded is
    kept under --cache, and an interrupted run goes on from there. A hub id is owner/name, or
    owner/name@split.

    Example: internet-neg eval --model vit-b16 --id test/ --id-images shots/ --ood dtd=dtd/images
    """
    from internet_neg._inputs import read_lines, read_vocabulary
    from internet_neg.benchmark import Settings, prepare_benchmark, run_benchmark
    from internet_neg.evaluate import CONVENTIONS
    from internet_neg.plots import plot_bank, plot_margins, plot_roc
    from shared_core.parallel import join_processes
    from shared_core.run import RunFolder

    if preset is not None:
        settings = Settings.from_preset(preset, data_root)
    else:
        if known is None or not ood or id_images is None:
            raise InputError(
                "give --preset with --data-root, or --id, --id-images and --ood NAME=PATH"
            )
        names = None if classes is None else read_lines(classes)
        settings = Settings.from_sources(
            names, known, id_images, ood, negatives=count, groups=groups
        )
    settings = settings.with_changes(
        beta=beta,
        seed=seed,
        batch_size=batch_size,
        rescore=rescore,
        percentile_mode=percentile_mode,
        transform=transform or settings.config.transform,
    )
    if rank_by not in ("margin", "score"):
        raise InputError(f"--rank-by {rank_by!r}; accepted: margin, score")
    encoder = _encoder(model or ("vit-b16" if preset else None), pretrained, device)
    wanted = [m.strip() for m in methods.split(",") if m.strip()]
    vocabulary = read_vocabulary(vocab, wordnet_dir, exclude)
    with join_processes(encoder.device) as here:
        run = None
        if here.first:
            run = RunFolder(out or Path("runs/internet-neg") / f"eval-{preset or 'own'}")
            run.write_config("internet-neg eval", {"model": encoder.source, **settings.describe()})
        prepared = prepare_benchmark(encoder, settings, wanted, vocabulary, cache, sync=True)
    if run is None:
        return
    table, streams = run_benchmark(prepared, rank_by="score" if rank_by == "score" else "margin")
    n_id = len(prepared.known)
    rows = [
        {
            "method": method,
            "unknown": name,
            "AUROC": round(100 * e["auroc"], 2),
            "FPR95 (ID+)": round(100 * e["fpr95"], 2),
            "FPR95 (OOD+)": round(100 * e["fpr95_ood_positive"], 2),
            "gated known %": round(100 * e["gated_id"], 1),
            "gated unknown %": round(100 * e["gated_ood"], 1),
        }
        for method, sets in table.items()
        for name, e in sets.items()
    ]
    metrics = {"methods": table, "rank_by": rank_by, "conventions": CONVENTIONS}
    run.write_metrics(metrics)
    if plots:
        run.save_figure("roc", plot_roc(streams, n_id))
        run.save_figure("hist", plot_margins(streams, n_id))
        growth = plot_bank(streams)
        if growth is not None:
            run.save_figure("bank", growth)
    text = f"{format_table(rows)}\n{_legend()}\n\n{run.path}"
    show_result(metrics, text, as_json=as_json)


@command(app)
def vocab(
    action: Annotated[str, typer.Argument(help="stats or build.")] = "stats",
    vocab: Vocab = None,
    wordnet_dir: WordnetDir = None,
    exclude: Exclude = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Count the words of a vocabulary (stats), or write them to words.txt in --out (build)."""
    from internet_neg._inputs import read_vocabulary
    from shared_core.run import RunFolder, atomic_path

    words = read_vocabulary(vocab, wordnet_dir, exclude)
    summary: dict[str, Any] = {"nouns": len(words.nouns), "adjectives": len(words.adjectives)}
    if action == "build":
        path = RunFolder(out or Path("runs/internet-neg/vocab")).path / "words.txt"
        with atomic_path(path) as temporary:
            lines = [f"{w}\tnoun\n" for w in words.nouns] + [
                f"{w}\tadj\n" for w in words.adjectives
            ]
            temporary.write_text("".join(lines), encoding="utf-8")
        summary["out"] = str(path)
    elif action != "stats":
        raise InputError(f"vocab {action!r}; accepted: stats, build")
    show_result(summary, format_table([summary]), as_json=as_json)


@command(app)
def info(as_json: Json = False) -> None:
    """List the models and benchmarks that have a name."""
    from internet_neg.presets import BENCHMARKS, MODELS

    models = [
        {"model": k, "library": m.library, "is": m.model, "weights": m.pretrained}
        for k, m in MODELS.items()
    ]
    presets = [
        {"preset": k, "unknown": ", ".join(b.unknown), "G": str(b.config.groups)}
        for k, b in BENCHMARKS.items()
    ]
    text = f"{format_table(models)}\n\n{format_table(presets)}"
    show_result({"models": models, "presets": presets}, text, as_json=as_json)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return run_app(app, argv)


if __name__ == "__main__":
    raise SystemExit(main())

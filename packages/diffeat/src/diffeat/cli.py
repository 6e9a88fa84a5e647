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
    "diffeat",
    "Any activation of any diffusion model as a dense image feature (Meng et al., NeurIPS 2024). "
    "Begin with: diffeat demo",
)

Model = Annotated[
    str, typer.Option("--model", help="Hub id, pipeline folder, demo folder, or a short name.")
]
PresetModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="The same; several by commas for a combined preset.  [default: the preset's]",
    ),
]
LayersOption = Annotated[
    str, typer.Option("--layers", help="A preset, names or patterns by commas, or a JSON file.")
]
Input = Annotated[Path, typer.Option("--input", help="A folder of images, or one image.")]
T = Annotated[int, typer.Option("--t", help="Timestep of 1000.", min=0)]
PresetT = Annotated[
    int | None,
    typer.Option("--t", help="Timestep of 1000.  [default: the preset's, else 50]", min=0),
]
PromptOption = Annotated[str, typer.Option("--prompt", help="One prompt for all images.")]
Size = Annotated[int | None, typer.Option("--size", help="Side in pixels; images are resized.")]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Images per forward.", min=1)]
Dtype = Annotated[str, typer.Option("--dtype", help="float32, bfloat16, float16 or auto.")]
Offload = Annotated[
    str | None,
    typer.Option("--offload", help="model, sequential or group: weights wait on the CPU."),
]


def _extractor(
    model: str | None,
    layers: str,
    device: str,
    dtype: str,
    size: int | None,
    offload: str | None = None,
) -> Any:
    import torch

    from diffeat.aggregate import MultiModel
    from diffeat.demo import load_backbone
    from diffeat.extractor import FeatureExtractor
    from diffeat.presets import COMBINED, PRESETS
    from shared_core.device import select_device, select_dtype

    chosen = select_device(device)
    options: dict[str, Any] = {
        "dtype": select_dtype(dtype, chosen), "size": size, "offload": offload
    }  # fmt: skip
    if layers in COMBINED:
        devices = [chosen]
        if device == "auto" and chosen.type == "cuda":  # a model on each GPU
            devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
        models = model.split(",") if model else None
        return MultiModel.from_pretrained(layers, models, devices=devices, **options)
    if model is None:
        if layers not in PRESETS:
            raise InputError(f"--layers {layers} belongs to no model; give --model")
        model = PRESETS[layers].topology
    if (Path(model) / "text.safetensors").is_file():
        fx = load_backbone(Path(model))
        fx.layers = layers
        fx.backbone.to(chosen)
        return fx
    return FeatureExtractor.from_pretrained(model, layers, device=chosen, **options)


def _call_options(layers: str, t: int | None) -> dict[str, Any]:
    """Timestep, ensemble and noise of a preset; the timestep given goes before."""
    from diffeat.presets import PRESETS

    found = PRESETS[layers].call_options() if layers in PRESETS else {"t": 50}
    return found if t is None else {**found, "t": t}


@command(app)
def layers(
    model: Annotated[str | None, typer.Option("--model", help="Hub id or pipeline folder.")] = None,
    topology: Annotated[
        str | None, typer.Option("--topology", help="sd15, sd21, sdxl or playground: no download.")
    ] = None,
    maps: Annotated[bool, typer.Option("--maps", help="Also attention maps.")] = False,
    extra: Annotated[bool, typer.Option("--extra", help="Also names of our own.")] = False,
    pattern: Annotated[str | None, typer.Option("--pattern", help="Only names like this.")] = None,
    as_json: Json = False,
) -> None:
    """List every activation of a model from its configuration alone, without its weights."""
    from dataclasses import asdict

    from diffeat._loading import load_backbone_config
    from diffeat.naming import list_activations
    from diffeat.presets import build_topology

    if (model is None) == (topology is None):
        raise InputError("give either --model ID or --topology sd15|sd21|sdxl|playground")
    backbone = build_topology(topology) if topology else load_backbone_config(model or "")
    found = list_activations(backbone, maps=maps, extra=extra, pattern=pattern)
    rows = [
        {"name": i.name, "channels": i.channels, "reduction": i.reduction, "module": i.module_path}
        for i in found
    ]
    summary = {"activations": [asdict(i) for i in found]}
    show_result(summary, f"{format_table(rows)}\n\n{len(rows)} activations", as_json=as_json)


@command(app)
def presets(as_json: Json = False) -> None:
    """List the published selections."""
    from diffeat.presets import COMBINED, PRESETS

    rows = [
        {"preset": n, "model": p.topology, "size": p.size, "channels": p.channels, "t": p.t}
        | {"layers": len(p.layers), "source": p.source}
        for n, p in PRESETS.items()
    ]
    joined = "\n".join(f"{name} = {' + '.join(parts)}" for name, parts in COMBINED.items())
    summary = {"presets": {n: p.describe() for n, p in PRESETS.items()}, "combined": COMBINED}
    show_result(summary, f"{format_table(rows)}\n\n{joined}", as_json=as_json)


@command(app)
def extract(
    source: Input,
    layers: LayersOption,
    model: PresetModel = None,
    t: PresetT = None,
    prompt: PromptOption = "",
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", help="A text file that holds the prompt.")
    ] = None,
    size: Size = None,
    batch_size: BatchSize = 8,
    dtype: Dtype = "auto",
    offload: Offload = None,
    form: Annotated[
        str, typer.Option("--format", help="safetensors, npy, or memmap (one array a layer).")
    ] = "safetensors",
    layout: Annotated[
        str | None,
        typer.Option("--layout", help="per-sample or per-layer.  [default: per-sample]"),
    ] = None,
    pca: Annotated[
        int | None, typer.Option("--pca", help="Principal components to keep of each layer.", min=1)
    ] = None,
    resume: Resume = False,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Write the features of a folder of images; diffeat.FeatureCache reads them.

    Several GPUs: torchrun --nproc-per-node 4 -m diffeat.cli extract … ; each takes its share.
    """
    from diffeat.cache import extract_to_disk
    from shared_core.data.folders import named_images
    from shared_core.parallel import launched

    samples = named_images(source)
    if prompt_file is not None:
        try:
            prompt = prompt_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--prompt-file {prompt_file} cannot be read: {error}") from error
    here = launched(device)
    if here.world > 1:
        device = str(here.device)
    fx = _extractor(model, layers, device, dtype, size, offload)
    folder = extract_to_disk(
        fx, samples, out or Path("runs/diffeat/extract"), batch_size=batch_size, prompt=prompt,
        seed=seed, format=form, layout=layout, pca=pca,  # type: ignore[arg-type]
        resume=resume or here.world > 1, shard=(here.rank, here.world), **_call_options(layers, t),
    )  # fmt: skip
    summary = {"out": str(folder), "images": len(samples), "layers": list(fx.layers)}
    show_result(summary, f"{folder}: {len(samples)} images", as_json=as_json)


@command(app)
def visualize(
    source: Input,
    layers: LayersOption,
    model: PresetModel = None,
    t: PresetT = None,
    prompt: PromptOption = "",
    size: Size = None,
    images: Annotated[int, typer.Option("--images", help="At most this many.", min=1)] = 6,
    dtype: Dtype = "auto",
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Draw the first principal components of activations."""
    from diffeat.measure import pca_image
    from diffeat.plots import plot_pca
    from shared_core.data.folders import named_images
    from shared_core.run import RunFolder

    samples = named_images(source)[:images]
    fx = _extractor(model, layers, device, dtype, size)
    pictures, options = [image for _, image in samples], _call_options(layers, t)
    found = fx(pictures, prompt, seed=seed, ids=[name for name, _ in samples], **options)
    run = RunFolder(out or Path("runs/diffeat/visualize"))
    run.write_config("diffeat visualize", {"model": model, "layers": list(fx.layers), **options})
    shown = fx.pixels(pictures) / 2 + 0.5
    picture = run.save_figure("pca", plot_pca(shown, {n: pca_image(v) for n, v in found.items()}))
    show_result({"picture": str(picture)}, str(picture), as_json=as_json)


@command(app)
def measure(
    source: Input,
    model: Model,
    t: T = 50,
    prompt: PromptOption = "",
    size: Size = None,
    batch_size: BatchSize = 4,
    dtype: Dtype = "auto",
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
    plots: Plots = True,
    as_json: Json = False,
) -> None:
    """Measure noise, granularity and locality of every activation, without labels."""
    from diffeat.demo import measure_depth
    from diffeat.plots import plot_depth
    from shared_core.data.folders import named_images
    from shared_core.run import RunFolder

    fx = _extractor(model, "unet-out", device, dtype, size)
    images = [i for _, i in named_images(source)]
    rows = measure_depth(fx, images, t, seed=seed, prompt=prompt, batch_size=batch_size)
    run = RunFolder(out or Path("runs/diffeat/measure"))
    run.write_config("diffeat measure", {"model": model, "t": t, "seed": seed})
    run.write_metrics({"activations": rows})
    if plots:
        run.save_figure("depth", plot_depth(rows))
    short = [
        {"name": r["name"], **{key: round(r[key], 3) for key in ("noise", "hf", "locality")}}
        for r in rows
    ]
    show_result({"activations": rows}, f"{format_table(short)}\n\n{run.path}", as_json=as_json)


@command(app)
def demo(
    out: Out = None,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: Json = False,
    quick: Quick = False,
    plots: Plots = True,
) -> None:
    """Train small diffusion U-Nets on shapes, measure all their activations and rank them.

    Two seeds, each with a process of its own, or one with --quick. Nothing is downloaded. The
    first model stays in OUT/backbone for the other commands.
    """
    import time
    from dataclasses import asdict, replace

    from diffeat import demo as the_demo
    from shared_core.device import select_device
    from shared_core.run import RunFolder, progress

    chosen = select_device(device)
    settings = the_demo.DemoSettings()
    if quick:
        settings = replace(
            settings, seeds=1, steps=50, images=400, train=40, test=30, timesteps=(50,)
        )
    run = RunFolder(out or Path("runs/diffeat/demo"))
    run.write_config(
        "diffeat demo", {"seed": seed, "device": str(chosen), **asdict(settings)},
        distributions=["diffeat", "diffusers"],
    )  # fmt: skip
    started = time.perf_counter()
    total = settings.seeds * settings.steps
    with progress(total=total, description="training", unit="step") as bar:

        def told(place: int, step: int, loss: float) -> None:
            run.log(seed=seed + place, step=step, loss=loss)
            bar.update()
            if bar.n == total:
                say("measuring and probing")

        runs, first = the_demo.run_seeds(
            settings, seed, run.path / "backbone", device=chosen, told=told
        )
    result = the_demo.combine(runs)
    if plots:
        for name, figure in the_demo.figures(first, result, seed).items():
            run.save_figure(name, figure)
    metrics = {
        **result,
        "summary": {
            "message": result["message"],
            "rows": result["table"],
            "picture": "depth.png" if plots else None,
        },
    }
    run.write_metrics(metrics, timing={"seconds": time.perf_counter() - started})
    text = f"{format_table(result['table'])}\n\n{result['message']}\n\n{run.path}"
    show_result(metrics, text, as_json=as_json)


@command(app)
def rank(
    model: Model,
    images: Annotated[Path, typer.Option("--images", help="Folder of training and test images.")],
    labels: Annotated[Path, typer.Option("--labels", help="Folder of label PNGs, same names.")],
    classes: Annotated[int, typer.Option("--classes", help="Number of classes.", min=2)],
    candidates: Annotated[
        str, typer.Option("--candidates", help="paper, auto, all, or layers as for extract.")
    ] = "all",
    test_share: Annotated[
        float, typer.Option("--test-share", help="Share of images, from the end, to test on.")
    ] = 0.4,
    t: T = 50,
    prompt: PromptOption = "",
    size: Size = None,
    components: Annotated[
        int | None, typer.Option("--components", help="Principal components to compare by.")
    ] = None,
    kind: Annotated[
        str, typer.Option("--probe", help="ridge (one pass), or mlp (one candidate at a time).")
    ] = "ridge",
    networks: Annotated[int, typer.Option("--networks", help="Of mlp: how many vote.", min=1)] = 10,
    epochs: Annotated[int, typer.Option("--epochs", help="Of mlp, at most.", min=1)] = 100,
    batch_size: BatchSize = 8,
    dtype: Dtype = "auto",
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
    plots: Plots = True,
    as_json: Json = False,
) -> None:
    """Rank activations by a segmentation probe, without storing features."""
    from diffeat.plots import plot_ranking
    from diffeat.ranking import load_labelled
    from diffeat.ranking import rank as run_ranking
    from shared_core.data.folders import named_images
    from shared_core.run import RunFolder

    fx = _extractor(model, "unet-out", device, dtype, size)
    train, test = load_labelled(named_images(images), labels, fx, test_share)
    rows = run_ranking(
        fx, train, test, classes=classes, candidates=candidates, timesteps=[t], prompt=prompt,
        batch_size=batch_size, components=components, seed=seed,
        probe=kind, networks=networks, epochs=epochs,  # type: ignore[arg-type]
    )  # fmt: skip
    run = RunFolder(out or Path("runs/diffeat/rank"))
    run.write_config("diffeat rank", {"model": model, "candidates": candidates, "t": t})
    run.write_metrics({"ranking": rows})
    if plots:
        run.save_figure("ranking", plot_ranking(rows))
    short = [{**r, **{k: round(r[k], 4) for k in ("miou", "low", "high")}} for r in rows[:20]]
    show_result({"ranking": rows}, f"{format_table(short)}\n\n{run.path}", as_json=as_json)


@command(app)
def probe(
    layers: LayersOption,
    images: Annotated[Path, typer.Option("--images", help="Folder of training and test images.")],
    labels: Annotated[Path, typer.Option("--labels", help="Folder of label PNGs, same names.")],
    classes: Annotated[int, typer.Option("--classes", help="Number of classes.", min=2)],
    model: PresetModel = None,
    kind: Annotated[
        str, typer.Option("--probe", help="mlp (networks that vote), ridge, or head (many images).")
    ] = "mlp",
    networks: Annotated[int, typer.Option("--networks", help="Of mlp: how many vote.", min=1)] = 10,
    epochs: Annotated[int, typer.Option("--epochs", help="Of mlp, at most.", min=1)] = 100,
    steps: Annotated[int, typer.Option("--steps", help="Of head.", min=1)] = 80_000,
    channels: Annotated[int, typer.Option("--channels", help="Inside the head.", min=1)] = 512,
    test_share: Annotated[
        float, typer.Option("--test-share", help="Share of images, from the end, to test on.")
    ] = 0.4,
    t: PresetT = None,
    prompt: PromptOption = "",
    size: Size = None,
    batch_size: BatchSize = 8,
    dtype: Dtype = "auto",
    offload: Offload = None,
    resume: Resume = False,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Segment from labelled images with all chosen layers together.

    By default DDPM-seg's protocol for few labelled images; with --probe head a convolutional head,
    trained as the paper does on large data sets.
    """
    from diffeat.evaluate import segment
    from diffeat.ranking import load_labelled
    from shared_core.data.folders import named_images
    from shared_core.run import RunFolder, progress

    if kind not in ("mlp", "ridge", "head"):
        raise InputError(f"--probe {kind}; accepted: mlp, ridge, head")
    fx = _extractor(model, layers, device, dtype, size, offload)
    train, test = load_labelled(named_images(images), labels, fx, test_share)
    run = RunFolder(out or Path("runs/diffeat/probe"), resume=resume)
    options = _call_options(layers, t)
    run.write_config("diffeat probe", {"model": model, "layers": list(fx.layers), **options})
    if kind == "head":
        options = {"t": options["t"], "steps": steps, "channels": channels, **_trained(run, 500)}
        begun = options["state"]["step"] if options["state"] else 0
        bar = progress(total=steps - begun, description="training the head", unit="step")
        options["after"] = _with_bar(options["after"], bar)
    else:
        options |= {"networks": networks, "epochs": epochs, "batch_size": batch_size}
    found = segment(
        fx, train, test, classes=classes, probe=kind, prompt=prompt, seed=seed,  # type: ignore[arg-type]
        **options,
    )  # fmt: skip
    run.write_metrics(found)
    rows = [
        {"class": i, "IoU": "never there" if v is None else f"{v:.4f}"}
        for i, v in enumerate(found["iou"])
    ]
    text = f"{format_table(rows)}\n\nmIoU {found['miou']:.4f}\n{run.path}"
    show_result(found, text, as_json=as_json)


def _trained(run: Any, every: int) -> dict[str, Any]:
    """Where to begin, and what to do after each step: log, and save every so often."""

    def after(step: int, loss: float, state: Any) -> None:
        run.log(step=step, loss=loss)
        if step % every == 0:
            run.save_checkpoint(state())

    state = run.load_checkpoint() if run.has_checkpoint else None
    if state is not None:
        run.truncate_log(state["step"])
    return {"state": state, "after": after}


def _with_bar(after: Any, bar: Any) -> Any:
    def told(step: int, loss: float, state: Any) -> None:
        after(step, loss, state)
        bar.update()

    return told


@command(app)
def correspond(
    layers: LayersOption,
    pairs: Annotated[Path, typer.Option("--pairs", help="Folder laid out as SPair-71k.")],
    model: PresetModel = None,
    split: Annotated[
        str, typer.Option("--split", help="Folder of PairAnnotation, or a JSON list of pairs.")
    ] = "test",
    limit: Annotated[int | None, typer.Option("--limit", help="At most so many.", min=1)] = None,
    method: Annotated[
        str, typer.Option("--method", help="nn, or conv: train a convolution first.")
    ] = "nn",
    train_split: Annotated[str, typer.Option("--train-split", help="Of conv.")] = "trn",
    val_split: Annotated[str, typer.Option("--val-split", help="Of conv.")] = "val",
    val_limit: Annotated[int, typer.Option("--val-limit", help="Of conv, pairs.", min=1)] = 360,
    epochs: Annotated[int, typer.Option("--epochs", help="Of conv.", min=1)] = 2,
    steps: Annotated[int, typer.Option("--steps", help="Of conv, an epoch.", min=1)] = 5000,
    alpha: Annotated[float, typer.Option("--alpha", help="Threshold of PCK.", min=0)] = 0.1,
    t: PresetT = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="By default the paper's for SPair-71k.")
    ] = None,
    size: Size = None,
    dtype: Dtype = "auto",
    offload: Offload = None,
    resume: Resume = False,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Match keypoints of image pairs and report PCK.

    By nearest neighbours of the features as they are; or, with --method conv, of a convolution of
    them that is trained on other pairs first (it stays in OUT/head.safetensors).
    """
    from safetensors.torch import save_file

    from diffeat.evaluate import correspond as run_correspond
    from diffeat.evaluate import read_pairs
    from diffeat.presets import PROMPTS
    from diffeat.train import train_correspondence
    from shared_core.run import RunFolder, atomic_path, progress

    if method not in ("nn", "conv"):
        raise InputError(f"--method {method}; accepted: nn, conv")
    found_pairs = read_pairs(pairs, split, limit)
    others = []
    if method == "conv":
        others = [read_pairs(pairs, train_split), read_pairs(pairs, val_split, val_limit)]
    fx = _extractor(model, layers, device, dtype, size, offload)
    options = {
        "prompt": PROMPTS["spair"] if prompt is None else prompt, "alpha": alpha, "seed": seed,
        **_call_options(layers, t),
    }  # fmt: skip
    run = RunFolder(out or Path("runs/diffeat/correspond"), resume=resume)
    run.write_config(
        "diffeat correspond",
        {"model": model, "layers": list(fx.layers), "split": split, "method": method, **options},
    )
    head, trained = None, {}  # type: ignore[var-annotated]
    if method == "conv":
        given = _trained(run, 100)
        total = epochs * min(steps, len(others[0]))
        begun = given["state"]["step"] if given["state"] else 0
        bar = progress(total=total - begun, description="training the convolution", unit="pair")
        head, trained = train_correspondence(
            fx, others[0], validation=others[1], epochs=epochs, steps_per_epoch=steps,
            state=given["state"], after=_with_bar(given["after"], bar), **options,
        )  # fmt: skip
        with atomic_path(run.path / "head.safetensors") as temporary:
            save_file(head.state_dict(), temporary)
    found = {**run_correspond(fx, found_pairs, head=head, **options), **trained}
    run.write_metrics(found)
    rows = [*found["categories"], {"category": "all keypoints", **found}]
    short = [
        {k: row[k] for k in ("category", "pairs", "keypoints")}
        | {k: f"{100 * row[k]:.1f}" for k in ("pck_image", "pck_box")}
        for row in rows
    ]
    text = f"{format_table(short)}\n\nPCK@{alpha}, in per cent\n{run.path}"
    show_result(found, text, as_json=as_json)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return run_app(app, argv)


if __name__ == "__main__":
    raise SystemExit(main())

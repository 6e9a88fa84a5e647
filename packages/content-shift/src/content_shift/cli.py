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
    "content-shift",
    "Diffusion features that stay true to the input image: GATE (Meng et al., NeurIPS 2024). "
    "Begin with: content-shift demo",
)

Model = Annotated[
    str, typer.Option("--model", help="Hub id, pipeline folder, demo folder, or a short name.")
]
Layers = Annotated[
    str, typer.Option("--layers", help="A preset, names or patterns by commas, or a JSON file.")
]
Input = Annotated[Path, typer.Option("--input", help="A folder of images, or one image.")]
T = Annotated[int, typer.Option("--t", help="Timestep of 1000.", min=0)]
PromptOption = Annotated[
    str, typer.Option("--prompt", help="Where a technique sets none, and without it.")
]
Size = Annotated[int | None, typer.Option("--size", help="Side in pixels; images are resized.")]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Images per forward.", min=1)]
Dtype = Annotated[str, typer.Option("--dtype", help="float32, bfloat16, float16 or auto.")]
Prompts = Annotated[
    list[str] | None, typer.Option("--with-prompt", help="A prompt as a technique; repeatable.")
]
Control = Annotated[
    str | None, typer.Option("--control", help="ControlNet: hub id or folder.")
]  # fmt: skip
Preprocess = Annotated[
    str, typer.Option("--preprocess", help="What ControlNet sees: canny, sobel or image.")
]
Scale = Annotated[float, typer.Option("--scale", help="ControlNet's conditioning scale.")]
Loras = Annotated[
    list[str] | None, typer.Option("--lora", help="LoRA weights as a technique; repeatable.")
]
Cfg = Annotated[
    float | None, typer.Option("--cfg", help="Classifier-free guidance as a technique.")
]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", help="YAML or JSON file of named techniques.")
]
Steps = Annotated[int, typer.Option("--steps", help="Training steps in all.", min=1)]
CaptionFile = Annotated[
    Path | None, typer.Option("--captions", help="JSON: image name to caption or captions.")
]
Assigners = Annotated[int, typer.Option("--assigners", help="Number of assigners.", min=1)]
Granularity = Annotated[
    str, typer.Option("--granularity", help="Weights: scalar (paper) or channel (their code).")
]


def _run(out: Path | None, name: str, settings: dict[str, Any], *, resume: bool = False) -> Any:
    from shared_core.run import RunFolder

    run = RunFolder(out or Path(f"runs/content-shift/{name}"), resume=resume)
    run.write_config(
        f"content-shift {name}", settings, distributions=["content-shift", "diffeat", "diffusers"]
    )
    return run


@command(app)
def gate(
    source: Input,
    model: Model,
    layers: Layers,
    t: T = 50,
    prompt: PromptOption = "",
    prompts: Prompts = None,
    control: Control = None,
    preprocess: Preprocess = "canny",
    scale: Scale = 1.0,
    loras: Loras = None,
    cfg: Cfg = None,
    recipe: RecipeFile = None,
    draws: Annotated[int, typer.Option("--draws", help="Noise draws.", min=1)] = 2,
    ref: Annotated[
        str, typer.Option("--ref", help="Reference at t = 0: plain (paper) or same technique.")
    ] = "plain",
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Divide channels by the reference's deviation.")
    ] = False,
    size: Size = None,
    batch_size: BatchSize = 8,
    dtype: Dtype = "auto",
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
    plots: Plots = True,
    as_json: Json = False,
) -> None:
    """Score techniques on your images before you integrate them: eq. 2, and reconstruction gain."""
    from content_shift._inputs import open_extractor, techniques_from
    from content_shift.gate import evaluate
    from shared_core.data.folders import named_images
    from shared_core.device import select_device

    samples = named_images(source)
    every = techniques_from(prompts or [], control, preprocess, scale, loras or [], cfg, recipe)
    fx = open_extractor(model, layers, select_device(device), dtype, size)
    run = _run(out, "gate", {"model": model, "t": t, "techniques": {k: repr(r) for k, r in
                                                                    every.items()}})  # fmt: skip
    report = evaluate(
        fx, every, [i for _, i in samples], t, draws, prompt=prompt, ref=ref, seed=seed,
        normalize="channel" if normalize else None, ids=[n for n, _ in samples],
        batch_size=batch_size,
    )  # fmt: skip
    report.save(run.path, plot=plots)
    run.write_metrics(report.to_dict())
    rows = [
        {
            "technique": r["technique"],
            "score": f"{r['score']:+.3f}",
            "std over draws": "" if r["std"] is None else f"{r['std']:.3f}",
            "reconstruction gain dB": f"{r['gain']:+.3f}",
        }
        for r in report.pooled
    ]
    ranking = f"by score: {', '.join(report.rank())}\nby gain: {', '.join(report.rank('gain'))}"
    show_result(report.to_dict(), f"{format_table(rows)}\n\n{ranking}\n{run.path}", as_json=as_json)


@command(app, "img2img")
def img2img_(
    source: Input,
    model: Model,
    prompt: PromptOption = "",
    prompts: Prompts = None,
    control: Control = None,
    preprocess: Preprocess = "canny",
    scale: Scale = 1.0,
    loras: Loras = None,
    cfg: Cfg = None,
    recipe: RecipeFile = None,
    strength: Annotated[float, typer.Option("--strength", help="Share that is repainted.")] = 0.7,
    steps: Annotated[int, typer.Option("--steps", help="Of the whole diffusion.", min=1)] = 30,
    images: Annotated[int, typer.Option("--images", help="At most this many.", min=1)] = 6,
    size: Size = None,
    dtype: Dtype = "auto",
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
    plots: Plots = True,
    as_json: Json = False,
) -> None:
    """Repaint images strongly with and without each technique: who stays closer to the input?"""
    from content_shift._inputs import open_extractor, techniques_from
    from content_shift.gate import img2img
    from shared_core.data.folders import named_images
    from shared_core.device import select_device

    samples = named_images(source)[:images]
    every = techniques_from(prompts or [], control, preprocess, scale, loras or [], cfg, recipe)
    fx = open_extractor(model, "unet-out", select_device(device), dtype, size)
    run = _run(out, "img2img", {"model": model, "strength": strength, "steps": steps})
    found = img2img(
        fx, every, [i for _, i in samples], strength, steps, prompt=prompt, seed=seed,
        ids=[n for n, _ in samples],
    )  # fmt: skip
    found.save(run.path, plot=plots)
    run.write_metrics({"rows": found.rows})
    short = [
        {k: v if isinstance(v, str) else f"{v:.3f}" for k, v in row.items()} for row in found.rows
    ]
    show_result({"rows": found.rows}, f"{format_table(short)}\n\n{run.path}", as_json=as_json)


@command(app)
def extract(
    source: Input,
    model: Model,
    recipe: Annotated[
        str,
        typer.Option("--recipe", help="spair, horse21, bedroom28, ade20k, cityscapes, or a file."),
    ],
    loras: Annotated[
        list[str] | None, typer.Option("--lora", help="KEY=PATH of a preset's LoRA; repeatable.")
    ] = None,
    control: Control = None,
    topology: Annotated[str, typer.Option("--topology", help="sd15 or sdxl.")] = "sd15",
    pre_denoise: Annotated[
        str, typer.Option("--pre-denoise", help="Begin at t = 60: attention, control or none.")
    ] = "attention",
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Leave features out whose LoRA is not given.")
    ] = False,
    layers: Annotated[
        str, typer.Option("--layers", help="For features of a file that name none.")
    ] = "sd15-legacy",
    prompt: PromptOption = "",
    size: Size = None,
    batch_size: BatchSize = 8,
    dtype: Dtype = "auto",
    resume: Resume = False,
    out: Out = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Write every feature of a recipe for every image in one pass, one file an image.

    Several GPUs: torchrun --nproc-per-node 4 -m content_shift.cli extract … ; each takes its share.
    """
    from content_shift._inputs import features_from, open_extractor
    from content_shift.bucket import extract_bucket
    from shared_core.data.folders import named_images
    from shared_core.parallel import launched

    samples = named_images(source)
    specs = features_from(recipe, loras or [], control, topology, pre_denoise, skip_missing)
    here = launched(device)
    fx = open_extractor(model, layers, here.device, dtype, size)
    bucket = extract_bucket(
        fx, specs, samples, out or Path("runs/content-shift/extract"), prompt=prompt,
        batch_size=batch_size, resume=resume or here.world > 1,
        shard=(here.rank, here.world),
    )  # fmt: skip
    summary = {
        "out": str(bucket.path), "images": len(samples), "features": [s.name for s in specs],
    }  # fmt: skip
    text = f"{bucket.path}: {len(samples)} images, features {', '.join(summary['features'])}"  # type: ignore[arg-type]
    show_result(summary, text, as_json=as_json)


@command(app, "train-lora")
def train_lora_(
    source: Input,
    model: Model,
    captions: CaptionFile = None,
    steps: Steps = 3000,
    rank: Annotated[int, typer.Option("--rank", help="Of the weights.", min=1)] = 64,
    alpha: Annotated[int, typer.Option("--alpha", help="Scale over rank.", min=1)] = 32,
    lr: Annotated[float, typer.Option("--lr", help="Of the U-Net's weights.")] = 1e-4,
    te_lr: Annotated[float, typer.Option("--te-lr", help="Of the text encoder's; 0: none.")] = 5e-5,
    locon: Annotated[
        bool, typer.Option("--locon/--no-locon", help="Also on convolutions, as in the paper.")
    ] = True,
    limit: Annotated[int, typer.Option("--images", help="At most this many.", min=1)] = 30,
    save_every: Annotated[int, typer.Option("--save-every", help="Steps.", min=1)] = 100,
    size: Size = None,
    batch_size: BatchSize = 1,
    dtype: Dtype = "auto",
    resume: Resume = False,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Train a LoRA of your images' style; diffusers loads the result. Also under torchrun."""
    from content_shift._inputs import open_extractor, read_captions
    from content_shift.lora import train_lora
    from shared_core.data.folders import named_images
    from shared_core.device import select_dtype
    from shared_core.parallel import join_processes

    samples = named_images(source)[:limit]
    words: Any = [""] if captions is None else read_captions(captions, [n for n, _ in samples])
    folder = out or Path("runs/content-shift/train-lora")
    with join_processes(device) as here:
        # Weights in float32, computation in the chosen type.
        mixed = select_dtype(dtype, here.device)
        fx = open_extractor(model, "unet-out", here.device, "float32", size)
        found = train_lora(
            fx, [i for _, i in samples], words, out=folder, rank=rank, alpha=alpha, lr=lr,
            te_lr=te_lr, steps=steps, batch_size=batch_size, locon=locon, dtype=mixed, seed=seed,
            resume=resume, save_every=save_every,
        )  # fmt: skip
    if not here.first:
        return
    summary = {
        "out": str(found.path), "images": len(samples), "layers": found.modules,
        "loss": found.losses[-1] if found.losses else None,
    }  # fmt: skip
    run = _run(
        found.path, "train-lora", {"model": model, "steps": steps, "rank": rank}, resume=True
    )
    run.write_metrics(summary)
    show_result(summary, f"{found.path}: LoRA on {found.modules} layers", as_json=as_json)


@command(app, "train-control")
def train_control_(
    source: Input,
    model: Model,
    captions: CaptionFile = None,
    preprocess: Preprocess = "canny",
    steps: Steps = 1000,
    lr: Annotated[float, typer.Option("--lr", help="Peak learning rate.")] = 1e-4,
    widths: Annotated[
        str, typer.Option("--embedding-channels", help="Of the control image's embedding.")
    ] = "16,32,96,256",
    save_every: Annotated[int, typer.Option("--save-every", help="Steps.", min=1)] = 100,
    size: Size = None,
    batch_size: BatchSize = 8,
    dtype: Dtype = "auto",
    resume: Resume = False,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Train a ControlNet for a model of your own, on your images' edges. Also under torchrun."""
    from content_shift._inputs import open_extractor, read_captions
    from content_shift.train_control import train_control
    from shared_core.data.folders import named_images
    from shared_core.parallel import join_processes

    samples = named_images(source)
    words = None
    if captions is not None:
        words = [c[0] for c in read_captions(captions, [n for n, _ in samples])]
    try:
        channels = [int(w) for w in widths.split(",")]
    except ValueError as error:
        raise InputError(f"--embedding-channels {widths}; accepted: numbers by commas") from error
    folder = out or Path("runs/content-shift/train-control")
    losses: list[float] = []
    with join_processes(device) as here:
        fx = open_extractor(model, "unet-out", here.device, dtype, size)
        train_control(
            fx, [i for _, i in samples], words, preprocess=preprocess, steps=steps, lr=lr,
            batch_size=batch_size, embedding_channels=channels, seed=seed, out=folder,
            resume=resume, save_every=save_every, told=lambda step, loss: losses.append(loss),
        )  # fmt: skip
    if not here.first:
        return
    summary = {
        "out": str(folder / "controlnet"), "images": len(samples),
        "loss": losses[-1] if losses else None,
    }  # fmt: skip
    run = _run(folder, "train-control", {"model": model, "steps": steps}, resume=True)
    run.write_metrics(summary)
    show_result(summary, f"{folder / 'controlnet'}: trained on {len(samples)}", as_json=as_json)


@command(app)
def amalgamate(
    bucket: Annotated[Path, typer.Option("--bucket", help="Folder that extract wrote.")],
    task: Annotated[str, typer.Option("--task", help="correspondence or segmentation.")],
    pairs: Annotated[
        Path | None, typer.Option("--pairs", help="Correspondence: folder laid out as SPair-71k.")
    ] = None,
    train_split: Annotated[str, typer.Option("--train-split", help="Of the pairs.")] = "trn",
    val_split: Annotated[str, typer.Option("--val-split", help="Of the pairs.")] = "val",
    head: Annotated[str, typer.Option("--head", help="nn or conv.")] = "nn",
    steps: Steps = 10_000,
    validate_every: Annotated[int, typer.Option("--validate-every", help="Steps.", min=1)] = 500,
    side: Annotated[int, typer.Option("--side", help="Of the maps.", min=4)] = 64,
    labels: Annotated[
        Path | None, typer.Option("--labels", help="Segmentation: label PNGs, same names.")
    ] = None,
    classes: Annotated[int, typer.Option("--classes", help="Number of classes.", min=2)] = 2,
    label_side: Annotated[
        int | None, typer.Option("--label-side", help="Side that labels are resized to.")
    ] = None,
    networks: Annotated[int, typer.Option("--networks", help="How many vote.", min=1)] = 10,
    epochs: Annotated[int, typer.Option("--epochs", help="Of each, at most.", min=1)] = 100,
    test_share: Annotated[
        float, typer.Option("--test-share", help="Share of images, from the end, to test on.")
    ] = 0.4,
    assigners: Assigners = 2,
    granularity: Granularity = "scalar",
    gamma1: Annotated[float, typer.Option("--gamma1", help="g1 of eq. 5.", min=0)] = 0.0,
    gamma2: Annotated[float, typer.Option("--gamma2", help="g2 of eq. 5.", min=0)] = 0.0,
    resume: Resume = False,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Learn how to weigh the features of a bucket, for matching or for segmentation."""
    from content_shift.bucket import FeatureBucket
    from shared_core.device import select_device

    if task not in ("correspondence", "segmentation"):
        raise InputError(f"--task {task}; accepted: correspondence, segmentation")
    if granularity not in ("scalar", "channel") or head not in ("nn", "conv"):
        raise InputError("accepted: --granularity scalar or channel, --head nn or conv")
    found_bucket = FeatureBucket(bucket)
    folder = out or Path("runs/content-shift/amalgamate")
    common: dict[str, Any] = {
        "n_assigners": assigners, "granularity": granularity, "gamma1": gamma1, "gamma2": gamma2,
        "seed": seed, "device": select_device(device),
    }  # fmt: skip
    if task == "correspondence":
        from content_shift.correspondence import from_pair, train_correspondence
        from diffeat.evaluate import read_pairs

        if pairs is None:
            raise InputError("--task correspondence wants --pairs")
        parts = [
            [from_pair(p, pairs / "JPEGImages") for p in read_pairs(pairs, split)]
            for split in (train_split, val_split)
        ]
        _, found = train_correspondence(
            found_bucket, *parts, head="conv" if head == "conv" else "nn", steps=steps,
            validate_every=validate_every, side=side, out=folder, resume=resume, **common,
        )  # fmt: skip
        rows = [
            {"round": name, "step": found[name]["step"]}
            | {k: f"{100 * found[name][k]:.1f}" for k in ("pck_image", "pck_box")}
            for name in ("last", "best")
        ]
        text = f"{format_table(rows)}\n\nPCK@0.1 on {val_split}, in per cent"
    else:
        import torch

        from content_shift.segmentation import train_segmentation
        from shared_core.data.folders import label_maps

        if labels is None:
            raise InputError("--task segmentation wants --labels")
        names = list(found_bucket)
        cut = round(len(names) * (1 - test_share))
        size = None if label_side is None else (label_side, label_side)
        maps = {n: torch.from_numpy(m) for n, m in label_maps(labels, names, size).items()}
        found = train_segmentation(
            found_bucket, maps, names[:cut], names[cut:],
            classes=classes, networks=networks, epochs=epochs, **common,
        )  # fmt: skip
        text = f"mIoU {found['miou']:.4f}"
    run = _run(folder, "amalgamate", {"bucket": str(bucket), "task": task, **common}, resume=True)
    run.write_metrics(found)
    show_result(found, f"{text}\n{run.path}", as_json=as_json)


@command(app)
def caption(
    source: Input,
    model: Annotated[
        str | None, typer.Option("--model", help="Image-to-text model; by default Kosmos-2.")
    ] = None,
    beginning: Annotated[
        str, typer.Option("--beginning", help="Beginning of every caption.")
    ] = "An image of",
    dtype: Dtype = "auto",
    out: Out = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Describe every image, for --captions and fine-grained prompts (paper A.1)."""
    import numpy as np
    import torch

    from content_shift.caption import Captioner
    from content_shift.presets import CAPTIONER
    from shared_core.data.folders import named_images
    from shared_core.device import select_device, select_dtype
    from shared_core.run import progress, write_json

    samples = named_images(source)
    chosen = select_device(device)
    captioner = Captioner(
        model or CAPTIONER, prompt=beginning, device=chosen, dtype=select_dtype(dtype, chosen)
    )
    run = _run(out, "caption", {"model": model or CAPTIONER, "beginning": beginning})
    found: dict[str, str] = {}
    # One after another: images differ in size, and captions are not to depend on their neighbours.
    for name, image in progress(samples, description="captioning", unit="image"):
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        found[name] = captioner(pixels[None])[0]
    write_json(run.path / "captions.json", found)
    summary = {"captions": found, "file": str(run.path / "captions.json")}
    rows = [{"image": name, "caption": text} for name, text in found.items()]
    show_result(summary, f"{format_table(rows)}\n\n{summary['file']}", as_json=as_json)


@command(app)
def demo(
    backbone: Annotated[
        Path | None,
        typer.Option("--backbone", help="backbone folder of an earlier demo, also of diffeat's."),
    ] = None,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: Json = False,
    quick: Quick = False,
    plots: Plots = True,
) -> None:
    """Train small diffusion models and ControlNets for them; see what keeps their features true.

    Two seeds, or one with --quick; each has a process of its own. Nothing is downloaded. The models
    of the first stay in OUT for the other commands.
    """
    import time
    from dataclasses import asdict

    from content_shift import demo as the_demo
    from shared_core.device import select_device
    from shared_core.run import progress

    chosen = select_device(device)
    settings = the_demo.DemoSettings()
    if quick:
        settings = settings.quick()
    run = _run(
        out, "demo",
        {"seed": seed, "device": str(chosen), "backbone": backbone and str(backbone)}
        | asdict(settings),
    )  # fmt: skip
    started = time.perf_counter()
    total = settings.seeds * (settings.control_steps + (0 if backbone else settings.backbone_steps))
    with progress(total=total, description="training", unit="step") as bar:

        def told(place: int) -> None:
            bar.update()
            if bar.n == total:
                say("comparing techniques")

        rows, fx, net = the_demo.run_seeds(
            settings, seed, run.path, backbone=backbone, device=chosen, told=told
        )
    found = the_demo.tell(rows)
    if plots:
        for name, figure in the_demo.figures(fx, net, rows, seed).items():
            run.save_figure(name, figure)
    metrics = {
        **found,
        "rows": rows,
        "summary": {
            "message": found["message"],
            "rows": found["table"],
            "picture": "scatter.png" if plots else None,
        },
    }
    run.write_metrics(metrics, timing={"seconds": time.perf_counter() - started})
    text = f"{format_table(found['table'])}\n\n{found['message']}\n\n{run.path}"
    show_result(metrics, text, as_json=as_json)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return run_app(app, argv)


if __name__ == "__main__":
    raise SystemExit(main())

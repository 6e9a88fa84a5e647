"""The command line: parses, calls, prints."""

from pathlib import Path
from typing import Annotated

import typer

from shared_core.cli import (
    Device,
    Json,
    Out,
    Quick,
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
    "gmsa",
    "Context compression for language models by group merging and layer semantic alignment "
    "(Tang et al., 2025). Begin with: gmsa demo",
)

Checkpoint = Annotated[Path, typer.Argument(help="Folder of a GMSA checkpoint.")]
Rate = Annotated[int, typer.Option("--rate", help="Tokens a soft token stands for.", min=1)]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text: {error}") from error


@command(app)
def demo(
    seeds: Annotated[int, typer.Option("--seeds", help="Number of seeds.", min=1)] = 2,
    out: Out = None,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: Json = False,
    quick: Quick = False,
) -> None:
    """Train both stages on a tiny language of facts; compare with truncation and pooling.

    Nothing is downloaded; it runs on the CPU. --quick takes one seed and fewer steps.
    """
    import time
    from dataclasses import asdict

    import torch

    from gmsa import demo as the_demo
    from shared_core.device import select_device
    from shared_core.plots import COLORS, new_figure, style
    from shared_core.run import RunFolder, progress

    if select_device(device).type != "cpu":
        raise InputError("the demo's model is too small for a GPU; use --device cpu")
    settings = the_demo.DemoSettings()
    if quick:
        settings, seeds = settings.quick(), 1
    run = RunFolder(out or Path("runs/gmsa/demo"))
    run.write_config(
        "gmsa demo", {"seed": seed, "seeds": seeds, **asdict(settings)}, distributions=["gmsa"]
    )
    started = time.perf_counter()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the model is small: a second thread would only get in the way
    steps = settings.base_steps + settings.ae_steps + 2 * settings.keft_steps
    try:
        with progress(total=seeds * steps, description="training", unit="step") as bar:
            results = [
                the_demo.run_seed(s, settings, tick=lambda: bar.update())
                for s in range(seed, seed + seeds)
            ]
    finally:
        torch.set_num_threads(threads)
    rows = the_demo.table(results)
    message = the_demo.tell(rows, seeds, settings.rate)
    with style():
        figure, axes = new_figure(1, 2)
        names = [row["method"] for row in rows]
        axes[0].barh(names[::-1], [row["QA exact match %"] for row in rows][::-1], color=COLORS[0])
        axes[0].set_xlabel("QA exact match, %")
        axes[0].set_title(f"Questions answered at {settings.rate}x")
        for number, result in enumerate(results):
            axes[1].plot(result["ae_losses"], color=COLORS[number], label=f"seed {seed + number}")
        axes[1].set_xlabel("step of the autoencoding stage")
        axes[1].set_ylabel("cross-entropy")
        axes[1].set_title("Learning to restate")
        axes[1].legend()
    run.save_figure("comparison", figure)
    metrics = {
        "seeds": {str(seed + i): r["methods"] for i, r in enumerate(results)},
        "summary": {"message": message, "rows": rows, "picture": "comparison.png"},
    }
    run.write_metrics(metrics, timing={"seconds": time.perf_counter() - started})
    text = f"{format_table(rows)}\n\n{message}\n\n{run.path}: metrics.json, comparison.png"
    show_result(metrics, text, as_json=as_json)


@command(app)
def compress(
    checkpoint: Checkpoint,
    texts: Annotated[list[Path], typer.Argument(help="Text files, one document each.")],
    store: Annotated[Path, typer.Option("--store", help="Folder of the store.")],
    rate: Rate = 4,
    as_json: Json = False,
) -> None:
    """Compress documents into a store on disk; each file's name is its id."""
    from gmsa.compressor import GMSACompressor
    from gmsa.store import SoftTokenStore

    documents = {path.name: _read(path) for path in texts}
    if len(documents) < len(texts):
        raise InputError("two of the files have the same name; ids have to differ")
    compressor = GMSACompressor.from_pretrained(checkpoint)
    opened = SoftTokenStore(store, compressor)
    opened.add(list(documents), list(documents.values()), rate)
    found = {"documents": len(opened), "store": str(store)}
    show_result(found, f"{store}: {len(opened)} documents", as_json=as_json)


@command(app)
def answer(
    checkpoint: Checkpoint,
    question: Annotated[str, typer.Argument(help="The question.")],
    context: Annotated[Path, typer.Option("--context", help="Text file to answer from.")],
    rate: Rate = 4,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 100,
    as_json: Json = False,
) -> None:
    """Answer a question from a compressed text file."""
    from gmsa.compressor import GMSACompressor

    text = _read(context)
    compressor = GMSACompressor.from_pretrained(checkpoint)
    found = compressor.answer(question, text, rate, max_new_tokens=max_new_tokens)
    report = compressor.report(text, rate)
    show_result({"answer": found, **report}, str(found), as_json=as_json)


@command(app)
def reconstruct(
    checkpoint: Checkpoint,
    text: Annotated[Path, typer.Argument(help="Text file to compress and restate.")],
    rate: Rate = 4,
    as_json: Json = False,
) -> None:
    """Restate a text file from its soft tokens."""
    from gmsa.compressor import GMSACompressor

    content = _read(text)
    found = GMSACompressor.from_pretrained(checkpoint).reconstruct(content, rate)
    show_result({"text": found}, found, as_json=as_json)


@command(app)
def info(as_json: Json = False) -> None:
    """List the paper's presets."""
    from dataclasses import asdict

    from gmsa.presets import PRESETS

    found = {name: asdict(preset) for name, preset in PRESETS.items()}
    rows = [
        {"preset": n, "model": p["model"], "rates": ",".join(map(str, p["rates"])),
         "encoder layers": p["encoder_layers"]}
        for n, p in found.items()
    ]  # fmt: skip
    show_result(found, format_table(rows), as_json=as_json)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_app(app, argv)


if __name__ == "__main__":
    raise SystemExit(main())

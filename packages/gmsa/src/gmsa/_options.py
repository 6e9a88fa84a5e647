"""The options of the commands, as typer reads them."""

from typing import Annotated

import typer

Checkpoint = Annotated[str, typer.Argument(help="Folder or hub id of a GMSA checkpoint.")]
Rate = Annotated[int, typer.Option("--rate", help="Tokens a soft token stands for.", min=1)]
Rates = Annotated[str, typer.Option("--rates", help="Compression rates, by commas.")]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", help="Length of an answer.", min=1)]
Batch = Annotated[int, typer.Option("--batch-size", help="Texts at once.", min=1)]
Limit = Annotated[int | None, typer.Option("--limit", help="Records, from the first on.", min=1)]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Attn = Annotated[str, typer.Option("--attn", help="sdpa, flash_attention_2, eager, …")]
Base = Annotated[
    str | None,
    typer.Option("--base-model", help="The base, if it is not where the checkpoint says."),
]

# The options of both training commands.
Preset = Annotated[
    str | None, typer.Option("--preset", help="Settings of the paper; gmsa info lists them.")
]
Model = Annotated[
    str | None,
    typer.Option("--model", help="Hub id or folder of a language model, or a GMSA checkpoint."),
]
TrainFile = Annotated[
    str | None,
    typer.Option("--train-file", help="JSON lines with input, prompt, answer; or a text a line."),
]
TrainRates = Annotated[
    str | None, typer.Option("--rates", help="Rates to draw from, by commas.  [default: 4,8]")
]
Sampling = Annotated[
    str | None, typer.Option("--rate-sampling", help="sample, batch or fixed.  [default: sample]")
]
Layers = Annotated[int | None, typer.Option("--encoder-layers", help="k.  [default: 8]", min=1)]
LsaLayers = Annotated[int | None, typer.Option("--lsa-layers", help="k_LSA.  [default: 1]", min=1)]
Alignment = Annotated[
    str | None, typer.Option("--alignment", help="lsa, linear or none (ablation).  [default: lsa]")
]
LsaInit = Annotated[
    str | None, typer.Option("--lsa-init", help="decoder or random (ablation).  [default: decoder]")
]
Merging = Annotated[
    str | None,
    typer.Option(
        "--merging",
        help="groups; memory (tokens as in ICAE) or embeddings (pooling), as baselines.  "
        "[default: groups]",
    ),
]
MemoryTokens = Annotated[
    int | None, typer.Option("--memory-tokens", help="At most.  [default: 512]", min=1)
]
LoraR = Annotated[
    int | None, typer.Option("--lora-r", help="Rank of the encoder's LoRA.  [default: 128]", min=1)
]
Instruction = Annotated[
    str | None, typer.Option("--instruction", help="The prompt that asks for the context.")
]
Steps = Annotated[int | None, typer.Option("--steps", help="Steps.  [default: 1000]", min=1)]
Lr = Annotated[float | None, typer.Option("--lr", help="Learning rate.", min=0)]
TrainBatch = Annotated[
    int | None, typer.Option("--batch-size", help="Samples of a micro-batch.  [default: 1]", min=1)
]
Accumulation = Annotated[
    int | None, typer.Option("--grad-accum", help="Micro-batches a step.  [default: 1]", min=1)
]
MaxLength = Annotated[
    int | None,
    typer.Option("--max-length", help="Tokens of context and prompt.  [default: 4096]", min=2),
]
SaveSteps = Annotated[
    int | None, typer.Option("--save-steps", help="Between checkpoints.  [default: 500]", min=1)
]
TrainDtype = Annotated[
    str | None, typer.Option("--dtype", help="Of frozen weights: auto, float32, bfloat16, float16.")
]
TrainAttn = Annotated[
    str | None, typer.Option("--attn", help="sdpa, flash_attention_2, eager, …  [default: sdpa]")
]
Checkpointing = Annotated[
    str | None,
    typer.Option(
        "--checkpointing",
        help="Recompute activations of none, encoder, decoder or all.  [default: none]",
    ),
]
ReportTo = Annotated[
    str | None, typer.Option("--report-to", help="none, wandb, tensorboard, …  [default: none]")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")]
# A stage's seed is part of its preset.
StageSeed = Annotated[
    int | None, typer.Option("--seed", help="Seed of every random draw.  [default: 0]", min=0)
]

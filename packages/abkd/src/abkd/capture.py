"""Writing down a teacher's top-k, so that the student trains without the teacher in memory."""

from pathlib import Path
from typing import Any

import torch

from abkd.data import CompletionCollator
from shared_core.errors import InputError, MissingExtraError
from shared_core.run import atomic_path, progress

__all__ = ["capture_topk"]


def capture_topk(
    model: Any,
    rows: Any,
    out: Path,
    *,
    k: int = 64,
    vocab: int | None = None,
    batch_size: int = 8,
    resume: bool = False,
) -> int:
    """Run a teacher over tokenized rows and write parquet files with its k most probable tokens.

    Each row keeps ``input_ids`` and ``labels`` and gains ``topk_ids`` (int32), ``topk_logprobs``
    (float32, of the softmax over `vocab`) and ``teacher_lse``, lists of one entry a token. Entry t
    is the distribution of token t given those before; entry 0 has no meaning.
    `abkd.trainer.DistillationTrainer` takes such rows without a teacher.

    Args:
        model: A causal language model of transformers.
        rows: As `abkd.data.tokenize_dataset` returns them.
        out: A folder; each batch becomes a file, whole or not at all.
        k: How many tokens to keep.
        vocab: Rows of the head to use (see `abkd.align_vocab`); by default all.
        batch_size: Rows of a batch and of a file.
        resume: Keep the files that are there.

    Returns:
        The number of rows.

    Raises:
        InputError: If `k` is impossible, or the folder holds files and `resume` is not set.
    """
    try:
        from datasets import Dataset
    except ImportError as error:
        raise MissingExtraError("abkd", "data", "datasets") from error

    size = vocab or int(model.config.vocab_size)
    if not 1 <= k <= size:
        raise InputError(f"k is {k}; accepted: 1 to {size}, the vocabulary")
    out.mkdir(parents=True, exist_ok=True)
    if any(out.glob("*.parquet")) and not resume:
        raise InputError(f"{out} holds files of an earlier run; pass resume, or choose another")
    model.eval()
    device = next(model.parameters()).device
    collate = CompletionCollator()
    for start in progress(range(0, len(rows), batch_size), description="capturing", unit="batch"):
        path = out / f"part-{start // batch_size:06d}.parquet"
        if path.is_file():
            continue
        some = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
        batch = collate(some)
        inputs = {n: batch[n].to(device) for n in ("input_ids", "attention_mask")}
        with torch.no_grad():
            logits = model(**inputs).logits[..., :size].float()
        lse = torch.logsumexp(logits, -1).cpu()
        top = torch.log_softmax(logits, -1).topk(k)
        ids, log_probs = top.indices.int().cpu(), top.values.cpu()
        found = []
        for i, row in enumerate(some):
            past = [0, *range(len(row["input_ids"]) - 1)]  # token t is predicted at t - 1
            found.append(
                {
                    "input_ids": list(row["input_ids"]),
                    "labels": list(row["labels"]),
                    "topk_ids": ids[i, past].numpy(),
                    "topk_logprobs": log_probs[i, past].numpy(),
                    "teacher_lse": lse[i, past].numpy(),
                }
            )
        with atomic_path(path) as temporary:
            Dataset.from_list(found).to_parquet(temporary)
    return len(rows)

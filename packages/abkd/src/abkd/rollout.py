"""Batches of the student's own text: prompts from the data, responses drawn from the student."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["own_responses"]


def own_responses(
    model: Any,
    batch: Mapping[str, Tensor],
    collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
    *,
    max_new_tokens: int,
    max_length: int | None = None,
    eos_id: int | None = None,
    pad_id: int = 0,
    vocab: int | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Replace the responses of a batch by samples of a model, at temperature 1 from all tokens.

    The prompt of a row is what stands before its first label (at least one token); the sample up to
    the end-of-text token counts.

    Args:
        model: The student, a causal language model; its mode is left as it was.
        batch: ``input_ids``, ``attention_mask`` and ``labels`` ``[B, T]``.
        collate: Makes a batch of rows with ``input_ids`` and ``labels``.
        max_new_tokens: Length of a response.
        max_length: Longer rows are cut.
        eos_id: The end-of-text token.
        pad_id: For the padding of prompts.
        vocab: Tokens that mean something; rows of the head beyond are never drawn.
        seed: Of the draw; torch's generators are left as they were.
    """
    prompts = []
    for ids, mask, labels in zip(
        batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
    ):
        there = mask.bool()
        counted = (labels[there] != -100).nonzero()
        stop = int(counted[0]) if len(counted) else int(there.sum())
        prompts.append(ids[there][: max(stop, 1)].tolist())
    width = max(map(len, prompts))
    device = batch["input_ids"].device
    tokens = torch.tensor([[pad_id] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    rows_of_head = int(model.get_output_embeddings().weight.shape[0])
    beyond = list(range(rows_of_head if vocab is None else vocab, rows_of_head))
    training = model.training
    devices = [device] if device.type == "cuda" else []
    model.eval()
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(seed)
            found = model.generate(
                input_ids=tokens,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=True,
                temperature=1.0,
                top_p=1.0,
                top_k=0,
                pad_token_id=pad_id,
                eos_token_id=eos_id,
                suppress_tokens=beyond or None,
            )[:, width:]
    finally:
        model.train(training)
    rows = []
    for prompt, response in zip(prompts, found.tolist(), strict=True):
        if eos_id in response:
            response = response[: response.index(eos_id) + 1]
        ids = [*prompt, *response][:max_length]
        labels_of = [*([-100] * len(prompt)), *response][:max_length]
        rows.append({"input_ids": ids, "labels": labels_of})
    return {name: tensor.to(device) for name, tensor in collate(rows).items()}

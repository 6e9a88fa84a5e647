"""Rows of text to token ids with labels on the response, and batches of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shared_core.errors import InputError

__all__ = ["CompletionCollator", "tokenize_dataset", "tokenize_row"]


def tokenize_row(
    row: Mapping[str, Any],
    tokenizer: Any,
    max_length: int | None,
    completion_only: bool = True,
    max_prompt: int | None = None,
) -> dict[str, Any]:
    """Token ids and labels of a row; -100 marks tokens that do not count.

    Args:
        row: ``input_ids`` with ``labels`` (kept as they are), or ``prompt`` and ``completion``
            (or ``question`` and ``answer``), or ``messages`` for the tokenizer's chat template, or
            ``text``. Columns whose names begin with ``topk_`` are kept.
        tokenizer: A tokenizer of transformers.
        max_length: Longer rows are cut at the end.
        completion_only: Whether only the completion counts.
        max_prompt: Longer prompts lose their beginning.

    Raises:
        InputError: If the row has none of these columns, or the tokenizer is missing.
    """
    kept = {k: v for k, v in row.items() if k.startswith("topk_")}
    if "input_ids" in row:
        ids = list(row["input_ids"])
        labels = list(row.get("labels", ids))
    else:
        if tokenizer is None:
            raise InputError("rows of text need a tokenizer: pass processing_class")
        prompt, completion = _parts(row, tokenizer)
        start = tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
        if max_prompt is not None:
            start = start[max(len(start) - max_prompt, 0) :]
        rest = tokenizer(completion, add_special_tokens=False)["input_ids"]
        if "messages" not in row and tokenizer.eos_token_id is not None:
            rest = [*rest, tokenizer.eos_token_id]
        ids = [*start, *rest]
        labels = [*([-100] * len(start) if completion_only else start), *rest]
    cut = {k: v[:max_length] for k, v in {"input_ids": ids, "labels": labels, **kept}.items()}
    return cut


def _parts(row: Mapping[str, Any], tokenizer: Any) -> tuple[str, str]:
    for first, second in (("prompt", "completion"), ("question", "answer")):
        if first in row and second in row:
            return str(row[first]), str(row[second])
    if "messages" in row:
        messages = row["messages"]
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        prompt = tokenizer.apply_chat_template(
            messages[:-1], tokenize=False, add_generation_prompt=True
        )
        return prompt, whole.removeprefix(prompt)
    if "text" in row:
        return "", str(row["text"])
    raise InputError(
        f"the data have the columns {', '.join(row)}; accepted: input_ids and labels, prompt and "
        "completion, question and answer, messages, or text"
    )


def tokenize_dataset(
    data: Any,
    tokenizer: Any,
    max_length: int | None,
    completion_only: bool = True,
    max_prompt: int | None = None,
) -> Any:
    """Apply `tokenize_row` to all rows; data sets of `datasets` are mapped, others become lists."""
    if data is None:
        return None

    def convert(row: Mapping[str, Any]) -> dict[str, Any]:
        return tokenize_row(row, tokenizer, max_length, completion_only, max_prompt)

    if hasattr(data, "map"):
        return data.map(convert, remove_columns=data.column_names)
    return [convert(row) for row in data]


@dataclass
class CompletionCollator:
    """Pads rows to one length: ids, attention mask, labels, and top-k columns if there are any.

    Args:
        pad_id: The id to pad with.
        side: ``left`` or ``right``.

    Examples:
        >>> collate = CompletionCollator(pad_id=0, side="left")
        >>> batch = collate([{"input_ids": [5, 6], "labels": [-100, 6]},
        ...                  {"input_ids": [7], "labels": [7]}])
        >>> batch["input_ids"].tolist(), batch["labels"].tolist()
        ([[5, 6], [0, 7]], [[-100, 6], [-100, 7]])
    """

    pad_id: int = 0
    side: str = "right"

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Make the batch."""
        width = max(len(row["input_ids"]) for row in rows)

        def stack(lists: list[Any], fill: Any, dtype: torch.dtype) -> Tensor:
            pieces = []
            for one in lists:
                tensor = torch.as_tensor(one, dtype=dtype)
                padding = tensor.new_full((width - len(tensor), *tensor.shape[1:]), fill)
                order = [padding, tensor] if self.side == "left" else [tensor, padding]
                pieces.append(torch.cat(order))
            return torch.stack(pieces)

        ids = [row["input_ids"] for row in rows]
        mask = stack([[1] * len(i) for i in ids], 0, torch.int64)
        batch = {
            "input_ids": stack(ids, self.pad_id, torch.int64),
            "attention_mask": mask,
            "labels": stack([row["labels"] for row in rows], -100, torch.int64),
        }
        if self.side == "left":
            batch["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        if "topk_ids" in rows[0]:
            batch["topk_ids"] = stack([r["topk_ids"] for r in rows], 0, torch.int64)
            logs = [r["topk_logprobs"] for r in rows]
            batch["topk_logprobs"] = stack(logs, -1e4, torch.float32)
        return batch

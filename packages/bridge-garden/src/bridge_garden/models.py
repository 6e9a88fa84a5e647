"""Loading what the commands work on: language models, tokenizers, rows of text."""

import json
from pathlib import Path
from typing import Any

import torch

from shared_core.errors import InputError, MissingExtraError

__all__ = ["encode", "load_model", "load_pair", "load_tokenizer", "prompt_of", "read_rows"]


def load_model(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A causal language model of transformers, from a hub id or a folder, in evaluation mode.

    Raises:
        InputError: If there is no such model.
    """
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError) as error:
        raise InputError(_told("model", name, error)) from error
    return model.to(device).eval()


def load_tokenizer(name: str) -> Any:
    """A tokenizer of transformers, from a hub id or a folder.

    Raises:
        InputError: If there is no such tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(_told("tokenizer", name, error)) from error


def load_pair(student: str, teacher: str, device: str, dtype: str) -> tuple[Any, Any, Any, Any]:
    """Student, teacher, the student's tokenizer and the device, from what the user named.

    Raises:
        InputError: If one of them does not exist.
    """
    from shared_core.device import select_device, select_dtype

    chosen = select_device(device)
    kind = select_dtype(dtype, chosen)
    tokenizer = load_tokenizer(student)
    return load_model(student, chosen, kind), load_model(teacher, chosen, kind), tokenizer, chosen


def _told(what: str, name: str, error: Exception) -> str:
    first = str(error).strip().splitlines() or [type(error).__name__]
    return f"no {what} could be loaded from {name!r} ({first[0]}); give a hub id or a folder"


def read_rows(source: str, split: str = "train", limit: int | None = None) -> list[dict[str, Any]]:
    """Rows of a ``.jsonl`` or ``.txt`` file (a row per line), a folder, or a hub data set.

    Raises:
        InputError: If the file is missing, empty or not JSON lines.
        MissingExtraError: If a folder or a hub id is given without the extra ``data``.

    Examples:
        >>> path = getfixture("tmp_path") / "rows.jsonl"
        >>> _ = path.write_text('{"prompt": "1+1=", "completion": "2"}')
        >>> read_rows(str(path))
        [{'prompt': '1+1=', 'completion': '2'}]
    """
    path = Path(source)
    if path.suffix not in (".jsonl", ".txt"):
        return _from_hub(source, split, limit)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{source} cannot be read: {error}") from error
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or (limit is not None and len(rows) >= limit):
            continue
        if path.suffix == ".txt":
            rows.append({"text": line})
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{source}, line {number}, is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise InputError(f"{source}, line {number}, is not an object with named columns")
        rows.append(row)
    if not rows:
        raise InputError(f"{source} has no rows")
    return rows


def _from_hub(source: str, split: str, limit: int | None) -> list[dict[str, Any]]:
    from shared_core.data.loading import load_rows

    try:
        data = load_rows(source, split=split)
    except MissingExtraError as error:
        raise MissingExtraError("bridge-garden", "data", "datasets") from error
    return [dict(data[i]) for i in range(len(data) if limit is None else min(limit, len(data)))]


def prompt_of(row: dict[str, Any]) -> str:
    """The text of a row that a model is to continue.

    Raises:
        InputError: If the row has none.

    Examples:
        >>> prompt_of({"question": "1+1=", "answer": "2"})
        '1+1='
    """
    for name in ("prompt", "question", "text"):
        if name in row:
            return str(row[name])
    raise InputError(
        f"the data have the columns {', '.join(row)}; accepted: prompt, question or text"
    )


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a prompt, never empty.

    Raises:
        InputError: If the text has no token and the tokenizer no begin token.
    """
    ids = list(tokenizer(text, add_special_tokens=True)["input_ids"])
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    if not ids:
        raise InputError("a prompt is empty; give at least one token")
    return ids

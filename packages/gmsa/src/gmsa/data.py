"""Records from files, samples of both stages, and batches with compression rates drawn at random.

A record has ``input`` (the context), ``prompt`` (a question about it) and ``answer``, a string or
a list of those that are right.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from gmsa.losses import IGNORED
from gmsa.presets import RESTATE_INSTRUCTION
from gmsa.rates import SAMPLINGS, check_rates, draw_rate
from shared_core.errors import InputError

__all__ = [
    "AutoencodingDataset",
    "GMSADataCollator",
    "QADataset",
    "read_documents",
    "read_records",
    "read_text",
]

QA_FIELDS = ("input", "prompt", "answer")


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a file.

    Raises:
        InputError: If it cannot be read, or is not UTF-8.

    Examples:
        >>> path = getfixture("tmp_path") / "a.txt"
        >>> _ = path.write_text("ba be")
        >>> read_text(path)
        'ba be'
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{os.fspath(path)} cannot be read as text: {error}") from error


def read_documents(paths: Sequence[str | os.PathLike[str]]) -> dict[str, str]:
    """Documents by id: text files under their names, and lines of JSON under their ``id``.

    Args:
        paths: Files; of those ending in ``.json`` or ``.jsonl`` every line is an object with
            ``input`` and, if it has no ``id``, is called FILE:NUMBER.

    Raises:
        InputError: If a file cannot be read, or an id occurs twice.

    Examples:
        >>> path = getfixture("tmp_path") / "a.txt"
        >>> _ = path.write_text("ba be")
        >>> read_documents([path])
        {'a.txt': 'ba be'}
    """
    documents: dict[str, str] = {}
    for path in map(Path, paths):
        if path.suffix in (".jsonl", ".json"):
            records = read_records(path, ("input",))
            named = [
                (str(r.get("id", f"{path.name}:{i}")), r["input"]) for i, r in enumerate(records, 1)
            ]
        else:
            named = [(path.name, read_text(path))]
        for name, text in named:
            if name in documents:
                raise InputError(f"two documents have the id {name!r}; ids have to differ")
            documents[name] = text
    return documents


def read_records(
    path: str | os.PathLike[str], fields: Sequence[str] = QA_FIELDS
) -> list[dict[str, Any]]:
    """Read records from JSON lines, or contexts from a text file, one a line.

    Args:
        path: A file; one that does not end in ``.txt`` holds a JSON object a line.
        fields: What every record has to have. A text file gives ``input`` only.

    Raises:
        InputError: If the file cannot be read or has no record; with the line's number if a line
            is no JSON object, lacks a field, or a field is of the wrong type.

    Examples:
        >>> path = getfixture("tmp_path") / "a.jsonl"
        >>> _ = path.write_text('{"input": "ba be", "prompt": "ba", "answer": ["be"]}')
        >>> read_records(path)[0]["answer"]
        ['be']
    """
    place = Path(path)
    lines = read_text(place).split("\n")
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{place}, line {number}"
        if place.suffix == ".txt":
            record: Any = {"input": line}
        else:
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{where}: no JSON ({error})") from error
            if not isinstance(record, dict):
                raise InputError(f"{where}: not a JSON object")
        _check_record(record, fields, where)
        records.append(record)
    if not records:
        raise InputError(f"{place} has no records")
    return records


def _check_record(record: Mapping[str, Any], fields: Sequence[str], where: str) -> None:
    for field in fields:
        if field not in record:
            raise InputError(f"{where} has no {field!r}; needed: {', '.join(fields)}")
        value = record[field]
        several = field == "answer" and isinstance(value, list) and bool(value)
        if not all(isinstance(v, str) for v in (value if several else [value])):
            kind = "a string or a list of strings" if field == "answer" else "a string"
            raise InputError(f"{where}: {field!r} is {type(value).__name__}; accepted: {kind}")


class _Samples(Dataset[dict[str, Any]]):
    """Token ids of contexts, prompts and targets; a sample carries its place and the epoch."""

    epoch = 0

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        if tokenizer.eos_token_id is None:
            raise InputError("the tokenizer has no end-of-sequence token to end a target with")
        if max_length < 1:
            raise InputError(f"max_length is {max_length}; accepted: 1 and above")
        self.tokenizer, self.max_length = tokenizer, max_length
        self.rows: list[dict[str, list[int]]] = []

    def _ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next samples belong to; `GMSATrainer` does."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[index], "index": index, "epoch": self.epoch}


class AutoencodingDataset(_Samples):
    """Contexts that are to be restated (first stage).

    The target is exactly the encoded context, and ends in EOS only if the context was not cut.

    Args:
        texts: The contexts.
        tokenizer: The base model's.
        max_length: Tokens of context and instruction together; a longer context is cut at its end.
        instruction: The prompt of the stage.

    Raises:
        InputError: If a context is empty, or the instruction leaves no room for it.

    Examples:
        >>> from gmsa.demo import tiny_compressor
        >>> data = AutoencodingDataset(["ba be bi"], tiny_compressor().tokenizer, 3, "Restate")
        >>> len(data[0]["context"]), data[0]["target"] == data[0]["context"]
        (2, True)
    """

    def __init__(
        self,
        texts: Sequence[str],
        tokenizer: Any,
        max_length: int = 4096,
        instruction: str = RESTATE_INSTRUCTION,
    ) -> None:
        super().__init__(tokenizer, max_length)
        prompt = self._ids(instruction)
        room = max_length - len(prompt)
        if room < 1:
            raise InputError(f"max_length is {max_length}, the instruction {len(prompt)} tokens")
        for number, text in enumerate(texts):
            ids = self._ids(text)
            if not ids:
                raise InputError(f"context {number} has no tokens")
            end = [tokenizer.eos_token_id] if len(ids) <= room else []
            context = ids[:room]
            self.rows.append({"context": context, "prompt": prompt, "target": context + end})


class QADataset(_Samples):
    """Contexts with questions and answers (second stage).

    Args:
        records: Mappings with ``input`` (the context), ``prompt`` (the question) and ``answer``, a
            string or several, of which the first that is not empty is learned.
        tokenizer: The base model's.
        max_length: Tokens of context and question together; a longer context is cut at its end.

    Raises:
        InputError: Naming the record that lacks a field, has no answer, or whose question leaves no
            room for its context.

    Examples:
        >>> from gmsa.demo import tiny_compressor
        >>> record = {"input": "ba be bi", "prompt": "ba", "answer": ["", "be bi"]}
        >>> data = QADataset([record], tiny_compressor().tokenizer)
        >>> {name: len(ids) for name, ids in data.rows[0].items()}
        {'context': 3, 'prompt': 1, 'target': 3}
    """

    def __init__(
        self, records: Sequence[Mapping[str, Any]], tokenizer: Any, max_length: int = 4096
    ) -> None:
        super().__init__(tokenizer, max_length)
        for number, record in enumerate(records):
            _check_record(record, QA_FIELDS, f"record {number}")
            given = record["answer"]
            answers = [a for a in ([given] if isinstance(given, str) else given) if a.strip()]
            if not answers:
                raise InputError(f"record {number} has no answer that is not empty")
            prompt = self._ids(record["prompt"])
            context = self._ids(record["input"])[: max(0, max_length - len(prompt))]
            if not context:
                raise InputError(f"record {number} has no context within {max_length} tokens")
            target = [*self._ids(answers[0]), tokenizer.eos_token_id]
            self.rows.append({"context": context, "prompt": prompt, "target": target})


class GMSADataCollator:
    """Makes batches for `GMSAModel` and draws their compression rates.

    A rate depends on the seed, the epoch and the sample's place in the data set alone, so it is
    the same for any number of workers and processes, and a resumed run repeats it.

    Args:
        pad_token_id: What fills rows up; it is masked.
        rates: The rates to draw from.
        sampling: ``sample`` (a draw a sample), ``batch`` (a draw a batch, by its first sample) or
            ``fixed`` (the first of `rates`).
        seed: Of the draws.

    Raises:
        InputError: If a rate or `sampling` is not accepted.

    Examples:
        >>> collate = GMSADataCollator(0, [2, 4])
        >>> row = {"context": [5, 6, 7], "prompt": [8], "target": [5, 6, 7], "epoch": 0}
        >>> batch = collate([{**row, "index": i} for i in range(4)])
        >>> batch["input_ids"].shape, batch["rate"]
        (torch.Size([4, 3]), tensor([2, 4, 2, 2]))
    """

    def __init__(
        self, pad_token_id: int, rates: Sequence[int], sampling: str = "sample", seed: int = 0
    ) -> None:
        if sampling not in SAMPLINGS:
            raise InputError(f"sampling is {sampling!r}; accepted: {', '.join(SAMPLINGS)}")
        self.pad_token_id, self.rates = pad_token_id, check_rates(rates)
        self.sampling, self.seed = sampling, seed

    def _rates(self, rows: Sequence[Mapping[str, Any]]) -> list[int]:
        if self.sampling == "fixed":
            return [self.rates[0]] * len(rows)
        drawn = rows if self.sampling == "sample" else rows[:1]
        found = [draw_rate(self.rates, self.seed, row["epoch"], row["index"]) for row in drawn]
        return found if self.sampling == "sample" else found * len(rows)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Pad the rows to the right and say where they are valid."""

        def pad(name: str, value: int) -> Tensor:
            parts = [torch.tensor(row[name], dtype=torch.long) for row in rows]
            return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=value)

        def mask(name: str) -> Tensor:
            lengths = torch.tensor([len(row[name]) for row in rows])
            return torch.arange(int(lengths.max())) < lengths[:, None]

        return {
            "input_ids": pad("context", self.pad_token_id),
            "attention_mask": mask("context"),
            "prompt_ids": pad("prompt", self.pad_token_id),
            "prompt_mask": mask("prompt"),
            "labels": pad("target", IGNORED),
            "rate": torch.tensor(self._rates(rows)),
        }

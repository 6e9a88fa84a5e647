"""Models, texts and prompts for the command line, by path or hub id."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lede.cost import CostModel
from lede.decoding import SelfSpeculativeDecoder
from lede.experience import ExperienceTable, collect
from lede.presets import DATASETS, get_preset
from shared_core.device import seed_everything, select_device, select_dtype
from shared_core.errors import InputError
from shared_core.parallel import join_processes


def load_model(
    model: str | None, preset: str | None, dtype: torch.dtype, device: torch.device
) -> tuple[Any, Any, tuple[int, ...] | None]:
    """Model, tokenizer and the preset's exits.

    Raises:
        InputError: If nothing is named, or it cannot be loaded; for gated weights the message says
            how to get access.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = get_preset(preset) if preset else None
    name = model or (found.model if found else None)
    if name is None:
        raise InputError("say which model: --model FOLDER or HUB-ID, or --preset NAME")
    try:
        loaded = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    except (OSError, ValueError) as error:
        text = " ".join(str(error).split())[:300]
        if any(word in text for word in ("gated", "401", "403")):
            raise InputError(
                f"{name} is gated: ask for access at https://huggingface.co/{name}, then run "
                "'hf auth login'"
            ) from error
        raise InputError(f"{name} cannot be loaded: {text}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return loaded.to(device).eval(), tokenizer, found.exit_layers if found else None


def parse_exits(given: str | None, own: tuple[int, ...] | None = None) -> list[int]:
    """Exit layers by commas; by default the preset's.

    Raises:
        InputError: If they are not numbers.
    """
    try:
        return [int(e) for e in given.split(",")] if given else list(own or [])
    except ValueError as error:
        raise InputError(f"--exit-layers {given}; give numbers, by commas") from error


def tokenize(tokenizer: Any, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Ids and mask, padded at the left."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    return batch["input_ids"], batch["attention_mask"]


def load_windows(source: str, tokenizer: Any, length: int, split: str = "train") -> Tensor:
    """Windows of text [N, length]: ``pydoc``, a text file, or a file or hub id with texts.

    Raises:
        InputError: If it cannot be read or does not fill one window.
    """
    from shared_core.data.text import pydoc_text, token_windows

    texts = [pydoc_text(split, kind="all")] if source == "pydoc" else _texts(source, split)  # type: ignore[arg-type]
    return token_windows(texts, tokenizer, length, separator=tokenizer.eos_token_id)


def load_decoder(
    prompts: str,
    count: int | None,
    model: str | None,
    preset: str | None,
    exits: str | None,
    max_draft: int,
    dtype: str,
    seed: int,
    device: str | torch.device,
    **options: Any,
) -> tuple[SelfSpeculativeDecoder, Any, Tensor, Tensor]:
    """Decoder, tokenizer, prompt ids and their mask on the device, from a command's options.

    Further `options` go to the decoder.

    Raises:
        InputError: If something cannot be loaded or no exits are named.
    """
    chosen = select_device(str(device))
    seed_everything(seed)
    lines = load_prompts(prompts, count)
    loaded, tokenizer, own = load_model(model, preset, select_dtype(dtype, chosen), chosen)
    chosen_exits = parse_exits(exits, own)
    if not chosen_exits:
        raise InputError("say where to exit: --exit-layers 2,4 or a --preset")
    decoder = SelfSpeculativeDecoder(loaded, chosen_exits, max_draft=max_draft, **options)
    ids, mask = tokenize(tokenizer, lines)
    return decoder, tokenizer, ids.to(chosen), mask.to(chosen)


def collect_shares(
    decoder: SelfSpeculativeDecoder,
    ids: Tensor,
    mask: Tensor,
    folder: Path,
    device: torch.device,
    **options: Any,
) -> ExperienceTable | None:
    """Tabulate prompts, a share in each process that a launcher started.

    Returns:
        The table of all prompts in their order; in the other processes ``None``.

    Raises:
        InputError: If there are fewer prompts than processes.
    """
    with join_processes(device) as here:
        if len(ids) < here.world:
            raise InputError(
                f"{len(ids)} prompts for {here.world} processes; give at least as many"
            )
        share = torch.arange(len(ids)).tensor_split(here.world)[here.rank]
        table = collect(decoder, ids[share], attention_mask=mask[share], **options)
        if here.world == 1:
            return table
        parts = [folder / f"experience-{rank:05d}.safetensors" for rank in range(here.world)]
        table.save(parts[here.rank])
        dist.barrier()
        if not here.first:
            return None
        whole = ExperienceTable.cat([ExperienceTable.load(part) for part in parts])
        for part in parts:
            part.unlink()
        return whole


def load_experience(folder: Path) -> tuple[ExperienceTable, CostModel]:
    """Table and cost that ``lede collect`` wrote.

    Raises:
        InputError: If they are missing or damaged.
    """
    table = ExperienceTable.load(folder / "experience.safetensors")
    return table, CostModel.load(folder / "cost.json")


def load_prompts(source: str, count: int | None = None) -> list[str]:
    """Prompts: a text file with one a line, or a data set of `DATASETS` or the hub.

    The formats are those of LayerSkip's evaluation: the first 100 words of an article for
    ``cnn_dailymail``, "Article: …" and "Summary:" for ``xsum``, else the text as it is.

    Raises:
        InputError: If it cannot be read or is empty.
    """
    path = Path(source)
    if path.suffix == ".txt" or path.is_file():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{source} is not a readable text file ({error})") from error
        found = [line for line in lines if line.strip()]
    else:
        from shared_core.data.loading import load_rows

        known = DATASETS.get(source)
        split = "test" if known is None or known.test else "train"
        options = {"name": known.name} if known and known.name else {}
        rows = load_rows(known.source if known else source, split=split, **options)
        column = known.column if known else "text"
        if column not in rows.column_names:
            raise InputError(f"{source} has no column {column!r}: {', '.join(rows.column_names)}")
        chosen = rows.select(range(min(len(rows), count or len(rows))))
        found = [known.format(text) if known else text for text in chosen[column]]
    if not found:
        raise InputError(f"{source} holds no prompt; write one a line")
    return found[:count]


def _texts(source: str, split: str) -> list[str]:
    path = Path(source)
    if path.is_file() and path.suffix == ".txt":
        try:
            return [path.read_text(encoding="utf-8")]
        except UnicodeDecodeError as error:
            raise InputError(f"{source} is not a readable text file ({error})") from error
    from shared_core.data.loading import load_texts

    return list(load_texts(source, split=split))

"""The compressor for strings: compress, answer, reconstruct."""

import os
import warnings
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from gmsa._backbone import bars_for_people_only
from gmsa._checkpoint import fingerprint
from gmsa.merging import as_rates
from gmsa.model import GMSAModel
from gmsa.soft_tokens import SoftTokens
from gmsa.streaming import compress_long, compress_windows
from shared_core.device import seed_everything, select_device, select_dtype
from shared_core.errors import InputError

__all__ = ["GMSACompressor", "load_tokenizer", "open_compressor"]


def load_tokenizer(name: str | None) -> Any:
    """A model's tokenizer; one without padding pads with its end of sequence, and says so once.

    Raises:
        InputError: If it is not there.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"the tokenizer of {name!r} cannot be loaded: {reason}") from error
    if tokenizer.pad_token is None:
        warnings.warn(
            f"the tokenizer of {name} has no padding token; its end of sequence pads", stacklevel=2
        )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


class GMSACompressor:
    """A `GMSAModel` with its tokenizer. No special tokens or chat template are added.

    Args:
        model: The model.
        tokenizer: The base model's tokenizer.

    Examples:
        >>> from gmsa.demo import tiny_compressor
        >>> compressor = tiny_compressor()
        >>> compressor.report("ba be bi bo bu", rate=2)
        {'origin_tokens': 5, 'compressed_tokens': 3, 'ratio': 1.6666666666666667}
    """

    def __init__(self, model: GMSAModel, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer

    @classmethod
    def from_pretrained(
        cls, path_or_id: str | os.PathLike[str], **hf_kwargs: Any
    ) -> "GMSACompressor":
        """Load a checkpoint and its base's tokenizer; options as for `GMSAModel.from_pretrained`.

        Raises:
            InputError: If a part is missing or does not fit.
        """
        model = GMSAModel.from_pretrained(path_or_id, **hf_kwargs)
        return cls(model, load_tokenizer(model.config.base_model_name_or_path))

    @cached_property
    def fingerprint(self) -> str:
        """What a `SoftTokenStore` knows this compressor by."""
        return fingerprint(self.model)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        for text in texts:
            if not isinstance(text, str):
                raise InputError(f"a text is {type(text).__name__}; accepted: str")
        if not texts:
            return []
        found: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return found

    def _pad(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        width = max((len(r) for r in rows), default=0)
        place = self.model.get_input_embeddings().weight.device
        ids = torch.tensor([[*r, *[0] * (width - len(r))] for r in rows], dtype=torch.long)
        mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
        shape = (len(rows), width)
        return ids.view(shape).to(place), mask.view(shape).bool().to(place)

    @torch.no_grad()
    def compress(
        self,
        text: str | Sequence[str],
        rate: int = 4,
        *,
        target_tokens: int | None = None,
        batch_size: int = 8,
        chunk_size: int | None = None,
        exact: bool = True,
        allow_empty: bool = False,
    ) -> SoftTokens:
        """Compress texts; those of like length are run together.

        Args:
            text: One text, or several.
            rate: Compression rate.
            target_tokens: At most this many soft tokens a text, in place of `rate`.
            batch_size: Texts run together.
            chunk_size: Compress each text in pieces of this many tokens.
            exact: Whether the pieces see those before (equal to one piece), or are windows apart.
            allow_empty: Let empty texts become no soft tokens instead of raising.

        Raises:
            InputError: If a text is empty, or a number is not accepted.
        """
        texts = [text] if isinstance(text, str) else list(text)
        return self.compress_ids(
            self._encode(texts),
            rate,
            target_tokens=target_tokens,
            batch_size=batch_size,
            chunk_size=chunk_size,
            exact=exact,
            allow_empty=allow_empty,
        )

    @torch.no_grad()
    def compress_ids(
        self,
        rows: Sequence[Sequence[int]],
        rate: int = 4,
        *,
        target_tokens: int | None = None,
        batch_size: int = 8,
        chunk_size: int | None = None,
        exact: bool = True,
        allow_empty: bool = False,
    ) -> SoftTokens:
        """As `compress`, from token ids."""
        if not rows:
            raise InputError("there is no text to compress")
        if target_tokens is not None and target_tokens < 1:
            raise InputError(f"target_tokens is {target_tokens}; accepted: 1 and above")
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; accepted: 1 and above")
        as_rates(rate, 1)
        lacking = [i for i, row in enumerate(rows) if not row]
        if lacking and not allow_empty:
            raise InputError(f"text {lacking[0]} has no tokens; leave it out, or allow_empty=True")
        rates = [
            rate if target_tokens is None else max(1, -(-len(row) // target_tokens)) for row in rows
        ]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        found: list[SoftTokens | None] = [None] * len(rows)
        step = batch_size if chunk_size is None else 1
        for begin in range(0, len(order), step):
            chosen = order[begin : begin + step]
            ids, mask = self._pad([rows[i] for i in chosen])
            if chunk_size is None or ids.shape[1] == 0:
                wanted = torch.tensor([rates[i] for i in chosen])
                soft = self.model.compress(ids, mask, wanted)
            else:
                run = compress_long if exact else compress_windows
                soft = run(self.model, ids, rates[chosen[0]], chunk_size)
            for i, one in zip(chosen, soft.unbatch(), strict=True):
                found[i] = one
        return SoftTokens.batch([s for s in found if s is not None])

    def answer(
        self,
        question: str | Sequence[str],
        context: str | Sequence[str] | SoftTokens,
        rate: int = 4,
        *,
        prompt_template: str = "{prompt}",
        batch_size: int = 8,
        **gen_kwargs: Any,
    ) -> str | list[str]:
        """Answer from compressed contexts: one a question, or one for all questions.

        Args:
            question: One question, or several.
            context: Texts, or soft tokens.
            rate: Compression rate of texts.
            prompt_template: Put around each question; it holds ``{prompt}``.
            batch_size: Questions answered together.
            gen_kwargs: Those of ``generate``, such as ``max_new_tokens`` (100).

        Raises:
            InputError: If the numbers of questions and contexts do not fit.
        """
        questions = [question] if isinstance(question, str) else list(question)
        soft = context if isinstance(context, SoftTokens) else self.compress(context, rate)
        if len(soft) not in (1, len(questions)):
            raise InputError(f"there are {len(questions)} questions for {len(soft)} contexts")
        prompts = [prompt_template.replace("{prompt}", q) for q in questions]
        rows = self.answer_ids(prompts, soft, batch_size=batch_size, **gen_kwargs)
        answers = [a.strip() for a in self.tokenizer.batch_decode(rows, skip_special_tokens=True)]
        return answers[0] if isinstance(question, str) else answers

    def answer_ids(
        self, prompts: Sequence[str], soft: SoftTokens, *, batch_size: int = 8, **gen_kwargs: Any
    ) -> list[list[int]]:
        """The new token ids after each prompt, up to the end of sequence and without it.

        Args:
            prompts: As they are.
            soft: One context a prompt, or one for all.
            batch_size: Prompts run together.
            gen_kwargs: Those of ``generate``.
        """
        rows = self._encode(prompts)
        known = self.model.decoder.generation_config.eos_token_id
        ends = {self.tokenizer.eos_token_id, self.tokenizer.pad_token_id}
        ends.update(known if isinstance(known, list) else [known])
        found: list[list[int]] = []
        for begin in range(0, len(rows), batch_size):
            ids, mask = self._pad(rows[begin : begin + batch_size])
            some = range(begin, begin + len(ids))
            part = soft[[0] * len(ids)] if len(soft) == 1 else soft[list(some)]
            for new in self.model.generate(part, ids, mask, **gen_kwargs).tolist():
                stop = next((i for i, token in enumerate(new) if token in ends), len(new))
                found.append(new[:stop])
        return found

    def reconstruct(
        self, text: str | SoftTokens, rate: int = 4, *, max_new_tokens: int | None = None
    ) -> str:
        """Restate a text from its soft tokens, after the autoencoding stage.

        Args:
            text: A text, or the soft tokens of one.
            rate: Compression rate of a text.
            max_new_tokens: By default as many as the text had, and one.

        Raises:
            InputError: If there is more than one text.
        """
        soft = text if isinstance(text, SoftTokens) else self.compress(text, rate)
        if len(soft) != 1:
            raise InputError(f"reconstruct takes one text, not {len(soft)}")
        new = int(soft.n_tokens[0]) + 1 if max_new_tokens is None else max_new_tokens
        instruction = self.model.config.restate_instruction
        found = self.answer(instruction, soft, max_new_tokens=new)
        assert isinstance(found, str)
        return found

    def inputs_embeds(self, soft: SoftTokens, prompt: str | Sequence[str]) -> dict[str, Tensor]:
        """``inputs_embeds`` and ``attention_mask`` for any ``generate`` of the decoder.

        One row without its padding, ``[s, d]``, is what vLLM takes as ``prompt_embeds``.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        embeds, mask = self.model.decoder_inputs(soft, *self._pad(self._encode(prompts)))
        return {"inputs_embeds": embeds, "attention_mask": mask.long()}

    def report(self, text: str, rate: int = 4) -> dict[str, int | float]:
        """How many tokens a text has and becomes; nothing is computed."""
        as_rates(rate, 1)
        [row] = self._encode([text])
        after = -(-len(row) // rate)
        ratio = len(row) / after if after else 1.0
        return {"origin_tokens": len(row), "compressed_tokens": after, "ratio": ratio}


def open_compressor(
    checkpoint: str,
    device: str = "auto",
    seed: int = 0,
    dtype: str = "auto",
    attn: str = "sdpa",
    base_model: str | None = None,
) -> GMSACompressor:
    """The compressor of a checkpoint on a device, with every generator seeded.

    Args:
        checkpoint: Folder or hub id.
        device: See `shared_core.device.select_device`.
        seed: Of every random draw.
        dtype: ``auto`` as it was saved, ``float32``, ``bfloat16`` or ``float16``.
        attn: Attention of transformers.
        base_model: Its base, if not where the checkpoint says.

    Raises:
        InputError: If something is not there, or does not fit.
    """
    place = select_device(device)
    seed_everything(seed)
    bars_for_people_only()
    kind = "auto" if dtype == "auto" else select_dtype(dtype, place)
    found = GMSACompressor.from_pretrained(
        checkpoint, dtype=kind, attn_implementation=attn, base_model=base_model
    )
    found.model.to(place)
    return found

"""Exposure bias: how much worse a student is on its own prefixes than on the teacher's.

    L_{d_θ}(π_θ)     =  L_{d_T}(π_θ)  +  [ L_{d_θ}(π_θ) - L_{d_T}(π_θ) ]
    inference error     training fit     exposure bias

Both sides are sampled, and both models score every state of both.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

import abkd
from shared_core.errors import InputError
from shared_core.run import progress as progress_bar

__all__ = ["ExposureReport", "exposure_bias", "exposure_from_losses", "sample", "score"]

Model = Callable[..., Any]


@dataclass(frozen=True)
class ExposureReport:
    """Training fit, inference error and exposure bias, as means over positions.

    Attributes:
        fit: L_{d_T}, the loss on the teacher's prefixes.
        inference: L_{d_θ}, the loss on the student's own.
        bias: inference - fit.
        fit_error: Standard error of `fit`, over rollouts (or prompts, where given).
        inference_error: Likewise.
        bias_error: Standard error of `bias`, paired.
        per_position_fit: Mean loss of each position over the rollouts that reach it.
        per_position_inference: Likewise.
        positions_fit: How many rollouts reach each position.
        positions_inference: Likewise.
        teacher_side: ``rollouts`` or ``references``: where the teacher's prefixes came from.
    """

    fit: float
    inference: float
    bias: float
    fit_error: float
    inference_error: float
    bias_error: float
    per_position_fit: list[float]
    per_position_inference: list[float]
    positions_fit: list[int]
    positions_inference: list[int]
    teacher_side: str = "rollouts"

    def to_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return dict(self.__dict__)


def _error(values: Tensor) -> float:
    n = len(values)
    return (values.std() / math.sqrt(n)).item() if n > 1 else math.nan


def exposure_from_losses(
    teacher_side: Float[Tensor, "N T"],
    student_side: Float[Tensor, "N U"],
    teacher_mask: Bool[Tensor, "N T"] | None = None,
    student_mask: Bool[Tensor, "N U"] | None = None,
    *,
    groups: Int[Tensor, " N"] | None = None,
    source: str = "rollouts",
) -> ExposureReport:
    """The report from losses per position that are at hand.

    Args:
        teacher_side: ℓ at each position of the teacher's rollouts.
        student_side: ℓ at each position of the student's; row i is paired with row i.
        teacher_mask: Which positions are there (default: all).
        student_mask: Likewise.
        groups: The prompt of each row: errors are then over prompts, not rollouts.
        source: Where the teacher's prefixes came from.

    Returns:
        Means over all positions: a long rollout counts more than a short one.

    Raises:
        InputError: If a side has no position, or a loss is NaN.

    Examples:
        >>> report = exposure_from_losses(torch.full((3, 2), 0.1), torch.full((3, 2), 0.4))
        >>> report.bias
        0.300
    """
    sides = []
    for name, losses, mask in (
        ("teacher", teacher_side, teacher_mask),
        ("student", student_side, student_mask),
    ):
        mask = torch.ones_like(losses, dtype=torch.bool) if mask is None else mask
        if not mask.any():
            raise InputError(f"the {name}'s rollouts have no position to measure")
        values = torch.where(mask, losses.double(), 0.0)
        if values.isnan().any():
            raise InputError(f"a loss on the {name}'s prefixes is NaN")
        count = mask.sum(0)
        each = (values.sum(0) / count.clamp(min=1))[count > 0].tolist()
        sides.append((values, mask, each, count[count > 0].tolist()))
    influences, means = [], []
    for values, mask, _, _ in sides:
        mean = values.sum() / mask.sum()
        # The ratio's linearised contribution of each rollout, whose spread is its standard error.
        part = (values.sum(1) - mean * mask.sum(1)) / (mask.sum() / len(values))
        if groups is not None:
            size = int(groups.max()) + 1
            total = torch.zeros(size, dtype=part.dtype, device=part.device)
            part = total.index_add_(0, groups, part) * (size / len(values))
        influences.append(part)
        means.append(mean.item())
    (_, _, fit_each, fit_count), (_, _, own_each, own_count) = sides
    return ExposureReport(
        means[0],
        means[1],
        means[1] - means[0],
        _error(influences[0]),
        _error(influences[1]),
        _error(influences[1] - influences[0]),
        fit_each,
        own_each,
        fit_count,
        own_count,
        source,
    )


def model_logits(model: Model, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits ``[B, T, V]`` of a transformers model or of any callable of ids."""
    if hasattr(model, "config"):
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        found = model(input_ids=ids, attention_mask=mask.long(), position_ids=positions)
    else:
        found = model(ids)
    logits: Tensor = found.logits if hasattr(found, "logits") else found
    return logits


@torch.no_grad()
def sample(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    eos_token_id: int | None = None,
    vocab: int | None = None,
    device: torch.device | None = None,
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"], int]:
    """Continue prompts by ancestral sampling, with the cache of transformers models.

    Args:
        model: A causal language model of transformers, or a callable from ids to logits.
        prompts: Token ids, of any lengths; padded on the left.
        max_new_tokens: How many to sample.
        generator: Of the draws, on the CPU.
        temperature: T.
        eos_token_id: Ends a sequence; it is kept.
        vocab: Sample from the first so many classes only.
        device: Where the model is.

    Returns:
        Ids, which of them are real (no padding), and the length of the padded prompts.

    Raises:
        InputError: If there is no prompt, one is empty, or the temperature is not above 0.
    """
    if not prompts or min(map(len, prompts)) == 0:
        raise InputError("every prompt needs at least one token (a begin token will do)")
    if not temperature > 0 or max_new_tokens < 1:
        raise InputError("temperature has to be above 0 and max_new_tokens at least 1")
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts]).to(
        ids.device
    )
    alive = torch.ones(len(prompts), dtype=torch.bool, device=ids.device)
    cached = hasattr(model, "config")
    # transformers calls the argument `cache` from 5.x on, and `past_key_values` before.
    newer = cached and "cache" in inspect.signature(model.forward).parameters  # type: ignore[attr-defined]
    name = "cache" if newer else "past_key_values"
    past = None
    for _ in range(max_new_tokens):
        if cached:
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
            new = ids if past is None else ids[:, -1:]
            out = model(
                input_ids=new,
                attention_mask=mask.long(),
                position_ids=positions[:, -new.shape[1] :],
                use_cache=True,
                **{name: past},
            )
            past, logits = getattr(out, name), out.logits[:, -1]
        else:
            logits = model_logits(model, ids, mask)[:, -1]
        p = torch.softmax(logits[:, :vocab].double().cpu() / temperature, -1)
        token = torch.multinomial(p, 1, generator=generator).to(ids.device)
        ids = torch.cat([ids, torch.where(alive.unsqueeze(1), token, 0)], 1)
        mask = torch.cat([mask, alive.unsqueeze(1)], 1)
        if eos_token_id is not None:
            alive = alive & (token.squeeze(1) != eos_token_id)
            if not alive.any():
                break
    return ids, mask, width


@torch.no_grad()
def score(
    student: Model,
    teacher: Model,
    ids: Int[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    start: int,
    *,
    divergence: str = "fkl",
    vocab: int | None = None,
) -> tuple[Float[Tensor, "B n"], Bool[Tensor, "B n"]]:
    """ℓ of every state from `start` on: the divergence where token t (≥ start) is predicted.

    Args:
        student: See `sample`.
        teacher: Likewise.
        ids: Token ids.
        mask: Which are real.
        start: Index of the first token that is scored, at least 1.
        divergence: A name of `abkd.DIVERGENCES`.
        vocab: Cut both heads to this many classes.
    """
    q = model_logits(student, ids, mask)[:, start - 1 : -1, :vocab]
    p = model_logits(teacher, ids, mask)[:, start - 1 : -1, :vocab]
    valid = mask[:, start:]
    return abkd.divergence(divergence, q, p, mask=valid, reduction="none"), valid


def shared_vocab(student: Model, teacher: Model, vocab: int | None) -> int | None:
    if vocab is not None or not (hasattr(student, "config") and hasattr(teacher, "config")):
        return vocab
    return abkd.align_vocab(student, teacher)


def exposure_bias(
    student: Model,
    teacher: Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    n_rollouts: int = 1,
    temperature: float = 1.0,
    divergence: str = "fkl",
    batch_size: int = 16,
    seed: int = 0,
    eos_token_id: int | None = None,
    references: Sequence[Sequence[int]] | None = None,
    vocab: int | None = None,
    device: torch.device | None = None,
) -> ExposureReport:
    """Measure training fit, inference error and exposure bias of a student.

    Both models are put into evaluation mode and back. Standard errors are over prompts, paired.

    Args:
        student: A causal language model of transformers, or a callable from ids to logits.
        teacher: Likewise, with the same tokens.
        prompts: Token ids of the prompts.
        max_new_tokens: Length of the rollouts.
        n_rollouts: Rollouts per prompt on each side.
        temperature: Of the rollouts.
        divergence: ℓ; a name of `abkd.DIVERGENCES`.
        batch_size: Rollouts at once.
        seed: Of the rollouts: the same seed gives the same report.
        eos_token_id: Ends a rollout.
        references: Continuations to take as the teacher's side instead of its rollouts, one per
            prompt.
        vocab: Cut both heads to this many classes (by default transformers' heads of unequal
            size are cut to the smaller).
        device: Where the models are.

    Raises:
        InputError: If prompts are missing or empty, or numbers are out of range.

    Examples:
        >>> def model(ids): return torch.zeros(*ids.shape, 5)
        >>> exposure_bias(model, model, [[1], [2]], max_new_tokens=4).bias
        0.0
    """
    if n_rollouts < 1 or batch_size < 1:
        raise InputError("n_rollouts and batch_size have to be at least 1")
    if not prompts or min(map(len, prompts)) == 0:
        raise InputError("every prompt needs at least one token (a begin token will do)")
    if references is not None and len(references) != len(prompts):
        raise InputError(f"{len(references)} references for {len(prompts)} prompts; one each")
    vocab = shared_vocab(student, teacher, vocab)
    modes = [(m, m.training) for m in (student, teacher) if isinstance(m, torch.nn.Module)]
    for module, _ in modes:
        module.eval()
    rows = [list(p) for p in prompts for _ in range(n_rollouts)]
    replies = (
        None if references is None else [list(r) for r in references for _ in range(n_rollouts)]
    )
    sides: dict[str, list[tuple[Tensor, Tensor]]] = {"teacher": [], "student": []}
    try:
        starts = range(0, len(rows), batch_size)
        for begin in progress_bar(starts, description="rollouts", unit="batch"):
            batch = rows[begin : begin + batch_size]
            for offset, (name, model) in enumerate((("teacher", teacher), ("student", student))):
                if name == "teacher" and replies is not None:
                    ids, mask, start = _joined(batch, replies[begin : begin + batch_size], device)
                else:
                    generator = torch.Generator().manual_seed(
                        (seed * 1_000_003 + begin) * 2 + offset
                    )
                    ids, mask, start = sample(
                        model,
                        batch,
                        max_new_tokens=max_new_tokens,
                        generator=generator,
                        temperature=temperature,
                        eos_token_id=eos_token_id,
                        vocab=vocab,
                        device=device,
                    )
                found = score(
                    student, teacher, ids, mask, start, divergence=divergence, vocab=vocab
                )
                sides[name].append((found[0].cpu(), found[1].cpu()))
    finally:
        for module, training in modes:
            module.train(training)
    (fit, fit_mask), (own, own_mask) = (_stack(sides[n]) for n in ("teacher", "student"))
    return exposure_from_losses(
        fit,
        own,
        fit_mask,
        own_mask,
        groups=torch.arange(len(prompts)).repeat_interleave(n_rollouts),
        source="rollouts" if references is None else "references",
    )


def _joined(
    prompts: list[list[int]], replies: list[list[int]], device: torch.device | None
) -> tuple[Tensor, Tensor, int]:
    """Prompts padded on the left and replies on the right, in one tensor."""
    width, length = max(map(len, prompts)), max(1, *map(len, replies))
    ids = torch.zeros(len(prompts), width + length, dtype=torch.int64)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for i, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        ids[i, width - len(prompt) : width + len(reply)] = torch.tensor(prompt + reply)
        mask[i, width - len(prompt) : width + len(reply)] = True
    return ids.to(device), mask.to(device), width


def _stack(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Batches of unequal length as one tensor, padded on the right."""
    width = max(values.shape[1] for values, _ in parts)
    pad = torch.nn.functional.pad
    return (
        torch.cat([pad(values, (0, width - values.shape[1])) for values, _ in parts]),
        torch.cat([pad(mask, (0, width - mask.shape[1])) for _, mask in parts]),
    )

"""κ of a language model's positions, estimated: teacher continuations after chosen deviations."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bridge_garden.exposure import Model, model_logits, sample, score, shared_vocab
from shared_core.errors import InputError
from shared_core.run import progress as progress_bar

__all__ = ["KappaEstimate", "kappa_mc"]


@dataclass(frozen=True)
class KappaEstimate:
    """κ of some tokens at one position.

    Attributes:
        position: Index of the token that was deviated from.
        tokens: The alternatives.
        kappa: κ of each: what it costs over the horizon, against following the teacher.
        standard_error: Of each.
        score: The bridge score: mean κ of the alternatives.
        weight: λ = 1 - max π_T there.
    """

    position: int
    tokens: list[int]
    kappa: list[float]
    standard_error: list[float]
    score: float
    weight: float

    def to_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return dict(self.__dict__)


@torch.no_grad()
def kappa_mc(
    student: Model,
    teacher: Model,
    ids: Sequence[int],
    positions: Sequence[int] | None = None,
    *,
    n_alternatives: int = 4,
    horizon: int = 64,
    n_rollouts: int = 8,
    divergence: str = "fkl",
    seed: int = 0,
    eos_token_id: int | None = None,
    vocab: int | None = None,
    device: torch.device | None = None,
) -> list[KappaEstimate]:
    """Estimate κ at positions of a text.

    At each, the teacher's `n_alternatives` most probable tokens and as many drawn evenly from
    the others are forced in turn; the teacher continues `n_rollouts` times; the student's loss
    is summed over the continuation. What the teacher's own continuation costs is taken off.

    Args:
        student: A causal language model of transformers, or a callable from ids to logits.
        teacher: Likewise.
        ids: The text.
        positions: Indices (≥ 1) of the tokens to replace; all by default.
        n_alternatives: Of either kind.
        horizon: Tokens of a continuation.
        n_rollouts: Continuations of each alternative, and eight times as many without one.
        divergence: A name of `abkd.DIVERGENCES`.
        seed: Of the draws.
        eos_token_id: Ends a continuation.
        vocab: Cut both heads to this many classes.
        device: Where the models are.

    Raises:
        InputError: If a position is outside the text, or a number below 1.

    Examples:
        >>> def model(ids): return torch.zeros(*ids.shape, 6)
        >>> kappa_mc(model, model, [1, 2, 3], [2], horizon=2, n_rollouts=2)[0].score
        0.0
    """
    if min(n_alternatives, horizon, n_rollouts) < 1:
        raise InputError("n_alternatives, horizon and n_rollouts have to be at least 1")
    text = list(ids)
    wanted = list(range(1, len(text))) if positions is None else list(positions)
    outside = [p for p in wanted if not 1 <= p <= len(text)]
    if outside or not wanted:
        raise InputError(
            f"position {outside[0] if outside else None} is outside the text; accepted: 1 to "
            f"{len(text)} (the first token has no prefix)"
        )
    vocab = shared_vocab(student, teacher, vocab)
    for module in (student, teacher):
        if isinstance(module, torch.nn.Module):
            module.eval()
    generator = torch.Generator().manual_seed(seed)
    found = []
    for position in progress_bar(wanted, description="positions", unit="position"):
        prefix = text[:position]
        row = torch.tensor([prefix], device=device)
        logits = model_logits(teacher, row, torch.ones_like(row, dtype=torch.bool))[0, -1, :vocab]
        p = torch.softmax(logits.double(), -1).cpu()
        tokens = _alternatives(p, n_alternatives, generator)
        base = max(32, 8 * n_rollouts)
        prompts = [[*prefix, a] for a in tokens for _ in range(n_rollouts)]

        def cost(prompts: list[list[int]], length: int, skip: int) -> Tensor:
            sampled = sample(
                teacher,
                prompts,
                max_new_tokens=length,
                generator=generator,
                eos_token_id=eos_token_id,
                vocab=vocab,
                device=device,
            )
            losses, valid = score(student, teacher, *sampled, divergence=divergence, vocab=vocab)
            kept = torch.where(valid, losses.double(), 0.0)[:, skip:]
            return kept.sum(1).cpu()

        ended = torch.tensor([a == eos_token_id for a in tokens]).unsqueeze(1)
        costs = cost(prompts, horizon, 0).reshape(len(tokens), n_rollouts)
        costs = torch.where(ended, 0.0, costs)
        baseline = cost([prefix] * base, horizon + 1, 1)
        kappa = costs.mean(1) - baseline.mean()
        spread = baseline.var() / base
        if n_rollouts > 1:
            spread = spread + costs.var(1) / n_rollouts
        error = spread.expand(len(tokens)).sqrt()
        found.append(
            KappaEstimate(
                position,
                tokens,
                kappa.tolist(),
                error.tolist(),
                kappa.mean().item(),
                1 - p.max().item(),
            )
        )
    return found


def _alternatives(p: Tensor, count: int, generator: torch.Generator) -> list[int]:
    """The most probable tokens, and as many drawn evenly from the others."""
    count = min(count, len(p))
    top = p.topk(count).indices.tolist()
    rest = torch.ones_like(p)
    rest[top] = 0
    others = min(count, len(p) - count)
    if not others:
        return list(top)
    return [*top, *torch.multinomial(rest, others, generator=generator).tolist()]

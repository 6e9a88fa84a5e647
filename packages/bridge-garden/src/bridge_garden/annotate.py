"""λ along a text: where a teacher would have its student learn a token, and where a choice."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from abkd import TokenStatistics
from bridge_garden.exposure import Model, model_logits, shared_vocab
from bridge_garden.weights import Confidence, StepInfo, Weight, checked_weight, weight_from_string
from shared_core.errors import InputError

__all__ = ["Annotation", "annotate"]


@dataclass(frozen=True)
class Annotation:
    """λ and what it is made of, one entry for each token from the second on.

    Attributes:
        ids: The tokens that are predicted: all but the first.
        weight: λ.
        max_prob: The teacher's greatest probability.
        entropy: The teacher's entropy, in nats.
        argmax: The teacher's token.
        label_prob: The teacher's probability of the token that is there.
    """

    ids: list[int]
    weight: list[float]
    max_prob: list[float]
    entropy: list[float]
    argmax: list[int]
    label_prob: list[float]

    def to_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
        return asdict(self)


@torch.no_grad()
def annotate(
    teacher: Model,
    ids: Sequence[int],
    *,
    student: Model | None = None,
    weight: Weight | str = Confidence(),  # noqa: B008 - frozen
    at: StepInfo = StepInfo(),  # noqa: B008 - frozen
    vocab: int | None = None,
    device: torch.device | None = None,
) -> Annotation:
    """λ of every token of a text, as training on that text would have it.

    Args:
        teacher: A causal language model of transformers, or a callable from ids to logits.
        ids: The text, of at least two tokens.
        student: For weights that look at it (``wsl``); by default the teacher itself.
        weight: λ.
        at: Where training stands, for the curriculum.
        vocab: Cut the heads to this many classes.
        device: Where the models are.

    Raises:
        InputError: If the text is too short, or the weight is impossible.

    Examples:
        >>> def model(ids): return torch.tensor([[9.0, 0.0], [0.0, 0.0]])[ids]
        >>> annotate(model, [0, 1, 0]).weight
        [0.0001, 0.5000]
    """
    if len(ids) < 2:
        raise InputError(f"the text has {len(ids)} token; the first has no prefix: give at least 2")
    found = weight_from_string(weight) if isinstance(weight, str) else weight
    if student is not None:
        vocab = shared_vocab(student, teacher, vocab)
    row = torch.tensor([list(ids)], device=device)
    mask = torch.ones_like(row, dtype=torch.bool)
    logs = []
    for model in (teacher, teacher if student is None else student):
        if isinstance(model, torch.nn.Module):
            model.eval()
        z = model_logits(model, row, mask)[0, :-1, :vocab]
        logs.append(torch.log_softmax(z if z.dtype == torch.float64 else z.float(), -1))
    labels = row[0, 1:]
    seen = TokenStatistics(torch.arange(len(labels), device=row.device), labels, logs[1], logs[0])
    return Annotation(
        labels.tolist(),
        checked_weight(found, seen, at).tolist(),
        seen.teacher_max_prob.tolist(),
        seen.teacher_entropy.tolist(),
        seen.teacher_argmax.tolist(),
        seen.teacher_label_prob.tolist(),
    )

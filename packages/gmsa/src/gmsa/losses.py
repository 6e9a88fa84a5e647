"""The cross-entropy of the autoencoding and fine-tuning stages, at label positions only."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from shared_core.errors import InputError

__all__ = ["IGNORED", "label_cross_entropy"]

IGNORED = -100
"""The label of positions that do not count."""


def label_cross_entropy(
    hidden: Float[Tensor, "B s d"],
    labels: Int[Tensor, "B s"],
    head: Callable[[Tensor], Tensor],
    *,
    num_items: Tensor | int | None = None,
    chunk_size: int = 1024,
) -> tuple[Float[Tensor, ""], Int[Tensor, ""], Int[Tensor, ""]]:
    """-(1 / N) Σ_i log p(y_i | what came before), with logits for the N labels alone.

    With V tokens in the vocabulary, the full ``[B, s, V]`` logits are never made: the hidden
    states that predict a label are gathered first, and the head sees `chunk_size` of them at a
    time, recomputed in the backward pass.

    Args:
        hidden: The decoder's last hidden states ``[B, s, d]``.
        labels: ``labels[b, i]`` is the token at position i; it is predicted from position i - 1.
            -100 where there is none ``[B, s]``.
        head: From ``[N, d]`` to logits ``[N, V]``.
        num_items: Divide the sum by this instead of the number of labels, for gradient
            accumulation over batches of different sizes.
        chunk_size: Labels per call of the head.

    Returns:
        The loss (0, and differentiable, if no label counts), the number of labels that the argmax
        predicts, and the number of labels.

    Raises:
        InputError: If shapes differ, or a label is at position 0, where nothing predicts it.

    Source: L_AE and L_FT of the paper.

    Examples:
        >>> hidden = torch.eye(3)[None]
        >>> labels = torch.tensor([[-100, 0, 2]])
        >>> label_cross_entropy(hidden, labels, lambda h: 10 * h)[1:]
        (tensor(1), tensor(2))
    """
    if labels.shape != hidden.shape[:2]:
        raise InputError(
            f"labels have shape {list(labels.shape)}, hidden states {list(hidden.shape)}"
        )
    if labels.shape[1] and bool((labels[:, 0] != IGNORED).any()):
        raise InputError("a label is at position 0 of its row: nothing comes before it")
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    where = targets != IGNORED
    chosen, wanted = hidden[where], targets[where].long()
    count = wanted.new_tensor(len(wanted))
    # Keeps the graph (and, in DDP, every parameter's gradient) where no label counts.
    total = hidden.sum().float() * 0 if not len(wanted) else hidden.new_zeros((), dtype=torch.float)
    correct = wanted.new_zeros(())

    def part(states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(states).float()
        hits = (logits.detach().argmax(-1) == targets).sum()
        return F.cross_entropy(logits, targets, reduction="sum"), hits

    for begin in range(0, len(wanted), chunk_size):
        pieces = (chosen[begin : begin + chunk_size], wanted[begin : begin + chunk_size])
        if torch.is_grad_enabled() and len(wanted) > chunk_size:
            loss, hits = checkpoint(part, *pieces, use_reentrant=False)
        else:
            loss, hits = part(*pieces)
        total, correct = total + loss, correct + hits
    divisor = count.clamp(min=1) if num_items is None else num_items
    return total / divisor, correct, count

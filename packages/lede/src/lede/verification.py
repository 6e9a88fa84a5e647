"""Which drafts to keep, so that the output is the target model's own (sections 2.2 and 2.6).

A round has k passes of the early layers and k - 1 drafts; the late layers give k target
distributions. ``counts[b]`` says how many drafts row b really has (a row may stop before others).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["residual_distribution", "verify_greedy", "verify_sampled"]


def verify_greedy(
    predictions: Int[Tensor, "rows passes"],
    drafts: Int[Tensor, "rows drafts"],
    counts: Int[Tensor, "rows"],
) -> tuple[Int[Tensor, "rows"], Int[Tensor, "rows"]]:
    """Accept the leading drafts that equal the target's most likely tokens.

    Args:
        predictions: The target's argmax after each pass, k per row.
        drafts: y_1 .. y_{k-1}.
        counts: Drafts of each row.

    Returns:
        Accepted drafts a per row, and the target's token after them.

    Examples:
        >>> verify_greedy(torch.tensor([[5, 6, 7]]), torch.tensor([[5, 9]]), torch.tensor([2]))
        (tensor([1]), tensor([6]))
    """
    width = drafts.shape[1]
    real = torch.arange(width, device=drafts.device) < counts[:, None]
    accepted = ((predictions[:, :width] == drafts) & real).long().cumprod(1).sum(1)
    return accepted, predictions.gather(1, accepted[:, None])[:, 0]


def residual_distribution(
    p: Float[Tensor, "rows vocabulary"], q: Float[Tensor, "rows vocabulary"]
) -> Float[Tensor, "rows vocabulary"]:
    """norm(max(p - q, 0)): what a rejected draft is replaced from; p itself where p equals q.

    Examples:
        >>> residual_distribution(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]]))
        tensor([[0., 1.]])
    """
    rest = (p - q).clamp(min=0)
    total = rest.sum(-1, keepdim=True)
    empty = total <= torch.finfo(p.dtype).eps
    return torch.where(empty, p, rest / total.masked_fill(empty, 1.0))


def verify_sampled(
    p: Float[Tensor, "rows passes vocabulary"],
    q: Float[Tensor, "rows drafts vocabulary"],
    drafts: Int[Tensor, "rows drafts"],
    counts: Int[Tensor, "rows"],
    generator: torch.Generator | None = None,
) -> tuple[Int[Tensor, "rows"], Int[Tensor, "rows"]]:
    """Speculative sampling: accept y_i with probability min(1, p_i(y_i) / q_i(y_i)).

    The first rejected draft is replaced by a draw from norm(max(p - q, 0)); after the last draft
    one more token is drawn from the target. Committed tokens are distributed as the target's own
    (Leviathan et al. 2023; Chen et al. 2023).

    Args:
        p: Target distributions after each pass, after all logits processors.
        q: Distributions that the drafts were drawn from.
        drafts: y_1 .. y_{k-1}.
        counts: Drafts of each row.
        generator: Of the random numbers.

    Returns:
        Accepted drafts a per row, and the token after them.

    Examples:
        >>> p = q = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
        >>> verify_sampled(p, q[:, :1], torch.tensor([[1]]), torch.tensor([1]))
        (tensor([1]), tensor([0]))
    """
    rows, width = drafts.shape
    at = torch.arange(rows, device=p.device)
    if width:
        p_y = p[:, :width].gather(2, drafts[..., None])[..., 0]
        q_y = q.gather(2, drafts[..., None])[..., 0]
        u = torch.rand(p_y.shape, generator=generator, device=p.device, dtype=p.dtype)
        real = torch.arange(width, device=p.device) < counts[:, None]
        accepted = ((u * q_y < p_y) & real).long().cumprod(1).sum(1)
        rejected = accepted < counts
        rest = residual_distribution(p[at, accepted], q[at, accepted.clamp(max=width - 1)])
        final = torch.where(rejected[:, None], rest, p[at, accepted])
    else:
        accepted, final = counts * 0, p[:, 0]
    return accepted, torch.multinomial(final, 1, generator=generator)[:, 0]

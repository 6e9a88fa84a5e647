"""A small classifier that reads an exit's hidden state: will its drafts be right?

The confidence of a distribution says little where a model is sure of its own mistakes, and it costs
a head to see. A probe on the normed hidden state (as CALM's exit classifiers: Schuster et al. 2022)
sees more and costs no head, so that a policy can walk and stop before any head has run. It looks
at the hidden state, never at the token drawn, so sampled output stays the model's own.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lede.errors import PolicyMismatchError
from shared_core.errors import InputError

__all__ = ["AcceptanceProbe", "fit_probe", "train_probe"]

OUTPUTS = 2


class AcceptanceProbe:
    """Per exit, C → H → 2: log-odds that the draft here is right, and how far drafts stay right.

    Args:
        weights: ``w1`` [m, C, H], ``b1`` [m, H], ``w2`` [m, H, 2], ``b2`` [m, 2], float32.

    Raises:
        PolicyMismatchError: If the weights have other shapes.

    Examples:
        >>> rng = np.random.default_rng(0)
        >>> shapes = {"w1": (3, 8, 4), "b1": (3, 4), "w2": (3, 4, 2), "b2": (3, 2)}
        >>> probe = AcceptanceProbe({k: rng.normal(size=s) for k, s in shapes.items()})
        >>> probe(torch.zeros(5, 8), candidate=1).shape
        torch.Size([5, 2])
    """

    def __init__(self, weights: Mapping[str, np.ndarray]) -> None:
        self.weights = {k: np.ascontiguousarray(v, dtype=np.float32) for k, v in weights.items()}
        try:
            exits, width, hidden = self.weights["w1"].shape
            shapes = [self.weights[k].shape for k in ("b1", "w2", "b2")]
        except (KeyError, ValueError) as error:
            raise PolicyMismatchError(f"the probe's weights are not whole ({error})") from error
        if shapes != [(exits, hidden), (exits, hidden, OUTPUTS), (exits, OUTPUTS)]:
            raise PolicyMismatchError(f"the probe's weights do not fit each other: {shapes}")
        self.exits, self.width = exits, width
        self._on: dict[torch.device, dict[str, Tensor]] = {}

    def __call__(
        self, normed: Float[Tensor, "*batch width"], candidate: int
    ) -> Float[Tensor, "*batch 2"]:
        """Outputs for normed hidden states [..., C] of the candidate with this index, float32."""
        w = self._on.get(normed.device)
        if w is None:
            w = {k: torch.from_numpy(v).to(normed.device) for k, v in self.weights.items()}
            self._on[normed.device] = w
        x = torch.relu(normed.float() @ w["w1"][candidate] + w["b1"][candidate])
        outputs: Tensor = x @ w["w2"][candidate] + w["b2"][candidate]
        return outputs


def train_probe(
    hidden: np.ndarray,
    right: np.ndarray,
    leading: np.ndarray,
    *,
    width: int = 32,
    steps: int = 400,
    weight_decay: float = 0.1,
    seed: int = 0,
) -> AcceptanceProbe:
    """Fit the probes of all exits at once.

    Args:
        hidden: Normed hidden states of N positions, [N, m, C].
        right: Whether each exit's draft is right there, [N, m].
        leading: Its right drafts in a row from there, over the longest draft, [N, m].
        width: H.
        steps: Updates, of 512 positions each.
        weight_decay: Of AdamW.
        seed: Of weights and batches.
    """
    x = torch.from_numpy(hidden.astype(np.float32))
    target = torch.from_numpy(np.stack([right, leading], -1).astype(np.float32))
    mean, spread = x.mean(0), x.std(0) + 1e-6
    x = (x - mean) / spread
    count, exits, size = x.shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, fan: int) -> Tensor:
        return (torch.randn(shape, generator=generator) / math.sqrt(fan)).requires_grad_()

    w1, w2 = draw(exits, size, width, fan=size), draw(exits, width, OUTPUTS, fan=width)
    b1 = torch.zeros(exits, 1, width, requires_grad=True)
    b2 = torch.zeros(exits, 1, OUTPUTS, requires_grad=True)
    optimizer = torch.optim.AdamW([w1, b1, w2, b2], lr=5e-3, weight_decay=weight_decay)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / steps)
        chosen = torch.randint(count, (512,), generator=generator)
        out = torch.relu(x[chosen].transpose(0, 1) @ w1 + b1) @ w2 + b2
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            out, target[chosen].transpose(0, 1)
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():  # standardisation goes into the first layer
        inner = w1 / spread[:, :, None]
        offset = b1[:, 0] - (mean[:, None] @ inner)[:, 0]
    weights = {"w1": inner, "b1": offset, "w2": w2, "b2": b2[:, 0]}
    return AcceptanceProbe({k: v.detach().numpy() for k, v in weights.items()})


def fit_probe(
    decoder: Any,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 128,
    seed: int = 0,
    **kwargs: Any,
) -> AcceptanceProbe:
    """Generate from prompts and fit a probe on the hidden states met at the decoder's exits.

    Use other prompts than for the policy's experience: on its own prompts a probe is too sure.

    Args:
        decoder: A `SelfSpeculativeDecoder`.
        input_ids: Prompts [B, P], left-padded.
        attention_mask: Of the prompts.
        max_new_tokens: Tokens to generate from each.
        seed: Of weights and batches.
        kwargs: For ``generate``.

    Raises:
        InputError: If there is no prompt or sampling is asked for.

    Examples:
        >>> from lede import SelfSpeculativeDecoder
        >>> from lede.testing import tiny_model
        >>> decoder = SelfSpeculativeDecoder(tiny_model(layers=3), [1, 2])
        >>> fit_probe(decoder, torch.ones(2, 3, dtype=torch.long), max_new_tokens=8).exits
        2
    """
    from lede.experience import collect

    seen: list[Tensor] = []
    table = collect(
        decoder,
        input_ids,
        attention_mask=attention_mask,
        max_new_tokens=max_new_tokens,
        mode="teacher",
        keep_hidden=seen,
        **kwargs,
    )
    inside = np.arange(table.tokens.shape[1]) < table.lengths[:, None]
    width = table.tokens.shape[1]
    hidden = torch.cat(
        [torch.nn.functional.pad(h, (0, 0, 0, width - h.shape[2])) for h in seen]
    ).numpy()
    if not inside.any():
        raise InputError("nothing was generated to fit a probe on")
    swapped = [np.moveaxis(a, 1, 2)[inside] for a in (hidden, table.right, table.leading())]
    leading = np.minimum(swapped[2], table.max_draft) / table.max_draft
    return train_probe(swapped[0], swapped[1], leading, seed=seed)

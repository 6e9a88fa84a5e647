"""Amalgamation of features obtained under different techniques (paper A.4, eq. 3 to 5).

Assigners f^j give every feature r_i of an image a weight; softmax over i; each assigner's weighted
sum is a feature, and the sums are joined: ``r = concat_j sum_i w^j_i r_i``. A regulariser asks for
decided assigners (large ``||w^j||_2``) that disagree (large ``||w^j - w^k||_2``).
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shared_core.errors import InputError

__all__ = ["Amalgamation", "AmalgamationOutput", "GammaWalk", "amalgamation_loss"]

EPSILON = 1e-12  # under the root: the gradient of a norm at zero is not defined


@dataclass(frozen=True)
class AmalgamationOutput:
    """What `Amalgamation` gives.

    Attributes:
        features: ``[B, n C (+ E), H, W]``, or ``[B, n C (+ E)]`` of pixels.
        weights: ``[B, n, b]``, or ``[B, n, b, C]`` with a weight a channel.
        sparsity: ``sum_j ||w^j||_2``, image by image, ``[B]`` (mean over channels).
        diversity: ``1/2 sum_j sum_{k != j} ||w^j - w^k||_2``, ``[B]``.
    """

    features: Tensor
    weights: Tensor
    sparsity: Tensor
    diversity: Tensor


def _norm(x: Tensor, dim: int) -> Tensor:
    return (x.square().sum(dim) + EPSILON).sqrt()


def _sparsity(weights: Tensor) -> Tensor:
    norms = _norm(weights, 2).sum(1)  # [B] or [B, C]
    return norms.flatten(1).mean(1) if norms.ndim > 1 else norms


def _diversity(weights: Tensor) -> Tensor:
    n = weights.shape[1]
    total = weights.new_zeros(weights.shape[0])
    for j in range(n):
        for k in range(j + 1, n):  # both orders of a pair, halved
            gap = _norm(weights[:, j] - weights[:, k], 1)
            total = total + (gap.flatten(1).mean(1) if gap.ndim > 1 else gap)
    return total


class Amalgamation(nn.Module):
    """Weigh and join b features of the same shape (paper A.4).

    Args:
        channels: C of each feature.
        n_assigners: n; up to 3 in the paper.
        granularity: ``scalar``, one weight a feature (the paper); ``channel``, one a channel (the
            authors' code).
        kind: ``map`` weighs whole maps (3 x 3 convolution, then the mean over positions);
            ``pixel`` weighs vectors ``[B, b, C]``.
        hidden: Width of the assigners.
        dropout: In the assigners, while training.
        norm: ``batch`` as published; ``group`` (one group) does not look at other samples and
            allows batches of one.

    Examples:
        >>> mix = Amalgamation(4).eval(); stack = torch.randn(2, 3, 4, 8, 8)
        >>> out = mix(stack)
        >>> out.features.shape, out.weights.shape
        (torch.Size([2, 8, 8, 8]), torch.Size([2, 2, 3]))
    """

    def __init__(
        self,
        channels: int,
        n_assigners: int = 2,
        granularity: Literal["scalar", "channel"] = "scalar",
        kind: Literal["map", "pixel"] = "map",
        hidden: int = 128,
        dropout: float = 0.5,
        norm: Literal["batch", "group"] = "batch",
    ) -> None:
        super().__init__()
        if granularity not in ("scalar", "channel") or kind not in ("map", "pixel"):
            raise InputError(
                f"granularity={granularity!r}, kind={kind!r}; accepted: scalar, channel; map, pixel"
            )
        if norm not in ("batch", "group") or channels < 1 or n_assigners < 1:
            raise InputError(
                f"norm={norm!r}, channels={channels}, n_assigners={n_assigners}; accepted: batch, "
                "group; at least 1"
            )
        self.channels, self.granularity, self.kind, self.norm = channels, granularity, kind, norm
        out = 1 if granularity == "scalar" else channels
        # Every assigner is initialised on its own: equal ones would stay equal.
        self.assigners = nn.ModuleList(
            nn.Sequential(*self._layers(channels, hidden, out, dropout)) for _ in range(n_assigners)
        )

    def _layers(self, channels: int, hidden: int, out: int, dropout: float) -> list[nn.Module]:
        normed: nn.Module
        if self.kind == "map":
            normed = nn.BatchNorm2d(hidden) if self.norm == "batch" else nn.GroupNorm(1, hidden)
            first: nn.Module = nn.Conv2d(channels, hidden, 3, padding=1, bias=False)
            pool: list[nn.Module] = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        else:
            normed = nn.BatchNorm1d(hidden) if self.norm == "batch" else nn.GroupNorm(1, hidden)
            first, pool = nn.Linear(channels, hidden), []
        return [first, nn.ReLU(), normed, nn.Dropout(dropout), *pool, nn.Linear(hidden, out)]

    def weights(self, stack: Float[Tensor, "batch b channels ..."]) -> Tensor:
        """Weights ``[B, n, b]`` or ``[B, n, b, C]`` that sum to 1 over b, float32.

        Raises:
            InputError: See `forward`.
        """
        self._check(stack)
        batch, b = stack.shape[:2]
        flat = stack.flatten(0, 1)  # the same assigner looks at each of the b features
        logits = torch.stack([f(flat).float().view(batch, b, -1) for f in self.assigners], 1)
        if self.granularity == "scalar":
            logits = logits.squeeze(-1)
        return logits.softmax(2)

    def forward(
        self, stack: Float[Tensor, "batch b channels ..."], extra: Tensor | None = None
    ) -> AmalgamationOutput:
        """Join the features, with the attention feature appended unweighted.

        Args:
            stack: b features of each image, ``[B, b, C, H, W]`` (``[B, b, C]`` of pixels).
            extra: ``[B, E, H, W]`` or ``[B, E]``, appended as it is.

        Raises:
            InputError: If there are fewer than two features, the shapes do not fit, or single
                pixels meet batch normalisation while training.
        """
        weights = self.weights(stack)
        shaped = weights if self.granularity == "channel" else weights.unsqueeze(-1)
        shaped = shaped.view(*shaped.shape, *[1] * (stack.ndim - 3)).to(stack.dtype)
        mixed = [(w * stack).sum(1) for w in shaped.unbind(1)]
        if extra is not None:
            if extra.shape[0] != stack.shape[0] or extra.shape[2:] != stack.shape[3:]:
                raise InputError(
                    f"extra {list(extra.shape)} beside features {list(stack.shape)}; give as many "
                    "images and the same sides"
                )
            mixed.append(extra.to(stack.dtype))
        return AmalgamationOutput(
            torch.cat(mixed, 1), weights, _sparsity(weights), _diversity(weights)
        )

    def _check(self, stack: Tensor) -> None:
        dims = 5 if self.kind == "map" else 3
        if stack.ndim != dims or stack.shape[2] != self.channels:
            wanted = "[B, b, C, H, W]" if self.kind == "map" else "[B, b, C]"
            raise InputError(
                f"features are {list(stack.shape)}; accepted: {wanted} with C = {self.channels}"
            )
        if stack.shape[1] < 2:
            raise InputError("amalgamation weighs at least 2 features; 1 was given")
        if self.training and self.kind == "pixel" and self.norm == "batch" and len(stack) == 1:
            raise InputError(
                "one pixel has no batch statistics: train on at least 2, or use norm='group'"
            )


def amalgamation_loss(
    task_loss: Float[Tensor, ""],
    out: AmalgamationOutput,
    gamma1: "float | GammaWalk" = 0.0,
    gamma2: float = 0.0,
) -> Float[Tensor, ""]:
    """Eq. 5: ``L - g1 sum_j ||w^j||_2 - (g2 / 2) sum_j sum_{k != j} ||w^j - w^k||_2``.

    Args:
        task_loss: L.
        out: From `Amalgamation`.
        gamma1: g1; or a `GammaWalk`, as in the authors' code.
        gamma2: g2.

    Examples:
        >>> out = Amalgamation(4, 1).eval()(torch.randn(2, 3, 4, 8, 8))
        >>> bool(amalgamation_loss(torch.tensor(1.0), out, 0.1) < 1)
        True
    """
    loss = task_loss - gamma2 * out.diversity.mean()
    if isinstance(gamma1, GammaWalk):
        return loss + gamma1.term(task_loss, out)
    return loss - gamma1 * out.sparsity.mean()


class GammaWalk:
    """The authors' code instead of g1: a random walk that is kept where the loss falls faster.

    Every `every` steps gamma moves by -delta, 0 or +delta (never below 0); the move stays if the
    loss fell by more than in the interval before, or with a chance of 1 in 20. The term is
    ``gamma L (-S) / S`` with L and the divisor detached and S the mean norm, so that it is always
    gamma times as large as the loss.

    Args:
        every: Steps between moves.
        delta: Size of a move.
        seed: Of the walk (the published one has none).

    Examples:
        >>> walk = GammaWalk(); out = Amalgamation(4, 1).eval()(torch.randn(2, 3, 4, 8, 8))
        >>> float(walk.term(torch.tensor(1.0), out).detach())  # gamma begins at 0
        -0.0
    """

    def __init__(self, every: int = 5, delta: float = 1e-5, seed: int = 0) -> None:
        self.every, self.delta = every, delta
        self.gamma = 0.0
        self._before, self._drop = 0.0, float("-inf")
        self._losses: list[float] = []
        self._previous_mean: float | None = None
        self._generator = torch.Generator().manual_seed(seed)

    def term(self, task_loss: Tensor, out: AmalgamationOutput) -> Tensor:
        """What is added to the loss; call it once a step."""
        mean_norm = out.sparsity.mean() / out.weights.shape[1]
        term = self.gamma * task_loss.detach() * -mean_norm / mean_norm.detach()
        self._losses.append(float(task_loss.detach()))
        if len(self._losses) == self.every:
            self._move(sum(self._losses) / self.every)
            self._losses = []
        return term

    def _move(self, mean: float) -> None:
        if self._previous_mean is not None:
            drop = self._previous_mean - mean
            lucky = float(torch.rand((), generator=self._generator)) < 1 / 20
            if not (drop > self._drop or lucky):
                self.gamma = self._before
            self._drop = drop
        self._previous_mean = mean
        self._before = self.gamma
        step = int(torch.randint(-1, 2, (), generator=self._generator))
        self.gamma = max(0.0, self.gamma + step * self.delta)

    def state_dict(self) -> dict[str, Any]:
        """All of the walk, for a checkpoint."""
        return {
            "gamma": self.gamma, "before": self._before, "drop": self._drop,
            "losses": self._losses, "previous_mean": self._previous_mean,
            "generator": self._generator.get_state(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.gamma, self._before, self._drop = state["gamma"], state["before"], state["drop"]
        self._losses, self._previous_mean = list(state["losses"]), state["previous_mean"]
        self._generator.set_state(state["generator"])

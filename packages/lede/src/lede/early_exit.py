"""Making a model exit well early: layer dropout and a loss at every exit (section 2.7).

The recipe of LayerSkip (Elhoushi et al., ACL 2024), restated from its formulas: samples skip
layers at random, deep ones more often, and the shared head is trained on early layers too.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lede.adapters import layer_runner
from shared_core.errors import InputError

__all__ = [
    "EarlyExitConfig",
    "active_exits",
    "early_exit_loss",
    "exit_loss_weights",
    "exit_quality",
    "layer_dropout_rates",
]


@dataclass(frozen=True)
class EarlyExitConfig:
    """Settings of the recipe.

    Attributes:
        p_max: Dropout rate of the last layer.
        e_scale: Weight of the early losses.
        curriculum: ``rotational``: every exit has its loss every `rotation` steps;
            ``gradual``: exits join from deep to shallow over the first half of training; ``all``.
        rotation: R.
        dropout_schedule: ``constant`` (continued training) or ``exponential`` (from scratch).

    Raises:
        InputError: If a value is out of range.

    Examples:
        >>> EarlyExitConfig().p_max
        0.1
    """

    p_max: float = 0.1
    e_scale: float = 0.2
    curriculum: str = "rotational"
    rotation: int = 4
    dropout_schedule: str = "constant"

    def __post_init__(self) -> None:
        if not 0 <= self.p_max < 1:
            raise InputError(f"p_max={self.p_max}; accepted: 0 to below 1")
        if self.e_scale < 0:
            raise InputError(f"e_scale={self.e_scale}; it must not be negative")
        if self.curriculum not in ("rotational", "gradual", "all"):
            raise InputError(f"curriculum={self.curriculum!r}; accepted: rotational, gradual, all")
        if self.rotation < 1:
            raise InputError(f"rotation={self.rotation}; it must be at least 1")
        if self.dropout_schedule not in ("constant", "exponential"):
            raise InputError(
                f"dropout_schedule={self.dropout_schedule!r}; accepted: constant, exponential"
            )


def layer_dropout_rates(
    depth: int, config: EarlyExitConfig, step: int = 0, total: int = 1
) -> Tensor:
    """p(l) = S(t) p_max (2^{l / (L - 1)} - 1) for l = 0 .. L - 1, float64 [L].

    S is 1, or 2^{t / (T - 1)} - 1 from scratch.

    Examples:
        >>> layer_dropout_rates(3, EarlyExitConfig(p_max=0.1))
        tensor([0.0000, 0.0414, 0.1000], dtype=torch.float64)
    """
    at = torch.arange(depth, dtype=torch.float64) / max(1, depth - 1)
    scale = 1.0
    if config.dropout_schedule == "exponential":
        scale = math.exp(step * math.log(2) / max(1, total - 1)) - 1
    return scale * config.p_max * (torch.exp(at * math.log(2)) - 1)


def exit_loss_weights(depth: int, config: EarlyExitConfig, active: Tensor) -> Tensor:
    """Normalised loss weights of the exits after each layer, float64 [L]; the last is the model's.

    e(l) = e_scale Σ_{i ≤ l} i before the last layer, L - 1 + e_scale Σ_{i ≤ L - 2} i at it; those
    of inactive exits are 0 and the rest is divided by its sum.

    Args:
        depth: L.
        config: Settings.
        active: Which exits have a loss in this step, bool [L].

    Examples:
        >>> exit_loss_weights(3, EarlyExitConfig(e_scale=1.0), torch.ones(3, dtype=torch.bool))
        tensor([0.0000, 0.2500, 0.7500], dtype=torch.float64)
    """
    index = torch.arange(depth, dtype=torch.float64)
    weights = config.e_scale * index.cumsum(0)
    weights[-1] = depth - 1 + config.e_scale * index[:-1].sum()
    weights = weights * active
    return weights / weights.sum()


def active_exits(depth: int, config: EarlyExitConfig, step: int, total: int) -> Tensor:
    """Which exits have a loss at this step, bool [L]; the last layer always.

    Examples:
        >>> active_exits(4, EarlyExitConfig(rotation=2), step=1, total=10).int()
        tensor([0, 1, 0, 1], dtype=torch.int32)
    """
    index = torch.arange(depth)
    if config.curriculum == "rotational":
        active = index % config.rotation == step % config.rotation
    elif config.curriculum == "gradual":
        active = index >= depth - 1 - (2 * step * depth) // max(1, total)
    else:
        active = torch.ones(depth, dtype=torch.bool)
    active[-1] = True
    return active


@contextlib.contextmanager
def _layers_watched(layers: list[Any], rates: Tensor) -> Iterator[dict[int, Tensor]]:
    """Let samples skip layers, and keep every layer's output, while the block runs."""
    kept: dict[int, Tensor] = {}

    def hook_of(index: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            plain = output[0] if isinstance(output, tuple) else output
            rate = float(rates[index])
            if module.training and rate > 0:
                before = args[0] if args else kwargs["hidden_states"]
                skip = torch.rand(len(plain), 1, 1, device=plain.device) < rate
                plain = torch.where(skip, before, plain)
            kept[index] = plain
            return (plain, *output[1:]) if isinstance(output, tuple) else plain

        return hook

    handles = [
        layer.register_forward_hook(hook_of(i), with_kwargs=True) for i, layer in enumerate(layers)
    ]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def early_exit_loss(
    model: Any,
    input_ids: Tensor,
    labels: Tensor,
    config: EarlyExitConfig,
    *,
    step: int = 0,
    total: int = 1,
    attention_mask: Tensor | None = None,
    forward: Any = None,
) -> Tensor:
    """Σ_l ẽ(l) CE(z_l, y): next-token loss over the active exits, in training with layer dropout.

    Args:
        model: A causal language model of a supported family.
        input_ids: [B, T].
        labels: [B, T], aligned with `input_ids` (the shift is done here); -100 is ignored.
        config: Settings.
        step: Of training.
        total: Steps of training.
        attention_mask: [B, T].
        forward: What to call instead of `model`: its wrapper for distributed training.

    Examples:
        >>> from lede.testing import tiny_model
        >>> ids = torch.randint(64, (2, 8))
        >>> early_exit_loss(tiny_model(), ids, ids, EarlyExitConfig()).ndim
        0
    """
    runner = layer_runner(model)
    depth = runner.depth
    rates = layer_dropout_rates(depth, config, step, total)
    weights = exit_loss_weights(depth, config, active_exits(depth, config, step, total))
    with _layers_watched(runner.layers, rates) as kept:
        final = (forward or model)(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).logits
    target = labels[:, 1:].reshape(-1)

    def cross_entropy(logits: Tensor) -> Tensor:
        flat = logits[:, :-1].reshape(-1, logits.shape[-1])
        return nn.functional.cross_entropy(flat.float(), target.to(flat.device))

    loss = weights[-1].item() * cross_entropy(final)
    for i in range(depth - 1):
        if weights[i] > 0:
            # Logits of many exits at a large vocabulary do not fit: they are made again backwards.
            exit_loss: Any = checkpoint(
                lambda h: cross_entropy(runner.logits(h)), kept[i], use_reentrant=False
            )
            loss = loss + weights[i].item() * exit_loss
    return loss


def exit_quality(model: Any, input_ids: Tensor, *, batch_size: int = 16) -> dict[str, list[float]]:
    """How well every layer predicts: next-token loss, and agreement with the last layer.

    Args:
        model: A causal language model of a supported family; it is run in eval mode.
        input_ids: Windows of text without padding, [B, T].
        batch_size: Windows at a time.

    Returns:
        ``loss`` in nats per token and ``agreement``, the share of positions at which the exit's
        most likely token is the last layer's; a value per layer 1 .. L.

    Examples:
        >>> from lede.testing import tiny_model
        >>> found = exit_quality(tiny_model(layers=3), torch.ones(1, 4, dtype=torch.long))
        >>> len(found["loss"]), found["agreement"][-1]
        (3, 1.0)
    """
    runner = layer_runner(model)
    loss = torch.zeros(runner.depth, dtype=torch.float64)
    agree = torch.zeros(runner.depth, dtype=torch.float64)
    training = model.training
    model.eval()
    try:
        for ids in torch.split(input_ids, batch_size):
            with torch.no_grad(), _layers_watched(runner.layers, torch.zeros(runner.depth)) as kept:
                final = model(input_ids=ids.to(runner.device), use_cache=False).logits[:, :-1]
                best, target = final.argmax(-1), ids[:, 1:].to(final.device)
                for i in range(runner.depth):
                    scores = runner.logits(kept[i])[:, :-1]
                    loss[i] += nn.functional.cross_entropy(
                        scores.flatten(0, 1), target.flatten().to(scores.device), reduction="sum"
                    ).cpu()
                    agree[i] += (scores.argmax(-1) == best.to(scores.device)).sum().cpu()
    finally:
        model.train(training)
    count = input_ids[:, 1:].numel()
    return {"loss": (loss / count).tolist(), "agreement": (agree / count).tolist()}

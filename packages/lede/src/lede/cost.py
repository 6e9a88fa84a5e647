"""What a round costs, in seconds or in one-token layers, and the closed forms of speedup."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shared_core.device import synchronize
from shared_core.errors import InputError
from shared_core.run import write_json

__all__ = ["CostModel", "calibrate", "expected_speedup", "expected_tokens"]

WIDTHS = (1, 2, 4, 8, 13)


@dataclass(frozen=True)
class CostModel:
    """Cost of a layer and of the head by tokens per pass, and of looking and deciding.

    Costs between the measured widths are interpolated linearly.

    Args:
        depth: Layers, L.
        layer: Cost of one layer at each of `widths` tokens.
        head: Cost of norm and head at each of `widths` tokens.
        features: Cost of the confidence features of one distribution.
        policy: Cost of one decision.
        widths: Tokens per pass.
        unit: ``layer`` (one-token layers) or ``s``.

    Examples:
        >>> cost = CostModel.memory_bound(8, head_ratio=0.5)
        >>> cost.autoregressive, round(float(cost.round(2, passes=3, heads=2)), 3)
        (8.5, 13.565)
    """

    depth: int
    layer: tuple[float, ...]
    head: tuple[float, ...]
    features: float = 0.0
    policy: float = 0.0
    widths: tuple[int, ...] = WIDTHS
    unit: str = "layer"

    @classmethod
    def memory_bound(cls, depth: int, head_ratio: float = 0.3) -> "CostModel":
        """A device that reads weights and waits for little else: a GPU at batch 1.

        A layer of k tokens costs 1 + 0.005 (k - 1); the head `head_ratio` of that; features 0.02
        and a decision 0.02 of a layer.
        """
        grow = [1 + 0.005 * (w - 1) for w in WIDTHS]
        head = tuple(head_ratio * g for g in grow)
        return cls(depth, tuple(grow), head, features=0.02, policy=0.02)

    def layer_cost(self, width: Any) -> Any:
        """Cost of one layer at `width` tokens."""
        return np.interp(width, self.widths, self.layer)

    def head_cost(self, width: Any) -> Any:
        """Cost of norm and head at `width` tokens."""
        return np.interp(width, self.widths, self.head)

    @property
    def autoregressive(self) -> float:
        """Cost of a plain token, T_AR."""
        return float(self.depth * self.layer[0] + self.head[0])

    @property
    def look(self) -> float:
        """Cost of features and decision at one distribution, without the head."""
        return self.features + self.policy

    def round(self, exit_layer: Any, passes: Any, heads: Any, looks: Any = 0) -> Any:
        """Cost of a round.

        Args:
            exit_layer: E; the depth for a plain step.
            passes: Early passes, k.
            heads: Early heads.
            looks: Distributions looked at by the policy.
        """
        late = (self.depth - exit_layer) * self.layer_cost(passes) + self.head_cost(passes)
        early = passes * exit_layer * self.layer[0] + heads * self.head[0]
        return early + late + looks * self.look

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "CostModel":
        """Read what `save` wrote.

        Raises:
            InputError: If the file is missing or is something else.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            values: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in found.items()
            }
            return cls(**values)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{os.fspath(path)} is not a saved cost model ({error})") from error


def expected_tokens(alpha: float, drafts: int) -> float:
    """Tokens per round if every draft is right with probability α: (1 - α^{d+1}) / (1 - α).

    Examples:
        >>> expected_tokens(0.5, 2), expected_tokens(1.0, 4)
        (1.75, 5.0)
    """
    return float(sum(alpha**i for i in range(drafts + 1)))


def expected_speedup(alpha: float, exit_layer: int, drafts: int, cost: CostModel) -> float:
    """Speedup over plain decoding if every draft is right with probability α.

    Examples:
        >>> round(expected_speedup(0.97, 7, 8, CostModel.memory_bound(32, 0.3)), 2)
        2.81
    """
    spent = float(cost.round(exit_layer, drafts + 1, drafts))
    return expected_tokens(alpha, drafts) * cost.autoregressive / spent


def calibrate(decoder: Any, *, context: int = 128, repeats: int = 30) -> CostModel:
    """Measure a `CostModel` with the real model on its device, in seconds (medians).

    Args:
        decoder: A `SelfSpeculativeDecoder`.
        context: Tokens before the measured pass.
        repeats: Timed passes of each width.

    Examples:
        >>> from lede import SelfSpeculativeDecoder
        >>> from lede.testing import tiny_model
        >>> decoder = SelfSpeculativeDecoder(tiny_model(layers=3), [1])
        >>> calibrate(decoder, context=8, repeats=2).unit
        's'
    """
    from lede.cache import RaggedCache
    from lede.features import confidence_features

    runner = decoder.runner
    runner.prepare()
    cache = RaggedCache(runner.depth, context + max(WIDTHS))
    padding = np.zeros(1, dtype=np.int64)
    ids = torch.ones(1, context + max(WIDTHS), dtype=torch.long, device=runner.device)

    def median(call: Callable[[], object]) -> float:
        taken = []
        for turn in range(repeats + 3):
            synchronize(runner.device)
            began = time.perf_counter()
            call()
            synchronize(runner.device)
            if turn >= 3:
                taken.append(time.perf_counter() - began)
        return float(np.median(taken))

    layers, heads = [], []
    with torch.no_grad():
        frame = runner.frame(np.zeros(1, dtype=np.int64), context, padding, cache)
        runner.run(runner.embed(ids[:, :context]), 0, runner.depth, frame, cache)
        at = np.array([context])
        for width in WIDTHS:
            hidden = runner.embed(ids[:, :width])

            def run(hidden: torch.Tensor = hidden, width: int = width) -> None:
                frame = runner.frame(at, width, padding, cache)
                runner.run(hidden, 0, runner.depth, frame, cache)

            layers.append(median(run) / runner.depth)
            heads.append(median(lambda hidden=hidden: runner.logits(hidden).argmax(-1)))
        scores = runner.logits(runner.embed(ids[:, :1]))[:, -1]
        features = median(lambda: confidence_features(scores)[0].cpu())
    return CostModel(runner.depth, tuple(layers), tuple(heads), features, 2e-5, unit="s")

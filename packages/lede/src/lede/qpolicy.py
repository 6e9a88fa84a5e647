"""The learned policy: a small Q-network over the state of a round (section 2.3).

Two actions in each of two phases. Walking: go deeper (0) or exit here (1). Drafting: draft on (0)
or stop and verify (1). One network serves both; it has an output pair for every phase and
candidate, as Q = V ± A / 2.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from lede.errors import PolicyMismatchError
from lede.policies import AutoregressivePolicy, Observation, chance
from lede.probe import AcceptanceProbe
from shared_core.errors import InputError
from shared_core.run import atomic_path, write_json

__all__ = ["PROBE_FEATURES", "STATE_FEATURES", "QPolicy", "StateSpec"]

STATE_FEATURES = [
    "phase",
    "layer",
    "index",
    "p1",
    "margin",
    "entropy",
    "agree",
    "ema",
    "prefix",
    "log_doubt",
    "last_accepted",
    "joint",
    "log_joint",
]
PROBE_FEATURES = ["chance", "log_odds", "reach", "chain", "log_chain"]
HEAD_FEATURES = {"p1", "margin", "entropy", "agree", "prefix", "log_doubt", "joint", "log_joint"}
PROBE_STATE = ("phase", "layer", "index", "ema", "last_accepted", *PROBE_FEATURES)
WALK, DRAFT = 0, 1


@dataclass(frozen=True)
class StateSpec:
    """Which features a policy sees, in order; saved with it and checked at loading.

    Args:
        names: Of `STATE_FEATURES` and `PROBE_FEATURES`. The first ten are the description's; ours
            are ``last_accepted``, ``joint`` (Π p₁ with the present one), its logarithm, and what
            the probe of the hidden state says: the chance that the draft is right, its log-odds,
            how far drafts stay right (``reach``), the chances' product (``chain``) and logarithm.

    Raises:
        InputError: If a name is unknown.

    Examples:
        >>> len(StateSpec().names)
        13
    """

    names: tuple[str, ...] = tuple(STATE_FEATURES)

    def __post_init__(self) -> None:
        known = [*STATE_FEATURES, *PROBE_FEATURES]
        unknown = [n for n in self.names if n not in known]
        if unknown:
            raise InputError(f"unknown features {unknown}; accepted: {', '.join(known)}")

    @cached_property
    def needs_head(self) -> bool:
        """Whether a feature is one of the distribution."""
        return bool(HEAD_FEATURES & set(self.names))

    @cached_property
    def needs_probe(self) -> bool:
        """Whether a feature is the probe's."""
        return bool(set(PROBE_FEATURES) & set(self.names))

    def states(self, phase: int, seen: Observation, depth: int, max_draft: int) -> np.ndarray:
        """State vectors, float32 [R, F], of observations in one phase."""
        if self.needs_probe and (seen.probe is None or seen.chain is None):
            raise PolicyMismatchError("the policy's features need a probe of hidden states")
        sight = _Sight(phase, seen, depth, max_draft)
        out = np.empty((len(seen.layer), len(self.names)), dtype=np.float32)
        for column, name in enumerate(self.names):
            out[:, column] = _FEATURES[name](sight)
        return out


@dataclass
class _Sight:
    """An observation, and what several features are made of; each computed when asked for."""

    phase: int
    seen: Any
    depth: int
    max_draft: int

    @cached_property
    def joint(self) -> Any:
        return self.seen.prefix * self.seen.p1

    @cached_property
    def right(self) -> Any:
        return chance(self.seen.probe[:, 0])

    @cached_property
    def chain(self) -> Any:
        return self.seen.chain * self.right


def _log(probability: np.ndarray) -> Any:
    """Logarithm of a probability, 0 to -1."""
    return np.log(np.maximum(probability, 1e-4)) / 9.2


_FEATURES: dict[str, Callable[[_Sight], Any]] = {
    "phase": lambda s: s.phase,
    "layer": lambda s: s.seen.layer / s.depth,
    "index": lambda s: s.seen.index / s.max_draft,
    "p1": lambda s: s.seen.p1,
    "margin": lambda s: s.seen.margin,
    "entropy": lambda s: s.seen.entropy,
    "agree": lambda s: s.seen.agree,
    "ema": lambda s: s.seen.ema,
    "prefix": lambda s: s.seen.prefix,
    "log_doubt": lambda s: _log(1 - s.seen.p1),
    "last_accepted": lambda s: s.seen.last_accepted,
    "joint": lambda s: s.joint,
    "log_joint": lambda s: _log(s.joint),
    "chance": lambda s: s.right,
    "log_odds": lambda s: np.clip(s.seen.probe[:, 0], -8, 8) / 8,
    "reach": lambda s: chance(s.seen.probe[:, 1]),
    "chain": lambda s: s.chain,
    "log_chain": lambda s: _log(s.chain),
}


class QPolicy(AutoregressivePolicy):
    """Acts greedily on a Q-network.

    Args:
        weights: ``w1 b1 w2 b2 w3 b3`` of the network F → H → H → m · 2 · 2 (candidate, phase,
            action), float32.
        exits: Candidates it was trained for.
        depth: Layers of the model.
        max_draft: Longest draft.
        spec: Its state.
        probe: Of hidden states, if the state has its features.
        mode: ``full``: walks and stops by Q; ``exit_only``: walks by Q, then drafts a fixed
            number; ``draft_only``: a fixed exit, stops by Q.
        exit_layer: For ``draft_only``.
        num_draft: For ``exit_only``.
        active: For ``full`` and ``exit_only``: candidates to look at (default: all). The last one
            ends the walk.

    Raises:
        InputError: If the mode or its arguments do not fit.
        PolicyMismatchError: If the weights have other shapes.
    """

    autoregressive = False

    def __init__(
        self,
        weights: Mapping[str, np.ndarray],
        exits: Sequence[int],
        depth: int,
        max_draft: int,
        spec: StateSpec | None = None,
        *,
        probe: AcceptanceProbe | None = None,
        mode: str = "full",
        exit_layer: int | None = None,
        num_draft: int | None = None,
        active: Sequence[int] | None = None,
    ) -> None:
        self.weights = {k: np.ascontiguousarray(v, dtype=np.float32) for k, v in weights.items()}
        self.exits, self.depth, self.longest = tuple(exits), depth, max_draft
        self.spec = spec or StateSpec()
        self.probe = probe if self.spec.needs_probe else None
        if self.spec.needs_probe and (probe is None or probe.exits != len(self.exits)):
            raise PolicyMismatchError(
                f"the state has features of a probe of {len(self.exits)} exits; give probe="
            )
        self.needs_head = self.spec.needs_head
        expected = (len(self.spec.names), len(self.exits) * 4)
        try:
            shape = self.weights["w1"].shape[0], self.weights["w3"].shape[1]
        except (KeyError, IndexError) as error:
            raise PolicyMismatchError(f"the weights lack {error}") from error
        if shape != expected:
            raise PolicyMismatchError(
                f"the network takes {shape[0]} features and gives {shape[1]} values; "
                f"{expected[0]} features and {len(self.exits)} exits need {expected}"
            )
        if mode not in ("full", "exit_only", "draft_only"):
            raise InputError(f"mode={mode!r}; accepted: full, exit_only, draft_only")
        if mode == "draft_only" and exit_layer not in self.exits:
            raise InputError(f"draft_only needs exit_layer, one of {self.exits}, not {exit_layer}")
        if mode == "exit_only" and not num_draft:
            raise InputError("exit_only needs num_draft")
        self.mode, self.exit_layer, self.num_draft = mode, exit_layer, num_draft
        if self.exit_layer is None:
            del self.exit_layer  # `custom_generate` takes it for a fixed exit
        self.active = tuple(active or self.exits)
        if set(self.active) - set(self.exits):
            raise InputError(f"active={self.active} are not all among the exits {self.exits}")
        self.uses_features = mode != "exit_only"
        self._index = {layer: j for j, layer in enumerate(self.exits)}

    def __repr__(self) -> str:
        more = {
            "full": f", active={self.active}",
            "exit_only": f", num_draft={self.num_draft}, active={self.active}",
            "draft_only": f", exit_layer={getattr(self, 'exit_layer', None)}",
        }[self.mode]
        return f"QPolicy(mode={self.mode!r}{more})"

    def variant(self, mode: str, **changes: Any) -> "QPolicy":
        """The same network in another mode."""
        return QPolicy(
            self.weights,
            self.exits,
            self.depth,
            self.longest,
            self.spec,
            probe=self.probe,
            mode=mode,
            **changes,
        )

    def q_values(self, phase: int, seen: Observation) -> np.ndarray:
        """Q of both actions, [R, 2]."""
        value, advantage = self._value_advantage(phase, seen)
        both: np.ndarray = np.stack([value - advantage / 2, value + advantage / 2], 1)
        return both

    def _value_advantage(self, phase: int, seen: Observation) -> tuple[np.ndarray, np.ndarray]:
        x = self.spec.states(phase, seen, self.depth, self.longest)
        w = self.weights
        x = np.maximum(x @ w["w1"] + w["b1"], 0)
        x = np.maximum(x @ w["w2"] + w["b2"], 0)
        out = (x @ w["w3"] + w["b3"]).reshape(len(x), len(self.exits), 2, 2)
        candidate = [self._index[int(layer)] for layer in seen.layer]
        chosen = out[np.arange(len(x)), candidate, phase]
        return chosen[:, 0], chosen[:, 1]

    def reset(self, rows: int, exits: Sequence[int], depth: int, max_draft: int) -> None:
        """Begin `rows` sequences.

        Raises:
            PolicyMismatchError: If the decoder's exits, depth or longest draft are others.
        """
        given, own = (tuple(exits), depth, max_draft), (self.exits, self.depth, self.longest)
        if given != own:
            raise PolicyMismatchError(
                "the policy was trained for exits {}, {} layers and drafts up to {}; the decoder "
                "has {}, {}, {}".format(*own, *given)
            )

    def probes(self, layer: int) -> bool:
        """Candidates that the walk looks at."""
        return self.mode != "draft_only" and layer in self.active

    def choose_exit(self, observation: Observation) -> np.ndarray:
        """Q(exit) - Q(deeper); always exit at the last candidate looked at."""
        layer = observation.layer
        if self.mode == "draft_only":
            return np.where(layer == self.exit_layer, 1.0, -1.0)
        if not self.probes(int(layer[0])):
            return np.full(len(layer), -1.0)
        if int(layer[0]) == self.active[-1]:
            return np.ones(len(layer))
        return self._value_advantage(WALK, observation)[1]

    def max_drafts(self, rows: np.ndarray, layer: np.ndarray) -> np.ndarray:
        """`num_draft` in ``exit_only``, else the longest."""
        return np.full(len(rows), self.num_draft if self.mode == "exit_only" else self.longest)

    def keep_drafting(self, observation: Observation) -> np.ndarray:
        """Q(draft on) - Q(stop)."""
        return -self._value_advantage(DRAFT, observation)[1]

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``policy.safetensors`` and ``policy.json``."""
        target = Path(folder)
        with atomic_path(target / "policy.safetensors") as temporary:
            probe = {f"probe.{k}": v for k, v in self.probe.weights.items()} if self.probe else {}
            save_file({**self.weights, **probe}, temporary)
        write_json(
            target / "policy.json",
            {
                "exits": self.exits,
                "depth": self.depth,
                "max_draft": self.longest,
                "features": self.spec.names,
                "mode": self.mode,
                "exit_layer": getattr(self, "exit_layer", None),
                "num_draft": self.num_draft,
                "active": self.active,
            },
        )

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str]) -> "QPolicy":
        """Load from a folder, or from a hub id if there is no such folder.

        Raises:
            InputError: If the files are missing or damaged.
            PolicyMismatchError: If settings and weights do not fit each other.
        """
        folder = Path(source)
        if not folder.is_dir():
            folder = _download(os.fspath(source))
        try:
            settings = json.loads((folder / "policy.json").read_text(encoding="utf-8"))
            found = load_file(folder / "policy.safetensors")
            weights = {k: v for k, v in found.items() if not k.startswith("probe.")}
            own = {k.removeprefix("probe."): v for k, v in found.items() if k not in weights}
            spec = StateSpec(tuple(settings["features"]))
            return cls(
                weights,
                settings["exits"],
                settings["depth"],
                settings["max_draft"],
                spec,
                probe=AcceptanceProbe(own) if own else None,
                mode=settings["mode"],
                exit_layer=settings["exit_layer"],
                num_draft=settings["num_draft"],
                active=settings["active"],
            )
        except (OSError, KeyError, TypeError, SafetensorError, json.JSONDecodeError) as error:
            raise InputError(f"{folder} does not hold a whole policy ({error})") from error


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["policy.*"]))
    except Exception as error:
        raise InputError(f"{name} is neither a folder nor a reachable hub id ({error})") from error


class QNetwork(torch.nn.Module):
    """The network in training: F → 64 → 64 → (candidates, phases, V and A).

    Args:
        features: F.
        candidates: m.
        hidden: Width.
    """

    def __init__(self, features: int, candidates: int, hidden: int = 64) -> None:
        super().__init__()
        self.candidates = candidates
        self.trunk = torch.nn.Sequential(
            torch.nn.Linear(features, hidden),
            torch.nn.ReLU(),
            torch.nn.Linear(hidden, hidden),
            torch.nn.ReLU(),
            torch.nn.Linear(hidden, candidates * 4),
        )

    def forward(
        self, states: torch.Tensor, candidate: torch.Tensor, phase: torch.Tensor | int
    ) -> torch.Tensor:
        """Q of both actions [N, 2] for states [N, F] at their candidates and phases."""
        out = self.trunk(states).view(len(states), self.candidates * 2, 2)
        pair = out[torch.arange(len(states)), candidate * 2 + phase]
        value, advantage = pair.unbind(-1)
        return torch.stack([value - advantage / 2, value + advantage / 2], -1)

    def load(self, weights: Mapping[str, np.ndarray]) -> None:
        """Take a `QPolicy`'s weights."""
        with torch.no_grad():
            for name, layer in zip(
                "123", (self.trunk[0], self.trunk[2], self.trunk[4]), strict=True
            ):
                linear: Any = layer
                linear.weight.copy_(torch.from_numpy(weights[f"w{name}"].T))
                linear.bias.copy_(torch.from_numpy(weights[f"b{name}"]))

    def weights(self) -> dict[str, np.ndarray]:
        """Numpy weights for `QPolicy`."""
        out = {}
        for name, layer in zip("123", (self.trunk[0], self.trunk[2], self.trunk[4]), strict=True):
            linear: Any = layer
            out[f"w{name}"] = linear.weight.detach().numpy().T.copy()
            out[f"b{name}"] = linear.bias.detach().numpy().copy()
        return out

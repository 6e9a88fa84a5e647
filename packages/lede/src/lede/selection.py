"""Which policy to deploy: the fastest on validation experience, among learned ones and baselines.

Nothing is ever gained by a policy that a static pair beats. So every candidate (the learned policy
in its modes, the best static pair, the best threshold rule) is tuned on training experience and
replayed on validation experience, and the fastest is taken: a user never gets less than the best
of them, up to the noise of the validation prompts.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from lede.cost import CostModel
from lede.experience import ExperienceTable
from lede.policies import (
    AutoregressivePolicy,
    ConfidenceExitPolicy,
    DELPolicy,
    DraftVerifyPolicy,
    Policy,
)
from lede.qpolicy import QPolicy
from lede.simulation import best_confidence, best_static, simulate

__all__ = ["Choice", "choose_policy"]


@dataclass
class Choice:
    """The policy to deploy and what it was chosen from.

    Attributes:
        policy: The fastest on validation experience.
        name: Its kind: ``full``, ``draft_only``, ``exit_only``, ``static``, ``threshold``, …
        best: The best policy of every kind, by kind.
        tried: Every candidate: kind, description, speedup on validation.
    """

    policy: Policy
    name: str
    best: dict[str, Policy]
    tried: list[dict[str, Any]]


def choose_policy(
    learned: list[QPolicy],
    train: ExperienceTable,
    validation: ExperienceTable,
    cost: CostModel,
) -> Choice:
    """Tune every kind of policy on training experience and take the fastest on validation.

    Args:
        learned: Checkpoints of `train_policy`; none is allowed.
        train: Experience that static pairs and thresholds are tuned on.
        validation: Experience of other prompts, to choose on.
        cost: What rounds cost.
    """
    candidates: list[tuple[str, Policy]] = [("autoregressive", AutoregressivePolicy())]
    static, _ = best_static(train, cost)
    candidates.append(("static", static))
    candidates.append(("threshold", best_confidence(train, cost)[0]))
    candidates += [("draft_verify", DraftVerifyPolicy(e)) for e in train.exits]
    candidates += [("del", DELPolicy(th)) for th in (0.1, 0.3, 0.5)]
    candidates += [
        ("confidence_exit", ConfidenceExitPolicy(th, draft))
        for th, draft in itertools.product((0.5, 0.7, 0.9), (0.2, 0.4, 0.6))
    ]
    for network in learned:
        candidates += [("full", network.variant("full", active=a)) for a in _subsets(train.exits)]
        candidates += [
            ("draft_only", network.variant("draft_only", exit_layer=e)) for e in train.exits
        ]
        candidates += [
            ("exit_only", network.variant("exit_only", num_draft=d))
            for d in sorted({2, 4, static.num_draft, train.max_draft})
            if d <= train.max_draft
        ]
    tried = []
    best: dict[str, tuple[float, Policy]] = {}
    for kind, policy in candidates:
        speedup = simulate(validation, policy, cost, keep_log=False).speedup
        tried.append({"kind": kind, "policy": repr(policy), "validation": speedup})
        if kind not in best or speedup > best[kind][0]:
            best[kind] = (speedup, policy)
    kinds = list(best)
    name = kinds[int(np.argmax([best[k][0] for k in kinds]))]
    return Choice(best[name][1], name, {k: p for k, (_, p) in best.items()}, tried)


def _subsets(exits: tuple[int, ...]) -> list[tuple[int, ...]]:
    """All candidates, and every pair: each look costs a head."""
    pairs = list(itertools.combinations(exits, 2)) if len(exits) > 2 else []
    return [exits, *pairs]

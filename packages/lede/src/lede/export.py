"""Experience as transitions for libraries of offline reinforcement learning, such as d3rlpy."""

import numpy as np
import torch

from lede.cost import CostModel
from lede.experience import ExperienceTable
from lede.rollouts import Episodes
from lede.simulation import best_static
from lede.training import EpisodeArrays, TrainConfig

__all__ = ["to_d3rlpy"]


def to_d3rlpy(
    experience: ExperienceTable | Episodes,
    cost: CostModel,
    config: TrainConfig | None = None,
    *,
    rho: float | None = None,
) -> dict[str, np.ndarray]:
    """One round per start, with exit and length drawn at random, as arrays of transitions.

    The keys are the arguments of ``d3rlpy.dataset.MDPDataset``; d3rlpy itself is not needed. The
    rewards of an episode add up to its tokens minus ρ times its cost in plain tokens (section 2.3).
    Such libraries know neither the masks of the last exit and of the budget nor that both outcomes
    of a state are known; `train_policy` does.

    Args:
        experience: A table with continuations, or roll-outs.
        cost: What rounds cost.
        config: Whose features, stride and seed are used.
        rho: ρ; by default the speedup of the best static pair.

    Returns:
        ``observations`` float32 [N, F]; ``actions`` int64 [N]: 0 go deeper or draft on, 1 exit here
        or stop; ``rewards`` float32 [N]; ``terminals`` float32 [N].

    Raises:
        InputError: If the experience is teacher-only or too short.

    Examples:
        >>> from lede import SelfSpeculativeDecoder, collect
        >>> from lede.testing import tiny_model
        >>> decoder = SelfSpeculativeDecoder(tiny_model(layers=3), [1, 2], max_draft=3)
        >>> ids = torch.randint(1, 64, (2, 4), generator=torch.Generator().manual_seed(0))
        >>> table = collect(decoder, ids, max_new_tokens=8, pad_token_id=0)
        >>> found = to_d3rlpy(table, CostModel.memory_bound(3))
        >>> sorted(found), found["observations"].shape[1], int(found["terminals"].sum())
        (['actions', 'observations', 'rewards', 'terminals'], 13, 14)
    """
    config = config or TrainConfig()
    arrays = EpisodeArrays(experience, cost, config)
    if rho is None:
        table = experience if isinstance(experience, ExperienceTable) else None
        rho = best_static(table, cost)[1] if table is not None else arrays.best_fixed()
    count, m, steps = arrays.valid.shape
    generator = torch.Generator().manual_seed(config.seed)
    n = torch.arange(count)
    j = torch.randint(m, (count,), generator=generator)  # the exit
    limit = arrays.forced
    k = 1 + (torch.rand(count, generator=generator) * (limit + 1)).long()  # early passes
    # Slots of a round: the decisions at all candidates but the last, then those after each pass.
    candidate, index = torch.arange(m - 1), torch.arange(steps)
    walking = candidate <= j[:, None]
    deeper = candidate < j[:, None]
    sunk = arrays.sunk
    climb = sunk[1:, 0] - sunk[:-1, 0] + arrays.look
    walk_reward = torch.where(deeper, -rho * climb, 0.0)
    drafting = index < torch.minimum(k, limit)[:, None]
    goes_on = index + 1 < k[:, None]
    step = (sunk[:, 1:] - sunk[:, :-1])[j]
    end = arrays.tokens[n, j] - rho * arrays.late[j]  # of stopping after 1 .. D + 1 passes
    at_budget = index + 1 == limit[:, None]
    # The pass that uses up the budget is not looked at; the longest round's last one never is.
    unseen = rho * arrays.look * (at_budget & (index + 1 < steps))
    draft_reward = torch.where(
        goes_on, -rho * step + (end[:, 1:] + unseen) * at_budget, end[:, :steps]
    )
    reward = torch.cat([walk_reward, draft_reward], 1)
    reward[:, 0] -= rho * sunk[0, 0]  # paid before the first decision
    done = torch.cat([torch.zeros_like(walking), ~goes_on | at_budget], 1)
    action = torch.cat([~deeper, ~goes_on], 1)
    states = torch.cat([arrays.walk_states[:, : m - 1], arrays.draft_states[n, j]], 1)
    real = torch.cat([walking, drafting], 1)
    return {
        "observations": states[real].numpy(),
        "actions": action[real].long().numpy(),
        "rewards": reward[real].float().numpy(),
        "terminals": done[real].float().numpy(),
    }

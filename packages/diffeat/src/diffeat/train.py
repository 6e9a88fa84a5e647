"""Training of the correspondence head (Meng et al., appendix C.1)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffeat.evaluate import Pair, correspond, pair_features
from diffeat.extractor import FeatureExtractor
from diffeat.probe import ConvCorrespondence
from shared_core.errors import InputError

__all__ = ["train_correspondence"]

Told = Callable[[int, float, Callable[[], dict[str, Any]]], None]


def train_correspondence(
    fx: Any,
    pairs: Sequence[Pair],
    *,
    head: ConvCorrespondence | None = None,
    validation: Sequence[Pair] = (),
    epochs: int = 2,
    steps_per_epoch: int = 5000,
    lr: float = 5e-4,
    weight_decay: float = 0.01,
    validate_every: int = 500,
    prompt: Any = "",
    t: Any = 50,
    side: int = 128,
    alpha: float = 0.1,
    seed: int = 0,
    state: Mapping[str, Any] | None = None,
    after: Told = lambda step, loss, state: None,
    **options: Any,
) -> tuple[ConvCorrespondence, dict[str, Any]]:
    """Train one 3 x 3 convolution on pairs with keypoints, one pair a step, features frozen.

    The authors report the best of all validation rounds; here that is told beside the last, which
    is the honest figure. Everything random follows from the seed and the step, so a resumed
    training is the same one.

    Args:
        fx: The extractor (or several, `diffeat.aggregate.MultiModel`).
        pairs: To train on, from `diffeat.evaluate.read_pairs`.
        head: By default a new one with as many output channels as the features have, or half with
            several models.
        validation: Pairs to validate on.
        epochs: Rounds.
        steps_per_epoch: Random pairs a round, at most.
        lr: Of AdamW.
        weight_decay: Of AdamW.
        validate_every: Steps between validations; there is one after the last step as well.
        prompt: One prompt for all images.
        t: Timestep.
        side: Of the maps that layers are resized to and joined at.
        alpha: Threshold of PCK.
        seed: Of weights, order and noise.
        state: Continue from what `after` was given.
        after: Told every step's number, loss, and a function that gives the state so far.
        options: Of the extractor, such as ``ensemble``.

    Returns:
        The head; and ``rounds`` of validation with ``best`` and ``last`` of them.

    Raises:
        InputError: If there are no pairs.
    """
    if not pairs:
        raise InputError("there are no pairs to train on")
    if head is None:
        joined = _joined(fx, pairs[0], prompt, t, seed, side, options)
        channels = joined.shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            halved = not isinstance(fx, FeatureExtractor)
            head = ConvCorrespondence(channels, channels // 2 if halved else None)
        head.to(joined.device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=weight_decay)
    rounds: list[dict[str, Any]] = []
    first = 0
    if state is not None:
        head.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
        rounds, first = list(state["rounds"]), state["step"]
    per_epoch = min(steps_per_epoch, len(pairs))
    total = epochs * per_epoch
    for step in range(first, total):
        epoch, at = divmod(step, per_epoch)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        pair = pairs[int(torch.randperm(len(pairs), generator=generator)[at])]
        maps = _joined(fx, pair, prompt, t, seed + step, side, options)
        points = [p.to(maps.device) for p in pair.points_at(side)]
        loss = head.loss(maps[:1], maps[1:], *points)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        done = step + 1
        if validation and (done % validate_every == 0 or done == total):
            found = correspond(
                fx, validation, prompt=prompt, t=t, side=side, alpha=alpha, seed=seed, head=head,
                **options,
            )  # fmt: skip
            rounds.append({"step": done, **{k: found[k] for k in ("pck_image", "pck_box")}})
        now = (head.state_dict(), optimizer.state_dict(), list(rounds), done)
        after(
            done,
            float(loss.detach()),
            lambda now=now: dict(zip(("head", "optimizer", "rounds", "step"), now, strict=True)),
        )
    best = {k: max(r[k] for r in rounds) for k in ("pck_image", "pck_box")} if rounds else None
    return head, {"rounds": rounds, "best": best, "last": rounds[-1] if rounds else None}


def _joined(
    fx: Any, pair: Pair, prompt: Any, t: Any, seed: int, side: int, options: Mapping[str, Any]
) -> Tensor:
    with torch.no_grad():
        features = pair_features(fx, pair, prompt, t, seed, **options)
    joined: Tensor = features.concat(side).float()
    return joined

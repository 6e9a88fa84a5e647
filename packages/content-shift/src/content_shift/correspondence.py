"""Semantic correspondence from a feature bucket (paper C.1 with amalgamation, A.4)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from content_shift._training import fit, generator_of
from content_shift.amalgamation import (
    Amalgamation,
    AmalgamationOutput,
    GammaWalk,
    amalgamation_loss,
)
from content_shift.bucket import FeatureBucket
from diffeat.evaluate import Pair
from diffeat.probe import nn_correspondence, pck
from shared_core.errors import InputError

__all__ = ["CorrespondenceHead", "Match", "evaluate_matches", "from_pair", "train_correspondence"]


@dataclass(frozen=True)
class Match:
    """Two samples of a bucket with the same keypoints.

    Attributes:
        source, target: Names of the samples.
        source_points, target_points: (x, y) in pixels of each image, ``[N, 2]``.
        source_size, target_size: (width, height) of each image.
        box: The target object: left, top, right, bottom; by default the image.
    """

    source: str
    target: str
    source_points: Tensor
    target_points: Tensor
    source_size: tuple[int, int]
    target_size: tuple[int, int]
    box: tuple[float, float, float, float] | None = None


def from_pair(pair: Pair, root: Path) -> Match:
    """A pair of SPair-71k (`diffeat.evaluate.read_pairs`) by names relative to `root`.

    Raises:
        InputError: If an image cannot be read.
    """
    sizes = []
    for file in (pair.source, pair.target):
        try:
            with Image.open(file) as image:
                sizes.append(image.size)
        except OSError as error:
            raise InputError(f"{file} cannot be read as an image: {error}") from error
    names = [file.relative_to(root).as_posix() for file in (pair.source, pair.target)]
    return Match(
        names[0], names[1], pair.source_points, pair.target_points, sizes[0], sizes[1], pair.box
    )


class CorrespondenceHead(nn.Module):
    """Amalgamated features to match by: ``nn``, the assigners alone; ``conv``, a convolution more.

    The convolution (3 x 3, no bias, C + E to C + E) follows each assigner's sum and the attention
    feature; every assigner has its own.

    Args:
        channels: C of each feature.
        extra: E, channels of the attention feature.
        head: ``nn`` or ``conv``.
        n_assigners: n.
        granularity: See `Amalgamation`.
        temperature: Of the cosine similarities; fixed.

    Examples:
        >>> head = CorrespondenceHead(4, 2, "conv").eval()
        >>> head(torch.randn(2, 3, 4, 8, 8), torch.randn(2, 2, 8, 8))[0].shape
        torch.Size([2, 12, 8, 8])
    """

    def __init__(
        self,
        channels: int,
        extra: int = 0,
        head: Literal["nn", "conv"] = "nn",
        n_assigners: int = 2,
        granularity: Literal["scalar", "channel"] = "scalar",
        temperature: float = 0.07,
    ) -> None:
        super().__init__()
        if head not in ("nn", "conv"):
            raise InputError(f"head={head!r}; accepted: nn, conv")
        self.channels, self.extra, self.temperature = channels, extra, temperature
        self.mix = Amalgamation(channels, n_assigners, granularity)
        width = channels + extra
        self.convs = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=1, bias=False)
            for _ in range(n_assigners if head == "conv" else 0)
        )

    def forward(
        self, stack: Float[Tensor, "batch b channels h w"], extra: Tensor | None = None
    ) -> tuple[Float[Tensor, "batch D h w"], AmalgamationOutput]:
        """Features to match, and the weights behind them."""
        out = self.mix(stack, extra)
        if not self.convs:
            return out.features, out
        sums = out.features[:, : self.channels * len(self.convs)].split(self.channels, 1)
        tail = [] if extra is None else [extra]
        joined = [f(torch.cat([r, *tail], 1)) for f, r in zip(self.convs, sums, strict=True)]
        return torch.cat(joined, 1), out

    def loss(
        self,
        features: Float[Tensor, "2 D h w"],
        source_points: Int[Tensor, "N 2"],
        target_points: Int[Tensor, "N 2"],
    ) -> Float[Tensor, ""]:
        """Symmetric cross-entropy over all positions; only keypoints times positions are formed.

        Args:
            features: Of source and target image.
            source_points: (x, y) on the map.
            target_points: (x, y) on the map.
        """
        width = features.shape[-1]
        a, b = (F.normalize(x.flatten(1).float(), dim=0) for x in features)
        i, j = (p[:, 1] * width + p[:, 0] for p in (source_points, target_points))
        forth = a[:, i].T @ b / self.temperature
        back = b[:, j].T @ a / self.temperature
        return (F.cross_entropy(forth, j) + F.cross_entropy(back, i)) / 2


def _on_map(points: Tensor, size: tuple[int, int], side: int) -> Tensor:
    scaled = points * points.new_tensor([side / size[0], side / size[1]])
    return scaled.floor().long().clamp(0, side - 1)


@torch.no_grad()
def evaluate_matches(
    head: CorrespondenceHead,
    bucket: FeatureBucket,
    matches: Sequence[Match],
    *,
    side: int = 64,
    size: int = 512,
    alpha: float = 0.1,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """PCK of nearest neighbours of the head's features, keypoints of all pairs pooled.

    Args:
        head: The head.
        bucket: The features.
        matches: Pairs.
        side: Of the maps that layers are resized to.
        size: Of the image that keypoints are matched in.
        alpha: Threshold.
        device: Where the head is.

    Returns:
        ``pck_image`` and ``pck_box``, relative to the target image and to its object.
    """
    head.eval()
    hits: list[Tensor] = []
    for match in matches:
        stack, extra = bucket.load([match.source, match.target], side)
        maps, _ = head(stack.to(device), None if extra is None else extra.to(device))
        scales = [torch.tensor([size / w, size / h]) for w, h in
                  (match.source_size, match.target_size)]  # fmt: skip
        points = (match.source_points * scales[0]).clamp(0, size - 1).to(maps.device)
        found = nn_correspondence(maps[:1], maps[1:], points, size=size).cpu() / scales[1]
        left, top, right, bottom = match.box or (0.0, 0.0, *map(float, match.target_size))
        by = (float(max(match.target_size)), max(right - left, bottom - top))
        hits.append(torch.stack([pck(found, match.target_points, x, alpha) for x in by], 1))
    image, box = torch.cat(hits).double().mean(0).tolist()
    return {"pck_image": image, "pck_box": box}


def train_correspondence(
    bucket: FeatureBucket,
    train: Sequence[Match],
    validation: Sequence[Match],
    *,
    head: Literal["nn", "conv"] = "nn",
    n_assigners: int = 2,
    granularity: Literal["scalar", "channel"] = "scalar",
    gamma1: float | Literal["walk"] = 0.0,
    gamma2: float = 0.0,
    steps: int = 10_000,
    lr: float = 5e-4,
    weight_decay: float = 1e-2,
    validate_every: int = 500,
    side: int = 64,
    size: int = 512,
    alpha: float = 0.1,
    seed: int = 0,
    device: torch.device | str = "cpu",
    out: str | Path | None = None,
    resume: bool = False,
) -> tuple[CorrespondenceHead, dict[str, Any]]:
    """Train a head on random pairs, features frozen (2 x 5,000 pairs in the paper).

    The authors report the best of all validation rounds, on the set that they validate on. Here the
    last one stands beside it.

    Args:
        bucket: The features.
        train: Pairs to draw from, one a step.
        validation: Pairs to report on.
        head: See `CorrespondenceHead`.
        n_assigners: See `CorrespondenceHead`.
        granularity: See `Amalgamation`.
        gamma1: g1 of eq. 5, or ``walk``.
        gamma2: g2 of eq. 5.
        steps: Pairs in all.
        lr: Of AdamW.
        weight_decay: Of AdamW.
        validate_every: Steps between validations.
        side: See `evaluate_matches`.
        size: See `evaluate_matches`.
        alpha: See `evaluate_matches`.
        seed: Of weights and order.
        device: Where to train.
        out: Folder of the checkpoint.
        resume: Continue the run in `out`.

    Returns:
        The trained head, and ``last``, ``best`` (each with PCKs and step) and ``rounds``.

    Raises:
        InputError: If there are no pairs.
    """
    if not train or not validation:
        raise InputError(f"{len(train)} training and {len(validation)} validation pairs; give some")
    stack, extra = bucket.load([train[0].source], side)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CorrespondenceHead(
            stack.shape[2], 0 if extra is None else extra.shape[1], head, n_assigners, granularity
        ).to(device)
    walk = GammaWalk(seed=seed) if gamma1 == "walk" else None
    rounds: list[dict[str, Any]] = []
    settings: dict[str, Any] = {"side": side, "size": size, "alpha": alpha, "device": device}

    def loss_of(step: int) -> Tensor:
        generator = generator_of(seed, step)
        match = train[int(torch.randint(len(train), (), generator=generator))]
        maps, more = bucket.load([match.source, match.target], side)
        model.train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(1 << 30, (), generator=generator)))  # dropout
            features, found = model(maps.to(device), None if more is None else more.to(device))
        points = [
            _on_map(p, s, side).to(features.device)
            for p, s in ((match.source_points, match.source_size),
                         (match.target_points, match.target_size))
        ]  # fmt: skip
        task = model.loss(features, *points)
        g1: Any = gamma1 if walk is None else walk
        return amalgamation_loss(task, found, g1, gamma2)

    def told(step: int, loss: float) -> None:
        if (step + 1) % validate_every == 0 or step + 1 == steps:
            found = evaluate_matches(model, bucket, validation, **settings)
            rounds.append({"step": step + 1, **found})

    keep = _Keep(model, rounds, walk)
    trainable = dict(model.named_parameters())
    fit(
        trainable, [{"params": list(trainable.values()), "lr": lr}], loss_of, steps=steps,
        weight_decay=weight_decay, clip=None, out=out, resume=resume, save_every=validate_every,
        description="training assigners", told=told, extra=keep,
    )  # fmt: skip
    if not rounds:
        raise InputError(f"the run in {out} is finished, with other validation rounds")
    best = max(rounds, key=lambda r: float(r["pck_image"]))
    return model.eval(), {"last": rounds[-1], "best": best, "rounds": rounds}


class _Keep:
    """What a checkpoint holds beside parameters: running statistics, rounds, the walk."""

    def __init__(
        self, model: nn.Module, rounds: list[dict[str, Any]], walk: GammaWalk | None
    ) -> None:
        self.model, self.rounds, self.walk = model, rounds, walk

    def state_dict(self) -> dict[str, Any]:
        return {
            "buffers": dict(self.model.named_buffers()),
            "rounds": self.rounds,
            "walk": None if self.walk is None else self.walk.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, buffer in self.model.named_buffers():
            buffer.copy_(state["buffers"][name])
        self.rounds[:] = state["rounds"]
        if self.walk is not None:
            self.walk.load_state_dict(state["walk"])

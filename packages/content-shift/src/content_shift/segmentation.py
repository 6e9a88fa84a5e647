"""Label-scarce segmentation from a feature bucket (paper C.1 with amalgamation, A.4)."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from content_shift.amalgamation import Amalgamation, AmalgamationOutput, amalgamation_loss
from content_shift.bucket import FeatureBucket
from diffeat.evaluate import ignore_rare
from diffeat.probe import PixelMLPEnsemble, confusion_matrix, iou_of
from shared_core.errors import InputError
from shared_core.run import progress

__all__ = ["AmalgamatedPixels", "train_segmentation"]

IGNORE = 255


class AmalgamatedPixels(nn.Module):
    """An assigner for vectors and a small network on what it joins, trained together.

    The network is that of DDPM-seg: C -> 128 -> 32 -> K (256 and 128 from 30 classes on).

    Args:
        channels: C of each feature.
        classes: K.
        extra: E, channels of the attention feature.
        n_assigners: n.
        granularity: See `Amalgamation`.

    Examples:
        >>> model = AmalgamatedPixels(4, 3).eval()
        >>> model(torch.randn(5, 2, 4))[0].shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        extra: int = 0,
        n_assigners: int = 2,
        granularity: Literal["scalar", "channel"] = "scalar",
    ) -> None:
        super().__init__()
        self.mix = Amalgamation(channels, n_assigners, granularity, kind="pixel")
        width = n_assigners * channels + extra
        [self.network] = PixelMLPEnsemble(width, classes, n=1).members

    def forward(
        self, stack: Float[Tensor, "N b C"], extra: Tensor | None = None
    ) -> tuple[Float[Tensor, "N K"], AmalgamationOutput]:
        """Scores of the classes, and the weights behind them."""
        out = self.mix(stack, extra)
        return self.network(out.features), out


def _pixels(
    bucket: FeatureBucket, names: Sequence[str], labels: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor | None, Tensor]:
    """All labelled pixels of some samples: ``[N, b, C]``, ``[N, E]``, ``[N]``."""
    stacks, extras, truths = [], [], []
    for name in names:
        if name not in labels:
            raise InputError(f"there is no label map of {name!r}")
        truth = ignore_rare(labels[name][None].long())[0]
        stack, extra = bucket.load([name], (truth.shape[0], truth.shape[1]))
        kept = (truth != IGNORE).flatten()
        stacks.append(stack[0].flatten(2).permute(2, 0, 1)[kept])
        if extra is not None:
            extras.append(extra[0].flatten(1).T[kept])
        truths.append(truth.flatten()[kept])
    return torch.cat(stacks), torch.cat(extras) if extras else None, torch.cat(truths)


def train_segmentation(
    bucket: FeatureBucket,
    labels: Mapping[str, Int[Tensor, "H W"]],
    train: Sequence[str],
    test: Sequence[str],
    *,
    classes: int,
    networks: int = 10,
    n_assigners: int = 2,
    granularity: Literal["scalar", "channel"] = "scalar",
    gamma1: float = 0.0,
    gamma2: float = 0.0,
    epochs: int = 100,
    batch_size: int = 64,
    lr: float = 1e-3,
    patience: int = 50,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Train networks that vote on every pixel (DDPM-seg's protocol), each with its own assigners.

    Args:
        bucket: The features.
        labels: Label maps by sample; 255 and classes of fewer than 20 pixels are ignored.
        train: Samples to fit on.
        test: Samples to report on.
        classes: K.
        networks: How many vote.
        n_assigners: See `Amalgamation`.
        granularity: See `Amalgamation`.
        gamma1: g1 of eq. 5.
        gamma2: g2 of eq. 5.
        epochs: At most.
        batch_size: Pixels a step.
        lr: Of Adam.
        patience: Batches without a new best, from epoch 4 on, that end the training.
        seed: Of weights and order.
        device: Where to train.

    Returns:
        ``miou``, ``iou`` by class (``None`` where a class occurs nowhere), and ``weights``, the
        mean weight of each feature, by network and assigner.

    Raises:
        InputError: If samples have no labels, or there are none.
    """
    if not train or not test:
        raise InputError(f"{len(train)} training and {len(test)} test samples; give some of both")
    stack, extra, truth = _pixels(bucket, train, labels)
    if bool((truth >= classes).any()):
        raise InputError(f"label {int(truth.max())} with {classes} classes")
    wide = 0 if extra is None else extra.shape[1]
    members = []
    with progress(total=networks, description="training networks", unit="network") as bar:
        for number in range(networks):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed + number)
                model = AmalgamatedPixels(
                    stack.shape[2], classes, wide, n_assigners, granularity
                ).to(device)
                _fit(
                    model, stack, extra, truth, epochs, batch_size, lr, patience, gamma1, gamma2,
                    device,
                )  # fmt: skip
            members.append(model.eval())
            bar.update()
    table = torch.zeros(classes, classes, dtype=torch.float64)
    sums: list[Tensor] = []
    for name in test:
        pixels, more, here = _pixels(bucket, [name], labels)
        with torch.no_grad():
            found = [
                m(pixels.to(device), None if more is None else more.to(device)) for m in members
            ]
        votes = torch.stack([F.one_hot(scores.argmax(1), classes) for scores, _ in found]).sum(0)
        table += confusion_matrix(
            votes.argmax(1).cpu(), here, classes, ignore_index=IGNORE
        ).double()
        flat = [out.weights if out.weights.ndim == 3 else out.weights.mean(-1) for _, out in found]
        sums.append(torch.stack([w.mean(0) for w in flat]).cpu())
    hit, union = table.diagonal(), table.sum(0) + table.sum(1) - table.diagonal()
    return {
        "miou": float(iou_of(table)),
        "iou": [float(h / u) if u else None for h, u in zip(hit, union, strict=True)],
        "weights": torch.stack(sums).mean(0).tolist(),
    }


def _fit(
    model: AmalgamatedPixels, stack: Tensor, extra: Tensor | None, truth: Tensor, epochs: int,
    batch_size: int, lr: float, patience: int, gamma1: float, gamma2: float, device: Any,
) -> None:  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    best, waited = float("inf"), 0
    for epoch in range(epochs):
        for rows in torch.split(torch.randperm(len(truth)), batch_size):
            if len(rows) < 2:  # batch normalisation wants two
                continue
            scores, out = model(
                stack[rows].to(device), None if extra is None else extra[rows].to(device)
            )
            task = F.cross_entropy(scores, truth[rows].to(device))
            optimizer.zero_grad()
            amalgamation_loss(task, out, gamma1, gamma2).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            value = float(task.detach())
            best, waited = (value, 0) if value < best else (best, waited + 1)
            if epoch >= 4 and waited > patience:
                return

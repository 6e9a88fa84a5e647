"""A head for dense prediction on frozen features, its losses, and its training.

The paper segments ADE20K and Cityscapes with a refinement block for each layer and each
resolution under UPerNet (Meng et al., appendix C.2). Here the refined resolutions are summed at the
size of the largest instead, without a pyramid of pools; the losses and the schedule are the
paper's. Unlike the authors' blocks, whose weights all begin at zero and so never receive a
gradient, every parameter of these trains from the first step on.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from diffeat._labelled import LabelledImages
from shared_core.errors import InputError

__all__ = ["RefineBlock", "SegmentationHead", "lovasz_softmax", "train_segmentation"]

IGNORE = 255


class RefineBlock(nn.Module):
    """A residual bottleneck (1 x 1, 3 x 3, 1 x 1, batch normalisation).

    Args:
        channels: Of input and output.
        inner: Of the bottleneck.

    Examples:
        >>> RefineBlock(8)(torch.randn(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(self, channels: int, inner: int | None = None) -> None:
        super().__init__()
        inner = inner or max(8, channels // 4)
        self.branch = nn.Sequential(
            nn.Conv2d(channels, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, inner, 3, padding=1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        """The input, refined."""
        refined: Tensor = x + self.branch(x)
        return refined


class SegmentationHead(nn.Module):
    """Refine each layer and each resolution, sum resolutions at the size of the largest, classify.

    Args:
        layers: Channels and reduction of each layer by name, as `FeatureExtractor.feature_info`
            tells them; layers of one reduction form a resolution.
        classes: Number of classes.
        channels: Inside the head; 512 in the paper.
        dropout: Before the classifier.

    Examples:
        >>> head = SegmentationHead({"a": (6, 8), "b": (4, 8), "c": (3, 4)}, 5, channels=16)
        >>> maps = {"a": torch.randn(2, 6, 4, 4), "b": torch.randn(2, 4, 4, 4)}
        >>> head({**maps, "c": torch.randn(2, 3, 8, 8)}).shape
        torch.Size([2, 5, 8, 8])
    """

    def __init__(
        self,
        layers: Mapping[str, tuple[int, int]],
        classes: int,
        *,
        channels: int = 512,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if not layers or classes < 2:
            raise InputError(f"{len(layers)} layers, {classes} classes; accepted: 1, 2 and more")
        self.classes = classes
        sizes = sorted({reduction for _, reduction in layers.values()}, reverse=True)
        self.levels = [[n for n, (_, r) in layers.items() if r == size] for size in sizes]
        self.refine_layers = nn.ModuleList(
            nn.ModuleList(RefineBlock(layers[n][0]) for n in level) for level in self.levels
        )
        self.reduce = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(sum(layers[n][0] for n in level), channels, 1, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
            )
            for level in self.levels
        )
        self.refine_levels = nn.ModuleList(RefineBlock(channels) for _ in self.levels)
        self.fuse = self._convolution(channels)
        self.classify = nn.Sequential(nn.Dropout2d(dropout), nn.Conv2d(channels, classes, 1))
        self.auxiliary = nn.Sequential(
            self._convolution(channels), nn.Dropout2d(dropout), nn.Conv2d(channels, classes, 1)
        )

    @staticmethod
    def _convolution(channels: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        )

    @classmethod
    def of(cls, fx: Any, classes: int, **options: Any) -> "SegmentationHead":
        """The head for the layers of an extractor.

        Raises:
            InputError: If a layer's channels are not known beforehand (attention maps).
        """
        rows = fx.feature_info
        unknown = [row["name"] for row in rows if not row["channels"] or not row["reduction"]]
        if unknown:
            raise InputError(f"channels of {', '.join(unknown)} are not known before a forward")
        layers = {row["name"]: (row["channels"], row["reduction"]) for row in rows}
        return cls(layers, classes, **options)

    def _refined(self, features: Mapping[str, Tensor]) -> list[Tensor]:
        missing = [n for level in self.levels for n in level if n not in features]
        if missing:
            raise InputError(f"features lack {', '.join(missing)}")
        found = []
        for names, blocks, reduce, refine in zip(
            self.levels, self.refine_layers, self.reduce, self.refine_levels, strict=True
        ):
            assert isinstance(blocks, nn.ModuleList)
            maps = [block(features[n].float()) for n, block in zip(names, blocks, strict=True)]
            found.append(refine(reduce(torch.cat(maps, 1))))
        return found

    def forward(self, features: Mapping[str, Tensor]) -> Float[Tensor, "B K h w"]:
        """Scores of the classes, at the size of the largest layer.

        Raises:
            InputError: If a layer is missing.
        """
        return self._scores(self._refined(features))

    def _scores(self, levels: Sequence[Tensor]) -> Tensor:
        size = levels[-1].shape[-2:]
        total = sum(
            F.interpolate(level, size, mode="bilinear", align_corners=False) for level in levels
        )
        scores: Tensor = self.classify(self.fuse(total))
        return scores

    def loss(
        self, features: Mapping[str, Tensor], labels: Int[Tensor, "B H W"]
    ) -> Float[Tensor, ""]:
        """Cross-entropy + Lovász of the scores, and .4 times that of an auxiliary head.

        Scores are enlarged to the labels; label 255 counts for nothing.
        """
        levels = self._refined(features)
        beside = self.auxiliary(levels[min(1, len(levels) - 1)])
        total = torch.zeros((), device=labels.device)
        for scores, weight in ((self._scores(levels), 1.0), (beside, 0.4)):
            big = F.interpolate(scores, labels.shape[-2:], mode="bilinear", align_corners=False)
            entropy = F.cross_entropy(big, labels, ignore_index=IGNORE)
            total = total + weight * (entropy + lovasz_softmax(big.softmax(1), labels))
        return total


def lovasz_softmax(
    probabilities: Float[Tensor, "B K H W"], labels: Int[Tensor, "B H W"]
) -> Float[Tensor, ""]:
    """The Lovász extension of the Jaccard loss, mean over the classes that are there.

    Berman, Rannen Triki & Blaschko, CVPR 2018, equations 8 and 9.

    Args:
        probabilities: Of the classes.
        labels: Class of each pixel; 255 counts for nothing.

    Examples:
        >>> y = torch.tensor([[[0, 1]]])
        >>> float(lovasz_softmax(torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]]), y))
        0.0
    """
    kept = labels.flatten() != IGNORE
    p = probabilities.permute(0, 2, 3, 1).flatten(0, 2)[kept]
    y = labels.flatten()[kept]
    if len(y) == 0:
        return probabilities.sum() * 0
    truth = F.one_hot(y, probabilities.shape[1]).to(p.dtype)
    errors, order = (truth - p).abs().sort(0, descending=True)
    sorted_truth = truth.gather(0, order)
    total = sorted_truth.sum(0)
    intersection = total - sorted_truth.cumsum(0)
    union = total + (1 - sorted_truth).cumsum(0)
    jaccard = 1 - intersection / union
    slope = torch.cat([jaccard[:1], jaccard[1:] - jaccard[:-1]])
    there = total > 0
    return (errors * slope).sum(0)[there].mean()


def train_segmentation(
    fx: Any,
    head: SegmentationHead,
    train: LabelledImages,
    *,
    steps: int = 80_000,
    batch_size: int = 2,
    lr: float = 1.6e-4,
    weight_decay: float = 1e-3,
    power: float = 0.9,
    min_lr: float = 1e-4,
    prompt: Any = "",
    t: Any = 50,
    flip: bool = True,
    seed: int = 0,
    state: Mapping[str, Any] | None = None,
    after: Callable[[int, float, Callable[[], dict[str, Any]]], None] = lambda i, loss, state: None,
) -> SegmentationHead:
    """Train a head on frozen features: AdamW, polynomial decay, flips, new noise in every step.

    Everything random follows from the seed and the step, so a resumed training is the same one.

    Args:
        fx: The extractor (or several, `diffeat.aggregate.MultiModel`); it stays as it is.
        head: The head, trained in place.
        train: Images and label maps ``[N, H, W]``.
        steps: Of the optimizer; 80,000 in the paper, with 2 images per GPU.
        batch_size: Images per step.
        lr: At the beginning.
        weight_decay: Of AdamW.
        power: Of the decay.
        min_lr: At the end.
        prompt: One prompt for all images.
        t: Timestep.
        flip: Mirror half of the images.
        seed: Of order, flips and noise.
        state: Continue from what `after` was given.
        after: Told every step's number, loss, and a function that gives the state so far.

    Raises:
        InputError: If images and labels do not fit.
    """
    images, labels = train
    if len(images) != len(labels) or not len(images):
        raise InputError(f"{len(images)} images and {len(labels)} label maps; give as many")
    device = next(head.parameters()).device
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=weight_decay)
    first = 0
    if state is not None:
        head.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    head.train()
    for step in range(first, steps):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        torch.manual_seed(seed * 1_000_003 + step)  # dropout
        rows = torch.randperm(len(images), generator=generator)[:batch_size]
        x, y = images[rows], labels[rows].long()
        if flip:
            mirrored = torch.rand(len(rows), generator=generator) < 0.5
            x, y = x.clone(), y.clone()
            x[mirrored], y[mirrored] = x[mirrored].flip(-1), y[mirrored].flip(-1)
        for group in optimizer.param_groups:
            group["lr"] = (lr - min_lr) * (1 - step / steps) ** power + min_lr
        ids = [f"step{step}/{i}" for i in range(len(rows))]
        features = fx(x, prompt, t, ids=ids, seed=seed)
        loss = head.loss({n: v.to(device) for n, v in features.items()}, y.to(device))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        done = step + 1
        after(
            done,
            float(loss.detach()),
            lambda done=done: {
                "head": head.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": done,
            },
        )
    return head.eval()

"""Probes: what can be read out of features with little training.

`LinearProbe` is a closed-form ridge classifier of positions, from sums alone; `PixelMLPEnsemble`
the label-scarce protocol of DDPM-seg; `ConvCorrespondence` and `nn_correspondence` the semantic
correspondence protocol of Meng et al. (appendix C.1).
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from diffeat._matching import match
from shared_core.errors import InputError
from shared_core.metrics import confusion_matrix, mean_iou

__all__ = [
    "ConvCorrespondence",
    "LinearProbe",
    "PixelMLPEnsemble",
    "cell_counts",
    "confusion_matrix",
    "mean_iou",
    "nn_correspondence",
    "pck",
]

IGNORE = 255


def cell_counts(
    labels: Int[Tensor, "batch H W"], classes: int, size: tuple[int, int]
) -> Float[Tensor, "batch classes h w"]:
    """Pixels of each class under each cell of a coarser map; label 255 counts for nothing.

    Raises:
        InputError: If a label is neither below `classes` nor 255.

    Examples:
        >>> cell_counts(torch.tensor([[[0, 1], [1, 1]]]), 2, (1, 1)).flatten().tolist()
        [1.0, 3.0]
    """
    labels = labels.long()
    wrong = (labels != IGNORE) & ((labels < 0) | (labels >= classes))
    if wrong.any():
        raise InputError(
            f"label {int(labels[wrong][0])} with {classes} classes; accepted: 0 to {classes - 1}, "
            f"and {IGNORE} for ignored pixels"
        )
    hot = torch.stack([labels == c for c in range(classes)], 1).double()
    pixels = labels.shape[-2] * labels.shape[-1] / (size[0] * size[1])
    return F.adaptive_avg_pool2d(hot, size) * pixels


class LinearProbe:
    """Ridge classification of positions: one-hot targets, features standardised by channel.

    Only sums are kept (X'X, X'Y), in float64: C² + CK numbers however many images are seen. The
    solution is that of ridge on features enlarged to the labels' size by nearest neighbour.

    Args:
        classes: Number of classes K.
        penalty: λ, per pixel, on standardised features; the intercept is free.
        components: Project to this many principal components first, to compare activations of
            different width on equal terms.

    Examples:
        >>> probe = LinearProbe(2)
        >>> x = torch.tensor([[[[-1.0, 1.0]]]]); y = torch.tensor([[[0, 1]]])
        >>> probe.update(x, y); probe.predict(x).tolist()
        [[[0, 1]]]
    """

    def __init__(
        self, classes: int, *, penalty: float = 1e-3, components: int | None = None
    ) -> None:
        if classes < 2 or penalty <= 0 or (components is not None and components < 1):
            raise InputError(
                f"classes={classes}, penalty={penalty}, components={components}; accepted: at "
                "least 2, above 0, at least 1 or None"
            )
        self.classes, self.penalty, self.components = classes, penalty, components
        self.gram: Tensor | None = None
        self.moment: Tensor | None = None
        self._solved: tuple[Tensor, Tensor] | None = None

    def update(self, features: Float[Tensor, "B C h w"], labels: Int[Tensor, "B H W"]) -> None:
        """Add the sums of a batch.

        Raises:
            InputError: If features are not finite or labels out of range.
        """
        if not features.isfinite().all():
            raise InputError("features hold NaN or infinite values; extract in bfloat16 or float32")
        counts = cell_counts(labels, self.classes, (features.shape[-2], features.shape[-1]))
        x = features.double().permute(0, 2, 3, 1).flatten(0, 2)
        x = torch.cat([x, x.new_ones(len(x), 1)], 1)
        y = counts.to(x.device).permute(0, 2, 3, 1).flatten(0, 2)
        gram, moment = x.T @ (x * y.sum(1, keepdim=True)), x.T @ y
        self.gram = gram if self.gram is None else self.gram + gram
        self.moment = moment if self.moment is None else self.moment + moment
        self._solved = None

    def merge(self, other: "LinearProbe") -> None:
        """Add the sums of another probe, such as another process's."""
        if other.gram is None or other.moment is None:
            return
        self.gram = other.gram if self.gram is None else self.gram + other.gram
        self.moment = other.moment if self.moment is None else self.moment + other.moment
        self._solved = None

    def solve(self) -> tuple[Float[Tensor, "C K"], Float[Tensor, " K"]]:
        """Weights and intercept.

        Raises:
            InputError: If nothing was added yet.
        """
        if self._solved is not None:
            return self._solved
        if self.gram is None or self.moment is None:
            raise InputError("the probe has seen no labelled pixels; call update first")
        n = self.gram[-1, -1]
        mean, prior = self.gram[-1, :-1] / n, self.moment[-1] / n
        covariance = self.gram[:-1, :-1] / n - mean[:, None] * mean
        cross = self.moment[:-1] / n - mean[:, None] * prior
        std = covariance.diagonal().clamp_min(0).sqrt()
        scale = torch.where(std > 1e-8 * std.max(), 1 / std.clamp_min(1e-300), 0.0)
        correlation = covariance * scale[:, None] * scale
        right = cross * scale[:, None]
        if self.components is None:
            eye = torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
            weights = torch.linalg.solve(correlation + self.penalty * eye, right)
        else:
            values, vectors = torch.linalg.eigh(correlation)
            values, vectors = values[-self.components :], vectors[:, -self.components :]
            weights = vectors @ ((vectors.T @ right) / (values + self.penalty)[:, None])
        weights = weights * scale[:, None]
        self._solved = weights, prior - mean @ weights
        return self._solved

    def predict(self, features: Float[Tensor, "B C h w"]) -> Int[Tensor, "B h w"]:
        """The class of every position."""
        weights, intercept = self.solve()
        scores = torch.einsum("bchw,ck->bkhw", features.double(), weights)
        return (scores + intercept[:, None, None]).argmax(1)

    def confusion(
        self, features: Float[Tensor, "B C h w"], labels: Int[Tensor, "B H W"]
    ) -> Float[Tensor, "B K K"]:
        """Pixels of each true class (rows) predicted as each class, image by image."""
        predicted = self.predict(features)
        counts = cell_counts(labels, self.classes, (predicted.shape[-2], predicted.shape[-1]))
        hot = F.one_hot(predicted, self.classes).double()
        return torch.einsum("bkhw,bhwj->bkj", counts.to(hot.device), hot)


class PixelMLPEnsemble(nn.Module):
    """Ten independent small networks that vote on every pixel (DDPM-seg's label-scarce protocol).

    C -> 128 -> 32 -> K with ReLU then batch normalisation; C -> 256 -> 128 -> K from 30 classes on;
    weights from N(0, 0.02).

    Args:
        channels: C.
        classes: K.
        n: Number of networks.

    Examples:
        >>> torch.manual_seed(0); probe = PixelMLPEnsemble(2, 2, n=2)
        <torch._C.Generator object at ...>
        >>> x = torch.randn(256, 2); _ = probe.fit(x, (x[:, 0] > 0).long(), epochs=5)
        >>> probe(x)[0].shape
        torch.Size([256])
    """

    def __init__(self, channels: int, classes: int, n: int = 10) -> None:
        super().__init__()
        first, second = (256, 128) if classes >= 30 else (128, 32)
        self.classes = classes
        self.members = nn.ModuleList(
            nn.Sequential(
                nn.Linear(channels, first),
                nn.ReLU(),
                nn.BatchNorm1d(first),
                nn.Linear(first, second),
                nn.ReLU(),
                nn.BatchNorm1d(second),
                nn.Linear(second, classes),
            )
            for _ in range(n)
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.02)

    def fit(
        self,
        pixels: Float[Tensor, "N C"],
        labels: Int[Tensor, " N"],
        *,
        epochs: int = 100,
        batch_size: int = 64,
        lr: float = 1e-3,
        patience: int = 50,
        seed: int = 0,
    ) -> "PixelMLPEnsemble":
        """Train every network with Adam; stop after `patience` batches without a new best.

        The patience counts from epoch 4 on, as published.

        Raises:
            InputError: If there are fewer than two labelled pixels.
        """
        kept = labels != IGNORE
        pixels, labels = pixels[kept], labels[kept]
        if len(pixels) < 2:
            raise InputError(f"{len(pixels)} labelled pixels; at least 2 are needed")
        generator = torch.Generator().manual_seed(seed)
        for member in self.members:
            member.train()
            optimizer = torch.optim.Adam(member.parameters(), lr=lr)
            best, waited = float("inf"), 0
            for epoch in range(epochs):
                order = torch.randperm(len(pixels), generator=generator).to(pixels.device)
                for rows in torch.split(order, batch_size):
                    if len(rows) < 2:  # batch normalisation wants two
                        continue
                    loss = F.cross_entropy(member(pixels[rows]), labels[rows])
                    optimizer.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    value = float(loss.detach())
                    best, waited = (value, 0) if value < best else (best, waited + 1)
                    if epoch >= 4 and waited > patience:
                        break
                if epoch >= 4 and waited > patience:
                    break
            member.eval()
        return self

    @torch.no_grad()
    def forward(
        self, pixels: Float[Tensor, "N C"]
    ) -> tuple[Int[Tensor, " N"], Float[Tensor, " N"]]:
        """The vote of each pixel, and the Jensen-Shannon divergence of the members."""
        p = torch.stack([m.eval()(pixels).softmax(-1) for m in self.members])
        votes = F.one_hot(p.argmax(-1), self.classes).sum(0).argmax(-1)
        mean = p.mean(0)
        entropy = -(mean * mean.clamp_min(1e-12).log()).sum(-1)
        return votes, entropy + (p * p.clamp_min(1e-12).log()).sum(-1).mean(0)


class ConvCorrespondence(nn.Module):
    """One 3 x 3 convolution over features, trained to match keypoints of image pairs.

    Args:
        channels: C of the features.
        out_channels: By default C; the paper halves it with several models.
        temperature: Of the cosine similarities; fixed.

    Examples:
        >>> head = ConvCorrespondence(4)
        >>> a = torch.randn(1, 4, 8, 8); points = torch.tensor([[1, 2], [5, 5]])
        >>> head.loss(a, a, points, points).ndim
        0
    """

    def __init__(
        self, channels: int, out_channels: int | None = None, *, temperature: float = 0.07
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels or channels, 3, padding=1, bias=False)
        self.temperature = temperature

    def forward(self, features: Float[Tensor, "B C h w"]) -> Float[Tensor, "B D h w"]:
        """Features to match."""
        out: Tensor = self.conv(features)
        return out

    def loss(
        self,
        source: Float[Tensor, "1 C h w"],
        target: Float[Tensor, "1 C h w"],
        source_points: Int[Tensor, "N 2"],
        target_points: Int[Tensor, "N 2"],
    ) -> Float[Tensor, ""]:
        """Symmetric cross-entropy over all positions; points are (x, y) on the map."""
        width = source.shape[-1]
        a, b = (F.normalize(self(x)[0].flatten(1), dim=0) for x in (source, target))
        i, j = (p[:, 1] * width + p[:, 0] for p in (source_points.long(), target_points.long()))
        forth = a[:, i].T @ b / self.temperature
        back = b[:, j].T @ a / self.temperature
        return (F.cross_entropy(forth, j) + F.cross_entropy(back, i)) / 2


def nn_correspondence(
    source: Float[Tensor, "1 C h w"],
    target: Float[Tensor, "1 C h w"],
    points: Float[Tensor, "N 2"],
    *,
    size: int = 512,
) -> Float[Tensor, "N 2"]:
    """For points of the source image, the most similar positions of the target image.

    The result is that of enlarging both maps to `size` (bilinear) and taking the pixel of the
    highest cosine similarity, but no enlarged features are made.

    Args:
        source: Features of the source image.
        target: Features of the target image.
        points: (x, y) in an image of `size` x `size`.
        size: Side of both images.

    Raises:
        InputError: If a point lies outside.

    Examples:
        >>> a = torch.randn(1, 16, 8, 8)
        >>> nn_correspondence(a, a, torch.tensor([[2.0, 5.0]]), size=8)
        tensor([[2., 5.]])
    """
    where = points.round().long()
    if (where < 0).any() or (where >= size).any():
        raise InputError(f"points range outside the image of {size}x{size}")
    return match([(source[0], target[0])], where, size).to(points.dtype)


def pck(
    predicted: Float[Tensor, "N 2"],
    true: Float[Tensor, "N 2"],
    reference: Float[Tensor, "N"] | float,
    alpha: float = 0.1,
) -> Bool[Tensor, "N"]:
    """Which keypoints are correct: within alpha times a reference length of the truth.

    The paper averages over the keypoints of all pairs pooled.

    Args:
        predicted: (x, y), in pixels of the original target image.
        true: The same.
        reference: max(width, height) of the target image, or of the object's box.
        alpha: Threshold.

    Examples:
        >>> pck(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2), 50.0).tolist()
        [True]
    """
    distance = (predicted - true).norm(dim=1)
    correct: Tensor = distance <= alpha * torch.as_tensor(reference, device=distance.device)
    return correct


def iou_of(confusion: Float[Tensor, "*n K K"]) -> Float[Tensor, "*n"]:
    """Mean IoU of confusion matrices, over the classes that occur in each."""
    hit = confusion.diagonal(dim1=-2, dim2=-1)
    union = confusion.sum(-1) + confusion.sum(-2) - hit
    there = union > 0
    return torch.where(there, hit / union.clamp_min(1e-12), 0.0).sum(-1) / there.sum(-1)

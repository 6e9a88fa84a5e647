"""Which outlier-exposure (OE) set to train with: the spectral "dilation distance" to the ID set.

    d = ‖Σ_in^k - Σ_out^k‖_F

with Σ^k the diagonal matrix of the k largest singular values of a matrix of features (rows are
samples, not centred) from a pretrained backbone before any fine-tuning.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from shared_core.errors import InputError
from shared_core.run import progress

__all__ = ["OERank", "OESelector", "dilation_distance", "singular_values", "spectrum"]

Variant = Literal["paper", "official", "full"]


def singular_values(features: Float[Tensor, "n F"]) -> Float[Tensor, " r"]:
    """The ``r = min(n, F)`` singular values in float64, largest first, by the smaller Gram matrix.

    Much faster than a decomposition of the matrix itself; values below 1e-8 of the largest lose
    their digits, which no distance of spectra notices.

    Examples:
        >>> singular_values(torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]]))
        tensor([4., 3.], dtype=torch.float64)
    """
    f = features.double()
    gram = f @ f.T if len(f) <= f.shape[1] else f.T @ f
    values: Tensor = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0)
    return values


def spectrum(
    features: Float[Tensor, "n F"],
    batch_size: int | None = 64,
    generator: torch.Generator | None = None,
) -> Float[Tensor, " r"]:
    """The spectrum of a feature set: singular values averaged over batches, or of all at once.

    Args:
        features: One row per sample.
        batch_size: Rows per batch (a last, smaller batch is left out), since singular values grow
            with the number of rows. ``None`` takes all rows at once and divides by the square root
            of their number.
        generator: Shuffles the rows first.

    Examples:
        >>> spectrum(torch.eye(4), batch_size=2)
        tensor([1., 1.], dtype=torch.float64)
    """
    _check_features(features)
    if batch_size is None:
        values: Tensor = singular_values(features) / len(features) ** 0.5
        return values
    if generator is not None:
        features = features[torch.randperm(len(features), generator=generator)]
    size = min(batch_size, len(features))
    whole = features[: len(features) // size * size].reshape(-1, size, features.shape[1])
    mean: Tensor = torch.stack([singular_values(batch) for batch in whole]).mean(0)
    return mean


def dilation_distance(
    feat_id: Float[Tensor, "n F"],
    feat_oe: Float[Tensor, "m F"],
    k: int = 32,
    batch_size: int = 64,
    variant: Variant = "paper",
    generator: torch.Generator | None = None,
) -> float:
    """Dilation distance between two feature sets.

    Args:
        feat_id: Features of ID samples.
        feat_oe: Features of OE samples, from the same backbone and transform.
        k: Leading singular values that count.
        batch_size: Rows per batch, the same on both sides.
        variant: ``paper`` as above, with the spectra averaged over batches. ``official`` is the
            number that the authors' script prints: ``sqrt(min(k, B))`` times the distance of the
            full spectra, because it slices rows of a broadcast matrix. ``full`` takes one spectrum
            of all rows over ``sqrt(n)``, which does not depend on a batch size.
        generator: Shuffles the rows into batches.

    Raises:
        InputError: If features do not fit together, are empty or not finite, or `k` is below 1.

    Source:
        Sun et al., AAAI 2025, section on OE selection.

    Examples:
        >>> dilation_distance(torch.eye(2) * 3, torch.eye(2), k=1, variant="paper")
        2.0
    """
    if k < 1 or batch_size < 1:
        raise InputError(f"k={k}, batch_size={batch_size}; both must be at least 1")
    if variant not in ("paper", "official", "full"):
        raise InputError(f"variant is {variant!r}; accepted: 'paper', 'official', 'full'")
    _check_features(feat_id)
    _check_features(feat_oe)
    if feat_id.shape[1] != feat_oe.shape[1]:
        raise InputError(
            f"ID features have {feat_id.shape[1]} columns, OE features {feat_oe.shape[1]}; "
            "both have to come from one backbone"
        )
    size = min(batch_size, len(feat_id), len(feat_oe))
    rows = None if variant == "full" else size
    inside, outside = (spectrum(f, rows, generator) for f in (feat_id, feat_oe))
    return spectral_distance(inside, outside, k, variant, size)


def spectral_distance(
    inside: Tensor, outside: Tensor, k: int, variant: Variant, batch_size: int
) -> float:
    """Distance of two spectra, padded by zeros to one length; see `dilation_distance`.

    Examples:
        >>> spectral_distance(torch.tensor([2.0]), torch.tensor([1.0, 1.0]), 9, "paper", 64)
        1.4142135381698608
    """
    length = max(len(inside), len(outside))
    inside, outside = (torch.nn.functional.pad(s, (0, length - len(s))) for s in (inside, outside))
    difference = inside - outside.to(inside.device)
    if variant == "official":
        return float(min(k, batch_size) ** 0.5 * difference.norm())
    return float(difference[:k].norm())


@dataclass(frozen=True)
class OERank:
    """One candidate of a ranking.

    Attributes:
        name: Its name.
        distance: Dilation distance to the ID set.
        n: How many samples were seen.
        spectrum: Its spectrum.
        suspicious: Whether it lies as close as ID samples do to each other, as a leak would.
    """

    name: str
    distance: float
    n: int
    spectrum: list[float]
    suspicious: bool


class OESelector:
    """Rank candidate OE sets by their dilation distance to an ID set.

    That a SMALLER distance is better is our inference: the text of the paper that we could read
    says that the distance finds informative sets, and not in which direction.

    Args:
        backbone: Maps a batch of inputs to features ``[B, F]``. A module, or the module that it is
            a method of, is put into eval mode for the time of the measurement.
        k: See `dilation_distance`.
        batch_size: Rows per spectrum.
        max_batches: Read at most ``max_batches * batch_size`` samples of each set.
        variant: See `dilation_distance`.
        prefer: ``smallest`` or ``largest`` distance first.
        device: Where inputs are sent.

    Attributes:
        id_spectrum: The spectrum of the ID set, after `fit`.
        id_distance: Distance between two halves of the ID set: what no difference looks like.

    Examples:
        >>> g = torch.Generator().manual_seed(0)
        >>> data = [torch.randn(8, 4, generator=g) for _ in range(4)]
        >>> selector = OESelector(torch.nn.Identity(), k=4, batch_size=8).fit(data)
        >>> sets = {"far": [9 * x for x in data], "near": [2 * x for x in data]}
        >>> [rank.name for rank in selector.rank(sets)]
        ['near', 'far']
    """

    def __init__(
        self,
        backbone: Callable[[Tensor], Tensor],
        k: int = 32,
        batch_size: int = 64,
        max_batches: int = 100,
        variant: Variant = "paper",
        prefer: Literal["smallest", "largest"] = "smallest",
        device: torch.device | None = None,
    ) -> None:
        if prefer not in ("smallest", "largest"):
            raise InputError(f"prefer is {prefer!r}; accepted: 'smallest', 'largest'")
        if k < 1 or batch_size < 1 or max_batches < 1:
            raise InputError("k, batch_size and max_batches must be at least 1")
        self.backbone, self.k, self.batch_size = backbone, k, batch_size
        self.max_batches, self.variant, self.prefer = max_batches, variant, prefer
        self.device = device or torch.device("cpu")
        self._features: Tensor | None = None
        self.id_spectrum: Tensor | None = None
        self.id_distance: float | None = None

    def fit(self, id_loader: Iterable[Any]) -> "OESelector":
        """Take the features of the ID set: batches of inputs, or tuples that begin with them."""
        self._features = self._read(id_loader, "ID")
        rows = None if self.variant == "full" else min(self.batch_size, len(self._features))
        self.id_spectrum = spectrum(self._features, rows)
        if len(self._features) >= 2:
            self.id_distance = self._distance(self._features[::2], self._features[1::2])
        return self

    def rank(self, candidates: Mapping[str, Iterable[Any]]) -> list[OERank]:
        """Rank OE sets, the preferred first; warns of those that look like the ID set itself.

        Raises:
            InputError: If `fit` was not called, or there is no candidate.
        """
        if self._features is None:
            raise InputError("the selector has no ID set; call fit(id_loader) first")
        if not candidates:
            raise InputError("there are no candidates; pass {name: loader}")
        ranks = []
        for name, loader in candidates.items():
            features = self._read(loader, name)
            distance = self._distance(self._features, features)
            rows = None if self.variant == "full" else min(self.batch_size, len(features))
            close = self.id_distance is not None and distance <= self.id_distance
            if close:
                warnings.warn(
                    f"{name} lies {distance:.3g} from the ID set, no farther than two halves of "
                    "the ID set from each other; see that it holds no ID images",
                    stacklevel=2,
                )
            values = spectrum(features, rows).tolist()
            ranks.append(OERank(name, distance, len(features), values, close))
        return sorted(ranks, key=lambda r: r.distance, reverse=self.prefer == "largest")

    def _distance(self, first: Tensor, second: Tensor) -> float:
        return dilation_distance(first, second, self.k, self.batch_size, self.variant)

    @torch.no_grad()
    def _read(self, loader: Iterable[Any], name: str) -> Tensor:
        # A module, or a method of one: BatchNorm must not learn from what is only measured.
        owner = getattr(self.backbone, "__self__", self.backbone)
        module = owner if isinstance(owner, torch.nn.Module) else None
        was_training = module.training if module is not None else False
        if module is not None:
            module.eval()
        parts: list[Tensor] = []
        try:
            for batch in progress(loader, description=f"features of {name}", unit="batch"):
                inputs = batch[0] if isinstance(batch, tuple | list) else batch
                parts.append(self.backbone(inputs.to(self.device)).float().flatten(1).cpu())
                if sum(map(len, parts)) >= self.max_batches * self.batch_size:
                    break
        finally:
            if module is not None:
                module.train(was_training)
        if not parts:
            raise InputError(f"{name} holds no samples")
        return torch.cat(parts)[: self.max_batches * self.batch_size]


def _check_features(features: Tensor) -> None:
    if features.ndim != 2 or 0 in features.shape:
        raise InputError(f"features have shape {list(features.shape)}; accepted: [n, F], not empty")
    if not bool(features.isfinite().all()):
        raise InputError("features hold NaN or Inf")

"""The EDGE loss: BCE, outlier confidence, and the energy gap between tail and outliers.

    L = L_id + α L_conf + β L_gap

with N in-distribution (ID) samples, M samples of an outlier-exposure (OE) set and C labels.
Everything here reads logits alone, so it fits any model and any kind of data.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from edge_ood._closed_form import ClosedForm, Weights, can_use_closed_form
from edge_ood._gather import gather_rows
from edge_ood.energy import joint_energy, label_energies
from shared_core.errors import InputError
from shared_core.parallel import is_parallel

__all__ = ["EdgeLoss", "EdgeLossOutput", "EdgeSchedule", "edge_loss", "energy_gap", "tail_size"]

GapMask = Literal["all", "positives"]
GapImplementation = Literal["auto", "pairwise", "sorted"]

# Up to this many pairs the plain matrix is faster than sorting.
_PAIRS = 2**15


class EdgeLossOutput(NamedTuple):
    """What the loss of a step is made of; all tensors 0-dimensional, detached but for `loss`.

    Attributes:
        loss: ``l_id + alpha * l_conf + beta * l_gap``; the one to call ``backward`` on.
        l_id: The classification loss of the ID samples.
        l_conf: Mean label energy of the OE samples.
        l_gap: The energy gap; 0 while it is off.
        n_tail: How many ID samples stand for the tail; 0 while the gap is off.
        gap_active_frac: Share of the pairs whose gap is not yet wide enough.
    """

    loss: Float[Tensor, ""]
    l_id: Float[Tensor, ""]
    l_conf: Float[Tensor, ""]
    l_gap: Float[Tensor, ""]
    n_tail: int
    gap_active_frac: Float[Tensor, ""]


def tail_size(k: int | float, n: int) -> int:
    """The k of a batch of n ID samples: a fraction of n, or a number, within ``[1, n]``.

    Examples:
        >>> tail_size(0.25, 128), tail_size(50, 21)
        (32, 21)
    """
    return max(1, min(round(k * n) if isinstance(k, float) else k, n))


def energy_gap(
    tail: Float[Tensor, " k"],
    outliers: Float[Tensor, " M"],
    margin: float = 0.0,
    implementation: GapImplementation = "auto",
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Mean hinge over all pairs of an outlier and a tail energy: ``mean max(0, E - t + m)``.

    Args:
        tail: Energies t of the tail samples, ``[k]``.
        outliers: Energies E of the outliers, ``[M]``.
        margin: m, by how much a tail energy should exceed an outlier's.
        implementation: ``pairwise`` makes the k × M matrix. ``sorted`` gives the same value and
            gradient in O((M + k) log k) time and O(M + k) memory. ``auto`` chooses by size.

    Returns:
        The gap, and the share of pairs with a positive hinge.

    Examples:
        >>> gap, active = energy_gap(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.5]))
        >>> gap, active
        (tensor(0.1250), tensor(0.2500))
    """
    if _is_pairwise(implementation, tail.numel() * outliers.numel()):
        hinge = F.relu(outliers[:, None] - tail + margin)
        return hinge.mean(), (hinge.detach() > 0).to(hinge.dtype).mean()
    # Prefix sums cancel; in float64 they do so far below float32's precision (MPS has none).
    wide = outliers.dtype if outliers.device.type == "mps" else torch.float64
    ordered = tail.to(wide).sort().values
    raised = outliers.to(wide) + margin
    below = torch.searchsorted(ordered.detach(), raised.detach())  # how many t < E + m
    sums = F.pad(ordered.cumsum(0), (1, 0))
    pairs = tail.numel() * outliers.numel()
    gap = (raised * below - sums[below]).sum() / pairs
    return gap.to(outliers.dtype), (below.sum() / pairs).to(outliers.dtype)


def edge_loss(
    logits_id: Float[Tensor, "N C"],
    targets: Float[Tensor, "N C"],
    logits_oe: Float[Tensor, "M C"] | None,
    *,
    alpha: float = 1.0,
    beta: float = 0.1,
    k: int | float = 0.25,
    margin: float = 0.0,
    gap: bool = True,
    id_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    gap_mask: GapMask = "all",
    gap_impl: GapImplementation = "auto",
    gather: bool = False,
) -> EdgeLossOutput:
    """The EDGE loss of a step; `EdgeLoss` as a function.

    Args:
        logits_id: Logits z of the ID samples, ``[N, C]``.
        targets: Their labels y in [0, 1], float, ``[N, C]``.
        logits_oe: Logits of the OE samples, ``[M, C]``; ``None`` or M = 0 leaves the ID loss.
        alpha: α, the weight of L_conf, the mean over OE samples and labels of ``log(1 + exp(z))``.
        beta: β, the weight of L_gap.
        k: How many ID samples of lowest energy stand for the tail: a fraction of N (float) or a
            number (int), at most N.
        margin: m of the hinge.
        gap: Whether L_gap is on; see `EdgeSchedule`.
        id_loss: Takes logits and targets and returns L_id. By default BCE with logits, mean.
        gap_mask: ``all`` as published, or ``positives``, an extension: the energy of a tail sample
            is then summed over its true labels only, so that the gap raises no other label.
        gap_impl: See `energy_gap`.
        gather: Under several processes, take the batch of all of them as one. The loss (for the
            default `id_loss`) and, under DDP, the gradient are those of one process with the
            joined batch. Without it every process has its own tail.

    Returns:
        Losses in float32 (float64 for float64 logits), whatever autocast is on.

    Raises:
        InputError: If shapes, dtypes or settings do not fit, or a target lies outside [0, 1].

    Source:
        Sun et al., "EDGE: Unknown-aware Multi-label Learning by Energy Distribution Gap
        Expansion", AAAI 2025. L_conf and L_gap have the form of the authors' code.

    Examples:
        >>> z, y = torch.zeros(4, 3), torch.eye(4, 3)
        >>> out = edge_loss(z, y, torch.full((2, 3), -2.0))
        >>> round(out.loss.item(), 4), out.n_tail
        (0.8201, 1)
    """
    check_settings(alpha, beta, k, margin, gap_mask, gap_impl)
    _check_logits(logits_id, targets, logits_oe)
    with torch.autocast(logits_id.device.type, enabled=False):
        z, y = _wide(logits_id), targets.to(_wide(logits_id).dtype)
        outliers = None if logits_oe is None else _wide(logits_oe)
        settings = alpha, beta if gap else 0.0, k, margin, id_loss, gap_mask, gap_impl
        formulas = partial(_formulas, y=y, settings=settings, join=gather and is_parallel())
        as_published = id_loss is None and gap_mask == "all" and not gather
        if not (as_published and settings[1] > 0 and outliers is not None and len(outliers)):
            return formulas(z, outliers)
        if not can_use_closed_form(z, y, outliers):
            return formulas(z, outliers)
        n_tail = tail_size(k, len(z))
        pairwise = _is_pairwise(gap_impl, n_tail * len(outliers))
        weights = Weights(alpha, beta, n_tail, margin, pairwise)
        values = ClosedForm.apply(z, y, outliers, weights, lambda *z: formulas(*z).loss)
        loss, l_id, l_conf, l_gap, active = values
    return EdgeLossOutput(loss, l_id, l_conf, l_gap, n_tail, active)


def _formulas(
    z: Tensor, logits_oe: Tensor | None, *, y: Tensor, settings: tuple[Any, ...], join: bool
) -> EdgeLossOutput:
    """The loss as it is written; `join` makes one batch of those of all processes."""
    alpha, beta, k, margin, id_loss, gap_mask, gap_impl = settings
    if id_loss is not None:
        l_id = id_loss(z, y)
    elif join:
        per_sample = F.binary_cross_entropy_with_logits(z, y, reduction="none").mean(1)
        l_id = gather_rows(per_sample).mean()
    else:
        l_id = F.binary_cross_entropy_with_logits(z, y)
    zero = torch.zeros_like(l_id)
    if logits_oe is None or (len(logits_oe) == 0 and not join):
        return EdgeLossOutput(l_id, l_id.detach(), zero, zero, 0, zero)
    outliers = joint_energy(logits_oe)
    if join:
        outliers = gather_rows(outliers)
    if len(outliers) == 0:
        return EdgeLossOutput(l_id, l_id.detach(), zero, zero, 0, zero)
    l_conf = outliers.mean() / z.shape[1]
    loss = l_id + alpha * l_conf
    if beta == 0:
        return EdgeLossOutput(loss, l_id.detach(), l_conf.detach(), zero, 0, zero)
    energies = joint_energy(z)
    tail_energies = energies if gap_mask == "all" else (label_energies(z) * (y > 0)).sum(1)
    if join:
        energies, tail_energies = gather_rows(energies), gather_rows(tail_energies)
    n_tail = tail_size(k, len(energies))
    lowest = energies.detach().topk(n_tail, largest=False, sorted=False).indices
    l_gap, active = energy_gap(tail_energies[lowest], outliers, margin, gap_impl)
    loss = loss + beta * l_gap
    return EdgeLossOutput(loss, l_id.detach(), l_conf.detach(), l_gap.detach(), n_tail, active)


class EdgeLoss(nn.Module):
    """The EDGE loss as a module.

    Args:
        alpha: See `edge_loss`, as all that follow.
        beta: β.
        k: Size of the tail, a fraction of the ID batch or a number.
        margin: m.
        id_loss: ``"bce"``, or a module of logits and targets.
        gap_mask: ``all`` or ``positives``.
        gather: Whether several processes form one batch.
        gap_impl: ``auto``, ``pairwise`` or ``sorted``.

    Raises:
        InputError: If a setting is out of range.

    Examples:
        >>> criterion = EdgeLoss(alpha=1.0, beta=0.1)
        >>> logits = torch.randn(6, 5, requires_grad=True)
        >>> out = criterion(logits[:4], torch.ones(4, 5), logits[4:])
        >>> out.loss.backward(); out.n_tail
        1
    """

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 0.1,
        k: int | float = 0.25,
        margin: float = 0.0,
        *,
        id_loss: nn.Module | str = "bce",
        gap_mask: GapMask = "all",
        gather: bool = False,
        gap_impl: GapImplementation = "auto",
    ) -> None:
        super().__init__()
        check_settings(alpha, beta, k, margin, gap_mask, gap_impl)
        if isinstance(id_loss, str) and id_loss != "bce":
            raise InputError(f"id_loss is {id_loss!r}; accepted: 'bce', or a module")
        self.alpha, self.beta, self.k, self.margin = alpha, beta, k, margin
        self.id_loss = None if isinstance(id_loss, str) else id_loss
        self.gap_mask, self.gather, self.gap_impl = gap_mask, gather, gap_impl

    def forward(
        self,
        logits_id: Float[Tensor, "N C"],
        targets: Float[Tensor, "N C"],
        logits_oe: Float[Tensor, "M C"] | None,
        *,
        gap: bool = True,
    ) -> EdgeLossOutput:
        """Compute the loss; see `edge_loss`."""
        return edge_loss(
            logits_id,
            targets,
            logits_oe,
            alpha=self.alpha,
            beta=self.beta,
            k=self.k,
            margin=self.margin,
            gap=gap,
            id_loss=self.id_loss,
            gap_mask=self.gap_mask,
            gap_impl=self.gap_impl,
            gather=self.gather,
        )

    def extra_repr(self) -> str:
        """The settings."""
        return f"alpha={self.alpha}, beta={self.beta}, k={self.k}, margin={self.margin}"


class EdgeSchedule:
    """When the gap is on: β is 0 before the "transform epoch" τ.

    Early in training the samples of lowest energy are any samples, not those of rare labels. The
    schedule has no state, so a resumed run finds its place by the epoch alone.

    Args:
        tau: τ as an epoch, counted from 0 (int), or as a fraction of `epochs` (float in [0, 1]).
        epochs: All epochs of the training; needed for a fraction.
        beta: β from τ on.

    Raises:
        InputError: If τ is negative, a fraction above 1, or one without `epochs`.

    Examples:
        >>> schedule = EdgeSchedule(0.5, epochs=100, beta=0.1)
        >>> schedule.beta(49), schedule.beta(50), schedule.is_on(49.99)
        (0.0, 0.1, False)
    """

    def __init__(
        self, tau: int | float = 0.5, epochs: int | None = None, beta: float = 0.1
    ) -> None:
        if not (math.isfinite(tau) and tau >= 0) or (isinstance(tau, float) and tau > 1):
            raise InputError(f"tau is {tau}; accepted: an epoch from 0 up, or a fraction in [0, 1]")
        if isinstance(tau, float) and (epochs is None or epochs < 1):
            raise InputError(f"tau={tau} is a fraction of the epochs, but epochs is {epochs}")
        self.start = tau * (epochs or 0) if isinstance(tau, float) else tau
        self._beta = beta

    def is_on(self, epoch: int | float) -> bool:
        """Whether the gap is on in an epoch, counted from 0; a fraction is a place within one."""
        return epoch >= self.start

    def beta(self, epoch: int | float) -> float:
        """β of an epoch."""
        return self._beta if self.is_on(epoch) else 0.0


def check_settings(
    alpha: Any, beta: Any, k: Any, margin: Any, gap_mask: str = "all", gap_impl: str = "auto"
) -> None:
    """Refuse settings that the loss cannot have.

    Raises:
        InputError: Naming the setting.
    """
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"{name} is {value}; it must be finite and at least 0")
    if not math.isfinite(margin):
        raise InputError(f"margin is {margin}; it must be finite")
    good = 0 < k <= 1 if isinstance(k, float) else k >= 1
    if not good:
        raise InputError(
            f"k is {k}; accepted: a fraction of the ID batch in (0, 1] (float), or a number of "
            "samples from 1 up (int)"
        )
    if gap_mask not in ("all", "positives"):
        raise InputError(f"gap_mask is {gap_mask!r}; accepted: 'all', 'positives'")
    if gap_impl not in ("auto", "pairwise", "sorted"):
        raise InputError(f"gap_impl is {gap_impl!r}; accepted: 'auto', 'pairwise', 'sorted'")


def _is_pairwise(implementation: GapImplementation, pairs: int) -> bool:
    return implementation == "pairwise" or (implementation == "auto" and pairs <= _PAIRS)


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def check_targets(logits: Tensor, targets: Tensor) -> None:
    """Refuse labels that are not ``[N, C]`` numbers in [0, 1].

    Raises:
        InputError: Saying what to pass.
    """
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise InputError(f"logits_id has shape {list(logits.shape)}; accepted: [N, C]")
    if len(logits) == 0:
        raise InputError("logits_id is empty; a step needs at least one ID sample")
    if not targets.is_floating_point() or targets.shape != logits.shape:
        raise InputError(
            f"targets have shape {list(targets.shape)} and dtype {targets.dtype}, logits_id has "
            f"shape {list(logits.shape)}; pass one float per label, for class indices "
            "torch.nn.functional.one_hot(targets, C).float()"
        )
    # Looking at values on a GPU would wait for it, and under torch.compile break the graph.
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (bound.item() for bound in targets.detach().aminmax())
        if not (low >= 0 and high <= 1):
            raise InputError(f"targets lie in [{low}, {high}]; accepted: numbers in [0, 1]")


def _check_logits(logits_id: Tensor, targets: Tensor, logits_oe: Tensor | None) -> None:
    check_targets(logits_id, targets)
    if logits_oe is not None and (logits_oe.ndim != 2 or logits_oe.shape[1] != logits_id.shape[1]):
        raise InputError(
            f"logits_oe has shape {list(logits_oe.shape)}, logits_id {list(logits_id.shape)}; "
            "both come from one model: [M, C] and [N, C]"
        )

"""OpenworldAUC as `torchmetrics.Metric`: accumulates over batches, merges over processes.

A module of its own because torchmetrics takes seconds to import.
"""

import warnings
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from openworld_auc._checks import (
    Samples,
    check_choice,
    check_correct,
    check_domain,
    check_samples,
    check_scores,
)
from openworld_auc.binned import area_of_histograms, bin_edges, check_binnable, histograms
from openworld_auc.ranking import Ties, area
from openworld_auc.report import companions
from shared_core.errors import InputError

__all__ = ["OpenworldAUC", "OpenworldMetrics"]


class _Accumulating(Metric):
    """The samples of all batches: what both metrics keep, so that a collection keeps it once."""

    is_differentiable = False
    full_state_update = False
    scores: list[Tensor]
    correct: list[Tensor]
    is_base: list[Tensor]
    sample_id: list[Tensor]

    def __init__(self, *, soft: bool = False, dedupe: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.soft = soft
        self.dedupe = dedupe
        self._keep_samples()

    def _keep_samples(self) -> None:
        for name in ("scores", "correct", "is_base", "sample_id"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(
        self,
        scores: Shaped[Tensor, " batch"],
        is_base: Shaped[Tensor, " batch"],
        *,
        correct: Shaped[Tensor, " batch"] | None = None,
        preds: Shaped[Tensor, "batch ..."] | None = None,
        target: Int[Tensor, " batch"] | None = None,
        sample_id: Int[Tensor, " batch"] | None = None,
    ) -> None:
        """Add a batch.

        Args:
            scores: Detector scores, larger means more base-like, [batch].
            is_base: Domain of each sample, bool or 0 and 1, [batch].
            correct: Whether each sample is classified right within its own domain, [batch].
            preds: In place of `correct`: predicted classes [batch], or logits [batch, classes]
                over the sample's own domain.
            target: True classes, with `preds`.
            sample_id: A number of each sample, if the metric was made with ``dedupe=True``.
        """
        values, right, base = self._checked(scores, is_base, correct, preds, target)
        if self.dedupe != (sample_id is not None) or (
            sample_id is not None and sample_id.shape != values.shape
        ):
            raise InputError(
                f"dedupe={self.dedupe}, sample_id {'is' if sample_id is not None else 'not'} given;"
                " sample_id goes with dedupe=True, one number per score"
            )
        # Double for all, which holds any score exactly, so that processes can exchange them.
        self.scores.append(values.double())
        self.correct.append(right)
        self.is_base.append(base)
        if sample_id is not None:
            self.sample_id.append(sample_id.to(values.device).long())

    def _checked(
        self,
        scores: Tensor,
        is_base: Tensor,
        correct: Tensor | None,
        preds: Tensor | None,
        target: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if correct is None:
            if preds is None or target is None:
                raise InputError("nothing says what is right; accepted: correct, or preds + target")
            labels = preds.argmax(1) if preds.ndim == 2 else preds
            if labels.is_floating_point() or labels.shape != target.shape:
                raise InputError(
                    f"preds has shape {list(preds.shape)} and dtype {preds.dtype}, target "
                    f"{list(target.shape)}; accepted: class indices [n] or logits [n, classes]"
                )
            correct = labels == target
        elif preds is not None or target is not None:
            raise InputError("both correct and preds/target are given; give one of the two")
        values = check_scores(scores)
        right = check_correct(correct, len(values), values.device)
        if right.is_floating_point() and not self.soft:
            raise InputError("correct is soft; make the metric with soft=True for that")
        base = check_domain(is_base, len(values), values.device)
        return values, right.double() if self.soft else right, base

    def merge_state(self, incoming_state: Any) -> None:
        """Add the samples of another metric, and forget what was computed before."""
        super().merge_state(incoming_state)
        self._computed = None

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the samples of all processes; `compute` calls this."""
        if isinstance(self.scores, list) and not self.scores:
            # torchmetrics would send an empty tensor of another dtype
            self.scores.append(torch.empty(0, dtype=torch.float64, device=self.device))
            kind = torch.float64 if self.soft else torch.bool
            self.correct.append(torch.empty(0, dtype=kind, device=self.device))
            self.is_base.append(torch.empty(0, dtype=torch.bool, device=self.device))
            if self.dedupe:
                self.sample_id.append(torch.empty(0, dtype=torch.long, device=self.device))
        super().sync(*args, **kwargs)

    def _samples(self) -> Samples | None:
        """All samples of all processes, or None (and a warning) where a domain has none."""
        if len(self.scores) == 0:
            return self._none()
        scores, correct, is_base = map(dim_zero_cat, (self.scores, self.correct, self.is_base))
        if self.dedupe:
            ids = dim_zero_cat(self.sample_id)
            ids, order = ids.sort(stable=True)
            first = torch.ones_like(ids, dtype=torch.bool)
            first[1:] = ids[1:] != ids[:-1]
            keep = order[first]
            scores, correct, is_base = scores[keep], correct[keep], is_base[keep]
        if is_base.all() or not is_base.any():
            return self._none()
        return check_samples(scores, correct, is_base)

    @staticmethod
    def _none() -> None:
        warnings.warn(
            "there are no base samples or no new samples yet; OpenworldAUC is NaN", stacklevel=4
        )


class OpenworldAUC(_Accumulating):
    """OpenworldAUC over batches, exact or in constant memory.

    Exact, it keeps every score (16 bytes a sample at most); with `bins` it keeps histograms, and
    `error_bound` tells how far off `compute` can be. A `DistributedSampler` repeats samples to
    make shards even, which shifts the value: leave them out, or use ``dedupe=True``.

    Args:
        bins: None for the exact value, or as in `openworld_auc.openworld_auc_binned`.
        ties: ``half`` or ``strict``, as in `openworld_auc.openworld_auc`.
        soft: Whether correctness is a number in [0, 1] instead of a bool.
        dedupe: Whether `update` takes a ``sample_id``, of which only the first counts.
        kwargs: Of `torchmetrics.Metric`.

    Raises:
        InputError: If settings contradict each other; on `update`, as `openworld_auc`.

    Examples:
        >>> from openworld_auc import OpenworldAUC
        >>> metric = OpenworldAUC()
        >>> is_base = torch.tensor([True, True, False])
        >>> metric.update(
        ...     torch.tensor([0.9, 0.4, 0.5]), is_base, correct=torch.tensor([True, True, True])
        ... )
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    edges: Tensor
    counts: Tensor

    def __init__(
        self,
        bins: int | Shaped[Tensor, " edges"] | None = None,
        *,
        ties: Ties = "half",
        soft: bool = False,
        dedupe: bool = False,
        **kwargs: Any,
    ) -> None:
        check_choice("ties", ties, ("half", "strict"))
        if bins is not None and (soft or dedupe or ties == "strict"):
            raise InputError(
                "histograms count whole samples, ties by half: bins goes with neither soft, dedupe "
                "nor ties='strict'"
            )
        self.bins = bins
        self.ties: Ties = ties
        super().__init__(soft=soft, dedupe=dedupe, **kwargs)

    def _keep_samples(self) -> None:
        if self.bins is None:
            super()._keep_samples()
            return
        edges = bin_edges(self.bins)
        self.register_buffer("edges", edges, persistent=False)
        zeros = torch.zeros(4, len(edges) + 1, dtype=torch.long)
        self.add_state("counts", zeros, dist_reduce_fx="sum")

    def set_dtype(self, dst_type: Any) -> "OpenworldAUC":
        """Keep the states as they are: scores in float64, counts as integers."""
        return self

    def update(self, scores: Any, is_base: Any, **given: Any) -> None:
        """Add a batch; see the arguments of `OpenworldMetrics.update`."""
        if self.bins is None:
            super().update(scores, is_base, **given)
            return
        checked = self._checked(
            scores, is_base, given.get("correct"), given.get("preds"), given.get("target")
        )
        check_binnable(checked[0], checked[1], default_edges=not isinstance(self.bins, Tensor))
        self.counts += histograms(*checked, self.edges)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the samples or counts of all processes; `compute` calls this."""
        if self.bins is None:
            super().sync(*args, **kwargs)
        else:
            Metric.sync(self, *args, **kwargs)

    def compute(self) -> Tensor:
        """OpenworldAUC of all batches of all processes; NaN where a domain has no sample."""
        if self.bins is not None:
            return self._of_counts()[0]
        samples = self._samples()
        if samples is None:
            return torch.tensor(torch.nan, dtype=torch.float64, device=self.device)
        return area(samples, self.ties)

    def error_bound(self) -> Tensor:
        """How far `compute` of this process can be from the exact value; 0 without bins."""
        if self.bins is None:
            return torch.zeros((), dtype=torch.float64, device=self.device)
        return self._of_counts()[1]

    def _of_counts(self) -> tuple[Tensor, Tensor]:
        hit_base, hit_new, all_base, all_new = self.counts
        pairs = (all_base.sum() * all_new.sum()).double()
        if pairs == 0:
            self._none()
        value, bound = area_of_histograms(hit_base, hit_new)
        return value / pairs, bound / pairs


class OpenworldMetrics(_Accumulating):
    """OpenworldAUC and all threshold-free companions over batches, from one state.

    `compute` gives 0-dimensional float64 tensors under the keys ``openworld_auc``, ``base_acc``,
    ``new_acc``, ``hm``, ``auroc``, ``fpr95``, ``opt_a`` and ``opt_g``; see
    `openworld_auc.OpenworldReport`.

    Args:
        soft: Whether correctness is a number in [0, 1] instead of a bool.
        dedupe: Whether `update` takes a ``sample_id``, of which only the first counts.
        kwargs: Of `torchmetrics.Metric`.

    Examples:
        >>> from openworld_auc import OpenworldMetrics
        >>> metric = OpenworldMetrics()
        >>> is_base = torch.tensor([True, True, False])
        >>> metric.update(
        ...     torch.tensor([0.9, 0.4, 0.5]), is_base, preds=torch.tensor([1, 2, 0]),
        ...     target=torch.tensor([1, 1, 0]),
        ... )
        >>> {key: round(value.item(), 3) for key, value in metric.compute().items()}
        {'openworld_auc': 0.5, 'base_acc': 0.5, 'new_acc': 1.0, 'hm': 0.667, 'auroc': 0.5,
         'fpr95': 1.0, 'opt_a': 0.5, 'opt_g': 0.5}
    """

    KEYS = ("openworld_auc", "base_acc", "new_acc", "hm", "auroc", "fpr95", "opt_a", "opt_g")

    def set_dtype(self, dst_type: Any) -> "OpenworldMetrics":
        """Keep the states as they are: scores in float64."""
        return self

    def compute(self) -> dict[str, Tensor]:
        """The metrics of all batches of all processes; NaN where a domain has no sample."""
        samples = self._samples()
        values = dict.fromkeys(self.KEYS, torch.nan) if samples is None else companions(samples)
        return {
            key: torch.tensor(value, dtype=torch.float64, device=self.device)
            for key, value in values.items()
        }

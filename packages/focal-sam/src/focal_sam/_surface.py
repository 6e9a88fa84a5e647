"""The loss of groups of classes as a function of the parameters: values, slopes, curvature.

Everything here leaves the model, the generators and the loader as it found them.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from focal_sam._perturbation import moved
from focal_sam._stillness import Buffers, Generators, compilers_off
from shared_core.errors import InputError

Criterion = Callable[[Tensor, Tensor], Tensor]
Groups = Mapping[str, Iterable[int]]

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Per-sample cross-entropy, the default criterion."""
    return F.cross_entropy(logits, target, reduction="none")


def _on(value: Any, device: torch.device) -> Any:
    """Move the tensors of an input, however nested, to `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {k: _on(v, device) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on(v, device) for v in value)
    return value


def _checked_groups(groups: Groups | None, classes: int) -> dict[str, list[int]]:
    if groups is None:
        return {str(c): [c] for c in range(classes)}
    result = {str(name): [int(c) for c in members] for name, members in groups.items()}
    if not result:
        raise InputError("groups is empty; name at least one, such as {'tail': [7, 8, 9]}")
    for name, members in result.items():
        outside = [c for c in members if not 0 <= c < classes]
        if outside:
            raise InputError(
                f"group {name!r} names class {outside[0]}; the model has classes 0 to {classes - 1}"
            )
        if len(set(members)) < len(members):
            raise InputError(f"group {name!r} names a class twice: {members}")
    return result


class GroupLosses:
    """The mean loss of every group of classes, at any displacement of the parameters.

    Made by `group_losses`, which keeps the model still. The losses at θ are computed on entry.

    Attributes:
        groups: The classes of each group.
        counts: Samples of each group.
        empty: The groups without samples.
        losses: Mean loss of each group at θ; NaN without samples.
        parameters: The trainable parameters, each once.
        dimension: P, the number of their elements.
        members: Which classes a group has, ``[groups, classes]``, 1 or 0.
        largest_batch: Samples of the loader's largest batch.
        wide: The dtype sums are taken in.
        restore: Sets the generators back to the start of a pass.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        criterion: Criterion,
        groups: Groups | None,
        eval_mode: bool,
        parameters: list[nn.Parameter],
        restore: Callable[[], None],
    ) -> None:
        self.model, self.loader, self.criterion = model, loader, criterion
        self.eval_mode = eval_mode
        self.parameters = parameters
        self.dimension = sum(p.numel() for p in parameters)
        self.device = parameters[0].device
        self.dtype = (
            torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
        )
        # MPS has no float64.
        self.wide = torch.float32 if self.device.type == "mps" else torch.float64
        self.restore = restore
        self.largest_batch = 0
        sums, self._class_counts = self._class_sums("at θ")
        self.groups: dict[str, list[int]] = _checked_groups(groups, len(sums))
        self.members = torch.zeros(len(self.groups), len(sums), dtype=self.wide, device=self.device)
        for row, classes in zip(self.members, self.groups.values(), strict=True):
            row[classes] = 1
        totals = (self.members @ self._class_counts.to(self.wide)).tolist()
        self.counts: dict[str, int] = {
            name: int(n) for name, n in zip(self.groups, totals, strict=True)
        }
        self.empty = [name for name, n in self.counts.items() if n == 0]
        self.losses: dict[str, float] = self._means(sums)

    def batches(self) -> Iterator[tuple[Any, Tensor]]:
        """One pass over the data, the same in every pass."""
        self.restore()
        for batch in self.loader:
            if not isinstance(batch, list | tuple) or len(batch) != 2:
                raise InputError(
                    f"the loader gave a {type(batch).__name__}; a batch is a pair (x, y). "
                    "For a single batch pass [(x, y)]"
                )
            x, y = batch
            y = torch.as_tensor(y)
            if y.ndim != 1 or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
                raise InputError(
                    f"labels have shape {list(y.shape)} and dtype {y.dtype}; accepted: integer "
                    "labels [batch], since a sample must belong to one class"
                )
            if len(y):
                yield _on(x, self.device), y.to(self.device).long()

    def forward(self, x: Any, y: Tensor, where: str) -> tuple[Tensor, Tensor]:
        """The logits and the losses ``[batch]`` of one batch, checked."""
        logits = self.model(x)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(y):
            shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise InputError(
                f"the model returned {shape} for {len(y)} labels; it has to return logits "
                "[batch, classes]"
            )
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= logits.shape[1]:
            raise InputError(
                f"label {low if low < 0 else high} is outside the classes 0 to "
                f"{logits.shape[1] - 1} of the model"
            )
        losses = self.criterion(logits, y)
        if not isinstance(losses, Tensor) or losses.shape != y.shape:
            shape = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise InputError(
                f"the criterion returned {shape} for {len(y)} samples; it has to return one loss "
                "per sample: build it with reduction='none'"
            )
        finite = losses.detach().isfinite()
        if not finite.all():
            first = int((~finite).nonzero()[0])
            raise InputError(
                f"the loss of a sample of class {int(y[first])} is {losses[first].item()} {where}; "
                "sharpness and curvature need finite losses"
            )
        return logits, losses

    def _class_sums(self, where: str) -> tuple[Tensor, Tensor]:
        """Sums of the losses and numbers of the samples of every class, ``[classes]`` both."""
        sums = counts = torch.zeros(0)
        with torch.no_grad():
            for x, y in self.batches():
                logits, losses = self.forward(x, y, where)
                if not len(sums):
                    sums = torch.zeros(logits.shape[1], dtype=self.wide, device=self.device)
                    counts = torch.zeros_like(sums, dtype=torch.long)
                sums.index_add_(0, y, losses.to(self.wide))
                counts += torch.bincount(y, minlength=len(counts))
                self.largest_batch = max(self.largest_batch, len(y))
        if not len(sums):
            raise InputError("the loader gave no samples")
        return sums, counts

    @staticmethod
    def unsteady(before: int, now: int) -> None:
        """Refuse a loader that changes between passes."""
        raise InputError(
            f"the loader gave other samples in a second pass ({before}, then {now}); pass one that "
            "can be walked repeatedly, such as a DataLoader over a fixed dataset, or list(loader)"
        )

    def _means(self, sums: Tensor) -> dict[str, float]:
        totals = (self.members @ sums).tolist()
        return {
            name: total / n if n else math.nan
            for (name, n), total in zip(self.counts.items(), totals, strict=True)
        }

    def at(self, displacement: Tensor, where: str) -> dict[str, float]:
        """The mean loss of every group at θ + `displacement` (``[P]``)."""
        with self.displaced(displacement):
            sums, counts = self._class_sums(where)
        if not torch.equal(counts, self._class_counts):
            self.unsteady(int(self._class_counts.sum()), int(counts.sum()))
        return self._means(sums)

    def displaced(self, displacement: Tensor) -> contextlib.AbstractContextManager[None]:
        """Move the parameters by `displacement` (``[P]``) while a block runs."""
        return moved(self.parameters, self.split(displacement))

    def split(self, vector: Tensor) -> list[Tensor]:
        """Cut a vector ``[P]`` into the shapes of the parameters."""
        pieces = torch.split(vector, [p.numel() for p in self.parameters])
        return [
            v.view(p.shape).to(p.device, p.dtype)
            for v, p in zip(pieces, self.parameters, strict=True)
        ]

    def joined(self, tensors: Iterable[Tensor]) -> Tensor:
        """The inverse of `split`."""
        return torch.cat([t.detach().reshape(-1).to(self.device, self.dtype) for t in tensors])

    def random_vector(self, generator: torch.Generator) -> Tensor:
        """A standard normal vector ``[P]``, the same on every device and in every precision."""
        vector = torch.randn(self.dimension, generator=generator, dtype=torch.float32)
        return vector.to(self.device, self.dtype)

    def random_signs(self, generator: torch.Generator) -> Tensor:
        """A vector ``[P]`` of independent fair signs (Rademacher)."""
        bits = torch.randint(0, 2, (self.dimension,), generator=generator)
        return (2 * bits - 1).to(self.device, self.dtype)

    def filter_normalized(self, direction: Tensor) -> Tensor:
        """Give each filter of `direction` the norm of the parameters' filter.

        Biases and the parameters of normalisation layers get no direction (Li et al., NeurIPS
        2018, Section 4).
        """
        norms = {
            id(p)
            for m in self.model.modules()
            if isinstance(m, NORMS) or type(m).__name__.endswith("Norm")
            for p in m.parameters(recurse=False)
        }
        pieces = []
        for piece, parameter in zip(self.split(direction), self.parameters, strict=True):
            if parameter.ndim < 2 or id(parameter) in norms:
                pieces.append(torch.zeros_like(piece))
                continue
            filters = tuple(range(1, parameter.ndim))
            wanted = torch.linalg.vector_norm(parameter.detach(), dim=filters, keepdim=True)
            given = torch.linalg.vector_norm(piece, dim=filters, keepdim=True)
            pieces.append(piece * (wanted / given.clamp_min(torch.finfo(given.dtype).tiny)))
        result = self.joined(pieces)
        if not result.any():
            raise InputError(
                "filter-normalised directions vanish: no weight that requires a gradient has two "
                "dimensions and is not zero"
            )
        return result


class GroupLoss:
    """The mean loss of one group: value, gradient and Hessian-vector products at the current θ.

    Only the group's own samples are run, packed into batches no larger than the loader's, and a
    group that fits in one is read once. Where a sample's loss may depend on the rest of its batch
    (`eval_mode` off), whole batches are run and the group's losses picked.
    """

    def __init__(self, losses: GroupLosses, name: str) -> None:
        self.space, self.name = losses, name
        row = list(losses.groups).index(name)
        self.count = losses.counts[name]
        self._member = losses.members[row].bool()
        self._only: tuple[Any, Tensor, Tensor | None] | None = None
        self._graph: tuple[Tensor, ...] | None = None
        if losses.eval_mode and self.count <= losses.largest_batch:
            packed = list(self._walk())
            if len(packed) == 1 and packed[0][2] is None:
                self._only = packed[0]

    def batches(self) -> Iterator[tuple[Any, Tensor, Tensor | None]]:
        """Inputs, labels, and which of the samples are the group's (``None``: all)."""
        if self._only is not None:
            self.space.restore()
            yield self._only
        else:
            yield from self._walk()

    def _walk(self) -> Iterator[tuple[Any, Tensor, Tensor | None]]:
        held: list[tuple[Tensor, Tensor]] = []
        size = seen = 0
        for x, y in self.space.batches():
            keep = self._member[y]
            seen += int(keep.sum())
            if not (self.space.eval_mode and isinstance(x, Tensor)):
                yield x, y, keep
                continue
            if not keep.any():
                continue
            x, y = x[keep], y[keep]
            alike = not held or x.shape[1:] == held[0][0].shape[1:]
            if held and (not alike or size + len(y) > self.space.largest_batch):
                yield *self._joined(held), None
                held, size = [], 0
            held.append((x, y))
            size += len(y)
        if held:
            yield *self._joined(held), None
        if seen != self.count:
            self.space.unsteady(self.count, seen)

    @staticmethod
    def _joined(held: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        return torch.cat([x for x, _ in held]), torch.cat([y for _, y in held])

    def _losses(self, x: Any, y: Tensor, keep: Tensor | None, where: str) -> Tensor:
        _, losses = self.space.forward(x, y, where)
        return losses if keep is None else losses[keep]

    def value(self, where: str) -> float:
        """The mean loss."""
        total = torch.zeros((), dtype=self.space.wide, device=self.space.device)
        with torch.no_grad():
            for batch in self.batches():
                total += self._losses(*batch, where).to(self.space.wide).sum()
        return float(total) / self.count

    def value_and_gradient(self, where: str) -> tuple[float, Tensor]:
        """The mean loss and its gradient ``[P]``."""
        total = torch.zeros((), dtype=self.space.wide, device=self.space.device)
        gradient = torch.zeros(
            self.space.dimension, dtype=self.space.dtype, device=self.space.device
        )
        for batch in self.batches():
            losses = self._losses(*batch, where)
            total += losses.detach().to(self.space.wide).sum()
            gradient += self.space.joined(self._gradients(losses))
        return float(total) / self.count, gradient

    def _gradients(self, losses: Tensor, *, differentiable: bool = False) -> tuple[Tensor, ...]:
        """This batch's share of the gradient of the mean loss."""
        if not losses.requires_grad:
            raise InputError(
                "the loss does not depend on any trainable parameter; is the forward pass "
                "detached or run under torch.no_grad?"
            )
        return torch.autograd.grad(
            losses.sum() / self.count,
            self.space.parameters,
            create_graph=differentiable,
            materialize_grads=True,
        )

    def hessian_product(self, vector: Tensor) -> Tensor:
        """The Hessian of the mean loss times `vector` (``[P]``)."""
        tangents = self.space.split(vector)
        if self._only is not None:
            # The graph of the gradient serves all products, as long as θ stays.
            if self._graph is None:
                losses = self._losses(*self._only, "at θ")
                self._graph = self._gradients(losses, differentiable=True)
            return self._product(self._graph, tangents, retain=True)
        result = torch.zeros_like(vector)
        for batch in self.batches():
            gradients = self._gradients(self._losses(*batch, "at θ"), differentiable=True)
            result += self._product(gradients, tangents, retain=False)
        return result

    def _product(
        self, gradients: tuple[Tensor, ...], tangents: list[Tensor], *, retain: bool
    ) -> Tensor:
        # A parameter that the loss is linear in has a constant gradient: no graph, no curvature.
        curved = [(g, t) for g, t in zip(gradients, tangents, strict=True) if g.requires_grad]
        if not curved:
            return self.space.joined(torch.zeros_like(p) for p in self.space.parameters)
        return self.space.joined(
            torch.autograd.grad(
                [g for g, _ in curved],
                self.space.parameters,
                [t for _, t in curved],
                retain_graph=retain,
                materialize_grads=True,
            )
        )


@contextlib.contextmanager
def group_losses(
    model: nn.Module,
    loader: Iterable[Any],
    criterion: Criterion | None,
    groups: Groups | None,
    eval_mode: bool,
) -> Iterator[GroupLosses]:
    """Hold the model still and give its losses by group.

    On any exit the buffers, the training flags and the generators are as they were; ``p.grad`` is
    never touched.
    """
    if isinstance(loader, Iterator):
        raise InputError(
            f"the loader is a {type(loader).__name__}, which can be walked once; several passes "
            "are needed. Pass a DataLoader, or list(loader) if it fits in memory"
        )
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise InputError("no parameter requires a gradient; there is nothing to move")
    coarse = {p.dtype for p in parameters} - {torch.float32, torch.float64}
    if coarse:
        raise InputError(
            f"parameters have dtype {coarse.pop()}; sharpness and curvature need float32 or "
            "float64: pass copy.deepcopy(model).float()"
        )
    generators = Generators(loader, {p.device for p in model.parameters()})
    buffers = Buffers(model)
    modes = [(m, m.training) for m in model.modules()]

    def restore() -> None:
        generators.restore()
        if not eval_mode:
            buffers.restore()

    try:
        if eval_mode:
            # Not model.eval(), which some models override to do more than set the flag.
            for module, _ in modes:
                module.training = False
        with (
            compilers_off(),
            # Lifts torch.no_grad as well.
            torch.inference_mode(False),
            # The fused attention kernels have no second derivative.
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            yield GroupLosses(
                model, loader, criterion or cross_entropy, groups, eval_mode, parameters, restore
            )
    finally:
        for module, training in modes:
            module.training = training
        buffers.restore()
        generators.restore()

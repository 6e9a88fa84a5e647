r"""CC-SAM: a perturbation for each class, sized by a PAC-Bayes bound.

Zhou et al., "Class-Conditional Sharpness-Aware Minimization for Deep Long-Tailed Recognition",
CVPR 2023, first stage. Class k of the batch, with the gradient ``g_k`` of its own mean loss, sees
the P perturbed parameters ``w`` moved by

    ε_k = r_k √P g_k / ||g_k||,   r_k = r √||w|| / (√||g_k|| √2 (n_k - 1)^¼ P^¼),

and the loss is ``(1 - f) mean l(w) + f mean l_k(w + ε_k)``. Fine control, at a price that grows
with the number of classes in the batch; Focal-SAM's does not.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NoReturn

import torch
from jaxtyping import Int
from torch import Tensor, nn

from focal_sam._backward import Backward
from focal_sam._checks import check_choice, check_counts, check_labels
from focal_sam._modules import RandomState, frozen_running_stats
from focal_sam._perturbation import global_norm, moved
from focal_sam.sharpness import Closure, SharpnessMethod, StepResult, _Batch

__all__ = ["CCSAM"]

Gradients = Sequence[Tensor | None]


class CCSAM(SharpnessMethod):
    """CC-SAM: perturbs the classifier (or all of the model) apart for each class.

    Args:
        model: The model as the training loop calls it.
        class_counts: Number of training samples ``n_k`` of each class.
        noise_ratio: r of the radius; takes the place of ρ.
        flat_ratio: f, the share of the perturbed loss; the authors use 0.3 and 0.5.
        scope: ``"classifier"`` moves the classifier only: two forward and backward passes.
            ``"all"`` moves everything: a further forward and two backward passes for each class
            in the batch, and a copy of the gradient for each.
        classifier: The classifier; by default the last `torch.nn.Linear`.
        options: ``bn_perturbed``, ``rng`` and ``interval`` of `SharpnessMethod`.

    Raises:
        ValueError: If an argument is out of range, or no classifier is found.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> method = CCSAM(model, class_counts=[50, 20, 5], flat_ratio=0.5)
        >>> x, y = torch.randn(6, 4), torch.randint(3, (6,))
        >>> result = method.backward(
        ...     lambda: nn.functional.cross_entropy(model(x), y, reduction="none"), y
        ... )
        >>> result.loss.shape
        torch.Size([])
    """

    def __init__(
        self,
        model: nn.Module,
        class_counts: Sequence[int] | Tensor,
        noise_ratio: float = 1e-6,
        flat_ratio: float = 0.3,
        *,
        scope: Literal["classifier", "all"] = "classifier",
        classifier: nn.Module | None = None,
        **options: Any,
    ) -> None:
        check_choice("scope", scope, "classifier", "all")
        if not 0 <= flat_ratio <= 1:
            raise ValueError(f"flat_ratio is {flat_ratio}; it must be between 0 and 1")
        unknown = set(options) - {"bn_perturbed", "rng", "interval"}
        if unknown:
            raise ValueError(f"CCSAM has no option {', '.join(sorted(unknown))}")
        if scope == "classifier":
            classifier = _last_linear(model) if classifier is None else classifier
            inside = {id(p) for p in classifier.parameters()}
            options["perturb"] = lambda _, p: id(p) in inside
        super().__init__(model, 1.0, noise_ratio, **options)
        if self._parallel.sharded:
            raise NotImplementedError("CCSAM does not run on sharded parameters; use DDP")
        self.class_counts = check_counts(class_counts)
        self.flat_ratio, self.classifier, self.scope = flat_ratio, classifier, scope

    def ascent_gradient(self, closure: Closure, target: Any = None) -> NoReturn:
        """Not defined: there is one ascent gradient per class."""
        raise NotImplementedError("CC-SAM has a perturbation for each class; use backward()")

    def perturbed(self, gradients: Gradients) -> NoReturn:
        """Not defined: there is one perturbation per class."""
        raise NotImplementedError("CC-SAM has a perturbation for each class; use backward()")

    def _uniform(self, target: Any) -> float | None:
        if not isinstance(target, Tensor) or target.ndim != 1 or target.is_floating_point():
            raise ValueError("CC-SAM perturbs by class: it needs integer labels of shape [B]")
        check_labels(target, len(self.class_counts), on_device=True)
        return 1.0

    def _step(self, batches: Sequence[_Batch], engine: Backward) -> StepResult:
        if len(batches) > 1:
            raise ValueError("CC-SAM has no joint perturbation; call backward(scale=1/A) A times")
        [batch] = batches
        active = self.rho > 0 and self.flat_ratio > 0 and self.steps % self.interval == 0
        self.steps += 1
        if not active:
            batch.passes = [self._forward(batch)]
            engine.backward(batch.first.losses.mean())
            return self._summary(batch, batch.first.losses, None)
        parameters = self._parameters()
        batch.random = RandomState({p.device for p in parameters})
        members = {k: batch.target == k for k in batch.target.unique().tolist()}
        with self._parallel.unsynced():
            batch.passes = [self._forward(batch)]
            losses = batch.first.losses
            gradients = {
                k: torch.autograd.grad(
                    losses[mask.to(losses.device)].mean(),
                    parameters,
                    retain_graph=True,
                    allow_unused=True,
                )
                for k, mask in members.items()
            }
            norms = {
                k: global_norm([g for g in gs if g is not None]) for k, gs in gradients.items()
            }
            noises = {k: self._noise(k, gradients.pop(k), norms[k]) for k in list(members)}
            engine.backward((1 - self.flat_ratio) * losses.mean())
        if self.scope == "classifier":
            second = self._through_classifier(batch, members, noises)
            engine.backward(self.flat_ratio * second.mean())
        else:
            second = self._through_model(batch, members, noises, engine)
        return self._summary(batch, second, torch.stack(list(norms.values())).max())

    def _noise(self, k: int, gradients: Gradients, norm: Tensor) -> list[Tensor | None]:
        """``ε_k``, one per perturbed parameter."""
        parameters = self._parameters()
        size = sum(p.numel() for p in parameters)
        count = max(self.class_counts[k].item() - 1, 1)
        weight_norm = global_norm([p.detach() for p in parameters])
        constant = self.rho / (math.sqrt(2) * count**0.25 * size**0.25) * math.sqrt(size)
        factor = constant * weight_norm.sqrt() / norm**1.5
        factor = torch.where(factor.isfinite(), factor, torch.zeros_like(factor))
        return [None if g is None else (g * factor).to(g.dtype) for g in gradients]

    def _second(self, batch: _Batch) -> Tensor:
        """The losses of another forward pass on the same batch."""
        if self.rng == "replay" and batch.random is not None:
            batch.random.replay()
        with frozen_running_stats(self._norms, self.bn_perturbed == "freeze"):
            return self._forward(batch).losses

    def _through_classifier(
        self,
        batch: _Batch,
        members: Mapping[int, Tensor],
        noises: Mapping[int, Sequence[Tensor | None]],
    ) -> Tensor:
        """All classes in one pass: the classifier sees each class's rows with its own weights."""
        assert self.classifier is not None
        shifts = {id(p): i for i, p in enumerate(self._parameters())}
        named = {n: p for n, p in self.classifier.named_parameters() if id(p) in shifts}

        def weights(noise: Sequence[Tensor | None]) -> dict[str, Tensor]:
            pairs = ((n, p, noise[shifts[id(p)]]) for n, p in named.items())
            return {n: p if shift is None else p + shift for n, p, shift in pairs}

        with _replaced_forward(
            self.classifier, members, {k: weights(noise) for k, noise in noises.items()}
        ):
            return self._second(batch)

    def _through_model(
        self,
        batch: _Batch,
        members: Mapping[int, Tensor],
        noises: Mapping[int, Sequence[Tensor | None]],
        engine: Backward,
    ) -> Tensor:
        """One pass per class, with the whole model moved for it."""
        losses = torch.zeros_like(batch.first.losses.detach())
        parameters = self._parameters()
        for turn, (k, mask) in enumerate(members.items(), start=1):
            pairs = [(p, e) for p, e in zip(parameters, noises[k], strict=True) if e is not None]
            last = turn == len(members)
            with (
                contextlib.nullcontext() if last else self._parallel.unsynced(),
                moved([p for p, _ in pairs], [e for _, e in pairs]),
            ):
                own = torch.where(mask.to(losses.device), self._second(batch), 0.0)
                engine.backward(self.flat_ratio * own.mean())
            losses += own.detach()
        return losses

    def _summary(self, batch: _Batch, second: Tensor, norm: Tensor | None) -> StepResult:
        with torch.no_grad():
            loss, perturbed = batch.first.losses.mean(), second.mean()
            norm = torch.zeros_like(loss) if norm is None else norm.to(loss.device)
            skipped = ~(loss.isfinite() & norm.isfinite())
            return StepResult(loss, perturbed, perturbed - loss, norm, skipped, batch.first.aux)


def _last_linear(model: nn.Module) -> nn.Module:
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    if not linears:
        raise ValueError("the model has no torch.nn.Linear; pass its classifier as classifier=")
    return linears[-1]


@contextlib.contextmanager
def _replaced_forward(
    classifier: nn.Module,
    members: Mapping[int, Int[Tensor, " batch"] | Tensor],
    weights: Mapping[int, dict[str, Tensor]],
) -> Iterator[None]:
    """Inside, `classifier` gives class k's rows the output of ``weights[k]``."""
    running = False

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        nonlocal running
        if running:  # the calls below come through here too
            return output
        [rows] = args
        batch = len(next(iter(members.values())))
        if not isinstance(rows, Tensor) or rows.shape[0] != batch:
            raise ValueError(
                f"the classifier does not see one row per sample ({batch}); use scope='all'"
            )
        running = True
        try:
            places = {k: mask.to(rows.device).nonzero().squeeze(1) for k, mask in members.items()}
            parts = [
                torch.func.functional_call(module, weights[k], (rows[place],))
                for k, place in places.items()
            ]
        finally:
            running = False
        return torch.cat(parts)[torch.cat(list(places.values())).argsort()]

    call: Callable[..., Any] = hook
    handle = classifier.register_forward_hook(call)
    try:
        yield
    finally:
        handle.remove()

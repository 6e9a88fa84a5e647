r"""The sharpness-aware gradient of a class-weighted loss: one engine for the whole family.

A method computes a gradient into ``p.grad``; optimizer, scheduler and gradient scaler stay the
user's own. With per-sample losses ``l`` of a batch of B and weights ``w = c[y]``, one call of
`SharpnessMethod.backward` (Li et al., ICML 2025)

1. takes ``g_b = ∇ (1/B) Σ w l`` and ``g_a = ∇ (1/B) Σ (1 - w) l`` from one forward pass;
2. moves θ to ``θ + ε`` with ``ε = ρ g_b / ||g_b||``;
3. takes ``g_1 = ∇ (1/B) Σ w l`` there from a second forward pass, and moves back, bit for bit;
4. leaves ``g_a + g_1`` in ``p.grad``.

With ``c_i = λ (1 - π_i)^γ`` this is ``λ ∇L^γ(θ + ε) + ∇[L - λ L^γ](θ)``, to first order the
gradient of ``L(θ) + λ max_{||ε|| ≤ ρ} Σ_i (1 - π_i)^γ [L^i(θ + ε) - L^i(θ)]``, where ``L^i`` is
class i's share of the mean loss.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from focal_sam._backward import Backward, uses_reentrant_checkpointing
from focal_sam._checks import check_choice, check_nonnegative
from focal_sam._modules import RandomState, frozen_running_stats, norm_layers
from focal_sam._parallel import Parallel
from focal_sam._perturbation import displacements, lost_fraction, moved
from focal_sam._selection import Predicate, select_parameters
from focal_sam.weights import ClassWeights

__all__ = ["SharpnessMethod", "StepResult"]

Closure = Callable[[], Tensor | tuple[Tensor, Any]]
Model = nn.Module | Iterable[Tensor] | Iterable[Mapping[str, Any]]

LOST_EVERY = 100
# Nearer to 1 than this, 1 - w is too small to carry a half-precision backward pass.
SHORTCUT_MARGIN = 0.01


@dataclass(frozen=True)
class StepResult:
    """What one step saw. Scalars stay on the device, so nothing waits for them.

    Attributes:
        loss: Mean loss at θ.
        loss_perturbed: Mean loss at θ + ε (that at θ where nothing had to be perturbed).
        sharpness: ``(1/B) Σ w l(θ + ε) - (1/B) Σ w l(θ)``.
        grad_norm: Norm of the ascent gradient ``g_b``, without a scaler's factor.
        skipped: Whether the loss or the norm was not finite. ε was 0 then, and with a gradient
            scaler ``p.grad`` is not finite either, so that the scaler skips the step.
        aux: What the closure returned beside its losses, from the pass at θ; a list of these
            after `SharpnessMethod.accumulate`.
    """

    loss: Tensor
    loss_perturbed: Tensor
    sharpness: Tensor
    grad_norm: Tensor
    skipped: Tensor
    aux: Any = None


@dataclass
class _Pass:
    """The losses ``l`` and weights ``w`` of one forward pass, ``[B]`` each."""

    losses: Tensor
    weights: Tensor | float
    multiplier: float
    aux: Any


def _mean(at: _Pass) -> Tensor:
    """``L``, the mean loss."""
    return at.losses.mean()


def _weighted(at: _Pass) -> Tensor:
    """``(1/B) Σ w l``, the focal loss sum ``λ L^γ``."""
    return (at.multiplier * at.weights * at.losses).mean()


def _rest(at: _Pass) -> Tensor:
    """``(1/B) Σ (1 - w) l``, that is ``L - λ L^γ``."""
    return ((1 - at.weights) * at.losses).mean()


@dataclass
class _Batch:
    """One (micro-)batch on its way through both passes."""

    closure: Closure
    target: Any
    uniform: float | None
    fraction: float | Tensor = 1.0
    random: RandomState | None = None
    passes: list[_Pass] = field(default_factory=list)

    @property
    def first(self) -> _Pass:
        """The pass at θ."""
        return self.passes[0]

    @property
    def second(self) -> _Pass:
        """The pass at θ + ε, or that at θ where there was no other."""
        return self.passes[-1]


class SharpnessMethod:
    """Sharpness-aware gradients with a weight for each class's share of the loss.

    Args:
        model: The model as the training loop calls it (wrapped by DDP, if it is). Parameters, or
            groups ``{"params": ..., "rho": ..., "adaptive": ...}``, are accepted too; but then
            BatchNorm's running statistics cannot be kept from the second pass.
        weights: A weight per class: `ClassWeights`, a tensor ``[classes]``, or a function that
            takes the target and returns ``[B]`` weights. Or one number for all samples.
        rho: Radius ρ ≥ 0 of the perturbation.
        adaptive: ASAM's element-wise radius, ``ε = ρ T² g / ||T g||`` with ``T = |θ| + η``.
        eta: η of ASAM.
        adaptive_bias: Whether ``T`` also scales vectors (biases and norms); else it is 1 there.
        params: Groups that give some parameters of `model` another ``rho`` or ``adaptive``. The
            norm is over all parameters; a group's ρ scales its slice.
        perturb: Which trainable parameters move: ``None`` (all), a function of a parameter's name
            and the parameter, ``"norm_only"`` or ``"no_norm_bias"``.
        bn_perturbed: ``"freeze"`` updates running statistics in the pass at θ only; ``"update"``
            in both, as the authors' code does.
        rng: ``"replay"`` gives both passes the same dropout; ``"fresh"`` draws anew.
        passes: ``"shared"`` takes both gradients at θ from one graph; ``"recompute"`` runs the
            forward pass again, for models whose graph can be walked only once; ``"auto"`` begins
            with the first and falls back to the second.
        sync: With DDP, ``"local"`` perturbs each process by its own gradient (one all-reduce a
            step), ``"global"`` by the gradient of the joined batch (two). FSDP2 is always global.
        uniform_tol: Treat weights within this relative tolerance of their mean as equal, which
            saves a backward pass; the error is of that order.
        interval: Compute the sharpness term every k-th step only, the plain gradient between.

    Attributes:
        stats: ``"eps_lost"``, for half-precision parameters: the sampled fraction of elements
            that ε was too small to change.

    Raises:
        ValueError: If an argument is out of range, or nothing is trainable.

    Examples:
        >>> model = torch.nn.Linear(4, 3)
        >>> method = SharpnessMethod(model, torch.tensor([0.1, 0.4, 0.8]), rho=0.2)
        >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
        >>> result = method.backward(
        ...     lambda: torch.nn.functional.cross_entropy(model(x), y, reduction="none"), y
        ... )
        >>> result.loss.shape, model.weight.grad.shape
        (torch.Size([]), torch.Size([3, 4]))
    """

    # Factor of the weighted loss (not of its complement); 1 but in ImbSAM's published code.
    _multiplier = 1.0

    def __init__(
        self,
        model: Model,
        weights: ClassWeights | Tensor | Callable[[Any], Tensor] | float,
        rho: float,
        *,
        adaptive: bool = False,
        eta: float = 0.0,
        adaptive_bias: bool = True,
        params: Sequence[Mapping[str, Any]] | None = None,
        perturb: Predicate | Literal["norm_only", "no_norm_bias"] | None = None,
        bn_perturbed: Literal["freeze", "update"] = "freeze",
        rng: Literal["replay", "fresh"] = "replay",
        passes: Literal["auto", "shared", "recompute"] = "auto",
        sync: Literal["local", "global"] = "local",
        uniform_tol: float = 0.0,
        interval: int = 1,
    ) -> None:
        check_choice("bn_perturbed", bn_perturbed, "freeze", "update")
        check_choice("rng", rng, "replay", "fresh")
        check_choice("passes", passes, "auto", "shared", "recompute")
        check_choice("sync", sync, "local", "global")
        check_nonnegative(rho=rho, eta=eta, uniform_tol=uniform_tol)
        if interval < 1:
            raise ValueError(f"interval is {interval}; it must be at least 1")
        self.model = model if isinstance(model, nn.Module) else None
        self.weights = ClassWeights(weights) if isinstance(weights, Tensor) else weights
        self.eta, self.adaptive_bias = eta, adaptive_bias
        self.groups = select_parameters(model, params, perturb=perturb, rho=rho, adaptive=adaptive)
        check_nonnegative(**{f"rho of group {i}": g.rho for i, g in enumerate(self.groups)})
        self.bn_perturbed, self.rng, self.passes = bn_perturbed, rng, passes
        self.uniform_tol, self.interval = uniform_tol, interval
        self.steps = 0
        self.stats: dict[str, float] = {}
        self._norms = norm_layers(self.model)
        self._parallel = Parallel(self.model, sync)
        # FSDP2 reduces gradients in hooks that `torch.autograd.grad` does not run, and to it the
        # parameters inside a reentrant checkpoint look unused.
        self._by_backward, self._graph_seen = self._parallel.sharded, False
        self._inside = False

    @property
    def rho(self) -> float:
        """The largest radius of any group."""
        return max(g.rho for g in self.groups)

    def set_rho(self, rho: float) -> None:
        """Set the radius of every group.

        Raises:
            ValueError: If it is negative or not finite.
        """
        check_nonnegative(rho=rho)
        for group in self.groups:
            group.rho = float(rho)

    def state_dict(self) -> dict[str, Any]:
        """Step counter, radii and interval. Nothing of the model's size has to be saved."""
        return {
            "steps": self.steps,
            "rho": [g.rho for g in self.groups],
            "interval": self.interval,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            ValueError: If the state has another number of groups.
        """
        if len(state["rho"]) != len(self.groups):
            raise ValueError(
                f"the state has {len(state['rho'])} parameter groups, "
                f"this method has {len(self.groups)}"
            )
        for group, rho in zip(self.groups, state["rho"], strict=True):
            group.rho = float(rho)
        self.steps, self.interval = int(state["steps"]), int(state["interval"])

    def backward(
        self,
        closure: Closure,
        target: Any = None,
        *,
        scaler: Any = None,
        accelerator: Any = None,
        backward: Callable[..., Any] | None = None,
        scale: float = 1.0,
    ) -> StepResult:
        """Add this batch's gradient to ``p.grad``, in place of ``loss.backward()``.

        Args:
            closure: Runs the forward pass and returns the per-sample losses ``[B]``, or a pair of
                them and anything else, which comes back as ``aux``. It is called twice.
            target: What the weights are looked up by: labels ``[B]`` or label distributions
                ``[B, classes]``. Not needed where all classes weigh the same. Labels on the CPU
                let a batch of equal weights be noticed, which saves a backward pass.
            scaler: A `torch.amp.GradScaler`. The losses are scaled by it; call its ``step`` and
                ``update`` as always.
            accelerator: An `accelerate.Accelerator`. Its ``backward``, scaler and gradient
                accumulation are used.
            backward: Called with a loss instead of its ``backward()``; with `scaler`, it is the
                one that scales.
            scale: Factor of the gradient: ``1/A`` for A micro-batches, each of which then
                perturbs for itself.

        Raises:
            ValueError: If the closure does not return one loss per label.
            IndexError: If a label (on the CPU) is outside the classes.
            RuntimeError: If called inside `perturbed`, or if the losses do not require gradients.
        """
        engine = Backward(scaler, accelerator, backward, scale)
        batch = _Batch(closure, target, self._uniform(target))
        return self._step([batch], engine)

    def accumulate(
        self,
        closures: Sequence[Closure],
        targets: Sequence[Any],
        *,
        scaler: Any = None,
        accelerator: Any = None,
        backward: Callable[..., Any] | None = None,
    ) -> StepResult:
        """Add the gradient of a batch that comes in micro-batches, with one perturbation for all.

        Two sweeps over the micro-batches give the gradient of the whole batch (BatchNorm apart).

        Args:
            closures: One per micro-batch, as for `backward`; each is called twice.
            targets: One per micro-batch, with a length: micro-batches count by their size.
            scaler: See `backward`.
            accelerator: See `backward`.
            backward: See `backward`.

        Raises:
            ValueError: If there are no micro-batches, or not one target for each.
        """
        if not closures or len(closures) != len(targets):
            raise ValueError(
                f"accumulate takes one target per closure, at least one; got {len(closures)} "
                f"closures and {len(targets)} targets"
            )
        sizes = [_length(t) for t in targets]
        # Which path a micro-batch takes must not depend on its own labels: their sum is one batch.
        uniforms = [self._uniform(t) for t in targets]
        uniform = uniforms[0] if len(set(uniforms)) == 1 else None
        batches = [
            _Batch(closure, target, uniform, size / sum(sizes))
            for closure, target, size in zip(closures, targets, sizes, strict=True)
        ]
        return self._step(batches, Backward(scaler, accelerator, backward))

    @torch.enable_grad()
    def ascent_gradient(self, closure: Closure, target: Any = None) -> list[Tensor | None]:
        """``g_b``, one per perturbed parameter, for training loops that `backward` does not fit.

        ``p.grad`` is left alone. Give the result to `perturbed`.

        Examples:
            >>> model = torch.nn.Linear(2, 1)
            >>> method = SharpnessMethod(model, 1.0, rho=0.1)
            >>> before = model.weight.clone()
            >>> g = method.ascent_gradient(lambda: model(torch.ones(3, 2)).squeeze(1))
            >>> with method.perturbed(g):
            ...     moved = (model.weight - before).norm()
            >>> bool(moved > 0), bool((model.weight == before).all())
            (True, True)
        """
        batch = _Batch(closure, target, self._uniform(target))
        batch.random = RandomState({p.device for p in self._parameters()})
        batch.passes = [self._forward(batch)]
        return self._apart(batch, _weighted, Backward())

    def split(self, losses: Tensor, target: Any = None) -> tuple[Tensor, Tensor]:
        """``(1/B) Σ w l`` and ``(1/B) Σ (1 - w) l`` of per-sample losses, to differentiate apart.

        Args:
            losses: ``[B]``, with their graph.
            target: See `backward`.

        Examples:
            >>> method = SharpnessMethod(torch.nn.Linear(2, 1), torch.tensor([0.25, 1.0]), rho=0.1)
            >>> losses = torch.tensor([4.0, 2.0], requires_grad=True)
            >>> weighted, rest = method.split(losses, torch.tensor([0, 1]))
            >>> weighted.item(), rest.item()
            (1.5, 1.5)
        """
        found = self._forward(_Batch(lambda: losses, target, self._uniform(target)))
        return _weighted(found), _rest(found)

    @contextlib.contextmanager
    def perturbed(self, gradients: Sequence[Tensor | None]) -> Iterator[None]:
        """Hold the parameters at θ + ε inside the block; restore every bit on any exit.

        Args:
            gradients: g, one per perturbed parameter, as `ascent_gradient` gives it.

        Raises:
            RuntimeError: If nested.
        """
        if self._inside:
            raise RuntimeError("perturbed() is already in force; leave that block first")
        parameters, steps, factors, _ = self._displacements(gradients)
        self._inside = True
        try:
            with moved(parameters, steps, factors):
                yield
        finally:
            self._inside = False

    def _parameters(self) -> list[Tensor]:
        return [p for g in self.groups for p in g.params if p.requires_grad]

    def _trainable(self) -> list[Tensor]:
        """Everything a backward pass may reach, perturbed or not."""
        parameters = self._parameters()
        if self.model is None:
            return parameters
        known = {id(p) for p in parameters}
        others = [p for p in self.model.parameters() if p.requires_grad and id(p) not in known]
        return [*parameters, *others]

    @torch.enable_grad()
    def _step(self, batches: Sequence[_Batch], engine: Backward) -> StepResult:
        if self._inside:
            raise RuntimeError("backward() inside perturbed(): leave that block first")
        parameters = self._parameters()
        if not parameters:
            raise ValueError("no parameter to perturb requires a gradient any more")
        self._parallel.reduce_every_pass()
        idle = self.rho == 0 or all(b.uniform == 0 for b in batches)
        active = not idle and self.steps % self.interval == 0
        gradients = self._sweep_at_theta(batches, engine, active)
        norm = None
        if active:
            gradients = self._parallel.mean_gradients(gradients, parameters)
            moving, steps, factors, norm = self._displacements(gradients)
            gradients.clear()
            self._sweep_at_perturbed(batches, engine, norm, moved(moving, steps, factors))
        self.steps += 1
        return self._result(batches, norm, engine)

    def _sweep_at_theta(
        self, batches: Sequence[_Batch], engine: Backward, active: bool
    ) -> list[Tensor | None]:
        """Add ``g_a`` to ``p.grad`` and return ``g_b``; if not active, add the plain gradient."""
        gradients: list[Tensor | None] = []
        devices = {p.device for p in self._parameters()}
        share: Tensor | None = None
        for batch in batches:
            # Without a perturbation, the last pass at θ is the one that DDP synchronises.
            synced = not active and batch is batches[-1]
            with contextlib.nullcontext() if synced else self._parallel.unsynced():
                if active:
                    batch.random = RandomState(devices)
                batch.passes = [self._forward(batch)]
                if share is None and self._parallel.is_global:
                    size = sum(map(_length, (b.target for b in batches[1:])))
                    size += len(batch.first.losses)
                    share = self._parallel.batch_share(size, batch.first.losses.device)
                if share is not None:
                    batch.fraction = batch.fraction * share
                if active:
                    gradients = _added(gradients, self._gradients(batch, engine))
                else:
                    engine.backward(batch.fraction * _mean(batch.first))
        return gradients

    def _sweep_at_perturbed(
        self,
        batches: Sequence[_Batch],
        engine: Backward,
        norm: Tensor,
        at_perturbed: contextlib.AbstractContextManager[None],
    ) -> None:
        """Add ``g_1`` to ``p.grad``."""
        # With a scaler, a norm that overflowed must reach every process as an overflow.
        overflow = engine.overflow(norm)
        self._inside = True
        try:
            with at_perturbed:
                for batch in batches:
                    synced = batch is batches[-1]
                    with contextlib.nullcontext() if synced else self._parallel.unsynced():
                        if self.rng == "replay" and batch.random is not None:
                            batch.random.replay()
                        with frozen_running_stats(self._norms, self.bn_perturbed == "freeze"):
                            batch.passes.append(self._forward(batch))
                        engine.backward(batch.fraction * overflow * _weighted(batch.second))
        finally:
            self._inside = False

    def _uniform(self, target: Any) -> float | None:
        """The weight, if the host knows that all samples have the same. Checks labels early."""
        weights = self.weights
        if isinstance(weights, int | float):
            return float(weights)
        if not isinstance(weights, ClassWeights):
            return None
        if target is None:
            common = weights.uniform(self.uniform_tol)
            if common is None:
                raise ValueError(
                    f"{type(self).__name__} weights each class, so it needs the labels: "
                    "backward(closure, target)"
                )
            return common
        on_host = isinstance(target, Tensor) and (
            target.device.type == "cpu" or weights.check_labels
        )
        looked_up = weights(target, torch.float64) if on_host and len(target) else None
        common = weights.uniform(self.uniform_tol)
        if common is not None:
            return common
        # Processes have to take the same path, and know only their own labels.
        if looked_up is None or target.device.type != "cpu" or not self._parallel.alone:
            return None
        low, high = looked_up.aminmax()
        return low.item() if low == high else None

    def _forward(self, batch: _Batch) -> _Pass:
        output = batch.closure()
        losses, aux = output if isinstance(output, tuple) else (output, None)
        if not isinstance(losses, Tensor) or losses.ndim != 1:
            shape = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"the closure returned {shape} instead of one loss per sample, [B]; "
                "give the criterion reduction='none'"
            )
        if len(losses) == 0:
            raise ValueError("the closure returned no losses: the batch is empty")
        if isinstance(batch.target, Tensor) and len(batch.target) != len(losses):
            raise ValueError(f"{len(losses)} losses for {len(batch.target)} labels")
        if not losses.requires_grad:
            raise RuntimeError("the losses do not depend on any parameter that requires a gradient")
        # Sums of weighted half-precision losses are taken in float32.
        losses = losses if losses.dtype == torch.float64 else losses.float()
        weights = self._lookup(batch.target, losses) if batch.uniform is None else batch.uniform
        return _Pass(losses, weights, self._multiplier, aux)

    def _lookup(self, target: Any, losses: Tensor) -> Tensor:
        weights = self.weights
        assert callable(weights)
        if isinstance(weights, ClassWeights):
            return weights(target, losses.dtype).to(losses.device, non_blocking=True)
        values = weights(target)
        if values.shape != losses.shape:
            raise ValueError(
                f"the weight function returned shape {list(values.shape)} for "
                f"{len(losses)} losses; it must return [B]"
            )
        return values.detach().to(losses.device, losses.dtype, non_blocking=True)

    def _gradients(self, batch: _Batch, engine: Backward) -> list[Tensor | None]:
        """Return ``g_b`` and add ``g_a`` to ``p.grad``."""
        uniform = batch.uniform
        if uniform is not None and uniform > 0:
            # g_a is a multiple of g_b, so one backward pass gives both.
            if uniform == 1:
                return self._apart(batch, _mean, engine)
            if abs(1 - uniform) > SHORTCUT_MARGIN:
                found = self._by_real_backward(batch, _rest, engine, keep=True)
                ratio = self._multiplier * uniform / (1 - uniform)
                torch._foreach_mul_([g for g in found if g is not None], ratio)
                return found
        if self.passes != "recompute":
            try:
                found = self._apart(batch, _weighted, engine, retain_graph=True)
                engine.backward(batch.fraction * _rest(batch.first))
                return found
            except RuntimeError as error:
                if self.passes == "shared" or "donated buffer" not in str(error):
                    raise
            warnings.warn(
                "torch.compile made a graph that can be walked only once, so each step runs one "
                "more forward pass from here on; passes='recompute' says so from the start",
                stacklevel=5,
            )
            self.passes = "recompute"
            batch.passes = [self._once_more(batch)]
        found = self._apart(batch, _weighted, engine)
        engine.backward(batch.fraction * _rest(self._once_more(batch)))
        return found

    def _apart(
        self,
        batch: _Batch,
        value: Callable[[_Pass], Tensor],
        engine: Backward,
        *,
        retain_graph: bool = False,
    ) -> list[Tensor | None]:
        """The gradient of a loss with respect to the perturbed parameters, not in ``p.grad``."""
        loss = batch.fraction * value(batch.first)
        if not self._graph_seen:
            self._graph_seen = True
            self._by_backward |= uses_reentrant_checkpointing(loss)
        if not self._by_backward:
            return engine.gradient(loss, self._parameters(), retain_graph=retain_graph)
        return self._by_real_backward(batch, value, engine, keep=False, retain_graph=retain_graph)

    def _by_real_backward(
        self,
        batch: _Batch,
        value: Callable[[_Pass], Tensor],
        engine: Backward,
        *,
        keep: bool,
        retain_graph: bool = False,
    ) -> list[Tensor | None]:
        return engine.gradient_by_backward(
            batch.fraction * value(batch.first),
            self._parameters(),
            self._trainable(),
            keep=keep,
            retain_graph=retain_graph,
        )

    def _once_more(self, batch: _Batch) -> _Pass:
        """The forward pass at θ again, as if for the first time."""
        assert batch.random is not None
        batch.random.replay()
        with frozen_running_stats(self._norms):
            return self._forward(batch)

    def _displacements(
        self, gradients: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], list[Tensor], list[float], Tensor]:
        """The parameters that move, their ε with factors, and the norm of ``g_b``."""
        members = [(p, g) for g in self.groups for p in g.params if p.requires_grad]
        if len(gradients) != len(members):
            raise ValueError(f"{len(gradients)} gradients for {len(members)} parameters")
        used = [(p, g, d) for (p, g), d in zip(members, gradients, strict=True) if d is not None]
        if not used:
            raise RuntimeError("the losses do not depend on any of the perturbed parameters")
        if any(d.layout != torch.strided for _, _, d in used):
            raise NotImplementedError(
                "a parameter has a sparse gradient; build its embedding with sparse=False"
            )
        parameters = [p for p, _, _ in used]
        steps, factors, norm = displacements(
            [d for _, _, d in used],
            parameters,
            rho=[g.rho for _, g, _ in used],
            adaptive=[g.adaptive and (self.adaptive_bias or p.ndim > 1) for p, g, _ in used],
            eta=self.eta,
        )
        if self.steps % LOST_EVERY == 0:
            self._watch_precision(parameters, steps)
        return parameters, steps, factors, norm

    def _watch_precision(self, parameters: Sequence[Tensor], steps: Sequence[Tensor]) -> None:
        """Say so when ε vanishes in the rounding of half-precision parameters."""
        halves = (torch.float16, torch.bfloat16)
        lost = [
            lost_fraction(p, s) for p, s in zip(parameters, steps, strict=True) if p.dtype in halves
        ]
        if not lost:
            return
        self.stats["eps_lost"] = torch.stack([f.cpu() for f in lost]).mean().item()
        if self.stats["eps_lost"] > 0.5:
            warnings.warn(
                f"{100 * self.stats['eps_lost']:.0f} % of the perturbation is lost to the rounding "
                "of half-precision parameters; keep the parameters in float32 and use autocast",
                stacklevel=5,
            )

    def _result(
        self, batches: Sequence[_Batch], norm: Tensor | None, engine: Backward
    ) -> StepResult:

        def total(value: Callable[[_Batch], Tensor]) -> Tensor:
            return torch.stack([b.fraction * value(b) for b in batches]).sum()

        with torch.no_grad():
            loss = total(lambda b: _mean(b.first))
            perturbed = total(lambda b: _mean(b.second))
            sharpness = total(lambda b: _weighted(b.second) - _weighted(b.first))
            norm = torch.zeros_like(loss) if norm is None else engine.unscaled(norm).to(loss.device)
            skipped = ~(loss.isfinite() & norm.isfinite())
        aux = [b.first.aux for b in batches]
        return StepResult(
            loss, perturbed, sharpness, norm, skipped, aux if len(batches) > 1 else aux[0]
        )


def _length(target: Any) -> int:
    try:
        return len(target)
    except TypeError:
        raise ValueError("accumulate needs targets with a length, to weigh the batches") from None


def _added(total: list[Tensor | None], found: list[Tensor | None]) -> list[Tensor | None]:
    """The sum of two lists of gradients, in place where both are there."""
    if not total:
        return found
    pairs = [(a, b) for a, b in zip(total, found, strict=True) if a is not None and b is not None]
    sums = iter(torch._foreach_add([a for a, _ in pairs], [b for _, b in pairs]) if pairs else ())
    return [
        b if a is None else a if b is None else next(sums)
        for a, b in zip(total, found, strict=True)
    ]

"""The distillation objective from hidden states: heads and loss chunk by chunk, no [N, V] logits.

At a vocabulary of 151,936, the float32 logits of 8,192 tokens are 5 GB, and a chain of softmaxes,
powers and products keeps ten copies. Here a chunk's logits exist only until their gradient has been
multiplied into the gradients of the hidden states and of the head.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from abkd._checks import (
    IGNORE_INDEX,
    check_chunk_size,
    check_floating,
    detached_teacher,
    uncompiled,
    wants_grad,
)
from abkd.divergence import chunk_rows, scaled_gradient, upcast, wide
from abkd.objective import (
    DenseChunk,
    DistillationOutput,
    HardLabels,
    Objective,
    TeacherChunk,
    WeightFunction,
    label_gradient,
    prepare,
    settings_among,
)
from abkd.terms import Terms
from abkd.vocab import shared_size
from shared_core.errors import InputError

__all__ = ["fused_linear_ab_divergence"]


@dataclass(frozen=True)
class Head:
    """From hidden states to logits: z = cap·tanh(scale·(W h + b)/cap) on the first `classes`."""

    classes: int
    scale: float
    softcap: float | None

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Float32 (or float64) logits ``[C, classes]``."""
        some = None if bias is None else bias[: self.classes]
        found = wide(torch.nn.functional.linear(hidden, weight[: self.classes], some))
        if self.scale != 1:
            found.mul_(self.scale)
        if self.softcap is not None:
            found.div_(self.softcap).tanh_().mul_(self.softcap)
        return found

    def slope(self, logits: Tensor) -> Tensor | float:
        """How the logits move with W h + b."""
        if self.softcap is None:
            return self.scale
        return (logits / self.softcap).square_().neg_().add_(1).mul_(self.scale)


class _FusedLoss(torch.autograd.Function):
    """Loss, label logits and logsumexp; all gradients are made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        teacher: Callable[[Tensor], TeacherChunk],
        objective: Objective,
        rows: Tensor,
        chunk: int,
        part: int,
        with_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        objective.allocate(upcast(hidden[:0]).dtype, hidden.device)
        gradients = _Gradients(hidden, weight, bias, ctx.needs_input_grad if with_grad else None)

        def one_chunk(at: Tensor) -> None:  # whose logits are gone before the next one's are made
            h = hidden[at]
            logits = head.logits(h, weight, bias)
            theirs = teacher(at)
            for start in range(0, len(at), part):
                some = slice(start, start + part)
                mine = logits[some]
                slope = head.slope(mine) if with_grad else 1.0
                objective.chunk(mine, theirs.part(some), at[some], with_grad)
                _through(mine, slope)
            if with_grad:
                gradients.add(at, h, weight, logits)

        for at in torch.split(rows, chunk):
            one_chunk(at)
        ctx.rows, ctx.chunk, ctx.head = rows, chunk, head
        ctx.save_for_backward(hidden, weight, bias, objective.results["target"], *gradients.all)
        ctx.set_materialize_grads(False)
        return objective.differentiable()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_loss: Any, by_label: Any, by_lse: Any) -> Any:
        hidden, weight, bias, target, *kept = ctx.saved_tensors
        if by_loss is None:
            scaled = [None if g is None else torch.zeros_like(g) for g in kept]
        else:
            scaled = [None if g is None else scaled_gradient(g, by_loss) for g in kept]
        if by_label is not None or by_lse is not None:
            gradients = _Gradients(hidden, weight, bias, ctx.needs_input_grad, scaled)
            for at in torch.split(ctx.rows, ctx.chunk):
                h = hidden[at]
                logits = ctx.head.logits(h, weight, bias)
                slope = ctx.head.slope(logits)
                found = label_gradient(logits, target[at], at, by_label, by_lse)
                gradients.add(at, h, weight, _through(found, slope))
            scaled = gradients.all
        inputs = (hidden, weight, bias)
        out = [None if g is None else g.to(t.dtype) for g, t in zip(scaled, inputs, strict=True)]
        return *out, None, None, None, None, None, None, None


def _through(gradient: Tensor, slope: Tensor | float) -> Tensor:
    """The gradient by W h + b, in place of that by the logits."""
    return gradient if isinstance(slope, float) and slope == 1 else gradient.mul_(slope)


class _Gradients:
    """The gradients by hidden states, weight and bias, of which only the wanted ones exist.

    The head's are summed in float32 whatever the weights' type.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        wanted: Sequence[bool] | None,
        start: list[Tensor | None] | None = None,
    ) -> None:
        if start is None:
            start = [None, None, None]
            for i, tensor in enumerate((hidden, weight, bias)):
                if wanted is not None and wanted[i] and tensor is not None:
                    dtype = hidden.dtype if i == 0 else upcast(tensor[:0]).dtype
                    start[i] = torch.zeros_like(tensor, dtype=dtype)
        self.all = start

    def add(self, at: Tensor, h: Tensor, weight: Tensor, by_logits: Tensor) -> None:
        """Add a chunk's part, given the loss's gradient by W h + b ``[C, classes]``."""
        by_hidden, by_weight, by_bias = self.all
        classes = by_logits.shape[-1]
        if by_bias is not None:
            by_bias[:classes] += by_logits.sum(0)
        low = by_logits.to(h.dtype)
        if by_hidden is not None:
            by_hidden[at] += low @ weight[:classes]
        if by_weight is not None:
            if by_weight.dtype == h.dtype:
                by_weight[:classes].addmm_(low.t(), h)
            else:
                by_weight[:classes] += low.t() @ h


def fused_linear_ab_divergence(
    student_hidden: Float[Tensor, "*batch student_width"],
    student_weight: Float[Tensor, "student_rows student_width"],
    teacher_hidden: Float[Tensor, "*batch teacher_width"],
    teacher_weight: Float[Tensor, "teacher_rows teacher_width"],
    *,
    alpha: float = 0.2,
    beta: float = 0.7,
    labels: Int[Tensor, "*batch"] | None = None,
    mask: Bool[Tensor, "*batch"] | Float[Tensor, "*batch"] | None = None,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    token_weight: Float[Tensor, "*batch"] | None = None,
    ce_token_weight: Float[Tensor, "*batch"] | None = None,
    weight_fn: WeightFunction | None = None,
    hard_labels: HardLabels = "labels",
    statistics: Sequence[str] = (),
    return_label_logits: bool = False,
    student_bias: Float[Tensor, " student_rows"] | None = None,
    teacher_bias: Float[Tensor, " teacher_rows"] | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    divergence: str | Terms = "ab",
    mix: float | None = None,
    temperature: float = 1.0,
    temperature_power: float = 0.0,
    chunk_size: int | str = "auto",
    n_valid: Tensor | float | None = None,
    vocab: int | str = "strict",
    detach_teacher: bool = False,
    ignore_index: int = IGNORE_INDEX,
) -> DistillationOutput:
    """`abkd.distillation_loss` computed from hidden states and heads, without logits of all tokens.

    Tokens that do not count are dropped before the heads. A frozen head costs no weight gradient.
    Nothing of shape ``[N, V]`` is made while the chunk is smaller than N.

    Args:
        student_hidden: ``[..., Hs]``, aligned with the labels (shift them before).
        student_weight: The head, ``[Vs, Hs]``.
        teacher_hidden: ``[..., Ht]``; gets no gradient.
        teacher_weight: ``[Vt, Ht]``; gets no gradient.
        alpha: α.
        beta: β.
        labels: See `abkd.distillation_loss`, as all that is not listed here.
        mask: Which tokens count, beside the labels.
        kd_weight: Weight of the soft term.
        ce_weight: Weight of the hard term.
        token_weight: u per token.
        ce_token_weight: v per token.
        weight_fn: ``TokenStatistics -> (soft [C], hard [C])``, called once a chunk.
        hard_labels: ``labels``, ``teacher_argmax`` or ``both_agree``.
        statistics: Names of statistics to return for every token.
        return_label_logits: Return the hard label's logit and logsumexp, differentiable: their
            backward recomputes the logits of a chunk at a time.
        student_bias: ``[Vs]``.
        teacher_bias: ``[Vt]``.
        student_softcap: c in z = c·tanh(z/c) (Gemma).
        teacher_softcap: The teacher's.
        student_logit_scale: A factor of the logits, before the cap (Cohere; 1/scaling in Granite).
        teacher_logit_scale: The teacher's.
        divergence: A name of `abkd.DIVERGENCES`, or terms.
        mix: See `abkd.divergence_terms`.
        temperature: τ.
        temperature_power: r in τ^r.
        chunk_size: Tokens computed at once, or ``auto``.
        n_valid: The denominator.
        vocab: What to do with heads of unequal size: ``strict`` refuses, ``intersection`` cuts
            both to the smaller, and a number cuts both to it (the tokenizer's length, so that
            padding rows of the heads have no part; see `abkd.align_vocab`).
        detach_teacher: Accept a teacher that requires gradients.
        ignore_index: The label of tokens that do not count.

    Raises:
        InputError: As `abkd.distillation_loss`; also if hidden states and heads do not fit.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> h, W = torch.randn(6, 4), torch.nn.Parameter(torch.randn(11, 4))
        >>> out = fused_linear_ab_divergence(
        ...     h, W, torch.randn(6, 8), torch.randn(12, 8), vocab=10, chunk_size=2,
        ...     statistics=["teacher_entropy"])
        >>> out.loss.backward()
        >>> W.grad[10].tolist(), out.statistics["teacher_entropy"].shape
        ([0.0, 0.0, 0.0, 0.0], torch.Size([6]))
    """
    settings = settings_among(locals())
    classes = shared_size(len(student_weight), len(teacher_weight), vocab)
    _check_heads(student_hidden, student_weight, "student")
    _check_heads(teacher_hidden, teacher_weight, "teacher")
    if student_hidden.shape[:-1] != teacher_hidden.shape[:-1]:
        raise InputError(
            f"student_hidden has shape {list(student_hidden.shape)} and teacher_hidden "
            f"{list(teacher_hidden.shape)}; all but the last dimension have to be equal"
        )
    teacher_inputs = [
        None if t is None else detached_teacher(t, detach_teacher)
        for t in (teacher_hidden, teacher_weight, teacher_bias)
    ]
    th, tw, tb = _autocast(*teacher_inputs)
    assert th is not None
    assert tw is not None
    flat = th.reshape(-1, th.shape[-1])
    teacher_head = Head(classes, teacher_logit_scale, teacher_softcap)

    def teacher(at: Tensor) -> TeacherChunk:
        return DenseChunk(teacher_head.logits(flat[at], tw, tb))

    head = Head(classes, student_logit_scale, student_softcap)
    return fused_loss(
        student_hidden, student_weight, student_bias, head, teacher, chunk_size, settings
    )


@uncompiled
def fused_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    head: Head,
    teacher: Callable[[Tensor], TeacherChunk],
    chunk_size: int | str,
    settings: dict[str, Any],
) -> DistillationOutput:
    """The objective from the student's hidden states with any kind of teacher."""
    check_chunk_size(chunk_size)
    shape = hidden.shape[:-1]
    objective, rows = prepare(shape, head.classes, hidden.device, **settings)
    with_grad = wants_grad(hidden, weight, bias)
    low, low_weight, low_bias = _autocast(hidden, weight, bias)
    assert low is not None
    with torch.autocast(hidden.device.type, enabled=False):
        found = _FusedLoss.apply(
            low.reshape(-1, hidden.shape[-1]),
            low_weight,
            low_bias,
            head,
            teacher,
            objective,
            rows,
            # Each chunk reads and writes the whole head once, so it wants many rows; what is done
            # to their logits wants no more of them than the cache holds.
            chunk_rows(chunk_size, head.classes, hidden.device, cpu=1 << 21, least=64),
            chunk_rows(None, head.classes, hidden.device, cpu=1 << 19),
            with_grad,
        )
    return objective.output(shape, *found)


def _autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """What autocast would do to the inputs of a linear layer; without it, one common dtype."""
    first = next(t for t in tensors if t is not None)
    kind = first.device.type
    if first.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    else:
        dtype = first.dtype
    return [None if t is None else t.to(dtype) for t in tensors]


def _check_heads(hidden: Tensor, weight: Tensor, who: str) -> None:
    check_floating(**{f"{who}_hidden": hidden, f"{who}_weight": weight})
    if weight.ndim != 2 or hidden.shape[-1] != weight.shape[-1]:
        raise InputError(
            f"{who}_hidden has shape {list(hidden.shape)} and {who}_weight {list(weight.shape)}; "
            "they must be [..., H] and [V, H] with the same H"
        )
    if hidden.device != weight.device:
        raise InputError(
            f"{who}_hidden is on {hidden.device} and {who}_weight on {weight.device}; "
            "move them to one device"
        )

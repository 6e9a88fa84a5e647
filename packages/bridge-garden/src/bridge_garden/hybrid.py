"""The hybrid loss: soft and hard labels mixed token by token, over one denominator.

    ℓ = 1/n Σ_t [ λ_t D(π_T ‖ π_θ) + (1 - λ_t) (-log π_θ(a*_t) + (α/4) Δ_t²) ]

n, the number of valid tokens, divides all three terms. `hybrid_loss` takes logits;
`fused_hybrid_loss` takes hidden states and heads and never holds logits of all tokens.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

import abkd
from abkd import DistillationOutput, TokenStatistics
from bridge_garden._one_pass import LabelLogits, OnePassRisk, one_pass
from bridge_garden.risk import Risk, discounts, reduce_risk, risk_terms
from bridge_garden.weights import Confidence, StepInfo, Weight, checked_weight, weight_from_string
from shared_core.errors import InputError

__all__ = ["HybridOutput", "fused_hybrid_loss", "hybrid_loss"]

Divergence = str | tuple[str, float, float]
HardLabels = Literal["teacher_argmax", "labels", "both_agree"]

IGNORE = -100


@dataclass
class HybridOutput:
    """What a hybrid loss returns.

    Attributes:
        loss: The objective, a scalar with gradient: soft + hard + risk.
        soft: Σ λ D / n, without gradient.
        hard: Σ (1 - λ) CE / n, without gradient.
        risk: The penalty's part of the loss, without gradient.
        weight: λ of each token, 0 where masked.
        weight_mean: Mean λ of the valid tokens.
        bridge_fraction: Share of the valid tokens with λ < 0.2.
        garden_fraction: Share with λ > 0.8.
        n_valid: The denominator.
        per_token_soft: D of each token, unweighted, 0 where masked.
        per_token_hard: Cross-entropy of each token, likewise.
        statistics: The teacher statistics asked for, per token.
    """

    loss: Tensor
    soft: Tensor
    hard: Tensor
    risk: Tensor
    weight: Tensor
    weight_mean: Tensor
    bridge_fraction: Tensor
    garden_fraction: Tensor
    n_valid: Tensor | float
    per_token_soft: Tensor
    per_token_hard: Tensor
    statistics: dict[str, Tensor]


@dataclass
class HybridPlan:
    """What both losses share: abkd's settings, and what is needed to finish."""

    labels: Tensor | None
    valid: Tensor
    risk: Risk | None
    segments: Tensor | None
    hard_labels: str
    settings: dict[str, Any]
    in_pass: OnePassRisk | None = None

    def finish(self, out: DistillationOutput) -> HybridOutput:
        """Add the risk, and say what was seen."""
        loss, hard, risk = out.loss, out.ce, torch.zeros_like(out.loss.detach())
        if self.in_pass is not None:
            loss, hard, risk = self.in_pass.finish(out)
        elif self.risk is not None:
            penalty = self._penalty(self.risk, out)
            loss, risk = loss + penalty, penalty.detach()
        count = self.valid.sum().clamp(min=1)
        weight = out.soft_weight
        return HybridOutput(
            loss,
            out.kd,
            hard,
            risk,
            weight,
            weight.sum() / count,
            (self.valid & (weight < 0.2)).sum() / count,
            (self.valid & (weight > 0.8)).sum() / count,
            out.n_valid,
            out.per_token_kd,
            out.per_token_ce,
            out.statistics,
        )

    def fuse(self, logits: LabelLogits) -> None:
        """Have the risk penalty in the one pass over a head's chunks, where that can be."""
        if self.risk is None or not one_pass(self.risk, self.hard_labels):
            return
        assert self.labels is not None
        weight_fn = self.settings["weight_fn"]
        self.in_pass = OnePassRisk(
            logits,
            lambda seen: weight_fn(seen)[0],
            self.risk,
            self.labels,
            self.valid,
            self.segments,
            self.hard_labels,
        )
        self.settings.update(weight_fn=self.in_pass, return_label_logits=False)

    def _penalty(self, risk: Risk, out: DistillationOutput) -> Tensor:
        assert self.labels is not None
        assert out.label_logit is not None
        assert out.student_lse is not None
        follows = None
        if self.hard_labels != "labels":
            follows = out.statistics["teacher_argmax"] == self.labels
        each, ends = risk_terms(
            out.label_logit,
            out.student_lse,
            self.valid,
            risk,
            follows=follows,
            segments=self.segments,
        )
        share = 1 - out.soft_weight
        return reduce_risk(share * each, share * ends, self.valid, out.n_valid, self.segments)


def plan_hybrid(
    shape: torch.Size,
    device: torch.device,
    labels: Tensor | None,
    mask: Tensor | None,
    *,
    weight: Weight | str,
    divergence: Divergence,
    hard_labels: str,
    risk: Risk | None,
    temperature: float,
    temperature_power: float,
    segments: Tensor | None,
    n_valid: Tensor | float | None,
    at: StepInfo,
    statistics: tuple[str, ...],
) -> HybridPlan:
    if hard_labels not in ("teacher_argmax", "labels", "both_agree"):
        raise InputError(
            f"hard_labels is {hard_labels!r}; accepted: teacher_argmax, labels, both_agree"
        )
    for name, given in (("labels", labels), ("mask", mask), ("segments", segments)):
        if given is not None and given.shape != shape:
            raise InputError(f"{name} has shape {list(given.shape)}; the tokens are {list(shape)}")
    found = weight_from_string(weight) if isinstance(weight, str) else weight
    valid = torch.ones(shape, dtype=torch.bool, device=device)
    if mask is not None:
        valid = valid & mask.bool()
    if labels is not None:
        valid = valid & (labels != IGNORE)
    discount = None
    if risk is not None:
        if labels is None or len(shape) != 2:
            raise InputError(
                "risk compares a token with the one that follows: pass labels, and logits [B, T, V]"
            )
        if hard_labels != "labels":
            statistics = tuple(dict.fromkeys([*statistics, "teacher_argmax"]))
        if risk.gamma != 1:
            discount = discounts(valid, risk.gamma, segments)

    def weight_fn(seen: TokenStatistics) -> tuple[Tensor, Tensor]:
        lam = checked_weight(found, seen, at)
        return lam, 1 - lam

    name, *exponents = (divergence,) if isinstance(divergence, str) else divergence
    settings: dict[str, Any] = {
        "divergence": name,
        "temperature": temperature,
        "temperature_power": temperature_power,
        "kd_weight": 1.0,
        "ce_weight": 1.0,
        "labels": labels,
        "mask": mask,
        "ce_token_weight": discount,
        "weight_fn": weight_fn,
        "hard_labels": hard_labels,
        "n_valid": n_valid,
        "statistics": statistics,
        "return_label_logits": risk is not None,
    }
    if exponents:
        settings["alpha"], settings["beta"] = exponents
    return HybridPlan(labels, valid, risk, segments, hard_labels, settings)


def _shifted(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t[:, 1:] for t in tensors]


def hybrid_loss(
    student_logits: Float[Tensor, "*batch student_classes"],
    teacher_logits: Float[Tensor, "*batch teacher_classes"],
    labels: Int[Tensor, "*batch"] | None = None,
    *,
    weight: Weight | str = Confidence(),  # noqa: B008 - frozen
    divergence: Divergence = "fkl",
    hard_labels: HardLabels = "teacher_argmax",
    risk: Risk | None = None,
    temperature: float = 1.0,
    temperature_power: float = 0.0,
    mask: Bool[Tensor, "*batch"] | None = None,
    segments: Int[Tensor, "*batch"] | None = None,
    n_valid: Tensor | float | None = None,
    vocab: int | None = None,
    shift: bool = False,
    at: StepInfo = StepInfo(),  # noqa: B008 - frozen
    statistics: tuple[str, ...] = (),
) -> HybridOutput:
    """Hybrid hard- and soft-label distillation from logits.

    Args:
        student_logits: ``[..., V]``; those at t predict ``labels[t]``, unless `shift`.
        teacher_logits: The same tokens'; gets no gradient.
        labels: Tokens of the data; -100 marks those that do not count. May be left out with
            ``hard_labels="teacher_argmax"`` and no risk.
        weight: λ: a weight of `bridge_garden.weights`, its name, or any callable.
        divergence: Of the soft term: a name of `abkd.DIVERGENCES`, or ``("ab", α, β)``.
        hard_labels: ``teacher_argmax`` (the theory's), ``labels`` (the paper's LLM runs), or
            ``both_agree``: labels where they are the teacher's argmax, no hard term elsewhere.
        risk: Settings of the risk-guided hard label, if wanted.
        temperature: τ of the soft term; weights and hard term are at 1.
        temperature_power: r in τ^r, a factor of the soft term.
        mask: Which tokens count, beside the labels.
        segments: Ids of the sequences packed in a row, which risk does not cross.
        n_valid: The denominator of all terms; by default the valid tokens. Pass the global number
            under gradient accumulation or data parallelism.
        vocab: Cut both to this many classes (the tokenizer's length), where heads are padded.
        shift: Logits at t predict ``labels[t + 1]`` of ``[B, T]``, as transformers gives them.
        at: Where training stands, for the curriculum.
        statistics: Names of `abkd.TokenStatistics` to return per token.

    Returns:
        The loss and its parts; 0 where no token counts.

    Raises:
        InputError: If the weight leaves [0, 1] or is NaN, shapes or vocabularies differ, labels
            are missing or impossible, or a name is unknown.

    Examples:
        >>> student = torch.zeros(1, 2, 3, requires_grad=True)
        >>> teacher = torch.tensor([[[9.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])
        >>> out = hybrid_loss(student, teacher, weight="confidence")
        >>> out.weight
        tensor([[2.4670e-04, 6.6667e-01]])
        >>> out.loss.backward()
    """
    if vocab is not None:
        sizes = student_logits.shape[-1], teacher_logits.shape[-1]
        if not 1 <= vocab <= min(sizes):
            raise InputError(f"vocab is {vocab}; accepted: 1 to {min(sizes)}, the smaller head")
        student_logits, teacher_logits = student_logits[..., :vocab], teacher_logits[..., :vocab]
    if shift:
        labels, mask, segments = _shifted(labels, mask, segments)
        student_logits, teacher_logits = student_logits[:, :-1], teacher_logits[:, :-1]
    plan = plan_hybrid(
        student_logits.shape[:-1],
        student_logits.device,
        labels,
        mask,
        weight=weight,
        divergence=divergence,
        hard_labels=hard_labels,
        risk=risk,
        temperature=temperature,
        temperature_power=temperature_power,
        segments=segments,
        n_valid=n_valid,
        at=at,
        statistics=statistics,
    )
    return plan.finish(abkd.distillation_loss(student_logits, teacher_logits, **plan.settings))


def fused_hybrid_loss(
    student_hidden: Float[Tensor, "*batch student_width"],
    student_weight: Float[Tensor, "student_rows student_width"],
    teacher_hidden: Float[Tensor, "*batch teacher_width"],
    teacher_weight: Float[Tensor, "teacher_rows teacher_width"],
    labels: Int[Tensor, "*batch"] | None = None,
    *,
    weight: Weight | str = Confidence(),  # noqa: B008 - frozen
    divergence: Divergence = "fkl",
    hard_labels: HardLabels = "teacher_argmax",
    risk: Risk | None = None,
    temperature: float = 1.0,
    temperature_power: float = 0.0,
    mask: Bool[Tensor, "*batch"] | None = None,
    segments: Int[Tensor, "*batch"] | None = None,
    n_valid: Tensor | float | None = None,
    vocab: int | str = "strict",
    shift: bool = False,
    at: StepInfo = StepInfo(),  # noqa: B008 - frozen
    statistics: tuple[str, ...] = (),
    **head_options: Any,
) -> HybridOutput:
    """`hybrid_loss` from hidden states and heads: no ``[N, V]`` tensor is made.

    Args:
        student_hidden: ``[..., Hs]``.
        student_weight: The head, ``[Vs, Hs]``.
        teacher_hidden: ``[..., Ht]``.
        teacher_weight: ``[Vt, Ht]``.
        labels: See `hybrid_loss`, as all that is not listed here.
        weight: λ.
        divergence: Of the soft term.
        hard_labels: Which hard label.
        risk: The risk-guided hard label.
        temperature: τ.
        temperature_power: r in τ^r.
        mask: Which tokens count.
        segments: Ids of packed sequences.
        n_valid: The denominator.
        vocab: ``strict``, ``intersection``, or the number of classes that both heads are cut to;
            rows beyond it are never a label and have no part in log V.
        shift: Hidden states at t predict ``labels[t + 1]``.
        at: Where training stands.
        statistics: Names of statistics to return.
        head_options: ``student_bias``, ``teacher_bias``, ``student_softcap``,
            ``teacher_softcap``, ``student_logit_scale``, ``teacher_logit_scale``, ``chunk_size``;
            see `abkd.fused_linear_ab_divergence`.

    Raises:
        InputError: As `hybrid_loss`.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> h, W = torch.randn(2, 3, 4), torch.nn.Parameter(torch.randn(11, 4))
        >>> out = fused_hybrid_loss(h, W, torch.randn(2, 3, 8), torch.randn(11, 8))
        >>> out.loss.backward()
        >>> W.grad.shape
        torch.Size([11, 4])
    """
    if shift:
        labels, mask, segments = _shifted(labels, mask, segments)
        student_hidden, teacher_hidden = student_hidden[:, :-1], teacher_hidden[:, :-1]
    plan = plan_hybrid(
        student_hidden.shape[:-1],
        student_hidden.device,
        labels,
        mask,
        weight=weight,
        divergence=divergence,
        hard_labels=hard_labels,
        risk=risk,
        temperature=temperature,
        temperature_power=temperature_power,
        segments=segments,
        n_valid=n_valid,
        at=at,
        statistics=statistics,
    )
    plan.fuse(
        LabelLogits(
            student_hidden.flatten(0, -2),
            student_weight,
            head_options.get("student_bias"),
            head_options.get("student_softcap"),
            head_options.get("student_logit_scale", 1.0),
        )
    )
    out = abkd.fused_linear_ab_divergence(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        vocab=vocab,
        **plan.settings,
        **head_options,
    )
    return plan.finish(out)

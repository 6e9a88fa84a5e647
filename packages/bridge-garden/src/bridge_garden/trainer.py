"""Hybrid distillation with the trainer of Hugging Face transformers.

A script that distils with `abkd.trainer` changes two names; one that fine-tunes with
`transformers.Trainer` also adds a teacher::

    from bridge_garden.trainer import HybridConfig, HybridTrainer

    args = HybridConfig("out", weight="confidence", bf16=True)
    trainer = HybridTrainer(student, teacher, args, train_dataset=data, processing_class=tokenizer)
    trainer.train()

Adapters, accumulation, several processes, resuming, top-k teachers and on-policy data are
`abkd.trainer`'s own.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from abkd import DistillationOutput, TokenStatistics
from abkd.trainer import DistillationConfig, DistillationTrainer, ModelSide
from bridge_garden._one_pass import LabelLogits
from bridge_garden.hybrid import HybridOutput, HybridPlan
from bridge_garden.risk import Risk, discounts
from bridge_garden.weights import StepInfo, Weight, checked_weight, weight_from_string
from shared_core.errors import InputError

__all__ = ["HybridConfig", "HybridTrainer"]


@dataclass
class HybridConfig(DistillationConfig):
    """`abkd.trainer.DistillationConfig` with the settings of the hybrid loss.

    The soft term is the forward KL with no factor τ², both terms have weight 1, and λ shares.

    Args:
        weight: λ, as `bridge_garden.weight_from_string` reads it.
        hard_labels: ``teacher_argmax``, ``labels`` (the paper's LLM runs) or ``both_agree``.
        risk_alpha: α of the risk-guided hard label; 0 is without.
        risk_gamma: γ.
        risk_terminal: ``skip`` or ``official``.
        nonfinite: What to do with a micro-batch whose loss is not finite: ``raise``, or ``skip``
            (it adds no gradient and is counted in the log as ``skipped``; its tokens stay in the
            step's denominator).

    With `on_policy_fraction` above 0 (0.2 in the authors' on-policy runs, with λ = 0.1), some
    micro-batches hold the student's own responses; the hard label is then the teacher's argmax.

    Examples:
        >>> HybridConfig("out", weight="static:0.2", hard_labels="labels", use_cpu=True).weight
        'static:0.2'
    """

    divergence: str = "fkl"
    temperature_power: float = 0.0
    ce_weight: float = 1.0
    weight: str = "confidence"
    hard_labels: str = "teacher_argmax"
    risk_alpha: float = 0.0
    risk_gamma: float = 1.0
    risk_terminal: str = "skip"
    nonfinite: str = "raise"


class HybridTrainer(DistillationTrainer):
    """`abkd.trainer.DistillationTrainer` with hard and soft labels mixed token by token.

    The curriculum follows optimizer steps, so that accumulation does not advance it and a resumed
    run continues it. Beside abkd's, the log has ``weight`` (mean λ), ``bridge_fraction``
    (λ < 0.2), ``garden_fraction`` (λ > 0.8) and ``risk``; with ``nonfinite="skip"`` also
    ``skipped``, the micro-batches without a finite loss since the last line.

    Args:
        args: See `abkd.trainer.DistillationTrainer`, as all that is not listed here.
        weight: λ as a callable, instead of the configuration's name.
        options: As above.

    Attributes:
        weight: λ.
        last_output: Of the last micro-batch, without gradient; ``None`` before.

    Raises:
        InputError: If a setting is impossible; if a loss is not finite, in training with
            ``nonfinite="raise"`` and always in evaluation; if the student's weights no longer are.
    """

    def __init__(self, *args: Any, weight: Weight | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        config = self.args
        self.weight = weight if weight is not None else weight_from_string(config.weight)
        self._risk: Risk | None = None
        if config.risk_alpha:
            self._risk = Risk(config.risk_alpha, config.risk_gamma, config.risk_terminal)
        self._valid: Tensor | None = None
        self._segments: Tensor | None = None
        self._fused: tuple[HybridPlan, LabelLogits] | None = None
        self.last_output: HybridOutput | None = None
        self._seen: dict[str, Tensor] = {}
        self._skipped = 0
        if config.nonfinite == "skip" and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise InputError(
                "a micro-batch of a sharded student cannot be skipped; use nonfinite='raise'"
            )

    @staticmethod
    def _check(args: Any) -> None:
        DistillationTrainer._check(args)
        if not isinstance(args, HybridConfig):
            raise InputError(f"args are {type(args).__name__}; pass a HybridConfig")
        if args.nonfinite not in ("raise", "skip"):
            raise InputError(f"nonfinite is {args.nonfinite!r}; accepted: raise, skip")
        if args.on_policy_fraction and args.hard_labels == "labels":
            raise InputError(
                "the labels of on-policy data are the student's own tokens, which it must not be "
                "trained on; set hard_labels='teacher_argmax'"
            )
        weight_from_string(args.weight)
        Risk(args.risk_alpha, args.risk_gamma, args.risk_terminal)  # type: ignore[arg-type]
        if args.hard_labels not in ("teacher_argmax", "labels", "both_agree"):
            raise InputError(
                f"hard_labels is {args.hard_labels!r}; accepted: teacher_argmax, labels, both_agree"
            )
        if (args.kd_weight, args.ce_weight) != (1, 1):
            raise InputError(
                f"kd_weight is {args.kd_weight} and ce_weight {args.ce_weight}; λ shares the two "
                "terms here: leave both at 1 and set weight='static:0.2' or another"
            )
        if args.risk_alpha and args.risk_terminal == "official" and args.risk_gamma != 1:
            raise InputError(
                "the official terminal term is a mean over sequences, which depends on how a step "
                "is cut into micro-batches; use risk_gamma=1 or risk_terminal='skip'"
            )

    def loss_options(self) -> dict[str, Any]:
        """The settings of abkd with λ, the hard label, and what risk needs."""
        options = super().loss_options()
        total = self.state.max_steps if self.state.max_steps > 0 else None
        at = StepInfo(self.state.global_step, total)

        def weight_fn(seen: TokenStatistics) -> tuple[Tensor, Tensor]:
            lam = checked_weight(self.weight, seen, at)
            return lam, 1 - lam

        options.update(
            weight_fn=weight_fn,
            hard_labels=self.args.hard_labels,
            return_label_logits=self._risk is not None,
        )
        if self._risk is not None and self._risk.gamma != 1 and self._valid is not None:
            options["ce_token_weight"] = discounts(self._valid, self._risk.gamma, self._segments)
        if self._fused is not None:
            plan, logits = self._fused
            plan.settings = options
            plan.fuse(logits)
        return options

    def distil(
        self, student: ModelSide, teacher: ModelSide, labels: Tensor, n_valid: Tensor
    ) -> DistillationOutput:
        """The loss between the two sides, the risk in the same pass where heads are fused."""
        if self._risk is not None and student.hidden is not None and teacher.hidden is not None:
            hidden, head = student.hidden[:, :-1].flatten(0, -2), student.head
            logits = LabelLogits(hidden, head.weight, head.bias, student.softcap, student.scale)
            self._fused = self._plan(labels), logits
        return super().distil(student, teacher, labels, n_valid)

    def _plan(self, labels: Tensor) -> HybridPlan:
        return HybridPlan(
            labels, labels != -100, self._risk, self._segments, self.args.hard_labels, {}
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The hybrid loss of a micro-batch, as its share of the step's mean over tokens."""
        self._valid = inputs["labels"][:, 1:] != -100
        self._segments = None
        if "position_ids" in inputs:  # sequences packed in a row, which risk must not couple
            self._segments = (inputs["position_ids"] == 0).cumsum(-1)[:, 1:]
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def assemble_loss(self, output: DistillationOutput, labels: Tensor) -> Tensor:
        """Soft, hard and risk over one denominator."""
        valid = labels != -100
        plan = self._plan(labels) if self._fused is None else self._fused[0]
        self._fused = None
        found = plan.finish(output)
        output.ce = found.hard
        if not self._all_finite(found.loss.detach()):
            if self.args.nonfinite == "raise" or not self.model.training:
                raise InputError(
                    f"the loss is {float(found.loss.detach())} at step {self.state.global_step} "
                    f"(soft {float(found.soft)}, hard {float(found.hard)}, risk "
                    f"{float(found.risk)}); lower the learning rate, or train in bfloat16 or "
                    "float32"
                )
            return self._skip(output)
        loss, found.loss = found.loss, found.loss.detach()
        self.last_output = found
        if self.model.training:
            count = valid.sum()
            mine = {
                "weight": found.weight.sum(),
                "bridge_fraction": found.bridge_fraction * count,
                "garden_fraction": found.garden_fraction * count,
                "risk": found.risk * found.n_valid,
                "tokens": count,
            }
            for name, value in mine.items():
                self._seen[name] = self._seen.get(name, torch.zeros_like(value)) + value
        return loss

    def _all_finite(self, loss: Tensor) -> bool:
        """Whether the loss is finite, and with ``skip`` that of every process: all skip or none."""
        finite = torch.isfinite(loss)
        if self.args.nonfinite == "skip" and self.accelerator.num_processes > 1:
            finite = self.accelerator.reduce((~finite).float(), reduction="sum") == 0
        return bool(finite)

    def _skip(self, output: DistillationOutput) -> Tensor:
        """A loss of zero with a gradient of zeros, for which other processes may wait."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if not all(torch.isfinite(p.detach()).all() for p in parameters):
            raise InputError(
                f"the student's weights are not finite at step {self.state.global_step}, so that "
                "no micro-batch can be; start from an earlier checkpoint with a lower learning rate"
            )
        self._skipped += 1
        # What is logged of the batch must not be NaN either.
        output.kd = output.ce = torch.zeros_like(output.kd)
        output.statistics.clear()
        return torch.stack([0 * p.flatten()[:1].sum() for p in parameters]).sum()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add means over the tokens since the last line, and the number of skipped batches."""
        if "loss" in logs:
            if self._seen:
                sums = self.of_all_processes(self._seen)
                tokens = max(sums.pop("tokens"), 1.0)
                logs = {**logs, **{n: v / tokens for n, v in sums.items()}}
            if self.args.nonfinite == "skip":
                logs = {**logs, "skipped": self._skipped}
            self._seen, self._skipped = {}, 0
        super().log(logs, *args, **kwargs)

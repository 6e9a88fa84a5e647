"""Hybrid distillation with the trainer of Hugging Face transformers.

A script that distils with `abkd.trainer` changes two names; one that fine-tunes with
`transformers.Trainer` also adds a teacher::

    from bridge_garden.trainer import HybridConfig, HybridTrainer

    args = HybridConfig("out", weight="confidence", bf16=True)
    trainer = HybridTrainer(student, teacher, args, train_dataset=data, processing_class=tokenizer)
    trainer.train()

Adapters, accumulation, several processes, resuming and top-k teachers are `abkd.trainer`'s own.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from abkd import DistillationOutput, TokenStatistics
from abkd.trainer import DistillationConfig, DistillationTrainer
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

    Example:
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


class HybridTrainer(DistillationTrainer):
    """`abkd.trainer.DistillationTrainer` with hard and soft labels mixed token by token.

    The curriculum follows optimizer steps, so that accumulation does not advance it and a resumed
    run continues it. Beside abkd's, the log has ``weight`` (mean λ), ``bridge_fraction``
    (λ < 0.2), ``garden_fraction`` (λ > 0.8) and ``risk``.

    Args:
        args: See `abkd.trainer.DistillationTrainer`, as all that is not listed here.
        weight: λ as a callable, instead of the configuration's name.
        options: As above.

    Attributes:
        weight: λ.
        last_output: Of the last micro-batch, without gradient; ``None`` before.

    Raises:
        InputError: If a setting is impossible; in training, if the loss is not finite (it is never
            replaced by zero in silence).
    """

    def __init__(self, *args: Any, weight: Weight | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        config = self.args
        self.weight = weight if weight is not None else weight_from_string(config.weight)
        self._risk: Risk | None = None
        if config.risk_alpha:
            self._risk = Risk(config.risk_alpha, config.risk_gamma, config.risk_terminal)
        self._valid: Tensor | None = None
        self.last_output: HybridOutput | None = None
        self._seen: dict[str, Tensor] = {}

    @staticmethod
    def _check(args: Any) -> None:
        DistillationTrainer._check(args)
        if not isinstance(args, HybridConfig):
            raise InputError(f"args are {type(args).__name__}; pass a HybridConfig")
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
            options["ce_token_weight"] = discounts(self._valid, self._risk.gamma)
        return options

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The hybrid loss of a micro-batch, as its share of the step's mean over tokens."""
        self._valid = inputs["labels"][:, 1:] != -100
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def assemble_loss(self, output: DistillationOutput, labels: Tensor) -> Tensor:
        """Soft, hard and risk over one denominator."""
        valid = labels != -100
        plan = HybridPlan(labels, valid, self._risk, None, self.args.hard_labels, {})
        found = plan.finish(output)
        if not torch.isfinite(found.loss.detach()):
            raise InputError(
                f"the loss is {float(found.loss.detach())} at step {self.state.global_step} (soft "
                f"{float(found.soft)}, hard {float(found.hard)}, risk {float(found.risk)}); lower "
                "the learning rate, or train in bfloat16 or float32"
            )
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

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add means over the tokens since the last line."""
        if "loss" in logs and self._seen:
            tokens = max(float(self._seen.pop("tokens")), 1.0)
            logs = {**logs, **{n: float(v) / tokens for n, v in self._seen.items()}}
            self._seen = {}
        super().log(logs, *args, **kwargs)

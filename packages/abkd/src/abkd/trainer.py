"""Distilling a causal language model with the trainer of Hugging Face transformers.

A script that fine-tunes with `transformers.Trainer` changes two names and adds a teacher::

    from abkd.trainer import DistillationConfig, DistillationTrainer

    args = DistillationConfig("out", alpha=0.2, beta=0.7, bf16=True)
    trainer = DistillationTrainer(student, teacher, args, train_dataset=data,
                                  processing_class=tokenizer)
    trainer.train()

Student and teacher run without their heads; heads and loss are computed together, chunk by chunk
(`abkd.fused_linear_ab_divergence`). Everything else is the Trainer's own.
"""

import hashlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from abkd.cross_entropy import fused_linear_cross_entropy
from abkd.data import CompletionCollator, tokenize_dataset
from abkd.fused import fused_linear_ab_divergence
from abkd.objective import DistillationOutput, distillation_loss
from abkd.rollout import own_responses
from abkd.sharded import after, can_gather, gathered, is_sharded
from abkd.sparse import sparse_distillation_loss
from abkd.terms import divergence_terms
from abkd.vocab import align_vocab
from shared_core.errors import InputError, MissingExtraError

__all__ = ["DistillationConfig", "DistillationTrainer", "ModelSide"]


@dataclass
class DistillationConfig(TrainingArguments):
    """`transformers.TrainingArguments` with the settings of the distillation.

    Args:
        divergence: One of `abkd.DIVERGENCES`.
        alpha: α.
        beta: β.
        mix: The number of the mixtures (see `abkd.divergence_terms`).
        temperature: τ.
        temperature_power: r in τ^r.
        kd_weight: Weight of the soft term.
        ce_weight: Weight of the hard term.
        teacher_model_name_or_path: The teacher, if no model is passed.
        teacher_init_kwargs: For its ``from_pretrained``.
        fused: Compute heads and loss together; off, or where a head is adapted or sharded by
            other means than FSDP2, from logits.
        chunk_size: Tokens of a chunk; by default what the memory suits.
        max_length: Longer examples are cut.
        completion_only_loss: Only the completion's tokens count.
        disable_dropout: Set the student's dropout to 0.
        max_prompt_length: Longer prompts lose their beginning.
        pretrain_weight: Weight of the cross-entropy on `pretrain_dataset`, if there is one.
        on_policy_fraction: Share of micro-batches whose responses are drawn from the student.
        max_new_tokens: Length of such a response.
        topk_tail: What a top-k teacher's unlisted mass is: ``residual``, ``renormalize`` or
            ``ignore`` (see `abkd.sparse.sparse_distillation_loss`).

    Examples:
        >>> DistillationConfig("out", alpha=0.1, beta=0.8, use_cpu=True).kd_weight
        1.0
    """

    divergence: str = "ab"
    alpha: float = 0.2
    beta: float = 0.7
    mix: float | None = None
    temperature: float = 1.0
    temperature_power: float = 2.0
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    teacher_model_name_or_path: str | None = None
    teacher_init_kwargs: dict[str, Any] | None = None
    fused: bool = True
    chunk_size: int | None = None
    max_length: int | None = 512
    completion_only_loss: bool = True
    disable_dropout: bool = True
    max_prompt_length: int | None = None
    pretrain_weight: float = 1.0
    on_policy_fraction: float = 0.0
    max_new_tokens: int = 128
    topk_tail: str = "residual"
    remove_unused_columns: bool = field(default=False)


@dataclass
class ModelSide:
    """One model's part in the loss: hidden states and head, or logits.

    Attributes:
        hidden: ``[B, T, H]``, or ``None`` where logits are given.
        head: The linear head.
        logits: ``[B, T, V]``, or ``None``.
        softcap: See `abkd.fused_linear_ab_divergence`.
        scale: Likewise.
    """

    hidden: Tensor | None
    head: Any
    logits: Tensor | None
    softcap: float | None = None
    scale: float = 1.0

    def all_logits(self) -> Tensor:
        """The logits of all tokens, for the paths that need them."""
        if self.logits is not None:
            return self.logits
        assert self.head is not None
        logits: Tensor = self.head(self.hidden) * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class DistillationTrainer(Trainer):
    """A `transformers.Trainer` that distils a teacher into the model.

    To change the loss, override `loss_options` (settings of the fused and the plain loss alike,
    among them ``weight_fn``) and `assemble_loss` (what is minimised, given what they return).

    Args:
        model: The student, a causal language model or the name of one.
        teacher_model: The teacher; ``None`` takes the config's, or the data's top-k columns
            (``topk_ids``, ``topk_logprobs``; see `abkd.capture`), or none (with ``kd_weight=0`` and
            a `ce_weight`: plain fine-tuning, as the paper starts its students).
        args: The settings.
        train_dataset: Rows with ``input_ids`` and ``labels``, or ``prompt`` and ``completion``, or
            ``messages``, or ``text``.
        eval_dataset: Likewise.
        processing_class: The tokenizer.
        teacher_processing_class: The teacher's tokenizer, to see that the tokens agree.
        pretrain_dataset: Plain text mixed in: each micro-batch brings as many rows of it, drawn at
            random, with their cross-entropy times `pretrain_weight`.
        peft_config: Train adapters only (needs peft).
        options: See `transformers.Trainer`.

    Attributes:
        teacher: The teacher, in eval mode and frozen; ``None`` with a top-k teacher.
        vocab_size: The tokens that both heads are cut to.

    Raises:
        InputError: If there is no teacher, vocabularies differ, or settings are impossible.
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        teacher_model: PreTrainedModel | str | None = None,
        args: DistillationConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        teacher_processing_class: Any = None,
        peft_config: Any = None,
        pretrain_dataset: Any = None,
        **options: Any,
    ) -> None:
        args = args or DistillationConfig("runs/abkd/trainer")
        self._check(args)
        if isinstance(model, str):
            model = AutoModelForCausalLM.from_pretrained(model)
        if args.disable_dropout:
            _disable_dropout(model)
        if peft_config is not None:
            try:
                from peft import get_peft_model
            except ImportError as error:
                raise MissingExtraError("abkd", "lora", "peft") from error
            model = get_peft_model(model, peft_config)
        teacher_model = teacher_model or args.teacher_model_name_or_path
        if isinstance(teacher_model, str):
            kwargs = args.teacher_init_kwargs or {}
            teacher_model = AutoModelForCausalLM.from_pretrained(teacher_model, **kwargs)
        self._check_teacher(model, teacher_model, train_dataset, args)
        if args.on_policy_fraction and teacher_model is None:
            raise InputError("on-policy data need the teacher itself, not its top-k columns")
        prepared = [
            tokenize_dataset(
                data,
                processing_class,
                args.max_length,
                args.completion_only_loss,
                args.max_prompt_length,
            )
            for data in (train_dataset, eval_dataset, pretrain_dataset)
        ]
        pad = getattr(processing_class, "pad_token_id", None)
        options.setdefault(
            "data_collator",
            CompletionCollator(
                0 if pad is None else pad, getattr(processing_class, "padding_side", "right")
            ),
        )
        super().__init__(
            model,
            args,
            train_dataset=prepared[0],
            eval_dataset=prepared[1],
            processing_class=processing_class,
            **options,
        )
        self.teacher: Any = teacher_model
        if teacher_model is not None:
            frozen: Any = teacher_model
            frozen.requires_grad_(False).eval()
            if getattr(frozen, "hf_device_map", None) is None:
                frozen.to(self.args.device)
            # FSDP's sparing way to load reads weights in one process only.
            if self.is_fsdp_enabled and self.accelerator.num_processes > 1:
                for tensor in (*frozen.parameters(), *frozen.buffers()):
                    torch.distributed.broadcast(tensor.detach(), src=0)
        size = _config(model)
        self.vocab_size = align_vocab(
            size,
            size if teacher_model is None else _config(teacher_model),
            processing_class,
            teacher_processing_class,
        )
        # The loss is divided by the tokens of the whole step here, so the Trainer must not divide.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.pretrain_dataset = prepared[2]
        self._pretrain_tokens: Tensor | None = None
        if args.on_policy_fraction and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise InputError("on-policy data are not drawn from a sharded student; use DDP")
        self._head_checked: set[str] = set()
        self._sums: dict[str, Tensor] = {}

    @staticmethod
    def _check(args: DistillationConfig) -> None:
        if not isinstance(args, DistillationConfig):
            raise InputError(
                f"args are {type(args).__name__}; pass a DistillationConfig, which takes all "
                "TrainingArguments"
            )
        divergence_terms(args.divergence, alpha=args.alpha, beta=args.beta, mix=args.mix)
        if not 0 <= args.on_policy_fraction <= 1:
            raise InputError(
                f"on_policy_fraction is {args.on_policy_fraction}; accepted: 0 to 1, the share of "
                "micro-batches"
            )
        if args.label_smoothing_factor:
            raise InputError("label_smoothing_factor has no part in this loss; leave it at 0")
        if args.n_gpu > 1:
            raise InputError(
                f"{args.n_gpu} GPUs in one process would train with nn.DataParallel; start one "
                "process per GPU (torchrun or accelerate launch), or set CUDA_VISIBLE_DEVICES"
            )

    @staticmethod
    def _check_teacher(model: Any, teacher: Any, data: Any, args: DistillationConfig) -> None:
        if teacher is model:
            raise InputError("student and teacher are one model; load the teacher on its own")
        columns = getattr(data, "column_names", None) or list(data[0] if data else ())
        hard_only = args.ce_weight and not args.kd_weight
        if teacher is None and "topk_ids" not in columns and not hard_only:
            raise InputError(
                "there is no teacher: pass teacher_model, set teacher_model_name_or_path, or give "
                "data with the columns topk_ids and topk_logprobs (see abkd capture); for plain "
                "fine-tuning set kd_weight=0 and ce_weight=1"
            )

    def loss_options(self) -> dict[str, Any]:
        """The settings of the loss; keywords of `abkd.distillation_loss`. Override to add some."""
        args = self.args
        return {
            "divergence": args.divergence,
            "alpha": args.alpha,
            "beta": args.beta,
            "mix": args.mix,
            "temperature": args.temperature,
            "temperature_power": args.temperature_power,
            "kd_weight": args.kd_weight,
            "ce_weight": args.ce_weight,
            "statistics": (
                "student_entropy",
                "teacher_entropy",
                "student_argmax",
                "teacher_argmax",
            ),
        }

    def assemble_loss(self, output: DistillationOutput, labels: Tensor) -> Tensor:
        """What is minimised, already divided by ``output.n_valid``. Override to add terms.

        Args:
            output: What the loss returned for the batch; per-token fields are ``[B, T - 1]``.
            labels: The shifted labels ``[B, T - 1]``.
        """
        del labels
        return output.loss

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The micro-batches of a step and the number of tokens that count in all of them."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        for place, batch in enumerate(batches):
            self._draw_responses(batch, place)
            if self.pretrain_dataset is not None:
                batch["pretrain"] = self._pretrain_batch(len(batch["labels"]), place)
        some = [batch["pretrain"]["labels"] for batch in batches if "pretrain" in batch]
        counts = [
            sum((labels[:, 1:] != -100).sum().to(self.args.device) for labels in group)
            for group in ([batch["labels"] for batch in batches], some)
        ]
        count = torch.stack([torch.as_tensor(c, device=self.args.device) for c in counts])
        if self.accelerator.num_processes > 1:
            count = self.accelerator.reduce(count, reduction="sum")
        self._pretrain_tokens = count[1].clamp(min=1)
        return batches, count[0]

    def _seed_of(self, place: int, *, rank: int | None = None) -> int:
        """A seed for a micro-batch, the same after a resume; for all processes, or for one."""
        parts = (self.args.seed, self.state.global_step, place, -1 if rank is None else rank)
        return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6])

    def _draw_responses(self, batch: dict[str, Any], place: int) -> None:
        """With probability `on_policy_fraction`, give the batch the student's own responses."""
        if not self.args.on_policy_fraction:
            return
        drawn = torch.rand((), generator=torch.Generator().manual_seed(self._seed_of(place)))
        if drawn >= self.args.on_policy_fraction:
            return
        tokenizer = self.processing_class
        found = own_responses(
            self.accelerator.unwrap_model(self.model),
            batch,
            self.data_collator,
            max_new_tokens=self.args.max_new_tokens,
            max_length=self.args.max_length,
            eos_id=getattr(tokenizer, "eos_token_id", None),
            pad_id=getattr(tokenizer, "pad_token_id", None) or 0,
            vocab=self.vocab_size,
            seed=self._seed_of(place, rank=self.args.process_index),
        )
        batch.clear()
        batch.update(found)

    def _pretrain_batch(self, size: int, place: int) -> dict[str, Tensor]:
        seed = self._seed_of(place, rank=self.args.process_index)
        g = torch.Generator().manual_seed(seed)
        data = self.pretrain_dataset
        rows = [data[i] for i in torch.randint(len(data), (size,), generator=g).tolist()]
        return {n: t.to(self.args.device) for n, t in self.data_collator(rows).items()}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a micro-batch, as its share of the step's mean over tokens."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        plain_text = inputs.pop("pretrain", None)
        topk = [inputs.pop(name, None) for name in ("topk_ids", "topk_logprobs")]
        shifted = labels[:, 1:]
        training = model.training and num_items_in_batch is not None
        n_valid = torch.as_tensor(
            num_items_in_batch if training else (shifted != -100).sum(), device=labels.device
        ).clamp(min=1)
        student = self.run_model(model, inputs, "student")
        if self.teacher is None and topk[0] is None and not self.args.kd_weight:
            hard = self._cross_entropy(student, shifted, n_valid)
            loss = self.args.ce_weight * hard
            if training:
                self._add(ce=hard.detach() * n_valid, tokens=(shifted != -100).sum())
                loss = loss * self.accelerator.num_processes
            return (loss, {}) if return_outputs else loss
        if self.teacher is None:
            output = self._with_topk(student, topk, shifted, n_valid)
        else:
            with torch.no_grad():
                teacher = self.run_model(self.teacher.eval(), inputs, "teacher")
            output = self.distil(student, teacher, shifted, n_valid)
        loss = self.assemble_loss(output, shifted)
        if plain_text is not None:
            loss = loss + self.args.pretrain_weight * self._pretrain_loss(model, plain_text)
        if training:
            # The processes' gradients are averaged, but n_valid counts the tokens of all.
            loss = loss * self.accelerator.num_processes
            self._remember(output, shifted)
        return (loss, {"logits": shifted.new_zeros(len(labels), 1)}) if return_outputs else loss

    def _pretrain_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Cross-entropy of a micro-batch of plain text, as its share of the step's mean."""
        labels = inputs.pop("labels")[:, 1:]
        side = self.run_model(model, inputs, "student")
        assert self._pretrain_tokens is not None
        loss = self._cross_entropy(side, labels, self._pretrain_tokens)
        own = (labels != -100).sum()
        self._add(pretrain_ce=loss.detach() * self._pretrain_tokens, pretrain_tokens=own)
        return loss

    def _cross_entropy(self, side: ModelSide, labels: Tensor, n_valid: Tensor) -> Tensor:
        if side.hidden is None:
            logits = side.all_logits()[:, :-1, : self.vocab_size].float().flatten(0, 1)
            flat = labels.flatten()
            return nn.functional.cross_entropy(logits, flat, reduction="sum") / n_valid
        return fused_linear_cross_entropy(
            side.hidden[:, :-1],
            side.head.weight,
            labels,
            bias=side.head.bias,
            softcap=side.softcap,
            logit_scale=side.scale,
            vocab=self.vocab_size,
            n_valid=n_valid,
            chunk_size=self.args.chunk_size or "auto",
        )

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """The distillation loss of an evaluation batch; no logits are kept."""
        del prediction_loss_only, ignore_keys
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def distil(
        self, student: ModelSide, teacher: ModelSide, labels: Tensor, n_valid: Tensor
    ) -> DistillationOutput:
        """The loss between the two sides; hidden states or logits at t predict labels at t."""
        options = dict(self.loss_options(), labels=labels, n_valid=n_valid)
        if student.hidden is None or teacher.hidden is None:
            size = self.vocab_size
            return distillation_loss(
                student.all_logits()[:, :-1, :size],
                teacher.all_logits()[:, :-1, :size],
                chunk_size=self.args.chunk_size,
                **options,
            )
        assert student.head is not None
        assert teacher.head is not None
        return fused_linear_ab_divergence(
            student.hidden[:, :-1],
            student.head.weight,
            teacher.hidden[:, :-1],
            teacher.head.weight,
            student_bias=student.head.bias,
            teacher_bias=teacher.head.bias,
            student_softcap=student.softcap,
            teacher_softcap=teacher.softcap,
            student_logit_scale=student.scale,
            teacher_logit_scale=teacher.scale,
            chunk_size=self.args.chunk_size or "auto",
            vocab=self.vocab_size,
            **options,
        )

    def _with_topk(
        self, student: ModelSide, topk: list[Any], labels: Tensor, n_valid: Tensor
    ) -> DistillationOutput:
        if topk[0] is None:
            raise InputError("the batch has no topk_ids and topk_logprobs, and there is no teacher")
        source: Any = student.logits
        if source is None:
            assert student.head is not None
            assert student.hidden is not None
            source = (student.hidden[:, :-1], student.head.weight)
            extra: dict[str, Any] = {
                "student_bias": student.head.bias,
                "student_softcap": student.softcap,
                "student_logit_scale": student.scale,
            }
        else:
            source, extra = source[:, :-1, : self.vocab_size], {}
        return sparse_distillation_loss(
            source,
            topk[0][:, 1:],
            topk[1][:, 1:],
            vocab=self.vocab_size,
            tail=self.args.topk_tail,
            labels=labels,
            n_valid=n_valid,
            **extra,
            **self.loss_options(),
        )

    def run_model(self, model: nn.Module, inputs: dict[str, Any], who: str) -> ModelSide:
        """Run a model without its head where that can be, else for its logits.

        On the first batch the head's result is compared with the model's own logits of the last
        position, so that a model which transforms them in an unknown way is noticed.
        """
        causal = _causal(self.accelerator.unwrap_model(model))
        head = causal.get_output_embeddings()
        keeps = "logits_to_keep" in inspect.signature(causal.forward).parameters
        # An adapted head has a forward of its own; one that FSDP has wrapped does not.
        linear = getattr(type(head), "forward", None) is nn.Linear.forward
        sharded = linear and is_sharded(head.weight)
        if sharded:
            linear = can_gather(head.weight, self.accelerator.num_processes)
        if not (self.args.fused and keeps and linear):
            return ModelSide(None, None, model(**inputs, use_cache=False).logits)
        with _last_hidden(causal) as found:
            last = model(**inputs, use_cache=False, logits_to_keep=1).logits
        hidden = found[0]
        if sharded:
            hidden, head = after(hidden, last), gathered(head)
        config = _config(causal)
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        side = ModelSide(hidden, head, None, cap, scale)
        if who not in self._head_checked:
            self._head_checked.add(who)
            with torch.no_grad():
                mine = ModelSide(hidden[:, -1:], head, None, cap, scale).all_logits()
            if not torch.allclose(mine.float(), last.float(), rtol=2e-2, atol=2e-2):
                raise InputError(
                    f"the {who} ({type(causal).__name__}) changes its logits after the head in a "
                    "way that is not known here; set fused=False"
                )
        return side

    def _remember(self, output: DistillationOutput, labels: Tensor) -> None:
        """Sum up what is logged, on the device."""
        counted = labels != -100
        found = {"kd": output.kd * output.n_valid, "ce": output.ce * output.n_valid}
        seen = output.statistics
        for name in ("student_entropy", "teacher_entropy"):
            if name in seen:
                found[name] = seen[name].sum()
        if "student_argmax" in seen and "teacher_argmax" in seen:
            agree = (seen["student_argmax"] == seen["teacher_argmax"]) & counted
            found["agreement"] = agree.sum()
        found["tokens"] = counted.sum()
        self._add(**found)

    def _add(self, **found: Tensor) -> None:
        for name, value in found.items():
            self._sums[name] = self._sums.get(name, torch.zeros((), device=value.device)) + value

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add means over the tokens since the last line: kd, ce, entropies, top-1 agreement."""
        if "loss" in logs and self._sums:
            sums, self._sums = self.of_all_processes(self._sums), {}
            tokens = max(sums.pop("tokens"), 1.0)
            if "pretrain_ce" in sums:
                own = max(sums.pop("pretrain_tokens"), 1.0)
                logs = {**logs, "pretrain_ce": sums.pop("pretrain_ce") / own}
            logs = {**logs, **{n: v / tokens for n, v in sums.items()}}
        super().log(logs, *args, **kwargs)

    def of_all_processes(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Scalars, each summed over the processes; all of them have to call this."""
        stacked = torch.stack([value.float() for value in sums.values()])
        if self.accelerator.num_processes > 1:
            stacked = self.accelerator.reduce(stacked, reduction="sum")
        return dict(zip(sums, stacked.tolist(), strict=True))


def _causal(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _config(model: Any) -> Any:
    config = _causal(model).config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


@contextmanager
def _last_hidden(causal: Any) -> Iterator[list[Tensor]]:
    """Catch the decoder's last hidden states while the model runs."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        del module, args
        found.append(output[0])

    handle = causal.get_decoder().register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


def _disable_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0

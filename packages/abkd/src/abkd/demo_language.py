"""The demo's language part: a small Llama teaches a smaller one on Python's own documentation.

Every method starts from the same short fine-tuning and sees the same batches. The learning rate of
each was chosen on seed 100, which is not reported.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from abkd.evaluation import compare
from abkd.objective import distillation_loss
from shared_core.metrics.text import rouge_l
from shared_core.run import progress

__all__ = ["METHODS", "LanguageSettings", "run_language", "tell_language"]

# Each method's (α, β), and the learning rate of 0.005, 0.01 and 0.02 that left the least
# cross-entropy on held-out text.
METHODS: dict[str, tuple[tuple[float, float] | None, float]] = {
    "fine-tuning": (None, 0.02),
    "forward KL": ((1.0, 0.0), 0.02),
    "reverse KL": ((0.0, 1.0), 0.01),
    "αβ (0.2, 0.7)": ((0.2, 0.7), 0.02),
    "αβ (0.5, 0.5)": ((0.5, 0.5), 0.01),
}
MEASURES = (
    *("ce", "fkl", "rkl", "student_entropy", "agreement"),
    *("teacher_nll", "distinct_2", "rouge_l"),
)


@dataclass(frozen=True)
class LanguageSettings:
    """The task and its training."""

    vocab: int = 512
    window: int = 64
    batch: int = 16
    teacher_width: int = 112
    teacher_steps: int = 350
    teacher_lr: float = 3e-3
    student_width: int = 32
    init_steps: int = 60
    steps: int = 100
    init_lr: float = 1e-2
    held_out: int = 64
    prompt: int = 24
    new_tokens: int = 40


def _model(width: int, layers: int, heads: int, settings: LanguageSettings, seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=settings.vocab,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=2 * settings.window,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def _train(
    model: Any, windows: Tensor, steps: int, lr: float, settings: LanguageSettings, seed: int,
    teacher: Any = None, pair: tuple[float, float] | None = None, *, warmup: bool = False,
) -> None:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-2)
    rise = steps // 5 if warmup else 0
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: (
            (i + 1) / rise
            if i < rise
            else 0.5 + 0.5 * math.cos(math.pi * (i - rise) / (steps - rise))
        ),
    )
    model.train()
    for _ in progress(range(steps), description="training", unit="step"):
        rows = windows[torch.randint(len(windows), (settings.batch,), generator=g)]
        logits = model(input_ids=rows).logits[:, :-1]
        if pair is None:
            loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        else:
            with torch.no_grad():
                theirs = teacher(input_ids=rows).logits[:, :-1]
            loss = distillation_loss(logits, theirs, alpha=pair[0], beta=pair[1]).loss
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def _measure(
    student: Any, teacher: Any, held: Tensor, tokenizer: Any, settings: LanguageSettings, seed: int
) -> dict[str, float]:
    """Distances on held-out text, and how good and how varied the student's own text is."""
    batches = [{"input_ids": rows, "labels": rows} for rows in torch.split(held, settings.batch)]
    found = compare(student, teacher, batches)
    start = held[:, : settings.prompt]
    torch.manual_seed(seed)
    whole = student.generate(
        input_ids=start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0, top_p=1.0,
        max_new_tokens=settings.new_tokens, min_new_tokens=settings.new_tokens, pad_token_id=0,
    )  # fmt: skip
    new = whole[:, settings.prompt :]
    lp = teacher(input_ids=whole).logits[:, settings.prompt - 1 : -1].log_softmax(-1)
    found["teacher_nll"] = -float(lp.gather(-1, new.unsqueeze(-1)).mean())
    pairs = [tuple(p) for row in new.tolist() for p in itertools.pairwise(row)]
    found["distinct_2"] = len(set(pairs)) / len(pairs)
    scores = [
        100 * rouge_l(tokenizer.decode(mine), tokenizer.decode(theirs))
        for mine, theirs in zip(new.tolist(), held[:, settings.prompt :].tolist(), strict=True)
    ]
    found["rouge_l"] = sum(scores) / len(scores)
    found["rouge_l_error"] = float(torch.tensor(scores).std()) / math.sqrt(len(scores))
    return found


def run_language(
    seeds: list[int],
    settings: LanguageSettings | None = None,
) -> dict[str, Any]:
    """Train a teacher once and students of each method from each seed.

    Returns:
        ``rows``: means over the seeds by method; ``errors``: their standard errors;
        ``teacher_entropy`` and ``teacher_ce``.
    """
    from shared_core.data.text import pydoc_documents, token_windows, train_bpe

    settings = settings or LanguageSettings()
    texts = {s: [d.text for d in pydoc_documents(s)] for s in ("train", "validation")}
    tokenizer = train_bpe(texts["train"], settings.vocab)
    windows = token_windows(texts["train"], tokenizer, settings.window, separator=2)
    held = token_windows(texts["validation"], tokenizer, settings.window, separator=2)
    order = torch.randperm(len(held), generator=torch.Generator().manual_seed(0))
    held = held[order[: settings.held_out]]
    teacher = _model(settings.teacher_width, 2, 4, settings, 0)
    _train(teacher, windows, settings.teacher_steps, settings.teacher_lr, settings, 0, warmup=True)
    teacher.eval().requires_grad_(False)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
    for seed in seeds:
        student = _model(settings.student_width, 1, 2, settings, seed)
        _train(student, windows, settings.init_steps, settings.init_lr, settings, seed)
        start = {k: v.clone() for k, v in student.state_dict().items()}
        for name, (pair, lr) in METHODS.items():
            student.load_state_dict(start)
            _train(student, windows, settings.steps, lr, settings, seed, teacher, pair)
            found[name].append(_measure(student, teacher, held, tokenizer, settings, seed))
    truth = compare(teacher, teacher, [{"input_ids": held, "labels": held}])
    rows, errors = {}, {}
    for name, runs in found.items():
        values = {m: torch.tensor([r[m] for r in runs]) for m in MEASURES}
        rows[name] = {m: float(v.mean()) for m, v in values.items()}
        errors[name] = {
            m: float(v.std()) / math.sqrt(len(v)) if len(v) > 1 else None for m, v in values.items()
        }
        # The texts' noise, which the seeds share, is more than that of the seeds.
        errors[name]["rouge_l"] = sum(r["rouge_l_error"] for r in runs) / len(runs)
    return {
        "rows": rows,
        "errors": errors,
        "seeds": seeds,
        "teacher_entropy": truth["student_entropy"],
        "teacher_ce": truth["ce"],
    }


def tell_language(found: dict[str, Any]) -> str:
    """What was seen, whichever way it went."""
    rows, errors = found["rows"], found["errors"]
    pair = "αβ (0.2, 0.7)"

    def least(measure: str) -> str:
        names: list[str] = list(rows)
        return min(names, key=lambda name: float(rows[name][measure]))

    best = max(rows[n]["rouge_l"] for n in rows) - min(rows[n]["rouge_l"] for n in rows)
    noise = 2 * math.sqrt(2) * max(e["rouge_l"] for e in errors.values())
    text = (
        f"Language, {len(found['seeds'])} seeds: {pair} leaves forward KL {rows[pair]['fkl']:.2f} "
        f"and reverse KL {rows[pair]['rkl']:.2f} to the teacher, where training on forward KL "
        f"leaves {rows['forward KL']['fkl']:.2f} and {rows['forward KL']['rkl']:.2f}, and on "
        f"reverse KL {rows['reverse KL']['fkl']:.2f} and {rows['reverse KL']['rkl']:.2f}. The "
        f"samples most probable under the teacher are those of {least('teacher_nll')}; the least "
        f"reverse KL is that of {least('rkl')}, the least cross-entropy that of {least('ce')}. "
    )
    verdict = "within" if best < noise else "beyond"
    return text + f"All ROUGE-L lie {verdict} twice their standard errors of each other."

"""The embedded demo: a tiny language model, both training stages, and what they reach.

A context is a list of facts, each of seven tokens: a name, a relation and a value of two tokens
each, and a full stop. The base model learns to restate contexts and to answer by copying; then the
compressor is trained as an autoencoder against it, and the decoder is fine-tuned on questions.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gmsa.compressor import GMSACompressor
from gmsa.configuration import GMSAConfig
from gmsa.model import GMSAModel
from shared_core.device import seed_everything

__all__ = ["DemoSettings", "facts", "run_seed", "table", "tell", "tiny_compressor", "tiny_model"]

PAD, BOS, EOS, RESTATE, DOT = range(5)
NAMES, RELATIONS, VALUES = 7, 23, 31
VOCABULARY = 96


@dataclass(frozen=True)
class DemoSettings:
    """How long each part trains, and how hard the task is."""

    base_steps: int = 1000
    ae_steps: int = 300
    keft_steps: int = 150
    batch_size: int = 24
    facts: int = 4
    rate: int = 4
    items: int = 256

    def quick(self) -> "DemoSettings":
        """The version that takes less than 40 seconds."""
        return replace(self, base_steps=500, ae_steps=120, keft_steps=70, items=128)


def facts(rows: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw contexts with a question each.

    Args:
        rows: How many.
        count: Facts a context, with names that differ.
        generator: Of the draws.

    Returns:
        Contexts ``[rows, 7 count]``, questions ``[rows, 5]`` (restate, name, relation) and answers
        ``[rows, 2]``.

    Example:
        >>> context, question, answer = facts(2, 3, torch.Generator().manual_seed(0))
        >>> context.shape, question.shape, answer.shape
        (torch.Size([2, 21]), torch.Size([2, 5]), torch.Size([2, 2]))
    """
    name = torch.rand(rows, 64, generator=generator).argsort(1)[:, :count]
    relation = torch.randint(4, (rows, count), generator=generator)
    value = torch.randint(64, (rows, count), generator=generator)
    parts = [
        NAMES + name // 8,
        NAMES + 8 + name % 8,
        RELATIONS + 2 * relation,
        RELATIONS + 1 + 2 * relation,
        VALUES + 16 * relation + value // 8,
        VALUES + 16 * relation + 8 + value % 8,
        torch.full_like(name, DOT),
    ]
    table = torch.stack(parts, 2)
    asked = table[torch.arange(rows), torch.randint(count, (rows,), generator=generator)]
    questions = torch.cat([torch.full((rows, 1), RESTATE), asked[:, :4]], 1)
    return table.flatten(1), questions, asked[:, 4:6]


def tiny_model(seed: int = 0) -> Any:
    """An untrained Llama of 0.1 million parameters.

    Example:
        >>> tiny_model().config.num_hidden_layers
        3
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    seed_everything(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            tie_word_embeddings=True,
            initializer_range=0.05,
            max_position_embeddings=512,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
    )


def tiny_compressor(seed: int = 0) -> GMSACompressor:
    """An untrained compressor over words of two letters, to try the interface with.

    Example:
        >>> tiny_compressor().compress("ba be bi", rate=2).lengths
        tensor([2])
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    syllables = [c + v for c in "bcdfghjklmnprstvwz" for v in "aeiou"][: VOCABULARY - 6]
    words = ["<pad>", "<s>", "</s>", "Restate", ".", "<unk>", *syllables]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    config = GMSAConfig(encoder_layers=1, lora_r=4)
    return GMSACompressor(GMSAModel.from_backbone(tiny_model(seed), config), tokenizer)


def _optimize(
    parameters: list[Any], loss: Callable[[], Tensor], steps: int, lr: float,
    tick: Callable[[], None],
) -> list[float]:  # fmt: skip
    """AdamW with 10 % warm-up and cosine; returns the losses."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=warm),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warm), lr / 20),
        ],
        [warm],
    )
    losses = []
    for _ in range(steps):
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(value.item())
        tick()
    return losses


def _train_base(settings: DemoSettings, seed: int, tick: Callable[[], None]) -> Any:
    """The base model: restates contexts and continues the beginnings of facts."""
    model = tiny_model(seed)
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        count = int(torch.randint(2, settings.facts + 1, (1,), generator=generator))
        context, question, answer = facts(settings.batch_size, count, generator)
        begin = torch.full((len(context), 1), BOS)
        if torch.rand((), generator=generator) < 0.5:
            question, answer = torch.full_like(begin, RESTATE), context
        ids = torch.cat([begin, context, question, answer], 1)
        start = ids.shape[1] - answer.shape[1]
        logits = model(ids).logits[:, :-1].transpose(1, 2)
        each = torch.nn.functional.cross_entropy(logits, ids[:, 1:], reduction="none")
        return each[:, start - 1 :].mean() + 0.2 * each[:, : start - 1].mean()

    model.train()
    _optimize(list(model.parameters()), loss, settings.base_steps, 3e-3, tick)
    return model.eval()


def _stage(
    model: GMSAModel, stage: str, settings: DemoSettings, seed: int, tick: Callable[[], None]
) -> list[float]:
    """One training stage of a compressor."""
    generator = torch.Generator().manual_seed(1000 + seed)
    model.freeze_for_stage(stage)
    model.train()

    def loss() -> Tensor:
        count = int(torch.randint(2, settings.facts + 1, (1,), generator=generator))
        context, question, answer = facts(settings.batch_size, count, generator)
        if stage == "autoencoding":
            question, answer = torch.full((len(context), 1), RESTATE), context
        found: Tensor = model(context, prompt_ids=question, labels=answer, rate=settings.rate).loss
        return found

    trained = [p for p in model.parameters() if p.requires_grad]
    steps, lr = (
        (settings.ae_steps, 4e-3) if stage == "autoencoding" else (settings.keft_steps, 2e-3)
    )
    losses = _optimize(trained, loss, steps, lr, tick)
    model.eval()
    return losses


@torch.no_grad()
def _answers(model: Any, prefix: Tensor, question: Tensor) -> Tensor:
    """Two greedy tokens of a plain language model."""
    ids = torch.cat([torch.full((len(prefix), 1), BOS), prefix, question], 1)
    new: Tensor = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False,
        eos_token_id=None,
    )  # fmt: skip
    answers: Tensor = new[:, ids.shape[1] :]
    return answers


def run_seed(
    seed: int, settings: DemoSettings, tick: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Train everything for one seed and measure it on contexts of its own.

    Returns:
        Per method ``qa`` (exact match) and ``reconstruction`` (teacher-forced token accuracy), both
        in [0, 1], and the losses of the autoencoding stage.

    Example:
        >>> tiny = DemoSettings(base_steps=2, ae_steps=2, keft_steps=2, items=8)
        >>> sorted(run_seed(0, tiny)["methods"])
        ['GMSA', 'GMSA before KEFT', 'full prompt', 'pooling', 'truncation']
    """
    import copy

    base = _train_base(settings, seed, tick)
    generator = torch.Generator().manual_seed(10**6 + seed)
    context, question, answer = facts(settings.items, settings.facts, generator)
    restate = torch.full((len(context), 1), RESTATE)

    def exact(found: Tensor) -> float:
        return float((found == answer).all(1).float().mean())

    @torch.no_grad()
    def measure(model: GMSAModel) -> dict[str, float]:
        soft = model.compress(context, rate=settings.rate)
        new = model.generate(soft, question, max_new_tokens=2, eos_token_id=None)
        out = model(soft=soft, prompt_ids=restate, labels=context)
        assert out.num_correct is not None
        assert out.num_label_tokens is not None
        return {"qa": exact(new), "reconstruction": float(out.num_correct / out.num_label_tokens)}

    kept = -(-context.shape[1] // settings.rate)
    methods: dict[str, dict[str, float]] = {
        "full prompt": {"qa": exact(_answers(base, context, question))},
        "truncation": {"qa": exact(_answers(base, context[:, -kept:], question))},
    }
    options: dict[str, Any] = {"encoder_layers": 1, "lora_r": 32, "lora_alpha": 32}
    pooling = GMSAModel.from_backbone(
        copy.deepcopy(base), GMSAConfig(merging="embeddings", alignment="none", **options)
    )
    _stage(pooling, "keft", settings, seed, tick)
    methods["pooling"] = measure(pooling)
    model = GMSAModel.from_backbone(base, GMSAConfig(lora_dropout=0.0, **options))
    losses = _stage(model, "autoencoding", settings, seed, tick)
    methods["GMSA before KEFT"] = measure(model)
    _stage(model, "keft", settings, seed, tick)
    methods["GMSA"] = {**measure(model)}
    return {"methods": methods, "ae_losses": losses}


def table(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The mean over seeds, one row a method, in percent.

    Example:
        >>> table([{"methods": {"GMSA": {"qa": 0.5, "reconstruction": 0.8}}}])
        [{'method': 'GMSA', 'QA exact match %': 50.0, 'reconstruction token accuracy %': 80.0}]
    """
    rows = []
    for name in results[0]["methods"]:
        found = [r["methods"][name] for r in results]
        row: dict[str, Any] = {"method": name}
        for key, column in (
            ("qa", "QA exact match %"),
            ("reconstruction", "reconstruction token accuracy %"),
        ):
            values = [f[key] for f in found if key in f]
            row[column] = round(100 * sum(values) / len(values), 1) if values else None
        rows.append(row)
    return rows


def tell(rows: list[dict[str, Any]], seeds: int, rate: int) -> str:
    """What the table shows, in words, whatever it shows."""
    qa = {row["method"]: row["QA exact match %"] for row in rows}
    better = [m for m in ("truncation", "pooling") if qa["GMSA"] > qa[m]]
    worse = [m for m in ("truncation", "pooling") if qa["GMSA"] <= qa[m]]
    parts = [
        f"At {rate}x compression GMSA answers {qa['GMSA']:.1f} % of the questions, the untuned "
        f"base model {qa['full prompt']:.1f} % with the full prompt ({seeds} seed(s))."
    ]
    if better:
        parts.append(f"It is ahead of {' and '.join(better)}.")
    if worse:
        parts.append(f"It is not ahead of {' and '.join(worse)}.")
    return " ".join(parts)

"""The embedded demo: train a small early-exit model on mixed text, learn a policy, compare.

Everything is computed here: no download, no stored number. Cost is counted, not timed: in
one-token layers on a memory-bound device (`CostModel.memory_bound`), which no noise touches.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lede.cost import CostModel
from lede.decoding import SelfSpeculativeDecoder
from lede.early_exit import EarlyExitConfig, early_exit_loss, exit_quality
from lede.experience import ExperienceTable, collect
from lede.policies import Policy
from lede.probe import fit_probe
from lede.selection import Choice, choose_policy
from lede.simulation import OraclePolicy, simulate
from lede.text import SEGMENTS, segment_text
from lede.training import TrainConfig, TrainResult, train_policy

__all__ = [
    "QUICK",
    "DemoSettings",
    "SeedResult",
    "compare_recipes",
    "experience",
    "make_model",
    "metrics",
    "prompts",
    "run_seed",
    "summarize",
    "table",
    "tell",
    "train_model",
]


SPLITS = ("validation", "test")


@dataclass(frozen=True)
class DemoSettings:
    """What the demo does. Chosen on seeds 100 and above; reported on others.

    Attributes:
        layers: Depth of the model.
        hidden: Its width.
        train_steps: Of the model.
        batch: Windows per step.
        window: Tokens per window.
        exits: Candidates.
        max_draft: Longest draft.
        probe_prompts: Training prompts for the probe of hidden states.
        prompts: Training, validation and test prompts of the policy.
        prompt_tokens: Length of a prompt.
        new_tokens: Generated from each.
        policy_steps: Updates of the policy.
        head_ratio: Cost of the head in one-token layers.
        plain: Whether to train the same model without the recipe too, to compare their exits.
    """

    layers: int = 12
    hidden: int = 64
    train_steps: int = 160
    batch: int = 12
    window: int = 96
    exits: tuple[int, ...] = (1, 3, 5, 8)
    max_draft: int = 12
    probe_prompts: int = 80
    prompts: tuple[int, int, int] = (80, 32, 40)
    prompt_tokens: int = 64
    new_tokens: int = 64
    policy_steps: int = 900
    head_ratio: float = 0.3
    plain: bool = True


QUICK = DemoSettings(
    layers=6,
    exits=(1, 2, 3, 4),
    train_steps=110,
    probe_prompts=40,
    prompts=(40, 16, 16),
    new_tokens=40,
    policy_steps=500,
    plain=False,
)


def make_model(settings: DemoSettings, seed: int) -> Any:
    """A Llama over ASCII characters, untrained."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=settings.hidden,
        intermediate_size=settings.hidden * 5 // 2,
        num_hidden_layers=settings.layers,
        num_attention_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def _windows(
    texts: dict[str, np.ndarray], count: int, length: int, generator: np.random.Generator
) -> Tensor:
    """`count` windows, the kinds in turn, [count, length]."""
    rows = []
    for i in range(count):
        text = texts[SEGMENTS[i % len(SEGMENTS)]]
        at = int(generator.integers(0, len(text) - length))
        rows.append(text[at : at + length])
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def _texts(split: str, seed: int) -> dict[str, np.ndarray]:
    return {
        kind: np.frombuffer(segment_text(kind, split, seed=seed).encode(), dtype=np.uint8)
        for kind in SEGMENTS
    }


def train_model(
    settings: DemoSettings,
    seed: int,
    config: EarlyExitConfig | None = None,
    tick: Callable[[], object] = lambda: None,
) -> Any:
    """Train a model from scratch with the early-exit recipe (p_max = e_scale = 0: without)."""
    config = config or EarlyExitConfig(p_max=0.1, e_scale=0.2, rotation=3)
    model = make_model(settings, seed)
    texts, generator = _texts("train", seed), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    model.train()
    total = settings.train_steps
    for step in range(total):
        decay = 0.05 + 0.475 * (1 + math.cos(math.pi * step / total))
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, (step + 1) / 30) * decay
        ids = _windows(texts, settings.batch, settings.window, generator)
        loss = early_exit_loss(model, ids, ids, config, step=step, total=total)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        tick()
    return model.eval()


def prompts(settings: DemoSettings, split: str, count: int, seed: int) -> tuple[Tensor, list[str]]:
    """`count` prompts of a split, [count, P], and their kinds."""
    generator = np.random.default_rng([seed, 7])
    ids = _windows(_texts(split, seed), count, settings.prompt_tokens, generator)
    return ids, [SEGMENTS[i % len(SEGMENTS)] for i in range(count)]


@dataclass
class SeedResult:
    """What one seed gave.

    Attributes:
        speedups: Counted speedup on test prompts, by kind of policy; ``delivered`` and ``oracle``.
        choice: Chosen on validation prompts.
        details: Acceptance, mean exit and mean draft length by kind.
        segments: For each kind of text: speedup of static, threshold and delivered, mean exit.
        lossless: Whether real decoding of eight test prompts gave the tokens of ``generate``.
        agreement: Share of test positions where each exit agrees with the last layer.
    """

    speedups: dict[str, float]
    choice: Choice
    details: dict[str, dict[str, float]]
    segments: dict[str, dict[str, float]]
    lossless: bool
    agreement: list[float]
    training: TrainResult = field(repr=False)
    test: ExperienceTable = field(repr=False)
    model: Any = field(repr=False)
    cost: CostModel = field(repr=False)


def experience(
    model: Any, settings: DemoSettings, seed: int
) -> tuple[ExperienceTable, ExperienceTable, ExperienceTable]:
    """Training, validation and test experience; the probe is fitted on training prompts apart."""
    s = settings
    decoder = SelfSpeculativeDecoder(model, s.exits, max_draft=s.max_draft)
    apart = s.probe_prompts
    ids, kinds = prompts(s, "train", apart + s.prompts[0], seed)
    probe = fit_probe(decoder, ids[:apart], max_new_tokens=s.new_tokens, seed=seed, pad_token_id=0)
    found = []
    splits = [(ids[apart:], kinds[apart:])]
    splits += [prompts(s, name, n, seed) for name, n in zip(SPLITS, s.prompts[1:], strict=True)]
    for ids, kinds in splits:
        found.append(
            collect(
                decoder,
                ids,
                max_new_tokens=s.new_tokens,
                segment=kinds,
                probe=probe,
                pad_token_id=0,
            )
        )
    return found[0], found[1], found[2]


def compare_recipes(model: Any, settings: DemoSettings, seed: int) -> dict[str, Any]:
    """Loss and agreement of every exit on test text, with the recipe and without (same steps)."""
    plain = train_model(settings, seed, EarlyExitConfig(p_max=0.0, e_scale=0.0))
    texts, generator = _texts("test", seed), np.random.default_rng([seed, 9])
    windows = _windows(texts, 32, settings.window, generator)
    return {"recipe": exit_quality(model, windows), "plain": exit_quality(plain, windows)}


def run_seed(
    seed: int,
    settings: DemoSettings | None = None,
    *,
    tick: Callable[[], object] = lambda: None,
) -> SeedResult:
    """Train model and policy with one seed, choose on validation prompts, compare on test prompts.

    Args:
        seed: Of the model, the text and the policy.
        settings: Of the demo.
        tick: Called after every training step of the model.
    """
    s = settings or DemoSettings()
    model = train_model(s, seed, tick=tick)
    train, validation, test = experience(model, s, seed)
    cost = CostModel.memory_bound(s.layers, s.head_ratio)
    config = TrainConfig(steps=s.policy_steps, seed=seed)
    result = train_policy(train, cost, config, validation=validation)
    choice = choose_policy([result.policy], train, validation, cost)
    speedups, details = {}, {}
    policies: dict[str, Policy] = {**choice.best, "delivered": choice.policy}
    for kind, policy in policies.items():
        found = simulate(test, policy, cost)
        speedups[kind] = found.speedup
        details[kind] = {
            "acceptance": found.acceptance_rate,
            "exit": found.mean_exit_layer,
            "draft": found.mean_draft_len,
        }
    speedups["oracle"] = OraclePolicy(test, cost).speedup
    segments = _by_segment(test, choice, cost)
    lossless = _really_decode(model, s, seed, test, choice.policy)
    agreement = [float(a) for a in test.right.mean((0, 2))]
    return SeedResult(
        speedups, choice, details, segments, lossless, agreement, result, test, model, cost
    )


def _by_segment(
    test: ExperienceTable, choice: Choice, cost: CostModel
) -> dict[str, dict[str, float]]:
    from lede.simulation import static_grid

    out = {}
    kinds = np.array(test.segment)
    for kind in SEGMENTS:
        part = test.select(np.flatnonzero(kinds == kind))
        grid = static_grid(part, cost)
        j, d = np.unravel_index(int(grid.argmax()), grid.shape)
        delivered = simulate(part, choice.policy, cost)
        out[kind] = {
            "own_best_exit": float(part.exits[j]),
            "own_best_draft": float(d + 1),
            "static": simulate(part, choice.best["static"], cost).speedup,
            "threshold": simulate(part, choice.best["threshold"], cost).speedup,
            "delivered": delivered.speedup,
            "mean_exit": delivered.mean_exit_layer,
            "mean_draft": delivered.mean_draft_len,
        }
    return out


def _really_decode(
    model: Any,
    s: DemoSettings,
    seed: int,
    test: ExperienceTable,
    policy: Policy,
    count: int = 8,
) -> bool:
    """Decode some test prompts for real: the tokens must be ``generate``'s, as in the table."""
    ids, _ = prompts(s, "test", s.prompts[2], seed)
    decoder = SelfSpeculativeDecoder(model, s.exits, max_draft=s.max_draft, policy=policy)
    for row in range(min(count, len(ids))):
        out = decoder.generate(ids[row : row + 1], max_new_tokens=s.new_tokens, pad_token_id=0)
        given = torch.from_numpy(test.tokens[row])
        if not torch.equal(out.sequences[0, s.prompt_tokens :], given):
            return False
    return True


def summarize(results: list[SeedResult]) -> dict[str, Any]:
    """Means, values and ratios over the seeds, by kind of policy."""
    kinds = [k for k in results[0].speedups if all(k in r.speedups for r in results)]
    static = [r.speedups["static"] for r in results]
    threshold = [r.speedups["threshold"] for r in results]
    out: dict[str, Any] = {}
    for kind in kinds:
        values = [r.speedups[kind] for r in results]
        ratios = [v / s for v, s in zip(values, static, strict=True)]
        out[kind] = {
            "speedup": statistics.fmean(values),
            "values": values,
            "against_static": statistics.fmean(ratios),
            "against_static_values": ratios,
            "against_threshold": statistics.fmean(
                v / t for v, t in zip(values, threshold, strict=True)
            ),
        }
        if kind in results[0].details:
            for name in ("acceptance", "exit", "draft"):
                out[kind][name] = statistics.fmean(r.details[kind][name] for r in results)
    return out


TITLES = {
    "static": "static pair (LayerSkip)",
    "threshold": "confidence threshold",
    "draft_verify": "Draft&Verify",
    "del": "DEL",
    "confidence_exit": "confidence exit (LITE)",
    "full": "LEDE: exit and length",
    "draft_only": "LEDE: length only",
    "exit_only": "LEDE: exit only",
    "delivered": "delivered (validation's choice)",
    "oracle": "oracle (ceiling)",
}


def metrics(
    results: list[SeedResult], summary: dict[str, Any], recipes: dict[str, Any] | None
) -> dict[str, Any]:
    """What goes into ``metrics.json``, beside the summary."""
    first = results[0]
    return {
        "policies": {TITLES[k]: summary[k] for k in TITLES if k in summary},
        "segments": first.segments,
        "segments_of_all_seeds": [r.segments for r in results],
        "history": first.training.history,
        "chosen": [r.choice.name for r in results],
        "tried": [r.choice.tried for r in results],
        "agreement_by_exit": [r.agreement for r in results],
        "predicted_on_training_prompts": [r.training.rho for r in results],
        "exit_quality": recipes,
        "lossless": all(r.lossless for r in results),
    }


def table(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the printed table, from what `summarize` returned."""
    rows = []
    for kind, title in TITLES.items():
        entry = summary.get(kind)
        if entry is None:
            continue
        rows.append(
            {
                "policy": title,
                "speedup": f"{entry['speedup']:.2f}",
                "vs static": f"{entry['against_static']:.3f}",
                "vs threshold": f"{entry['against_threshold']:.3f}",
                "accepted": f"{entry['acceptance']:.2f}" if "acceptance" in entry else "",
                "mean exit": f"{entry['exit']:.1f}" if "exit" in entry else "",
                "mean draft": f"{entry['draft']:.1f}" if "draft" in entry else "",
            }
        )
    return rows


def tell(
    results: list[SeedResult], summary: dict[str, Any], recipes: dict[str, Any] | None = None
) -> str:
    """Say in words what was seen, losses included."""
    delivered, full = summary["delivered"], summary["full"]
    chosen = ", ".join(r.choice.name for r in results)
    lossless = all(r.lossless for r in results)
    lines = [
        f"lossless={lossless}. Counted cost, {len(results)} seed(s): the delivered policy is "
        f"{delivered['speedup']:.2f} times as fast as plain decoding, "
        f"{delivered['against_static']:.3f} times the best static pair and "
        f"{delivered['against_threshold']:.3f} times the tuned threshold "
        f"(chosen on validation prompts: {chosen})."
    ]
    ablation = ", ".join(
        f"{TITLES[k].removeprefix('LEDE: ')} {summary[k]['against_static']:.3f}"
        for k in ("full", "draft_only", "exit_only")
        if k in summary
    )
    lines.append(f"Ablation, against static: {ablation}.")
    if full["against_static"] < 1:
        lines.append("The full learned policy lost to the static pair.")
    if delivered["against_threshold"] < 1:
        lines.append("The delivered policy did not beat the tuned threshold.")
    if recipes is not None:
        exits = ", ".join(
            f"{e}: {recipes['recipe']['agreement'][e - 1]:.2f} and "
            f"{recipes['plain']['agreement'][e - 1]:.2f}"
            for e in results[0].test.exits
        )
        lines.append(f"Exits agree with the last layer, with the recipe and without: {exits}.")
    lines.append(f"An oracle would reach {summary['oracle']['speedup']:.2f}.")
    return " ".join(lines)

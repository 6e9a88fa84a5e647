"""LEDE: which design of the policy is worth what, and speed in real decoding beside peers.

Run with ``nox -s bench -- lede``. Sections (``--sections policy,speed,batch,collection``):

- ``policy``: the demo's model and prompts, some seeds. Each design is trained on the same
  experience; its mode is chosen on validation prompts; counted cost on test prompts. What was
  tried and lost stays in.
- ``speed``: a synthetic Llama, greedy, one prompt at a time, in turns: plain ``generate``, our loop
  without drafts, a static pair, transformers' ``assistant_early_exit`` with the same pair, a loop
  as LayerSkip's (growing tuples of keys and values, the head on the whole prompt, a look at the
  host for every draft), and a learned policy. The static pair also compiled, beside our compiled
  loop without drafts; the other loops grow their caches and so have no fixed shapes to compile.
  ``--clock cpu`` counts processor seconds, for a machine that others use too.
- ``batch``: the same synthetic Llama at 1, 2, 4, 8 and 16 prompts at once: a static pair and
  drafting by confidence beside ``generate``. Rows accept differently, and verifying many tokens
  costs more, so that the gain falls.
- ``collection``: batched experience with continuations beside one-by-one roll-outs.
"""

import argparse
import dataclasses
import inspect
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lede
from lede import demo
from lede.bench import bench, generate_with, plain, speedups, usual_contenders
from lede.qpolicy import PROBE_FEATURES, PROBE_STATE, STATE_FEATURES
from lede.testing import synthetic_llama
from shared_core.device import environment, select_device
from shared_core.run import write_json

PAPER = tuple(STATE_FEATURES[:10])
BOTH = (*STATE_FEATURES, *PROBE_FEATURES)
DESIGNS: dict[str, dict[str, Any]] = {
    "described state, bootstrapped double DQN": {"features": PAPER, "target": "bootstrap"},
    "described state, returns": {"features": PAPER, "target": "returns"},
    "13 features and probe, expected tokens": {"features": BOTH},
    "probe, returns": {"features": PROBE_STATE, "target": "returns"},
    "probe, expected tokens (the default)": {"features": PROBE_STATE},
}
KINDS = ("static", "threshold", "draft_verify", "del", "confidence_exit")


def unseen(train: lede.ExperienceTable, test: lede.ExperienceTable, n: int = 8) -> np.ndarray:
    """Share of each test text's n-grams that no training text has."""

    def grams(tokens: np.ndarray) -> list[bytes]:
        return [tokens[i : i + n].tobytes() for i in range(len(tokens) - n + 1)]

    known = {g for row in train.tokens for g in grams(row)}
    return np.array([np.mean([g not in known for g in grams(row)]) for row in test.tokens])


def one_seed(seed: int, settings: demo.DemoSettings) -> tuple[dict[str, dict[str, Any]], float]:
    """Every design on one seed, by name; and the share of test 8-grams not seen in training."""
    model = demo.train_model(settings, seed)
    train, validation, test = demo.experience(model, settings, seed)
    cost = lede.CostModel.memory_bound(settings.layers, settings.head_ratio)
    share = unseen(train, test)
    novel = test.select(np.argsort(-share, kind="stable")[: len(share) // 2])
    tuned = lede.choose_policy([], train, validation, cost)
    rows: dict[str, dict[str, Any]] = {}

    def note(name: str, kind: str, make: Any) -> None:
        """Speedup on all test texts, and on the half with most that training has not."""
        entry = rows[name] = {"seed": seed, "kind": kind}
        for part, where in (("", test), ("novel_", novel)):
            speedup = lede.simulate(where, make(where), cost).speedup
            entry[f"{part}speedup"] = speedup
            for other in ("static", "threshold"):
                theirs = lede.simulate(where, tuned.best[other], cost).speedup
                entry[f"{part}against_{other}"] = speedup / theirs

    for kind in KINDS:
        note(kind, kind, lambda where, kind=kind: tuned.best[kind])
    note("oracle (backward induction)", "oracle", lambda where: lede.OraclePolicy(where, cost))
    for name, changes in DESIGNS.items():
        config = lede.TrainConfig(steps=settings.policy_steps, seed=seed, **changes)
        learned = lede.train_policy(train, cost, config, validation=validation).policy
        choice = lede.choose_policy([learned], train, validation, cost)
        note(name, choice.name, lambda where, p=choice.policy: p)
        if name == list(DESIGNS)[-1]:
            for mode in ("full", "draft_only", "exit_only"):
                note(f"{name}: {mode}", mode, lambda where, p=choice.best[mode]: p)
    return rows, float(share.mean())


def policy(seeds: list[int], short: bool, small: bool) -> dict[str, Any]:
    settings = demo.QUICK if small else demo.DemoSettings()
    if short:
        settings = dataclasses.replace(
            demo.QUICK, train_steps=20, prompts=(16, 8, 8), new_tokens=16, policy_steps=40
        )
    found = [one_seed(seed, settings) for seed in seeds]
    names = ("speedup", "against_static", "against_threshold")
    names += tuple(f"novel_{n}" for n in names)
    table = []
    for design in found[0][0]:
        entries = [rows[design] for rows, _ in found]
        means = {n: round(statistics.fmean(e[n] for e in entries), 3) for n in names}
        table.append({"design": design, **means, "by_seed": entries})
    return {
        "settings": vars(settings),
        "seeds": seeds,
        "share_of_test_8_grams_not_in_training": [share for _, share in found],
        "table": table,
    }


class TupleCache:
    """Keys and values that grow by concatenation."""

    def __init__(self, layers: int) -> None:
        self.pairs: list[tuple[Tensor, Tensor] | None] = [None] * layers

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        old = self.pairs[layer_idx]
        if old is not None:
            keys, values = torch.cat([old[0], keys], 2), torch.cat([old[1], values], 2)
        self.pairs[layer_idx] = keys, values
        return keys, values

    def crop(self, length: int) -> None:
        self.pairs = [
            None if p is None else (p[0][:, :, :length], p[1][:, :, :length]) for p in self.pairs
        ]


def layerskip_style(model: Any, exit_layer: int, drafts: int, new: int) -> Any:
    """A loop in the manner of LayerSkip's (restated, no code of it)."""
    base, layers = model.model, model.model.layers
    # transformers 5.24 renamed the argument, and the old name costs a wrapper around every layer.
    names = inspect.signature(type(layers[0]).forward).parameters
    cache_name = "cache" if "cache" in names else "past_key_values"

    def run(hidden: Tensor, first: int, last: int, start: int, cache: TupleCache) -> Tensor:
        width = hidden.shape[1]
        positions = torch.arange(start, start + width, device=hidden.device)[None]
        mask = torch.full(
            (width, start + width), torch.finfo(hidden.dtype).min, device=hidden.device
        )
        mask = torch.triu(mask, diagonal=start + 1)[None, None]
        rotary = base.rotary_emb(hidden, positions)
        for layer in layers[first:last]:
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_ids=positions,
                position_embeddings=rotary,
                **{cache_name: cache},
            )
        return hidden

    def generate(ids: Tensor) -> tuple[Tensor, None]:
        cache = TupleCache(len(layers))
        tokens = ids[0].tolist()
        hidden = run(base.embed_tokens(ids), 0, len(layers), 0, cache)
        tokens.append(model.lm_head(base.norm(hidden))[0, -1].argmax().item())
        goal = ids.shape[1] + new
        while len(tokens) < goal:
            n = len(tokens)
            budget = min(drafts, goal - n - 1)
            states, drafted, token = [], [], tokens[-1]
            for i in range(budget + 1):
                fed = torch.tensor([[token]], device=ids.device)
                states.append(run(base.embed_tokens(fed), 0, exit_layer, n - 1 + i, cache))
                if i < budget:
                    token = model.lm_head(base.norm(states[-1]))[0, -1].argmax().item()
                    drafted.append(token)
            late = run(torch.cat(states, 1), exit_layer, len(layers), n - 1, cache)
            truth = model.lm_head(base.norm(late))[0].argmax(-1).tolist()
            accepted = 0
            while accepted < budget and drafted[accepted] == truth[accepted]:
                accepted += 1
            tokens += [*drafted[:accepted], truth[accepted]]
            cache.crop(len(tokens) - 1)
        return torch.tensor([tokens], device=ids.device), None

    def wrapped(ids: Tensor) -> tuple[Tensor, None]:
        with torch.no_grad():
            return generate(ids)

    return wrapped


def speed(
    device: torch.device, width: int, repeats: int, short: bool, clock: str
) -> dict[str, Any]:
    large = device.type == "cuda"
    shape: dict[str, Any] = {"layers": 12, "hidden": width, "vocab": 2048, "knee": 4}
    if large:
        shape = {"layers": 32, "hidden": 4096, "vocab": 32000, "knee": 8, "dtype": torch.bfloat16}
    model = synthetic_llama(**shape, acceptance=0.9, device=device)
    depth, knee = shape["layers"], shape["knee"]
    exits, pair, new = (knee // 2, knee, 2 * knee), (knee, 4), 24 if short else 64
    decoder = lede.SelfSpeculativeDecoder(model, exits, max_draft=12)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, shape["vocab"], (60, 32), generator=generator).to(device)
    cost = lede.CostModel.memory_bound(depth)
    common = {"max_new_tokens": new, "pad_token_id": 0}
    probe = lede.fit_probe(decoder, ids[:24], **common)
    table = lede.collect(decoder, ids[24:48], probe=probe, **common)
    began = time.perf_counter()
    config = lede.TrainConfig(steps=100 if short else 600)
    learned = lede.train_policy(table, cost, config).policy
    trained = time.perf_counter() - began
    static, _ = lede.best_static(table, cost)
    contenders = usual_contenders(decoder, pair, None, **common)
    settings = {"do_sample": False, **common}
    ready = lede.SelfSpeculativeDecoder(model, (pair[0],), max_draft=pair[1], compile=True)
    assert ready.compiled is not None
    began = time.perf_counter()
    ready.compiled.warm_up(1, ids.shape[1] + new)
    compiling = time.perf_counter() - began
    contenders |= {
        "no drafts, compiled": generate_with(ready, lede.AutoregressivePolicy(), **settings),
        f"static {pair[0]},{pair[1]}, compiled": generate_with(
            ready, lede.StaticPolicy(*pair), **settings
        ),
        "LayerSkip-style loop": layerskip_style(model, *pair, new),
        f"best static {static.exit_layer},{static.num_draft}": generate_with(
            decoder, static, **settings
        ),
        "LEDE": generate_with(decoder, learned, **settings),
    }
    prompts = [row[None] for row in ids[48 : 50 if short else 54]]
    timer = time.process_time if clock == "cpu" else time.perf_counter
    found = bench(contenders, prompts, device, repeats=repeats, reference="generate", clock=timer)
    result = speedups(found, "generate", cost)
    rate = {name: r["tokens_per_second"] for name, r in result.items()}
    fixed = rate[f"static {pair[0]},{pair[1]}"]
    compiled = rate[f"static {pair[0]},{pair[1]}, compiled"]
    seen = lede.policies.Observation(
        *(np.array([v]) for v in (0, knee, 1, 0.5, 0.2, 0.3, 1.0, 0.7, 1.0, 0.2)),
        probe=np.zeros((1, 2)),
        chain=np.ones(1),
    )
    normed = torch.zeros(1, shape["hidden"], device=device)

    def look() -> None:
        probe(normed, 1).cpu()
        learned.keep_drafting(seen)

    for _ in range(50):
        look()
    began = timer()
    for _ in range(200):
        look()
    one = (timer() - began) / 200
    log = found["LEDE"].log
    round_time = float(np.median(found["LEDE"].seconds, 0).sum()) / max(1, len(log))
    return {
        "shape": {k: str(v) for k, v in shape.items()},
        "pair": pair,
        "clock": clock,
        "contenders": result,
        "static_over_assistant_early_exit": fixed / rate["assistant_early_exit"],
        "static_over_layerskip_style": fixed / rate["LayerSkip-style loop"],
        "compiled_static_over_assistant_early_exit": compiled / rate["assistant_early_exit"],
        "compiled_static_over_layerskip_style": compiled / rate["LayerSkip-style loop"],
        "compiled_static_over_compiled_no_drafts": compiled / rate["no drafts, compiled"],
        "compiling_seconds": compiling,
        "policy_training_seconds": trained,
        "seconds_of_a_look": one,
        "looks_share_of_a_round": one * float(np.mean([r.looks for r in log])) / round_time,
    }


def batches(
    device: torch.device, width: int, repeats: int, short: bool, clock: str
) -> dict[str, Any]:
    model = synthetic_llama(
        layers=12, hidden=width, vocab=2048, knee=4, acceptance=0.9, device=device
    )
    decoder = lede.SelfSpeculativeDecoder(model, (4,), max_draft=12)
    ids = torch.randint(1, 2048, (48, 32), generator=torch.Generator().manual_seed(1)).to(device)
    settings = {"do_sample": False, "max_new_tokens": 24 if short else 64, "pad_token_id": 0}
    contenders = {
        "generate": plain(model, **settings),
        "no drafts": generate_with(decoder, lede.AutoregressivePolicy(), **settings),
        "static 4,4": generate_with(decoder, lede.StaticPolicy(4, 4), **settings),
        "threshold 4,0.4": generate_with(decoder, lede.ConfidencePolicy(4, 0.4), **settings),
    }
    found = {}
    for size in (1, 2) if short else (1, 2, 4, 8, 16):
        prompts = list(ids[: 3 * size].split(size))
        timer = time.process_time if clock == "cpu" else time.perf_counter
        one = bench(contenders, prompts, device, repeats=repeats, reference="generate", clock=timer)
        result = speedups(one, "generate")
        for values in result.values():
            values["tokens_per_second"] *= size
        found[str(size)] = result
    return {"width": width, "clock": clock, "batch_sizes": found}


def collection(short: bool) -> dict[str, Any]:
    model = synthetic_llama(layers=8, hidden=128, vocab=512, knee=3, acceptance=0.85)
    decoder = lede.SelfSpeculativeDecoder(model, (1, 3, 5), max_draft=12)
    ids = torch.randint(
        1, 512, (8 if short else 24, 16), generator=torch.Generator().manual_seed(0)
    )
    common = {"max_new_tokens": 32, "pad_token_id": 0}
    began = time.perf_counter()
    table = lede.collect(decoder, ids, **common)
    together = (time.perf_counter() - began) / int((table.lengths - 1).sum())
    began = time.perf_counter()
    rollouts = lede.collect_rollouts(decoder, ids[:4], batch_size=1, **common)
    apart = (time.perf_counter() - began) / len(rollouts)
    return {
        "seconds_per_start": {"table": together, "one_by_one": apart},
        "ratio": apart / together,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--sections", default="policy,speed,batch,collection")
    parser.add_argument("--widths", default="128,256", help="Of the models of section speed.")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--small", action="store_true", help="The model of demo --quick.")
    parser.add_argument("--short", action="store_true", help="Little of everything.")
    parser.add_argument("--note", default="", help="About the machine, to be kept.")
    options = parser.parse_args()
    device = select_device(options.device)
    torch.set_num_threads(1)
    wanted = options.sections.split(",")
    seeds = [int(s) for s in options.seeds.split(",")]
    parts = {
        "policy": lambda: policy(seeds, options.short, options.small),
        "speed": lambda: {
            f"width {w}": speed(device, w, options.repeats, options.short, options.clock)
            for w in map(int, options.widths.split(","))
        },
        "batch": lambda: batches(
            device,
            int(options.widths.split(",")[-1]),
            options.repeats,
            options.short,
            options.clock,
        ),
        "collection": lambda: collection(options.short),
    }
    for name in wanted:
        result = {
            "environment": environment("lede", "transformers"),
            "threads": torch.get_num_threads(),
            "note": options.note,
            name: parts[name](),
        }
        write_json(options.out / f"lede-{name}-{device.type}.json", result)


if __name__ == "__main__":
    main()

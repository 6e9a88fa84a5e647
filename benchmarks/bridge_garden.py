"""The hybrid loss beside pure soft labels and beside a plain restatement of the formula.

Run with ``nox -s bench -- bridge-garden``; what is measured is said in `bridge_garden.bench`. And
exact κ by dynamic programming beside a plain recursion over all texts; and a step of the trainer
beside one of abkd's, and beside one whose responses the student has to write first.
"""

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridge_garden import exact_kappa
from bridge_garden.bench import measure_losses
from bridge_garden.ledger import Ledger, LedgerState, WindowStudent
from shared_core.device import environment, measure_time, select_device
from shared_core.run import write_json


def kappa(repeats: int) -> dict[str, Any]:
    """Exact κ of the first state: dynamic programming against recursion over all texts."""
    ledger = Ledger(modulus=2, ops=(0.6, 0.4), fillers=2, fillers_per_round=1, rounds=3, window=2)
    student = WindowStudent(ledger.vocab_size, window=2, width=8)

    def to_go(state: LedgerState) -> float:
        if ledger.is_terminal(state):
            return 0.0
        p = ledger.next_dist(state)
        lq = torch.log_softmax(student.on_states([state])[0].double(), -1)
        total = (torch.xlogy(p, p) - p * lq).sum().item()
        for a in p.nonzero().flatten().tolist():
            total += p[a].item() * to_go(ledger.step(state, a))
        return total

    def recursive() -> list[float]:
        return [to_go(ledger.step(ledger.initial, a)) for a in range(ledger.vocab_size)]

    def dynamic() -> Tensor:
        return exact_kappa(ledger, student.on_states, [ledger.initial])

    Q = torch.tensor(recursive(), dtype=torch.float64)
    difference = (dynamic()[0] - (Q - (ledger.next_dist(ledger.initial) * Q).sum())).abs().max()
    slow, fast = measure_time(recursive, dynamic, repeats=repeats, warmup=0)
    return {
        "seconds": {"recursive": slow.median, "dynamic": fast.median},
        "recursive_over_dynamic": slow.median / fast.median,
        "largest_difference": difference.item(),
    }


def steps(repeats: int, width: int = 64, vocab: int = 8192, response: int = 512) -> dict[str, Any]:
    """Seconds of a trainer's step at equal batch, Llamas of 8 layers: hybrid, abkd's, on-policy."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from abkd.trainer import DistillationConfig, DistillationTrainer
    from bridge_garden.trainer import HybridConfig, HybridTrainer

    def llama(width: int) -> LlamaForCausalLM:
        config = LlamaConfig(
            vocab_size=vocab, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=8,
            num_attention_heads=2, max_position_embeddings=2048, eos_token_id=None,
        )  # fmt: skip
        return LlamaForCausalLM(config)

    torch.manual_seed(0)
    ids = torch.randint(vocab, (4, 32 + response)).tolist()
    rows = [{"input_ids": row, "labels": [-100] * 32 + row[32:]} for row in ids]
    common: dict[str, Any] = {
        "max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True, "report_to": "none",
        "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no",
        "dataloader_pin_memory": False, "max_length": 32 + response,
    }  # fmt: skip
    teacher = llama(2 * width)
    own = {"on_policy_fraction": 1.0, "max_new_tokens": response}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {
            "hybrid": HybridTrainer(
                llama(width), teacher, HybridConfig(folder, **common), train_dataset=rows
            ),
            "abkd": DistillationTrainer(
                llama(width), teacher, DistillationConfig(folder, alpha=1.0, beta=0.0, **common),
                train_dataset=rows,
            ),
            "on-policy": HybridTrainer(
                llama(width), teacher, HybridConfig(folder, **common, **own), train_dataset=rows
            ),
        }  # fmt: skip
        with contextlib.redirect_stdout(sys.stderr):
            timings = measure_time(*(t.train for t in trainers.values()), repeats=repeats)
    seconds = {name: t.median / 2 for name, t in zip(trainers, timings, strict=True)}
    return {
        "seconds": seconds,
        "hybrid_over_abkd": seconds["hybrid"] / seconds["abkd"],
        "on_policy_over_hybrid": seconds["on-policy"] / seconds["hybrid"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--note", default="", help="What to say of the machine.")
    options = parser.parse_args()
    device = select_device(options.device)
    sizes = [(512, 50_000, 128)] if device.type == "cpu" else [(8192, 151_936, 2048)]
    results: dict[str, Any] = {
        f"{N}x{V}": measure_losses(N, V, H, repeats=options.repeats, device=device)
        for N, V, H in sizes
    }
    results["kappa"] = kappa(3)
    results["steps"] = steps(3)
    results["note"] = options.note
    results["environment"] = environment("bridge-garden", "abkd")
    name = f"bridge_garden-{device.type}.json"
    write_json(options.out / name, results)
    print(options.out / name)


if __name__ == "__main__":
    main()

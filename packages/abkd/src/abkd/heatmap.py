"""Choosing α and β for a task of one's own: short runs on a grid, the better ones run longer.

All runs of a round start from the same weights and see the same batches. After each round the best
share goes on to the next, whose runs are twice as long (successive halving).
"""

import contextlib
import json
import math
import sys
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from abkd.evaluation import compare, generate, prompts_and_references, rouge_l
from abkd.train import (
    TrainSettings,
    load_causal_lm,
    load_examples,
    load_tokenizer,
    trainer_arguments,
)
from shared_core.errors import InputError
from shared_core.run import RunFolder, progress, write_json

__all__ = ["METRICS", "Search", "figure", "heatmap", "search_grid"]

METRICS = ("ce", "fkl", "rkl", "tv", "agreement", "rouge_l")
_HIGHER = ("agreement", "rouge_l")
CELLS = "cells.json"


@dataclass(frozen=True)
class Search:
    """How the grid is searched.

    Args:
        sums: Values of α + β.
        alpha_step: Step of α from itself up to below each sum.
        metric: One of `METRICS`, on held-out rows; the α-β loss itself cannot compare its cells.
        rounds: Rounds of successive halving.
        keep: Share of the cells that goes on.
        validation: Held-out data, named like the training data; by default every tenth row.
        limit: Held-out rows to use.

    Raises:
        InputError: If a setting is impossible.
    """

    sums: tuple[float, ...] = (0.9, 1.0, 1.1, 1.2)
    alpha_step: float = 0.1
    metric: str = "ce"
    rounds: int = 3
    keep: float = 0.25
    validation: str | None = None
    limit: int = 64

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise InputError(f"metric is {self.metric!r}; accepted: {', '.join(METRICS)}")
        if self.rounds < 1 or not 0 < self.keep < 1 or self.limit < 1:
            raise InputError(
                f"rounds={self.rounds}, keep={self.keep}, limit={self.limit}; accepted: 1 round or "
                "more, a share between 0 and 1, 1 row or more"
            )
        search_grid(self.sums, self.alpha_step)

    def better(self, value: float) -> float:
        """A key for sorting: smaller is better, what is not a number comes last."""
        if not math.isfinite(value):
            return math.inf
        return -value if self.metric in _HIGHER else value


def search_grid(
    sums: tuple[float, ...] = (0.9, 1.0, 1.1, 1.2), alpha_step: float = 0.1
) -> list[tuple[float, float]]:
    """The authors' grid: for each α + β, α in steps, with β above 0.

    Raises:
        InputError: If the sums or the step are not positive.

    Examples:
        >>> search_grid((0.5,), 0.2)
        [(0.2, 0.3), (0.4, 0.1)]
    """
    if not sums or not all(s > 0 and math.isfinite(s) for s in sums) or not alpha_step > 0:
        raise InputError(f"sums={sums}, alpha_step={alpha_step}; all have to be above 0")
    pairs = []
    for total in sums:
        for i in range(1, int(total / alpha_step + 1)):
            alpha = round(i * alpha_step, 6)
            if total - alpha > 1e-6:
                pairs.append((alpha, round(total - alpha, 6)))
    return pairs


def heatmap(
    settings: TrainSettings,
    search: Search,
    out: Path,
    device: str = "auto",
    *,
    resume: bool = False,
) -> dict[str, Any]:
    """Search α and β; each finished cell is written down, and kept with `resume`.

    Args:
        settings: The runs; ``max_steps`` is the length of the first round's.
        search: The grid and the rounds.
        out: The folder of the run.
        device: ``cpu``, or what transformers finds.
        resume: Go on with the search found in `out`.

    Returns:
        ``cells`` (each with its round, α, β and measures), ``best``, ``metric``.

    Raises:
        InputError: If something cannot be loaded, or the folder holds another search.
    """
    if settings.max_steps < 1:
        raise InputError("say how long the runs of the first round are: --max-steps 50")
    described = {"settings": asdict(settings), "search": asdict(search)}
    cells = _earlier(out, described, resume)
    run = RunFolder(out, resume=resume)
    run.write_config("abkd heatmap", described, distributions=["abkd", "transformers"])
    trial = _Trial(settings, search, out, device)
    left = search_grid(search.sums, search.alpha_step)
    for turn in range(search.rounds):
        steps = settings.max_steps * 2**turn
        for alpha, beta in progress(left, description=f"round {turn + 1}", unit="run"):
            if any(_key(c) == (turn, alpha, beta) for c in cells):
                continue
            found = trial(alpha, beta, steps)
            cells.append({"round": turn, "steps": steps, "alpha": alpha, "beta": beta, **found})
            write_json(out / CELLS, cells)
        done = [c for c in cells if c["round"] == turn]
        done.sort(key=lambda c: search.better(_number(c[search.metric])))
        keep = max(1, math.ceil(search.keep * len(done)))
        left = [(c["alpha"], c["beta"]) for c in done[:keep]]
    best = done[0]
    metrics = {"metric": search.metric, "best": best, "cells": cells}
    run.write_metrics(metrics)
    return metrics


def _key(cell: dict[str, Any]) -> tuple[int, float, float]:
    return cell["round"], cell["alpha"], cell["beta"]


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _earlier(out: Path, described: dict[str, Any], resume: bool) -> list[dict[str, Any]]:
    """The finished cells of the search in a folder."""
    if not (out / CELLS).is_file():
        return []
    if not resume:
        raise InputError(
            f"{out} holds an earlier search; continue it with --resume, or choose another --out"
        )
    try:
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
        cells: list[dict[str, Any]] = json.loads((out / CELLS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"the search in {out} cannot be read; choose another --out") from error
    if config.get("settings") != json.loads(json.dumps(described)):
        raise InputError(
            f"--resume, but the search in {out} has other settings (its config.json); give the "
            "same, or choose another --out"
        )
    return cells


class _Trial:
    """What all cells share: models, weights to start from, batches, held-out rows."""

    def __init__(self, settings: TrainSettings, search: Search, out: Path, device: str) -> None:
        from abkd.data import CompletionCollator, tokenize_dataset
        from abkd.vocab import align_vocab

        if settings.teacher is None:
            raise InputError("the search compares with a teacher: pass --teacher")
        self.settings, self.search, self.out, self.device = settings, search, out, device
        self.student = load_causal_lm(settings.student)
        self.teacher = load_causal_lm(settings.teacher)
        self.tokenizer = load_tokenizer(settings.student)
        self.start = {k: v.clone() for k, v in self.student.state_dict().items()}
        rows = list(load_examples(settings.data, settings.max_length))
        if search.validation is None:
            held = rows[::10]
            rows = [row for i, row in enumerate(rows) if i % 10]
        else:
            held = list(load_examples(search.validation, settings.max_length))
        held = held[: search.limit]
        if not held or not rows:
            raise InputError("the data have too few rows to hold some out; pass --validation")
        options = (self.tokenizer, settings.max_length, True, settings.max_prompt_length)
        self.rows = tokenize_dataset(rows, *options)
        collate = CompletionCollator(self.tokenizer.pad_token_id or 0)
        tokens, size = tokenize_dataset(held, *options), settings.batch_size
        self.batches = [collate(tokens[i : i + size]) for i in range(0, len(tokens), size)]
        self.vocab = align_vocab(
            self.student, self.teacher, self.tokenizer, load_tokenizer(settings.teacher)
        )
        self.texts = prompts_and_references(held) if search.metric == "rouge_l" else None
        if self.texts is not None:
            rouge_l(["a"], ["a"])  # a missing library is told before the work

    def __call__(self, alpha: float, beta: float, steps: int) -> dict[str, float]:
        """Train one cell from the common start and measure it."""
        from abkd.trainer import DistillationTrainer

        self.student.load_state_dict(self.start)
        chosen = replace(self.settings, alpha=alpha, beta=beta, max_steps=steps)
        args = trainer_arguments(
            chosen,
            self.out / "trainer",
            self.device,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "alpha=.*outside")  # the grid goes above 1 knowingly
            trainer = DistillationTrainer(
                self.student, self.teacher, args, self.rows, processing_class=self.tokenizer
            )
        with contextlib.redirect_stdout(sys.stderr):
            trainer.train()
        found = compare(self.student, self.teacher, self.batches, self.vocab)
        if self.texts is not None:
            answers = generate(
                self.student, self.tokenizer, self.texts[0], seed=chosen.seed,
                max_new_tokens=chosen.max_new_tokens, batch_size=chosen.batch_size,
            )  # fmt: skip
            scores = rouge_l(answers, self.texts[1])
            found["rouge_l"] = sum(scores) / len(scores)
        return found


def figure(metrics: dict[str, Any]) -> Any:
    """The first round as a map of α and α + β; later rounds as rings, the best as a star."""
    from shared_core.plots import new_figure

    cells, name = metrics["cells"], metrics["metric"]
    first = [c for c in cells if c["round"] == 0]
    alphas = sorted({c["alpha"] for c in first})
    sums = sorted({round(c["alpha"] + c["beta"], 6) for c in first})

    def place(cell: dict[str, Any]) -> tuple[int, int]:
        return alphas.index(cell["alpha"]), sums.index(round(cell["alpha"] + cell["beta"], 6))

    field = [[math.nan] * len(alphas) for _ in sums]
    for cell in first:
        x, y = place(cell)
        field[y][x] = _number(cell[name])
    fig, ax = new_figure(figsize=(max(5.0, 0.75 * len(alphas) + 2), 0.7 * len(sums) + 2))
    picture = ax.imshow(
        field, origin="lower", aspect="auto", cmap="viridis" if name in _HIGHER else "viridis_r"
    )
    for x in range(len(alphas)):
        for y in range(len(sums)):
            if math.isfinite(field[y][x]):
                red, green, blue, _ = picture.cmap(picture.norm(field[y][x]))
                dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
                ax.text(
                    x, y - 0.25, f"{field[y][x]:.3g}", ha="center", va="center", fontsize=7,
                    color="white" if dark else "black",
                )  # fmt: skip
    later = [c for c in cells if c["round"] > 0]
    for cell in later:
        x, y = place(cell)
        ax.scatter(x, y + 0.15, s=50 + 60 * cell["round"], facecolors="none", edgecolors="#D55E00")
    x, y = place(metrics["best"])
    ax.scatter(x, y + 0.15, marker="*", s=90, color="#D55E00", edgecolors="white", linewidths=0.6)
    ax.set_xticks(range(len(alphas)), [f"{a:g}" for a in alphas])
    ax.set_yticks(range(len(sums)), [f"{s:g}" for s in sums])
    ax.set_xlabel("α")
    ax.set_ylabel("α + β")
    ax.grid(visible=False)
    ax.set_title(f"{name} after the first round; rings: later rounds, star: the best")
    fig.colorbar(picture, ax=ax, label=name)
    return fig

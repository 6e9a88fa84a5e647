"""The ratios of all benchmarks in one table, and what has become worse since an earlier time.

``python benchmarks/compare.py`` prints the table of what is in ``results/`` and, with ``--page``,
writes it for the site. With ``--before DIR`` it compares, and fails where a ratio is worse than it
was by more than `NOISE`. ``nox -s bench`` does this after its measurements.

Ratios alone are compared: seconds belong to a machine.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
PAGE = Path(__file__).resolve().parent.parent / "docs" / "measured.md"
# Two runs on one quiet machine differ by less; on machines that others use, by more.
NOISE = 0.25


@dataclass(frozen=True)
class Ratio:
    """One number of a result file.

    Attributes:
        package: Whose it is.
        file: The result file without its ending.
        path: The keys that lead to it.
        says: What it means.
        target: What the package wants it to be at least, or at most if `small`.
        small: Whether less is better.
    """

    package: str
    file: str
    path: tuple[str | int, ...]
    says: str
    target: float | None = None
    small: bool = False


LONG, SHORT = "4096 tokens, 32000 classes, width 32", "192 tokens, 50257 classes, width 64"
RATIOS = (
    Ratio("abkd", "abkd-cpu", (SHORT, "ratios", "plain_ab over ab, time"),
          "plain formula / `ab_divergence`, time", 5),
    Ratio("abkd", "abkd-cpu", (SHORT, "ratios", "ab over plain_ab, memory"),
          "`ab_divergence` / plain formula, memory", 0.35, small=True),
    Ratio("abkd", "abkd-cpu", (SHORT, "ratios", "JSD over TRL JSD, time"),
          "our Jensen-Shannon divergence / TRL's, time", small=True),
    Ratio("abkd", "abkd-cpu", (LONG, "ratios", "fused over heads and plain_ab, time"),
          "fused loss / heads and plain formula, time", small=True),
    Ratio("abkd", "abkd-cpu", (LONG, "ratios", "fused over heads and plain_ab, memory"),
          "fused loss / heads and plain formula, memory", 0.15, small=True),
    Ratio("bridge-garden", "bridge_garden-cpu", ("512x50000", "ratios", "hybrid over soft, time"),
          "hybrid loss / soft labels alone, time", 1.05, small=True),
    Ratio("bridge-garden", "bridge_garden-cpu", ("512x50000", "ratios", "chain over hybrid, time"),
          "published chain / hybrid loss, time", 3),
    Ratio("bridge-garden", "bridge_garden-cpu",
          ("512x50000", "ratios", "hybrid over chain, memory"),
          "hybrid loss / published chain, memory", 0.1, small=True),
    Ratio("bridge-garden", "bridge_garden-cpu", ("kappa", "recursive_over_dynamic"),
          "recursion / dynamic programme for κ, time", 20),
    Ratio("content-shift", "content_shift-cpu", ("separate_over_bucket",),
          "separate runs / bucket of recipes, time", 1.25),
    Ratio("diffeat", "diffeat-cpu", ("official_over_ours",),
          "published loop / ours, batch 1, time", 1.25),
    Ratio("diffeat", "diffeat-cpu", ("stopped_over_bare",),
          "stopped pass / whole pass, time", 0.87, small=True),
    Ratio("edge-ood", "edge_ood-cpu", ("loss_128_128_80", "plain", "times_the_first"),
          "plain formula / `EdgeLoss`, time", 1),
    Ratio("edge-ood", "edge_ood-cpu", ("gap_8192_2048", "pairwise", "times_the_first"),
          "pairwise gap / sorted gap, time", 100),
    Ratio("edge-ood", "edge_ood-cpu", ("spectrum_128_2048", "svd", "times_the_first"),
          "SVD / Gram matrix for the dilation distance, time", 5),
    Ratio("focal-sam", "focal_sam-cpu", ("resnet32", "plain_focal_over_focal"),
          "plain Focal-SAM / ours, ResNet-32 step", 0.98),
    Ratio("focal-sam", "focal_sam-cpu",
          ("300_small_tensors", "overhead_of_plain_focal_over_focal"),
          "plain Focal-SAM / ours, what a step adds to its passes, 300 small tensors", 2.5),
    Ratio("focal-sam", "focal_sam-cpu", ("resnet32", "peer_sam_over_sam"),
          "pytorch_optimizer's SAM / ours, ResNet-32 step"),
    Ratio("gmsa", "gmsa-cpu", ("compress", "official over ours, time"),
          "pipeline in the authors' style / `compress`, time", 1.5),
    Ratio("gmsa", "gmsa-cpu", ("merge", "loop over ours, time"),
          "loop over rows / `group_merge`, time", 1.3),
    Ratio("gmsa", "gmsa-cpu", ("train", "official over ours, time"),
          "autoencoding step in the authors' style / ours, time", 1.2),
    Ratio("gmsa", "gmsa-cpu", ("answer", "speed-up at n = 4096, rate 4"),
          "whole prompt / compressed prompt, from question to answer, time", 2),
    Ratio("internet-neg", "internet_neg-cpu", ("scoring", "formula", "ratio"),
          "plain formula / our scores, from features, time"),
    Ratio("internet-neg", "internet_neg-cpu", ("scoring", "published_flow_with_its_file", "ratio"),
          "published flow / our scores, from features, time", 3),
    Ratio("internet-neg", "internet_neg-cpu", ("inversion", "ratio"),
          "published flow / ours, inversion, time", 4),
    Ratio("internet-neg", "internet_neg-cpu", ("stream", "ratio"),
          "published flow / ours, whole stream, time", 4),
    Ratio("lede", "lede-speed-cpu", ("speed", "width 128", "static_over_layerskip_style"),
          "ours / loop in LayerSkip's style, width 128, tokens a second", 1.2),
    Ratio("lede", "lede-speed-cpu", ("speed", "width 128", "compiled_static_over_layerskip_style"),
          "ours, compiled / loop in LayerSkip's style, width 128, tokens a second", 1.2),
    Ratio("lede", "lede-speed-cpu", ("speed", "width 256", "static_over_assistant_early_exit"),
          "ours / transformers' early exit, width 256, tokens a second", 1.3),
    Ratio("lede", "lede-speed-cpu", ("speed", "width 256", "static_over_layerskip_style"),
          "ours / loop in LayerSkip's style, width 256, tokens a second", 1.2),
    Ratio("lede", "lede-speed-cpu",
          ("speed", "width 256", "compiled_static_over_assistant_early_exit"),
          "ours, compiled / transformers' early exit, width 256, tokens a second", 1.3),
    Ratio("lede", "lede-speed-cpu", ("speed", "width 256", "compiled_static_over_layerskip_style"),
          "ours, compiled / loop in LayerSkip's style, width 256, tokens a second", 1.2),
    Ratio("openworld-auc", "openworld_auc-cpu", ("metric", 1, "times_faster_than_roc_curve"),
          "ROC curve on lists / OpenworldAUC, a million samples, time", 3),
    Ratio("openworld-auc", "openworld_auc-cpu", ("training_step", "times_faster"),
          "published training step / ours, time", 5),
)  # fmt: skip


def value_of(ratio: Ratio, folder: Path) -> float | None:
    """The number in that folder of results, or ``None`` where it was not measured."""
    file = folder / f"{ratio.file}.json"
    if not file.is_file():
        return None
    found: Any = json.loads(file.read_text(encoding="utf-8"))
    for key in ratio.path:
        try:
            found = found[key]
        except (KeyError, IndexError, TypeError):
            return None
    return float(found)


def met(ratio: Ratio, value: float) -> str:
    """Whether a target is reached, in a word."""
    if ratio.target is None:
        return ""
    reached = value <= ratio.target if ratio.small else value >= ratio.target
    return "met" if reached else "missed"


def table(folder: Path) -> str:
    """All ratios as a Markdown table."""
    lines = ["| package | what | ratio | target | |", "|---|---|---|---|---|"]
    for ratio in RATIOS:
        value = value_of(ratio, folder)
        if value is None:
            continue
        sign = "≤" if ratio.small else "≥"
        target = "" if ratio.target is None else f"{sign} {ratio.target:g}"
        said = f"| {ratio.package} | {ratio.says} | {value:.3g} | {target} | {met(ratio, value)} |"
        lines.append(said)
    return "\n".join(lines) + "\n"


def page(folder: Path) -> str:
    """The page of the site."""
    return (
        "# Measured side by side\n\n"
        "Ratios from `nox -s bench`, our packages and a peer in turns in one process; the files\n"
        "in `benchmarks/results/` say on what machine, how often, and with which spread. This\n"
        "page is made from them by `benchmarks/compare.py --page`; a test keeps it true. Targets\n"
        "that are missed stay in.\n\n" + table(folder)
    )


def worse(before: Path, after: Path) -> Iterator[str]:
    """A line for each ratio that is worse than it was, by more than noise."""
    for ratio in RATIOS:
        old, new = value_of(ratio, before), value_of(ratio, after)
        if old is None or new is None:
            continue
        if new > old * (1 + NOISE) if ratio.small else new < old / (1 + NOISE):
            yield f"{ratio.package}: {ratio.says}: {old:.3g} before, {new:.3g} now"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--before", type=Path, help="Compare with the results in this folder.")
    parser.add_argument("--page", action="store_true", help="Write the page of the site.")
    arguments = parser.parse_args()
    print(table(arguments.results))
    if arguments.page:
        PAGE.write_text(page(arguments.results), encoding="utf-8")
    found = list(worse(arguments.before, arguments.results)) if arguments.before else []
    for line in found:
        print(f"worse: {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

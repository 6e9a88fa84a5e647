"""Several models on the same test images: reports, paired tests and pictures in a run folder."""

from collections.abc import Mapping
from typing import Any, Literal

import torch

from openworld_auc import plots
from openworld_auc.gmop import GMoP
from openworld_auc.intervals import compare_openworld_auc
from openworld_auc.report import openworld_report
from openworld_auc.train import Features, evaluation
from shared_core.run import RunFolder

__all__ = ["evaluate_models"]

COLUMNS = {
    "base_acc": "base",
    "new_acc": "new",
    "hm": "HM",
    "auroc": "AUROC",
    "openworld_auc": "OpenworldAUC",
}


def evaluate_models(
    run: RunFolder,
    models: Mapping[str, GMoP],
    base: Features,
    new: Features,
    *,
    ci: Literal["placement", "bootstrap"] = "placement",
    by_class: bool = False,
    seed: int = 0,
    history: Any = None,
    seconds: float = 0.0,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Evaluate models on the same features, the first against the others.

    Args:
        run: Gets ``metrics.json``, ``curves.png`` and ``scores.png``.
        models: By name, with new classes set.
        base: Features and labels among the base classes.
        new: Features and labels among the new classes.
        ci: Method of the intervals.
        by_class: Whether the bootstrap draws whole classes.
        seed: Of the bootstrap.
        history: Losses by epoch, for the file.
        seconds: How long training took, for the file.

    Returns:
        ``test``, a report by model, and ``against``, the first model's comparison with each other;
        and the rows of a table.
    """
    cases = {name: evaluation(model, base, new) for name, model in models.items()}
    classes = torch.cat([base[1], new[1]]) if by_class else None  # each domain draws its own
    reports = {
        name: openworld_report(
            *case, ci=ci, classes=classes, generator=torch.Generator().manual_seed(seed)
        )
        for name, case in cases.items()
    }
    run.save_figure("curves", plots.curve_figure(cases))
    first, *others = cases
    run.save_figure("scores", plots.histogram_figure(cases[first]))
    tests = {n: compare_openworld_auc(cases[first], cases[n])._asdict() for n in others}
    summary = {"test": {n: r.to_dict() for n, r in reports.items()}, "against": tests}
    run.write_metrics({**summary, "history": history}, timing={"training_seconds": seconds})
    rows = [
        {
            "method": name,
            **{short: round(100 * getattr(r, key), 2) for key, short in COLUMNS.items()},
            "interval": f"{100 * (r.low or 0):.2f}-{100 * (r.high or 0):.2f}",
            "p": f"{tests[name]['p_value']:.2g}" if name in tests else "",
        }
        for name, r in reports.items()
    ]
    return summary, rows

"""One set of scores gives the same out-of-distribution numbers whichever package reports them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

import edge_ood
import edge_ood.evaluate
import internet_neg
import internet_neg.evaluate
import openworld_auc
from shared_core.metrics import ood_metrics

KEYS = ("auroc", "aupr_in", "aupr_out", "fpr95", "fpr95_ood_positive")


@pytest.fixture(scope="module", params=["distinct scores", "tied scores"])
def logits(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray]:
    """Logits of 300 known and 200 unknown samples for six labels."""
    generator = np.random.default_rng(0)
    known = generator.normal(0.4, 1.5, (300, 6))
    unknown = generator.normal(-0.4, 1.5, (200, 6))
    if request.param == "tied scores":
        # Few different rows, and no logit twice in one, so that ties do not depend on rounding.
        rows = generator.normal(0, 1.5, (12, 6))
        known, unknown = rows[generator.integers(3, 12, 300)], rows[generator.integers(0, 9, 200)]
    return known.astype(np.float32), unknown.astype(np.float32)


def by_scikit_learn(known: np.ndarray, unknown: np.ndarray) -> dict[str, float]:
    """The numbers from scikit-learn's curves alone."""
    scores = np.concatenate([known, unknown]).astype(np.float64)
    inside = np.concatenate([np.ones(len(known)), np.zeros(len(unknown))])

    def fpr(truth: np.ndarray, values: np.ndarray) -> float:
        false, true, _ = roc_curve(truth, values, drop_intermediate=False)
        return float(false[np.argmax(true >= 0.95)])

    return {
        "auroc": float(roc_auc_score(inside, scores)),
        "aupr_in": float(average_precision_score(inside, scores)),
        "aupr_out": float(average_precision_score(1 - inside, -scores)),
        "fpr95": fpr(inside, scores),
        "fpr95_ood_positive": fpr(1 - inside, -scores),
    }


def only(found: Mapping[str, Any]) -> dict[str, float]:
    return {key: found[key] for key in KEYS}


def test_three_packages_and_scikit_learn_agree(logits: tuple[np.ndarray, np.ndarray]) -> None:
    known, unknown = logits
    scores = [edge_ood.joint_energy(torch.from_numpy(z)) for z in logits]

    core = only(ood_metrics(*scores))
    assert core == pytest.approx(by_scikit_learn(*(s.numpy() for s in scores)), abs=1e-12)

    multilabel = edge_ood.evaluate.evaluate(known, {"unknown": unknown}, rule="at_least")
    assert only(multilabel["scorers"]["joint_energy"]["ood"]["unknown"]) == core

    assert only(internet_neg.ood_metrics(*scores)) == core

    stream = internet_neg.evaluate.StreamResult(
        output=internet_neg.OODOutput(
            *[torch.cat(scores)] * 2,
            *[torch.zeros(500, dtype=torch.long)] * (len(internet_neg.OODOutput._fields) - 2),
        ),
        order=torch.arange(500),
        growth=[{"bank": 0}],
    )
    assert only(internet_neg.evaluate.stream_metrics(stream, n_id=300)) == core


def test_openworld_auc_of_a_perfect_classifier_is_the_auroc(
    logits: tuple[np.ndarray, np.ndarray],
) -> None:
    known, unknown = (edge_ood.joint_energy(torch.from_numpy(z)) for z in logits)
    is_base = torch.cat([torch.ones_like(known), torch.zeros_like(unknown)]).bool()
    found = openworld_auc.openworld_auc(
        torch.cat([known, unknown]), torch.ones_like(is_base), is_base
    )
    assert found.item() == pytest.approx(ood_metrics(known, unknown)["auroc"], abs=1e-12)

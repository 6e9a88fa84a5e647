"""The demo's data, its measurements, and what it says of wins and losses."""

import dataclasses

import pytest
import torch

from edge_ood.demo import (
    METHODS,
    DemoSettings,
    ShapesTask,
    figures,
    report,
    run_seed,
    summarize,
    table,
    tell,
)
from shared_core.errors import InputError
from shared_core.metrics import auroc

SHORT = DemoSettings(train=256, test=300, ood=60, epochs=2)


@pytest.fixture(scope="module")
def results():
    return [run_seed(seed, ["bce", "edge", "conf"], SHORT) for seed in (0, 1)]


@pytest.mark.smoke
def test_the_task():
    task = ShapesTask(0, SHORT)
    assert len(task.class_names) == 20
    assert task.train[1].sum(0).equal(task.counts.float())
    assert (task.test[1].sum(1) > 0).all()
    assert {name: len(x) for name, x in task.ood.items()} == {
        "shapes": 60,
        "colors": 60,
        "textures": 60,
    }
    assert sum(len(x) for x in task.oe.values()) == 256
    everything = [task.train[0], task.test[0], *task.oe.values(), *task.ood.values()]
    rows = [x.flatten(1) for x in everything]
    for i, first in enumerate(rows):
        for second in rows[i + 1 :]:
            assert torch.cdist(first, second).min() > 0.5


def test_the_same_seed_gives_the_same_numbers(results):
    again = run_seed(0, ["edge"], SHORT)
    assert again.methods["edge"].ood == results[0].methods["edge"].ood
    assert again.methods["edge"].history == results[0].methods["edge"].history


def test_measurements_are_of_the_energies(results):
    found = results[0].methods["edge"]
    task = results[0].task
    head = task.counts.argsort(descending=True, stable=True)[:10]
    tail = ~task.test[1][:, head].any(1)
    assert found.tail["n_id"] == tail.sum()
    together = torch.cat(list(found.ood_energies.values()))
    assert found.tail["auroc"] == auroc(found.id_energies[tail], together)
    assert found.ood["colors"]["auroc"] == auroc(found.id_energies, found.ood_energies["colors"])
    assert [row["l_gap"] > 0 for row in found.history] == [False, True]
    assert all(row["l_gap"] == 0 for row in results[0].methods["conf"].history)


def test_summary_and_ranking(results):
    metrics = report(results)
    values = metrics["methods"]["edge"]["auroc"]["values"]
    assert values == [r.methods["edge"].auroc for r in results]
    assert metrics["methods"]["edge"]["auroc"]["mean"] == pytest.approx(sum(values) / 2)
    low, high = metrics["methods"]["bce"]["tail_auroc_interval_first_seed"]
    assert low <= results[0].methods["bce"].tail["auroc"] <= high
    names = {r["name"] for r in metrics["outlier_ranking_first_seed"]}
    assert names == {"objects", "textures", "mixture", "noise"}
    assert [row["method"] for row in table(metrics["methods"])] == [
        "BCE",
        "EDGE",
        "EDGE, confidence only",
    ]


def test_losses_are_told(results):
    summary = summarize(results)
    bce, edge = summary["bce"], summary["edge"]
    for key, ours, theirs in (("fpr95", 0.6, 0.5), ("mAP", 0.4, 0.5), ("tail_auroc", 0.3, 0.6)):
        edge[key] = {**edge[key], "mean": ours}
        bce[key] = {**bce[key], "mean": theirs}
    for name in ("shapes", "colors", "textures"):
        edge["ood"][name]["fpr95"]["mean"] = 0.2
        bce["ood"][name]["fpr95"]["mean"] = 0.2 if name == "colors" else 0.5
    told = tell(summary, results)
    assert "FPR95 by +10.0 points" in told
    assert "mAP by -10.0" in told
    assert "It does not lower FPR95 on: colors." in told
    assert "below the unknown ones" not in told
    bce["tail_auroc"]["mean"] = 0.4
    assert "40.0 %: below the unknown ones." in tell(summary, results)


def test_pictures(results):
    drawn = figures(results)
    assert list(drawn) == [
        *["comparison", "energies", "tail_curve", "roc", "training", "spectra", "images"]
    ]


def test_all_methods_run():
    tiny = dataclasses.replace(SHORT, train=128, epochs=1)
    assert list(run_seed(2, list(METHODS), tiny, rank_outliers=False).methods) == list(METHODS)


@pytest.mark.parametrize("methods", [["adam"], []])
def test_unknown_methods(methods):
    with pytest.raises(InputError, match="accepted: bce, edge, conf"):
        run_seed(0, methods, SHORT)


def test_the_common_first_half_is_trained_once_and_changes_nothing(results):
    alone = run_seed(0, ["conf"], SHORT, rank_outliers=False).methods["conf"]
    shared = results[0].methods["conf"]
    assert alone.history == shared.history
    assert torch.equal(alone.id_energies, shared.id_energies)
    assert results[0].methods["edge"].history[0] == shared.history[0]
    assert results[0].methods["edge"].history[1] != shared.history[1]

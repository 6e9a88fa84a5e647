"""The demo's parts: what the metric sees, a tiny run, and that losses are told."""

import pytest
import torch

from openworld_auc import demo
from openworld_auc.demo import DemoSettings

TINY = DemoSettings(
    pretraining_images=200, pretraining_steps=2, batch_size=72, shots=2, test_images=2, epochs=1
)


@pytest.mark.smoke
def test_what_each_metric_sees() -> None:
    rows, interval = demo.metric_properties()
    found = {row["evaluation"]: row for row in rows}
    whole = found["as it is"]
    shuffled, chance = found["detector scores shuffled"], found["predictions at random"]
    assert shuffled["HM"] == whole["HM"]
    assert shuffled["OpenworldAUC"] < whole["OpenworldAUC"] - 20
    assert chance["AUROC"] == whole["AUROC"]
    assert chance["OpenworldAUC"] < 5
    few, many = found["base : new = 1 : 10"], found["base : new = 10 : 1"]
    assert abs(few["overall"] - many["overall"]) > 8
    assert abs(few["OpenworldAUC"] - many["OpenworldAUC"]) < 4
    assert interval.low < interval.value < interval.high


@pytest.mark.smoke
@pytest.mark.filterwarnings("default:the value is")  # two steps teach next to nothing
def test_a_tiny_run_measures_every_method() -> None:
    backbone = demo.pretrain(TINY)
    result = demo.run_seed(backbone, TINY, 0)
    assert list(result.evaluations) == list(demo.methods(TINY, 0))
    assert len(result.history) == 1
    again = demo.run_seed(backbone, TINY, 0)
    for name, case in result.evaluations.items():
        assert all(torch.equal(a, b) for a, b in zip(case, again.evaluations[name], strict=True))
    summary = demo.summarize([result, again])
    assert summary["GMoP"]["new_acc"] == summary["zero-shot"]["new_acc"]  # the same h
    assert summary["GMoP"]["base_acc"] == summary["GMoP, λ = 0"]["base_acc"]  # the same g
    assert len(demo.table(summary)) == 6


def test_losses_are_told() -> None:
    summary = {
        name: {"openworld_auc": value, "auroc": auroc}
        for name, value, auroc in (
            ("zero-shot", 12.0, 90.0),
            ("CoOp", 13.0, 85.0),
            ("GMoP", 11.0, 80.0),
            ("GMoP, λ = 0", 11.5, 80.0),
        )
    }
    told = demo.tell(summary, 3)
    assert "not GMoP but 'CoOp' (13.0 %)" in told
    assert "detectors lose to the zero-shot detector" in told
    assert "The gated ranking term costs 0.5 points" in told
    summary["GMoP"] = {"openworld_auc": 15.0, "auroc": 95.0}
    told = demo.tell(summary, 3)
    assert "not GMoP" not in told
    assert "adds 3.5 points" in told

"""mAP against scikit-learn and torchmetrics; tail curve and buckets against plain filters."""

import math

import pytest
import torch

from edge_ood.metrics import (
    average_precisions,
    bucket_report,
    frequency_order,
    multilabel_map,
    sample_buckets,
    tail_curve,
)
from shared_core.errors import InputError
from shared_core.metrics import fpr_at_recall, ood_metrics


def table(n=80, c=5, seed=0, decimals=1):
    g = torch.Generator().manual_seed(seed)
    y = (torch.rand(n, c, generator=g) < torch.linspace(0.6, 0.05, c)).float()
    y[:c] = torch.eye(c)
    z = (torch.randn(n, c, generator=g) + y).round(decimals=decimals)
    return z, y


@pytest.mark.smoke
@pytest.mark.parametrize("decimals", [0, 1, 4])
def test_average_precision_equals_scikit_learn(decimals):
    from sklearn.metrics import auc, average_precision_score, precision_recall_curve

    z, y = table(decimals=decimals)
    step, trapezoid = average_precisions(z, y), average_precisions(z, y, "trapezoid")
    for c in range(5):
        assert step[c].item() == pytest.approx(average_precision_score(y[:, c], z[:, c]))
        precision, recall, _ = precision_recall_curve(y[:, c], z[:, c])
        assert trapezoid[c].item() == pytest.approx(auc(recall, precision))
    assert multilabel_map(z, y) == pytest.approx(step.mean().item())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_map_equals_torchmetrics():
    from torchmetrics.functional.classification import multilabel_average_precision

    z, y = table()
    expected = multilabel_average_precision(z.sigmoid(), y.long(), 5)
    assert multilabel_map(z.sigmoid(), y) == pytest.approx(expected.item(), rel=1e-5)


def test_classes_without_positives_are_reported():
    z, y = table()
    y[:, 2] = 0
    assert average_precisions(z, y)[2].isnan()
    with pytest.warns(UserWarning, match="1 of 5 classes"):
        found = multilabel_map(z, y)
    assert found == pytest.approx(average_precisions(z, y)[[0, 1, 3, 4]].mean().item())
    with pytest.raises(InputError, match="no class has a positive"):
        multilabel_map(z, y * 0)


@pytest.mark.filterwarnings("ignore:7 ID samples have no label")
@pytest.mark.parametrize("order_by", ["train", "eval"])
def test_the_tail_curve_is_the_published_filter(order_by):
    _, y = table()
    g = torch.Generator().manual_seed(1)
    scores, unknown = torch.randn(80, generator=g), torch.randn(60, generator=g)
    counts = [3, 900, 40, 500, 7]
    frequency = counts if order_by == "train" else y.sum(0).tolist()
    ranking = sorted(range(5), key=lambda c: -frequency[c])
    rows = tail_curve(scores, y, unknown, class_counts=counts, order_by=order_by, grid=[0, 2, 4])
    for row in rows:
        kept = [i for i in range(80) if y[i].any() and not y[i, ranking[: row["j"]]].any()]
        expected = ood_metrics(scores[kept], unknown, rule="nearest")
        assert row["n"] == len(kept)
        assert row["auroc"] == expected["auroc"]
        assert row["fpr95"] == fpr_at_recall(scores[kept], unknown, rule="nearest")


def test_unlabelled_and_empty_parts():
    y = torch.eye(3)[[0, 0, 1]]
    scores, unknown = torch.tensor([3.0, 2.0, 1.0, 0.5]), torch.tensor([0.0])
    with_empty = torch.cat([y, torch.zeros(1, 3)])
    with pytest.warns(UserWarning, match="1 ID samples have no label"):
        rows = tail_curve(scores, with_empty, unknown, class_counts=[9, 5, 1], grid=[0, 1])
    assert [r["n"] for r in rows] == [3, 1]
    rows = tail_curve(
        scores, with_empty, unknown, class_counts=[9, 5, 1], grid=[0, 1], include_unlabelled=True
    )
    assert [r["n"] for r in rows] == [4, 2]
    with pytest.warns(UserWarning, match=r"no ID sample is left for j = \[2\]"):
        rows = tail_curve(scores[:3], y, unknown, class_counts=[9, 5, 1], grid=[2])
    assert rows[0]["n"] == 0
    assert rows[0]["auroc"] is None


def test_buckets_go_by_the_most_frequent_label():
    counts = [1, 100, 10, 50, 5, 20]  # order 1, 3, 5, 2, 4, 0
    assert frequency_order(counts) == [1, 3, 5, 2, 4, 0]
    y = torch.zeros(5, 6)
    for row, labels in zip(y, ([1, 0], [5, 4], [0], [4, 0], []), strict=True):
        row[labels] = 1
    assert sample_buckets(y, counts).tolist() == [0, 1, 2, 2, -1]
    scores = torch.tensor([4.0, 3.0, 2.0, 0.0, 9.0])
    report = bucket_report(scores, y, torch.tensor([1.0]), class_counts=counts)
    assert {k: (v["n"], v["auroc"]) for k, v in report.items()} == {
        "head": (1, 1.0),
        "medium": (1, 1.0),
        "tail": (2, 0.5),
    }


def test_single_class_data():
    y = torch.ones(4, 1)
    [row] = tail_curve(torch.arange(4.0), y, torch.tensor([-1.0]), class_counts=[4])
    assert row == {"j": 0, "n": 4, **{k: row[k] for k in row if k not in "jn"}}
    assert row["auroc"] == 1


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z, y: average_precisions(z, y, "mean"), "ap is 'mean'"),
        (lambda z, y: average_precisions(z * math.nan, y), "NaN"),
        (lambda z, y: tail_curve(z[:, 0], y, z[:, 1]), "class_counts is missing"),
        (lambda z, y: tail_curve(z[:, 0], y, z[:, 1], class_counts=[1]), "1 class_counts for 5"),
        (lambda z, y: tail_curve(z[:, 0], y, z[:, 1], order_by="test"), "order_by is 'test'"),
        (
            lambda z, y: tail_curve(z[:, 0], y, z[:, 1], class_counts=[1] * 5, grid=[7]),
            r"grid=\[7\]",
        ),
        (lambda z, y: tail_curve(z[1:, 0], y, z[:, 1], class_counts=[1] * 5), "id_scores have"),
    ],
)
def test_errors(call, message):
    with pytest.raises(InputError, match=message):
        call(*table())

"""The torchmetrics classes: any batching, two processes, bins within their bound."""

import pickle

import pytest
import torch
from torchmetrics import MetricCollection

from openworld_auc import OpenworldAUC, OpenworldMetrics, openworld_auc, openworld_auc_binned
from openworld_auc.binned import bin_edges


def feed(metric, case, sizes=(1, 7, 3, 11, 200)):
    scores, correct, is_base = case
    start = 0
    for size in sizes:
        part = slice(start, start + size)
        if len(scores[part]):
            metric.update(scores[part], is_base[part], correct=correct[part])
        start += size
    return metric


@pytest.mark.smoke
def test_any_batching_gives_the_same_bits(tools) -> None:
    for seed in range(8):
        case = tools.case(seed, levels=6, dtype=torch.float32)
        expected = openworld_auc(*case)
        for sizes in ((200,), (1,) * 100, (5, 5, 5, 100)):
            assert feed(OpenworldAUC(), case, sizes).compute() == expected


def test_predictions_in_place_of_correctness() -> None:
    scores, is_base = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([True, True, False])
    logits = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    target = torch.tensor([1, 1, 0])
    for preds in (logits, logits.argmax(1)):
        metric = OpenworldAUC()
        metric.update(scores, is_base, preds=preds, target=target)
        assert metric.compute() == 0.5


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_collections_resets_and_copies(tools) -> None:
    case = tools.case(2)
    metrics = MetricCollection([OpenworldAUC(), OpenworldMetrics()])
    feed(metrics, case)
    found = metrics.compute()
    assert found["OpenworldAUC"] == found["openworld_auc"] == openworld_auc(*case)
    metric = feed(OpenworldAUC(), case)
    assert pickle.loads(pickle.dumps(metric)).compute() == openworld_auc(*case)  # noqa: S301
    assert metric.half().compute() == openworld_auc(*case)
    other = feed(OpenworldAUC(), tools.case(3))
    metric.merge_state(other)
    both = [torch.cat(parts) for parts in zip(case, tools.case(3), strict=True)]
    assert metric.compute() == openworld_auc(*both)
    metric.reset()
    with pytest.warns(UserWarning, match="OpenworldAUC is NaN"):
        assert metric.compute().isnan()
    with pytest.warns(UserWarning, match="OpenworldAUC is NaN"):
        assert all(v.isnan() for v in OpenworldMetrics().compute().values())


def test_repeated_samples_count_once(tools) -> None:
    scores, correct, is_base = case = tools.case(5)
    ids = torch.arange(len(scores))
    metric = OpenworldAUC(dedupe=True)
    metric.update(scores, is_base, correct=correct, sample_id=ids)
    metric.update(scores[:3], is_base[:3], correct=correct[:3], sample_id=ids[:3])
    assert metric.compute() == openworld_auc(*case)


@pytest.mark.parametrize("bins", [2, 8, 64, 1000])
def test_bins_keep_their_bound(tools, bins) -> None:
    for seed in range(25):
        scores, correct, is_base = tools.case(seed, dtype=torch.float32)
        case = (4 * scores).sigmoid(), correct, is_base
        exact = float(openworld_auc(*case))
        value, bound = openworld_auc_binned(*case, bins=bins)
        assert abs(float(value) - exact) <= float(bound) + 1e-12
        metric = feed(OpenworldAUC(bins=bins), case)
        assert metric.compute() == value
        assert metric.error_bound() == bound
    assert float(bound) < 0.02 or bins < 1000


def test_own_edges_take_any_scores(tools) -> None:
    case = tools.case(0)
    value, bound = openworld_auc_binned(*case, bins=case[0].unique())
    assert abs(float(value - openworld_auc(*case))) < 1e-15
    assert bound == 0
    assert bin_edges(torch.tensor([1, 2])).dtype == torch.float64


def check_shards(rank):
    """In one of two processes; `test_parallel` starts them."""
    g = torch.Generator().manual_seed(0)
    scores = torch.randint(20, (101,), generator=g).double() / 20
    whole = scores, torch.rand(101, generator=g) < 0.7, torch.rand(101, generator=g) < 0.5
    expected = openworld_auc(*whole)
    edges = torch.linspace(0, 1, 11)
    for cut in (30, 101):  # unequal shards, then an empty one
        part = slice(0, cut) if rank == 0 else slice(cut, 101)
        mine = [x[part] for x in whole]
        values = []
        for metric in (OpenworldAUC(), OpenworldMetrics(), OpenworldAUC(bins=edges)):
            if len(mine[0]):
                metric.update(mine[0], mine[2], correct=mine[1])
            values.append(metric.compute())
        assert values[0] == values[1]["openworld_auc"] == expected
        assert values[2] == openworld_auc_binned(*whole, bins=edges).value


@pytest.mark.usefixtures("without_type_checks")
def test_bad_input() -> None:
    scores, is_base = torch.tensor([0.5, 2.0]), torch.tensor([True, False])
    right = torch.tensor([True, True])
    for options, message in (
        ({}, "nothing says what is right"),
        ({"correct": right, "preds": right, "target": right}, "give one of the two"),
        ({"preds": torch.ones(3).long(), "target": torch.ones(2).long()}, "preds has shape"),
        ({"correct": torch.tensor([0.5, 0.5])}, "soft=True"),
        ({"correct": right, "sample_id": torch.arange(2)}, "dedupe=True"),
    ):
        with pytest.raises(ValueError, match=message):
            OpenworldAUC().update(scores, is_base, **options)
    with pytest.raises(ValueError, match="pass a tensor of edges"):
        OpenworldAUC(bins=10).update(scores, is_base, correct=right)
    with pytest.raises(ValueError, match="bins is 1"):
        OpenworldAUC(bins=1)
    with pytest.raises(ValueError, match="strictly ascending"):
        OpenworldAUC(bins=torch.tensor([1.0, 1.0]))
    with pytest.raises(ValueError, match="histograms count whole samples"):
        OpenworldAUC(bins=4, ties="strict")
    with pytest.raises(ValueError, match="correct is soft"):
        openworld_auc_binned(scores, torch.tensor([0.5, 0.5]), is_base)

"""The demo's task, its measurements against the definitions, and what it says."""

import copy

import pytest
import torch

from focal_sam.demo import (
    GROUPS,
    DemoSettings,
    DigitsTask,
    figures,
    run_seed,
    summarize,
    table,
    tell,
)

QUICK = DemoSettings(epochs=2)
CPU = torch.device("cpu")


def test_the_task_is_long_tailed_and_tested_on_balance() -> None:
    task = DigitsTask(3, DemoSettings(), CPU)
    assert task.counts == [100, 71, 51, 36, 26, 18, 13, 9, 6, 5]
    assert torch.bincount(task.train[1]).tolist() == task.counts
    assert torch.bincount(task.test[1]).tolist() == [70] * 10
    train, test = ({tuple(x.tolist()) for x in part[0]} for part in (task.train, task.test))
    assert len(train & test) <= 2  # the digits hold a few identical images


def test_seeds_draw_other_digits_for_the_tail_and_repeat_themselves() -> None:
    one, again, other = (DigitsTask(s, DemoSettings(), CPU) for s in (0, 0, 1))
    assert torch.equal(one.train[0], again.train[0])
    assert not torch.equal(one.train[0], other.train[0])


@pytest.mark.smoke
def test_a_seed_measures_every_method_from_the_same_start() -> None:
    found = run_seed(0, ["sgd", "focal"], QUICK)
    again = run_seed(0, ["focal"], QUICK)
    assert found["focal"].overall == again["focal"].overall
    for result in found.values():
        assert result.sharpness.keys() == result.eigenvalue.keys() == GROUPS.keys()
        sizes = {g: len(c) for g, c in GROUPS.items()}
        mean = sum(result.accuracy[g] * sizes[g] for g in GROUPS) / 10
        assert mean == pytest.approx(result.overall)


def test_sharpness_is_the_rise_of_the_training_loss_along_the_gradient() -> None:
    from focal_sam.losses import LogitAdjustedLoss

    result = run_seed(0, ["sgd"], QUICK)["sgd"]
    task = DigitsTask(0, QUICK, CPU)
    x, y = (part[task.train[1] >= 7] for part in task.train)
    criterion = LogitAdjustedLoss(task.counts)
    model = copy.deepcopy(result.model)
    loss = criterion(model(x), y).mean()
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * p.grad / norm
        rise = criterion(model(x), y).mean() - loss
    assert result.sharpness["tail"] == pytest.approx(rise.item(), rel=1e-3)


def test_summary_pairs_seeds() -> None:
    seeds = [run_seed(s, ["sgd", "sam"], QUICK) for s in (0, 1)]
    summary = summarize(seeds)
    differences = [r["sam"].overall - r["sgd"].overall for r in seeds]
    found = summary["sam"]["difference_from_sgd"]
    assert found["values"] == differences
    assert found["mean"] == pytest.approx(sum(differences) / 2)
    assert found["standard_error"] == pytest.approx(abs(differences[0] - differences[1]) / 2)
    assert "difference_from_sgd" not in summary["sgd"]
    rows = table(summary)
    assert [row["method"] for row in rows] == ["SGD", "SAM"]
    assert "nothing to compare" in tell(summary, 2)


def entry(overall: float, head: float, tail: float, sharp: float) -> dict[str, object]:
    def spread(value: float) -> dict[str, object]:
        return {"mean": value, "std": 1.0, "values": [value]}

    return {
        "overall": spread(overall),
        "accuracy": {"head": spread(head), "medium": spread(90), "tail": spread(tail)},
        "sharpness": {g: spread(sharp) for g in GROUPS},
        "eigenvalue": {g: spread(sharp) for g in GROUPS},
        "difference_from_sgd": {"mean": overall - 90, "standard_error": 0.5, "values": []},
    }


def test_losses_are_told() -> None:
    methods = {
        "sgd": entry(90, 95, 80, 1.0),
        "imbsam": entry(93, 94, 88, 0.9),
        "focal": entry(89, 96, 79, 0.5),
    }
    told = tell(methods, 5)
    assert "2.0 times less" in told
    assert "-1.00 points against SGD (standard error 0.50" in told
    assert "ImbSAM did as well or better overall" in told
    assert "lost accuracy against SGD on: tail" in told
    methods["focal"] = entry(94, 96, 89, 0.5)
    assert "as well or better" not in tell(methods, 5)


def test_pictures() -> None:
    drawn = figures([run_seed(0, ["sgd", "focal"], QUICK)], 0, QUICK)
    assert sorted(drawn) == ["class_weights", "comparison", "landscape", "sharpness"]


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("methods", [["adam"], []])
def test_unknown_methods(methods: list[str]) -> None:
    with pytest.raises(ValueError, match="accepted: sgd, sam, imbsam, focal"):
        run_seed(0, methods, QUICK)

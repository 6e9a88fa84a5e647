import jaxtyping
import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix as sklearn_confusion_matrix

from shared_core.errors import InputError
from shared_core.metrics import (
    SegmentationMetrics,
    class_iou,
    confusion_matrix,
    mean_iou,
    segmentation_metrics,
)


@pytest.fixture
def without_shape_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let wrong shapes reach our own checks, as they do outside the tests."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def label_maps(classes: int = 6, absent: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Predicted and true maps [3, 9, 8]; one class in neither, a tenth of the target 255."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, classes, (3, 9, 8), generator=generator)
    preds = torch.where(
        torch.rand(target.shape, generator=generator) < 0.6,
        target,
        torch.randint(0, classes, target.shape, generator=generator),
    )
    for labels in (target, preds):
        labels[labels == absent] = 0
    target[torch.rand(target.shape, generator=generator) < 0.1] = 255
    return preds, target


def sets_of_pixels(preds: torch.Tensor, target: torch.Tensor, ignored: int) -> dict[int, float]:
    """IoU of each class that occurs or is predicted, from sets of pixel positions."""
    p, t = preds.numpy().ravel(), target.numpy().ravel()
    p, t = p[t != ignored], t[t != ignored]
    result = {}
    for c in range(256):
        predicted, true = set(np.flatnonzero(p == c)), set(np.flatnonzero(t == c))
        if predicted | true:
            result[c] = len(predicted & true) / len(predicted | true)
    return result


@pytest.mark.smoke
def test_iou_is_intersection_over_union_of_pixel_sets() -> None:
    preds, target = label_maps()
    expected = sets_of_pixels(preds, target, 255)
    assert 4 not in expected
    iou = class_iou(confusion_matrix(preds, target, 6, ignore_index=255))
    assert {c: v for c, v in enumerate(iou.tolist()) if v == v} == pytest.approx(expected, 1e-12)
    value = mean_iou(preds, target, 6, ignore_index=255)
    assert value.item() == pytest.approx(sum(expected.values()) / len(expected), 1e-12)


def test_accuracies_by_counting() -> None:
    preds, target = label_maps()
    counted = target != 255
    values = segmentation_metrics(confusion_matrix(preds, target, 6, ignore_index=255))
    right = (preds == target)[counted].double().mean().item()
    recalls = [
        (preds[target == c] == c).double().mean().item() for c in target[counted].unique().tolist()
    ]
    assert values["pixel_accuracy"].item() == pytest.approx(right, 1e-12)
    assert values["mean_accuracy"].item() == pytest.approx(sum(recalls) / len(recalls), 1e-12)


def test_confusion_matrix_equals_scikit_learn() -> None:
    preds, target = label_maps()
    kept = target != 255
    expected = sklearn_confusion_matrix(target[kept], preds[kept], labels=range(6))
    assert confusion_matrix(preds, target, 6, ignore_index=255).tolist() == expected.tolist()


@pytest.mark.parametrize("ignored", [None, 255, 0])
def test_mean_iou_equals_the_jaccard_index(ignored: int | None) -> None:
    from torchmetrics.functional.classification import multiclass_jaccard_index

    preds, target = label_maps()
    if ignored != 255:
        target[target == 255] = 1
    expected = multiclass_jaccard_index(
        preds, target, num_classes=6, ignore_index=ignored, validate_args=False
    )
    value = mean_iou(preds, target, 6, ignore_index=ignored)
    assert value.item() == pytest.approx(expected.item(), 1e-6)


def test_class_scores_count_by_their_maximum() -> None:
    preds, target = label_maps()
    scores = torch.nn.functional.one_hot(preds, 6).movedim(-1, 1).to(torch.bfloat16)
    for maps in (preds, scores):
        value = mean_iou(maps, target, 6, ignore_index=255)
        assert value.item() == mean_iou(preds, target, 6, ignore_index=255).item()


@pytest.mark.smoke
def test_limiting_cases() -> None:
    maps = torch.tensor([[[0, 1], [2, 2]]])
    metric = SegmentationMetrics(4)
    metric.update(maps, maps)
    assert [v.item() for v in metric.compute().values()] == [1, 1, 1]
    assert mean_iou(maps, (maps + 1) % 3, 3).item() == 0
    ignored = torch.full_like(maps, 255)
    assert mean_iou(maps, ignored, 4, ignore_index=255).isnan()


def test_batches_pool_pixels_before_dividing() -> None:
    preds, target = label_maps()
    metric = SegmentationMetrics(6, ignore_index=255)
    for p, t in zip(preds.split(1), target.split(1), strict=True):
        metric.update(p, t)
    whole = segmentation_metrics(confusion_matrix(preds, target, 6, ignore_index=255))
    assert {k: v.item() for k, v in metric.compute().items()} == {
        k: v.item() for k, v in whole.items()
    }
    # One image all right, one with a single pixel that counts, wrong: IoUs 3/4 and 0.
    preds, target = torch.tensor([[0, 0, 0], [0, 0, 0]]), torch.tensor([[0, 0, 0], [1, 255, 255]])
    assert mean_iou(preds, target, 2, ignore_index=255).item() == (3 / 4 + 0) / 2


def test_counts_beyond_float32_stay_exact() -> None:
    confusion = torch.tensor([[2**30 + 1, 1], [0, 2**30]])
    expected = (2**30 + 1) / (2**30 + 2)
    assert class_iou(confusion)[0].item() == expected != 1.0


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("preds", "target", "ignored", "message"),
    [
        ([[0, 1]], [[0, 2]], None, "target holds the class 2; accepted: 0 to 1$"),
        ([[0, 1]], [[0, 2]], 255, "target holds the class 2; .* and 255 in target to ignore"),
        ([[0, 1]], [[-1, 1]], None, "target holds the class -1"),
        ([[0, 255]], [[0, 1]], 255, "preds holds the class 255"),
        ([[0, 1]], [[0, 1, 1]], None, r"preds have shape \[1, 2\] and target \[1, 3\]"),
        ([[[0.0, 1.0]]], [[0, 1]], None, r"class scores of shape \[1, 2, 2\]"),
    ],
)
def test_label_maps_that_do_not_fit_are_refused(
    preds: list, target: list, ignored: int | None, message: str
) -> None:
    maps = torch.tensor(preds), torch.tensor(target)
    with pytest.raises(InputError, match=message):
        mean_iou(*maps, 2, ignore_index=ignored)
    with pytest.raises(InputError, match=message):
        SegmentationMetrics(2, ignore_index=ignored).update(*maps)


def test_predictions_on_ignored_pixels_do_not_matter() -> None:
    value = mean_iou(torch.tensor([[0, 99]]), torch.tensor([[0, 255]]), 2, ignore_index=255)
    assert value.item() == 1.0

"""The stateful metrics over several processes, and what importing the package costs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shared_core.metrics import confusion_matrix, ood_metrics, segmentation_metrics
from shared_core.testing import run_gloo


def numbers(values: dict) -> dict:
    return {key: float(value) for key, value in values.items()}


def merge_on_ranks(rank: int, world: int) -> None:
    from shared_core.metrics import OODMetrics, SegmentationMetrics, ShotAccuracy

    generator = torch.Generator().manual_seed(3)
    is_ood = torch.rand(101, generator=generator) < 0.4
    scores = torch.randn(101, generator=generator).mul(4).round()
    target = torch.randint(0, 3, (101,), generator=generator)
    preds = torch.randint(0, 3, (101,), generator=generator)
    alone = ShotAccuracy([300, 50, 5], sync_on_compute=False)
    alone.update(preds, target)
    # Shards of different length; then all on the first rank, then all on the second.
    for start, middle, end in ((0, 30, 101), (0, 101, 101), (0, 0, 101)):
        mine = slice(start, middle) if rank == 0 else slice(middle, end)
        ood, shots = OODMetrics(), ShotAccuracy([300, 50, 5])
        maps = SegmentationMetrics(3, ignore_index=2)
        if mine.start < mine.stop:
            # Ranks differ in dtype too.
            ood.update(scores[mine].to([torch.bfloat16, torch.float64][rank]), is_ood[mine])
            shots.update(preds[mine], target[mine])
            maps.update(preds[mine, None], target[mine, None])
        expected = ood_metrics(scores[~is_ood], scores[is_ood])
        assert numbers(ood.compute()) == numbers(expected)
        assert sum(map(len, ood.scores)) == mine.stop - mine.start  # back to its own after that
        assert numbers(shots.compute()) == numbers(alone.compute())
        pooled = confusion_matrix(preds[:, None], target[:, None], 3, ignore_index=2)
        expected = segmentation_metrics(pooled, ignore_index=2)
        assert numbers(maps.compute()) == numbers(expected)


def test_states_merge_over_processes(tmp_path: Path) -> None:
    run_gloo(merge_on_ranks, tmp_path)


@pytest.mark.smoke
def test_import_does_not_load_torchmetrics() -> None:
    code = (
        "import sys, shared_core.metrics as m; "
        "assert not {'torchmetrics', 'sklearn', 'scipy'} & set(sys.modules); "
        "assert all(hasattr(m, name) for name in m.__all__); "
        "assert 'torchmetrics' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_name_is_an_attribute_error() -> None:
    import shared_core.metrics

    with pytest.raises(AttributeError, match="no attribute 'accuracy'"):
        shared_core.metrics.accuracy  # noqa: B018

"""Accuracy over many-, medium- and few-shot classes, as long-tailed recognition reports it.

`shot_groups` and `ShotAccuracy` are those of `shared_core.metrics`. The edges of the groups are
arguments, because the literature draws them differently; `focal_sam.presets.shot_thresholds` has
those that Focal-SAM was evaluated with. `ShotAccuracy` is imported on first use, because
torchmetrics takes seconds to import.

Examples:
    >>> from focal_sam.presets import get_preset
    >>> preset = get_preset("cifar10lt-resnet32")
    >>> counts = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    >>> shot_groups(counts, many=preset.many_above, few=preset.few_below)
    {'many': [0, 1, 2, 3], 'medium': [4, 5, 6], 'few': [7, 8, 9]}
"""

from typing import TYPE_CHECKING, Any

from shared_core.metrics import shot_groups

if TYPE_CHECKING:
    from shared_core.metrics import ShotAccuracy

__all__ = ["ShotAccuracy", "shot_groups"]


def __getattr__(name: str) -> Any:
    if name == "ShotAccuracy":
        from shared_core.metrics import ShotAccuracy

        return ShotAccuracy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

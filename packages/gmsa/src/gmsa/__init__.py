"""GMSA: context compression for language models by group merging and layer semantic alignment.

The heart is in `gmsa.merging`, `gmsa.sequences`, `gmsa.losses`, `gmsa.rates` and
`gmsa.soft_tokens`; the model in `gmsa.model`, what trains when in `gmsa.stages`. Further:
`gmsa.streaming`, `gmsa.store`, `gmsa.data`, `gmsa.trainer`, `gmsa.train`, `gmsa.evaluate`,
`gmsa.baselines` and `gmsa.presets`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from gmsa.losses import label_cross_entropy
from gmsa.merging import group_merge, num_groups
from gmsa.rates import draw_rate
from gmsa.soft_tokens import SoftTokens

if TYPE_CHECKING:
    from gmsa.compressor import GMSACompressor
    from gmsa.configuration import GMSAConfig
    from gmsa.data import AutoencodingDataset, GMSADataCollator, QADataset
    from gmsa.evaluation import qa_metrics, reconstruction_metrics
    from gmsa.model import GMSAModel
    from gmsa.store import SoftTokenStore, StoreMismatchError
    from gmsa.trainer import GMSATrainer

__all__ = [
    "AutoencodingDataset",
    "GMSACompressor",
    "GMSAConfig",
    "GMSADataCollator",
    "GMSAModel",
    "GMSATrainer",
    "QADataset",
    "SoftTokenStore",
    "SoftTokens",
    "StoreMismatchError",
    "draw_rate",
    "group_merge",
    "label_cross_entropy",
    "num_groups",
    "qa_metrics",
    "reconstruction_metrics",
]

__version__ = "0.1.0"

# These need transformers or peft, which `import gmsa` does not load.
_LAZY = {
    "AutoencodingDataset": "data",
    "GMSADataCollator": "data",
    "GMSATrainer": "trainer",
    "QADataset": "data",
    "GMSACompressor": "compressor",
    "GMSAConfig": "configuration",
    "GMSAModel": "model",
    "SoftTokenStore": "store",
    "StoreMismatchError": "store",
    "qa_metrics": "evaluation",
    "reconstruction_metrics": "evaluation",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'gmsa' has no attribute {name!r}")
    return getattr(importlib.import_module(f"gmsa.{_LAZY[name]}"), name)

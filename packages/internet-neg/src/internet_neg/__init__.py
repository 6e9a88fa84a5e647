"""InterNeg: zero-shot out-of-distribution detection for CLIP-like models.

`InterNegDetector` is the method; `internet_neg.baselines` has MCM and NegLabel behind the same
interface, `internet_neg.evaluate` the protocol, `internet_neg.presets` the paper's settings.
"""

from typing import TYPE_CHECKING, Any

from internet_neg.bank import NegativeBank
from internet_neg.baselines import MCMDetector, NegLabelDetector
from internet_neg.config import InterNegConfig
from internet_neg.detector import InterNegDetector, NegativeText, OODOutput
from internet_neg.encoders import DualEncoder, HFClipEncoder, OpenClipEncoder
from internet_neg.errors import InterNegError, NoAdmissibleNegativesError, NotFittedError
from internet_neg.inversion import invert_images
from internet_neg.proxies import ProxyBuilder
from internet_neg.score import grouped_score, mcm_score
from internet_neg.selection import (
    admissible,
    base_distance,
    deviation,
    neglabel_select,
    select_negatives,
)
from internet_neg.vocabulary import Vocabulary
from shared_core.metrics import ood_metrics

if TYPE_CHECKING:
    from shared_core.metrics import OODMetrics

__all__ = [
    "DualEncoder",
    "HFClipEncoder",
    "InterNegConfig",
    "InterNegDetector",
    "InterNegError",
    "MCMDetector",
    "NegLabelDetector",
    "NegativeBank",
    "NegativeText",
    "NoAdmissibleNegativesError",
    "NotFittedError",
    "OODMetrics",
    "OODOutput",
    "OpenClipEncoder",
    "ProxyBuilder",
    "Vocabulary",
    "admissible",
    "base_distance",
    "deviation",
    "grouped_score",
    "invert_images",
    "mcm_score",
    "neglabel_select",
    "ood_metrics",
    "select_negatives",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "OODMetrics":  # torchmetrics takes seconds to import
        from shared_core.metrics import OODMetrics

        return OODMetrics
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

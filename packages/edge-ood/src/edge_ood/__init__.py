"""EDGE: multi-label out-of-distribution detection by energy-gap expansion.

The loss (`EdgeLoss`), the logit scores and the metrics need logits and nothing else. Beside them:
`edge_ood.losses` (what EDGE is compared with), `edge_ood.feature_scorers`, `edge_ood.dilation`
(choosing an outlier set), `edge_ood.models`, `edge_ood.datasets`, `edge_ood.train`, and the bridge
`edge_ood.hf` to the Trainer of transformers.
"""

from edge_ood.data import PairedLoader, check_disjoint
from edge_ood.detector import DetectorOutput, OODDetector
from edge_ood.dilation import OERank, OESelector, dilation_distance
from edge_ood.energy import joint_energy, label_energies
from edge_ood.loss import EdgeLoss, EdgeLossOutput, EdgeSchedule, edge_loss, energy_gap
from edge_ood.metrics import bucket_report, multilabel_map, tail_curve
from edge_ood.scorers import JointEnergy, Scorer, get_scorer, list_scorers

__all__ = [
    "DetectorOutput",
    "EdgeLoss",
    "EdgeLossOutput",
    "EdgeSchedule",
    "JointEnergy",
    "OERank",
    "OESelector",
    "OODDetector",
    "PairedLoader",
    "Scorer",
    "bucket_report",
    "check_disjoint",
    "dilation_distance",
    "edge_loss",
    "energy_gap",
    "get_scorer",
    "joint_energy",
    "label_energies",
    "list_scorers",
    "multilabel_map",
    "tail_curve",
]

__version__ = "0.1.0"

"""LEDE: lossless self-speculative decoding with learned exits and draft lengths."""

from lede.adapters import LayerRunner, register_adapter, supported_model_types
from lede.cache import RaggedCache
from lede.cost import CostModel, calibrate, expected_speedup, expected_tokens
from lede.decoding import LedeOutput, SelfSpeculativeDecoder, custom_generate
from lede.errors import PolicyMismatchError, UnsupportedModelError
from lede.experience import ExperienceTable, collect
from lede.export import to_d3rlpy
from lede.policies import (
    AutoregressivePolicy,
    ConfidenceExitPolicy,
    ConfidencePolicy,
    DELPolicy,
    DraftVerifyPolicy,
    Observation,
    Policy,
    StaticPolicy,
)
from lede.probe import AcceptanceProbe, fit_probe
from lede.qpolicy import QPolicy, StateSpec
from lede.rollouts import Episodes, collect_rollouts
from lede.selection import Choice, choose_policy
from lede.simulation import OraclePolicy, Simulation, best_confidence, best_static, simulate
from lede.stats import DecodeStats, Round
from lede.training import TrainConfig, TrainResult, train_policy

__all__ = [
    "AcceptanceProbe",
    "AutoregressivePolicy",
    "Choice",
    "ConfidenceExitPolicy",
    "ConfidencePolicy",
    "CostModel",
    "DELPolicy",
    "DecodeStats",
    "DraftVerifyPolicy",
    "Episodes",
    "ExperienceTable",
    "LayerRunner",
    "LedeOutput",
    "Observation",
    "OraclePolicy",
    "Policy",
    "PolicyMismatchError",
    "QPolicy",
    "RaggedCache",
    "Round",
    "SelfSpeculativeDecoder",
    "Simulation",
    "StateSpec",
    "StaticPolicy",
    "TrainConfig",
    "TrainResult",
    "UnsupportedModelError",
    "best_confidence",
    "best_static",
    "calibrate",
    "choose_policy",
    "collect",
    "collect_rollouts",
    "custom_generate",
    "expected_speedup",
    "expected_tokens",
    "fit_probe",
    "register_adapter",
    "simulate",
    "supported_model_types",
    "to_d3rlpy",
    "train_policy",
]

__version__ = "0.1.0"

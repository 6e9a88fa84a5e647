"""Diffusion features that stay true to the input image (GATE).

Noise makes a diffusion model imagine what it cannot see; its features then describe a slightly
different image. Techniques that steer generation steer them back. `techniques` compose to recipes,
`gate` tells which of them help, `Amalgamation` joins features obtained under several.
"""

from content_shift import caption, correspondence, gate, presets, segmentation, techniques
from content_shift.amalgamation import (
    Amalgamation,
    AmalgamationOutput,
    GammaWalk,
    amalgamation_loss,
)
from content_shift.bucket import FeatureBucket, FeatureSpec, extract_bucket, load_specs
from content_shift.canny import canny
from content_shift.errors import (
    AdapterClash,
    IncompatibleControl,
    UnsupportedTechnique,
    ZeroAnchor,
)
from content_shift.gate import GateReport, shift_map
from content_shift.lora import TrainedLoRA, train_lora
from content_shift.presets import recipes
from content_shift.recipe import Context, Inputs, Patch, Recipe, Technique
from content_shift.techniques import load_recipe
from content_shift.train_control import train_control

__all__ = [
    "AdapterClash",
    "Amalgamation",
    "AmalgamationOutput",
    "Context",
    "FeatureBucket",
    "FeatureSpec",
    "GammaWalk",
    "GateReport",
    "IncompatibleControl",
    "Inputs",
    "Patch",
    "Recipe",
    "Technique",
    "TrainedLoRA",
    "UnsupportedTechnique",
    "ZeroAnchor",
    "amalgamation_loss",
    "canny",
    "caption",
    "correspondence",
    "extract_bucket",
    "gate",
    "load_recipe",
    "load_specs",
    "presets",
    "recipes",
    "segmentation",
    "shift_map",
    "techniques",
    "train_control",
    "train_lora",
]

__version__ = "0.1.0"

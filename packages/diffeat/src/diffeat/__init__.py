"""Generic diffusion feature: any activation of any diffusion backbone as a dense image feature.

`FeatureExtractor` turns images into named feature maps; `capture` and `Recorder` read activations
out of any forward pass. Beside them: `diffeat.measure`, `diffeat.probe`, `diffeat.filters`,
`diffeat.evaluate`, `diffeat.segmentation`, `diffeat.train`, `diffeat.aggregate`, `diffeat.presets`.
"""

from diffeat import aggregate, evaluate, filters, measure, presets, probe, segmentation, train
from diffeat.cache import FeatureCache, extract_to_disk
from diffeat.capture import Capture, capture
from diffeat.errors import ActivationNotFound, MapTooLarge, UnsupportedBackbone
from diffeat.extractor import FeatureExtractor
from diffeat.features import Features
from diffeat.measure import pca_image
from diffeat.naming import ActivationInfo, alias, find_activation, list_activations
from diffeat.noise import Schedule, seeded_noise
from diffeat.prompts import PipelineText, PromptEmbedding
from diffeat.ranking import rank
from diffeat.recorder import Recorder
from diffeat.selection import Selection

__all__ = [
    "ActivationInfo",
    "ActivationNotFound",
    "Capture",
    "FeatureCache",
    "FeatureExtractor",
    "Features",
    "MapTooLarge",
    "PipelineText",
    "PromptEmbedding",
    "Recorder",
    "Schedule",
    "Selection",
    "UnsupportedBackbone",
    "aggregate",
    "alias",
    "capture",
    "evaluate",
    "extract_to_disk",
    "filters",
    "find_activation",
    "list_activations",
    "measure",
    "pca_image",
    "presets",
    "probe",
    "rank",
    "seeded_noise",
    "segmentation",
    "train",
]

__version__ = "0.1.0"

"""The paper's settings as data: the features of each task (C.2), hub ids, LoRA training (A.3).

Not published, and our choice where it matters: the kernel and borders of eq. 1, the anchor of
eq. 2, g1 and g2 of eq. 5 (chosen by grid, `GAMMA_GRID`). The paper disagrees with itself in two
places. Its main text and commands begin at t = 60 for every ControlNet feature but those of
large-scale segmentation, its appendix A.2 for attention features alone: `GateRecipe.build` takes
``pre_denoise="control"`` or ``"attention"`` (the default). Its main text uses attention features
for ADE20K and Cityscapes, its appendix does not; here the appendix is followed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from content_shift.bucket import FeatureSpec
from content_shift.recipe import Recipe, Technique
from content_shift.techniques import ControlNet, LoRA, PreDenoise, Prompt
from diffeat.presets import PROMPTS
from shared_core.errors import InputError

__all__ = [
    "CAPTIONER",
    "CLEANDIFT",
    "CONTROLNETS",
    "GAMMA_GRID",
    "LORA_TRAINING",
    "QUALITY_PROMPTS",
    "FeaturePlan",
    "GateRecipe",
    "get_recipe",
    "recipes",
]

CONTROLNETS = {
    "sd15": "lllyasviel/sd-controlnet-canny",
    "sd15-depth": "lllyasviel/sd-controlnet-depth",
    "sdxl": "diffusers/controlnet-canny-sdxl-1.0",
}
CAPTIONER = "microsoft/kosmos-2-patch14-224"
CLEANDIFT = "CompVis/cleandift"

# Values of g1 and g2 to try; the paper shows the chosen ones in a figure only.
GAMMA_GRID = (0.0, 1e-4, 1e-3, 1e-2, 1e-1)

LORA_TRAINING: dict[str, Any] = {
    "images": 30, "captions": ("", "tags", "sentence"), "repeats": 10, "rank": 64, "alpha": 32,
    "lr": 1e-4, "te_lr": 5e-5, "epochs": 100, "locon": True,
}  # fmt: skip

# 2.2: what counts is that the words match the input, not that they are good ones.
QUALITY_PROMPTS = {
    "cifar-high": "cinematic shot photo taken by ARRI, photo taken by sony, incredibly detailed, "
    "sharpen, masterpiece, best quality, realistic, HD, raytracing, CG unified 8K wallpapers",
    "cifar-low": "low quality, low resolution, blurry, draft, grainy, disfigured, deformed, "
    "low contrast, underexposed, overexposed, bad art",
    "horse-high": "a horse, high quality, best quality, highly realistic, masterpiece",
    "horse-low": "a horse, low quality, worst quality, deformation, broken shape, blurry",
}

CONVOLUTIONAL = {"sd15": "sd15-legacy", "sdxl": "sdxl-legacy"}
PYRAMID = {
    "sd15": ("up-level0-upsampler-out", "up-level1-upsampler-out", "up-level2-upsampler-out"),
    "sdxl": ("up-level0-upsampler-out", "up-level1-upsampler-out", "up-level2-repeat2-res-out"),
}


@dataclass(frozen=True)
class FeaturePlan:
    """One feature of a task, before weights are known.

    Attributes:
        name: Of the feature.
        prompt: Its prompt.
        control: Whether ControlNet sees the image's edges.
        lora: Key of the LoRA weights, such as ``good``.
        attention: Whether it is the attention feature.
        seed: Of the noise.
    """

    name: str
    prompt: str
    control: bool = False
    lora: str | None = None
    attention: bool = False
    seed: int = 0


@dataclass(frozen=True)
class GateRecipe:
    """The features of one of the paper's tasks.

    Attributes:
        name: Of the task.
        features: In order.
        t: Timestep.
        pyramid: Whether layers stay apart, one for each level of a segmentation head.
    """

    name: str
    features: tuple[FeaturePlan, ...]
    t: int = 50
    pyramid: bool = False

    @property
    def loras(self) -> tuple[str, ...]:
        """Keys of the LoRA weights that it wants."""
        return tuple(dict.fromkeys(f.lora for f in self.features if f.lora))

    def build(
        self,
        lora: Mapping[str, Any] | None = None,
        *,
        topology: str = "sd15",
        control: Any = None,
        pre_denoise: str = "attention",
        skip_missing: bool = False,
    ) -> list[FeatureSpec]:
        """The features with weights filled in.

        Args:
            lora: Weights by key, see `loras`.
            topology: ``sd15`` or ``sdxl``.
            control: ControlNet id, folder or module; by default the paper's Canny.
            pre_denoise: Which features begin at t = 60: ``attention``, ``control`` or ``none``.
            skip_missing: Leave features out whose LoRA weights are not given.

        Raises:
            InputError: If an option is unknown or weights are missing.

        Examples:
            >>> [s.name for s in recipes["horse21"].build(skip_missing=True)]
            ['prompt', 'control']
        """
        if topology not in CONVOLUTIONAL or pre_denoise not in ("attention", "control", "none"):
            raise InputError(
                f"topology={topology!r}, pre_denoise={pre_denoise!r}; accepted: "
                f"{', '.join(CONVOLUTIONAL)}; attention, control, none"
            )
        given = dict(lora or {})
        missing = [key for key in self.loras if key not in given]
        if missing and not skip_missing:
            raise InputError(
                f"{self.name} wants LoRA weights {', '.join(missing)}: train them with "
                "content-shift train-lora and pass them, or leave their features out "
                "(skip_missing=True, --skip-missing)"
            )
        net = control or CONTROLNETS[topology]
        found = []
        for plan in self.features:
            if plan.lora and plan.lora not in given:
                continue
            parts: list[Technique] = [Prompt(plan.prompt)]
            if plan.control:
                parts.append(ControlNet(net))
            if plan.lora:
                parts.append(LoRA(given[plan.lora]))
            early = plan.attention if pre_denoise == "attention" else not self.pyramid
            if plan.control and early and pre_denoise != "none":
                parts.append(PreDenoise(60))
            layers: Any = CONVOLUTIONAL[topology]
            if self.pyramid:
                layers = PYRAMID[topology]
            if plan.attention:
                layers = ["attn"]
            found.append(FeatureSpec(plan.name, Recipe(*parts), layers, self.t, plan.seed))
        return found


_SPAIR = (
    "a photo of aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, dog, horse, "
    "motorbike, person, potted plant, sheep, train, tv monitor, high quality, best quality, highly "
    "realistic, masterpiece, high resolution"
)
_RIDER = (
    "a photo of a single horse running in a sports field, with a well-equipped rider on its back, "
    "seems they are in a competition, high quality, best quality, highly realistic, masterpiece"
)
_ROOM = (
    "bedroom, a bed, some bedroom furniture, lights, a door, ceiling, floor, walls, pillow, quilt, "
    "chair and table, window, in good quality"
)


def _segmentation(name: str) -> GateRecipe:
    prompt = PROMPTS[name]
    plans = (
        FeaturePlan("prompt", prompt),
        FeaturePlan("control-lora", prompt, control=True, lora="good"),
        FeaturePlan("control-lora-overfit", prompt, control=True, lora="overfit"),
    )
    return GateRecipe(name, plans, pyramid=True)


recipes: dict[str, GateRecipe] = {
    "spair": GateRecipe(
        "spair",
        (
            *(
                plan
                for seed, lora in ((0, "good"), (1, "overfit"))
                for plan in (
                    FeaturePlan(f"prompt-seed{seed}", _SPAIR, seed=seed),
                    FeaturePlan(f"lora-seed{seed}", "a photo", lora=lora, seed=seed),
                    FeaturePlan(f"control-seed{seed}", "a photo", control=True, seed=seed),
                )
            ),
            FeaturePlan("attention", _SPAIR, control=True, lora="good", attention=True),
        ),
    ),
    "horse21": GateRecipe(
        "horse21",
        (
            FeaturePlan("prompt", QUALITY_PROMPTS["horse-high"]),
            FeaturePlan("control", "a horse", control=True),
            FeaturePlan("lora", "a horse", lora="good"),
            FeaturePlan("lora-overfit", "a horse", lora="overfit"),
            FeaturePlan("attention", _RIDER, control=True, lora="good", attention=True),
        ),
    ),
    "bedroom28": GateRecipe(
        "bedroom28",
        (
            FeaturePlan("prompt", "a photo of a tidy and well-designed bedroom"),
            FeaturePlan("control", "a bedroom", control=True),
            FeaturePlan("lora", "a bedroom", lora="good"),
            FeaturePlan("attention", _ROOM, control=True, lora="good", attention=True),
        ),
    ),
    "ade20k": _segmentation("ade20k"),
    "cityscapes": _segmentation("cityscapes"),
}


def get_recipe(name: str) -> GateRecipe:
    """The recipe of this task.

    Raises:
        InputError: If there is none.

    Examples:
        >>> len(get_recipe("spair").features)
        7
    """
    if name not in recipes:
        raise InputError(f"there is no recipe {name!r}; accepted: {', '.join(recipes)}")
    return recipes[name]

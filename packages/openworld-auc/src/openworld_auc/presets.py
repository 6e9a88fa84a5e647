"""The paper's settings as data: 15 benchmarks, methods, backbones."""

from dataclasses import dataclass, replace

from openworld_auc.gmop import GMoPConfig
from openworld_auc.train import TrainConfig
from shared_core.data.prompts import get_templates
from shared_core.errors import InputError

__all__ = ["BACKBONES", "BENCHMARKS", "METHODS", "Benchmark", "Method", "load_preset"]


@dataclass(frozen=True)
class Benchmark:
    """One data set of the paper.

    Attributes:
        name: Its key.
        classes: Number of classes.
        base: How many of them, the first by label, are base; the rest are new.
        test_images: Size of its test set.
        templates: Key of its prompt in `shared_core.data.prompts`.
        epochs: Passes over the few shots.
        alpha: Weight of the detectors' cross entropy.
        train_on: For cross-domain tests: whose prompts are used.
    """

    name: str
    classes: int
    base: int
    test_images: int
    templates: str
    epochs: int = 40
    alpha: float = 0.5
    train_on: str | None = None

    @property
    def template(self) -> str:
        """The hand-written prompt."""
        return get_templates(self.templates)[0]


BENCHMARKS = {
    b.name: b
    for b in (
        Benchmark("imagenet", 1000, 500, 50_000, "imagenet", epochs=10, alpha=1.0),
        Benchmark("caltech101", 100, 50, 2_465, "caltech101"),
        Benchmark("oxford_pets", 37, 19, 3_669, "oxford-pets"),
        Benchmark("stanford_cars", 196, 98, 8_041, "stanford-cars"),
        Benchmark("flowers102", 102, 51, 2_463, "oxford-flowers", epochs=50),
        Benchmark("food101", 101, 51, 30_300, "food101"),
        Benchmark("fgvc_aircraft", 100, 50, 3_333, "fgvc-aircraft"),
        Benchmark("sun397", 397, 199, 19_850, "sun397"),
        Benchmark("dtd", 47, 24, 1_692, "dtd"),
        Benchmark("eurosat", 10, 5, 8_100, "eurosat"),
        Benchmark("ucf101", 101, 51, 3_783, "ucf101"),
        Benchmark("imagenet_v2", 1000, 500, 10_000, "imagenet-v2", train_on="imagenet"),
        Benchmark("imagenet_sketch", 1000, 500, 50_889, "imagenet-sketch", train_on="imagenet"),
        Benchmark("imagenet_a", 200, 101, 7_500, "imagenet-a", train_on="imagenet"),
        Benchmark("imagenet_r", 200, 134, 30_000, "imagenet-r", train_on="imagenet"),
    )
}


@dataclass(frozen=True)
class Method:
    """One method: what is tuned for which role, and how.

    Attributes:
        model: Settings of the model.
        train: The recipe, or None where nothing is trained.
    """

    model: GMoPConfig
    train: TrainConfig | None


# CoOp's own recipe is that of Zhou et al. (IJCV 2022), without its augmentation and warm-up epoch.
METHODS = {
    "gmop": Method(GMoPConfig(), TrainConfig()),
    "gmop-official": Method(
        GMoPConfig(detach_gate=False, official_padding=True), TrainConfig(t_max=100)
    ),
    "coop": Method(
        GMoPConfig(new_prompt="tuned", detector="mcm", lam=0.0, alpha=0.0),
        TrainConfig(momentum=0.9, weight_decay=5e-4),
    ),
    "zeroshot": Method(
        GMoPConfig(
            base_prompt="template",
            detector="mcm",
            detector_prompt="template",
            lam=0.0,
            alpha=0.0,
        ),
        None,
    ),
}

BACKBONES = (
    ("ViT-B-16-quickgelu", "openai"),
    ("ViT-B-32-quickgelu", "openai"),
    ("ViT-L-14-quickgelu", "openai"),
    ("ViT-B-16", "laion2b_s34b_b88k"),
)


def load_preset(benchmark: str, method: str = "gmop") -> tuple[Benchmark, Method]:
    """The settings of a method on a benchmark.

    Args:
        benchmark: A key of `BENCHMARKS`.
        method: A key of `METHODS`.

    Raises:
        InputError: If one of them is not known.

    Examples:
        >>> benchmark, method = load_preset("oxford_pets")
        >>> benchmark.base, method.model.template, method.train.epochs
        (19, 'a photo of a {}, a type of pet.', 40)
    """
    if benchmark not in BENCHMARKS:
        raise InputError(f"there is no preset {benchmark!r}; accepted: {', '.join(BENCHMARKS)}")
    if method not in METHODS:
        raise InputError(f"there is no method {method!r}; accepted: {', '.join(METHODS)}")
    data, chosen = BENCHMARKS[benchmark], METHODS[method]
    alpha = data.alpha if chosen.model.alpha > 0 else 0.0
    model = replace(chosen.model, alpha=alpha, template=data.template)
    train = None if chosen.train is None else replace(chosen.train, epochs=data.epochs)
    return data, Method(model, train)

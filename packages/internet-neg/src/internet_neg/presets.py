"""The paper's settings as data: models, benchmarks, and what its Table 1 reports.

The benchmarks read the image lists of OpenOOD (``relative/path label`` a line, -1 unknown) and the
images beside them. The published numbers of InterNeg count unknown images as positive in FPR95;
those of MCM and NegLabel, which stand beside them in the paper, count known ones.
"""

from dataclasses import dataclass, field

from internet_neg.config import InterNegConfig
from internet_neg.errors import InterNegError

__all__ = [
    "BENCHMARKS",
    "MODELS",
    "NEGLABEL",
    "PAPER",
    "Benchmark",
    "ImageList",
    "Model",
    "get_benchmark",
    "imagenet_classnames",
]


@dataclass(frozen=True)
class Model:
    """A model that the literature uses.

    Attributes:
        library: ``open_clip`` or ``hf``.
        model: Architecture, or hub id.
        pretrained: Tag of the weights, for open_clip.
    """

    library: str
    model: str
    pretrained: str | None = None


MODELS = {
    "vit-b16": Model("open_clip", "ViT-B-16-quickgelu", "openai"),
    "vit-b32": Model("open_clip", "ViT-B-32-quickgelu", "openai"),
    "vit-l14": Model("open_clip", "ViT-L-14-quickgelu", "openai"),
    "rn50": Model("open_clip", "RN50-quickgelu", "openai"),
    "vit-b16-laion2b": Model("open_clip", "ViT-B-16", "laion2b_s34b_b88k"),
    "hf-vit-b16": Model("hf", "openai/clip-vit-base-patch16"),
    "hf-vit-l14": Model("hf", "openai/clip-vit-large-patch14"),
}


@dataclass(frozen=True)
class ImageList:
    """One set of a benchmark.

    Attributes:
        imglist: The list, relative to ``benchmark_imglist`` of OpenOOD.
        count: How many images it holds.
    """

    imglist: str
    count: int


@dataclass(frozen=True)
class Benchmark:
    """A row of the paper's experiments.

    Attributes:
        known: The test images of the known classes.
        train: The images that proxies are drawn from.
        unknown: The sets of unknown images.
        config: Settings of the method.
        batch_size: Images at a time.
        paper: AUROC and FPR95 that the paper reports, in percent; empty where it gives no sets.
    """

    known: ImageList
    train: ImageList
    unknown: dict[str, ImageList]
    config: InterNegConfig
    batch_size: int = 256
    paper: dict[str, tuple[float, float]] = field(default_factory=dict)


_LISTS = {
    "inaturalist": ImageList("imagenet/test_inaturalist.txt", 10_000),
    "sun": ImageList("imagenet/test_sun.txt", 10_000),
    "places": ImageList("imagenet/test_places.txt", 10_000),
    "textures": ImageList("imagenet/test_textures.txt", 5_160),
    "openimage-o": ImageList("imagenet/test_openimage_o.txt", 15_869),
    "ssb-hard": ImageList("imagenet/test_ssb_hard.txt", 49_000),
    "ninco": ImageList("imagenet/test_ninco.txt", 5_879),
}
_KNOWN = ImageList("imagenet/test_imagenet.txt", 45_000)
_TRAIN = ImageList("imagenet/train_imagenet.txt", 1_281_167)

# AUROC and FPR95 in percent, CLIP ViT-B/16, ImageNet-1k against the four sets (Table 1).
PAPER: dict[str, dict[str, tuple[float, float]]] = {
    "MCM": {
        "inaturalist": (94.59, 32.20),
        "sun": (92.25, 38.80),
        "places": (90.31, 46.20),
        "textures": (86.12, 58.50),
        "average": (90.82, 43.93),
    },
    "NegLabel": {
        "inaturalist": (99.49, 1.91),
        "sun": (95.49, 20.53),
        "places": (91.64, 35.59),
        "textures": (90.22, 43.56),
        "average": (94.21, 25.40),
    },
    "InterNeg": {
        "inaturalist": (99.79, 0.40),
        "sun": (98.68, 6.78),
        "places": (95.01, 27.11),
        "textures": (96.26, 21.85),
        "average": (97.43, 14.04),
    },
}


# NegLabel's own settings.
NEGLABEL = InterNegConfig(negatives=10_000, groups=100, text_only=True)


def _sets(*names: str) -> dict[str, ImageList]:
    return {name: _LISTS[name] for name in names}


BENCHMARKS = {
    "imagenet-four": Benchmark(
        _KNOWN,
        _TRAIN,
        _sets("inaturalist", "sun", "places", "textures"),
        InterNegConfig(groups=5, transform="openood"),
        paper=PAPER["InterNeg"],
    ),
    "imagenet-near": Benchmark(
        _KNOWN,
        _TRAIN,
        _sets("ssb-hard", "ninco"),
        InterNegConfig(groups=1, transform="openood"),
    ),
    "imagenet-far": Benchmark(
        _KNOWN,
        _TRAIN,
        _sets("inaturalist", "textures", "openimage-o"),
        InterNegConfig(groups=5, transform="openood"),
    ),
}


def get_benchmark(name: str) -> Benchmark:
    """One benchmark by name.

    Args:
        name: A key of `BENCHMARKS`.

    Raises:
        InterNegError: If there is none of that name.

    Examples:
        >>> get_benchmark("imagenet-near").config.groups
        1
    """
    if name not in BENCHMARKS:
        raise InterNegError(f"no preset is called {name!r}; accepted: {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def imagenet_classnames() -> list[str]:
    """The 1,000 class names that CLIP was evaluated with, from open_clip.

    Two of them come twice (missile, sunglasses); the second gets a space at its end, which
    tokenizers do not see.

    Examples:
        >>> names = imagenet_classnames()
        >>> len(set(names)), len({name.strip() for name in names})
        (1000, 998)
    """
    from open_clip import IMAGENET_CLASSNAMES

    found: list[str] = []
    for name in IMAGENET_CLASSNAMES:
        found.append(f"{name} " if name in found else name)
    return found

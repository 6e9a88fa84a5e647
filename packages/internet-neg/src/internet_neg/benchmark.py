"""A comparison on image files: features once for all methods, then the protocol of `evaluate`."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from internet_neg._inputs import labelled_images, unlabelled_images
from internet_neg.baselines import MCMDetector, NegLabelDetector
from internet_neg.config import InterNegConfig
from internet_neg.detector import InterNegDetector
from internet_neg.errors import InterNegError
from internet_neg.evaluate import StreamResult, compare, read_imglist
from internet_neg.presets import NEGLABEL, ImageList, get_benchmark, imagenet_classnames
from internet_neg.proxies import embed_images
from internet_neg.transforms import load_transform
from internet_neg.vocabulary import Vocabulary

__all__ = [
    "METHODS",
    "Prepared",
    "Settings",
    "default_groups",
    "prepare_benchmark",
    "run_benchmark",
]

METHODS = ("mcm", "neglabel", "text-only", "interneg")

Images = tuple[list[Any], list[int]]


@dataclass(frozen=True)
class Settings:
    """What to compare on.

    Attributes:
        classnames: Names of the known classes.
        known: Test images of known classes and their labels.
        shots: Images for the proxies and their labels.
        unknown: Sets of unknown images.
        config: Of InterNeg.
        neglabel: Of NegLabel.
        batch_size: Images of the stream at a time.
    """

    classnames: list[str]
    known: Images
    shots: Images
    unknown: dict[str, list[Any]]
    config: InterNegConfig
    neglabel: InterNegConfig
    batch_size: int = 256

    @classmethod
    def from_preset(cls, name: str, data_root: Path | None) -> "Settings":
        """A benchmark of the paper, from OpenOOD's folder of lists and images.

        Raises:
            InterNegError: If a list is missing or has another number of images than it should.
        """
        benchmark = get_benchmark(name)
        if data_root is None:
            raise InterNegError(f"the preset {name} reads images of your own: give --data-root")
        root = Path(data_root)

        def read(part: ImageList) -> Images:
            path = root / "benchmark_imglist" / part.imglist
            # OpenOOD keeps the texture images apart from the others.
            for folder in ("images_largescale", "images_classic"):
                images, labels = read_imglist(path, root / folder)
                if len(images) != part.count:
                    raise InterNegError(
                        f"{path} lists {len(images)} images; the benchmark has {part.count}"
                    )
                if images[0].is_file():
                    return list(images), labels
            raise InterNegError(
                f"the images of {path} are neither in images_largescale/ nor in images_classic/ of "
                f"{root}: {images[0].relative_to(root / folder)}"
            )

        images, labels = read(benchmark.train)
        return cls(
            imagenet_classnames(),
            read(benchmark.known),
            _draw(images, labels, benchmark.config.shots or 16, benchmark.config.seed),
            {key: read(part)[0] for key, part in benchmark.unknown.items()},
            benchmark.config,
            NEGLABEL,
            benchmark.batch_size,
        )

    @classmethod
    def from_sources(
        cls,
        classnames: list[str] | None,
        known: str,
        id_images: str,
        ood: Sequence[str],
        *,
        negatives: int,
        groups: int | None,
    ) -> "Settings":
        """Images of your own, or data sets of the hub; see `labelled_images` of ``_inputs``.

        Args:
            classnames: Names of the known classes; None takes those of `id_images`.
            known: Test images of the known classes.
            id_images: Images of them for the proxies.
            ood: ``NAME=SOURCE`` for each set of unknown images.
            negatives: M of InterNeg and NegLabel.
            groups: G of both; None is 5 from 100 classes on, else 1.

        Raises:
            InterNegError: If something is missing.
        """
        unknown = {}
        for item in ood:
            name, _, source = item.partition("=")
            if not source:
                raise InterNegError(f"--ood {item!r}; accepted: NAME=FOLDER, NAME=LIST or a hub id")
            unknown[name] = unlabelled_images(source, "test")
        images, labels, names = labelled_images(id_images, "train", classnames)
        config = InterNegConfig(negatives=negatives, groups=default_groups(groups, len(names)))
        return cls(
            names,
            labelled_images(known, "test", names)[:2],
            _draw(images, labels, config.shots or 16, config.seed),
            unknown,
            config,
            config,
        )

    def with_changes(
        self, *, batch_size: int, percentile_mode: Any = "linear", **changes: Any
    ) -> "Settings":
        """The same with another percentile of NegLabel and other settings of InterNeg."""
        return dataclasses.replace(
            self,
            config=dataclasses.replace(self.config, **changes),
            neglabel=dataclasses.replace(self.neglabel, percentile_mode=percentile_mode),
            batch_size=batch_size,
        )

    def describe(self) -> dict[str, Any]:
        """The settings without the file names, JSON-ready."""
        return {
            "classes": len(self.classnames),
            "known": len(self.known[0]),
            "shots": len(self.shots[0]),
            "unknown": {name: len(files) for name, files in self.unknown.items()},
            "interneg": self.config.to_dict(),
            "neglabel": self.neglabel.to_dict(),
            "batch_size": self.batch_size,
        }


@dataclass
class Prepared:
    """Fitted detectors and the features that they share.

    Attributes:
        detectors: By method.
        known: Features of the known test images.
        labels: Their classes.
        unknown: Features of every set of unknown images.
        settings: What they come from.
    """

    detectors: dict[str, InterNegDetector]
    known: Tensor
    labels: Tensor
    unknown: dict[str, Tensor]
    settings: Settings


def prepare_benchmark(
    encoder: Any,
    settings: Settings,
    methods: Sequence[str],
    vocabulary: Vocabulary,
    cache: Path | None = None,
    *,
    sync: bool = False,
) -> Prepared:
    """Embed all images and words once, and fit the methods.

    Args:
        encoder: The model.
        settings: What to compare on.
        methods: Some of `METHODS`.
        vocabulary: Candidate words.
        cache: Folder that keeps features; None keeps none.
        sync: With torch.distributed, whether the ranks share the work; all have to call.

    Raises:
        InterNegError: If a method is not known, a label is none of the classes, or an image is
            missing or broken.
    """
    if not methods or (strange := [m for m in methods if m not in METHODS]):
        raise InterNegError(
            f"methods {', '.join(strange) if methods else 'are missing'}; "
            f"accepted: {', '.join(METHODS)}"
        )
    names = settings.classnames
    wrong = [label for label in settings.known[1] if not 0 <= label < len(names)]
    if wrong:
        raise InterNegError(
            f"a known test image has label {wrong[0]}; accepted: 0 to {len(names) - 1}, in the "
            "order of the class names"
        )
    transform = load_transform(settings.config.transform, encoder)

    def embed(files: list[Any]) -> Tensor:
        kept = None if cache is None else (cache, settings.config.transform)
        return embed_images(encoder, files, transform=transform, cache=kept, sync=sync)

    source = {"features": embed(settings.shots[0]), "labels": torch.tensor(settings.shots[1])}
    text_only = dataclasses.replace(settings.config, text_only=True)
    makers: dict[str, Callable[[], InterNegDetector]] = {
        "mcm": lambda: MCMDetector(encoder, names, InterNegConfig(), vocabulary, cache),
        "neglabel": lambda: NegLabelDetector(encoder, names, settings.neglabel, vocabulary, cache),
        "text-only": lambda: InterNegDetector(encoder, names, text_only, vocabulary, cache),
        "interneg": lambda: InterNegDetector(encoder, names, settings.config, vocabulary, cache),
    }
    return Prepared(
        {method: makers[method]().fit(source, sync=sync) for method in methods},
        embed(settings.known[0]),
        torch.tensor(settings.known[1]),
        {name: embed(files) for name, files in settings.unknown.items()},
        settings,
    )


def run_benchmark(
    prepared: Prepared, *, rank_by: Literal["margin", "score"] = "margin"
) -> tuple[dict[str, dict[str, dict[str, Any]]], dict[tuple[str, str], StreamResult]]:
    """Compare fitted methods on the features that they share; see `internet_neg.evaluate.compare`.

    Args:
        prepared: What `prepare_benchmark` returned.
        rank_by: ``margin`` or ``score``.
    """
    return compare(
        prepared.detectors,
        prepared.known,
        prepared.unknown,
        labels=prepared.labels,
        batch_size=prepared.settings.batch_size,
        seeds=[prepared.settings.config.seed],
        rank_by=rank_by,
    )


def default_groups(groups: int | None, classes: int) -> int:
    """G if it is given, else 5 from 100 classes on, and 1 for fewer."""
    return groups if groups is not None else (5 if classes >= 100 else 1)


def _draw(images: list[Any], labels: list[int], shots: int, seed: int) -> Images:
    """At most `shots` images of each class, so that no more than those are embedded."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    counts: dict[int, int] = {}
    kept = []
    for index in order:
        counts[labels[index]] = counts.get(labels[index], 0) + 1
        if counts[labels[index]] <= shots:
            kept.append(index)
    kept.sort()
    return [images[i] for i in kept], [labels[i] for i in kept]

"""Image proxies of the known classes: the mean embedding of a few labelled images of each."""

import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image
import torch
from jaxtyping import Float, Int
from torch import Tensor

from internet_neg._checks import check_embeddings, normalize
from internet_neg._features import features_in_parts
from internet_neg.errors import InterNegError
from internet_neg.transforms import load_transform
from shared_core.data.loading import ImageDataset

if TYPE_CHECKING:
    from internet_neg.encoders import DualEncoder

__all__ = [
    "DataImage",
    "ProxyBuilder",
    "class_folders",
    "class_proxies",
    "embed_images",
    "is_image",
    "read_image",
    "stream_proxies",
]


def class_proxies(
    features: Float[Tensor, "n D"], labels: Int[Tensor, " n"], classnames: Sequence[str]
) -> Float[Tensor, "K D"]:
    """Normalized mean of the normalized embeddings of each class.

    Args:
        features: Image embeddings.
        labels: Class of each, from 0.
        classnames: Names of the classes.

    Raises:
        InterNegError: If a label is out of range, or a class has no image.

    Examples:
        >>> class_proxies(torch.eye(2), torch.tensor([0, 0]), ["a"])
        tensor([[0.7071, 0.7071]])
    """
    check_embeddings("ID images", features)
    K = len(classnames)
    if len(labels) != len(features):
        raise InterNegError(f"there are {len(features)} images but {len(labels)} labels")
    labels = labels.to(features.device)
    wrong = labels[(labels < 0) | (labels >= K)]
    if len(wrong):
        raise InterNegError(f"label {int(wrong[0])} is none of the classes; accepted: 0 to {K - 1}")
    counts = torch.bincount(labels, minlength=K)
    if missing := [classnames[i] for i in (counts == 0).nonzero().flatten().tolist()]:
        more = ", ..." if len(missing) > 5 else ""
        raise InterNegError(
            f"{len(missing)} classes have no image: {', '.join(missing[:5])}{more}; "
            "every class needs at least one"
        )
    v = normalize(features)
    sums = torch.zeros(K, v.shape[1], dtype=v.dtype, device=v.device).index_add_(0, labels, v)
    means = sums / counts[:, None]
    check_embeddings("proxies", means)
    return normalize(means)


def stream_proxies(
    v: Float[Tensor, "n D"], T: Float[Tensor, "K D"], scale: float, shots: int = 16
) -> Float[Tensor, "K D"]:
    """Proxies without labelled images, an extension: confident images of an unlabelled stream.

    Images whose largest softmax probability exceeds 0.9 stand for the class they match, at most
    `shots` a class, the most confident first; a class without any keeps its text embedding.

    Args:
        v: Image embeddings of the stream.
        T: Text embeddings of the classes.
        scale: s.
        shots: Images a class.

    Examples:
        >>> stream_proxies(torch.eye(3)[:1], torch.eye(3)[:2], scale=100.0)
        tensor([[1., 0., 0.],
                [0., 1., 0.]])
    """
    v, T = normalize(v), normalize(T)
    confidence, label = torch.softmax(scale * v @ T.T, dim=-1).max(dim=-1)
    proxies = T.clone()
    for k in range(len(T)):
        mine = ((label == k) & (confidence > 0.9)).nonzero().flatten()
        if len(mine):
            best = mine[confidence[mine].argsort(descending=True, stable=True)[:shots]]
            proxies[k] = v[best].mean(dim=0)
    return normalize(proxies)


def read_image(path: str | os.PathLike[str]) -> PIL.Image.Image:
    """An image file in RGB, whatever its mode.

    Raises:
        InterNegError: If it is missing or cannot be decoded; the message names it.
    """
    try:
        with PIL.Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three
        reason = "cannot be decoded" if Path(path).is_file() else "is not there"
        raise InterNegError(f"the image {os.fspath(path)} {reason}: {error}") from error


@dataclass(frozen=True)
class DataImage:
    """An image of a data set, read when it is needed.

    Attributes:
        data: The data set.
        source: Its name, split and version.
        index: Which of its images.
    """

    data: ImageDataset
    source: str
    index: int

    def read(self) -> PIL.Image.Image:
        """The image in RGB."""
        image: PIL.Image.Image = self.data[self.index][0]
        return image


def embed_images(
    encoder: "DualEncoder",
    images: Any,
    *,
    batch_size: int = 256,
    transform: Callable[[Any], Tensor] | None = None,
    cache: tuple[Path, str] | None = None,
    sync: bool = False,
) -> Float[Tensor, "n D"]:
    """Features of images: a preprocessed tensor, or PIL images and paths.

    Args:
        encoder: The model.
        images: A tensor [n, C, H, W], or a sequence of PIL images and paths.
        batch_size: Images at a time.
        transform: In place of the encoder's ``preprocess``.
        cache: With paths alone: a folder that keeps the features, a file for each batch, by the
            model and the images' names, sizes and times, and a name for the transform. An
            interrupted extraction goes on where it stopped.
        sync: With torch.distributed, whether every rank embeds some of the batches; all ranks have
            to call, with the same images, and all get all features.

    Raises:
        InterNegError: If an image is missing or cannot be decoded.

    Examples:
        >>> from internet_neg.mini_clip import build_mini_clip
        >>> embed_images(build_mini_clip(), [PIL.Image.new("L", (40, 30))]).shape
        torch.Size([1, 64])
    """
    prepare = transform or encoder.preprocess

    def compute(piece: slice) -> Tensor:
        batch = images[piece]
        if not isinstance(batch, Tensor):
            batch = torch.stack([prepare(_open(image)) for image in batch])
        return encoder.encode_image(batch)

    names = [""] * len(images)
    if cache is not None:
        names = [f"{cache[1]} {_identity(file)}" for file in images]
    return features_in_parts(
        encoder,
        "images",
        names,
        compute,
        part=batch_size,
        folder=None if cache is None else cache[0],
        sync=sync,
    )


def _identity(file: Any) -> str:
    """A file's name, size and time of change; a data set's version and the place in it."""
    if isinstance(file, DataImage):
        return f"{file.source} {file.index}"
    try:
        stat = Path(file).stat()
    except OSError as error:
        raise InterNegError(f"the image {os.fspath(file)} is not there") from error
    return f"{Path(file).resolve()} {stat.st_size} {stat.st_mtime_ns}"


def _open(image: Any) -> PIL.Image.Image:
    if isinstance(image, PIL.Image.Image):
        return image.convert("RGB")
    return image.read() if isinstance(image, DataImage) else read_image(image)


class ProxyBuilder:
    """Image proxies from labelled images of any kind.

    Args:
        encoder: The model.
        classnames: Names of the classes.
        shots: Images of each class, at most, drawn with the seed; None takes all.
        augment: Random crops and flips, as the published code draws them; by default the images
            are preprocessed as in testing.
        transform: ``clip`` or ``openood``; see `internet_neg.transforms.load_transform`.
        seed: Of the draws.
        batch_size: Images at a time.
        sync: See `embed_images`.

    Examples:
        >>> from internet_neg.mini_clip import build_mini_clip
        >>> images = [PIL.Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
        >>> ProxyBuilder(build_mini_clip(), ["red", "blue"]).build(zip(images, [0, 1])).shape
        torch.Size([2, 64])
    """

    def __init__(
        self,
        encoder: "DualEncoder",
        classnames: Sequence[str],
        *,
        shots: int | None = 16,
        augment: bool = False,
        transform: str = "clip",
        seed: int = 0,
        batch_size: int = 256,
        sync: bool = False,
    ) -> None:
        self.encoder, self.classnames = encoder, list(classnames)
        self.shots, self.augment, self.seed = shots, augment, seed
        self._prepare = load_transform(transform, encoder)
        self.batch_size, self.sync = batch_size, sync

    def build(self, source: Any) -> Float[Tensor, "K D"]:
        """Proxies from a data set, a loader, a mapping of classes to images, or features.

        Args:
            source: A mapping of class names to lists of images or paths, or a folder with a
                subfolder for each; ``{"features": [n, D], "labels": [n]}``; or an iterable or data
                set of (image, label) or of batches of them.

        Raises:
            InterNegError: As `class_proxies`; also for unknown class names and broken images.
        """
        if isinstance(source, Mapping) and "features" in source:
            features, labels = source["features"], torch.as_tensor(source["labels"])
            if len(labels) != len(features):
                raise InterNegError(f"there are {len(features)} images but {len(labels)} labels")
            kept = self._choose(labels.tolist())
            return class_proxies(features[kept], labels[kept], self.classnames)
        if isinstance(getattr(source, "targets", None), list):  # labels without reading images
            labels_list = [int(label) for label in source.targets]
            kept = self._choose(labels_list)
            chosen = [source[i][0] for i in kept]
        else:
            images, labels_list = self._collect(source)
            kept = self._choose(labels_list)
            chosen = [images[i] for i in kept]
        features = self._embed(chosen)
        labels = torch.tensor([labels_list[i] for i in kept], dtype=torch.long)
        return class_proxies(features, labels, self.classnames)

    def _embed(self, images: list[Any]) -> Tensor:
        transform = self._prepare
        if images and isinstance(images[0], Tensor):
            images = torch.stack(images)  # type: ignore[assignment]
        elif self.augment:

            def transform(image: PIL.Image.Image) -> Tensor:
                return self._prepare(_random_crop(image, rng))

            rng = random.Random(self.seed)
        return embed_images(
            self.encoder,
            images,
            batch_size=self.batch_size,
            transform=transform,
            sync=self.sync and not self.augment,  # crops are drawn one after another
        )

    def _choose(self, labels: list[int]) -> list[int]:
        """Which samples to use: a seeded draw of at most `shots` a class, in order."""
        if self.shots is None:
            return list(range(len(labels)))
        order = list(range(len(labels)))
        random.Random(self.seed).shuffle(order)
        counts: dict[int, int] = {}
        kept = []
        for index in order:
            counts[labels[index]] = counts.get(labels[index], 0) + 1
            if counts[labels[index]] <= self.shots:
                kept.append(index)
        return sorted(kept)

    def _collect(self, source: Any) -> tuple[list[Any], list[int]]:
        if isinstance(source, str | os.PathLike):
            source = class_folders(Path(source))
        if isinstance(source, Mapping):
            unknown = [name for name in source if name not in self.classnames]
            if unknown:
                raise InterNegError(
                    f"{unknown[0]!r} is none of the {len(self.classnames)} class names"
                )
            pairs = [(image, name) for name, images in source.items() for image in images]
            numbers = {name: index for index, name in enumerate(self.classnames)}
            return [image for image, _ in pairs], [numbers[name] for _, name in pairs]
        images, labels = [], []
        items = (
            source
            if not hasattr(source, "__getitem__")
            else (source[i] for i in range(len(source)))
        )
        for image, label in items:
            if isinstance(label, Tensor) and label.ndim == 1:  # a batch of a loader
                images += list(image)
                labels += label.tolist()
            else:
                images.append(image)
                labels.append(int(label))
        return images, labels


def class_folders(folder: Path) -> dict[str, list[Path]]:
    """The images of each subfolder, by its name.

    Raises:
        InterNegError: If there is no folder, or no image in any subfolder.
    """
    if not folder.is_dir():
        raise InterNegError(f"there is no folder {folder}")
    found = {
        child.name: sorted(file for file in child.rglob("*") if is_image(file))
        for child in sorted(folder.iterdir())
        if child.is_dir()
    }
    if not any(found.values()):
        raise InterNegError(f"{folder} has no subfolder of images; make one for each class")
    return found


def is_image(file: Path) -> bool:
    """Whether a file's name is an image's.

    Examples:
        >>> is_image(Path("a.JPG")), is_image(Path("a.txt"))
        (True, False)
    """
    suffixes = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
    return file.suffix.lower() in suffixes


def _random_crop(image: PIL.Image.Image, rng: random.Random) -> PIL.Image.Image:
    """A crop of 8 to 100 % of the area and sides of 3:4 to 4:3, mirrored half of the time."""
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1.0)
        ratio = (4 / 3) ** rng.uniform(-1, 1)
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            square = (max(w, h), max(w, h))
            image = image.crop((left, top, left + w, top + h)).resize(square)
            break
    if rng.random() < 0.5:
        image = image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
    return image

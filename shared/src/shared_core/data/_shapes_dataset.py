"""Labelled images of the shapes world as a map-style data set."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import Int16, Int64

from shared_core.data._attributes import VOCABULARIES
from shared_core.data._render import draw_images
from shared_core.data.loading import ImageDataset

__all__ = ["ShapesDataset", "Transform"]

Transform = Callable[[PIL.Image.Image], Any]


class _LazyImages(Sequence[Any]):
    """Images that are drawn when they are read."""

    def __init__(
        self,
        attributes: Int16[np.ndarray, "n 4"],
        indices: Int64[np.ndarray, " n"],
        seed: int,
        size: int,
    ) -> None:
        self.attributes, self.indices, self.seed, self.size = attributes, indices, seed, size

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return _LazyImages(self.attributes[index], self.indices[index], self.seed, self.size)
        attributes = self.attributes[[index]].astype(np.int64)
        images, _ = draw_images(attributes, self.indices[[index]], self.seed, self.size)
        return images[0]


class ShapesDataset(ImageDataset):
    """Labelled images of a `shared_core.data.shapes.ShapesWorld`, which makes them.

    Attributes:
        images: The pixels, uint8 [n, size, size, 3]; of a lazy data set a sequence that draws them.
        targets: The class index of each image.
        class_names: The name of each class.
        attrs: Index of shape, color, fill and background of each image, [n, 4].
        indices: The number of each image in its world.
        seed: Seed of the world.
        size: Pixels per side.
        split: The split that the images belong to.
    """

    def __init__(
        self,
        attributes: Int16[np.ndarray, "n 4"],
        indices: Int64[np.ndarray, " n"],
        targets: Sequence[int],
        class_names: Sequence[str],
        *,
        seed: int,
        size: int,
        split: str,
        lazy: bool = False,
        transform: Transform | None = None,
    ) -> None:
        images: Any
        if lazy:
            images = _LazyImages(attributes, indices, seed, size)
        else:
            images, _ = draw_images(attributes.astype(np.int64), indices, seed, size)
        super().__init__(images, targets, class_names, transform)
        self.attrs = attributes
        self.indices = indices
        self.seed = seed
        self.size = size
        self.split = split

    def describe(self) -> dict[str, Any]:
        """What the data set holds, ready for JSON.

        Examples:
            >>> from shared_core.data.shapes import ShapesWorld
            >>> data = ShapesWorld(0).classification("color", 2, colors=["red", "blue"])
            >>> data.describe()["classes"]
            {'red': 2, 'blue': 2}
        """
        counts = np.bincount(self.targets, minlength=len(self.class_names)).tolist()
        values = {
            name: [vocabulary[i] for i in np.unique(column) if i >= 0]
            for (name, vocabulary), column in zip(VOCABULARIES.items(), self.attrs.T, strict=True)
        }
        return {
            "seed": self.seed,
            "size": self.size,
            "split": self.split,
            "images": len(self),
            "classes": dict(zip(self.class_names, counts, strict=True)),
            **values,
        }

"""Named feature maps of one batch of images."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from diffeat.naming import ActivationInfo
from shared_core.errors import InputError
from shared_core.run import atomic_path

__all__ = ["Features"]

Size = int | tuple[int, int] | Literal["max", "min"]


class Features(Mapping[str, Tensor]):
    """Feature maps ``[B, C, H, W]`` by name, in order of execution.

    Args:
        maps: The tensors.
        infos: What is known of each.

    Examples:
        >>> maps = Features({"a": torch.ones(2, 3, 4, 4), "b": torch.ones(2, 5, 8, 8)})
        >>> maps.concat("max").shape
        torch.Size([2, 8, 8, 8])
    """

    def __init__(
        self, maps: Mapping[str, Tensor], infos: Mapping[str, ActivationInfo] | None = None
    ) -> None:
        self._maps = dict(maps)
        self.infos = dict(infos or {})

    def __getitem__(self, name: str) -> Tensor:
        return self._maps[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._maps)

    def __len__(self) -> int:
        return len(self._maps)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{n}: {list(m.shape)}" for n, m in self._maps.items())
        return f"Features({shapes})"

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Name, channels and side of each map."""
        return [
            {"name": n, "channels": m.shape[1], "size": list(m.shape[-2:])}
            for n, m in self._maps.items()
        ]

    def to(self, *args: Any, **kwargs: Any) -> "Features":
        """All maps moved or converted, like `torch.Tensor.to`."""
        return Features({n: m.to(*args, **kwargs) for n, m in self._maps.items()}, self.infos)

    def _side(self, size: Size) -> tuple[int, int]:
        if isinstance(size, str):
            if size not in ("max", "min"):
                raise InputError(f"size={size!r}; accepted: max, min, a number or a pair")
            choose = max if size == "max" else min
            height, width = choose((m.shape[-2:] for m in self._maps.values()), key=tuple)
            return height, width
        return (size, size) if isinstance(size, int) else size

    def resize(self, size: Size, mode: str = "bilinear") -> "Features":
        """All maps at one size: a number, (height, width), or that of the largest or smallest map.

        Raises:
            InputError: If the size is none of these.
        """
        side = self._side(size)
        keep = {} if mode in ("nearest", "area") else {"align_corners": False}
        return Features(
            {
                n: m
                if tuple(m.shape[-2:]) == side
                else F.interpolate(m.float(), size=side, mode=mode, **keep).to(m.dtype)
                for n, m in self._maps.items()
            },
            self.infos,
        )

    def concat(self, size: Size = "max", mode: str = "bilinear") -> Tensor:
        """One tensor ``[B, ΣC, H, W]``: all maps resized to `size`, in order."""
        return torch.cat(list(self.resize(size, mode).values()), 1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all."""
        order = "\n".join(self._maps)
        with atomic_path(path) as temporary:
            save_file(
                {n: m.detach().cpu().contiguous() for n, m in self._maps.items()},
                temporary,
                metadata={"order": order},
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str], layers: Sequence[str] | None = None) -> "Features":
        """Read what `save` wrote, or only some layers of it.

        Raises:
            InputError: If the file is missing or damaged.

        Examples:
            >>> path = getfixture("tmp_path") / "f.safetensors"
            >>> Features({"a": torch.ones(1, 2, 3, 3)}).save(path)
            >>> Features.load(path)
            Features(a: [1, 2, 3, 3])
        """
        from safetensors import safe_open

        try:
            with safe_open(path, framework="pt") as file:
                order = (file.metadata() or {})["order"].split("\n")
                wanted = order if layers is None else [n for n in order if n in set(layers)]
                return cls({name: file.get_tensor(name) for name in wanted})
        except (OSError, SafetensorError, KeyError) as error:
            raise InputError(f"{os.fspath(path)} holds no readable features: {error}") from error

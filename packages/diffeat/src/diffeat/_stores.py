"""How features lie on disk: files of samples, files of layers, or one array a layer."""

import hashlib
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor

from diffeat.features import Features
from shared_core.errors import InputError
from shared_core.run import atomic_path


def _stem(sample: str) -> str:
    """A sample's file name; names that are no plain file name are hashed."""
    plain = sample.replace("-", "").replace("_", "").replace(".", "").isalnum()
    return sample if plain and len(sample) < 120 else hashlib.sha256(sample.encode()).hexdigest()


def _layer(name: str) -> str:
    return quote(name, safe="@")


def _load_array(file: Path) -> Tensor:
    try:
        return torch.from_numpy(np.load(file, mmap_mode="c", allow_pickle=False))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} holds no readable features: {error}") from error


def _save_array(file: Path, value: Tensor) -> None:
    with atomic_path(file) as temporary, open(temporary, "wb") as opened:
        np.save(opened, value.contiguous().numpy(), allow_pickle=False)


class Store(ABC):
    """Where samples are kept."""

    def __init__(self, folder: Path, layers: Sequence[str]) -> None:
        self.folder, self.layers = folder, list(layers)

    @abstractmethod
    def has(self, sample: str) -> bool:
        """Whether all layers of a sample are there."""

    @abstractmethod
    def write(self, sample: str, features: Features) -> None:
        """Keep a sample, whole or not at all."""

    @abstractmethod
    def read(self, sample: str, layers: Sequence[str]) -> Features:
        """Some layers of a sample."""


class SampleFiles(Store):
    """A safetensors file for each sample."""

    def _file(self, sample: str) -> Path:
        return self.folder / "samples" / f"{_stem(sample)}.safetensors"

    def has(self, sample: str) -> bool:
        return self._file(sample).is_file()

    def write(self, sample: str, features: Features) -> None:
        features.save(self._file(sample))

    def read(self, sample: str, layers: Sequence[str]) -> Features:
        return Features.load(self._file(sample), layers)


class SampleFolders(Store):
    """A folder of arrays for each sample."""

    def _path(self, sample: str) -> Path:
        return self.folder / "samples" / _stem(sample)

    def has(self, sample: str) -> bool:
        return self._path(sample).is_dir()

    def write(self, sample: str, features: Features) -> None:
        target = self._path(sample)
        unfinished = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        for name, value in features.items():
            _save_array(unfinished / f"{_layer(name)}.npy", value)
        os.replace(unfinished, target)

    def read(self, sample: str, layers: Sequence[str]) -> Features:
        folder = self._path(sample)
        return Features({n: _load_array(folder / f"{_layer(n)}.npy") for n in layers})


class LayerFiles(Store):
    """A folder for each layer, a file for each sample in it."""

    def __init__(self, folder: Path, layers: Sequence[str], suffix: str) -> None:
        super().__init__(folder, layers)
        self.suffix = suffix

    def _file(self, layer: str, sample: str) -> Path:
        return self.folder / "layers" / _layer(layer) / f"{_stem(sample)}.{self.suffix}"

    def has(self, sample: str) -> bool:
        return all(self._file(layer, sample).is_file() for layer in self.layers)

    def write(self, sample: str, features: Features) -> None:
        for name, value in features.items():
            file = self._file(name, sample)
            if self.suffix == "npy":
                _save_array(file, value)
            else:
                Features({name: value}).save(file)

    def read(self, sample: str, layers: Sequence[str]) -> Features:
        found: dict[str, Tensor] = {}
        for name in layers:
            file = self._file(name, sample)
            found[name] = _load_array(file) if self.suffix == "npy" else Features.load(file)[name]
        return Features(found)


class Arrays(Store):
    """One array ``[N, C, H, W]`` for each layer; a mark for each row that is written."""

    def __init__(self, folder: Path, layers: Sequence[str], samples: Sequence[str]) -> None:
        super().__init__(folder, layers)
        self.rows = {name: i for i, name in enumerate(samples)}
        self._open: dict[str, np.memmap[Any, Any]] = {}

    def _file(self, layer: str) -> Path:
        return self.folder / "layers" / f"{_layer(layer)}.npy"

    def _mark(self, sample: str) -> Path:
        return self.folder / "rows" / str(self.rows[sample])

    def has(self, sample: str) -> bool:
        return sample in self.rows and self._mark(sample).is_file()

    def _array(self, layer: str, value: Tensor) -> "np.memmap[Any, Any]":
        if layer not in self._open:
            file, shape = self._file(layer), (len(self.rows), *value.shape[1:])
            if not file.is_file():
                # Several processes may be here at once: whose link comes first makes the array.
                file.parent.mkdir(parents=True, exist_ok=True)
                unfinished = file.with_name(f".{file.name}.{os.getpid()}")
                array = np.lib.format.open_memmap(
                    unfinished, mode="w+", dtype=value.numpy().dtype, shape=shape
                )
                array.flush()
                del array
                try:
                    os.link(unfinished, file)
                except FileExistsError:
                    pass
                finally:
                    unfinished.unlink()
            self._open[layer] = np.lib.format.open_memmap(file, mode="r+")
        array = self._open[layer]
        if array.shape[1:] != tuple(value.shape[1:]):
            raise InputError(
                f"{layer} is {list(value.shape[1:])} here and {list(array.shape[1:])} in the "
                "array; images of several sizes need another format than memmap, or a size"
            )
        return array

    def write(self, sample: str, features: Features) -> None:
        for name, value in features.items():
            array = self._array(name, value)
            array[self.rows[sample]] = value[0].numpy()
            array.flush()
        mark = self._mark(sample)
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()

    def read(self, sample: str, layers: Sequence[str]) -> Features:
        row = self.rows[sample]
        return Features({n: _load_array(self._file(n))[row : row + 1] for n in layers})


def make_store(
    folder: Path, settings: Mapping[str, Any], samples: Sequence[str], dtype: torch.dtype | None
) -> Store:
    """The store of a folder's settings.

    Raises:
        InputError: If format and layout do not go together, or the format cannot hold the dtype.
    """
    kind, layout = settings.get("format"), settings.get("layout")
    if kind not in ("safetensors", "npy", "memmap") or layout not in ("per-sample", "per-layer"):
        raise InputError(
            f"format={kind!r}, layout={layout!r}; accepted: safetensors, npy, memmap; per-sample, "
            "per-layer"
        )
    if kind != "safetensors" and dtype == torch.bfloat16:
        raise InputError(f"{kind} holds no bfloat16; store as float16 or float32, or safetensors")
    layers = settings["features"]
    if kind == "memmap":
        if layout == "per-sample":
            raise InputError("memmap is one array a layer; accepted: layout='per-layer'")
        return Arrays(folder, layers, samples)
    if layout == "per-layer":
        return LayerFiles(folder, layers, kind)
    return (SampleFiles if kind == "safetensors" else SampleFolders)(folder, layers)

"""Soft tokens on disk: compress a document once, answer from it any number of times."""

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from gmsa.soft_tokens import SoftTokens
from shared_core.device import select_dtype
from shared_core.errors import InputError
from shared_core.run import atomic_path, progress, write_json

if TYPE_CHECKING:
    from gmsa.compressor import GMSACompressor

__all__ = ["SoftTokenStore", "StoreMismatchError"]

INDEX = "index.json"
FORMAT = 1


class StoreMismatchError(InputError):
    """The store holds the soft tokens of another compressor."""


class SoftTokenStore:
    """A folder of soft tokens by document id, memory-mapped and written shard by shard.

    Each `add` writes whole safetensors files first and the index last, both by renaming, so a
    write that is killed leaves the store as it was. Readers may be many; `refresh` shows them what
    a writer added. Two writers at once are refused by a lock file.

    Args:
        path: The folder; made when something is added.
        compressor: What compresses the texts, and what the soft tokens must come from. Without
            one, the store reads only.
        dtype: The dtype of storage: ``bfloat16``, ``float16`` or ``float32``. Of a store that is
            there, its own counts.
        shard_size: Documents a file.

    Raises:
        StoreMismatchError: If the store was written by another compressor.
        InputError: If the index is damaged or the dtype unknown.

    Examples:
        >>> from gmsa.demo import tiny_compressor
        >>> compressor = tiny_compressor()
        >>> store = SoftTokenStore(getfixture("tmp_path") / "store", compressor, dtype="float32")
        >>> store.add(["doc"], ["ba be bi bo bu ba"], rate=2)
        >>> "doc" in store, store.get(["doc"]).lengths
        (True, tensor([3]))
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        compressor: "GMSACompressor | None" = None,
        *,
        dtype: str = "bfloat16",
        shard_size: int = 256,
    ) -> None:
        select_dtype(dtype, torch.device("cpu"))
        if shard_size < 1:
            raise InputError(f"shard_size is {shard_size}; accepted: 1 and above")
        self.path = Path(path)
        self.compressor = compressor
        self.shard_size = shard_size
        self._open: dict[str, Any] = {}
        self._documents: dict[str, dict[str, Any]] = {}
        self.dtype = "float32" if dtype == "auto" else dtype
        self.fingerprint = compressor.fingerprint if compressor is not None else None
        self.refresh()

    def refresh(self) -> None:
        """Read the index again."""
        index = self.path / INDEX
        if not index.is_file():
            if self.compressor is None:
                raise InputError(f"there is no store at {self.path}")
            return
        try:
            found = json.loads(index.read_text(encoding="utf-8"))
            version, stored = found["format"], found["fingerprint"]
            documents, dtype = found["documents"], found["dtype"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{index} is damaged ({error}); restore it, or delete the store and compress again"
            ) from error
        if version != FORMAT:
            raise InputError(f"{index} has the format {version}; this version reads {FORMAT}")
        if self.fingerprint is not None and stored != self.fingerprint:
            raise StoreMismatchError(
                f"{self.path} was written by compressor {stored[:8]}, this one is "
                f"{self.fingerprint[:8]}; open it with the compressor that wrote it, or make "
                "another store"
            )
        self.fingerprint, self.dtype, self._documents = stored, dtype, documents

    def __len__(self) -> int:
        return len(self._documents)

    def __contains__(self, key: object) -> bool:
        return key in self._documents

    def __iter__(self) -> Iterator[str]:
        return iter(self._documents)

    def lengths(self, name: str) -> tuple[int, int]:
        """How many tokens a document had, and how many soft tokens it has.

        Raises:
            InputError: If it is not there.
        """
        entry = self._documents.get(name)
        if entry is None:
            raise InputError(f"{name!r} is not among the {len(self)} documents of {self.path}")
        return entry["n_tokens"], -(-entry["n_tokens"] // entry["rate"])

    def key(self, text: str, rate: int) -> str:
        """The key of a text at a rate with this compressor, for callers without ids.

        Example: ``store.add([store.key(t, 4) for t in texts], texts, rate=4)``.
        """
        return hashlib.sha256(f"{self.fingerprint}/{rate}/{text}".encode()).hexdigest()[:32]

    def add(
        self,
        ids: Sequence[str],
        contexts: Sequence[str] | SoftTokens,
        rate: int = 4,
        *,
        batch_size: int = 8,
        chunk_size: int | None = None,
    ) -> None:
        """Compress texts (or take soft tokens) and store them; ids that are there are replaced.

        Args:
            ids: One a document.
            contexts: The texts, or soft tokens made by this store's compressor.
            rate: Compression rate of the texts.
            batch_size: Texts compressed together.
            chunk_size: See `GMSACompressor.compress`.

        Raises:
            InputError: If ids repeat, numbers differ, the store reads only, or another writer is
                at work.
        """
        if self.compressor is None:
            raise InputError("a store opened without a compressor reads only")
        names = list(ids)
        if len(set(names)) != len(names):
            raise InputError("an id occurs twice among those to add")
        if len(names) != len(contexts):
            raise InputError(f"there are {len(names)} ids for {len(contexts)} contexts")
        self.path.mkdir(parents=True, exist_ok=True)
        with self._lock():
            self.refresh()
            shards = range(0, len(names), self.shard_size)
            for begin in progress(shards, description="storing", unit="shard"):
                part = slice(begin, begin + self.shard_size)
                if isinstance(contexts, SoftTokens):
                    soft = contexts[part]
                else:
                    soft = self.compressor.compress(
                        list(contexts[part]), rate, batch_size=batch_size, chunk_size=chunk_size
                    )
                self._write(names[part], soft.detach().cpu())

    def _write(self, names: list[str], soft: SoftTokens) -> None:
        """One shard, then the index."""
        dtype = select_dtype(self.dtype, torch.device("cpu"))
        lengths = soft.lengths.tolist()
        tensors = {str(i): soft.embeds[i, :n].to(dtype).contiguous() for i, n in enumerate(lengths)}
        shard = f"{uuid.uuid4().hex}.safetensors"
        with atomic_path(self.path / shard) as temporary:
            save_file(tensors, temporary, metadata={"format": "gmsa-store"})
        documents = dict(self._documents)
        rows = zip(names, soft.rates.tolist(), soft.n_tokens.tolist(), strict=True)
        for i, (name, rate, n) in enumerate(rows):
            documents[name] = {"shard": shard, "row": i, "rate": rate, "n_tokens": n}
        write_json(
            self.path / INDEX,
            {
                "format": FORMAT,
                "fingerprint": self.fingerprint,
                "dtype": self.dtype,
                "documents": documents,
            },
        )
        self._documents = documents

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        path = self.path / ".writing"
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            try:
                owner = int(path.read_text() or 0)
            except (OSError, ValueError):
                owner = 0
            if owner and _alive(owner):
                raise InputError(f"{self.path} is being written by process {owner}") from None
            # Its writer was killed; what it left behind is whole.
            path.unlink(missing_ok=True)
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        try:
            os.write(handle, str(os.getpid()).encode())
            os.close(handle)
            yield
        finally:
            path.unlink(missing_ok=True)

    def get(self, ids: Sequence[str]) -> SoftTokens:
        """The soft tokens of documents, as a batch in the order asked for, in the stored dtype.

        Raises:
            InputError: If an id is not there or its shard is missing or damaged.
        """
        names = [ids] if isinstance(ids, str) else list(ids)
        rows = []
        for name in names:
            entry = self._documents.get(name)
            if entry is None:
                raise InputError(f"{name!r} is not among the {len(self)} documents of {self.path}")
            try:
                embeds = self._shard(entry["shard"]).get_tensor(str(entry["row"]))
            except (SafetensorError, OSError) as error:
                raise InputError(
                    f"the shard of {name!r} in {self.path} is missing or damaged ({error}); "
                    "add the document again"
                ) from error
            rows.append(
                SoftTokens(
                    embeds[None],
                    torch.ones(1, len(embeds), dtype=torch.bool),
                    torch.tensor([entry["rate"]]),
                    torch.tensor([entry["n_tokens"]]),
                )
            )
        return SoftTokens.batch(rows)

    def _shard(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(self.path / name, framework="pt")
        return self._open[name]

    def verify(self) -> list[str]:
        """The ids whose tensors are missing, damaged or of the wrong length."""
        broken = []
        for name, entry in self._documents.items():
            expected = -(-entry["n_tokens"] // entry["rate"])
            try:
                if self.get([name]).embeds.shape[1] != expected:
                    broken.append(name)
            except InputError:
                broken.append(name)
        return broken


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True

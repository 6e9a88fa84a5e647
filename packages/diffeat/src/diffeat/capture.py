"""Read named activations out of any forward pass, by plain hooks, and stop when all are there."""

import contextlib
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from diffeat._maps import LIMIT, spied
from diffeat.features import Features
from diffeat.naming import (
    ActivationInfo,
    activations_by_name,
    find_activations,
    list_activations,
    unwrap,
)
from diffeat.selection import ATTENTION, VAE, Layers, Selection
from shared_core.errors import InputError

__all__ = ["Capture", "capture"]


class _Stop(Exception):  # noqa: N818 - a signal
    """All requested activations of `owner` are there."""

    def __init__(self, owner: "Capture") -> None:
        super().__init__()
        self.owner = owner


class Capture:
    """The context manager behind `capture`.

    Attributes:
        features: What the last forward pass gave.
        names: What is captured, in order of execution.
        calls: Forward passes begun so far.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers,
        *,
        stop: bool = True,
        detach: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        heads: str = "mean",
        allow_large: bool = False,
        on_complete: Callable[[dict[str, Tensor]], None] | None = None,
    ) -> None:
        if heads not in ("mean", "keep"):
            raise InputError(f"heads={heads!r}; accepted: mean, keep")
        self.model = unwrap(model)
        if stop and self.model is not model and hasattr(model, "_orig_mod"):
            raise InputError(
                "a compiled model cannot be stopped halfway; pass stop=False, or the model itself "
                "(model._orig_mod)"
            )
        selection = Selection.parse(layers)
        known: dict[str, ActivationInfo] = {}
        if not all(item.startswith("module:") for item in selection.items):
            known = activations_by_name(self.model)
        self.names = tuple(n for n in selection.resolve(self.model, known) if n != VAE)
        if not self.names:
            raise InputError(f"{VAE} is the extractor's own; a model alone cannot give it")
        self.stop, self.detach, self.dtype, self.device = stop, detach, dtype, device
        self.heads, self.limit = heads, None if allow_large else LIMIT
        self.on_complete = on_complete
        infos = find_activations(self.model, [n for n in self.names if n != ATTENTION], known)
        self._attention = attention_sources(self.model) if ATTENTION in self.names else []
        self.sources = list({i.name: i for i in [*infos, *self._attention]}.values())
        self._refuse_fused()
        self.features = Features({})
        self.calls = 0
        self._found: dict[str, Tensor] = {}
        self._grids: dict[str, tuple[int, int]] = {}
        self._text_tokens = 0
        self._stack = contextlib.ExitStack()
        self._thread: int | None = None

    def _refuse_fused(self) -> None:
        for info in self.sources:
            if info.kind.rpartition("-")[2] in ("q", "k", "v"):
                owner = self.model.get_submodule(info.module_path.rpartition(".")[0])
                if getattr(owner, "fused_projections", False):
                    raise InputError(
                        f"{info.name} does not exist while projections are fused; call "
                        "unfuse_qkv_projections() first"
                    )

    def __enter__(self) -> "Capture":
        self._thread = threading.get_ident()
        try:
            self._hook(self.model.register_forward_pre_hook(self._begin, with_kwargs=True))
            for path in {info.grid for info in self.sources} - {""}:
                module = self.model.get_submodule(path)
                self._hook(
                    module.register_forward_pre_hook(self._read_grid(path), with_kwargs=True)
                )
            spied_at: dict[str, list[ActivationInfo]] = {}
            for info in self.sources:
                module = self.model.get_submodule(info.module_path)
                if info.source == "map":
                    spied_at.setdefault(info.module_path, []).append(info)
                elif info.source == "input":
                    self._hook(
                        module.register_forward_pre_hook(self._input(info), with_kwargs=True)
                    )
                else:
                    self._hook(module.register_forward_hook(self._output(info)))
            for path, group in spied_at.items():
                module = self.model.get_submodule(path)
                spy = spied(module, group[0].name, self._maps(group), limit=self.limit)
                self._stack.enter_context(spy)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        self._stack.close()
        stopped = isinstance(error, _Stop) and error.owner is self
        if error is not None and not stopped:
            return False
        missing = [i.name for i in self.sources if i.name not in self._found]
        if self.calls and missing:
            raise RuntimeError(
                f"this forward pass did not compute {', '.join(missing[:5])}; the block that "
                "holds it was skipped"
            )
        return stopped

    def _hook(self, handle: Any) -> None:
        self._stack.callback(handle.remove)

    def _elsewhere(self) -> bool:
        """Whether this call belongs to another thread, which has captures of its own."""
        return threading.get_ident() != self._thread

    def _begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self._elsewhere():
            return
        self.calls += 1
        self._found = {}
        self._grids = {}
        sample = kwargs.get("sample", kwargs.get("hidden_states", args[0] if args else None))
        ids = kwargs.get("img_ids")
        if ids is not None:  # Flux: latents come packed, positions say where each token is
            ids = ids[0] if ids.ndim == 3 else ids
            rows, columns = (ids[:, 1:].amax(0) + 1).long().tolist()
            self._grids[""] = (rows, columns)
        elif isinstance(sample, Tensor) and sample.ndim == 4:
            patch = getattr(getattr(self.model, "config", None), "patch_size", None) or 1
            self._grids[""] = (sample.shape[-2] // patch, sample.shape[-1] // patch)

    def _read_grid(self, path: str) -> Callable[..., None]:
        def read(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            inner = args[0] if args else kwargs["hidden_states"]
            if not self._elsewhere() and inner.ndim == 4:
                self._grids[path] = (inner.shape[-2], inner.shape[-1])

        return read

    def _input(self, info: ActivationInfo) -> Callable[..., None]:
        def read(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if not self._elsewhere():
                given = args[info.index or 0] if args else next(iter(kwargs.values()))
                # The module may work on its input in place.
                self._keep(info, self._spatial(info, given).clone())

        return read

    def _output(self, info: ActivationInfo) -> Callable[..., None]:
        def read(module: nn.Module, args: Any, output: Any) -> None:
            if self._elsewhere():
                return
            if hasattr(output, "sample") and not isinstance(output, Tensor):
                output = output.sample
            if isinstance(output, tuple | list):
                output = output[info.index or 0]
            if not isinstance(output, Tensor):
                raise InputError(
                    f"{info.name} is a {type(output).__name__}; address a tensor in it with #k"
                )
            self._keep(info, self._spatial(info, output))

        return read

    def _spatial(self, info: ActivationInfo, value: Tensor) -> Tensor:
        """Tokens [B, N, C] as a map [B, C, H, W]; text tokens as [B, C, 1, L]."""
        if value.ndim != 3 or info.kind == "module":
            return value
        if info.text_side:
            return value.transpose(1, 2).unsqueeze(2)
        rows, columns = self._grids[info.grid]
        # Where a block joins text and image tokens in one sequence, the image comes last.
        tokens = value[:, -rows * columns :].transpose(1, 2)
        return tokens.reshape(*tokens.shape[:2], rows, columns)

    def _maps(self, group: list[ActivationInfo]) -> Callable[[Tensor], None]:
        def read(maps: Tensor) -> None:
            if self._elsewhere():
                return
            for info in group:
                part = self._map_part(info, maps)
                part = part.mean(1) if self.heads == "mean" else part.transpose(2, 3).flatten(1, 2)
                if self.heads == "mean":
                    part = part.transpose(1, 2)
                self._keep(info, part.reshape(*part.shape[:2], *self._grids[info.grid]))

        return read

    def _map_part(self, info: ActivationInfo, maps: Tensor) -> Tensor:
        """Image queries, and the keys that the name means, of a map over joined tokens."""
        if info.stage != "vit" or "-block" not in info.name or info.module_path[-4:] != "attn":
            return maps
        rows, columns = self._grids[info.grid]
        count = rows * columns
        image_first = type(self.model).__name__.startswith("SD3")
        image = slice(0, count) if image_first else slice(-count, None)
        text = slice(count, None) if image_first else slice(0, maps.shape[-1] - count)
        return maps[:, :, image, image if info.kind == "self-map" else text]

    def _keep(self, info: ActivationInfo, value: Tensor) -> None:
        # A recomputation under activation checkpointing fires the hook again; the first counts.
        if info.name in self._found:
            return
        if self.detach:
            value = value.detach()
        self._found[info.name] = value.to(device=self.device, dtype=self.dtype).contiguous()
        if len(self._found) == len(self.sources):
            self._complete()

    def _complete(self) -> None:
        infos = {info.name: info for info in self.sources}
        found = {n: self._found[n] for n in self.names if n != ATTENTION}
        if self._attention:
            rows, columns = self._grids[""]
            found[ATTENTION] = join_attention(
                [self._found[i.name] for i in self._attention], (rows, columns)
            )
        self.features = Features(found, {n: infos[n] for n in found if n in infos})
        if self.on_complete is not None:
            self.on_complete(dict(found))
        if self.stop:
            raise _Stop(self)


def capture(
    model: nn.Module,
    layers: Layers,
    *,
    stop: bool = True,
    detach: bool = True,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    heads: str = "mean",
    allow_large: bool = False,
) -> Capture:
    """Capture named activations of the calls made inside the block, whatever their arguments.

    With ``stop=True`` the forward pass ends, and the block with it, as soon as the last of them is
    there. Hooks and attention processors are as before afterwards, however the block ends. Calls
    in other threads are not seen; captures may be nested.

    Args:
        model: The backbone.
        layers: See `Selection.parse`.
        stop: End the forward pass early. With LoRA scales passed by ``cross_attention_kwargs``
            use ``stop=False``.
        detach: Cut the features from the graph.
        dtype: Convert the features.
        device: Move the features.
        heads: Of attention maps: ``mean`` gives ``[B, L, H, W]``, ``keep`` ``[B, heads L, H, W]``.
        allow_large: Let maps of more than 2 GiB through.

    Raises:
        ActivationNotFound: Before any computation, if a name is unknown.
        InputError: If the selection is empty, the model compiled or projections fused.
        MapTooLarge: See `allow_large`.
        NotImplementedError: If an attention processor cannot be read.
        RuntimeError: If the forward pass skipped an activation.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> with capture(model, ["module:1"]) as cap:
        ...     _ = model(torch.ones(4, 2))
        >>> cap.features["module:1"].shape
        torch.Size([4, 3])
    """
    return Capture(
        model,
        layers,
        stop=stop,
        detach=detach,
        dtype=dtype,
        device=device,
        heads=heads,
        allow_large=allow_large,
    )


def attention_sources(model: nn.Module) -> list[ActivationInfo]:
    """The cross-attention maps that ``attn`` joins: up stage, half and quarter of the latent side.

    Raises:
        InputError: If the model has none.
    """
    found = [
        info
        for info in list_activations(model, maps=True)
        if info.stage == "up" and info.kind == "cross-map" and info.reduction in (2, 4)
    ]
    if not found:
        raise InputError(
            f"{type(model).__name__} has no cross-attention in the up stage for 'attn'"
        )
    return found


def join_attention(maps: list[Tensor], size: tuple[int, int]) -> Tensor:
    """Mean of the maps ``[B, L, h, w]`` of each size, joined: ``[B, sizes L, H, W]``."""
    groups: dict[int, list[Tensor]] = {}
    for one in maps:
        groups.setdefault(one.shape[-1], []).append(one)
    means = [torch.stack(groups[side]).mean(0) for side in sorted(groups)]
    return torch.cat([nn.functional.interpolate(m, size=size, mode="nearest") for m in means], 1)

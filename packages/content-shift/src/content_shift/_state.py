"""What techniques may change in a model, remembered and put back; and which adapters are active."""

import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

_LOCKS: "WeakKeyDictionary[nn.Module, threading.RLock]" = WeakKeyDictionary()
_GUARD = threading.Lock()
TEXT_TOWERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep to themselves what the loaders of other libraries say about their own options."""
    with warnings.catch_warnings():
        for message in (
            "Already found a `peft_config`",
            ".*local_dir_use_symlinks",
            ".*torch_dtype",
        ):
            warnings.filterwarnings("ignore", message)
        yield


def lock_of(model: nn.Module) -> threading.RLock:
    """One lock a model, because its adapters are global to it."""
    with _GUARD:
        return _LOCKS.setdefault(model, threading.RLock())


def models_of(fx: Any) -> list[nn.Module]:
    """The backbone, and the text towers that adapters may also reach."""
    towers = [getattr(fx.pipeline, name, None) for name in TEXT_TOWERS]
    return [fx.backbone, *(t for t in towers if isinstance(t, nn.Module))]


def adapted_layers(fx: Any) -> Iterator[Any]:
    """Layers that hold LoRA weights."""
    for model in models_of(fx):
        if getattr(model, "peft_config", None):
            for module in model.modules():
                if hasattr(module, "set_scale") and hasattr(module, "lora_A"):
                    yield module


class Snapshot:
    """Module tree, processors, adapters and flags of a model, to be put back exactly."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        # Of every module its own dict of children: wrapping a layer changes the parent's.
        self._children = [(m, dict(m._modules)) for m in model.modules()]
        self._flags = [(p, p.requires_grad) for p in model.parameters()]
        self._training = [(m, m.training) for m in model.modules()]
        modules: list[Any] = list(model.modules())
        self._processors = [(m, m.processor) for m in modules if hasattr(m, "set_processor")]
        self._projection = getattr(model, "encoder_hid_proj", model)
        self._hidden = getattr(getattr(model, "config", None), "encoder_hid_dim_type", None)
        self.peft = dict(getattr(model, "peft_config", None) or {})
        self._loaded = getattr(model, "_hf_peft_config_loaded", None)
        self.active = {
            id(m): (list(m.active_adapters), dict(m.scaling), m._disable_adapters)
            for m in modules
            if hasattr(m, "set_scale") and hasattr(m, "lora_A")
        }

    def restore(self) -> None:
        """Put everything back."""
        extra = set(getattr(self.model, "peft_config", None) or {}) - set(self.peft)
        modules: list[Any] = list(self.model.modules())
        for name in extra:
            for module in modules:
                if hasattr(module, "lora_A") and name in module.scaling:
                    module.delete_adapter(name)
            self.model.peft_config.pop(name)  # type: ignore[operator, union-attr]
        for module, processor in self._processors:
            if module.processor is not processor:
                module.set_processor(processor)
        for module, children in self._children:
            if dict(module._modules) != children:
                module._modules.clear()
                module._modules.update(children)
        if self._projection is None and not hasattr(self.model, "encoder_hid_proj"):
            # It was a plain None, which the adapter's module had taken the place of.
            self.model.encoder_hid_proj = None  # type: ignore[assignment]
        config = getattr(self.model, "config", None)
        if config is not None and getattr(config, "encoder_hid_dim_type", None) != self._hidden:
            config.encoder_hid_dim_type = self._hidden
        if not self.peft and hasattr(self.model, "peft_config"):
            delattr(self.model, "peft_config")
        if getattr(self.model, "_hf_peft_config_loaded", None) != self._loaded:
            self.model._hf_peft_config_loaded = self._loaded  # type: ignore[assignment]
        for module in self.model.modules():
            if id(module) in self.active:
                names, scaling, disabled = self.active[id(module)]
                layer: Any = module
                layer.set_adapter(names)
                layer.scaling.clear()
                layer.scaling.update(scaling)
                layer._disable_adapters = disabled
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        for module, mode in self._training:
            module.training = mode


class Session:
    """Techniques set up on an extractor: what was there before, and what is active now."""

    def __init__(self, fx: Any, outer: "Session | None" = None) -> None:
        self.fx = fx
        self._before = [Snapshot(model) for model in models_of(fx)]
        self._own: dict[int, Any] = {k: v for s in self._before for k, v in s.active.items()}
        self.there: set[str] = {name for s in self._before for name in s.peft}
        self.sources: dict[str, Any] = {}
        self._adapted: tuple[Any, list[Any]] = (None, [])
        if outer is not None:
            self._own, self.there, self.sources = outer._own, outer.there, dict(outer.sources)

    def activate(self, adapters: Mapping[str, float]) -> None:
        """Make exactly these adapters act, beside those the user had active before."""
        there = [tuple(getattr(m, "peft_config", None) or ()) for m in models_of(self.fx)]
        if self._adapted[0] != there:
            self._adapted = (there, list(adapted_layers(self.fx)))
        for layer in self._adapted[1]:
            own = self._own.get(id(layer), ([], {}, False))[0]
            mine = [name for name in adapters if name in layer.scaling]
            if list(layer.active_adapters) != [*own, *mine]:
                layer.set_adapter([*own, *mine])
                layer.requires_grad_(False)
            for name in mine:
                layer.set_scale(name, adapters[name])

    def close(self) -> None:
        """Put the models back."""
        for snapshot in self._before:
            snapshot.restore()


_OPEN: "WeakKeyDictionary[nn.Module, Session]" = WeakKeyDictionary()


@contextmanager
def session(fx: Any, techniques: Sequence[Any]) -> Iterator[Session]:
    """Set techniques up on an extractor, and take them off on every way out.

    Sessions nest: an inner one adds to what the outer one set up and takes off only its own.
    """
    with lock_of(fx.backbone):
        outer = _OPEN.get(fx.backbone)
        if outer is not None and not any(t.exclusive for t in techniques):
            for technique in techniques:
                technique.setup(fx, outer)
            yield outer
            return
        opened = Session(fx, outer)
        _OPEN[fx.backbone] = opened
        done: list[Any] = []
        try:
            for technique in techniques:
                done.append(technique)
                technique.setup(fx, opened)
            yield opened
        finally:
            for technique in reversed(done):
                technique.teardown(fx)
            opened.close()
            if outer is None:
                del _OPEN[fx.backbone]
            else:
                _OPEN[fx.backbone] = outer

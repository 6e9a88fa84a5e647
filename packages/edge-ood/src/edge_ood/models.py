"""Multi-label classifiers: a backbone that gives features, and a head that gives logits."""

import os
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from shared_core.errors import InputError, MissingExtraError

__all__ = ["MultiLabelHead", "MultiLabelModel", "SmallConvNet", "create_model", "paired_forward"]


class SmallConvNet(nn.Module):
    """Four convolutions with BatchNorm for 32-pixel images; 128 features, mean and largest value.

    Examples:
        >>> SmallConvNet()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 128])
    """

    out_features = 128

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for index, (channels, stride) in enumerate(((16, 2), (32, 1), (64, 1), (64, 1))):
            layers += [
                nn.Conv2d(width, channels, 3, stride, 1, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(inplace=True),
            ]
            if index in (1, 2):
                layers.append(nn.MaxPool2d(2))
            width = channels
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 128"]:
        """Features."""
        maps = self.layers(x)
        return torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], dim=1)


class MultiLabelHead(nn.Sequential):
    """Features to logits: one linear layer, or the head of the JointEnergy and EDGE code.

    Args:
        features: F.
        classes: C.
        hidden: ``None`` for a linear layer; a width H for Linear, BatchNorm, ReLU, Linear, with
            1000 in the authors' code.

    Examples:
        >>> len(MultiLabelHead(8, 3, hidden=16)), len(MultiLabelHead(8, 3))
        (4, 1)
    """

    def __init__(self, features: int, classes: int, hidden: int | None = None) -> None:
        if classes < 1:
            raise InputError(f"classes is {classes}; it must be at least 1")
        layers: list[nn.Module] = []
        if hidden is not None:
            layers = [nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.ReLU()]
            features = hidden
        super().__init__(*layers, nn.Linear(features, classes))

    @property
    def last(self) -> nn.Linear:
        """The last linear layer."""
        layer = self[-1]
        assert isinstance(layer, nn.Linear)
        return layer


class MultiLabelModel(nn.Module):
    """A backbone and a head; ``model(x)`` gives logits, ``model.features(x)`` what the head reads.

    Args:
        backbone: Gives features ``[B, F]`` or ``[B, F, 1, 1]``.
        head: Gives logits ``[B, C]``.
        spec: What `create_model` needs to make the model again, for saving; ``None`` if it is not
            one of its models.

    Examples:
        >>> model = MultiLabelModel(SmallConvNet(), MultiLabelHead(128, 4))
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: MultiLabelHead,
        spec: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head
        self.spec = None if spec is None else dict(spec)

    def features(self, x: Tensor) -> Float[Tensor, "B F"]:
        """Features, flattened."""
        features: Tensor = self.backbone(x).flatten(1)
        return features

    def forward(self, x: Tensor) -> Float[Tensor, "B C"]:
        """Logits."""
        logits: Tensor = self.head(self.features(x))
        return logits


class _Transformer(nn.Module):
    """The pooled output of a model of transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        config: Any = model.config
        sizes = getattr(config, "hidden_sizes", None)
        self.out_features = int(sizes[-1] if sizes else config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Features."""
        output = self.model(x)
        pooled: Tensor | None = getattr(output, "pooler_output", None)
        if pooled is None:
            pooled = output.last_hidden_state.mean(1)
        features: Tensor = pooled.flatten(1)
        return features


def create_model(
    name: str,
    classes: int,
    *,
    hidden: int | None = None,
    pretrained: bool = False,
    config: Mapping[str, Any] | None = None,
) -> MultiLabelModel:
    """Make a classifier by name.

    Args:
        name: ``small_cnn``; ``timm:NAME``, any model of timm; ``torchvision:NAME``, a
            classification model of torchvision; ``hf:ID``, an image model of transformers by hub id
            or folder.
        classes: Number of labels C.
        hidden: See `MultiLabelHead`.
        pretrained: Whether to load the library's weights (a download, unless they are cached or
            in the folder).
        config: The configuration of an ``hf:`` model, in place of the one at ID.

    Raises:
        InputError: If there is no such model, or its weights cannot be loaded.
        MissingExtraError: If its library is not installed.

    Examples:
        >>> create_model("small_cnn", 20).head.last.out_features
        20
    """
    kind, _, rest = name.partition(":")
    makers: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
        "timm": lambda: _timm(rest, pretrained),
        "torchvision": lambda: _torchvision(rest, pretrained),
        "hf": lambda: _transformers(rest, pretrained, config),
    }
    if name == "small_cnn":
        if pretrained:
            raise InputError("small_cnn has no pretrained weights; leave pretrained out")
        backbone: nn.Module = SmallConvNet()
        saved = None
    elif kind in makers and rest:
        backbone, saved = makers[kind]()
    else:
        raise InputError(
            f"no model is called {name!r}; accepted: small_cnn, timm:NAME, torchvision:NAME, hf:ID"
        )
    head = MultiLabelHead(int(backbone.out_features), classes, hidden)  # type: ignore[arg-type]
    spec = {"name": name, "classes": classes, "hidden": hidden, "config": saved}
    return MultiLabelModel(backbone, head, spec)


def _timm(name: str, pretrained: bool) -> tuple[nn.Module, None]:
    try:
        import timm
    except ImportError as error:
        raise MissingExtraError("edge-ood", "timm", "timm") from error
    try:
        model = timm.create_model(name, pretrained=pretrained, num_classes=0)
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(f"timm cannot make {name!r}: {_first_line(error)}") from error
    model.out_features = model.num_features
    return model, None


def _torchvision(name: str, pretrained: bool) -> tuple[nn.Module, None]:
    try:
        import torchvision
    except ImportError as error:
        raise MissingExtraError("edge-ood", "vision", "torchvision") from error
    try:
        model = torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None)
    except (ValueError, OSError) as error:
        raise InputError(f"torchvision cannot make {name!r}: {_first_line(error)}") from error
    for attribute in ("fc", "classifier", "head", "heads"):
        layer: Any = getattr(model, attribute, None)
        linears = [m for m in layer.modules() if isinstance(m, nn.Linear)] if layer else []
        if linears:
            model.out_features = linears[-1].in_features
            setattr(model, attribute, _without_last(layer))
            return model, None
    raise InputError(f"torchvision's {name!r} has no classifier that could be replaced")


def _without_last(layer: nn.Module) -> nn.Module:
    if isinstance(layer, nn.Linear):
        return nn.Identity()
    names = [n for n, m in layer.named_children() if isinstance(m, nn.Linear)]
    setattr(layer, names[-1], nn.Identity())
    return layer


def _transformers(
    name: str, pretrained: bool, config: Mapping[str, Any] | None
) -> tuple[nn.Module, dict[str, Any]]:
    try:
        from transformers import AutoConfig, AutoModel
    except ImportError as error:
        raise MissingExtraError("edge-ood", "hf", "transformers") from error
    try:
        if pretrained:
            model = AutoModel.from_pretrained(name)
        elif config is not None:
            settings = {k: v for k, v in config.items() if k != "model_type"}
            model = AutoModel.from_config(AutoConfig.for_model(config["model_type"], **settings))
        else:
            model = AutoModel.from_config(AutoConfig.from_pretrained(name))
    except (OSError, ValueError) as error:
        raise InputError(f"transformers cannot load {name!r}: {_first_line(error)}") from error
    saved = model.config.to_dict()
    return _Transformer(model), {k: v for k, v in saved.items() if _is_plain(v)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    return value is None or isinstance(value, bool | int | float | str)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def paired_forward(
    model: Callable[[Tensor], Tensor],
    x_id: Tensor,
    x_oe: Tensor | None,
    mode: Literal["joint", "separate"] = "joint",
) -> tuple[Tensor, Tensor | None]:
    """Logits of an ID and an OE batch.

    Args:
        model: Maps inputs to logits.
        x_id: ID inputs.
        x_oe: OE inputs of the same shape but the first dimension, or ``None``.
        mode: ``joint`` makes one forward pass of both, as in the paper's algorithm, so that
            BatchNorm sees the mixture once; ``separate`` makes two.

    Raises:
        InputError: If the mode is unknown or the inputs do not fit together.

    Examples:
        >>> ours, theirs = paired_forward(nn.Linear(3, 2), torch.zeros(4, 3), torch.zeros(5, 3))
        >>> ours.shape, theirs.shape
        (torch.Size([4, 2]), torch.Size([5, 2]))
    """
    if mode not in ("joint", "separate"):
        raise InputError(f"forward mode is {mode!r}; accepted: 'joint', 'separate'")
    if x_oe is None or len(x_oe) == 0:
        return model(x_id), None
    if mode == "separate":
        return model(x_id), model(x_oe)
    if x_id.shape[1:] != x_oe.shape[1:]:
        raise InputError(
            f"ID inputs are {list(x_id.shape[1:])}, OE inputs {list(x_oe.shape[1:])}; "
            "put both through one transform, or take forward_mode='separate'"
        )
    both = model(torch.cat([x_id, x_oe]))
    return both[: len(x_id)], both[len(x_id) :]


def model_from_spec(spec: Mapping[str, Any]) -> MultiLabelModel:
    """Make a model again from its spec, without weights.

    Examples:
        >>> model_from_spec(create_model("small_cnn", 3).spec).head.last.out_features
        3
    """
    return create_model(
        os.fspath(spec["name"]), spec["classes"], hidden=spec["hidden"], config=spec["config"]
    )

import math
import sys

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from focal_sam.losses import LDAMLoss
from focal_sam.models import NormedLinear, create_model, mlp, resnet32_cifar, small_cnn
from shared_core.errors import InputError, MissingExtraError
from shared_core.testing import examples


@pytest.fixture
def without_type_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let wrong arguments reach our own checks, as they do outside the tests."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def cosines(features: Tensor, weight: Tensor) -> Tensor:
    """Cosines in float64, one pair at a time."""
    x, w = features.double(), weight.detach().double()
    rows = [[float(a @ b / (a @ a).sqrt() / (b @ b).sqrt()) for b in w] for a in x]
    return torch.tensor(rows, dtype=torch.float64)


# ResNet-32


@pytest.mark.smoke
def test_resnet32_size_and_shape() -> None:
    model = resnet32_cifar(10)
    # 3x3 convolutions without bias, two numbers per channel of batch norm, and the linear layer
    convolutions = 3 * 16 + 10 * 16**2 + 16 * 32 + 9 * 32**2 + 32 * 64 + 9 * 64**2
    channels = 11 * 16 + 10 * 32 + 10 * 64
    assert parameters(model) == 9 * convolutions + 2 * channels + 64 * 10 + 10 == 464_154
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    weighted = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(weighted) == 32
    assert parameters(resnet32_cifar(100)) == 464_154 + 65 * 90


def test_shortcut_subsamples_and_pads_with_zeros() -> None:
    block = resnet32_cifar(10).stages[1][0]
    x = torch.randn(2, 16, 7, 6)
    expected = torch.zeros(2, 32, 4, 3)
    for channel in range(16):
        for row in range(4):
            for column in range(3):
                expected[:, 8 + channel, row, column] = x[:, channel, 2 * row, 2 * column]
    assert torch.equal(block.shortcut(x), expected)
    same = resnet32_cifar(10).stages[0][0]
    assert torch.equal(same.shortcut(x), x)


def test_resnet32_forward_rederived() -> None:
    torch.manual_seed(0)
    model = resnet32_cifar(5).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for statistic in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(statistic)
            nn.init.uniform_(module.running_var, 0.5, 2)
    model.eval()
    state = model.state_dict()

    def normalised(x: Tensor, name: str) -> Tensor:
        gain, shift, mean, var = (
            state[f"{name}.{k}"][:, None, None]
            for k in ("weight", "bias", "running_mean", "running_var")
        )
        return gain * (x - mean) / (var + 1e-5).sqrt() + shift

    def convolved(x: Tensor, name: str, stride: int = 1) -> Tensor:
        return F.conv2d(x, state[f"{name}.weight"], stride=stride, padding=1)

    x = images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    x = normalised(convolved(x, "conv"), "norm").relu()
    for stage in range(3):
        for index in range(5):
            name = f"stages.{stage}.{index}"
            stride = 2 if stage and not index else 1
            y = normalised(convolved(x, f"{name}.conv1", stride), f"{name}.norm1").relu()
            y = normalised(convolved(y, f"{name}.conv2"), f"{name}.norm2")
            if stride == 2:
                zeros = torch.zeros_like(x)[:, ::2, ::2, ::2]
                x = torch.cat([zeros, x[:, :, ::2, ::2], zeros], dim=1)
            x = (x + y).relu()
    pooled = x.flatten(2).sum(2) / 16
    expected = pooled @ state["classifier.weight"].T + state["classifier.bias"]
    torch.testing.assert_close(model(images), expected, rtol=1e-10, atol=1e-10)


def test_resnet32_starts_from_he_initialisation() -> None:
    torch.manual_seed(0)
    model = resnet32_cifar(10)
    model.requires_grad_(False)
    assert not model.classifier.bias.any()
    for stage, width in enumerate((16, 32, 64)):
        weights = torch.cat([block.conv2.weight.flatten() for block in model.stages[stage]])
        assert float(weights.std()) == pytest.approx(math.sqrt(2 / (9 * width)), rel=0.03)
        assert float(weights.abs().max()) > 3 * float(weights.std())  # normal, not uniform


def test_normed_resnet32_gives_cosines_for_ldam() -> None:
    torch.manual_seed(0)
    model = resnet32_cifar(10, normed=True)
    assert isinstance(model.classifier, NormedLinear)
    assert parameters(model) == 464_154 - 10
    logits = model(torch.randn(4, 3, 32, 32))
    assert float(logits.detach().abs().max()) <= 1 + 1e-6
    loss = LDAMLoss([500, 400, 300, 200, 100, 50, 40, 30, 20, 10])(logits, torch.arange(4))
    loss.mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# NormedLinear


@pytest.mark.smoke
def test_normed_linear_against_float64() -> None:
    torch.manual_seed(0)
    head = NormedLinear(7, 4, scale=30.0)
    features = torch.randn(5, 7) * torch.tensor([1e-6, 0.1, 1.0, 30.0, 1e4])[:, None]
    expected = 30 * cosines(features, head.weight)
    torch.testing.assert_close(head(features).double(), expected, rtol=1e-5, atol=1e-5)
    nested = head(features.reshape(5, 1, 7))
    torch.testing.assert_close(nested, head(features)[:, None])


def test_normed_linear_starts_from_unit_directions() -> None:
    torch.manual_seed(0)
    weight = NormedLinear(50, 2000).weight.detach()
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(2000))
    assert float(weight.mean(0).norm()) < 0.1  # no direction is preferred
    assert NormedLinear(50, 2).scale == 1.0


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_normed_linear_in_half_precision(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    head = NormedLinear(64, 4).to(dtype)
    # Lengths that float16 overflows and underflows at when it squares them.
    features = torch.randn(3, 64).to(dtype) * torch.tensor([1e-3, 1.0, 1e3], dtype=dtype)[:, None]
    logits = head(features)
    assert logits.dtype == dtype
    expected = cosines(features, head.weight)
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=tolerance)
    assert not head(torch.zeros(2, 64, dtype=dtype)).any()


def test_normed_linear_with_half_features_and_float_weights() -> None:
    head = NormedLinear(64, 4)
    features = torch.randn(3, 64).half()
    assert head(features).dtype == torch.float32
    torch.testing.assert_close(
        head(features).double(), cosines(features, head.weight), rtol=0, atol=1e-6
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(features.float())
    torch.testing.assert_close(logits.double(), cosines(features, head.weight), rtol=0, atol=2e-2)


def test_normed_linear_of_zero_features() -> None:
    head = NormedLinear(3, 2, scale=25.0)
    features = torch.zeros(4, 3, requires_grad=True)
    logits = head(features)
    assert not logits.any()
    logits.sum().backward()
    # of the order of the scale, not of the inverse of a small constant
    assert float(features.grad.abs().max()) <= 2 * 25
    assert not head.weight.grad.any()


def test_normed_linear_gradients() -> None:
    torch.manual_seed(0)
    head = NormedLinear(4, 3, scale=2.0).double()
    features = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def logits(x: Tensor, w: Tensor) -> Tensor:
        return torch.func.functional_call(head, {"weight": w}, (x,))

    assert torch.autograd.gradcheck(logits, (features, head.weight))


@examples(20)
@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.integers(0, 100))
def test_normed_linear_ignores_lengths(longer: float, heavier: float, seed: int) -> None:
    torch.manual_seed(seed)
    head = NormedLinear(5, 3).double()
    features = torch.randn(2, 5, dtype=torch.float64)
    before = head(features)
    with torch.no_grad():
        head.weight.mul_(heavier)
    torch.testing.assert_close(head(longer * features), before)


# Small networks


def test_small_cnn() -> None:
    model = small_cnn(7, in_channels=1, width=4)
    convolutions = 9 * (1 * 4 + 4 * 8 + 8 * 16)
    assert parameters(model) == convolutions + 2 * (4 + 8 + 16) + 16 * 7 + 7
    for size in (4, 8, 33):
        assert model(torch.randn(2, 1, size, size)).shape == (2, 7)
    assert small_cnn(3)(torch.randn(2, 3, 8, 8)).shape == (2, 3)


@pytest.mark.smoke
def test_mlp_forward_rederived() -> None:
    model = mlp(6, [5, 4], 3)
    linears = [m for m in model if isinstance(m, nn.Linear)]
    assert [tuple(m.weight.shape) for m in linears] == [(5, 6), (4, 5), (3, 4)]
    assert not any(m.bias.any() for m in linears)
    for m in linears:
        nn.init.normal_(m.bias)
    x = torch.randn(2, 2, 3)
    hidden = x.reshape(2, 6).double()
    for i, m in enumerate(linears):
        hidden = hidden @ m.weight.double().T + m.bias.double()
        hidden = hidden.clamp_min(0) if i < 2 else hidden
    torch.testing.assert_close(model(x).double(), hidden, rtol=1e-5, atol=1e-6)


def test_mlp_starts_from_he_initialisation() -> None:
    torch.manual_seed(0)
    model = mlp(400, [300], 200).requires_grad_(False)
    for linear, fan_in in ((model[1], 400), (model[3], 300)):
        assert float(linear.weight.std()) == pytest.approx(math.sqrt(2 / fan_in), rel=0.02)
        assert float(linear.weight.abs().max()) > 3 * math.sqrt(2 / fan_in)


def test_mlp_without_hidden_layers_is_linear() -> None:
    model = mlp(4, [], 3)
    assert [type(m) for m in model] == [nn.Flatten, nn.Linear]


# By name


def test_create_model_by_name() -> None:
    assert parameters(create_model("resnet32", 10)) == 464_154
    assert isinstance(create_model("resnet32", 10, normed=True).classifier, NormedLinear)
    assert create_model("small_cnn", 4, in_channels=1)(torch.zeros(2, 1, 8, 8)).shape == (2, 4)
    assert parameters(create_model("mlp", 10, in_features=64, hidden=[64, 64])) == 8970


def test_create_resnet50_untrained() -> None:
    with torch.device("meta"):
        assert parameters(create_model("resnet50", 1000)) == 25_557_032
        assert create_model("resnet50", 8142).fc.out_features == 8142


def test_create_clip_passes_the_class_names_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import focal_sam.adaptformer

    made = nn.Identity()
    calls = []

    def fake(*args: object, **options: object) -> nn.Module:
        calls.append((args, options))
        return made

    monkeypatch.setattr(focal_sam.adaptformer, "clip_adaptformer", fake)
    model = create_model("clip-vit-b16", 2, class_names=["eel", "newt"], bottleneck=3)
    assert model is made
    assert calls == [(("openai/clip-vit-base-patch16", ["eel", "newt"]), {"bottleneck": 3})]


# Errors


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(InputError, match=r"'resnet18'.*resnet32, resnet50, clip-vit-b16"):
        create_model("resnet18", 10)


@pytest.mark.parametrize(("names", "given"), [(None, "none"), (["eel"], "1")])
def test_clip_needs_one_name_per_class(names: list[str] | None, given: str) -> None:
    with pytest.raises(InputError, match=f"2 classes, and got {given}"):
        create_model("clip-vit-b16", 2, class_names=names)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: resnet32_cifar(0), "num_classes is 0"),
        (lambda: small_cnn(10, in_channels=0), "in_channels is 0"),
        (lambda: small_cnn(10, width=-1), "width is -1"),
        (lambda: mlp(0, [], 10), "in_features is 0"),
        (lambda: mlp(4, [3, 0], 10), r"hidden\[1\] is 0"),
        (lambda: NormedLinear(0, 2), "in_features is 0"),
        (lambda: NormedLinear(2, 0), "out_features is 0"),
        (lambda: create_model("resnet50", 0), "num_classes is 0"),
    ],
)
def test_sizes_below_one(make: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_torchvision_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(MissingExtraError, match=r"focal-sam\[vision\]"):
        create_model("resnet50", 10)

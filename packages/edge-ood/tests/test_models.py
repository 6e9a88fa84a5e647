"""Models of every library, without weights; one forward pass for both batches."""

import pytest
import torch
from torch import nn

from edge_ood.models import (
    MultiLabelHead,
    MultiLabelModel,
    create_model,
    model_from_spec,
    paired_forward,
)
from shared_core.errors import InputError


@pytest.mark.smoke
def test_small_cnn_and_heads():
    model = create_model("small_cnn", 7, hidden=9)
    x = torch.randn(4, 3, 32, 32)
    assert model(x).shape == (4, 7)
    model.eval()
    assert torch.equal(model(x), model.head(model.features(x)))
    again = model_from_spec(model.spec)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(x), model(x))
    kinds = [type(layer).__name__ for layer in MultiLabelHead(8, 3, 16)]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear"]


def test_timm():
    pytest.importorskip("timm")
    model = create_model("timm:resnet18", 5).eval()
    assert model.features(torch.randn(2, 3, 32, 32)).shape == (2, 512)
    with pytest.raises(InputError, match="timm cannot make"):
        create_model("timm:resnet18000", 5)


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "mobilenet_v3_small"])
def test_torchvision(name):
    pytest.importorskip("torchvision")
    if name == "squeezenet1_1":
        with pytest.raises(InputError, match="no classifier that could be replaced"):
            create_model(f"torchvision:{name}", 5)
        return
    model = create_model(f"torchvision:{name}", 5).eval()
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    with pytest.raises(InputError, match="torchvision cannot make"):
        create_model("torchvision:none", 5)


def test_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1])
    transformers.ResNetModel(config).save_pretrained(tmp_path)
    model = create_model(f"hf:{tmp_path}", 5, pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    assert model.features(x).shape == (2, 12)
    again = model_from_spec({**model.spec, "name": "hf:moved/away"}).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))
    with pytest.raises(InputError, match="transformers cannot load"):
        create_model(f"hf:{tmp_path / 'nothing'}", 5)


def test_one_pass_of_both_updates_batch_norm_once():
    x, outliers = torch.randn(6, 4), torch.randn(5, 4) + 3
    for mode, updates in (("joint", 1), ("separate", 2)):
        model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
        ours, theirs = paired_forward(model, x, outliers, mode)
        assert (len(ours), len(theirs)) == (6, 5)
        assert model[0].num_batches_tracked == updates
        if mode == "joint":
            expected = 0.1 * torch.cat([x, outliers]).mean(0)
            torch.testing.assert_close(model[0].running_mean, expected)
    assert paired_forward(model, x, None)[1] is None
    assert paired_forward(model, x, outliers[:0])[1] is None


@pytest.mark.usefixtures("without_type_checks")
def test_errors():
    for call, message in (
        (lambda: create_model("vgg", 5), "accepted: small_cnn, timm:NAME"),
        (lambda: create_model("timm:", 5), "accepted: small_cnn"),
        (lambda: create_model("small_cnn", 5, pretrained=True), "no pretrained weights"),
        (lambda: create_model("small_cnn", 0), "classes is 0"),
        (
            lambda: paired_forward(nn.Identity(), torch.ones(1, 2), torch.ones(1, 3)),
            "one transform",
        ),
        (lambda: paired_forward(nn.Identity(), torch.ones(1), None, "twice"), "'twice'"),
    ):
        with pytest.raises(InputError, match=message):
            call()
    assert isinstance(create_model("small_cnn", 2), MultiLabelModel)

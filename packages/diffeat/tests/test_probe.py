"""Probes, measures, rankings and the cache against derivations of their own."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from diffeat import list_activations, rank
from diffeat.aggregate import HyperAggregation, MultiModel, WeightedSum
from diffeat.demo import build_extractor, load_backbone, save_backbone, shapes_data
from diffeat.measure import hf_ratio, locality, noise_ratio, pca_image
from diffeat.probe import (
    ConvCorrespondence,
    LinearProbe,
    PixelMLPEnsemble,
    iou_of,
    mean_iou,
    nn_correspondence,
    pck,
)
from shared_core.errors import InputError


@pytest.mark.smoke
def test_ridge_is_the_normal_equations() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 5, 4, 4, generator=generator, dtype=torch.float64) * 3 + 1
    y = torch.randint(0, 3, (6, 8, 8), generator=generator)
    y[0, 0] = 255
    probe = LinearProbe(3, penalty=0.1)
    for rows in (slice(0, 2), slice(2, 6)):
        probe.update(x[rows].float().double(), y[rows])
    big = F.interpolate(x, scale_factor=2, mode="nearest").permute(0, 2, 3, 1).reshape(-1, 5)
    flat = y.flatten()
    a = big[flat != 255].numpy()
    b = np.eye(3)[flat[flat != 255].numpy()]
    mean, std = a.mean(0), a.std(0)
    z = (a - mean) / std
    w = np.linalg.solve(z.T @ z / len(z) + 0.1 * np.eye(5), z.T @ (b - b.mean(0)) / len(z))
    weights, intercept = probe.solve()
    np.testing.assert_allclose(weights.numpy(), w / std[:, None], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(
        intercept.numpy(), b.mean(0) - (mean / std) @ w, rtol=1e-5, atol=1e-7
    )
    predicted = F.interpolate(probe.predict(x)[:, None].double(), scale_factor=2)[:, 0].long()
    direct = mean_iou(predicted.reshape(-1)[flat != 255], flat[flat != 255], 3)
    assert float(iou_of(probe.confusion(x, y).sum(0))) == pytest.approx(float(direct), abs=1e-6)
    full = LinearProbe(3, penalty=0.1, components=5)
    full.update(x, y)
    torch.testing.assert_close(full.solve()[0], weights)
    halves = [LinearProbe(3, penalty=0.1) for _ in range(2)]
    for half, rows in zip(halves, (slice(0, 2), slice(2, 6)), strict=True):
        half.update(x[rows], y[rows])
    halves[0].merge(halves[1])
    torch.testing.assert_close(halves[0].solve()[0], weights)


@pytest.mark.usefixtures("without_type_checks")
def test_ridge_refuses() -> None:
    probe = LinearProbe(2)
    with pytest.raises(InputError, match="no labelled"):
        probe.solve()
    with pytest.raises(InputError, match="label 7"):
        probe.update(torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1), 7))
    with pytest.raises(InputError, match="NaN"):
        probe.update(torch.full((1, 1, 1, 1), torch.inf), torch.zeros(1, 1, 1).long())
    with pytest.raises(InputError, match="penalty"):
        LinearProbe(2, penalty=0)


def test_mlp_ensemble_learns_and_votes() -> None:
    torch.manual_seed(0)
    x = torch.randn(600, 4)
    y = (x[:, 0] * x[:, 1] > 0).long()
    probe = PixelMLPEnsemble(4, 2, n=3).fit(x[:400], y[:400], epochs=12)
    votes, doubt = probe(x[400:])
    assert (votes == y[400:]).float().mean() > 0.8
    assert (doubt >= -1e-6).all()
    members = torch.stack([m(x[400:]).argmax(1) for m in probe.members])
    assert torch.equal(votes, members.mode(0).values)
    assert PixelMLPEnsemble(4, 30, n=1).members[0][0].out_features == 256


def test_correspondence() -> None:
    torch.manual_seed(0)
    a = torch.randn(1, 24, 16, 16)
    shifted = a.roll((2, 3), (2, 3))
    points = torch.tensor([[4.0, 5.0], [9.0, 1.0]])
    found = nn_correspondence(a, shifted, points, size=16)
    assert torch.equal(found, points + torch.tensor([3.0, 2.0]))
    right = [pck(found + 1.5, points + torch.tensor([3.0, 2.0]), 16.0, a).sum() for a in (0.1, 0.2)]
    assert right[0] <= right[1] == 2
    with pytest.raises(InputError, match="outside"):
        nn_correspondence(a, a, torch.tensor([[20.0, 0.0]]), size=16)
    head = ConvCorrespondence(24)
    where = torch.tensor([[4, 5], [9, 1]])
    loss = head.loss(a, shifted, where, where + torch.tensor([3, 2]))
    s = F.normalize(head(a)[0].flatten(1), dim=0)
    t = F.normalize(head(shifted)[0].flatten(1), dim=0)
    i, j = where[:, 1] * 16 + where[:, 0], (where[:, 1] + 2) * 16 + where[:, 0] + 3
    forth = -torch.log_softmax(s[:, i].T @ t / 0.07, 1)[range(2), j].mean()
    back = -torch.log_softmax(t[:, j].T @ s / 0.07, 1)[range(2), i].mean()
    torch.testing.assert_close(loss, (forth + back) / 2)


def test_measures() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, 16, 16, generator=generator)
    draws = [x + 0.5 * torch.randn(x.shape, generator=generator) for _ in range(2)]
    assert noise_ratio(*draws) == pytest.approx(0.25 / 1.25, abs=0.01)
    assert noise_ratio(draws[0] * 7, draws[1] * 7) == pytest.approx(noise_ratio(*draws))
    ramp = torch.arange(16.0)[:, None].expand(16, 16)[None, None]
    wave = torch.sin(ramp * torch.pi / 8)
    assert hf_ratio(wave) < 1e-6 < hf_ratio(x)
    place = torch.stack([torch.sin(ramp[0, 0] / 4), torch.cos(ramp[0, 0] / 4)])[None]
    assert locality(place) > 0.3
    assert abs(locality(torch.randn(1, 64, 16, 16, generator=generator))) < 0.05
    picture = pca_image(x, 3)
    assert picture.min() >= 0
    assert picture.max() <= 1
    assert pca_image(x[:, :2]).shape[1] == 3
    for wrong in (torch.full((1, 1, 8, 8), torch.nan), torch.zeros(0, 1, 8, 8)):
        with pytest.raises(InputError):
            hf_ratio(wrong)
    with pytest.raises(InputError, match="4x4"):
        hf_ratio(torch.zeros(1, 1, 2, 2))


def test_one_pass_ranking_equals_one_activation_at_a_time() -> None:
    fx = build_extractor()
    train, test = shapes_data(6, "train")[:2], shapes_data(4, "test")[:2]
    names = ["mid-vit-out", "up-level1-repeat0-vit-block0-cross-q"]
    together = rank(fx, train, test, classes=4, candidates=names, prompt="", batch_size=4)
    assert fx.layers == ("up-level1-repeat1-vit-out",)
    for row in together:
        alone = rank(fx, train, test, classes=4, candidates=[row["name"]], prompt="", batch_size=3)
        assert alone[0]["miou"] == pytest.approx(row["miou"], abs=1e-6)
        assert row["low"] <= row["high"]
    fx.layers = [names[0]]
    probe = LinearProbe(4)
    a, b = (
        fx(x, "", ids=[f"{s}{i}" for i in range(len(x))])[names[0]]
        for s, x in (("train", train[0]), ("test", test[0]))
    )
    probe.update(a, train[1])
    expected = float(iou_of(probe.confusion(b, test[1]).sum(0)))
    found = next(r["miou"] for r in together if r["name"] == names[0])
    assert found == pytest.approx(expected, abs=1e-6)
    with pytest.raises(InputError, match="give as many"):
        rank(fx, (train[0], train[1][:2]), test, classes=4)


def test_heads_have_gradients_everywhere_at_once() -> None:
    torch.manual_seed(0)
    maps = [torch.randn(2, 3, 4, 4), torch.randn(2, 5, 8, 8)]
    for head in (WeightedSum([3, 5], 8), HyperAggregation([3, 5], 32)):
        out = head(maps)
        assert out.shape[-2:] == (8, 8)
        (out * torch.randn_like(out)).sum().backward()
        for name, p in head.named_parameters():
            assert p.grad is not None, name
            assert p.grad.abs().sum() > 0, name
    with pytest.raises(InputError, match="multiples of 32"):
        HyperAggregation([3], 33)
    with pytest.raises(InputError, match="1 maps for 2"):
        WeightedSum([3, 5], 8)(maps[:1])


def test_several_models(tmp_path: Path) -> None:
    fx = build_extractor()
    save_backbone(fx, tmp_path)
    again = load_backbone(tmp_path)
    images = shapes_data(2, "test")[0]
    both = MultiModel({"a": fx, "b": again})(images, "a picture of circle")
    assert list(both) == [f"{m}/up-level1-repeat1-vit-out" for m in "ab"]
    assert torch.equal(*both.values())
    with pytest.raises(InputError, match="no demo backbone"):
        load_backbone(tmp_path / "nowhere")
    with pytest.raises(InputError, match="at least one"):
        MultiModel({})
    torch.testing.assert_close(fx.decode(fx.encode_images(images)) * 255, images.float())
    assert len(list_activations(fx.backbone)) > 60

"""Dilation distance against numpy's SVD, its invariances, and the ranking of candidates."""

import numpy as np
import pytest
import torch
from torch import nn

from edge_ood import OESelector, dilation_distance
from edge_ood.dilation import singular_values, spectrum
from shared_core.errors import InputError


def features(n=128, f=40, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, f, generator=g, dtype=torch.float64) * scale + 0.3


@pytest.mark.smoke
@pytest.mark.parametrize("shape", [(20, 50), (50, 20)])
def test_singular_values(shape):
    x = features(*shape)
    expected = np.linalg.svd(x.numpy(), compute_uv=False)
    assert singular_values(x).numpy() == pytest.approx(expected, rel=1e-9)
    assert singular_values(x.float()).numpy() == pytest.approx(expected, abs=2e-4)


def test_the_variants():
    a, b = features(seed=1), features(seed=2, scale=2.0)

    def mean_spectrum(x):
        parts = [np.linalg.svd(part, compute_uv=False) for part in x.numpy().reshape(4, 32, 40)]
        return np.mean(parts, axis=0)

    difference = mean_spectrum(a) - mean_spectrum(b)
    options = {"k": 8, "batch_size": 32}
    paper = dilation_distance(a, b, **options)
    assert paper == pytest.approx(np.linalg.norm(difference[:8]))
    official = dilation_distance(a, b, variant="official", **options)
    # The printed number of the published script: a (B, B) matrix whose rows are all the same.
    rows = np.broadcast_to(difference, (32, 32))[:8]
    assert official == pytest.approx(np.linalg.norm(rows))
    full = dilation_distance(a, b, variant="full", **options)
    whole = [np.linalg.svd(x.numpy(), compute_uv=False) / len(x) ** 0.5 for x in (a, b)]
    assert full == pytest.approx(np.linalg.norm((whole[0] - whole[1])[:8]))


@pytest.mark.parametrize("variant", ["paper", "official", "full"])
def test_invariances(variant):
    a, b = features(seed=1), features(seed=2, scale=1.5)
    options = {"k": 8, "batch_size": 128, "variant": variant}
    d = dilation_distance(a, b, **options)
    assert dilation_distance(a, a, **options) == 0
    assert dilation_distance(b, a, **options) == pytest.approx(d)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    assert dilation_distance(a[order], b, **options) == pytest.approx(d)
    rotation = torch.linalg.qr(features(40, 40, seed=3)).Q
    assert dilation_distance(a @ rotation, b @ rotation, **options) == pytest.approx(d)
    assert dilation_distance(a * 3, b * 3, **options) == pytest.approx(3 * d)


def test_k_beyond_the_rank_is_the_full_spectrum():
    a, b = features(64, 10), features(64, 10, seed=4)
    assert dilation_distance(a, b, k=10) == dilation_distance(a, b, k=99)


def test_sets_of_different_size_use_equal_batches():
    a = features(200)
    assert dilation_distance(a, a[:50], batch_size=64) < 1.5
    assert len(spectrum(a[:50], batch_size=64)) == 40
    g = torch.Generator().manual_seed(0)
    assert dilation_distance(a, a[:150], generator=g) < 3


def batches(x):
    return list(x.float().split(16))


def test_the_selector_ranks_and_suspects():
    net = nn.Sequential(nn.Linear(40, 12), nn.BatchNorm1d(12), nn.ReLU())
    before = net[1].running_mean.clone()
    selector = OESelector(net, k=8, batch_size=32).fit(batches(features()))
    ranks = selector.rank(
        {"far": batches(features(seed=5, scale=6.0)), "near": batches(features(seed=6, scale=1.6))}
    )
    assert [r.name for r in ranks] == ["near", "far"]
    assert ranks[0].n == 128
    assert not any(r.suspicious for r in ranks)
    assert torch.equal(net[1].running_mean, before)
    assert net.training
    OESelector(net.forward, k=8, batch_size=32).fit(batches(features()))
    assert torch.equal(net[1].running_mean, before)
    other = OESelector(net, k=8, batch_size=32, prefer="largest").fit(batches(features()))
    far, near = batches(features(seed=5, scale=6.0)), batches(features(seed=6, scale=1.6))
    assert [r.name for r in other.rank({"near": near, "far": far})] == ["far", "near"]
    with pytest.warns(UserWarning, match="holds no ID images"):
        [leak] = selector.rank({"leak": batches(features())})
    assert leak.distance == 0
    assert leak.suspicious


@pytest.mark.usefixtures("without_type_checks")
def test_errors():
    a = features(8, 4)
    for call, message in (
        (lambda: dilation_distance(a, a, k=0), "k=0"),
        (lambda: dilation_distance(a, a[:, :2]), "one backbone"),
        (lambda: dilation_distance(a, a[:0]), "not empty"),
        (lambda: dilation_distance(a, a * np.nan), "NaN"),
        (lambda: dilation_distance(a, a, variant="svd"), "variant is 'svd'"),
        (lambda: OESelector(nn.Identity(), prefer="best"), "prefer is 'best'"),
        (lambda: OESelector(nn.Identity()).rank({"a": [a]}), "call fit"),
        (lambda: OESelector(nn.Identity()).fit([]), "no samples"),
        (lambda: OESelector(nn.Identity()).fit([a]).rank({}), "no candidates"),
    ):
        with pytest.raises(InputError, match=message):
            call()

"""Scorers of features and inputs against numpy restatements and special cases."""

import numpy as np
import pytest
import torch
from torch import nn

from edge_ood import get_scorer, joint_energy
from edge_ood.feature_scorers import KNN, LOF, ODIN, IForest, Mahalanobis, ReAct, ViM
from shared_core.errors import InputError


def data(n=60, f=6, c=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, f, generator=g, dtype=torch.float64)
    y = (torch.rand(n, c, generator=g) < 0.5).double()
    return x, y


@pytest.mark.smoke
def test_mahalanobis_counts_a_sample_once_for_each_label():
    x, y = data()
    pairs = [(i, c) for i in range(60) for c in range(3) if y[i, c]]
    f, labels = x.numpy(), y.numpy()
    means = np.stack([f[labels[:, c] > 0].mean(0) for c in range(3)])
    residuals = np.stack([f[i] - means[c] for i, c in pairs])
    precision = np.linalg.inv(residuals.T @ residuals / len(pairs))
    new = data(7, seed=1)[0]
    half = np.array([[-0.5 * (v - m) @ precision @ (v - m) for m in means] for v in new.numpy()])
    for reduce, expected in (("max", half.max(1)), ("sum", half.sum(1))):
        found = Mahalanobis(reduce, shrinkage=0.0).fit(x, y).score(new)
        assert found.numpy() == pytest.approx(expected, rel=1e-6)


def test_mahalanobis_of_one_class_is_a_gaussian():
    x, _ = data()
    scorer = Mahalanobis(shrinkage=0.0).fit(x, torch.ones(60, 1))
    gaussian = torch.distributions.MultivariateNormal(x.mean(0), x.T.cov(correction=0))
    difference = gaussian.log_prob(x) - scorer.score(x)
    torch.testing.assert_close(difference, difference[:1].expand(60))


def test_mahalanobis_with_more_features_than_samples_stays_finite():
    x, y = data(10, 40)
    assert Mahalanobis().fit(x.float(), y).score(x.float()).isfinite().all()


def test_odin():
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 5)).double()
    x = torch.randn(6, 3, 6, 6, generator=g, dtype=torch.float64)
    with torch.no_grad():
        z = model(x)
    torch.testing.assert_close(ODIN(model).score(x), get_scorer("max_prob").score(z))
    torch.testing.assert_close(ODIN().score(z), get_scorer("max_prob").score(z))
    for method in ("max", "sum"):
        # One sample at a time by finite differences of the loss the docstring describes.
        def loss(v, method=method):
            out = model(v)
            pseudo = (out >= 0).double()
            each = nn.functional.binary_cross_entropy_with_logits(out, pseudo, reduction="none")
            return (
                each.max(1).values
                if method == "none"
                else (each[0, out.argmax()] if method == "max" else each.sum())
            )

        std = torch.tensor([0.2, 0.5, 1.0])
        expected = []
        for i in range(6):
            v = x[i : i + 1]
            gradient = torch.zeros_like(v)
            with torch.no_grad():
                for place in range(v.numel()):
                    step = torch.zeros_like(v).view(-1)
                    step[place] = 1e-5
                    step = step.view_as(v)
                    gradient.view(-1)[place] = loss(v + step) - loss(v - step)
                moved = v - 0.01 * torch.sign(gradient) / std.view(1, 3, 1, 1)
                p = torch.sigmoid(model(moved) / 2.0)
            expected.append(p.max() if method == "max" else p.sum())
        found = ODIN(model, temperature=2.0, eps=0.01, method=method, std=std).score(x)
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-6, atol=1e-9)
    assert all(p.grad is None for p in model.parameters())


def test_knn():
    x, _ = data()
    new = data(5, seed=1)[0]
    bank, query = (v.numpy() / np.linalg.norm(v.numpy(), axis=1, keepdims=True) for v in (x, new))
    distances = np.sort(np.linalg.norm(query[:, None] - bank, axis=2), axis=1)
    assert KNN(k=7).fit(x).score(new).numpy() == pytest.approx(-distances[:, 6], rel=1e-6)
    assert len(KNN(max_bank=25).fit(x).bank) <= 25
    # Chunks do not change a score.
    many = torch.cat([new] * 1000)
    torch.testing.assert_close(KNN(k=7).fit(x).score(many)[:5], KNN(k=7).fit(x).score(new))


def test_react():
    x, _ = data()
    head = nn.Linear(6, 3).double()
    scorer = ReAct(head, p=80).fit(x)
    limit = np.sort(x.numpy().ravel())[round(0.8 * 360) - 1]
    assert scorer.threshold.item() == pytest.approx(limit)
    torch.testing.assert_close(scorer.score(x), joint_energy(head(x.clamp(max=limit))).detach())
    everything = ReAct(head, p=100, base="max_logit").fit(x)
    torch.testing.assert_close(everything.score(x), head(x).amax(1).detach())


def test_vim():
    x, _ = data(f=8)
    head = nn.Linear(8, 3).double()
    scorer = ViM(head, dim=5).fit(x)
    w, b = head.weight.detach().numpy(), head.bias.detach().numpy()
    centered = x.numpy() + np.linalg.pinv(w) @ b
    values, vectors = np.linalg.eigh(centered.T @ centered)
    residual = vectors[:, np.argsort(values)[:3]]
    norm = np.linalg.norm(centered @ residual, axis=1)
    z = x.numpy() @ w.T + b
    alpha = z.max(1).mean() / norm.mean()
    expected = np.log(np.exp(z).sum(1)) - alpha * norm
    assert scorer.score(x).numpy() == pytest.approx(expected, rel=1e-6)


def test_isolation_and_local_outlier_factor():
    z, _ = data()
    from sklearn.neighbors import LocalOutlierFactor

    expected = LocalOutlierFactor(n_neighbors=20, novelty=True).fit(z.numpy()).score_samples(z + 3)
    assert LOF().fit(z).score(z + 3).numpy() == pytest.approx(expected, rel=1e-6)
    forest = IForest(n_estimators=20).fit(z)
    assert forest.score(z).mean() > forest.score(z + 8).mean()
    with pytest.raises(InputError, match="without pickle"):
        forest.state()


def test_states_make_the_scorer_again():
    x, y = data(f=8)
    head = nn.Linear(8, 3).double()
    for scorer in (Mahalanobis("sum"), KNN(3), ReAct(head), ViM(head)):
        scorer.fit(x, y)
        again = type(scorer)(**scorer.options())
        if hasattr(again, "head"):
            again.head = head
        again.load_state(scorer.state())
        assert torch.equal(again.score(x), scorer.score(x))
        with pytest.raises(InputError, match="lacks"):
            again.load_state({})


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: Mahalanobis().score(x), "has not been fitted"),
        (lambda x, y: Mahalanobis().fit(x), "needs the labels"),
        (lambda x, y: Mahalanobis().fit(x, y * 0), "no sample has a label"),
        (lambda x, y: Mahalanobis("mean"), "reduce is 'mean'"),
        (lambda x, y: Mahalanobis(shrinkage=2.0), "shrinkage is 2"),
        (lambda x, y: KNN(0), "k=0"),
        (lambda x, y: KNN().fit(x[:0]), "no ID features"),
        (lambda x, y: ReAct().fit(x).score(x), "needs the model's head"),
        (lambda x, y: ReAct(p=0.0), r"p is 0\.0"),
        (lambda x, y: ReAct(base="knn"), "no logit score"),
        (lambda x, y: ViM().fit(x), "last linear layer"),
        (lambda x, y: ViM(nn.ReLU()), "linear head"),
        (lambda x, y: ViM(nn.Linear(6, 3), dim=6).fit(x.float()), "dim is 6"),
        (lambda x, y: ODIN(eps=0.1).score(x), "needs the model"),
        (lambda x, y: ODIN(temperature=0.0), "temperature=0"),
        (lambda x, y: ODIN(method="mean"), "method is 'mean'"),
        (lambda x, y: LOF().score(x), "has not been fitted"),
    ],
)
def test_errors(call, message):
    with pytest.raises(InputError, match=message):
        call(*data())

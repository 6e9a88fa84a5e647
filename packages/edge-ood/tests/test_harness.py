"""All scorers on one model: what each is given, and what is refused."""

import numpy as np
import pytest
import torch
from torch import nn

from edge_ood import get_scorer, list_scorers
from edge_ood.evaluate import evaluate
from edge_ood.feature_scorers import ODIN, ViM
from edge_ood.harness import choose_scorers, make_scorers, score_outputs
from edge_ood.loop import Outputs, collect
from edge_ood.models import MultiLabelHead, MultiLabelModel
from shared_core.errors import InputError


def model(hidden=None):
    torch.manual_seed(0)
    head = MultiLabelHead(6, 3, hidden)
    net = MultiLabelModel(nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.ReLU()), head)
    net(torch.randn(64, 3, 2, 2))  # moves BatchNorm's statistics
    return net.eval()


def data(n=80, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, 2, 2, generator=g)
    y = (torch.rand(n, 3, generator=g) < 0.5).float()
    return [(x[i : i + 16], y[i : i + 16]) for i in range(0, n, 16)]


@pytest.mark.parametrize("hidden", [None, 5])
def test_every_scorer_gives_what_it_gives_alone(hidden):
    net, train, test = model(hidden), data(), data(40, 2)
    fit, out = collect(net, train, features=True), collect(net, test, features=True)
    names = choose_scorers(["all"], fitted=True, images=True)
    pytest.importorskip("sklearn")
    assert set(names) == set(list_scorers())
    made = make_scorers(names, net, fit, options={"odin": {"eps": 0.01}})
    found = score_outputs(made, out, net, test)
    assert set(found) == set(names)
    assert all(len(scores) == 40 and scores.isfinite().all() for scores in found.values())
    for name in ("joint_energy", "msp"):
        assert torch.equal(found[name], get_scorer(name).score(out.logits))
    knn = get_scorer("knn").fit(fit.features).score(out.features)
    torch.testing.assert_close(found["knn"], knn)
    maha = get_scorer("mahalanobis").fit(fit.features, fit.targets).score(out.features)
    torch.testing.assert_close(found["mahalanobis"], maha)
    react = get_scorer("react", head=net.head).fit(fit.features).score(out.features)
    torch.testing.assert_close(found["react"], react)
    odin = torch.cat([ODIN(net, eps=0.01).score(x) for x, _ in test])
    torch.testing.assert_close(found["odin"], odin)
    # ViM reads the input of the last linear layer.
    with torch.no_grad():
        front = nn.Sequential(*list(net.head)[:-1])
        vim = ViM(net.head.last).fit(front(fit.features)).score(front(out.features))
    torch.testing.assert_close(found["vim"], vim)


def test_given_scores_are_evaluated_like_those_of_logits():
    rng = np.random.default_rng(0)
    z, far = rng.normal(size=(60, 3)), rng.normal(size=(30, 3)) - 1
    energy = get_scorer("joint_energy")
    given = {"mine": energy.score(torch.from_numpy(z))}
    outside = {"far": {"mine": energy.score(torch.from_numpy(far)), "other": torch.zeros(2)}}
    labels = np.eye(3)[rng.integers(0, 3, 60)]
    found = evaluate(z, {"far": far}, labels, id_scores=given, ood_scores=outside)["scorers"]
    assert list(found) == ["joint_energy", "mine"]
    assert found["mine"] == found["joint_energy"]
    for ours, theirs, message in (
        (given, {}, "the OOD set far has not"),
        (given, {"near": {}}, "no such OOD set"),
        ({"mine": torch.zeros(5)}, outside, "for 60 rows"),
        (given, {"far": {"mine": torch.full((30,), torch.nan)}}, "30 of 30 mine scores of far"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(z, {"far": far}, id_scores=ours, ood_scores=theirs)


def test_errors():
    net = model()
    fit = collect(net, data(), features=True)
    for call, message in (
        (lambda: choose_scorers(["nn"], fitted=True, images=True), "no scorer is called 'nn'"),
        (lambda: choose_scorers([], fitted=True, images=True), "no scorer is given"),
        (lambda: choose_scorers(["odin"], fitted=True, images=False), "odin reads inputs"),
        (lambda: choose_scorers(["vim"], fitted=False, images=True), "vim has to be fitted"),
        (lambda: make_scorers(["knn"], net, fit._replace(features=torch.empty(0))), "are none"),
        (lambda: make_scorers(["knn"], net, fit._replace(logits=fit.logits + 1)), "another model"),
        (lambda: make_scorers(["knn"], nn.Linear(2, 2), fit), "model of edge_ood.create_model"),
        (lambda: make_scorers(["mahalanobis"], net, Outputs(*fit[:2], torch.empty(0))), "labels"),
        (lambda: score_outputs(make_scorers(["odin"], net), fit, net, data(16)), "for 80 rows"),
    ):
        with pytest.raises(InputError, match=message):
            call()

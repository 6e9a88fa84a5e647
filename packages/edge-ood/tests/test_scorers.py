"""Scores of logits against their formulas; how scorers are found by name."""

import math

import pytest
import torch

from edge_ood import JointEnergy, Scorer, get_scorer, joint_energy, list_scorers
from edge_ood.scorers import LOGIT_SCORERS
from shared_core.errors import InputError


def formulas(row):
    energies = [math.log1p(math.exp(v)) for v in row]
    probabilities = [1 / (1 + math.exp(-v)) for v in row]
    return {
        "joint_energy": sum(energies),
        "max_energy": max(energies),
        "topk_energy": sum(sorted(energies)[-5:]),
        "max_logit": max(row),
        "msp": max(math.exp(v) for v in row) / sum(math.exp(v) for v in row),
        "max_prob": max(probabilities),
        "sum_prob": sum(probabilities),
        "logsumexp": math.log(sum(map(math.exp, row))),
    }


@pytest.mark.smoke
def test_every_score_equals_its_formula():
    z = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).double() * 3
    for name, scorer in LOGIT_SCORERS.items():
        expected = [formulas(row)[name] for row in z.tolist()]
        assert scorer().score(z).tolist() == pytest.approx(expected, rel=1e-12)
        assert scorer().score(z.float()).tolist() == pytest.approx(expected, rel=1e-6)
        assert isinstance(scorer(), Scorer)
        assert scorer().fit(z).state() == {}


def test_special_cases():
    z = torch.randn(9, 1)
    assert torch.equal(get_scorer("logsumexp").score(z), z[:, 0])
    z = torch.randn(9, 6)
    joint = joint_energy(z)
    torch.testing.assert_close(get_scorer("topk_energy", k=99).score(z), joint)
    maximum = get_scorer("max_energy").score(z)
    torch.testing.assert_close(get_scorer("topk_energy", k=1).score(z), maximum)


@pytest.mark.parametrize("name", LOGIT_SCORERS)
def test_half_precision_and_compilation(name, without_type_checks):
    z = torch.full((2, 80), 6e4).half()
    scores = get_scorer(name).score(z)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()
    torch._dynamo.reset()
    compiled = torch.compile(get_scorer(name).score, backend="eager", fullgraph=True)
    z = torch.randn(3, 8)
    torch.testing.assert_close(compiled(z), get_scorer(name).score(z))


def test_a_score_exports(without_type_checks):
    class Score(torch.nn.Module):
        def forward(self, z):
            return JointEnergy().score(z)

    z = torch.randn(3, 8)
    exported = torch.export.export(Score(), (z,))
    torch.testing.assert_close(exported.module()(z), joint_energy(z))


def test_names():
    assert set(LOGIT_SCORERS) < set(list_scorers("logits"))
    assert set(list_scorers("features")) == {"mahalanobis", "knn", "react", "vim"}
    assert list_scorers("inputs") == ["odin"]
    with pytest.raises(InputError, match="no scorer is called 'energy'; accepted: joint_energy"):
        get_scorer("energy")
    with pytest.raises(InputError, match="scorer joint_energy"):
        get_scorer("joint_energy", k=3)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("bad", [torch.zeros(3), torch.zeros(3, 0), torch.zeros(3, 2).long()])
def test_what_is_no_table_of_logits_is_refused(bad):
    with pytest.raises(InputError, match="one row per sample"):
        JointEnergy().score(bad)

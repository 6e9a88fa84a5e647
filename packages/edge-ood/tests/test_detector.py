"""Calibration, saving and loading bit by bit, the adapter to pytorch-ood."""

import json

import pytest
import torch
from torch import nn

from edge_ood import OODDetector, joint_energy
from edge_ood.detector import threshold_at_recall
from edge_ood.feature_scorers import KNN, ODIN, IForest, Mahalanobis, ReAct, ViM
from edge_ood.models import create_model
from edge_ood.scorers import TopKEnergy
from shared_core.errors import InputError


def model(classes=4):
    torch.manual_seed(0)
    return create_model("small_cnn", classes).eval()


def images(n=40, seed=1):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.smoke
@pytest.mark.parametrize(("n", "recall"), [(20, 0.95), (21, 0.95), (7, 0.5), (1, 0.95), (9, 1.0)])
def test_the_threshold_keeps_the_share_and_no_more(n, recall):
    scores = torch.randn(n, generator=torch.Generator().manual_seed(n))
    threshold = threshold_at_recall(scores, recall)
    kept = (scores >= threshold).sum().item()
    assert kept / n >= recall
    assert (kept - 1) / n < recall
    assert threshold in scores.tolist()


def scorers():
    net = model()
    features = net.features(images()).detach()
    targets = (torch.rand(40, 4, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    yield "joint_energy"
    yield TopKEnergy(2)
    yield Mahalanobis().fit(features, targets)
    yield KNN(3).fit(features)
    yield ReAct(net.head).fit(features)
    yield ViM(net.head.last).fit(features)
    yield ODIN(eps=0.01, model=net)


def test_saved_detectors_come_back_bit_by_bit(tmp_path):
    for index, scorer in enumerate(scorers()):
        detector = OODDetector(model(), scorer, class_names=list("abcd"))
        detector.calibrate(images(), recall=0.9, inputs=True)
        before = detector.predict(images(9, 2))
        detector.save(tmp_path / str(index))
        again = OODDetector.load(tmp_path / str(index))
        after = again.predict(images(9, 2))
        assert torch.equal(before.score, after.score)
        assert torch.equal(before.is_id, after.is_id)
        assert torch.equal(before.labels, after.labels)
        assert again.class_names == list("abcd")
        assert (again.threshold, again.recall) == (detector.threshold, 0.9)


def test_what_it_says():
    detector = OODDetector(model())
    with pytest.raises(InputError, match="no threshold"):
        detector.predict(images())
    with torch.no_grad():
        z = detector.model(images())
    detector.calibrate(z, 0.8)
    out = detector.predict(images())
    torch.testing.assert_close(out.score, joint_energy(z))
    assert out.is_id.sum() == 32
    assert torch.equal(out.labels, z >= 0)
    detector.model.train()
    again = detector.predict(images())
    assert torch.equal(again.score, out.score)
    assert detector.model.training


def test_a_model_of_your_own(tmp_path):
    net = nn.Linear(3, 2)
    OODDetector(net, threshold=0.5).save(tmp_path)
    with pytest.raises(InputError, match="pass it"):
        OODDetector.load(tmp_path)
    other = nn.Linear(3, 2)
    found = OODDetector.load(tmp_path, other)
    assert torch.equal(other.weight, net.weight)
    assert found.threshold == 0.5
    with pytest.raises(InputError, match="does not fit the model"):
        OODDetector.load(tmp_path, nn.Linear(4, 2))


def test_damaged_folders(tmp_path):
    detector = OODDetector(model(), Mahalanobis().fit(torch.randn(9, 128), torch.ones(9, 1)))
    detector.save(tmp_path)
    (tmp_path / "scorer.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="not a readable safetensors file"):
        OODDetector.load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors"):
        OODDetector.load(tmp_path)
    for text in ("{", "[]", json.dumps({"scorer": "joint_energy"})):
        (tmp_path / "detector.json").write_text(text)
        with pytest.raises(InputError, match="not the folder of a detector"):
            OODDetector.load(tmp_path)
    with pytest.raises(InputError, match="without pickle"):
        OODDetector(model(), IForest()).save(tmp_path / "forest")
    assert not (tmp_path / "forest").exists()


def test_the_adapter_negates():
    detector = OODDetector(model())
    adapter = detector.as_pytorch_ood()
    assert torch.equal(adapter.predict(images()), -detector.score(images()))
    assert torch.equal(adapter(images()), -detector.score(images()))
    features = detector.model.features(images()).detach()
    y = torch.ones(40, 4)
    y[30:] = -1  # OOD, in pytorch-ood's convention
    fitted = OODDetector(model(), Mahalanobis()).as_pytorch_ood().fit_features(features, y)
    expected = Mahalanobis().fit(features[:30], y[:30]).score(features)
    assert torch.equal(fitted.predict_features(features), -expected)
    from_loader = OODDetector(model(), Mahalanobis()).as_pytorch_ood()
    from_loader.fit([(images(), y)])
    torch.testing.assert_close(from_loader.predict(images()), -expected, rtol=1e-4, atol=1e-3)
    with pytest.raises(InputError, match="ID samples"):
        adapter.fit_features(features, y * 0 - 1)


def test_the_metrics_of_pytorch_ood_agree():
    reason = "needs the extra pytorch-ood"
    pytorch_ood = pytest.importorskip("pytorch_ood.metrics.ood", reason=reason)
    from shared_core.metrics import ood_metrics

    detector = OODDetector(model())
    inside, outside = images(60, 1), images(50, 2) * 0.5
    metrics = pytorch_ood.OODMetrics()
    adapter = detector.as_pytorch_ood()
    metrics.update(adapter.predict(inside), torch.zeros(60))
    metrics.update(adapter.predict(outside), -torch.ones(50))
    theirs = metrics.compute()
    ours = ood_metrics(detector.score(inside), detector.score(outside), rule="at_least")
    assert theirs["AUROC"] == pytest.approx(ours["auroc"], abs=1e-6)
    assert theirs["FPR95TPR"] == pytest.approx(ours["fpr95_ood_positive"], abs=1e-6)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("scores", "recall"),
    [(torch.ones(3), 0.0), (torch.ones(3), 1.1), (torch.ones(0), 0.9), (torch.ones(2, 2), 0.9)],
)
def test_bad_calibration(scores, recall):
    with pytest.raises(InputError, match=r"accepted: \[n\]|recall is"):
        threshold_at_recall(scores, recall)

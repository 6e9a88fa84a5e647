"""Evaluation from files: kinds of files, chunks, what it equals, what it refuses."""

import numpy as np
import pytest
import torch

import edge_ood.evaluate as evaluation
from edge_ood import get_scorer, joint_energy
from edge_ood.evaluate import evaluate, evaluation_rows, open_array, score_array
from shared_core.errors import InputError
from shared_core.metrics import ood_metrics


def tables(n=200, c=6, seed=0):
    rng = np.random.default_rng(seed)
    y = (rng.random((n, c)) < np.linspace(0.5, 0.05, c)).astype(np.uint8)
    y[np.arange(n), rng.integers(0, c, n)] = 1
    z = (rng.normal(size=(n, c)) + 3 * y - 2).astype(np.float32)
    outside = {"a": rng.normal(size=(90, c)).astype(np.float32) - 2, "b": z[:50] - 3}
    return z, y, outside


def test_files(tmp_path):
    from safetensors.torch import save_file

    z, y, _ = tables()
    np.save(tmp_path / "z.npy", z)
    np.savez(tmp_path / "z.npz", logits=z, labels=y)
    save_file({"logits": torch.from_numpy(z).bfloat16()}, tmp_path / "z.safetensors")
    assert isinstance(open_array(tmp_path / "z.npy"), np.memmap)
    several = {
        "labels": torch.from_numpy(y),
        "logits": torch.from_numpy(z),
        "half": torch.ones(3, 1),
    }
    several["half"] = several["half"].half()
    save_file(several, tmp_path / "several.safetensors")
    for key, table in several.items():
        opened = open_array(tmp_path / "several.safetensors", key)
        assert isinstance(opened, np.memmap)
        assert opened.dtype == table.numpy().dtype
        assert np.array_equal(opened, table.numpy())
    assert np.array_equal(open_array(tmp_path / "several.safetensors"), z)
    (tmp_path / "broken.safetensors").write_bytes(b"\x10\x00")
    assert np.array_equal(open_array(tmp_path / "z.npz"), z)
    assert np.array_equal(open_array(tmp_path / "z.npz", "labels"), y)
    assert open_array(tmp_path / "z.safetensors").dtype == np.float32
    np.savez(tmp_path / "two.npz", a=z, b=z)
    (tmp_path / "z.txt").write_text("1")
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "cube.npy", np.zeros((2, 2, 2)))
    for name, message in (
        ("none.npy", "no file"),
        ("two.npz", "name one of them"),
        ("z.txt", "no known kind"),
        ("broken.npy", "cannot be read"),
        ("broken.safetensors", "cannot be read"),
        ("objects.npy", "cannot be read"),
        ("cube.npy", "shape"),
    ):
        with pytest.raises(InputError, match=message):
            open_array(tmp_path / name)


@pytest.mark.smoke
def test_it_equals_the_parts(monkeypatch):
    monkeypatch.setattr(evaluation, "_ROWS", 64)  # several chunks
    monkeypatch.setattr(evaluation, "_COLUMNS", 4)
    z, y, outside = tables()
    found = evaluate(z, outside, y, scorers=["all"], class_counts=[60, 50, 40, 30, 20, 10])
    assert len(found["scorers"]) == 8
    inside = joint_energy(torch.from_numpy(z))
    entry = found["scorers"]["joint_energy"]
    for name, array in outside.items():
        expected = ood_metrics(inside, joint_energy(torch.from_numpy(array)), rule="nearest")
        assert entry["ood"][name] == expected
    mean = sum(entry["ood"][n]["auroc"] for n in outside) / 2
    assert entry["mean"]["auroc"] == pytest.approx(mean)
    assert entry["tail_curve"][0]["n"] == 200
    assert sum(b["n"] for b in entry["buckets"].values()) == 200
    assert 0.5 < found["mAP"] <= found["mAP_trapezoid"] + 0.05
    rows = evaluation_rows(found)
    assert len(rows) == 8 * 3
    assert sorted(evaluation.figures(found, z, outside)) == ["energies", "roc", "tail_curve"]


def test_fitted_scorers():
    z, _, outside = tables()
    found = evaluate(z, outside, scorers=["lof", "iforest"], fit_logits=z[:100])
    assert found["scorers"]["lof"]["mean"]["auroc"] > 0.5
    assert "mAP" not in found
    assert len(evaluate(z, outside, scorers=["all"], fit_logits=z)["scorers"]) == 10


@pytest.mark.usefixtures("without_type_checks")
def test_errors():
    z, y, outside = tables()
    broken = z.copy()
    broken[7, 2] = np.nan
    for call, message in (
        (lambda: evaluate(z, {}), "no OOD set"),
        (lambda: evaluate(z, {"a": z[:, :2]}), "same number of labels"),
        (lambda: evaluate(z, outside, y[:5]), "labels have shape"),
        (lambda: evaluate(z, outside, y * 3), "other numbers than 0 and 1"),
        (lambda: evaluate(z, outside, y, class_counts=[1]), "1 class counts for 6"),
        (lambda: evaluate(z, outside, scorers=["knn"]), "cannot work on saved logits"),
        (lambda: evaluate(z, outside, scorers=["lof"]), "has to be fitted"),
        (lambda: evaluate(broken, outside), "1 of 200 joint_energy scores of the ID set"),
        (lambda: score_array(z[:0], get_scorer("msp")), "not empty"),
    ):
        with pytest.raises(InputError, match=message):
            call()

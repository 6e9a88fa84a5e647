"""Companion metrics against definitions and scikit-learn; their bounds; thresholds."""

import json

import pytest
import torch

from openworld_auc import fit_threshold, openworld_report


def report(case, **options):
    return openworld_report(*case, **options)


def test_companions_are_their_definitions(tools) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    for seed in range(30):
        case = tools.case(seed, levels=7)
        scores, _, is_base = case
        s, c, u, d = tools.split(*case)
        found = report(case)
        ones = torch.ones_like
        assert found.base_acc == pytest.approx(float(c.double().mean()))
        assert found.new_acc == pytest.approx(float(d.double().mean()))
        both = found.base_acc + found.new_acc
        hm = 2 * found.base_acc * found.new_acc / both if both else 0
        assert found.hm == pytest.approx(hm)
        assert found.auroc == pytest.approx(metrics.roc_auc_score(is_base, scores), abs=1e-12)
        assert found.opt_a == pytest.approx(tools.pairwise(s, c, u, ones(d)), abs=1e-12)
        assert found.opt_g == pytest.approx(tools.pairwise(s, ones(c), u, d), abs=1e-12)
        fpr, tpr, _ = metrics.roc_curve(is_base, scores, drop_intermediate=False)
        assert found.fpr95 == pytest.approx(fpr[(tpr >= 0.95).argmax()], abs=1e-12)


@pytest.mark.smoke
def test_bounds(tools) -> None:
    slack = 1e-12
    for seed in range(100):
        r = report(tools.case(seed, levels=4 if seed % 2 else None))
        a, b, n = r.openworld_auc, r.base_acc, r.new_acc
        assert a <= min(r.auroc, b * n, r.opt_a, r.opt_g) + slack
        assert a >= max(0, r.auroc + b + n - 2, r.opt_a + n - 1, r.opt_g + b - 1) - slack
        assert r.opt_a <= b + slack
        assert r.opt_g <= n + slack


def test_overall_accuracy_and_prior(tools) -> None:
    scores, correct, is_base = case = tools.case(4)
    right = correct & ((scores > 0.1) == is_base)
    found = report(case, threshold=0.1)
    assert found.overall_acc == pytest.approx(float(right.double().mean()))
    # Another prior is what repeating one domain would give.
    repeated = [part.repeat_interleave(torch.where(is_base, 5, 1)) for part in case]
    many = openworld_report(*repeated, threshold=0.1)
    assert report(case, threshold=0.1, prior=many.prior).overall_acc == pytest.approx(
        many.overall_acc
    )
    assert many.openworld_auc == pytest.approx(found.openworld_auc)


def test_one_classifier_of_all_classes(tools) -> None:
    _, correct, is_base = case = tools.case(6)
    joint = correct & (torch.arange(len(correct)) % 3 > 0)
    found = report(case, joint_correct=joint)
    assert found.overall_acc_joint == pytest.approx(float(joint.double().mean()))
    assert found.overall_acc is None
    b, n = float(joint[is_base].double().mean()), float(joint[~is_base].double().mean())
    assert report(case, joint_correct=joint, prior=0.2).overall_acc_joint == pytest.approx(
        0.2 * b + 0.8 * n
    )
    with pytest.raises(ValueError, match=r"prior is -1"):
        report(case, joint_correct=joint, prior=-1.0)


def test_thresholds_are_the_best_by_search(tools) -> None:
    for seed in range(20):
        scores, _, is_base = tools.case(seed, levels=12)
        s, u = scores[is_base], scores[~is_base]

        def j(t, s=s, u=u):
            return float((s > t).double().mean() - (u > t).double().mean())

        best = max(j(t) for t in scores.tolist())
        assert j(fit_threshold(scores, is_base)) == pytest.approx(best, abs=1e-12)
        t = fit_threshold(scores, is_base, rule="tpr95")
        kept = (s > t).double().mean()
        assert kept >= 0.95
        above = s[s > t].min()
        assert (s > above).double().mean() < 0.95
        if scores.unique().numel() > 1:
            t = fit_threshold(scores, rule="otsu")

            def within(t, x=scores):
                return sum(float(((p - p.mean()) ** 2).sum()) for p in (x[x <= t], x[x > t]))

            candidates = scores.unique()[:-1].tolist()
            assert within(t) == pytest.approx(min(map(within, candidates)))
        assert fit_threshold(scores, rule="median") == pytest.approx(float(scores.quantile(0.5)))


def test_a_threshold_of_the_evaluated_samples_is_told(tools) -> None:
    case = tools.case(0)
    with pytest.warns(UserWarning, match="fitted on the evaluated samples"):
        found = report(case, threshold="youden")
    assert found.threshold == fit_threshold(case[0], case[2])


def test_forms_of_the_report(tools) -> None:
    found = report(tools.case(1), ci="placement", threshold=-torch.inf)
    plain = json.loads(found.to_json())
    assert list(plain) == list(found.to_dict())
    assert plain["threshold"] is None  # minus infinity is no JSON
    assert plain["low"] < plain["openworld_auc"] < plain["high"]
    assert "openworld_auc" in found.table()


@pytest.mark.usefixtures("without_type_checks")
def test_bad_input(tools) -> None:
    case = tools.case(0)
    with pytest.raises(ValueError, match=r"prior is 1\.5"):
        report(case, threshold=0.0, prior=1.5)
    with pytest.raises(ValueError, match="needs a threshold"):
        report(case, prior=0.5)
    with pytest.raises(ValueError, match="rule is 'best'"):
        fit_threshold(case[0], case[2], rule="best")
    with pytest.raises(ValueError, match="needs is_base"):
        fit_threshold(case[0])
    with pytest.raises(ValueError, match="both domains"):
        fit_threshold(case[0], torch.ones_like(case[2]))
    with pytest.raises(ValueError, match="there are no scores"):
        fit_threshold(torch.empty(0), rule="otsu")

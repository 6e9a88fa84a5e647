"""The demo computes what it says, and tells losses."""

import dataclasses

import pytest
import torch

from bridge_garden.demo import (
    DemoSettings,
    figures,
    kappa_picture,
    run_seed,
    summarize,
    table,
    tell,
    train_student,
)
from bridge_garden.ledger import Ledger
from shared_core.errors import InputError

SHORT = DemoSettings(rounds=2, sequences=60, steps=6, batch=8, rollouts=60)


@pytest.mark.smoke
def test_a_seed_repeats_itself_whatever_else_is_trained() -> None:
    found = run_seed(0, ["soft", "risk", "curriculum"], SHORT)
    again = run_seed(0, ["soft"], SHORT)
    assert found["soft"].exposure == again["soft"].exposure
    assert run_seed(1, ["soft"], SHORT)["soft"].exposure != again["soft"].exposure


def test_hard_labels_narrow_the_gardens() -> None:
    settings = dataclasses.replace(SHORT, steps=60, sequences=200)
    found = run_seed(0, ["soft", "hard"], settings)
    assert found["hard"].garden_entropy < 0.5 < found["soft"].garden_entropy
    assert found["soft"].exposure.fit < found["hard"].exposure.fit


def test_pictures_and_words() -> None:
    results = [run_seed(s, ["soft", "hard", "static", "confidence", "risk"], SHORT) for s in (0, 1)]
    picture = kappa_picture(0, steps=2, texts=2, rounds=2)
    bias = picture.decomposition.bias
    assert sum(picture.decomposition.attribution) == pytest.approx(bias, abs=1e-10)
    assert sorted(figures(results, picture, 1.9)) == ["comparison", "kappa", "positions"]
    methods = summarize(results)
    assert [row["method"] for row in table(methods)][:2] == ["soft labels", "hard labels"]
    assert "exposure bias" in tell(methods, 1.9)
    assert "nothing to compare" in tell({"soft": methods["soft"]}, 1.9)


def entry(values: list[float]) -> dict[str, object]:
    names = ["fit", "inference", "bias", "bridge_accuracy", "garden_entropy"]
    mean = sum(values) / len(values)
    return {n: {"mean": mean, "standard_error": 0.1, "values": values} for n in names}


def test_losses_are_told() -> None:
    told = tell({"soft": entry([1.0, 1.1, 1.0]), "confidence": entry([2.0, 2.1, 2.1])}, 2.0)
    assert "exposure bias +1.033 ±0.033 (worse)" in told
    assert "bridge accuracy +1.033 ±0.033 (better)" in told
    told = tell({"soft": entry([1.0, 3.0]), "confidence": entry([2.0, 2.1])}, 2.0)
    assert "no clear difference" in told


def test_unknown_methods() -> None:
    for methods in ([], ["dpo"]):
        with pytest.raises(InputError, match="accepted: soft, hard"):
            run_seed(0, methods, SHORT)
    with pytest.raises(InputError, match="accepted: soft, hard"):
        train_student(Ledger(rounds=2), torch.zeros(2, 10, dtype=torch.int64), "dpo", 0, SHORT)

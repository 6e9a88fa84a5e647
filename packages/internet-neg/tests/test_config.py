"""Settings: the published defaults, round trips, and every refusal."""

from typing import Any

import pytest

from internet_neg import InterNegConfig, InterNegError
from internet_neg.presets import BENCHMARKS, PAPER, get_benchmark


def test_the_defaults_are_the_published_ones() -> None:
    config = InterNegConfig()
    found = (config.negatives, config.extra, config.beta, config.groups, config.shots)
    assert found == (2000, 2000, 0.35, 5, 16)
    steps = (config.inversion_steps, config.inversion_lr, config.inversion_weight_decay)
    assert (*steps, config.inversion_init_std) == (10, 0.02, 0.01, 0.02)
    changed = InterNegConfig(templates=("a {}",), beta=0.1)
    assert InterNegConfig.from_dict(changed.to_dict()) == changed


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"negatives": 0}, "negatives=0"),
        ({"extra": 0}, "extra=0"),
        ({"groups": 0}, "groups=0"),
        ({"shots": 0}, "shots=0"),
        ({"inversion_steps": 0}, "inversion_steps=0"),
        ({"beta": 1.5}, r"beta=1.5; it has to lie in \[0, 1\]"),
        ({"max_gate_rate": -1.0}, "max_gate_rate"),
        ({"inversion_lr": 0.0}, "inversion_lr"),
        ({"seed": -1}, "seed=-1"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"rescore": "never"}, "accepted: batch, accepted"),
        ({"dedup": "fuzzy"}, "accepted: casefold, exact"),
        ({"transform": "resize"}, "accepted: clip, openood"),
        ({"percentile_mode": "nearest"}, "accepted: linear, index"),
        ({"dtype": "int8"}, "accepted: auto, float32"),
        ({"final_template": "first"}, "exactly once"),
        ({"class_prompt": "a photo"}, "exactly once"),
        ({"templates": ("{} {}",)}, "exactly once"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InterNegConfig(**changes)


def test_unknown_settings_and_presets() -> None:
    with pytest.raises(InterNegError, match="no setting 'gamma'"):
        InterNegConfig.from_dict({"gamma": 1})
    with pytest.raises(InterNegError, match="accepted: imagenet-four"):
        get_benchmark("cifar")


def test_the_presets_are_the_benchmarks_of_the_paper() -> None:
    counts = {n: [p.count for p in b.unknown.values()] for n, b in BENCHMARKS.items()}
    assert counts == {
        "imagenet-four": [10_000, 10_000, 10_000, 5_160],
        "imagenet-near": [49_000, 5_879],
        "imagenet-far": [10_000, 5_160, 15_869],
    }
    assert all(b.known.count == 45_000 for b in BENCHMARKS.values())
    assert [b.config.groups for b in BENCHMARKS.values()] == [5, 1, 5]
    for row in PAPER.values():
        sets = [values for name, values in row.items() if name != "average"]
        for column in (0, 1):
            mean = sum(values[column] for values in sets) / 4
            assert mean == pytest.approx(row["average"][column], abs=0.011)

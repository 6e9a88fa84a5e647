import dataclasses
import json

import pytest

from focal_sam.presets import PRESETS, ReportedResult, get_preset, shot_thresholds
from shared_core.errors import InputError
from shared_core.metrics import shot_groups

# name: rho, gamma, lambda, learning rate, weight decay, batch, epochs
HYPERPARAMETERS = {
    "cifar10lt-resnet32": (0.2, 3.0, 0.5, 0.1, 2e-4, 64, 200),
    "cifar100lt-resnet32": (0.3, 3.2, 0.8, 0.1, 1e-3, 64, 200),
    "imagenetlt-resnet50": (0.1, 0.8, 0.8, 0.1, 5e-4, 256, 200),
    "inat2018-resnet50": (0.2, 2.0, 1.1, 0.2, 2e-4, 512, 200),
    "cifar10lt-clip": (0.05, 1.5, 0.7, 0.01, 5e-4, 128, 20),
    "cifar100lt-clip": (0.05, 5.5, 0.8, 0.01, 5e-4, 128, 20),
    "imagenetlt-clip": (0.05, 0.5, 0.8, 0.01, 5e-4, 128, 20),
    "inat2018-clip": (0.02, 0.2, 1.0, 0.01, 5e-4, 128, 20),
}

# name starts with: data set, classes, imbalance ratio, few <, many >
DATASETS = {
    "cifar10lt": ("CIFAR-10-LT", 10, 100, 200, 1000),
    "cifar100lt": ("CIFAR-100-LT", 100, 100, 20, 100),
    "imagenetlt": ("ImageNet-LT", 1000, None, 20, 100),
    "inat2018": ("iNaturalist 2018", 8142, None, 20, 100),
}


@pytest.mark.smoke
def test_hyperparameters() -> None:
    found = {
        name: (p.rho, p.gamma, p.lam, p.lr, p.weight_decay, p.batch_size, p.epochs)
        for name, p in PRESETS.items()
    }
    assert found == HYPERPARAMETERS


@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_data_and_groups(name: str) -> None:
    preset = get_preset(name)
    assert preset.name == name
    prefix, network = name.split("-")
    settings = (
        preset.dataset,
        preset.num_classes,
        preset.imbalance_ratio,
        preset.few_below,
        preset.many_above,
    )
    assert settings == DATASETS[prefix]
    hub = {"cifar10lt": "uoft-cs/cifar10", "cifar100lt": "uoft-cs/cifar100"}
    assert preset.source == hub.get(prefix, preset.source)
    if prefix not in hub:
        assert "user-supplied" in preset.source
        assert "path label" in preset.source
    scratch = {"cifar10lt": "cifar", "cifar100lt": "cifar", "imagenetlt": "imagenet-lt"}
    assert preset.transform == ("clip" if network == "clip" else scratch.get(prefix, "inat2018"))
    assert preset.model == ("clip-vit-b16" if network == "clip" else network)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_what_all_runs_share(preset: object) -> None:
    shared = (preset.loss, preset.optimizer, preset.momentum, preset.lr_schedule, preset.seed)
    assert shared == ("la", "sgd", 0.9, "cosine", 0)


def test_only_imagenet_lt_from_scratch_raises_rho() -> None:
    late = {name: p.rho_late for name, p in PRESETS.items() if p.rho_late is not None}
    assert late == {"imagenetlt-resnet50": 0.2}
    assert PRESETS["imagenetlt-resnet50"].rho_late_from == 0.8


def test_mixed_precision_is_for_clip_but_inaturalist() -> None:
    mixed = {name for name, p in PRESETS.items() if p.amp}
    assert mixed == {"cifar10lt-clip", "cifar100lt-clip", "imagenetlt-clip"}


def listed(name: str) -> dict[int | None, float]:
    """The figures without a speed, by imbalance ratio."""
    return {
        r.imbalance_ratio: r.top1
        for r in get_preset(name).reported
        if r.images_per_second is None and r.method == "Focal-SAM"
    }


def plotted(name: str) -> dict[str, tuple[float, float | None]]:
    return {
        r.method: (r.top1, r.images_per_second)
        for r in get_preset(name).reported
        if r.images_per_second is not None
    }


def test_reported_results() -> None:
    assert listed("cifar10lt-resnet32") == {200: 71.7, 100: 77.2, 50: 82.0}
    assert listed("cifar100lt-resnet32") == {100: 44.0, 50: 48.1}
    assert listed("imagenetlt-resnet50") == {None: 54.3}
    assert listed("inat2018-resnet50") == {None: 71.8}
    figure = {
        "cifar10lt-resnet32": {"CC-SAM": (82.5, 1070), "Focal-SAM": (83.0, 1620)},
        "cifar100lt-resnet32": {"CC-SAM": (50.0, 550), "Focal-SAM": (50.6, 1620)},
        "imagenetlt-resnet50": {"CC-SAM": (52.4, 75), "Focal-SAM": (54.3, 400)},
        "inat2018-resnet50": {"CC-SAM": (71.0, 40), "Focal-SAM": (71.8, 410)},
    }
    assert {name: plotted(name) for name in figure} == figure


def test_every_reported_result_has_its_caveat() -> None:
    for name, preset in PRESETS.items():
        assert bool(preset.reported) == (not name.endswith("-clip"))
        for result in preset.reported:
            by_eye = "read by eye from Figure 1b" in result.caveat
            assert by_eye == (result.images_per_second is not None)
            assert by_eye or "base loss" in result.caveat


@pytest.mark.parametrize(
    ("dataset", "ratio", "edges"),
    [
        ("CIFAR-10-LT", 10, (835, 2319)),
        ("CIFAR-10-LT", 50, (200, 1500)),
        ("CIFAR-10-LT", 100.0, (200, 1000)),
        ("CIFAR-10-LT", 200, (100, 800)),
        ("CIFAR-100-LT", 10, (99, 265)),
        ("CIFAR-100-LT", 50, (20, 100)),
        ("CIFAR-100-LT", 200, (10, 60)),
        ("ImageNet-LT", None, (20, 100)),
    ],
)
def test_shot_thresholds(dataset: str, ratio: float | None, edges: tuple[int, int]) -> None:
    assert shot_thresholds(dataset, ratio) == edges


def test_thresholds_are_those_of_shot_groups() -> None:
    preset = get_preset("cifar100lt-resnet32")
    groups = shot_groups([101, 100, 20, 19], many=preset.many_above, few=preset.few_below)
    assert groups == {"many": [0], "medium": [1, 2], "few": [3]}


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_description_is_json(preset: object) -> None:
    description = preset.describe()
    again = json.loads(json.dumps(description, allow_nan=False))
    assert again == description
    reported = tuple(ReportedResult(**result) for result in again.pop("reported"))
    assert type(preset)(**again, reported=reported) == preset


def test_presets_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_preset("cifar10lt-clip").rho = 1.0


def test_unknown_preset_lists_the_known() -> None:
    with pytest.raises(InputError, match=r"'cifar10'; accepted: cifar10lt-resnet32, .*clip"):
        get_preset("cifar10")


def test_unknown_dataset() -> None:
    with pytest.raises(InputError, match=r"'CIFAR-10'; accepted: CIFAR-10-LT"):
        shot_thresholds("CIFAR-10")


@pytest.mark.parametrize(("dataset", "ratio"), [("CIFAR-10-LT", 20), ("CIFAR-10-LT", None)])
def test_ratio_without_published_edges(dataset: str, ratio: int | None) -> None:
    with pytest.raises(InputError, match=f"ratio {ratio}; accepted: 10, 50, 100, 200"):
        shot_thresholds(dataset, ratio)

"""The pictures say what the results say."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from focal_sam.analysis import (
    class_hessian_eigs,
    class_sharpness,
    class_spectrum,
    loss_surface_2d,
)
from focal_sam.plots import (
    plot_class_weights,
    plot_loss_surface,
    plot_sharpness_bars,
    plot_spectrum,
)
from focal_sam.weights import ClassWeights, FocalWeights
from shared_core.errors import InputError

GROUPS = {"head": [0, 1], "tail": [2]}


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def batches(classes: int = 3) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(30, 4, generator=generator), torch.arange(30) % classes)]


def drawn(figure: Any, folder: Path) -> Any:
    """Layout and text are only worked out when a figure is written."""
    path = folder / "figure.png"
    figure.savefig(path)
    assert path.stat().st_size > 5000
    return figure


def legend(figure: Any) -> list[str]:
    return [t.get_text() for t in figure.legends[0].get_texts()]


@pytest.mark.smoke
def test_class_weights_are_drawn_from_the_most_frequent_on(tmp_path: Path) -> None:
    weights = FocalWeights([20, 500, 100], gamma=2.0, lam=0.8)
    figure = drawn(plot_class_weights(weights), tmp_path)
    curve, bars = figure.axes
    assert list(curve.lines[0].get_ydata()) == weights.values[[1, 2, 0]].tolist()
    assert [t.get_text() for t in curve.get_xticklabels()] == ["1", "2", "0"]
    assert [p.get_height() for p in bars.patches] == [500, 100, 20]
    assert not figure.legends


def test_several_class_weights_share_one_axis(tmp_path: Path) -> None:
    named = {
        "focal": ClassWeights(torch.tensor([0.1, 0.5])),
        "tail only": torch.tensor([0.0, 1.2]),
    }
    figure = drawn(plot_class_weights(named), tmp_path)
    assert legend(figure) == ["focal", "tail only"]
    [axes] = figure.axes  # no counts, no bars
    assert axes.get_ylim()[1] > 1.2
    assert axes.get_xlabel() == "class"
    with_counts = plot_class_weights(named, class_counts=[5, 50])
    assert list(with_counts.axes[0].lines[1].get_ydata()) == pytest.approx([1.2, 0.0])


def test_weights_that_are_all_zero_can_be_drawn(tmp_path: Path) -> None:
    drawn(plot_class_weights(torch.zeros(3)), tmp_path)


def test_a_thousand_classes_are_not_named_one_by_one(tmp_path: Path) -> None:
    counts = torch.arange(1000, 0, -1)
    figure = drawn(plot_class_weights(FocalWeights(counts, gamma=2000.0)), tmp_path)
    assert len(figure.axes[0].get_xticklabels()) < 20


def test_bars_of_one_result(tmp_path: Path) -> None:
    result = class_sharpness(model(), batches(), 0.25, groups=GROUPS)
    figure = drawn(plot_sharpness_bars(result), tmp_path)
    [axes] = figure.axes
    heights = [p.get_height() for p in axes.patches]
    assert heights == pytest.approx(list(result.sharpness.values()))
    assert [t.get_text() for t in axes.get_xticklabels()] == ["head", "tail"]
    assert "0.25" in axes.get_ylabel()
    assert "ascent" in axes.get_title()
    assert axes.get_xlabel() == "group of classes"
    assert not figure.legends


def test_bars_of_several_seeds_are_means_with_every_seed_shown(tmp_path: Path) -> None:
    results = {
        name: [class_sharpness(model(s), batches(), 0.1, groups=GROUPS) for s in seeds]
        for name, seeds in {"SGD": (0, 1, 2), "SAM": (3, 4, 5)}.items()
    }
    figure = drawn(plot_sharpness_bars(results, log=True), tmp_path)
    [axes] = figure.axes
    sam = [r.sharpness["tail"] for r in results["SAM"]]
    bar = axes.containers[3]  # bars and whiskers of SGD, then of SAM
    heights = [p.get_height() for p in bar.patches]
    assert heights[1] == pytest.approx(sum(sam) / 3)
    [segments] = bar.errorbar.lines[2]
    spread = torch.tensor(sam).std().item()
    low, high = segments.get_segments()[1][:, 1]
    assert high - low == pytest.approx(2 * spread, rel=1e-5)
    dots = [line for line in axes.lines if line.get_marker() == "."]
    assert list(dots[1].get_ydata())[3:] == pytest.approx(sam)
    centre = bar.patches[1].get_center()[0]
    assert list(dots[1].get_xdata()[3:]) == pytest.approx([centre] * 3)
    assert legend(figure) == ["SGD", "SAM"]
    assert axes.get_yscale() == "log"


def test_bars_of_eigenvalues(tmp_path: Path) -> None:
    result = class_hessian_eigs(model(), batches(), k=2)
    figure = drawn(plot_sharpness_bars({"SGD": result}), tmp_path)
    [axes] = figure.axes
    assert [p.get_height() for p in axes.patches] == pytest.approx(
        [v[0] for v in result.top.values()]
    )
    assert axes.get_ylabel() == "top Hessian eigenvalue"
    assert axes.get_xlabel() == "class"


@pytest.mark.parametrize("log", [True, False])
def test_bars_leave_a_gap_for_groups_without_samples(log: bool, tmp_path: Path) -> None:
    result = class_sharpness(model(), batches(classes=2), 0.1, groups=GROUPS)
    figure = drawn(plot_sharpness_bars({"a": [result, result]}, log=log), tmp_path)
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["head", "tail"]


@pytest.mark.smoke
def test_spectrum_lines_are_the_densities(tmp_path: Path) -> None:
    result = class_spectrum(model(), batches(classes=2), groups={**GROUPS, "one": [1]}, samples=2)
    figure = drawn(plot_spectrum(result), tmp_path)
    [axes] = figure.axes
    lines = [line for line in axes.lines if len(line.get_xdata()) > 2]
    assert [line.get_label() for line in lines] == ["head", "one"]  # the tail is empty
    assert list(lines[1].get_ydata()) == result.density["one"]
    assert list(lines[1].get_xdata()) == result.grid
    assert axes.get_yscale() == "log"


def test_surfaces_share_their_colours(tmp_path: Path) -> None:
    surfaces = {
        name: loss_surface_2d(model(seed), batches(), groups=GROUPS, steps=5)
        for seed, name in enumerate(["ImbSAM", "Focal-SAM"])
    }
    figure = drawn(plot_loss_surface(surfaces), tmp_path)
    *panels, bar = figure.axes
    assert [a.get_title() for a in panels] == ["head", "tail", "", ""]
    assert [a.get_ylabel().split("\n")[0] for a in panels] == ["ImbSAM", "", "Focal-SAM", ""]
    values = [v for s in surfaces.values() for g in GROUPS for row in s.surface[g] for v in row]
    for axes in panels:
        filled = axes.collections[0]
        assert filled.get_clim() == pytest.approx((min(values), max(values)))
    assert bar.get_ylabel() == "mean loss"


def test_one_surface_of_single_classes_with_one_empty(tmp_path: Path) -> None:
    surface = loss_surface_2d(model(), batches(classes=2), steps=4)
    figure = drawn(plot_loss_surface(surface), tmp_path)
    assert [a.get_title() for a in figure.axes[:-1]] == ["class 0", "class 1"]


def test_a_surface_follows_its_coordinates(tmp_path: Path) -> None:
    # The loss grows along direction 1 alone, that is to the right.
    surface = loss_surface_2d(model(), batches(), groups=GROUPS, steps=5, radius=0.5)
    slope = [[0.1 * 10**j for j in range(5)] for _ in range(5)]
    tilted = type(surface)(**{**surface.__dict__, "surface": dict.fromkeys(GROUPS, slope)})
    figure = drawn(plot_loss_surface(tilted), tmp_path)
    contour = figure.axes[0].collections[1]
    line = max((p.vertices for p in contour.get_paths()), key=len)
    assert line[:, 0].max() - line[:, 0].min() < 1e-6
    assert line[:, 1].max() - line[:, 1].min() == pytest.approx(1.0)


def test_a_flat_surface_can_be_drawn(tmp_path: Path) -> None:
    surface = loss_surface_2d(
        model(), batches(), groups=GROUPS, steps=3, criterion=lambda z, y: 0 * z[:, 0] + 2
    )
    drawn(plot_loss_surface(surface), tmp_path)


def sharpness(rho: float = 0.1, **options: Any) -> Any:
    return class_sharpness(model(), batches(), rho, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plot_class_weights({}), "no weights"),
        (lambda: plot_class_weights(torch.ones(3), [1, 2]), r"of \[2, 3\] classes"),
        (lambda: plot_sharpness_bars({}), "no results"),
        (lambda: plot_sharpness_bars({"SGD": []}), "no results"),
        (
            lambda: plot_sharpness_bars({"a": sharpness(), "b": sharpness(groups=GROUPS)}),
            "differ in kind, groups",
        ),
        (lambda: plot_sharpness_bars({"a": sharpness(), "b": sharpness(0.2)}), "differ in kind"),
        (
            lambda: plot_sharpness_bars(class_hessian_eigs(model(), batches(), which="bottom")),
            "bars show the top",
        ),
        (
            lambda: plot_spectrum(class_spectrum(model(), batches(), samples=1), floor=0.0),
            "floor is 0.0",
        ),
        (lambda: plot_loss_surface({}), "no surfaces"),
        (
            lambda: plot_loss_surface(
                {
                    "a": loss_surface_2d(model(), batches(), steps=2),
                    "b": loss_surface_2d(model(), batches(), groups=GROUPS, steps=2),
                }
            ),
            "differ in groups",
        ),
        (
            lambda: plot_loss_surface(
                loss_surface_2d(model(), batches(), steps=2, criterion=lambda z, y: 0 * z[:, 0] - 1)
            ),
            "no surface has a positive loss",
        ),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()

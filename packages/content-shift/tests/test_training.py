"""The loop under all training, and a small ControlNet trained by it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from content_shift import IncompatibleControl, train_control
from content_shift import techniques as T
from content_shift._training import fit, generator_of, share, world
from content_shift.control import check_control
from diffeat import FeatureExtractor
from shared_core.errors import InputError
from shared_core.testing import run_gloo

Build = Callable[..., Any]


def small(
    out: str | None = None, *, steps: int = 6, **options: Any
) -> tuple[nn.Linear, list[float]]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)

    def loss_of(step: int) -> torch.Tensor:
        x = torch.randn(4, 3, generator=generator_of(0, step))
        return (model(x[share(torch.arange(4))]) - 1).square().mean()

    named = dict(model.named_parameters())
    groups = [{"params": list(named.values()), "lr": 0.1}]
    losses = fit(named, groups, loss_of, steps=steps, out=out, save_every=2, **options)
    return model, losses


@pytest.mark.smoke
def test_fit_is_adamw_and_resumes_to_the_bit(tmp_path: Path) -> None:
    model, losses = small(str(tmp_path / "a"))
    torch.manual_seed(0)
    plain = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.1, weight_decay=1e-2)
    for step in range(6):
        x = torch.randn(4, 3, generator=generator_of(0, step))
        loss = (plain(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        assert float(loss.detach()) == losses[step]
    assert torch.equal(plain.weight, model.weight)
    small(str(tmp_path / "b"), steps=3)
    again, rest = small(str(tmp_path / "b"), resume=True)
    assert rest == losses[3:]
    assert torch.equal(again.weight, model.weight)
    with pytest.raises(InputError, match="--resume"):
        small(str(tmp_path / "b"))


def _share_the_work(rank: int, world_size: int, folder: str) -> None:
    assert world() == (rank, world_size)
    model, _ = small(str(Path(folder) / "run"))
    torch.save(model.state_dict(), Path(folder) / f"{rank}.pt")
    with pytest.raises(InputError, match="evenly"):
        share(torch.arange(3))


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    run_gloo(_share_the_work, tmp_path, str(tmp_path))
    alone, _ = small()
    states = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2)]
    for state in states:
        torch.testing.assert_close(state["weight"], alone.weight.detach())
    assert torch.equal(states[0]["weight"], states[1]["weight"])


def test_a_trained_controlnet_tells_the_image(tmp_path: Path) -> None:
    """On diffeat's demo model: training lowers the loss, and the base does not move."""
    from diffeat.demo import build_extractor, shapes_data

    fx = build_extractor()
    nn.init.normal_(fx.backbone.conv_out.weight, 0, 0.05)  # an untrained model that answers
    before = {n: p.clone() for n, p in fx.backbone.named_parameters()}
    images, _, captions = shapes_data(4, "train")
    given: dict[str, Any] = {
        "embedding_channels": (8, 16), "batch_size": 2, "save_every": 1, "lr": 1e-2,
    }  # fmt: skip
    net = train_control(fx, images, captions, steps=4, out=tmp_path / "a", **given)
    assert all(torch.equal(p, before[n]) for n, p in fx.backbone.named_parameters())
    assert net.controlnet_mid_block.weight.abs().sum() > 0
    train_control(fx, images, captions, steps=2, out=tmp_path / "b", **given)
    # The rate falls over all steps, so that a shorter run is another one; its weights differ.
    rest = train_control(fx, images, captions, steps=4, out=tmp_path / "b", resume=True, **given)
    assert rest.config == net.config
    loaded = T.ControlNet(str(tmp_path / "a" / "controlnet"), "sobel")
    ours = T.ControlNet(net, "sobel")
    found = [t(fx, images, prompt="", t=100) for t in (ours, loaded)]
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value)


@pytest.mark.parametrize("topology", ["sdxl"])
def test_sdxl_gets_a_controlnet_too(extractor: Build, topology: str) -> None:
    fx = extractor(topology)
    net = train_control(
        fx, torch.rand(2, 3, 64, 64), preprocess="canny", steps=1, batch_size=1,
        embedding_channels=(4, 4, 8, 8),
    )  # fmt: skip
    check_control(fx.backbone, net)
    assert len(T.ControlNet(net)(fx, torch.rand(2, 3, 64, 64), prompt="a")) == 3


def test_bad_input_is_refused(fx: FeatureExtractor, extractor: Build, control: Build) -> None:
    images = torch.rand(2, 3, 64, 64)
    for options, message in (
        ({"embedding_channels": (4, 8)}, "a factor of 8"),
        ({"captions": ["a"]}, "1 captions for 2 images"),
        ({"preprocess": "depth"}, "canny, sobel"),
        ({"t_range": (10, 2000)}, "do not fit"),
    ):
        with pytest.raises(InputError, match=message):
            train_control(fx, images, **{"embedding_channels": (4, 4, 8, 8), **options})
    with pytest.raises(IncompatibleControl):
        check_control(extractor("sdxl").backbone, control(fx.backbone))

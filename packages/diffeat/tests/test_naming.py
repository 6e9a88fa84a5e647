"""Names and counts are the published ones, and what they say about shapes is true."""

from typing import Any

import pytest
import torch
from torch import nn

from diffeat import (
    ActivationNotFound,
    Selection,
    UnsupportedBackbone,
    alias,
    capture,
    find_activation,
    list_activations,
)
from diffeat.filters import auto_candidates, paper_candidates
from diffeat.presets import COMBINED, PRESETS, build_topology
from shared_core.errors import InputError


@pytest.mark.smoke
@pytest.mark.parametrize(("name", "plain", "maps"), [("sd15", 165, 197), ("sdxl", 472, 612)])
def test_counts(name: str, plain: int, maps: int) -> None:
    model = build_topology(name)
    assert len(list_activations(model)) == plain
    listed = [info.name for info in list_activations(model, maps=True)]
    assert len(listed) == len(set(listed)) == maps


def test_279_candidates_of_the_paper() -> None:
    kept = [
        info
        for info in list_activations(build_topology("sdxl"))
        if not info.name.startswith("unet")
        and info.kind != "self-v"
        and info.block in (None, 0, 1, 3, 5, 7, 9)
    ]
    assert len(kept) == 279


@pytest.mark.parametrize(("name", "count"), [("sdxl", 63), ("playground", 63), ("sd15", 33)])
def test_paper_candidates(name: str, count: int) -> None:
    model = build_topology(name)
    found = paper_candidates(model)
    assert len(set(found)) == count
    assert set(found) <= {info.name for info in list_activations(model)}
    if name == "sd15":
        assert "up-level2-upsampler-out" in found
        assert not any(n.startswith("up-level0") for n in found)
        assert [n for n in found if "level3" in n] == [
            f"up-level3-repeat{r}-vit-block0-self-{p}" for r in range(3) for p in "qk"
        ]


def test_paper_candidates_refuses_other_layouts() -> None:
    changes = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    model = build_topology("sd15", block_out_channels=(320, 640), **changes)
    with pytest.raises(InputError, match="auto_candidates"):
        paper_candidates(model)


def test_auto_candidates_follow_the_noise() -> None:
    model = build_topology("sd15")
    noise = {i.name: 0.9 if i.level == 3 else 0.1 for i in list_activations(model)}
    found = auto_candidates(model, noise)
    assert "up-level1-repeat0-vit-out" in found
    assert "up-level3-repeat0-vit-block0-self-k" in found
    assert "up-level3-repeat0-vit-out" not in found
    assert not any(n.startswith("down") for n in found)
    with pytest.raises(InputError, match="up stage"):
        auto_candidates(model, {})


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_name_activations_and_add_up(name: str) -> None:
    preset = PRESETS[name]
    model = build_topology(preset.topology)
    total = 0
    for layer in Selection.parse(name).resolve(model):
        total += 2 * 77 if layer == "attn" else find_activation(model, layer).channels or 0
    assert total * max(1, len(preset.timesteps)) == preset.channels


def test_combined_presets_have_the_papers_channels() -> None:
    totals = {n: sum(PRESETS[p].channels for p in parts) for n, parts in COMBINED.items()}
    assert totals == {"xl-t": 8154, "xl-t-seg": 7040}


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_list_equals_a_real_forward(name: str, request: pytest.FixtureRequest) -> None:
    """Order, channels and reduction, against hooks of our own on a real forward."""
    model = request.getfixturevalue(name)
    infos = [i for i in list_activations(model, extra=True) if i.source == "output"]
    seen: list[tuple[str, torch.Size]] = []
    handles = []
    for info in infos:

        def hook(m: nn.Module, a: Any, out: Any, key: str = info.name) -> None:
            out = out[0] if isinstance(out, tuple) else getattr(out, "sample", out)
            seen.append((key, out.shape))

        handles.append(model.get_submodule(info.module_path).register_forward_hook(hook))
    extra = {"text_embeds": torch.zeros(1, 8), "time_ids": torch.zeros(1, 6)}
    with torch.no_grad():
        model(torch.zeros(1, 4, 16, 16), 1, torch.zeros(1, 5, 8), added_cond_kwargs=extra)
    for handle in handles:
        handle.remove()
    published = [i.name for i in infos if not i.extra]
    assert [n for n, _ in seen if n in set(published)] == published
    assert len(seen) == len(infos)
    shapes = dict(seen)
    for info in infos:
        shape = shapes[info.name]
        assert info.channels == (shape[1] if len(shape) == 4 else shape[2]), info
        positions = 5 if info.text_side else (16 // (info.reduction or 1)) ** 2
        assert positions == (shape[2] * shape[3] if len(shape) == 4 else shape[1]), info


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(ActivationNotFound) as caught:
        Selection.parse("up-level1-repeat1-vit-block0-cros-q").resolve(build_topology("sd15"))
    assert len(caught.value.nearest) == 5
    assert "up-level1-repeat1-vit-block0-cross-q" in str(caught.value)
    with pytest.raises(ActivationNotFound):
        Selection.parse("up-level9-*").resolve(build_topology("sd15"))
    with pytest.raises(UnsupportedBackbone, match="module:"):
        list_activations(nn.Linear(1, 1))
    with pytest.raises(ActivationNotFound):
        find_activation(nn.Linear(1, 1), "module:nowhere")


def test_selections(tmp_path: Any) -> None:
    model = build_topology("sd15")
    file = tmp_path / "layers.json"
    file.write_text('{"unet-out": true, "unet-in": true, "mid-vit-out": false}')
    assert Selection.parse(str(file)).resolve(model) == ("unet-in", "unet-out")
    assert Selection.parse("re:up-level[12]-upsampler-out").resolve(model) == (
        "up-level1-upsampler-out",
        "up-level2-upsampler-out",
    )
    globbed = Selection.parse(["mid-*"]).resolve(model)
    assert len(globbed) == 11
    assert not any(n.endswith(("map", "cross-k", "self-out")) for n in globbed)
    assert Selection.parse(["mid-*-map"]).resolve(model) == (
        "mid-vit-block0-self-map",
        "mid-vit-block0-cross-map",
    )
    with pytest.warns(UserWarning, match="more than once"):
        assert Selection.parse(["unet-in", "unet-in"]).items == ("unet-in",)
    for wrong in ([], {"unet-in": False}, ""):
        with pytest.raises(InputError, match="empty"):
            Selection.parse(wrong)
    file.write_text("3")
    with pytest.raises(InputError, match="no layer list"):
        Selection.parse(str(file))
    with pytest.raises(InputError, match="regular expression"):
        Selection.parse("re:(").resolve(model)


def test_alias_goes_both_ways() -> None:
    model = build_topology("sd15")
    for info in list_activations(model)[3::9]:
        assert alias(model, alias(model, info.name)) == info.name
    address = alias(model, "up-level1-repeat2-res-out")
    assert address == "module:up_blocks.1.resnets.2"
    assert alias(model, address) == "up-level1-repeat2-res-out"


def test_module_addresses_work_on_anything() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True))
    x = torch.tensor([[1.0, -1.0]])
    with capture(model, ["module:1@in", "module:1"], stop=False) as cap:
        model(x)
    assert torch.equal(cap.features["module:1@in"], model[0](x))
    assert torch.equal(cap.features["module:1"], model[0](x).relu())

"""Recipes against forwards written out by hand, and the extractor left as it was."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from content_shift import (
    IncompatibleControl,
    Inputs,
    Patch,
    Recipe,
    UnsupportedTechnique,
    load_recipe,
)
from content_shift import techniques as T
from content_shift.canny import canny
from diffeat import FeatureExtractor, capture, list_activations
from shared_core.errors import InputError

Build = Callable[..., Any]


def same(a: Any, b: Any) -> bool:
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)


def tree(module: nn.Module) -> list[tuple[str, int]]:
    return [(name, id(m)) for name, m in module.named_modules()]


@pytest.mark.smoke
@pytest.mark.parametrize("topology", ["sd15", "sd21", "sdxl"])
def test_what_has_no_strength_changes_no_bit(
    extractor: Build, control: Build, images: torch.Tensor, topology: str
) -> None:
    fx = extractor(topology)
    plain = fx(images, "a cat", t=50, seed=3)
    net, fresh = control(fx.backbone), control(fx.backbone, fresh=True)
    for recipe in (
        Recipe(),
        T.Prompt("a cat"),
        T.Captions(["a cat"] * 3),
        T.CFG(1.0),
        T.CFG(7.5),  # acts on predictions, of which a feature has none
        T.ControlNet(net, scale=0.0),
        T.ControlNet(fresh),
        T.PreDenoise(50),
        T.NoiseEnsemble(1),
        T.Callable(lambda ctx: Patch()),
        T.Prompt("a cat") + T.ControlNet(net, scale=0.0) + T.CFG(1.0) + T.PreDenoise(50),
    ):
        assert same(recipe(fx, images, t=50, seed=3, prompt="a cat"), plain), recipe
    steered = T.ControlNet(net)(fx, images, t=50, seed=3, prompt="a cat")
    assert all(not torch.allclose(steered[n], plain[n]) for n in plain)


@pytest.mark.parametrize("topology", ["sd15", "sdxl"])
def test_control_is_the_forward_written_out(
    extractor: Build, control: Build, images: torch.Tensor, topology: str
) -> None:
    fx = extractor(topology)
    first, second = control(fx.backbone), control(fx.backbone, seed=2)
    recipe = T.ControlNet(first, scale=0.7) + T.Prompt("a dog") + T.ControlNet(second, "image")
    found = recipe(fx, images, t=50, seed=3)
    latents = fx.encode_images(images)
    x_t = fx.schedule.add_noise(latents, fx.make_noise(latents, seed=3), 50)
    words = fx.encode_prompt("a dog")
    states = words.states.expand(3, -1, -1)
    times = torch.full((3,), 50)
    given: dict[str, Any] = {}
    if topology == "sdxl":
        ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(3, -1)
        text = words.pooled.expand(3, -1)
        given["added_cond_kwargs"] = {"text_embeds": text, "time_ids": ids}
    with torch.no_grad(), capture(fx.backbone, fx.layers) as cap:
        outs = [
            net(x_t, times, states, picture, conditioning_scale=scale, return_dict=False, **given)
            for net, picture, scale in ((first, canny(images), 0.7), (second, images, 1.0))
        ]
        down = [a + b for a, b in zip(outs[0][0], outs[1][0], strict=True)]
        assert len(outs[0][0]) == (9 if topology == "sdxl" else 12)
        fx.backbone(
            x_t, times, states,
            down_block_additional_residuals=down,
            mid_block_additional_residual=outs[0][1] + outs[1][1], **given,
        )  # fmt: skip
    for name in fx.layers:
        torch.testing.assert_close(found[name], cap.features[name])


def test_residuals_are_shared_only_where_all_is_the_same(
    extractor: Build, control: Build, images: torch.Tensor
) -> None:
    fx = extractor("sd15")
    net, other = control(fx.backbone), control(fx.backbone, seed=2)
    calls = []
    net.register_forward_pre_hook(lambda *a: calls.append(net))
    other.register_forward_pre_hook(lambda *a: calls.append(other))
    recipes = [
        T.Prompt("a") + T.ControlNet(net),
        T.ControlNet(net) + T.Prompt("a") + T.CFG(1.0),  # as the first
        T.Prompt("bb") + T.ControlNet(net),
        T.Prompt("a") + T.ControlNet(net, scale=0.5),
        T.Prompt("a") + T.ControlNet(net, "image"),
        T.Prompt("a") + T.ControlNet(other),
        T.Prompt("a") + T.ControlNet(net) + T.ControlNet(other),
        T.Prompt("a") + T.ControlNet(net, images=canny(images)),
        T.Prompt("a") + T.ControlNet(net) + T.PreDenoise(51),
    ]
    inputs = Inputs.prepare(fx, images)
    together = [recipe(fx, inputs=inputs) for recipe in recipes]
    assert len(calls) == 9 + 1 + 1 - 1  # a second net, a step of the walk; one that is shared
    for one, recipe in zip(together, recipes, strict=True):
        assert same(one, recipe(fx, images))
    assert same(together[0], together[1])
    assert not any(same(together[0], one) for one in together[2:7])
    begun = len(calls)
    recipes[0](fx, inputs=inputs, t=60)
    recipes[0](fx, inputs=inputs, seed=1)
    recipes[0](fx, inputs=inputs, draw=1)
    assert len(calls) == begun + 3


def test_order_is_that_of_the_sum(fx: FeatureExtractor, images: torch.Tensor) -> None:
    last = (T.Prompt("one") + T.Prompt("three"))(fx, images)
    assert same(last, T.Prompt("three")(fx, images))
    assert not same(last, (T.Prompt("three") + T.Prompt("one"))(fx, images))
    walk_first = (T.PreDenoise(52) + T.Prompt("three"))(fx, images)
    assert same(walk_first, (T.Prompt("three") + T.PreDenoise(52))(fx, images))
    assert repr(T.Prompt("a") + T.CFG(2.0)) == "Prompt(text='a') + CFG(scale=2.0)"


def test_captions_go_to_their_images(fx: FeatureExtractor, images: torch.Tensor) -> None:
    words = ["a", "bb", "ccc"]
    whole = T.Captions(words)(fx, images)
    by_id = T.Captions({"x": "a", "y": "bb", "z": "ccc"})
    named = by_id(fx, images, ids=["x", "y", "z"])
    called = T.Captions(lambda pixels: words)(fx, images, ids=["x", "y", "z"])
    assert same(named, called)
    for i, word in enumerate(words):
        single = T.Prompt(word)(fx, images[i : i + 1], ids=[i])
        for name in whole:
            torch.testing.assert_close(whole[name][i : i + 1], single[name], atol=1e-5, rtol=1e-5)
    for bad in (T.Captions(["a"]), T.Captions({"x": "a"}), T.Captions(lambda pixels: ["a"])):
        with pytest.raises(InputError, match="caption"):
            bad(fx, images)


def test_features_do_not_depend_on_the_batch(
    fx: FeatureExtractor, control: Build, images: torch.Tensor
) -> None:
    recipe = T.Prompt("a cat") + T.ControlNet(control(fx.backbone)) + T.PreDenoise(53)
    whole = recipe(fx, images, ids=["a", "b", "c"], seed=1)
    part = recipe(fx, images[[2, 0]], ids=["c", "a"], seed=1)
    for name in whole:
        torch.testing.assert_close(part[name], whole[name][[2, 0]], atol=2e-5, rtol=1e-4)
    inputs = Inputs.prepare(fx, images, ids=["a", "b", "c"])
    again = recipe(fx, inputs=inputs, seed=1)
    assert same(whole, again)
    # Edges and noise are there once for all recipes.
    assert list(inputs.shared) == [("start", "seeded", 1, 0, 50), ("control", "canny")]
    assert same(recipe(fx, inputs=inputs, seed=1), whole)


def test_anchor_and_candidate_share_their_noise(fx: FeatureExtractor, images: torch.Tensor) -> None:
    seen = []

    def spy(ctx: Any) -> Patch:
        seen.append(ctx.noise)
        return Patch()

    T.Callable(spy)(fx, images, seed=4, prompt="a")
    T.Callable(spy)(fx, images, seed=4, prompt="b", t=90)
    expected = fx.make_noise(fx.encode_images(images), seed=4)
    assert all(torch.equal(noise, expected) for noise in seen)


def test_the_walk_of_a_perfect_model_ends_on_the_same_noise(
    fx: FeatureExtractor, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def oracle(x: torch.Tensor, t: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(t)
        signal, scale = fx.schedule.signal_and_noise(t)
        return (x.double() - signal * latents.double()) / scale

    latents = fx.encode_images(images)
    noise = fx.make_noise(latents, seed=2)
    monkeypatch.setattr(fx, "predict", oracle)
    recipe = Recipe(T.PreDenoise(60))
    with recipe.applied(fx) as opened:
        inputs = Inputs.prepare(fx, images)
        ctx = recipe.conditioned(fx, opened, inputs, t=50, prompt="a", seed=2)
    assert calls == list(range(60, 50, -1))
    torch.testing.assert_close(
        ctx.x_t, fx.schedule.add_noise(latents, noise, 50), atol=1e-5, rtol=0
    )


def test_ensemble_inversion_and_guidance(fx: FeatureExtractor, images: torch.Tensor) -> None:
    together = T.NoiseEnsemble(3)(fx, images, prompt="a")
    expected = fx(images, "a", ensemble=3)
    for name in together:
        torch.testing.assert_close(together[name], expected[name])
    inverted = T.Inversion(3)(fx, images, prompt="a")
    x = fx.invert(fx.encode_images(images), 50, "a", steps=3)
    assert same(inverted, fx.run(x, 50, "a"))
    recipe = Recipe(T.Prompt("a cat"), T.CFG(3.0))
    inputs = Inputs.prepare(fx, images)
    with recipe.applied(fx) as opened:
        ctx = recipe.conditioned(fx, opened, inputs)
        x = ctx.x_t
        cond, free = fx.predict(x, 50, "a cat"), fx.predict(x, 50, "")
        torch.testing.assert_close(ctx.predict(x, 50), free + 3 * (cond - free))


def test_clean_backbone_exchanges_and_returns_the_weights(
    extractor: Build, images: torch.Tensor
) -> None:
    fx = extractor("sd15")
    before = {n: (p.data_ptr(), p.clone()) for n, p in fx.backbone.named_parameters()}
    torch.manual_seed(9)
    other = {n: torch.randn_like(p) * 0.1 for n, p in fx.backbone.named_parameters()}
    found = T.CleanBackbone(other)(fx, images, prompt="a")
    for name, p in fx.backbone.named_parameters():
        assert p.data_ptr() == before[name][0]
        assert torch.equal(p, before[name][1])
    fx.backbone.load_state_dict(other, strict=True)
    assert same(found, fx.run(fx.encode_images(images), 50, "a"))
    with pytest.raises(InputError, match="do not fit"):
        T.CleanBackbone({"x": torch.zeros(1)})(fx, images, prompt="a")


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(
    fx: FeatureExtractor, control: Build, images: torch.Tensor, fails: bool
) -> None:
    def break_it(ctx: Any) -> Patch:
        if fails:
            raise RuntimeError("in the middle")
        return Patch()

    before, state = tree(fx.backbone), {k: v.clone() for k, v in fx.backbone.state_dict().items()}
    flags = [p.requires_grad for p in fx.backbone.parameters()]
    processors = list(fx.backbone.attn_processors.values())
    names = list_activations(fx.backbone, maps=True, extra=True)
    recipe = T.ControlNet(control(fx.backbone)) + T.Callable(break_it)
    if fails:
        with pytest.raises(RuntimeError, match="middle"):
            recipe(fx, images, prompt="a")
    else:
        recipe(fx, images, prompt="a")
    assert tree(fx.backbone) == before
    assert all(torch.equal(v, state[k]) for k, v in fx.backbone.state_dict().items())
    assert [p.requires_grad for p in fx.backbone.parameters()] == flags
    assert list(fx.backbone.attn_processors.values()) == processors
    assert list_activations(fx.backbone, maps=True, extra=True) == names
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in fx.backbone.modules())


def test_control_does_not_reach_down_and_mid(
    fx: FeatureExtractor, control: Build, images: torch.Tensor
) -> None:
    layers = ["down-level1-repeat0-vit-out", "mid-vit-out", "up-level1-repeat0-vit-out"]
    recipe = Recipe(T.ControlNet(control(fx.backbone)))
    with pytest.warns(UserWarning, match="down-level1-repeat0-vit-out, mid-vit-out"):
        found = recipe(fx, images, prompt="a", layers=layers)
    plain = Recipe()(fx, images, prompt="a", layers=layers)
    equal = [torch.equal(found[n], plain[n]) for n in layers]
    assert equal == [True, True, False]


def test_recipes_of_two_threads_do_not_mix(fx: FeatureExtractor, images: torch.Tensor) -> None:
    torch.manual_seed(4)
    other = {n: torch.randn_like(p) * 0.1 for n, p in fx.backbone.named_parameters()}
    recipes = [Recipe(T.CleanBackbone(other)), Recipe(T.Prompt("a"))]
    alone = [r(fx, images, prompt="a") for r in recipes]
    together: dict[int, Any] = {}

    def work(i: int) -> None:
        for _ in range(3):
            together[i] = recipes[i](fx, images, prompt="a")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(together[i], alone[i]) for i in range(2))


def test_recipes_are_data(tmp_path: Any, fx: FeatureExtractor, images: torch.Tensor) -> None:
    import json

    import yaml

    recipe = T.Prompt("a cat") + T.ControlNet("some/id", scale=0.5) + T.PreDenoise(55)
    assert recipe.to_dict()[1] == {"technique": "ControlNet", "model": "some/id", "scale": 0.5}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    (tmp_path / "r.json").write_text(json.dumps(recipe.to_dict()))
    for file in ("r.yaml", "r.json"):
        assert repr(load_recipe(tmp_path / file)) == repr(recipe)
    with pytest.raises(InputError, match="cannot be written"):
        T.ControlNet(fx.backbone).to_dict()
    for content, message in (
        ("- {technique: Prmpt}", "accepted: CFG"),
        ("- {technique: Prompt, text: a, txt: b}", "txt"),
        ("a: [", "cannot be read"),
        ("just words", "list of techniques"),
    ):
        (tmp_path / "bad.yaml").write_text(content)
        with pytest.raises(InputError, match=message):
            load_recipe(tmp_path / "bad.yaml")


def test_bad_input_is_refused(
    fx: FeatureExtractor, extractor: Build, control: Build, images: torch.Tensor
) -> None:
    foreign = control(extractor("sdxl").backbone)
    with pytest.raises(IncompatibleControl, match=r"10 residuals .* takes 13"):
        T.ControlNet(foreign)(fx, images, prompt="a")
    from diffusers import DiTTransformer2DModel

    dit = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=4, num_layers=1,
        sample_size=8, norm_num_groups=4,
    )  # fmt: skip
    on_dit = FeatureExtractor(dit, scheduler=fx.schedule.scheduler, layers="vit-block0-out")
    latents = torch.rand(1, 3, 8, 8)
    with pytest.raises(UnsupportedTechnique, match="ControlNet cannot act on DiTTransformer2D"):
        T.ControlNet(control(fx.backbone))(on_dit, latents)
    net = control(fx.backbone)
    for recipe, message in (
        (T.ControlNet("nobody/nothing"), "cannot be loaded"),
        (T.ControlNet(net, lambda x: 3 * x), r"in \[0, 1\]"),
        (T.ControlNet(net, images=images[:2]), "2 control images for 3 images"),
        (T.ControlNet(net, "sobel"), "wants"),
        (T.PreDenoise(40), "after t=50"),
        (T.PreDenoise(1000), "0 to 999"),
    ):
        with pytest.raises(InputError, match=message):
            recipe(fx, images, prompt="a")
    with pytest.raises(InputError, match="needs a prompt"):
        Recipe()(fx, images)
    with pytest.raises(InputError, match="either images or inputs"):
        Recipe()(fx)
    with pytest.raises(InputError, match="canny"):
        T.ControlNet(net, "depth")
    with pytest.raises(InputError, match="1 and more"):
        T.NoiseEnsemble(0)
    with pytest.raises(InputError, match="2 ids"):
        Recipe()(fx, images, prompt="a", ids=["a", "b"])

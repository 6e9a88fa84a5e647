"""The report, the reconstruction gain and the repainting, each against loops or diffusers' own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from content_shift import Inputs, Recipe, ZeroAnchor, gate, shift_map
from content_shift import techniques as T
from content_shift.closeness import psnr
from content_shift.img2img import extractor_of
from diffeat import FeatureExtractor
from shared_core.errors import InputError

Build = Callable[..., Any]


@pytest.mark.smoke
@pytest.mark.parametrize("ref", ["plain", "same"])
def test_report_is_the_score_written_out(
    fx: FeatureExtractor, control: Build, images: torch.Tensor, ref: str
) -> None:
    net = control(fx.backbone)
    techniques = {"control": Recipe(T.ControlNet(net)), "nothing": Recipe(T.Prompt("a"))}
    report = gate.evaluate(
        fx, techniques, images, t=80, draws=2, ref=ref, prompt="a", batch_size=2, seed=3
    )
    recipe = techniques["control"]
    own = recipe if ref == "same" else Recipe()
    reference = own(fx, images, t=0, noise="none", prompt="a")
    assert [r["technique"] for r in report.table] == ["control"] * 4 + ["nothing"] * 4
    pooled = []
    for row, layer in zip(report.table, fx.layers, strict=False):
        scores, each = [], []
        for draw in (0, 1):
            anchor = Recipe()(fx, images, t=80, seed=3, draw=draw, prompt="a")[layer]
            mine = recipe(fx, images, t=80, seed=3, draw=draw, prompt="a")[layer]
            scores.append(float(gate.score(mine, reference[layer], anchor)))
            each.append(gate.score(mine, reference[layer], anchor, reduction="none"))
        assert row["layer"] == layer
        assert row["score"] == pytest.approx(sum(scores) / 2, abs=1e-4)
        assert row["std"] == pytest.approx(abs(scores[0] - scores[1]) / 2**0.5, abs=1e-4)
        found = torch.tensor(report.per_image["control"][layer])
        torch.testing.assert_close(found, torch.stack(each).mean(0), atol=1e-4, rtol=1e-4)
        pooled.append(row["score"])
    assert report.pooled[0]["score"] == pytest.approx(sum(pooled) / 4)
    assert report.pooled[1] == {
        "technique": "nothing", "score": 0.0, "std": 0.0, "gain": 0.0, "gain_std": 0.0,
    }  # fmt: skip
    gain = gate.reconstruction_gain(
        fx, recipe, images, 80, prompt="a", draws=2, seed=3, batch_size=3
    )
    assert report.pooled[0]["gain"] == pytest.approx(float(gain), abs=1e-4)
    assert report.rank() == sorted(
        ["control", "nothing"], key=lambda n: -{"control": sum(pooled), "nothing": 0}[n]
    )


def test_reconstruction_is_one_prediction(fx: FeatureExtractor, images: torch.Tensor) -> None:
    latents = fx.encode_images(images)
    x_t = fx.schedule.add_noise(latents, fx.make_noise(latents, seed=1), 100)
    abar = fx.schedule.alphas_cumprod[100].float()
    close = []
    for words in ("a cat", "a"):
        clean = (x_t - (1 - abar).sqrt() * fx.predict(x_t, 100, words)) / abar.sqrt()
        close.append(psnr(fx.decode(clean), images))
    gains = gate.reconstruction_gain(
        fx, T.Prompt("a cat"), images, prompt="a", seed=1, reduction="none"
    )
    torch.testing.assert_close(gains, close[0] - close[1], atol=1e-4, rtol=1e-4)
    for metric in ("ssim", "edge"):
        assert gate.reconstruction_gain(fx, T.CFG(1.0), images, 100, metric, prompt="a") == 0


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_features_and_estimate_come_from_one_forward(
    fx: FeatureExtractor, images: torch.Tensor, guidance: float
) -> None:
    recipe, calls = T.Prompt("a cat") + T.CFG(guidance), []
    inputs = Inputs.prepare(fx, images)
    handle = fx.backbone.register_forward_pre_hook(lambda *a: calls.append(1))
    with recipe.applied(fx) as opened:
        found, clean = recipe.features_and_estimate(
            fx, opened, inputs, layers=list(fx.layers), t=80, seed=2
        )
    handle.remove()
    assert len(calls) == (1 if guidance == 1 else 3)
    alone = recipe(fx, images, t=80, seed=2)
    assert list(found) == list(alone)
    assert all(torch.equal(found[name], alone[name]) for name in alone)
    with recipe.applied(fx) as opened:
        ctx = recipe.conditioned(fx, opened, inputs, t=80, seed=2)
        assert torch.equal(clean, ctx.clean_estimate())


def test_report_is_saved_and_drawn(
    fx: FeatureExtractor, images: torch.Tensor, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    report = gate.evaluate(
        fx, {"guided": T.CFG(5.0), "said": T.Prompt("a cat")}, images[:2], prompt="a", draws=1
    )
    report.save(tmp_path)
    written = json.loads((tmp_path / "gate.json").read_text())
    assert written["ranking"] == report.rank()
    assert written["pooled"][0]["score"] == 0  # guidance does not touch a single forward
    assert written["table"][0]["std"] is None
    assert (tmp_path / "gate.png").stat().st_size > 5_000
    assert set(report.rank("gain")) == {"guided", "said"}


def test_shift_map_sums_to_eq_1(fx: FeatureExtractor, images: torch.Tensor) -> None:
    layer = fx.layers[1]
    reference = Recipe()(fx, images[:1], t=0, noise="none", prompt="a")[layer]
    found = T.Prompt("a cat")(fx, images[:1], t=90, prompt="a")[layer]
    shown = shift_map(fx, images[0], 90, T.Prompt("a cat"), layer=layer, prompt="a")
    assert shown.shape == found.shape[-2:]
    torch.testing.assert_close(shown.sum()[None], gate.difference(found, reference))
    with pytest.raises(InputError, match="one image"):
        shift_map(fx, images, 90, prompt="a")


def test_repainting_is_diffusers_own(pipeline: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(pipeline)
    pipe.set_progress_bar_config(disable=True)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    fx = extractor_of(pipe)
    noise = fx.make_noise(fx.encode_images(images))
    found = gate.img2img(
        pipe, {"said": T.Prompt("a c"), "guided": T.Prompt("a c") + T.CFG(4.0)}, images,
        strength=0.6, steps=5, prompt="",
    )  # fmt: skip
    import diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img as theirs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theirs, "randn_tensor", lambda *a, **k: noise)
        patch.setattr(
            theirs, "retrieve_latents", lambda out, **k: out.latent_dist.mode()
        )  # they draw the latent
        for name, words, scale in (("none", "", 1.0), ("said", "a c", 1.0), ("guided", "a c", 4.0)):
            painted = pipe(
                [words] * 2, image=images, strength=0.6, num_inference_steps=5,
                guidance_scale=scale, output_type="pt", generator=torch.Generator(),
            ).images  # fmt: skip
            torch.testing.assert_close(found.pictures[name], painted, atol=1e-4, rtol=1e-4)
    assert [r["technique"] for r in found.rows] == ["none", "said", "guided"]
    assert found.rows[0]["psnr_gain"] == 0
    expected = float(psnr(found.pictures["said"], images).mean())
    assert found.rows[1]["psnr"] == pytest.approx(expected, abs=1e-4)
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    found.save(tmp_path)
    assert (tmp_path / "img2img.png").stat().st_size > 5_000
    assert json.loads((tmp_path / "img2img.json").read_text())["rows"][0]["ssim"] < 1


def test_bad_input_is_refused(fx: FeatureExtractor, images: torch.Tensor) -> None:
    with pytest.raises(ZeroAnchor, match="unet-after-conv-in"):
        gate.evaluate(
            fx, {"a": Recipe()}, images, t=0, layers=["unet-after-conv-in"], prompt="a",
            ref_t=0, reconstruction=False, draws=1,
        ) if _no_noise(fx) else None  # fmt: skip
    for call, message in (
        (lambda: gate.evaluate(fx, {}, images), "at least one technique"),
        (lambda: gate.evaluate(fx, {"a": T.CFG(1.0)}, images, ref="best"), "plain, same"),
        (lambda: gate.evaluate(fx, {"a": T.CFG(1.0)}, images[:0]), "at least one image"),
        (lambda: gate.img2img(fx, {}, images, strength=0.0), "strength"),
        (lambda: gate.img2img(3, {}, images), "neither"),
        (lambda: gate.reconstruction_gain(fx, T.CFG(1.0), images, reduction="sum"), "mean, none"),
    ):
        with pytest.raises(InputError, match=message):
            call()
    report = gate.evaluate(
        fx, {"a": T.CFG(1.0)}, images[:1], prompt="a", reconstruction=False, draws=1
    )
    with pytest.raises(InputError, match="by='gain'"):
        report.rank("gain")


def _no_noise(fx: FeatureExtractor) -> bool:
    """Make the extractor add no noise, so that anchor and reference coincide."""
    fx.make_noise = lambda *a, **k: None  # type: ignore[method-assign]
    return True

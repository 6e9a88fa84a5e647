"""The detector: the published stream rules, invariances, saving, errors, baselines."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from internet_neg import (
    InterNegConfig,
    InterNegDetector,
    InterNegError,
    MCMDetector,
    NegLabelDetector,
    NotFittedError,
    OpenClipEncoder,
    Vocabulary,
    admissible,
    deviation,
    grouped_score,
    invert_images,
    mcm_score,
)
from internet_neg.adapters import InterNegOOD
from internet_neg.transforms import load_transform
from shared_core.data.loading import ImageDataset

Unit = Callable[..., Tensor]
Make = Callable[..., InterNegDetector]


def images(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.smoke
@pytest.mark.parametrize("rescore", ["batch", "accepted"])
def test_the_stream_follows_algorithm_1(make_detector: Make, unit: Unit, rescore: str) -> None:
    detector = make_detector(rescore=rescore)
    config, encoder = detector.config, detector.encoder
    assert encoder is not None
    T, P, N = detector._T, detector._P, detector._N
    assert T is not None
    X, deltas = N[:0], torch.zeros(0)
    touched = 0
    for b, n in enumerate((5, 3, 9)):
        # Near some words and far from the classes, so that the gate sees both sides.
        v = F.normalize(N[torch.arange(n) % len(N)] + 0.1 * unit(n, 64, seed=b), dim=-1)
        v[0] = F.normalize(T[0] + 0.02 * v[0], dim=-1)
        S = grouped_score(v, T, torch.cat([N, X]), 20.0, config.groups)
        gated = config.beta >= S
        accepted = torch.zeros_like(gated)
        if gated.any():
            e = invert_images(
                encoder,
                v[gated],
                steps=config.inversion_steps,
                templates=config.templates,
                generator=torch.Generator().manual_seed(config.seed + b),
            )
            keep = admissible(e, T, P)
            accepted[gated] = keep
            X, deltas = torch.cat([X, e[keep]]), torch.cat([deltas, deviation(e[keep], T, P)])
            order = deltas.argsort(descending=True, stable=True)[: config.extra]
            X, deltas = X[order], deltas[order]
            again = grouped_score(v, T, torch.cat([N, X]), 20.0, config.groups)
            S = again if rescore == "batch" else torch.where(accepted, again, S)
        out = detector.predict(features=v)
        assert torch.equal(out.gated, gated)
        assert torch.equal(out.accepted, accepted)
        assert torch.allclose(out.score, S, atol=1e-4)
        assert torch.equal(out.pred, (v @ T.T).argmax(1))
        assert torch.allclose(detector.bank.deviations, deltas, atol=1e-5)
        touched += int(accepted.sum())
    assert touched > 8  # the bank was full
    assert len(detector.bank) == 8
    assert admissible(detector.bank.embeddings, T, P).all()
    assert (detector.bank.deviations.diff() <= 0).all()


def test_what_leaves_the_stream_alone(make_detector: Make, unit: Unit) -> None:
    v = unit(12, 64)
    detector = make_detector()
    plain = make_detector(text_only=True).predict(features=v)
    still = detector.predict(features=v, update=False)
    assert torch.equal(still.score, plain.score)
    assert torch.equal(make_detector(beta=0.0).predict(features=v).score, plain.score)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    shuffled = torch.cat(
        [detector.predict(features=x, update=False).score for x in v[order].split(5)]
    )
    assert torch.allclose(shuffled, plain.score[order], atol=1e-6)
    assert len(detector.bank) == 0
    assert not still.gated.any()


def test_prefixes_resets_and_other_detectors(make_detector: Make, unit: Unit) -> None:
    v, other = unit(20, 64), unit(20, 64, seed=9)
    one, two = make_detector(), make_detector()
    first = [one.predict(features=x).margin for x in v.split(4)]
    for x in v[:12].split(4):
        two.predict(features=x)
    bank = two.bank.embeddings.clone()
    make_detector().predict(features=other)  # shares no state
    rest = [two.predict(features=x).margin for x in other.split(4)]
    assert len(rest) == 5
    again = [one.reset().predict(features=v[:4]).margin]
    again += [one.predict(features=x).margin for x in v[4:].split(4)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    one.reset()
    for x in v[:12].split(4):
        one.predict(features=x)
    assert torch.equal(one.bank.embeddings, bank)


def test_the_transform_is_that_of_the_settings(make_detector: Make, mini: OpenClipEncoder) -> None:
    ramp = torch.arange(96).mul(2).byte().expand(64, 96)[:, :, None].repeat(1, 1, 3)
    picture = PIL.Image.fromarray(ramp.numpy())
    plain, cropped = make_detector(), make_detector(transform="openood")
    pixels = load_transform("openood", mini)(picture)[None]
    expected = plain.predict(pixels, update=False).margin
    assert torch.equal(cropped.predict([picture], update=False).margin, expected)
    assert not torch.equal(plain.predict([picture], update=False).margin, expected)
    source = {"red star": [picture], "blue bar": [picture]}
    proxies = cropped._proxies(source, cropped._T, None)
    assert torch.allclose(proxies[0], F.normalize(mini.encode_image(pixels), dim=-1)[0], atol=1e-6)


def test_the_percentile_is_that_of_the_settings(make_detector: Make) -> None:
    both = [make_detector(NegLabelDetector, percentile_mode=mode) for mode in ("linear", "index")]
    texts = [F.normalize(d.encoder.encode_text(
        [f"The nice {w}." for w, _ in d._words]), dim=-1) for d in both]  # fmt: skip
    for found, place in zip(texts, (0.95, 1.0), strict=True):
        # Of two classes, the index takes the larger cosine, the other mode goes 95 % of the way.
        cosines = (found @ both[0]._T.T).sort(dim=1).values
        rating = cosines[:, 0] + place * (cosines[:, 1] - cosines[:, 0])
        assert (rating.diff() >= -1e-6).all()


def test_streams_of_every_kind_of_batch(make_detector: Make, mini: OpenClipEncoder) -> None:
    pixels = images(6)
    pictures = [
        PIL.Image.fromarray((255 * x.permute(1, 2, 0)).round().byte().numpy()) for x in pixels
    ]
    exact = torch.stack([mini.preprocess(picture) for picture in pictures])
    labels = torch.zeros(3)
    kinds: list[list[Any]] = [
        [exact[:3], exact[3:]],
        [(exact[:3], labels), (exact[3:], labels)],
        [pictures[:3], pictures[3:]],
        [mini.encode_image(exact[:3]), mini.encode_image(exact[3:])],
    ]
    detector = make_detector()
    scores = [
        torch.cat([out.score for out in detector.reset().stream(batches)]) for batches in kinds
    ]
    for found in scores[1:]:
        assert torch.allclose(found, scores[0], atol=1e-5)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_images_of_every_mode_and_number(make_detector: Make, mode: str) -> None:
    detector = make_detector()
    assert detector.predict([PIL.Image.new(mode, (40, 20))]).score.shape == (1,)
    assert detector.predict(images(0)).score.shape == (0,)


@pytest.mark.smoke
def test_saved_and_restored_with_its_stream(
    make_detector: Make, mini: OpenClipEncoder, unit: Unit, tmp_path: Path
) -> None:
    detector = make_detector()
    v = unit(24, 64)
    detector.predict(features=v[:12])
    detector.calibrate(torch.linspace(0.2, 0.9, 20))
    detector.save_pretrained(tmp_path)
    other = InterNegDetector.from_pretrained(tmp_path, mini)
    assert other._words == detector._words
    assert torch.equal(other._N, detector._N)
    assert other.config == detector.config
    one, two = (d.predict(features=v[12:]) for d in (detector, other))
    assert torch.equal(one.margin, two.margin)
    assert torch.equal(one.is_id, two.is_id)
    without = InterNegDetector.from_pretrained(tmp_path)
    assert without.predict(features=v, update=False).score.shape == (24,)
    with pytest.raises(InterNegError, match="needs an encoder"):
        InterNegDetector.from_pretrained(tmp_path).predict(features=detector._N)


def test_saved_state_that_does_not_fit(
    make_detector: Make, make_open_clip: Callable[..., Any], mini: OpenClipEncoder, tmp_path: Path
) -> None:
    detector = make_detector()
    detector.save_pretrained(tmp_path)
    with pytest.raises(InterNegError, match="other weights"):
        InterNegDetector.from_pretrained(tmp_path, make_open_clip())
    with pytest.raises(InterNegError, match="holds a InterNeg, not a NegLabel"):
        NegLabelDetector.from_pretrained(tmp_path)
    state = detector.state_dict()
    with pytest.raises(InterNegError, match="has 2 classes, this detector 3"):
        InterNegDetector(mini, ["a", "b", "c"]).load_state_dict(state)
    with pytest.raises(InterNegError, match="64 dimensions, the encoder 24"):
        InterNegDetector(make_open_clip(), ["a", "b"]).load_state_dict(state)
    (tmp_path / "detector.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        InterNegDetector.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InterNegError, match="holds no detector"):
        InterNegDetector.from_pretrained(tmp_path)


def test_features_alone_are_enough(unit: Unit) -> None:
    T = unit(3, 10)
    P = F.normalize(T + 0.1 * unit(3, 10, seed=1), dim=-1)
    words = unit(40, 10, seed=2)
    config = InterNegConfig(text_only=True, negatives=10, groups=2)
    detector = InterNegDetector.from_features(
        T, 2 * P, words[:30], words[30:], scale=50.0, config=config
    )
    assert detector.predict(features=words[:4].half()).score.dtype == torch.float64
    v = unit(9, 10, seed=5)
    expected = grouped_score(v, T, detector._N, 50.0, 2)
    assert torch.allclose(detector.predict(features=3 * v).score, expected, atol=1e-6)
    named = detector.explain(v, k=2)[0]
    assert [len(named["known"]), len(named["negative"])] == [2, 2]
    assert named["known"][0][1] == pytest.approx((T @ v[0]).max().item(), abs=1e-6)
    Q = torch.linalg.qr(unit(10, 10, seed=7)).Q
    turned = InterNegDetector.from_features(
        T @ Q, P @ Q, words[:30] @ Q, words[30:] @ Q, scale=50.0, config=config
    )
    assert turned.negatives[0].word == detector.negatives[0].word
    assert torch.allclose(turned.predict(features=v @ Q).score, expected, atol=1e-5)
    with pytest.raises(InterNegError, match="needs an encoder"):
        InterNegDetector.from_features(T, P, words, config=InterNegConfig())
    with pytest.raises(InterNegError, match="the vocabulary has 1 nouns"):
        InterNegDetector.from_features(T, P, words, vocabulary=Vocabulary(("one",)))
    with pytest.raises(InterNegError, match="without an encoder"):
        detector.predict(images(1))
    with pytest.raises(InterNegError, match="make the detector by from_features"):
        detector.fit(P)


def test_the_known_classes_leave_the_vocabulary(make_detector: Make) -> None:
    detector = make_detector()
    assert sorted(detector.removed_words) == ["blue bar", "red star"]
    words = {text.word for text in detector.negatives}
    assert not words & {"blue bar", "red star"}
    deltas = [text.deviation for text in detector.negatives]
    assert deltas == sorted(deltas, reverse=True)


def test_proxies_of_every_source(mini: OpenClipEncoder, tmp_path: Path) -> None:
    names = ["red star", "blue bar"]
    config = InterNegConfig(groups=1, negatives=3, shots=2)

    def make(source: Any, **options: Any) -> Tensor:
        detector = InterNegDetector(mini, names, config, ["ring", "heart", "gear", "pink"])
        # The mini-CLIP is untrained: the proxies are looked at, not the choice.
        return detector._proxies(source, detector_texts, options.get("unlabelled"))

    detector_texts = F.normalize(mini.encode_text(names), dim=-1)
    pictures = [PIL.Image.new("RGB", (32, 32), color) for color in ("red", "blue")]
    for name, picture in zip(names, pictures, strict=True):
        (tmp_path / name).mkdir()
        picture.save(tmp_path / name / "one.png")
    features = mini.encode_image(torch.stack([mini.preprocess(p) for p in pictures]))
    expected = F.normalize(features, dim=-1)
    loader = torch.utils.data.DataLoader(
        [(mini.preprocess(p), i) for i, p in enumerate(pictures)], batch_size=2
    )
    sources: list[Any] = [
        tmp_path,
        str(tmp_path),
        {names[0]: [pictures[0]], names[1]: [tmp_path / "blue bar" / "one.png"]},
        {"features": features, "labels": torch.tensor([0, 1])},
        list(zip(pictures, [0, 1], strict=True)),
        ImageDataset(pictures, [0, 1], names),
        loader,
        features,
    ]
    for source in sources:
        assert torch.allclose(make(source), expected, atol=1e-5)
    with pytest.warns(UserWarning, match="texts stand in as proxies"):
        assert torch.equal(make("text"), detector_texts)
    with pytest.warns(UserWarning, match="confident images of the stream"):
        assert make("stream", unlabelled=features).shape == (2, 64)
    with pytest.raises(InterNegError, match="needs unlabelled images"):
        make("stream")


def test_baselines_behind_the_same_interface(
    make_detector: Make, unit: Unit, tmp_path: Path
) -> None:
    v = unit(8, 64)
    for cls in (MCMDetector, NegLabelDetector):
        saved = make_detector(cls, temperature=0.5)
        saved.save_pretrained(tmp_path)
        loaded = cls.from_pretrained(tmp_path)
        assert torch.equal(loaded.predict(features=v).margin, saved.predict(features=v).margin)
    mcm = make_detector(MCMDetector, temperature=None)
    assert torch.allclose(mcm.predict(features=v).score, mcm_score(v, mcm._T).double())
    assert torch.equal(mcm.predict(features=v).margin.argsort(), mcm_score(v, mcm._T).argsort())
    assert mcm.negatives == []
    neglabel = make_detector(NegLabelDetector)
    out = neglabel.predict(features=v)
    assert not out.gated.any()
    assert torch.allclose(out.score, grouped_score(v, neglabel._T, neglabel._N, 20.0, 2))
    assert [text.deviation for text in neglabel.negatives] == [None] * 12
    assert torch.equal(mcm.predict(features=v).pred, out.pred)


def test_the_pytorch_ood_adapter(make_detector: Make, unit: Unit) -> None:
    detector = make_detector(text_only=True)
    adapter = InterNegOOD(detector)
    v = unit(5, 64)
    assert torch.equal(adapter.predict_features(v), -detector.predict(features=v).score)
    pixels = images(4)
    assert torch.equal(adapter(pixels), -detector.predict(pixels).score)
    labels = torch.tensor([0, 1, 0, 1, 0])
    centers = torch.cat([detector._P, detector._P, detector._P[:1]])
    assert adapter.fit_features(centers, labels).detector is detector


def test_calibration_lets_the_share_pass(make_detector: Make, unit: Unit) -> None:
    detector = make_detector(text_only=True)
    v = unit(40, 64)
    out = detector.predict(features=v)
    assert out.is_id is None
    for tpr in (0.5, 0.95, 1.0):
        detector.calibrate(out, tpr)
        passed = detector.predict(features=v).is_id
        assert passed is not None
        assert passed.sum() >= tpr * 40
        assert passed.sum() <= tpr * 40 + 1
    detector.calibrate(out.score)
    again = detector.predict(features=v).is_id
    assert again is not None
    assert int(again.sum()) in (37, 38, 39)  # up to rounding of the score
    detector.calibrate(torch.ones(3))
    assert torch.tensor(detector.threshold).isfinite()
    for scores, tpr in (
        (torch.zeros(0), 0.95),
        (torch.tensor([float("nan")]), 0.95),
        (out.score, 0.0),
    ):
        with pytest.raises(InterNegError, match="0 < tpr <= 1"):
            detector.calibrate(scores, tpr)


def test_a_stream_of_known_images_warns(make_detector: Make, unit: Unit) -> None:
    detector = make_detector(max_gate_rate=0.0, beta=1.0, inversion_steps=1)
    with pytest.warns(UserWarning, match="100% of the stream's images"):
        detector.predict(features=unit(256, 64))
    detector.predict(features=unit(4, 64))  # once a stream


@pytest.mark.usefixtures("without_type_checks")
def test_errors(mini: OpenClipEncoder, make_detector: Make, unit: Unit) -> None:
    for names, message in (
        ([], "at least one string"),
        ("star", "at least one string"),
        (["a", " "], "class name 1 is ' '"),
        (["a", "b", "a"], "'a' comes twice"),
    ):
        with pytest.raises(InterNegError, match=message):
            InterNegDetector(mini, names)
    fresh = InterNegDetector(mini, ["star", "bar"], vocabulary=["ring", "star"])
    with pytest.raises(NotFittedError):
        fresh.predict(features=unit(1, 64))
    with pytest.raises(NotFittedError):
        fresh.state_dict()
    for source, message in (
        ({"features": unit(2, 64), "labels": torch.tensor([0, 5])}, "label 5 is none"),
        ({"features": unit(2, 64), "labels": torch.tensor([0, 0])}, "1 classes have no image: bar"),
        ({"features": unit(2, 64) * float("inf"), "labels": torch.tensor([0, 1])}, "NaN or inf"),
        ({"features": unit(2, 64), "labels": torch.tensor([0])}, "2 images but 1 labels"),
        ({"moon": []}, "'moon' is none of the 2 class names"),
        ("./nowhere", "there is no folder nowhere"),
        (unit(2, 32), "have 32 dimensions, but the class texts have 64"),
        (torch.zeros(2, 64), "zero vector in row 0"),
    ):
        with pytest.raises(InterNegError, match=message):
            fresh.fit(source)
    with pytest.raises(InterNegError, match=r"vocabulary 'nouns.txt'; accepted: wordnet"):
        InterNegDetector(mini, ["star"], vocabulary="nouns.txt").fit(unit(1, 64))
    with pytest.raises(InterNegError, match="groups=50 of 12 negative texts"):
        make_detector(groups=50)
    detector = make_detector()
    bad = unit(3, 64)
    bad[1, 1] = float("nan")
    for features, message in (
        (bad, "NaN or infinity, first in row 1"),
        (unit(2, 32), "32 dimensions"),
        (torch.zeros(2, 64), "zero vector"),
    ):
        with pytest.raises(InterNegError, match=message):
            detector.predict(features=features)
    with pytest.raises(InterNegError, match="either images or features"):
        detector.predict()
    with pytest.raises(InterNegError, match="is not there"):
        detector.predict(["nowhere.png"])


def test_odd_class_names_are_names(mini: OpenClipEncoder) -> None:
    names = ["set {a} {}", "Ärmel", "one"]
    detector = InterNegDetector(
        mini, names, InterNegConfig(groups=1, negatives=2), ["ring", "gear", "drop"]
    )
    with pytest.warns(UserWarning, match="texts stand in"):
        detector.fit("text")
    assert detector.predict(images(1)).pred.shape == (1,)


def test_one_class_is_enough(mini: OpenClipEncoder) -> None:
    detector = InterNegDetector(
        mini, ["star"], InterNegConfig(groups=1, negatives=2), ["ring", "gear", "drop"]
    )
    with pytest.warns(UserWarning, match="texts stand in"):
        detector.fit("text")
    assert detector.predict(images(2)).pred.tolist() == [0, 0]


def test_no_random_state_is_touched_and_nothing_heavy_is_loaded_early() -> None:
    # In a fresh process, because the type checks of these tests draw from `random` themselves.
    program = """
import random, sys
import numpy as np, torch
import internet_neg
assert "open_clip" not in sys.modules
from internet_neg.mini_clip import build_mini_clip
mini = build_mini_clip()
config = internet_neg.InterNegConfig(groups=1, negatives=3, beta=1.0, templates=("a {}",))
states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
images = torch.linspace(0, 1, 4 * 3 * 32 * 32).view(4, 3, 32, 32)
detector = internet_neg.InterNegDetector(mini, ["star", "bar"], config, ["ring", "gear", "drop"])
detector.fit(
    torch.nn.functional.normalize(mini.encode_text(["The nice star.", "The nice bar."]), dim=-1)
)
out = detector.predict(images)
assert out.gated.all()
assert torch.equal(torch.get_rng_state(), states[0])
assert random.getstate() == states[1]
assert (np.random.get_state()[1] == states[2]).all()
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.cuda
def test_cuda_scores_are_the_cpus(make_detector: Make, unit: Unit) -> None:
    v = unit(24, 64)
    detector = make_detector()
    expected = torch.cat([detector.predict(features=x).score for x in v.split(8)])
    assert detector.encoder is not None
    state = detector.reset().state_dict()
    try:
        detector.encoder.model.cuda()  # type: ignore[attr-defined]
        detector._templates = None
        detector.load_state_dict(state)
        found = torch.cat([detector.predict(features=x).score for x in v.cuda().split(8)])
        assert torch.allclose(found.cpu(), expected, atol=1e-4)
    finally:
        detector.encoder.model.cpu()  # type: ignore[attr-defined]

"""Invariants, over many drawn cases."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from diffeat import Schedule, Selection, capture, list_activations, seeded_noise
from diffeat._matching import match
from diffeat.filters import auto_candidates
from diffeat.presets import build_topology
from diffeat.probe import LinearProbe, cell_counts, nn_correspondence
from diffeat.segmentation import lovasz_softmax
from shared_core.testing import examples

cases = examples(15, suppress_health_check=list(HealthCheck))
SD15 = build_topology("sd15")
NAMES = [info.name for info in list_activations(SD15)]


@cases
@given(
    names=st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=5, unique=True),
    seed=st.integers(0, 2**40),
    draw=st.integers(0, 9),
    data=st.data(),
)
def test_noise_follows_the_sample(
    names: list[str], seed: int, draw: int, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(names))))
    whole = seeded_noise(names, (2, 3), seed=seed, draw=draw)
    part = seeded_noise([names[i] for i in order], (2, 3), seed=seed, draw=draw)
    assert torch.equal(part, whole[list(order)])
    assert len({tuple(row.flatten().tolist()) for row in whole}) == len(names)


@cases
@given(t=st.integers(0, 999), seed=st.integers(0, 99), flow=st.booleans())
def test_noise_keeps_variance_and_can_be_undone(t: int, seed: int, flow: bool) -> None:
    schedule = Schedule(FlowMatchEulerDiscreteScheduler() if flow else DDIMScheduler())
    signal, scale = schedule.signal_and_noise(t)
    assert signal + scale == pytest.approx(1) if flow else signal**2 + scale**2 == pytest.approx(1)
    generator = torch.Generator().manual_seed(seed)
    x, eps = torch.randn(2, 1, 3, 4, 4, generator=generator, dtype=torch.float64)
    noisy = schedule.add_noise(x, eps, t)
    torch.testing.assert_close(schedule.predict_clean(noisy, eps - x if flow else eps, t), x)


@cases
@given(chosen=st.lists(st.sampled_from(NAMES), min_size=1, max_size=9, unique=True))
def test_selections_come_in_order_of_execution(chosen: list[str]) -> None:
    found = Selection.parse(chosen).resolve(SD15)
    assert list(found) == [name for name in NAMES if name in set(chosen)]
    assert Selection.parse(dict.fromkeys(chosen, True)).resolve(SD15) == found


@cases
@given(
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    at=st.integers(0, 35),
    channel=st.integers(0, 3),
)
def test_tokens_lie_row_by_row_in_any_size(height: int, width: int, at: int, channel: int) -> None:
    """A token of a vision transformer's block, marked, is found where its patch is."""
    at %= height * width

    class Block(nn.Module):
        def forward(self, sample: torch.Tensor) -> torch.Tensor:
            tokens = torch.zeros(1, height * width, 4)
            tokens[0, at, channel] = 1
            return tokens

    from diffeat.capture import Capture
    from diffeat.naming import ActivationInfo

    model = nn.Sequential(Block())
    cap = Capture(model, ["module:0"], stop=False)
    cap.sources = [ActivationInfo("marked", "0", "block-out", grid="")]
    cap.names = ("marked",)
    with cap:
        model(torch.zeros(1, 1, height, width))
    assert cap.features["marked"].shape == (1, 4, height, width)
    assert cap.features["marked"][0].nonzero().tolist() == [[channel, at // width, at % width]]


@cases
@given(
    side=st.integers(2, 9),
    size=st.integers(2, 24),
    channels=st.integers(1, 9),
    seed=st.integers(0, 999),
    layers=st.integers(1, 3),
)
def test_matching_equals_enlarged_features(
    side: int, size: int, channels: int, seed: int, layers: int
) -> None:
    """Also where the map is not enlarged but made smaller."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(layers, 2, channels, side, side, generator=generator, dtype=torch.float64)
    where = torch.randint(size, (5, 2), generator=generator)
    found = match([(a, b) for a, b in maps], where, size)
    big = F.interpolate(maps.transpose(0, 1).flatten(1, 2), (size, size), mode="bilinear")
    a, b = F.normalize(big, dim=1)
    scores = torch.einsum("cn,cm->nm", a[:, where[:, 1], where[:, 0]], b.flatten(1))
    # Where pixels tie to rounding, either is right.
    best = scores.gather(1, (found[:, 1] * size + found[:, 0])[:, None])[:, 0]
    torch.testing.assert_close(best, scores.max(1).values, atol=1e-5, rtol=0)
    again = nn_correspondence(maps[0, :1].float(), maps[0, 1:].float(), where.float(), size=size)
    assert torch.equal(again.long(), match([(maps[0, 0], maps[0, 1])], where, size))


@cases
@given(
    cut=st.integers(1, 5),
    seed=st.integers(0, 99),
    scale=st.floats(1e-3, 1e3),
    classes=st.integers(2, 4),
)
def test_ridge_sums_add_up_and_do_not_mind_units(
    cut: int, seed: int, scale: float, classes: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 3, 4, 4, generator=generator)
    y = torch.randint(0, classes, (6, 8, 8), generator=generator)
    counts = cell_counts(y, classes, (4, 4))
    assert counts.sum() == y.numel()
    whole, first, rest, scaled = (LinearProbe(classes) for _ in range(4))
    whole.update(x, y)
    first.update(x[:cut], y[:cut])
    rest.update(x[cut:], y[cut:])
    first.merge(rest)
    scaled.update(x * scale, y)
    torch.testing.assert_close(first.solve()[0], whole.solve()[0])
    torch.testing.assert_close(scaled.solve()[0] * scale, whole.solve()[0], rtol=1e-4, atol=1e-6)
    assert torch.equal(scaled.predict(x * scale), whole.predict(x))
    tables = whole.confusion(x, y)
    torch.testing.assert_close(tables.sum(2), counts.sum((2, 3)))


@cases
@given(
    classes=st.integers(2, 4), n=st.integers(1, 12), seed=st.integers(0, 999), ignored=st.booleans()
)
def test_lovasz_is_the_extension_of_the_jaccard_loss(
    classes: int, n: int, seed: int, ignored: bool
) -> None:
    """Against its definition: errors in falling order, times what each adds to the set's loss."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(1, classes, 1, n, generator=generator, dtype=torch.float64).softmax(1)
    y = torch.randint(0, classes, (1, 1, n), generator=generator)
    if ignored:
        y[..., 0] = 255
    kept = [i for i in range(n) if y[0, 0, i] != 255]
    values = []
    for c in range(classes):
        truth = {i for i in kept if y[0, 0, i] == c}
        if not truth:
            continue
        error = {i: abs(float(i in truth) - float(p[0, c, 0, i])) for i in kept}
        total, before, wrong = 0.0, 0.0, set()
        for i in sorted(kept, key=lambda i: -error[i]):
            wrong.add(i)
            jaccard = 1 - len(truth - wrong) / len(truth | wrong)
            total += error[i] * (jaccard - before)
            before = jaccard
        values.append(total)
    assert float(lovasz_softmax(p, y)) == pytest.approx(np.mean(values) if values else 0, abs=1e-9)


@cases
@given(
    noise=st.lists(st.floats(0, 1), min_size=len(NAMES), max_size=len(NAMES)), top=st.floats(0, 1)
)
def test_auto_candidates_split_by_noise(noise: list[float], top: float) -> None:
    by_name = dict(zip(NAMES, noise, strict=True))
    for name in auto_candidates(SD15, by_name, noise_max=top):
        assert name.startswith("up")
        assert (by_name[name] > top) == name.endswith(("self-q", "self-k"))


def test_capture_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"), capture(nn.Linear(1, 1), []):
        pass

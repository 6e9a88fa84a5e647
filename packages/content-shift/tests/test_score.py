"""Eq. 1 and 2 against loops in float64, and their closed forms."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from content_shift import ZeroAnchor, gate
from content_shift.score import score_of_differences
from shared_core.errors import InputError
from shared_core.testing import examples

PADDED = {"replicate": "edge", "zero": "constant", "reflect": "reflect"}
OFFSETS = {
    "5pt": [(-1, 0), (1, 0), (0, -1), (0, 1)],
    "9pt": [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)],
}


def by_hand(f: np.ndarray, ref: np.ndarray, padding: str, kernel: str, normalize: bool) -> float:
    """Eq. 1 of one image, in numpy, from the second differences of every channel."""

    def lines(x: np.ndarray) -> np.ndarray:
        if normalize:
            x = x / ref.std((1, 2), keepdims=True)
        big = np.pad(x, ((0, 0), (1, 1), (1, 1)), PADDED[padding])
        h, w = x.shape[1:]
        total = np.zeros_like(x)
        for i, j in OFFSETS[kernel]:
            total += big[:, 1 + i : 1 + i + h, 1 + j : 1 + j + w] - x
        return np.sqrt((total**2).sum(0))

    return float(np.abs(lines(ref) - lines(f)).sum())


@pytest.mark.smoke
@pytest.mark.parametrize("padding", list(PADDED))
@pytest.mark.parametrize("kernel", list(OFFSETS))
@pytest.mark.parametrize("normalize", [None, "channel"])
def test_equals_an_independent_computation(
    padding: str, kernel: str, normalize: str | None
) -> None:
    torch.manual_seed(0)
    f, ref, anchor = torch.randn(3, 2, 5, 7, 6, dtype=torch.float64).unbind()
    own = [
        [by_hand(x[i].numpy(), ref[i].numpy(), padding, kernel, normalize is not None)
         for i in range(2)]
        for x in (f, anchor)
    ]  # fmt: skip
    options = {"padding": padding, "kernel": kernel, "normalize": normalize}
    single = gate.score(f, ref, anchor, **options, reduction="none")
    for i in range(2):
        assert float(single[i]) == pytest.approx((own[1][i] - own[0][i]) / own[1][i], abs=1e-9)
    both = (sum(own[1]) - sum(own[0])) / sum(own[1])
    assert float(gate.score(f, ref, anchor, **options)) == pytest.approx(both, abs=1e-9)
    rounded = gate.score(f.float(), ref.float(), anchor.float(), **options)
    assert float(rounded) == pytest.approx(both, abs=1e-5)


@given(st.floats(-3, 4, width=32), st.integers(0, 99))
@examples(20)
def test_closed_forms(k: float, seed: int) -> None:
    torch.manual_seed(seed)
    ref, anchor = torch.randn(2, 2, 3, 6, 6, dtype=torch.float64).unbind()
    assert float(gate.score(ref, ref, anchor)) == 1
    assert float(gate.score(anchor, ref, anchor)) == 0
    total = gate.contours(ref).sum((1, 2))
    expected = 1 - abs(1 - abs(k)) * total / gate.difference(anchor, ref)
    torch.testing.assert_close(gate.score(ref * k, ref, anchor, reduction="none"), expected)
    # A constant added to a channel has no contours; order in the batch does not matter.
    offset = torch.randn(1, 3, 1, 1, dtype=torch.float64)
    assert float(gate.score(ref + offset, ref, anchor)) == pytest.approx(1, abs=1e-9)
    f = torch.randn_like(ref)
    flipped = gate.score(f.flip(0), ref.flip(0), anchor.flip(0), reduction="none")
    torch.testing.assert_close(flipped.flip(0), gate.score(f, ref, anchor, reduction="none"))


def test_laplacian_of_ramps_and_deltas() -> None:
    rows, columns = torch.arange(6.0)[:, None], torch.arange(7.0)
    ramp = (2 * rows - 3 * columns + 1)[None, None]
    for kernel in OFFSETS:
        assert gate.laplacian(ramp, kernel=kernel)[..., 1:-1, 1:-1].abs().max() == 0
    delta = torch.zeros(1, 1, 5, 5)
    delta[..., 2, 2] = 1
    assert gate.laplacian(delta)[0, 0, 1:4, 1:4].tolist() == [[0, 1, 0], [1, -4, 1], [0, 1, 0]]


def test_a_moved_feature_scores_lower() -> None:
    torch.manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.randn(1, 4, 6, 6), (24, 24), mode="bicubic")
    anchor = smooth + torch.randn_like(smooth)
    scores = [float(gate.score(smooth.roll(s, 3), smooth, anchor)) for s in range(4)]
    assert scores[0] == 1
    assert all(s < 1 for s in scores[1:])


def test_half_precision_is_summed_in_single() -> None:
    torch.manual_seed(0)
    ref, anchor, f = (100 * torch.randn(3, 1, 64, 16, 16)).half().unbind()
    whole = gate.score(f.float(), ref.float(), anchor.float())
    assert gate.score(f, ref, anchor).dtype == torch.float32
    assert float(gate.score(f, ref, anchor)) == float(whole)
    assert gate.difference(f, ref).isfinite().all()  # in half precision these sums overflow


@pytest.mark.usefixtures("without_type_checks")
def test_bad_input_is_refused() -> None:
    x, y = torch.randn(2, 1, 2, 4, 4).unbind()
    with pytest.raises(ZeroAnchor, match="divide by zero"):
        gate.score(y, x, x)
    assert issubclass(ZeroAnchor, ValueError)
    with pytest.raises(InputError, match="negative or NaN"):
        score_of_differences(torch.ones(1), torch.tensor([float("nan")]))
    for call in (
        lambda: gate.score(x, y, y[..., :3]),
        lambda: gate.score(x * float("nan"), y, y),
        lambda: gate.laplacian(x, kernel="7pt"),
        lambda: gate.laplacian(x, padding="wrap"),
        lambda: gate.laplacian(x[..., :1], padding="reflect"),
        lambda: gate.difference(x, y, normalize="layer"),
        lambda: gate.score(x, y, x, reduction="sum"),
    ):
        with pytest.raises(InputError):
            call()

"""The baseline policies against their published update rules, written out row by row."""

import numpy as np
import pytest

import lede
from lede.policies import Observation


def seen(rows: np.ndarray, p1: np.ndarray, layer: int = 2) -> Observation:
    """An observation in which nothing but p₁ matters."""
    other = np.ones(len(rows))
    return Observation(
        rows=rows,
        layer=np.full(len(rows), layer),
        index=np.ones(len(rows)),
        p1=p1,
        margin=other,
        entropy=other,
        agree=other,
        ema=other,
        prefix=other,
        last_accepted=other,
    )


def test_draft_and_verify_follows_its_rule() -> None:
    """M ← 0.5 M + 0.5 m, then θ moves a tenth of 0.01 up while M < 0.9, else down."""
    rng = np.random.default_rng(0)
    policy = lede.DraftVerifyPolicy(2, threshold=0.8)
    policy.reset(3, (2, 4), 8, 12)
    theta, matched = [0.8] * 3, [0.9] * 3
    directions = set()
    for turn in range(200):
        chosen = np.flatnonzero(rng.random(3) < 0.7)
        drafted = rng.integers(0, 13, size=len(chosen))
        good = 1.0 if turn < 100 else 0.3
        accepted = np.array([rng.binomial(d, good) for d in drafted], dtype=np.int64)
        policy.end_round(chosen, accepted, drafted, None)
        for row, a, d in zip(chosen, accepted, drafted, strict=True):
            if d == 0:
                continue  # nothing was judged
            matched[row] = 0.5 * matched[row] + 0.5 * a / d
            wanted = theta[row] + (0.01 if matched[row] < 0.9 else -0.01)
            directions.add(wanted > theta[row])
            theta[row] = 0.9 * theta[row] + 0.1 * wanted
        for row in range(3):
            for p1, sign in ((theta[row] + 1e-9, 1.0), (theta[row] - 1e-9, -1.0)):
                answer = policy.keep_drafting(seen(np.array([row]), np.array([p1])))
                assert answer.tolist() == [sign]
    assert directions == {True, False}
    policy.reset(1, (2, 4), 8, 12)
    assert policy.keep_drafting(seen(np.array([0]), np.array([0.8]))).tolist() == [1.0]


def test_del_takes_the_most_tokens_per_layer() -> None:
    """α by a moving average of the shares; exit and length by trying all of them."""
    rng = np.random.default_rng(1)
    exits, depth, longest, decay = (2, 3, 5), 8, 6, 0.8
    policy = lede.DELPolicy(0.3, decay=decay)
    policy.reset(2, exits, depth, longest)
    alpha = [[0.8] * 3, [0.8] * 3]
    chosen_pairs = set()
    for _ in range(60):
        rows = np.flatnonzero(rng.random(2) < 0.8)
        shares = np.sort(rng.random((len(rows), 3)) ** 0.5, 1)
        nothing = np.zeros(len(rows), dtype=np.int64)
        policy.end_round(rows, nothing, nothing, shares)
        for row, share in zip(rows, shares, strict=True):
            alpha[row] = [
                decay * a + (1 - decay) * s for a, s in zip(alpha[row], share, strict=True)
            ]
        policy.start_round(np.zeros(2))
        for row in range(2):
            best, pair = -1.0, (0, 0)
            for j, exit_layer in enumerate(exits):
                for d in range(1, longest + 1):
                    tokens = sum(alpha[row][j] ** i for i in range(d + 1))
                    # d + 1 early passes, then the late layers once for all of them
                    rate = tokens / ((d + 1) * exit_layer + depth - exit_layer)
                    if rate > best + 1e-12:
                        best, pair = rate, (exit_layer, d)
            chosen_pairs.add(pair)
            one = np.array([row])
            assert policy.max_drafts(one, one).tolist() == [pair[1]]
            leaves = [policy.choose_exit(seen(one, one, e))[0] > 0 for e in exits]
            assert leaves == [e >= pair[0] for e in exits]
    assert len(chosen_pairs) > 3
    assert policy.keep_drafting(seen(np.arange(2), np.array([0.3, 0.29]))).tolist() == [1.0, -1.0]


def test_thresholds() -> None:
    rows, p1 = np.arange(3), np.array([0.49, 0.5, 0.9])
    lite = lede.ConfidenceExitPolicy([0.9, 0.5], draft_threshold=0.6)
    lite.reset(3, (2, 4), 8, 12)
    assert lite.choose_exit(seen(rows, p1, 2)).tolist() == [-1.0, -1.0, 1.0]
    assert lite.choose_exit(seen(rows, p1, 4)).tolist() == [-1.0, 1.0, 1.0]
    assert lite.keep_drafting(seen(rows, p1)).tolist() == [-1.0, -1.0, 1.0]
    plain = lede.ConfidencePolicy(2, 0.5)
    assert plain.keep_drafting(seen(rows, p1)).tolist() == [-1.0, 1.0, 1.0]
    product = seen(rows, p1)
    product.prefix = np.array([1.0, 0.9, 0.6])
    assert lede.ConfidencePolicy(2, 0.5, product=True).keep_drafting(product).tolist() == [
        -1.0,
        -1.0,
        1.0,
    ]
    with pytest.raises(Exception, match="1 thresholds for 2 exit layers"):
        lede.ConfidenceExitPolicy([0.5]).reset(1, (2, 4), 8, 12)

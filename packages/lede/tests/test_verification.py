"""Sampled output is distributed as the target's own, whatever the policy."""

from typing import Any

import numpy as np
import pytest
import torch

import lede
from lede import LayerRunner, SelfSpeculativeDecoder
from lede._rounds import Rounds
from lede.features import confidence_features
from lede.qpolicy import PROBE_STATE
from lede.testing import tiny_model
from lede.verification import residual_distribution, verify_greedy, verify_sampled


def test_greedy_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    predictions = torch.randint(3, (50, 6), generator=generator)
    drafts = torch.randint(3, (50, 5), generator=generator)
    counts = torch.randint(6, (50,), generator=generator)
    accepted, final = verify_greedy(predictions, drafts, counts)
    for b in range(50):
        a = 0
        while a < counts[b] and drafts[b, a] == predictions[b, a]:
            a += 1
        assert (accepted[b], final[b]) == (a, predictions[b, a])


@pytest.mark.smoke
def test_sampled_tokens_follow_the_target() -> None:
    """Two drafts: joint distribution of the committed tokens, and the chance to accept."""
    rows, v = 200_000, 6
    generator = torch.Generator().manual_seed(0)
    p = torch.softmax(torch.randn(3, v, generator=generator), -1)
    q = torch.softmax(torch.randn(2, v, generator=generator), -1)
    drafts = torch.stack(
        [torch.multinomial(q[i].expand(rows, v), 1, generator=generator)[:, 0] for i in range(2)], 1
    )
    accepted, final = verify_sampled(
        p.expand(rows, 3, v), q.expand(rows, 2, v), drafts, torch.full((rows,), 2), generator
    )
    alpha = [torch.minimum(p[i], q[i]).sum().item() for i in range(2)]
    shares = [(accepted >= 1).float().mean().item(), (accepted == 2).float().mean().item()]
    assert shares[0] == pytest.approx(alpha[0], abs=0.005)
    assert shares[1] == pytest.approx(alpha[0] * alpha[1], abs=0.005)
    first = torch.where(accepted > 0, drafts[:, 0], final)
    counts = torch.bincount(first, minlength=v).double()
    chi = ((counts - rows * p[0]) ** 2 / (rows * p[0])).sum()
    assert chi < 25  # the 99.99 % quantile at 5 degrees of freedom is 25.7
    second = torch.where(accepted > 1, drafts[:, 1], final)[accepted > 0]
    counts = torch.bincount(second, minlength=v).double()
    chi = ((counts - len(second) * p[1]) ** 2 / (len(second) * p[1])).sum()
    assert chi < 25
    third = torch.bincount(final[accepted == 2], minlength=v).double()
    total = third.sum()
    assert ((third - total * p[2]) ** 2 / (total * p[2])).sum() < 25


def test_residual_and_equal_distributions() -> None:
    p, q = torch.tensor([[0.2, 0.5, 0.3]]), torch.tensor([[0.5, 0.1, 0.4]])
    torch.testing.assert_close(residual_distribution(p, q), torch.tensor([[0.0, 1.0, 0.0]]))
    torch.testing.assert_close(residual_distribution(p, p), p)
    same = p.expand(1000, 3, 3), p.expand(1000, 2, 3)
    drafts = torch.randint(3, (1000, 2))
    accepted, _ = verify_sampled(*same, drafts, torch.full((1000,), 2))
    assert (accepted == 2).all()


SAMPLED: dict[str, Any] = {
    "static": lambda: lede.StaticPolicy(1, 2),
    "confidence": lambda: lede.ConfidencePolicy(2, 0.4),
    "confidence_exit": lambda: lede.ConfidenceExitPolicy(0.5, 0.3),
    "draft_verify": lambda: lede.DraftVerifyPolicy(1, 0.4),
    "del": lambda: lede.DELPolicy(0.3),
    "autoregressive": lede.AutoregressivePolicy,
    "q": lambda: _random_q(),
    "probe": lambda: _random_q(probe=8),
    "probe_of_tables": lambda: _random_q(probe=9),
}


def _random_q(*, probe: int = 0) -> lede.QPolicy:
    generator = np.random.default_rng(0)
    spec = lede.StateSpec(PROBE_STATE) if probe else lede.StateSpec()
    width = len(spec.names)
    shapes = {"w1": (width, 8), "b1": 8, "w2": (8, 8), "b2": 8, "w3": (8, 8), "b3": 8}
    weights = {k: generator.normal(size=s) for k, s in shapes.items()}
    weights["w3"] *= 0.2
    weights["b3"][[3, 7]] = -10.0  # the advantage of stopping: lean towards drafting
    eye = {"w1": (2, probe, 4), "b1": (2, 4), "w2": (2, 4, 2), "b2": (2, 2)}
    seen = lede.AcceptanceProbe({k: generator.normal(size=s) for k, s in eye.items()})
    return lede.QPolicy(weights, (1, 2), 3, 3, spec, probe=seen if probe else None)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("static", {"temperature": 1.0}),
        ("confidence", {"temperature": 1.5, "top_k": 4}),
        ("confidence_exit", {"temperature": 1.0}),
        ("draft_verify", {"temperature": 0.3}),
        ("del", {"temperature": 1.0}),
        ("autoregressive", {"temperature": 1.0}),
        ("q", {"temperature": 1.5, "top_p": 0.8}),
        ("probe", {"temperature": 1.0}),
    ],
)
def test_sampled_generation_has_the_models_joint_marginals(
    name: str, settings: dict[str, float]
) -> None:
    """The first three tokens, against the model's own probabilities after the same processors."""
    from transformers import GenerationConfig, LogitsProcessorList

    model = tiny_model(layers=3, vocab=8, hidden=8, sharpness=30.0)
    prompt = torch.tensor([[1, 2]])
    rows = 20_000
    settings = {"top_k": 0, **settings}
    torch.manual_seed(0)
    decoder = SelfSpeculativeDecoder(
        model, (1, 2), policy=SAMPLED[name](), max_draft=3, min_active=0.0
    )
    out = decoder.generate(
        prompt.expand(rows, 2), max_new_tokens=3, do_sample=True, pad_token_id=0, **settings
    )
    drafted = out.stats.drafted
    assert drafted == 0 if name == "autoregressive" else drafted > rows / 4
    found = torch.zeros(8, 8, 8)
    found.index_put_(tuple(out.sequences[:, 2:].T), torch.ones(rows), accumulate=True)
    processors = LogitsProcessorList(
        model._get_logits_processor(GenerationConfig(do_sample=True, **settings), 2)
    )

    def chance(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return torch.softmax(processors(ids, model(ids).logits[:, -1].float()), -1)

    first = chance(prompt)[0]
    pairs = torch.cat([prompt.expand(8, 2), torch.arange(8)[:, None]], 1)
    second = chance(pairs)
    triples = torch.cat([pairs.repeat_interleave(8, 0), torch.arange(8).repeat(8)[:, None]], 1)
    expected = first[:, None, None] * second[..., None] * chance(triples).view(8, 8, 8)
    assert found[expected == 0].sum() == 0
    common = expected * rows >= 5
    counts, means = found[common], expected[common] * rows
    chi = ((counts - means) ** 2 / means).sum().item()
    degrees = int(common.sum())
    assert chi < degrees + 4.5 * (2 * degrees) ** 0.5 + 5
    # A multinomial count is off its mean by sqrt(2 n p (1 - p) / pi) on average.
    noise = (2 * expected * (1 - expected) / (torch.pi * rows)).sqrt().sum() / 2
    assert (found / rows - expected).abs().sum() / 2 < 1.5 * noise


class Tables(LayerRunner):
    """A model whose exits are tables of logits by the last token: what is slow here is sampling."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(3, 8, 8, generator=generator)
        self.tables = 1.5 * noise[2] + torch.tensor([1.0, 0.6, 0.0])[:, None, None] * noise
        self.depth = 3

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def prepare(self) -> None:
        pass

    def frame(self, starts: Any, width: int, padding: Any, cache: Any) -> Any:
        return None

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(ids[..., None].float(), (0, 8))

    def run(self, hidden: torch.Tensor, first: int, last: int, frame: Any, cache: Any) -> Any:
        ids = hidden[..., :1]
        return torch.cat([ids, self.tables[last - 1][ids[..., 0].long()]], -1)

    def normalize(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    def head(self, normed: torch.Tensor) -> torch.Tensor:
        return normed[..., 1:]


@pytest.mark.parametrize(
    ("name", "temperature", "top"),
    [
        ("static", 1.0, 8),
        ("confidence", 1.5, 4),
        ("confidence_exit", 1.0, 8),
        ("draft_verify", 0.3, 8),
        ("del", 1.0, 8),
        ("autoregressive", 1.0, 8),
        ("q", 1.5, 5),
        ("probe_of_tables", 1.0, 8),
    ],
)
def test_joint_marginals_of_200_000_rows(name: str, temperature: float, top: int) -> None:
    """One, two and three tokens: chi-square and total variation against the exact chain."""
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper

    rows, runner, policy = 200_000, Tables(), SAMPLED[name]()
    processors = LogitsProcessorList([TemperatureLogitsWarper(temperature), TopKLogitsWarper(top)])
    rounds = Rounds(
        runner,
        policy,
        (1, 2),
        3,
        torch.ones(rows, 1, dtype=torch.long),
        np.zeros(rows, dtype=np.int64),
        4,
        sample=True,
        processors=processors,
        generator=torch.Generator().manual_seed(0),
        min_active=0.0,
    )
    while not rounds.done.all():
        rounds.step()
    drafted = rounds.tokens_made - sum(map(len, rounds._told))  # accepted ones: a round adds one
    assert drafted == 0 if policy.autoregressive else drafted > rows / 10
    step = torch.softmax(processors(torch.zeros(8, 1, dtype=torch.long), runner.tables[2]), -1)
    exact = step[1][:, None, None] * step[:, :, None] * step[None]
    found = torch.zeros(8, 8, 8)
    found.index_put_(tuple(torch.from_numpy(rounds.tokens[:, 1:].T)), torch.ones(rows), True)
    for p, n in (
        (exact, found),
        (exact.sum(2), found.sum(2)),
        (exact.sum((1, 2)), found.sum((1, 2))),
    ):
        assert n[p == 0].sum() == 0
        common = p * rows >= 5
        chi = ((n - p * rows)[common] ** 2 / (p * rows)[common]).sum().item()
        degrees = int(common.sum())
        assert chi < degrees + 4.5 * (2 * degrees) ** 0.5 + 5
        noise = (2 * p * (1 - p) / (torch.pi * rows)).sqrt().sum() / 2
        assert (n / rows - p).abs().sum() / 2 < 1.7 * noise + 1e-4


def test_features_of_extreme_logits() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf], [3.0, 3.0, 3.0]], dtype=torch.float64)
    features, top = confidence_features(logits)
    q = np.exp([0.0, 1.0]) / np.exp([0.0, 1.0]).sum()
    entropy = -(q * np.log(q)).sum() / np.log(3)
    np.testing.assert_allclose(features[0], [q[1], q[1] - q[0], entropy], rtol=1e-6)
    np.testing.assert_allclose(features[1], [1 / 3, 0.0, 1.0], rtol=1e-6, atol=1e-7)
    assert top.tolist() == [1, 0]
    large, _ = confidence_features(torch.zeros(1, 150_000, dtype=torch.float16))
    assert large[0, 2] == pytest.approx(1.0, abs=1e-4)
    assert confidence_features(torch.full((1, 4), torch.nan))[0].isnan().all()

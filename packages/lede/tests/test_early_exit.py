"""The recipe's formulas, and that it does what it is for."""

import pytest
import torch

from lede.early_exit import (
    EarlyExitConfig,
    active_exits,
    early_exit_loss,
    exit_loss_weights,
    layer_dropout_rates,
)
from lede.testing import tiny_model


def test_dropout_rates_by_formula() -> None:
    rates = layer_dropout_rates(8, EarlyExitConfig(p_max=0.2))
    for i in range(8):
        assert rates[i] == pytest.approx(0.2 * (2 ** (i / 7) - 1))
    scratch = EarlyExitConfig(p_max=0.2, dropout_schedule="exponential")
    assert layer_dropout_rates(8, scratch, 0, 11).sum() == 0
    assert layer_dropout_rates(8, scratch, 5, 11)[7] == pytest.approx(0.2 * (2**0.5 - 1))
    torch.testing.assert_close(layer_dropout_rates(8, scratch, 10, 11), rates)


def test_loss_weights_by_formula() -> None:
    config = EarlyExitConfig(e_scale=0.3)
    for active in (torch.ones(6, dtype=torch.bool), active_exits(6, config, 1, 10)):
        raw = [0.3 * sum(range(i + 1)) for i in range(5)] + [5 + 0.3 * sum(range(5))]
        raw = [w * bool(a) for w, a in zip(raw, active, strict=True)]
        expected = torch.tensor(raw, dtype=torch.float64) / sum(raw)
        torch.testing.assert_close(exit_loss_weights(6, config, active), expected)


def test_curricula() -> None:
    rotational = EarlyExitConfig(rotation=3)
    seen = sum(active_exits(9, rotational, s, 9).int() for s in range(3))
    assert seen.tolist() == [1] * 8 + [3]
    gradual = EarlyExitConfig(curriculum="gradual")
    assert active_exits(4, gradual, 0, 100).tolist() == [False, False, False, True]
    assert active_exits(4, gradual, 25, 100).tolist() == [False, True, True, True]
    assert active_exits(4, gradual, 99, 100).all()


@pytest.mark.smoke
def test_loss_is_the_weighted_sum_of_cross_entropies() -> None:
    model = tiny_model("gemma2", dtype=torch.float64)
    ids = torch.randint(64, (2, 9))
    labels = ids.clone()
    labels[0, :3] = -100
    config = EarlyExitConfig(e_scale=0.5, curriculum="all")
    loss = early_exit_loss(model, ids, labels, config)
    out = model(ids, output_hidden_states=True)
    weights = exit_loss_weights(4, config, torch.ones(4, dtype=torch.bool))
    expected = 0.0
    for i in range(4):
        if i == 3:
            logits = out.logits
        else:
            logits = model.lm_head(model.model.norm(out.hidden_states[i + 1]))
            logits = 300 * torch.tanh(logits / 300)
        expected += weights[i] * torch.nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, 64), labels[:, 1:].reshape(-1)
        )
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_dropped_samples_skip_the_layer() -> None:
    model = tiny_model().train()
    ids = torch.randint(64, (400, 3))
    config = EarlyExitConfig(p_max=0.5, curriculum="gradual")
    torch.manual_seed(0)
    seen: list[torch.Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda m, a: seen.append(a[0].detach()))
    with torch.no_grad():
        early_exit_loss(model, ids, ids, config)
        out = model.model(ids, output_hidden_states=True).hidden_states
    same = (seen[0] - out[3]).abs().flatten(1).max(1).values < 1e-6  # only the last layer skipped
    assert 0.1 < same.float().mean() < 0.5
    model.eval()
    hooks = model.model.layers[0]._forward_hooks.values()
    assert not [h for h in hooks if "_layers_watched" in h.__qualname__]


@pytest.mark.parametrize(
    "change",
    [
        {"p_max": 1.0},
        {"e_scale": -1.0},
        {"curriculum": "random"},
        {"rotation": 0},
        {"dropout_schedule": "linear"},
    ],
)
def test_bad_settings(change: dict[str, float | str]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        EarlyExitConfig(**change)

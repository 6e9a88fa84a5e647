"""What the published code gets wrong, each with a test that would catch it here.

The axes' factors and the NaN gradients have their tests in test_divergence.py, the denominators
under accumulation and over processes in test_trainer.py.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from abkd import (
    DIVERGENCES,
    ab_divergence,
    distillation_loss,
    divergence,
    fused_linear_ab_divergence,
)
from abkd.presets import PRESETS
from abkd.sparse import sparse_distillation_loss
from abkd.vision import DistillationLoss, dkd_loss, lsd_loss, ttm_loss

pytestmark = [pytest.mark.smoke, pytest.mark.filterwarnings("ignore:alpha=.*outside")]
AXES = [(0.0, 1.0), (0.7, 0.0), (0.0, 0.4), (0.5, -0.5), (0.0, 0.0)]


def draw(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g), torch.randn(*shape, generator=g)


def test_where_the_exponents_cancel_the_divergence_is_not_negative() -> None:
    z, t = draw(20, 7)
    for alpha in (-0.5, -0.2, 0.5):  # 1/α in place of 1/α² is negative for the first two
        assert (ab_divergence(z, t, alpha, -alpha, reduction="none") > 0).all()


@pytest.mark.parametrize(("alpha", "beta"), AXES)
def test_the_vision_losses_work_on_the_axes(
    alpha: float, beta: float, textbook: Callable[..., Tensor]
) -> None:
    z, t = draw(6, 5)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    z.requires_grad_()
    losses = [
        dkd_loss(z, t, labels, alpha, beta),
        lsd_loss(z, t, alpha, beta),
        ttm_loss(z, t, alpha, beta),  # there it reads an option that does not exist
        DistillationLoss("ab", alpha, beta)(z, t, labels),
    ]
    for loss in losses:
        assert loss.isfinite()
        [gradient] = torch.autograd.grad(loss, z)
        assert gradient.isfinite().all()
    expected = textbook(z, 0.1 * t, alpha, beta).mean().float()
    torch.testing.assert_close(losses[2], expected)


def test_standardised_logits_are_compared_with_the_exponents_asked_for() -> None:
    z, t = draw(6, 5)
    assert (lsd_loss(z, t, 0.9, 0.3) - lsd_loss(z, t, 0.3, 0.9)).abs() > 1e-3


def test_kl_is_a_mean_over_samples_like_the_rest() -> None:
    """There the KL baseline divides by N·C, the α-β loss by N, so their weights do not compare."""
    z, t = draw(6, 5)
    labels = torch.zeros(6, dtype=torch.long)
    kl = F.kl_div((z / 4).log_softmax(-1), (t / 4).softmax(-1), reduction="batchmean")
    loss = DistillationLoss("kd", kd_weight=1.0, ce_weight=0.0)(z, t, labels)
    torch.testing.assert_close(loss, 16 * kl)
    plain = DistillationLoss("ab", 1.0, 0.0, kd_weight=16.0, ce_weight=0.0)(z, t, labels)
    torch.testing.assert_close(loss, plain)
    hinton = DistillationLoss(
        "ab", 1.0, 0.0, kd_weight=1.0, ce_weight=0.0, temperature_power=2.0
    )(z, t, labels)  # fmt: skip
    torch.testing.assert_close(loss, hinton)


def test_no_preset_is_reverse_kl_in_disguise() -> None:
    named = {n: p for n, p in PRESETS.items() if p.kd_weight}
    assert all((p.alpha, p.beta) != (0.0, 1.0) for p in named.values())
    small = PRESETS["gpt2-small-dolly"]
    assert (small.alpha, small.beta, small.teacher) == (0.2, 0.7, "openai-community/gpt2-xl")
    assert (PRESETS["openllama-3b-dolly"].alpha, PRESETS["openllama-3b-dolly"].beta) == (0.1, 0.8)


def test_a_batch_without_a_response_is_zero_and_not_zero_by_zero() -> None:
    z, t = draw(1, 3, 5)
    labels = torch.full((1, 3), -100)
    z.requires_grad_()
    with pytest.warns(UserWarning, match="no valid position"):
        out = distillation_loss(z, t, labels, ce_weight=1.0)
    [gradient] = torch.autograd.grad(out.loss, z)
    assert out.loss == 0
    assert (gradient == 0).all()


def test_infinities_are_not_masked_away() -> None:
    """A class that the student excludes and the teacher wants costs what the divergence says."""
    t = torch.zeros(1, 3)
    z = torch.tensor([[0.0, 0.0, -torch.inf]])
    assert ab_divergence(z, t, 1.0, 0.0).isinf()
    found = ab_divergence(z, t, 0.5, 0.5)
    p, q = torch.full((3,), 1 / 3), torch.tensor([0.5, 0.5, 0.0])
    torch.testing.assert_close(found, 2 * (p.sqrt() - q.sqrt()).square().sum())


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_teacher_of_nan_is_not_one_that_agrees(name: str, dtype: torch.dtype) -> None:
    """A teacher that overflowed in half precision would look as if it were distilled perfectly."""
    z, t = (x.to(dtype).requires_grad_(i == 0) for i, x in enumerate(draw(3, 6)))
    t[1] = torch.nan
    values = divergence(name, z, t, reduction="none")
    assert values.isnan().tolist() == [False, True, False]
    [gradient] = torch.autograd.grad(values[::2].sum(), z)
    assert gradient[::2].isfinite().all()
    assert divergence(name, t[1:2], z[1:2].detach(), reduction="none").isnan()
    eye = torch.eye(6, dtype=dtype)
    assert fused_linear_ab_divergence(z, eye, t, eye, divergence=name).loss.isnan()


def test_ids_beyond_sixteen_bits() -> None:
    """Prompts are found and masked, and tokens listed, whatever their ids: nothing is a separator.

    Token files of uint16 with 65535 between prompt and response lose both beyond 65,534 tokens.
    """
    from abkd.data import CompletionCollator, tokenize_row

    class Tokenizer:
        eos_token_id = 151_643

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [int(word) for word in text.split()]}

    row = {"prompt": "65535 151000", "completion": "65535 70000"}
    batch = CompletionCollator(0)([tokenize_row(row, Tokenizer(), None)])
    assert batch["input_ids"].tolist() == [[65535, 151_000, 65535, 70_000, 151_643]]
    assert batch["labels"].tolist() == [[-100, -100, 65535, 70_000, 151_643]]
    classes = 151_936
    z = torch.randn(1, classes, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[65535, 70_000, 151_643]], dtype=torch.int32)
    found = sparse_distillation_loss(z, ids, torch.tensor([[0.5, 0.3, 0.1]]).log())
    assert found.loss.isfinite()


def test_the_soft_and_the_hard_term_have_one_denominator() -> None:
    g = torch.Generator().manual_seed(0)
    h, w, th, tw = (torch.randn(*s, generator=g) for s in ((6, 4), (9, 4), (6, 4), (9, 4)))
    labels = torch.tensor([1, 2, -100, 3, -100, 5])
    whole = fused_linear_ab_divergence(h, w, th, tw, labels=labels, ce_weight=0.7)
    parts = [
        fused_linear_ab_divergence(
            h[s], w, th[s], tw, labels=labels[s], ce_weight=0.7, n_valid=4.0
        ).loss
        for s in (slice(0, 1), slice(1, 6))
    ]
    torch.testing.assert_close(whole.loss, parts[0] + parts[1])

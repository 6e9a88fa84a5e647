"""What only a GPU shows: no waiting for it, memory of the fused loss, mixed precision, no drift."""

import pytest
import torch

from abkd import ab_divergence, divergence, fused_linear_ab_divergence
from abkd.bench import plain_ab
from shared_core.device import peak_memory

pytestmark = pytest.mark.cuda
DEVICE = torch.device("cuda")


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    g = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, generator=g, device=DEVICE, dtype=dtype)


def test_forward_and_backward_do_not_wait_for_the_device() -> None:
    z, t = draw(64, 1000).requires_grad_(), draw(64, 1000, seed=1)
    h, w = draw(64, 32).requires_grad_(), draw(1000, 32).requires_grad_()
    th, tw = draw(64, 32, seed=2), draw(1000, 32, seed=3)

    def run() -> None:
        ab_divergence(z, t, 0.2, 0.7).backward()
        divergence("jsd", z, t).backward()
        fused_linear_ab_divergence(h, w, th, tw, chunk_size=16).loss.backward()

    run()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_the_fused_loss_holds_no_logits_of_all_tokens() -> None:
    tokens, classes, width = 4096, 50_257, 64
    h, w = draw(tokens, width).requires_grad_(), draw(classes, width).requires_grad_()
    th, tw = draw(tokens, width, seed=2), draw(classes, width, seed=3)
    with peak_memory(DEVICE) as fused:
        found = torch.autograd.grad(fused_linear_ab_divergence(h, w, th, tw).loss, [h, w])
    with peak_memory(DEVICE) as plain:
        expected = torch.autograd.grad(plain_ab(h @ w.T, th @ tw.T, 0.2, 0.7), [h, w])
    assert fused.bytes is not None
    assert plain.bytes is not None
    assert fused.bytes < 0.4 * 4 * tokens * classes  # of one copy of the logits
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=2e-2, atol=1e-5)


def test_bf16_is_the_float32_result_of_the_same_values() -> None:
    z, t = draw(8, 151_936, dtype=torch.bfloat16), draw(8, 151_936, dtype=torch.bfloat16, seed=1)
    wide = z.float().requires_grad_()
    low = z.requires_grad_()
    one, two = ab_divergence(low, t, 0.2, 0.7), ab_divergence(wide, t.float(), 0.2, 0.7)
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    [a], [b] = torch.autograd.grad(one, low), torch.autograd.grad(two, wide)
    torch.testing.assert_close(a.float(), b, rtol=1e-2, atol=1e-8)


def test_under_autocast_with_a_scaler() -> None:
    h = draw(64, 32).requires_grad_()
    head = torch.nn.Linear(32, 500, bias=False, device=DEVICE)
    th, tw = draw(64, 32, seed=2), draw(500, 32, seed=3)
    scaler = torch.amp.GradScaler("cuda")
    with torch.autocast("cuda", dtype=torch.float16):
        loss = fused_linear_ab_divergence(h, head.weight, th, tw).loss
    scaler.scale(loss).backward()
    assert head.weight.grad is not None
    assert head.weight.grad.isfinite().all()
    plain = ab_divergence(h @ head.weight.T, th @ tw.T, 0.2, 0.7)
    torch.testing.assert_close(loss, plain, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize(("alpha", "beta"), [(0.2, 0.7), (1.0, 0.0), (0.0, 1.0), (0.5, -0.5)])
@pytest.mark.filterwarnings("ignore:alpha=.*outside")
def test_the_same_numbers_as_on_the_cpu(alpha: float, beta: float) -> None:
    z, t = draw(16, 500), draw(16, 500, seed=1)
    found = ab_divergence(z, t, alpha, beta, reduction="none").cpu()
    expected = ab_divergence(z.cpu(), t.cpu(), alpha, beta, reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)

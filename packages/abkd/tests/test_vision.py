"""DKD, LSD and TTM: the originals at (1, 0), the plain formulas elsewhere."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from abkd.vision import DistillationLoss, dkd_loss, lsd_loss, ttm_loss

G = torch.Generator().manual_seed(0)
Z, T = (3 * torch.randn(6, 5, generator=G) for _ in range(2))
Y = torch.tensor([0, 1, 2, 3, 4, 0])


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1).mean()


@pytest.mark.smoke
def test_dkd_at_forward_kl_is_the_original() -> None:
    tau = 4.0
    q, p = (x.div(tau).softmax(-1) for x in (Z, T))
    mask = F.one_hot(Y, 5).float()
    two = [torch.stack([(x * mask).sum(-1), (x * (1 - mask)).sum(-1)], -1) for x in (p, q)]
    rest = [(x / tau - 1000 * mask).softmax(-1).clamp(min=1e-30) for x in (T, Z)]
    expected = (kl(*two) + 8 * kl(*rest)) * tau**2
    torch.testing.assert_close(dkd_loss(Z, T, Y), expected)


def test_dkd_elsewhere(textbook: Callable[..., Tensor]) -> None:
    tau = 4.0
    keep = ~F.one_hot(Y, 5).bool()
    z, t = (x[keep].reshape(6, 4) for x in (Z, T))
    forward = dkd_loss(Z, T, Y, non_target_weight=0.0)
    expected = forward + 2 * tau**2 * textbook(z, t, 0.8, 0.3, tau).mean().float()
    torch.testing.assert_close(dkd_loss(Z, T, Y, 0.8, 0.3, non_target_weight=2.0), expected)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.9, 0.3)])
def test_lsd_and_ttm(textbook: Callable[..., Tensor], alpha: float, beta: float) -> None:
    scores = [(x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-7) for x in (Z, T)]
    expected = 4 * textbook(*scores, alpha, beta, 2.0).mean().float()
    torch.testing.assert_close(lsd_loss(Z, T, alpha, beta), expected)
    p = T.softmax(-1) ** 0.3
    powered = (p / p.sum(-1, keepdim=True)).log()
    expected = textbook(Z, powered, alpha, beta).mean().float()
    torch.testing.assert_close(ttm_loss(Z, T, alpha, beta, exponent=0.3), expected)


def test_weights_of_the_authors(textbook: Callable[..., Tensor]) -> None:
    ce = F.cross_entropy(Z, Y)
    ab = textbook(Z, T, 0.8, 0.3, 4.0).mean().float()
    kd = 16 * textbook(Z, T, 1.0, 0.0, 4.0).mean().float()
    torch.testing.assert_close(DistillationLoss("ab")(Z, T, Y), ce + 32 * ab)
    torch.testing.assert_close(DistillationLoss("kd")(Z, T, Y), ce + 9 * kd)
    lsd = lsd_loss(Z, T, 0.8, 0.3)
    torch.testing.assert_close(DistillationLoss("lsd")(Z, T, Y), 0.1 * ce + 9 * lsd)
    ttm = ttm_loss(Z, T, 0.8, 0.3)
    torch.testing.assert_close(DistillationLoss("ttm")(Z, T, Y), ce + ttm)
    dkd = DistillationLoss("dkd")
    whole = dkd(Z, T, Y)
    dkd.epoch = 5
    torch.testing.assert_close(dkd(Z, T, Y), ce + (whole - ce) * 5 / 20)


def test_gradients() -> None:
    for name in ("ab", "kd", "dkd", "lsd", "ttm"):
        z = Z.clone().requires_grad_()
        DistillationLoss(name)(z, T, Y).backward()
        assert z.grad.isfinite().all()
        assert z.grad.abs().sum() > 0


@pytest.mark.usefixtures("without_type_checks")
def test_errors() -> None:
    with pytest.raises(ValueError, match="criterion is 'crd'"):
        DistillationLoss("crd")
    with pytest.raises(ValueError, match="temperature is 0"):
        DistillationLoss(temperature=0.0)
    with pytest.raises(ValueError, match="at least 2 classes"):
        dkd_loss(Z[:, :1], T[:, :1], Y)
    with pytest.raises(ValueError, match="at least 2 classes"):
        lsd_loss(Z[:, :1], T[:, :1])
    with pytest.raises(ValueError, match="exponent is 0"):
        ttm_loss(Z, T, exponent=0.0)

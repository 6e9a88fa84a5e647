from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest_plugins = ["shared_core.testing"]


def pytest_configure(config: pytest.Config) -> None:
    # transformers 5.24 renames these; transformers itself and peft still use the old names.
    for name in ("gradient_checkpointing", "is_gradient_checkpointing"):
        config.addinivalue_line(
            "filterwarnings", f"ignore:`{name}` is deprecated and will be removed:FutureWarning"
        )


def _textbook(z: Tensor, t: Tensor, alpha: float, beta: float, tau: float = 1.0) -> Tensor:
    """D^(α,β) of §4.1 of the paper and its limits, by probabilities in float64, per row."""
    q = torch.softmax(z.double() / tau, -1)
    p = torch.softmax(t.double() / tau, -1)
    s = alpha + beta
    if alpha == 0 and beta == 0:
        terms = 0.5 * (p.log() - q.log()) ** 2
    elif beta == 0:
        terms = (p**alpha * (p**alpha / q**alpha).log() - p**alpha + q**alpha) / alpha**2
    elif alpha == 0:
        terms = (q**beta * (q**beta / p**beta).log() - q**beta + p**beta) / beta**2
    elif s == 0:
        terms = ((q**alpha / p**alpha).log() + (q**alpha / p**alpha) ** -1 - 1) / alpha**2
    else:
        terms = -(p**alpha * q**beta - alpha / s * p**s - beta / s * q**s) / (alpha * beta)
    return terms.sum(-1)


@pytest.fixture
def textbook() -> Callable[..., Tensor]:
    """The definition, written out with probabilities, that the package is compared with."""
    return _textbook

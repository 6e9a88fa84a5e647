import pytest
import torch

pytest_plugins = ["shared_core.testing"]


def pairwise(s, c, u, d, *, strict=False):
    """The double sum of the definition, in float64."""
    s, u = s.double()[:, None], u.double()[None]
    kernel = (s > u).double() + (0.0 if strict else 0.5) * (s == u)
    pairs = c.double()[:, None] * d.double()[None] * kernel
    return float(pairs.sum() / (len(s) * u.shape[1]))


def random_case(seed, *, levels=None, soft=False, dtype=torch.float64):
    """Scores (with ties if there are few levels), correctness and domain of random samples."""
    g = torch.Generator().manual_seed(seed)
    n_b, n_n = (int(torch.randint(1, 40, (), generator=g)) for _ in range(2))
    n = n_b + n_n
    scores = torch.randn(n, generator=g, dtype=torch.float64)
    if levels:
        scores = torch.randint(levels, (n,), generator=g).double()
    correct = torch.rand(n, generator=g, dtype=torch.float64)
    correct = correct if soft else correct < 0.6
    order = torch.randperm(n, generator=g)
    is_base = (torch.arange(n) < n_b)[order]
    return scores.to(dtype), correct, is_base


def split(scores, correct, is_base):
    return scores[is_base], correct[is_base], scores[~is_base], correct[~is_base]


@pytest.fixture
def tools():
    class Tools:
        pass

    Tools.pairwise = staticmethod(pairwise)
    Tools.case = staticmethod(random_case)
    Tools.split = staticmethod(split)
    return Tools

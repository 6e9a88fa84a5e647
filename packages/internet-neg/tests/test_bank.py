"""The bank keeps the top E, older ones first in a tie, in constant memory."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from internet_neg import InterNegError, NegativeBank

Unit = Callable[..., Tensor]


@pytest.mark.smoke
def test_it_keeps_what_sorting_everything_would(unit: Unit) -> None:
    generator = torch.Generator().manual_seed(0)
    bank = NegativeBank(10, 4)
    pointer = bank._embeddings.data_ptr()
    seen: list[tuple[float, int]] = []
    texts = unit(60, 4)
    for start in range(0, 60, 7):
        n = min(7, 60 - start)
        # Few different values, so that there are ties.
        deviations = torch.randint(0, 5, (n,), generator=generator) / 4
        sources = torch.arange(start, start + n)
        bank.insert(texts[start : start + n], deviations, sources)
        seen += list(zip(deviations.tolist(), sources.tolist(), strict=True))
        expected = sorted(seen, key=lambda pair: (-pair[0], pair[1]))[:10]
        assert bank.source_index.tolist() == [source for _, source in expected]
        assert bank.deviations.tolist() == [value for value, _ in expected]
        assert torch.equal(bank.embeddings, texts[bank.source_index])
    assert bank._embeddings.data_ptr() == pointer


def test_saved_and_restored(unit: Unit) -> None:
    bank = NegativeBank(5, 4)
    bank.insert(unit(3, 4), torch.tensor([0.1, 0.3, 0.2]), torch.arange(3))
    other = NegativeBank(5, 4)
    other.load_state_dict(bank.state_dict())
    assert torch.equal(other.embeddings, bank.embeddings)
    bank.clear()
    assert (len(bank), len(other)) == (0, 3)
    bank.insert(unit(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long))
    assert len(bank) == 0


def test_errors(unit: Unit) -> None:
    with pytest.raises(InterNegError, match="at least 1"):
        NegativeBank(0, 4)
    with pytest.raises(InterNegError, match="have 3 dimensions"):
        NegativeBank(2, 4).insert(unit(1, 3), torch.zeros(1), torch.zeros(1).long())
    with pytest.raises(InterNegError, match="NaN"):
        NegativeBank(2, 4).insert(
            torch.full((1, 4), float("nan")), torch.zeros(1), torch.zeros(1).long()
        )
    full = NegativeBank(3, 4)
    full.insert(unit(3, 4), torch.zeros(3), torch.arange(3))
    with pytest.raises(InterNegError, match="holds 3, this one at most 2"):
        NegativeBank(2, 4).load_state_dict(full.state_dict())

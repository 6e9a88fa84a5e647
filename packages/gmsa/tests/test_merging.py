"""Group merging against the mean of each group, written out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gmsa.merging import as_rates, compact_rows, group_merge, num_groups
from shared_core.testing import examples

pytestmark = pytest.mark.smoke


def by_hand(row: Tensor, r: int) -> Tensor:
    """The definition, for one row of valid vectors."""
    return torch.stack([row[j : j + r].mean(0) for j in range(0, len(row), r)])


@examples(60)
@given(st.integers(1, 13), st.integers(1, 16), st.integers(0, 2**16))
def test_full_rows_are_means_of_groups(n: int, r: int, seed: int) -> None:
    hidden = torch.randn(2, n, 3, dtype=torch.float64, generator=torch.manual_seed(seed))
    expected = torch.stack([by_hand(row, r) for row in hidden])
    oracle = torch.nn.functional.avg_pool1d(
        hidden.transpose(1, 2), r, r, ceil_mode=True, count_include_pad=False
    ).transpose(1, 2) if r <= n else hidden.mean(1, keepdim=True)  # fmt: skip
    everywhere = torch.ones(2, n, dtype=torch.bool)
    for mask in (None, everywhere):
        merged, merged_mask = group_merge(hidden, mask, r)
        assert merged.shape[1] == -(-n // r)
        assert merged_mask.all()
        torch.testing.assert_close(merged, expected)
        torch.testing.assert_close(merged, oracle)


@examples(60)
@given(st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=4), st.data())
def test_ragged_rows_with_holes_and_rates_of_their_own(
    pattern: list[list[bool]], data: st.DataObject
) -> None:
    mask = torch.tensor(pattern)
    rates = torch.tensor(
        data.draw(st.lists(st.integers(1, 11), min_size=len(mask), max_size=len(mask)))
    )
    hidden = torch.randn(len(mask), 9, 2, dtype=torch.float64, generator=torch.manual_seed(0))
    poisoned = hidden.masked_fill(~mask[:, :, None], float("nan"))
    merged, merged_mask = group_merge(poisoned, mask, rates)
    assert torch.equal(merged_mask.sum(1), num_groups(mask.sum(1), rates))
    for row in range(len(mask)):
        valid = hidden[row][mask[row]]
        if len(valid):
            expected = by_hand(valid, int(rates[row]))
            torch.testing.assert_close(merged[row][merged_mask[row]], expected)
            sizes = [len(valid[j : j + rates[row]]) for j in range(0, len(valid), int(rates[row]))]
            total = (torch.tensor(sizes)[:, None] * merged[row][merged_mask[row]]).sum(0)
            torch.testing.assert_close(total, valid.sum(0))
        assert not merged[row][~merged_mask[row]].any()


def test_rate_one_is_the_identity_bit_for_bit() -> None:
    hidden = torch.randn(2, 5, 3, dtype=torch.bfloat16)
    mask = torch.ones(2, 5, dtype=torch.bool)
    assert torch.equal(group_merge(hidden, rate=1)[0], hidden)
    assert torch.equal(group_merge(hidden, mask, 1)[0], hidden)


def test_gradients() -> None:
    mask = torch.tensor([[True, True, False, True, True], [False, True, True, False, False]])
    rates = torch.tensor([2, 3])
    hidden = torch.randn(2, 5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h: group_merge(h, mask, rates)[0], hidden)
    assert torch.autograd.gradcheck(lambda h: group_merge(h, None, 2)[0], hidden)
    group_merge(hidden, mask, rates)[0].sum().backward()
    expected = torch.tensor([[0.5, 0.5, 0, 0.5, 0.5], [0, 0.5, 0.5, 0, 0]])
    assert torch.equal(hidden.grad[:, :, 0], expected.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adds_in_float32(dtype: torch.dtype) -> None:
    hidden = (60000 if dtype is torch.float16 else 1) * torch.ones(1, 64, 2)
    hidden[:, ::2] *= 0.99
    half = hidden.to(dtype)
    exact = half.double().mean(1, keepdim=True).to(dtype)
    mask = torch.ones(1, 64, dtype=torch.bool)
    for given_mask in (None, mask):
        merged, _ = group_merge(half, given_mask, 64)
        assert merged.dtype == dtype
        assert torch.equal(merged, exact)


def test_non_contiguous_empty_and_huge_rates() -> None:
    hidden = torch.randn(3, 2, 4).transpose(0, 1)
    torch.testing.assert_close(group_merge(hidden, rate=10**7)[0], hidden.mean(1, keepdim=True))
    nothing, mask = group_merge(torch.randn(2, 0, 4), rate=3)
    assert nothing.shape == (2, 0, 4)
    assert mask.shape == (2, 0)
    merged, mask = group_merge(torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.bool), 2)
    assert merged.shape == (2, 0, 4)
    assert mask.shape == (2, 0)


@pytest.mark.usefixtures("without_type_checks")  # which cannot be compiled
def test_compile_in_one_graph_for_a_fixed_rate() -> None:
    hidden = torch.randn(2, 10, 3)
    compiled = torch.compile(
        lambda hidden: group_merge(hidden, rate=4)[0], fullgraph=True, backend="eager"
    )
    torch.testing.assert_close(compiled(hidden), group_merge(hidden, rate=4)[0])


def test_rows_are_compacted_in_order() -> None:
    mask = torch.tensor([[False, True, True, False], [True, False, False, True]])
    dense, values = compact_rows(mask, torch.tensor([[9, 5, 6, 9], [7, 9, 9, 8]]))
    assert dense.all()
    assert values.tolist() == [[5, 6], [7, 8]]


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("rate", [0, -3, 2.0, True, "4", torch.tensor([1.5, 2.0])])
def test_rates_that_are_none(rate: object) -> None:
    with pytest.raises(ValueError, match="accepted: whole numbers"):
        group_merge(torch.randn(2, 4, 3), rate=rate)


@pytest.mark.usefixtures("without_type_checks")
def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="mask has shape"):
        group_merge(torch.randn(2, 4, 3), torch.ones(2, 5, dtype=torch.bool), 2)
    with pytest.raises(ValueError, match="one number or one a row"):
        as_rates(torch.tensor([2, 3]), 3)
    with pytest.raises(ValueError, match="a rate is 0"):
        as_rates(torch.tensor([2, 0]), 2)


@pytest.mark.cuda
def test_on_a_gpu_and_without_a_sync_for_a_fixed_rate() -> None:
    hidden = torch.randn(4, 64, 8, device="cuda")
    expected = group_merge(hidden.cpu(), rate=4)[0]
    torch.cuda.set_sync_debug_mode("error")
    try:
        merged, _ = group_merge(hidden, rate=4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(merged.cpu(), expected)
    mask = torch.rand(4, 64, device="cuda") > 0.3
    rates = torch.tensor([1, 2, 3, 5], device="cuda")
    ragged = group_merge(hidden, mask, rates)[0]
    torch.testing.assert_close(ragged.cpu(), group_merge(hidden.cpu(), mask.cpu(), rates.cpu())[0])

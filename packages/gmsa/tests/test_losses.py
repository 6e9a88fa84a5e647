"""The loss against a cross-entropy over all logits, and the joining of rows."""

import pytest
import torch
import torch.nn.functional as F

from gmsa.losses import label_cross_entropy
from gmsa.rates import check_rates, draw_rate
from gmsa.sequences import join_rows

pytestmark = pytest.mark.smoke


def case(dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 7, 4, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(11, 4, generator=generator, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, 11, (3, 7), generator=generator)
    labels[:, :2] = -100
    labels[1, 4:] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("chunk_size", [1000, 3])
def test_equals_cross_entropy_of_all_logits(chunk_size: int) -> None:
    hidden, weight, labels = case()
    loss, correct, count = label_cross_entropy(
        hidden, labels, lambda h: h @ weight.T, chunk_size=chunk_size
    )
    logits = (hidden @ weight.T)[:, :-1].flatten(0, 1)
    targets = labels[:, 1:].flatten()
    expected = F.cross_entropy(logits.float(), targets, ignore_index=-100)
    torch.testing.assert_close(loss, expected)
    assert count == (targets != -100).sum()
    assert correct == ((logits.argmax(-1) == targets) & (targets != -100)).sum()
    got = torch.autograd.grad(loss, (hidden, weight))
    for one, other in zip(got, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_the_head_sees_label_positions_only() -> None:
    hidden, weight, labels = case(torch.float32)
    seen = []

    def head(states):
        seen.append(len(states))
        return states @ weight.T

    _, _, count = label_cross_entropy(hidden, labels, head)
    assert sum(seen) == int(count) == int((labels != -100).sum())


def test_no_label_is_a_zero_that_can_be_differentiated() -> None:
    hidden, weight, labels = case(torch.float32)
    loss, _, count = label_cross_entropy(
        hidden, torch.full_like(labels, -100), lambda h: h @ weight.T
    )
    loss.backward()
    assert (loss.item(), int(count)) == (0, 0)
    assert not hidden.grad.any()


def test_num_items_makes_micro_batches_add_up() -> None:
    hidden, weight, labels = case()
    whole, _, count = label_cross_entropy(hidden, labels, lambda h: h @ weight.T)
    parts = [
        label_cross_entropy(
            hidden[i : i + 1], labels[i : i + 1], lambda h: h @ weight.T, num_items=count
        )[0]
        for i in range(3)
    ]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.usefixtures("without_type_checks")
def test_labels_without_anything_before_them() -> None:
    hidden, weight, labels = case(torch.float32)
    labels[0, 0] = 3
    with pytest.raises(ValueError, match="nothing comes before it"):
        label_cross_entropy(hidden, labels, lambda h: h @ weight.T)
    with pytest.raises(ValueError, match="labels have shape"):
        label_cross_entropy(hidden, labels[:, 1:], lambda h: h @ weight.T)


@pytest.mark.parametrize("side", ["left", "right"])
def test_join_rows_by_hand(side: str) -> None:
    a = torch.arange(12).view(2, 3, 2).float().requires_grad_()
    b = 100 + torch.arange(8).view(2, 2, 2).float()
    mask_a = torch.tensor([[True, False, True], [False, False, False]])
    mask_b = torch.tensor([[True, True], [False, True]])
    joined, mask = join_rows([(a, mask_a), (b, mask_b)], side=side)
    rows = [torch.cat([a[0][mask_a[0]], b[0]]), b[1][1:]]
    for row, expected in enumerate(rows):
        assert torch.equal(joined[row][mask[row]], expected)
        empty = mask.shape[1] - len(expected)
        assert mask[row].tolist() == (
            [False] * empty + [True] * len(expected)
            if side == "left"
            else [True] * len(expected) + [False] * empty
        )
        assert not joined[row][~mask[row]].any()
    joined.sum().backward()
    assert torch.equal(a.grad[:, :, 0], mask_a.float())


@pytest.mark.usefixtures("without_type_checks")
def test_parts_that_do_not_fit() -> None:
    yes = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="differ in batch size, width, dtype"):
        join_rows([(torch.zeros(2, 3, 4), yes), (torch.zeros(2, 3, 4).half(), yes)])
    with pytest.raises(ValueError, match="no parts"):
        join_rows([])
    with pytest.raises(ValueError, match="accepted: left, right"):
        join_rows([(torch.zeros(2, 3), yes)], side="top")


def test_rates_are_uniform_and_repeat() -> None:
    drawn = [draw_rate([2, 4, 8], 5, 1, i) for i in range(3000)]
    assert drawn == [draw_rate([2, 4, 8], 5, 1, i) for i in range(3000)]
    counts = torch.tensor([drawn.count(r) for r in (2, 4, 8)])
    # Chi-square with two degrees of freedom: 13.8 is passed once in a thousand.
    assert ((counts - 1000) ** 2 / 1000).sum() < 13.8
    for other in ((6, 1), (5, 2)):
        assert drawn != [draw_rate([2, 4, 8], *other, i) for i in range(3000)]


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("rates", [[], [0], [2.5], [True]])
def test_rates_to_draw_from(rates: list) -> None:
    with pytest.raises(ValueError, match="one or more whole numbers from 1 on"):
        check_rates(rates)

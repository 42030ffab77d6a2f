from __future__ import annotations

import itertools

import pytest
import torch

from pairtune.maths.masking import masked_mean, masked_sum, pair_indices

X = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]], dtype=torch.float64)
MASK = torch.tensor([[True, False, True], [False, False, False]])


@pytest.mark.parametrize(
    "dim, total, mean", [(None, 5.0, 2.5), (-1, [5.0, 0.0], [2.5, 0.0]), (0, [1.0, 0.0, 4.0], [1.0, 0.0, 4.0])]
)
def test_only_what_counts_is_summed(dim: int | None, total: object, mean: object) -> None:
    assert masked_sum(X, MASK, dim).tolist() == total
    assert masked_mean(X, MASK, dim).tolist() == mean


def test_a_mask_broadcasts_and_its_copies_are_counted() -> None:
    assert masked_mean(X, torch.tensor([True, True, False])).item() == pytest.approx((1 + 2 + 8 + 16) / 4)


@pytest.mark.parametrize("function", [masked_sum, masked_mean])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_what_does_not_count_reaches_neither_value_nor_gradient(function, poison: float) -> None:
    x = torch.where(MASK, X, poison).requires_grad_()
    result = function(x, MASK, -1)
    result.sum().backward()
    clean = X.clone().requires_grad_()
    function(clean, MASK, -1).sum().backward()
    assert torch.equal(result, function(X, MASK, -1))
    assert torch.equal(x.grad, clean.grad)
    assert x.grad[~MASK].eq(0).all()


@pytest.mark.parametrize("num_completions", [1, 2, 3, 5])
def test_pairs_are_all_pairs_once(num_completions: int) -> None:
    first, second = pair_indices(num_completions)
    assert list(zip(first.tolist(), second.tolist(), strict=True)) == list(
        itertools.combinations(range(num_completions), 2)
    )

"""The one place where masks meet arithmetic.

A mask is boolean and True where a value counts. What stands where it is False never reaches a result or a gradient,
NaN and infinity included: values are replaced before they are summed, not multiplied by zero (0 * NaN is NaN).
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_sum(x: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """The sum of the x that count, over `dim` (over everything where None); 0 where none counts.

    `mask` is bool and broadcasts to the shape of `x`.
    """
    return torch.where(mask, x, 0).sum(dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """The mean of the x that count, over `dim` (over everything where None); 0, with zero gradient, where none counts.

    `mask` is bool and broadcasts to the shape of `x`.
    """
    return masked_sum(x, mask, dim) / mask.expand_as(x).sum(dim).clamp(min=1)


def pair_indices(num_completions: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """All pairs i < j of a group of K completions: two int64 index tensors (K (K - 1) / 2,)."""
    first, second = torch.triu_indices(num_completions, num_completions, offset=1, device=device)
    return first, second

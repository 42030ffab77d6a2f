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


def checked_mask(mask: Tensor | None, **tensors: Tensor) -> Tensor:
    """The mask, all True for None.

    Raises ValueError unless it is bool, all have one shape (of one dimension at least), and what is named *_logprobs
    or *_logratio is float32 or float64.
    """
    if mask is None:
        mask = torch.ones_like(next(iter(tensors.values())), dtype=torch.bool)
    shapes = [tuple(x.shape) for x in (*tensors.values(), mask)]
    if not shapes[0] or len(set(shapes)) > 1:
        raise ValueError(
            f"{', '.join(tensors)} and mask must have one shape of at least one dimension, "
            f"but they have {', '.join(map(str, shapes))}"
        )
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool (True where a value counts), but it is {mask.dtype}")
    for name, x in tensors.items():
        if name.endswith(("_logprobs", "_logratio")) and x.dtype not in (torch.float32, torch.float64):
            # In bfloat16 a token's log-probability of -16 is off by up to 0.06, a completion's of -100 by 0.25.
            raise ValueError(f"{name} must be float32 or float64, but they are {x.dtype}")
    return mask

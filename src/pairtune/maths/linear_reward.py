"""A linear reward on fixed features, by penalised maximum likelihood: what a fresh head knows before anything else of
the model moves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

PENALTIES = tuple(10 ** (exponent / 2) for exponent in range(-8, 1))
"""Tried where none is given: 1e-4 to 1, two a decade."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""Rewards (n, K) and the numbers of their rows (n,) -> one loss a row (n,), differentiable and convex in rewards."""


@dataclass(frozen=True)
class LinearReward:
    """The reward of a completion is `weight` times its features."""

    weight: Tensor
    """(D,) float64, for features as they were given."""
    penalty: float
    """The one that was chosen."""
    loss: float
    """Its mean over rows, each predicted from the other folds; NaN where no choice was made."""


def fit_linear_reward(
    features: Tensor,
    loss: Loss,
    *,
    groups: Tensor | None = None,
    penalties: tuple[float, ...] = PENALTIES,
    num_folds: int = 5,
    seed: int = 0,
) -> LinearReward:
    """Minimise the mean loss plus penalty / 2 * |v|^2 over linear rewards of features (N, K, D) of K completions a row.

    v are the weights of features scaled to a standard deviation of 1 / sqrt(D), so that a penalty means the same for
    any model. Of several penalties the one is taken whose rewards have the smallest loss on rows that they were not
    fitted to, by cross-validation; rows of one group (N,) int64 are never on two sides. With fewer groups than folds
    the largest penalty is taken. Every minimum is unique. Raises ValueError where features are not (N, K, D) or no
    penalty is above 0.
    """
    if features.dim() != 3 or not penalties or min(penalties) <= 0:
        raise ValueError(f"features must be (N, K, D) and penalties above 0, not {tuple(features.shape)}, {penalties}")
    features = features.double()
    scale = features.flatten(0, 1).std(0, correction=0).clamp(min=1e-12) * math.sqrt(features.shape[-1])
    scaled = features / scale
    rows = torch.arange(len(features))
    held_out_loss, penalty = math.nan, max(penalties)
    if len(penalties) > 1 and (fold := _folds(groups, len(features), num_folds, seed)) is not None:
        totals = dict.fromkeys(penalties, 0.0)
        for number in range(num_folds):
            inside, outside = rows[fold != number], rows[fold == number]
            start = torch.zeros(features.shape[-1], dtype=torch.float64)
            for candidate in sorted(penalties, reverse=True):  # each starts at the minimum of the one before
                start = _minimise(scaled, inside, loss, candidate, start)
                totals[candidate] += loss(scaled[outside] @ start, outside).sum().item()
        penalty = min(totals, key=totals.__getitem__)
        held_out_loss = totals[penalty] / len(features)
    weight = _minimise(scaled, rows, loss, penalty, torch.zeros(features.shape[-1], dtype=torch.float64))
    return LinearReward(weight / scale, penalty, held_out_loss)


def _folds(groups: Tensor | None, num_rows: int, num_folds: int, seed: int) -> Tensor | None:
    """(N,) the fold of each row, by its group; None where there are fewer groups than folds."""
    numbers, place = (torch.arange(num_rows) if groups is None else groups).unique(return_inverse=True)
    if len(numbers) < num_folds:
        return None
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed))
    return (order % num_folds)[place]


def _minimise(features: Tensor, rows: Tensor, loss: Loss, penalty: float, start: Tensor) -> Tensor:
    """(D,) the minimum over the given rows, to about seven digits."""
    weight = start.clone().requires_grad_(True)
    some = features[rows]
    optimizer = torch.optim.LBFGS(
        [weight], max_iter=200, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(some @ weight, rows).mean() + penalty / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach()

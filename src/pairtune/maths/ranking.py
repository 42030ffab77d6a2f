"""Strengths of policies from their wins against each other, and what they owe to the data."""

from __future__ import annotations

import torch
from torch import Tensor


def bradley_terry(wins: Tensor, *, prior: float = 1.0) -> Tensor:
    """Strengths (M,) float64 in nats, mean 0, of M policies from wins (M, M): games that row won of column, ties half.

    The maximiser of sum_ij wins_ij log sigma(s_i - s_j) (Bradley & Terry 1952), where every pair has played `prior`
    games more and each won half of them: a policy that won everything has a finite strength, and one that never met
    another has one at all. Newton's method; the diagonal is not read. Raises ValueError unless prior is above 0 and
    the wins are square and at least 0.
    """
    with_prior = _with_prior(wins, prior)
    strengths = torch.zeros(len(wins), dtype=torch.float64)
    value = _log_likelihood(strengths, with_prior)
    for _ in range(200):
        gradient = _gradient(strengths, with_prior)
        step = torch.linalg.solve(_information(strengths, with_prior), gradient)
        # Far from the maximum a whole step can overshoot; the likelihood is concave, so a small part of it never does.
        while (further := _log_likelihood(strengths + step, with_prior)) < value and step.abs().max() > 0.1:
            step = step / 2
        strengths, value = strengths + step, further
        if step.abs().max() <= 1e-12:
            break
    return strengths - strengths.mean()


def bradley_terry_derivatives(strengths: Tensor, games: Tensor, *, prior: float = 1.0) -> Tensor:
    """(M, M, M): how strength k moves with the share of games that i won of j, at [k, i, j].

    games (M, M), symmetric: how many a pair has played. By the implicit function theorem at the maximum; the shares of
    (i, j) and (j, i) are one number, and the entry of [k, j, i] is minus that of [k, i, j].
    """
    total = games + prior * (1 - torch.eye(len(games), dtype=torch.float64))
    probabilities = torch.sigmoid(strengths[:, None] - strengths)
    inverse = torch.linalg.inv(_information(strengths, total * probabilities))
    return games * (inverse[:, :, None] - inverse[:, None, :])


def _with_prior(wins: Tensor, prior: float) -> Tensor:
    if wins.dim() != 2 or wins.shape[0] != wins.shape[1]:
        raise ValueError(f"wins must be (M, M), but they have {tuple(wins.shape)}")
    if not prior > 0:
        raise ValueError(f"prior must be above 0, but it is {prior}")
    off_diagonal = 1 - torch.eye(len(wins), dtype=torch.float64)
    counted = wins.to("cpu", torch.float64).masked_fill(off_diagonal == 0, 0)
    if not (counted >= 0).all():
        raise ValueError("wins must be at least 0 for every pair")
    return counted + prior / 2 * off_diagonal


def _log_likelihood(strengths: Tensor, wins: Tensor) -> float:
    return (wins * torch.nn.functional.logsigmoid(strengths[:, None] - strengths)).sum().item()


def _gradient(strengths: Tensor, wins: Tensor) -> Tensor:
    expected = (wins + wins.T) * torch.sigmoid(strengths[:, None] - strengths)
    return (wins - expected).sum(1)


def _information(strengths: Tensor, wins: Tensor) -> Tensor:
    """The negative second derivative, with a constant added that fixes the mean of the strengths at 0."""
    probabilities = torch.sigmoid(strengths[:, None] - strengths)
    between = (wins + wins.T) * probabilities * (1 - probabilities)
    return between.sum(1).diag() - between + 1 / len(wins)

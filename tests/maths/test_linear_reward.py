"""A head fitted to fixed features: the maximum of the penalised likelihood, and a penalty that leaves nothing out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pairtune.maths.linear_reward import PENALTIES, fit_linear_reward
from pairtune.maths.reward_learning import plackett_luce_loss


def bradley_terry(rewards: Tensor, rows: Tensor) -> Tensor:
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1])


def problem(num_rows: int, dimensions: int, *, noise: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features (N, 2, D) of very different scales, sorted so that a true linear reward puts the chosen one first, up to
    noise; and that reward's weights."""
    generator = torch.Generator().manual_seed(seed)
    scales = 10.0 ** torch.linspace(-2, 2, dimensions).double()
    features = torch.randn(num_rows, 2, dimensions, generator=generator, dtype=torch.float64) * scales
    weight = torch.randn(dimensions, generator=generator, dtype=torch.float64) / scales
    scores = features @ weight + noise * torch.randn(num_rows, 2, generator=generator, dtype=torch.float64)
    best_first = scores.argsort(dim=1, descending=True)
    return features.gather(1, best_first[..., None].expand_as(features)), weight


def test_it_is_the_minimum() -> None:
    features, _ = problem(60, 8, noise=1.0)
    for penalty in (1e-3, 1.0):
        weight = fit_linear_reward(features, bradley_terry, penalties=(penalty,)).weight.requires_grad_(True)
        scale = features.flatten(0, 1).std(0, correction=0) * math.sqrt(8)
        rows = torch.arange(60)
        value = bradley_terry(features @ weight, rows).mean() + penalty / 2 * (weight * scale).square().sum()
        (gradient,) = torch.autograd.grad(value, weight)
        assert (gradient / scale).abs().max() < 1e-6


def test_the_unit_of_a_feature_does_not_matter() -> None:
    features, _ = problem(60, 8, noise=1.0)
    units = torch.tensor([1e3, 1e-3, 5.0, 1.0, 1.0, 2.0, 7.0, 1e-2], dtype=torch.float64)
    one = fit_linear_reward(features, bradley_terry)
    other = fit_linear_reward(features * units, bradley_terry)
    assert one.penalty == other.penalty
    assert torch.allclose(one.weight, other.weight * units, rtol=1e-4)


def test_what_there_is_to_find_is_found() -> None:
    features, weight = problem(400, 10, noise=0.1)
    fitted = fit_linear_reward(features[:300], bradley_terry)
    chosen = features[300:] @ fitted.weight
    assert (chosen[:, 0] > chosen[:, 1]).double().mean() > 0.95
    assert F.cosine_similarity(fitted.weight, weight, dim=0) > 0.9
    assert fitted.loss < 0.2


def test_the_penalty_grows_with_the_noise() -> None:
    clear = fit_linear_reward(problem(80, 30, noise=0.1)[0], bradley_terry)
    noise = fit_linear_reward(torch.randn(80, 2, 30, generator=torch.Generator().manual_seed(1)), bradley_terry)
    assert clear.penalty < 0.05
    assert noise.penalty > 0.05
    assert noise.loss == pytest.approx(math.log(2), abs=0.05)


def test_rows_of_one_group_are_on_one_side() -> None:
    """Ten rows, each there eight times: whoever finds its copy among those that it was fitted to seems to know it."""
    features, _ = problem(10, 40, noise=100.0)
    copies, groups = features.repeat(8, 1, 1), torch.arange(10).repeat(8)
    told = fit_linear_reward(copies, bradley_terry, groups=groups)
    untold = fit_linear_reward(copies, bradley_terry)
    assert untold.loss < 0.2
    assert told.loss > 0.5
    assert told.penalty > untold.penalty


def test_too_few_groups_for_a_choice() -> None:
    features, _ = problem(20, 4, noise=1.0)
    fitted = fit_linear_reward(features, bradley_terry, groups=torch.arange(20) % 4)
    assert fitted.penalty == max(PENALTIES)
    assert math.isnan(fitted.loss)


def test_any_convex_loss_will_do() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 4, 6, generator=generator, dtype=torch.float64)
    weight = torch.tensor([2.0, -1.0, 0.0, 1.0, 0.0, 3.0], dtype=torch.float64)
    ranks = (features @ weight).argsort(1, descending=True).argsort(1)
    fitted = fit_linear_reward(features, lambda rewards, rows: plackett_luce_loss(rewards, ranks[rows]))
    assert F.cosine_similarity(fitted.weight, weight, dim=0) > 0.99


@pytest.mark.parametrize("features, penalties", [(torch.zeros(4, 3), (1.0,)), (torch.zeros(4, 2, 3), (0.0, 1.0))])
def test_what_is_refused(features: Tensor, penalties: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="features must be"):
        fit_linear_reward(features, bradley_terry, penalties=penalties)

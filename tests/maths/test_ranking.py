from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pairtune.maths.ranking import bradley_terry, bradley_terry_derivatives


def some_wins(num_policies: int = 5, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    games = torch.randint(5, 60, (num_policies, num_policies), generator=random).double().triu(1)
    won = (games * torch.rand(num_policies, num_policies, generator=random, dtype=torch.float64)).round()
    return won + (games - won).T


def by_minorisation(wins: list[list[float]], prior: float) -> list[float]:
    """Hunter's (2004) climb of the same likelihood, one strength after the other, in plain loops."""
    policies = range(len(wins))
    won = [sum(wins[i][j] + prior / 2 for j in policies if j != i) for i in policies]
    odds = [1.0] * len(wins)
    for _ in range(500):
        for i in policies:
            met = sum((wins[i][j] + wins[j][i] + prior) / (odds[i] + odds[j]) for j in policies if j != i)
            odds[i] = won[i] / met
    strengths = [math.log(x) for x in odds]
    return [x - sum(strengths) / len(wins) for x in strengths]


def test_the_strengths_are_those_of_a_plain_optimisation() -> None:
    wins = some_wins(4)
    assert bradley_terry(wins, prior=0.5).tolist() == pytest.approx(by_minorisation(wins.tolist(), 0.5), abs=1e-9)


def test_two_policies_differ_by_the_log_odds() -> None:
    strengths = bradley_terry(torch.tensor([[0.0, 30.0], [10.0, 0.0]]), prior=2.0)
    assert strengths.tolist() == pytest.approx([math.log(31 / 11) / 2, -math.log(31 / 11) / 2], rel=1e-12)


def test_who_won_everything_or_never_met_anyone_has_a_finite_strength() -> None:
    wins = torch.zeros(4, 4)
    wins[0, 1] = wins[0, 2] = wins[1, 2] = 1e4
    first, second, third, never = bradley_terry(wins).tolist()
    assert 20 > first > second > third > -20
    assert never == pytest.approx(0, abs=1e-9)
    assert second == pytest.approx(0, abs=1e-9)
    assert first == pytest.approx(-third, rel=1e-9)


def test_swapping_and_naming_change_nothing_else() -> None:
    wins = some_wins()
    strengths = bradley_terry(wins)
    assert strengths.sum().item() == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(bradley_terry(wins.T), -strengths, rtol=0, atol=1e-9)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(bradley_terry(wins[order][:, order]), strengths[order], rtol=0, atol=1e-9)
    with_diagonal = wins + 1000 * torch.eye(5)
    assert torch.equal(bradley_terry(with_diagonal), strengths)


def test_the_derivatives_are_those_of_finite_differences() -> None:
    wins = some_wins()
    games, step = wins + wins.T, 1e-5
    found = bradley_terry_derivatives(bradley_terry(wins), games)
    for i, j in ((0, 1), (3, 1), (2, 4)):
        moved = []
        for sign in (1, -1):
            changed = wins.clone()
            changed[i, j] += sign * step * games[i, j]
            changed[j, i] -= sign * step * games[i, j]
            moved.append(bradley_terry(changed))
        torch.testing.assert_close(found[:, i, j], (moved[0] - moved[1]) / (2 * step), rtol=1e-6, atol=1e-9)
        assert torch.equal(found[:, j, i], -found[:, i, j])


def test_a_wrong_call_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"\(M, M\).*\(2, 3\)"):
        bradley_terry(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="prior must be above 0, but it is 0"):
        bradley_terry(torch.zeros(2, 2), prior=0)
    with pytest.raises(ValueError, match="at least 0"):
        bradley_terry(torch.tensor([[0.0, -1.0], [1.0, 0.0]]))
    with pytest.raises(ValueError, match="at least 0"):
        bradley_terry(torch.tensor([[0.0, math.nan], [1.0, 0.0]]))

"""evidence/head_to_head.py: win rates against counting by hand, matrices that sum to 1, rankings, judges' biases."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from pairtune.errors import PairtuneError
from pairtune.evidence.head_to_head import (
    Games,
    both_orders,
    length_controlled,
    outcome_shares,
    position_bias,
    ranking,
    score_games,
    win_matrix,
    win_rate,
    win_rate_by_length,
)
from pairtune.maths.ranking import bradley_terry
from pairtune.maths.statistics import Estimate, student_quantile, verdict


def scores(*shape: int, mean: float = 0.0, seed: int = 0, seeds: float = 0.0, prompts: Tensor | None = None) -> Tensor:
    """(S, P, K), in steps of 0.5 so that ties occur."""
    random = torch.Generator().manual_seed(seed)
    values = mean + torch.randn(*shape, generator=random, dtype=torch.float64)
    values = values + seeds * torch.randn(shape[0], 1, 1, generator=random, dtype=torch.float64)
    values = values if prompts is None else values + prompts[:, None]
    return (2 * values).round() / 2


def lengths(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 40, shape, generator=torch.Generator().manual_seed(seed))


def games(num_prompts: int = 40, mean: float = 0.4) -> Games:
    return Games.from_scores(
        scores(3, num_prompts, 2, mean=mean, seeds=0.3),
        scores(2, num_prompts, 3, seed=1, seeds=0.3),
        lengths(3, num_prompts, 2),
        lengths(2, num_prompts, 3, seed=1),
    )


# ------------------------------------------------------------------------------------------------------------ win rates


def test_every_completion_of_a_prompt_plays_every_other() -> None:
    a, b = scores(3, 5, 2, mean=0.3), scores(2, 5, 4, seed=1)
    a[0, 1, 1] = b[1, 4, 2] = math.nan
    won = ties = played = 0
    for s in range(3):
        for t in range(2):
            for p in range(5):
                for x in a[s, p].tolist():
                    for y in b[t, p].tolist():
                        if not math.isnan(x) and not math.isnan(y):
                            won, ties, played = won + (x > y), ties + (x == y), played + 1
    assert ties > 0
    found = Games.from_scores(a, b)
    assert found.outcomes.shape == (3, 2, 5, 8)
    assert win_rate(found).mean == pytest.approx((won + ties / 2) / played, rel=1e-12)
    shares = outcome_shares(found)
    assert shares[:3] == pytest.approx((won / played, ties / played, (played - won - ties) / played))
    assert shares.missing == pytest.approx(1 - played / 240)


def test_two_sides_sum_to_exactly_1() -> None:
    """Recomputed from swapped scores, at numbers of games that no binary fraction divides."""
    for num_prompts in range(1, 50):
        a, b = scores(3, num_prompts, 1, seed=num_prompts), scores(1, num_prompts, 1, seed=100 + num_prompts)
        one, other = win_rate(Games.from_scores(a, b)), win_rate(Games.from_scores(b, a))
        assert one.mean + other.mean == 1
        if num_prompts > 1:
            assert (1 - other.high, 1 - other.low) == pytest.approx((one.low, one.high), abs=1e-12)


def test_the_errors_of_a_win_rate_are_those_of_its_parts() -> None:
    """Over prompts, and over the seeds of either side, less what prompts explain: spelled out for full tables."""
    found = games()
    mean = found.outcomes.mean(-1)  # (3, 2, 40)
    estimate = win_rate(found)
    assert estimate.prompt_error == pytest.approx((mean.mean((0, 1)).var() / 40).sqrt().item(), rel=1e-9)
    expected = 0.0
    for table in (mean.mean(1), mean.mean(0)):
        num_seeds = len(table)
        rest = table - table.mean(0) - table.mean(1, keepdim=True) + table.mean()
        interaction = rest.square().sum() / (num_seeds - 1) / 39
        expected += (table.mean(1).var() / num_seeds - interaction / num_seeds / 40).item()
    assert estimate.seed_error == pytest.approx(math.sqrt(expected), rel=1e-9)
    assert estimate.seeds_included
    assert (estimate.mean - estimate.low) > 1.9 * estimate.prompt_error


def test_prompts_with_more_verdicts_count_for_more() -> None:
    outcomes = torch.tensor([[1.0, 1.0, 0.0], [math.nan, 0.0, math.nan], [math.nan] * 3, [1.0, math.nan, 0.5]])
    found = Games.from_verdicts(outcomes)
    assert found.num_prompts == 3
    estimate = win_rate(found)
    assert estimate.mean == pytest.approx(3.5 / 6)
    assert not estimate.seeds_included
    # A ratio of sums: as the jackknife over the prompts says, to first order.
    won, played = outcomes.nansum(1), (~outcomes.isnan()).sum(1)
    spread = (won - 3.5 / 6 * played) / (6 / 4)
    assert estimate.prompt_error == pytest.approx((spread.var() / 4).sqrt().item(), rel=1e-6)


def test_a_policy_that_won_every_game_has_an_interval() -> None:
    found = Games.from_scores(scores(3, 60, 2, mean=50), scores(3, 60, 2))
    estimate = win_rate(found)
    z = student_quantile(0.975, 59)
    assert (estimate.mean, estimate.high) == (1, 1)
    assert estimate.low == pytest.approx(1 / (1 + z**2 / 60), rel=1e-9)
    assert verdict(estimate, against=0.5).confirmed


def test_a_policy_against_itself_with_other_seeds_wins_half() -> None:
    """Over 100 pairs of trained arms that differ by luck alone, 95% of the intervals contain 50%."""
    hard = torch.exp(torch.randn(60, generator=torch.Generator().manual_seed(7), dtype=torch.float64))
    held = 0
    for i in range(100):
        one, other = (scores(3, 60, 2, seed=1000 * i + j, seeds=0.3, prompts=hard) for j in (0, 1))
        estimate = win_rate(Games.from_scores(one, other))
        held += estimate.low <= 0.5 <= estimate.high
    assert 90 <= held <= 99


def test_one_seed_is_enough_of_what_was_not_trained() -> None:
    trained, start = scores(3, 30, 2, mean=1), scores(1, 30, 2, seed=1)
    assert not win_rate(Games.from_scores(trained, start)).seeds_included
    fixed = Games.from_scores(trained, start, fixed=(False, True))
    assert win_rate(fixed).seeds_included
    assert win_rate(fixed.swapped()).seeds_included
    assert not win_rate(replace(fixed.swapped(), fixed=(False, True))).seeds_included
    by_name = score_games({"p3o": trained, "start": start}, fixed=["start"])
    assert by_name["p3o", "start"].fixed == (False, True)


def test_no_verdict_is_no_win_rate() -> None:
    nothing = Games.from_verdicts(torch.full((4,), math.nan))
    assert math.isnan(win_rate(nothing).mean)
    assert math.isnan(win_rate(nothing).low)
    assert outcome_shares(nothing).missing == 1
    assert win_matrix({("a", "b"): nothing}).rates == [[None, None], [None, None]]
    assert ranking({("a", "b"): nothing, ("a", "c"): nothing}) == ((), [], ())


def test_wrong_games_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(S, S', P, G\)"):
        Games(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="between 0 and 1"):
        Games.from_verdicts(torch.tensor([0.0, 2.0]))
    with pytest.raises(ValueError, match="prompts must be the same, but there are 4 and 5"):
        Games.from_scores(scores(1, 4, 1), scores(1, 5, 1))
    with pytest.raises(ValueError, match="length_differences are"):
        Games(torch.zeros(1, 1, 2, 1), torch.zeros(1, 1, 2, 2))
    with pytest.raises(PairtuneError, match=r"a: 4, b: 5"):
        score_games({"a": scores(1, 4, 1), "b": scores(1, 5, 1)})


# --------------------------------------------------------------------------------------------------- matrix and ranking


def four_policies(num_prompts: int = 40) -> dict[str, Tensor]:
    means = {"a": 0.0, "b": 0.5, "c": 0.2, "d": 1.0}
    return {n: scores(3, num_prompts, 2, mean=m, seed=i, seeds=0.2) for i, (n, m) in enumerate(means.items())}


def test_the_matrix_holds_every_pair_from_both_sides() -> None:
    found = win_matrix(score_games(four_policies()))
    assert found.names == ("a", "b", "c", "d")
    for i in range(4):
        assert found.rates[i][i] is None
        for j in range(i):
            one, other = found.rates[i][j], found.rates[j][i]
            assert one is not None
            assert other is not None
            assert one.mean + other.mean == 1
    judged = {("x", "y"): Games.from_verdicts(torch.tensor([0.1, 0.7, 0.1], dtype=torch.float64))}
    (_, one), (other, _) = win_matrix(judged).rates
    assert one is not None
    assert other is not None
    assert one.mean + other.mean == 1
    assert found.rates[0][3] == win_rate(Games.from_scores(four_policies()["a"], four_policies()["d"]))


def test_the_ranking_is_bradley_terrys_of_the_shares() -> None:
    games = score_games(four_policies())
    found, matrix = ranking(games, prior=2.0), win_matrix(games)
    wins = torch.tensor([[0 if r is None else 40 * r.mean for r in row] for row in matrix.rates], dtype=torch.float64)
    assert [s.mean for s in found.strengths] == pytest.approx(bradley_terry(wins, prior=2.0).tolist(), abs=1e-9)
    assert sum(s.mean for s in found.strengths) == pytest.approx(0, abs=1e-9)
    assert found.names == matrix.names
    assert found.order == (3, 1, 2, 0)
    assert all(s.low < s.mean < s.high and s.seeds_included for s in found.strengths)


def leave_out(values: dict[str, Tensor], prompt: int) -> dict[str, Tensor]:
    return {name: torch.cat([x[:, :prompt], x[:, prompt + 1 :]], 1) for name, x in values.items()}


def jackknife(statistic: Callable[[int], float], num_prompts: int) -> float:
    without = torch.tensor([statistic(p) for p in range(num_prompts)], dtype=torch.float64)
    return math.sqrt((num_prompts - 1) / num_prompts * (without - without.mean()).square().sum().item())


def test_the_error_of_a_strength_is_that_of_leaving_each_prompt_out() -> None:
    policies = four_policies()
    found = ranking(score_games(policies))
    without = [ranking(score_games(leave_out(policies, p))).strengths for p in range(40)]
    for k in range(4):
        expected = jackknife(lambda p, k=k: without[p][k].mean, 40)
        assert found.strengths[k].prompt_error == pytest.approx(expected, rel=0.05)


def test_the_error_of_a_strength_holds_the_seeds_of_all_policies() -> None:
    """One seed of d far better than its others: d's strength is uncertain, and that of those it beats by the anchor."""
    policies = four_policies()
    calm = ranking(score_games(policies)).strengths
    policies["d"] = policies["d"] + torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)[:, None, None]
    torn = ranking(score_games(policies)).strengths
    assert torn[3].seed_error > 2 * calm[3].seed_error
    assert torn[0].seed_error > calm[0].seed_error


def test_a_policy_that_won_everything_is_first_by_an_amount_that_the_data_bounds() -> None:
    policies = {**four_policies(), "best": scores(3, 40, 2, mean=50)}
    found = ranking(score_games(policies))
    best = found.strengths[4]
    assert found.order[0] == 4
    assert 3 < best.mean < 8
    assert best.low > max(s.high for s in found.strengths[:4])
    assert best.prompt_error > 0.3
    # Two policies, all 60 games won: the log-odds of the fit have a standard error of 1 / sqrt(n p (1 - p)), about.
    pair = ranking({("x", "y"): Games.from_verdicts(torch.ones(60))}).strengths[0]
    p = torch.sigmoid(torch.tensor(2 * pair.mean, dtype=torch.float64)).item()
    assert 2 * pair.prompt_error == pytest.approx(1 / math.sqrt(61 * p * (1 - p)), rel=0.02)


def test_seeds_and_completions_do_not_make_a_pair_weigh_more() -> None:
    policies = four_policies()
    doubled = {n: x.repeat(1, 1, 1 + (n in "ab")) for n, x in policies.items()}
    found, again = ranking(score_games(policies)), ranking(score_games(doubled))
    assert [s.mean for s in again.strengths] == pytest.approx([s.mean for s in found.strengths])
    assert [s.prompt_error for s in again.strengths] == pytest.approx([s.prompt_error for s in found.strengths])


def test_games_that_do_not_fit_together_are_refused() -> None:
    pairs = score_games(four_policies())
    pairs["a", "b"] = Games.from_scores(scores(2, 40, 2), scores(3, 40, 2, seed=1))
    with pytest.raises(ValueError, match=r"a has \(seeds, prompts\) \(2, 40\) and \(3, 40\)"):
        ranking(pairs)


# --------------------------------------------------------------------------------------------------------------- judges


def test_a_judge_that_always_says_first() -> None:
    always = torch.ones(50)
    assert win_rate(Games.from_verdicts(both_orders(always, always))).mean == 0.5
    bias = position_bias(always, always)
    assert (bias.first.mean, bias.second.mean, bias.consistent.mean) == (1, 0, 0)
    assert bias.won_by_first_shown.mean == 1
    assert bias.first.low > 0.9


def test_verdicts_in_both_orders() -> None:
    nan = math.nan
    shown_first = torch.tensor([1, 0, 1, 0, 0.5, 0.5, 1, nan, 0.9, 0.4])
    swapped = torch.tensor([0, 1, 1, 0, 0.5, 1, 0.5, 0, 0.2, 0.3])
    expected = torch.tensor([1, 0, 0.5, 0.5, 0.5, 0.5, 0.5, nan, 1, 0.5], dtype=torch.float64)
    torch.testing.assert_close(both_orders(shown_first, swapped), expected, equal_nan=True)
    bias = position_bias(shown_first, swapped)
    assert bias.consistent.mean == pytest.approx(4 / 9)
    assert bias.first.mean == pytest.approx(1 / 9)
    assert bias.second.mean == pytest.approx(2 / 9)
    assert bias.won_by_first_shown.mean == pytest.approx((5.3 + 4.5) / 18)


# --------------------------------------------------------------------------------------------------------------- length


def test_bins_hold_each_game_once() -> None:
    found = games()
    bins = win_rate_by_length(found, 4)
    assert len(bins) == 4
    assert sum(b.share for b in bins) == pytest.approx(1)
    assert sum(b.share * b.win_rate.mean for b in bins) == pytest.approx(win_rate(found).mean)
    assert all(0.15 < b.share < 0.35 for b in bins)
    assert all(one.high < other.low for one, other in pairwise(bins))
    inside = (found.length_differences >= bins[1].low) & (found.length_differences <= bins[1].high)  # type: ignore[operator]
    assert bins[1].win_rate.mean == pytest.approx(found.outcomes[inside].mean().item())


def test_equal_differences_stay_together() -> None:
    same = Games.from_verdicts(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([2.0, 2.0, 2.0]))
    (only,) = win_rate_by_length(same)
    assert (only.low, only.high, only.share) == (2, 2, 1)
    assert win_rate_by_length(Games.from_verdicts(torch.full((2,), math.nan), torch.zeros(2))) == []
    with pytest.raises(ValueError, match="no length_differences"):
        win_rate_by_length(Games.from_verdicts(torch.ones(3)))
    with pytest.raises(ValueError, match="no length_differences"):
        length_controlled(Games.from_verdicts(torch.ones(3)))


def by_plain_descent(found: Games) -> tuple[float, float]:
    """The same likelihood and prior, one game after the other, climbed by small steps."""
    assert found.length_differences is not None
    y, d = found.outcomes.flatten(), found.length_differences.flatten()
    t = torch.tanh(d / d.std(correction=0))
    weight, theta, phi = found.num_prompts / len(y), 0.0, 0.0
    for _ in range(3000):
        residuals = y - torch.sigmoid(theta + phi * t)
        theta += 0.05 * (weight * residuals.sum().item() + 0.5 - 1 / (1 + math.exp(-theta)))
        phi += 0.05 * (weight * (residuals * t).sum().item() - phi / 16)
    return theta, phi


def test_the_length_controlled_fit_is_that_of_plain_descent() -> None:
    found = games()
    theta, phi = by_plain_descent(found)
    controlled = length_controlled(found)
    assert controlled.win_rate.mean == pytest.approx(1 / (1 + math.exp(-theta)), abs=1e-6)
    assert controlled.phi.mean == pytest.approx(phi, abs=1e-5)
    assert controlled.raw == win_rate(found)


def test_what_only_length_decides_is_no_win_between_equal_lengths() -> None:
    """A judge that takes the longer, and a policy that writes more: raw far above a half, controlled at a half."""
    random = torch.Generator().manual_seed(0)
    longer = 10 + 20 * torch.randn(4000, generator=random, dtype=torch.float64)
    chance = torch.sigmoid(2 * torch.tanh(longer / longer.std(correction=0)))
    liked = (torch.rand(4000, generator=random, dtype=torch.float64) < chance).double()
    found = length_controlled(Games.from_verdicts(liked, longer))
    assert found.raw.low > 0.6
    assert found.win_rate.low < 0.5 < found.win_rate.high
    assert found.win_rate.high - found.win_rate.low < 0.06
    assert found.phi.low < 2 < found.phi.high


def test_sides_mirror_each_other_in_the_length_controlled_rate() -> None:
    found = games()
    one, other = length_controlled(found), length_controlled(found.swapped())
    assert one.win_rate.mean + other.win_rate.mean == pytest.approx(1, abs=1e-12)
    assert (1 - other.win_rate.high, 1 - other.win_rate.low) == pytest.approx((one.win_rate.low, one.win_rate.high))
    assert other.phi.mean == pytest.approx(one.phi.mean)


@pytest.mark.parametrize("kind", ["completions of several seeds", "lengths that a few prompts decide"])
def test_the_error_of_the_length_controlled_rate_is_that_of_leaving_each_prompt_out(kind: str) -> None:
    """Refitted every time, with the lengths' standard deviation anew."""
    found = games(60)
    if kind != "completions of several seeds":
        random = torch.Generator().manual_seed(0)
        longer = torch.exp(0.5 * torch.randn(60, 1, generator=random, dtype=torch.float64)).expand(60, 20) - 1
        liked = torch.rand(60, 20, generator=random, dtype=torch.float64) < torch.sigmoid(3 * torch.tanh(longer))
        found = Games.from_verdicts(liked.double(), longer)
    controlled = length_controlled(found)

    def refit(prompt: int) -> Any:
        kept = torch.arange(60) != prompt
        assert found.length_differences is not None
        return length_controlled(Games(found.outcomes[:, :, kept], found.length_differences[:, :, kept]))

    refits = [refit(p) for p in range(60)]
    for name in ("win_rate", "phi"):
        estimate: Estimate = getattr(controlled, name)
        expected = jackknife(lambda p, name=name: getattr(refits[p], name).mean, 60)
        assert estimate.prompt_error == pytest.approx(expected, rel=0.08)


def test_lengths_of_a_policy_that_won_everything() -> None:
    found = length_controlled(Games.from_verdicts(torch.ones(60), torch.arange(60) - 30.0))
    assert 0.9 < found.win_rate.mean < 1
    assert found.win_rate.low < found.win_rate.mean < found.win_rate.high < 1
    nothing = length_controlled(Games.from_verdicts(torch.full((3,), math.nan), torch.ones(3)))
    assert math.isnan(nothing.win_rate.mean)

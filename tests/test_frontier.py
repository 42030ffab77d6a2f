"""evidence/frontier.py: curves whose answers are known, errors against the jackknife, differences, reference curves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from pairtune.evidence.exact import EnumerableTask, optimum, sequence_logprobs, tabular_model
from pairtune.evidence.frontier import (
    Evaluated,
    area_under_frontier,
    best_of_n_curve,
    combine_seeds,
    compare_area,
    compare_at,
    compare_kl_at_reward,
    compare_reward_at_kl,
    fit_frontier,
    frontier,
    gap_to_optimum,
    kl_at_reward,
    kl_range,
    optimal_reward,
    reward_at_kl,
    reward_range,
    table1_row,
)
from pairtune.maths.statistics import Estimate, Interval, estimate_mean, estimate_ratio


def run(kl: list[float], reward: list[float], num_prompts: int = 1) -> Evaluated:
    """One seed whose prompts are all alike."""
    return arm([kl], [reward], num_prompts)


def arm(kl: list[list[float]], reward: list[list[float]], num_prompts: int = 1) -> Evaluated:
    kls, rewards = (torch.tensor(x, dtype=torch.float64)[..., None].expand(-1, -1, num_prompts) for x in (kl, reward))
    return Evaluated(10 * torch.arange(kls.shape[1]), kls, kls, rewards, torch.full_like(kls, 20))


def sampled(num_seeds: int = 3, num_prompts: int = 40, seed: int = 0, gain: float = 1.0) -> Evaluated:
    """Runs along reward = gain * sqrt(KL), prompts that drift and gain more and less, noise."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    at = torch.linspace(0, 6, 7, dtype=torch.float64) * torch.exp(0.1 * normal(num_seeds, 1))
    kl = at[..., None] * torch.exp(0.4 * normal(num_prompts)) * torch.exp(0.1 * normal(num_seeds, 1, num_prompts))
    reward = gain * kl.sqrt() + normal(num_prompts) + 0.1 * normal(num_seeds, 7, num_prompts)
    length = 10 + 20 * torch.rand(num_seeds, 7, num_prompts, generator=random, dtype=torch.float64)
    truncated = torch.rand(num_seeds, 7, num_prompts, generator=random, dtype=torch.float64)
    return Evaluated(torch.arange(7), kl, kl + 0.1 * normal(*kl.shape), reward, length, truncated)


def value(found: Estimate | None) -> float:
    assert found is not None
    return found.mean


# ------------------------------------------------------------------------------------------------------- known curves


def test_a_point_is_interpolated_between_two_evaluations() -> None:
    """On straight lines over the square root of the KL, which is 0, 2 and 4 here."""
    curve = run([0, 4, 16], [0, 1, 1.5])
    assert [value(reward_at_kl(curve, kl)) for kl in (0, 0.25, 4, 9, 16)] == pytest.approx([0, 0.25, 1, 1.25, 1.5])
    assert [value(kl_at_reward(curve, reward)) for reward in (0, 0.5, 1, 1.25)] == pytest.approx([0, 1, 4, 9])


def test_a_run_that_moves_far_between_evaluations_is_not_set_back() -> None:
    """Both are on one frontier, of the best that any policy can do; one is evaluated six times, the other twice."""
    task = EnumerableTask.random(seed=3)
    ref = sequence_logprobs(tabular_model(task, seed=0), task)
    best = [optimum(task, ref, beta) for beta in (1e6, 3.0, 1.5, 1.0, 0.75, 0.6)]
    kls, rewards = ([getattr(one, name).mean().item() for one in best] for name in ("kl", "reward"))
    often, seldom = run(kls, rewards), run([kls[0], kls[-1]], [rewards[0], rewards[-1]])
    chord = rewards[0] + (rewards[-1] - rewards[0]) * (kls[2] - kls[0]) / (kls[-1] - kls[0])
    gap = rewards[2] - chord
    assert gap > 0.1 * (rewards[-1] - rewards[0])  # what a straight line over the KL would lose
    assert abs(value(reward_at_kl(seldom, kls[2])) - rewards[2]) < 0.1 * gap
    often_area, seldom_area = (value(area_under_frontier(one, kls[-1])) for one in (often, seldom))
    chord_area = (rewards[0] + rewards[-1]) / 2 * (kls[-1] - kls[0])
    assert abs(seldom_area - often_area) < 0.15 * (often_area - chord_area)


def test_nothing_is_extrapolated() -> None:
    curve = arm([[0, 2, 4], [0, 1, 3]], [[0, 1, 1.5], [0, 0.6, 1.1]])
    assert kl_range(curve) == (0, 3)
    assert reward_range(curve) == (0, 1.1)
    assert reward_at_kl(curve, 3.0) is not None
    assert reward_at_kl(curve, 3.001) is None
    assert kl_at_reward(curve, 1.101) is None
    assert reward_at_kl(curve, -0.001) is None
    assert area_under_frontier(curve, 3.001) is None
    assert kl_range(curve, run([3.5, 4], [0, 1])) is None
    assert kl_range(curve, run([0.5, 2], [0, 1])) == (0.5, 2)
    assert reward_at_kl(run([1], [1]), 1) is None  # one evaluation is no curve


def test_a_run_that_turns_back_counts_where_it_first_crosses() -> None:
    """KL 0, 9, 1, 25: it is at 4 nats three times, first with a reward of 4 / 3, though later with more."""
    curve = run([0, 9, 1, 25], [0, 2, 4, 8])
    assert value(reward_at_kl(curve, 4)) == pytest.approx(4 / 3)
    assert value(reward_at_kl(curve, 16)) == pytest.approx(7)
    falling = run([16, 0], [0, 4])
    assert value(reward_at_kl(falling, 1)) == pytest.approx(3)
    assert value(kl_at_reward(run([0, 1, 4, 9], [0, 2, 1, 3]), 1.5)) == pytest.approx(0.75**2)
    still = run([0, 1, 1, 2], [0, 1, 5, 6])
    assert value(reward_at_kl(still, 1)) == pytest.approx(1)


def test_an_arm_is_the_mean_of_its_seeds() -> None:
    curve = arm([[0, 4], [0, 16]], [[0, 2], [1, 3]])
    found = reward_at_kl(curve, 1)
    assert found is not None
    assert found.by_seed == pytest.approx((1, 1.5))
    assert found.mean == pytest.approx(1.25)
    assert found.seeds_included
    assert not found.prompts_included


def test_the_area_is_that_of_the_first_crossings() -> None:
    straight = run([0, 4, 16], [1, 1, 3])  # over the square root 1, then sqrt(KL) - 1
    assert value(area_under_frontier(straight, 16)) == pytest.approx(4 + 2 / 3 * (64 - 8) - 12)
    assert value(area_under_frontier(straight, 9)) == pytest.approx(4 + 2 / 3 * (27 - 8) - 5)
    assert value(area_under_frontier(straight, 9, 1)) == pytest.approx(3 + 2 / 3 * (27 - 8) - 5)
    # 0 to 9 on the first line, from 9 on along the last, which is sqrt(KL) + 3.
    turning = run([0, 9, 1, 25], [0, 2, 4, 8])
    assert value(area_under_frontier(turning, 25)) == pytest.approx(2 / 3 * 2 / 3 * 27 + 2 / 3 * (125 - 27) + 3 * 16)
    later = run([1, 9], [0, 2])
    assert area_under_frontier(later, 9, 0) is None
    assert value(area_under_frontier(later, 9)) == pytest.approx(2 / 3 * (27 - 1) - 8)
    with pytest.raises(ValueError, match="not above its start at 3"):
        area_under_frontier(straight, 2, 3)


def test_the_area_is_the_integral_of_the_reward_at_a_kl() -> None:
    arms = sampled()
    area = area_under_frontier(arms, 4)
    rewards = [value(reward_at_kl(arms, kl)) for kl in torch.linspace(0, 4, 161).tolist()]
    assert value(area) == pytest.approx(torch.trapezoid(torch.tensor(rewards), dx=4 / 160).item(), rel=1e-3)


# --------------------------------------------------------------------------------------------------------------- errors


def without_prompt(evaluated: Evaluated, prompt: int) -> Evaluated:
    kept = torch.arange(evaluated.num_prompts) != prompt
    names = ("kl", "kl_k1", "reward", "length")
    return replace(evaluated, truncated=None, **{name: getattr(evaluated, name)[..., kept] for name in names})


ASKED: dict[str, Callable[[Evaluated], Any]] = {
    "reward at KL": lambda e: reward_at_kl(e, 3.1),
    "KL at reward": lambda e: kl_at_reward(e, 1.3),
    "area": lambda e: area_under_frontier(e, 4.2, 0.5),
    "linear slope": lambda e: fit_frontier(e, "linear").slope,  # type: ignore[union-attr]
    "square-root slope": lambda e: fit_frontier(e, "sqrt").slope,  # type: ignore[union-attr]
    "square-root intercept": lambda e: fit_frontier(e, "sqrt").intercept,  # type: ignore[union-attr]
    "KL a token": lambda e: table1_row(e).kl_per_token,
}


@pytest.mark.parametrize("name", ASKED)
def test_the_error_over_prompts_is_that_of_leaving_each_out(name: str) -> None:
    """Prompts are left out of KL and reward alike, with no derivative: the jackknife."""
    arms = sampled(num_prompts=60)
    found = ASKED[name](arms)
    without = torch.tensor([ASKED[name](without_prompt(arms, p)).mean for p in range(60)], dtype=torch.float64)
    jackknife = math.sqrt(59 / 60 * (without - without.mean()).square().sum().item())
    assert found.prompt_error == pytest.approx(jackknife, rel=0.06)
    assert found.mean == pytest.approx(sum(found.by_seed) / 3, rel=1e-12)


def test_no_gradient_mode_of_the_caller_matters() -> None:
    arms = sampled()
    with torch.no_grad():
        assert reward_at_kl(arms, 3) == reward_at_kl(sampled(), 3)


# ---------------------------------------------------------------------------------------------------------- differences


def test_a_difference_is_confirmed_only_with_seeds_that_agree() -> None:
    """One curve above the other by far more than prompts scatter; what is left is whether the seeds say so too."""
    kl = [[0.0, 4.0, 16.0]] * 3
    better, worse = arm(kl, [[0, 2.0, 3.0], [0, 2.1, 3.1], [0, 1.9, 2.9]]), arm(kl, [[0, 1.0, 1.5]] * 3)
    found = compare_reward_at_kl(better, worse, 9)
    assert found.word == "confirmed"
    assert value(found.estimate) == pytest.approx(1.25)
    erratic = arm(kl, [[0, 3.5, 4.5], [0, 2.0, 3.0], [0, 0.5, 1.5]])
    assert compare_reward_at_kl(erratic, worse, 9).word == "not confirmed"
    one = run([0, 4, 16], [0, 2, 3], num_prompts=50)
    found = compare_reward_at_kl(one, run([0, 4, 16], [0, 1, 1.5], num_prompts=50), 9)
    assert not found.confirmed
    assert "one training seed" in found.reason
    assert value(found.estimate) == pytest.approx(1.25)
    nowhere = compare_reward_at_kl(better, worse, 17)
    assert (nowhere.estimate, nowhere.confirmed) == (None, False)
    assert "not every run" in nowhere.reason


def test_prompts_are_paired_and_sides_mirror_each_other() -> None:
    a, b = sampled(seed=1), sampled(seed=1, gain=0.9)
    alone = reward_at_kl(a, 3)
    assert alone is not None
    for compare in (compare_reward_at_kl, compare_area):
        found, mirrored = compare(a, b, 3.0).estimate, compare(b, a, 3.0).estimate
        assert found is not None
        assert mirrored is not None
        assert (mirrored.low, mirrored.mean, mirrored.high) == pytest.approx((-found.high, -found.mean, -found.low))
    difference = compare_reward_at_kl(a, b, 3).estimate
    assert difference is not None
    assert difference.prompt_error < 0.3 * alone.prompt_error
    reached = compare_kl_at_reward(a, b, 1.2).estimate
    assert reached is not None
    assert reached.mean == pytest.approx(value(kl_at_reward(a, 1.2)) - value(kl_at_reward(b, 1.2)))
    assert reached.mean < 0
    assert value(compare_at(a, b, "reward", 0).estimate) == pytest.approx(0)
    assert value(compare_at(a, b, "kl").estimate) == pytest.approx((a.kl[:, -1] - b.kl[:, -1]).mean().item())


def test_areas_are_compared_from_a_common_start() -> None:
    early, late = run([0, 16], [0, 4]), run([4, 16], [1, 3])  # sqrt(KL) and sqrt(KL) - 1, from 4 to 16 nats
    found = compare_area(early, late, 16).estimate
    assert value(found) == pytest.approx(12)


def test_points_hold_what_their_evaluation_does() -> None:
    arms = sampled()
    points = frontier(arms)
    assert [point.step for point in points] == list(range(7))
    assert points[3].kl == estimate_mean(arms.kl[:, 3])
    assert points[3].kl_k1 == estimate_mean(arms.kl_k1[:, 3])
    assert points[3].reward == estimate_mean(arms.reward[:, 3])
    assert points[0].kl[:3] == (0, 0, 0)


def test_wrong_shapes_are_refused() -> None:
    arms = sampled()
    with pytest.raises(ValueError, match=r"\(S, 6, P\)"):
        replace(arms, steps=arms.steps[1:])
    with pytest.raises(ValueError, match="as many evaluations as steps"):
        replace(arms, reward=arms.reward[..., 1:])
    with pytest.raises(ValueError, match="truncated is not known"):
        compare_at(replace(arms, truncated=None), arms, "truncated")
    with pytest.raises(ValueError, match="prompts must be the same"):
        compare_reward_at_kl(arms, sampled(num_prompts=39), 3)


# ----------------------------------------------------------------------------------------------------------------- fits


def test_a_fit_finds_the_line_it_was_made_of() -> None:
    kl = torch.linspace(0, 9, 10, dtype=torch.float64)
    linear = fit_frontier(run(kl.tolist(), (0.5 + 0.2 * kl).tolist()), "linear")
    assert linear is not None
    assert (linear.intercept.mean, linear.slope.mean) == pytest.approx((0.5, 0.2))
    assert linear.r_squared == pytest.approx(1)
    assert linear.residual_std == pytest.approx(0, abs=1e-12)
    assert linear.reward(4) == pytest.approx(1.3)
    root = fit_frontier(run(kl.tolist(), (0.5 + 0.2 * kl.sqrt()).tolist()), "sqrt")
    assert root is not None
    assert (root.intercept.mean, root.slope.mean) == pytest.approx((0.5, 0.2))
    assert root.reward(4) == pytest.approx(0.9)


def test_a_fit_equals_the_least_squares_of_linear_algebra() -> None:
    arms = sampled()
    found = fit_frontier(arms, "sqrt")
    assert found is not None
    kls, rewards = arms.kl.mean(-1).sqrt(), arms.reward.mean(-1)
    residual = total = 0.0
    for s in range(3):
        design = torch.stack([torch.ones(7, dtype=torch.float64), kls[s]], 1)
        line = torch.linalg.lstsq(design, rewards[s, :, None]).solution
        assert (found.intercept.by_seed[s], found.slope.by_seed[s]) == pytest.approx(tuple(line[:, 0].tolist()))
        residual += (rewards[s] - (design @ line)[:, 0]).square().sum().item()
        total += (rewards[s] - rewards[s].mean()).square().sum().item()
    assert found.r_squared == pytest.approx(1 - residual / total)
    assert found.residual_std == pytest.approx(math.sqrt(residual / 3 / 5))


def test_no_fit_through_too_few_points() -> None:
    assert fit_frontier(run([0, 1], [0, 1]), "linear") is None
    assert fit_frontier(run([1, 1, 1], [0, 1, 2]), "linear") is None


# ----------------------------------------------------------------------------------------------------- reference curves


def test_best_of_n_is_the_mean_over_all_subsets() -> None:
    rewards = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rewards[1] = 2.0  # all tie
    found = best_of_n_curve(rewards, range(1, 7))
    for point in found:
        by_hand = [sum(max(s) for s in combinations(row, point.n)) / math.comb(6, point.n) for row in rewards.tolist()]
        assert point.reward.mean == pytest.approx(sum(by_hand) / 5, rel=1e-12)
        assert point.kl_bound == pytest.approx(math.log(point.n) - (point.n - 1) / point.n)
    assert found[0].reward[:5] == pytest.approx(estimate_mean(rewards.mean(1), fixed=True)[:5], nan_ok=True)
    assert found[0].reward.seeds_included
    assert [point.n for point in best_of_n_curve(rewards)] == [1, 2, 4]


def test_completions_without_a_reward_do_not_count() -> None:
    rewards = torch.tensor([[3.0, math.nan, 1.0, 2.0], [math.nan, 5.0, math.nan, math.nan]], dtype=torch.float64)
    one, two, three = best_of_n_curve(rewards, [1, 2, 3, 4])
    assert one.reward.mean == pytest.approx((2 + 5) / 2)
    assert two.reward.mean == pytest.approx((3 + 3 + 2) / 3)
    assert three.reward.mean == pytest.approx(3)
    with pytest.raises(ValueError, match="n must be at least 1, but it is 0"):
        best_of_n_curve(rewards, [0])


@pytest.fixture(scope="module")
def task() -> EnumerableTask:
    return EnumerableTask.random(seed=3)


def test_the_optimum_at_any_beta_lies_on_the_frontier(task: EnumerableTask) -> None:
    ref = sequence_logprobs(tabular_model(task, seed=0), task)
    for beta in (30.0, 3.0, 0.7, 0.3, 0.1, 0.03, 0.011):
        best = optimum(task, ref, beta)
        gap = gap_to_optimum(task, ref, best.kl.mean(), best.reward.mean())
        assert abs(gap.item()) < 1e-7
    start = (ref.exp() * task.rewards).sum(-1).mean().item()
    most = task.rewards.amax(1).mean().item()
    found = optimal_reward(task, ref, torch.tensor([[-0.1, 0.0], [100.0, math.nan]]))
    assert found[0].tolist() == pytest.approx([start, start], abs=1e-12)
    assert found[1, 0].item() == pytest.approx(most, abs=1e-7)
    assert math.isnan(found[1, 1])


def test_no_policy_lies_above_the_frontier(task: EnumerableTask) -> None:
    ref = sequence_logprobs(tabular_model(task, seed=0), task)
    random = torch.Generator().manual_seed(0)
    for scale in (0.01, 0.1, 1.0, 10.0):
        logits = ref + scale * (task.rewards + torch.randn(200, *ref.shape, generator=random, dtype=torch.float64))
        policy = logits.log_softmax(-1)
        kl = (policy.exp() * (policy - ref)).sum(-1).mean(-1)
        reward = (policy.exp() * task.rewards).sum(-1).mean(-1)
        gap = gap_to_optimum(task, ref, kl, reward)
        assert gap.shape == (200,)
        assert (gap > -1e-7).all()
        assert gap.max() > 1e-3 * scale


def test_a_task_without_a_choice_has_a_flat_frontier(task: EnumerableTask) -> None:
    flat = replace(task, rewards=torch.full_like(task.rewards, 0.25))
    ref = sequence_logprobs(tabular_model(task, seed=0), task)
    assert optimal_reward(flat, ref, torch.tensor([0.0, 1.0, 50.0])).tolist() == pytest.approx([0.25] * 3)


# -------------------------------------------------------------------------------------------------------------- table 1


def test_the_table_holds_each_metric_of_one_evaluation() -> None:
    arms = sampled()
    row = table1_row(arms, 2, distinct=[Interval(0.5, 0.4, 0.6)] * 3)
    assert row.reward == estimate_mean(arms.reward[:, 2])
    assert row.kl == estimate_mean(arms.kl[:, 2])
    assert row.kl_per_token == estimate_ratio(arms.kl[:, 2], arms.length[:, 2])
    assert row.tokens == estimate_mean(arms.length[:, 2])
    assert arms.truncated is not None
    assert row.finished == estimate_mean(1 - arms.truncated[:, 2], share=True)
    assert row.distinct is not None
    assert row.distinct.mean == 0.5
    plain = table1_row(replace(arms, truncated=None))
    assert (plain.finished, plain.distinct) == (None, None)


def test_intervals_of_runs_are_combined_with_the_scatter_of_their_means() -> None:
    alike = combine_seeds([Interval(0.5, 0.4, 0.7)] * 3)
    assert (alike.mean, alike.low, alike.high) == pytest.approx((0.5, 0.4, 0.7))
    assert alike.prompt_error == pytest.approx(0.15 / 1.959964, rel=1e-6)
    apart = combine_seeds([Interval(m, m - 0.1, m + 0.1) for m in (0.3, 0.5, 0.7)])
    assert apart.high - 0.5 == pytest.approx(math.hypot(0.1, 4.302653 * 0.2 / math.sqrt(3)), rel=1e-6)
    assert apart.by_seed == (0.3, 0.5, 0.7)
    one = combine_seeds([Interval(0.5, 0.4, 0.7)])
    assert (one.mean, one.low, one.high, one.seeds_included) == (0.5, 0.4, 0.7, False)
    with pytest.raises(ValueError, match="no run"):
        combine_seeds([])

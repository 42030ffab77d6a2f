"""Baselines, token rewards, GAE and whitening, each against a plain loop."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pairtune.maths import advantages as adv

inf, nan = math.inf, math.nan
BASELINES = {
    "leave_one_out": adv.leave_one_out,
    "group_centred": adv.group_centred,
    "group_standardised": adv.group_standardised,
}


def random_groups(num_completions: int, *, num_groups: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(num_groups, num_completions, dtype=torch.float64, generator=generator)
    return rewards, torch.rand(rewards.shape, generator=generator) < 0.7


# ------------------------------------------------------------------------------------------------ baselines of a group


def plain_baseline(name: str, rewards: list[float], mask: list[bool]) -> list[float]:
    counted = [r for r, m in zip(rewards, mask, strict=True) if m]
    result = []
    for i, counts in enumerate(mask):
        others = [r for j, r in enumerate(rewards) if mask[j] and j != i]
        if not counts or not others:
            result.append(0.0)
        elif name == "leave_one_out":
            result.append(rewards[i] - statistics.fmean(others))
        elif name == "group_centred":
            result.append(rewards[i] - statistics.fmean(counted))
        else:
            result.append((rewards[i] - statistics.fmean(counted)) / (statistics.pstdev(counted) + 1e-4))
    return result


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("num_completions", [1, 2, 3, 6])
def test_a_baseline_is_that_of_a_plain_loop(name: str, num_completions: int) -> None:
    rewards, mask = random_groups(num_completions)
    expected = [plain_baseline(name, r, m) for r, m in zip(rewards.tolist(), mask.tolist(), strict=True)]
    result = BASELINES[name](rewards, mask)
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(BASELINES[name](rewards), BASELINES[name](rewards, torch.ones_like(mask)))


def test_leave_one_out_is_the_centred_reward_times_k_over_k_minus_one() -> None:
    for num_completions in (2, 3, 7):
        rewards, _ = random_groups(num_completions)
        factor = num_completions / (num_completions - 1)
        centred = rewards - rewards.mean(-1, keepdim=True)
        torch.testing.assert_close(adv.leave_one_out(rewards), factor * centred, rtol=0, atol=1e-12)
        torch.testing.assert_close(adv.leave_one_out(rewards), factor * adv.group_centred(rewards), rtol=0, atol=1e-12)


def test_a_standardised_pair_keeps_the_sign_alone() -> None:
    rewards = torch.tensor([[3.0, -4.0], [0.0, 1e-6], [2.0, 2.0]], dtype=torch.float64)
    signs = adv.group_standardised(rewards, eps=0.0)
    torch.testing.assert_close(signs, torch.tensor([[1.0, -1.0], [-1.0, 1.0], [0.0, 0.0]]).double())
    assert adv.group_standardised(rewards)[1].abs().max() < 0.01


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("reward", [0.1, -1e6, 1 / 3])
def test_equal_rewards_have_exactly_no_advantage(name: str, reward: float) -> None:
    """The float32 mean of three times 0.1 is not 0.1."""
    options = {"eps": 0.0} if name == "group_standardised" else {}
    assert BASELINES[name](torch.full((2, 3), reward), **options).eq(0).all()


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("poison", [nan, inf, -inf])
def test_masked_rewards_are_not_read(name: str, poison: float) -> None:
    rewards, _ = random_groups(5)
    mask = torch.tensor([True, False, True, True, False]).expand_as(rewards)
    result = BASELINES[name](torch.where(mask, rewards, poison), mask)
    torch.testing.assert_close(result[:, mask[0]], BASELINES[name](rewards[:, mask[0]]), rtol=0, atol=1e-12)
    assert result[~mask].eq(0).all()


@settings(max_examples=40)
@given(
    name=st.sampled_from(sorted(BASELINES)),
    rewards=st.lists(st.integers(-640, 640), min_size=2, max_size=5),
    shift=st.integers(-(2**16), 2**16),
)
def test_a_shift_of_a_prompts_rewards_changes_no_bit(name: str, rewards: list[int], shift: int) -> None:
    r = torch.tensor(rewards) / 64
    assert torch.equal(BASELINES[name](r), BASELINES[name](r + shift / 64))


# --------------------------------------------------------------------------------------------- baseline over training


def test_the_moving_average_is_the_mean_of_all_rewards_before() -> None:
    rewards, mask = random_groups(3, num_groups=6)
    average, seen = adv.MovingAverage(), []
    for r, m in zip(rewards, mask, strict=True):
        before = average
        assert average.mean == pytest.approx(statistics.fmean(seen) if seen else 0.0, abs=1e-12)
        average = adv.update_moving_average(average, torch.where(m, r, nan), m)
        seen += r[m].tolist()
        assert before is not average
    assert average.count == len(seen)
    assert average.mean == pytest.approx(statistics.fmean(seen), abs=1e-12)
    assert adv.update_moving_average(adv.MovingAverage(), rewards).mean == pytest.approx(rewards.mean().item())


# -------------------------------------------------------------------------------------------------- credit of a token


def random_tokens(*, num_tokens: int = 7, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """rewards (N,), log-ratios, values and mask (N, T); completions of every length from 0 to T."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(num_tokens + 1, dtype=torch.float64, generator=generator)
    logratio, values = torch.randn(2, num_tokens + 1, num_tokens, dtype=torch.float64, generator=generator)
    mask = torch.arange(num_tokens) < torch.arange(num_tokens + 1)[:, None]
    return rewards, logratio, values, mask


def test_token_rewards_put_the_score_on_the_last_token() -> None:
    result = adv.token_rewards(
        torch.tensor([5.0, 7.0, nan]),
        torch.tensor([[1.0, 2.0, nan], [1.0, -2.0, 4.0], [inf, nan, nan]]),
        beta=0.5,
        mask=torch.tensor([[True, True, False], [True, True, True], [False, False, False]]),
    )
    assert result.tolist() == [[-0.5, 4.0, 0.0], [-0.5, 1.0, 5.0], [0.0, 0.0, 0.0]]


def test_a_gap_in_a_completion_has_no_reward() -> None:
    mask = torch.tensor([True, False, True, False])
    result = adv.token_rewards(torch.tensor(5.0), torch.tensor([1.0, nan, 2.0, nan]), beta=0.5, mask=mask)
    assert result.tolist() == [-0.5, 0.0, 4.0, 0.0]
    assert adv.rewards_to_go(result, mask).tolist() == [3.5, 0.0, 4.0, 0.0]


def test_token_rewards_sum_to_the_trajectory_reward() -> None:
    rewards, logratio, _, mask = random_tokens()
    result = adv.token_rewards(rewards, logratio, beta=0.3, mask=mask)
    expected = rewards - 0.3 * (logratio * mask).sum(-1)
    torch.testing.assert_close(result.sum(-1)[1:], expected[1:], rtol=0, atol=1e-12)
    assert result[0].eq(0).all()


def plain_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """The recursion, from the last token to the first."""
    advantages: list[float] = []
    next_value = next_advantage = 0.0
    for r, v in zip(reversed(rewards), reversed(values), strict=True):
        next_advantage = r + gamma * next_value - v + gamma * lam * next_advantage
        next_value = v
        advantages.insert(0, next_advantage)
    return advantages


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (1.0, 1.0), (0.9, 0.8), (1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("num_tokens", [1, 2, 5, 8, 9])
def test_gae_is_that_of_a_plain_loop(gamma: float, lam: float, num_tokens: int) -> None:
    _, rewards, values, mask = random_tokens(num_tokens=num_tokens)
    poisoned = [torch.where(mask, x, nan) for x in (rewards, values)]
    result = adv.gae(*poisoned, mask, gamma=gamma, lam=lam)
    for row in range(len(mask)):
        n = int(mask[row].sum())
        expected = plain_gae(rewards[row, :n].tolist(), values[row, :n].tolist(), gamma, lam)
        assert result[row, :n].tolist() == pytest.approx(expected, abs=1e-12)
        assert result[row, n:].eq(0).all()


def test_a_reward_is_discounted_by_the_tokens_between() -> None:
    """Not by one more, as the P3O paper prints."""
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.zeros(1, 3)
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert adv.gae(rewards, values, mask, gamma=0.5, lam=0.5).tolist() == [[1 / 16, 1 / 4, 1.0]]


def test_without_values_and_discount_gae_is_the_rewards_to_go() -> None:
    _, rewards, values, mask = random_tokens()
    to_go = adv.rewards_to_go(torch.where(mask, rewards, nan), mask)
    for row in range(len(mask)):
        n = int(mask[row].sum())
        assert to_go[row, :n].tolist() == pytest.approx([rewards[row, t:n].sum().item() for t in range(n)], abs=1e-12)
        assert to_go[row, n:].eq(0).all()
    without_values = adv.gae(rewards, torch.zeros_like(rewards), mask, gamma=1.0, lam=1.0)
    torch.testing.assert_close(without_values, to_go, rtol=0, atol=1e-12)
    # With lambda 1 the value target is the reward-to-go whatever the values are.
    targets = adv.returns(adv.gae(rewards, values, mask, gamma=1.0, lam=1.0), values, mask)
    torch.testing.assert_close(targets, to_go, rtol=0, atol=1e-12)


def test_returns_add_the_values_where_a_token_counts() -> None:
    advantages, values = torch.tensor([1.0, 2.0, nan]), torch.tensor([10.0, 20.0, inf])
    assert adv.returns(advantages, values, torch.tensor([True, True, False])).tolist() == [11.0, 22.0, 0.0]


def test_whitening_has_the_masked_mean_and_population_variance() -> None:
    _, x, _, mask = random_tokens(seed=3)
    counted = (3 * x + 5)[mask].tolist()
    whitened = adv.whiten(torch.where(mask, 3 * x + 5, nan), mask)
    mean, std = statistics.fmean(counted), math.sqrt(statistics.pvariance(counted) + 1e-8)
    assert whitened[mask].tolist() == pytest.approx([(v - mean) / std for v in counted], abs=1e-12)
    assert whitened[~mask].eq(0).all()
    kept = adv.whiten(torch.where(mask, 3 * x + 5, nan), mask, shift_mean=False)
    assert kept[mask].tolist() == pytest.approx([(v - mean) / std + mean for v in counted], abs=1e-12)
    assert kept[~mask].eq(0).all()


def test_whitening_values_without_spread_stays_finite() -> None:
    mask = torch.tensor([True, True, False])
    assert adv.whiten(torch.tensor([2.0, 2.0, nan]), mask).tolist() == [0.0, 0.0, 0.0]
    assert adv.whiten(torch.full((3,), nan), torch.zeros(3, dtype=torch.bool)).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("more", [1, 9])
def test_padding_changes_nothing(more: int) -> None:
    rewards, logratio, values, mask = random_tokens()
    padded_logratio, padded_values = (torch.nn.functional.pad(x, (0, more), value=nan) for x in (logratio, values))
    padded_mask = torch.nn.functional.pad(mask, (0, more), value=False)

    def pipeline(logratio: Tensor, values: Tensor, mask: Tensor) -> list[Tensor]:
        token_rewards = adv.token_rewards(rewards, logratio, beta=0.1, mask=mask)
        advantages = adv.gae(token_rewards, values, mask)
        targets = adv.returns(advantages, values, mask)
        return [
            token_rewards,
            adv.rewards_to_go(token_rewards, mask),
            advantages,
            targets,
            adv.whiten(advantages, mask),
        ]

    before, after = pipeline(logratio, values, mask), pipeline(padded_logratio, padded_values, padded_mask)
    for x, y in zip(before, after, strict=True):
        torch.testing.assert_close(x, y[:, :-more], rtol=0, atol=1e-13)
        assert y[:, -more:].eq(0).all()


def test_nothing_carries_a_gradient() -> None:
    x, mask = torch.randn(3, 4, requires_grad=True), torch.ones(3, 4, dtype=torch.bool)
    results = [baseline(x) for baseline in BASELINES.values()]
    results += [adv.token_rewards(x[:, 0], x, beta=0.1, mask=mask), adv.rewards_to_go(x, mask), adv.gae(x, x, mask)]
    results += [adv.returns(x, x, mask), adv.whiten(x, mask)]
    assert not any(y.requires_grad for y in results)


# --------------------------------------------------------------------------------------------------------- wrong calls


def test_a_wrong_call_says_what_is_wrong() -> None:
    x, mask = torch.zeros(3, 4), torch.ones(3, 4, dtype=torch.bool)
    for function in (*BASELINES.values(), adv.rewards_to_go, adv.whiten):
        with pytest.raises(ValueError, match=r"mask must have one shape.*\(3, 4\), \(3, 1\)"):
            function(x, mask[:, :1])
        with pytest.raises(ValueError, match="mask must be bool"):
            function(x, x)
    for function in (adv.gae, adv.returns):
        with pytest.raises(ValueError, match="values and mask must have one shape"):
            function(x, x[:, :1], mask)
    with pytest.raises(ValueError, match="rewards and mask must have one shape"):
        adv.update_moving_average(adv.MovingAverage(), x, mask[:1])
    with pytest.raises(ValueError, match="logratio and mask must have one shape"):
        adv.token_rewards(x[:, 0], x[:, :1], beta=0.1, mask=mask)
    with pytest.raises(ValueError, match=r"rewards must be one a completion, \(3,\).*\(3, 4\)"):
        adv.token_rewards(x, x, beta=0.1, mask=mask)
    with pytest.raises(ValueError, match="at least one dimension"):
        adv.leave_one_out(torch.tensor(1.0))
    with pytest.raises(ValueError, match="eps must be at least 0"):
        adv.group_standardised(x, eps=-1.0)
    for name, bad in (("gamma", 1.1), ("lam", -0.1)):
        with pytest.raises(ValueError, match=f"{name} must lie between 0 and 1"):
            adv.gae(x, x, mask, **{name: bad})
    gap = torch.tensor([True, False, True, False]).expand(3, 4)
    with pytest.raises(ValueError, match="without a gap"):
        adv.gae(x, x, gap)

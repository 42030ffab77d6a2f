"""The whole of P3O's gradient on a policy of which every completion can be written down.

15 completions of at most 3 tokens from a vocabulary of 3; the expectation over all groups that could be sampled is a
finite sum.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pairtune.maths import pairwise
from pairtune.maths.kl import kl_shaped_rewards

from .tabular import TabularPolicy, estimator_variance, expected_loss_gradient, objective_gradient

LOSSES: dict[str, Callable[..., Tensor]] = {
    "joint": pairwise.p3o_joint_loss,
    "separate": pairwise.p3o_separate_loss,
    "none": pairwise.pairwise_policy_gradient_loss,
}
# A clip too wide to touch anything: what is left is the importance-weighted estimator.
UNCLIPPED: dict[str, Callable[..., Tensor]] = {
    "joint": lambda *args, **options: pairwise.p3o_joint_loss(*args, epsilon=1e9, **options),
    "separate": lambda *args, **options: pairwise.p3o_separate_loss(*args, epsilon=1e9, **options),
    "none": pairwise.pairwise_policy_gradient_loss,
}
BETA = 0.3
POLICY = TabularPolicy()
THETA, OLD_THETA = POLICY.logits(0), POLICY.logits(1)
REWARDS = POLICY.rewards(3)
REF_LOGPROBS = POLICY.sequence_logprobs(POLICY.logits(2))


def current_kl(groups: Tensor, logprobs: Tensor) -> Tensor:
    """Trajectory rewards with the KL term of the policy that is updated (`kl_at: current`)."""
    return kl_shaped_rewards(REWARDS[groups], logprobs - REF_LOGPROBS[groups], BETA)


def sampling_kl(groups: Tensor, logprobs: Tensor) -> Tensor:
    """Trajectory rewards with the KL term of the policy that sampled (`kl_at: sampling`, Algorithm 2 of the paper)."""
    return kl_shaped_rewards(REWARDS[groups], (POLICY.sequence_logprobs(OLD_THETA) - REF_LOGPROBS)[groups], BETA)


TRUE_GRADIENT = objective_gradient(POLICY, THETA, REWARDS, REF_LOGPROBS, BETA)


def test_the_tabular_policy_is_a_distribution_with_zero_mean_scores() -> None:
    probs = POLICY.sequence_logprobs(THETA).exp()
    assert len(POLICY.completions) == len(set(POLICY.completions)) == 15
    assert probs.sum().item() == pytest.approx(1, abs=1e-12)
    assert (probs @ POLICY.scores(THETA)).abs().max() < 1e-12


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("num_completions", [2, 3])
def test_at_ratio_one_the_expected_gradient_is_exact(kind: str, num_completions: int) -> None:
    """-grad of E[r] - beta KL(policy || reference), to 1e-10."""
    gradient = expected_loss_gradient(POLICY, LOSSES[kind], THETA, THETA, num_completions, current_kl)
    assert TRUE_GRADIENT.abs().max() > 0.1
    torch.testing.assert_close(gradient, -TRUE_GRADIENT, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", UNCLIPPED)
@pytest.mark.parametrize("num_completions", [2, 3])
def test_with_the_current_kl_it_is_exact_for_any_sampling_policy(kind: str, num_completions: int) -> None:
    gradient = expected_loss_gradient(POLICY, UNCLIPPED[kind], THETA, OLD_THETA, num_completions, current_kl)
    torch.testing.assert_close(gradient, -TRUE_GRADIENT, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", UNCLIPPED)
def test_with_the_sampling_kl_it_is_another_gradient(kind: str) -> None:
    """That of E[r - beta * log(old / reference)]: further drift costs nothing. Here it is off by 0.125."""
    gradient = expected_loss_gradient(POLICY, UNCLIPPED[kind], THETA, OLD_THETA, 2, sampling_kl)
    frozen = REWARDS - BETA * (POLICY.sequence_logprobs(OLD_THETA) - REF_LOGPROBS)
    without_penalty = objective_gradient(POLICY, THETA, frozen, REF_LOGPROBS, 0.0)
    torch.testing.assert_close(gradient, -without_penalty, rtol=0, atol=1e-10)
    assert (gradient + TRUE_GRADIENT).abs().max() > 0.1


@pytest.mark.parametrize("kind", LOSSES)
def test_a_clamped_weight_or_a_clip_makes_it_biased(kind: str) -> None:
    """What `max_ratio` and `epsilon` buy is paid for: away from ratio 1 the gradient is no longer exact."""

    def clamped(*args: Tensor) -> Tensor:
        return UNCLIPPED[kind](*args, max_ratio=1.5)

    losses = [clamped] if kind == "none" else [clamped, LOSSES[kind]]
    for loss in losses:
        gradient = expected_loss_gradient(POLICY, loss, THETA, OLD_THETA, 2, current_kl)
        assert (gradient + TRUE_GRADIENT).abs().max() > 0.01


# --------------------------------------------------------------------------- one gradient under many names, at ratio 1


def gradient_at_ratio_one(loss: Callable[..., Tensor], logprobs: Tensor, rewards: Tensor, **options: object) -> Tensor:
    """(N, K) minus the gradient of the loss by the sequence log-probabilities: what each completion's score is
    multiplied by."""
    leaf = logprobs.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf, logprobs, rewards, **options).sum(), leaf)
    return -gradient


def leave_one_out(rewards: Tensor) -> Tensor:
    """(1/K) (R_i - mean of the others), the mean form of RLOO (Ahmadian et al. 2024, section 2.3)."""
    num_completions = rewards.shape[-1]
    others = [rewards[..., torch.arange(num_completions) != i].mean(-1) for i in range(num_completions)]
    return (rewards - torch.stack(others, -1)) / num_completions


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("num_completions", [2, 3, 5])
def test_the_mean_over_pairs_is_leave_one_out(kind: str, num_completions: int) -> None:
    generator = torch.Generator().manual_seed(5)
    logprobs, rewards = torch.randn(2, 40, num_completions, dtype=torch.float64, generator=generator)
    coefficients = gradient_at_ratio_one(LOSSES[kind], logprobs, rewards)
    torch.testing.assert_close(coefficients, leave_one_out(rewards), rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", LOSSES)
def test_with_a_mask_it_is_leave_one_out_of_those_that_count(kind: str) -> None:
    generator = torch.Generator().manual_seed(6)
    logprobs, rewards = torch.randn(2, 40, 4, dtype=torch.float64, generator=generator)
    mask = torch.tensor([True, False, True, True]).expand_as(rewards)
    coefficients = gradient_at_ratio_one(LOSSES[kind], logprobs, rewards, mask=mask)
    torch.testing.assert_close(coefficients[:, mask[0]], leave_one_out(rewards[:, mask[0]]), rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", LOSSES)
def test_for_pairs_it_is_half_of_copg(kind: str) -> None:
    """CoPG (arXiv 2406.19185) maximises -(dr - beta * du)^2 / (2 beta) with its gradient through u = log(policy /
    reference)."""
    generator = torch.Generator().manual_seed(7)
    logprobs, ref, rewards = torch.randn(3, 40, 2, dtype=torch.float64, generator=generator)
    leaf = logprobs.clone().requires_grad_()
    du = (leaf - ref)[:, 0] - (leaf - ref)[:, 1]
    copg = -((rewards[:, 0] - rewards[:, 1] - BETA * du) ** 2) / (2 * BETA)
    (expected,) = torch.autograd.grad(copg.sum(), leaf)
    coefficients = gradient_at_ratio_one(LOSSES[kind], logprobs, kl_shaped_rewards(rewards, logprobs - ref, BETA))
    torch.testing.assert_close(coefficients, expected / 2, rtol=0, atol=1e-14)


# ---------------------------------------------------------------------------------- the exact variance of the gradient


LOGPROBS = POLICY.sequence_logprobs(THETA)
TRAJECTORY_REWARDS = REWARDS - BETA * (LOGPROBS - REF_LOGPROBS)


def p3o_variance(num_completions: int, kind: str = "joint", offset: float = 0.0) -> float:
    """The variance of one group's gradient, times K: at an equal number of completions sampled."""
    groups = POLICY.groups(num_completions)
    shaped = kl_shaped_rewards((REWARDS + offset)[groups], (LOGPROBS - REF_LOGPROBS)[groups], BETA)
    coefficients = gradient_at_ratio_one(LOSSES[kind], LOGPROBS[groups], shaped)
    mean, variance = estimator_variance(POLICY, THETA, coefficients, groups)
    torch.testing.assert_close(mean, TRUE_GRADIENT.flatten(), rtol=0, atol=1e-10)
    return num_completions * variance


def reinforce_variance(offset: float, baseline: float = 0.0) -> float:
    """The variance of (R - baseline) * score for one completion."""
    single = POLICY.groups(1)[:, None]
    coefficients = TRAJECTORY_REWARDS[single] + offset - baseline
    mean, variance = estimator_variance(POLICY, THETA, coefficients, single)
    torch.testing.assert_close(mean, TRUE_GRADIENT.flatten(), rtol=0, atol=1e-10)
    return variance


EXACT_BASELINE = reinforce_variance(0.0, (LOGPROBS.exp() @ TRAJECTORY_REWARDS).item())
"""REINFORCE with E[R] itself for a baseline, which nobody knows."""


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("num_completions", [2, 3])
def test_the_variance_is_that_of_leave_one_out(kind: str, num_completions: int) -> None:
    """And all three clippings have it, since their gradients agree group by group."""
    groups = POLICY.groups(num_completions)
    _, expected = estimator_variance(POLICY, THETA, leave_one_out(TRAJECTORY_REWARDS[groups]), groups)
    assert p3o_variance(num_completions, kind) == pytest.approx(num_completions * expected, rel=1e-12)


def test_the_variance_for_k_completions_is_that_of_a_u_statistic() -> None:
    """Hoeffding's formula, with the exact baseline's variance as the part that no number of completions takes away.

    Per completion sampled, on this task: 1.069 for K = 2, 0.823 for 3, 0.741 for 4, and 0.576 in the limit. So a
    group of four beats two pairs of the same prompt, and a pair has 1.9 times the variance of the exact, unknown
    baseline.
    """
    pair = p3o_variance(2)
    assert pair == pytest.approx(1.0692, abs=1e-4)
    assert pytest.approx(0.5762, abs=1e-4) == EXACT_BASELINE
    for num_completions in (3, 4):
        expected = ((num_completions - 2) * EXACT_BASELINE + pair) / (num_completions - 1)
        assert p3o_variance(num_completions) == pytest.approx(expected, rel=1e-10)


def test_an_offset_of_all_rewards_costs_reinforce_and_not_p3o() -> None:
    """The variance per completion of P3O's pairs is 1.07 at any offset; REINFORCE's without a baseline grows with its
    square.

    Here E[R] is -0.06, which happens to suit REINFORCE: 0.57, less than P3O. At offset 1 it is 1.77, at 2 5.40, at 5
    30.9.
    """
    pair = p3o_variance(2)
    for offset in (1.0, 5.0, 100.0):
        assert p3o_variance(2, offset=offset) == pytest.approx(pair, rel=1e-9)
    assert reinforce_variance(0.0) == pytest.approx(0.5735, abs=1e-4)
    assert reinforce_variance(0.0) < 0.6 * pair
    assert reinforce_variance(1.0) > 1.6 * pair
    assert reinforce_variance(5.0) == pytest.approx(30.939, abs=1e-3)

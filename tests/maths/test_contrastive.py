"""CoPG and REBEL, each against every property that it should have."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pairtune.maths import contrastive

BETA, ETA = 0.3, 0.7
inf, nan = math.inf, math.nan
LOSSES: dict[str, Callable[..., Tensor]] = {
    "copg": lambda policy, base, rewards, mask=None: contrastive.copg_loss(policy, base, rewards, beta=BETA, mask=mask),
    "rebel": lambda policy, base, rewards, mask=None: contrastive.rebel_loss(policy, base, rewards, eta=ETA, mask=mask),
}


def random_groups(num_completions: int, *, num_groups: int = 24, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_groups, num_completions)
    base = -30 * torch.rand(shape, dtype=torch.float64, generator=generator)
    policy = base + torch.randn(shape, dtype=torch.float64, generator=generator)
    rewards = torch.randn(shape, dtype=torch.float64, generator=generator)
    return [policy, base, rewards], torch.rand(shape, generator=generator) < 0.8


def loss_and_gradient(name: str, policy: Tensor, base: Tensor, rewards: Tensor, mask: Tensor | None = None):
    policy = policy.clone().requires_grad_()
    losses = LOSSES[name](policy, base, rewards, mask=mask)
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    return losses.detach(), gradient


def plain_loss(name: str, policy: list[float], base: list[float], rewards: list[float], mask: list[bool]) -> float:
    values = []
    for i, j in itertools.combinations([k for k, counts in enumerate(mask) if counts], 2):
        reward = rewards[i] - rewards[j]
        logratio = (policy[i] - base[i]) - (policy[j] - base[j])
        values.append(
            (reward - BETA * logratio) ** 2 / (2 * BETA) if name == "copg" else (logratio - ETA * reward) ** 2
        )
    return sum(values) / len(values) if values else 0.0


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("num_completions", [1, 2, 3, 5])
def test_equals_the_equation(name: str, num_completions: int) -> None:
    groups, mask = random_groups(num_completions)
    losses = LOSSES[name](*groups, mask=mask)
    rows = zip(*(x.tolist() for x in (*groups, mask)), strict=True)
    expected = torch.tensor([plain_loss(name, *row) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)


def test_copg_is_the_papers_objective_but_for_a_constant() -> None:
    """Equations 7 to 9: the gradient flows through the reward as well, which has beta / 2 in it."""
    (policy, ref, rewards), _ = random_groups(2)
    _, gradient = loss_and_gradient("copg", policy, ref, rewards)
    leaf = policy.clone().requires_grad_()
    u = leaf - ref
    regularised = rewards - BETA / 2 * u
    first, second = regularised.unbind(-1)
    objective = (first - second) * u[:, 0] + (second - first) * u[:, 1]
    (expected,) = torch.autograd.grad(objective.sum(), leaf)
    torch.testing.assert_close(gradient, -expected, rtol=0, atol=1e-12)
    constant = (rewards[:, 0] - rewards[:, 1]).square() / (2 * BETA)
    losses = LOSSES["copg"](policy, ref, rewards)
    torch.testing.assert_close(losses, constant - objective.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name: str) -> None:
    (policy, base, rewards), mask = random_groups(3, num_groups=6, seed=1)
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, base, rewards, mask=mask), policy.requires_grad_())


@pytest.mark.parametrize("name", LOSSES)
def test_only_the_policy_gets_a_gradient(name: str) -> None:
    groups, _ = random_groups(3)
    for x in groups:
        x.requires_grad_()
    LOSSES[name](*groups).sum().backward()
    assert groups[0].grad is not None
    assert groups[0].grad.abs().sum() > 0
    assert groups[1].grad is None
    assert groups[2].grad is None


@pytest.mark.parametrize("name", LOSSES)
def test_the_order_of_a_group_does_not_matter(name: str) -> None:
    groups, mask = random_groups(4, seed=2)
    order = torch.tensor([2, 0, 3, 1])
    losses, gradient = loss_and_gradient(name, *groups, mask)
    shuffled = loss_and_gradient(name, *(x[:, order] for x in groups), mask[:, order])
    torch.testing.assert_close(losses, shuffled[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient[:, order], shuffled[1], rtol=1e-12, atol=1e-12)
    pairs, _ = random_groups(2)
    swapped = loss_and_gradient(name, *(x.flip(-1) for x in pairs))
    losses, gradient = loss_and_gradient(name, *pairs)
    assert torch.equal(losses, swapped[0])
    assert torch.equal(gradient, swapped[1].flip(-1))


@settings(max_examples=40)
@given(
    name=st.sampled_from(sorted(LOSSES)),
    num_completions=st.integers(2, 4),
    seed=st.integers(0, 2**16),
    shift=st.integers(-(2**16), 2**16),
)
def test_a_shift_of_a_prompts_rewards_changes_no_bit(name: str, num_completions: int, seed: int, shift: int) -> None:
    (policy, base, rewards), mask = random_groups(num_completions, num_groups=4, seed=seed)
    policy, base, rewards = policy.float(), base.float(), ((rewards * 64).round() / 64).float()
    before = loss_and_gradient(name, policy, base, rewards, mask)
    after = loss_and_gradient(name, policy, base, rewards + shift / 64, mask)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("name", LOSSES)
def test_rewards_are_subtracted_in_their_own_precision(name: str) -> None:
    (policy, base, rewards), _ = random_groups(3)
    rewards = (rewards * 64).round() / 64
    before = loss_and_gradient(name, policy.float(), base.float(), rewards)
    after = loss_and_gradient(name, policy.float(), base.float(), rewards + 2.0**20)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("name", LOSSES)
def test_log_ratios_are_taken_before_they_meet(name: str) -> None:
    """Log-probabilities of thousands of nats have a float32 spacing of 2e-4, their log-ratios here have none."""
    base = torch.tensor([[-4000.0, -3.3]])
    policy = base + torch.tensor([[0.25, 0.0]])
    losses = LOSSES[name](policy, base, torch.zeros(1, 2))
    expected = (BETA * 0.25) ** 2 / (2 * BETA) if name == "copg" else 0.25**2
    assert losses.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("poison", [nan, inf, -inf])
def test_masked_completions_change_nothing(name: str, poison: float) -> None:
    groups, _ = random_groups(5)
    mask = torch.tensor([True, False, True, True, False]).expand_as(groups[0])
    expected = loss_and_gradient(name, *(x[:, mask[0]] for x in groups))
    losses, gradient = loss_and_gradient(name, *(torch.where(mask, x, poison) for x in groups), mask)
    torch.testing.assert_close(losses, expected[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient[:, mask[0]], expected[1], rtol=1e-12, atol=1e-14)
    assert gradient[~mask].eq(0).all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", [(2,), (1, 3), (4, 2, 3), (0, 2)])
def test_shapes(name: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert LOSSES[name](x, x, x).shape == shape[:-1]


@pytest.mark.parametrize("name", LOSSES)
def test_large_log_ratios_stay_finite(name: str) -> None:
    base = torch.full((1, 2), -60.0)
    for step in (torch.tensor([1000.0, -1000.0]), torch.tensor([-1000.0, -1000.0])):
        losses, gradient = loss_and_gradient(name, base + step, base, torch.tensor([[1.0, -1.0]]))
        assert losses.isfinite().all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_wrong_call_says_what_is_wrong(name: str) -> None:
    x = torch.zeros(3, 2)
    base = "ref_logprobs" if name == "copg" else "old_logprobs"
    with pytest.raises(ValueError, match=rf"policy_logprobs, {base}, rewards and mask must have one.*\(3, 1\)"):
        LOSSES[name](x, x, x[:, :1])
    with pytest.raises(ValueError, match="mask must be bool"):
        LOSSES[name](x, x, x, mask=x)
    with pytest.raises(ValueError, match=f"{base} must be float32 or float64"):
        LOSSES[name](x, x.bfloat16(), x)
    with pytest.raises(ValueError, match="beta must be greater than 0"):
        contrastive.copg_loss(x, x, x, beta=0.0)
    with pytest.raises(ValueError, match="eta must be greater than 0"):
        contrastive.rebel_loss(x, x, x, eta=-1.0)

"""REINFORCE, the ratio clip, GRPO, RAFT and the value loss, each against every property that it should have."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pairtune.maths import policy_gradient as pg

EPSILON = 0.2
BETA = 0.3
inf, nan = math.inf, math.nan


def grpo(policy: Tensor, old: Tensor, ref: Tensor, credit: Tensor, **options) -> Tensor:
    """With one advantage a completion: the first of the row."""
    return pg.grpo_loss(policy, old, ref, credit[..., 0].nan_to_num(0.0), epsilon=EPSILON, beta=BETA, **options)


# (policy, old, ref, credit) -> losses; `policy` (or the values) is what is trained.
LOSSES: dict[str, Callable[..., Tensor]] = {
    "reinforce": lambda p, o, r, a, **options: pg.reinforce_loss(p, a, **options),
    "sequence_clip": lambda p, o, r, a, **options: pg.sequence_clip_loss(p, o, a, epsilon=EPSILON, **options),
    "ppo": lambda p, o, r, a, **options: pg.ppo_policy_loss(p, o, a, epsilon=EPSILON, **options),
    "grpo": grpo,
    "raft": lambda p, o, r, a, **options: pg.raft_loss(p, a, **options),
    "value": lambda p, o, r, a, **options: pg.ppo_value_loss(p, o, a, clip=EPSILON, **options),
    "value without clip": lambda p, o, r, a, **options: pg.ppo_value_loss(p, o, a, clip=None, **options),
}
CLIPPED = {name: LOSSES[name] for name in ("sequence_clip", "ppo")}


def random_inputs(*, num_rows: int = 24, num_columns: int = 5, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """[policy, old, ref, credit] and mask, (N, C); log-ratios on both sides of both edges."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_rows, num_columns)
    old = -3 * torch.rand(shape, dtype=torch.float64, generator=generator)
    policy, ref = old + 0.4 * torch.randn(2, *shape, dtype=torch.float64, generator=generator)
    credit = torch.randn(shape, dtype=torch.float64, generator=generator)
    return [policy, old, ref, credit], torch.rand(shape, generator=generator) < 0.8


def loss_and_gradient(loss: Callable[..., Tensor], policy: Tensor, *args: Tensor, **options) -> tuple[Tensor, Tensor]:
    policy = policy.clone().requires_grad_()
    losses = loss(policy, *args, **options)
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    return losses.detach(), gradient


# ----------------------------------------------------------------------------------------------- the papers' equations


def plain_element(name: str, policy: float, old: float, ref: float, credit: float) -> float:
    if name == "reinforce":
        return -credit * policy
    if name.startswith("value"):
        near = min(max(policy, old - EPSILON), old + EPSILON) if name == "value" else policy
        return max((policy - credit) ** 2, (near - credit) ** 2) / 2
    ratio = math.exp(policy - old)
    surrogate = min(ratio * credit, min(max(ratio, 1 - EPSILON), 1 + EPSILON) * credit)
    if name == "grpo":
        return -surrogate + BETA * (math.exp(ref - policy) - 1 - (ref - policy))
    return -surrogate


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "raft"])
def test_equals_the_equation(name: str) -> None:
    inputs, mask = random_inputs()
    losses = LOSSES[name](*inputs, mask=mask)
    for row, column in itertools.product(*map(range, mask.shape)):
        policy, old, ref, credit = (x[row, column].item() for x in inputs)
        if name == "grpo":
            credit = inputs[3][row, 0].item()
        expected = plain_element(name, policy, old, ref, credit) if mask[row, column] else 0.0
        assert losses[row, column].item() == pytest.approx(expected, rel=1e-12, abs=1e-14)


def test_raft_imitates_the_best_that_counts() -> None:
    (policy, _, _, rewards), mask = random_inputs(seed=1)
    losses = pg.raft_loss(policy, rewards, mask=mask)
    for row in range(len(mask)):
        counted = [k for k in range(mask.shape[1]) if mask[row, k]]
        best = max(counted, key=lambda k: rewards[row, k].item())
        assert losses[row].item() == -policy[row, best].item()


def test_the_best_of_raft_share_the_weight() -> None:
    rewards = torch.tensor([[2.0, 1.0, 2.0, 2.0], [9.0, -1.0, -1.0, 9.0], [1.0, 2.0, 3.0, 4.0]])
    mask = torch.tensor([[True, True, True, False], [False, True, True, False], [False] * 4])
    policy = torch.tensor([[-1.0, -2.0, -4.0, -8.0]]).repeat(3, 1)
    losses, gradient = loss_and_gradient(pg.raft_loss, policy, rewards, mask=mask)
    assert losses.tolist() == [2.5, 3.0, 0.0]
    assert gradient.tolist() == [[-0.5, 0.0, -0.5, 0.0], [0.0, -0.5, -0.5, 0.0], [0.0] * 4]


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name: str) -> None:
    inputs, mask = random_inputs(num_rows=8, seed=2)
    policy, *rest = inputs
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, *rest, mask=mask), policy.requires_grad_())


# ------------------------------------------------------------------------------------------------------ every property


@pytest.mark.parametrize("name", LOSSES)
def test_only_what_is_trained_gets_a_gradient(name: str) -> None:
    inputs, _ = random_inputs()
    for x in inputs:
        x.requires_grad_()
    LOSSES[name](*inputs).sum().backward()
    assert inputs[0].grad is not None
    assert inputs[0].grad.abs().sum() > 0
    assert all(x.grad is None for x in inputs[1:])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("poison", [nan, inf, -inf])
def test_what_is_masked_changes_nothing(name: str, poison: float) -> None:
    inputs, _ = random_inputs()
    mask = torch.tensor([True, False, True, True, False]).expand_as(inputs[0])
    kept = loss_and_gradient(LOSSES[name], *[x[:, mask[0]] for x in inputs])
    losses, gradient = loss_and_gradient(LOSSES[name], *[torch.where(mask, x, poison) for x in inputs], mask=mask)
    assert torch.equal(losses if name == "raft" else losses[:, mask[0]], kept[0])
    assert torch.equal(gradient[:, mask[0]], kept[1])
    assert gradient[~mask].eq(0).all()
    if name != "raft":
        assert losses[~mask].eq(0).all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", [(3,), (2, 1), (2, 3, 4), (0, 2)])
def test_shapes(name: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert LOSSES[name](x, x, x, x).shape == (shape[:-1] if name == "raft" else shape)


def test_one_advantage_holds_for_all_tokens_of_a_completion() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    advantages = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]], dtype=torch.float64)
    _, gradient = loss_and_gradient(pg.grpo_loss, x, x, x, advantages)
    torch.testing.assert_close(gradient, -advantages[..., None].expand_as(x), rtol=0, atol=1e-15)


def test_grpo_without_beta_does_not_read_the_reference() -> None:
    (policy, old, _, credit), mask = random_inputs()
    losses = pg.grpo_loss(policy, old, torch.full_like(old, nan), credit[:, 0], epsilon=EPSILON, mask=mask)
    expected = pg.ppo_policy_loss(policy, old, credit[:, :1].expand_as(policy), epsilon=EPSILON, mask=mask)
    assert torch.equal(losses, expected)


# -------------------------------------------------------------------------------------------------------- the clip

STEPS = [-1.0, -0.3, -0.225, -0.22, -0.205, -0.2, -0.18, 0.0, 0.18, 0.185, 0.2, 0.205, 0.3, 1.0]


@pytest.mark.parametrize("name", CLIPPED)
@pytest.mark.parametrize("advantage", [1.5, -1.5])
@pytest.mark.parametrize("step", STEPS)
def test_the_ratio_is_clipped_on_the_improving_side_only(name: str, advantage: float, step: float) -> None:
    old, a = torch.tensor([-2.0], dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64)
    losses, gradient = loss_and_gradient(CLIPPED[name], old + step, old, old, a)
    ratio = math.exp(step)
    past = (advantage > 0 and ratio > 1 + EPSILON) or (advantage < 0 and ratio < 1 - EPSILON)
    edge = 1 + EPSILON if advantage > 0 else 1 - EPSILON
    assert losses.item() == pytest.approx(-advantage * (edge if past else ratio), rel=1e-12)
    assert gradient.item() == pytest.approx(0.0 if past else -advantage * ratio, rel=1e-12, abs=0)
    assert pg.clipped(old + step, old, a, epsilon=EPSILON).item() is past
    _, grpo_gradient = loss_and_gradient(pg.grpo_loss, old + step, old, old, a[0], epsilon=EPSILON)
    assert torch.equal(grpo_gradient, gradient)


def test_the_kl_of_grpo_still_pulls_where_the_clip_has_stopped_the_surrogate() -> None:
    old = torch.tensor([-2.0], dtype=torch.float64)
    _, gradient = loss_and_gradient(grpo, old + 1.0, old, old, torch.ones(1, dtype=torch.float64))
    assert gradient.item() == pytest.approx(BETA * (1 - math.exp(-1.0)))


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_an_epsilon_above_one_has_no_lower_edge(advantage: float) -> None:
    policy, old, a = torch.tensor([-9.0]), torch.zeros(1), torch.tensor([advantage])
    _, gradient = loss_and_gradient(pg.ppo_policy_loss, policy, old, a, epsilon=1.0)
    assert gradient.item() == pytest.approx(-advantage * math.exp(-9.0))


def test_clipped_names_the_tokens_without_a_gradient() -> None:
    (policy, old, ref, advantages), mask = random_inputs(num_rows=200, seed=4)
    advantages[:20] = 0.0
    clipped = pg.clipped(policy, old, advantages, epsilon=EPSILON, mask=mask)
    _, gradient = loss_and_gradient(CLIPPED["ppo"], policy, old, ref, advantages, mask=mask)
    assert torch.equal(clipped, (gradient == 0) & mask & (advantages != 0))
    assert 0.1 < clipped.double().mean() < 0.5
    poisoned = [torch.where(mask, x, nan) for x in (policy, old, advantages)]
    assert torch.equal(pg.clipped(*poisoned, epsilon=EPSILON, mask=mask), clipped)


@pytest.mark.parametrize("size", [50.0, 1000.0])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_large_log_ratios(size: float, sign: int, advantage: float) -> None:
    """In float32. Finite at 50; beyond its range inf on the open side, and never NaN."""
    old, a = torch.tensor([-60.0]), torch.tensor([advantage])
    losses, gradient = loss_and_gradient(pg.ppo_policy_loss, old + sign * size, old, a)
    assert not losses.isnan().any()
    assert not gradient.isnan().any()
    if size == 50.0 or sign < 0 or advantage >= 0:
        assert losses.isfinite().all()
        assert gradient.isfinite().all()
    if advantage == 0:
        assert losses.item() == gradient.item() == 0
    losses, gradient = loss_and_gradient(grpo, old + sign * size, old, old, a)
    assert not losses.isnan().any()
    assert not gradient.isnan().any()


@pytest.mark.parametrize(
    "value, target, loss, gradient",
    [
        (1.1, 3.0, 1.9**2 / 2, -1.9),  # inside the interval 1 +- 0.2
        (1.5, 3.0, 1.8**2 / 2, 0.0),  # left it towards the target: the error counts from the edge
        (0.5, 3.0, 2.5**2 / 2, -2.5),  # left it away from the target: pulled back
        (3.5, 2.0, 1.5**2 / 2, 1.5),  # overshot by more than the edge is away: pulled back
        (2.5, 2.0, 0.8**2 / 2, 0.0),
    ],
)
def test_the_value_is_clipped_on_the_improving_side_only(value, target, loss, gradient) -> None:
    old, target = torch.ones(1, dtype=torch.float64), torch.tensor([target], dtype=torch.float64)
    value = torch.tensor([value], dtype=torch.float64)
    result = loss_and_gradient(pg.ppo_value_loss, value, old, target, clip=EPSILON)
    assert [x.item() for x in result] == pytest.approx([loss, gradient], abs=1e-12)


# --------------------------------------------------------------------------------------------------------- wrong calls


@pytest.mark.parametrize("name", LOSSES)
def test_a_wrong_call_says_what_is_wrong(name: str) -> None:
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"mask must have one shape.*\(3, 1\)"):
        LOSSES[name](x, x, x, x, mask=torch.ones(3, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask must be bool"):
        LOSSES[name](x, x, x, x, mask=x)
    if not name.startswith("value"):
        with pytest.raises(ValueError, match=r"policy_logprobs must be float32 or float64.*bfloat16"):
            LOSSES[name](x.bfloat16(), x, x, x)


def test_a_wrong_option_is_refused() -> None:
    x = torch.zeros(3, 2)
    for call in (
        lambda: pg.ppo_policy_loss(x, x, x, epsilon=0.0),
        lambda: pg.sequence_clip_loss(x, x, x, epsilon=0.0),
        lambda: pg.grpo_loss(x, x, x, x[:, 0], epsilon=0.0),
        lambda: pg.clipped(x, x, x, epsilon=0.0),
    ):
        with pytest.raises(ValueError, match="epsilon must be greater than 0"):
            call()
    with pytest.raises(ValueError, match="clip must be greater than 0"):
        pg.ppo_value_loss(x, x, x, clip=0.0)
    with pytest.raises(ValueError, match="beta must be at least 0"):
        pg.grpo_loss(x, x, x, x[:, 0], beta=-0.1)
    with pytest.raises(ValueError, match=r"advantages must be one a completion, \(3,\).*are \(3, 2\)"):
        pg.grpo_loss(x, x, x, x)
    with pytest.raises(ValueError, match=r"ref_logprobs and mask must have one shape.*\(3, 1\)"):
        pg.grpo_loss(x, x, x[:, :1], x[:, 0])

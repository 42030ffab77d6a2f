"""Every method beside the others: the gradient each takes at ratio 1, the point each rests at, what each is blind to.

Expectations are over all groups that could be sampled from a policy with 15 completions (`tabular`). u = log(policy /
reference), R = r - beta u, g_i the gradient of completion i's log-probability; all gradients are in the direction of
ascent.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pairtune.maths import advantages, contrastive, pairwise, policy_gradient, preference
from pairtune.maths.kl import kl_shaped_rewards
from pairtune.maths.masking import masked_mean, masked_sum, pair_indices

from .tabular import TabularPolicy, expected_loss_gradient, objective_gradient

BETA, ETA, EPSILON = 0.3, 0.7, 0.2

# (policy, old, ref, r) of completions (..., K) -> (...), each method as it is meant to be used: r as given, without KL.
Method = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def shaped(policy: Tensor, ref: Tensor, rewards: Tensor) -> Tensor:
    return kl_shaped_rewards(rewards, policy - ref, BETA)


def p3o(policy: Tensor, old: Tensor, ref: Tensor, rewards: Tensor) -> Tensor:
    return pairwise.p3o_joint_loss(policy, old, shaped(policy, ref, rewards))


def rloo(policy: Tensor, old: Tensor, ref: Tensor, rewards: Tensor) -> Tensor:
    credit = advantages.leave_one_out(shaped(policy, ref, rewards))
    return policy_gradient.reinforce_loss(policy, credit).mean(-1)


def rloo_clipped(policy: Tensor, old: Tensor, ref: Tensor, rewards: Tensor) -> Tensor:
    credit = advantages.leave_one_out(shaped(policy, ref, rewards))
    return policy_gradient.sequence_clip_loss(policy, old, credit, epsilon=EPSILON).mean(-1)


def rloo_sum(policy: Tensor, old: Tensor, ref: Tensor, rewards: Tensor) -> Tensor:
    return rloo(policy, old, ref, rewards) * policy.shape[-1]


def group_mean(policy: Tensor, old: Tensor, ref: Tensor, rewards: Tensor) -> Tensor:
    """Dr. GRPO's baseline, with the KL in the reward."""
    credit = advantages.group_centred(shaped(policy, ref, rewards))
    return policy_gradient.sequence_clip_loss(policy, old, credit, epsilon=EPSILON).mean(-1)


def copg(policy: Tensor, old: Tensor, ref: Tensor, rewards: Tensor) -> Tensor:
    return contrastive.copg_loss(policy, ref, rewards, beta=BETA)


def rebel(policy: Tensor, old: Tensor, ref: Tensor, rewards: Tensor) -> Tensor:
    return contrastive.rebel_loss(policy, old, shaped(old, ref, rewards), eta=ETA)


def online_dpo(policy: Tensor, old: Tensor, ref: Tensor, rewards: Tensor, kind: str = "expected") -> Tensor:
    return preference.online_dpo_loss(policy, ref, *preference.preference_labels(rewards, kind), beta=BETA)


def online_dpo_hard(policy: Tensor, old: Tensor, ref: Tensor, rewards: Tensor) -> Tensor:
    return online_dpo(policy, old, ref, rewards, "hard")


def online_ipo(policy: Tensor, old: Tensor, ref: Tensor, rewards: Tensor) -> Tensor:
    return preference.online_ipo_loss(policy, ref, *preference.preference_labels(rewards, "expected"), beta=BETA)


def raft(policy: Tensor, old: Tensor, ref: Tensor, rewards: Tensor) -> Tensor:
    return policy_gradient.raft_loss(policy, rewards)


def standardised(policy: Tensor, old: Tensor, ref: Tensor, rewards: Tensor) -> Tensor:
    """GRPO's advantages, with the KL in the reward and completions for actions."""
    credit = advantages.group_standardised(shaped(policy, ref, rewards), eps=0.0)
    return policy_gradient.reinforce_loss(policy, credit).mean(-1)


# -------------------------------------------------------------------------- the gradient at ratio 1, relative to P3O's


def coefficients(method: Method, policy: Tensor, ref: Tensor, rewards: Tensor, old: Tensor | None = None) -> Tensor:
    """(..., K): what each g_i is multiplied by in the direction of ascent; at ratio 1 without `old`."""
    leaf = policy.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(method(leaf, policy if old is None else old, ref, rewards).sum(), leaf)
    return -gradient


def random_groups(num_completions: int, *, num_groups: int = 40, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_groups, num_completions)
    ref = -20 * torch.rand(shape, dtype=torch.float64, generator=generator)
    policy = ref + torch.randn(shape, dtype=torch.float64, generator=generator)
    return policy, ref, torch.randn(shape, dtype=torch.float64, generator=generator)


SIZES: dict[Method, Callable[[int], float]] = {
    p3o: lambda k: 1,
    rloo: lambda k: 1,
    rloo_clipped: lambda k: 1,
    rloo_sum: lambda k: k,
    group_mean: lambda k: (k - 1) / k,
    copg: lambda k: 2,
    rebel: lambda k: 4 * ETA,
}
"""Method -> size of its gradient relative to the pairwise policy gradient, dR (g_1 - g_2) / 2 for a pair."""


@pytest.mark.parametrize("method", SIZES)
@pytest.mark.parametrize("num_completions", [2, 3, 5])
def test_at_ratio_one_these_have_one_gradient_but_for_its_size(method: Method, num_completions: int) -> None:
    policy, ref, rewards = random_groups(num_completions)
    R = rewards - BETA * (policy - ref)
    baseline = (R.sum(-1, keepdim=True) - R) / (num_completions - 1)
    expected = SIZES[method](num_completions) * (R - baseline) / num_completions
    result = coefficients(method, policy, ref, rewards)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
    if num_completions == 2:
        pair = (R[:, 0] - R[:, 1])[:, None] * torch.tensor([0.5, -0.5], dtype=torch.float64)
        torch.testing.assert_close(result, SIZES[method](2) * pair, rtol=0, atol=1e-12)


def test_online_dpo_saturates_in_the_reward() -> None:
    """beta (s(dr) - s(beta du)) (g_1 - g_2)."""
    policy, ref, rewards = random_groups(2)
    u = policy - ref
    size = BETA * ((rewards[:, 0] - rewards[:, 1]).sigmoid() - (BETA * (u[:, 0] - u[:, 1])).sigmoid())
    expected = torch.stack([size, -size], -1)
    torch.testing.assert_close(coefficients(online_dpo, policy, ref, rewards), expected, rtol=0, atol=1e-12)


def test_ipo_is_copg_with_rewards_of_a_quarter() -> None:
    """(2 / tau) (1/2 - tau D) (g_w - g_l), which is 2 / tau times CoPG at beta = tau with r_w = 1/4, r_l = -1/4."""
    policy, ref, _ = random_groups(2)
    u = policy - ref
    rewards = torch.tensor([0.25, -0.25], dtype=torch.float64).expand_as(policy)
    leaf = (policy - ref).requires_grad_()
    (gradient,) = torch.autograd.grad(preference.ipo_loss(leaf[:, 0], leaf[:, 1], beta=BETA).sum(), leaf)
    size = (2 / BETA) * (0.5 - BETA * (u[:, 0] - u[:, 1]))
    torch.testing.assert_close(-gradient, torch.stack([size, -size], -1), rtol=0, atol=1e-11)
    of_copg = coefficients(copg, policy, ref, rewards)
    torch.testing.assert_close(-gradient, (2 / BETA) * of_copg, rtol=0, atol=1e-11)


def random_tokens(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Token log-probabilities (P, 2, T), mask, rewards (P, 2)."""
    generator = torch.Generator().manual_seed(seed)
    logprobs = -torch.rand(20, 2, 6, dtype=torch.float64, generator=generator)
    lengths = torch.randint(1, 7, (20, 2, 1), generator=generator)
    return logprobs, torch.arange(6) < lengths, torch.randn(20, 2, dtype=torch.float64, generator=generator)


def test_a_pair_of_grpo_keeps_only_the_sign_of_the_difference() -> None:
    """sign(dr) (g_1 - g_2) / 2, with g_i divided by the number of tokens."""
    logprobs, mask, rewards = random_tokens()
    leaf = logprobs.clone().requires_grad_()
    credit = advantages.group_standardised(rewards, eps=0.0)
    losses = masked_mean(policy_gradient.grpo_loss(leaf, logprobs, logprobs, credit, mask=mask), mask, -1).mean(-1)
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    sign = (rewards[:, 0] - rewards[:, 1]).sign()
    size = torch.stack([sign, -sign], -1)[..., None] / 2 / mask.sum(-1, keepdim=True)
    torch.testing.assert_close(-gradient, torch.where(mask, size, 0), rtol=0, atol=1e-12)


def test_a_pair_of_dr_grpo_is_half_of_rloo() -> None:
    """dr (g_1 - g_2) / 4, with tokens summed."""
    logprobs, mask, rewards = random_tokens()
    leaf = logprobs.clone().requires_grad_()
    credit = advantages.group_centred(rewards)
    losses = masked_sum(policy_gradient.grpo_loss(leaf, logprobs, logprobs, credit, mask=mask), mask, -1).mean(-1)
    (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    difference = rewards[:, 0] - rewards[:, 1]
    size = torch.stack([difference, -difference], -1)[..., None] / 4
    torch.testing.assert_close(-gradient, torch.where(mask, size, 0), rtol=0, atol=1e-12)


def test_ppo_before_the_first_update_is_the_policy_gradient() -> None:
    """Ratio 1: nothing is clipped, and the gradient is REINFORCE's on the same advantages."""
    logprobs, mask, _ = random_tokens()
    credit = logprobs.sin()
    assert not policy_gradient.clipped(logprobs, logprobs, credit, epsilon=1e-9, mask=mask).any()
    gradients = []
    for loss in (
        lambda x: policy_gradient.ppo_policy_loss(x, logprobs, credit, mask=mask),
        lambda x: policy_gradient.reinforce_loss(x, credit, mask=mask),
    ):
        leaf = logprobs.clone().requires_grad_()
        gradients += torch.autograd.grad(loss(leaf).sum(), leaf)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-14)


# ---------------------------------------------------------------------------------------------- exact, by enumeration

POLICY = TabularPolicy()
THETA, OLD_THETA = POLICY.logits(0), POLICY.logits(1)
REWARDS = POLICY.rewards(3)
REF_THETA = POLICY.logits(2)
REF_LOGPROBS = POLICY.sequence_logprobs(REF_THETA)
TRUE_GRADIENT = objective_gradient(POLICY, THETA, REWARDS, REF_LOGPROBS, BETA)


def theta_of(logprobs: Tensor) -> Tensor:
    """Logits of the tabular policy that gives completions (M,) these log-probabilities, up to a constant."""
    flow = torch.einsum("mpv,m->pv", POLICY.visits, logprobs.softmax(-1))
    return torch.where(flow > 0, flow, 1.0).log()


OPTIMUM = theta_of(REF_LOGPROBS + REWARDS / BETA)
"""reference * exp(r / beta) / Z, the maximum of E[r] - beta KL."""


def expected_gradient(method: Method, theta: Tensor, old_theta: Tensor, num_completions: int = 2) -> Tensor:
    """The exact expected gradient of ascent at `theta` on groups that `old_theta` samples."""

    def loss(policy: Tensor, old: Tensor, groups: Tensor) -> Tensor:
        return method(policy, old, REF_LOGPROBS[groups], REWARDS[groups])

    return -expected_loss_gradient(POLICY, loss, theta, old_theta, num_completions, lambda groups, _: groups)


def test_the_optimum_is_the_maximum_of_the_objective() -> None:
    expected = (REF_LOGPROBS + REWARDS / BETA).log_softmax(-1)
    torch.testing.assert_close(POLICY.sequence_logprobs(OPTIMUM), expected, rtol=0, atol=1e-12)
    assert objective_gradient(POLICY, OPTIMUM, REWARDS, REF_LOGPROBS, BETA).abs().max() < 1e-12
    assert TRUE_GRADIENT.abs().max() > 0.1


@pytest.mark.parametrize("method", SIZES)
@pytest.mark.parametrize("num_completions", [2, 3])
def test_on_its_own_samples_the_expected_gradient_is_that_of_the_objective(method: Method, num_completions) -> None:
    gradient = expected_gradient(method, THETA, THETA, num_completions)
    torch.testing.assert_close(gradient, SIZES[method](num_completions) * TRUE_GRADIENT, rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", [raft, standardised, online_dpo, online_ipo])
def test_these_follow_another_gradient(method: Method) -> None:
    """None is a multiple of the objective's."""
    gradient = expected_gradient(method, THETA, THETA).flatten()
    cosine = torch.cosine_similarity(gradient, TRUE_GRADIENT.flatten(), dim=0)
    assert gradient.abs().max() > 0.01
    assert cosine < 0.999


@pytest.mark.parametrize("method", [p3o, rloo, rloo_clipped, rebel, copg, online_dpo])
def test_the_optimum_is_where_these_come_to_rest(method: Method) -> None:
    assert expected_gradient(method, OPTIMUM, OPTIMUM).abs().max() < 1e-10
    assert expected_gradient(method, THETA, THETA).abs().max() > 0.01


@pytest.mark.parametrize("method", [copg, online_dpo])
def test_on_pairs_of_any_policy_these_rest_at_the_optimum(method: Method) -> None:
    """Off-policy, and without importance weights."""
    assert expected_gradient(method, OPTIMUM, OLD_THETA).abs().max() < 1e-10
    assert expected_gradient(method, THETA, OLD_THETA).abs().max() > 0.01


@pytest.mark.parametrize("method", [online_ipo, online_dpo_hard, raft])
def test_the_optimum_is_not_where_these_rest(method: Method) -> None:
    assert expected_gradient(method, OPTIMUM, OPTIMUM).abs().max() > 0.01


def test_leave_one_out_without_weights_is_at_home_on_policy_only() -> None:
    """On another policy's samples its gradient is not the objective's. At the optimum itself all R are equal, so that
    it rests there on any samples."""
    off_policy = expected_gradient(rloo, THETA, OLD_THETA)
    assert torch.cosine_similarity(off_policy.flatten(), TRUE_GRADIENT.flatten(), dim=0) < 0.9
    assert expected_gradient(rloo, OPTIMUM, OLD_THETA).abs().max() < 1e-10


def test_ipo_rests_at_the_chance_to_win() -> None:
    """reference * exp(E_mu[P(y > y')] / tau) / Z, on pairs that mu samples: not the optimum of r."""
    mu = POLICY.sequence_logprobs(OLD_THETA).exp()
    chance_to_win = (REWARDS[:, None] - REWARDS[None, :]).sigmoid() @ mu
    theta = theta_of(REF_LOGPROBS + chance_to_win / BETA)
    assert expected_gradient(online_ipo, theta, OLD_THETA).abs().max() < 1e-10
    assert expected_gradient(online_ipo, OPTIMUM, OLD_THETA).abs().max() > 0.01
    assert (POLICY.sequence_logprobs(theta).exp() - POLICY.sequence_logprobs(OPTIMUM).exp()).abs().max() > 0.1


def test_every_step_of_rebel_is_mirror_descent_and_their_limit_the_optimum() -> None:
    groups = POLICY.groups(2)
    logprobs = POLICY.sequence_logprobs(THETA)
    for _ in range(200):
        R = REWARDS - BETA * (logprobs - REF_LOGPROBS)
        following = (logprobs + ETA * R).log_softmax(-1)
        losses = rebel(following[groups], logprobs[groups], REF_LOGPROBS[groups], REWARDS[groups])
        assert losses.max() < 1e-20
        logprobs = following
    torch.testing.assert_close(logprobs, POLICY.sequence_logprobs(OPTIMUM), rtol=0, atol=1e-10)


@pytest.mark.parametrize("baseline", [0.0, 1.7])
def test_reinforce_is_unbiased_with_any_baseline_of_the_steps_before(baseline: float) -> None:
    average = advantages.update_moving_average(advantages.MovingAverage(), torch.tensor([baseline]))

    def reinforce(policy: Tensor, old: Tensor, ref: Tensor, rewards: Tensor) -> Tensor:
        R = rewards - BETA * (policy.detach() - ref)
        return policy_gradient.reinforce_loss(policy, R - average.mean).mean(-1)

    gradient = expected_gradient(reinforce, THETA, THETA)
    torch.testing.assert_close(gradient, TRUE_GRADIENT, rtol=0, atol=1e-10)


def test_a_baseline_that_contains_its_own_reward_is_not() -> None:
    """Of two completions, half of the gradient cancels."""

    def own_mean(policy: Tensor, old: Tensor, ref: Tensor, rewards: Tensor) -> Tensor:
        R = rewards - BETA * (policy.detach() - ref)
        return policy_gradient.reinforce_loss(policy, R - R.mean(-1, keepdim=True)).mean(-1)

    torch.testing.assert_close(expected_gradient(own_mean, THETA, THETA), TRUE_GRADIENT / 2, rtol=0, atol=1e-10)


# --------------------------------------------------------------------------------------- token-wise credit, enumerated

LENGTHS = torch.tensor([len(completion) for completion in POLICY.completions])
TOKEN_MASK = torch.arange(3) < LENGTHS[:, None]
TOKENS = torch.tensor([[*c, *[0] * (3 - len(c))] for c in POLICY.completions])
PREFIXES = torch.tensor(
    [
        # Completions that end with EOS come first, in the order of their prefixes.
        [POLICY.completions.index((*c[:t], 0)) if t < len(c) else 0 for t in range(3)]
        for c in POLICY.completions
    ]
)
"""(M, T): the row of logits that each token of each completion was sampled from."""


def token_logprobs(theta: Tensor) -> Tensor:
    """(M, T) of all completions."""
    return torch.where(TOKEN_MASK, theta.log_softmax(-1)[PREFIXES, TOKENS], 0)


TOKEN_REWARDS = advantages.token_rewards(
    REWARDS, token_logprobs(THETA) - token_logprobs(REF_THETA), beta=BETA, mask=TOKEN_MASK
)


def exact_values() -> Tensor:
    """(prefixes,): the expected reward-to-go from every prefix on, its KL included."""
    weights = TOKEN_MASK * POLICY.sequence_logprobs(THETA).exp()[:, None]
    to_go = advantages.rewards_to_go(TOKEN_REWARDS, TOKEN_MASK)
    num_prefixes = POLICY.shape[0]
    total = torch.zeros(num_prefixes, dtype=torch.float64).index_add(0, PREFIXES.flatten(), (weights * to_go).flatten())
    reached = torch.zeros(num_prefixes, dtype=torch.float64).index_add(0, PREFIXES.flatten(), weights.flatten())
    return total / reached


def token_gradient(loss: Callable[..., Tensor], credit: Tensor) -> Tensor:
    theta = THETA.clone().requires_grad_()
    logprobs = token_logprobs(theta)
    losses = loss(logprobs, credit)
    (gradient,) = torch.autograd.grad((POLICY.sequence_logprobs(THETA).exp() * losses.sum(-1)).sum(), theta)
    return -gradient


TOKEN_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "vpg": lambda x, a: policy_gradient.reinforce_loss(x, a, mask=TOKEN_MASK),
    "ppo": lambda x, a: policy_gradient.ppo_policy_loss(x, x.detach(), a, mask=TOKEN_MASK),
}


@pytest.mark.parametrize("name", TOKEN_LOSSES)
@pytest.mark.parametrize(
    "values, lam", [("none", 1.0), ("arbitrary", 1.0), ("exact", 1.0), ("exact", 0.95), ("exact", 0.0)]
)
def test_token_wise_credit_has_the_gradient_of_the_objective(name: str, values: str, lam: float) -> None:
    """With lambda 1 for any value function, with a smaller one for the exact value function."""
    of_prefix = {
        "none": torch.zeros(POLICY.shape[0], dtype=torch.float64),
        "arbitrary": 3 * POLICY.logits(9)[:, 0],
        "exact": exact_values(),
    }[values]
    credit = advantages.gae(TOKEN_REWARDS, of_prefix[PREFIXES], TOKEN_MASK, lam=lam)
    torch.testing.assert_close(token_gradient(TOKEN_LOSSES[name], credit), TRUE_GRADIENT, rtol=0, atol=1e-10)


def test_a_wrong_value_function_with_a_smaller_lambda_is_biased() -> None:
    values = (3 * POLICY.logits(9)[:, 0])[PREFIXES]
    credit = advantages.gae(TOKEN_REWARDS, values, TOKEN_MASK, lam=0.5)
    assert (token_gradient(TOKEN_LOSSES["vpg"], credit) - TRUE_GRADIENT).abs().max() > 0.1


def test_the_kl_of_grpo_is_the_other_direction_at_the_prefixes_reached() -> None:
    """Gradient of KL(reference || policy) of the next token, summed over prefixes as often as the policy meets them;
    that of the sequence KL(policy || reference) is another."""

    def loss(logprobs: Tensor, credit: Tensor) -> Tensor:
        ref = token_logprobs(REF_THETA)
        return policy_gradient.grpo_loss(logprobs, logprobs.detach(), ref, credit[:, 0], beta=1.0, mask=TOKEN_MASK)

    gradient = token_gradient(loss, torch.zeros_like(TOKEN_REWARDS))
    theta = THETA.clone().requires_grad_()
    met = torch.einsum("mpv,m->p", POLICY.visits, POLICY.sequence_logprobs(THETA).exp())
    ref = REF_THETA.log_softmax(-1)
    forward_kl = (met * (ref.exp() * (ref - theta.log_softmax(-1))).sum(-1)).sum()
    (expected,) = torch.autograd.grad(-forward_kl, theta)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-10)
    reverse = objective_gradient(POLICY, THETA, torch.zeros_like(REWARDS), REF_LOGPROBS, 1.0)
    assert (gradient - reverse).abs().max() > 0.1


# --------------------------------------------------------------------------- Theorem 2: r and r + delta(x) are the same

INVARIANT: list[Method] = [p3o, rloo, rloo_clipped, group_mean, copg, rebel, online_dpo, online_dpo_hard, online_ipo]
INVARIANT += [raft, standardised]


def groups_on_a_binary_grid(num_completions: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    policy, ref, rewards = random_groups(num_completions, num_groups=6, seed=seed)
    rewards = (rewards * 64).round() / 64
    return policy.float(), ref.float(), (policy + 0.1 * rewards.flip(0)).float(), rewards.float()


@pytest.mark.parametrize("method", INVARIANT)
@settings(max_examples=10)
@given(
    num_completions=st.integers(2, 4),
    seed=st.integers(0, 2**16),
    shifts=st.lists(st.integers(-(2**16), 2**16), min_size=6, max_size=6),
)
def test_a_reward_of_the_prompt_changes_no_bit_of_the_gradient(method: Method, num_completions, seed, shifts) -> None:
    policy, ref, old, rewards = groups_on_a_binary_grid(num_completions, seed)
    delta = torch.tensor(shifts)[:, None] / 64
    before = coefficients(method, policy, ref, rewards, old)
    assert torch.equal(before, coefficients(method, policy, ref, rewards + delta, old))


def test_a_reward_of_the_prompt_changes_the_gradient_of_reinforce() -> None:
    """Its baseline is one number for all prompts, and of the steps before."""

    def reinforce(policy: Tensor, old: Tensor, ref: Tensor, rewards: Tensor) -> Tensor:
        R = rewards - BETA * (policy.detach() - ref)
        return policy_gradient.reinforce_loss(policy, R - advantages.MovingAverage(3.0, 6).mean).mean(-1)

    policy, ref, _, rewards = groups_on_a_binary_grid(2, 0)
    delta = torch.arange(6)[:, None] / 64
    before, after = (coefficients(reinforce, policy, ref, r) for r in (rewards, rewards + delta))
    assert (before - after)[1:].abs().min() > 1e-3


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("values_know", [False, True])
def test_a_reward_of_the_prompt_changes_the_gradient_of_ppo(whiten: bool, values_know: bool) -> None:
    """Unless the value function knows it already."""
    logprobs, mask, rewards = random_tokens()
    values = logprobs.cos()
    delta = torch.arange(20, dtype=torch.float64)[:, None] / 4

    def gradient(rewards: Tensor, values: Tensor) -> Tensor:
        token_rewards = advantages.token_rewards(rewards, logprobs.sin(), beta=BETA, mask=mask)
        credit = advantages.gae(token_rewards, values, mask)
        if whiten:
            credit = advantages.whiten(credit, mask)
        leaf = logprobs.clone().requires_grad_()
        losses = policy_gradient.ppo_policy_loss(leaf, logprobs, credit, mask=mask)
        return torch.autograd.grad(losses.sum(), leaf)[0]

    before = gradient(rewards, values)
    after = gradient(rewards + delta, values + delta[..., None] if values_know else values)
    if values_know:
        torch.testing.assert_close(before, after, rtol=0, atol=1e-12)
    else:
        assert (before - after)[1:][mask[1:]].abs().max() > 1
        assert (before - after).abs().amax((-2, -1))[1:].min() > 0.01


def test_labels_and_losses_agree_on_the_order_of_pairs() -> None:
    """A label of 1 for one pair alone raises the first of that pair and lowers the second."""
    x = torch.zeros(4, dtype=torch.float64)
    for m, (i, j) in enumerate(zip(*(index.tolist() for index in pair_indices(4)), strict=True)):
        leaf = x.clone().requires_grad_()
        labels = torch.full((6,), 0.5, dtype=torch.float64)
        labels[m] = 1.0
        (gradient,) = torch.autograd.grad(preference.online_dpo_loss(leaf, x, labels, beta=BETA), leaf)
        assert gradient[i] < 0 < gradient[j]
        assert gradient.count_nonzero() == 2
        rewards = x.clone()
        rewards[i], rewards[j] = 1.0, -1.0
        assert preference.preference_labels(rewards, "hard").probability[m] == 1

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pairtune.maths import kl

from .tabular import TabularPolicy

inf, nan = math.inf, math.nan


def random_laws(
    n: int = 50, vocabulary: int = 11, seed: int = 0, scale: float = 1.5
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    laws = scale * torch.randn(2, n, vocabulary, dtype=torch.float64, generator=generator)
    return tuple(laws.log_softmax(-1))


# -------------------------------------------------------------------------------------------------- sequence log-probs


def test_sequence_logprobs_sum_the_tokens_that_count() -> None:
    tokens = torch.tensor([[-1.0, -2.0, nan], [-4.0, inf, -inf]], requires_grad=True)
    sums = kl.sequence_logprobs(tokens, torch.tensor([[True, True, False], [True, False, False]]))
    sums.sum().backward()
    assert sums.tolist() == [-3.0, -4.0]
    assert tokens.grad.tolist() == [[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]


def test_sequence_logprobs_sum_in_float32_at_least() -> None:
    tokens = torch.full((1000,), -0.5, dtype=torch.bfloat16)
    mask = torch.ones(1000, dtype=torch.bool)
    assert kl.sequence_logprobs(tokens, mask).dtype == torch.float32
    assert kl.sequence_logprobs(torch.full((1000,), -0.1).bfloat16(), mask).item() == pytest.approx(-100.1, abs=0.1)
    assert kl.sequence_logprobs(tokens.double(), mask).dtype == torch.float64


# ------------------------------------------------------------------------------------------------------ shaped rewards


def test_shaped_rewards_are_the_trajectory_rewards_but_for_a_constant_per_group() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, logratio = torch.randn(2, 20, 4, dtype=torch.float64, generator=generator)
    shaped = kl.kl_shaped_rewards(rewards, logratio, 0.1)
    expected = rewards - 0.1 * logratio
    difference = shaped - expected
    torch.testing.assert_close(difference, -rewards[:, :1].expand_as(difference), rtol=0, atol=1e-14)


def test_shaped_rewards_count_from_the_first_that_counts_and_are_zero_elsewhere() -> None:
    rewards = torch.tensor([[nan, 5.0, 7.0, inf], [2.0, nan, nan, 3.0], [nan, nan, nan, nan]])
    logratio = torch.tensor([[inf, 1.0, -1.0, nan], [0.5, nan, inf, -0.5], [nan, nan, nan, nan]])
    mask = torch.tensor([[False, True, True, False], [True, False, False, True], [False] * 4])
    shaped = kl.kl_shaped_rewards(rewards, logratio, 0.5, mask)
    assert shaped.tolist() == [[0.0, -0.5, 2.5, 0.0], [-0.25, 0.0, 0.0, 1.25], [0.0] * 4]


def test_shaped_rewards_carry_no_gradient() -> None:
    """Else the KL term would be differentiated a second time."""
    x = torch.randn(3, 2, requires_grad=True)
    assert not kl.kl_shaped_rewards(x, x, 0.1).requires_grad


@settings(max_examples=60)
@given(
    rewards=st.lists(st.integers(-640, 640), min_size=2, max_size=5),
    shift=st.integers(-(2**17), 2**17),
    beta=st.floats(0, 2),
    seed=st.integers(0, 1000),
)
def test_a_shift_on_a_binary_grid_changes_no_bit(rewards: list[int], shift: int, beta: float, seed: int) -> None:
    r = torch.tensor(rewards) / 64
    logratio = torch.randn(len(rewards), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(kl.kl_shaped_rewards(r, logratio, beta), kl.kl_shaped_rewards(r + shift / 64, logratio, beta))


# ----------------------------------------------------------------------------------------------------------- estimators


def test_k1_and_k3_are_unbiased_and_k2_is_not() -> None:
    """Expectations under the policy, by enumeration over the vocabulary."""
    policy, ref = random_laws()
    p, d = policy.exp(), policy - ref
    exact = (p * d).sum(-1)
    torch.testing.assert_close((p * kl.k1(d)).sum(-1), exact, rtol=0, atol=1e-12)
    torch.testing.assert_close((p * kl.k3(d)).sum(-1), exact, rtol=0, atol=1e-12)
    assert ((p * kl.k2(d)).sum(-1) - exact).abs().max() > 0.1
    assert kl.k1(d).min() < 0 <= kl.k2(d).min()
    assert kl.k3(d).min() >= 0


def test_k2_agrees_to_second_order() -> None:
    policy, _ = random_laws()
    ref = (policy + 1e-3 * torch.linspace(-1, 1, policy.shape[-1], dtype=torch.float64)).log_softmax(-1)
    d = policy - ref
    exact = (policy.exp() * d).sum(-1)
    torch.testing.assert_close((policy.exp() * kl.k2(d)).sum(-1), exact, rtol=1e-2, atol=0)


def test_gradients_of_the_estimators_as_losses() -> None:
    """On the policy's own samples: k1 nothing, k2 the gradient of KL(policy || ref), k3 that of KL(ref || policy)."""
    logits = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    ref = random_laws(1, 7)[1][0]
    policy = logits.log_softmax(-1)

    def gradient(value: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    p = policy.detach().exp()
    reverse = gradient((policy.exp() * (policy - ref)).sum())
    forward = gradient((ref.exp() * (ref - policy)).sum())
    torch.testing.assert_close(gradient((p * kl.k1(policy - ref)).sum()), torch.zeros_like(logits), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient((p * kl.k2(policy - ref)).sum()), reverse, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient((p * kl.k3(policy - ref)).sum()), forward, rtol=0, atol=1e-12)


# -------------------------------------------------------------------------------------------------------- whole laws


def test_rao_blackwellised_kl_and_entropy_equal_torchs() -> None:
    policy, ref = random_laws()
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=policy), torch.distributions.Categorical(logits=ref)
    )
    torch.testing.assert_close(kl.rao_blackwellised_kl(policy, ref), expected, rtol=1e-12, atol=0)
    entropy = torch.distributions.Categorical(logits=policy).entropy()
    torch.testing.assert_close(kl.entropy(policy), entropy, rtol=1e-12, atol=0)


def test_equal_laws_have_exactly_no_divergence() -> None:
    policy = random_laws()[0].float()
    policy[:, 0] = -inf
    assert kl.rao_blackwellised_kl(policy, policy.clone()).eq(0).all()


def test_tokens_that_the_policy_never_samples_add_nothing() -> None:
    """The law of top-p sampling against the whole reference, and a token that both exclude."""
    policy = torch.tensor([[0.5, 0.5, 0.0, 0.0]], dtype=torch.float64).log()
    ref = torch.tensor([[0.25, 0.25, 0.5, 0.0]], dtype=torch.float64).log()
    assert kl.rao_blackwellised_kl(policy, ref).item() == pytest.approx(math.log(2))
    assert kl.entropy(policy).item() == pytest.approx(math.log(2))
    assert kl.rao_blackwellised_kl(ref, policy).item() == inf


def test_gradients_stay_finite_where_tokens_are_excluded() -> None:
    policy = torch.tensor([[0.5, 0.5, 0.0, 0.0]], dtype=torch.float64).log().requires_grad_()
    ref = torch.tensor([[0.25, 0.25, 0.5, 0.0]], dtype=torch.float64).log()
    (kl.rao_blackwellised_kl(policy, ref) + kl.entropy(policy)).sum().backward()
    assert policy.grad.isfinite().all()


def test_summed_along_sampled_completions_it_estimates_the_sequence_kl_without_bias() -> None:
    """By enumeration: E_policy[sum_t KL of the next-token laws] = KL of whole completions, with less spread than k1
    here."""
    tabular = TabularPolicy()
    theta, ref_theta = tabular.logits(0), tabular.logits(2)
    logprobs, ref = tabular.sequence_logprobs(theta), tabular.sequence_logprobs(ref_theta)
    per_prefix = kl.rao_blackwellised_kl(theta.log_softmax(-1), ref_theta.log_softmax(-1))
    estimate = tabular.visits.sum(-1) @ per_prefix
    p = logprobs.exp()
    exact = p @ kl.k1(logprobs - ref)
    assert (p @ estimate).item() == pytest.approx(exact.item(), rel=1e-12)
    assert estimate.min() > 0
    assert p @ (estimate - exact) ** 2 < 0.2 * p @ (logprobs - ref - exact) ** 2


# ---------------------------------------------------------------------------------------------------------- best of n


@pytest.mark.parametrize("n", [1, 2, 4, 64])
def test_best_of_n_kl_of_ten_equal_outcomes(n: int) -> None:
    """The exact law of the best of n by enumeration: F(y)^n - F(y - 1)^n. At n = 64 the bound log n - (n - 1) / n is
    3.17, the KL 2.29."""
    below = torch.arange(11, dtype=torch.float64) / 10
    law = below[1:] ** n - below[:-1] ** n
    counted = law > 0
    exact = (law[counted] * (law[counted] * 10).log()).sum().item()
    estimate = kl.best_of_n_kl(torch.full((10,), 0.1, dtype=torch.float64).log(), n)
    assert estimate.shape == (10,)
    assert (law * estimate).sum().item() == pytest.approx(exact, abs=0.12)
    if n == 1:
        assert estimate.abs().max() < 1e-12
    if n == 64:
        assert exact == pytest.approx(2.29, abs=0.005)


def test_best_of_n_kl_at_its_ends() -> None:
    """What never comes twice has the bound; what always comes has no choice; nothing in between is NaN."""
    ends = kl.best_of_n_kl(torch.tensor([-1e5, -30.0, 0.0, 1e-6]), 4)
    bound = math.log(4) - 3 / 4
    assert ends.tolist() == pytest.approx([bound, bound, 0.0, 0.0], abs=1e-9)
    between = kl.best_of_n_kl(torch.linspace(-20, 0, 2001), 4)
    assert between.isfinite().all()
    assert (between >= -1e-9).all()
    assert (between <= bound + 1e-9).all()
    with pytest.raises(ValueError, match="n must be at least 1, but it is 0"):
        kl.best_of_n_kl(torch.zeros(1), 0)
